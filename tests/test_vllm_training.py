"""Rollouts and training with vLLM (on a CPU, its CPU build) are what they are with transformers."""

import json

import pytest
import torch

import grpo
import rollout
import train
from conftest import needs_vllm
from distil.artifacts import read_artifact
from distil.models import load_model

STAGE = "--dtype float32 --max_response_tokens 12 --gpu_memory_utilization 0.1"
ROUNDING = 1e-4 if torch.cuda.is_available() else 2e-5  # of a log-probability, between two devices or on one

pytestmark = [needs_vllm, pytest.mark.usefixtures("no_trace_of_vllm")]


def words_of(text, **flags):
    return [*text.split(), *(str(word) for flag, value in flags.items() for word in (f"--{flag}", value))]


def test_rollouts_are_equal_on_both_engines(world, tmp_path):
    text = f"--temperature 0 {STAGE}"
    for name in ("hf", "vllm"):
        given = {"model": world / "student_init", "data": world / "train.jsonl", "engine": name}
        rollout.main(rollout.get_args(words_of(text, out=tmp_path / name, **given)))
        assert read_artifact(str(tmp_path / name), "-", "rollout")["args"]["engine"] == name
    assert (tmp_path / "vllm/rollouts.jsonl").read_bytes() == (tmp_path / "hf/rollouts.jsonl").read_bytes()


def test_on_policy_training_is_equal_on_both_engines(world, tmp_path):
    """Greedy: the responses of steps 2 and 3 show that the engine got the weights of the step before."""
    text = (
        f"--prefix student --kl reverse --temperature 0 --steps 3 --batch_size 4 --lr 3e-2 --warmup 0 {STAGE}"
    )
    models = {"student": world / "student_init", "teacher": world / "teacher_init"}
    rows, weights = {}, {}
    for name in ("hf", "vllm"):
        given = {"data": world / "train.jsonl", "engine": name, "out": tmp_path / name}
        train.main(train.get_args(words_of(text, **models, **given)))
        lines = [json.loads(line) for line in open(tmp_path / name / "metrics.jsonl")]
        rows[name] = [
            {k: v for k, v in line.items() if "second" not in k and k != "peak_memory"} for line in lines
        ]
        weights[name] = load_model(str(tmp_path / name / "final"), "-", "float32").state_dict()
    for found, expected in zip(rows["vllm"], rows["hf"], strict=True):
        assert found == pytest.approx(expected, rel=1e-3)
    for key in weights["hf"]:
        torch.testing.assert_close(weights["hf"][key], weights["vllm"][key], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("policy", ["full", "truncated"])
def test_grpo_with_vllm_measures_a_mismatch_of_rounding_alone(policy, world, tmp_path, monkeypatch):
    """After an update too, the engine's log-probabilities are those of the weights that are trained; of the
    sampler, at its temperature and over what it keeps, with the truncated policy."""
    rewards = torch.tensor([[0.0, 1.0]])
    monkeypatch.setattr(grpo, "rewards_of", lambda *args: [rewards.repeat(len(args[-1]), 1)] * 2)
    text = "--n 2 --batch_size 4 --steps 2 --lr 3e-2 --warmup 0 --kl_weight 0.1 --engine vllm " + STAGE
    text += f" --policy {policy} --temperature 0.8 --top_p 0.7 --top_k 15"
    given = {"model": world / "student_init", "data": world / "train.jsonl", "out": tmp_path / "run"}
    grpo.main(grpo.get_args(words_of(text, **given)))
    rows = [json.loads(line) for line in open(tmp_path / "run/metrics.jsonl")]
    assert all(0 < row["mismatch"] < 5 * ROUNDING for row in rows) and len(rows) == 2
    assert rows[1]["reference_kl"] > 1e-3 and rows[0]["sampler_kl"] > 0.3
    assert [row.get("outside") for row in rows] == ([None, None] if policy == "full" else [0, 0])
