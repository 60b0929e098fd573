"""The study on the toy world: the papers' comparisons in miniature, over several seeds.

    python -m recipes.toy_grid --out out/toy_grid               all runs, then out/toy_grid/results.json
    python -m recipes.toy_grid --report results/toy_grid.json   tables and figures of that file, beside it

Every run is a command of a stage, printed as it starts, which can be repeated by hand. Here they run in
forks of one process that has imported torch: on a CPU one on each core, on a GPU one after the other in
that process itself. A study that is started again keeps what is finished and resumes the rest.

A horizon is the limit of response tokens in training: only the shortest solutions fit into the short one,
nearly all into the long one. The curriculum's entropy floor, 0.2, is below the teacher's own entropy,
0.236. The runs ends_* start from a base student whose stop token is not the teacher's. `collapsed` is the
base student after many epochs on few responses of its own.

Equal FLOPs: of the student-prefix run, the first checkpoint (--save_every) that has spent as much as the
teacher-prefix run with the same KL, horizon and seed has spent in all. Sampling and live scores count, the
teacher's stored scores do not.
"""

import argparse
import functools
import glob
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
from distil.artifacts import provenance, read_artifact, refuse, write_json
from distil.jsonl import read_jsonl
from recipes import toy_world
from recipes.plan import is_finished
from recipes.toy_grid_report import CELLS, HORIZONS, KLS, report

STAGES = {
    "toy_world": toy_world,
    "rollout": rollout,
    "score_teacher": score_teacher,
    "train": train,
    "grpo": grpo,
    "evaluate": evaluate,
}
SIZE = {
    "world": "--terms 4 8 --haste 0.15 --slips 0.4 --restate 0.15 --student_width 32",
    "short": "32",
    "long": "160",
    "teacher": "--steps 600",
    "base": "--steps 800",
    "rollouts": "--limit 4000",
    "own": "--limit 100",
    "collapsed": "--steps 200 --batch_size 32 --lr 1e-3",
    "cell": "--steps 120 --lr 1e-4 --save_every 5 --eval_every 10 --eval_n 4",
    "curriculum": "--horizons 16,32,64,160 --gate_every 15 --entropy_floor 0.2",
    "grpo": "--steps 30 --lr 1e-4 --n 8 --batch_size 16 --save_every 10 --eval_every 10 --eval_n 4",
    "test": "--n 8 --k 1 4 8",
}
SHARED = ("teacher", "base", "base_endoftext", "collapsed")  # are made once, not with every seed
EVALUATED_TWICE = ("ends_student", "ends_student_forward")  # the second time both stop tokens stop
COMMON = "--engine hf --dtype float32"


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", help="directory of all runs")
    p.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[1, 2, 3],
        help="of training and sampling; teacher and base are shared",
    )
    p.add_argument("--report", metavar="JSON", help="write tables and figures of these results beside them")
    args = p.parse_args(argv)
    if bool(args.out) == bool(args.report):
        p.error("give --out or --report")
    return args


# ----------------------------------------------------------------------------------------------------------
# Commands: text in which {out} and {seed} are filled in, and which ends with --out


def runs_of(size):
    """{name: command without --out} of the runs that are made with every seed."""
    curriculum = f"--curriculum entropy {size['curriculum']}"
    own_stop = "--stop_ids student"
    runs = {}
    for name in CELLS:
        prefix, kl, horizon = name.split("_")
        runs[name] = distil(size, f"--kl {kl}", horizon, prefix)
    for weight in ("0.2", "0.5", "0.8"):
        runs[f"mix_{weight}"] = distil(size, f"--kl mix --fkl_weight {weight}")
    runs["curriculum"] = distil(size, f"--kl reverse {curriculum}")
    runs["topk"] = distil(size, "--kl reverse --vocab topk --k 4")
    runs["sampled"] = distil(size, "--kl reverse --vocab sampled")
    runs["from_collapsed"] = distil(size, "--kl reverse", base="collapsed")
    for name, flags, horizon in (
        ("ends_both", "--kl reverse --stop_ids both", "long"),
        ("ends_student", f"--kl reverse {own_stop}", "long"),
        ("ends_student_forward", f"--kl forward {own_stop}", "long"),
        ("ends_student_short", f"--kl reverse {own_stop}", "short"),
        ("ends_student_curriculum", f"--kl reverse {own_stop} {curriculum}", "long"),
    ):
        runs[name] = distil(size, flags, horizon, base="base_endoftext")
    for name in CELLS:
        runs[f"grpo_{name}"] = (
            f"grpo --model {{out}}/{name}_{{seed}}/final --data {{out}}/world/train.jsonl "
            f"--max_response_tokens {size['long']} {size['grpo']} {watched(size)}"
        )
    return runs


def distil(size, flags, horizon="long", prefix="student", base="base"):
    data = "--rollouts {out}/rollouts --scores {out}/scores"
    if prefix == "student":
        data = "--teacher {out}/teacher/final --data {out}/world/train.jsonl"
    return (
        f"train --prefix {prefix} {flags} --student {{out}}/{base}/final {data} --normalize token "
        f"--max_response_tokens {size[horizon]} --batch_size 32 {size['cell']} {watched(size)}"
    )


def watched(size):
    """The flags of evaluations in training."""
    held_out = "--eval_data {out}/world/heldout.jsonl"
    return f"{held_out} --eval_max_response_tokens {size['long']} --log_every 20 {COMMON} --seed {{seed}}"


def fine_tune(size, flags):
    """Hard-label supervised fine-tuning."""
    return (
        f"train --prefix teacher --kl forward --vocab sampled --normalize token --stop_ids student "
        f"--max_response_tokens {size['long']} --log_every 100 {COMMON} {flags}"
    )


def test(size, model, place, flags=""):
    return (
        f"evaluate --model {model} --data {{out}}/world/test.jsonl {size['test']} --sample_batch 1024 "
        f"--max_response_tokens {size['long']} {COMMON} --seed {{seed}} {flags} --out {{out}}/{place}"
    )


def trained(size, command, place):
    """A job: a run, then its evaluation."""
    return [f"{command} --out {{out}}/{place}", test(size, f"{{out}}/{place}/final", f"{place}/eval")]


def phases(size, out, seeds):
    """Yields lists of jobs. A job is a list of commands, in order; the jobs of one list are independent."""
    fill = functools.partial(filled, out=out)
    other_stop = "--student_end endoftext --chat_share 0.1"
    yield [
        fill([f"toy_world {size['world']} --out {{out}}/world"]),
        fill([f"toy_world {size['world']} {other_stop} --out {{out}}/world_endoftext"]),
    ]
    start = []
    for name, data, model, world in (
        ("teacher", "gold", "teacher_init", "world"),
        ("base", "hasty", "student_init", "world"),
        ("base_endoftext", "hasty", "student_init", "world_endoftext"),
    ):
        source = f"--student {{out}}/{world}/{model} --rollouts {{out}}/{world}/{data}"
        flags = f"--batch_size 64 --lr 3e-3 {source} {size['teacher' if name == 'teacher' else 'base']}"
        start.append(fill(trained(size, fine_tune(size, flags), name)))
    yield start

    sample = f"--data {{out}}/world/train.jsonl --max_response_tokens {size['long']} {COMMON}"
    score = "score_teacher --teacher {out}/teacher/final --rollouts {out}/rollouts --dtype float32"
    own = f"rollout --model {{out}}/base/final {size['own']} --temperature 0.6 --top_p 0.95 {sample}"
    collapse = f"--student {{out}}/base/final --rollouts {{out}}/own {size['collapsed']}"
    yield [
        fill(
            [
                f"rollout --model {{out}}/teacher/final {size['rollouts']} {sample} --out {{out}}/rollouts",
                f"{score} --out {{out}}/scores",
            ]
        ),
        fill([f"{own} --out {{out}}/own", *trained(size, fine_tune(size, collapse), "collapsed")]),
    ]

    jobs = {}
    for seed in seeds:
        for name, command in runs_of(size).items():
            job = jobs.setdefault((seed, name.removeprefix("grpo_")), [])  # GRPO starts where its cell ends
            job += fill(trained(size, command, f"{name}_{{seed}}"), seed=seed)
    yield list(jobs.values())

    again = []
    for seed in seeds:
        for name in EVALUATED_TWICE:
            run = f"{name}_{{seed}}"
            command = test(size, f"{{out}}/{run}/final", f"{run}/eval_both", "--extra_stop_ids 2")
            again.append(fill([command], seed=seed))
        for kl in KLS:
            for horizon in HORIZONS:
                checkpoint = equal_flops(out, kl, horizon, seed)
                place = f"student_{kl}_{horizon}_{{seed}}/eval_equal_flops"
                again.append(fill([test(size, f"{{out}}/{checkpoint}", place)], seed=seed))
    yield again


def filled(job, out, seed=42):
    """A job's commands as lists of words, which may hold blanks."""
    return [[word.format(out=out, seed=seed) for word in command.split()] for command in job]


def equal_flops(out, kl, horizon, seed):
    """Path below out: the student-prefix run's checkpoint that spent what the teacher-prefix run spent."""

    def spent(path):
        return json.load(open(f"{out}/{path}/checkpoint.json"))["tflops"]

    run = f"student_{kl}_{horizon}_{seed}"
    budget = spent(f"teacher_{kl}_{horizon}_{seed}/final")
    steps = sorted(glob.glob("step_*", root_dir=f"{out}/{run}"))
    checkpoints = [f"{run}/{name}" for name in (*steps, "final")]
    return next((path for path in checkpoints if spent(path) >= budget), checkpoints[-1])


# ----------------------------------------------------------------------------------------------------------
# Running


def call(words):
    """Runs a stage in this process; a finished artifact is kept, an unfinished one is resumed."""
    stage, *flags = words
    module = STAGES[stage]
    args = module.get_args(flags)
    if is_finished(args, "the study"):
        return
    if os.path.isfile(f"{args.out}/meta.partial.json"):
        flags.append("--overwrite" if stage == "toy_world" else "--resume")
    sys.argv = ["-m recipes.toy_world" if stage == "toy_world" else f"{stage}.py", *flags]
    print(f"$ python {sys.argv[0]} {shlex.join(flags)}", flush=True)
    module.main(module.get_args(flags))


def do(job):
    for words in job:
        call(words)


def work(jobs, workers):
    """Does the jobs, `workers` at a time, each in a fork; one worker: in this process. Stops at a failure."""
    if workers == 1:
        for job in jobs:
            do(job)
        return
    fork, waiting, running = multiprocessing.get_context("fork"), list(jobs), []
    while waiting or running:
        while waiting and len(running) < workers:
            process = fork.Process(target=do, args=(waiting.pop(0),), daemon=True)
            process.start()
            running.append(process)
        multiprocessing.connection.wait(process.sentinel for process in running)
        ended = [process for process in running if not process.is_alive()]
        if any(process.exitcode for process in ended):
            refuse("a run failed, see above; start the study again to keep what is finished", code=1)
        running = [process for process in running if process not in ended]


def study(size, out, seeds, workers):
    """Does what is left of the study and writes OUT/results.json."""
    for jobs in phases(size, out, seeds):
        work(jobs, workers)
    results = [collect(name, None, f"{out}/{name}", "eval") for name in SHARED]
    matched = [name for name in CELLS if name.startswith("student")]
    for suffix, evaluation, names in (
        ("", "eval", runs_of(size)),
        ("_cut", "eval_both", EVALUATED_TWICE),
        ("_equal_flops", "eval_equal_flops", matched),
    ):
        for name in names:
            results += [collect(name + suffix, seed, f"{out}/{name}_{seed}", evaluation) for seed in seeds]
    date = json.load(open(f"{out}/world/meta.json"))["started"]
    study = {**provenance(), "date": date, "size": size, "seeds": seeds, "results": results}
    write_json(f"{out}/results.json", study)
    print(f"results: {out}/results.json")


# ----------------------------------------------------------------------------------------------------------
# Results


def collect(name, seed, run, evaluation):
    """What the study keeps of a run: its curve, and sums for each test problem (cut: truncated)."""
    meta = read_artifact(run, "--out", "train", "grpo")
    n = read_artifact(f"{run}/{evaluation}", "--out", "evaluate")["args"]["n"]
    found = json.load(open(f"{run}/{evaluation}/results.json"))
    rows = rows_of(f"{run}/{evaluation}/samples.jsonl")
    problems = [rows[i : i + n] for i in range(0, len(rows), n)]

    def sums(value):
        return " ".join(str(value(problem)) for problem in problems)

    return {
        "name": name,
        "seed": seed,
        "stage": meta["stage"],
        "flags": shlex.join(meta["argv"]),
        "commit": meta["commit"],
        "step": found["step"],
        "tflops": rounded(found["tflops"]),
        "seconds": round(sum(row["seconds"] for row in rows_of(f"{run}/metrics.jsonl")), 1),
        "n": n,
        "maj": rounded(found["maj"][str(n)]),
        "curve": [point(row) for row in logged(f"{run}/evals.jsonl")],
        "gates": logged(f"{run}/gates.jsonl"),
        "correct": sums(lambda rows: sum(row["correct"] for row in rows)),
        "cut": sums(lambda rows: sum(row["finish_reason"] == "length" for row in rows)),
        "tokens": sums(lambda rows: sum(row["tokens"] for row in rows)),
        "entropy": sums(lambda rows: round(sum(row["entropy"] * row["tokens"] for row in rows), 1)),
    }


def point(row):
    """A point of a curve, from a row of evals.jsonl."""
    kept = ("step", "tflops", "avg", "length", "truncated", "entropy")
    return {key: rounded(row[key]) for key in kept} | {"pass@4": rounded(row["pass"]["4"])}


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
        return report(args.report)
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends the forks too
    study(SIZE, args.out, args.seeds, 1 if torch.cuda.is_available() else os.cpu_count())


if __name__ == "__main__":
    main(get_args())
