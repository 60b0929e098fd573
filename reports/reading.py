"""Reading what is finished: which evaluations a path holds, their results and rows, the logs of a run."""

import glob
import json
import os

from distil.artifacts import read_artifact, refuse
from distil.jsonl import read_jsonl

EVAL_CURVES = {
    "avg": "accuracy",
    "entropy": "predictive entropy (nats)",
    "length": "response length (tokens)",
}


def evaluations_in(path, flag, needed=True):
    """The evaluation at `path`; or those up to two levels below it: a run's, or what --benchmarks made."""
    for depths in ([""], ["*", "*/*"]):
        patterns = [os.path.join(glob.escape(path), depth, "samples.jsonl*") for depth in depths]
        found = sorted({os.path.dirname(file) for pattern in patterns for file in glob.glob(pattern)})
        if found or not needed and depths != [""]:
            return found
    refuse(f"{flag} {path}: no evaluation here or up to two levels below; evaluate.py --out writes one")


def read_results(path, flag):
    """results.json of a finished evaluation, its checksum verified."""
    read_artifact(path, flag, "evaluate")
    with open(os.path.join(path, "results.json"), encoding="utf-8") as file:
        return json.load(file)


def read_samples(path):
    """The graded rows of an evaluation."""
    return [row for _, row in read_jsonl(os.path.join(path, "samples.jsonl"))]


def read_log(run, name):
    """The rows of a run's metrics.jsonl or evals.jsonl."""
    return [row for _, row in read_jsonl(os.path.join(run, name))]


def cost_of(results):
    """The TFLOPs of the run that made an evaluated checkpoint, as text; "-" for a model of another origin."""
    if results["step"] is None:
        return "-"
    return "unknown" if results["tflops"] is None else f"{results['tflops']:.4g}"
