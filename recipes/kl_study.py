"""Sequence-level KLs of the four cells, on a real language model and on the toy world.

    bash recipes/kl_study.sh smollm2 [--data PROBLEMS] [--test PROBLEMS]     runs what the results lack
    bash recipes/kl_study.sh toy
    python -m recipes.kl_study --report results/kl_smollm2.jsonl             its table and its figure

From one student, after a short common start, each cell is trained with three seeds. Then both KLs to the
teacher are summed along plain samples, the student's own and the teacher's, as evaluate.py --teacher does, on
problems that were not trained on. Where accuracy is 0, as the real model's, none is claimed.

Expected before the runs (CLAIMS): student prefixes lower the reverse KL on the student's own responses more
than teacher prefixes do, and the more so late in them; training with a KL lowers that KL more than training
with the other does, the reverse one on own responses, the forward one on the teacher's.
"""

import argparse
import json
import os
import shlex
import signal
import sys

import torch

from distil.artifacts import provenance, read_artifact, refuse
from distil.jsonl import read_jsonl
from distil.problems import load_problems
from recipes.toy_grid import append, check_flags, read_results, rounded, weights_digest, with_needs, work
from recipes.toy_map_report import contrast, interval, save, signed, subplots
from recipes.toy_runs import Job, identity
from recipes.toy_verdicts import difference, verdict
from reports.figure import REACHED, line_styles
from reports.tables import markdown

SUFFIX = " Please reason step by step, and put your final answer within \\boxed{}."
CELLS = [f"{prefix}_{kl}" for prefix in ("teacher", "student") for kl in ("forward", "reverse")]
STUDIES = {
    "smollm2": {
        "models": [],  # recipes/smollm2_models.py makes them in {out}/models
        "teacher": "{out}/models/teacher",
        "student": "{out}/models/student",
        "data": "{out}/data/train.jsonl",
        "test": "{out}/data/test.jsonl",
        "tokens": 64,
        "dtype": "bfloat16",  # on a CPU with AMX four times as fast as float32
        "passes": "--micro_batch_tokens 2048",
        "rollouts": "--limit 640",
        "start": "--steps 40 --batch_size 16 --lr 3e-4",
        "cell": "--steps 30 --batch_size 8 --lr 1e-4",
        "n": 2,
        "seeds": [1, 2, 3],
    },
    "toy": {
        "models": [
            ("world", "toy_world --terms 4 8 --haste 0.15 --slips 0.4 --restate 0.15 --student_width 56"),
            ("big", "{sft} --steps 600 --student {out}/world/teacher_init --rollouts {out}/world/gold"),
            ("base", "{sft} --steps 600 --student {out}/world/student_init --rollouts {out}/world/hasty"),
        ],
        "teacher": "{out}/big/final",
        "student": "{out}/base/final",
        "data": "{out}/world/train.jsonl",
        "test": "{out}/world/test.jsonl",
        "tokens": 80,
        "dtype": "float32",
        "passes": "",
        "rollouts": "--limit 4000",
        "start": None,  # the base student itself
        "cell": "--steps 60 --batch_size 32 --lr 3e-5",
        "n": 4,
        "seeds": [1, 2, 3],
    },
}
SFT = "train --prefix teacher --kl forward --vocab sampled --normalize token --batch_size 64 --lr 3e-3"

HALVES = ("early", "late")  # of the positions that a response may have
OWN, KLS = {"student": "own", "teacher": "teacher"}, ("fkl", "rkl")  # own: the student's own responses


def prefixes(part=""):
    return contrast({cell: f"{cell}{part}" for cell in CELLS}, "teacher", "student")


REVERSE = contrast({cell: cell for cell in CELLS}, "reverse", "forward")
FORWARD, ALL = {run: -factor for run, factor in REVERSE.items()}, {"start": 1} | dict.fromkeys(CELLS, -1 / 4)
LATE = prefixes(" late")
LATER = LATE | {run: -factor for run, factor in prefixes(" early").items()}
CLAIMS = [  # expected before the runs: (text, metric, {run: factor}); "RUN late": its later positions alone
    ("the cells lower the reverse KL (start minus cells)", "own_rkl", ALL),
    ("student prefixes lower it more (teacher minus student)", "own_rkl", prefixes()),
    ("so by token, in the later half (teacher minus student)", "own_rkl_by_token", LATE),
    ("more than in the earlier half (late minus early)", "own_rkl_by_token", LATER),
    ("reverse KL lowers it more (forward minus reverse)", "own_rkl", FORWARD),
    ("forward KL lowers the forward KL more (reverse minus forward)", "teacher_fkl", REVERSE),
]
pair = lambda prefix: {f"{prefix}_reverse": 1, f"{prefix}_forward": -1}
RISE = {"start": 1, "student_forward": -1}
SIGNS = {"late": 1, "early": -1}
GAP = {f"{cell} {half}": sign / 4 for half, sign in SIGNS.items() for cell in CELLS}
GAP |= {f"{run} taught": -factor for run, factor in GAP.items()}
LATER_RUNS = "late minus early, own minus the teacher's responses"
AFTERWARDS = [  # the first four when the toy world's results were known; "taught": on the teacher's responses
    ("forward KL on own responses: forward KL lowers it more (reverse minus forward)", "own_fkl", REVERSE),
    ("student prefixes lower it more (teacher minus student)", "own_fkl", prefixes()),
    (f"exposure bias, reverse KL ({LATER_RUNS})", "own_rkl_by_token", GAP),
    (f"exposure bias, forward KL ({LATER_RUNS})", "own_fkl_by_token", GAP),
    ("the forward KL with teacher prefixes (reverse minus forward)", "teacher_fkl", pair("teacher")),
    ("with student prefixes (reverse minus forward)", "teacher_fkl", pair("student")),
    ("student prefixes, forward KL: below the start (start minus cell)", "teacher_fkl", RISE),
]


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("study", choices=STUDIES, nargs="?", help="what is run")
    p.add_argument("--out", help="directory of all runs")
    p.add_argument("--results", help="file to which missing ones are added (default: results/kl_STUDY.jsonl)")
    p.add_argument("--data", default="gsm8k_train", help="problems to train on, for the real model")
    p.add_argument("--test", default="gsm8k", help="problems to measure on, for the real model")
    p.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time, one thread each")
    p.add_argument("--report", metavar="FILE", help="print the table of these results and draw their figure")
    args = p.parse_args(argv)
    if bool(args.study) == bool(args.report) or args.study and not args.out:
        p.error("give a study and --out, or --report")
    args.results = args.results or f"results/kl_{args.study}.jsonl"
    return args


# ----------------------------------------------------------------------------------------------------------
# Running


def make_jobs(study):
    """{directory below {out}: Job}; those with a name are results."""
    jobs = {"models": Job([]), "data": Job([])}
    sampled = f"--engine hf --dtype {study['dtype']} --max_response_tokens {study['tokens']}"
    for name, command in study["models"]:
        flags = "" if name == "world" else f" {sampled}"
        jobs[name] = Job([f"{command.replace('{sft}', SFT)}{flags} --out {{out}}/{name}"])
    roll = f"rollout --model {study['teacher']} {sampled}"
    jobs["rollouts"] = Job([f"{roll} --data {study['data']} {study['rollouts']} --out {{out}}/rollouts"])
    jobs["asked"] = Job([f"{roll} --data {study['test']} --n {study['n']} --out {{out}}/asked"])
    score = f"score_teacher --teacher {study['teacher']} --rollouts {{out}}/rollouts --dtype {study['dtype']}"
    jobs["scores"] = Job([f"{score} {study['passes']} --out {{out}}/scores"])
    sources = {"teacher": "--rollouts {out}/rollouts --scores {out}/scores"}
    sources["student"] = f"--teacher {study['teacher']} --data {study['data']}"

    def measure(place, model):
        plain = f"--n {study['n']} --temperature 1 --top_p 1 {sampled} {study['passes']}"
        kls = f"--teacher {study['teacher']} --rollouts {{out}}/asked --out {{out}}/{place}/eval"
        return f"evaluate --model {model} --data {study['test']} {plain} {kls}"

    def add(name, seed, prefix, kl, student, flags):
        place = name if seed is None else f"{name}_{seed}"
        train = f"train --prefix {prefix} --kl {kl} --student {student} {sources[prefix]} {flags}"
        more = f"--log_every 10 --seed {seed or 42} {sampled} {study['passes']}"
        commands = [f"{train} {more} --out {{out}}/{place}", measure(place, f"{{out}}/{place}/final")]
        jobs[place] = Job(commands, name, seed, place)

    if study["start"]:
        add("start", None, "teacher", "forward", study["student"], study["start"])
    else:
        jobs["start"] = Job([measure("start", study["student"])], "start", None, "base")
    start = "{out}/start/final" if study["start"] else study["student"]
    for seed in study["seeds"]:
        for cell in CELLS:
            add(cell, seed, *cell.split("_"), start, study["cell"])
    return jobs


def write_problems(args):
    """data/train.jsonl and data/test.jsonl below --out, each problem with the instruction to reason."""
    for name, data, count in (("train", args.data, 2000), ("test", args.test, 64)):
        path = f"{args.out}/data/{name}.jsonl"
        if not os.path.isfile(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            rows = load_problems(data, count)
            asked = [row["problem"] + SUFFIX for row in rows]
            rows = [{"id": i, "problem": asked[i], "answer": row["answer"]} for i, row in enumerate(rows)]
            with open(path, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)


def run(args):
    if args.study == "smollm2":
        write_problems(args)
    jobs, results = make_jobs(STUDIES[args.study]), read_results(args.results)
    check_flags(args.results, results, jobs)
    missing = [place for place, job in jobs.items() if job.name and place not in results]
    print(f"{len(results)} results, {len(missing)} to come", flush=True)
    for place in work(with_needs(jobs, missing), jobs, results, args.out, args.workers):
        if jobs[place].name and place not in results:
            append(args.results, collect(jobs, place, args.out))


# ----------------------------------------------------------------------------------------------------------
# Results


def collect(jobs, place, out):
    """What is kept of a run: sums for each test problem, and means by position."""
    meta = read_artifact(f"{out}/{jobs[place].run}", "--out", "train")
    tokens = read_artifact(f"{out}/{place}/eval", "--out", "evaluate")["args"]["max_response_tokens"]
    found = json.load(open(f"{out}/{place}/eval/results.json"))
    samples = [row for _, row in read_jsonl(f"{out}/{place}/eval/samples.jsonl")]
    rows = [row for _, row in read_jsonl(f"{out}/{place}/eval/kl.jsonl")]
    ids = list(dict.fromkeys(row["id"] for row in samples))
    by_id = lambda rows: [[row for row in rows if row["id"] == id] for id in ids]
    assert all(kl["plain_samples"] for kl in found["kl"].values()), f"{place}: no KL of whole responses"
    origin, entry = provenance(), {"name": jobs[place].name, "seed": jobs[place].seed}
    entry |= {"id": identity(jobs, place), "flags": shlex.join(meta["argv"]), "commit": meta["commit"]}
    entry |= {"device": origin["device"], "torch": origin["versions"]["torch"]}
    entry |= {"tflops": rounded(found["tflops"]), "start": weights_digest(meta["args"]["student"])}
    entry |= {"n": found["n"], "by_position": {}, "sums": {}} | {half: {} for half in HALVES}
    entry["correct"] = "".join(str(sum(row["correct"] for row in group)) for group in by_id(samples))
    entry["cut"] = "".join(
        str(sum(row["finish_reason"] == "length" for row in group)) for group in by_id(samples)
    )
    entry["tokens"] = " ".join(str(sum(row["tokens"] for row in group)) for group in by_id(samples))
    entropies = [sum(row["entropy"] * row["tokens"] for row in group) for group in by_id(samples)]
    entry["entropy"] = " ".join(f"{value:.1f}" for value in entropies)
    for prefix, who in OWN.items():
        kl, groups = found["kl"][prefix], by_id([row for row in rows if row["prefix"] == prefix])
        entry["by_position"][who] = {name: [rounded(x) for x in kl[f"{name}_by_position"]] for name in KLS}
        entry["by_position"][who] |= {"bin": kl["bin"], "responses": kl["responses_by_position"]}
        middle = tokens // 2 // kl["bin"]  # bins of the earlier half
        for name in KLS:
            part = lambda rows, first, last: round(sum(sum(row[name][first:last]) for row in rows), 2)
            entry["sums"][f"{who}_{name}"] = [[part(g, 0, None) for g in groups], [len(g) for g in groups]]
            for half, first, last in (("early", 0, middle), ("late", middle, None)):
                counts = [sum(in_bins(row["tokens"], kl["bin"], first, last) for row in g) for g in groups]
                entry[half][f"{who}_{name}_by_token"] = [[part(g, first, last) for g in groups], counts]
    return entry


def in_bins(tokens, width, first, last):
    """How many of so many tokens are in the bins from `first` to before `last` (None: the end)."""
    end = tokens if last is None else min(tokens, last * width)
    return max(0, end - first * width)


def report(path):
    if not os.path.isfile(path):
        refuse(f"--report {path}: no such file")
    found, results = {}, read_results(path)
    for place, result in results.items():
        if not {*HALVES} <= result.keys():
            refuse(f"--report {path}: {place} is no result of this study")
        found.setdefault(result["name"], {})[result["seed"]] = result
        for half in HALVES:
            of_half = result[half]
            taught = {f"own_{kl}_by_token": of_half[f"teacher_{kl}_by_token"] for kl in KLS}
            for name, sums in ((half, of_half), (f"{half} taught", taught)):
                found.setdefault(f"{result['name']} {name}", {})[result["seed"]] = result | {"sums": sums}
    starts = {result["start"] for result in results.values() if result["seed"] and "start" in result}
    if len(starts) > 1:
        refuse(f"{path}: its cells start from students of {len(starts)} machines, which differ; remove some")
    tables = []
    for head, claims in (("expected", CLAIMS), ("looked at afterwards", AFTERWARDS)):
        lines = [[head, "metric", "difference [95%]", "each seed", "verdict"], ["---"] * 5]
        for text, metric, terms in claims:
            one = difference(found, terms, metric)
            lines.append([text, metric, *signed(one), verdict(one)])
        tables.append(markdown(lines))
    metrics = ["own_rkl", "own_fkl", "teacher_fkl", "teacher_rkl", "entropy", "length", "truncated", "avg"]
    table = [["run", *metrics], ["---"] * (len(metrics) + 1)]
    for name in ["start", *CELLS]:
        values = [difference(found, {name: 1}, metric) for metric in metrics]
        cells = [
            "" if one is None else f"{one.mean:.3f} [{max(one.low, 0):.3f}, {one.high:.3f}]" for one in values
        ]
        table.append([name, *cells])
    count = f"{len(results)} results of {os.path.basename(path)}."
    text = "\n\n".join([count, *tables, markdown(table)]) + "\n"
    with open(path.removesuffix(".jsonl") + ".md", "w", encoding="utf-8") as file:
        file.write(text)
    print(text)
    draw(path.removesuffix(".jsonl") + ".png", found)


def draw(path, found):
    """Both KLs by position, on own responses and on the teacher's: means over seeds. Bars: 95% intervals of
    the means of the earlier and of the later half."""
    fig, axes = subplots(2, 2, 2.8, sharex=True, sharey="row")
    kinds = [{"prefix": None, "kl": None}, *(dict(zip(("prefix", "kl"), cell.split("_"))) for cell in CELLS)]
    runs = {name: style | {"markersize": 0} for name, style in zip(["start", *CELLS], line_styles(kinds))}
    for row, (kl, title) in zip(axes, {"rkl": "KL(student‖teacher)", "fkl": "KL(teacher‖student)"}.items()):
        for axis, (who, where) in zip(
            row, {"own": "own responses", "teacher": "the teacher's responses"}.items()
        ):
            for place, (name, style) in enumerate(runs.items()):
                label = name if name == "start" else "{} prefix, {} KL".format(*name.split("_"))
                curves = [entry["by_position"][who] for entry in found.get(name, {}).values()]
                if not curves:
                    continue
                counts = [curve.get("responses", [1] * len(curve[kl])) for curve in curves]
                count = min(sum(some >= REACHED * row[0] for some in row) for row in counts)
                means = [sum(curve[kl][i] for curve in curves) / len(curves) for i in range(count)]
                width = curves[0]["bin"]
                axis.plot([(i + 0.5) * width for i in range(count)], means, **style, label=label)
                for half, middle in zip(HALVES, (0.25, 0.75)):
                    this = difference(found, {f"{name} {half}": 1}, f"{who}_{kl}_by_token")
                    at = middle * len(curves[0][kl]) * width + 1.5 * (place - 2)
                    interval(axis, style["color"], at, this, upright=True, filled=style["linestyle"] != "--")
            axis.set(
                title=f"{title}, {where}", xlabel="position in the response (tokens)", ylabel="nats a token"
            )
    save(fig, path, axes[0][0])


def main(args):
    if args.report:
        return report(args.report)
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends the forks too
    run(args)


if __name__ == "__main__":
    main(get_args())
