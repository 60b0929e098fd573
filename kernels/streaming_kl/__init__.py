"""Exact full-vocabulary KL between two language models, with memory per token that does not depend on the vocabulary.

    from streaming_kl import streaming_kl, linear_streaming_kl, linear_divergence, KLOutput

Per token, with q = softmax(teacher logits / T) and p = softmax(student logits / T) over the whole vocabulary:

    loss = fkl_weight * KL(q || p) + (1 - fkl_weight) * KL(p || q)              nats; no hidden factor T^2

    streaming_kl         from logits (N, V). Forward reads each once; backward recomputes from a few numbers a row.
    linear_streaming_kl  from hidden states (N, H) and heads (V, H). Logits exist for a bounded chunk of tokens only. For a scalar
                         loss the gradients are computed in the same pass, so nothing is computed twice.
    linear_divergence    the same for any torch function of two chunks of logits: how to try a new objective.

Nothing here needs triton until impl="triton", or impl="auto" with CUDA tensors, asks for it.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from . import reference

__all__ = ["KLOutput", "linear_divergence", "linear_streaming_kl", "streaming_kl"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
LOGITS_BYTES = {"cpu": 128 * 2**20, "cuda": 2500 * 10**6}  # default size of all chunk buffers of linear_*; 4096 tokens of Qwen3 in bf16


class KLOutput(NamedTuple):
    """`loss` carries the gradient. The rest are per token, nats, detached, unweighted, and 0 where the weight is 0."""

    loss: Tensor  # () for "sum" and "mean", (N,) for "none"
    fkl: Tensor  # (N,) KL(teacher||student)
    rkl: Tensor  # (N,) KL(student||teacher)
    student_entropy: Tensor  # (N,)
    teacher_entropy: Tensor  # (N,)


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
    """KL between two tensors of logits (N, V) in fp32, fp16 or bf16, with gradients for the student's. Returns a KLOutput.

    weight            (N,), float or bool; tokens of weight 0 are never read and get a gradient of exactly 0
    reduction         "sum", "mean" (over the sum of the weights; 0 if that is 0) or "none"
    vocab_size        entries from here on are padding in both models: probability 0, gradient 0
    inplace_backward  backward writes over student_logits, which nothing else may need then; a second backward raises
    """
    _check_options(fkl_weight, temperature, reduction)
    _check_tensors("logits", student_logits, teacher_logits)
    if len(student_logits) != len(teacher_logits):
        raise ValueError(f"student_logits has {len(student_logits)} tokens, teacher_logits {len(teacher_logits)}")
    vocab_size = _vocab_size(vocab_size, student_logits.shape[1], teacher_logits.shape[1])
    weight = _float_weight(weight, student_logits)
    if inplace_backward and torch.compiler.is_compiling():
        raise ValueError("inplace_backward=True writes over an input, which torch.compile does not allow: leave it False")
    losses, *metrics = _StreamingKL.apply(
        student_logits, teacher_logits, weight, float(fkl_weight), float(temperature), vocab_size, _resolve(impl, student_logits),
        inplace_backward,
    )
    loss = losses if reduction == "none" else losses.sum()
    return KLOutput(loss / _total(weight, losses) if reduction == "mean" else loss, *metrics)


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
    impl="auto",
):
    """KL between the logits hidden @ head.T of two models, with gradients for the student's hidden states and head. Returns a KLOutput.

    hidden is (N, H) and head (V, H), as in nn.Linear; H may differ between the models. weight, reduction, vocab_size as in streaming_kl;
    tokens of weight 0 cost nothing (finding them makes the host wait for the device once).
    logits_dtype   what logits are rounded to: by default the hidden states' dtype, as nn.Linear does. Rounding to bf16 can shift a KL
                   of 1e-3 by half of it; torch.float32 does not, at twice the memory traffic
    chunk_tokens   how many tokens have logits at a time; the default fills LOGITS_BYTES
    Under autocast, hidden states and heads are cast to its dtype, as nn.Linear does.
    """
    _check_options(fkl_weight, temperature, reduction)
    impl, fkl_weight, temperature = _resolve(impl, student_hidden), float(fkl_weight), float(temperature)

    def run(*arguments):
        return _linear_kl(*arguments, fkl_weight, temperature, impl)

    loss, metrics = _linear(
        run, student_hidden, student_head, teacher_hidden, teacher_head, weight, reduction, vocab_size, logits_dtype, chunk_tokens
    )
    return KLOutput(loss, *metrics)


def linear_divergence(
    fn, student_hidden, student_head, teacher_hidden, teacher_head, *, weight=None, reduction="sum", chunk_tokens=None
):
    """Any torch function of logits with the memory and gradients of linear_streaming_kl. Returns the loss alone.

    fn(student_logits, teacher_logits) -> (n,) losses sees the (n, V) logits of some tokens, in the hidden states' dtype, and must treat
    each token by itself:

        def total_variation(student_logits, teacher_logits):
            return (student_logits.float().softmax(-1) - teacher_logits.float().softmax(-1)).abs().sum(-1) / 2

        loss = linear_divergence(total_variation, student_hidden, student_head, teacher_hidden, teacher_head)
    """
    _check_options(1.0, 1.0, reduction)

    def step(student_logits, teacher_logits, coefficient):
        if coefficient is None:
            return fn(student_logits, teacher_logits).unsqueeze(0), None
        with torch.enable_grad():
            student_logits = student_logits.detach().requires_grad_()
            losses = fn(student_logits, teacher_logits)
            (gradient,) = torch.autograd.grad(losses, student_logits, coefficient.to(losses.dtype))
        return losses.detach().unsqueeze(0), gradient

    def run(*arguments):
        return _chunks(step, 1, *arguments)

    loss, _ = _linear(run, student_hidden, student_head, teacher_hidden, teacher_head, weight, reduction, None, None, chunk_tokens)
    return loss


# ---------------------------------------------------------------------------------------------------------------- from logits


def _opaque(fake):
    """Makes the function an operator that torch.compile calls as it is, knowing its results from `fake`. Elsewhere it is just called."""

    def wrap(function):
        operator = torch.library.custom_op(f"streaming_kl::{function.__name__.strip('_')}", function, mutates_args=())
        operator.register_fake(fake)

        @functools.wraps(function)
        def call(*arguments):
            return (operator if torch.compiler.is_compiling() else function)(*arguments)

        return call

    return wrap


def _statistics_fake(student_logits, teacher_logits, *_):
    dtype = reference.statistics_dtype(student_logits, teacher_logits)
    return student_logits.new_empty(len(reference.Stats._fields), len(student_logits), dtype=dtype)


@_opaque(_statistics_fake)
def _statistics(
    student_logits: Tensor, teacher_logits: Tensor, weight: Tensor | None, temperature: float, vocab_size: int, impl: str
) -> Tensor:
    return _module(impl).statistics(student_logits[:, :vocab_size], teacher_logits[:, :vocab_size], weight, temperature)


@_opaque(lambda student_logits, *_: torch.empty_like(student_logits))
def _gradient(
    student_logits: Tensor, teacher_logits: Tensor, statistics: Tensor, coefficient: Tensor, fkl_weight: float, temperature: float,
    vocab_size: int, impl: str,
) -> Tensor:
    out = torch.empty_like(student_logits)
    _write_gradient(student_logits, teacher_logits, statistics, coefficient, fkl_weight, temperature, vocab_size, impl, out)
    return out


def _write_gradient(student_logits, teacher_logits, statistics, coefficient, fkl_weight, temperature, vocab_size, impl, out):
    student, teacher, target = student_logits[:, :vocab_size], teacher_logits[:, :vocab_size], out[:, :vocab_size]
    _module(impl).gradient(student, teacher, statistics, coefficient, fkl_weight, temperature, target)
    out[:, vocab_size:] = 0


class _StreamingKL(torch.autograd.Function):
    """(N,) weighted losses, then the four metrics."""

    @staticmethod
    def forward(ctx, student_logits, teacher_logits, weight, fkl_weight, temperature, vocab_size, impl, inplace):
        statistics = _statistics(student_logits, teacher_logits, weight, temperature, vocab_size, impl)
        ctx.save_for_backward(student_logits, teacher_logits, weight, statistics)
        ctx.options, ctx.inplace = (fkl_weight, temperature, vocab_size, impl), inplace
        metrics = statistics[:4].clone().unbind()  # copies: what the caller does to them must not reach the backward
        ctx.mark_non_differentiable(*metrics)
        return _weighted(_mix(statistics, fkl_weight), weight), *metrics

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream, *_):
        if ctx.inplace == "done":
            raise RuntimeError("a second backward, but inplace_backward=True has written the first gradient over the logits")
        student_logits, teacher_logits, weight, statistics = ctx.saved_tensors
        arguments = student_logits.detach(), teacher_logits, statistics, _weighted(upstream, weight), *ctx.options
        if not ctx.inplace:
            gradient = _gradient(*arguments)
        else:
            ctx.inplace = "done"
            gradient = arguments[0]
            _write_gradient(*arguments, out=gradient)
            torch.autograd.graph.increment_version(student_logits)  # whoever else saved the logits for backward must get an error
        return gradient, *[None] * 7


# ---------------------------------------------------------------------------------------------------------- from hidden states


def _linear(run, student_hidden, student_head, teacher_hidden, teacher_head, weight, reduction, vocab_size, logits_dtype, chunk_tokens):
    """Checks, and the choice between the two autograd functions. Returns the loss and the metrics, each (N,)."""
    _check_tensors("hidden", student_hidden, teacher_hidden)
    _check_tensors("head", student_head, teacher_head)
    device = student_hidden.device
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    for name, hidden, head in (("student", student_hidden, student_head), ("teacher", teacher_hidden, teacher_head)):
        if hidden.shape[1] != head.shape[1] or hidden.device != head.device or (hidden.dtype != head.dtype and autocast is None):
            raise ValueError(f"{name}_hidden {_describe(hidden)} does not go with {name}_head {_describe(head)}")
    if len(student_hidden) != len(teacher_hidden):
        raise ValueError(f"student_hidden has {len(student_hidden)} tokens, teacher_hidden {len(teacher_hidden)}")
    vocab_size = _vocab_size(vocab_size, len(student_head), len(teacher_head))
    weight = _float_weight(weight, student_hidden)
    dtypes = autocast or student_hidden.dtype, autocast or teacher_hidden.dtype  # of the matrix products
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, not {chunk_tokens}")
    if chunk_tokens is None:
        chunk_tokens = _default_chunk(vocab_size, dtypes, logits_dtype, device)
    plan = [vocab_size, chunk_tokens, *dtypes, logits_dtype]
    needs = [torch.is_grad_enabled() and x.requires_grad for x in (student_hidden, student_head)]
    function = _RecomputeLinear if reduction == "none" else _FusedLinear
    loss, *metrics = function.apply(student_hidden, student_head, teacher_hidden, teacher_head, weight, run, plan, needs)
    return loss / _total(weight, student_hidden) if reduction == "mean" else loss, metrics


def _chunks(
    step, count, student_hidden, student_head, teacher_hidden, teacher_head, coefficient, vocab_size, chunk_tokens, student_dtype,
    teacher_dtype, logits_dtype, needs_hidden, needs_head,
):
    """The loop over chunks of tokens. Returns (count, N) columns, d_hidden and d_head, empty if not needed, of sum_i c_i loss_i.

    step(student_logits, teacher_logits, coefficient) -> (count, n) columns, the first one the losses, and the gradient (n, V) of the
    weighted losses, unless coefficient is None. It may overwrite student_logits. Tokens with a coefficient of 0 are left out.
    """
    n, device = len(student_hidden), student_hidden.device
    exact = reference.statistics_dtype(student_hidden, teacher_hidden)
    columns = torch.zeros(count, n, dtype=exact, device=device)
    d_hidden = torch.zeros_like(student_hidden) if needs_hidden else student_hidden.new_empty(0)
    d_head = torch.zeros(student_head.shape if needs_head else 0, dtype=exact, device=device)
    live = None if coefficient is None else coefficient.nonzero().squeeze(1)  # here the host waits for the device
    total = n if live is None else len(live)
    size = min(chunk_tokens, total)
    with torch.no_grad():
        student_head, teacher_head = student_head[:vocab_size].to(student_dtype), teacher_head[:vocab_size].to(teacher_dtype)
        student_buffer = _buffer(size, vocab_size, logits_dtype or student_dtype, device)
        teacher_buffer = _buffer(size, vocab_size, logits_dtype or teacher_dtype, device)
        for start in range(0, total, chunk_tokens):
            rows = slice(start, min(start + chunk_tokens, total))
            rows = rows if live is None else live[rows]
            hidden = student_hidden[rows].to(student_dtype)  # (n, H)
            student_logits = _matmul(hidden, student_head.t(), student_buffer)  # (n, V)
            teacher_logits = _matmul(teacher_hidden[rows].to(teacher_dtype), teacher_head.t(), teacher_buffer)  # (n, V)
            c = None
            if needs_hidden or needs_head:
                c = columns.new_ones(len(hidden)) if coefficient is None else coefficient[rows].to(exact)
            results, gradient = step(student_logits, teacher_logits, c)
            columns[:, rows] = results.to(exact)
            if gradient is None:
                continue
            gradient = gradient.to(student_dtype)  # (n, V)
            if needs_hidden:
                d_hidden[rows] = (gradient @ student_head).to(d_hidden.dtype)
            if needs_head:
                _accumulate(d_head[:vocab_size], gradient.t(), hidden)
    return columns, d_hidden, d_head


def _linear_kl_fake(student_hidden, student_head, teacher_hidden, *options):
    *_, needs_hidden, needs_head, _, _, _ = options
    exact = reference.statistics_dtype(student_hidden, teacher_hidden)
    return (
        student_hidden.new_empty(5, len(student_hidden), dtype=exact),
        torch.empty_like(student_hidden) if needs_hidden else student_hidden.new_empty(0),
        student_head.new_empty(student_head.shape if needs_head else 0, dtype=exact),
    )


@_opaque(_linear_kl_fake)
def _linear_kl(
    student_hidden: Tensor, student_head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor, coefficient: Tensor | None,
    vocab_size: int, chunk_tokens: int, student_dtype: torch.dtype, teacher_dtype: torch.dtype, logits_dtype: torch.dtype | None,
    needs_hidden: bool, needs_head: bool, fkl_weight: float, temperature: float, impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """_chunks with the KL as its step: columns are the loss and the four metrics."""
    kernels = _module(impl)

    def step(student_logits, teacher_logits, c):
        if c is None:
            statistics = kernels.statistics(student_logits, teacher_logits, None, temperature)
            return torch.stack([_mix(statistics, fkl_weight), *statistics[:4]]), None
        statistics = kernels.fused(student_logits, teacher_logits, c, fkl_weight, temperature)
        return torch.stack([_mix(statistics, fkl_weight), *statistics[:4]]), student_logits

    return _chunks(
        step, 5, student_hidden, student_head, teacher_hidden, teacher_head, coefficient, vocab_size, chunk_tokens, student_dtype,
        teacher_dtype, logits_dtype, needs_hidden, needs_head,
    )


class _FusedLinear(torch.autograd.Function):
    """sum_i w_i loss_i. The upstream gradient is a single number, so all gradients are computed here, and only scaled in backward."""

    @staticmethod
    def forward(ctx, student_hidden, student_head, teacher_hidden, teacher_head, weight, run, plan, needs):
        coefficient, ctx.scale = _normalise(weight)
        columns, d_hidden, d_head = run(student_hidden, student_head, teacher_hidden, teacher_head, coefficient, *plan, *needs)
        ctx.save_for_backward(d_hidden, d_head)
        ctx.needs, ctx.dtypes = needs, (student_hidden.dtype, student_head.dtype)
        losses, *metrics = columns.unbind()
        ctx.mark_non_differentiable(*metrics)
        return _weighted(losses, weight).sum(), *metrics

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream, *_):
        gradients = zip(ctx.saved_tensors, ctx.dtypes, ctx.needs)
        return *[_scaled(g, upstream * ctx.scale, dtype) if need else None for g, dtype, need in gradients], *[None] * 6


class _RecomputeLinear(torch.autograd.Function):
    """(N,) losses w_i loss_i. The upstream gradients are known in backward only, where the logits are computed a second time."""

    @staticmethod
    def forward(ctx, student_hidden, student_head, teacher_hidden, teacher_head, weight, run, plan, needs):
        columns, _, _ = run(student_hidden, student_head, teacher_hidden, teacher_head, weight, *plan, False, False)
        ctx.save_for_backward(student_hidden, student_head, teacher_hidden, teacher_head, weight)
        ctx.run, ctx.plan, ctx.needs = run, plan, needs
        losses, *metrics = columns.unbind()
        ctx.mark_non_differentiable(*metrics)
        return _weighted(losses, weight), *metrics

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream, *_):
        *tensors, weight = ctx.saved_tensors
        coefficient, scale = _normalise(_weighted(upstream, weight))
        _, *gradients = ctx.run(*tensors, coefficient, *ctx.plan, *ctx.needs)
        gradients = zip(gradients, tensors, ctx.needs)
        return *[_scaled(g, scale, x.dtype) if need else None for g, x, need in gradients], *[None] * 6


def _normalise(weight):
    """weight / max |weight|, and that maximum: a factor 1 / N in the weights would underflow in the chunk's fp16 gradient."""
    if weight is None:
        return None, 1.0
    scale = torch.cat([weight.abs(), weight.new_zeros(1)]).amax()  # also of no tokens
    return weight / torch.where(scale == 0, 1, scale), scale


def _scaled(gradient, scale, dtype):
    """gradient * scale, rounded once, without a copy in float32. A new tensor: a second backward finds the saved one as it was."""
    scale = scale.reshape(1, 1)  # a 0-dimensional factor would first be rounded to the gradient's dtype
    return torch.mul(gradient, scale, out=torch.empty_like(gradient, dtype=dtype))


def _buffer(rows, vocab_size, dtype, device):
    """Rows that begin at multiples of 16 entries, for wide loads."""
    buffer = torch.empty(rows, -(-vocab_size // 16) * 16, dtype=dtype, device=device)
    buffer[:, vocab_size:] = 0  # on CPUs, torch's bfloat16 product reads some of it and lets a NaN through
    return buffer[:, :vocab_size]


def _matmul(a, b, buffer):
    """a @ b into the first rows of the buffer. Half-precision products are summed in float32, and stay so if the buffer is float32."""
    out = buffer[: len(a)]
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if a.is_cuda and out.dtype == torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def _accumulate(total, a, b):
    """total += a @ b in float32, whatever the dtype of a and b."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda and total.dtype == torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def chunk_of(head):
    """Tokens that may have logits at a time, at 16 bytes a logit, for who computes with a head (V, H) outside of the kernels."""
    return max(1, LOGITS_BYTES[head.device.type] // (16 * len(head)))


def _default_chunk(vocab_size, dtypes, logits_dtype, device):
    """Tokens whose logits fill LOGITS_BYTES, counting the copy that turns float32 gradients into the matrix products' dtype."""
    width = sum((logits_dtype or dtype).itemsize for dtype in dtypes)
    if logits_dtype not in (None, dtypes[0]):
        width += dtypes[0].itemsize
    tokens = LOGITS_BYTES["cuda" if device.type == "cuda" else "cpu"] // (vocab_size * width)
    return max(tokens // 128 * 128, 128) if device.type == "cuda" else max(tokens, 1)


# --------------------------------------------------------------------------------------------------------------------- common


def _mix(statistics, fkl_weight):
    """The ends are not computed as mixtures: zero times an infinite KL would be NaN."""
    fkl, rkl = statistics[0], statistics[1]
    if fkl_weight in (0, 1):
        return fkl if fkl_weight else rkl
    return fkl_weight * fkl + (1 - fkl_weight) * rkl


def _weighted(x, weight):
    """x * weight, but exactly 0 where the weight is, whatever x is."""
    return x.clone() if weight is None else torch.where(weight == 0, 0, x * weight)


def _total(weight, tokens):
    """The sum of the weights, or 1 where that is 0: the sum it divides is 0 then."""
    if weight is None:
        return max(len(tokens), 1)
    total = weight.sum()
    return torch.where(total == 0, 1, total)


def _float_weight(weight, tokens):
    if weight is None:
        return None
    if weight.shape != tokens.shape[:1]:
        raise ValueError(f"weight must be one number per token, ({len(tokens)},), not {tuple(weight.shape)}")
    if weight.requires_grad:
        raise ValueError("weight requires grad, but gets no gradient here: pass weight.detach()")
    return weight.to(device=tokens.device, dtype=torch.promote_types(tokens.dtype, torch.float32)).contiguous()


def _vocab_size(vocab_size, student_size, teacher_size):
    if vocab_size is None:
        if student_size != teacher_size:
            raise ValueError(f"vocabularies of {student_size} and {teacher_size}: if the excess is padding, pass vocab_size")
        vocab_size = student_size
    if not 1 <= vocab_size <= min(student_size, teacher_size):
        raise ValueError(f"vocab_size {vocab_size} does not fit vocabularies of {student_size} and {teacher_size}")
    return vocab_size


def _check_options(fkl_weight, temperature, reduction):
    if not 0 <= fkl_weight <= 1:
        raise ValueError(f"fkl_weight must lie in [0, 1], not {fkl_weight}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive, not {temperature}")
    if reduction not in ("sum", "mean", "none"):
        raise ValueError(f'reduction must be "sum", "mean" or "none", not {reduction!r}')


def _check_tensors(what, student, teacher):
    for name, x in ((f"student_{what}", student), (f"teacher_{what}", teacher)):
        if hasattr(x, "full_tensor"):
            raise TypeError(
                f"{name} is a sharded DTensor: compute the loss where FSDP has gathered it (inside the root module's forward), or pass "
                f'{name}.full_tensor(grad_placements=[Partial("avg")]), whose gradient is averaged over ranks as FSDP averages'
            )
        if x.dim() != 2 or x.dtype not in DTYPES:
            raise ValueError(f"{name} must be a matrix of floats, not {_describe(x)}")
    if teacher.requires_grad:
        raise ValueError(f"teacher_{what} requires grad, but the teacher is fixed: pass teacher_{what}.detach()")
    if student.device != teacher.device:
        raise ValueError(f"student_{what} is on {student.device}, teacher_{what} on {teacher.device}")


def _describe(x):
    return f"{tuple(x.shape)} {x.dtype} on {x.device}"


def _resolve(impl, tensor):
    if impl not in ("auto", "torch", "triton"):
        raise ValueError(f'impl must be "auto", "torch" or "triton", not {impl!r}')
    return {"auto": "triton" if tensor.is_cuda else "torch"}.get(impl, impl)


def _module(impl):
    """Two modules with the same three functions."""
    if impl == "torch":
        return reference
    from . import triton_kl

    return triton_kl
