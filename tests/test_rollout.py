"""Whole runs of rollout.py, killed ones too, and what it refuses."""

import json
import shutil

import pytest

import rollout
from conftest import killed_in_call
from distil import sampling
from distil.artifacts import read_artifact
from distil.problems import load_problems
from distil.prompts import render_prompt
from recipes.toy_world import make_tokenizer


def run(world, out, *more):
    words = ["--model", world / "teacher_init", "--data", world / "train.jsonl", "--out", out]
    words += "--limit 5 --n 2 --sample_batch 4 --engine hf --dtype float32 --max_response_tokens 10".split()
    rollout.main(rollout.get_args([str(word) for word in [*words, *more]]))


def test_rollouts_artifact(world, tmp_path):
    run(world, tmp_path / "out")
    meta = read_artifact(str(tmp_path / "out"), "--", "rollout")
    rows = [json.loads(line) for line in open(tmp_path / "out/rollouts.jsonl")]
    problems, tokenizer = load_problems(str(world / "train.jsonl"), 5), make_tokenizer()
    assert [(row["id"], row["sample"]) for row in rows] == [(p["id"], i) for p in problems for i in (0, 1)]
    for row, problem in zip(rows, [p for p in problems for _ in (0, 1)]):
        assert row["prompt_ids"] == render_prompt(tokenizer, problem["problem"])
        assert row["answer"] == problem["answer"]
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


@pytest.mark.parametrize(
    "damage", [lambda text: text, lambda text: text[:-30], lambda text: text + '{"id": "train/4", "samp']
)
def test_a_killed_run_is_resumed_to_the_same_file(world, tmp_path, monkeypatch, damage):
    """Killed in the third of three chunks, perhaps in the middle of a line."""
    run(world, tmp_path / "whole")
    with killed_in_call(3, sampling, "sample_hf"):
        run(world, tmp_path / "out")
    partial = tmp_path / "out/rollouts.jsonl.tmp"
    assert partial.read_text().count("\n") == 8 and not (tmp_path / "out/meta.json").exists()
    partial.write_text(damage(partial.read_text()))
    calls, real = [], sampling.sample_hf
    monkeypatch.setattr(sampling, "sample_hf", lambda *words: calls.append(words) or real(*words))
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
    rows = {"problem": "1", "answer": "1"}, {"id": "giant", "problem": "1" * 500, "answer": "1"}
    (tmp_path / "long.jsonl").write_text("\n".join(map(json.dumps, rows)))
    is_refused(["--data", tmp_path / "long.jsonl"], "long/giant", "context of 512")
    is_refused(["--n", 0], "--n")
    is_refused(["--max_response_tokens", 0], "--max_response_tokens")
    is_refused(["--temperature", -0.5], "--temperature")
    is_refused(["--top_p", 0], "--top_p")
    is_refused(["--top_k", -1], "--top_k")
    is_refused(["--sample_batch", 0], "--sample_batch")


def test_a_directory_that_is_not_ours_is_refused_before_the_model_is_looked_for(world, tmp_path, refused):
    (tmp_path / "notes.txt").write_text("mine")
    refused(lambda: run(world, tmp_path, "--model", tmp_path / "absent"), "--out", "not this project's")


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
