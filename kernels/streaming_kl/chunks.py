"""The loop over chunks of tokens: logits from hidden states and heads, their losses and gradients."""

from typing import NamedTuple

import torch

from . import reference

# Default size of what all tokens of a chunk take together: 4096 tokens of Qwen3 in bfloat16 on a GPU.
LOGITS_BYTES = {"cpu": 128 * 2**20, "cuda": 2500 * 10**6}


class Plan(NamedTuple):
    """How the loop computes. Passed as separate numbers where torch.compile's operators take no tuples."""

    vocab_size: int
    chunk_tokens: int
    student_dtype: torch.dtype  # of the matrix products
    teacher_dtype: torch.dtype
    student_logits_dtype: torch.dtype  # of their results
    teacher_logits_dtype: torch.dtype


def make_plan(student_hidden, teacher_hidden, autocast, vocab_size, logits_dtype, chunk_tokens):
    student_dtype, teacher_dtype = autocast or student_hidden.dtype, autocast or teacher_hidden.dtype
    dtypes = student_dtype, teacher_dtype, logits_dtype or student_dtype, logits_dtype or teacher_dtype
    if chunk_tokens is None:
        chunk_tokens = default_chunk(vocab_size, *dtypes, student_hidden.device)
    return Plan(vocab_size, chunk_tokens, *dtypes)


def default_chunk(
    vocab_size, student_dtype, teacher_dtype, student_logits_dtype, teacher_logits_dtype, device
):
    """Tokens whose logits fill LOGITS_BYTES, counting a gradient's copy in the matrix product's dtype."""
    width = student_logits_dtype.itemsize + teacher_logits_dtype.itemsize
    if student_logits_dtype != student_dtype:
        width += student_dtype.itemsize
    if device.type == "cuda":
        tokens = LOGITS_BYTES["cuda"] // (vocab_size * width)
        return max(tokens // 128 * 128, 128)
    return max(LOGITS_BYTES["cpu"] // (vocab_size * width), 1)


def chunk_of(head):
    """How many tokens may have logits at a time, at 16 bytes a logit, in code that uses a head (V, H)."""
    return max(1, LOGITS_BYTES[head.device.type] // (16 * len(head)))


def over_chunks(
    step,
    n_columns,
    student_hidden,
    student_head,
    teacher_hidden,
    teacher_head,
    coefficient,
    plan,
    needs_hidden,
    needs_head,
):
    """Returns columns (n_columns, N), and d_hidden and d_head of sum_i c_i loss_i, empty where not needed.

    step(student_logits, teacher_logits, c) returns columns (n_columns, n), the first of them the losses, and
    the gradient (n, V) of the weighted losses, or None if c is None. It may overwrite student_logits.
    Tokens with a coefficient of 0 are left out: their columns and gradients are 0.
    """
    n_tokens, device = len(student_hidden), student_hidden.device
    exact = reference.statistics_dtype(student_hidden, teacher_hidden)
    columns = torch.zeros(n_columns, n_tokens, dtype=exact, device=device)
    d_hidden = torch.zeros_like(student_hidden) if needs_hidden else student_hidden.new_empty(0)
    d_head = torch.zeros(student_head.shape if needs_head else 0, dtype=exact, device=device)
    live = None
    if coefficient is not None:
        live = coefficient.nonzero().squeeze(1)  # here the host waits for the device
        n_tokens = len(live)
    with torch.no_grad():
        student_head = student_head[: plan.vocab_size].to(plan.student_dtype)
        teacher_head = teacher_head[: plan.vocab_size].to(plan.teacher_dtype)
        chunk_tokens = min(plan.chunk_tokens, n_tokens)
        student_buffer = aligned_buffer(chunk_tokens, plan.vocab_size, plan.student_logits_dtype, device)
        teacher_buffer = aligned_buffer(chunk_tokens, plan.vocab_size, plan.teacher_logits_dtype, device)
        for start in range(0, n_tokens, plan.chunk_tokens):
            rows = slice(start, min(start + plan.chunk_tokens, n_tokens))
            if live is not None:
                rows = live[rows]
            hidden = student_hidden[rows].to(plan.student_dtype)  # (n, H)
            student_logits = product(hidden, student_head.t(), student_buffer)  # (n, V)
            other_hidden = teacher_hidden[rows].to(plan.teacher_dtype)  # (n, H of the teacher)
            teacher_logits = product(other_hidden, teacher_head.t(), teacher_buffer)  # (n, V)
            c = None
            if needs_hidden or needs_head:
                c = columns.new_ones(len(hidden)) if coefficient is None else coefficient[rows].to(exact)
            results, gradient = step(student_logits, teacher_logits, c)
            columns[:, rows] = results.to(exact)
            if gradient is None:
                continue
            gradient = gradient.to(plan.student_dtype)  # (n, V)
            if needs_hidden:
                d_hidden[rows] = (gradient @ student_head).to(d_hidden.dtype)
            if needs_head:
                add_product(d_head[: plan.vocab_size], gradient.t(), hidden)
    return columns, d_hidden, d_head


def aligned_buffer(rows, vocab_size, dtype, device):
    """(rows, vocab_size), each row beginning at a multiple of 16 entries, for wide loads."""
    buffer = torch.empty(rows, -(-vocab_size // 16) * 16, dtype=dtype, device=device)
    buffer[:, vocab_size:] = 0  # on CPUs, torch's bfloat16 product reads some of it and lets a NaN through
    return buffer[:, :vocab_size]


def product(a, b, buffer):
    """a @ b in the first rows of the buffer; if that is float32, half-precision products are not rounded."""
    out = buffer[: len(a)]
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if a.is_cuda and out.dtype == torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def add_product(total, a, b):
    """total += a @ b in the dtype of total, float32 or wider, whatever the dtype of a and b."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda and total.dtype == torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
