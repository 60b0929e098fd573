"""The study on the toy world: the papers' comparisons in miniature, over several seeds.

    python -m recipes.toy_grid --out out/toy_grid               all runs whose results are missing
    python -m recipes.toy_grid --report results/toy_grid.jsonl  tables and figures of that file, beside it

recipes/toy_runs.py says which runs there are. Each is a command of a stage, printed as it starts, which can
be repeated by hand. Here they run in forks of one process that has imported torch: on a CPU one on each core,
on a GPU one after the other in that process itself.

A result is a line of --results, written when its run ends, with the raw counts of every test problem. It is
known by its name, seed and `id`, a digest of its commands and of all that made what they read: what is there
is not run again, in another checkout neither. A study that is started again resumes the runs in --out.

Equal FLOPs: of the student-prefix run, the first checkpoint (--save_every) that has spent as much as the
teacher-prefix run with the same KL, horizon and seed has spent in all. Sampling and live scores count, the
teacher's stored scores do not.
"""

import argparse
import glob
import hashlib
import json
import multiprocessing.connection
import os
import shlex
import signal
import sys

import torch

import evaluate
import grpo
import rollout
import score_teacher
import train
from distil.artifacts import provenance, read_artifact, refuse
from distil.jsonl import read_jsonl
from recipes import toy_world
from recipes.plan import artifacts_of, is_finished
from recipes.toy_runs import SIZE, identity, make_jobs, missing, needs

STAGES = {
    "toy_world": toy_world,
    "rollout": rollout,
    "score_teacher": score_teacher,
    "train": train,
    "grpo": grpo,
    "evaluate": evaluate,
}


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", help="directory of all runs")
    p.add_argument("--results", default="results/toy_grid.jsonl", help="file that grows by a line a result")
    p.add_argument("--workers", type=int, default=os.cpu_count(), help="runs side by side, on a CPU")
    p.add_argument("--report", metavar="JSONL", help="write tables and figures of these results beside them")
    args = p.parse_args(argv)
    if bool(args.out) == bool(args.report):
        p.error("give --out or --report")
    return args


# ----------------------------------------------------------------------------------------------------------
# Running


def study(size, out, path, workers):
    """Does what is missing from the results in `path`."""
    jobs, results = make_jobs(size), read_results(path)
    check_flags(path, results, jobs)
    while places := missing(size, results):
        print(f"{len(results)} results, {len(places)} more in this part of the study", flush=True)
        for place in work(with_needs(jobs, places), jobs, results, out, workers):
            if place in jobs and jobs[place].name and place not in results:
                results[place] = collect(jobs, place, out)
                append(path, results[place])
    print(f"results: {path}")


def check_flags(path, results, jobs):
    """Refuse a file of results that were not made by the commands of today's jobs."""
    for place, result in results.items():
        if place in jobs and result["id"] != identity(jobs, place):
            refuse(f"{path}: {place} was made with other flags: remove its line, or name another --results")


def with_needs(jobs, places):
    """The places, each behind those that it needs."""
    ordered = {}
    for place in places:
        ordered |= dict.fromkeys(with_needs(jobs, needs(jobs, place)))
        ordered[place] = None
    return list(ordered)


def work(places, jobs, results, out, workers):
    """Does jobs, `workers` at a time, each in a fork, and yields their places; one worker: in this process.
    A job waits for those that it needs. Stops at a failure."""
    if workers == 1:
        for place in places:
            do(jobs[place], results, out)
            yield place
        return
    fork, waiting, running = multiprocessing.get_context("fork"), list(places), {}
    while waiting or running:
        undone = {*waiting, *running.values()}
        ready = [place for place in waiting if not undone & {*needs(jobs, place)}]
        for place in ready[: workers - len(running)]:
            process = fork.Process(target=do, args=(jobs[place], results, out), daemon=True)
            process.start()
            running[process] = place
            waiting.remove(place)
        multiprocessing.connection.wait(process.sentinel for process in running)
        for process in [process for process in running if not process.is_alive()]:
            if process.exitcode:
                refuse("a run failed, see above; start the study again to keep what is finished", code=1)
            yield running.pop(process)


def do(job, results, out):
    fill = {"out": out}
    if job.budget:
        budget = next(results[place]["tflops"] for place in job.budget if place in results)
        fill["matched"] = equal_flops(f"{out}/{job.run}", budget)
    for command in job.commands:
        call([word.format(**fill) for word in command.split()])  # {out} may hold blanks


def call(words):
    """Runs a stage in this process; a finished artifact is kept, an unfinished one is resumed."""
    stage, *flags = words
    module = STAGES[stage]
    args = module.get_args(flags)
    if all(is_finished(one, "the study") for one in artifacts_of(stage, args)):
        return
    if os.path.isfile(f"{args.out}/meta.partial.json"):
        flags.append("--overwrite" if stage == "toy_world" else "--resume")
    sys.argv = ["-m recipes.toy_world" if stage == "toy_world" else f"{stage}.py", *flags]
    print(f"$ python {sys.argv[0]} {shlex.join(flags)}", flush=True)
    module.main(module.get_args(flags))


def equal_flops(run, budget):
    """Name of the run's first checkpoint that has spent so many TFLOPs."""
    names = [*sorted(glob.glob("step_*", root_dir=run)), "final"]
    spent = {name: json.load(open(f"{run}/{name}/checkpoint.json"))["tflops"] for name in names}
    return next((name for name in names if rounded(spent[name]) >= budget), "final")


# ----------------------------------------------------------------------------------------------------------
# Results


def read_results(path):
    """{place: result} of a file of results, {} if there is none."""
    results = {}
    for number, result in read_jsonl(path) if os.path.isfile(path) else []:
        if not {"name", "seed"} <= result.keys():
            refuse(f"{path} line {number}: no result of a study, which has a name and a seed")
        place = result["name"] if result["seed"] is None else f"{result['name']}_{result['seed']}"
        if place in results:
            refuse(f"{path} line {number}: a second result of {place}; remove one")
        results[place] = result
    return results


def append(path, result):
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")


def collect(jobs, place, out):
    """What the study keeps of a job: the run's curve, and sums for each test problem (cut: truncated).
    correct and cut have a digit a problem."""
    job, evaluation = jobs[place], f"{out}/{place}/eval"
    run = f"{out}/{job.run}"
    meta = read_artifact(run, "--out", "train", "grpo")
    n = read_artifact(evaluation, "--out", "evaluate")["args"]["n"]
    assert n < 10, "a count of correct responses is one digit"
    found = json.load(open(f"{evaluation}/results.json"))
    rows = rows_of(f"{evaluation}/samples.jsonl")
    problems = [rows[i : i + n] for i in range(0, len(rows), n)]

    def sums(value, between=" "):
        return between.join(str(value(problem)) for problem in problems)

    origin = provenance()
    return {
        "name": job.name,
        "seed": job.seed,
        "id": identity(jobs, place),
        "flags": shlex.join(meta["argv"]),
        "commit": meta["commit"],
        "start": weights_digest(meta["args"]["student" if meta["stage"] == "train" else "model"]),
        "device": origin["device"],
        "torch": origin["versions"]["torch"],
        "step": found["step"],
        "tflops": rounded(found["tflops"]),
        "seconds": round(sum(row["seconds"] for row in rows_of(f"{run}/metrics.jsonl")), 1),
        "n": n,
        "maj": rounded(found["maj"][str(n)]),
        "curve": columns(logged(f"{run}/evals.jsonl")),
        "gates": logged(f"{run}/gates.jsonl"),
        "correct": sums(lambda rows: sum(row["correct"] for row in rows), ""),
        "cut": sums(lambda rows: sum(row["finish_reason"] == "length" for row in rows), ""),
        "tokens": sums(lambda rows: sum(row["tokens"] for row in rows)),
        "entropy": sums(lambda rows: round(sum(row["entropy"] * row["tokens"] for row in rows), 1)),
    }


def weights_digest(model):
    """Of the model that a run started from: made again on another machine, it differs by rounding."""
    return hashlib.sha256(open(f"{model}/model.safetensors", "rb").read()).hexdigest()[:12]


def columns(rows):
    """{name: its values} of the points of a curve, rows of evals.jsonl."""
    kept = ("step", "tflops", "avg", "length", "truncated", "entropy")
    curve = {key: [rounded(row[key]) for row in rows] for key in kept}
    return curve | {"pass@4": [rounded(row["pass"]["4"]) for row in rows]}


def rows_of(path):
    return [row for _, row in read_jsonl(path)]


def logged(path):
    """The rows of a log, which does not exist where there are none."""
    return rows_of(path) if os.path.isfile(path) else []


def rounded(value):
    """Four significant digits."""
    return float(f"{value:.4g}")


def main(args):
    if args.report:
        if not os.path.isfile(args.report):
            refuse(f"--report {args.report}: no such file")
        from recipes.toy_grid_report import report

        return report(args.report, read_results(args.report))
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends the forks too
    study(SIZE, args.out, args.results, 1 if torch.cuda.is_available() else args.workers)


if __name__ == "__main__":
    main(get_args())
