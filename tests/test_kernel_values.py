"""Values and gradients of the KL against float64 on the same inputs: both implementations, one contract."""

import math

import pytest
import torch

from kernel_helpers import (
    BLOCK,
    DEVICE,
    EPSILON,
    INF,
    INTERPRETED,
    MARKS,
    NAN,
    assert_close,
    assert_values,
    exact_logits,
    heads,
    needs_triton,
    randn,
    relative_rms,
    rounding,
    true_gradient,
    truth,
    value_and_gradient,
)
from streaming_kl import linear_streaming_kl, streaming_kl

pytestmark = MARKS


@pytest.mark.parametrize("fkl_weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_values_and_gradients(impl, fkl_weight, temperature):
    student, teacher = randn(4, 3 * BLOCK + 5, scale=3), randn(4, 3 * BLOCK + 5, seed=1, scale=3)
    upstream = randn(4, seed=2)
    options = {"fkl_weight": fkl_weight, "temperature": temperature}
    out, gradient = value_and_gradient(student, teacher, upstream, **options, impl=impl)
    assert_values(out, student, teacher, **options)
    assert_close(gradient, true_gradient(student, teacher, **options, upstream=upstream))
    assert not any(metric.requires_grad for metric in out[1:])


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("fkl_weight", [0.0, 0.3, 1.0])
def test_linear_values_and_gradients(impl, reduction, fkl_weight):
    tensors = heads(n=7)
    weight = torch.tensor([0.5, 0.2, 0, 1, 0.7, 0, 3], device=DEVICE)
    upstream = {"sum": 3, "mean": 3, "none": randn(7, seed=9)}[reduction]
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]
    losses = truth(exact[0] @ exact[1].T, exact[2] @ exact[3].T, fkl_weight, 0.7).loss * weight
    expected = {"sum": losses.sum(), "mean": losses.sum() / weight.double().sum(), "none": losses}[reduction]
    true = torch.autograd.grad((expected * upstream).sum(), exact[:2])
    live = weight != 0
    for chunk in (None, 1, 3) if fkl_weight == 0.3 else (3,):  # of 5 live tokens
        options = {"fkl_weight": fkl_weight, "temperature": 0.7}
        out = linear_streaming_kl(
            *tensors, **options, weight=weight, reduction=reduction, chunk_tokens=chunk, impl=impl
        )
        assert_close(out.loss, expected)
        assert_values(out[1:], *exact_logits(tensors), **options, rows=live)
        assert all((metric[~live] == 0).all() for metric in out[1:])
        assert_close(torch.autograd.grad((out.loss * upstream).sum(), tensors[:2]), true)


# --------------------------------------------------------------------------------- direction, KL


def test_direction_by_hand(impl):
    p, q = torch.tensor([[0.7, 0.2, 0.1]], device=DEVICE), torch.tensor([[0.5, 0.25, 0.25]], device=DEVICE)
    fkl = 0.7 * math.log(0.7 / 0.5) + 0.2 * math.log(0.2 / 0.25) + 0.1 * math.log(0.1 / 0.25)
    rkl = 0.5 * math.log(0.5 / 0.7) + 0.25 * math.log(0.25 / 0.2) + 0.25 * math.log(0.25 / 0.1)
    assert abs(fkl - rkl) > 0.005
    for fkl_weight in (0.0, 0.25, 1.0):
        out, gradient = value_and_gradient(q.log(), p.log() + 1, fkl_weight=fkl_weight, impl=impl)
        assert [out.fkl.item(), out.rkl.item()] == pytest.approx([fkl, rkl], rel=1e-5)
        assert out.loss.item() == pytest.approx(fkl_weight * fkl + (1 - fkl_weight) * rkl, rel=1e-5)
        forward, reverse = q - p, q * ((q / p).log() - rkl)
        assert_close(gradient, fkl_weight * forward + (1 - fkl_weight) * reverse)


@pytest.mark.parametrize("fkl_weight", [0.0, 0.5, 1.0])
def test_equal_logits_give_zero(impl, fkl_weight):
    logits = randn(3, 2 * BLOCK, scale=5)
    out, gradient = value_and_gradient(logits, logits + 8, fkl_weight=fkl_weight, impl=impl)
    assert_values(out, logits, logits + 8, fkl_weight)
    assert gradient.abs().max() < 32 * EPSILON  # of probabilities up to 1, whose logits differ by roundings


@pytest.mark.parametrize("offsets", [(500, 0), (0, -500), (-900, 500)])
def test_offsets_change_nothing(impl, offsets):
    # multiples of 1/1024 survive an offset of 900 unrounded
    student, teacher = ((randn(3, 70, seed=s, scale=3) * 1024).round() / 1024 for s in (0, 1))
    moved = student + offsets[0], teacher + offsets[1]
    out, gradient = value_and_gradient(*moved, fkl_weight=0.5, impl=impl)
    assert_values(out, student, teacher, 0.5)
    assert_close(gradient, true_gradient(student, teacher, 0.5))


@pytest.mark.parametrize("offset", [0, 500])
def test_near_convergence(impl, offset):
    student = randn(4, 3 * BLOCK)
    teacher = student + randn(4, 3 * BLOCK, seed=1, scale=0.015) + offset
    expected = truth(student, teacher, 1.0).fkl
    assert 5e-5 < expected.min() and expected.max() < 3e-4
    for fkl_weight in (0.0, 1.0):
        out, gradient = value_and_gradient(student, teacher, fkl_weight=fkl_weight, impl=impl)
        assert_close(out.loss, truth(student, teacher, fkl_weight).loss, 0.01)
        assert_close(gradient, true_gradient(student, teacher, fkl_weight), 0.01)


def test_gradients_sum_to_zero(impl):
    student, teacher = randn(2, 100, scale=4), randn(2, 100, seed=1)
    for fkl_weight in (0.0, 0.4, 1.0):
        _, gradient = value_and_gradient(student, teacher, fkl_weight=fkl_weight, impl=impl)
        assert (gradient.sum(-1).abs() < 1e-5 * gradient.abs().sum(-1)).all()


def test_temperature_scales_nothing_else(impl):
    """The loss at T is the KL of the divided logits, with no factor T^2; its gradient has a factor 1 / T."""
    student, teacher = randn(3, 70), randn(3, 70, seed=1)
    hot, d_hot = value_and_gradient(student, teacher, fkl_weight=0.3, temperature=4.0, impl=impl)
    cold, d_cold = value_and_gradient(student / 4, teacher / 4, fkl_weight=0.3, impl=impl)
    assert_close(hot, cold)
    assert_close(d_hot, d_cold / 4)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("needs_gradient", [True, False])
def test_the_likeliest_tokens_of_both_models(impl, reduction, needs_gradient):
    """From the logits of the KL, before the gradient is written over them; the KL is as without them."""
    tensors = [x.detach().requires_grad_(needs_gradient and x.requires_grad) for x in heads(n=7, v=70)]
    weight = torch.tensor([0.5, 0.2, 0, 1, 0.7, 0, 3], device=DEVICE)
    live = weight != 0
    options = {"fkl_weight": 0.3, "temperature": 0.7, "weight": weight, "reduction": reduction, "impl": impl}
    for chunk in (None, 2):  # of 5 live tokens
        plain = linear_streaming_kl(*tensors, **options, chunk_tokens=chunk, vocab_size=61)
        out, top = linear_streaming_kl(*tensors, **options, chunk_tokens=chunk, vocab_size=61, top_k=6)
        assert all(torch.equal(a, b) for a, b in zip(plain, out))
        for logits, logps, ids in zip(exact_logits(tensors), top[::2], top[1::2]):
            expected = (logits[:, :61] / 0.7).log_softmax(-1).topk(6)
            assert torch.equal(ids[live], expected.indices[live]) and not logps.requires_grad
            torch.testing.assert_close(logps[live].double(), expected.values[live], rtol=1e-5, atol=1e-5)
            assert (logps[~live] == 0).all() and (ids[~live] == 0).all()
        if needs_gradient:
            losses = [x.sum() for x in (plain.loss, out.loss)]
            gradients = [torch.autograd.grad(loss, tensors[:2]) for loss in losses]
            assert all(torch.equal(a, b) for a, b in zip(*gradients))


# -------------------------------------------------------------------------------- infinities, NaN


def test_both_exclude_an_entry(impl):
    """The first block, single entries, all but one."""
    student, teacher = randn(3, 100), randn(3, 100, seed=1) * 2
    for logits in (student, teacher):
        logits[0, : BLOCK + 3] = -INF
        logits[1, ::3] = -INF
        logits[2, :77] = logits[2, 78:] = -INF
    keep = student.isfinite()
    for fkl_weight in (0.0, 0.5, 1.0):
        out, gradient = value_and_gradient(student, teacher, fkl_weight=fkl_weight, impl=impl)
        assert_values(out, student, teacher, fkl_weight)
        assert (gradient[~keep] == 0).all()
        for row in range(2):
            kept = (x[row, keep[row]][None] for x in (student, teacher))
            assert_close(gradient[row, keep[row]], true_gradient(*kept, fkl_weight)[0])
        assert gradient[2].abs().max() < 8 * EPSILON


@pytest.mark.parametrize("excluder", ["student", "teacher"])
def test_one_excludes_an_entry(impl, excluder):
    """One direction is infinite; the other stays exact, with its gradient."""
    student, teacher = randn(3, 100), randn(3, 100, seed=1)
    logits = student if excluder == "student" else teacher
    logits[0, 40] = -INF  # in the middle
    logits[1, : BLOCK + 1] = -INF  # the whole first block
    logits[2, 99] = -INF  # last
    finite = 0.0 if excluder == "student" else 1.0
    out, gradient = value_and_gradient(student, teacher, fkl_weight=finite, impl=impl)
    assert_values(out, student, teacher, finite)
    assert ((out.fkl if excluder == "student" else out.rkl) == INF).all()
    clamped = (torch.where(x == -INF, -1e4, x) for x in (student, teacher))
    assert_close(gradient, true_gradient(*clamped, finite))
    for infinite in (1 - finite, 0.5):
        assert (streaming_kl(student, teacher, fkl_weight=infinite, impl=impl).loss == INF).all()


def test_underflow_and_saturation(impl):
    student, teacher = randn(5, 100), randn(5, 100, seed=1)
    student[0, ::2] -= 200  # log-probabilities whose exponentials float32 cannot hold
    teacher[1, ::2] -= 200
    student[2, 5] = teacher[2, 60] = 1e4  # one entry has all, in each a different one
    student[3] -= 1000  # far below zero
    teacher[3] -= 3000
    student[4] *= 30
    for fkl_weight in (0.0, 0.5, 1.0):
        out, gradient = value_and_gradient(student, teacher, fkl_weight=fkl_weight, impl=impl)
        assert_values(out, student, teacher, fkl_weight)
        assert_close(gradient, true_gradient(student, teacher, fkl_weight))


def test_infinite_ratios_that_underflow(impl):
    """The teacher's probability of an entry the student excludes underflows: 0 * inf is 0, in any order."""
    student, teacher = randn(2, 3 * BLOCK), randn(2, 3 * BLOCK, seed=1)
    student[0, 3], teacher[0, :BLOCK], teacher[0, -1] = -INF, -150, 100
    student[1, -1], teacher[1, -BLOCK:], teacher[1, 3] = -INF, -150, 100
    out, gradient = value_and_gradient(student, teacher, fkl_weight=0.5, impl=impl)
    assert_values(out, torch.where(student == -INF, -1e4, student), teacher, 0.5)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("bad", [NAN, INF])
def test_nan_surfaces_in_its_row_only(impl, bad):
    student, teacher = randn(5, 100), randn(5, 100, seed=1)
    clean_out, clean_gradient = value_and_gradient(student, teacher, fkl_weight=0.5, impl=impl)
    student[1, 2] = teacher[2, 99] = bad
    student[3] = -INF  # a row without any probability
    out, gradient = value_and_gradient(student, teacher, fkl_weight=0.5, impl=impl)
    for x in (out.loss, out.fkl, out.rkl, gradient.sum(-1)):
        assert x.isnan().tolist() == [False, True, True, True, False]
    assert torch.equal(gradient[[0, 4]], clean_gradient[[0, 4]])
    assert torch.equal(out.loss[[0, 4]], clean_out.loss[[0, 4]])


@pytest.mark.parametrize("vocab", [4 * BLOCK, 4 * BLOCK + 1, 4 * BLOCK + 9])
def test_infinities_in_blocks_and_tails(impl, vocab):
    """-inf and NaN in the tail alone, in a whole block alone, in both, and filling either."""
    student, teacher = randn(6, vocab), randn(6, vocab, seed=1)
    for row, entries in enumerate([[-1], [BLOCK], [-1, BLOCK], slice(0, BLOCK), slice(4 * BLOCK - 1, None)]):
        student[row, entries] = teacher[row, entries] = -INF
    keep = student.isfinite()
    out, gradient = value_and_gradient(student, teacher, fkl_weight=0.4, impl=impl)
    assert_values(out, student, teacher, 0.4)
    assert (gradient[~keep] == 0).all()
    for row in range(6):
        kept = (x[row, keep[row]][None] for x in (student, teacher))
        assert_close(gradient[row, keep[row]], true_gradient(*kept, 0.4)[0])
    student[0, -1], teacher[1, BLOCK] = NAN, NAN
    out, gradient = value_and_gradient(student, teacher, fkl_weight=0.4, impl=impl)
    assert out.loss.isnan().tolist() == gradient.sum(-1).isnan().tolist() == [True] * 2 + [False] * 4


# --------------------------------------------------------------------------- vocabularies, layout


@pytest.mark.parametrize(
    "vocab", [1, 2, 7, BLOCK - 1, BLOCK, BLOCK + 1, BLOCK + 16, 3 * BLOCK, 3 * BLOCK + 1, 5 * BLOCK + 21]
)
def test_any_vocabulary(impl, vocab):
    """Logits far below and far above 0: an entry read past the end as 0 would show in one of them."""
    for offset in (-50, 50):
        student = randn(2, vocab, scale=3) + offset
        teacher = randn(2, vocab, seed=1, scale=3) + offset
        out, gradient = value_and_gradient(student, teacher, fkl_weight=0.3, impl=impl)
        assert_values(out, student, teacher, 0.3)
        assert_close(gradient, true_gradient(student, teacher, 0.3))
    tensors = heads(n=3, v=vocab)
    loss = linear_streaming_kl(*tensors, fkl_weight=0.3, impl=impl).loss
    d_hidden, d_head = torch.autograd.grad(loss, tensors[:2])
    d_logits = true_gradient(*exact_logits(tensors), 0.3)
    assert_close(d_hidden, d_logits @ tensors[1].double())
    assert_close(d_head, d_logits.T @ tensors[0].double())


@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("vocab", [151936, 151669])
def test_full_vocabulary(impl, vocab):
    """Blocks of their real size; KLs from large to 1e-4."""
    student = randn(2, vocab, scale=3)
    near, far = student[0] + randn(vocab, seed=1, scale=0.015), randn(vocab, seed=2, scale=3)
    teacher = torch.stack([near, far]) + 200
    out, gradient = value_and_gradient(student, teacher, fkl_weight=0.5, impl=impl)
    assert_values(out, student, teacher, 0.5)
    true = true_gradient(student, teacher, 0.5)
    assert_close(gradient[0], true[0], 1e-3)
    assert_close(gradient[1], true[1])


def test_padded_vocabulary(impl):
    """vocab_size cuts both models, whatever lies beyond, and lets their sizes differ."""
    student, teacher = randn(3, 60), randn(3, 70, seed=1)
    student[:, 50:], teacher[:, 50:] = 1e4, NAN
    out, gradient = value_and_gradient(student, teacher, fkl_weight=0.3, vocab_size=50, impl=impl)
    assert_values(out, student[:, :50], teacher[:, :50], 0.3)
    assert_close(gradient[:, :50], true_gradient(student[:, :50], teacher[:, :50], 0.3))
    assert (gradient[:, 50:] == 0).all()

    student_hidden, student_head, teacher_hidden, teacher_head = tensors = heads()
    cut = linear_streaming_kl(*tensors, fkl_weight=0.3, impl=impl)
    expected = torch.autograd.grad(cut.loss, (student_hidden, student_head))
    padded = torch.cat([student_head, torch.full_like(student_head[:3], NAN)]).detach().requires_grad_()
    padded_teacher = torch.cat([teacher_head, torch.full_like(teacher_head[:9], NAN)])
    tensors = student_hidden, padded, teacher_hidden, padded_teacher
    out = linear_streaming_kl(*tensors, fkl_weight=0.3, vocab_size=50, impl=impl)
    d_hidden, d_head = torch.autograd.grad(out.loss, (student_hidden, padded))
    assert_close([out.loss, d_hidden, d_head[:50]], [cut.loss, *expected])
    assert (d_head[50:] == 0).all()


def test_any_layout(impl):
    """Rows apart, transposed, offset, every other row, a broadcast teacher: as if contiguous."""
    student, teacher = randn(4, 70), randn(4, 70, seed=1)
    expected_out, expected = value_and_gradient(student, teacher, fkl_weight=0.3, impl=impl)
    wide = randn(9, 101)
    layouts = wide[1:5, 3:73], wide[:8:2, :70], wide.T[:70].T[:4], torch.empty(70, 4, device=DEVICE).T
    for view in layouts:
        for inplace in (False, True):
            leaf = view.detach().copy_(student).requires_grad_()
            options = {"fkl_weight": 0.3, "reduction": "none", "inplace_backward": inplace, "impl": impl}
            out = streaming_kl(leaf, teacher, **options)
            (gradient,) = torch.autograd.grad(out.loss.sum(), leaf)
            assert_close([out.loss, gradient], [expected_out.loss, expected])
    one_row = teacher[:1].expand(4, 70)
    out, _ = value_and_gradient(student, one_row, fkl_weight=0.3, impl=impl)
    assert_values(out, student, one_row, 0.3)


def test_offsets_beyond_32_bits(impl):
    """Rows 2^28 entries apart: the tenth begins beyond 2^31. Memory that is never touched costs nothing."""
    if DEVICE == "cuda":
        pytest.skip("test_kernel_gpu.py does this with real rows")
    torch.use_deterministic_algorithms(False)  # or the memory below would be filled with NaN
    storage = torch.empty(9 * 2**28 + 8, dtype=torch.float16)
    student = torch.as_strided(storage, (10, 8), (2**28, 1))
    student.copy_(randn(10, 8))
    teacher = randn(10, 8, seed=1, dtype=torch.float16)
    last = student[9:].clone(), teacher[9:]
    weight = torch.tensor([1.0] + [0.0] * 8 + [1.0])
    leaf = student.detach().requires_grad_()
    options = {"fkl_weight": 0.3, "reduction": "none", "impl": impl}
    out = streaming_kl(leaf, teacher, weight=weight, inplace_backward=True, **options)
    assert_values([metric[9:] for metric in out], *last, 0.3)
    out.loss.sum().backward()  # over `student` itself
    assert relative_rms(student[9:], true_gradient(*last, 0.3)) < rounding(impl, torch.float16)
    assert (student[1:9] == 0).all()


def test_more_rows_than_a_grid_dimension():
    student, teacher = randn(70000, 3), randn(70000, 3, seed=1)
    impl = "torch" if INTERPRETED else "triton"
    out, gradient = value_and_gradient(student, teacher, fkl_weight=0.3, impl=impl)
    assert_values(out, student, teacher, 0.3)
    assert_close(gradient, true_gradient(student, teacher, 0.3))
