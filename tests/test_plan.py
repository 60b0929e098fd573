"""Activation checkpointing and the memory plan, against what real tensors take."""

import contextlib
import functools
import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, Qwen3Config

import grpo
import score_teacher
import train
from conftest import run_line, untimed
from distil import models
from distil.models import Response, checkpoint_activations, forward, response_hidden
from runs import plan
from test_ranks import on_ranks

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "head_dim": 8, "vocab_size": 99}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
QWEN3 = Qwen3Config(num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, **SIZES, **IDS)
DROPOUT = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
GPT2 = GPT2Config(vocab_size=99, n_embd=32, n_layer=3, n_head=4, **IDS, **DROPOUT)
CONFIGS = pytest.mark.parametrize("config", [QWEN3, GPT2], ids=["qwen3", "gpt2"])
RESPONSES = [Response([1, 3, 20], [21, 5, 2] * 9, False), Response([1, 9], [5, 6, 7] * 20, False)]


def model_of(config):
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@contextlib.contextmanager
def saved_bytes(model):
    """Bytes of the storages that autograd saves, weights and buffers not counted: a list of one number."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept, total = {}, []

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield total
    total.append(sum(storage.nbytes() for storage in kept.values()))


def step(model, dtype=None):
    """The loss and gradients of a sum of hidden states, and the bytes saved for them."""
    with saved_bytes(model) as saved, models.autocast(dtype):
        loss = response_hidden(model, RESPONSES).sin().sum()
    loss.backward()
    return loss.detach(), [weight.grad for weight in model.parameters()], saved[0]


@CONFIGS
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_checkpointing_changes_no_bit_and_saves_memory(config, dtype):
    plain, checkpointed = model_of(config), model_of(config)
    checkpoint_activations(checkpointed)
    assert plain.state_dict().keys() == checkpointed.state_dict().keys() and not checkpointed.training
    (loss, gradients, kept), (same, others, less) = step(plain, dtype), step(checkpointed, dtype)
    assert torch.equal(loss, same)
    for a, b in zip(gradients, others, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    assert less < kept / 4


@CONFIGS
def test_checkpointing_leaves_sampling_as_it_is(config):
    plain, checkpointed = model_of(config), model_of(config)
    checkpoint_activations(checkpointed)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    ids = torch.tensor([[1, 5, 7]])
    with torch.no_grad():
        assert torch.equal(plain.generate(ids, **options), checkpointed.generate(ids, **options))


def test_a_model_without_layers_is_refused(refused):
    model = model_of(QWEN3)
    model.model.layers = torch.nn.Sequential(*model.model.layers)
    refused(lambda: checkpoint_activations(model), "--activation_checkpointing")


@CONFIGS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_traced_is_what_real_tensors_take(config, dtype, tmp_path):
    """Weights by their number; after the forward pass, what autograd saves, hidden states and head."""
    model = model_of(config)
    model.save_pretrained(tmp_path)
    weights, _, found = plan.trace(tmp_path, (2, 60), 99, "float32", dtype, trained=True)
    assert weights == 4 * sum(weight.numel() for weight in model.parameters())
    responses = [Response([1], [5] * 60, False)] * 2
    with saved_bytes(model) as saved:
        hidden, head = forward(model, responses, 99, dtype)
    copies = 2 * (hidden.nbytes + head.nbytes) if dtype == "bfloat16" else hidden.nbytes
    assert found["hidden"] == pytest.approx(saved[0], abs=2 * copies + 4 * 60 * 16)
    assert found["hidden"] <= found["forward"] and found["hidden"] < found["loss"]


def test_checkpointed_passes_take_less(tmp_path):
    model_of(QWEN3).save_pretrained(tmp_path)
    off, on = (
        plan.trace(tmp_path, (2, 500), 99, "float32", "float32", True, way)[2] for way in (False, True)
    )
    assert all(on[name] < off[name] / 1.5 for name in off)


def test_memory_shared_by_ranks(tmp_path, monkeypatch, refused):
    model_of(QWEN3).save_pretrained(tmp_path)
    given = dict(student=tmp_path, teacher=None, head=0, vocab_size=99, shape=(1, 64), dtype="float32")
    given |= dict(engine="hf", sampled=(4, 64), pool=None, sleeps=False)
    memory = functools.partial(plan.memory, checkpointing=False)
    one = {row[0]: row[1] for row in memory(**given, n=1)[0]}
    two = {row[0]: row[1] for row in memory(**given, n=2)[0]}
    assert all(two[name] == one[name] / 2 for name in ("weights", "gradients", "moments"))
    assert two["copy that samples"] == one["weights"]
    given |= dict(engine="vllm", pool=2**20)
    awake, asleep = (memory(**given | {"sleeps": sleeps}, n=1) for sleeps in (False, True))
    assert awake[0][-1][:2] == asleep[1][0][:2] == ["vLLM", 2**20] and len(awake[0]) == len(asleep[0]) + 1
    [row] = [row for row in memory(**given | {"pool": 100}, n=1)[0] if row[0] == "vLLM"]
    assert row[1] == math.inf
    weights = one["weights"]  # in float32, as vLLM has them; a response is 64 tokens, see below
    for pool, small in (
        (weights + 64 * 3 * 2 * 2 * 8 * 4 - 1, True),
        (weights + 64 * 3 * 2 * 2 * 8 * 4, False),
    ):
        for sleeps, place in ((False, 0), (True, 1)):
            rows = memory(**given | {"pool": pool, "sleeps": sleeps}, n=1)[place]
            [size] = [row[1] for row in rows if row[0] == "vLLM"]
            assert (size == math.inf) == small
    long = given | {"pool": None, "sampled": (1, 10**9)}  # a CPU's share is a guess, which refuses nothing
    assert all(row[1] < math.inf for rows in memory(**long, n=1) for row in rows)
    monkeypatch.setattr(plan, "device_bytes", lambda: 2**40)
    refused(lambda: plan.plan(given | {"pool": 100, "n": 1}, "off", False), "--gpu_memory_utilization")
    given |= dict(engine="hf")
    cache = {row[0]: row[1] for row in memory(**given, n=2)[1]}["sampling"]
    assert cache == 4 * 64 * 3 * 2 * 2 * 8 * 4  # tokens, layers, keys and values, heads, their size, bytes


def plan_of(capsys, stage, flags):
    try:
        run_line(stage, flags)
    except SystemExit as end:
        assert end.code == 0
    return capsys.readouterr().out


@pytest.fixture
def unloaded(monkeypatch):
    def load(*given, **named):
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)


@pytest.mark.parametrize("case", ["teacher", "student", "grpo"])
def test_plan_prints_a_table_and_ends(case, world, prefix_flags, tmp_path, capsys, unloaded):
    stage, flags = train, f"{prefix_flags.get(case)} --kl reverse"
    if case == "grpo":
        stage, flags = grpo, f"--model {world}/student_init --data {world}/train.jsonl --kl_weight 0.1"
    out = plan_of(capsys, stage, f"{flags} --engine hf --max_response_tokens 12 --plan --out {tmp_path}/run")
    for row in ("weights", "gradients", "moments", "teacher", "loss", "backward pass"):
        assert f"{row} " in out
    assert ("sampling" in out) == (case != "teacher") and "activation checkpointing off" in out
    assert not (tmp_path / "run").exists() and "unknown" not in out


def test_preflight_prints_the_plan(world, capsys):
    pair = f"--teacher {world}/teacher_init --student {world}/student_init"
    assert "backward pass" in plan_of(capsys, score_teacher, f"--preflight {pair} --dtype float32")


def test_passes_that_cannot_be_traced_are_unknown(world, prefix_flags, tmp_path, capsys, monkeypatch):
    def fail(*given):
        raise RuntimeError("needs values")

    monkeypatch.setattr(plan, "trace", plan.trace.real)
    monkeypatch.setattr(plan.models, "autocast", fail)
    out = plan_of(
        capsys,
        train,
        f"{prefix_flags['student']} --kl reverse --max_response_tokens 12 --plan --out {tmp_path}/run",
    )
    assert "unknown GiB" in out and "and what is unknown" in out


@pytest.fixture
def small(monkeypatch):
    """small(share): a device with that share of the memory that the run of `job` takes."""

    def make(share, on_gpu=True):
        monkeypatch.setattr(plan, "memory", lambda checkpointing, **job: rows(1 if checkpointing else 2))
        monkeypatch.setattr(plan, "device_bytes", lambda: share * 2**30)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)

    def rows(size):
        return [["weights", 2**30, ""]], [["backward pass", size * 2**30, ""], ["loss", 0, ""]]

    return make


def test_auto_checkpoints_where_the_rest_would_not_fit(small, capsys):
    for share, on in {1.9: True, 2.0: True, 2.9: True, 3.0: False}.items():
        small(share, on_gpu=False)
        assert plan.plan({"engine": "vllm"}, "auto", False) == on
        out = capsys.readouterr().out
        assert ("WARNING" in out and "--micro_batch_tokens" in out) == (share < 2) and out.count("\n") == 1
    assert plan.plan({"engine": "vllm"}, "on", False)


def test_what_a_gpu_cannot_hold_is_refused_with_the_flags_that_help(small, refused):
    small(2.5)
    assert plan.plan({"engine": "vllm"}, "auto", False)
    helps = "checkpointing on", "--micro_batch_tokens", "--gpu_memory_utilization", "more ranks"
    message = refused(lambda: plan.plan({"engine": "vllm"}, "off", False), "3.00 of 2.50", *helps)
    assert message.count("\n") == 1


@pytest.mark.parametrize("count", [1, 2])
def test_a_checkpointed_run_ends_as_a_plain_one(world, prefix_flags, tmp_path, count):
    """On two ranks too: the layers are sharded and gathered again for the backward pass."""
    flags = (
        f"{prefix_flags['student']} --kl reverse --steps 2 --batch_size 3 --lr 2e-3 --max_response_tokens 8"
    )
    for mode in ("off", "on"):
        line = f"{flags} --activation_checkpointing {mode} --out {tmp_path}/{mode}"
        run_line(train, line) if count == 1 else on_ranks(run_line, train, line)
    assert untimed(tmp_path / "off/metrics.jsonl") == untimed(tmp_path / "on/metrics.jsonl")
    off, on = (load_file(tmp_path / mode / "final/model.safetensors") for mode in ("off", "on"))
    assert off.keys() == on.keys() and all(torch.equal(off[name], on[name]) for name in off)
    row = json.loads((tmp_path / "on/metrics.jsonl").read_text().splitlines()[0])
    assert 0.1 < row["peak_memory"] < 100  # GiB: Python and torch alone are a few hundred MB
