"""Can this teacher teach this student? Checked before the first step, and by score_teacher.py --preflight."""

import math

import torch

from distil.artifacts import refuse
from distil.diagnostics import overlap, teacher_top
from distil.models import forward, output_head, top_tokens
from distil.prompts import prompt_text, template_sha256, tokenizer_sha256
from streaming_kl import linear_streaming_kl


def check_tokenizers(tokenizer, flag, other_sha256, other_flag):
    """Refuse two tokenizers whose ids mean different tokens: a KL would compare unrelated words."""
    if tokenizer_sha256(tokenizer) != other_sha256:
        refuse(
            f"{flag} and {other_flag} have different tokenizers (their maps from tokens to ids differ); "
            "distillation over the vocabulary needs one tokenizer for both"
        )


def match_tokenizers(student, teacher, flag, take_template):
    """Refuse different ids, and different prompt templates unless take_template gives the student the other.

    student, teacher: tokenizers; the student's is changed in place. flag: where the teacher's comes from."""
    check_tokenizers(student, "--student", tokenizer_sha256(teacher), flag)
    if template_sha256(student) == template_sha256(teacher):
        return
    if not take_template:
        refuse(
            f"--student and {flag} have different prompt templates: the teacher would score prompts that it "
            "was not trained on; --take_template gives the student the teacher's"
        )
    student.chat_template = teacher.chat_template
    print(f"--take_template: the student's prompt template is now that of {flag}")


def preflight(student, tokenizer, student_stops, teacher, teacher_stops, responses, k, dtype):
    """Compare both models on a few Responses, print what is found, refuse a teacher without a signal.

    student: the model; teacher: a teacher.Teacher; the tokenizers were matched before."""
    size, rows = len(tokenizer), len(output_head(student))
    findings = check_pair(tokenizer, student_stops, teacher_stops, rows, teacher.head_rows or size)
    with torch.no_grad():
        hidden, head = forward(student, responses, size, dtype)
    findings += check_signal(hidden, head, teacher.signal(responses), k)
    for what, finding, warning in findings:
        print_finding(what, finding, warning)


def print_finding(what, finding, warning):
    print(f"preflight: {what:26} {finding}" + (f"   WARNING: {warning}" if warning else ""), flush=True)


def check_pair(tokenizer, student_stops, teacher_stops, student_rows, teacher_rows):
    """[(what, finding, warning or "")] of what needs no forward pass. rows: of the output heads."""
    size = len(tokenizer)
    if min(student_rows, teacher_rows) < size:
        refuse(
            f"preflight: the output heads have {student_rows} (student) and {teacher_rows} (teacher) rows, "
            f"but the tokenizer has {size} tokens"
        )
    end_tokens = [tokenizer.convert_ids_to_tokens(stops) for stops in (student_stops, teacher_stops)]
    prompt = prompt_text(tokenizer, "PROBLEM")
    end_warning = thinking_warning = ""
    if student_stops != teacher_stops:
        end_warning = (
            "they end differently: a student that learns an end token it does not stop at grows to the "
            "length limit; keep --stop_ids both, or choose one side"
        )
    if "<think>" in prompt and "</think>" not in prompt:
        thinking_warning = "the prompt opens a <think> block although thinking is off"
    padding = f"student {student_rows - size}, teacher {teacher_rows - size}; masked in loss and sampling"
    return [
        ("token maps", f"equal, {size} tokens", ""),
        ("padded rows", padding, ""),
        ("stop ids", f"student {end_tokens[0]}, teacher {end_tokens[1]}", end_warning),
        ("prompt", repr(prompt), thinking_warning),
    ]


@torch.no_grad()
def check_signal(hidden, head, signal, k):
    """[(what, finding, warning or "")] of the distributions at N positions; hidden, head: the student's."""
    if signal.hidden is None:
        return [("distributions", "not known from this --signal", "")]
    uniform = math.log(len(signal.head))
    teacher_itself = (signal.hidden, signal.head, signal.hidden, signal.head)
    self_kl = linear_streaming_kl(*teacher_itself, fkl_weight=1.0).fkl.abs().max().item()
    out = linear_streaming_kl(hidden, head, signal.hidden, signal.head, fkl_weight=1.0)
    fkl, rkl, student_entropy, teacher_entropy = (values.mean().item() for values in out[1:])
    numbers = (self_kl, fkl, rkl, student_entropy, teacher_entropy)
    if not all(map(math.isfinite, numbers)) or self_kl > 1e-3:
        refuse(
            f"preflight: the distributions are not sound: KL of the teacher with itself {self_kl}, to the "
            f"student {fkl}, reverse {rkl}; entropies {student_entropy} (student), {teacher_entropy}"
        )
    if teacher_entropy > 0.98 * uniform:
        refuse(
            f"preflight: the teacher's entropy is {teacher_entropy:.3f} nats, a uniform distribution has "
            f"{uniform:.3f}: its weights are missing or not trained"
        )
    ratio = overlap(*top_tokens(hidden, head, k), *teacher_top(signal, k))["overlap_ratio"].mean().item()
    same = far = ""
    if fkl <= 1e-6:
        same = "none: teacher and student are the same"
    if ratio < 0.5:
        far = "far apart (0.7 is a usual start): first train on the teacher's rollouts, and align the prompts"
    entropies = f"student {student_entropy:.3f}, teacher {teacher_entropy:.3f} of {uniform:.3f} nats"
    return [
        ("KL of teacher with itself", f"{self_kl:.1e} nats", ""),
        ("KL teacher||student", f"{fkl:.4f} nats; reverse {rkl:.4f}", same),
        ("entropies", entropies, ""),
        (f"overlap of the top {k}", f"{ratio:.3f}", far),
    ]
