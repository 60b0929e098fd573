"""Files with a JSON object per line: reading, and writing so that a kill loses at most one chunk."""

import hashlib
import json
import os

from distil.artifacts import DAMAGE, digest_with, refuse


class GrowingFile:
    """A .jsonl file that grows in chunks, and recovers from a kill at any byte.

    progress.jsonl beside it gets a line per finished chunk: what mark() was given, "bytes" (length of the
    file) and "sha256" (of the file up to there and of the line's other fields). Opening cuts both files
    behind the last chunk whose line is right; `done` is that line, or `start` if there is none."""

    def __init__(self, path, **start):
        self.path, self.progress = path, os.path.join(os.path.dirname(path), "progress.jsonl")
        self.done = start | {"bytes": 0}
        self.sha256 = hashlib.sha256()  # of the file up to done["bytes"]
        self.unmarked = bytearray()  # what was written since
        with open(path, "a+b") as file, open(self.progress, "a+b") as progress:
            file.seek(0)
            progress.seek(0)
            lines = progress.readlines()
            good = 0
            while good < len(lines) and self.is_good(lines[good], file):
                good += 1
            if good < len(lines):
                print(f"{path}: {len(lines) - good} cut or damaged chunks are made again", flush=True)
            file.truncate(self.done["bytes"])
            progress.truncate(sum(len(line) for line in lines[:good]))

    def is_good(self, line, file):
        """Read the next chunk. If it is as this line of progress.jsonl says, move `done` to it."""
        sha256 = self.sha256.copy()
        try:
            mark = json.loads(line)
            digest = mark.pop("sha256")
            sha256.update(file.read(max(0, mark["bytes"] - self.done["bytes"])))
        except DAMAGE:
            return False
        if not line.endswith(b"\n") or digest != digest_with(mark, sha256):
            return False
        self.done = mark
        self.sha256 = sha256
        return True

    def write(self, text):
        self.unmarked += text.encode()

    def mark(self, **facts):
        """Finish a chunk: everything written so far is kept from now on."""
        with open(self.path, "ab") as file:  # closed here: after a failed write nothing is left for exit
            file.write(self.unmarked)
            file.flush()
            os.fsync(file.fileno())
        self.sha256.update(self.unmarked)
        self.done = facts | {"bytes": self.done["bytes"] + len(self.unmarked)}
        self.unmarked = bytearray()
        line = self.done | {"sha256": digest_with(self.done, self.sha256)}
        with open(self.progress, "ab") as progress:
            progress.write(json.dumps(line).encode() + b"\n")


def finite(facts, place):
    """The facts, as they are. A number among them that is not finite ends the run: JSON has none."""
    for name, value in facts.items():
        found = []
        json.loads(json.dumps(value), parse_constant=found.append)
        if found:
            refuse(f"{place}: {name} is {found[0]}, not a finite number; the run ends here", code=1)
    return facts


def read_jsonl(path):
    """Yield ("FILE line N", object) for each line of a .jsonl file. Other lines are refused."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    place = f"{path} line {number}"
                    yield place, parse_row(line, place)
    except (OSError, UnicodeDecodeError) as error:
        refuse(f"cannot read {path}: {error}")


def parse_row(line, place):
    try:
        row = json.loads(line)
        if "\\ud" in line or "\\uD" in line:  # half of a surrogate pair is no character
            json.dumps(row, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        refuse(f"{place}: not JSON ({error})")
    if not isinstance(row, dict):
        refuse(f"{place}: not a JSON object")
    return row
