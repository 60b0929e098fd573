"""streaming_kl: the loss and its gradient from two tensors of logits."""

import torch
from torch import Tensor

from . import reference
from .checks import (
    check_logits,
    check_options,
    check_reduction,
    choose_impl,
    common_vocabulary,
    weight_per_token,
)
from .common import KLOutput, implementation, mixed_kl, opaque_operator, weight_total, weighted


def streaming_kl(
    student_logits,
    teacher_logits,
    *,
    fkl_weight,
    temperature=1.0,
    weight=None,
    reduction="sum",
    vocab_size=None,
    impl="auto",
    inplace_backward=False,
):
    """KL between two tensors of logits (N, V), with gradients for the student's. Returns a KLOutput.

    Logits are float32, float16, bfloat16 or, with torch, float64; the two models' may differ.

    weight            (N,), float or bool; tokens of weight 0 are never read and get a gradient of exactly 0
    reduction         "sum", "mean" (over the sum of the weights; 0 if that is 0) or "none"
    vocab_size        entries from here on are padding in both models: probability 0, gradient 0
    impl              "torch", "triton", or "auto": triton for CUDA tensors
    inplace_backward  backward writes the gradient over student_logits, which nothing else may need then; a
                      second backward raises
    """
    check_options(fkl_weight, temperature)
    check_reduction(reduction)
    check_logits(student_logits, teacher_logits)
    vocab_size = common_vocabulary(vocab_size, student_logits.shape[1], teacher_logits.shape[1])
    weight = weight_per_token(weight, student_logits)
    impl = choose_impl(impl, student_logits, teacher_logits)
    if inplace_backward and torch.compiler.is_compiling():
        raise ValueError(
            "inplace_backward=True writes over an input, which torch.compile does not allow: leave it False"
        )
    options = float(fkl_weight), float(temperature), vocab_size, impl
    losses, *metrics = _StreamingKL.apply(student_logits, teacher_logits, weight, options, inplace_backward)
    loss = losses if reduction == "none" else losses.sum()
    if reduction == "mean":
        loss = loss / weight_total(weight, len(losses))
    return KLOutput(loss, *metrics)


class _StreamingKL(torch.autograd.Function):
    """(N,) weighted losses, then the four metrics."""

    @staticmethod
    def forward(ctx, student_logits, teacher_logits, weight, options, inplace):
        fkl_weight, temperature, vocab_size, impl = options
        numbers = statistics(student_logits, teacher_logits, weight, temperature, vocab_size, impl)
        ctx.save_for_backward(student_logits, teacher_logits, weight, numbers)
        ctx.options, ctx.inplace, ctx.overwritten = options, inplace, False
        # copies: what the caller does to them must not reach the backward
        metrics = numbers[:4].clone().unbind()
        ctx.mark_non_differentiable(*metrics)
        return weighted(mixed_kl(numbers, fkl_weight), weight), *metrics

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream, *_):
        if ctx.overwritten:
            raise RuntimeError(
                "a second backward, but inplace_backward=True has written the first gradient over the logits"
            )
        student_logits, teacher_logits, weight, numbers = ctx.saved_tensors
        coefficient = weighted(upstream, weight)
        inputs = student_logits.detach(), teacher_logits, numbers, coefficient, *ctx.options
        if ctx.inplace:
            ctx.overwritten = True
            result = inputs[0]
            write_gradient(*inputs, out=result)
            # whoever else saved the logits for a backward must get an error
            torch.autograd.graph.increment_version(student_logits)
        else:
            result = gradient(*inputs)
        return result, None, None, None, None


def _statistics_fake(student_logits, teacher_logits, *_):
    dtype = reference.statistics_dtype(student_logits, teacher_logits)
    return student_logits.new_empty(len(reference.Stats._fields), len(student_logits), dtype=dtype)


@opaque_operator(_statistics_fake)
def statistics(
    student_logits: Tensor,
    teacher_logits: Tensor,
    weight: Tensor | None,
    temperature: float,
    vocab_size: int,
    impl: str,
) -> Tensor:
    """(9, N), the rows that reference.Stats names."""
    student, teacher = student_logits[:, :vocab_size], teacher_logits[:, :vocab_size]
    return implementation(impl).statistics(student, teacher, weight, temperature)


def _gradient_fake(student_logits, *_):
    return torch.empty_like(student_logits)


@opaque_operator(_gradient_fake)
def gradient(
    student_logits: Tensor,
    teacher_logits: Tensor,
    statistics: Tensor,
    coefficient: Tensor,
    fkl_weight: float,
    temperature: float,
    vocab_size: int,
    impl: str,
) -> Tensor:
    """(N, V) gradient of sum_i coefficient_i loss_i."""
    out = torch.empty_like(student_logits)
    write_gradient(
        student_logits,
        teacher_logits,
        statistics,
        coefficient,
        fkl_weight,
        temperature,
        vocab_size,
        impl,
        out,
    )
    return out


def write_gradient(
    student_logits, teacher_logits, statistics, coefficient, fkl_weight, temperature, vocab_size, impl, out
):
    """The same into `out` (N, V), which may be student_logits itself."""
    student, teacher = student_logits[:, :vocab_size], teacher_logits[:, :vocab_size]
    target = out[:, :vocab_size]
    implementation(impl).gradient(student, teacher, statistics, coefficient, fkl_weight, temperature, target)
    out[:, vocab_size:] = 0
