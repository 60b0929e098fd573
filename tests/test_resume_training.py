"""train.py and grpo.py killed while writing or stopped by signals: --resume ends with the same bits."""

import os
import random
import shutil
import signal

import pytest

import grpo
import train
from conftest import run_line, untimed
from distil import artifacts, training
from distil.models import model_dir
from test_resume import Disk, in_fork


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(artifacts, "provenance", dict)
    monkeypatch.setattr(artifacts, "writing", False)  # as in a process that has just started


@pytest.fixture(scope="module")
def start(world):
    """start(stage, out, more): a function that makes a run of six steps, small but real."""
    flags = {
        train: f"--prefix student --kl reverse --teacher {world}/teacher_init --student {world}/student_init"
        " --curriculum entropy --horizons 3,6 --entropy_floor 0.5 --gate_every 4 --refresh_every 2"
        " --position_bins 2",
        grpo: f"--model {world}/student_init --n 2 --max_response_tokens 6 --kl_weight 0.1",
    }
    common = f"--data {world}/train.jsonl --eval_data {world}/heldout.jsonl --eval_every 3 --eval_n 2"
    common += (
        " --engine hf --dtype float32 --steps 6 --batch_size 2 --lr 1e-2 --save_every 2 --keep_checkpoints 2"
    )
    common += " --keep_best avg"

    def prepared(stage, out, more=""):
        args = stage.get_args(f"{flags[stage]} {common} --out {out} {more}".split())
        return lambda: artifacts.run_stage(stage.main, args)

    return prepared


def results(out):
    """All that a run leaves, without its times and its name."""
    files = artifacts.read_artifact(str(out), "-", "train", "grpo")["files"]
    logs = {name: untimed(out / name) for name in training.LOGS if (out / name).exists()}
    assert all(logs.values())  # no log is empty
    varies = (".jsonl", "checkpoint.json")
    return logs, {name: digest for name, digest in files.items() if not name.endswith(varies)}


def steps_in(out):
    return sorted(name for name in os.listdir(out) if name.startswith("step"))


def signal_in_step_3(number):
    """An optimizer_step that sends this process a signal in the third step."""
    real = training.optimizer_step

    def step(args, model, optimizer, step, ids):
        if step == 2:
            os.kill(os.getpid(), number)
        return real(args, model, optimizer, step, ids)

    return step


@pytest.fixture(scope="module", params=[train, grpo], ids=["train", "grpo"])
def whole(request, start, tmp_path_factory):
    """(stage, results, number of changes to the disk) of a run that nothing disturbs."""
    out = tmp_path_factory.mktemp("whole") / "run"

    def body():
        disk = Disk(0)
        start(request.param, out)()
        (out.parent / "changes").write_text(str(disk.changes))

    assert in_fork(body) == 0
    assert steps_in(out) == ["step_000002", "step_000004"]
    return request.param, results(out), int((out.parent / "changes").read_text())


def test_killed_at_random_changes_to_the_disk_it_ends_the_same(whole, start, tmp_path):
    """Two runs, each killed again and again at a random change to the disk in what is left of it."""
    stage, expected, changes = whole
    rng, kills = random.Random(stage.__name__), 0
    for attempt in range(2):
        out, code = tmp_path / str(attempt) / "run", -signal.SIGKILL
        out.parent.mkdir()
        while code == -signal.SIGKILL and kills < 8 * (attempt + 1):
            kill_at = rng.randrange(1, changes // 2)
            code = in_fork(lambda: (Disk(kill_at), start(stage, out, "--resume")()))
            kills += code == -signal.SIGKILL
        assert code in (0, -signal.SIGKILL)
        assert in_fork(start(stage, out, "--resume")) == 0
        assert results(out) == expected
    assert kills > 6


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_after_its_step_with_a_checkpoint(
    whole, start, number, code, tmp_path, monkeypatch, capfd
):
    stage, expected, _ = whole
    capfd.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(training, "optimizer_step", signal_in_step_3(number))
        assert in_fork(start(stage, tmp_path / "run")) == code
    out, err = capfd.readouterr()
    assert f"stopped by {number.name}" in err and "--resume continues" in err and "Traceback" not in out + err
    last = 4 if stage is train else 3  # the responses of --refresh_every steps are used up first
    assert sorted(os.listdir(tmp_path / "run"))[-1] == f"step_{last:06d}"
    assert in_fork(start(stage, tmp_path / "run", "--resume")) == 0
    assert results(tmp_path / "run") == expected


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_still_good(whole, start, tmp_path, refused):
    stage, expected, changes = whole
    out = tmp_path / "run"
    body = lambda: (Disk(changes - 15), start(stage, out)())
    assert in_fork(body) == -signal.SIGKILL
    newest = out / "step_000004"
    for name in ("optimizer.safetensors", "model.safetensors", "checkpoint.json"):
        whole_bytes = (newest / name).read_bytes()
        flipped = bytearray(whole_bytes)
        flipped[len(flipped) // 2] ^= 1
        for damaged in (bytes(flipped), whole_bytes[:-9], b""):
            (newest / name).write_bytes(damaged)
            refused(start(stage, out, "--resume"), "--resume", "step_000004")
            refused(lambda: model_dir(str(newest), "--model"), "--model", "step_000004")
        (newest / name).unlink()
        refused(start(stage, out, "--resume"), "--resume", "step_000004")
        (newest / name).write_bytes(whole_bytes)
    assert model_dir(str(newest), "--model") == str(newest)
    shutil.rmtree(newest)
    assert in_fork(start(stage, out, "--resume")) == 0
    assert results(out) == expected


def test_a_checkpoint_that_was_half_saved_when_the_run_was_killed_is_cleared_away(
    whole, start, tmp_path, monkeypatch
):
    """Saved upon SIGTERM at a step that --save_every does not choose, so no later save takes its name."""
    stage, expected, _ = whole

    def save(tensors, path):
        os.kill(os.getpid(), signal.SIGKILL)

    more = "--save_every 6" + (" --refresh_every 1" if stage is train else "")
    with monkeypatch.context() as patch:
        patch.setattr(training, "optimizer_step", signal_in_step_3(signal.SIGTERM))
        patch.setattr(training, "save_file", save)
        assert in_fork(start(stage, tmp_path / "run", more)) == -signal.SIGKILL
    assert (tmp_path / "run/step_000003.tmp").exists()
    assert in_fork(start(stage, tmp_path / "run", f"{more} --resume")) == 0
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_a_result_that_was_damaged_is_refused_by_the_next_stage(whole, start, world, tmp_path, refused):
    stage, *_ = whole
    assert in_fork(start(stage, tmp_path / "run")) == 0
    file = tmp_path / "run/final/model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 4
    file.write_bytes(data)
    line = f"--model {tmp_path}/run/final --data {world}/train.jsonl --out {tmp_path}/next"
    refused(lambda: run_line(grpo, line), "--model", "final/model.safetensors", "changed")


def test_old_checkpoints_go_only_when_the_new_one_is_complete(start, tmp_path):
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
        start(train, tmp_path / "run", "--steps 9")()

    assert in_fork(body) == 0
    assert steps_in(tmp_path / "run") == ["step_000006", "step_000008"]


def test_a_run_killed_while_it_wrote_its_meta_json_can_be_resumed(whole, start, tmp_path, monkeypatch):
    """What is left is meta.json.tmp, a file."""
    stage, expected, _ = whole
    replace = os.replace

    def killed(source, target):
        if str(target).endswith("/meta.json"):
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        assert in_fork(start(stage, tmp_path / "run")) == -signal.SIGKILL
    assert (tmp_path / "run/meta.json.tmp").is_file()
    assert in_fork(start(stage, tmp_path / "run", "--resume")) == 0
    assert results(tmp_path / "run") == expected
