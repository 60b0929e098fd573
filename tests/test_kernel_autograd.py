"""Weights, reductions, upstream gradients, in-place backward: how the loss behaves inside a training step."""

import pytest
import torch

from kernel_helpers import (
    DEVICE,
    INF,
    MARKS,
    NAN,
    assert_close,
    heads,
    randn,
    true_gradient,
    truth,
    value_and_gradient,
)
from streaming_kl import linear_divergence, linear_streaming_kl, streaming_kl

pytestmark = MARKS


def test_tokens_of_weight_zero_are_not_read(impl):
    student, teacher = randn(5, 70), randn(5, 70, seed=1)
    weight = torch.tensor([0.5, 0, 1, 0, 2], device=DEVICE)
    live = weight > 0
    student[~live], teacher[1] = NAN, INF
    options = {"fkl_weight": 0.5, "weight": weight, "impl": impl}
    expected = (truth(student[live], teacher[live], 0.5).loss * weight[live]).sum()
    true = true_gradient(student[live], teacher[live], 0.5, upstream=weight[live])
    for inplace in (False, True):
        leaf = student.clone().requires_grad_()
        out = streaming_kl(leaf * 1, teacher, **options, inplace_backward=inplace)
        (gradient,) = torch.autograd.grad(out.loss, leaf)
        assert (gradient[~live] == 0).all() and all((metric[~live] == 0).all() for metric in out[1:])
        assert_close([out.loss, gradient[live]], [expected, true])
    upstream = torch.where(live, 1, NAN)  # a masked token may have been divided by 0 later on
    _, gradient = value_and_gradient(student, teacher, upstream, **options)
    assert (gradient[~live] == 0).all()
    assert_close(gradient[live], true)

    apart = torch.stack([weight, torch.ones_like(weight)], 1)[:, 0]  # the same weights, two entries apart
    assert torch.equal(streaming_kl(student, teacher, **options | {"weight": apart}).fkl, out.fkl)

    student_hidden, student_head, teacher_hidden, teacher_head = tensors = heads(n=5)
    with torch.no_grad():
        student_hidden[~live], teacher_hidden[1] = NAN, INF
    options["chunk_tokens"] = 2
    for options["reduction"] in ("mean", "none"):
        out = linear_streaming_kl(*tensors, **options)
        d_hidden, d_head = torch.autograd.grad(out.loss.sum(), tensors[:2])
        alone = student_hidden[live], student_head, teacher_hidden[live], teacher_head
        without = linear_streaming_kl(*alone, **options | {"weight": weight[live]})
        expected = torch.autograd.grad(without.loss.sum(), tensors[:2])
        assert_close([d_hidden[live], d_head], [expected[0][live], expected[1]])
        assert (d_hidden[~live] == 0).all()


def test_bool_weights_means_and_micro_batches(impl):
    """mean divides by the sum of the weights; micro-batches of a sum add up to the whole."""
    tensors, mask = heads(n=6), torch.tensor([1, 1, 0, 1, 0, 1], dtype=torch.bool, device=DEVICE)
    options = {"fkl_weight": 0.4, "impl": impl}
    mean = linear_streaming_kl(*tensors, weight=mask, reduction="mean", **options).loss
    student_hidden, student_head, teacher_hidden, teacher_head = tensors
    parts = []
    for i in (slice(0, 2), slice(2, 4), slice(4, 6)):
        part = student_hidden[i], student_head, teacher_hidden[i], teacher_head
        parts.append(linear_streaming_kl(*part, weight=mask[i], **options).loss / 4)
    assert_close(sum(parts), mean)
    assert_close(*(torch.autograd.grad(loss, tensors[:2]) for loss in (sum(parts), mean)))
    logits = (student_hidden @ student_head.T).detach(), teacher_hidden @ teacher_head.T
    assert_close(streaming_kl(*logits, weight=mask, reduction="mean", **options).loss, mean)


@pytest.mark.parametrize("n", [0, 3])
def test_nothing_to_learn_from(impl, n):
    """No tokens, or none with a weight: a loss of 0 that can still be differentiated."""
    student_hidden, student_head, teacher_hidden, teacher_head = tensors = heads(n=n)
    zeros = torch.zeros(n, device=DEVICE)
    logits = student_hidden @ student_head.T, teacher_hidden @ teacher_head.T
    for reduction in ("sum", "mean", "none"):
        for weight in (zeros, None) if n == 0 else (zeros,):
            options = {"weight": weight, "reduction": reduction}
            losses = [
                linear_streaming_kl(*tensors, fkl_weight=0.4, impl=impl, **options).loss,
                streaming_kl(*logits, fkl_weight=0.4, impl=impl, **options).loss,
                linear_divergence(lambda s, t: (s - t).sum(-1), *tensors, **options),
            ]
            for loss in losses:
                assert loss.shape == ((n,) if reduction == "none" else ()) and (loss == 0).all()
                gradients = torch.autograd.grad(loss.sum(), tensors[:2], retain_graph=True)
                assert all((gradient == 0).all() for gradient in gradients)


def test_upstream_gradients_and_repeats(impl):
    """Twice through a retained graph: the same gradients; inputs unchanged; two calls interleaved."""
    student, teacher, upstream = randn(3, 70), randn(3, 70, seed=1), randn(3, seed=2)
    tensors = heads(n=3)
    leaves = [student.clone().requires_grad_(), student.clone().mul_(2).requires_grad_()]
    options = {"fkl_weight": 0.3, "impl": impl}
    calls = [  # (loss, inputs)
        (streaming_kl(leaves[0], teacher, reduction="none", **options).loss, leaves[:1]),
        (streaming_kl(leaves[1], teacher, reduction="none", **options).loss, leaves[1:]),
        (linear_streaming_kl(*tensors, reduction="none", **options).loss, tensors[:2]),
        (linear_streaming_kl(*tensors, reduction="sum", **options).loss, tensors[:2]),
    ]
    copies = [[x.detach().clone() for x in inputs] for _, inputs in calls]
    rounds = []
    for _ in range(2):
        rounds.append([])
        for loss, inputs in reversed(calls):
            grad_output = upstream if loss.dim() else upstream[0]
            rounds[-1] += torch.autograd.grad(loss, inputs, grad_output, retain_graph=True)
    assert all(torch.equal(first, second) for first, second in zip(*rounds))
    assert all(torch.equal(x, y) for (_, xs), ys in zip(calls, copies) for x, y in zip(xs, ys))
    assert_close(rounds[0][-1], true_gradient(student, teacher, 0.3, upstream=upstream))
    with pytest.raises(RuntimeError, match="differentiable|does not require grad"):
        (gradient,) = torch.autograd.grad(calls[0][0].sum(), leaves[0], create_graph=True)
        torch.autograd.grad(gradient.sum(), leaves[0])


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_metrics_are_the_callers_to_change(impl, reduction):
    student, teacher = randn(3, 70).requires_grad_(), randn(3, 70, seed=1)
    gradients = []
    for change in (False, True):
        out = streaming_kl(student, teacher, fkl_weight=0.3, reduction=reduction, impl=impl)
        if change:
            out.rkl.zero_()
        gradients += torch.autograd.grad(out.loss.sum(), student)
    assert torch.equal(*gradients)


def test_in_place(impl):
    """The gradient is in the logits' own memory; a second backward or another use of them is refused."""
    leaf, teacher = randn(3, 70).requires_grad_(), randn(3, 70, seed=1)
    logits = leaf * 1
    loss = streaming_kl(logits, teacher, fkl_weight=0.3, inplace_backward=True, impl=impl).loss
    other = (logits**2).sum()
    _, expected = value_and_gradient(leaf, teacher, fkl_weight=0.3, impl=impl)
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert gradient.data_ptr() == logits.data_ptr() and torch.equal(gradient, expected)
    with pytest.raises(RuntimeError, match="second backward"):
        torch.autograd.grad(loss, logits)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_tied_embeddings(impl):
    """One matrix as embedding and head: its gradient is the sum of both."""
    embedding, ids = randn(50, 8).requires_grad_(), torch.arange(6, device=DEVICE) * 3
    teacher_hidden, teacher_head = randn(6, 12, seed=1), randn(50, 12, seed=2)
    tensors = embedding[ids] * 2, embedding, teacher_hidden, teacher_head
    loss = linear_streaming_kl(*tensors, fkl_weight=0.3, impl=impl).loss
    plain = truth(tensors[0] @ embedding.T, teacher_hidden @ teacher_head.T, 0.3).loss.sum()
    assert_close(*(torch.autograd.grad(x, [embedding], retain_graph=True) for x in (loss, plain)))


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_only_the_gradients_that_are_needed(impl, reduction):
    both = heads()
    linear_streaming_kl(*both, fkl_weight=0.3, impl=impl).loss.backward()
    options = {"fkl_weight": 0.3, "reduction": reduction, "chunk_tokens": 4, "impl": impl}
    for needed, other in ((0, 1), (1, 0)):
        tensors = heads()
        tensors[other].requires_grad_(False)
        linear_streaming_kl(*tensors, **options).loss.sum().backward()
        assert tensors[other].grad is None
        assert_close(tensors[needed].grad, both[needed].grad)
    with torch.no_grad():
        assert not linear_streaming_kl(*both, **options).loss.requires_grad
    frozen = [x.detach() for x in both]
    assert not linear_streaming_kl(*frozen, **options).loss.requires_grad
    assert not streaming_kl(frozen[0], frozen[0], fkl_weight=0.3, impl=impl).loss.requires_grad


def test_deterministic(impl):
    runs = []
    for _ in range(2):
        tensors = heads()
        loss = linear_streaming_kl(*tensors, fkl_weight=0.3, chunk_tokens=4, impl=impl).loss
        runs.append([loss, *torch.autograd.grad(loss, tensors[:2])])
    assert all(torch.equal(first, second) for first, second in zip(*runs))
