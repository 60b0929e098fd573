"""Evaluate a checkpoint: Avg@n, Pass@k, response length and predictive entropy; tables and figures over runs.

    checkpoint, problems  ->  eval/results.json, eval/samples.jsonl, eval/meta.json

    python evaluate.py --model out/run/final --data math500 --n 3 --k 1 3 --out out/run/eval
    python evaluate.py --table out/*/eval                       one Markdown table, a row a run
    python evaluate.py --figure out/cells.png --runs out/a out/b    accuracy, entropy and length against step

Avg@n is the mean over problems of the share of correct responses among n. Pass@k is the unbiased estimate of the chance that one
or more of k responses are correct, 1 - C(n-c, k) / C(n, k) with c correct of n (Chen et al. 2021, arXiv 2107.03374). Predictive
entropy is the model's own full-softmax entropy at temperature 1, in nats, averaged over all response tokens it sampled. Defaults:
temperature 0.6, top-p 0.95, 8192 tokens, as the paper evaluates.

This file also owns grading: extract_answer() and is_correct(), which GRPO's reward uses too.
"""
import argparse
import json
import math
import os
import random
import re

import torch
from tqdm import tqdm

from artifacts import add_output_flags, finish_artifact, read_artifact, read_jsonl, refuse, start_artifact, write_json
from inputs import add_problem_flags, default_dtype, load_model
from kernels import linear_streaming_kl
from rollout import add_sampling_flags, derive_seed, load_vllm, prepare, sample
from score_teacher import batches_by_tokens, output_head, response_hidden

EVAL_SAMPLING = {"temperature": 0.6, "top_p": 0.95}  # the paper's, for evaluations in training and after it


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # what to do; without --table or --figure, one model is evaluated
    p.add_argument("--table", nargs="+", metavar="EVAL", help="print one table over these directories that evaluate.py wrote")
    p.add_argument("--figure", metavar="PNG", help="draw the in-training evaluations of --runs")
    p.add_argument("--runs", nargs="+", metavar="RUN", help="directories that train.py or grpo.py wrote with --eval_every")
    # what goes in
    p.add_argument("--model", help="Hugging Face directory or hub id of the model to evaluate")
    add_problem_flags(p, required=False)
    # how
    add_sampling_flags(p, n=4, **EVAL_SAMPLING, max_response_tokens=8192, gpu_memory_utilization=0.6)
    p.add_argument("--k", type=int, nargs="+", help="k of Pass@k, one or more (default: n)")
    p.add_argument("--micro_batch_tokens", type=int, default=16384, help="tokens in one forward pass, padding included")
    p.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default=default_dtype(), help="dtype of the model")
    p.add_argument("--seed", type=int, default=42)
    add_output_flags(p, required=False, resume=False)
    args = p.parse_args(argv)
    if args.figure and not args.runs:
        p.error("--figure needs --runs")
    if not (args.table or args.figure) and not (args.model and args.data and args.out):
        p.error("give --model, --data and --out; or --table; or --figure and --runs")
    args.k = args.k or [args.n]
    if max(args.k) > args.n or min(args.k) < 1:
        p.error(f"--k {' '.join(map(str, args.k))}: Pass@k needs 1 <= k <= n, and --n is {args.n}")
    return args

# ---------------------------------------------------------------------------------------------------------------------
# Grading


def extract_answer(response):
    """The final answer in a response, as text, or None: the content of the last \\boxed{...}, else what follows the last ####.

    extract_answer(r"so \\boxed{3}, no, \\boxed{\\frac{1}{2}}.") -> r"\\frac{1}{2}" """
    start = response.rfind("\\boxed{")
    if start >= 0:
        depth, begin = 0, start + len("\\boxed")
        for end in range(begin, len(response)):
            depth += (response[end] == "{") - (response[end] == "}")
            if depth == 0:
                return response[begin + 1:end].strip()
        return None  # cut off inside the box
    if "####" in response:
        lines = response.rsplit("####", 1)[1].strip().splitlines()
        return lines[0].strip().rstrip(".") if lines else None
    return None


def is_correct(response, answer):
    """Whether the response's final answer equals the gold answer: as text, else by math-verify."""
    found = extract_answer(response)
    if not found:
        return False
    if found == answer:
        return True
    if max(len(found), len(answer)) > 1000:  # no gold answer is this long, and parsing may take for ever
        return False
    from math_verify import parse, verify  # each stops itself after 5 seconds
    found = re.sub(r"(?<=\d)(,|\{,\}|\\,|\\!)(?=\d{3}(\D|$))", "", found)  # 1,234,567 and 1{,}234 are one number; 1,2 is not
    gold, mine = parse(f"\\boxed{{{answer}}}"), parse(f"\\boxed{{{found}}}")
    return bool(gold and mine and verify(gold, mine))

# ---------------------------------------------------------------------------------------------------------------------
# Metrics


def pass_at_k(n, correct, k):
    """Chance that k responses drawn without replacement from n, of which `correct` are right, hold a right one."""
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def interval(values, draws=1000):
    """95% bootstrap interval of the mean of one value a problem."""
    rng = random.Random(0)
    means = sorted(sum(rng.choices(values, k=len(values))) / len(values) for _ in range(draws))
    return [means[int(0.025 * draws)], means[int(0.975 * draws) - 1]]


@torch.no_grad()
def predictive_entropy(model, prompts, responses, vocab_size, micro_batch_tokens):
    """A number for each response: the mean over its tokens of the model's full-softmax entropy (nats, temperature 1)."""
    head, entropies = output_head(model, "--model").detach(), [None] * len(prompts)
    for batch in batches_by_tokens([len(p) + len(r) for p, r in zip(prompts, responses, strict=True)], micro_batch_tokens):
        hidden = response_hidden(model, [prompts[i] for i in batch], [responses[i] for i in batch])
        head = head.to(hidden.dtype)
        entropy = linear_streaming_kl(hidden, head, hidden, head, fkl_weight=1.0, vocab_size=vocab_size).student_entropy
        for i, piece in zip(batch, entropy.split([len(responses[i]) for i in batch])):
            entropies[i] = piece.mean().item()
    return entropies


def evaluate(model, engine, tokenizer, problems, prompts, sampling, seed, ks, micro_batch_tokens):
    """Sample, grade and measure: (results, rows). `engine` samples; `model` gives the entropies (they may be the same)."""
    chunk, rows = max(1, sampling.sample_batch // sampling.n), []
    for start in tqdm(range(0, len(problems), chunk), unit="batch", desc="evaluate", disable=len(problems) <= chunk, leave=False):
        part = slice(start, start + chunk)
        groups = sample(engine, prompts[part], sampling, derive_seed(seed, "evaluate", start))
        for problem, prompt, group in zip(problems[part], prompts[part], groups, strict=True):
            for index, (ids, reason, _) in enumerate(group):
                response = tokenizer.decode(ids, skip_special_tokens=True)
                rows.append({"id": problem["id"], "sample": index, "prompt_ids": prompt, "response_ids": ids, "response": response,
                             "answer": problem["answer"], "extracted": extract_answer(response),
                             "correct": is_correct(response, problem["answer"]), "finish_reason": reason, "tokens": len(ids)})
    entropies = predictive_entropy(model, [row["prompt_ids"] for row in rows], [row["response_ids"] for row in rows],
                                   len(tokenizer), micro_batch_tokens)
    for row, entropy in zip(rows, entropies):
        row["entropy"] = entropy
    return summarise(rows, sampling.n, ks), rows


def summarise(rows, n, ks):
    """Results over graded rows, n of them for each problem, in order."""
    correct = [sum(row["correct"] for row in rows[i:i + n]) for i in range(0, len(rows), n)]
    tokens = sum(row["tokens"] for row in rows)
    average = [c / n for c in correct]
    results = {"problems": len(correct), "n": n, "avg": sum(average) / len(average), "avg_interval": interval(average),
               "pass": {}, "pass_interval": {}, "length": tokens / len(rows),
               "truncated": sum(row["finish_reason"] == "length" for row in rows) / len(rows),
               "entropy": sum(row["entropy"] * row["tokens"] for row in rows) / tokens}
    for k in ks:
        chances = [pass_at_k(n, c, k) for c in correct]
        results["pass"][str(k)] = sum(chances) / len(chances)
        results["pass_interval"][str(k)] = interval(chances)
    return results

# ---------------------------------------------------------------------------------------------------------------------
# Tables and figures


def read_results(path):
    """results.json of a finished evaluation, its checksum verified."""
    read_artifact(path, "--table", "evaluate")
    return json.load(open(os.path.join(path, "results.json")))


def table(paths):
    """Markdown table, a row an evaluation. TFLOPs are those of the run that made the checkpoint, not of its starting point."""
    results = [read_results(path) for path in paths]
    for name in ("data", "problems", "n", "pass"):
        if len({str(list(r[name]) if name == "pass" else r[name]) for r in results}) > 1:
            refuse(f"--table: the evaluations differ in {name}, so their numbers cannot be compared")
    n, ks = results[0]["n"], list(results[0]["pass"])
    header = ["run", "prefix", "KL", f"Avg@{n} [95%]", *[f"Pass@{k}" for k in ks], "length", "cut off", "entropy", "TFLOPs"]
    lines = [header, ["---"] * len(header)]
    for r in results:
        low, high = r["avg_interval"]
        lines.append([r["run"], r["cell"]["prefix"], r["cell"]["kl"], f"{r['avg']:.3f} [{low:.3f}, {high:.3f}]",
                      *[f"{r['pass'][k]:.3f}" for k in ks], f"{r['length']:.1f}", f"{r['truncated']:.1%}", f"{r['entropy']:.3f}",
                      f"{r['tflops']:.4g}" if r["tflops"] else "-"])
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines)


def figure(path, runs):
    """Accuracy, entropy and response length against step, a line a run (as figures 2 to 5 of the paper)."""
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
            axis.plot([row["step"] for row in rows], [row[key] for row in rows], label=meta["cell"]["name"], **style)
            axis.set(xlabel="step", title=label)
            axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    fig.savefig(path, dpi=150)
    plt.close(fig)
    print(f"figure: {path}")

# ---------------------------------------------------------------------------------------------------------------------


def main(args):
    if args.table:
        print(table(args.table))
    if args.figure:
        figure(args.figure, args.runs)
    if args.table or args.figure:
        return
    directory, tokenizer, stops, problems, prompts, sampling = prepare(args)
    model = load_model(directory, "--model", args.dtype)
    engine = load_vllm(args, directory) if args.engine == "vllm" else model
    start_artifact(args)
    print(f"evaluate: {args.model} on {len(problems)} problems x {args.n}, engine {args.engine}, {args.dtype}, stop ids {stops}")
    results, rows = evaluate(model, engine, tokenizer, problems, prompts, sampling, args.seed, args.k, args.micro_batch_tokens)

    checkpoint = os.path.join(directory, "checkpoint.json")  # written by train.py and grpo.py
    origin = {"run": args.model, "cell": {"prefix": "-", "kl": "-"}, "step": None, "tflops": None}
    if os.path.isfile(checkpoint):
        origin = json.load(open(checkpoint))
    results |= {"model": args.model, "data": args.data, **origin}
    with open(os.path.join(args.out, "samples.jsonl"), "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_json(os.path.join(args.out, "results.json"), results)
    finish_artifact(args, "evaluate", ["results.json", "samples.jsonl"], model=os.path.realpath(directory), stop_ids=stops)
    print(f"Avg@{args.n} {results['avg']:.3f}  " + "  ".join(f"Pass@{k} {results['pass'][str(k)]:.3f}" for k in args.k)
          + f"  length {results['length']:.1f}  cut off {results['truncated']:.1%}  entropy {results['entropy']:.3f}")


if __name__ == "__main__":
    main(get_args())
