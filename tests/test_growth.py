"""The peak memory of rollout.py and score_teacher.py does not grow with the number of responses.

The models are replaced by functions; what Python and numpy allocate is counted by tracemalloc.
"""

import json
import tracemalloc

import numpy
import pytest
import torch

import rollout
import score_teacher
from distil import artifacts, models, rollouts, sampling
from distil.models import Response

LENGTH = 500  # tokens of a response: 4 KB as a list
FEW, MANY = 20, 120  # responses


@pytest.fixture
def problems(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text(
        "".join(json.dumps({"problem": f"a={i % 10} b={i // 10}", "answer": "1"}) + "\n" for i in range(MANY))
    )
    return path


@pytest.fixture(autouse=True)
def no_models(monkeypatch):
    def sample_hf(model, config, queue):
        requests, queue[:] = queue[:], []
        for r in requests:
            yield r, Response(r.prompt, [4 + (r.place + i) % 20 for i in range(LENGTH)], True)

    for module in (rollout, models):
        monkeypatch.setattr(module, "load_model", lambda *args: torch.nn.Linear(1, 1))
    monkeypatch.setattr(artifacts, "provenance", dict)
    monkeypatch.setattr(sampling, "sample_hf", sample_hf)
    monkeypatch.setattr(sampling, "context_of", lambda directory: 10**6)
    monkeypatch.setattr(models, "context_of", lambda *args: 10**6)
    monkeypatch.setattr(models, "output_head", lambda *args: torch.eye(29, 4))
    monkeypatch.setattr(models, "check_head", lambda *args: None)


def run(stage, words):
    stage.main(stage.get_args([str(word) for word in words]))


def peak_of(stage, words):
    """Bytes that Python and numpy held at most while the stage ran."""
    tracemalloc.start()
    run(stage, words)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def roll(world, problems, out, count, run=peak_of):
    words = ["--model", world / "student_init", "--data", problems, "--limit", count, "--out", out]
    words += "--overwrite --engine hf --dtype float32 --sample_batch 20 --max_response_tokens".split()
    return run(rollout, [*words, LENGTH])


def test_rollout_holds_a_chunk_of_responses(world, problems, tmp_path, monkeypatch):
    roll(world, problems, tmp_path / "first", FEW)  # imports, caches
    few, many = (roll(world, problems, tmp_path / str(count), count) for count in (FEW, MANY))
    assert many - few < 2000 * (MANY - FEW)  # bytes; problem and prompt are held
    kept, write = [], rollouts.write_rollouts
    monkeypatch.setattr(rollout, "write_rollouts", lambda *args: (kept.append(args[-1]), write(*args)))
    everything = roll(world, problems, tmp_path / "kept", MANY)
    assert everything - few > 4000 * (MANY - FEW)  # what it would be if it held them all


def test_scoring_holds_a_shard_of_responses(world, problems, tmp_path, monkeypatch):
    def score(model, responses, *options):
        scored = [
            {"hidden": torch.from_numpy(numpy.ones((len(response.response_ids), 4), numpy.float32))}
            for response in responses
        ]
        kept.extend(scored * keep)
        return scored

    def peak(count):
        words = ["--teacher", world / "teacher_init", "--rollouts", tmp_path / str(count), "--overwrite"]
        words += ["--out", tmp_path / "scores", "--shard_tokens", 20 * LENGTH]
        return peak_of(score_teacher, words)

    monkeypatch.setattr(score_teacher, "score", score)
    keep, kept = False, []
    for count in (FEW, MANY):
        roll(world, problems, tmp_path / str(count), count, run=run)
    peak(FEW)
    few, many = peak(FEW), peak(MANY)
    assert many - few < 500 * (MANY - FEW)  # bytes; its length is held, and its place in the index
    keep = True
    assert peak(MANY) - few > 4000 * (MANY - FEW)
