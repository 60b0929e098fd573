"""What one head gives: log-probabilities with gradients, likeliest tokens, entropies; and its sampler's.

From hidden states (N, H) and a head (V, H), as in nn.Linear. Only a chunk of positions has logits at a time,
in float32, or float64 where the inputs are: logits rounded to bfloat16 would bias a log-probability.
"""

from typing import NamedTuple

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
    def backward(ctx, upstream):
        hidden, head, tokens = ctx.saved_tensors
        return *_logps_gradients(hidden, head, tokens, upstream), None


def _logps_gradients(hidden, head, tokens, upstream, prepare=lambda rows, logits: None):
    """Of sum upstream * log p(tokens), for hidden and head. prepare(rows, logits) may change a chunk first.

    d log p_y / d logit_v = [v = y] - p_v
    """
    d_hidden, d_head = torch.empty_like(hidden), torch.zeros_like(head, dtype=upstream.dtype)
    rounded = aligned_buffer(min(chunk_of(head), len(hidden)), len(head), hidden.dtype, hidden.device)
    for rows, logits in logit_chunks(hidden, head):
        prepare(rows, logits)
        _exp_in_place(logits)
        logits.mul_(-upstream[rows].sum(-1, keepdim=True) / logits.sum(-1, keepdim=True))
        logits.scatter_add_(1, tokens[rows], upstream[rows])
        gradient = rounded[: len(logits)].copy_(logits)
        d_hidden[rows] = gradient @ head
        add_product(d_head, gradient.t(), hidden[rows])
    return d_hidden, d_head.to(head.dtype)


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
    """(N,) KL(sampler || model) in nats: how far temperature, then top-k, then top-p move the samples."""
    pieces = []
    for _, logits in logit_chunks(hidden, head):
        cut = logits < _lowest_kept(logits, temperature, top_p, top_k)
        pieces.append(_to_sampler(logits, cut, temperature))
    return torch.cat(pieces)


class SamplerOutput(NamedTuple):
    """Of sampler_logps."""

    logps: torch.Tensor  # (N,) log-probabilities of the tokens under the sampler, with gradients
    kl: torch.Tensor  # (N,) KL(sampler || model), as sampler_kl
    outside: torch.Tensor  # (N,) whether the token was not in its kept set, to which it is then added


class KeptSets(NamedTuple):
    """The tokens that a sampler keeps at N positions. Both tensors are on the CPU."""

    ids: torch.Tensor  # int32: the ids of position 0, then those of position 1, ...
    counts: torch.Tensor  # (N,) how many each position has

    def split(self, lengths):
        """A list of KeptSets of so many positions each."""
        counts = self.counts.split(lengths)
        return list(map(KeptSets, self.ids.split([part.sum().item() for part in counts]), counts))


def sampler_logps(hidden, head, tokens, temperature=1.0, top_p=1.0, top_k=0, kept=None):
    """SamplerOutput of tokens (N,): the sampler is softmax(logits / temperature) over the set it keeps.

    The set is what temperature, then top-k, then top-p keep of these logits, or `kept`, the KeptSets of
    earlier weights. The gradient holds it fixed. The logits are recomputed in the backward pass.
    """
    found = _SamplerLogps.apply(hidden, head, tokens[:, None], temperature, top_p, top_k, kept)
    return SamplerOutput(*(x.squeeze(1) for x in found))


@torch.no_grad()
def kept_sets(hidden, head, temperature, top_p, top_k):
    """The KeptSets of sampler_logps: 4 bytes for each token that is kept, and 8 a position."""
    ids, counts = [torch.empty(0, dtype=torch.int32)], [torch.empty(0, dtype=torch.long)]
    for _, logits in logit_chunks(hidden, head):
        kept = logits >= _lowest_kept(logits, temperature, top_p, top_k)
        counts.append(kept.sum(-1).cpu())
        ids.append(kept.nonzero()[:, 1].int().cpu())
    return KeptSets(torch.cat(ids), torch.cat(counts))


LIKELIEST = 1024  # tokens in which top-p looks first: a sort of the vocabulary takes many times as long


def _lowest_kept(logits, temperature, top_p, top_k):
    """(n, 1) The smallest logit that a sampler keeps. Tokens that tie with it are kept too.

    First the k largest logits, then the likeliest of these until their mass reaches p: the order of
    transformers and vLLM.
    """
    if temperature == 0:  # greedy
        return logits.amax(-1, keepdim=True)
    if not top_k and top_p == 1:
        return logits.new_full((len(logits), 1), -torch.inf)
    values = logits.topk(min(top_k or LIKELIEST, logits.shape[1])).values
    if top_p == 1:
        return values.amin(-1, keepdim=True)
    total = ((values if top_k else logits) / temperature).logsumexp(-1, keepdim=True)
    mass = (values / temperature - total).exp_()
    before = mass.cumsum(-1).sub_(mass)  # of the likelier tokens: 0 for the first
    lowest = values.masked_fill(before >= top_p, torch.inf).amin(-1, keepdim=True)
    if not top_k and (wide := mass.sum(-1) < top_p).any():
        lowest[wide] = _lowest_kept(logits[wide], temperature, top_p, top_k=logits.shape[1])  # of all of them
    return lowest


def _cut(rows, logits, tokens, lowest, kept):
    """(n, V) What a chunk does not keep, but never its own tokens; (n, 1) whether those were not kept."""
    if kept is None:
        cut = logits < lowest[rows]
    else:
        counts, first = kept.counts[rows], kept.counts[: rows.start].sum()
        ids = kept.ids[first : first + counts.sum()].to(logits.device)
        position = torch.arange(len(counts)).repeat_interleave(counts).to(logits.device)
        cut = torch.ones_like(logits, dtype=torch.bool)
        cut[position, ids] = False
    outside = cut.gather(1, tokens[rows])
    return cut.scatter_(1, tokens[rows], False), outside


def _to_sampler(logits, cut, temperature):
    """Overwrites a chunk of logits with the sampler's log-probabilities: KL(sampler || model) (n,)."""
    temperature = temperature or 1.0  # greedy: the kept token has a probability of 1 at any
    logits -= logits.amax(-1, keepdim=True)
    whole = logits.logsumexp(-1)
    logits.div_(temperature).masked_fill_(cut, -torch.inf)
    total = logits.logsumexp(-1)
    logits -= total[:, None]
    s = logits.exp()
    entropy = torch.special.entr(s, out=s).sum(-1)
    return whole - temperature * total - (1 - temperature) * entropy  # sum s (log s - log q)


class _SamplerLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, tokens, temperature, top_p, top_k, kept):
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logps, kl, lowest = (hidden.new_empty(tokens.shape, dtype=dtype) for _ in range(3))
        outside = torch.empty_like(tokens, dtype=torch.bool)
        for rows, logits in logit_chunks(hidden, head):
            if kept is None:
                lowest[rows] = _lowest_kept(logits, temperature, top_p, top_k)
            cut, outside[rows] = _cut(rows, logits, tokens, lowest, kept)
            kl[rows, 0] = _to_sampler(logits, cut, temperature)
            logps[rows] = logits.gather(1, tokens[rows])
        ctx.save_for_backward(hidden, head, tokens, lowest)
        ctx.temperature, ctx.kept = temperature or 1.0, kept
        ctx.mark_non_differentiable(kl, outside)
        return logps, kl, outside

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream, *_):
        hidden, head, tokens, lowest = ctx.saved_tensors

        def prepare(rows, logits):
            cut, _ = _cut(rows, logits, tokens, lowest, ctx.kept)
            logits.div_(ctx.temperature).masked_fill_(cut, -torch.inf)

        gradients = _logps_gradients(hidden, head, tokens, upstream / ctx.temperature, prepare)
        return *gradients, *[None] * 5
