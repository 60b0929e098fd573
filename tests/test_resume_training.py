"""train.py and grpo.py killed at changes they make to the disk, and stopped by signals: --resume ends with the same bits."""

import json
import os
import random
import shutil
import signal

import pytest

import grpo
import train
from distil import artifacts, training
from distil.models import model_dir
from test_resume import Disk, in_fork


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(artifacts, "provenance", dict)
    monkeypatch.setattr(artifacts, "writing", False)  # as in a process that has just started


def start(stage, world, rollouts, scores, out, *more):
    """A function that makes a run of six steps, small but real."""
    given = {
        train: [
            *"--prefix student --teacher".split(),
            world / "teacher_init",
            *"--kl reverse --student".split(),
            world / "student_init",
            *"--curriculum entropy --horizons 3,6 --entropy_floor 0.5 --gate_every 4 --refresh_every 2".split(),
        ],
        grpo: ["--model", world / "student_init", *"--n 2 --max_response_tokens 6 --kl_weight 0.1".split()],
    }
    words = [
        *given[stage],
        "--data",
        world / "train.jsonl",
        "--eval_data",
        world / "heldout.jsonl",
        *"--eval_every 3 --eval_n 2 --engine hf --dtype float32 --steps 6 --batch_size 2 --lr 1e-2 --save_every 2 --keep_checkpoints 2".split(),
        *more,
    ]
    args = stage.get_args([str(word) for word in (*words, "--out", out)])
    return lambda: artifacts.run_stage(stage.main, args)


def results(out):
    """All that a run leaves, without its times and its name."""

    def rows(name):
        return [
            {key: value for key, value in json.loads(line).items() if "second" not in key}
            for line in open(out / name)
        ]

    files = artifacts.read_artifact(str(out), "-", "train", "grpo")["files"]
    logs = {name: rows(name) for name in training.LOGS}
    return logs, {
        name: digest for name, digest in files.items() if not name.endswith((".jsonl", "checkpoint.json"))
    }


@pytest.fixture(scope="module", params=[train, grpo], ids=["train", "grpo"])
def whole(request, world, rollouts, scores, tmp_path_factory):
    """(stage, results, number of changes to the disk) of a run that nothing disturbs."""
    out = tmp_path_factory.mktemp("whole") / "run"

    def body():
        disk = Disk(0)
        start(request.param, world, rollouts, scores, out)()
        (out.parent / "changes").write_text(str(disk.changes))

    assert in_fork(body) == 0
    assert sorted(name for name in os.listdir(out) if name.startswith("step")) == [
        "step_000002",
        "step_000004",
    ]
    return request.param, results(out), int((out.parent / "changes").read_text())


def test_killed_at_random_changes_to_the_disk_it_ends_the_same(whole, world, rollouts, scores, tmp_path):
    """One run, killed again and again, each time somewhere in what is left of it; twice over with other moments."""
    stage, expected, changes = whole
    rng, kills = random.Random(stage.__name__), 0
    for attempt in range(2):
        out, code = tmp_path / str(attempt) / "run", -signal.SIGKILL
        out.parent.mkdir()
        while code == -signal.SIGKILL and kills < 8 * (attempt + 1):
            kill_at = rng.randrange(1, changes // 2)
            code = in_fork(lambda: (Disk(kill_at), start(stage, world, rollouts, scores, out, "--resume")()))
            kills += code == -signal.SIGKILL
        assert code in (0, -signal.SIGKILL)
        assert in_fork(start(stage, world, rollouts, scores, out, "--resume")) == 0
        assert results(out) == expected
    assert kills > 6


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_after_its_step_with_a_checkpoint(
    whole, number, code, world, rollouts, scores, tmp_path, monkeypatch, capfd
):
    stage, expected, _ = whole
    real = training.optimizer_step

    def step(args, model, optimizer, step, ids):
        if step == 2:
            os.kill(os.getpid(), number)
        return real(args, model, optimizer, step, ids)

    capfd.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(training, "optimizer_step", step)
        assert in_fork(start(stage, world, rollouts, scores, tmp_path / "run")) == code
    out, err = capfd.readouterr()
    assert f"stopped by {number.name}" in err and "--resume continues" in err and "Traceback" not in out + err
    last = 4 if stage is train else 3  # the responses of --refresh_every steps are used up first
    assert sorted(os.listdir(tmp_path / "run"))[-1] == f"step_{last:06d}"
    assert in_fork(start(stage, world, rollouts, scores, tmp_path / "run", "--resume")) == 0
    assert results(tmp_path / "run") == expected


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_still_good(
    whole, world, rollouts, scores, tmp_path, refused
):
    stage, expected, changes = whole
    out = tmp_path / "run"
    assert (
        in_fork(lambda: (Disk(changes - 15), start(stage, world, rollouts, scores, out)())) == -signal.SIGKILL
    )
    newest = out / "step_000004"
    for name in ("optimizer.safetensors", "model.safetensors", "checkpoint.json"):
        whole_bytes = (newest / name).read_bytes()
        flipped = bytearray(whole_bytes)
        flipped[len(flipped) // 2] ^= 1
        for damaged in (bytes(flipped), whole_bytes[:-9], b""):
            (newest / name).write_bytes(damaged)
            refused(start(stage, world, rollouts, scores, out, "--resume"), "--resume", "step_000004")
            refused(lambda: model_dir(str(newest), "--model"), "--model", "step_000004")
        (newest / name).unlink()
        refused(start(stage, world, rollouts, scores, out, "--resume"), "--resume", "step_000004")
        (newest / name).write_bytes(whole_bytes)
    assert model_dir(str(newest), "--model") == str(newest)
    shutil.rmtree(newest)
    assert in_fork(start(stage, world, rollouts, scores, out, "--resume")) == 0
    assert results(out) == expected


def test_a_checkpoint_that_was_half_saved_when_the_run_was_killed_is_cleared_away(
    whole, world, rollouts, scores, tmp_path, monkeypatch
):
    """Saved upon SIGTERM, at a step that --save_every would not have chosen; so no later save takes its name."""
    stage, expected, _ = whole

    def step(args, model, optimizer, step, ids):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real_step(args, model, optimizer, step, ids)

    def save(tensors, path):
        os.kill(os.getpid(), signal.SIGKILL)

    real_step = training.optimizer_step
    more = ["--save_every", 6] + (["--refresh_every", 1] if stage is train else [])
    with monkeypatch.context() as patch:
        patch.setattr(training, "optimizer_step", step)
        patch.setattr(training, "save_file", save)
        assert in_fork(start(stage, world, rollouts, scores, tmp_path / "run", *more)) == -signal.SIGKILL
    assert (tmp_path / "run/step_000003.tmp").exists()
    assert in_fork(start(stage, world, rollouts, scores, tmp_path / "run", *more, "--resume")) == 0
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_a_result_that_was_damaged_is_refused_by_the_next_stage(
    whole, world, rollouts, scores, tmp_path, refused
):
    stage, *_ = whole
    assert in_fork(start(stage, world, rollouts, scores, tmp_path / "run")) == 0
    file = tmp_path / "run/final/model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 4
    file.write_bytes(data)
    refused(
        lambda: grpo.main(
            grpo.get_args(
                [
                    "--model",
                    str(tmp_path / "run/final"),
                    "--data",
                    str(world / "train.jsonl"),
                    "--out",
                    str(tmp_path / "next"),
                ]
            )
        ),
        "--model",
        "final/model.safetensors",
        "changed",
    )


def test_old_checkpoints_go_only_when_the_new_one_is_complete(world, rollouts, scores, tmp_path, monkeypatch):
    """At every change to the disk of a save, --keep_checkpoints whole checkpoints are there."""

    def body():
        class Watch(Disk):
            def change(self, half=None):
                there = training.checkpoints(tmp_path / "run")
                for path in there:
                    if os.path.isfile(os.path.join(path, "checkpoint.json")) and path == there[-1]:
                        artifacts.read_checkpoint(path, "--resume")
                if (tmp_path / "run/step_000006").exists():
                    assert len(there) >= 2

        Watch(0)
        start(train, world, rollouts, scores, tmp_path / "run", "--steps", 9)()

    assert in_fork(body) == 0
    assert [os.path.basename(path) for path in training.checkpoints(tmp_path / "run")] == [
        "step_000006",
        "step_000008",
    ]


def test_a_run_killed_while_it_wrote_its_meta_json_can_be_resumed(
    whole, world, rollouts, scores, tmp_path, monkeypatch
):
    """What is left is meta.json.tmp, a file."""
    stage, expected, _ = whole
    replace = os.replace

    def killed(source, target):
        if str(target).endswith("/meta.json"):
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        assert in_fork(start(stage, world, rollouts, scores, tmp_path / "run")) == -signal.SIGKILL
    assert (tmp_path / "run/meta.json.tmp").is_file()
    assert in_fork(start(stage, world, rollouts, scores, tmp_path / "run", "--resume")) == 0
    assert results(tmp_path / "run") == expected
