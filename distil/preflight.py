"""Can this teacher and this student work together? Checks before the first step, and as a command of its own."""

import math

import torch

from distil.artifacts import refuse
from distil.diagnostics import overlap
from distil.models import load_model, model_dir, output_head, response_hidden, top_tokens
from distil.prompts import (
    load_tokenizer,
    prompt_text,
    render_prompt,
    stop_ids,
    template_sha256,
    tokenizer_sha256,
)
from distil.sampling import Sampling, sample
from distil.teacher import Signal
from streaming_kl import linear_streaming_kl

PROBES = [
    "What is 17 * 23?",
    "A train covers 120 km in 1.5 hours. What is its average speed in km/h?",
    "If 3x + 5 = 20, what is x?",
    "How many positive divisors does 36 have?",
]


def check_tokenizers(tokenizer, flag, other_sha256, other_flag):
    """Refuse two tokenizers whose ids mean different tokens: a KL over their vocabularies would compare unrelated words."""
    if tokenizer_sha256(tokenizer) != other_sha256:
        refuse(
            f"{flag} and {other_flag} have different tokenizers (their maps from tokens to ids differ); "
            "distillation over the vocabulary needs one tokenizer for both"
        )


def match_tokenizers(args, student, teacher, flag):
    """Same ids, and the same prompt around a problem; with --take_template the student takes the other's template, in place."""
    check_tokenizers(student, "--student", tokenizer_sha256(teacher), flag)
    if template_sha256(student) != template_sha256(teacher):
        if not args.take_template:
            refuse(
                f"--student and {flag} have different prompt templates: the teacher would score prompts that it was not "
                "trained on; --take_template gives the student the teacher's"
            )
        student.chat_template = teacher.chat_template
        print(f"--take_template: the student's prompt template is now that of {flag}")


def check_pair(student, student_stops, teacher_stops, student_rows, teacher_rows):
    """Lines of the preflight that need no forward pass: [(what, finding, warning or "")]. student: its tokenizer; rows: of the output
    heads. Different token maps are refused before, by match_tokenizers."""
    size = len(student)
    if min(student_rows, teacher_rows) < size:
        refuse(
            f"preflight: the output heads have {student_rows} (student) and {teacher_rows} (teacher) rows, but the tokenizer has "
            f"{size} tokens"
        )
    end = (
        ""
        if student_stops == teacher_stops
        else (
            "they end differently: a student that is taught another end than it samples grows to the length limit; "
            "keep --stop_ids both, or choose one side"
        )
    )
    prompt = prompt_text(student, "PROBLEM")
    thinking = (
        ""
        if "<think>" not in prompt or "</think>" in prompt
        else "the prompt opens a <think> block although thinking is off"
    )
    return [
        ("token maps", f"equal, {size} tokens", ""),
        (
            "padded rows",
            f"student {student_rows - size}, teacher {teacher_rows - size}; masked in loss and sampling",
            "",
        ),
        (
            "stop ids",
            "student {}, teacher {}".format(
                *map(student.convert_ids_to_tokens, (student_stops, teacher_stops))
            ),
            end,
        ),
        ("prompt", repr(prompt), thinking),
    ]


@torch.no_grad()
def check_signal(student_hidden, student_head, teacher, k):
    """Lines of the preflight over a few responses; a teacher without a signal is refused."""
    if teacher.hidden is None:
        return [("distributions", "not known from this --signal", "")]
    top = math.log(len(teacher.head))
    self_kl = (
        linear_streaming_kl(teacher.hidden, teacher.head, teacher.hidden, teacher.head, fkl_weight=1.0)
        .fkl.abs()
        .max()
        .item()
    )
    out = linear_streaming_kl(student_hidden, student_head, teacher.hidden, teacher.head, fkl_weight=1.0)
    numbers = {
        name: getattr(out, name).mean().item()
        for name in ("fkl", "rkl", "student_entropy", "teacher_entropy")
    }
    if not all(map(math.isfinite, [self_kl, *numbers.values()])) or self_kl > 1e-3:
        refuse(
            f"preflight: the distributions are not sound: KL of the teacher with itself {self_kl}, {numbers}"
        )
    if numbers["teacher_entropy"] > 0.98 * top:
        refuse(
            f"preflight: the teacher's entropy is {numbers['teacher_entropy']:.3f} nats, a uniform distribution's is {top:.3f}: "
            "its weights are missing or not trained"
        )
    tops = *top_tokens(student_hidden, student_head, k), *top_tokens(teacher.hidden, teacher.head, k)
    ratio = overlap(*tops)["overlap_ratio"].mean().item()
    far = (
        ""
        if ratio >= 0.5
        else "far apart (0.7 is a usual start): first train on the teacher's rollouts, and align the prompts"
    )
    return [
        ("KL of teacher with itself", f"{self_kl:.1e} nats", ""),
        (
            "KL teacher||student",
            f"{numbers['fkl']:.4f} nats; reverse {numbers['rkl']:.4f}",
            "" if numbers["fkl"] > 1e-6 else "none: teacher and student are the same",
        ),
        (
            "entropies",
            f"student {numbers['student_entropy']:.3f}, teacher {numbers['teacher_entropy']:.3f} of {top:.3f} nats",
            "",
        ),
        (f"overlap of the top {k}", f"{ratio:.3f}", far),
    ]


def print_preflight(lines):
    for what, finding, warning in lines:
        print(f"preflight: {what:26} {finding}" + (f"   WARNING: {warning}" if warning else ""), flush=True)


def preflight(args):
    """The preflight as a command of its own: the student answers a few problems, and both models are compared on its answers."""
    student_dir, teacher_dir = model_dir(args.student, "--student"), model_dir(args.teacher, "--teacher")
    tokenizer, teacher_tokenizer = (
        load_tokenizer(student_dir, "--student"),
        load_tokenizer(teacher_dir, "--teacher"),
    )
    check_tokenizers(tokenizer, "--student", tokenizer_sha256(teacher_tokenizer), "--teacher")
    student, teacher = (
        load_model(student_dir, "--student", args.dtype),
        load_model(teacher_dir, "--teacher", args.dtype),
    )
    heads = [
        output_head(model, flag).detach() for model, flag in ((student, "--student"), (teacher, "--teacher"))
    ]
    stops = [stop_ids(tokenizer, student_dir), stop_ids(teacher_tokenizer, teacher_dir)]
    lines = check_pair(tokenizer, *stops, *map(len, heads))
    if template_sha256(tokenizer) != template_sha256(teacher_tokenizer):
        lines.append(
            (
                "prompt of the teacher",
                repr(prompt_text(teacher_tokenizer, "PROBLEM")),
                "another template than the student's: train.py refuses the pair unless --take_template is given",
            )
        )
    prompts = [render_prompt(teacher_tokenizer, problem) for problem in PROBES]
    sampling = Sampling(1, 1.0, 1.0, 0, 64, sorted({*stops[0], *stops[1]}), len(tokenizer))
    responses = [group[0].response_ids for group in sample(student, prompts, sampling, seed=0)]
    with torch.no_grad():
        hidden = [response_hidden(model, prompts, responses) for model in (student, teacher)]
    heads = [head[: len(tokenizer)] for head in heads]
    print_preflight(
        lines + check_signal(hidden[0], heads[0], Signal(hidden[1], heads[1]), min(args.k, len(tokenizer)))
    )
