"""Three stages killed at every change to the disk, or stopped by signals, and then resumed.

A stage runs in a fork of this process, so that nothing is imported again. In most tests cheap functions stand
for the model: what they sample or score depends only on the prompt, as with the real ones.
"""

import builtins
import contextlib
import io
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
from distil import artifacts, evaluation, models, prompts, sampling
from distil.grading import Grade
from distil.models import Response

STAGES = {"rollout": rollout, "score_teacher": score_teacher, "evaluate": evaluate}
RESULTS = {
    "rollout": ["rollouts.jsonl"],
    "score_teacher": ["head.safetensors", "shard_0"],
    "evaluate": ["samples.jsonl", "results.json"],
}


def in_fork(body, wait=True):
    """Exit code of body() in a fork, or minus the signal that killed it. Without `wait`: its process id."""
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
    """Counts this process's changes to the disk, and kills it before one or in the middle of a write."""

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


class Work:
    """What the cheap models are asked for, also by forks of this process. before_*: called first."""

    def __init__(self, log):
        self.log = log
        self.before_chunk = self.before_load = lambda: None
        self.reset()

    def chunk(self, real_open=builtins.open):
        self.before_chunk()
        with real_open(self.log, "ab", buffering=0) as file:
            file.write(b".")

    def load(self, *args):
        self.before_load()
        return torch.nn.Linear(1, 1)

    def reset(self):
        self.log.write_bytes(b"")

    def chunks(self):
        """How many chunks were sampled or scored since reset()."""
        return self.log.stat().st_size


@pytest.fixture(name="cheap")
def cheap_models(monkeypatch, world, tmp_path):
    """Models that cost nothing: a Work. All patches of the stages' functions are here."""
    work, tokenizer = Work(tmp_path / "chunks"), prompts.load_tokenizer(str(world / "student_init"), "-")

    def sample_hf(model, config, queue):
        work.chunk()
        requests, queue[:] = queue[:], []
        for r in requests:
            ids = [3, 9 + random.Random(r.seed).randrange(10), 2]
            yield r, Response(r.prompt, ids, False)

    def score(model, responses, *options):
        work.chunk()
        rows = [(len(r.prompt_ids), len(r.response_ids)) for r in responses]
        return [{"hidden": torch.tensor([[float(p + i)] * 4 for i in range(n)])} for p, n in rows]

    monkeypatch.setattr(sampling, "load_tokenizer", lambda *args: tokenizer)
    monkeypatch.setattr(score_teacher, "load_tokenizer", lambda *args: tokenizer)
    monkeypatch.setattr(sampling, "context_of", lambda directory: 512)
    monkeypatch.setattr(artifacts, "provenance", dict)
    monkeypatch.setattr(artifacts, "writing", False)  # as in a process that has just started
    monkeypatch.setattr(score_teacher, "score", score)
    monkeypatch.setattr(models, "output_head", lambda *args: torch.eye(29, 4))
    monkeypatch.setattr(models, "check_head", lambda *args: None)
    monkeypatch.setattr(
        evaluation, "grade", lambda responses, answers: [Grade("1", False, False) for _ in responses]
    )
    monkeypatch.setattr(evaluation, "predictive_entropy", lambda model, prompts, *more: [1.0] * len(prompts))
    monkeypatch.setattr(evaluation, "interval", lambda values, weights=None: [0.0, 1.0])
    for module in (rollout, models):
        monkeypatch.setattr(module, "load_model", work.load)
    monkeypatch.setattr(sampling, "sample_hf", sample_hf)
    return work


def args_of(stage, world, rollouts, out, *more):
    sampled = f"--model {world}/student_init --n 2 --sample_batch 4 --engine hf --max_response_tokens 6"
    given = {
        "rollout": f"{sampled} --data {world}/train.jsonl --limit 5",
        "score_teacher": f"--teacher {world}/teacher_init --rollouts {rollouts} --shard_tokens 60",
        "evaluate": f"{sampled} --data {world}/test.jsonl",
    }
    words = [*given[stage].split(), "--dtype", "float32", "--out", out, *more]
    return STAGES[stage].get_args([str(word) for word in words])


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
    chunks, changes = cheap.chunks(), int((tmp_path / "changes").read_text())
    assert not names & {*artifacts.WORKING} and chunks >= 2 and changes > 20
    for kill_at in range(1, changes + 1):
        cheap.reset()
        out = tmp_path / "killed"
        assert run(out, kill_at) == -signal.SIGKILL
        if kill_at % 3 == 0:  # 0: it was finished
            assert run(out, 1 + kill_at % 7, "--resume") in (0, -signal.SIGKILL)
        assert run(out, 0, "--resume") == 0
        assert results(stage, out) == whole
        assert set(os.listdir(out)) == names
        assert cheap.chunks() <= chunks + 2  # a kill costs at most the chunk it falls into
        shutil.rmtree(out)


def test_killed_while_it_replaces_a_run_nothing_of_that_is_taken_over(world, rollouts, tmp_path, cheap):
    """--overwrite of an unfinished run with other flags, killed at every change to the disk."""
    args_of_old = args_of("rollout", world, rollouts, tmp_path / "old", "--seed", 7)
    assert in_fork(lambda: (Disk(20), rollout.main(args_of_old))) == -signal.SIGKILL
    assert {"rollouts.jsonl.tmp", "progress.jsonl", "meta.partial.json"} <= set(os.listdir(tmp_path / "old"))
    rollout.main(args_of("rollout", world, rollouts, tmp_path / "whole"))
    old, out = tmp_path / "old", tmp_path / "out"

    def run(kill_at, *more):
        return in_fork(lambda: (Disk(kill_at), rollout.main(args_of("rollout", world, rollouts, out, *more))))

    for kill_at in range(1, 16):
        shutil.copytree(old, out)
        assert run(kill_at, "--overwrite") == -signal.SIGKILL
        mark = out / "meta.partial.json"
        if mark.exists() and mark.read_bytes() == (old / "meta.partial.json").read_bytes():
            assert set(os.listdir(out)) >= set(os.listdir(old))  # half deleted, it is no run to resume
        with pytest.raises(SystemExit):
            artifacts.read_artifact(str(out), "-", "rollout")
        run(0, "--resume")  # finishes the new run, or is refused
        code = run(0, "--resume", "--overwrite")
        if code == 2:  # the old run is still there, whole, and has other flags
            code = run(0, "--overwrite")
        assert code == 0 and results("rollout", out) == results("rollout", tmp_path / "whole")
        shutil.rmtree(out)


@pytest.mark.parametrize("stage", STAGES)
def test_real_stages_killed_at_random_moments(stage, world, rollouts, tmp_path):
    """With real models, at moments of the clock."""

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
def test_a_signal_ends_a_stage_after_its_chunk(stage, number, code, world, rollouts, tmp_path, cheap, capfd):
    """The chunk under way is kept, one message says how to go on, and nothing is a traceback."""

    def run(out, *more):
        args = args_of(stage, world, rollouts, out, *more)
        return lambda: artifacts.run_stage(STAGES[stage].main, args)

    assert in_fork(run(tmp_path / "whole")) == 0
    chunks = cheap.chunks()
    capfd.readouterr()
    cheap.before_chunk = lambda: os.kill(os.getpid(), number)
    assert in_fork(run(tmp_path / "out")) == code
    cheap.before_chunk = lambda: None
    out, err = capfd.readouterr()
    assert (
        err.count("with --resume continues") == 1 and f"stopped by {number.name}: {tmp_path}/out keeps" in err
    )
    assert "Traceback" not in out + err and cheap.chunks() == chunks + 1
    assert in_fork(run(tmp_path / "out", "--resume")) == 0
    assert cheap.chunks() == 2 * chunks and results(stage, tmp_path / "out") == results(
        stage, tmp_path / "whole"
    )


def test_a_second_signal_and_one_before_anything_was_written_end_at_once(
    world, rollouts, tmp_path, cheap, capfd
):
    def twice():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("it went on")

    def run(out, *more):
        args = args_of("rollout", world, rollouts, tmp_path / out, *more)
        return in_fork(lambda: artifacts.run_stage(rollout.main, args)), capfd.readouterr().err

    cheap.before_chunk = twice
    code, said = run("out")
    assert code == 143 and "SIGTERM: stopped; the same command with --resume continues\n" in said
    cheap.before_chunk, cheap.before_load = lambda: None, twice
    code, said = run("other")
    assert code == 143 and "SIGTERM: stopped\n" in said and not (tmp_path / "other").exists()
    cheap.before_load = lambda: None
    assert run("out", "--resume")[0] == 0
