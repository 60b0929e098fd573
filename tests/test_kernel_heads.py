"""Log-probabilities, of a model and of its sampler, likeliest tokens and entropies, against float64."""

import pytest
import torch

from streaming_kl import (
    KeptSets,
    entropies,
    heads,
    kept_sets,
    sampler_kl,
    sampler_logps,
    token_logps,
    top_tokens,
)


@pytest.mark.parametrize("chunk", [2, 4096])
def test_token_logps_and_their_gradient(chunk, monkeypatch):
    monkeypatch.setattr(heads, "chunk_of", lambda head: chunk)
    g = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(rows, 5, generator=g, requires_grad=True) for rows in (7, 12))
    tokens, upstream = torch.randint(9, (7,), generator=g), torch.randn(7, generator=g)
    found = token_logps(hidden, head[:9], tokens)
    (found * upstream).sum().backward()
    hidden64, head64 = (x.detach().double().requires_grad_() for x in (hidden, head))
    truth = (hidden64 @ head64[:9].T).log_softmax(-1)[torch.arange(7), tokens]
    (truth * upstream.double()).sum().backward()
    for a, b in [(found, truth), (hidden.grad, hidden64.grad), (head.grad, head64.grad)]:
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_token_logps_of_no_tokens():
    assert token_logps(torch.randn(0, 5), torch.randn(9, 5), torch.zeros(0, dtype=torch.long)).shape == (0,)


def bfloat16_case():
    """Hidden states and a head in bfloat16 whose logits are far from what bfloat16 can hold."""
    g = torch.Generator().manual_seed(3)
    hidden, head = torch.randn(6, 64, generator=g), torch.randn(50, 64, generator=g)
    return hidden.bfloat16(), head.bfloat16()


def test_log_probabilities_of_bfloat16_states_come_from_float32_logits():
    """Rounded to bfloat16, logits of size 20 would be off by up to 0.06."""
    hidden, head = bfloat16_case()
    truth = (hidden.double() @ head.double().T).log_softmax(-1)
    tokens = torch.arange(6)
    found = token_logps(hidden, head, tokens)
    torch.testing.assert_close(found.double(), truth[tokens, tokens], rtol=1e-5, atol=1e-4)
    logps, ids = top_tokens(hidden, head, 5)
    assert ids.tolist() == truth.topk(5).indices.tolist()
    torch.testing.assert_close(logps.double(), truth.topk(5).values, rtol=1e-5, atol=1e-4)
    rounded = (hidden @ head.T).float().log_softmax(-1)[tokens, tokens]
    assert (rounded - truth[tokens, tokens]).abs().max() > 1e-2  # what the rule is for


def test_gradients_of_bfloat16_states_are_rounded_once():
    hidden, head = (x.requires_grad_() for x in bfloat16_case())
    tokens, upstream = torch.arange(6), torch.linspace(-1, 1, 6)
    (token_logps(hidden, head, tokens) * upstream).sum().backward()
    hidden64, head64 = (x.detach().double().requires_grad_() for x in (hidden, head))
    truth = (hidden64 @ head64.T).log_softmax(-1)[tokens, tokens]
    (truth * upstream.double()).sum().backward()
    for found, right in ((hidden.grad, hidden64.grad), (head.grad, head64.grad)):
        assert found.dtype == torch.bfloat16
        assert (found.double() - right).norm() < 0.01 * right.norm()


@pytest.mark.parametrize("chunk", [2, 4096])
def test_entropies(chunk, monkeypatch):
    """Of flat and of sharp distributions, against float64."""
    monkeypatch.setattr(heads, "chunk_of", lambda head: chunk)
    g = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(7, 5, generator=g) * torch.logspace(-2, 2, 7)[:, None], torch.randn(12, 5)
    log_q = (hidden.double() @ head.double().T).log_softmax(-1)
    truth = -(log_q.exp() * log_q).sum(-1)
    torch.testing.assert_close(entropies(hidden, head).double(), truth, rtol=1e-5, atol=1e-5)


# temperature, top-p, top-k
SAMPLERS = [
    (1.0, 1.0, 0),
    (0.6, 1.0, 0),
    (1.0, 0.7, 0),
    (0.8, 0.9, 0),
    (1.0, 1.0, 3),
    (0.7, 0.8, 4),
    (1.5, 0.9, 99),
]


def transformers_logps(logits, temperature, top_p, top_k):
    """(N, V) The log-probabilities that transformers samples from; -inf: not kept."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = TemperatureLogitsWarper(temperature)(None, logits)
    logits = TopKLogitsWarper(top_k)(None, logits) if top_k else logits
    return (TopPLogitsWarper(top_p)(None, logits) if top_p < 1 else logits).log_softmax(-1)


def sampler_case(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(rows, 5, generator=g, dtype=dtype, requires_grad=True) for rows in (40, 12)], g


@pytest.mark.parametrize("chunk, likeliest", [(3, 1024), (4096, 4)])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sampler_logps_and_their_gradient_are_those_of_transformers_sampler(
    sampler, chunk, likeliest, monkeypatch
):
    """Tokens that it could have sampled, in float64 by autograd. The 4 likeliest do not always hold p."""
    monkeypatch.setattr(heads, "chunk_of", lambda head: chunk)
    monkeypatch.setattr(heads, "LIKELIEST", likeliest)
    (hidden, head), g = sampler_case()
    hidden64, head64 = (x.detach().double().requires_grad_() for x in (hidden, head))
    truth = transformers_logps(hidden64 @ head64[:11].T, *sampler)
    tokens = truth.detach().exp().multinomial(1, generator=g).squeeze(1)
    upstream = torch.randn(40, generator=g)
    found = sampler_logps(hidden, head[:11], tokens, *sampler)
    (found.logps * upstream).sum().backward()
    right = truth.gather(1, tokens[:, None]).squeeze(1)
    (right * upstream.double()).sum().backward()
    for a, b in [(found.logps, right), (hidden.grad, hidden64.grad), (head.grad, head64.grad)]:
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    assert not found.outside.any() and not found.kl.requires_grad
    model = (hidden64 @ head64[:11].T).log_softmax(-1)
    kl = torch.where(truth > -torch.inf, truth.exp() * (truth - model), 0).sum(-1)
    torch.testing.assert_close(found.kl.double(), kl, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sampler_kl(hidden, head[:11], *sampler), found.kl)
    sets = kept_sets(hidden, head[:11], *sampler)
    assert sets.counts.tolist() == (truth > -torch.inf).sum(-1).tolist()
    assert sets.ids.tolist() == (truth > -torch.inf).nonzero()[:, 1].tolist()


def test_a_token_outside_of_the_kept_set_is_added_to_it():
    """Its log-probability is finite: the most unlikely token's, over what top-k keeps and itself."""
    (hidden, head), _ = sampler_case(torch.float64)
    logits = hidden @ head.T
    tokens = logits.argmin(-1)
    found = sampler_logps(hidden, head, tokens, 1.0, 1.0, 3)
    most = torch.cat([logits.topk(3).values, logits.amin(-1, keepdim=True)], 1)
    torch.testing.assert_close(found.logps, most.log_softmax(-1)[:, 3])
    assert found.outside.all()
    assert not sampler_logps(hidden, head, logits.argmax(-1), 1.0, 1.0, 3).outside.any()


@pytest.mark.parametrize("chunk", [3, 4096])
def test_remembered_sets_outlast_a_change_of_weights(chunk, monkeypatch):
    """Split and joined again. Some tokens would be in no set of the new weights."""
    monkeypatch.setattr(heads, "chunk_of", lambda head: chunk)
    sampler = 0.8, 0.7, 6
    (hidden, head), g = sampler_case(torch.float64)
    kept = transformers_logps(hidden @ head.T, *sampler).detach() > -torch.inf
    tokens = kept.double().multinomial(1, generator=g).squeeze(1)
    parts = kept_sets(hidden, head, *sampler).split([1, 7, 0, 32])
    assert [len(part.counts) for part in parts] == [1, 7, 0, 32]
    sets = KeptSets(*map(torch.cat, zip(*parts)))
    moved = (head.detach() + torch.randn(12, 5, generator=g, dtype=torch.float64)).requires_grad_()
    found = sampler_logps(hidden, moved, tokens, *sampler, kept=sets)
    found.logps.sum().backward()
    gradients = hidden.grad.clone(), moved.grad.clone()
    hidden.grad = moved.grad = None
    truth = ((hidden @ moved.T) / 0.8).masked_fill(~kept, -torch.inf).log_softmax(-1)
    right = truth.gather(1, tokens[:, None]).squeeze(1)
    right.sum().backward()
    torch.testing.assert_close(found.logps, right)
    torch.testing.assert_close(gradients, (hidden.grad, moved.grad))
    assert not found.outside.any()
    assert sampler_logps(hidden, moved, tokens, *sampler).outside.any()  # what the sets are for


def test_no_tokens_have_a_sampler():
    hidden, head, tokens = torch.randn(0, 5), torch.randn(9, 5), torch.zeros(0, dtype=torch.long)
    found = sampler_logps(hidden, head, tokens, 1.0, 0.9, 0, kept=kept_sets(hidden, head, 1.0, 0.9, 0))
    assert [x.shape for x in found] == [(0,)] * 3
