"""Top-k KL and the overlap metrics against direct computations, position by position, in float64; the cached signals."""

import argparse

import pytest
import torch

from distil.diagnostics import measure
from distil.models import batches_by_tokens, top_tokens
from distil.teacher import Signal
from streaming_kl import linear_streaming_kl
from train import objective

N, H, V, K = 7, 6, 11, 4


@pytest.fixture
def case():
    """(student hidden, student head, Signal, weight): the student is the teacher disturbed, so their likeliest tokens overlap in part."""
    torch.manual_seed(0)
    teacher_hidden, teacher_head = torch.randn(N, H), torch.randn(V, H)
    student_hidden, student_head = (
        teacher_hidden + 0.7 * torch.randn(N, H),
        teacher_head + 0.7 * torch.randn(V, H),
    )
    return (
        student_hidden.requires_grad_(),
        student_head.requires_grad_(),
        Signal(teacher_hidden, teacher_head),
        torch.rand(N),
    )


def flags(**changes):
    return argparse.Namespace(
        **({"vocab": "topk", "k": K, "topk_set": "student", "kl": "mix", "fkl_weight": 0.3} | changes)
    )


def direct(case, kind, w, k=K):
    """(weighted loss, [set of tokens a position]) one position at a time, in float64."""
    hidden, head, teacher, weight = case
    logits_q, logits_p = hidden.double() @ head.double().T, teacher.hidden.double() @ teacher.head.double().T
    loss, sets = 0, []
    for q, p, c in zip(logits_q, logits_p, weight.double()):
        s, t = set(q.topk(k).indices.tolist()), set(p.topk(k).indices.tolist())
        chosen = sorted({"student": s, "teacher": t, "union": s | t, "intersection": s & t}[kind])
        sets.append(chosen)
        if chosen:
            q, p = q[chosen].log_softmax(0), p[chosen].log_softmax(0)
            loss = loss + c * (w * (p.exp() * (p - q)).sum() + (1 - w) * (q.exp() * (q - p)).sum())
    return loss, sets


@pytest.mark.parametrize("kind", ["student", "teacher", "union", "intersection"])
@pytest.mark.parametrize("w", [0.0, 0.3, 1.0])
def test_topk_loss_gradient_and_tails(case, kind, w):
    hidden, head, teacher, weight = case
    loss, metrics = objective(flags(topk_set=kind, fkl_weight=w), hidden, head, teacher, None, weight)
    truth, sets = direct(case, kind, w)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-6)
    for found, right in zip(
        torch.autograd.grad(loss, [hidden, head]), torch.autograd.grad(truth, [hidden, head])
    ):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-6)
    for name, h, e in (("student", hidden, head), ("teacher", teacher.hidden, teacher.head)):
        probability = (h.double() @ e.double().T).softmax(-1)
        tail = torch.stack([1 - row[chosen].sum() for row, chosen in zip(probability, sets)])
        torch.testing.assert_close(
            metrics[f"{name}_tail_mass"].double(), tail.detach(), rtol=0, atol=1e-5
        )  # 1 - a sum of up to 1


def test_an_empty_intersection_has_no_loss_and_no_gradient():
    hidden, head = torch.eye(4)[:1].requires_grad_(), 9 * torch.eye(4)
    teacher = Signal(torch.eye(4)[1:2], 9 * torch.eye(4))
    loss, _ = objective(flags(topk_set="intersection", k=1), hidden, head, teacher, None, torch.ones(1))
    assert loss.item() == 0 and torch.autograd.grad(loss, hidden)[0].abs().max() == 0


@pytest.mark.parametrize("kind", ["student", "teacher", "union", "intersection"])
def test_topk_with_the_whole_vocabulary_is_the_full_kl(case, kind):
    hidden, head, teacher, weight = case
    found = objective(flags(k=V, topk_set=kind), hidden, head, teacher, None, weight)[0]
    full = linear_streaming_kl(hidden, head, teacher.hidden, teacher.head, fkl_weight=0.3, weight=weight).loss
    for a, b in zip(
        [found, *torch.autograd.grad(found, [hidden, head])],
        [full, *torch.autograd.grad(full, [hidden, head])],
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_cached_top_tokens_give_the_live_loss_and_metrics(case):
    hidden, head, teacher, weight = case
    logps, ids = top_tokens(teacher.hidden, teacher.head, K + 2)  # a cache may hold more than is used
    cached = Signal(top_logps=logps, top_ids=ids)
    losses, metrics = zip(
        *(
            objective(flags(topk_set="teacher"), hidden, head, signal, None, weight)
            for signal in (teacher, cached)
        )
    )
    torch.testing.assert_close(*losses)
    live, stored = (
        m | measure(hidden.detach(), head.detach(), signal, K, known=m)
        for m, signal in zip(metrics, (teacher, cached))
    )
    assert live.keys() - stored.keys() == {"fkl", "rkl", "student_entropy", "teacher_entropy", "entropy_gap"}
    for name in stored:
        torch.testing.assert_close(live[name], stored[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("vocab", ["full", "topk"])
def test_the_diagnostics_of_both_papers(case, vocab):
    hidden, head, teacher, weight = case
    _, metrics = objective(flags(vocab=vocab), hidden, head, teacher, None, weight)
    found = metrics | measure(hidden.detach(), head.detach(), teacher, K, known=metrics)
    log_q, log_p = (
        (h.double() @ e.double().T).log_softmax(-1)
        for h, e in ((hidden.detach(), head.detach()), teacher[:2])
    )
    right = {
        name: []
        for name in (
            "fkl",
            "rkl",
            "student_entropy",
            "teacher_entropy",
            "entropy_gap",
            "overlap_ratio",
            "overlap_mass",
            "overlap_mass_teacher",
            "overlap_advantage",
        )
    }
    for q, p in zip(log_q, log_p):
        h_q, h_p = -(q.exp() * q).sum(), -(p.exp() * p).sum()
        both = sorted(set(q.topk(K).indices.tolist()) & set(p.topk(K).indices.tolist()))
        q_bar, p_bar = q[both] - q[both].exp().sum().log(), p[both] - p[both].exp().sum().log()
        advantage = (q_bar.exp() * (p_bar - q_bar)).mean() if both else torch.zeros(())
        for name, value in zip(
            right,
            (
                (p.exp() * (p - q)).sum(),
                (q.exp() * (q - p)).sum(),
                h_q,
                h_p,
                (h_p - h_q).abs(),
                len(both) / K,
                q[both].exp().sum(),
                p[both].exp().sum(),
                advantage,
            ),
        ):
            right[name].append(float(value))
    assert 0 < sum(right["overlap_ratio"]) < N  # neither none nor all overlap
    for name, values in right.items():
        torch.testing.assert_close(
            found[name].double(), torch.tensor(values, dtype=torch.float64), rtol=1e-5, atol=2e-6, msg=name
        )


def test_micro_batches_waste_little_on_lengths_like_real_ones():
    """Log-normal lengths of 100 to 4200 tokens, batches of 32: under a tenth is padding, in few micro-batches."""
    import random

    rng, waste, count = random.Random(0), [], []
    for _ in range(100):
        lengths = [min(4200, 100 + int(rng.lognormvariate(6.0, 0.9))) for _ in range(32)]
        parts = batches_by_tokens(lengths, 16384)
        assert sorted(i for part in parts for i in part) == list(range(32))
        padded = [len(part) * max(lengths[i] for i in part) for part in parts]
        assert max(padded) <= 16384
        waste.append(1 - sum(lengths) / sum(padded))
        count.append(len(parts))
    assert sum(waste) / 100 < 0.1 and sum(count) / 100 < 12
