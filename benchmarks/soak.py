"""Soak: the stages over and over on the toy world, with random faults; results must be those of clean runs.

    OMP_NUM_THREADS=1 python -m benchmarks.soak --minutes 30 --out out/soak --seed 0

A cycle makes six artifacts, each from those before it. Each is started with one to three faults, then
resumed to its end:

    kill, terminate, interrupt    SIGKILL; SIGTERM; SIGINT to the process group (Ctrl-C); at a random moment
    disk                          no file may grow beyond a random size
    second                        while it writes, a second run in the same directory, which must be refused
    damage                        a bit of the finished artifact is flipped; its reader must refuse it

Stages are forks of this process, which has imported everything; one in twenty is a real `python STAGE.py`.
A finding is anything else: another exit code, a traceback, a hanging run, another result, a file or a
process left behind. OUT/findings keeps them.
"""

import argparse
import collections
import ctypes
import glob
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback

import evaluate
import grpo
import rollout
import score_teacher
import train
from distil import grading
from distil.artifacts import file_sha256, read_artifact, refuse, run_stage
from distil.jsonl import read_jsonl
from recipes import toy_world

STAGES = {
    "toy_world": toy_world,
    "rollout": rollout,
    "score_teacher": score_teacher,
    "train": train,
    "grpo": grpo,
    "evaluate": evaluate,
}
COMMON = "--dtype float32 --engine hf"
SFT = f"train --prefix teacher --kl forward --vocab sampled --normalize token --steps 60 --lr 3e-3 {COMMON}"
SHORT = f"{COMMON} --max_response_tokens 24"
SAMPLE = f"{SHORT} --data ../setup/hard.jsonl"
HELD_OUT = "--eval_data ../setup/world/heldout.jsonl"
TRAIN = "--lr 1e-3 --save_every 2 --keep_checkpoints 2 --batch_size 4"
SETUP = {
    "world": "toy_world --train 120 --heldout 4 --test 8 --terms 2 4",
    "teacher": f"{SFT} --student world/teacher_init --rollouts world/gold",
    "base": f"{SFT} --student world/student_init --rollouts world/hasty",
}
CYCLE = {
    "rollouts": f"rollout {SAMPLE} --model ../setup/teacher/final --n 2 --sample_batch 8 --drop unboxed",
    "scores": "score_teacher --teacher ../setup/teacher/final --rollouts rollouts --shard_tokens 200 "
    "--dtype float32",
    "offline": f"train {TRAIN} {SHORT} --prefix teacher --kl forward --student ../setup/base/final "
    f"--rollouts rollouts --scores scores --steps 9 {HELD_OUT} --eval_every 4",
    "onpolicy": f"train {TRAIN} {SAMPLE} --prefix student --kl reverse --student offline/final --steps 8 "
    f"--refresh_every 2 --teacher ../setup/teacher/final {HELD_OUT} --curriculum entropy --horizons 8,16,24 "
    "--entropy_floor 0.01 --gate_every 2",
    "grpo": f"grpo {TRAIN} {SHORT} --model onpolicy/final --data ../setup/world/train.jsonl --n 4 "
    "--updates 2 --steps 6",
    "eval": f"evaluate {SAMPLE} --model grpo/final --n 4 --k 1 4 --sample_batch 16",
}
READERS = dict(zip(CYCLE, [*list(CYCLE.values())[1:], "evaluate --table eval"]))  # who reads an artifact
SIGNALS = {"kill": signal.SIGKILL, "terminate": signal.SIGTERM, "interrupt": signal.SIGINT}
CODES = {  # allowed exit codes
    "none": [0],
    "second": [0],
    "disk": [0, 1, 2],
    "kill": [0, -9],
    "terminate": [0, -15, 143],
    "interrupt": [0, -2, 130],
}
HANGS = 240  # seconds after which a run is taken to hang
BAD = (
    "mismatches",
    "exit codes",
    "tracebacks",
    "second runs accepted",
    "damage accepted",
    "files left",
    "open files left",
    "processes left",
    "temporary files left",
    "/dev/shm files left",
)
SHOWN = ("cycles", "runs", *SIGNALS, "disk", "second", "damage", "resumes", "artifacts compared", *BAD)


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--minutes", type=float, default=30)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", required=True, help="directory to write; one that exists is refused")
    return p.parse_args(argv)


class Process:
    """A stage in the directory `place`, in its own session. real: python STAGE.py; limit: bytes of a file."""

    def __init__(self, place, command, real=False, limit=resource.RLIM_INFINITY):
        self.place, self.command, self.text = place, command, ""
        self.output, into = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(into)
            return
        os.setsid()
        os.chdir(place)
        os.dup2(into, 1)
        os.dup2(into, 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        stage, *words = command.split()
        if real:
            script = os.path.join(os.path.dirname(rollout.__file__), f"{stage}.py")
            os.execv(sys.executable, [sys.executable, script, *words])
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        code = run_and_count_files(STAGES[stage], words)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def wait(self, seconds, until=lambda: False):
        """Whether it is still there, after some seconds or when until() holds."""
        end = time.monotonic() + seconds
        while there := os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if time.monotonic() > end or until():
                break
            time.sleep(0.002)
        return there


def open_files():
    return os.listdir("/proc/self/fd")


def run_and_count_files(module, words):
    """Runs a stage: its exit code, 99 after an exception. Prints the files that it has left open."""
    before = len(open_files())
    try:
        run_stage(module.main, module.get_args(words))
        if len(open_files()) > before + 2 * len(grading.idle):  # an idle grading worker has two pipes
            print("OPEN FILES", [os.readlink(f"/proc/self/fd/{number}") for number in open_files()[:-1]])
    except SystemExit as end:
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 99
    return 0


class Soak:
    def __init__(self, args):
        self.out, self.rng = args.out, random.Random(args.seed)
        self.counts = collections.Counter()
        self.seconds, self.expected = {}, {}  # of each artifact: the time that it takes, its contents

    def finding(self, kind, what, run):
        self.counts[kind] += 1
        path = os.path.join(self.out, "findings", f"{self.counts['runs']}_{kind.replace(' ', '_')}")
        shutil.copytree(run.place, path, dirs_exist_ok=True)
        with open(os.path.join(path, "output.txt"), "a", encoding="utf-8") as file:
            file.write(f"{kind}: {what}\n{run.command}\n\n{run.text}")
        print(f"FINDING {kind}: {run.command.split()[0]}: {what}; see {path}", flush=True)

    def ended(self, run, codes, alone=True):
        """Exit code of a run, when it has ended; it must be one of `codes`. alone: no other is running."""
        if run.wait(HANGS):
            os.killpg(run.pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(run.pid, 0)[1])
        left = alone and not self.reap()
        os.set_blocking(run.output, False)
        with open(run.output, encoding="utf-8", errors="replace") as output:
            run.text = output.read() or ""
        self.counts["runs"] += 1
        found = {
            "exit codes": code not in codes,
            "tracebacks": "Traceback" in run.text,
            "open files left": "OPEN FILES" in run.text,
            "processes left": left,
        }
        for kind, is_found in found.items():
            if is_found:
                self.finding(kind, f"ended with {code}", run)
        return code

    @staticmethod
    def reap(seconds=20):
        """Whether all that a run left, which is now this process's child, has ended in time."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                if os.waitpid(-1, os.WNOHANG)[0] == 0:
                    time.sleep(0.01)
            except ChildProcessError:
                return True
        return False

    def attempt(self, place, name, flags, fault="none"):
        """Begins or continues an artifact, with a fault on the way. Returns the run and its exit code."""
        out, rng, limit = os.path.join(place, name), self.rng, resource.RLIM_INFINITY
        begun = os.path.exists(os.path.join(out, "meta.partial.json"))
        self.counts["resumes"] += begun and "--resume" in flags
        if fault == "disk":
            limit = int(2 ** rng.uniform(7, 21))
        # Ctrl-C in a real process may meet Python's imports, which answer in their own way
        real = name in self.seconds and fault != "interrupt" and rng.random() < 0.05
        moment = self.seconds.get(name, 0) * rng.uniform(0, 1.2) + 6 * real
        run = Process(place, f"{flags} --out {name}", real, limit)

        def writes():
            lock = os.path.join(out, "meta.lock")
            return os.path.isfile(lock) and f"process {run.pid} " in open(lock).read()

        if fault == "second" and run.wait(HANGS, writes) and run.wait(moment / 2):
            self.second(run, place, name)
        if fault in SIGNALS and run.wait(moment):
            (os.killpg if fault == "interrupt" else os.kill)(run.pid, SIGNALS[fault])
        code = self.ended(run, CODES[fault])
        self.counts[fault] += code != 0
        return run, code

    def second(self, run, place, name):
        """While `run` is stopped, a second run in its directory, which must be refused."""
        os.kill(run.pid, signal.SIGSTOP)
        finished = os.path.exists(os.path.join(place, name, "meta.json"))
        again = self.rng.choice(["--resume", "--overwrite"])
        second = Process(place, f"{CYCLE[name]} --out {name} {again}")
        code = self.ended(second, [0, 2], alone=False)
        refused = code == 2 and "is being written by process" in second.text
        if not refused and not finished:
            self.finding("second runs accepted", "while the first one wrote", second)
        self.counts["second"] += refused
        os.kill(run.pid, signal.SIGCONT)

    def made(self, place, name, flags):
        """Makes or resumes an artifact undisturbed; it must equal the one that was made first."""
        started, (run, code) = time.monotonic(), self.attempt(place, name, flags)
        if code:
            return self.made(place, name, flags.replace("--resume", "") + " --overwrite")
        self.seconds.setdefault(name, time.monotonic() - started)
        found = contents(os.path.join(place, name))
        expected = self.expected.setdefault(name, found)
        self.counts["artifacts compared"] += found is not expected
        left = sorted(found.keys() - expected.keys())
        changed = [key for key in expected if found.get(key) != expected[key]]
        for kind, names in {"files left": left, "mismatches": changed}.items():
            if names:
                self.finding(kind, f"in {name}: {names}", run)

    def damaged(self, place, name):
        """Flips a bit of a finished artifact, shows it to the stage that reads it, and makes it again."""
        files = list(read_artifact(os.path.join(place, name), name)["files"])
        model = [
            file for file in files if file.startswith("final/")
        ]  # of a run the next stage reads the model
        files = ["meta.json", *(model or files)]
        path = os.path.join(place, name, self.rng.choice(files))
        data = bytearray(open(path, "rb").read())
        at = self.rng.randrange(len(data))
        data[at] ^= 1 << self.rng.randrange(8)
        with open(path, "wb") as file:
            file.write(data)
        run = Process(place, READERS[name] + (" --out reader" if name != "eval" else ""))
        self.counts["damage"] += 1
        if self.ended(run, [0, 2]) != 2 or name not in run.text:
            self.finding("damage accepted", f"byte {at} of {os.path.relpath(path, place)}", run)
        shutil.rmtree(os.path.join(place, "reader"), ignore_errors=True)
        self.made(place, name, f"{CYCLE[name]} --overwrite")


def contents(path):
    """{file: sha256, or rows without times and memory} of a finished artifact, and its counts."""
    meta, found = read_artifact(path, "-"), {}
    for name in glob.glob("**", root_dir=path, recursive=True):
        file = os.path.join(path, name)
        if os.path.basename(name) in ("metrics.jsonl", "evals.jsonl", "gates.jsonl"):
            found[name] = [unmeasured(row) for _, row in read_jsonl(file)]
        elif not os.path.isfile(file) or name == "meta.json":
            continue
        elif ".tmp" in name or not name.startswith("step_"):
            found[name] = file_sha256(file)
    return found | {key: meta.get(key) for key in ("counts", "cell", "stop_ids", "tflops", "response_tokens")}


def unmeasured(row):
    return {key: row[key] for key in row if "second" not in key and key != "peak_memory"}


def main(args):
    if sys.platform != "linux":
        refuse("soak.py watches /proc and /dev/shm, so it needs Linux")
    if os.path.exists(args.out):
        refuse(f"--out {args.out}: exists; choose another directory")
    setup, cycle, temporary = [
        os.path.join(os.path.abspath(args.out), name) for name in ("setup", "cycle", "temporary")
    ]
    for path in (setup, cycle, temporary):
        os.makedirs(path)
    os.environ["TMPDIR"] = tempfile.tempdir = temporary
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: orphans become this process's children
    started, soak = time.monotonic(), Soak(args)
    shared, files = set(os.listdir("/dev/shm")), len(open_files())
    for name, command in SETUP.items():
        soak.made(setup, name, command)
    problems = [row for _, row in read_jsonl(os.path.join(setup, "world", "train.jsonl"))]
    with open(os.path.join(setup, "hard.jsonl"), "w", encoding="utf-8") as hard:
        for row in problems[:24]:  # answers that need a grading worker
            hard.write(json.dumps(row | {"answer": f"\\left|-{row['answer']}\\right|"}) + "\n")
    for name, command in CYCLE.items():
        soak.made(cycle, name, command)
    seconds = {name: round(value, 1) for name, value in soak.seconds.items()}
    print("seconds undisturbed:", seconds, flush=True)
    while time.monotonic() < started + 60 * args.minutes:
        shutil.rmtree(cycle)
        os.makedirs(cycle)
        for name, command in CYCLE.items():
            faults = ["second", "disk", *2 * list(SIGNALS)]
            for fault in soak.rng.choices(faults, k=soak.rng.randint(1, 3)):
                soak.attempt(cycle, name, f"{command} --resume", fault)
            soak.made(cycle, name, f"{command} --resume")
            if soak.rng.random() < 0.25:
                soak.damaged(cycle, name)
        soak.counts["cycles"] += 1
        print(f"{(time.monotonic() - started) / 60:.1f} minutes: {dict(soak.counts)}", flush=True)
    soak.counts["open files left"] += len(open_files()) - files
    soak.counts["temporary files left"] = len(os.listdir(temporary))
    soak.counts["/dev/shm files left"] = len(set(os.listdir("/dev/shm")) - shared)
    for name in SHOWN:
        print(f"| {name} | {soak.counts[name]} |")
    if any(soak.counts[name] for name in BAD):
        raise SystemExit(1)


if __name__ == "__main__":
    main(get_args())
