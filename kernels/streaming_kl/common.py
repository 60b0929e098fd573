"""What both entry points share: the result, weights, the implementations, operators for torch.compile."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from . import reference


class KLOutput(NamedTuple):
    """Only `loss` carries a gradient. The rest: nats per token, unweighted, but 0 where the weight is 0."""

    loss: Tensor  # () for "sum" and "mean", (N,) for "none"
    fkl: Tensor  # (N,) KL(teacher||student)
    rkl: Tensor  # (N,) KL(student||teacher)
    student_entropy: Tensor  # (N,)
    teacher_entropy: Tensor  # (N,)


class Top(NamedTuple):
    """The k likeliest tokens of each position, likeliest first; 0 where the weight is 0."""

    student_logps: Tensor  # (N, k) log-probabilities at the temperature, under the whole distribution
    student_ids: Tensor  # (N, k)
    teacher_logps: Tensor  # (N, k)
    teacher_ids: Tensor  # (N, k)


def mixed_kl(statistics, fkl_weight):
    """(N,) losses from (9, N) statistics. The ends are no mixtures: 0 times an infinite KL would be NaN."""
    fkl, rkl = statistics[0], statistics[1]
    if fkl_weight == 1:
        return fkl
    if fkl_weight == 0:
        return rkl
    return fkl_weight * fkl + (1 - fkl_weight) * rkl


def weighted(x, weight):
    """x * weight, but exactly 0 where the weight is 0, whatever x is."""
    return x.clone() if weight is None else torch.where(weight == 0, 0, x * weight)


def weight_total(weight, n_tokens):
    """What "mean" divides by: the sum of the weights, or 1 if that is 0: then the losses are 0 too."""
    if weight is None:
        return max(n_tokens, 1)
    total = weight.sum()
    return torch.where(total == 0, 1, total)


def implementation(impl):
    """One of two modules with the same three functions. Triton is imported only here."""
    if impl == "torch":
        return reference
    from . import triton_kl

    return triton_kl


def opaque_operator(fake):
    """torch.compile calls the decorated function as it is, and learns the shapes of its results from `fake`.

    Outside of torch.compile the function is called directly.
    """

    def decorate(function):
        operator = torch.library.custom_op(f"streaming_kl::{function.__name__}", function, mutates_args=())
        operator.register_fake(fake)

        @functools.wraps(function)
        def call(*arguments):
            return (operator if torch.compiler.is_compiling() else function)(*arguments)

        return call

    return decorate
