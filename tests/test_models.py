"""distil/models.py: batches, hidden states, log-probabilities, output heads, against float64."""

import json
import math
import shutil

import pytest
import torch
from transformers import AutoConfig

import evaluate
import grpo
import rollout
import score_teacher
import train
from conftest import run_line
from distil.batches import batches_by_tokens
from distil.models import (
    Response,
    check_finite,
    check_head,
    context_of,
    forward,
    load_model,
    output_head,
    response_hidden,
)
from distil.ranks import load_sharded
from distil.vllm_engine import stored_weights
from recipes.toy_world import make_model, make_tokenizer
from streaming_kl import token_logps


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(5)
    return make_model(make_tokenizer(), 32, 2, 1).eval()


def test_batches_hold_each_index_once_within_the_budget():
    g = torch.Generator().manual_seed(0)
    for budget in (1, 30, 64, 1000):
        lengths = torch.randint(1, 40, (50,), generator=g).tolist()
        batches = batches_by_tokens(lengths, budget)
        assert sorted(i for batch in batches for i in batch) == list(range(50))
        for batch in batches:  # a tenth may be padding, or more of what is less than a 32nd of the budget
            rows = sorted(lengths[i] for i in batch)
            assert len(rows) == 1 or len(rows) * rows[-1] <= budget
            assert sum(rows) >= 0.9 * len(rows) * rows[-1] or sum(rows[:-1]) < budget / 32 or len(rows) == 1
    assert len(batches) < 15  # not one row a batch where the budget has room
    assert batches_by_tokens([60, 90, 62, 2], 1024) == [[3, 0], [2], [1]]
    assert batches_by_tokens([], 9) == []


PROMPTS, RESPONSES = [[1, 3, 20], [1], [1, 9, 12, 13]], [[21, 0, 2], [5, 6, 7, 8, 9, 2], [2]]


def test_response_hidden_is_that_of_each_sequence_alone(model):
    """The state at position t predicts token t + 1, so a response's states begin one token before it."""
    with torch.no_grad():
        responses = [Response(*ids, False) for ids in zip(PROMPTS, RESPONSES)]
        states = response_hidden(model, responses).split([3, 6, 1])
        for prompt, response, found in zip(PROMPTS, RESPONSES, states):
            alone = model(input_ids=torch.tensor([prompt + response]), output_hidden_states=True)
            first = len(prompt) - 1
            torch.testing.assert_close(found, alone.hidden_states[-1][0, first:-1])
            torch.testing.assert_close(found @ output_head(model, "-").T, alone.logits[0, first:-1])
            for place, token in enumerate(response):  # a prefix ends where its logits predict the token
                prefix = model(input_ids=torch.tensor([prompt + response[:place]])).logits[0, -1]
                logp = token_logps(found, output_head(model, "-")[:29], torch.tensor(response))[place]
                assert logp.item() == pytest.approx(prefix.log_softmax(-1)[token].item(), abs=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_an_attention_mask_would_change_no_bit(model, attention):
    """Padding comes after all real positions, and attention is causal: response_hidden() needs no mask."""
    model = type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict())
    model.set_attn_implementation(attention)
    responses = [Response([1, 3, 20], [21, 0, 2], False), Response([1], [5, 6, 7, 8, 9, 2], False)]
    ids = torch.tensor([[1, 3, 20, 21, 0, 0], [1, 5, 6, 7, 8, 9]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
    masked = model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    assert torch.equal(response_hidden(model, responses), torch.cat([masked[0, 2:5], masked[1]]))


def test_forward_leaves_out_padded_rows_and_gradients_that_nobody_wants(model):
    responses = [Response(*ids, False) for ids in zip(PROMPTS, RESPONSES)]
    hidden, head = forward(model, responses, 20)
    assert hidden.shape == (10, 32) and head.shape == (20, 32) and head.requires_grad
    with torch.no_grad():
        hidden, head = forward(model, responses, 29, "bfloat16")
    assert hidden.dtype == head.dtype == torch.bfloat16 and not head.requires_grad


def test_the_first_tokens_of_a_response():
    response = Response([1], [5, 6, 2], False)
    assert response.first(3) == response
    assert response.first(2) == Response([1], [5, 6], True)


def copy_of(model, path, config=None, weights=None):
    """A directory with the model: `config` changes its config.json, `weights` its weights, {name: value}."""
    for name, value in (weights or {}).items():
        with torch.no_grad():
            model.get_parameter(name)[1] = value
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | (config or {})))
    return str(path)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused_by_every_stage(bad, world, rollouts, tmp_path, refused):
    names = ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"]
    model = copy_of(
        make_model(make_tokenizer(), 32, 2, 1), tmp_path / "model", weights=dict.fromkeys(names, bad)
    )
    shared = f"--dtype float32 --out {tmp_path}/out"
    sampled = f"--data {world}/train.jsonl --engine hf --max_response_tokens 4 {shared}"
    lines = {
        "--model": [(rollout, f"--model {model} {sampled}"), (evaluate, f"--model {model} {sampled}")],
        "--teacher": [(score_teacher, f"--teacher {model} --rollouts {rollouts} {shared}")],
        "the starting model": [(grpo, f"--model {model} {sampled}")],
    }
    student = f"--prefix teacher --vocab sampled --kl forward --rollouts {rollouts} --engine hf {shared}"
    lines["the starting model"].append((train, f"--student {model} {student}"))
    for flag, commands in lines.items():
        for stage, line in commands:
            message = f"error: {flag} {model}: weight {names[0]} is not finite (first of 2)\n"
            assert refused(lambda: run_line(stage, line)).endswith(message)
    assert not (tmp_path / "out").exists()
    stored = stored_weights(model)  # what vLLM is going to load
    refused(lambda: check_finite(stored, "--engine vllm"), "--engine vllm: weight model.layers.0.mlp.up_proj")


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes"])
def test_quantised_models_are_refused_in_one_line(method, world, model, tmp_path, refused):
    """None of their libraries is installed. One that could be loaded could still not be trained."""
    settings = {"quant_method": method, "bits": 4, "group_size": 32, "load_in_4bit": True}
    path = copy_of(model, tmp_path / "model", {"quantization_config": settings})
    message = refused(lambda: load_model(path, "--model", "float32"), f"--model {path}: ", "cannot be loaded")
    assert message.count("\n") == 1
    train_it = lambda: load_sharded(path, "the starting model", "float32", trained=True)
    refused(train_it, f"the starting model {path}: is quantised")


def test_a_model_without_a_context_has_no_limit(tmp_path, capsys):
    """Stated by no position embedding (state space, ALiBi) but by MPT, whose biases end there."""
    for number, (kind, sizes, context) in enumerate(
        [
            ("mamba", {}, math.inf),
            ("bloom", {}, math.inf),
            ("mpt", {"max_seq_len": 48}, 48),
            ("gpt2", {"n_positions": 40}, 40),
            ("gemma3", {"text_config": {"max_position_embeddings": 72}}, 72),
        ]
    ):
        AutoConfig.for_model(kind, **sizes).save_pretrained(tmp_path / str(number))
        assert [context_of(str(tmp_path / str(number))) for _ in range(2)] == [context] * 2
        assert capsys.readouterr().out.count("states no context") == (context == math.inf)


def test_heads_that_are_no_plain_product_are_refused(model, refused):
    """A bias; a scale that no config names; a cap so high that only large logits show it."""
    check_head(model, "--student")
    plain = make_model(make_tokenizer(), 32, 1, 1)
    plain.lm_head = torch.nn.Linear(32, 29, bias=True)
    refused(lambda: check_head(plain, "--student"), "--student", "bias")
    for dtype, smallest in ((torch.float32, 2e-4), (torch.bfloat16, 0.05), (torch.float16, 0.01)):
        for change in (lambda logits: logits * (1 + smallest), lambda logits: 9 * (logits / 9).tanh()):
            changed = make_model(make_tokenizer(), 32, 1, 1).to(dtype)
            check_head(changed, "--student")
            changed.lm_head.register_forward_hook(lambda module, given, logits: change(logits))
            refused(
                lambda: check_head(changed, "--student"), "--student", "times its output head", "differ by"
            )


@pytest.mark.parametrize(
    "change",
    [
        {"max_position_embeddings": "512"},
        {"max_position_embeddings": 0},
        {"max_position_embeddings": -1},
        {"vocab_size": None},
        {"vocab_size": "29"},
        {"hidden_size": None},
        {"num_attention_heads": 0},
        {"num_key_value_heads": 0},
        {"head_dim": 0},
        {"dtype": "nope"},
        {"model_type": "unheard_of"},
    ],
    ids=str,
)
def test_a_senseless_config_is_one_line(change, world, tmp_path, refused):
    path = shutil.copytree(world / "student_init", tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | change))
    line = f"--model {path} --data {world}/test.jsonl --engine hf --out {tmp_path}/out"
    message = refused(lambda: run_line(rollout, f"{line} --max_response_tokens 4"), path)
    assert message.count("\n") == 1 and "tokenizer" not in message and not (tmp_path / "out").exists()


def test_longrope_ends_where_a_longer_row_would_change_the_others(tmp_path, capsys):
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0, 4.0, 16.0, 64.0]}
    rope |= {"rope_theta": 1e4, "original_max_position_embeddings": 40}
    sizes = dict(vocab_size=29, hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    config = AutoConfig.for_model("llama", **sizes, num_attention_heads=4, max_position_embeddings=160)
    config.rope_parameters = rope
    config.save_pretrained(tmp_path)
    assert context_of(tmp_path) == 40 and "its context ends at 40" in capsys.readouterr().out


def test_a_model_without_a_tokenizer_is_named(world, tmp_path, refused):
    path = tmp_path / "model"
    load_model(world / "student_init", "-", "float32").save_pretrained(path)
    line = f"--model {path} --data {world}/test.jsonl --engine hf --out {tmp_path}/out"
    refused(lambda: run_line(rollout, line), "--model", "tokenizer")
