"""What both papers plot beside the loss: exact KLs and entropies, overlap of the likeliest tokens, how far a truncated sampler is off."""

import torch

from distil.models import top_tokens
from streaming_kl import chunk_of, linear_streaming_kl


def overlap(log_q, student_ids, log_p, teacher_ids):
    """How the k likeliest tokens S of the student (probabilities q) and T of the teacher (p) overlap, {name: (N,)}, from their
    log-probabilities and ids, each (N, k) (arXiv 2604.13016, equations 6 and 7 and appendix B.1):

        overlap_ratio       |S and T| / k
        overlap_mass        sum of q over S and T; overlap_mass_teacher: of p
        overlap_advantage   mean over v in S and T of q'(v) (log p'(v) - log q'(v)), renormalised on S and T; 0 where it is empty"""
    same = student_ids[:, :, None] == teacher_ids[:, None]  # (N, k, k)
    shared, count = same.any(2), same.sum((1, 2))
    log_p = torch.where(
        shared, log_p.gather(1, same.int().argmax(2)), 0.0
    )  # the teacher's, at the student's tokens
    q_bar, p_bar = (log.masked_fill(~shared, -1e30).log_softmax(1) for log in (log_q, log_p))
    return {
        "overlap_ratio": count / student_ids.shape[1],
        "overlap_mass": (log_q.exp() * shared).sum(1),
        "overlap_mass_teacher": (log_p.exp() * shared).sum(1),
        "overlap_advantage": (q_bar.exp() * (p_bar - q_bar) * shared).sum(1) / count.clamp(min=1),
    }


def exact_metrics(out):
    """Metrics of a KLOutput; the entropy gap is |H(p) - H(q)|."""
    metrics = {name: getattr(out, name) for name in ("fkl", "rkl", "student_entropy", "teacher_entropy")}
    return metrics | {"entropy_gap": (out.teacher_entropy - out.student_entropy).abs()}


def teacher_top(args, teacher):
    """(log-probabilities, ids), each (N, k), of the teacher's k likeliest tokens."""
    if teacher.hidden is None:
        return teacher.top_logps[:, : args.k], teacher.top_ids[:, : args.k]
    return top_tokens(teacher.hidden, teacher.head, args.k)


@torch.no_grad()
def diagnostics(args, metrics, student_hidden, student_head, teacher):
    """Adds what the loss did not bring of both papers' metrics, as far as the teacher is known: exact KLs, entropies, overlap."""
    if "fkl" not in metrics and teacher.hidden is not None:
        out = linear_streaming_kl(
            student_hidden,
            student_head,
            teacher.hidden,
            teacher.head,
            fkl_weight=args.fkl_weight,
            logits_dtype=torch.float32,
        )
        metrics |= exact_metrics(out)
    if teacher.hidden is None and teacher.top_ids is None:
        return metrics
    return metrics | overlap(*top_tokens(student_hidden, student_head, args.k), *teacher_top(args, teacher))


def truncates(args):
    """Whether the sampling flags make the samples others than the student's."""
    return (args.temperature, args.top_p, args.top_k) != (1.0, 1.0, 0)


def sampler_kl(hidden, head, temperature, top_p, top_k):
    """(N,) KL(sampler || student), nats: how far temperature, then top-k, then top-p take the sampler from the student."""
    pieces = []
    for part in hidden.split(chunk_of(head)):
        log_q, order = (part @ head.T.to(part.dtype)).float().log_softmax(-1).sort(-1, descending=True)
        log_s = (
            (log_q / temperature).log_softmax(-1)
            if temperature
            else torch.where(order == order[:, :1], 0.0, -torch.inf)
        )
        if top_k:
            log_s = log_s.masked_fill(
                torch.arange(log_s.shape[1], device=log_s.device) >= top_k, -torch.inf
            ).log_softmax(-1)
        s = log_s.exp()
        log_s = log_s.masked_fill(s.cumsum(-1) - s >= top_p, -torch.inf).log_softmax(
            -1
        )  # the first token is always kept
        pieces.append(torch.where(log_s > -torch.inf, log_s.exp() * (log_s - log_q), 0.0).sum(-1))
    return torch.cat(pieces)
