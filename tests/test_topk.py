"""Top-k KL and the overlap metrics against float64, position by position; the cached signals."""

import argparse
import random

import pytest
import torch

from distil.batches import batches_by_tokens
from distil.teacher import Signal
from streaming_kl import linear_streaming_kl, top_tokens
from train import objective

N, H, V, K = 7, 6, 11, 4
WHOLE = ["student", "teacher", "union", "intersection"]  # sets that are the vocabulary if k is


@pytest.fixture
def case():
    """Student hidden and head, Signal, weight. The student, a disturbed teacher, shares some top tokens."""
    torch.manual_seed(0)
    teacher = torch.randn(N, H), torch.randn(V, H)
    hidden, head = ((x + 0.7 * torch.randn_like(x)).requires_grad_() for x in teacher)
    return hidden, head, Signal(*teacher), torch.rand(N)


def flags(**changes):
    defaults = {"vocab": "topk", "k": K, "topk_set": "student", "kl": "mix", "fkl_weight": 0.3}
    return argparse.Namespace(**defaults | changes)


def direct(case, kind, w, k=K):
    """(weighted loss, [set of tokens a position]) one position at a time, in float64."""
    hidden, head, teacher, weight = case
    logits_q, logits_p = hidden.double() @ head.double().T, teacher.hidden.double() @ teacher.head.double().T
    loss, sets = 0, []
    for q, p, c in zip(logits_q, logits_p, weight.double()):
        s, t = set(q.topk(k).indices.tolist()), set(p.topk(k).indices.tolist())
        named = {"student": s, "teacher": t, "union": s | t, "intersection": s & t, "difference": s - t}
        chosen = sorted((named | {"symmetric_difference": s ^ t})[kind])
        sets.append(chosen)
        if chosen:
            q, p = q[chosen].log_softmax(0), p[chosen].log_softmax(0)
            loss = loss + c * (w * (p.exp() * (p - q)).sum() + (1 - w) * (q.exp() * (q - p)).sum())
    return loss, sets


@pytest.mark.parametrize("kind", [*WHOLE, "difference", "symmetric_difference"])
@pytest.mark.parametrize("w", [0.0, 0.3, 1.0])
def test_topk_loss_gradient_and_tails(case, kind, w):
    hidden, head, teacher, weight = case
    loss, metrics = objective(flags(topk_set=kind, fkl_weight=w), hidden, head, teacher, None, weight)
    truth, sets = direct(case, kind, w)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-6)
    gradients, expected = (torch.autograd.grad(x, [hidden, head]) for x in (loss, truth))
    for found, right in zip(gradients, expected):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-6)
    for name, h, e in (("student", hidden, head), ("teacher", teacher.hidden, teacher.head)):
        probability = (h.double() @ e.double().T).softmax(-1)
        tail = torch.stack([1 - row[chosen].sum() for row, chosen in zip(probability, sets)])
        found = metrics[f"{name}_tail_mass"].double()  # 1 - a sum of up to 1
        torch.testing.assert_close(found, tail.detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind, k", [("intersection", 1), ("difference", 4), ("symmetric_difference", 4)])
def test_an_empty_set_has_no_loss_and_no_gradient(kind, k):
    """The likeliest tokens differ; of 4 the models have all."""
    hidden, head = torch.eye(4)[:1].requires_grad_(), 9 * torch.eye(4)
    teacher = Signal(torch.eye(4)[1:2], 9 * torch.eye(4))
    loss, metrics = objective(flags(topk_set=kind, k=k), hidden, head, teacher, None, torch.ones(1))
    assert loss.item() == 0 and torch.autograd.grad(loss, hidden)[0].abs().max() == 0
    assert metrics["student_tail_mass"].item() == metrics["teacher_tail_mass"].item() == 1


@pytest.mark.parametrize("kind", ["difference", "symmetric_difference"])
def test_a_student_that_is_far_away_has_a_finite_loss_and_gradient(kind):
    """Each model's likeliest tokens have probabilities that underflow under the other."""
    hidden, head = (
        torch.tensor([[1.0, -1.0]]).requires_grad_(),
        torch.tensor([[300.0, 0], [290.0, 0], [0, 300], [0, 290]]),
    )
    teacher = Signal(torch.tensor([[-1.0, 1.0]]), head)
    loss, _ = objective(flags(topk_set=kind, k=2, fkl_weight=0.5), hidden, head, teacher, None, torch.ones(1))
    assert 0 < loss.item() < 700 and torch.autograd.grad(loss, hidden)[0].isfinite().all()


@pytest.mark.parametrize("kind", WHOLE)
def test_topk_with_the_whole_vocabulary_is_the_full_kl(case, kind):
    hidden, head, teacher, weight = case
    found = objective(flags(k=V, topk_set=kind), hidden, head, teacher, None, weight)[0]
    full = linear_streaming_kl(hidden, head, teacher.hidden, teacher.head, fkl_weight=0.3, weight=weight).loss
    for a, b in zip(*([loss, *torch.autograd.grad(loss, [hidden, head])] for loss in (found, full))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_cached_top_tokens_give_the_live_loss_and_metrics(case):
    hidden, head, teacher, weight = case
    logps, ids = top_tokens(teacher.hidden, teacher.head, K + 2)  # a cache may hold more than is used
    signals, args = [teacher, Signal(top_logps=logps, top_ids=ids)], flags(topk_set="teacher")
    found = (objective(args, hidden, head, signal, None, weight) for signal in signals)
    losses, (live, stored) = zip(*found)
    torch.testing.assert_close(*losses)
    assert live.keys() - stored.keys() == {"fkl", "rkl", "student_entropy", "teacher_entropy", "entropy_gap"}
    for name in stored:
        torch.testing.assert_close(live[name], stored[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("vocab", ["full", "topk"])
def test_the_diagnostics_of_both_papers(case, vocab):
    hidden, head, teacher, weight = case
    _, found = objective(flags(vocab=vocab), hidden, head, teacher, None, weight)
    states = hidden.detach(), head.detach()
    log_q, log_p = ((h.double() @ e.double().T).log_softmax(-1) for h, e in (states, teacher[:2]))
    right = []
    for q, p in zip(log_q, log_p):
        h_q, h_p = -(q.exp() * q).sum(), -(p.exp() * p).sum()
        both = sorted(set(q.topk(K).indices.tolist()) & set(p.topk(K).indices.tolist()))
        q_bar, p_bar = q[both] - q[both].exp().sum().log(), p[both] - p[both].exp().sum().log()
        advantage = (q_bar.exp() * (p_bar - q_bar)).mean() if both else torch.zeros(())
        of_top = q.exp() / q.topk(K).values.exp().sum()
        raw = (of_top * (p - q))[both].mean() if both else torch.zeros(())
        row = {"fkl": (p.exp() * (p - q)).sum(), "rkl": (q.exp() * (q - p)).sum()}
        row |= {"student_entropy": h_q, "teacher_entropy": h_p, "entropy_gap": (h_p - h_q).abs()}
        row |= {"overlap_ratio": len(both) / K, "overlap_advantage": advantage}
        row |= {"overlap_advantage_raw": raw}
        row |= {"overlap_mass": q[both].exp().sum(), "overlap_mass_teacher": p[both].exp().sum()}
        right.append({name: float(value) for name, value in row.items()})
    assert 0 < sum(row["overlap_ratio"] for row in right) < N  # neither none nor all overlap
    for name in right[0]:
        values = torch.tensor([row[name] for row in right], dtype=torch.float64)
        torch.testing.assert_close(found[name].double(), values, rtol=1e-5, atol=2e-6, msg=name)


def test_micro_batches_waste_little_on_lengths_like_real_ones():
    """Log-normal lengths of 100 to 4200 tokens, batches of 32: few micro-batches, less than 10% padding."""
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
