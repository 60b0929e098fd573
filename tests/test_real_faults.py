"""Disks that are really full: each stage on a small file system that is filled at many moments of its run.

Every scenario runs in a fork that mounts a tmpfs of its own, which ends with the fork: as root, or in a user
namespace. Where the system allows neither, these tests are skipped."""

import ctypes
import functools
import itertools
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

import evaluate
import grpo
import score_teacher
import train
from conftest import ROOT
from distil import artifacts
from runs import training
from test_resume import STAGES, args_of, cheap_models, in_fork, results  # noqa: F401 (a fixture)
from test_resume_training import results as results_of_run
from test_resume_training import start  # noqa: F401 (a fixture)

PAGE, PAGES = 4096, 2048  # tmpfs gives out whole pages; the disk has 8 MiB
NEW_MOUNTS, NEW_USER, RECURSIVE, PRIVATE = 0x20000, 0x10000000, 0x4000, 0x40000  # <sched.h>, <sys/mount.h>


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(artifacts, "provenance", dict)
    monkeypatch.setattr(artifacts, "writing", False)  # as in a process that has just started


def check(failed):
    if failed:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def mount_small_disk(folder):
    """Mount a tmpfs that this process and its children alone see."""
    libc, uid, gid = ctypes.CDLL(None, use_errno=True), os.getuid(), os.getgid()
    if libc.unshare(NEW_MOUNTS):
        check(libc.unshare(NEW_MOUNTS | NEW_USER))
        maps = {"setgroups": "deny", "uid_map": f"{uid} {uid} 1", "gid_map": f"{gid} {gid} 1"}
        for name, text in maps.items():
            pathlib.Path("/proc/self", name).write_text(text)
    check(libc.mount(b"none", b"/", None, RECURSIVE | PRIVATE, None))
    check(libc.mount(b"none", os.fsencode(folder), b"tmpfs", 0, f"size={PAGES * PAGE}".encode()))


@pytest.fixture(scope="module")
def can_mount(tmp_path_factory):
    if not sys.platform.startswith("linux"):
        pytest.skip("only Linux lets a test mount a file system of its own")
    folder = tmp_path_factory.mktemp("mount")

    def probe():
        try:
            mount_small_disk(folder)
        except OSError as error:
            raise SystemExit(error.errno) from None

    code = in_fork(probe)
    if code:
        pytest.skip(f"this system lets no test mount a file system of its own: {os.strerror(code)}")


@pytest.fixture
def on_small_disk(can_mount, tmp_path):
    """on_small_disk(scenario): scenario(disk) must succeed in a fork that has a small disk at `disk`."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def run(scenario):
        assert in_fork(lambda: (mount_small_disk(disk), scenario(disk))) == 0, "see the captured stderr"

    return run


def leave(disk, pages):
    """Fill the disk but for some pages."""
    with open(disk / "ballast", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, PAGE * (os.statvfs(disk).f_bfree - pages))


def run(body, disk):
    """(exit code, stdout and stderr) of body() in a fork; they go to a file on another disk."""
    log = disk.parent / "log"

    def child():
        sys.stdout = sys.stderr = open(log, "w", buffering=1)
        for number in (1, 2):  # for what is not printed by Python
            os.dup2(sys.stdout.fileno(), number)
        body()

    return in_fork(child), log.read_text()


def check_message(said, *words):
    """The one line about the full disk comes last and holds the words."""
    *before, last = said.splitlines()
    assert last.startswith("error: ") and "No space left on device" in last, said
    assert not any(line.startswith(("error: ", "Traceback", "Exception ignored")) for line in before), said
    for word in words:
        assert str(word) in last


def last_written(folder):
    """The name of the file that was changed last: the write that failed was to it, or came next."""
    return max(
        (path for path in folder.rglob("*") if path.is_file()), key=lambda p: p.stat().st_mtime_ns
    ).name


def check_full_disk(disk, pages, body_of, results_in, whole):
    """A run with so many pages fails with one line and, with room, resumes to the same results.

    body_of(out, *flags): the body of a run. Returns the name of the file that was written last, or None if
    the run had room enough."""
    out = disk / "out"
    leave(disk, pages)
    code, said = run(body_of(out), disk)
    last = last_written(out) if code else None
    (disk / "ballast").unlink()
    if code:
        assert code == 1, said
        check_message(said, f"{out} keeps what is finished; the same command with --resume continues")
        assert not (out / "meta.json").exists()  # the mark of a finished artifact
        kept = training.checkpoints(out)
        code, said = run(body_of(out, "--resume"), disk)
        assert code == 0 and (not kept or f"resumed from {kept[-1]}" in said), said
    assert results_in(out) == whole
    shutil.rmtree(out)
    return last


@pytest.mark.parametrize("stage", STAGES)
def test_a_disk_that_is_full_at_any_page(stage, world, rollouts, cheap, monkeypatch, on_small_disk):
    monkeypatch.setattr(score_teacher, "check_space", lambda out, size: None)  # the disk is filled after it

    def body_of(out, *more):
        args = args_of(stage, world, rollouts, out, *more)
        return lambda: artifacts.run_stage(STAGES[stage].main, args)

    def scenario(disk):
        assert run(body_of(disk / "whole"), disk)[0] == 0
        about = body_of, lambda out: results(stage, out), results(stage, disk / "whole")
        chunks, last = cheap.chunks(), []
        while not last or last[-1]:
            cheap.reset()
            last.append(check_full_disk(disk, len(last), *about))
            assert cheap.chunks() <= chunks + 1  # no finished chunk was made again
        assert len(last) > 7 and last[0] == "meta.lock" and len({*last}) > 4, last

    on_small_disk(scenario)


def spaces_of(out):
    """Numbers of pages, two or more apart, with which the disk is full about where a file of a run begins."""
    once = {path.stat().st_ino: path for path in out.rglob("*") if path.is_file()}  # some are hard links
    files = sorted(once.values(), key=lambda path: path.stat().st_mtime_ns)
    spaces = [0]
    for end in itertools.accumulate((-(-path.stat().st_size // PAGE) for path in files), initial=2):
        if end >= spaces[-1] + 2:
            spaces.append(end)
    return spaces[:-1]


@pytest.mark.parametrize("stage, every", [(train, 4), (grpo, 6)], ids=["train", "grpo"])
def test_a_disk_that_is_full_in_training(stage, every, start, on_small_disk):  # noqa: F811
    """While it begins, in its logs, in weights, tokenizers and optimizer states of checkpoints, in final/."""

    def body_of(out, *more):
        return start(stage, out, " ".join(more))

    def scenario(disk):
        assert run(body_of(disk / "whole"), disk)[0] == 0
        about = body_of, results_of_run, results_of_run(disk / "whole")
        last = [check_full_disk(disk, pages, *about) for pages in spaces_of(disk / "whole")[::every]]
        assert last[0] == "meta.lock" and None not in last and len({*last}) > 2, last

    on_small_disk(scenario)


def test_a_row_of_a_log_that_fits_by_half(start, monkeypatch, on_small_disk):  # noqa: F811
    """The disk fills in step 5, but for the rest of the page that metrics.jsonl already has."""
    real = training.optimizer_step

    def body_of(out, *more):
        return start(train, out, " ".join(["--steps 9 --save_every 4", *more]))

    def scenario(disk):
        def step(args, model, optimizer, step, ids):
            if step == 4:
                leave(disk, 0)
            return real(args, model, optimizer, step, ids)

        assert run(body_of(disk / "whole"), disk)[0] == 0
        with monkeypatch.context() as patch:
            patch.setattr(training, "optimizer_step", step)
            code, said = run(body_of(disk / "out"), disk)
        assert code == 1 and not (disk / "out/metrics.jsonl").read_bytes().endswith(b"\n")
        check_message(said)
        (disk / "ballast").unlink()
        code, said = run(body_of(disk / "out", "--resume"), disk)
        assert code == 0 and f"resumed from {disk}/out/step_000004" in said
        assert results_of_run(disk / "out") == results_of_run(disk / "whole")

    on_small_disk(scenario)


def test_a_figure_that_does_not_fit_leaves_the_old_one(start, on_small_disk):  # noqa: F811
    def scenario(disk):
        assert run(start(train, disk / "run"), disk)[0] == 0
        for kind, pages in itertools.product(("png", "pdf", "svg"), (0, 2)):
            figure = disk / f"a.{kind}"
            args = evaluate.get_args(["--figure", str(figure), "--runs", f"{disk}/run"])
            draw = functools.partial(artifacts.run_stage, evaluate.main, args)
            figure.write_text("old")
            leave(disk, pages)
            code, said = run(draw, disk)
            assert code == 1, said
            check_message(said, figure)
            assert figure.read_text() == "old" and sorted(os.listdir(disk)) == [figure.name, "ballast", "run"]
            (disk / "ballast").unlink()
            assert run(draw, disk)[0] == 0 and figure.stat().st_size > pages * PAGE
            figure.unlink()

    on_small_disk(scenario)


def test_a_command_line_ends_with_its_one_line(world, on_small_disk):
    """Python's development mode shows errors of files that are closed at exit, as Python 3.13 always does."""
    line = f"rollout.py --model {world}/student_init --data {world}/train.jsonl --engine hf --dtype float32"
    line += " --max_response_tokens 6 --out"

    def scenario(disk):
        for pages, last in {0: "meta.lock", 2: "rollouts.jsonl.tmp"}.items():
            leave(disk, pages)
            command = [sys.executable, "-X", "dev", "-W", "ignore", *line.split(), disk / "out"]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 1 and last_written(disk / "out") == last, done.stderr
            check_message(done.stderr, f"{disk}/out keeps what is finished")
            shutil.rmtree(disk / "out")

    on_small_disk(scenario)
