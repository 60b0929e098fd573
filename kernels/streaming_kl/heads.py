"""What one head gives: log-probabilities with gradients, likeliest tokens, entropies, the KL of a sampler.

From hidden states (N, H) and a head (V, H), as in nn.Linear. Only a chunk of positions has logits at a time,
in float32, or float64 where the inputs are: logits rounded to bfloat16 would bias a log-probability.
"""

import torch

from .chunks import add_product, aligned_buffer, chunk_of, product


def logit_chunks(hidden, head):
    """Yields (rows, logits (n, V)) for chunk_of(head) positions at a time, all in one buffer."""
    size, dtype = chunk_of(head), torch.promote_types(hidden.dtype, torch.float32)
    buffer = aligned_buffer(min(size, len(hidden)), len(head), dtype, hidden.device)
    for start in range(0, len(hidden), size):
        rows = slice(start, start + size)
        yield rows, product(hidden[rows], head.t(), buffer)


def _exp_in_place(logits):
    """Overwrites logits (n, V) with exp(logit - the largest); returns log sum exp(logit) (n, 1)."""
    largest = logits.amax(-1, keepdim=True)
    return logits.sub_(largest).exp_().sum(-1, keepdim=True).log() + largest


def token_logps(hidden, head, tokens):
    """log p(token) of tokens (N,) or (N, m), with gradients for hidden and head; shaped like tokens.

    The logits are recomputed in the backward pass.
    """
    picked = tokens if tokens.dim() == 2 else tokens[:, None]
    return _TokenLogps.apply(hidden, head, picked).view_as(tokens)


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, tokens):
        ctx.save_for_backward(hidden, head, tokens)
        logps = hidden.new_empty(tokens.shape, dtype=torch.promote_types(hidden.dtype, torch.float32))
        for rows, logits in logit_chunks(hidden, head):
            logps[rows] = logits.gather(1, tokens[rows])
            logps[rows] -= _exp_in_place(logits)
        return logps

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):  # d log p_y / d logit_v = [v = y] - p_v
        hidden, head, tokens = ctx.saved_tensors
        d_hidden, d_head = torch.empty_like(hidden), torch.zeros_like(head, dtype=upstream.dtype)
        rounded = aligned_buffer(min(chunk_of(head), len(hidden)), len(head), hidden.dtype, hidden.device)
        for rows, logits in logit_chunks(hidden, head):
            _exp_in_place(logits)
            logits.mul_(-upstream[rows].sum(-1, keepdim=True) / logits.sum(-1, keepdim=True))
            logits.scatter_add_(1, tokens[rows], upstream[rows])
            gradient = rounded[: len(logits)].copy_(logits)
            d_hidden[rows] = gradient @ head
            add_product(d_head, gradient.t(), hidden[rows])
        return d_hidden, d_head.to(head.dtype), None


@torch.no_grad()
def top_tokens(hidden, head, k):
    """The k likeliest tokens of each position, likeliest first: log-probabilities (N, k), ids (N, k)."""
    tops = []
    for _, logits in logit_chunks(hidden, head):
        values, ids = logits.topk(k)
        tops.append((values - _exp_in_place(logits), ids))
    return tuple(map(torch.cat, zip(*tops)))


@torch.no_grad()
def entropies(hidden, head):
    """(N,) Entropy of each position's distribution, in nats."""
    pieces = []
    for _, logits in logit_chunks(hidden, head):
        _exp_in_place(logits)
        logits /= logits.sum(-1, keepdim=True)
        pieces.append(torch.special.entr(logits, out=logits).sum(-1))  # -p log p
    return torch.cat(pieces)


@torch.no_grad()
def sampler_kl(hidden, head, temperature, top_p, top_k):
    """(N,) KL(sampler || student) in nats: how far temperature, then top-k, then top-p move the samples."""
    pieces = []
    for _, logits in logit_chunks(hidden, head):
        log_q, order = logits.log_softmax(-1).sort(-1, descending=True)
        if temperature:
            log_s = (log_q / temperature).log_softmax(-1)
        else:  # greedy
            log_s = torch.where(order == order[:, :1], 0.0, -torch.inf)
        if top_k:
            beyond = torch.arange(log_s.shape[1], device=log_s.device) >= top_k
            log_s = log_s.masked_fill(beyond, -torch.inf).log_softmax(-1)
        s = log_s.exp()
        before = s.cumsum(-1) - s  # mass of the likelier tokens: 0 for the first, which is always kept
        log_s = log_s.masked_fill(before >= top_p, -torch.inf).log_softmax(-1)
        terms = torch.where(log_s > -torch.inf, log_s.exp() * (log_s - log_q), 0.0)
        pieces.append(terms.sum(-1))
    return torch.cat(pieces)
