"""Log-probabilities, likeliest tokens and entropies from hidden states and a head, against float64."""

import pytest
import torch

from streaming_kl import entropies, heads, token_logps, top_tokens


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
