"""The divergences and their gradients in plain PyTorch: the readable twin of triton_kl.py, used on CPUs.

A row of student logits z and teacher logits y, with maxima m_s and m_t, at temperature T, gives

    u = (z - m_s) / T             v = (y - m_t) / T
    d_s = sum e^u                 d_t = sum e^v
    q = e^u / d_s (student)       p = e^v / d_t (teacher)       log q - log p = (u - v) - log(d_s / d_t)
    a_s = sum q (u - v)           a_t = sum p (v - u)

    FKL = KL(p||q) = a_t + log(d_s / d_t)                       dFKL/dz = (q - p) / T
    RKL = KL(q||p) = a_s - log(d_s / d_t)                       dRKL/dz = q (u - v - a_s) / T
    H_s = log d_s - sum q u                                     H_t = log d_t - sum p v

Subtracting the maxima first removes what the logits have in common, so a KL of 1e-4 keeps its digits under
any offset. A logit of -inf is a probability of zero, and so is a probability that underflows; zero times an
infinite log ratio counts as zero.

Three functions, the same three as in triton_kl.py. The kernels there need no memory beyond their outputs;
here a chunk of rows is in float32 at a time.

    statistics  logits -> (9, N), the rows that Stats names
    gradient    logits, statistics and a coefficient c per token -> gradient of sum_i c_i loss_i, into `out`
    fused       both

`out` takes the gradient in its own dtype, and may be the student logits themselves.

A token whose weight or coefficient is 0 is never read: its statistics and gradient are exactly 0.
"""

from typing import NamedTuple

import torch

# Of float32 logits at a time. There are six temporaries of this size, which should stay in a CPU's cache.
CHUNK_BYTES = {"cpu": 2**20, "cuda": 2**28}


class Stats(NamedTuple):
    """Names for the rows of the (9, N) statistics: float32, or float64 where either input is."""

    fkl: torch.Tensor  # KL(teacher||student), nats
    rkl: torch.Tensor  # KL(student||teacher), nats
    student_entropy: torch.Tensor  # nats
    teacher_entropy: torch.Tensor  # nats
    # what the gradient needs, in units of the implementation's own
    m_s: torch.Tensor
    d_s: torch.Tensor
    m_t: torch.Tensor
    d_t: torch.Tensor
    a_s: torch.Tensor


def statistics_dtype(student_logits, teacher_logits):
    return torch.promote_types(torch.promote_types(student_logits.dtype, teacher_logits.dtype), torch.float32)


def _row_chunks(select, student_logits):
    """Chunks of the rows with a non-zero entry in `select` (N,); of all N rows when it is None."""
    n, v = student_logits.shape
    step = max(1, CHUNK_BYTES["cuda" if student_logits.is_cuda else "cpu"] // (4 * v))
    if select is None:
        return [slice(i, min(i + step, n)) for i in range(0, n, step)]
    return select.nonzero().squeeze(1).split(step)


def _shift(logits, dtype, temperature, m=None):
    logits = logits.to(dtype)
    if m is None:
        m = logits.amax(-1)
    u = logits - m.unsqueeze(-1)
    return (u if temperature == 1 else u / temperature), m


def _statistics_chunk(student_logits, teacher_logits, temperature):
    """Stats of a chunk of n rows, and (e^u, e^v, u - v), each (n, V), for its gradient."""
    dtype = statistics_dtype(student_logits, teacher_logits)
    u, m_s = _shift(student_logits, dtype, temperature)
    v, m_t = _shift(teacher_logits, dtype, temperature)
    e_u, e_v, difference = u.exp(), v.exp(), u - v
    d_s, d_t = e_u.sum(-1), e_v.sum(-1)

    log_ratio = torch.log(d_s / d_t)  # log d_s - log d_t would round at the size of log V
    a_s = _expectation(e_u, difference, d_s)
    a_t = -_expectation(e_v, difference, d_t)
    student_entropy = d_s.log() - _expectation(e_u, u, d_s)
    teacher_entropy = d_t.log() - _expectation(e_v, v, d_t)
    kls = a_t + log_ratio, a_s - log_ratio
    stats = Stats(*kls, student_entropy, teacher_entropy, m_s, d_s, m_t, d_t, a_s)
    return stats, (e_u, e_v, difference)


def _expectation(e, x, d):
    """sum_v e x / d, where 0 * inf counts as 0."""
    total = (e * x).sum(-1)
    if total.isnan().any():  # from a 0 * inf, or from a NaN in the logits, which stays
        total = (e * x).masked_fill_(e == 0, 0).sum(-1)
    return total / d


def _gradient_chunk(e_u, e_v, difference, stats, coefficient, fkl_weight, temperature):
    d_s, d_t, a_s, c = (x.unsqueeze(-1) for x in (stats.d_s, stats.d_t, stats.a_s, coefficient / temperature))
    if fkl_weight == 1:  # not a mixture at the ends: the other direction may be infinite
        return (e_u / d_s).sub_(e_v / d_t).mul_(c)
    g = (difference - a_s).mul_(e_u)
    if g.sum().isnan():  # as in _expectation
        g.masked_fill_(e_u == 0, 0)
    g.mul_((1 - fkl_weight) / d_s)
    if fkl_weight != 0:
        g.add_((e_u / d_s).sub_(e_v / d_t), alpha=fkl_weight)
    return g.mul_(c)


def statistics(student_logits, teacher_logits, weight, temperature):
    dtype = statistics_dtype(student_logits, teacher_logits)
    result = torch.zeros(len(Stats._fields), len(student_logits), dtype=dtype, device=student_logits.device)
    for rows in _row_chunks(weight, student_logits):
        stats, _ = _statistics_chunk(student_logits[rows], teacher_logits[rows], temperature)
        result[:, rows] = torch.stack(stats)
    return result


def gradient(student_logits, teacher_logits, statistics, coefficient, fkl_weight, temperature, out):
    for rows in _row_chunks(coefficient, student_logits):
        stats = Stats(*statistics[:, rows])
        u, _ = _shift(student_logits[rows], statistics.dtype, temperature, stats.m_s)
        v, _ = _shift(teacher_logits[rows], statistics.dtype, temperature, stats.m_t)
        c = coefficient[rows]
        g = _gradient_chunk(u.exp(), v.exp(), u - v, stats, c, fkl_weight, temperature)
        out[rows] = g.to(out.dtype)
    out.masked_fill_((coefficient == 0).unsqueeze(-1), 0)


def fused(student_logits, teacher_logits, coefficient, fkl_weight, temperature, out):
    """All coefficients must be non-zero."""
    dtype = statistics_dtype(student_logits, teacher_logits)
    result = torch.empty(len(Stats._fields), len(student_logits), dtype=dtype, device=student_logits.device)
    for rows in _row_chunks(None, student_logits):
        stats, terms = _statistics_chunk(student_logits[rows], teacher_logits[rows], temperature)
        result[:, rows] = torch.stack(stats)
        g = _gradient_chunk(*terms, stats, coefficient[rows], fkl_weight, temperature)
        out[rows] = g.to(out.dtype)
    return result
