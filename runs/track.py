"""--track: the numbers of a run's logs, also in TensorBoard, Weights & Biases or Trackio, row by row.

{"step": 3, "pass": {"4": 1.0}} in evals.jsonl is evals/pass/4 at step 3; texts and intervals are left out."""

import importlib.util
import os
import re

from distil.artifacts import read_mark, refuse


def check_installed(tracker):
    if tracker and not getattr(importlib.util.find_spec(tracker), "origin", None):  # None: just a directory
        refuse(f"--track {tracker}: it is not installed; pip install {tracker}")


def numbers_of(value, name):
    """{"name/key": number} of a row; dicts in it are flattened, and its step is left out."""
    if isinstance(value, dict):
        parts = [numbers_of(part, f"{name}/{key}") for key, part in value.items() if key != "step"]
        return {key: number for part in parts for key, number in part.items()}
    return {name: value} if isinstance(value, (int, float)) else {}


def connect(tracker, out, config, step):
    """(log(numbers, step), finish()) of a tracker; step: the next to be logged."""
    if tracker == "tensorboard":
        writer_of = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        writer = writer_of(os.path.join(out, "tensorboard"), purge_step=step)  # hides what a kill undid
        add = lambda numbers, step: [writer.add_scalar(*pair, step) for pair in numbers.items()]
        return (lambda *row: (add(*row), writer.flush())), writer.close
    folder, name = os.path.split(os.path.realpath(out))
    given = {"project": os.path.basename(folder) or "runs", "name": name, "config": config}
    given["resume"] = "allow" if config["resume"] else "never"
    if tracker == "wandb":  # knows a run by its id
        given |= {"id": re.sub(r"\W", "-", f"{name}-{read_mark(out)['started']}"), "dir": out}
    run = importlib.import_module(tracker).init(**given)
    return run.log, run.finish


class Tracker:
    """The tracker of a run, or none. What it raises is said once; from then on it gets no more rows."""

    def __init__(self, tracker, *about):
        self.tracker = tracker
        self.connection = self.attempt(connect, tracker, *about) if tracker else None

    def attempt(self, call, *given):
        try:
            return call(*given)
        except Exception as error:  # of any kind: a stranger's code, disk or network is not worth the run
            self.connection = None
            print(f"WARNING: --track {self.tracker} failed and gets no more rows: {error!r}", flush=True)

    def log(self, name, row):
        if self.connection:
            self.attempt(self.connection[0], numbers_of(row, name.removesuffix(".jsonl")), row["step"])

    def finish(self):
        if self.connection:
            self.attempt(self.connection[1])
