"""One contract for both implementations: values and gradients against float64 on the same rounded inputs.

Without a GPU the Triton kernels run in Triton's interpreter, and are compiled for GPUs that are not there. Test names carry the number of
the pitfall they guard against: 1 direction, 2 is it a KL, 3 infinities, 4 ragged vocabularies, 5 layout, 6 weights, 7 upstream gradients,
8 accumulation, 9 low precision, 10 temperature, 11 performance, 12 integration.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from streaming_kl import chunks
from benchmarks import kernel_speed as bench
from streaming_kl import KLOutput, linear_divergence, linear_streaming_kl, reference, streaming_kl

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = DEVICE == "cpu"
COMPILER = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}  # environment of processes that compile
if INTERPRETED:  # Triton reads the variable while it is imported: import it now, again if other tests have, and leave no trace
    for name in [name for name in sys.modules if name.startswith("triton.") and not name.startswith("triton._C")] + ["triton"]:
        sys.modules.pop(name, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import triton.experimental.gluon.language  # noqa: F401  as the interpreter will

        from streaming_kl import triton_kl
else:
    from streaming_kl import triton_kl
ROOT = Path(__file__).parent.parent
ROUNDING = {torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}  # from one number to the next, relative
INF, NAN = float("inf"), float("nan")
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero):RuntimeWarning")  # the interpreter's numpy
gpu = pytest.mark.gpu


@pytest.fixture(params=["torch", "triton"])
def impl(request, monkeypatch):
    """Small blocks, so that small vocabularies take several."""
    monkeypatch.setattr(triton_kl, "BLOCK", 32 if INTERPRETED else 128)
    monkeypatch.setattr(triton_kl, "WARPS", 1)
    return request.param


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


BLOCK = 32 if INTERPRETED else 128


def randn(*shape, seed=0, scale=1.0, dtype=torch.float32):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(DEVICE, dtype)


def truth(student_logits, teacher_logits, fkl_weight, temperature=1.0):
    """Per-token (loss, fkl, rkl, student entropy, teacher entropy) by the textbook formulas, in float64."""
    log_p = (student_logits.double() / temperature).log_softmax(-1)
    log_q = (teacher_logits.double() / temperature).log_softmax(-1)

    def expect(log_weight, x):  # sum_v w x with 0 * inf = 0
        return torch.where(log_weight == -INF, 0, log_weight.exp() * torch.where(log_weight == -INF, 0, x)).sum(-1)

    fkl, rkl = expect(log_q, log_q - log_p), expect(log_p, log_p - log_q)
    loss = fkl if fkl_weight == 1 else rkl if fkl_weight == 0 else fkl_weight * fkl + (1 - fkl_weight) * rkl
    return KLOutput(loss, fkl, rkl, -expect(log_p, log_p), -expect(log_q, log_q))


def true_gradient(student_logits, teacher_logits, fkl_weight, temperature=1.0, upstream=None):
    z = student_logits.detach().double().requires_grad_()
    loss = truth(z, teacher_logits, fkl_weight, temperature).loss
    return torch.autograd.grad(loss, z, torch.ones_like(loss) if upstream is None else upstream.double())[0]


def assert_values(actual, expected):
    for name, a, e in zip(KLOutput._fields, actual, expected):
        error = (a.detach().double() - e.detach()).abs() - 1e-6 * e.detach().abs()
        assert a.shape == e.shape and error.max() <= 2e-6, f"{name} is off by {error.max():.2e}"


def relative_rms(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


def rounding(impl, dtype):
    """The largest relative error of storing a gradient: half a unit, but the interpreter truncates bfloat16."""
    return ROUNDING[dtype] * (1 if INTERPRETED and impl == "triton" and dtype == torch.bfloat16 else 0.5)


def value_and_gradient(student_logits, teacher_logits, upstream=None, **options):
    z = student_logits.detach().clone().requires_grad_()
    out = streaming_kl(z, teacher_logits, reduction="none", **options)
    (gradient,) = torch.autograd.grad(out.loss, z, torch.ones_like(out.loss) if upstream is None else upstream)
    return out, gradient


def heads(n=5, v=50, h=8, other=12, dtype=torch.float32, seed=0, scale=1.0):
    """student_hidden, student_head, teacher_hidden, teacher_head; the student's require gradients."""
    shapes = (n, h), (v, h), (n, other), (v, other)
    tensors = [randn(*shape, seed=seed + i, scale=scale if i == 1 else 1.0) for i, shape in enumerate(shapes)]
    return [x.to(dtype).requires_grad_(i < 2) for i, x in enumerate(tensors)]


# ------------------------------------------------------------------------------------------------------------ exactness


@pytest.mark.parametrize("fkl_weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_values_and_gradients(impl, fkl_weight, temperature):
    z, y, upstream = randn(4, 3 * BLOCK + 5, scale=3), randn(4, 3 * BLOCK + 5, seed=1, scale=3), randn(4, seed=2)
    out, gradient = value_and_gradient(z, y, upstream, fkl_weight=fkl_weight, temperature=temperature, impl=impl)
    assert_values(out, truth(z, y, fkl_weight, temperature))
    assert relative_rms(gradient, true_gradient(z, y, fkl_weight, temperature, upstream)) < 1e-5
    assert not any(x.requires_grad for x in out[1:])


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("fkl_weight", [0.0, 0.3, 1.0])
def test_linear_values_and_gradients(impl, reduction, fkl_weight):
    tensors = heads(n=7)
    weight, upstream = torch.tensor([0.5, 0.2, 0, 1, 0.7, 0, 3], device=DEVICE), randn(7, seed=9)
    x, w, xt, wt = [t.detach().double() for t in tensors]
    x.requires_grad_(), w.requires_grad_()
    expected = truth(x @ w.T, xt @ wt.T, fkl_weight, 0.7)
    losses = expected.loss * weight
    total = {"sum": losses.sum() * 3, "mean": losses.sum() / weight.sum().double() * 3, "none": (losses * upstream).sum()}[reduction]
    true_gradients = torch.autograd.grad(total, (x, w))
    for chunk in (None, 1, 3) if fkl_weight == 0.3 else (3,):  # of 5 live tokens
        out = linear_streaming_kl(
            *tensors, fkl_weight=fkl_weight, temperature=0.7, weight=weight, reduction=reduction, chunk_tokens=chunk, impl=impl
        )
        loss = (out.loss * upstream).sum() if reduction == "none" else out.loss * 3
        assert abs(loss.item() - total.item()) < 2e-5
        live = weight != 0
        assert_values([x[live] for x in out[1:]], [x[live] for x in expected[1:]])
        assert all((x[~live] == 0).all() for x in out[1:])
        for gradient, true in zip(torch.autograd.grad(loss, tensors[:2]), true_gradients):
            assert relative_rms(gradient, true) < 1e-5


def test_divergence_reproduces_the_kls_and_others():
    """linear_divergence with four functions against plain autograd: both KLs, Jensen-Shannon, total variation."""

    def kl(log_a, log_b):
        return (log_a.exp() * (log_a - log_b)).sum(-1)

    def jensen_shannon(s, t):
        log_p, log_q = s.log_softmax(-1), t.log_softmax(-1)
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        return (kl(log_p, log_m) + kl(log_q, log_m)) / 2

    functions = {
        "fkl": lambda s, t: kl(t.log_softmax(-1), s.log_softmax(-1)),
        "rkl": lambda s, t: kl(s.log_softmax(-1), t.log_softmax(-1)),
        "jensen_shannon": jensen_shannon,
        "total_variation": lambda s, t: (s.softmax(-1) - t.softmax(-1)).abs().sum(-1) / 2,
    }
    tensors = heads(n=11)
    weight = torch.linspace(0, 1, 11, device=DEVICE)
    for name, fn in functions.items():
        for reduction in ("sum", "mean", "none"):
            loss = linear_divergence(fn, *tensors, weight=weight, reduction=reduction, chunk_tokens=4)
            plain = fn(tensors[0] @ tensors[1].T, tensors[2] @ tensors[3].T) * weight
            plain = {"sum": plain.sum(), "mean": plain.sum() / weight.sum(), "none": plain}[reduction]
            torch.testing.assert_close(loss, plain)
            got, want = (torch.autograd.grad((x * x).sum(), tensors[:2]) for x in (loss, plain))
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
            if name in ("fkl", "rkl"):
                out = linear_streaming_kl(*tensors, fkl_weight=float(name == "fkl"), weight=weight, reduction=reduction)
                torch.testing.assert_close(loss, out.loss, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ pitfalls


def test_1_direction_by_hand(impl):
    q, p = torch.tensor([[0.7, 0.2, 0.1]], device=DEVICE), torch.tensor([[0.5, 0.25, 0.25]], device=DEVICE)
    fkl = 0.7 * math.log(0.7 / 0.5) + 0.2 * math.log(0.2 / 0.25) + 0.1 * math.log(0.1 / 0.25)
    rkl = 0.5 * math.log(0.5 / 0.7) + 0.25 * math.log(0.25 / 0.2) + 0.25 * math.log(0.25 / 0.1)
    assert abs(fkl - rkl) > 0.01
    for fkl_weight in (0.0, 0.25, 1.0):
        out, gradient = value_and_gradient(p.log(), q.log() + 1, fkl_weight=fkl_weight, impl=impl)
        assert out.fkl.item() == pytest.approx(fkl, abs=1e-6) and out.rkl.item() == pytest.approx(rkl, abs=1e-6)
        assert out.loss.item() == pytest.approx(fkl_weight * fkl + (1 - fkl_weight) * rkl, abs=1e-6)
        forward, reverse = p - q, p * ((p / q).log() - rkl)
        torch.testing.assert_close(gradient, fkl_weight * forward + (1 - fkl_weight) * reverse)


@pytest.mark.parametrize("fkl_weight", [0.0, 0.5, 1.0])
def test_2_equal_logits_give_zero(impl, fkl_weight):
    z = randn(3, 2 * BLOCK, scale=5)
    out, gradient = value_and_gradient(z, z + 8, fkl_weight=fkl_weight, impl=impl)
    assert max(out.fkl.abs().max(), out.rkl.abs().max(), gradient.abs().max()) < 1e-6


@pytest.mark.parametrize("offsets", [(500, 0), (0, -500), (-900, 500)])
def test_2_offsets_change_nothing(impl, offsets):
    z, y = ((randn(3, 70, seed=s, scale=3) * 1024).round() / 1024 for s in (0, 1))  # these survive an offset of 500 unrounded
    out, gradient = value_and_gradient(z + offsets[0], y + offsets[1], fkl_weight=0.5, impl=impl)
    assert_values(out, truth(z, y, 0.5))
    assert relative_rms(gradient, true_gradient(z, y, 0.5)) < 1e-5


@pytest.mark.parametrize("offset", [0, 500])
def test_2_near_convergence(impl, offset):
    z = randn(4, 3 * BLOCK)
    y = z + randn(4, 3 * BLOCK, seed=1, scale=0.015) + offset
    expected = truth(z, y, 1.0).fkl
    assert 5e-5 < expected.min() and expected.max() < 3e-4
    for fkl_weight in (0.0, 1.0):
        out, gradient = value_and_gradient(z, y, fkl_weight=fkl_weight, impl=impl)
        torch.testing.assert_close(out.loss.double(), truth(z, y, fkl_weight).loss, rtol=0.01, atol=0)
        assert relative_rms(gradient, true_gradient(z, y, fkl_weight)) < 0.01


def test_2_gradients_sum_to_zero(impl):
    for fkl_weight in (0.0, 0.4, 1.0):
        _, gradient = value_and_gradient(randn(3, 200, scale=4), randn(3, 200, seed=1), fkl_weight=fkl_weight, impl=impl)
        assert gradient.sum(-1).abs().max() < 1e-6 < gradient.abs().sum(-1).min()


def test_3_both_minus_infinity(impl):
    """Entries that both models exclude: the first block, single entries, all but one."""
    z, y = randn(3, 100), randn(3, 100, seed=1) * 2
    for x in (z, y):
        x[0, : BLOCK + 3], x[1, ::3], x[2, :77], x[2, 78:] = -INF, -INF, -INF, -INF
    for fkl_weight in (0.0, 0.5, 1.0):
        out, gradient = value_and_gradient(z, y, fkl_weight=fkl_weight, impl=impl)
        assert_values(out, truth(z, y, fkl_weight))
        keep = z[:2].isfinite()
        for row in range(2):
            true = true_gradient(z[row, keep[row]][None], y[row, keep[row]][None], fkl_weight)[0]
            assert relative_rms(gradient[row, keep[row]], true) < 1e-5 and (gradient[row, ~keep[row]] == 0).all()
        assert gradient[2].abs().max() < 1e-6 and out.student_entropy[2].abs() < 1e-6


@pytest.mark.parametrize("excluder", ["student", "teacher"])
def test_3_one_sided_minus_infinity(impl, excluder):
    """An entry that one model excludes makes one direction infinite; the other one stays exact, with its gradient."""
    z, y = randn(3, 100), randn(3, 100, seed=1)
    x = z if excluder == "student" else y
    x[0, 40], x[1, : BLOCK + 1], x[2, 99] = -INF, -INF, -INF  # in the middle, the whole first block, last
    finite = 0.0 if excluder == "student" else 1.0
    out, gradient = value_and_gradient(z, y, fkl_weight=finite, impl=impl)
    expected = truth(z, y, finite)
    assert_values([out.loss, *out[3:]], [expected.loss, *expected[3:]])
    assert ((out.fkl if excluder == "student" else out.rkl) == INF).all()
    true = torch.nan_to_num(true_gradient(torch.where(z == -INF, -1e4, z), torch.where(y == -INF, -1e4, y), finite))
    assert gradient.isfinite().all() and relative_rms(gradient, true) < 1e-5
    for infinite in (1 - finite, 0.5):
        loss = streaming_kl(z, y, fkl_weight=infinite, reduction="none", impl=impl).loss
        assert (loss == INF).all()


def test_3_underflow_and_saturation(impl):
    z, y = randn(5, 100), randn(5, 100, seed=1)
    z[0, ::2] -= 200  # log-probabilities that float32 exponentials cannot hold, in either
    y[1, ::2] -= 200
    z[2, 5], y[2, 60] = 1e4, 1e4  # one entry has all, a different one
    z[3] -= 1000  # far below zero
    y[3] -= 3000
    z[4] *= 30
    for fkl_weight in (0.0, 0.5, 1.0):
        out, gradient = value_and_gradient(z, y, fkl_weight=fkl_weight, impl=impl)
        assert_values(out, truth(z, y, fkl_weight))
        assert gradient.isfinite().all() and relative_rms(gradient, true_gradient(z, y, fkl_weight)) < 1e-5


def test_3_infinite_ratios_that_underflow(impl):
    """A student's -inf under a teacher's entry that starts large but ends below float32: 0 * inf is 0, not NaN, in any order."""
    z, y = randn(2, 3 * BLOCK), randn(2, 3 * BLOCK, seed=1)
    z[0, 3], y[0, :BLOCK], y[0, -1] = -INF, -150, 100
    z[1, -1], y[1, -BLOCK:], y[1, 3] = -INF, -150, 100
    out, gradient = value_and_gradient(z, y, fkl_weight=0.5, impl=impl)
    assert_values(out, truth(torch.where(z == -INF, -1e4, z), y, 0.5))
    assert gradient.isfinite().all()


@pytest.mark.parametrize("bad", [NAN, INF])
def test_3_nan_surfaces_in_its_row_only(impl, bad):
    z, y = randn(5, 100), randn(5, 100, seed=1)
    clean_out, clean_gradient = value_and_gradient(z, y, fkl_weight=0.5, impl=impl)
    z[1, 2], y[2, 99], z[3] = bad, bad, -INF  # the last: a row without any probability
    out, gradient = value_and_gradient(z, y, fkl_weight=0.5, impl=impl)
    for x in (out.loss, out.fkl, out.rkl, gradient.sum(-1)):
        assert x.isnan().tolist() == [False, True, True, True, False]
    torch.testing.assert_close(gradient[[0, 4]], clean_gradient[[0, 4]], rtol=0, atol=0)
    torch.testing.assert_close(out.loss[[0, 4]], clean_out.loss[[0, 4]], rtol=0, atol=0)


@pytest.mark.parametrize("v", [1, 2, 7, BLOCK - 1, BLOCK, BLOCK + 1, BLOCK + 16, 3 * BLOCK])
def test_4_any_vocabulary(impl, v):
    """Logits far below 0 and far above: an entry read past the end as 0 would show in one of them."""
    for offset in (-50, 50):
        z, y = randn(2, v, scale=3) + offset, randn(2, v, seed=1, scale=3) + offset
        out, gradient = value_and_gradient(z, y, fkl_weight=0.3, impl=impl)
        assert_values(out, truth(z, y, 0.3))
        assert (gradient - true_gradient(z, y, 0.3)).abs().max() < 1e-6
    tensors = heads(n=3, v=v)
    x, w, xt, wt = (t.detach() for t in tensors)
    gradients = torch.autograd.grad(linear_streaming_kl(*tensors, fkl_weight=0.3, impl=impl).loss, tensors[:2])
    true = true_gradient(x @ w.T, xt @ wt.T, 0.3)
    torch.testing.assert_close(gradients, ((true @ w.double()).float(), (true.T @ x.double()).float()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("v", [151936, 151937])
def test_4_full_vocabulary(impl, v):
    """At the blocks' real size; KLs from large to 1e-4."""
    z = randn(2, v, scale=3)
    y = torch.stack([z[0] + randn(v, seed=1, scale=0.015), randn(v, seed=2, scale=3)]) + 200
    out, gradient = value_and_gradient(z, y, fkl_weight=0.5, impl=impl)
    assert_values(out, truth(z, y, 0.5))
    true = true_gradient(z, y, 0.5)
    assert relative_rms(gradient[0], true[0]) < 1e-3 and relative_rms(gradient[1], true[1]) < 1e-5


def test_4_padded_vocabulary(impl):
    """vocab_size cuts both models, whatever lies beyond, and lets their sizes differ."""
    z, y = randn(3, 60), randn(3, 70, seed=1)
    z[:, 50:], y[:, 50:] = 1e4, NAN
    out, gradient = value_and_gradient(z, y, fkl_weight=0.3, vocab_size=50, impl=impl)
    assert_values(out, truth(z[:, :50], y[:, :50], 0.3))
    assert relative_rms(gradient[:, :50], true_gradient(z[:, :50], y[:, :50], 0.3)) < 1e-5 and (gradient[:, 50:] == 0).all()

    x, w, xt, wt = heads()
    cut = linear_streaming_kl(x, w, xt, wt, fkl_weight=0.3, impl=impl)
    expected = torch.autograd.grad(cut.loss, (x, w))
    padded, padded_t = torch.cat([w, torch.full_like(w[:3], NAN)]), torch.cat([wt, torch.full_like(wt[:9], NAN)])
    padded = padded.detach().requires_grad_()
    out = linear_streaming_kl(x, padded, xt, padded_t, fkl_weight=0.3, vocab_size=50, impl=impl)
    d_hidden, d_head = torch.autograd.grad(out.loss, (x, padded))
    torch.testing.assert_close((out.loss, d_hidden, d_head[:50]), (cut.loss, *expected), rtol=0, atol=0)
    assert (d_head[50:] == 0).all()


def test_4_vocabularies_must_agree():
    z, (x, w, xt, _) = randn(3, 50), heads()
    for vocab_size, message in ((None, "vocabularies of 50 and 51"), (51, "does not fit"), (0, "does not fit")):
        with pytest.raises(ValueError, match=message):
            streaming_kl(z, randn(3, 51), fkl_weight=1, vocab_size=vocab_size)
        with pytest.raises(ValueError, match=message):
            linear_streaming_kl(x, w, xt, randn(51, 12), fkl_weight=1, vocab_size=vocab_size)


def test_5_any_layout(impl):
    """Rows apart, transposed, offset, every other row, a broadcast teacher: all as if contiguous; the gradient in the student's place."""
    z, y = randn(4, 70), randn(4, 70, seed=1)
    expected_out, expected = value_and_gradient(z, y, fkl_weight=0.3, impl=impl)
    wide = randn(9, 101)
    for student in (wide[1:5, 3:73], wide[:8:2, :70], wide.T[:70].T[:4], torch.empty(70, 4, device=DEVICE).T):
        for inplace in (False, True):
            student = student.detach()
            student.copy_(z)
            leaf = student.requires_grad_()
            out = streaming_kl(leaf, y, fkl_weight=0.3, reduction="none", inplace_backward=inplace, impl=impl)
            (gradient,) = torch.autograd.grad(out.loss.sum(), leaf)
            torch.testing.assert_close((out.loss, gradient), (expected_out.loss, expected))
    out, gradient = value_and_gradient(z, y[:1].expand(4, 70), fkl_weight=0.3, impl=impl)
    assert_values(out, truth(z, y[:1], 0.3)[:3] + truth(z, y[:1].expand(4, 70), 0.3)[3:])


def test_5_offsets_beyond_32_bits(impl):
    """Rows 2^28 entries apart: the tenth begins beyond 2^31. Memory that is never touched costs nothing."""
    if DEVICE == "cuda":
        pytest.skip("test_5_beyond_32_bits_on_gpu does this with real rows")
    torch.use_deterministic_algorithms(False)  # or the memory below would be filled with NaN
    storage = torch.empty(9 * 2**28 + 8, dtype=torch.float16)
    z = torch.as_strided(storage, (10, 8), (2**28, 1))
    z.copy_(randn(10, 8))
    y, weight = randn(10, 8, seed=1, dtype=torch.float16), torch.ones(10)
    weight[1:9] = 0
    leaf = z.detach().requires_grad_()
    out = streaming_kl(leaf, y, fkl_weight=0.3, weight=weight, reduction="none", inplace_backward=True, impl=impl)
    assert abs(out.fkl[9] - truth(z[9:], y[9:], 0.3).fkl) < 2e-6
    true = true_gradient(z[9:], y[9:], 0.3)
    out.loss.sum().backward()  # over z itself
    assert (z[9].double() - true).abs().max() < 1e-3 and (z[1:9] == 0).all()


def test_5_more_rows_than_a_grid_dimension():
    z, y = randn(70000, 3), randn(70000, 3, seed=1)
    out, gradient = value_and_gradient(z, y, fkl_weight=0.3, impl="torch" if INTERPRETED else "triton")
    assert_values(out, truth(z, y, 0.3))
    assert relative_rms(gradient, true_gradient(z, y, 0.3)) < 1e-5


def test_6_rows_of_weight_zero_are_not_read(impl):
    z, y = randn(5, 70), randn(5, 70, seed=1)
    weight = torch.tensor([0.5, 0, 1, 0, 2], device=DEVICE)
    live = weight > 0
    z[~live], y[1] = NAN, INF
    for inplace in (False, True):
        leaf = z.clone().requires_grad_()
        out = streaming_kl(leaf * 1, y, fkl_weight=0.5, weight=weight, inplace_backward=inplace, impl=impl)
        (gradient,) = torch.autograd.grad(out.loss, leaf)
        assert (gradient[~live] == 0).all() and all((x[~live] == 0).all() for x in out[1:])
        expected = truth(z[live], y[live], 0.5).loss
        assert out.loss.item() == pytest.approx((expected * weight[live]).sum().item(), rel=1e-6)
        assert relative_rms(gradient[live], true_gradient(z[live], y[live], 0.5, upstream=weight[live])) < 1e-5
    upstream = torch.where(live, 1, NAN)  # a masked token may have been divided by 0 later on
    _, gradient = value_and_gradient(z, y, upstream, fkl_weight=0.5, weight=weight, impl=impl)
    assert (gradient[~live] == 0).all() and gradient[live].isfinite().all()

    apart = torch.stack([weight, torch.ones_like(weight)], 1)[:, 0]  # the same weights, two entries apart
    assert torch.equal(streaming_kl(z, y, fkl_weight=0.5, weight=apart, impl=impl).fkl, out.fkl)

    x, w, xt, wt = heads(n=5)
    with torch.no_grad():
        x[~live], xt[1] = NAN, INF
    for reduction in ("mean", "none"):
        out = linear_streaming_kl(x, w, xt, wt, fkl_weight=0.5, weight=weight, reduction=reduction, chunk_tokens=2, impl=impl)
        d_hidden, d_head = torch.autograd.grad(out.loss.sum(), (x, w))
        assert (d_hidden[~live] == 0).all() and d_head.isfinite().all() and d_hidden[live].abs().sum() > 0


def test_6_bool_weights_means_and_micro_batches(impl):
    """mean divides by the sum of the weights; micro-batches of a sum add up to the whole."""
    tensors, mask = heads(n=6), torch.tensor([1, 1, 0, 1, 0, 1], dtype=torch.bool, device=DEVICE)
    options = {"fkl_weight": 0.4, "impl": impl}
    mean = linear_streaming_kl(*tensors, weight=mask, reduction="mean", **options).loss
    expected = torch.autograd.grad(mean, tensors[:2])
    x, w, xt, wt = tensors
    parts = [linear_streaming_kl(x[i : i + 2], w, xt[i : i + 2], wt, weight=mask[i : i + 2], **options).loss / 4 for i in (0, 2, 4)]
    torch.testing.assert_close(sum(parts), mean)
    torch.testing.assert_close(torch.autograd.grad(sum(parts), tensors[:2]), expected)
    logits, teacher = (x @ w.T).detach(), (xt @ wt.T).detach()
    torch.testing.assert_close(streaming_kl(logits, teacher, weight=mask, reduction="mean", **options).loss, mean.detach())


@pytest.mark.parametrize("n", [0, 3])
def test_6_nothing_to_learn_from(impl, n):
    """No tokens, or none with a weight: a loss of 0 that can still be differentiated."""
    x, w, xt, wt = heads(n=n)
    weight = torch.zeros(n, device=DEVICE)
    for reduction in ("sum", "mean", "none"):
        for weights in (weight, None) if n == 0 else (weight,):
            options = {"fkl_weight": 0.4, "weight": weights, "reduction": reduction}
            losses = [
                linear_streaming_kl(x, w, xt, wt, impl=impl, **options).loss,
                streaming_kl(x @ w.T, xt @ wt.T, impl=impl, **options).loss,
                linear_divergence(lambda s, t: (s - t).sum(-1), x, w, xt, wt, weight=weights, reduction=reduction),
            ]
            for loss in losses:
                assert loss.shape == ((n,) if reduction == "none" else ()) and (loss == 0).all()
                assert all((g == 0).all() for g in torch.autograd.grad(loss.sum(), (x, w)))


def test_7_upstream_gradients_and_repeats(impl):
    """Twice through a retained graph: the same gradients; inputs unchanged; two calls interleaved."""
    z, y, up = randn(3, 70), randn(3, 70, seed=1), randn(3, seed=2)
    tensors = heads(n=3)
    leaves = [z.clone().requires_grad_(), z.clone().mul_(2).requires_grad_()]
    outs = [streaming_kl(leaf, y, fkl_weight=0.3, reduction="none", impl=impl).loss for leaf in leaves]
    outs.append(linear_streaming_kl(*tensors, fkl_weight=0.3, reduction="none", impl=impl).loss)
    outs.append(linear_streaming_kl(*tensors, fkl_weight=0.3, reduction="sum", impl=impl).loss)
    inputs = [leaves[:1], leaves[1:], tensors[:2], tensors[:2]]
    copies = [[x.detach().clone() for x in xs] for xs in inputs]
    grads = []
    for _ in range(2):
        for out, xs in reversed(list(zip(outs, inputs))):
            grads.append(torch.autograd.grad(out, xs, up if out.dim() else up[0], retain_graph=True))
    for first, second in zip(grads[:4], grads[4:]):
        torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert all(torch.equal(a, b) for xs, ys in zip(inputs, copies) for a, b in zip(xs, ys))
    for options in ({"reduction": "none"}, {}):  # metrics are the caller's to change
        results = [streaming_kl(leaves[0], y, fkl_weight=0.3, impl=impl, **options) for _ in range(2)]
        results[1].rkl.zero_()
        first, second = (torch.autograd.grad(out.loss.sum(), leaves[0]) for out in results)
        torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert relative_rms(grads[3][0], true_gradient(z, y, 0.3, upstream=up)) < 1e-5
    with pytest.raises(RuntimeError, match="differentiable|does not require grad"):
        (g,) = torch.autograd.grad(outs[0].sum(), leaves[0], create_graph=True)
        torch.autograd.grad(g.sum(), leaves[0])


def test_7_in_place(impl):
    """The gradient is in the logits' own memory; a second backward, or another user of the logits, is refused."""
    x = randn(3, 70).requires_grad_()
    logits = x * 1
    loss = streaming_kl(logits, randn(3, 70, seed=1), fkl_weight=0.3, reduction="none", inplace_backward=True, impl=impl).loss.sum()
    other = (logits**2).sum()
    plain = value_and_gradient(x, randn(3, 70, seed=1), fkl_weight=0.3, impl=impl)[1]
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert gradient.data_ptr() == logits.data_ptr() and torch.equal(gradient, plain)
    with pytest.raises(RuntimeError, match="second backward"):
        torch.autograd.grad(loss, logits)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_8_accumulation_over_chunks(impl, dtype):
    """Head gradients from 1, 4, 13 and 64 chunks: as exact as from one, since they are summed in float32."""
    tensors = heads(n=8 if INTERPRETED and impl == "triton" else 64, dtype=dtype, v=33)
    errors = []
    x, w, xt, wt = (t.detach() for t in tensors)
    logits, teacher = (x @ w.T), (xt @ wt.T)
    d_logits = true_gradient(logits, teacher, 0.4)
    for chunk in (len(x), len(x) // 4, 5, 1):
        out = linear_streaming_kl(*tensors, fkl_weight=0.4, chunk_tokens=chunk, impl=impl)
        d_hidden, d_head = torch.autograd.grad(out.loss, tensors[:2])
        errors.append(relative_rms(d_head, d_logits.T @ x.double()))
        limit = 1e-5 if dtype == torch.float32 else 0.8 * rounding(impl, dtype)
        assert relative_rms(d_hidden, d_logits @ w.double()) < limit
    assert max(errors) < limit and max(errors) < 1.1 * min(errors) + 1e-6, errors


def test_8_tied_embeddings(impl):
    """One matrix as embedding and head: its gradient is the sum of both."""
    embedding, ids = randn(50, 8).requires_grad_(), torch.arange(6, device=DEVICE) * 3
    xt, wt = randn(6, 12, seed=1), randn(50, 12, seed=2)
    loss = linear_streaming_kl(embedding[ids] * 2, embedding, xt, wt, fkl_weight=0.3, impl=impl).loss
    plain = truth((embedding[ids] * 2) @ embedding.T, xt @ wt.T, 0.3).loss.sum()
    assert relative_rms(torch.autograd.grad(loss, embedding)[0], torch.autograd.grad(plain, embedding)[0].double()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("inplace", [False, True])
def test_9_half_precision_logits(impl, dtype, inplace):
    """Values as for float32 inputs; gradients rounded once (the interpreter truncates bfloat16, within the same unit)."""
    z, y = randn(4, 200, scale=3, dtype=dtype), randn(4, 200, seed=1, scale=3, dtype=dtype)
    out, gradient = value_and_gradient(z, y, fkl_weight=0.3, temperature=1.5, inplace_backward=inplace, impl=impl)
    assert out.loss.dtype == torch.float32 and gradient.dtype == dtype
    assert_values(out, truth(z, y, 0.3, 1.5))
    true = true_gradient(z, y, 0.3, 1.5)
    smallest = 6e-8 if dtype == torch.float16 else 1e-9
    assert ((gradient.double() - true).abs() <= 1.01 * rounding(impl, dtype) * true.abs() + smallest).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_9_half_precision_hidden_states(impl, dtype):
    """Exact for the logits as the matrix product rounds them; gradients within two roundings."""
    tensors = heads(n=8, dtype=dtype)
    x, w, xt, wt = (t.detach() for t in tensors)
    logits, teacher = x @ w.T, xt @ wt.T
    d_logits = true_gradient(logits, teacher, 0.3)
    for reduction in ("sum", "none"):
        out = linear_streaming_kl(*tensors, fkl_weight=0.3, reduction=reduction, impl=impl)
        assert_values(out[1:], truth(logits, teacher, 0.3)[1:])
        d_hidden, d_head = torch.autograd.grad(out.loss.sum(), tensors[:2])
        assert d_hidden.dtype == d_head.dtype == dtype
        assert relative_rms(d_hidden, d_logits @ w.double()) < rounding(impl, dtype)
        assert relative_rms(d_head, d_logits.T @ x.double()) < rounding(impl, dtype)
        thirds = torch.autograd.grad(linear_streaming_kl(*tensors, fkl_weight=0.3, impl=impl).loss / 3, tensors[:2])
        for third, whole in zip(thirds, (d_hidden, d_head)):  # the factor itself is not rounded
            assert abs(3 * third.double().norm() / whole.double().norm() - 1) < 1e-3


def test_9_float32_logits_of_half_precision_models(impl):
    """bfloat16 rounding of the logits adds to a small KL; logits_dtype=float32 does not. The numbers are the README's."""
    n, v, h = 4, 100, 64
    x, w = randn(n, h, dtype=torch.bfloat16), randn(v, h, seed=1, scale=0.5, dtype=torch.bfloat16)
    xt = (x.float() + randn(n, h, seed=2, scale=0.02)).to(torch.bfloat16)
    x.requires_grad_(), w.requires_grad_()
    exact = truth(x.double() @ w.double().T, xt.double() @ w.double().T, 1.0)
    rounded = linear_streaming_kl(x, w, xt, w.detach(), fkl_weight=1.0, impl=impl)
    full = linear_streaming_kl(x, w, xt, w.detach(), fkl_weight=1.0, logits_dtype=torch.float32, impl=impl)
    print(f"KL {exact.fkl.mean():.6f}, from bf16 logits {rounded.fkl.mean():.6f}, from fp32 logits {full.fkl.mean():.6f}")
    assert_values(full[1:], exact[1:])
    assert (rounded.fkl.mean() / exact.fkl.mean() - 1).abs() > 0.02
    d_logits = true_gradient(x.double() @ w.double().T, xt.double() @ w.double().T, 1.0)
    gradients = torch.autograd.grad(full.loss, (x, w))
    for gradient, true in zip(gradients, (d_logits @ w.double(), d_logits.T @ x.double())):
        assert gradient.dtype == torch.bfloat16 and relative_rms(gradient, true) < 4e-3


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_9_no_underflow_in_float16(impl, reduction):
    """Weights of one in 32 x 4096 under a loss scale as large: the chunk's float16 gradients must not see the weights alone."""
    tensors = heads(n=8, dtype=torch.float16)
    tiny = torch.full((8,), 1 / 131072, device=DEVICE)
    expected = torch.autograd.grad(linear_streaming_kl(*tensors, fkl_weight=0.3, impl=impl).loss, tensors[:2])
    out = linear_streaming_kl(*tensors, fkl_weight=0.3, weight=tiny, reduction=reduction, impl=impl)
    for g, e in zip(torch.autograd.grad(out.loss.sum() * 131072, tensors[:2]), expected):
        assert relative_rms(g, e.double()) < 1e-3


def test_9_mixed_dtypes(impl):
    """A float32 student beside a teacher cached in bfloat16, and the other way around."""
    for dtypes in ((torch.float32, torch.bfloat16), (torch.float16, torch.float32)):
        z, y = randn(3, 70, dtype=dtypes[0]), randn(3, 70, seed=1, dtype=dtypes[1])
        out, gradient = value_and_gradient(z, y, fkl_weight=0.3, impl=impl)
        assert_values(out, truth(z, y, 0.3))
        assert gradient.dtype == dtypes[0] and relative_rms(gradient, true_gradient(z, y, 0.3)) < 1e-3
        x, w, xt, wt = heads(dtype=dtypes[0])
        xt, wt = xt.to(dtypes[1]), wt.to(dtypes[1])
        out = linear_streaming_kl(x, w, xt, wt, fkl_weight=0.3, impl=impl)
        assert_values(out[1:], truth((x @ w.T).detach(), xt @ wt.T, 0.3)[1:])
        assert [g.dtype for g in torch.autograd.grad(out.loss, (x, w))] == [dtypes[0]] * 2


def test_9_float64_is_exact_in_torch():
    z, y = randn(3, 70).double(), randn(3, 70, seed=1).double()
    out, gradient = value_and_gradient(z, y, fkl_weight=0.3)
    torch.testing.assert_close(tuple(out), tuple(truth(z, y, 0.3)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, true_gradient(z, y, 0.3), rtol=1e-12, atol=1e-14)
    with pytest.raises(ValueError, match="float64"):
        streaming_kl(z, y, fkl_weight=0.3, impl="triton")


def test_10_temperature_scales_nothing_else(impl):
    """The loss at T is the plain KL of the divided logits, without a factor T^2; its gradient has the factor 1 / T."""
    z, y = randn(3, 70), randn(3, 70, seed=1)
    hot, d_hot = value_and_gradient(z, y, fkl_weight=0.3, temperature=4.0, impl=impl)
    cold, d_cold = value_and_gradient(z / 4, y / 4, fkl_weight=0.3, impl=impl)
    torch.testing.assert_close(tuple(hot), tuple(cold))
    torch.testing.assert_close(d_hot, d_cold / 4)


def test_10_wrong_arguments_are_refused():
    z, (x, w, xt, wt) = randn(3, 50), heads()
    good = {"fkl_weight": 1.0}
    for wrong, message in [
        ({"fkl_weight": 1.5}, r"\[0, 1\]"),
        ({"fkl_weight": NAN}, r"\[0, 1\]"),
        ({"temperature": 0.0}, "positive"),
        ({"temperature": NAN}, "positive"),
        ({"reduction": "batchmean"}, "reduction"),
        ({"impl": "cuda"}, "impl"),
        ({"weight": torch.ones(4, device=DEVICE)}, "one number per token"),
    ]:
        with pytest.raises(ValueError, match=message):
            streaming_kl(z, z, **good | wrong)
        with pytest.raises(ValueError, match=message):
            linear_streaming_kl(x, w, xt, wt, **good | wrong)
    with pytest.raises(TypeError, match="fkl_weight"):
        streaming_kl(z, z)
    with pytest.raises(TypeError, match="softcap"):
        streaming_kl(z, z, fkl_weight=1.0, softcap=30.0)
    for bad, message in [
        ((z, z[:2]), "3 tokens"),
        ((z[0], z[0]), "matrix"),
        ((z.long(), z), "matrix of floats"),
        ((z, z.clone().requires_grad_()), r"teacher_logits.detach\(\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            streaming_kl(*bad, **good)
    for bad, message in [
        ((x, w, xt[:2], wt), "5 tokens"),
        ((x, w.half(), xt, wt), "does not go with"),
        ((x, w, xt[:, :5], wt), "does not go with"),
        ((x, w, xt.clone().requires_grad_(), wt), r"teacher_hidden.detach\(\)"),
        ((x, w, xt, wt.clone().requires_grad_()), r"teacher_head.detach\(\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            linear_streaming_kl(*bad, **good)
        with pytest.raises(ValueError, match=message):
            linear_divergence(lambda s, t: s.sum(-1), *bad)
    with pytest.raises(ValueError, match="chunk_tokens"):
        linear_streaming_kl(x, w, xt, wt, chunk_tokens=0, **good)
    with pytest.raises(ValueError, match="weight.detach"):
        streaming_kl(z, z, weight=torch.ones(3, device=DEVICE, requires_grad=True), **good)


class LargestAllocation(torch.utils._python_dispatch.TorchDispatchMode):
    """Bytes of the largest tensor that any operation inside makes; views of `inputs` do not count."""

    def __init__(self, *inputs):
        super().__init__()
        self.known, self.bytes = {x.untyped_storage().data_ptr() for x in inputs}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self.known:
                self.bytes = max(self.bytes, x.numel() * x.itemsize)
        return result


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_11_no_tensor_of_tokens_by_vocabulary(impl, reduction, monkeypatch):
    """Forward and backward with few and with many tokens: the largest allocation is the chunk, in both."""
    monkeypatch.setattr(triton_kl, "BLOCK", 4096)
    monkeypatch.setattr(reference, "CHUNK_BYTES", dict.fromkeys(("cpu", "cuda"), 2 * 600 * 4))  # 2 rows
    v, chunk = 600, 2
    for n in (4, 12):
        tensors = heads(n=n, v=v, h=2, other=2)
        with LargestAllocation(*tensors) as linear:
            linear_streaming_kl(*tensors, fkl_weight=0.3, reduction=reduction, chunk_tokens=chunk, impl=impl).loss.sum().backward()
        assert chunk * v * 4 <= linear.bytes <= chunk * (v + 16) * 4
    z, y = randn(n, v).requires_grad_(), randn(n, v, seed=1)
    with LargestAllocation(z, y) as forward:
        loss = streaming_kl(z, y, fkl_weight=0.3, impl=impl, inplace_backward=True).loss
    assert forward.bytes <= 2 * 4 * v
    with LargestAllocation(z, y) as backward:
        loss.backward()
    assert backward.bytes <= 2 * 4 * v


def test_11_few_large_chunks(monkeypatch):
    """Chunks follow a budget of bytes: one for a toy, 4096 tokens for Qwen3 in bfloat16 on a GPU."""
    gpu_device, cpu_device = torch.device("cuda"), torch.device("cpu")
    assert chunks.default_chunk(64, *[torch.float32] * 4, cpu_device) > 100_000
    assert chunks.default_chunk(151936, *[torch.bfloat16] * 4, gpu_device) == 4096
    for dtypes, logits_dtype in (((torch.bfloat16,) * 2, torch.float32), ((torch.float32,) * 2, None), ((torch.float16,) * 2, None)):
        tokens = chunks.default_chunk(151936, *dtypes, *[logits_dtype or dtypes[0]] * 2, gpu_device)
        assert tokens % 128 == 0 and 1024 <= tokens <= 4096
    assert chunks.default_chunk(10**9, *[torch.float32] * 4, cpu_device) == 1
    monkeypatch.setattr(chunks, "LOGITS_BYTES", {"cpu": 2 * 50 * 8, "cuda": 1})  # two tokens
    tensors = heads(n=500)
    with LargestAllocation(*tensors) as run:
        linear_streaming_kl(*tensors, fkl_weight=0.3, impl="torch")
    assert run.bytes < 128 * 64 * 4 * 2


@pytest.fixture(scope="module", autouse=True)
def resource_report(request, tmp_path_factory):
    """python -m benchmarks.kernel_resources, begun before the first test: it takes half a minute, in a process without the interpreter."""
    if not any(item.name.startswith("test_11_compiles") for item in request.session.items):
        yield None
        return
    path = tmp_path_factory.mktemp("resources") / "resources.json"
    command = [sys.executable, "-m", "benchmarks.kernel_resources", "--json", str(path)]
    process = subprocess.Popen(command, cwd=ROOT, env=COMPILER, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    yield process, path
    process.kill()
    process.wait()


def test_11_compiles_for_gpus_without_spilling(resource_report):
    """Every kernel for sm_80, sm_90 and sm_100, in every dtype."""
    process, path = resource_report
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    rows = json.loads(path.read_text())
    built = {(r["kernel"], r["arch"], r["dtype"]) for r in rows if r["rows"] == "aligned"}
    assert len(built) == 3 * 3 * 3 and {a for _, a, _ in built} == {"sm_80", "sm_90", "sm_100"}
    assert all(r["stack"] == r["local"] == 0 and r["registers"] < 255 and r["programs_per_sm"] >= 2 for r in rows)


def test_12_works_without_triton():
    """And says what is missing when Triton is asked for on a CPU."""
    code = """
import sys; sys.modules["triton"] = None
import torch; from streaming_kl import *
x, w = torch.randn(3, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
linear_streaming_kl(x, w, x.detach(), w.detach(), fkl_weight=0.5).loss.backward()
streaming_kl(x @ w.T, torch.randn(3, 9), fkl_weight=0.5).loss.backward()
try: streaming_kl(x, x.detach(), fkl_weight=0.5, impl="triton")
except ImportError: pass
else: raise SystemExit("triton was not needed")
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_12_triton_on_a_cpu_is_refused():
    code = 'import torch, streaming_kl; x = torch.ones(2, 3); streaming_kl.streaming_kl(x, x, fkl_weight=0.5, impl="triton")'
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=COMPILER, capture_output=True, text=True)
    assert done.returncode and 'impl="triton" needs CUDA tensors' in done.stderr


def test_12_only_the_gradients_that_are_needed(impl):
    both = heads()
    linear_streaming_kl(*both, fkl_weight=0.3, impl=impl).loss.backward()
    for reduction in ("sum", "none"):
        for which in (0, 1):
            tensors = heads()
            tensors[1 - which].requires_grad_(False)
            out = linear_streaming_kl(*tensors, fkl_weight=0.3, reduction=reduction, chunk_tokens=4, impl=impl)
            out.loss.sum().backward()
            assert tensors[1 - which].grad is None
            torch.testing.assert_close(tensors[which].grad, both[which].grad)
    tensors = heads()
    with torch.no_grad():
        out = linear_streaming_kl(*tensors, fkl_weight=0.3, impl=impl)
    assert not out.loss.requires_grad
    frozen = [t.detach() for t in tensors]
    for fn in (lambda: linear_streaming_kl(*frozen, fkl_weight=0.3, impl=impl), lambda: streaming_kl(frozen[0], frozen[0], fkl_weight=0.3)):
        assert not fn().loss.requires_grad


def test_12_deterministic(impl):
    runs = []
    for _ in range(2):
        tensors = heads()
        loss = linear_streaming_kl(*tensors, fkl_weight=0.3, chunk_tokens=4, impl=impl).loss
        runs.append((loss, *torch.autograd.grad(loss, tensors[:2])))
    torch.testing.assert_close(*runs, rtol=0, atol=0)


def test_12_autocast(impl):
    """As nn.Linear: computed in autocast's dtype, gradients in the parameters' own, the head's without rounding in between."""
    x, w, xt, wt = heads()
    with torch.autocast(DEVICE, torch.bfloat16):
        out = linear_streaming_kl(x, w, xt.bfloat16(), wt, fkl_weight=0.3, impl=impl)
        same = streaming_kl(x @ w.T, xt @ wt.T, fkl_weight=0.3, impl=impl)
    gradients = torch.autograd.grad(out.loss, (x, w))
    half = [t.detach().bfloat16().requires_grad_(i < 2) for i, t in enumerate((x, w, xt, wt))]
    expected = linear_streaming_kl(*half, fkl_weight=0.3, impl=impl)
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(same.loss, expected.loss)
    for g, e in zip(gradients, torch.autograd.grad(expected.loss, half[:2])):
        assert g.dtype == torch.float32 and relative_rms(g, e.double()) < 4e-3
    assert not torch.equal(gradients[1], gradients[1].bfloat16().float())
    with torch.autocast(DEVICE, torch.bfloat16):
        full = linear_streaming_kl(x, w, xt, wt, fkl_weight=0.3, logits_dtype=torch.float32, impl=impl)
    half = [t.detach() for t in half]
    assert_values(full[1:], truth(half[0].double() @ half[1].double().T, half[2].double() @ half[3].double().T, 0.3)[1:])


def test_12_torch_compile(impl):
    """Compiled whole (fullgraph), without a change in any number; linear_divergence splits the graph but works."""
    weight = torch.tensor([1.0, 0, 2, 1, 1], device=DEVICE)

    def both(x, w, xt, wt, reduction):
        out = linear_streaming_kl(x, w, xt, wt, fkl_weight=0.3, weight=weight, reduction=reduction, impl=impl)
        other = streaming_kl(x @ w.T, xt @ wt.T, fkl_weight=0.3, weight=weight, reduction=reduction, impl=impl)
        return (out.loss * 2).sum() + other.loss.sum() + out.fkl.sum()

    def divergence(x, w, xt, wt, reduction):
        return linear_divergence(lambda s, t: (s.softmax(-1) - t.softmax(-1)).abs().sum(-1), x, w, xt, wt, reduction=reduction) * 2

    for function, reduction, whole in ((both, "mean", True), (both, "none", True), (divergence, "sum", False)):
        torch._dynamo.reset()
        tensors = heads(n=5)
        compiled = torch.compile(function, backend="aot_eager", fullgraph=whole)
        results = []
        for f in (function, compiled):
            loss = f(*tensors, reduction)
            results.append((loss, *torch.autograd.grad(loss, tensors[:2])))
        torch.testing.assert_close(*results)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="inplace_backward"):
        torch.compile(lambda z: streaming_kl(z, z, fkl_weight=1.0, inplace_backward=True).loss, backend="eager", fullgraph=True)(tensors[3])


FSDP_CODE = """
import sys, torch, torch.nn as nn, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Partial
from streaming_kl import linear_streaming_kl
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
mesh = dist.init_device_mesh("cpu", (2,))
torch.manual_seed(0)
tokens, xt, wt = torch.randn(8, 6), torch.randn(8, 5), torch.randn(11, 5)

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 4), nn.Linear(4, 11, bias=False)
    def forward(self, tokens, xt):  # the loss inside the root's forward, where the head is whole
        return linear_streaming_kl(self.body(tokens), self.head.weight, xt, wt, fkl_weight=0.3, reduction="mean").loss

plain = Model()
plain(tokens, xt).backward()
expected = [p.grad for p in plain.parameters()]
mine = slice(4 * rank, 4 * rank + 4)
model = Model()
model.load_state_dict(plain.state_dict())
fully_shard(model, mesh=mesh)
model(tokens[mine], xt[mine]).backward()
for p, e in zip(model.parameters(), expected):
    torch.testing.assert_close(p.grad.full_tensor(), e)

hidden = torch.randn(8, 4)
loss = linear_streaming_kl(hidden, plain.head.weight, xt, wt, fkl_weight=0.3, reduction="mean").loss
(e,) = torch.autograd.grad(loss, plain.head.weight)
model.reshard()
head = model.head.weight
try: linear_streaming_kl(hidden[mine], head, xt[mine], wt, fkl_weight=0.3)
except TypeError as error: assert "full_tensor" in str(error)
else: raise SystemExit("a sharded head was taken")
whole = head.full_tensor(grad_placements=[Partial("avg")])
loss = linear_streaming_kl(hidden[mine], whole, xt[mine], wt, fkl_weight=0.3, reduction="mean").loss
(g,) = torch.autograd.grad(loss, head)
torch.testing.assert_close(g.full_tensor(), e)
dist.barrier()  # a rank that leaves first can make gloo abort the other
dist.destroy_process_group()
"""


def test_12_fsdp_sharded_callers(tmp_path):
    """Two ranks: inside FSDP's forward it just works; a sharded head is refused, with the way to gather it, which works too."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    commands = [[sys.executable, "-c", FSDP_CODE, str(rank), str(tmp_path / "store")] for rank in range(2)]
    ranks = [subprocess.Popen(c, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) for c in commands]
    for process in ranks:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors


def test_bench_runs(tmp_path):
    """The table that CPUs can run: every row has its times, or says why not."""
    sizes = ["--n", "8", "--vocab", "100", "--hidden", "8", "--teacher_hidden", "12", "--repeats", "1", "--dtype", "float32"]
    bench.main(bench.get_args([*sizes, "--out", str(tmp_path)]))
    report = json.loads((tmp_path / "bench.json").read_text())
    ran = [row for row in report["rows"] if "why" not in row]
    assert len(report["rows"]) == 3 * sum(map(len, bench.CONTENDERS.values()))
    assert {"streaming_kl torch", "linear_streaming_kl torch", "torch eager"} <= {row["name"] for row in ran}
    assert all(row["loss_error"] < 1e-5 and row["gradient_error"] < 1e-5 and row["both_ms"] > 0 for row in ran)


@pytest.mark.peer
@pytest.mark.parametrize("entry,name", [(entry, name) for entry, names in bench.CONTENDERS.items() for name in names])
def test_peers_agree(entry, name):
    """Every implementation in the benchmark computes the KL that it claims."""
    args = bench.get_args(["--dtype", "float32", "--hidden", "64", "--teacher_hidden", "96"])
    for fkl_weight in (1.0, 0.0):
        try:
            function = bench.CONTENDERS[entry][name](fkl_weight)
        except (bench.Unavailable, ImportError) as reason:
            pytest.skip(str(reason)) if fkl_weight else None
            continue
        assert max(bench.error(entry, function, fkl_weight, args, DEVICE)) < 1e-3


# ------------------------------------------------------------------------------------------------------------ on a GPU


@gpu
def test_5_beyond_32_bits_on_gpu():
    """N * V beyond 2^31, in one allocation."""
    n, v = 14200, 151936
    torch.use_deterministic_algorithms(False)
    z, y = (torch.randn(n, v, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    rows = [0, 14133, 14134, n - 1]
    expected, true = truth(z[rows], y[rows], 0.3), true_gradient(z[rows], y[rows], 0.3)
    z.requires_grad_()
    out = streaming_kl(z, y, fkl_weight=0.3, reduction="none", inplace_backward=True)
    assert_values([x[rows] for x in out], expected)
    (gradient,) = torch.autograd.grad(out.loss.sum(), z)
    assert relative_rms(gradient[rows], true) < 4e-3


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_9_no_worse_than_torch_on_gpu(dtype):
    """Loss and gradient errors against those of torch's own log_softmax in the same dtype."""
    z, y = randn(64, 151936, scale=3, dtype=dtype), randn(64, 151936, seed=1, scale=3, dtype=dtype)
    out, gradient = value_and_gradient(z, y, fkl_weight=1.0)
    eager = z.clone().requires_grad_()
    log_p, log_q = eager.float().log_softmax(-1), y.float().log_softmax(-1)
    loss = (log_q.exp() * (log_q - log_p)).sum(-1)
    (eager_gradient,) = torch.autograd.grad(loss.sum(), eager)
    expected, true = truth(z, y, 1.0).loss, true_gradient(z, y, 1.0)
    assert_values(out, truth(z, y, 1.0))
    assert (out.loss - expected).abs().max() <= (loss - expected).abs().max() + 1e-6
    assert relative_rms(gradient, true) <= 1.05 * relative_rms(eager_gradient, true) + 1e-6


@gpu
def test_8_float32_products_on_gpu():
    """cuBLAS's float32 results from bfloat16 inputs agree with the cast-first way that CPUs take."""
    a, b = randn(96, 64, dtype=torch.bfloat16), randn(64, 48, seed=1, dtype=torch.bfloat16)
    total = randn(96, 48, seed=2)
    expected = total + a.float() @ b.float()
    chunks.add_product(total, a, b)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-4)
    buffer = chunks.aligned_buffer(96, 48, torch.float32, torch.device("cuda"))
    torch.testing.assert_close(chunks.product(a, b, buffer), a.float() @ b.float(), rtol=1e-5, atol=1e-4)


@gpu
def test_11_memory_on_gpu():
    """What linear_streaming_kl takes beyond inputs and gradients: at most 3.2 GB for Qwen3, and no more for four times the tokens."""
    torch.use_deterministic_algorithms(False)
    v, w, wt = 151936, randn(151936, 1024, dtype=torch.bfloat16).requires_grad_(), randn(151936, 2560, dtype=torch.bfloat16)
    extra = []
    for n in (8192, 32768):
        x, xt = randn(n, 1024, dtype=torch.bfloat16).requires_grad_(), randn(n, 2560, dtype=torch.bfloat16)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        linear_streaming_kl(x, w, xt, wt, fkl_weight=0.5).loss.backward()
        extra.append(torch.cuda.max_memory_allocated() - before - x.grad.nbytes - w.grad.nbytes)
        x.grad = w.grad = None
    assert max(extra) < 3.2e9 and extra[1] - extra[0] < 0.1e9 < n * v


@gpu
def test_11_bandwidth_on_gpu():
    """Forward and backward in place move 4 reads and 1 write of the logits at 80% or more of the rate of a copy."""
    torch.use_deterministic_algorithms(False)
    z, y = (torch.randn(8192, 151936, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    z.requires_grad_()

    def seconds(function):
        for _ in range(3):
            function()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(10):
            function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e4

    target = torch.empty_like(y)
    copy = 2 * y.nbytes / seconds(lambda: target.copy_(y))
    del target
    ours = 5 * y.nbytes / seconds(lambda: torch.autograd.grad(streaming_kl(z, y, fkl_weight=0.5, inplace_backward=True).loss, z))
    print(f"copy {copy / 1e9:.0f} GB/s, forward and backward {ours / 1e9:.0f} GB/s")
    assert ours > 0.8 * copy


@gpu
def test_11_one_compilation_on_gpu():
    """Other numbers of tokens, weights of the mix, temperatures and upstream gradients reuse the compiled kernels; none of them spills."""
    device = torch.cuda.current_device()
    jitted = (triton_kl._statistics_kernel, triton_kl._gradient_kernel, triton_kl._fused_kernel)
    counts = []
    for n, fkl_weight, temperature in ((16, 0.3, 1.0), (17, 0.6, 2.0), (1000, 0.9, 0.5)):
        z, y = randn(n, 8192), randn(n, 8192, seed=1)
        value_and_gradient(z, y, randn(n), fkl_weight=fkl_weight, temperature=temperature)
        linear_streaming_kl(*heads(n=n, v=8192), fkl_weight=fkl_weight, temperature=temperature).loss.backward()
        counts.append([len(kernel.device_caches[device][0]) for kernel in jitted])
    assert counts[0] == counts[1] == counts[2]
    for kernel in jitted:
        for compiled in kernel.device_caches[device][0].values():
            compiled._init_handles()
            assert compiled.n_spills == 0


@gpu
def test_12_no_host_sync_on_gpu():
    """The host waits for the device nowhere, but for one count of live tokens in linear_streaming_kl with a weight."""
    torch.use_deterministic_algorithms(False)
    z, y, weight = randn(64, 1000).requires_grad_(), randn(64, 1000, seed=1), torch.ones(64, device="cuda")
    tensors = heads(n=64)
    for mode in ("default", "error"):  # the first round compiles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            for reduction in ("sum", "mean"):
                streaming_kl(z, y, fkl_weight=0.3, weight=weight, reduction=reduction).loss.backward()
                linear_streaming_kl(*tensors, fkl_weight=0.3, reduction=reduction).loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@gpu
def test_12_streams_and_devices_on_gpu():
    z, y = randn(64, 1000), randn(64, 1000, seed=1)
    expected = value_and_gradient(z, y, fkl_weight=0.3)[1]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)  # whoever runs on another stream would be early
        late = z * 1
        gradient = value_and_gradient(late, y, fkl_weight=0.3)[1]
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(gradient, expected)
    if torch.cuda.device_count() > 1:  # not the current device
        other = value_and_gradient(z.to("cuda:1"), y.to("cuda:1"), fkl_weight=0.3)[1]
        assert torch.equal(other.cpu(), expected.cpu())


@gpu
def test_12_inductor_on_gpu():
    tensors = heads(n=64, v=1000)

    def function(x, w, xt, wt):
        return linear_streaming_kl(x * 2, w, xt, wt, fkl_weight=0.3).loss + streaming_kl(x @ w.T, xt @ wt.T, fkl_weight=0.3).loss

    results = []
    for f in (function, torch.compile(function, fullgraph=True)):
        loss = f(*tensors)
        results.append((loss, *torch.autograd.grad(loss, tensors[:2])))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
