"""linear_divergence, and the examples of kernels/README.md: the Jensen-Shannon divergence must be exact."""

import re
from pathlib import Path

import pytest
import torch

from kernel_helpers import DEVICE, MARKS, assert_close, exact_logits, heads, randn, rounding
from streaming_kl import linear_divergence, linear_streaming_kl

pytestmark = MARKS
README = Path(__file__).parent.parent / "kernels" / "README.md"


@pytest.fixture(scope="module")
def example():
    """The names that the README's blocks of Python define, run one after the other."""
    names = {}
    for block in re.findall(r"(?ms)^```python\n(.*?)^```", README.read_text(encoding="utf-8")):
        exec(block, names)  # noqa: S102
    return names


def kl(log_a, log_b):
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def forward_kl(student_logits, teacher_logits):
    return kl(teacher_logits.log_softmax(-1), student_logits.log_softmax(-1))


def reverse_kl(student_logits, teacher_logits):
    return kl(student_logits.log_softmax(-1), teacher_logits.log_softmax(-1))


def total_variation(student_logits, teacher_logits):
    return (student_logits.softmax(-1) - teacher_logits.softmax(-1)).abs().sum(-1) / 2


def one_logit(student_logits, teacher_logits):
    return student_logits[:, 3]  # shares the memory that the gradient is written into


def true_jensen_shannon(student_logits, teacher_logits):
    p, q = teacher_logits.double().softmax(-1), student_logits.double().softmax(-1)
    m = (p + q) / 2
    return (torch.special.xlogy(p, p / m) + torch.special.xlogy(q, q / m)).sum(-1) / 2


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("fn", [forward_kl, reverse_kl, total_variation, one_logit])
def test_any_function_of_logits(fn, reduction):
    """Against plain autograd in float64; the KLs against linear_streaming_kl too."""
    tensors, weight = heads(n=11), torch.linspace(0, 1, 11, device=DEVICE)
    options = {"weight": weight, "reduction": reduction}
    loss = linear_divergence(fn, *tensors, **options, chunk_tokens=4)
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]
    losses = fn(exact[0] @ exact[1].T, exact[2] @ exact[3].T) * weight
    expected = {"sum": losses.sum(), "mean": losses.sum() / weight.double().sum(), "none": losses}[reduction]
    assert_close(loss, expected)
    upstream = 3 if reduction != "none" else randn(11, seed=9)
    gradients = torch.autograd.grad((loss * upstream).sum(), tensors[:2])
    assert_close(gradients, torch.autograd.grad((expected * upstream).sum(), exact[:2]))
    if fn in (forward_kl, reverse_kl):
        fkl_weight = 1.0 if fn is forward_kl else 0.0
        assert_close(loss, linear_streaming_kl(*tensors, fkl_weight=fkl_weight, **options).loss)


def test_the_readmes_example(example):
    """It runs, and linear_divergence differentiates its function."""
    student, teacher = exact_logits([example[f"{who}_{what}"] for who, what in NAMES])
    assert_close(example["loss"], (true_jensen_shannon(student, teacher) * example["mask"]).sum())


NAMES = [("student", "hidden"), ("student", "head"), ("teacher", "hidden"), ("teacher", "head")]


def test_jensen_shannon_of_a_wide_range(example):
    """float32 logits from -100 to 100: most probabilities underflow; value and gradient stay exact."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (200 * torch.rand(2, 64, 1000, generator=generator) - 100).to(DEVICE)
    student[0], teacher[0] = student[1], teacher[1]  # the extremes themselves:
    student[0, 3], teacher[0, 3], student[0, 7], teacher[0, 7] = 100, -100, -100, 100
    results = []
    for fn, dtype in ((example["jensen_shannon"], torch.float32), (true_jensen_shannon, torch.float64)):
        logits = student.to(dtype).requires_grad_()
        losses = fn(logits, teacher.to(dtype))
        results.append((losses, *torch.autograd.grad(losses.sum(), logits)))
    (losses, gradient), (true_losses, true_gradient) = results
    assert student.max() - student.min() >= 199 and (student.softmax(-1) == 0).any()
    assert ((losses - true_losses).abs() <= 1e-5 * true_losses).all()
    assert_close(gradient, true_gradient)


def test_jensen_shannon_of_bfloat16_models(example):
    """Against float64 on the same bfloat16 inputs. Gradients are rounded to bfloat16 twice."""
    tensors = heads(n=16, v=200, h=32, teacher_h=48, dtype=torch.bfloat16)
    losses = linear_divergence(example["jensen_shannon"], *tensors, reduction="none", chunk_tokens=5)
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]
    expected = true_jensen_shannon(exact[0] @ exact[1].T, exact[2] @ exact[3].T)
    assert ((losses - expected).abs() <= 1e-4 * expected).all()
    gradients = torch.autograd.grad(losses.sum(), tensors[:2])
    limit = rounding("torch", torch.bfloat16)
    assert_close(gradients, torch.autograd.grad(expected.sum(), exact[:2]), limit)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda s, t: (s - t).sum(),
        lambda s, t: s - t,
        lambda s, t: (s - t).sum(-1, keepdim=True),
        lambda s, t: (s - t).sum(-1).detach(),
        lambda s, t: None,
    ],
    ids=["scalar", "(n, V)", "(n, 1)", "no gradient", "None"],
)
def test_a_function_that_returns_something_else_is_refused(wrong):
    with pytest.raises(ValueError, match="losses with gradients"):
        linear_divergence(wrong, *heads())
