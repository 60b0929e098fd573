"""rollout.py, score_teacher.py and evaluate.py killed at every change they make to the disk, and by signals: --resume ends the same.

A stage runs in a fork of this process, so that nothing is imported again. In most tests cheap functions stand for the model: what is
sampled or scored is a function of the prompt, as it is for the real ones.
"""

import builtins
import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback

import pytest
import torch

import evaluate
import rollout
import score_teacher
from distil import artifacts, evaluation, prompts, sampling
from distil.grading import Grade
from distil.sampling import Sample

STAGES = {"rollout": rollout, "score_teacher": score_teacher, "evaluate": evaluate}
RESULTS = {
    "rollout": ["rollouts.jsonl"],
    "score_teacher": ["head.safetensors", "shard_0"],
    "evaluate": ["samples.jsonl", "results.json"],
}


def in_fork(body, wait=True):
    """Exit code of body() in a fork of this process, or minus the signal that killed it; without `wait`, its process id."""
    pid, code = os.fork(), 99
    if not pid:
        try:
            body()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) if wait else pid


class Disk:
    """Counts what this process changes on the disk, and kills it at one of the changes: before it, or in the middle of a write."""

    def __init__(self, kill_at):
        self.changes, self.kill_at = 0, kill_at
        disk, names = self, ("replace", "rename", "remove", "unlink", "mkdir", "rmdir", "fsync")
        for name in names:
            setattr(os, name, self.counted(getattr(os, name)))
        score_teacher.save_file = self.counted(score_teacher.save_file, self.half_saved)

        class File(io.FileIO):
            def write(self, data):
                disk.change(lambda: io.FileIO.write(self, bytes(data)[: len(data) // 2]))
                return super().write(data)

            def truncate(self, size=None):
                disk.change()
                return super().truncate(size)

        def opened(path, mode="r", buffering=-1, encoding=None, errors=None, newline=None, **more):
            if not set(mode) & set("wax+") or not isinstance(path, (str, os.PathLike)):
                return real(path, mode, buffering, encoding, errors, newline, **more)
            disk.change()
            raw = File(path, mode.replace("b", "").replace("t", ""))
            file = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            return file if "b" in mode else io.TextIOWrapper(file, encoding or "utf-8")

        real, builtins.open = builtins.open, opened

    def change(self, half=lambda: None):
        self.changes += 1
        if self.changes == self.kill_at:
            half()
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(self, function, half=lambda *args: None):
        def call(*args, **kwargs):
            self.change(lambda: half(*args))
            return function(*args, **kwargs)

        return call

    @staticmethod
    def half_saved(tensors, path):
        io.FileIO(path, "w").write(b"\x10\x00\x00\x00\x00\x00\x00\x00{")


@pytest.fixture
def cheap(monkeypatch, world, tmp_path):
    """Models that cost nothing. Every chunk that is sampled or scored is a byte in the file returned here."""
    log, tokenizer = tmp_path / "chunks", prompts.load_tokenizer(str(world / "student_init"), "-")
    log.touch()

    def work():
        with real_open(log, "ab", buffering=0) as file:
            file.write(b".")

    def sample(engine, prompts, sampling, seed, places):
        work()
        rng = random.Random(repr((seed, list(places))))
        return [[Sample([3, 9 + rng.randrange(10), 2], "stop") for _ in range(sampling.n)] for _ in prompts]

    def score(args, model, head, prompts, responses):
        work()
        return [
            {"hidden": torch.tensor([[float(len(prompt) + i)] * 4 for i in range(len(response))])}
            for prompt, response in zip(prompts, responses)
        ]

    real_open, model = open, torch.nn.Linear(1, 1)
    monkeypatch.setattr(sampling, "load_tokenizer", lambda *args: tokenizer)
    monkeypatch.setattr(score_teacher, "load_tokenizer", lambda *args: tokenizer)
    monkeypatch.setattr(sampling, "context_of", lambda directory: 512)
    monkeypatch.setattr(artifacts, "provenance", dict)
    monkeypatch.setattr(artifacts, "writing", False)  # as in a process that has just started
    monkeypatch.setattr(score_teacher, "score", score)
    monkeypatch.setattr(score_teacher, "output_head", lambda *args: torch.eye(29, 4))
    monkeypatch.setattr(
        evaluation, "grade", lambda responses, answers: [Grade("1", False, False) for _ in responses]
    )
    monkeypatch.setattr(evaluation, "predictive_entropy", lambda model, prompts, *more: [1.0] * len(prompts))
    monkeypatch.setattr(evaluation, "interval", lambda values, weights=None: [0.0, 1.0])
    for stage in STAGES.values():
        monkeypatch.setattr(stage, "load_model", lambda *args: model)
    monkeypatch.setattr(rollout, "sample", sample)
    monkeypatch.setattr(evaluation, "sample_as_finished", lambda *args: [dict(enumerate(sample(*args)))])
    return log


def args_of(stage, world, rollouts, out, *more):
    given = {
        "rollout": [
            "--model",
            world / "student_init",
            "--data",
            world / "train.jsonl",
            "--limit",
            5,
            "--n",
            2,
            *"--sample_batch 4 --engine hf --dtype float32 --max_response_tokens 6".split(),
        ],
        "score_teacher": [
            "--teacher",
            world / "teacher_init",
            "--rollouts",
            rollouts,
            *"--shard_tokens 60 --dtype float32".split(),
        ],
        "evaluate": [
            "--model",
            world / "student_init",
            "--data",
            world / "test.jsonl",
            "--n",
            2,
            *"--sample_batch 4 --engine hf --dtype float32 --max_response_tokens 6".split(),
        ],
    }
    return STAGES[stage].get_args([str(word) for word in (*given[stage], "--out", out, *more)])


def results(stage, out):
    """{name: bytes} of what the stage makes, with the lines of meta.json that hold no time and no process."""
    found = {
        name: (out / name).read_bytes()
        for name in sorted(os.listdir(out))
        if name.startswith(tuple(RESULTS[stage]))
    }
    meta = artifacts.read_artifact(str(out), "-", stage)
    return found, meta["files"], meta.get("counts"), meta["inputs"]


@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_any_change_to_the_disk_it_resumes_to_the_same_files(
    stage, world, rollouts, tmp_path, cheap
):
    """Every file operation in turn; every third resumed run is killed too, and resumed once more."""

    def run(out, kill_at, *more):
        args = args_of(stage, world, rollouts, out, *more)

        def body():
            disk = Disk(kill_at)
            STAGES[stage].main(args)
            (tmp_path / "changes").write_text(str(disk.changes))

        return in_fork(body)

    assert run(tmp_path / "whole", 0) == 0
    whole, names = results(stage, tmp_path / "whole"), set(os.listdir(tmp_path / "whole"))
    chunks, changes = cheap.stat().st_size, int((tmp_path / "changes").read_text())
    assert not names & {*artifacts.WORKING} and chunks >= 2 and changes > 20
    for kill_at in range(1, changes + 1):
        cheap.write_bytes(b"")
        out = tmp_path / "killed"
        assert run(out, kill_at) == -signal.SIGKILL
        if kill_at % 3 == 0:  # 0: it was finished
            assert run(out, 1 + kill_at % 7, "--resume") in (0, -signal.SIGKILL)
        assert run(out, 0, "--resume") == 0
        assert results(stage, out) == whole
        assert set(os.listdir(out)) == names
        assert cheap.stat().st_size <= chunks + 2  # a kill costs at most the chunk it falls into
        shutil.rmtree(out)


def test_killed_while_it_replaces_a_run_nothing_of_that_is_taken_over(world, rollouts, tmp_path, cheap):
    """--overwrite of an unfinished run with other flags, killed at every change to the disk."""
    args_of_old = args_of("rollout", world, rollouts, tmp_path / "old", "--seed", 7)
    assert in_fork(lambda: (Disk(20), rollout.main(args_of_old))) == -signal.SIGKILL
    assert {"rollouts.jsonl.tmp", "progress.jsonl", "meta.partial.json"} <= set(os.listdir(tmp_path / "old"))
    rollout.main(args_of("rollout", world, rollouts, tmp_path / "whole"))
    for kill_at in range(1, 16):
        shutil.copytree(tmp_path / "old", tmp_path / "out")
        args = args_of("rollout", world, rollouts, tmp_path / "out", "--overwrite")
        assert in_fork(lambda: (Disk(kill_at), rollout.main(args))) == -signal.SIGKILL
        there, mark = set(os.listdir(tmp_path / "out")), tmp_path / "out/meta.partial.json"
        if mark.exists() and mark.read_bytes() == (tmp_path / "old/meta.partial.json").read_bytes():
            assert there >= set(os.listdir(tmp_path / "old"))  # what is half deleted is no run to resume
        with pytest.raises(SystemExit):
            artifacts.read_artifact(str(tmp_path / "out"), "-", "rollout")
        in_fork(
            lambda: rollout.main(args_of("rollout", world, rollouts, tmp_path / "out", "--resume"))
        )  # if it says how, refused
        code = in_fork(
            lambda: rollout.main(
                args_of("rollout", world, rollouts, tmp_path / "out", "--resume", "--overwrite")
            )
        )
        if code == 2:  # the old run is still there, whole: its flags are others
            code = in_fork(
                lambda: rollout.main(args_of("rollout", world, rollouts, tmp_path / "out", "--overwrite"))
            )
        assert code == 0 and results("rollout", tmp_path / "out") == results("rollout", tmp_path / "whole")
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("stage", STAGES)
def test_real_stages_killed_at_random_moments(stage, world, rollouts, tmp_path):
    """The models are real and the moments are the clock's."""

    def run(out, *more):
        return lambda: STAGES[stage].main(args_of(stage, world, rollouts, out, *more))

    started = time.monotonic()
    assert in_fork(run(tmp_path / "whole")) == 0
    seconds, rng = time.monotonic() - started, random.Random(stage)
    for _ in range(3):
        pid = in_fork(run(tmp_path / "killed", "--resume"), wait=False)
        time.sleep(rng.uniform(0.2, 1) * seconds)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert in_fork(run(tmp_path / "killed", "--resume")) == 0
    assert results(stage, tmp_path / "killed") == results(stage, tmp_path / "whole")


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("stage", STAGES)
def test_a_signal_ends_a_stage_after_its_chunk(
    stage, number, code, world, rollouts, tmp_path, cheap, monkeypatch, capfd
):
    """The chunk under way is kept, one message says how to go on, and nothing is a traceback."""
    name = {"rollout": "sample", "score_teacher": "score", "evaluate": "sample_as_finished"}[stage]
    real = getattr(evaluation if stage == "evaluate" else STAGES[stage], name)

    def run(out, *more):
        args = args_of(stage, world, rollouts, out, *more)
        return lambda: artifacts.run_stage(STAGES[stage].main, args)

    assert in_fork(run(tmp_path / "whole")) == 0
    chunks = cheap.stat().st_size
    capfd.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(
            evaluation if stage == "evaluate" else STAGES[stage],
            name,
            lambda *args: os.kill(os.getpid(), number) or real(*args),
        )
        assert in_fork(run(tmp_path / "out")) == code
    out, err = capfd.readouterr()
    assert (
        err.count("with --resume continues") == 1 and f"stopped by {number.name}: {tmp_path}/out keeps" in err
    )
    assert "Traceback" not in out + err and cheap.stat().st_size == chunks + 1
    assert in_fork(run(tmp_path / "out", "--resume")) == 0
    assert cheap.stat().st_size == 2 * chunks and results(stage, tmp_path / "out") == results(
        stage, tmp_path / "whole"
    )


def test_a_second_signal_and_one_before_anything_was_written_end_at_once(
    world, rollouts, tmp_path, cheap, monkeypatch, capfd
):
    def twice(*args):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("it went on")

    args = args_of("rollout", world, rollouts, tmp_path / "out")
    for name, words in (
        (
            "sample",
            "a second signal stops at once\n\nSIGTERM: stopped; the same command with --resume continues\n",
        ),
        ("load_model", "SIGTERM: stopped\n"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(rollout, name, twice)
            assert in_fork(lambda: artifacts.run_stage(rollout.main, args)) == 143
        assert words in capfd.readouterr().err
        args = args_of("rollout", world, rollouts, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    assert (
        in_fork(lambda: rollout.main(args_of("rollout", world, rollouts, tmp_path / "out", "--resume"))) == 0
    )
