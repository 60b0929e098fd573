"""Half precision, mixed dtypes, float64, autocast; what logits of half-precision models are rounded to."""

import pytest
import torch

from kernel_helpers import (
    DEVICE,
    INTERPRETED,
    MARKS,
    assert_close,
    assert_values,
    exact_logits,
    heads,
    randn,
    relative_rms,
    rounding,
    true_gradient,
    truth,
    value_and_gradient,
)
from streaming_kl import linear_divergence, linear_streaming_kl, streaming_kl

pytestmark = MARKS
HALVES = [torch.float16, torch.bfloat16]


def true_linear_gradients(tensors, d_logits):
    return [d_logits @ tensors[1].detach().double(), d_logits.T @ tensors[0].detach().double()]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("inplace", [False, True])
def test_half_precision_logits(impl, dtype, inplace):
    """Values as for float32 inputs; gradients are rounded once."""
    student, teacher = (randn(4, 200, seed=seed, scale=3, dtype=dtype) for seed in (0, 1))
    options = {"fkl_weight": 0.3, "temperature": 1.5}
    out, gradient = value_and_gradient(student, teacher, **options, inplace_backward=inplace, impl=impl)
    assert out.loss.dtype == torch.float32 and gradient.dtype == dtype
    assert_values(out, student, teacher, **options)
    true = true_gradient(student, teacher, **options)
    limit = rounding(impl, dtype) * true.abs() + 1e-6 * true.abs().max()
    if dtype == torch.float16:
        limit += 2**-24  # its smallest number
    assert ((gradient.double() - true).abs() <= limit).all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_half_precision_hidden_states(impl, dtype, reduction):
    """Exact for the hidden states as they are: logits are float32. Gradients have two roundings."""
    tensors = heads(n=8, dtype=dtype)
    logits = exact_logits(tensors)
    out = linear_streaming_kl(*tensors, fkl_weight=0.3, reduction=reduction, impl=impl)
    assert_values(out[1:], *logits, 0.3)
    gradients = torch.autograd.grad(out.loss.sum(), tensors[:2], retain_graph=True)
    for gradient, true in zip(gradients, true_linear_gradients(tensors, true_gradient(*logits, 0.3))):
        assert gradient.dtype == dtype and relative_rms(gradient, true) < rounding(impl, dtype)
    thirds = torch.autograd.grad(out.loss.sum() / 3, tensors[:2])
    for third, whole in zip(thirds, gradients):  # the factor itself is not rounded
        assert abs(3 * third.double().norm() / whole.double().norm() - 1) < 1e-3


@pytest.mark.parametrize("dtype", HALVES)
def test_logits_dtype(impl, dtype):
    """Logits are rounded to logits_dtype and to nothing else, for half-precision and for float32 inputs."""
    for inputs_dtype in (dtype, torch.float32):
        # Multiples of a step: float32 sums of products are exact in any order, so their rounding is unique.
        step = 1 / 256 if inputs_dtype == torch.float32 else 1 / 64  # of numbers that bfloat16 lacks, or has
        tensors = []
        for x in heads(n=8):
            multiples = (x.detach() / step).round() * step
            tensors.append(multiples.to(inputs_dtype).requires_grad_(x.requires_grad))
        unrounded = exact_logits(tensors)
        rounded = [logits.to(dtype) for logits in unrounded]
        assert not torch.equal(rounded[0].double(), unrounded[0])
        out = linear_streaming_kl(*tensors, fkl_weight=0.3, logits_dtype=dtype, chunk_tokens=3, impl=impl)
        assert_values(out[1:], *rounded, 0.3)
        gradients = torch.autograd.grad(out.loss, tensors[:2])
        true = true_linear_gradients(tensors, true_gradient(*rounded, 0.3))
        assert_close(gradients, true, rounding(impl, dtype))
        assert_values(linear_streaming_kl(*tensors, fkl_weight=0.3, impl=impl)[1:], *unrounded, 0.3)
    with pytest.raises(ValueError, match="logits_dtype"):
        linear_streaming_kl(*tensors, fkl_weight=0.3, logits_dtype=torch.int32)


def test_divergences_see_float32_logits():
    """Unless asked otherwise; float64 of float64 inputs."""
    seen = []

    def spy(student_logits, teacher_logits):
        seen.append((student_logits.dtype, teacher_logits.dtype))
        return (student_logits - teacher_logits).abs().sum(-1)

    for dtype, logits_dtype, expected in [
        (torch.bfloat16, None, torch.float32),
        (torch.float16, None, torch.float32),
        (torch.float32, None, torch.float32),
        (torch.float64, None, torch.float64),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float64, torch.float64),
    ]:
        tensors = heads(dtype=dtype)
        loss = linear_divergence(spy, *tensors, logits_dtype=logits_dtype, chunk_tokens=2)
        assert set(seen) == {(expected, expected)}
        seen.clear()
        gradients = torch.autograd.grad(loss, tensors[:2])
        if logits_dtype is None:
            student, teacher = exact_logits(tensors)
            assert_close(loss, (student - teacher).abs().sum())
            true = true_linear_gradients(tensors, (student - teacher).sign())
            assert_close(gradients, true, max(1e-5, rounding("torch", dtype) if dtype in HALVES else 0))


def test_bfloat16_logits_bias_a_small_kl(impl):
    """Rounding adds to it. The default does not round."""
    student_hidden = randn(4, 64, dtype=torch.bfloat16)
    head = randn(100, 64, seed=1, scale=0.5, dtype=torch.bfloat16)
    teacher_hidden = (student_hidden.float() + randn(4, 64, seed=2, scale=0.02)).to(torch.bfloat16)
    tensors = student_hidden, head, teacher_hidden, head
    exact = truth(*exact_logits(tensors), 1.0)
    default = linear_streaming_kl(*tensors, fkl_weight=1.0, impl=impl)
    rounded = linear_streaming_kl(*tensors, fkl_weight=1.0, logits_dtype=torch.bfloat16, impl=impl)
    assert_values(default[1:], *exact_logits(tensors), 1.0)
    assert exact.fkl.mean() < 0.02 and abs(rounded.fkl.mean() / exact.fkl.mean() - 1) > 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accumulation_over_chunks(impl, dtype):
    """Head gradients from 1 to N chunks: as exact as from one, since they are summed in float32."""
    tensors = heads(n=8 if INTERPRETED and impl == "triton" else 64, dtype=dtype, v=33)
    n = len(tensors[0])
    d_hidden, d_head = true_linear_gradients(tensors, true_gradient(*exact_logits(tensors), 0.4))
    limit = 1e-5 if dtype == torch.float32 else 0.8 * rounding(impl, dtype)
    errors = []
    for chunk in (n, n // 4, 5, 1):
        out = linear_streaming_kl(*tensors, fkl_weight=0.4, chunk_tokens=chunk, impl=impl)
        gradients = torch.autograd.grad(out.loss, tensors[:2])
        assert_close(gradients, [d_hidden, d_head], limit)
        errors.append(relative_rms(gradients[1], d_head))
    assert max(errors) < 1.1 * min(errors) + 1e-6, errors


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_no_underflow_in_float16(impl, reduction):
    """Weights of 1 / (32 x 4096) under a loss scale of 32 x 4096: no float16 gradient may underflow."""
    tensors, tokens = heads(n=8, dtype=torch.float16), 32 * 4096
    weight = torch.full((8,), 1 / tokens, device=DEVICE)
    expected = linear_streaming_kl(*tensors, fkl_weight=0.3, impl=impl).loss
    out = linear_streaming_kl(*tensors, fkl_weight=0.3, weight=weight, reduction=reduction, impl=impl)
    gradients = [torch.autograd.grad(x, tensors[:2]) for x in (out.loss.sum() * tokens, expected)]
    assert_close(*gradients, 1e-3)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.float16, torch.float32)])
def test_mixed_dtypes(impl, dtypes):
    """A float32 student beside a teacher cached in bfloat16, and the other way around."""
    student, teacher = randn(3, 70, dtype=dtypes[0]), randn(3, 70, seed=1, dtype=dtypes[1])
    out, gradient = value_and_gradient(student, teacher, fkl_weight=0.3, impl=impl)
    assert_values(out, student, teacher, 0.3)
    assert gradient.dtype == dtypes[0]
    assert_close(gradient, true_gradient(student, teacher, 0.3), 1e-3)
    student_hidden, student_head = heads(dtype=dtypes[0])[:2]
    tensors = [student_hidden, student_head, *heads(dtype=dtypes[1])[2:]]
    out = linear_streaming_kl(*tensors, fkl_weight=0.3, impl=impl)
    assert_values(out[1:], *exact_logits(tensors), 0.3)
    assert [g.dtype for g in torch.autograd.grad(out.loss, tensors[:2])] == [dtypes[0]] * 2


def test_float64_is_exact_in_torch():
    student, teacher = randn(3, 70).double(), randn(3, 70, seed=1).double()
    out, gradient = value_and_gradient(student, teacher, fkl_weight=0.3)
    assert_close(out, truth(student, teacher, 0.3), 1e-13)
    assert_close(gradient, true_gradient(student, teacher, 0.3), 1e-13)
    tensors = heads(dtype=torch.float64)
    out = linear_streaming_kl(*tensors, fkl_weight=0.3, reduction="none")
    assert_close(out, truth(*exact_logits(tensors), 0.3), 1e-13)
    for refused in (
        lambda: streaming_kl(student, teacher, fkl_weight=0.3, impl="triton"),
        lambda: linear_streaming_kl(*tensors, fkl_weight=0.3, impl="triton"),
    ):
        with pytest.raises(ValueError, match="float64"):
            refused()


def test_autocast(impl):
    """Products in autocast's dtype, as in nn.Linear, but float32 logits; gradients in the parameters' dtype.

    The head's is not rounded in between.
    """
    tensors = heads()
    half = [x.detach().bfloat16().requires_grad_(x.requires_grad) for x in tensors]
    with torch.autocast(DEVICE, torch.bfloat16):
        student_hidden, student_head, teacher_hidden, teacher_head = tensors
        mixed = student_hidden, student_head, teacher_hidden.bfloat16(), teacher_head
        out = linear_streaming_kl(*mixed, fkl_weight=0.3, impl=impl)
        rounded = linear_streaming_kl(*tensors, fkl_weight=0.3, logits_dtype=torch.bfloat16, impl=impl)
    assert_values(out[1:], *exact_logits(half), 0.3)
    expected = linear_streaming_kl(*half, fkl_weight=0.3, impl=impl)
    assert_close(out.loss, expected.loss)
    gradients = torch.autograd.grad(out.loss, tensors[:2])
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    assert_close(gradients, torch.autograd.grad(expected.loss, half[:2]), 4e-3)
    assert not torch.equal(gradients[1], gradients[1].bfloat16().float())
    expected = linear_streaming_kl(*half, fkl_weight=0.3, logits_dtype=torch.bfloat16, impl=impl)
    assert_close(rounded.loss, expected.loss)
