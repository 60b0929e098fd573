"""Evaluate a checkpoint: Avg@n, Pass@k, Maj@k, length, entropy. Print tables and comparisons, draw figures.

    checkpoint, problems  ->  eval/results.json, eval/samples.jsonl, eval/meta.json   a directory per data set
    with --token_details  ->  eval/tokens.jsonl, eval/vocabulary.json: student and teacher at every token

    python evaluate.py --model out/run/final --data math500 --n 3 --k 1 3 --out out/run/eval
    python evaluate.py --model out/run/final --benchmarks aime24 amc23 math500 gsm8k --out out/run/evals
    python evaluate.py --table out/a/eval out/b/evals           a row per run and data set, then their means
    python evaluate.py --compare out/a out/b                    differences on the same problems and of means
    python evaluate.py --figure out/cells.png --runs out/a out/b --x tflops     evaluations during training
    python evaluate.py --figure out/k.png --runs out/a out/b --y pass@4 overlap_ratio    columns of the logs
    python evaluate.py --report out/report.html out/a out/b     one page: table, curves, responses

Avg@n    mean over problems of the share of correct responses among n
Pass@k   chance that at least one of k responses is correct, without bias from n of which c are correct:
         1 - C(n-c, k) / C(n, k)  (Chen et al. 2021, arXiv 2107.03374)
Maj@k    chance that the most frequent answer among k of the n responses is correct; equal answers are one
         answer, ties are broken at random
entropy  of the model's full softmax at temperature 1, in nats, averaged over all response tokens it sampled

Intervals are 95% bootstrap intervals over problems. Defaults: temperature 0.6, top-p 0.95, 8192 tokens, as
in the paper. docs/grading.md says what is correct, docs/metrics.md what the files hold.
"""

import argparse
import functools
import itertools
import json
import os

from distil import artifacts, evaluation, flags
from distil.artifacts import is_finished, refuse
from distil.batches import batches_by_tokens
from distil.evaluation import data_names
from distil.jsonl import GrowingFile, finite, read_jsonl
from distil.models import Response, check_head, context_of, default_dtype, load_model, model_dir, rows_of
from distil.preflight import check_tokenizers
from distil.problems import add_problem_flags, asked
from distil.prompts import load_tokenizer, template_sha256, tokenizer_sha256, vocab_size_of
from distil.sampling import add_sampling_flags, load_task, sampling_from
from distil.teacher import live_teacher
from distil.vllm_engine import load_vllm
from reports import figure, general, page, tables
from reports.reading import EVAL_CURVES

TOP = 5  # likeliest tokens of both models that --token_details stores


def get_args(argv=None):
    parser = flags.stage_parser(__doc__)
    p = parser.add_argument_group("what to show; without any of these, a model is evaluated")
    table_help = "print one table of these evaluations; a run's directory stands for all in it"
    p.add_argument("--table", type=flags.path, nargs="+", metavar="DIR", help=table_help)
    compare_help = "print how the second differs from the first: evaluations, or runs on the same data sets"
    p.add_argument("--compare", type=flags.path, nargs=2, metavar="DIR", help=compare_help)
    p.add_argument("--figure", type=flags.path, metavar="PNG", help="draw curves of --runs")
    p.add_argument("--runs", type=flags.path, nargs="+", metavar="RUN", help="of train.py and grpo.py")
    y_help = "columns of evals.jsonl and metrics.jsonl that --figure draws (default: avg entropy length)"
    p.add_argument("--y", nargs="+", metavar="NAME", help=y_help)
    p.add_argument("--x", choices=["step", "tflops"], default="step", help="what --figure draws them against")
    report_help = "write an HTML page, the first path, about evaluations and runs, the others"
    p.add_argument("--report", type=flags.path, nargs="+", metavar="PATH", help=report_help)
    p = parser.add_argument_group("what goes in")
    p.add_argument("--model", type=flags.path, help="directory or hub id of the model to evaluate")
    add_problem_flags(p, required=False)
    benchmarks_help = "several data sets, each as --data; --out/NAME gets it"
    p.add_argument("--benchmarks", type=flags.path, nargs="+", metavar="DATA", help=benchmarks_help)
    p = parser.add_argument_group("sampling and measuring")
    add_sampling_flags(
        p, n=None, **evaluation.EVAL_SAMPLING, max_response_tokens=8192, gpu_memory_utilization=0.6
    )
    p.add_argument("--k", type=flags.positive_int, nargs="+", help="k of Pass@k and Maj@k (default: n)")
    tokens_help = "tokens in one forward pass"
    p.add_argument("--micro_batch_tokens", type=flags.positive_int, default=16384, help=tokens_help)
    p.add_argument("--teacher", type=flags.path, help="directory or hub id, for --token_details")
    details_help = "store what both models say at each token of the first responses, N tokens in all"
    p.add_argument("--token_details", type=flags.positive_int, metavar="N", help=details_help)
    dtypes = ["float32", "bfloat16", "float16"]
    p.add_argument("--dtype", choices=dtypes, default=default_dtype(), help="dtype of the model")
    p.add_argument("--seed", type=flags.non_negative_int, default=42, help="of data order and sampling")
    artifacts.add_output_flags(parser, required=False)
    args = parser.parse_args(argv)
    if bool(args.figure) != bool(args.runs) or args.y and not args.figure:
        parser.error("--figure and --runs go together; --y is for --figure")
    if args.report and len(args.report) < 2:
        parser.error(f"--report {args.report[0]}: needs a page, then directories of evaluations or runs")
    if not (args.table or args.compare or args.figure or args.report):
        check_evaluation_flags(parser, args)
    return args


def check_evaluation_flags(p, args):
    if not (args.model and (args.data or args.benchmarks) and args.out):
        others = "--table, --compare, --report, or --figure and --runs"
        p.error(f"give --model, --data or --benchmarks, and --out; or {others}")
    if args.data and args.benchmarks:
        p.error("--data and --benchmarks: give one of them")
    if bool(args.teacher) != bool(args.token_details):
        p.error("--teacher and --token_details: give both or neither")
    benchmarks = args.benchmarks or []
    if len({*data_names(benchmarks).values()}) < len(benchmarks):
        p.error(f"--benchmarks {' '.join(benchmarks)}: one of them is given twice")
    for one in evaluations_of(args):
        if max(one.k) > one.n:
            ks = " ".join(map(str, one.k))
            p.error(f"--k {ks}: needs k <= n, and n is {one.n} for {one.data} (see --n)")


def evaluations_of(args):
    """The flags of each single evaluation, --data or one of --benchmarks, with its own data, n, k and out."""
    for data, name in data_names(args.benchmarks or [args.data]).items():
        n = evaluation.PAPER_N.get(data_names([data])[data], 4) if args.n is None else args.n
        out = os.path.join(args.out, name) if args.benchmarks else args.out
        yield argparse.Namespace(**vars(args) | {"data": data, "n": n, "k": args.k or [n], "out": out})


def prepare(args):
    """The Task of one evaluation. Refuses bad flags and input; writes nothing."""
    artifacts.check_out(args)
    make_sampling = functools.partial(sampling_from, args)
    task = load_task(args.model, asked(args, *(args.benchmarks or [])), make_sampling)
    if args.teacher:
        check_teacher(model_dir(args.teacher, "--teacher"), task)
    return task


def check_teacher(directory, task):
    """Refuse a teacher whose ids mean other tokens, or whose context is too short for the responses."""
    tokenizer = load_tokenizer(directory, "--teacher")
    check_tokenizers(tokenizer, "--teacher", tokenizer_sha256(task.tokenizer), "--model")
    vocab_size_of(tokenizer, rows_of(directory), "--teacher", task.sampling.vocab_size)
    longest = max(map(len, task.prompts)) + task.sampling.max_response_tokens
    if longest > context_of(directory, "--teacher"):
        refuse(
            f"--teacher {directory}: its context is shorter than the {longest} tokens of prompt and response"
        )
    if tokenizer.chat_template != task.tokenizer.chat_template:
        print("WARNING: --teacher has another chat template than --model, whose prompts it reads here")


def evaluate_data_set(args, model, engine, task, origin, teacher):
    """One data set, from sampling to meta.json; a resumed evaluation keeps the problems that are finished."""
    artifacts.start_artifact(args)
    problems, stops = task.problems, task.sampling.stop_ids
    print(
        f"evaluate: {args.model} on {len(problems)} problems of {args.data} x {args.n}, "
        f"engine {args.engine}, {args.dtype}, stop ids {stops}",
        flush=True,
    )
    path = os.path.join(args.out, "samples.jsonl")
    rows = sample_and_grade(args, model, engine, task, path + ".tmp")
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    results = evaluation.summarise(rows, args.n, args.k) | {"dropped_problems": task.dropped}
    files = ["results.json", "samples.jsonl"]
    if teacher:
        results["token_details"] = store_token_details(args, model, teacher, task, rows)
        files += ["tokens.jsonl", "vocabulary.json"]
    written = results | {"model": args.model, "data": args.data, **origin}
    artifacts.write_json(os.path.join(args.out, "results.json"), written)
    facts = {"template_sha256": template_sha256(task.tokenizer, task.prompting), "stop_ids": stops}
    artifacts.finish_artifact(args, "evaluate", files, model=os.path.realpath(task.directory), **facts)
    print_results(args.data, results)


def sample_and_grade(args, model, engine, task, path):
    """All graded rows, in the order of the problems. The file at `path` keeps those of finished problems."""
    file = GrowingFile(path, problems=0)
    places = {problem["id"]: place for place, problem in enumerate(task.problems)}
    done = {places[row["id"]] for _, row in read_jsonl(path)}
    if done:
        print(f"evaluate: resumes after {len(done)} problems")
    for finished in evaluation.evaluate_problems(
        model,
        engine,
        task.tokenizer,
        task.problems,
        task.prompts,
        task.sampling,
        args.seed,
        args.micro_batch_tokens,
        done=done,
    ):
        for rows in finished.values():
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        file.mark(problems=file.done["problems"] + len(finished))
        if artifacts.stop_requested():
            artifacts.stop(args)
    rows = [row for _, row in read_jsonl(path)]
    return sorted(rows, key=lambda row: (places[row["id"]], row["sample"]))


def store_token_details(args, model, teacher, task, rows):
    """Write tokens.jsonl, of the first responses of up to --token_details tokens, and vocabulary.json."""
    total = len(rows)
    ends = itertools.accumulate(row["tokens"] for row in rows)
    rows = [row for row, end in zip(rows, ends) if end <= args.token_details]
    responses = [Response(row["prompt_ids"], row["response_ids"], False) for row in rows]
    size, ids = task.sampling.vocab_size, set()
    with open(os.path.join(args.out, "tokens.jsonl"), "w", encoding="utf-8") as file:
        for indices in batches_by_tokens([r.length for r in responses], args.micro_batch_tokens):
            batch = [responses[i] for i in indices]
            details = evaluation.token_details(model, teacher, batch, size, min(TOP, size))
            for i, detail in zip(indices, details, strict=True):
                name = {"id": rows[i]["id"], "sample": rows[i]["sample"]}
                file.write(json.dumps(name | finite(detail, f"{name['id']}, sample {name['sample']}")) + "\n")
                ids.update(rows[i]["response_ids"], *detail["student_top_ids"], *detail["teacher_top_ids"])
            if artifacts.stop_requested():
                artifacts.stop(args)
    texts = page.token_texts(task.tokenizer, sorted(ids))
    artifacts.write_json(os.path.join(args.out, "vocabulary.json"), texts)
    print(f"--token_details {args.token_details}: {len(rows)} of {total} responses stored", flush=True)
    return {"responses": len(rows), "left_out": total - len(rows)}


def print_results(name, results):
    words = [f"{name}: Avg@{results['n']} {results['avg']:.3f}"]
    words += [f"Pass@{k} {results['pass'][k]:.3f}  Maj@{k} {results['maj'][k]:.3f}" for k in results["pass"]]
    words += [f"length {results['length']:.1f}", f"truncated {results['truncated']:.1%}"]
    words += [f"entropy {results['entropy']:.3f}", f"grading timed out {results['timed_out']}"]
    print("  ".join(words), flush=True)


# ----------------------------------------------------------------------------------------------------------


def main(args):
    if args.table:
        print(general.tables_of(args.table))
    if args.compare:
        print(tables.compare(args.compare))
    if args.figure:
        figure.figure(args.figure, args.runs, args.y or EVAL_CURVES, args.x)
    if args.report:
        page.write_report(args.report[0], args.report[1:])
    if args.table or args.compare or args.figure or args.report:
        return
    marks = [os.path.join(args.out, name) for name in ("meta.json", "meta.partial.json")]
    if args.benchmarks and any(map(os.path.isfile, marks)):
        refuse(f"--out {args.out}: holds another artifact; --benchmarks needs a directory of its own")
    # bad input is refused before a model is loaded
    todo = [(one, prepare(one)) for one in evaluations_of(args) if not is_finished(one)]
    if not todo:
        return
    directory, size = todo[0][1].directory, todo[0][1].sampling.vocab_size
    origin = evaluation.origin_of(directory, args.model)
    model = load_model(directory, "--model", args.dtype)
    check_head(model, "--model")
    teacher = None
    if args.teacher:
        teacher = live_teacher(model_dir(args.teacher, "--teacher"), args.dtype, size)
    engine = model
    if args.engine == "vllm":
        machine = args.dtype, args.tensor_parallel, args.gpu_memory_utilization
        engine = load_vllm(directory, size, *machine)
    for one, task in todo:
        evaluate_data_set(one, model, engine, task, origin, teacher)


if __name__ == "__main__":
    artifacts.run_stage(main, get_args())
