"""The divergences of reference.py as Triton kernels: each row is streamed once, block by block.

    _statistics_kernel  reads 2 x (N, V), writes (9, N)              one program a row
    _gradient_kernel    reads 2 x (N, V) and (9, N), writes (N, V)   one program a row and block
    _fused_kernel       both for one row in one program: part of the second reading comes from the L2 cache

Only a row's tail, what is left after its whole blocks, has a mask: one that ends at an odd vocabulary (Qwen3
has 151,669 tokens) splits 128-bit loads and stores into single logits. Elsewhere they are 128 bits wide for
every V, if row strides are multiples of 16 entries and the first row begins at a multiple of 16 bytes.

Notation of reference.py: z and y are student and teacher logits, m_s and m_t the maxima of the part of the
row seen so far, and u = (z - m_s) log2(e) / T, v likewise, in bits. Eight running numbers describe that part:
m_s and

    d_s = sum 2^u    A_s = sum 2^u (u - v)    B_s = sum 2^u u

and m_t, d_t, A_t, B_t with teacher and student exchanged. When a block raises the maxima, u shrinks by
r_s = (new m_s - old m_s) log2(e) / T and v by r_t, and the sums over the old part become

    d_s <- 2^-r_s d_s    A_s <- 2^-r_s (A_s + d_s (r_t - r_s))    B_s <- 2^-r_s (B_s - d_s r_s)

after which the block's own sums are added. Because the sums are of u - v, shifted by the running maxima, and
not of u and v apart, what the two rows have in common never enters and nothing cancels at the end:

    FKL = A_t / d_t + log2(d_s / d_t)    RKL = A_s / d_s - log2(d_s / d_t)    H_s = log2(d_s) - B_s / d_s

times ln 2, to go from bits to nats.

All arithmetic is float32: logits are converted right after each load (Triton's interpreter has no bfloat16
arithmetic), and only the gradient is rounded, once, when it is stored. Offsets are 64 bit: N * V passes 2^31
at 14,134 rows of 151,936.
"""

import math

import torch
import triton
import triton.language as tl

from .reference import Stats

# Logits per step and warps per program: 32 logits a thread and tensor. With 16, the reductions would take a
# quarter more instructions.
BLOCK = 4096
WARPS = 4
STAGES = 2  # depth of the pipeline of loads
LN2 = tl.constexpr(math.log(2))


@triton.jit
def _load(pointer, columns, V, MASKED: tl.constexpr):
    """float32 logits; -inf, a probability of 0, beyond the vocabulary."""
    if MASKED:
        inside = columns < V
        logits = tl.load(pointer + columns, mask=inside, other=0.0).to(tl.float32)
        return tl.where(inside, logits, float("-inf"))
    return tl.load(pointer + columns).to(tl.float32)


@triton.jit
def _store(pointer, columns, values, V, MASKED: tl.constexpr):
    mask = columns < V if MASKED else None
    tl.store(pointer + columns, values.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _origin(m, scale):
    """m_s in bits, to subtract from scaled logits; 0 while a row has shown only -inf (-inf - -inf is NaN)."""
    return tl.where(m == float("-inf"), 0.0, m) * scale


@triton.jit
def _step(z, y, scale, running, SAFE: tl.constexpr):
    """The eight running numbers after one more block of logits z (student) and y (teacher).

    With SAFE, entries of probability 0 add 0 whatever the logits. Without, 0 * inf gives NaN: the caller must
    notice.
    """
    m_s, d_s, a_s, b_s, m_t, d_t, a_t, b_t = running
    old_s, old_t = _origin(m_s, scale), _origin(m_t, scale)
    m_s, m_t = tl.maximum(m_s, tl.max(z, 0)), tl.maximum(m_t, tl.max(y, 0))
    new_s, new_t = _origin(m_s, scale), _origin(m_t, scale)
    r_s, r_t = new_s - old_s, new_t - old_t
    c_s = tl.exp2(-tl.maximum(r_s, 0.0))  # r_s < 0 only while the sums are 0
    c_t = tl.exp2(-tl.maximum(r_t, 0.0))
    # an infinite A whose logits turn out to underflow is dropped, where 0 * inf would make it NaN
    a_s = tl.where(c_s == 0.0, 0.0, c_s * (a_s + d_s * (r_t - r_s)))
    a_t = tl.where(c_t == 0.0, 0.0, c_t * (a_t + d_t * (r_s - r_t)))
    b_s, b_t = c_s * (b_s - d_s * r_s), c_t * (b_t - d_t * r_t)

    u, v = tl.fma(z, scale, -new_s), tl.fma(y, scale, -new_t)
    e_u, e_v = tl.exp2(u), tl.exp2(v)
    d_s, d_t = c_s * d_s + tl.sum(e_u, 0), c_t * d_t + tl.sum(e_v, 0)
    s_gap, t_gap = u - v, u - v
    if SAFE:
        s_gap, u = tl.where(e_u > 0.0, s_gap, 0.0), tl.where(e_u > 0.0, u, 0.0)
        t_gap, v = tl.where(e_v > 0.0, t_gap, 0.0), tl.where(e_v > 0.0, v, 0.0)
    a_s, b_s = a_s + tl.sum(e_u * s_gap, 0), b_s + tl.sum(e_u * u, 0)
    a_t, b_t = a_t - tl.sum(e_v * t_gap, 0), b_t + tl.sum(e_v * v, 0)
    return m_s, d_s, a_s, b_s, m_t, d_t, a_t, b_t


@triton.jit
def _stream(
    student, teacher, whole, scale, running, SAFE: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr
):
    """The running numbers after all whole blocks of a row."""
    columns = tl.arange(0, BLOCK)
    for start in tl.range(0, whole, BLOCK, num_stages=STAGES):
        z = _load(student, start + columns, whole, MASKED=False)
        y = _load(teacher, start + columns, whole, MASKED=False)
        running = _step(z, y, scale, running, SAFE)
    return running


@triton.jit
def _row_statistics(student, teacher, out, N, V, scale, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """Stores one row's column of the (9, N) statistics at `out`, and returns what its gradient needs."""
    lowest, zero = tl.full((), float("-inf"), tl.float32), tl.full((), 0.0, tl.float32)
    tail = lowest, zero, zero, zero, lowest, zero, zero, zero
    whole = V // BLOCK * BLOCK
    if whole < V:  # the tail first: after the loop it would take 165 registers instead of 128
        columns = whole + tl.arange(0, BLOCK)
        z = _load(student, columns, V, MASKED=True)
        y = _load(teacher, columns, V, MASKED=True)
        tail = _step(z, y, scale, tail, SAFE=True)
    running = _stream(student, teacher, whole, scale, tail, False, BLOCK, STAGES)
    total = running[2] + running[3] + running[6] + running[7]  # A_s + B_s + A_t + B_t
    if total != total:  # noqa: PLR0124  NaN
        # There was a -inf or a NaN. Only such a rare row is read again, with SAFE.
        running = _stream(student, teacher, whole, scale, tail, True, BLOCK, STAGES)
    m_s, d_s, a_s, b_s, m_t, d_t, a_t, b_t = running
    a_s /= d_s
    log_ratio = tl.log2(d_s / d_t)  # log2(d_s) - log2(d_t) would round at the size of log2(V)
    m_s, m_t = _origin(m_s, scale), _origin(m_t, scale)
    tl.store(out, (a_t / d_t + log_ratio) * LN2)
    tl.store(out + N, (a_s - log_ratio) * LN2)
    tl.store(out + 2 * N, (tl.log2(d_s) - b_s / d_s) * LN2)
    tl.store(out + 3 * N, (tl.log2(d_t) - b_t / d_t) * LN2)
    tl.store(out + 4 * N, m_s)
    tl.store(out + 5 * N, d_s)
    tl.store(out + 6 * N, m_t)
    tl.store(out + 7 * N, d_t)
    tl.store(out + 8 * N, a_s)
    return m_s, d_s, m_t, d_t, a_s


@triton.jit
def _write_gradient(
    student, teacher, out, columns, V, factors, FKL: tl.constexpr, RKL: tl.constexpr, MASKED: tl.constexpr
):
    """c_u e^u - c_v e^v + c_r e^u (u - v) at `columns`, after their loads: out may be student."""
    scale, m_s, m_t, c_u, c_v, c_r = factors
    z = _load(student, columns, V, MASKED)
    y = _load(teacher, columns, V, MASKED)
    u, v = tl.fma(z, scale, -m_s), tl.fma(y, scale, -m_t)
    e_u = tl.exp2(u)
    g = e_u * c_u
    if RKL:
        g = e_u * (c_u + c_r * tl.where(e_u > 0.0, u - v, 0.0))
    if FKL:
        g -= c_v * tl.exp2(v)
    _store(out, columns, g, V, MASKED)


@triton.jit
def _factors(c, fkl_weight, scale, numbers, FKL: tl.constexpr, RKL: tl.constexpr):
    """Scale, maxima, and the factors of c_u e^u - c_v e^v + c_r e^u (u - v), which is

    c dloss/dz = c / T (fkl_weight (q - p) + (1 - fkl_weight) q (u - v - a_s))
    """
    m_s, d_s, m_t, d_t, a_s = numbers
    c = c * scale * LN2  # scale ln 2 = 1 / T
    c_u, c_v, c_r = 0.0, 0.0, 0.0
    if FKL:
        c_u, c_v = c * fkl_weight / d_s, c * fkl_weight / d_t
    if RKL:
        c_r = c * (1.0 - fkl_weight) * LN2 / d_s
        c_u -= c_r * a_s
    return scale, m_s, m_t, c_u, c_v, c_r


@triton.jit(do_not_specialize=["N"])
def _statistics_kernel(
    student,
    teacher,
    weight,
    out,
    student_stride,
    teacher_stride,
    N,
    V,
    scale,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    out += row
    if WEIGHTED:  # noqa: SIM102  otherwise there is no weight to load
        if tl.load(weight + row) == 0.0:
            for i in tl.static_range(9):  # the rows of reference.Stats
                tl.store(out + i * N, 0.0)
            return
    student += row * student_stride
    teacher += row * teacher_stride
    _row_statistics(student, teacher, out, N, V, scale, BLOCK, STAGES)


@triton.jit(do_not_specialize=["N"])
def _gradient_kernel(
    student,
    teacher,
    statistics,
    coefficient,
    out,
    student_stride,
    teacher_stride,
    out_stride,
    N,
    V,
    scale,
    fkl_weight,
    FKL: tl.constexpr,
    RKL: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The whole blocks of all rows or, with TAIL, what is left of each row after them."""
    row = tl.program_id(0).to(tl.int64)
    block = V // BLOCK if TAIL else tl.program_id(1)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    out += row * out_stride
    c = tl.load(coefficient + row)
    if c == 0.0:
        _store(out, columns, tl.zeros((BLOCK,), tl.float32), V, TAIL)
        return
    student += row * student_stride
    teacher += row * teacher_stride
    statistics += row
    m_s = tl.load(statistics + 4 * N)
    d_s = tl.load(statistics + 5 * N)
    m_t = tl.load(statistics + 6 * N)
    d_t = tl.load(statistics + 7 * N)
    a_s = tl.load(statistics + 8 * N)
    factors = _factors(c, fkl_weight, scale, (m_s, d_s, m_t, d_t, a_s), FKL, RKL)
    _write_gradient(student, teacher, out, columns, V, factors, FKL, RKL, MASKED=TAIL)


@triton.jit(do_not_specialize=["N"])
def _fused_kernel(
    student,
    teacher,
    coefficient,
    statistics,
    out,
    student_stride,
    teacher_stride,
    out_stride,
    N,
    V,
    scale,
    fkl_weight,
    FKL: tl.constexpr,
    RKL: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    out += row * out_stride
    numbers = _row_statistics(student, teacher, statistics + row, N, V, scale, BLOCK, STAGES)
    factors = _factors(tl.load(coefficient + row), fkl_weight, scale, numbers, FKL, RKL)
    columns = tl.arange(0, BLOCK)
    whole = V // BLOCK * BLOCK
    # the tail last, the other blocks from the end: those read last are the likeliest to be in the cache still
    for step in tl.range(BLOCK, whole + BLOCK, BLOCK):
        _write_gradient(student, teacher, out, whole - step + columns, V, factors, FKL, RKL, MASKED=False)
    if whole < V:
        _write_gradient(student, teacher, out, whole + columns, V, factors, FKL, RKL, MASKED=True)


def statistics(student_logits, teacher_logits, weight, temperature):
    student, teacher = _rows(student_logits), _rows(teacher_logits)
    out = _empty_statistics(student)
    sizes = student.stride(0), teacher.stride(0), *student.shape, _scale(temperature)
    constants = {"WEIGHTED": weight is not None, "STAGES": STAGES}
    _launch(_statistics_kernel, (len(student),), student, teacher, weight, out, *sizes, **constants)
    return out


def gradient(student_logits, teacher_logits, statistics, coefficient, fkl_weight, temperature, out):
    student, teacher = _rows(student_logits), _rows(teacher_logits)
    target = out if out.stride(1) == 1 else torch.empty_like(student)
    n, v = student.shape
    sizes = student.stride(0), teacher.stride(0), target.stride(0), n, v, _scale(temperature), fkl_weight
    arguments = student, teacher, statistics, coefficient, target, *sizes
    constants = {"FKL": fkl_weight != 0, "RKL": fkl_weight != 1}
    whole, tail = divmod(v, _block(v))
    # two launches: with a branch in one, whole blocks would take a tail's registers, 116 instead of 40
    _launch(_gradient_kernel, (n, whole), *arguments, **constants, TAIL=False)
    if tail:
        _launch(_gradient_kernel, (n, 1), *arguments, **constants, TAIL=True)
    if target is not out:
        out.copy_(target)


def fused(student_logits, teacher_logits, coefficient, fkl_weight, temperature, out):
    student, teacher, n = student_logits, teacher_logits, len(student_logits)
    statistics = _empty_statistics(student)
    strides = student.stride(0), teacher.stride(0), out.stride(0)
    arguments = student, teacher, coefficient, statistics, out, *strides, *student.shape
    constants = {"FKL": fkl_weight != 0, "RKL": fkl_weight != 1, "STAGES": STAGES}
    _launch(_fused_kernel, (n,), *arguments, _scale(temperature), fkl_weight, **constants)
    return statistics


def _empty_statistics(student):
    return torch.empty(len(Stats._fields), len(student), dtype=torch.float32, device=student.device)


def _launch(kernel, grid, student, *arguments, **constants):
    if not student.is_cuda and isinstance(kernel, triton.runtime.JITFunction):
        raise ValueError(
            'impl="triton" needs CUDA tensors (or TRITON_INTERPRET=1, set before the first use of triton); '
            'use impl="torch"'
        )
    if 0 in grid:
        return
    block = _block(student.shape[1])
    with torch.cuda.device_of(student):  # Triton launches on the current device
        kernel[grid](student, *arguments, **constants, BLOCK=block, **launch_options(block))


def launch_options(block):
    return {"num_warps": max(1, WARPS * block // BLOCK), "enable_fp_fusion": True}


def _block(v):
    return min(BLOCK, triton.next_power_of_2(max(v, 128)))


def _scale(temperature):
    return math.log2(math.e) / temperature


def _rows(logits):
    """The kernels take any row stride, but the entries of a row side by side."""
    return logits if logits.stride(1) == 1 else logits.contiguous()
