"""Evaluate a checkpoint: Avg@n, Pass@k, Maj@k, response length and predictive entropy; tables, comparisons and figures.

    checkpoint, problems  ->  eval/results.json, eval/samples.jsonl, eval/meta.json        one directory a data set

    python evaluate.py --model out/run/final --data math500 --n 3 --k 1 3 --out out/run/eval
    python evaluate.py --model out/run/final --benchmarks aime24 amc23 math500 gsm8k --out out/run/evals
    python evaluate.py --table out/a/eval out/b/evals           one Markdown table, a row a run and data set
    python evaluate.py --compare out/a/eval out/b/eval          differences on the same problems, with intervals
    python evaluate.py --figure out/cells.png --runs out/a out/b --x tflops     accuracy, entropy and length over training

Avg@n is the mean over problems of the share of correct responses among n. Pass@k is the unbiased estimate of the chance that one
or more of k responses are correct, 1 - C(n-c, k) / C(n, k) with c correct of n (Chen et al. 2021, arXiv 2107.03374). Maj@k is the
chance that the answer given most often by k of the n responses is correct; equal answers are one answer, ties are drawn. Predictive
entropy is the model's own full-softmax entropy at temperature 1, in nats, averaged over all response tokens it sampled. Intervals
are 95% bootstrap intervals over problems. Defaults: temperature 0.6, top-p 0.95, 8192 tokens, as the paper evaluates.

Grading is in grading.py; extract_answer() and is_correct() can be had from here too.
"""
import argparse
import itertools
import json
import math
import os
import random

import torch
from tqdm import tqdm

import ranks
from artifacts import (GrowingFile, add_output_flags, finish_artifact, is_finished, read_artifact, read_jsonl, refuse, run_stage,
                       start_artifact, stop, stop_requested, write_json)
from grading import extract_answer, grade, is_correct, verdict_on  # noqa: F401 (two are for others to import)
from inputs import add_problem_flags, default_dtype, load_model
from streaming_kl import linear_streaming_kl
from rollout import add_sampling_flags, derive_seed, load_vllm, prepare, sample, sample_as_finished
from score_teacher import batches_by_tokens, output_head, response_hidden

EVAL_SAMPLING = {"temperature": 0.6, "top_p": 0.95}  # the paper's, for evaluations in training and after it
PAPER_N = {"aime24": 5, "amc23": 5, "math500": 3, "gsm8k": 3}  # responses to each problem; 4 for other data
DRAWS = 1000  # of the bootstrap, and at most of the subsets of a vote


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # what to do; without --table, --compare or --figure, one model is evaluated
    p.add_argument("--table", nargs="+", metavar="EVAL", help="print one table over these directories that evaluate.py wrote")
    p.add_argument("--compare", nargs=2, metavar="EVAL", help="print how the second evaluation differs from the first")
    p.add_argument("--figure", metavar="PNG", help="draw the in-training evaluations of --runs")
    p.add_argument("--runs", nargs="+", metavar="RUN", help="directories that train.py or grpo.py wrote with --eval_every")
    p.add_argument("--x", choices=["step", "tflops"], default="step", help="what --figure draws them against")
    # what goes in
    p.add_argument("--model", help="Hugging Face directory or hub id of the model to evaluate")
    add_problem_flags(p, required=False)
    p.add_argument("--benchmarks", nargs="+", metavar="DATA", help="several data sets, each as --data; --out/NAME gets it")
    # how
    add_sampling_flags(p, n=None, **EVAL_SAMPLING, max_response_tokens=8192, gpu_memory_utilization=0.6)
    p.add_argument("--k", type=int, nargs="+", help="k of Pass@k and Maj@k, one or more (default: n)")
    p.add_argument("--micro_batch_tokens", type=int, default=16384, help="tokens in one forward pass, padding included")
    p.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default=default_dtype(), help="dtype of the model")
    p.add_argument("--seed", type=int, default=42)
    add_output_flags(p, required=False)
    args = p.parse_args(argv)
    if args.figure and not args.runs:
        p.error("--figure needs --runs")
    if not (args.table or args.compare or args.figure):
        if not (args.model and (args.data or args.benchmarks) and args.out):
            p.error("give --model, --data or --benchmarks, and --out; or --table; or --compare; or --figure and --runs")
        if args.data and args.benchmarks:
            p.error("--data and --benchmarks: give one of them")
        names = [data_name(data) for data in args.benchmarks or []]
        if len(set(names)) < len(names):
            p.error(f"--benchmarks {' '.join(args.benchmarks)}: two of them would have the same name")
        for part in parts(args):
            if max(part.k) > part.n or min(part.k) < 1:
                p.error(f"--k {' '.join(map(str, part.k))}: needs 1 <= k <= n, and n is {part.n} for {part.data} (see --n)")
    return args


def data_name(data):
    """The short name of an alias, a hub id or a file: "math500" of data/math500.jsonl."""
    return os.path.splitext(os.path.basename(data.split(":")[0]))[0]


def parts(args):
    """The flags of each single evaluation: one for --data, one for each of --benchmarks, with its own n, k and --out."""
    for data in args.benchmarks or [args.data]:
        n = PAPER_N.get(data_name(data), 4) if args.n is None else args.n
        out = os.path.join(args.out, data_name(data)) if args.benchmarks else args.out
        yield argparse.Namespace(**vars(args) | {"data": data, "n": n, "k": args.k or [n], "out": out})

# ---------------------------------------------------------------------------------------------------------------------
# Metrics


def pass_at_k(n, correct, k):
    """Chance that k responses drawn without replacement from n, of which `correct` are right, hold a right one."""
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def majority(classes, correct, k):
    """Chance that the answer given most often by k of the responses is right. classes: for each response the mark of its answer,
    or None; correct: whether it is right. Ties are drawn; where no response has an answer, there is no vote.

    majority([0, 0, 2], [True, True, False], 3) -> 1.0;  majority([0, 1], [True, False], 2) -> 0.5"""
    right = {mark for mark, good in zip(classes, correct) if good}
    subsets = list(itertools.combinations(classes, k))
    if len(subsets) > DRAWS:
        subsets = random.Random(0).sample(subsets, DRAWS)
    chance = 0.0
    for subset in subsets:
        votes = {mark: subset.count(mark) for mark in subset if mark is not None}
        first = [mark for mark, count in votes.items() if count == max(votes.values())]
        chance += sum(mark in right for mark in first) / max(1, len(first))
    return chance / len(subsets)


def resampled(values, weights=None):
    """DRAWS bootstrap means over problems of sum(values) / sum(weights). Equal lengths draw the same problems, so that
    two evaluations can be compared draw by draw."""
    values = torch.tensor(values, dtype=torch.float64)
    weights = torch.ones_like(values) if weights is None else torch.tensor(weights, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    picked = (torch.randint(len(values), (len(values),), generator=generator) for _ in range(DRAWS))
    return torch.stack([values[i].sum() / weights[i].sum() for i in picked])


def middle(draws):
    """The interval that holds the middle 95% of the draws."""
    draws = draws.sort().values.tolist()
    return [draws[int(0.025 * DRAWS)], draws[int(0.975 * DRAWS) - 1]]


def interval(values, weights=None):
    """95% bootstrap interval, over problems, of sum(values) / sum(weights); of the mean without weights."""
    return middle(resampled(values, weights))


@torch.no_grad()
def predictive_entropy(model, prompts, responses, vocab_size, micro_batch_tokens):
    """A number for each response: the mean over its tokens of the model's full-softmax entropy (nats, temperature 1)."""
    entropies, lengths = {}, [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
    for batch, _ in ranks.deal(batches_by_tokens(lengths, micro_batch_tokens)):
        hidden = response_hidden(model, [prompts[i] for i in batch], [responses[i] for i in batch])
        head = output_head(model, "--model").detach().to(hidden.dtype)
        entropy = linear_streaming_kl(hidden, head, hidden, head, fkl_weight=1.0, vocab_size=vocab_size).student_entropy
        for i, piece in zip(batch, entropy.split([len(responses[i]) for i in batch])):
            entropies[i] = piece.mean().item()
    entropies = dict(ranks.gather(list(entropies.items())))
    return [entropies[i] for i in range(len(prompts))]


def evaluate(model, engine, tokenizer, problems, prompts, sampling, seed, ks, micro_batch_tokens):
    """Sample, grade and measure: (results, rows). `engine` samples; `model` gives the entropies (they may be the same)."""
    rows = {}
    for found in evaluate_problems(model, engine, tokenizer, problems, prompts, sampling, seed, micro_batch_tokens):
        rows |= found
    rows = [row for place in range(len(problems)) for row in rows[place]]
    return summarise(rows, sampling.n, ks), rows


def evaluate_problems(model, engine, tokenizer, problems, prompts, sampling, seed, micro_batch_tokens, done=()):
    """Yields {place of a problem: its n graded rows} as problems are done, without those whose places are in `done`. Problems go
    through in chunks that depend on nothing that came before, so what is made again after a kill is the same."""
    size = max(1, sampling.sample_batch // sampling.n) * ranks.count()
    chunks = [[place for place in range(start, min(start + size, len(problems))) if place not in done]
              for start in range(0, len(problems), size)]
    with tqdm(total=len(problems), initial=len(done), unit="problem", desc="evaluate", leave=False,
              disable=len(problems) <= size or ranks.rank() > 0) as bar:
        for todo in filter(None, chunks):
            given = engine, [prompts[place] for place in todo], sampling, derive_seed(seed, "evaluate"), todo
            for groups in sample_as_finished(*given) if ranks.count() == 1 else [dict(enumerate(sample(*given)))]:
                places = [todo[i] for i in groups]
                yield dict(zip(places, grade_groups(model, tokenizer, [problems[place] for place in places],
                                                    [prompts[place] for place in places], groups.values(), micro_batch_tokens)))
                bar.update(len(groups))


def grade_groups(model, tokenizer, problems, prompts, groups, micro_batch_tokens):
    """For each problem the rows of its group of Samples: the response, its verdict and its entropy."""
    groups = [[{"id": problem["id"], "sample": index, "prompt_ids": prompt, "response_ids": ids,
                "response": tokenizer.decode(ids, skip_special_tokens=True), "answer": problem["answer"],
                "finish_reason": reason, "tokens": len(ids)} for index, (ids, reason, *_) in enumerate(group)]
              for problem, prompt, group in zip(problems, prompts, groups, strict=True)]
    rows = [row for group in groups for row in group]
    mine = rows[ranks.mine(len(rows))]
    grades = ranks.gather(grade([row["response"] for row in mine], [row["answer"] for row in mine]))
    entropies = predictive_entropy(model, [row["prompt_ids"] for row in rows], [row["response_ids"] for row in rows],
                                   len(tokenizer), micro_batch_tokens)
    for row, verdict, entropy in zip(rows, grades, entropies, strict=True):
        row |= {**verdict._asdict(), "entropy": entropy}
    for group in groups:
        mark_equal_answers(group)
    return groups


def mark_equal_answers(rows):
    """Gives each response to one problem `same_as`: the first sample with an equal answer; None where there is no answer."""
    for i, row in enumerate(rows):
        equal = (other["sample"] for other in rows[:i] if other["same_as"] == other["sample"] and (
            other["correct"] and row["correct"] or other["correct"] == row["correct"]
            and verdict_on(row["extracted"], other["extracted"]) == "right"))
        row["same_as"] = next(equal, row["sample"]) if row["extracted"] else None


def by_problem(rows, n, ks):
    """{metric: (values, weights or None)}, a value a problem: the metric is the sum of the values over that of the weights, or the
    mean of the values. rows: n graded ones for each problem, in order."""
    groups = [rows[i:i + n] for i in range(0, len(rows), n)]
    assert all(len({row["id"] for row in group}) == 1 and len(group) == n for group in groups), "not n rows a problem"
    correct = [sum(row["correct"] for row in group) for group in groups]
    metrics = {"avg": ([c / n for c in correct], None)}
    for k in ks:
        metrics[f"pass@{k}"] = [pass_at_k(n, c, k) for c in correct], None
        metrics[f"maj@{k}"] = [majority([row["same_as"] for row in group], [row["correct"] for row in group], k)
                               for group in groups], None
    tokens = [sum(row["tokens"] for row in group) for group in groups]
    metrics["length"] = [count / n for count in tokens], None
    metrics["truncated"] = [sum(row["finish_reason"] == "length" for row in group) / n for group in groups], None
    metrics["entropy"] = [sum(row["entropy"] * row["tokens"] for row in group) for group in groups], tokens
    return metrics


def mean_of(values, weights):
    return sum(values) / (len(values) if weights is None else sum(weights))


def summarise(rows, n, ks):
    """Results over graded rows, n of them for each problem, in order: each metric and its interval."""
    results = {"problems": len(rows) // n, "n": n, "pass": {}, "pass_interval": {}, "maj": {}, "maj_interval": {},
               "timed_out": sum(row["timed_out"] for row in rows)}
    for name, (values, weights) in by_problem(rows, n, ks).items():
        kind, _, k = name.partition("@")
        if k:
            results[kind][k], results[f"{kind}_interval"][k] = mean_of(values, weights), interval(values, weights)
        else:
            results[kind], results[f"{kind}_interval"] = mean_of(values, weights), interval(values, weights)
    return results

# ---------------------------------------------------------------------------------------------------------------------
# Tables and figures


def read_results(path, flag):
    """results.json of a finished evaluation, its checksum verified."""
    read_artifact(path, flag, "evaluate")
    return json.load(open(os.path.join(path, "results.json")))


def evaluations_in(path):
    """The path itself, or the evaluations that --benchmarks left in it."""
    inner = sorted(entry.path for entry in os.scandir(path) if entry.is_dir()) if os.path.isdir(path) else []
    return inner if inner and not os.path.isfile(os.path.join(path, "meta.json")) else [path]


def table(paths):
    """Markdown table, a row an evaluation. TFLOPs are those of the run that made the checkpoint, not of its starting point."""
    results = [read_results(inner, "--table") for path in paths for inner in evaluations_in(path)]
    sets = {}  # data set -> the first evaluation on it
    for r in results:
        first = sets.setdefault(r["data"], r)
        for name in ("problems", "n", "pass"):
            if (list(r["pass"]) != list(first["pass"])) if name == "pass" else r[name] != first[name]:
                refuse(f"--table: the evaluations on {r['data']} differ in {name}, so their numbers cannot be compared")
    several = len(sets) > 1
    results.sort(key=lambda r: list(sets).index(r["data"]))
    n = results[0]["n"] if len({r["n"] for r in results}) == 1 else "n"
    ks = sorted({k for r in results for k in r["pass"]}, key=int)
    header = ["run", "prefix", "KL", *["data"] * several, *["n"] * (n == "n"), f"Avg@{n} [95%]", *[f"Pass@{k}" for k in ks],
              *[f"Maj@{k}" for k in ks if k != "1"], "length", "cut off", "entropy", "TFLOPs"]
    lines = [header, ["---"] * len(header)]
    for r in results:
        low, high = r["avg_interval"]
        lines.append([r["run"], r["cell"]["prefix"], r["cell"]["kl"],
                      *[data_name(r["data"])] * several, *[str(r["n"])] * (n == "n"),
                      f"{r['avg']:.3f} [{low:.3f}, {high:.3f}]", *[f"{r['pass'][k]:.3f}" if k in r["pass"] else "-" for k in ks],
                      *[f"{r['maj'][k]:.3f}" if k in r["maj"] else "-" for k in ks if k != "1"], f"{r['length']:.1f}",
                      f"{r['truncated']:.1%}", f"{r['entropy']:.3f}", f"{r['tflops']:.4g}" if r["tflops"] else "-"])
    return markdown(lines)


def markdown(lines):
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines)


def compare(paths):
    """Markdown table of two evaluations of the same problems: each metric, the difference and its paired bootstrap interval."""
    results = [read_results(path, "--compare") for path in paths]
    rows = [[row for _, row in read_jsonl(os.path.join(path, "samples.jsonl"))] for path in paths]
    problems = [list(dict.fromkeys((row["id"], row["answer"]) for row in side)) for side in rows]
    if problems[0] != problems[1]:
        refuse(f"--compare {' '.join(paths)}: they are not evaluations of the same problems")
    ks = [int(k) for k in results[0]["pass"] if k in results[1]["pass"]]
    first, second = (by_problem(side, r["n"], ks) for side, r in zip(rows, results))
    lines = [["metric", *(f"{r['run']} (n = {r['n']})" for r in results), "difference [95%]"], ["---"] * 4]
    for name in first:
        before, after = mean_of(*first[name]), mean_of(*second[name])
        low, high = middle(resampled(*second[name]) - resampled(*first[name]))
        lines.append([name, f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f} [{low:+.3f}, {high:+.3f}]"])
    return markdown(lines)


def figure(path, runs, x):
    """Accuracy, entropy and response length against step or TFLOPs, a line a run (as figures 2 to 5 of the paper)."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    panels = [("avg", "accuracy"), ("entropy", "predictive entropy (nats)"), ("length", "response length (tokens)")]
    fig, axes = plt.subplots(1, len(panels), figsize=(13, 3.8), constrained_layout=True)
    for run in runs:
        meta = read_artifact(run, "--runs", "train", "grpo")
        rows = [row for _, row in read_jsonl(os.path.join(run, "evals.jsonl"))] if "evals.jsonl" in meta["files"] else []
        if not rows:
            refuse(f"--runs {run}: was trained without --eval_every, so there is nothing to draw")
        style = {"color": {"forward": "tab:blue", "reverse": "tab:red"}.get(meta["cell"]["kl"], "tab:green"),
                 "linestyle": {"teacher": "--", "student": "-"}.get(meta["cell"]["prefix"], ":"), "marker": "o", "markersize": 3}
        for axis, (key, label) in zip(axes, panels):
            axis.plot([row[x] for row in rows], [row[key] for row in rows], label=meta["cell"]["name"], **style)
            axis.set(xlabel={"step": "step", "tflops": "TFLOPs"}[x], title=label)
            axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    fig.savefig(path, dpi=150)
    plt.close(fig)
    print(f"figure: {path}")

# ---------------------------------------------------------------------------------------------------------------------


def origin_of(args, directory):
    """Where the model comes from, by the checkpoint.json of train.py and grpo.py: run, cell, step, what was spent."""
    path = os.path.join(directory, "checkpoint.json")
    if not os.path.isfile(path):
        return {"run": args.model, "cell": {"prefix": "-", "kl": "-"}, "step": None, "tflops": None}
    try:
        with open(path, encoding="utf-8") as file:
            origin = json.load(file)
        cell = origin["cell"] | {name: str(origin["cell"][name]) for name in ("prefix", "kl")}
        known = {"run": str(origin["run"]), "cell": cell, "step": int(origin["step"]), "tflops": float(origin["tflops"])}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        refuse(f"--model {args.model}: its checkpoint.json is damaged ({error!r})")
    return {name: value for name, value in origin.items() if name not in ("schema", "sha256", "files")} | known


def evaluate_part(args, model, engine, prepared):
    """One data set, from sampling to meta.json; what a killed evaluation left of it is kept."""
    directory, tokenizer, stops, problems, prompts, sampling = prepared
    origin = origin_of(args, directory)
    start_artifact(args)
    print(f"evaluate: {args.model} on {len(problems)} problems of {args.data} x {args.n}, engine {args.engine}, {args.dtype}, "
          f"stop ids {stops}", flush=True)
    path = os.path.join(args.out, "samples.jsonl")
    file, places = GrowingFile(path + ".tmp", problems=0), {problem["id"]: place for place, problem in enumerate(problems)}
    done = {places[row["id"]] for _, row in read_jsonl(path + ".tmp")}
    if done:
        print(f"evaluate: goes on after {len(done)} problems")
    for found in evaluate_problems(model, engine, tokenizer, problems, prompts, sampling, args.seed, args.micro_batch_tokens, done):
        for row in itertools.chain(*found.values()):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.mark(problems=file.done["problems"] + len(found))
        if stop_requested():
            stop(args)
    rows = sorted((row for _, row in read_jsonl(path + ".tmp")), key=lambda row: (places[row["id"]], row["sample"]))
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    results = summarise(rows, args.n, args.k)
    write_json(os.path.join(args.out, "results.json"), results | {"model": args.model, "data": args.data, **origin})
    finish_artifact(args, "evaluate", ["results.json", "samples.jsonl"], model=os.path.realpath(directory), stop_ids=stops)
    print(f"{data_name(args.data)}: Avg@{args.n} {results['avg']:.3f}  "
          + "  ".join(f"Pass@{k} {results['pass'][str(k)]:.3f}  Maj@{k} {results['maj'][str(k)]:.3f}" for k in args.k)
          + f"  length {results['length']:.1f}  cut off {results['truncated']:.1%}  entropy {results['entropy']:.3f}"
          f"  grading timed out {results['timed_out']}", flush=True)


def main(args):
    if args.table:
        print(table(args.table))
    if args.compare:
        print(compare(args.compare))
    if args.figure:
        figure(args.figure, args.runs, args.x)
    if args.table or args.compare or args.figure:
        return
    if args.benchmarks and any(os.path.isfile(os.path.join(args.out, name)) for name in ("meta.json", "meta.partial.json")):
        refuse(f"--out {args.out}: holds another artifact; --benchmarks needs a directory of its own")
    todo = [(part, prepare(part)) for part in parts(args) if not is_finished(part)]  # bad input is refused before a model is loaded
    if todo:
        directory = todo[0][1][0]
        model = load_model(directory, "--model", args.dtype)
        engine = load_vllm(args, directory) if args.engine == "vllm" else model
        for part, prepared in todo:
            evaluate_part(part, model, engine, prepared)


if __name__ == "__main__":
    run_stage(main, get_args())
