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
import os

from distil.artifacts import (
    GrowingFile,
    add_output_flags,
    finish_artifact,
    is_finished,
    read_jsonl,
    refuse,
    run_stage,
    start_artifact,
    stop,
    stop_requested,
    write_json,
)
from distil.evaluation import EVAL_SAMPLING, PAPER_N, data_name, evaluate_problems, origin_of, summarise
from distil.models import default_dtype, load_model
from distil.problems import add_problem_flags
from distil.report import compare, figure, table
from distil.sampling import add_sampling_flags, prepare
from distil.vllm_engine import load_vllm


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # what to do; without --table, --compare or --figure, one model is evaluated
    p.add_argument(
        "--table",
        nargs="+",
        metavar="EVAL",
        help="print one table over these directories that evaluate.py wrote",
    )
    p.add_argument(
        "--compare", nargs=2, metavar="EVAL", help="print how the second evaluation differs from the first"
    )
    p.add_argument("--figure", metavar="PNG", help="draw the in-training evaluations of --runs")
    p.add_argument(
        "--runs",
        nargs="+",
        metavar="RUN",
        help="directories that train.py or grpo.py wrote with --eval_every",
    )
    p.add_argument("--x", choices=["step", "tflops"], default="step", help="what --figure draws them against")
    # what goes in
    p.add_argument("--model", help="Hugging Face directory or hub id of the model to evaluate")
    add_problem_flags(p, required=False)
    p.add_argument(
        "--benchmarks",
        nargs="+",
        metavar="DATA",
        help="several data sets, each as --data; --out/NAME gets it",
    )
    # how
    add_sampling_flags(p, n=None, **EVAL_SAMPLING, max_response_tokens=8192, gpu_memory_utilization=0.6)
    p.add_argument("--k", type=int, nargs="+", help="k of Pass@k and Maj@k, one or more (default: n)")
    p.add_argument(
        "--micro_batch_tokens", type=int, default=16384, help="tokens in one forward pass, padding included"
    )
    p.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        default=default_dtype(),
        help="dtype of the model",
    )
    p.add_argument("--seed", type=int, default=42)
    add_output_flags(p, required=False)
    args = p.parse_args(argv)
    if args.figure and not args.runs:
        p.error("--figure needs --runs")
    if not (args.table or args.compare or args.figure):
        if not (args.model and (args.data or args.benchmarks) and args.out):
            p.error(
                "give --model, --data or --benchmarks, and --out; or --table; or --compare; or --figure and --runs"
            )
        if args.data and args.benchmarks:
            p.error("--data and --benchmarks: give one of them")
        names = [data_name(data) for data in args.benchmarks or []]
        if len(set(names)) < len(names):
            p.error(f"--benchmarks {' '.join(args.benchmarks)}: two of them would have the same name")
        for part in parts(args):
            if max(part.k) > part.n or min(part.k) < 1:
                p.error(
                    f"--k {' '.join(map(str, part.k))}: needs 1 <= k <= n, and n is {part.n} for {part.data} (see --n)"
                )
    return args


def parts(args):
    """The flags of each single evaluation: one for --data, one for each of --benchmarks, with its own n, k and --out."""
    for data in args.benchmarks or [args.data]:
        n = PAPER_N.get(data_name(data), 4) if args.n is None else args.n
        out = os.path.join(args.out, data_name(data)) if args.benchmarks else args.out
        yield argparse.Namespace(**vars(args) | {"data": data, "n": n, "k": args.k or [n], "out": out})


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


# ---------------------------------------------------------------------------------------------------------------------
# Tables and figures


# ---------------------------------------------------------------------------------------------------------------------


def evaluate_part(args, model, engine, prepared):
    """One data set, from sampling to meta.json; what a killed evaluation left of it is kept."""
    directory, tokenizer, stops, problems, prompts, sampling = prepared
    origin = origin_of(args, directory)
    start_artifact(args)
    print(
        f"evaluate: {args.model} on {len(problems)} problems of {args.data} x {args.n}, engine {args.engine}, {args.dtype}, "
        f"stop ids {stops}",
        flush=True,
    )
    path = os.path.join(args.out, "samples.jsonl")
    file, places = (
        GrowingFile(path + ".tmp", problems=0),
        {problem["id"]: place for place, problem in enumerate(problems)},
    )
    done = {places[row["id"]] for _, row in read_jsonl(path + ".tmp")}
    if done:
        print(f"evaluate: goes on after {len(done)} problems")
    for found in evaluate_problems(
        model, engine, tokenizer, problems, prompts, sampling, args.seed, args.micro_batch_tokens, done
    ):
        for row in itertools.chain(*found.values()):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.mark(problems=file.done["problems"] + len(found))
        if stop_requested():
            stop(args)
    rows = sorted(
        (row for _, row in read_jsonl(path + ".tmp")), key=lambda row: (places[row["id"]], row["sample"])
    )
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    results = summarise(rows, args.n, args.k)
    write_json(
        os.path.join(args.out, "results.json"), results | {"model": args.model, "data": args.data, **origin}
    )
    finish_artifact(
        args, "evaluate", ["results.json", "samples.jsonl"], model=os.path.realpath(directory), stop_ids=stops
    )
    print(
        f"{data_name(args.data)}: Avg@{args.n} {results['avg']:.3f}  "
        + "  ".join(
            f"Pass@{k} {results['pass'][str(k)]:.3f}  Maj@{k} {results['maj'][str(k)]:.3f}" for k in args.k
        )
        + f"  length {results['length']:.1f}  cut off {results['truncated']:.1%}  entropy {results['entropy']:.3f}"
        f"  grading timed out {results['timed_out']}",
        flush=True,
    )


def main(args):
    if args.table:
        print(table(args.table))
    if args.compare:
        print(compare(args.compare))
    if args.figure:
        figure(args.figure, args.runs, args.x)
    if args.table or args.compare or args.figure:
        return
    if args.benchmarks and any(
        os.path.isfile(os.path.join(args.out, name)) for name in ("meta.json", "meta.partial.json")
    ):
        refuse(f"--out {args.out}: holds another artifact; --benchmarks needs a directory of its own")
    todo = [
        (part, prepare(part)) for part in parts(args) if not is_finished(part)
    ]  # bad input is refused before a model is loaded
    if todo:
        directory = todo[0][1][0]
        model = load_model(directory, "--model", args.dtype)
        engine = load_vllm(args, directory) if args.engine == "vllm" else model
        for part, prepared in todo:
            evaluate_part(part, model, engine, prepared)


if __name__ == "__main__":
    run_stage(main, get_args())
