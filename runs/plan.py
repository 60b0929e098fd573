"""What a run takes in memory, from the configs alone, before anything is loaded.

A micro-batch goes through the models on fake tensors, which have a shape and no memory; what lives together
is counted. Not counted: Python and torch (0.4 GB), CUDA's context, evaluations, what an allocator keeps."""

import contextlib
import math
import os
import weakref
from unittest import mock

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from distil import models
from distil.artifacts import refuse
from streaming_kl import linear_divergence
from streaming_kl.chunks import LOGITS_BYTES


class LiveBytes(TorchDispatchMode):
    """Within it: `now`, the bytes of the tensors made in it that live, and `peak`, the most they were."""

    now = peak = 0

    def __init__(self, before):
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in before}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = filter(torch.is_tensor, torch.utils._pytree.tree_leaves(out))
        for storage in (tensor.untyped_storage() for tensor in tensors):
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def free(self, storage, size):
        self.known.remove(storage)
        self.now -= size


def trace(directory, shape, vocab_size, kept_in, dtype=None, trained=False, checkpointing=False):
    """Bytes of a model: (its weights, what a rank of several gathers of them, {pass: most beside weights and
    gradients}); `hidden`: what lives after the forward pass. {} where it cannot run on fake tensors."""
    from transformers import AutoModelForCausalLM

    config, total, layers, found = models.config_of(directory), math.nan, [], {}
    # It reads values, which fake tensors do not have. None: each row is one sequence.
    rows = mock.patch("transformers.masking_utils.find_packed_sequence_indices", return_value=None)
    errors = RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ImportError
    errors += (DataDependentOutputException,)
    mode = FakeTensorMode(), rows, torch.device(models.default_device()), torch.set_grad_enabled(trained)
    with contextlib.suppress(*errors), contextlib.ExitStack() as stack:
        for one in mode:
            stack.enter_context(one)
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, kept_in)).eval()
        parts = [model, *models.decoder_layers(model)]
        total, *layers = (sum(weight.nbytes for weight in part.parameters()) for part in parts)
        if checkpointing:
            models.checkpoint_activations(model)
        weights = [*model.parameters()]
        for weight in weights:
            weight.grad = torch.zeros_like(weight)  # of the micro-batch before
        before = [*weights, *model.buffers(), *(weight.grad for weight in weights)]
        with LiveBytes(before) as live:
            with models.autocast(dtype):
                ids = torch.zeros(shape, dtype=torch.long)
                hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
            hidden = hidden.to(getattr(torch, dtype)) if dtype else hidden
            head = model.get_output_embeddings().weight[:vocab_size].to(hidden.dtype)
            found |= {"forward": live.peak, "hidden": live.now}
            if trained:
                live.peak = live.now
                pair = hidden[:1], head  # with all tokens, only the chunks of logits would be larger
                loss = linear_divergence(lambda q, p: (q - p).sum(-1), *pair, *(x.detach() for x in pair))
                found["loss"], live.peak = live.peak, live.now
                del hidden, head, pair
                loss.backward()
                found["backward"] = live.peak
    return total, total - sum(layers) + sum(sorted(layers)[-2:]), found


def memory(student, teacher, head, vocab_size, n, shape, sampled, dtype, engine, pool, sleeps, checkpointing):
    """Rows [what, bytes (NaN: unknown), how] of what stays, and of what comes and goes, one at a time.

    student, teacher: directories, the second may be None; head: bytes of the one that stored scores bring; n:
    ranks; shape: of a micro-batch; sampled: responses at a time, their tokens; pool: bytes of vLLM's share of
    a GPU, None on a CPU; sleeps: it is given back between samplings."""
    item, tokens, nan = getattr(torch, dtype).itemsize, math.prod(shape), math.nan
    others, gathers, scored = head, 0, {"forward": 0, "hidden": head // vocab_size * tokens}
    if teacher:
        others, gathers, scored = trace(teacher, shape, vocab_size, dtype)
    own, gathered, found = trace(student, shape, vocab_size, "float32", dtype, True, checkpointing)
    config = models.config_of(student).get_text_config()
    layers, heads = (getattr(config, name, nan) for name in ("num_hidden_layers", "num_attention_heads"))
    width = getattr(config, "head_dim", None) or config.hidden_size / heads
    width *= getattr(config, "num_key_value_heads", None) or heads
    cache = 2 * item * math.prod(sampled) * layers * width
    cached = f"keys and values of {sampled[0]} x {sampled[1]} tokens: {gib(cache)}"
    need = own * item / 4 + cache / sampled[0]
    fits = pool is None or pool >= need
    pool = pool or own * item / 4 + 2**30
    stays = [["weights", own / n, "float32"], ["gradients", own / n, "float32"]]
    stays += [["moments", 2 * own / n, "AdamW"], ["teacher", others / n, dtype]]
    stays += [["gathered of these", 2 * gathered + gathers, "two layers; what is in none"]] * (n > 1)
    stays += [["copy that samples", own, "float32"]] * (engine == "hf" and n > 1)
    small = f"its share, {gib(pool)}, is less than its weights and one response, {gib(need)}"
    vllm = ["vLLM", pool, f"weights: {gib(own * item / 4)}; {cached}"]
    vllm = [vllm if fits else ["vLLM", math.inf, small]] * (engine == "vllm")
    stays += vllm * (not sleeps)
    signal = scored.get("hidden", nan)
    logits = min(16 * tokens * vocab_size, LOGITS_BYTES[models.default_device()])
    goes = [["sampling", cache, cached]] * (engine == "hf") + vllm * sleeps
    goes += [["teacher's pass", scored.get("forward", nan), f"{shape[0]} x {shape[1]} tokens"]]
    goes += [["forward pass", found.get("forward", nan) + signal, f"{shape[0]} x {shape[1]} tokens"]]
    goes += [["loss", found.get("loss", nan) + signal + logits, f"chunk of logits: {gib(logits)}"]]
    return stays, [*goes, ["backward pass", found.get("backward", nan), "and gradients to be added"]]


def gib(size):
    return "unknown" if size != size else f"{size / 2**30:.2f}"


def device_bytes():
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def fit(job, checkpointing, device):
    """(bytes that a run takes, whether it checkpoints, the rows of memory()): "auto" does so where it would
    not fit on the device else."""
    for on in {"auto": (False, True), "on": (True,), "off": (False,)}[checkpointing]:
        stays, goes = memory(**job, checkpointing=on)
        total = sum(size for _, size, _ in stays) + max(
            (size for _, size, _ in goes if size == size), default=0
        )
        if total <= device:
            break
    return total, on, stays, goes


def plan(job, checkpointing, as_table):
    """Print what a run takes, refuse what a GPU cannot hold; whether to checkpoint. job: for memory()."""
    device = device_bytes()
    total, on, stays, goes = fit(job, checkpointing, device)
    for what, _, how in [row for row in (*stays, *goes) if row[1] == math.inf]:
        refuse(f"{what}: {how} GiB: raise --gpu_memory_utilization")
    if as_table:
        for what, size, how in [*stays, *([f"one at a time: {what}", *rest] for what, *rest in goes)]:
            print(f"memory: {what:34} {gib(size):>8} GiB  {how}")
    about = f"memory: {gib(total)} of {gib(device)} GiB, activation checkpointing {'on' if on else 'off'}"
    about += ", and what is unknown" * any(size != size for _, size, _ in goes)
    if total > device:
        about += ": too much; try " + "--activation_checkpointing on, " * (not on) + "a smaller "
        about += "--micro_batch_tokens, --max_response_tokens, --sample_batch (hf) or "
        about += "--gpu_memory_utilization (vllm), or more ranks"
        if torch.cuda.is_available():
            refuse(about)
    print("WARNING: " * (total > device) + about, flush=True)
    return on
