"""Reading what is finished, and what it is called: evaluations and their results, runs and their logs."""

import glob
import json
import os
from collections import Counter

from distil.artifacts import read_artifact, read_sealed, refuse
from distil.jsonl import read_jsonl

EVAL_CURVES = {
    "avg": "accuracy",
    "entropy": "predictive entropy (nats)",
    "length": "response length (tokens)",
}
STEP_CURVES = {"fkl": "forward KL (nats)", "rkl": "reverse KL (nats)", "reward": "reward", "loss": "loss"}
STEP_CURVES |= {"student_entropy": "student's entropy (nats)", "truncated": "share of cut-off responses"}
KLS = {"student": "rkl", "teacher": "fkl"}  # on whose plain samples which KL is that of whole responses
METRICS = ("avg", "pass", "maj", "length", "truncated", "entropy")  # of results.json, each with an interval


# ----------------------------------------------------------------------------------------------------------
# Names


def distinct_names(paths):
    """{path: its last directory, with as many of its parents as tell it from the others}.

    out/a/sft and out/b/sft are a/sft and b/sft. Two paths of one place have one name."""
    places = {path: os.path.realpath(path) for path in paths}
    tails = {}  # {place: the ends of its path, from short to long}
    for place in places.values():
        parts = place.strip(os.sep).split(os.sep)
        tails[place] = [os.sep.join(parts[-length:]) for length in range(1, len(parts) + 1)]
    uses = Counter(tail for found in tails.values() for tail in found)
    return {path: next((t for t in tails[place] if uses[t] == 1), place) for path, place in places.items()}


def without_repeats(paths):
    """The paths in their order, each place once."""
    first = {}
    for path in paths:
        first.setdefault(os.path.realpath(path), path)
    return list(first.values())


def model_of(path, meta, results, flag):
    """Where the model of an evaluation is: as recorded, or beside the evaluation if both have been moved."""
    beside = os.path.join(os.path.realpath(path), os.path.relpath(meta["args"]["model"], meta["args"]["out"]))
    if os.path.isfile(os.path.join(beside, "checkpoint.json")):
        checkpoint = read_sealed(os.path.join(beside, "checkpoint.json"), f"{flag} {path}")
        if all(checkpoint[name] == results.get(name) for name in ("run", "cell", "step", "response_tokens")):
            return os.path.realpath(beside)
    return meta["model"]


# ----------------------------------------------------------------------------------------------------------
# Evaluations


def evaluations_in(path, flag, needed=True):
    """The evaluation at `path`; or those up to two levels below it: a run's, or what --benchmarks made."""
    found = directories_with("samples.jsonl*", path)
    if needed and not found:
        refuse(f"{flag} {path}: no evaluation here or up to two levels below; evaluate.py --out writes one")
    return found


def directories_with(pattern, path):
    """`path` itself if it has a file of that pattern; or else those up to two levels below it that do."""
    for depths in ([""], ["*", "*/*"]):
        patterns = [os.path.join(glob.escape(path), depth, pattern) for depth in depths]
        if found := sorted({os.path.dirname(file) for one in patterns for file in glob.glob(one)}):
            return found
    return []


def read_evaluations(paths, flag, runs=()):
    """({path: results.json} of each evaluation once, checksums verified; {run: name} of `runs`).

    `run` in the results becomes a name that no other model among them has: of a checkpoint the directory of
    its run, with its own if that is not final/; of others what --model was. If a model was evaluated twice on
    a data set, or two have one name, the directories of the evaluations are added."""
    found, models, metas = {}, {}, {}
    for path in without_repeats(paths):
        metas[path] = read_artifact(path, flag, "evaluate")
        found[path] = read_results(path, flag)
        models[path] = model_of(path, metas[path], found[path], flag)
    trained = [path for path in found if found[path]["step"] is not None]
    names = distinct_names([*runs, *(os.path.dirname(models[path]) for path in trained)])
    for path in trained:
        home, checkpoint = os.path.split(models[path])
        found[path]["run"] = names[home] if checkpoint == "final" else os.path.join(names[home], checkpoint)
    for run in {results["run"] for results in found.values()}:
        same = {path: found[path] for path in found if found[path]["run"] == run}
        weights = {(models[path], r["step"], r.get("response_tokens")) for path, r in same.items()}
        if len({r["data"] for r in same.values()}) < len(same) or len(weights) > 1:
            folders = {path: folder_of(path, metas[path]["args"]) for path in same}
            inner = distinct_names(folders.values())
            for path, r in same.items():
                r["run"] = f"{run} ({inner[folders[path]]})"
    return found, {run: names[run] for run in runs}


def folder_of(path, given):
    """The directory of an evaluation, or of all those that --benchmarks made together."""
    return os.path.join(path, os.pardir) if given.get("benchmarks") else path


def read_results(path, flag):
    """results.json of an evaluation."""
    with open(os.path.join(path, "results.json"), encoding="utf-8") as file:
        results = json.load(file)
    for name in ("run", "cell", "step", "tflops", "data", "problems", "n", *METRICS):
        if name not in results:
            refuse(f"{flag} {path}: results.json has no {name}, so another version wrote it; evaluate again")
    return results


def metrics_of(results):
    """{metric: value} of results.json: avg, pass@k and maj@k for each k, length, truncated, entropy; with
    --teacher also sequence_rkl, on the model's responses, and sequence_fkl, on the teacher's, if these were
    plain samples: others give no KL of whole responses."""
    found = columns_of({name: results[name] for name in METRICS})
    kls = {prefix: kl for prefix, kl in kls_of(results).items() if kl["plain_samples"]}
    return found | {f"sequence_{KLS[prefix]}": kl[f"sequence_{KLS[prefix]}"] for prefix, kl in kls.items()}


def kls_of(results):
    """{whose responses: summary} of the KLs in results.json; {} without --teacher."""
    return results.get("kl", {})


def kls_by_problem(path, results):
    """{sequence KL in metrics_of(results): {id of a problem: (sum over its responses, their number)}}."""
    found = {name: {} for name in metrics_of(results) if name.startswith("sequence_")}
    for _, row in read_jsonl(os.path.join(path, "kl.jsonl")) if found else ():
        name = f"sequence_{KLS[row['prefix']]}"
        if name in found:
            total, count = found[name].get(row["id"], (0.0, 0))
            found[name][row["id"]] = total + sum(row[KLS[row["prefix"]]]), count + 1
    return found


def read_samples(path):
    """The graded rows of an evaluation."""
    return [row for _, row in read_jsonl(os.path.join(path, "samples.jsonl"))]


def cost_of(results):
    """The TFLOPs of the run that made an evaluated checkpoint, as text; "-" for a model of another origin."""
    if results["step"] is None:
        return "-"
    return "unknown" if results["tflops"] is None else f"{results['tflops']:.4g}"


# ----------------------------------------------------------------------------------------------------------
# Runs


def read_run(run, flag):
    """(meta.json, {"evals": rows of evals.jsonl if there is one, "metrics": of metrics.jsonl}) of a run.

    The checksums of its logs are verified, its weights are not read."""
    meta = read_artifact(run, flag, "train", "grpo", later=("final", "step_", "best"))
    names = [log for log in ("evals", "metrics") if f"{log}.jsonl" in meta["files"]]
    return meta, {log: [row for _, row in read_jsonl(os.path.join(run, f"{log}.jsonl"))] for log in names}


def columns_of(row):
    """{column: value} of a row of a log or of results.json; {"pass": {"4": 0.5}} is {"pass@4": 0.5}."""
    columns = {}
    for name, value in row.items():
        if isinstance(value, dict):
            kind, interval = name.removesuffix("_interval"), "_interval" * name.endswith("_interval")
            columns |= {f"{kind}@{key}{interval}": part for key, part in value.items()}
        else:
            columns[name] = value
    return columns
