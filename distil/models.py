"""Models: directories, loading, and one forward pass over responses: hidden states, log-probabilities, likeliest tokens."""

import json
import os
import re

import torch
from safetensors import SafetensorError
from torch.utils.checkpoint import checkpoint

from distil.artifacts import read_artifact, read_checkpoint, refuse
from distil.problems import hub_reachable
from streaming_kl import chunk_of


def default_dtype():
    return "bfloat16" if torch.cuda.is_available() else "float32"


def model_dir(name, flag):
    """The local directory of a model given as a directory or as a hub id; only safetensors weights are fetched."""
    if os.path.isdir(name):
        if not os.path.isfile(os.path.join(name, "config.json")):
            refuse(f"{flag} {name}: no config.json in this directory, so it is not a model")
        for path in (os.path.join(name, file) for file in ("config.json", "generation_config.json")):
            try:
                damaged = os.path.isfile(path) and not isinstance(
                    json.load(open(path, encoding="utf-8")), dict
                )
            except (ValueError, RecursionError):
                damaged = True
            if damaged:
                refuse(f"{flag} {name}: {os.path.basename(path)} is not a JSON object")
        run = os.path.dirname(os.path.realpath(name))
        if os.path.isfile(
            os.path.join(run, "meta.json")
        ):  # of a finished artifact, as final/ is: its checksums are there
            read_artifact(run, flag)
        if re.fullmatch(r"step_\d{6}", os.path.basename(os.path.realpath(name))):
            read_checkpoint(name, flag)
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


def load_model(directory, flag, dtype, device="cuda" if torch.cuda.is_available() else "cpu"):
    """The causal language model of a local directory, on the GPU if there is one. Only safetensors are read."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
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
    if wrong := [*report["missing_keys"], *report["mismatched_keys"]]:  # these weights would be random
        refuse(
            f"{flag} {directory}: {len(wrong)} of its weights are missing or of another shape, such as {sorted(map(str, wrong))[0]}"
        )
    return model.to(device).eval()


def context_of(directory):
    """Tokens that a model's positions are made for."""
    from transformers import AutoConfig

    try:
        return int(AutoConfig.from_pretrained(directory, trust_remote_code=False).max_position_embeddings)
    except (
        Exception
    ) as error:  # whatever is wrong with the file; or a model with code of its own, which is never run
        refuse(f"{directory}: its config.json cannot be used: {error}")


def output_head(model, flag):
    """The output projection's weight (V, H); models that do more than hidden @ weight.T to get their logits are refused."""
    head = model.get_output_embeddings()
    for name in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        if getattr(model.config, name, None) not in (None, 1.0):
            refuse(
                f"{flag}: the model changes its logits by {name}, which the KL from hidden states does not support"
            )
    if head is None or getattr(head, "bias", None) is not None:
        refuse(f"{flag}: the model has no plain output projection (none, or one with a bias)")
    return head.weight


def batches_by_tokens(lengths, budget):
    """Indices grouped by similar length, so that rows x longest <= budget in each batch (a longer row goes alone), and a batch that
    has a 32nd of the budget takes no row with which more than a tenth of it would be padding.

    batches_by_tokens([60, 90, 62, 2], 1024) -> [[3, 0], [2], [1]]"""
    batches, tokens = [], 0
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        padded = (len(batches[-1]) + 1) * lengths[i] if batches else 0
        if batches and padded <= budget and (tokens < budget / 32 or tokens + lengths[i] >= 0.9 * padded):
            batches[-1].append(i)
            tokens += lengths[i]
        else:
            batches.append([i])
            tokens = lengths[i]
    return batches


def response_hidden(model, prompts, responses):
    """Last hidden states (N, H) of the positions that predict the response tokens, row after row without padding.

    prompts, responses: lists of lists of token ids; N is the number of response tokens. With prompt [a b] and response [x y e]:
        input       a  b  x  y       the last token needs no input, it predicts nothing
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
    hidden = model.get_decoder()(
        input_ids=ids, attention_mask=(column < length).long(), use_cache=False
    ).last_hidden_state
    return hidden[(column >= first) & (column < length)]


def token_logps(hidden, head, tokens):
    """log p(token) in fp32, from hidden states (N, H), head (V, H) and tokens (N,) or (N, m): the shape of `tokens`.

    Logits exist for chunk_of(head) positions at a time, and are computed again in the backward pass."""

    def logps(hidden, tokens):
        return (hidden @ head.T.to(hidden.dtype)).float().log_softmax(-1).gather(1, tokens)

    picked = tokens if tokens.dim() == 2 else tokens[:, None]
    chunks = zip(hidden.split(chunk_of(head)), picked.split(chunk_of(head)))
    pieces = [checkpoint(logps, h, t, use_reentrant=False) for h, t in chunks]
    return torch.cat(pieces).view_as(tokens)


@torch.no_grad()
def top_tokens(hidden, head, k):
    """The k likeliest tokens of each position, likeliest first: (log-probabilities (N, k) fp32, ids (N, k))."""
    tops = [(h @ head.T.to(h.dtype)).float().log_softmax(-1).topk(k) for h in hidden.split(chunk_of(head))]
    return torch.cat([top.values for top in tops]), torch.cat([top.indices for top in tops])
