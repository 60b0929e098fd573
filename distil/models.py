"""Models: directories, loading, and the one forward pass over responses that every stage uses."""

import json
import os
import re
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from torch.utils.checkpoint import checkpoint

from distil.artifacts import read_artifact, read_checkpoint, refuse
from distil.problems import hub_reachable
from streaming_kl import chunk_of


class Response(NamedTuple):
    """One response to a problem, sampled now or read from disk."""

    prompt_ids: list
    response_ids: list  # with the stop token, unless truncated
    truncated: bool  # ended by the limit of response tokens
    id: str = ""  # the problem's
    sampler_logps: list | None = None  # vLLM's log-probability of each token; None: not known
    row: int = -1  # its place in a rollouts artifact
    advantage: float = 0.0  # GRPO
    old_logps: torch.Tensor | None = None  # (T,) under the policy that sampled; None: the model as it is
    text: str = ""  # decoded, where somebody needs it

    @property
    def length(self):
        """Tokens of prompt and response."""
        return len(self.prompt_ids) + len(self.response_ids)

    def first(self, count):
        """The Response with its first `count` tokens."""
        truncated = self.truncated or len(self.response_ids) > count
        return self._replace(response_ids=self.response_ids[:count], truncated=truncated)


def default_device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_dtype():
    return "bfloat16" if torch.cuda.is_available() else "float32"


def model_dir(name, flag):
    """The local directory of a model, a directory or a hub id; only safetensors weights are downloaded."""
    if os.path.isdir(name):
        check_model_dir(name, flag)
        return name
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        refuse(f"{flag} {name}: no such directory")
    reachable = hub_reachable()
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(
            name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
        )
    except (OSError, ValueError) as error:
        why = f"does not give it: {error}" if reachable else "cannot be reached"
        refuse(f"{flag} {name}: no such directory, and the hub {why}")


def check_model_dir(directory, flag):
    """Refuse a directory without a readable config, and a checkpoint changed after it was written."""
    if not os.path.isfile(os.path.join(directory, "config.json")):
        refuse(f"{flag} {directory}: no config.json in this directory, so it is not a model")
    for name in ("config.json", "generation_config.json"):
        path = os.path.join(directory, name)
        try:
            damaged = os.path.isfile(path) and not isinstance(json.load(open(path, encoding="utf-8")), dict)
        except (ValueError, RecursionError):
            damaged = True
        if damaged:
            refuse(f"{flag} {directory}: {name} is not a JSON object")
    real = os.path.realpath(directory)
    if os.path.isfile(
        os.path.join(os.path.dirname(real), "meta.json")
    ):  # RUN/final: its checksums are in RUN/meta.json
        read_artifact(os.path.dirname(real), flag)
    if re.fullmatch(r"step_\d{6}", os.path.basename(real)):
        read_checkpoint(directory, flag)


def load_model(directory, flag, dtype, device=None):
    """The causal language model of a local directory, in eval mode, on the GPU if there is one."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    options = {
        "dtype": dtype,
        "use_safetensors": True,
        "trust_remote_code": False,
        "output_loading_info": True,
    }
    try:
        model, report = AutoModelForCausalLM.from_pretrained(directory, **options)
    except (
        OSError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        RuntimeError,
        SafetensorError,
    ) as error:
        refuse(f"{flag} {directory}: the model cannot be loaded: {error}")
    wrong = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if wrong:  # transformers would leave these random
        refuse(
            f"{flag} {directory}: {len(wrong)} weights are missing or of another shape, such as {wrong[0]}"
        )
    return model.to(device or default_device()).eval()


def context_of(directory):
    """How many tokens a model's positions are made for."""
    from transformers import AutoConfig

    try:
        return int(AutoConfig.from_pretrained(directory, trust_remote_code=False).max_position_embeddings)
    except (
        Exception
    ) as error:  # transformers raises many kinds for a bad config, or for a model with code of its own
        refuse(f"{directory}: its config.json cannot be used: {error}")


def output_head(model, flag="the model"):
    """The output projection's weight (V, H). Refused where the logits are more than hidden @ weight.T."""
    head = model.get_output_embeddings()
    for name in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        if getattr(model.config, name, None) not in (None, 1.0):
            refuse(
                f"{flag}: its logits are changed by {name}, which the KL from hidden states does not support"
            )
    if head is None or getattr(head, "bias", None) is not None:
        refuse(f"{flag}: the model has no plain output projection (none, or one with a bias)")
    return head.weight


def autocast(dtype):
    """Autocast to "bfloat16"; nothing for "float32" or None."""
    enabled = dtype not in (None, "float32")
    return torch.autocast(default_device(), getattr(torch, dtype) if enabled else None, enabled=enabled)


def forward(model, responses, vocab_size, dtype=None):
    """What predicts the N response tokens of some Responses: hidden states (N, H) and the head (V, H).

    The logits are hidden @ head.T. Rows of the head beyond vocab_size, the tokenizer's size, are left out.
    dtype: of the computation, for models that are kept in float32; None: the model's own."""
    with autocast(dtype):
        hidden = response_hidden(
            model, [r.prompt_ids for r in responses], [r.response_ids for r in responses]
        )
    if dtype:
        hidden = hidden.to(getattr(torch, dtype))  # autocast leaves it in float32
    head = output_head(model)[:vocab_size].to(hidden.dtype)
    return hidden, head if torch.is_grad_enabled() else head.detach()


def response_hidden(model, prompts, responses):
    """Last hidden states (N, H) of the positions that predict response tokens, row after row, no padding.

    prompts, responses: lists of lists of token ids. With prompt [a b] and response [x y e]:
        input       a  b  x  y       the last token is no input, it predicts nothing
        predicts    b  x  y  e
        taken          *  *  *       the positions from the prompt's last token on"""
    rows = [prompt + response[:-1] for prompt, response in zip(prompts, responses, strict=True)]
    width, device = max(map(len, rows)), model.device
    ids = torch.tensor(
        [row + [0] * (width - len(row)) for row in rows], device=device
    )  # (B, T), padded on the right
    length = torch.tensor([len(row) for row in rows], device=device)[:, None]
    first = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)[:, None]
    column = torch.arange(width, device=device)[None]
    mask = (column < length).long()
    hidden = model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    return hidden[(column >= first) & (column < length)]


class Float32Logits(torch.autograd.Function):
    """hidden (n, H) @ head (V, H).T in float32 from half-precision inputs: rounded ones would bias a KL."""

    @staticmethod
    def forward(ctx, hidden, head):
        ctx.save_for_backward(hidden, head)
        if hidden.is_cuda:
            return torch.mm(hidden, head.T, out_dtype=torch.float32)
        return hidden.float() @ head.float().T

    @staticmethod
    def backward(ctx, gradient):
        hidden, head = ctx.saved_tensors
        gradient = gradient.to(hidden.dtype)
        return gradient @ head, gradient.T @ hidden


def logits_of(hidden, head):
    """Logits (n, V) in float32, or in float64 where the inputs are. No log-probability comes from less."""
    if hidden.dtype in (torch.float32, torch.float64):
        return hidden @ head.T
    return Float32Logits.apply(hidden, head)


def token_logps(hidden, head, tokens):
    """log p(token) in float32 from hidden states (N, H), head (V, H) and tokens (N,) or (N, m); like tokens.

    Logits exist for chunk_of(head) positions at a time and are recomputed in the backward pass."""

    def logps(hidden, tokens):
        return logits_of(hidden, head).log_softmax(-1).gather(1, tokens)

    picked = tokens if tokens.dim() == 2 else tokens[:, None]
    chunks = zip(hidden.split(chunk_of(head)), picked.split(chunk_of(head)))
    return torch.cat([checkpoint(logps, *chunk, use_reentrant=False) for chunk in chunks]).view_as(tokens)


@torch.no_grad()
def top_tokens(hidden, head, k):
    """The k likeliest tokens of each position, likeliest first: log-probabilities (N, k), ids (N, k)."""
    tops = [logits_of(chunk, head).log_softmax(-1).topk(k) for chunk in hidden.split(chunk_of(head))]
    return torch.cat([top.values for top in tops]), torch.cat([top.indices for top in tops])


def batches_by_tokens(lengths, budget):
    """Indices grouped by similar length, with rows x longest <= budget in a batch; a longer row goes alone.

    A batch with at least a 32nd of the budget takes no row that makes more than a tenth of it padding.
    batches_by_tokens([60, 90, 62, 2], 1024) -> [[3, 0], [2], [1]]"""
    batches, tokens = [], 0
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        padded = (len(batches[-1]) + 1) * lengths[i] if batches else 0
        dense = tokens < budget / 32 or tokens + lengths[i] >= 0.9 * padded
        if batches and padded <= budget and dense:
            batches[-1].append(i)
            tokens += lengths[i]
        else:
            batches.append([i])
            tokens = lengths[i]
    return batches
