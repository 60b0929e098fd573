"""The entropy-gated length curriculum: when it advances, what it truncates, the same decisions on resume."""

import json

import pytest

import train
from conftest import killed_in_call, read_rows, run_line, untimed
from distil import artifacts
from distil.artifacts import read_artifact
from runs import training


@pytest.fixture
def flags(world, prefix_flags):
    """prefix_flags and six steps with a gate after every two."""
    more = f"--kl reverse --steps 6 --batch_size 4 --eval_data {world}/heldout.jsonl --eval_n 2"
    more += " --curriculum entropy --gate_every 2"
    return {prefix: f"{given} {more}" for prefix, given in prefix_flags.items()}


@pytest.mark.parametrize("prefix", ["teacher", "student"])
def test_horizons_rise_while_the_entropy_is_above_the_floor(flags, tmp_path, prefix):
    run_line(train, f"{flags[prefix]} --horizons 2,4,8 --entropy_floor 0.1 --out {tmp_path}/run")
    rows, gates = read_rows(tmp_path / "run/metrics.jsonl"), read_rows(tmp_path / "run/gates.jsonl")
    assert [row["horizon"] for row in rows] == [2, 2, 4, 4, 8, 8]
    assert all(row["response_length"] <= row["horizon"] for row in rows) and rows[0]["response_length"] > 1
    assert [(g["step"], g["horizon"], g["decision"]) for g in gates] == [(2, 2, "advance"), (4, 4, "advance")]
    assert all(g["length"] <= g["horizon"] for g in gates)  # measured on samples truncated at this horizon
    assert "gates.jsonl" in read_artifact(str(tmp_path / "run"), "--runs", "train")["files"]


def test_sampling_is_truncated_at_the_horizon_too(flags, tmp_path, monkeypatch):
    limits, sample = [], training.Run.sample

    def recorded(self, prompts, sampling, seed):
        limits.append(sampling.max_response_tokens)
        return sample(self, prompts, sampling, seed)

    monkeypatch.setattr(training.Run, "sample", recorded)
    run_line(train, f"{flags['student']} --horizons 2,5 --entropy_floor 0 --steps 4 --out {tmp_path}/run")
    assert limits[1:] == [2, 2, 5, 5]  # the first is the preflight's


@pytest.mark.parametrize("fail", ["hold", "stop"])
def test_a_failed_gate_holds_for_good_or_ends_the_run(flags, tmp_path, fail):
    more = f"--horizons 2,4 --entropy_floor 99 --on_gate_fail {fail}"
    run_line(train, f"{flags['teacher']} {more} --out {tmp_path}/run")
    rows, gates = read_rows(tmp_path / "run/metrics.jsonl"), read_rows(tmp_path / "run/gates.jsonl")
    assert [row["horizon"] for row in rows] == [2] * (6 if fail == "hold" else 2)
    assert [g["decision"] for g in gates] == [fail]  # it is not asked again
    state = json.load(open(tmp_path / "run/final/checkpoint.json"))
    assert state["step"] == len(rows) and state["curriculum"] == {"level": 0, "open": False}


def test_a_run_that_was_stopped_stays_stopped_when_resumed(flags, tmp_path):
    line = f"{flags['teacher']} --horizons 2,4 --entropy_floor 99 --on_gate_fail stop --save_every 2"
    line += f" --eval_every 5 --out {tmp_path}/run"
    with killed_in_call(1, artifacts, "finish_artifact"):
        run_line(train, line)
    run_line(train, f"{line} --resume")
    assert len(read_rows(tmp_path / "run/metrics.jsonl")) == 2
    evaluated = [row["step"] for row in read_rows(tmp_path / "run/evals.jsonl")]
    assert evaluated == [0, 2]  # the last step is


@pytest.mark.parametrize("floor", [0.1, 99])
def test_a_resumed_run_decides_the_same(flags, tmp_path, floor):
    line = f"{flags['student']} --horizons 2,3,4 --entropy_floor {floor} --save_every 2"
    whole, again = tmp_path / "whole/run", tmp_path / "again/run"
    run_line(train, f"{line} --out {whole}")
    with killed_in_call(4, training, "optimizer_step"):
        run_line(train, f"{line} --out {again}")
    run_line(train, f"{line} --out {again} --resume")
    for name in ("metrics.jsonl", "gates.jsonl"):
        assert untimed(whole / name) == untimed(again / name) != []
    final = "final/model.safetensors"
    assert (whole / final).read_bytes() == (again / final).read_bytes()


ENTROPY = "--curriculum entropy --eval_data e "


@pytest.mark.parametrize(
    "line, word",
    [
        (ENTROPY + "--horizons 4,4 --entropy_floor 1 --gate_every 2", "not '4,4'"),
        (ENTROPY + "--horizons 8,4 --entropy_floor 1 --gate_every 2", "rise"),
        (ENTROPY + "--horizons 0,4 --entropy_floor 1 --gate_every 2", "--horizons: must be"),
        (ENTROPY + "--horizons 2,4 --gate_every 2", "--entropy_floor"),
        ("--curriculum entropy --horizons 2,4 --entropy_floor 1 --gate_every 2", "--eval_data"),
        (ENTROPY + "--horizons 2,4 --entropy_floor 1 --gate_every 3 --refresh_every 2", "--gate_every"),
        ("--entropy_floor 1", "--curriculum"),
        ("--horizons 2,4", "--curriculum"),
    ],
)
def test_bad_flags_are_refused(refused, line, word):
    given = f"--prefix student --kl reverse --student s --teacher t --data d --out o {line}"
    refused(lambda: train.get_args(given.split()), word)
