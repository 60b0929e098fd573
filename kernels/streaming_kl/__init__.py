"""Exact full-vocabulary KL between two language models; memory per token does not depend on the vocabulary.

    from streaming_kl import streaming_kl, linear_streaming_kl, linear_divergence, KLOutput, Top

Per token, with p = softmax(teacher logits / T) and q = softmax(student logits / T) over the whole vocabulary:

    loss = fkl_weight * KL(p || q) + (1 - fkl_weight) * KL(q || p)      nats; no hidden factor T^2

    streaming_kl         from logits (N, V). Forward reads each once; backward recomputes from nine numbers a
                         row.
    linear_streaming_kl  from hidden states (N, H) and heads (V, H). Only a chunk of tokens has logits at a
                         time. For a scalar loss the same pass computes the gradients, so nothing is computed
                         twice.
    linear_divergence    the same for any torch function of two chunks of logits: how to try a new objective.
    token_logps, top_tokens, entropies
                         of one model, from hidden states and a head, a chunk of tokens at a time.
    sampler_logps, sampler_kl, kept_sets
                         of what temperature, top-k and top-p make of that model; the same way.
    chunk_of             how many tokens those chunks have.

Nothing here needs triton until impl="triton", or impl="auto" with CUDA tensors, asks for it.
"""

from .chunks import chunk_of
from .common import KLOutput, Top
from .heads import (
    KeptSets,
    SamplerOutput,
    entropies,
    kept_sets,
    sampler_kl,
    sampler_logps,
    token_logps,
    top_tokens,
)
from .linear import linear_divergence, linear_streaming_kl
from .logits import streaming_kl

__all__ = [
    "KLOutput",
    "KeptSets",
    "SamplerOutput",
    "Top",
    "chunk_of",
    "entropies",
    "kept_sets",
    "linear_divergence",
    "linear_streaming_kl",
    "sampler_kl",
    "sampler_logps",
    "streaming_kl",
    "token_logps",
    "top_tokens",
]
