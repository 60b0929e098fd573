"""linear_streaming_kl and linear_divergence: losses of two models' logits from hidden states and heads."""

import torch
from torch import Tensor

from . import reference
from .checks import (
    check_chunking,
    check_linear,
    check_options,
    check_reduction,
    check_top_k,
    choose_impl,
    common_vocabulary,
    weight_per_token,
)
from .chunks import Plan, make_plan, over_chunks
from .common import KLOutput, Top, implementation, mixed_kl, opaque_operator, weight_total, weighted

FN_TENSORS = 8  # of the size of the logits: what the Jensen-Shannon divergence takes with its gradient


def linear_streaming_kl(
    student_hidden,
    student_head,
    teacher_hidden,
    teacher_head,
    *,
    fkl_weight,
    temperature=1.0,
    weight=None,
    reduction="sum",
    vocab_size=None,
    logits_dtype=None,
    chunk_tokens=None,
    top_k=0,
    impl="auto",
):
    """KL between the logits hidden @ head.T of two models, with gradients for the student's hidden and head.

    hidden is (N, H) and head (V, H), as in nn.Linear; H may differ between the models. Returns a KLOutput.
    temperature, weight, reduction, vocab_size and impl as in streaming_kl; tokens of weight 0 cost nothing
    (finding them makes the host wait for the device once).

    logits_dtype   by default float32, which is how half-precision products are summed, or float64 for float64
                   inputs. torch.bfloat16 rounds logits as a bfloat16 nn.Linear does: half the memory, but the
                   rounding can shift a KL of 1e-3 by half of it
    chunk_tokens   how many tokens have logits at a time; the default fills chunks.LOGITS_BYTES
    top_k          above 0: returns (KLOutput, Top), from the same logits the likeliest tokens of both models

    Under autocast, hidden states and heads are cast to its dtype, as nn.Linear does.
    """
    check_options(fkl_weight, temperature)
    check_top_k(top_k, vocab_size or min(len(student_head), len(teacher_head)))
    impl = choose_impl(impl, student_hidden, teacher_hidden)
    options = float(fkl_weight), float(temperature), top_k, impl

    def run(*tensors, plan, needs):
        return linear_kl(*tensors, *plan, *needs, *options)

    tensors = student_hidden, student_head, teacher_hidden, teacher_head
    *out, logps, ids = _reduced(run, tensors, weight, reduction, logits_dtype, chunk_tokens, vocab_size)
    return (KLOutput(*out), Top(logps[0], ids[0], logps[1], ids[1])) if top_k else KLOutput(*out)


def linear_divergence(
    fn,
    student_hidden,
    student_head,
    teacher_hidden,
    teacher_head,
    *,
    weight=None,
    reduction="sum",
    logits_dtype=None,
    chunk_tokens=None,
):
    """Any torch function of logits, with the memory and gradients of linear_streaming_kl. Returns the loss.

    fn(student_logits, teacher_logits) -> (n,) losses sees the (n, V) logits of some tokens, in float32 (or
    what logits_dtype says), and must treat each token by itself:

        def total_variation(student_logits, teacher_logits):
            return (teacher_logits.softmax(-1) - student_logits.softmax(-1)).abs().sum(-1) / 2

        loss = linear_divergence(total_variation, student_hidden, student_head, teacher_hidden, teacher_head)

    The default chunk leaves room for FN_TENSORS tensors of n x V, among them what autograd saves for fn. If
    fn takes more, or far less, set chunk_tokens.
    """

    def step(student_logits, teacher_logits, c, rows, out):
        if c is None:
            return fn(student_logits, teacher_logits).unsqueeze(0)
        with torch.enable_grad():
            student_logits = student_logits.detach().requires_grad_()  # out may share its memory
            losses = fn(student_logits, teacher_logits)
            if getattr(losses, "shape", None) != student_logits.shape[:1] or not losses.requires_grad:
                raise ValueError(
                    f"fn must return {len(student_logits)} losses with gradients, not {losses!r}"
                )
            (gradient,) = torch.autograd.grad(losses, student_logits, c.to(losses.dtype))
        losses = losses.detach().clone()  # fn may return a column of the logits that out overwrites
        out.copy_(gradient)
        return losses.unsqueeze(0)

    def run(*tensors, plan, needs):
        return over_chunks(step, 1, *tensors, plan, *needs)

    tensors = student_hidden, student_head, teacher_hidden, teacher_head
    (loss,) = _reduced(run, tensors, weight, reduction, logits_dtype, chunk_tokens, extra_tensors=FN_TENSORS)
    return loss


def _reduced(run, tensors, weight, reduction, logits_dtype, chunk_tokens, vocab_size=None, extra_tensors=0):
    """The loss, the columns after the first, (N,) each, and what else run returns.

    run(*tensors, coefficient, plan=, needs=) is over_chunks with a step, and may return more tensors.
    """
    check_reduction(reduction)
    check_chunking(chunk_tokens, logits_dtype)
    student_hidden, student_head, teacher_hidden, teacher_head = tensors
    device = student_hidden.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    check_linear(*tensors, autocast)
    vocab_size = common_vocabulary(vocab_size, len(student_head), len(teacher_head))
    weight = weight_per_token(weight, student_hidden)
    dtypes = autocast or student_hidden.dtype, autocast or teacher_hidden.dtype
    plan = make_plan(dtypes, logits_dtype, vocab_size, chunk_tokens, extra_tensors, student_hidden.device)
    needs = [torch.is_grad_enabled() and x.requires_grad for x in (student_hidden, student_head)]
    function = _TwoPasses if reduction == "none" else _OnePass
    loss, *rest = function.apply(*tensors, weight, run, plan, needs)
    if reduction == "mean":
        loss = loss / weight_total(weight, len(student_hidden))
    return loss, *rest


class _OnePass(torch.autograd.Function):
    """sum_i w_i loss_i. Its upstream gradient is one number, so forward computes the gradients unscaled."""

    @staticmethod
    def forward(ctx, student_hidden, student_head, teacher_hidden, teacher_head, weight, run, plan, needs):
        tensors = student_hidden, student_head, teacher_hidden, teacher_head
        coefficient, ctx.scale = _normalised(weight)
        columns, d_hidden, d_head, *more = run(*tensors, coefficient, plan=plan, needs=needs)
        ctx.save_for_backward(d_hidden, d_head)
        ctx.needs, ctx.dtypes = needs, (student_hidden.dtype, student_head.dtype)
        losses, *metrics = columns.unbind()
        ctx.mark_non_differentiable(*metrics, *more)
        return weighted(losses, weight).sum(), *metrics, *more

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream, *_):
        d_hidden, d_head = _gradients(ctx.saved_tensors, upstream * ctx.scale, ctx.dtypes, ctx.needs)
        return d_hidden, d_head, *[None] * 6


class _TwoPasses(torch.autograd.Function):
    """(N,) losses w_i loss_i. Their upstream gradients come with backward, which recomputes the logits."""

    @staticmethod
    def forward(ctx, student_hidden, student_head, teacher_hidden, teacher_head, weight, run, plan, needs):
        tensors = student_hidden, student_head, teacher_hidden, teacher_head
        columns, _, _, *more = run(*tensors, weight, plan=plan, needs=[False, False])
        ctx.save_for_backward(*tensors, weight)
        ctx.run, ctx.plan, ctx.needs = run, plan, needs
        losses, *metrics = columns.unbind()
        ctx.mark_non_differentiable(*metrics, *more)
        return weighted(losses, weight), *metrics, *more

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream, *_):
        *tensors, weight = ctx.saved_tensors
        coefficient, scale = _normalised(weighted(upstream, weight))
        _, *unscaled = ctx.run(*tensors, coefficient, plan=ctx.plan, needs=ctx.needs)
        d_hidden, d_head = _gradients(unscaled[:2], scale, [x.dtype for x in tensors[:2]], ctx.needs)
        return d_hidden, d_head, *[None] * 6


def _normalised(weight):
    """weight / max |weight|, and the maximum: weights of 1 / N would underflow in a float16 gradient."""
    if weight is None:
        return None, 1.0
    scale = torch.cat([weight.abs(), weight.new_zeros(1)]).amax()  # also of no tokens
    return weight / torch.where(scale == 0, 1, scale), scale


def _gradients(unscaled, scale, dtypes, needs):
    """Each gradient times the scale, rounded once to its dtype; None where it is not needed.

    New tensors without a float32 copy: a second backward finds the saved ones as they were.
    """
    scale = scale.reshape(1, 1)  # a 0-dimensional factor would first be rounded to the gradient's dtype
    results = []
    for gradient, dtype, need in zip(unscaled, dtypes, needs):
        out = torch.empty_like(gradient, dtype=dtype) if need else None
        results.append(torch.mul(gradient, scale, out=out) if need else None)
    return results


def _linear_kl_fake(student_hidden, student_head, teacher_hidden, *options):
    needs_hidden, needs_head, _, _, top_k, _ = options[-6:]
    n_tokens, exact = len(student_hidden), reference.statistics_dtype(student_hidden, teacher_hidden)
    return (
        student_hidden.new_empty(5, n_tokens, dtype=exact),
        torch.empty_like(student_hidden) if needs_hidden else student_hidden.new_empty(0),
        student_head.new_empty(student_head.shape if needs_head else 0, dtype=exact),
        student_hidden.new_empty(2, n_tokens, top_k, dtype=exact),
        student_hidden.new_empty(2, n_tokens, top_k, dtype=torch.long),
    )


@opaque_operator(_linear_kl_fake)
def linear_kl(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    coefficient: Tensor | None,
    vocab_size: int,
    chunk_tokens: int,
    student_dtype: torch.dtype,
    teacher_dtype: torch.dtype,
    student_logits_dtype: torch.dtype,
    teacher_logits_dtype: torch.dtype,
    needs_hidden: bool,
    needs_head: bool,
    fkl_weight: float,
    temperature: float,
    top_k: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """over_chunks with the KL as its step: columns (5, N) are the loss and the four metrics.

    Then the top_k likeliest tokens of student and teacher: log-probabilities and ids, (2, N, top_k) each.
    """
    kernels = implementation(impl)
    exact = reference.statistics_dtype(student_hidden, teacher_hidden)
    top_logps = torch.zeros(2, len(student_hidden), top_k, dtype=exact, device=student_hidden.device)
    top_ids = torch.zeros_like(top_logps, dtype=torch.long)

    def step(student_logits, teacher_logits, c, rows, out):
        tops = [logits.topk(top_k) for logits in (student_logits, teacher_logits) if top_k]
        if c is None:
            numbers = kernels.statistics(student_logits, teacher_logits, None, temperature)
        else:
            numbers = kernels.fused(student_logits, teacher_logits, c, fkl_weight, temperature, out)
        stats = reference.Stats(*numbers)
        for i, (top, d) in enumerate(zip(tops, (stats.d_s, stats.d_t))):
            logits = top.values.to(exact)
            top_logps[i, rows] = (logits - logits[:, :1]) / temperature - d.log().unsqueeze(1)
            top_ids[i, rows] = top.indices
        return torch.stack([mixed_kl(numbers, fkl_weight), *numbers[:4]])

    logits_dtypes = student_logits_dtype, teacher_logits_dtype
    plan = Plan(vocab_size, chunk_tokens, student_dtype, teacher_dtype, *logits_dtypes)
    tensors = student_hidden, student_head, teacher_hidden, teacher_head
    return *over_chunks(step, 5, *tensors, coefficient, plan, needs_hidden, needs_head), top_logps, top_ids
