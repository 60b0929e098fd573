"""What the kernel tests share: the textbook in float64, how close float32 can come to it, and inputs.

Without a GPU the Triton kernels run in Triton's interpreter; without Triton (macOS) their tests are skipped.
"""

import importlib.util
import os
import sys

import pytest
import torch

from streaming_kl import KLOutput, streaming_kl

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = DEVICE == "cpu"
COMPILER = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}  # to compile in
HAS_TRITON = importlib.util.find_spec("triton") is not None
triton_kl = None
if HAS_TRITON and INTERPRETED:
    # Triton reads the variable while it is imported: import it now, again if another test has.
    for name in list(sys.modules):
        if name == "triton" or name.startswith("triton.") and not name.startswith("triton._C"):
            del sys.modules[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import triton.experimental.gluon.language  # noqa: F401  as the interpreter will

        from streaming_kl import triton_kl
elif HAS_TRITON:
    from streaming_kl import triton_kl  # noqa: F401  for the tests
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")

INF, NAN = float("inf"), float("nan")
EPSILON = 2**-23  # of float32
BLOCK = 32 if INTERPRETED else 128  # the `impl` fixture makes blocks this small
STEP = {torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}  # to the next number, relative
MARKS = [
    pytest.mark.usefixtures("uninitialised_memory_is_nan"),
    # numpy's, in the interpreter
    pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero):RuntimeWarning"),
]


def randn(*shape, seed=0, scale=1.0, dtype=torch.float32):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(DEVICE, dtype)


def heads(n=5, v=50, h=8, teacher_h=12, dtype=torch.float32, seed=0):
    """student_hidden, student_head, teacher_hidden, teacher_head; the student's require gradients."""
    shapes = (n, h), (v, h), (n, teacher_h), (v, teacher_h)
    return [randn(*shape, seed=seed + i).to(dtype).requires_grad_(i < 2) for i, shape in enumerate(shapes)]


def exact_logits(tensors):
    """(student logits, teacher logits) in float64 of what `heads` returns."""
    student_hidden, student_head, teacher_hidden, teacher_head = (x.detach().double() for x in tensors)
    return student_hidden @ student_head.T, teacher_hidden @ teacher_head.T


def expectation(log_p, x):
    """sum_v p x with 0 * inf = 0"""
    zero = log_p == -INF
    return torch.where(zero, 0, log_p.exp() * torch.where(zero, 0, x)).sum(-1)


def truth(student, teacher, fkl_weight, temperature=1.0):
    """Per token (loss, fkl, rkl, student entropy, teacher entropy) by the textbook, in float64."""
    log_q = (student.double() / temperature).log_softmax(-1)
    log_p = (teacher.double() / temperature).log_softmax(-1)
    fkl, rkl = expectation(log_p, log_p - log_q), expectation(log_q, log_q - log_p)
    loss = {0: rkl, 1: fkl}.get(fkl_weight, fkl_weight * fkl + (1 - fkl_weight) * rkl)
    return KLOutput(loss, fkl, rkl, -expectation(log_q, log_q), -expectation(log_p, log_p))


def true_gradient(student, teacher, fkl_weight, temperature=1.0, upstream=None):
    student = student.detach().double().requires_grad_()
    losses = truth(student, teacher, fkl_weight, temperature).loss
    upstream = torch.ones_like(losses) if upstream is None else upstream.double()
    return torch.autograd.grad(losses, student, upstream)[0]


def tolerance(student, teacher, temperature=1.0):
    """(N,) What float32 rounding may do to a row's values, whatever the CPU and its order of summation.

    A value is a sum of p_v x_v, where x_v is a difference of logits or a log-probability. Rounding a shifted
    logit u_v changes x_v by about epsilon |u_v| and p_v by epsilon |u_v| p_v. Pairwise and blocked sums of V
    terms add a few epsilon sum p_v |x_v|. Together: c epsilon sum p_v (1 + |u_v|) (1 + |x_v|), c a few units.
    """
    u, v = (x.double() / temperature for x in (student, teacher))
    u, v = (x - x.amax(-1, keepdim=True) for x in (u, v))
    size = (1 + u.abs() + v.abs()) * (1 + (u - v).abs())
    # infinite where only one model excludes an entry: then a value is infinite, or its sum skips the entry
    size = torch.where(size.isfinite(), size, 0)
    return 4 * EPSILON * (expectation(u.log_softmax(-1), size) + expectation(v.log_softmax(-1), size))


def assert_values(actual, student, teacher, fkl_weight, temperature=1.0, rows=slice(None)):
    """`actual`: a KLOutput of losses per token, or metrics alone."""
    expected = truth(student, teacher, fkl_weight, temperature)
    limit = tolerance(student, teacher, temperature)[rows]
    actual = list(actual)
    for name, a, e in zip(KLOutput._fields[-len(actual) :], actual, expected[-len(actual) :]):
        a, e = a.detach().double()[rows], e.detach()[rows]
        right = (a == e) | ((a - e).abs() <= limit)
        assert right.all(), f"{name} is off by {(a - e).abs().max():.2e}, allowed {limit.min():.2e}"


def relative_rms(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def assert_close(actual, expected, limit=1e-5):
    """Relative root mean square, for tensors or sequences of them.

    1e-5 is about 100 float32 roundings: a gradient has a few roundings of its logits, of the sums of a row
    and of the products of the hidden states behind it.
    """
    if isinstance(actual, torch.Tensor):
        actual, expected = [actual], [expected]
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        error = (a.detach().double() - e.detach().double()).norm()
        assert error <= limit * e.detach().double().norm(), (
            f"off by {relative_rms(a.detach(), e.detach()):.1e}"
        )


def rounding(impl, dtype):
    """The largest relative error of storing a gradient: half a step; the interpreter truncates bfloat16."""
    return STEP[dtype] * (1 if INTERPRETED and impl == "triton" and dtype == torch.bfloat16 else 0.5)


def value_and_gradient(student, teacher, upstream=None, **options):
    """The KLOutput of reduction="none", and the gradient."""
    student = student.detach().clone().requires_grad_()
    out = streaming_kl(student, teacher, reduction="none", **options)
    upstream = torch.ones_like(out.loss) if upstream is None else upstream
    return out, torch.autograd.grad(out.loss, student, upstream)[0]
