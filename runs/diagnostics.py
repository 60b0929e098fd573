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
    """How the k likeliest tokens S of the student and T of the teacher overlap, {name: (N,)}.

    top: streaming_kl.Top. arXiv 2604.13016, equations 6 and 7 and appendix B.1:

        overlap_ratio          |S and T| / k
        overlap_mass           sum of q over S and T
        overlap_mass_teacher   sum of p over S and T
        overlap_advantage      mean over v in S and T of q'(v) (log p'(v) - log q'(v)), with p' and q'
                               renormalised on S and T; 0 where that is empty
        overlap_advantage_raw  as in that paper's released code: mean over S and T of q''(v) (log p(v) -
                               log q(v)), with q'' renormalised on S and the log-ratio as it is"""
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
