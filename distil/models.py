"""Models: directories, loading, and the one forward pass over responses that every stage uses."""

import contextlib
import functools
import json
import math
import os
import re
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from torch.utils.checkpoint import checkpoint

from distil.artifacts import read_artifact, read_checkpoint, refuse
from distil.problems import hub_reachable


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
    kept: tuple | None = None  # streaming_kl.KeptSets of that policy; None: those of the model as it is
    text: str = ""  # decoded, where somebody needs it
    teacher_prompt_ids: list | None = None  # of the prompt that the teacher sees; None: the same

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


def model_dir(name, flag, weights=True):
    """The local directory of a model, a directory or a hub id; only safetensors weights are downloaded."""
    directory = name if os.path.isdir(name) else download(name, flag, weights)
    check_model_dir(directory, flag)
    return directory


def download(name, flag, weights=True):
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        refuse(f"{flag} {name}: no such directory")
    reachable = hub_reachable()
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", *["*.safetensors"] * weights, "*.jinja", "*.txt", "*.model"]
        return snapshot_download(name, allow_patterns=patterns)
    except (OSError, ValueError) as error:
        why = f"does not give it: {error}" if reachable else "cannot be reached"
        refuse(f"{flag} {name}: no such directory, and the hub {why}")


def check_model_dir(directory, flag):
    """Refuse a directory without a readable config, and a checkpoint changed after it was written."""
    if not os.path.isfile(os.path.join(directory, "config.json")):
        final = " (its final/ is)" if os.path.isdir(os.path.join(directory, "final")) else ""
        refuse(f"{flag} {directory}: no config.json in this directory, so it is not a model{final}")
    for name in ("config.json", "generation_config.json"):
        path = os.path.join(directory, name)
        try:
            damaged = os.path.isfile(path) and not isinstance(json.load(open(path, encoding="utf-8")), dict)
        except (ValueError, RecursionError):
            damaged = True
        if damaged:
            refuse(f"{flag} {directory}: {name} is not a JSON object")
    config_of(directory, flag)
    real = os.path.realpath(directory)
    if os.path.isfile(os.path.join(os.path.dirname(real), "meta.json")):  # RUN/final: it has the checksums
        read_artifact(os.path.dirname(real), flag)
    own_best = os.path.basename(real) == "best" and os.path.isfile(os.path.join(real, "checkpoint.json"))
    if own_best or re.fullmatch(r"step_\d{6}", os.path.basename(real)):
        read_checkpoint(directory, flag)


@contextlib.contextmanager
def refusing(what):
    """What transformers or vLLM raise about a model becomes one line."""
    from huggingface_hub.errors import StrictDataclassError

    errors = OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, AssertionError
    errors += ArithmeticError, ImportError, SafetensorError, StrictDataclassError  # import: of quantised ones
    try:
        yield
    except errors as error:
        refuse(f"{what}: {error}")


def load_model(directory, flag, dtype, device=None):
    """The causal language model of a local directory, in eval mode, on the GPU if there is one."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    options = {"use_safetensors": True, "trust_remote_code": False, "output_loading_info": True}
    options["ignore_mismatched_sizes"] = True  # they are refused below, by name
    with refusing(f"{flag} {directory}: the model cannot be loaded"):
        model, report = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **options)
    wrong = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if wrong:  # transformers would leave these random
        refuse(f"{flag} {directory}: {len(wrong)} weights are missing or of another shape: {wrong[0]}, ...")
    model = model.to(device or default_device()).eval()
    check_finite(model.named_parameters(), f"{flag} {directory}")
    if device is None:  # a model to be sharded does not sample
        check_generation(model, f"{flag} {directory}")
    return model


def check_finite(weights, where):
    """Refuse weights, pairs (name, tensor), if one holds a NaN or an infinity."""
    bad = [name for name, weight in weights if not weight.float().isfinite().all()]
    if bad:
        refuse(f"{where}: weight {bad[0]} is not finite (first of {len(bad)})")


@torch.no_grad()
def check_generation(model, where):
    """Refuse a model that generates, padded on the left and with a cache, by other logits than its own.

    Tolerance: 1e-3 of the logits' norm or 32 eps (bfloat16 0.25), for rounding can choose other experts."""
    from transformers import GenerationConfig

    options = {"max_new_tokens": 3, "pad_token_id": 0, "output_logits": True, "return_dict_in_generate": True}
    own_config, model.generation_config = model.generation_config, GenerationConfig(**options)
    rows = torch.tensor([[0, 0, 0, 3, 2, 1], [1, 2, 3, 3, 2, 1]], device=model.device)
    with refusing(f"{where}: transformers cannot sample from it"):
        run = model.generate(input_ids=rows, attention_mask=rows.sign())
        own = model(input_ids=run.sequences[:1, 3:-1], use_cache=False).logits[0, 2:]
    model.generation_config = own_config
    if not own.isfinite().all():
        refuse(f"{where}: its logits are not finite: its weights or its --dtype do not suffice")
    error = relative_difference(torch.stack(run.logits)[:, 0], own)
    if not error <= max(1e-3, 32 * torch.finfo(model.dtype).eps):
        refuse(f"{where}: transformers generates from it with other logits: they differ by {error:.2g}")


def relative_difference(found, right):
    """The norm of the difference of two tensors over that of the second."""
    return ((found.float() - right.float()).norm() / right.float().norm().clamp(min=1e-30)).item()


def config_of(directory, flag="the model"):
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds for a bad config, or one with code of its own
        refuse(f"{flag} {directory}: its config.json cannot be used: {error}")


@functools.cache  # the line is printed once
def context_of(directory, flag="the model"):
    """How many tokens a model's positions are made for; math.inf where its config states no limit.

    Longrope stretches all positions of a batch if one lies beyond what the model was first trained on, so
    only the tokens before that are exact."""
    config = config_of(directory, flag).get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    for one in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if one.get("rope_type") == "longrope" and one.get("original_max_position_embeddings"):
            limit = int(one["original_max_position_embeddings"])
            print(f"{directory}: its positions are longrope, so its context ends at {limit}", flush=True)
            return limit
    for name in ("max_position_embeddings", "max_seq_len"):  # the second is MPT's
        limit = getattr(config, name, None)
        if limit is not None and (type(limit) is not int or limit < 1):
            refuse(f"{flag} {directory}: its config.json must state a positive {name}, not {limit!r}")
        if limit:
            return limit
    print(f"{directory}: its config.json states no context, so no length is too long", flush=True)
    return math.inf


def rows_of(directory):
    """How many token ids a model has rows for, in its embeddings and in its output head."""
    rows = getattr(config_of(directory).get_text_config(), "vocab_size", None)
    if type(rows) is not int or rows < 1:
        refuse(f"{directory}: its config.json must state a vocab_size, not {rows!r}")
    return rows


def output_head(model, flag="the model"):
    """The output projection's weight (V, H). Refused where there is none, or one with a bias."""
    head = model.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        refuse(f"{flag}: the model has no plain output projection (none, or one with a bias)")
    return head.weight


def logit_scale(config):
    """What a family multiplies hidden @ head.T by; check_head() finds out whether that is all it does."""
    scale, config = 1.0, config.get_text_config()
    for name, power in {"logit_scale": 1, "lm_head_multiplier": 1, "logits_scaling": -1}.items():
        value = getattr(config, name, None)
        scale *= value**power if isinstance(value, (int, float)) and value else 1
    return scale


@torch.no_grad()
def check_head(model, flag):
    """Refuse a model whose own logits, on 7 tokens, are not the hidden @ head.T of forward().

    Compared as they are and, to reveal a cap, with hidden states 128 times as large. Tolerance: 1e-4 of the
    logits' norm or, as models round their logits to their dtype, 4 eps (bfloat16 0.03, float16 0.004)."""
    ids = [i % len(output_head(model, flag)) for i in range(8)]
    for factor in (1, 128):
        with refusing(f"{flag}: no last hidden states can be had from it"):
            hook = model.get_decoder().register_forward_hook(functools.partial(enlarge, factor))
            hidden, head = forward(model, [Response(ids[:1], ids[1:], False)], None)
            own = model(input_ids=torch.tensor([ids[:-1]], device=model.device), use_cache=False).logits[0]
            hook.remove()
        error = relative_difference(hidden.float() @ head.float().T, own)
        if not error <= max(1e-4, 4 * torch.finfo(model.dtype).eps):
            large = "" if factor == 1 else ", where those are large"
            what = f"its logits are not its last hidden states times its output head{large}"
            refuse(f"{flag}: {what} (a soft cap?): they differ by {error:.2g}; it cannot be used")


def enlarge(factor, module, given, output):
    output.last_hidden_state = factor * output.last_hidden_state
    return output


def decoder_layers(model):
    """The layers of a model's decoder, whatever the family calls their list."""
    lists = [m for m in model.get_decoder().children() if isinstance(m, torch.nn.ModuleList)]
    return [layer for layers in lists for layer in layers]


def checkpoint_activations(model):
    """Let each layer keep its input alone, and compute the rest again in the backward pass.

    transformers' own switch acts only after train(), which would switch dropout on too."""
    again = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    layers = decoder_layers(model)
    if not layers:
        refuse("--activation_checkpointing: the model has no list of layers")
    for layer in layers:
        layer.forward = functools.partial(again, layer.forward)


def autocast(dtype):
    """Autocast to "bfloat16"; nothing for "float32" or None."""
    enabled = dtype not in (None, "float32")
    return torch.autocast(default_device(), getattr(torch, dtype) if enabled else None, enabled=enabled)


def forward(model, responses, vocab_size, dtype=None):
    """What predicts the N response tokens of some Responses: hidden states (N, H) and the head (V, H).

    The logits are hidden @ head.T; a constant that the family multiplies them by is in hidden. Rows of the
    head from vocab_size on are left out: no token has them.
    dtype: of the computation, for models that are kept in float32; None: the model's own."""
    with autocast(dtype):
        hidden = response_hidden(model, responses)
    if logit_scale(model.config) != 1:
        hidden = hidden * logit_scale(model.config)
    if dtype:
        hidden = hidden.to(getattr(torch, dtype))  # autocast leaves it in float32
    head = output_head(model)[:vocab_size].to(hidden.dtype)
    return hidden, head if torch.is_grad_enabled() else head.detach()


def response_hidden(model, responses):
    """Last hidden states (N, H) of the positions that predict response tokens, row after row, no padding.

    With prompt [a b] and response [x y e]:
        input       a  b  x  y       the last token is no input, it predicts nothing
        predicts    b  x  y  e
        taken          *  *  *       the positions from the prompt's last token on"""
    rows = [r.prompt_ids + r.response_ids[:-1] for r in responses]
    width, device = max(map(len, rows)), model.device
    rows = [row + [0] * (width - len(row)) for row in rows]
    ids = torch.tensor(rows, device=device)  # (B, T), padded on the right
    length = torch.tensor([r.length - 1 for r in responses], device=device)[:, None]
    first = torch.tensor([len(r.prompt_ids) - 1 for r in responses], device=device)[:, None]
    column = torch.arange(width, device=device)[None]
    # No attention mask: padding comes after all that is real, and every position sees only what is before it.
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    return hidden[(column >= first) & (column < length)]
