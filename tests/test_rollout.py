"""rollout.py: sampling with transformers against loops and frequencies of our own; whole runs, killed ones too."""

import json
import shutil

import pytest
import torch
from transformers import GenerationConfig

import rollout
from distil.artifacts import read_artifact
from distil.problems import load_problems
from distil.prompts import render_prompt
from distil.sampling import Sampling, sample
from recipes.toy_world import make_model, make_tokenizer

# ---------------------------------------------------------------------------------------------------------------------
# Sampling with transformers


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    return make_model(make_tokenizer(), 32, 2, 1).eval()


def sampling(**changes):
    default = dict(
        n=1, temperature=1.0, top_p=1.0, top_k=0, max_response_tokens=16, stop_ids=[0, 2], vocab_size=29
    )
    return Sampling(**(default | changes))


PROMPTS = [[1, 3, 20], [1, 9, 12, 13, 14, 15, 16], [1], [1, 22]]


def greedy_loop(model, prompt, sampling):
    ids = list(prompt)
    for _ in range(sampling.max_response_tokens):
        with torch.no_grad():
            ids.append(
                model(input_ids=torch.tensor([ids])).logits[0, -1, : sampling.vocab_size].argmax().item()
            )
        if ids[-1] in sampling.stop_ids:
            return ids[len(prompt) :], "stop"
    return ids[len(prompt) :], "length"


def test_greedy_equals_a_loop_of_single_steps(model):
    """Prompts of four lengths in one left-padded batch; which stop ids there are decides where each response ends."""
    reasons = set()
    for stops in ([0, 2], list(range(0, 29, 2)), [28]):
        greedy = sampling(temperature=0.0, stop_ids=stops)
        for prompt, [found] in zip(PROMPTS, sample(model, PROMPTS, greedy, seed=0)):
            assert tuple(found[:2]) == greedy_loop(model, prompt, greedy) and found.logps is None
            reasons.add(found.finish_reason)
    assert reasons == {"stop", "length"}


def test_batches_do_not_change_greedy_samples_or_their_order(model):
    together = sample(model, PROMPTS, sampling(temperature=0.0), seed=0)
    assert together == sample(model, PROMPTS, sampling(temperature=0.0, sample_batch=1), seed=0)
    assert together == sample(model, PROMPTS, sampling(temperature=0.0, sample_batch=3), seed=5)
    assert together == [sample(model, [prompt], sampling(temperature=0.0), seed=0)[0] for prompt in PROMPTS]


def test_seed_decides_the_samples_and_nothing_else_does(model):
    state, training = torch.random.get_rng_state(), model.train().training
    first = sample(model, PROMPTS, sampling(n=4), seed=7)
    assert torch.equal(torch.random.get_rng_state(), state) and model.training == training
    model.eval()
    torch.rand(3)
    assert sample(model, PROMPTS, sampling(n=4), seed=7) == first
    assert sample(model, PROMPTS, sampling(n=4), seed=8) != first
    assert [len(group) for group in first] == [4] * 4
    assert len({tuple(s.response_ids) for s in first[0]}) == 4  # the samples of one problem differ


@pytest.mark.parametrize(
    "settings", [dict(), dict(temperature=0.6, top_p=0.95), dict(temperature=1.5, top_k=5)]
)
def test_what_is_sampled_beside_it_changes_no_sample(model, settings):
    """In one batch, one by one, in another order, and by places as a resumed run or another process gives them."""
    together = sample(model, PROMPTS, sampling(n=3, **settings), seed=7)
    assert together == sample(model, PROMPTS, sampling(n=3, sample_batch=1, **settings), seed=7)
    assert together[::-1] == sample(
        model, PROMPTS[::-1], sampling(n=3, sample_batch=5, **settings), 7, range(3, -1, -1)
    )
    assert together[2:] == sample(model, PROMPTS[2:], sampling(n=3, **settings), 7, range(2, 4))
    assert together[2:] != sample(model, PROMPTS[2:], sampling(n=3, **settings), 7)


def test_the_models_own_generation_config_has_no_say(model):
    """Hugging Face models come with top-k, penalties and the like; the flags alone decide, and the model keeps its own."""
    first, own = sample(model, PROMPTS, sampling(n=4), seed=7), model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=1, temperature=0.1, repetition_penalty=5.0, max_length=3
    )
    try:
        assert sample(model, PROMPTS, sampling(n=4), seed=7) == first
        assert model.generation_config.repetition_penalty == 5.0
    finally:
        model.generation_config = own


def test_stop_token_is_kept_and_only_at_the_end(model):
    reasons = set()
    for response, reason, _ in sample(model, [PROMPTS[0]], sampling(n=200), seed=1)[0]:
        reasons.add(reason)
        assert not {0, 2} & set(response[:-1])
        assert (
            (response[-1] in (0, 2))
            if reason == "stop"
            else (len(response) == 16 and response[-1] not in (0, 2))
        )
    assert reasons == {"stop", "length"}


def test_padded_vocabulary_rows_are_never_sampled():
    torch.manual_seed(3)
    model = make_model(make_tokenizer(), 32, 1, 1).eval()
    model.resize_token_embeddings(40, mean_resizing=False)
    with torch.no_grad():
        model.get_output_embeddings().weight[29:] *= (
            100  # large logits, of either sign, on half of the padding rows each
        )
    with torch.no_grad():
        assert model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1].argmax() >= 29
    for temperature in (0.0, 1.0):
        for group in sample(model, PROMPTS, sampling(n=5, temperature=temperature), seed=0):
            assert all(token < 29 for s in group for token in s.response_ids)


@pytest.mark.parametrize(
    "settings",
    [
        dict(temperature=1.0),
        dict(temperature=0.5),
        dict(temperature=1.5, top_k=5),
        dict(temperature=1.0, top_p=0.6),
    ],
)
def test_frequencies_are_those_of_the_softmax(settings):
    """One token, 4000 times: chi-square against probabilities computed here. The bound is 6 deviations above its mean."""
    torch.manual_seed(3)
    model = make_model(make_tokenizer(), 32, 1, 1).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight *= 2  # probabilities from 0.005 to 0.4
        logits = model(input_ids=torch.tensor([PROMPTS[1]])).logits[0, -1].double()
    probabilities = (logits / settings["temperature"]).softmax(-1)
    kept, mass = [], 0.0
    for token in probabilities.argsort(descending=True).tolist():
        if len(kept) < settings.get("top_k", 29) and mass < settings.get("top_p", 1.0):
            kept.append(token)
            mass += probabilities[token].item()
    assert len(kept) == settings.get("top_k", 29) or mass < 0.9
    groups = sample(
        model, [PROMPTS[1]], sampling(n=4000, sample_batch=4000, max_response_tokens=1, **settings), seed=2
    )
    counts = torch.bincount(torch.tensor([one.response_ids[0] for one in groups[0]]), minlength=29)
    assert counts[kept].sum() == 4000
    expected = 4000 * probabilities[kept] / mass
    chi_square, freedom = ((counts[kept] - expected) ** 2 / expected).sum(), len(kept) - 1
    assert chi_square < freedom + 6 * (2 * freedom) ** 0.5


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs


def run(world, out, *more):
    given = [
        "--model",
        world / "teacher_init",
        "--data",
        world / "train.jsonl",
        "--out",
        out,
        *"--limit 5 --n 2 --sample_batch 4 --engine hf --dtype float32 --max_response_tokens 10".split(),
        *more,
    ]
    rollout.main(rollout.get_args([str(word) for word in given]))


def test_rollouts_artifact(world, tmp_path):
    run(world, tmp_path / "out")
    meta = read_artifact(str(tmp_path / "out"), "--", "rollout")
    rows = [json.loads(line) for line in open(tmp_path / "out/rollouts.jsonl")]
    problems, tokenizer = load_problems(str(world / "train.jsonl"), 5), make_tokenizer()
    assert [(row["id"], row["sample"]) for row in rows] == [(p["id"], i) for p in problems for i in (0, 1)]
    for row, problem in zip(rows, [p for p in problems for _ in (0, 1)]):
        assert (
            row["prompt_ids"] == render_prompt(tokenizer, problem["problem"])
            and row["answer"] == problem["answer"]
        )
        assert row["response"] == tokenizer.decode(row["response_ids"], skip_special_tokens=True)
        assert row["finish_reason"] == ("stop" if row["response_ids"][-1] in (0, 2) else "length")
    lengths = [len(row["response_ids"]) for row in rows]
    assert meta["counts"] == {
        "responses": 10,
        "response_tokens": sum(lengths),
        "longest_response": max(lengths),
        "truncated": sum(row["finish_reason"] == "length" for row in rows),
        "faults": {"dropped": 0},
    }
    assert meta["stop_ids"] == [0, 2] and meta["args"]["engine"] == "hf" and meta["args"]["seed"] == 42
    assert not (tmp_path / "out/rollouts.jsonl.tmp").exists()
    run(world, tmp_path / "again")
    assert (tmp_path / "again/rollouts.jsonl").read_bytes() == (tmp_path / "out/rollouts.jsonl").read_bytes()
    run(world, tmp_path / "other", "--seed", 43)
    assert (tmp_path / "other/rollouts.jsonl").read_bytes() != (tmp_path / "out/rollouts.jsonl").read_bytes()


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    "damage", [lambda text: text, lambda text: text[:-30], lambda text: text + '{"id": "train/4", "samp']
)
def test_a_killed_run_is_resumed_to_the_same_file(world, tmp_path, monkeypatch, damage):
    """Killed in the third of three chunks, perhaps in the middle of a line."""
    run(world, tmp_path / "whole")
    calls = []

    def killed_in_call_3(*words):
        calls.append(words)
        if len(calls) == 3:
            raise Killed
        return sample(*words)

    with monkeypatch.context() as patch:
        patch.setattr(rollout, "sample", killed_in_call_3)
        with pytest.raises(Killed):
            run(world, tmp_path / "out")
    partial = tmp_path / "out/rollouts.jsonl.tmp"
    assert partial.read_text().count("\n") == 8 and not (tmp_path / "out/meta.json").exists()
    partial.write_text(damage(partial.read_text()))
    calls.clear()
    monkeypatch.setattr(rollout, "sample", lambda *words: calls.append(words) or sample(*words))
    run(world, tmp_path / "out", "--resume")
    assert (tmp_path / "out/rollouts.jsonl").read_bytes() == (tmp_path / "whole/rollouts.jsonl").read_bytes()
    assert len(calls) <= 2  # nothing finished was sampled again
    read_artifact(str(tmp_path / "out"), "--", "rollout")


def test_bad_input_is_refused_and_leaves_no_directory(world, tmp_path, refused):
    out = tmp_path / "out"

    def is_refused(more, *words):
        refused(lambda: run(world, out, *more), *words)
        assert not out.exists()

    is_refused(["--model", tmp_path / "absent"], "--model", "absent")
    (tmp_path / "hollow").mkdir()
    is_refused(["--model", tmp_path / "hollow"], "--model", "config.json")
    is_refused(["--data", "gsm9k"], "--data gsm9k")
    (tmp_path / "long.jsonl").write_text(
        json.dumps({"problem": "1", "answer": "1"})
        + "\n"
        + json.dumps({"id": "giant", "problem": "1" * 500, "answer": "1"})
    )
    is_refused(["--data", tmp_path / "long.jsonl"], "long/giant", "context of 512")
    is_refused(["--n", 0], "--n")
    is_refused(["--max_response_tokens", 0], "--max_response_tokens")
    is_refused(["--temperature", -0.5], "--temperature")
    is_refused(["--top_p", 0], "--top_p")
    is_refused(["--top_k", -1], "--top_k")
    is_refused(["--sample_batch", 0], "--sample_batch")


def test_a_model_without_weights_or_template_is_refused_and_leaves_no_directory(world, tmp_path, refused):
    shutil.copytree(world / "teacher_init", tmp_path / "model")
    (tmp_path / "model/model.safetensors").unlink()
    refused(
        lambda: run(world, tmp_path / "out", "--model", tmp_path / "model"), "--model", "cannot be loaded"
    )
    assert not (tmp_path / "out").exists()
    (tmp_path / "model/chat_template.jinja").unlink()
    refused(lambda: run(world, tmp_path / "out", "--model", tmp_path / "model"), "--model", "chat template")
    assert not (tmp_path / "out").exists()


def test_extra_stop_ids_end_responses_too_and_must_exist(world, tmp_path, refused):
    run(world, tmp_path / "plain")
    rows = [json.loads(line) for line in open(tmp_path / "plain/rollouts.jsonl")]
    token = next(row["response_ids"][0] for row in rows if row["response_ids"][0] not in (0, 2))
    run(world, tmp_path / "extra", "--extra_stop_ids", token)
    meta = read_artifact(str(tmp_path / "extra"), "--", "rollout")
    assert meta["stop_ids"] == sorted([0, 2, token])
    ended = [json.loads(line)["response_ids"] for line in open(tmp_path / "extra/rollouts.jsonl")]
    assert [token] in ended and all(token not in ids[:-1] for ids in ended)
    refused(lambda: run(world, tmp_path / "bad", "--extra_stop_ids", 29), "--extra_stop_ids", "28")
