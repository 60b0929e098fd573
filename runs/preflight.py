"""Can this teacher teach this student? Checked before the first step, and by score_teacher.py --preflight."""

import math

import torch

from distil.artifacts import refuse
from distil.models import forward, output_head
from distil.prompts import prompt_text
from runs.diagnostics import overlap
from streaming_kl import linear_streaming_kl


def preflight(
    student, tokenizer, vocab_size, student_stops, teacher, teacher_stops, responses, k, dtype, prompting
):
    """Compare both models on a few Responses, print what is found, refuse a teacher without a signal.

    student: the model; teacher: a teacher.Teacher; the tokenizers were matched before."""
    padding = [rows - vocab_size for rows in (len(output_head(student)), teacher.head_rows)]
    findings = check_pair(tokenizer, student_stops, teacher_stops, *padding, prompting)
    with torch.no_grad():
        hidden, head = forward(student, responses, vocab_size, dtype)
    if ids := responses[0].teacher_prompt_ids:
        findings.append(("teacher's prompt", repr(tokenizer.decode(ids)), ""))
    findings += check_signal(hidden, head, teacher.signal(responses), k)
    for what, finding, warning in findings:
        print(f"preflight: {what:26} {finding}" + (f"   WARNING: {warning}" if warning else ""), flush=True)


def check_pair(tokenizer, student_stops, teacher_stops, student_padding, teacher_padding, prompting):
    """[(what, finding, warning or "")] of what needs no forward pass. padding: rows of the output heads."""
    end_tokens = [tokenizer.convert_ids_to_tokens(stops) for stops in (student_stops, teacher_stops)]
    prompt = prompt_text(tokenizer, "PROBLEM" + prompting.prompt_suffix, prompting)
    end = prompt.rpartition("PROBLEM" + prompting.prompt_suffix)[2]
    end_warning = thinking_warning = ""
    if student_stops != teacher_stops:
        end_warning = "they end differently: keep --stop_ids both, or responses grow to the length limit"
    if "<think>" in end and ("</think>" in end) == (prompting.thinking == "on"):
        does = "closes" if "</think>" in end else "opens"
        thinking_warning = f"the prompt {does} a <think> block although thinking is {prompting.thinking}"
    padding = f"student {student_padding}, teacher {teacher_padding}; masked in loss and sampling"
    return [
        ("token maps", f"equal, {len(tokenizer)} tokens", ""),
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
    out, top = linear_streaming_kl(hidden, head, signal.hidden, signal.head, fkl_weight=1.0, top_k=k)
    fkl, rkl, student_entropy, teacher_entropy = (values.mean().item() for values in out[1:])
    numbers = (self_kl, fkl, rkl, student_entropy, teacher_entropy)
    if not all(map(math.isfinite, numbers)) or self_kl > 1e-3:
        kls = f"KL of the teacher with itself {self_kl}, to the student {fkl}, reverse {rkl}"
        refuse(f"preflight: not sound: {kls}; entropies {student_entropy} (student), {teacher_entropy}")
    if teacher_entropy > 0.98 * uniform:
        uniform_too = f"{teacher_entropy:.3f} nats, a uniform distribution has {uniform:.3f}"
        refuse(f"preflight: the teacher's entropy is {uniform_too}: its weights are missing or not trained")
    ratio = overlap(top)["overlap_ratio"].mean().item()
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
