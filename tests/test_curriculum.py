"""The entropy-gated length curriculum: when it advances, what it cuts, and that a resumed run decides the same."""

import json

import pytest

import train
from distil import training
from distil.artifacts import read_artifact


def read_rows(path):
    return [json.loads(line) for line in open(path)]


def run(world, out, source, *flags, steps=6):
    flags = [
        *source,
        "--student",
        world / "student_init",
        *"--kl reverse --dtype float32 --engine hf --steps".split(),
        steps,
        *"--batch_size 4 --eval_data".split(),
        world / "heldout.jsonl",
        *"--eval_n 2 --curriculum entropy --out".split(),
        out,
        *flags,
    ]
    train.main(train.get_args([str(flag) for flag in flags]))


@pytest.fixture
def student_prefix(world):
    return ["--prefix", "student", "--teacher", world / "teacher_init", "--data", world / "train.jsonl"]


@pytest.fixture
def teacher_prefix(rollouts, scores):
    return ["--prefix", "teacher", "--rollouts", rollouts, "--scores", scores]


@pytest.mark.parametrize("prefix", ["teacher", "student"])
def test_horizons_rise_while_the_entropy_is_above_the_floor(world, tmp_path, request, prefix):
    run(
        world,
        tmp_path / "run",
        request.getfixturevalue(f"{prefix}_prefix"),
        "--horizons",
        "2,4,8",
        "--entropy_floor",
        0.1,
        "--gate_every",
        2,
    )
    rows, gates = read_rows(tmp_path / "run/metrics.jsonl"), read_rows(tmp_path / "run/gates.jsonl")
    assert [row["horizon"] for row in rows] == [2, 2, 4, 4, 8, 8]
    assert all(row["response_length"] <= row["horizon"] for row in rows) and rows[0]["response_length"] > 1
    assert [(g["step"], g["horizon"], g["decision"]) for g in gates] == [(2, 2, "advance"), (4, 4, "advance")]
    assert all(g["length"] <= g["horizon"] for g in gates)  # measured on samples cut at the present horizon
    assert "gates.jsonl" in read_artifact(str(tmp_path / "run"), "--runs", "train")["files"]


def test_sampling_is_cut_at_the_horizon_too(world, tmp_path, student_prefix, monkeypatch):
    limits, sample = [], training.Run.sample
    monkeypatch.setattr(
        training.Run,
        "sample",
        lambda self, prompts, sampling, seed: (
            limits.append(sampling.max_response_tokens) or sample(self, prompts, sampling, seed)
        ),
    )
    run(
        world,
        tmp_path / "run",
        student_prefix,
        "--horizons",
        "2,5",
        "--entropy_floor",
        0,
        "--gate_every",
        2,
        steps=4,
    )
    assert limits[1:] == [2, 2, 5, 5]  # the first is the preflight's


@pytest.mark.parametrize("fail", ["hold", "stop"])
def test_a_failed_gate_holds_for_good_or_ends_the_run(world, tmp_path, teacher_prefix, fail):
    run(
        world,
        tmp_path / "run",
        teacher_prefix,
        "--horizons",
        "2,4",
        "--entropy_floor",
        99,
        "--gate_every",
        2,
        "--on_gate_fail",
        fail,
    )
    rows, gates = read_rows(tmp_path / "run/metrics.jsonl"), read_rows(tmp_path / "run/gates.jsonl")
    assert [row["horizon"] for row in rows] == [2] * (6 if fail == "hold" else 2)
    assert [g["decision"] for g in gates] == [fail]  # it is not asked again
    state = json.load(open(tmp_path / "run/final/checkpoint.json"))
    assert state["step"] == len(rows) and state["curriculum"] == {"level": 0, "open": False}


def test_a_run_that_was_stopped_stays_stopped_when_resumed(world, tmp_path, teacher_prefix, monkeypatch):
    flags = [
        *"--horizons 2,4 --entropy_floor 99 --gate_every 2 --on_gate_fail stop --save_every 2 --eval_every 5".split()
    ]

    def killed(*words, **facts):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("distil.artifacts.finish_artifact", killed)
        run(world, tmp_path / "run", teacher_prefix, *flags)
    run(world, tmp_path / "run", teacher_prefix, *flags, "--resume")
    assert len(read_rows(tmp_path / "run/metrics.jsonl")) == 2
    assert [row["step"] for row in read_rows(tmp_path / "run/evals.jsonl")] == [
        0,
        2,
    ]  # its last step was evaluated


@pytest.mark.parametrize("floor", [0.1, 99])
def test_a_resumed_run_decides_the_same(world, tmp_path, student_prefix, monkeypatch, floor):
    flags = ["--horizons", "2,3,4", "--entropy_floor", floor, "--gate_every", 2, "--save_every", 2]
    run(world, tmp_path / "whole/run", student_prefix, *flags)
    optimizer_step = training.optimizer_step

    def killed(args, model, optimizer, step, ids):
        if step == 3:
            raise KeyboardInterrupt
        return optimizer_step(args, model, optimizer, step, ids)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "optimizer_step", killed)
        run(world, tmp_path / "again/run", student_prefix, *flags)
    run(world, tmp_path / "again/run", student_prefix, *flags, "--resume")
    for name in ("metrics.jsonl", "gates.jsonl"):
        whole, again = (
            [
                {k: v for k, v in row.items() if "second" not in k}
                for row in read_rows(tmp_path / part / "run" / name)
            ]
            for part in ("whole", "again")
        )
        assert whole == again != []
    weights = [(tmp_path / part / "run/final/model.safetensors").read_bytes() for part in ("whole", "again")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    "flags, word",
    [
        (
            "--curriculum entropy --horizons 4,4 --entropy_floor 1 --gate_every 2 --eval_data e",
            "--horizons 4,4",
        ),
        ("--curriculum entropy --horizons 8,4 --entropy_floor 1 --gate_every 2 --eval_data e", "rise"),
        ("--curriculum entropy --horizons 0,4 --entropy_floor 1 --gate_every 2 --eval_data e", "positive"),
        ("--curriculum entropy --horizons 2,4 --gate_every 2 --eval_data e", "--entropy_floor"),
        ("--curriculum entropy --horizons 2,4 --entropy_floor 1 --gate_every 2", "--eval_data"),
        (
            "--curriculum entropy --horizons 2,4 --entropy_floor 1 --gate_every 3 --refresh_every 2 --eval_data e",
            "--gate_every",
        ),
        ("--entropy_floor 1", "--curriculum"),
        ("--horizons 2,4", "--curriculum"),
    ],
)
def test_bad_flags_are_refused(refused, flags, word):
    line = "--prefix student --kl reverse --student s --teacher t --data d --out o " + flags
    refused(lambda: train.get_args(line.split()), word)
