"""What both papers plot beside the loss, per token: p is the teacher's distribution, q the student's."""

import torch

from streaming_kl import Top, linear_streaming_kl, top_tokens


@torch.no_grad()
def measure(hidden, head, signal, k):
    """Metrics {name: (N,)} as far as the teacher is known, and the Top with both models' k likeliest tokens.

    hidden (N, H) and head (V, H) are the student's."""
    if signal.hidden is not None:
        out, top = linear_streaming_kl(hidden, head, signal.hidden, signal.head, fkl_weight=1.0, top_k=k)
        return exact_metrics(out, top), top
    if signal.top_ids is not None:
        top = Top(*top_tokens(hidden, head, k), signal.top_logps[:, :k], signal.top_ids[:, :k])
        return overlap(top), top
    return {}, None


def exact_metrics(out, top):
    """Metrics of a KLOutput and a Top. The entropy gap is |H(p) - H(q)|."""
    metrics = {name: getattr(out, name) for name in ("fkl", "rkl", "student_entropy", "teacher_entropy")}
    metrics["entropy_gap"] = (out.teacher_entropy - out.student_entropy).abs()
    return metrics | overlap(top)


def overlap(top):
    """How the k likeliest tokens S of the student and T of the teacher overlap, {name: (N,)}; top: a Top.

    arXiv 2604.13016, equations 6 and 7 and appendix B.1; means and sums are over the tokens of S and T:

        overlap_ratio          their number / k
        overlap_mass           sum of q;  overlap_mass_teacher: sum of p
        overlap_advantage      mean of q' (log p' - log q'), p' and q' renormalised on them; 0 without any
        overlap_advantage_raw  as in that paper's released code: mean of q'' (log p - log q), with q''
                               renormalised on S and the log-ratio as it is"""
    log_q, student_ids, log_p, teacher_ids = top
    same = student_ids[:, :, None] == teacher_ids[:, None]  # (N, k, k)
    shared = same.any(2)  # (N, k): the student's token is one of the teacher's too
    count = same.sum((1, 2))
    log_p = torch.where(shared, log_p.gather(1, same.int().argmax(2)), 0.0)  # of the student's tokens
    log_q_shared = log_q.masked_fill(~shared, -1e30).log_softmax(1)
    log_p_shared = log_p.masked_fill(~shared, -1e30).log_softmax(1)
    advantage = log_q_shared.exp() * (log_p_shared - log_q_shared) * shared
    raw = log_q.softmax(1) * (log_p - log_q) * shared
    return {
        "overlap_ratio": count / student_ids.shape[1],
        "overlap_mass": (log_q.exp() * shared).sum(1),
        "overlap_mass_teacher": (log_p.exp() * shared).sum(1),
        "overlap_advantage": advantage.sum(1) / count.clamp(min=1),
        "overlap_advantage_raw": raw.sum(1) / count.clamp(min=1),
    }


def by_position(metrics, responses, size, longest):
    """Metrics {name: (N,)} of the tokens of some Responses, by position: {("by_position", name): (bins, N)}.

    A bin is `size` positions of a response, which has at most `longest`; outside it values are 0."""
    bins = torch.cat([torch.arange(len(r.response_ids)) // size for r in responses])  # (N,)
    inside = bins == torch.arange(-(-longest // size))[:, None]  # (bins, N)
    metrics = {"tokens": torch.ones(len(bins))} | metrics
    return {("by_position", name): values * inside.to(values.device) for name, values in metrics.items()}


def position_means(sums):
    """Takes by_position's metrics out of the sums over tokens: {"by_position": {name: [mean in each bin]}}.

    "tokens" has their numbers. Bins without any are left out; without by_position nothing is returned."""
    apart = {key[1]: sums.pop(key) for key in [*sums] if isinstance(key, tuple)}
    counts = [int(count) for count in apart.pop("tokens", []) if count]
    means = {name: [total / count for total, count in zip(row, counts)] for name, row in apart.items()}
    return {"by_position": {"tokens": counts} | means} if counts else {}
