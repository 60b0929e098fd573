"""The study on the toy world: the papers' comparisons in miniature, over several seeds, and what becomes of their claims.

    python -m recipes.toy_grid --out out/toy_grid                    all runs and evaluations -> out/toy_grid/results.json
    python -m recipes.toy_grid --report results/toy_grid.json        that file -> toy_grid.md and toy_grid_*.png beside it

Every run is a command of a stage, printed as it starts; each can be repeated by hand. Here they run in forks of one process that
has imported torch, one on each core of a CPU; on a GPU one after the other, in that process. Started again, the study keeps what is
finished and goes on. Horizons are limits of response tokens in training: the short one has room for the shortest solutions alone,
the long one for four. The curriculum's floor lies a little below the teacher's own entropy, 0.22. Runs named ends_* start from
a base student that ends with another token than the teacher; `collapsed` is the base student after many epochs on few responses of
its own.

Claims are differences of a metric between runs on the same test problems and seeds: means over seeds, with a 95% bootstrap interval
over problems. "holds": the whole interval lies on the claimed side. What differs from seed to seed is not in the interval.

Equal FLOPs: the student-prefix run's first checkpoint (--save_every) that has spent at least what the teacher-prefix run of the
same KL, horizon and seed has spent in all; column tflops: the teacher's stored scores cost nothing, sampling and live scores do.
"""

import argparse
import functools
import glob
import json
import multiprocessing
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
from distil.evaluation import bootstrap_means, mean_of, pass_at_k, percentile_interval
from distil.jsonl import read_jsonl
from distil.report import markdown
from recipes import toy_world

STAGES = {
    stage.__name__.split(".")[-1]: stage
    for stage in (toy_world, rollout, score_teacher, train, grpo, evaluate)
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
HORIZONS, PREFIXES, KLS = ("short", "long"), ("teacher", "student"), ("forward", "reverse")
CELLS = [f"{prefix}_{kl}_{horizon}" for horizon in HORIZONS for prefix in PREFIXES for kl in KLS]
COMMON = "--engine hf --dtype float32"
START = ("teacher", "base", "base_endoftext", "collapsed")
CUT = ("ends_student", "ends_student_forward")  # are evaluated a second time, with both stop ids


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
    p.add_argument(
        "--report", metavar="JSON", help="write the tables and figures of these results beside them"
    )
    args = p.parse_args(argv)
    if bool(args.out) == bool(args.report):
        p.error("give --out or --report")
    return args


# ---------------------------------------------------------------------------------------------------------------------
# The runs


def distilled(size, prefix, horizon, flags, base="base"):
    data = (
        "--teacher {out}/teacher/final --data {out}/world/train.jsonl"
        if prefix == "student"
        else ("--rollouts {out}/rollouts --scores {out}/scores")
    )
    return (
        f"train --prefix {prefix} {flags} --student {{out}}/{base}/final {data} --max_response_tokens {size[horizon]} "
        f"--normalize token --batch_size 32 {size['cell']} {evaluated(size)}"
    )


def evaluated(size):
    return (
        f"--eval_data {{out}}/world/heldout.jsonl --eval_max_response_tokens {size['long']} --log_every 20 {COMMON} "
        "--seed {seed}"
    )


def runs_of(size):
    """The table of runs: {name: stage and flags}. {out} and {seed} are filled in; each is made with every seed."""
    runs = {}
    for name in CELLS:
        prefix, kl, horizon = name.split("_")
        runs[name] = distilled(size, prefix, horizon, f"--kl {kl}")
    for weight in ("0.2", "0.5", "0.8"):
        runs[f"mix_{weight}"] = distilled(size, "student", "long", f"--kl mix --fkl_weight {weight}")
    runs["curriculum"] = distilled(
        size, "student", "long", f"--kl reverse --curriculum entropy {size['curriculum']}"
    )
    runs["topk"] = distilled(size, "student", "long", "--kl reverse --vocab topk --k 4")
    runs["sampled"] = distilled(size, "student", "long", "--kl reverse --vocab sampled")
    for name, horizon, flags in (
        ("ends_both", "long", "--kl reverse --stop_ids both"),
        ("ends_student", "long", "--kl reverse --stop_ids student"),
        ("ends_student_forward", "long", "--kl forward --stop_ids student"),
        ("ends_student_short", "short", "--kl reverse --stop_ids student"),
        (
            "ends_student_curriculum",
            "long",
            "--kl reverse --stop_ids student --curriculum entropy " + size["curriculum"],
        ),
    ):
        runs[name] = distilled(size, "student", horizon, flags, base="base_endoftext")
    runs["from_collapsed"] = distilled(size, "student", "long", "--kl reverse", base="collapsed")
    for name in CELLS:
        runs[f"grpo_{name}"] = (
            f"grpo --model {{out}}/{name}_{{seed}}/final --data {{out}}/world/train.jsonl "
            f"--max_response_tokens {size['long']} {size['grpo']} {evaluated(size)}"
        )
    return runs


def evaluation(size, model, extra=""):
    return (
        f"evaluate --model {model} --data {{out}}/world/test.jsonl {size['test']} --max_response_tokens {size['long']} "
        f"--sample_batch 1024 {COMMON} --seed {{seed}} {extra}"
    )


def phases(size, out, seeds):
    """Yields lists of jobs; those of one list need nothing from each other. A job is a list of commands, in order."""

    def command(words, where, seed=42):
        return [word.format(out=out, seed=seed) for word in words.split()] + [
            "--out",
            f"{out}/{where.format(seed=seed)}",
        ]

    yield [
        [
            command(f"toy_world {size['world']}", "world"),
            command(f"toy_world {size['world']} --student_end endoftext --chat_share 0.1", "world_endoftext"),
        ]
    ]
    sft = (
        f"train --prefix teacher --kl forward --vocab sampled --normalize token --stop_ids student "
        f"--max_response_tokens {size['long']} --log_every 100 {COMMON}"
    )
    start = {
        "teacher": ("world", "teacher_init", "gold", size["teacher"]),
        "base": ("world", "student_init", "hasty", size["base"]),
        "base_endoftext": ("world_endoftext", "student_init", "hasty", size["base"]),
    }
    yield [
        [
            command(
                f"{sft} --batch_size 64 --lr 3e-3 --student {{out}}/{world}/{model} --rollouts {{out}}/{world}/{rollouts} "
                f"{steps}",
                name,
            ),
            command(evaluation(size, f"{{out}}/{name}/final"), f"{name}/eval"),
        ]
        for name, (world, model, rollouts, steps) in start.items()
    ]
    sample = f"--data {{out}}/world/train.jsonl --max_response_tokens {size['long']} {COMMON}"
    yield [
        [
            command(f"rollout --model {{out}}/teacher/final {size['rollouts']} {sample}", "rollouts"),
            command(
                "score_teacher --teacher {out}/teacher/final --rollouts {out}/rollouts --dtype float32",
                "scores",
            ),
        ],
        [
            command(
                f"rollout --model {{out}}/base/final {size['own']} --temperature 0.6 --top_p 0.95 {sample}",
                "own",
            ),
            command(
                f"{sft} --student {{out}}/base/final --rollouts {{out}}/own {size['collapsed']}", "collapsed"
            ),
            command(evaluation(size, "{out}/collapsed/final"), "collapsed/eval"),
        ],
    ]
    jobs = []
    for seed in seeds:
        of_run = {}
        for name, words in runs_of(size).items():
            job = of_run.setdefault(name.removeprefix("grpo_"), [])  # GRPO goes on where its cell ends
            where = f"{name}_{{seed}}"
            job += [
                command(words, where, seed),
                command(evaluation(size, f"{{out}}/{where}/final"), f"{where}/eval", seed),
            ]
        jobs += of_run.values()
    yield jobs
    yield [
        [
            command(
                evaluation(size, f"{{out}}/{name}_{{seed}}/final", "--extra_stop_ids 2"),
                f"{name}_{{seed}}/eval_both",
                seed,
            )
        ]
        for name in CUT
        for seed in seeds
    ] + [
        [
            command(
                evaluation(size, equal_flops(out, kl, horizon, seed)),
                f"student_{kl}_{horizon}_{seed}/eval_equal_flops",
                seed,
            )
        ]
        for kl in KLS
        for horizon in HORIZONS
        for seed in seeds
    ]


def equal_flops(out, kl, horizon, seed):
    """The checkpoint of the student-prefix run where it has spent what the teacher-prefix run has spent in all."""
    budget = json.load(open(f"{out}/teacher_{kl}_{horizon}_{seed}/final/checkpoint.json"))["tflops"]
    checkpoints = sorted(glob.glob(f"{out}/student_{kl}_{horizon}_{seed}/step_*")) + [
        f"{out}/student_{kl}_{horizon}_{seed}/final"
    ]
    return next(
        (path for path in checkpoints if json.load(open(f"{path}/checkpoint.json"))["tflops"] >= budget),
        checkpoints[-1],
    )


def call(words):
    """Runs a stage in this process; a finished artifact is kept, an unfinished one goes on."""
    stage, *words = words
    module, out = STAGES[stage], words[-1]
    if os.path.isfile(f"{out}/meta.json"):
        before, now = (
            json.load(open(f"{out}/meta.json"))["args"],
            json.loads(json.dumps(vars(module.get_args(words)))),
        )
        for name in now.keys() - {"resume", "overwrite"}:
            if now[name] != before[name]:
                refuse(
                    f"--out {out}: is finished, but with another --{name} ({before[name]!r}, now {now[name]!r}); remove it, or "
                    "choose another --out"
                )
        return
    if os.path.isfile(f"{out}/meta.partial.json"):
        words.append("--overwrite" if stage == "toy_world" else "--resume")
    sys.argv = ["-m recipes.toy_world" if stage == "toy_world" else f"{stage}.py", *words]
    print(f"$ python {sys.argv[0]} {shlex.join(words)}", flush=True)
    module.main(module.get_args(words))


def work(jobs, workers):
    """Does the jobs, `workers` at a time, each in a fork; with one worker, in this process. A failure ends the study."""

    def do(job):
        for words in job:
            call(words)

    if workers == 1:
        return [do(job) for job in jobs]
    fork, jobs, running = multiprocessing.get_context("fork"), list(jobs), []
    while jobs or running:
        while jobs and len(running) < workers:
            running.append(fork.Process(target=do, args=(jobs.pop(0),), daemon=True))
            running[-1].start()
        multiprocessing.connection.wait(process.sentinel for process in running)
        for process in [process for process in running if not process.is_alive()]:
            if process.exitcode:
                refuse("a run has failed, see above; started again, the study keeps what is finished", code=1)
            running.remove(process)


def study(size, out, seeds, workers):
    """Does what is left of the study and writes OUT/results.json."""
    for jobs in phases(size, out, seeds):
        work(jobs, workers)
    named = {(name, None): name for name in START}
    named |= {(name, seed): f"{name}_{seed}" for name in runs_of(size) for seed in seeds}
    results = [collect(name, seed, f"{out}/{run}", "eval") for (name, seed), run in named.items()]
    results += [
        collect(f"{name}_cut", seed, f"{out}/{name}_{seed}", "eval_both") for name in CUT for seed in seeds
    ]
    results += [
        collect(f"{name}_equal_flops", seed, f"{out}/{name}_{seed}", "eval_equal_flops")
        for name in CELLS
        if name.startswith("student")
        for seed in seeds
    ]
    write_json(
        f"{out}/results.json",
        {
            **provenance(),
            "date": json.load(open(f"{out}/world/meta.json"))["started"],
            "size": size,
            "seeds": seeds,
            "results": results,
        },
    )
    print(f"results: {out}/results.json")


def collect(name, seed, run, inner):
    """What the study keeps of a run and its evaluation; of each test problem: correct and cut off responses, tokens, entropy."""
    meta, evaluated = (
        read_artifact(run, "--out", "train", "grpo"),
        read_artifact(f"{run}/{inner}", "--out", "evaluate"),
    )
    found, n = json.load(open(f"{run}/{inner}/results.json")), evaluated["args"]["n"]
    rows = [row for _, row in read_jsonl(f"{run}/{inner}/samples.jsonl")]
    groups = [rows[i : i + n] for i in range(0, len(rows), n)]
    problems = {
        "correct": [sum(row["correct"] for row in group) for group in groups],
        "cut": [sum(row["finish_reason"] == "length" for row in group) for group in groups],
        "tokens": [sum(row["tokens"] for row in group) for group in groups],
        "entropy": [round(sum(row["entropy"] * row["tokens"] for row in group), 1) for group in groups],
    }
    curve = [
        {
            key: short(row["pass"]["4"] if key == "pass@4" else row[key])
            for key in ("step", "tflops", "avg", "pass@4", "length", "truncated", "entropy")
        }
        for _, row in read_jsonl(f"{run}/evals.jsonl")
    ]
    seconds = sum(row["seconds"] for _, row in read_jsonl(f"{run}/metrics.jsonl"))
    gates = [row for _, row in read_jsonl(f"{run}/gates.jsonl")]
    return {
        "name": name,
        "seed": seed,
        "stage": meta["stage"],
        "flags": shlex.join(meta["argv"]),
        "commit": meta["commit"],
        "step": found["step"],
        "tflops": short(found["tflops"]),
        "seconds": round(seconds, 1),
        "n": n,
        "maj": short(found["maj"][str(n)]),
        "curve": curve,
        "gates": gates,
        **{key: " ".join(map(str, values)) for key, values in problems.items()},
    }


def short(value):
    return float(f"{value:.4g}")


# ---------------------------------------------------------------------------------------------------------------------
# The report

LABELS = {
    "avg": "Avg@8",
    "pass@4": "Pass@4",
    "pass@8": "Pass@8",
    "length": "length",
    "truncated": "cut off",
    "entropy": "entropy",
}
AXES = {
    "avg": "accuracy",
    "pass@4": "Pass@4",
    "length": "length (tokens)",
    "truncated": "cut off",
    "entropy": "entropy (nats)",
}
resampled_once = functools.cache(bootstrap_means)


def values_of(entries, metric):
    """(values, weights or None), a value a problem: the mean over the entries, one a seed; entropy weighs every token the same."""

    def mean(key, share=float):
        rows = [[share(x) for x in entry[key].split()] for entry in entries]
        return tuple(sum(column) / len(rows) for column in zip(*rows, strict=True))

    n, k = entries[0]["n"], metric.partition("@")[2]
    if metric == "entropy":
        return mean("entropy"), mean("tokens")
    if k:
        return mean("correct", lambda x: pass_at_k(n, int(x), int(k))), None
    return mean(
        {"avg": "correct", "length": "tokens", "truncated": "cut"}[metric], lambda x: int(x) / n
    ), None


def difference(results, terms, metric):
    """Of a sum of runs {name: factor}: (mean over seeds, its interval, [value of each seed]). Draws are paired over problems."""

    def total(measure, seeds):
        return sum(
            factor
            * measure(*values_of([e for e in results if e["name"] == name and e["seed"] in seeds], metric))
            for name, factor in terms.items()
        )

    seeds = sorted({entry["seed"] for entry in results if entry["name"] in terms} - {None})
    return (
        total(mean_of, [None, *seeds]),
        percentile_interval(total(resampled_once, [None, *seeds])),
        [total(mean_of, [None, s]) for s in seeds],
    )


def verdict(low, high, margin):
    rounding = 1e-9
    return "holds" if low > margin + rounding else "opposite" if high < margin - rounding else "not resolved"


def versus(these, those):
    """The mean of some runs minus the mean of others: {name: factor}."""
    return {name: 1 / len(these) for name in these} | {name: -1 / len(those) for name in those}


def cells(*words):
    return [name for name in CELLS if set(words) <= set(name.split("_"))]


def claims():
    """(claim, metric, {run: factor}, margin): that the sum over the runs is above the margin."""
    fixed = ["student_reverse_long"]
    for h in HORIZONS:
        yield f"reverse above forward KL, {h}", "avg", versus(cells("reverse", h), cells("forward", h)), 0
        yield (
            f"reverse lower than forward KL, {h} (forward - reverse)",
            "entropy",
            versus(cells("forward", h), cells("reverse", h)),
            0,
        )
    yield (
        "reverse not above forward KL, long (forward - reverse)",
        "pass@4",
        versus(cells("forward", "long"), cells("reverse", "long")),
        0,
    )
    for h in HORIZONS:
        for metric in ("avg", "pass@4"):
            yield (
                f"student above teacher prefixes at equal steps, {h}",
                metric,
                versus(cells("student", h), cells("teacher", h)),
                0,
            )
        matched = [f"{name}_equal_flops" for name in cells("student", h)]
        yield (
            f"cached teacher above student prefixes at equal FLOPs, {h}",
            "avg",
            versus(cells("teacher", h), matched),
            0,
        )
    yield "long above short horizon", "avg", versus(cells("long"), cells("short")), 0
    yield (
        "long lower than short horizon under reverse KL (short - long)",
        "entropy",
        versus(cells("reverse", "short"), cells("reverse", "long")),
        0,
    )
    yield "forward weight 0.8 loses less than 0.02 to reverse KL", "avg", versus(["mix_0.8"], fixed), -0.02
    yield "forward weight 0.8 above reverse KL", "entropy", versus(["mix_0.8"], fixed), 0
    yield (
        "forward weight 0.8 shorter than reverse KL (reverse - mix)",
        "length",
        versus(fixed, ["mix_0.8"]),
        0,
    )
    for metric in ("avg", "pass@4"):
        yield "curriculum above fixed long horizon", metric, versus(["curriculum"], fixed), 0
    yield (
        "curriculum shorter than fixed long horizon (fixed - curriculum)",
        "length",
        versus(fixed, ["curriculum"]),
        0,
    )
    for h in HORIZONS:
        gain = versus([f"grpo_{name}" for name in cells("forward", h)], cells("forward", h))
        yield (
            f"forward checkpoints gain more from GRPO, {h}",
            "avg",
            gain | versus(cells("reverse", h), [f"grpo_{name}" for name in cells("reverse", h)]),
            0,
        )
    yield "same ends: long reverse KL lowers entropy (base - run)", "entropy", versus(["base"], fixed), 0
    yield "same ends: long reverse KL is longer than its teacher", "length", versus(fixed, ["teacher"]), 0
    yield (
        "same ends: a collapsed student (entropy, base - collapsed)",
        "entropy",
        versus(["base"], ["collapsed"]),
        0,
    )
    yield "... is longer than the base student", "length", versus(["collapsed"], ["base"]), 0
    yield (
        "... is longer than the teacher after long reverse KL",
        "length",
        versus(["from_collapsed"], ["teacher"]),
        0,
    )
    yield "other ends, both stop: cut off more than same ends", "truncated", versus(["ends_both"], fixed), 0
    yield (
        "other ends, the student's stops: cut off more than with both",
        "truncated",
        versus(["ends_student"], ["ends_both"]),
        0,
    )
    yield (
        "... with the short horizon too",
        "truncated",
        versus(["ends_student_short"], ["student_reverse_short"]),
        0,
    )
    yield (
        "... with forward KL too",
        "truncated",
        versus(["ends_student_forward"], ["student_forward_long"]),
        0,
    )
    yield (
        "... whose entropy falls meanwhile (base - run)",
        "entropy",
        versus(["base_endoftext"], ["ends_student_forward"]),
        0,
    )
    yield (
        "... when both stop in the evaluation too",
        "truncated",
        versus([f"{name}_cut" for name in CUT], ["ends_both"]),
        0,
    )
    yield (
        "... less with the curriculum (fixed - curriculum)",
        "truncated",
        versus(["ends_student"], ["ends_student_curriculum"]),
        0,
    )
    for metric in ("avg", "pass@4"):
        yield (
            "... where the curriculum is above the fixed long horizon",
            metric,
            versus(["ends_student_curriculum"], ["ends_student"]),
            0,
        )
    yield "top-k (k = 4) loses less than 0.02 to the full vocabulary", "avg", versus(["topk"], fixed), -0.02
    yield "one sample worse than the full vocabulary (full - sampled)", "avg", versus(fixed, ["sampled"]), 0


def report(path):
    """Writes the tables of claims and of runs beside the results, prints them, and draws the figures."""
    found = json.load(open(path))
    results, stem = found["results"], os.path.splitext(path)[0]
    claimed = [["claim", "metric", "difference [95%]", "each seed", "verdict"], ["---"] * 5]
    for claim, metric, terms, margin in claims():
        mean, (low, high), each = difference(results, terms, metric)
        claimed.append(
            [
                claim,
                LABELS[metric],
                f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]",
                " ".join(f"{x:+.3f}" for x in each),
                verdict(low, high, margin),
            ]
        )
    runs = [["run", *LABELS.values(), "Maj@8", "TFLOPs"], ["---"] * 9]
    for name in dict.fromkeys(entry["name"] for entry in results):
        row = [name]
        for metric in LABELS:
            mean, (low, high), _ = difference(results, {name: 1}, metric)
            row.append(
                f"{mean:.1f} [{low:.1f}, {high:.1f}]"
                if metric == "length"
                else f"{mean:.3f} [{low:.3f}, {high:.3f}]"
            )
        entries = [entry for entry in results if entry["name"] == name]
        runs.append(
            row + [f"{sum(entry[key] for entry in entries) / len(entries):.3g}" for key in ("maj", "tflops")]
        )
    text = (
        f"Commit {found['commit'][:12]}, {found['device']}, torch {found['versions']['torch']}, seeds {found['seeds']}, "
        f"{len(results[0]['correct'].split())} test problems.\n\n{markdown(claimed)}\n\n{markdown(runs)}\n"
    )
    with open(f"{stem}.md", "w", encoding="utf-8") as file:
        file.write(text)
    print(text)
    figures(stem, results)


def figures(stem, results):
    """The paper's figures 2 to 5 (cells), 6 (FLOPs), 7 (mix), curriculum, GRPO; and the stop tokens."""
    grid = {
        h: {f"{prefix} prefix, {kl} KL": f"{prefix}_{kl}_{h}" for prefix in PREFIXES for kl in KLS}
        for h in HORIZONS
    }
    three = ("avg", "entropy", "length")
    draw(f"{stem}_cells.png", results, {f"{h} horizon": grid[h] for h in grid}, three)
    draw(f"{stem}_flops.png", results, {f"{h} horizon": grid[h] for h in grid}, ("avg", "pass@4"), x="tflops")
    weights = {
        "forward weight 0": "student_reverse_long",
        "0.2": "mix_0.2",
        "0.5": "mix_0.5",
        "0.8": "mix_0.8",
        "1": "student_forward_long",
    }
    draw(f"{stem}_mix.png", results, {"student prefix, long": weights}, three)
    draw(
        f"{stem}_curriculum.png",
        results,
        {
            "student prefix, reverse KL": {
                "fixed long": "student_reverse_long",
                "curriculum": "curriculum",
                "fixed short": "student_reverse_short",
            }
        },
        three,
    )
    draw(
        f"{stem}_grpo.png",
        results,
        {
            f"GRPO after the {h} horizon": {label: f"grpo_{name}" for label, name in grid[h].items()}
            for h in grid
        },
        three,
    )
    ends = {
        "same ends, long, reverse": "student_reverse_long",
        "other ends, both stop": "ends_both",
        "other ends, student's stops": "ends_student",
        "... forward KL": "ends_student_forward",
        "... short horizon": "ends_student_short",
        "... curriculum": "ends_student_curriculum",
        "same ends, from collapsed": "from_collapsed",
    }
    draw(f"{stem}_ends.png", results, {"student prefix": ends}, (*three, "truncated"))


def draw(path, results, rows, metrics, x="step"):
    """rows: {title: {label: run}}; a panel a row and metric. Thin lines are seeds, thick ones their means."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = 4.2 * len(metrics), 3.2 * len(rows)
    fig, axes = plt.subplots(len(rows), len(metrics), figsize=size, squeeze=False, layout="constrained")
    for line, (title, runs) in zip(axes, rows.items()):
        for axis, metric in zip(line, metrics):
            for color, (label, run) in enumerate(runs.items()):
                entries = [entry for entry in results if entry["name"] == run]
                curves = [[[row[key] for row in entry["curve"]] for key in (x, metric)] for entry in entries]
                for curve in curves:
                    axis.plot(*curve, color=f"C{color}", linewidth=0.6, alpha=0.5)
                mean = [[sum(same) / len(same) for same in zip(*column)] for column in zip(*curves)]
                axis.plot(*mean, color=f"C{color}", linewidth=2, marker="o", markersize=3, label=label)
            axis.set(title=f"{title}: {AXES[metric]}", xlabel={"step": "step", "tflops": "TFLOPs"}[x])
            axis.grid(alpha=0.3)
        line[-1].legend(fontsize=8)
    fig.savefig(path, dpi=90)
    plt.close(fig)
    print(f"figure: {path}")


def main(args):
    if args.report:
        return report(args.report)
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends the forks too
    study(SIZE, args.out, args.seeds, 1 if torch.cuda.is_available() else len(os.sched_getaffinity(0)))


if __name__ == "__main__":
    main(get_args())
