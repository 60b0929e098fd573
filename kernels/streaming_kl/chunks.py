"""The loop over chunks of tokens: logits from hidden states and heads, their losses and gradients."""

from typing import NamedTuple

import torch

from . import reference

# What the tokens of a chunk may take together by default. On a GPU it holds 1536 tokens of Qwen3 in bfloat16
# with float32 logits, or 4096 with bfloat16 logits.
LOGITS_BYTES = {"cpu": 128 * 2**20, "cuda": 2500 * 10**6}


class Plan(NamedTuple):
    """How the loop computes. Passed as separate numbers where torch.compile's operators take no tuples."""

    vocab_size: int
    chunk_tokens: int
    student_dtype: torch.dtype  # of the matrix products
    teacher_dtype: torch.dtype
    student_logits_dtype: torch.dtype  # of their results
    teacher_logits_dtype: torch.dtype


def make_plan(product_dtypes, logits_dtype, vocab_size, chunk_tokens, extra_tensors, device):
    """product_dtypes: of the student's and of the teacher's hidden states and heads.

    Logits are float32, or float64 for float64 inputs, unless logits_dtype says otherwise.
    """
    logits_dtypes = [logits_dtype or torch.promote_types(dtype, torch.float32) for dtype in product_dtypes]
    if chunk_tokens is None:
        chunk_tokens = default_chunk(product_dtypes, logits_dtypes, vocab_size, extra_tensors, device)
    return Plan(vocab_size, chunk_tokens, *product_dtypes, *logits_dtypes)


def default_chunk(product_dtypes, logits_dtypes, vocab_size, extra_tensors, device):
    """Tokens whose logits fill LOGITS_BYTES together with copies of them and extra tensors of their size."""
    width = sum(dtype.itemsize for dtype in logits_dtypes) + extra_tensors * logits_dtypes[0].itemsize
    if logits_dtypes[0] != product_dtypes[0]:
        width += product_dtypes[0].itemsize  # the gradient, for the products that follow
    pairs = zip(product_dtypes, logits_dtypes)
    width += max(product.itemsize if rounds(product, logits) else 0 for product, logits in pairs)
    if device.type == "cuda":
        tokens = LOGITS_BYTES["cuda"] // (vocab_size * width)
        return max(tokens // 128 * 128, 128)
    if rounds(torch.float32, product_dtypes[0]):
        width += torch.float32.itemsize  # the gradient again: see add_product
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

    step(student_logits, teacher_logits, c, rows, out) returns columns (n_columns, n), the first of them the
    losses. Unless c is None, it writes the gradient (n, V) of the weighted losses into out, which may be
    student_logits. rows: what indexes its n tokens among all N.
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
        gradient_buffer = student_buffer
        if (needs_hidden or needs_head) and plan.student_logits_dtype != plan.student_dtype:
            gradient_buffer = aligned_buffer(chunk_tokens, plan.vocab_size, plan.student_dtype, device)
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
            gradient = gradient_buffer[: len(hidden)]  # (n, V)
            columns[:, rows] = step(student_logits, teacher_logits, c, rows, gradient).to(exact)
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


def rounds(product_dtype, logits_dtype):
    """Whether some numbers of the first have no equal in the second."""
    return torch.promote_types(product_dtype, logits_dtype) != logits_dtype


def product(a, b, buffer):
    """a @ b in the first rows of the buffer, in its dtype. Half precision is summed in float32."""
    out = buffer[: len(a)]
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if rounds(a.dtype, out.dtype):
        rounded = aligned_buffer(*out.shape, a.dtype, a.device)
        return out.copy_(torch.mm(a, b, out=rounded))
    if a.is_cuda and out.dtype == torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def add_product(total, a, b):
    """total += a @ b in the dtype of total, float32 or wider, whatever the dtype of a and b."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda and total.dtype == torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:  # CPUs have no products of half precision with a float32 result
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
