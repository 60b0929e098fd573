"""Evaluate a checkpoint: Avg@n, Pass@k, Maj@k, length, entropy. Print tables and comparisons, draw figures.

    checkpoint, problems  ->  eval/results.json, eval/samples.jsonl, eval/meta.json   a directory per data set
    with --teacher        ->  eval/kl.jsonl: the KLs between model and teacher along every response
    with --token_details  ->  eval/tokens.jsonl, eval/vocabulary.json: what both say at every token

    python evaluate.py --model out/run/final --data math500 --n 3 --k 1 3 --out out/run/eval
    python evaluate.py --model out/run/final --benchmarks aime24 amc23 math500 gsm8k --out out/run/evals
    python evaluate.py --table out/a/eval out/b/evals           a row per run and data set, then their means
    python evaluate.py --compare out/a out/b                    differences on the same problems and of means
    python evaluate.py --figure out/cells.png --runs out/a out/b --x tflops     evaluations during training
    python evaluate.py --figure out/kl.png --runs out/a/kl out/b/kl --x position      KL along responses
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
import json
import os

import torch
from tqdm import tqdm

from distil import artifacts, evaluation, flags, models
from distil.artifacts import is_finished, read_artifact, refuse
from distil.batches import batches_by_tokens
from distil.evaluation import data_names, interval, mean_of
from distil.jsonl import GrowingFile, finite, read_jsonl
from distil.matching import check_tokenizers
from distil.models import Response, forward
from distil.problems import add_problem_flags, asked
from distil.prompts import load_tokenizer, template_sha256, tokenizer_sha256, vocab_size_of
from distil.rollouts import stored_responses
from distil.sampling import add_sampling_flags, is_plain, load_task, sampling_from
from distil.teacher import live_teacher
from distil.vllm_engine import load_vllm
from reports import details, figure, general, page, tables
from reports.reading import EVAL_CURVES
from streaming_kl import linear_streaming_kl

KL_BINS = 64  # of positions, at most, in which the KLs along responses are shown


def get_args(argv=None):
    parser = flags.stage_parser(__doc__)
    p = parser.add_argument_group("what to show; without any of these, a model is evaluated")
    table_help = "print one table of these evaluations; a run's directory stands for all in it"
    p.add_argument("--table", type=flags.path, nargs="+", metavar="DIR", help=table_help)
    compare_help = "print how the second differs from the first: evaluations, or runs on the same data sets"
    p.add_argument("--compare", type=flags.path, nargs=2, metavar="DIR", help=compare_help)
    p.add_argument("--figure", type=flags.path, metavar="PNG", help="draw curves of --runs")
    p.add_argument("--runs", type=flags.path, nargs="+", metavar="DIR", help="its runs, or its evaluations")
    y_help = "columns of evals.jsonl and metrics.jsonl that --figure draws (default: avg entropy length)"
    p.add_argument("--y", nargs="+", metavar="NAME", help=y_help)
    x_help = "what --figure draws them against; position: the KLs that --teacher has measured"
    p.add_argument("--x", choices=["step", "tflops", "position"], default="step", help=x_help)
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
    teacher_help = "directory or hub id; measure the sequence-level KL to it on the model's responses"
    p.add_argument("--teacher", type=flags.path, help=teacher_help)
    rollouts_help = "measure it on these responses of the teacher, too: a directory written by rollout.py"
    p.add_argument("--rollouts", type=flags.path, help=rollouts_help)
    details_help = "store what both models say at each token of the first responses, N tokens in all"
    p.add_argument("--token_details", type=flags.positive_int, metavar="N", help=details_help)
    dtypes = ["float32", "bfloat16", "float16"]
    p.add_argument("--dtype", choices=dtypes, default=models.default_dtype(), help="dtype of the model")
    p.add_argument("--seed", type=flags.non_negative_int, default=42, help="of data order and sampling")
    artifacts.add_output_flags(parser, required=False)
    args = parser.parse_args(argv)
    if bool(args.figure) != bool(args.runs) or (args.y or args.x != "step") and not args.figure:
        parser.error("--figure and --runs go together; --x and --y are for --figure")
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
    for name in ("rollouts", "token_details"):
        if getattr(args, name) and not args.teacher:
            p.error(f"--{name} needs --teacher")
    if args.rollouts and args.benchmarks:
        p.error("--rollouts: needs --data, for with --benchmarks it would be measured again and again")
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
        check_teacher(models.model_dir(args.teacher, "--teacher"), task)
    if args.rollouts:
        teacher_responses(args, task)
    return task


def check_teacher(directory, task):
    """Refuse a teacher whose ids mean other tokens, or whose context is too short for the responses."""
    tokenizer = load_tokenizer(directory, "--teacher")
    check_tokenizers(tokenizer, "--teacher", tokenizer_sha256(task.tokenizer), "--model")
    vocab_size_of(tokenizer, models.rows_of(directory), "--teacher", task.sampling.vocab_size)
    longest = max(map(len, task.prompts)) + task.sampling.max_response_tokens
    if longest > models.context_of(directory, "--teacher"):
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
        results |= {"teacher": args.teacher, "kl": store_kls(args, model, teacher, task, rows)}
        files.append("kl.jsonl")
    if args.token_details:
        results["token_details"] = details.store_token_details(args, model, teacher, task, rows)
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
    about = task.tokenizer, task.problems, task.prompts, task.sampling, args.seed, args.micro_batch_tokens
    for finished in evaluation.evaluate_problems(model, engine, *about, done=done):
        for rows in finished.values():
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        file.mark(problems=file.done["problems"] + len(finished))
        if artifacts.stop_requested():
            artifacts.stop(args)
    rows = [row for _, row in read_jsonl(path)]
    return sorted(rows, key=lambda row: (places[row["id"]], row["sample"]))


def teacher_responses(args, task):
    """Of --rollouts: (Responses to problems of --data, the number of others, why none are plain samples of
    --teacher, or "")."""
    meta = read_artifact(args.rollouts, "--rollouts", "rollout")
    check_tokenizers(task.tokenizer, "--model", meta["tokenizer_sha256"], "--rollouts")
    if template_sha256(task.tokenizer, task.prompting) != meta["template_sha256"]:
        refuse(f"--rollouts {args.rollouts}: their prompts are not --model's (see --template_from)")
    limits = args.max_response_tokens, models.context_of(task.directory), task.sampling.vocab_size
    stored, ids = stored_responses(args.rollouts, *limits), {problem["id"] for problem in task.problems}
    responses = [response for response in stored if response.id in ids]
    if not responses:
        refuse(f"--rollouts {args.rollouts}: they are responses to other problems than --data {args.data}")
    others = len(stored) - len(responses)
    made = argparse.Namespace(**dict.fromkeys(("temperature", "top_p", "top_k")) | meta["args"])
    now = artifacts.fingerprints(args).get("teacher")  # of a local directory
    teacher = os.path.realpath(models.model_dir(args.teacher, "--teacher"))
    if meta["model"] != teacher or meta["inputs"].get("model") != now:
        return responses, others, f"another model made them, {meta['model']}, or it has changed"
    chosen = [name for name in ("responses", "drop") if getattr(made, name, None)]
    return responses, others, f"made with --{chosen[0]}" if chosen else not_plain(made)


def not_plain(args):
    """Why samples do not come from the model's own distribution, or ""."""
    settings = f"temperature {args.temperature}, top-p {args.top_p}, top-k {args.top_k}"
    return "" if is_plain(args) else settings


def store_kls(args, model, teacher, task, rows):
    """Write kl.jsonl; returns {"student": kl_summary(), "teacher": ...}, by whose responses they are.

    With p the teacher's and q the student's next token behind a prefix s_t of a response, over the whole
    vocabulary at temperature 1, the KLs of whole responses are (arXiv 2605.16826, equations 3 and 2)

        KL(q || p) = E_{y ~ q} sum_t KL(q(.|s_t) || p(.|s_t))    the mean rkl of the student's responses
        KL(p || q) = E_{y ~ p} sum_t KL(p(.|s_t) || q(.|s_t))    the mean fkl of the teacher's

    if these are plain samples: temperature 1, no top-p, no top-k. Cut responses count as far as they go."""
    own = [Response(row["prompt_ids"], row["response_ids"], False, row["id"]) for row in rows]
    sources = {"student": (own, 0, not_plain(args))}
    if args.rollouts:
        sources["teacher"] = teacher_responses(args, task)
    summaries = {}
    with open(os.path.join(args.out, "kl.jsonl"), "w", encoding="utf-8") as file:
        for prefix, (responses, others, why_not) in sources.items():
            kls = token_kls(args, model, teacher, responses, task.sampling.vocab_size)
            width = -(-max(len(r.response_ids) for r in responses) // KL_BINS)  # positions in a bin
            kls = [[[part.sum().item() for part in one.split(width)] for one in kl] for kl in kls]
            for r, (fkl, rkl) in zip(responses, kls, strict=True):
                row = {"prefix": prefix, "id": r.id, "tokens": len(r.response_ids), "fkl": fkl, "rkl": rkl}
                file.write(json.dumps(finite(row, f"--teacher, a response to {r.id}")) + "\n")
            summary = kl_summary(responses, kls, width)
            sums = f"reverse {summary['sequence_rkl']:.4g}, forward {summary['sequence_fkl']:.4g} nats"
            notes = f"; {others} responses to other problems left out" * bool(others)
            notes += f"; no KL of whole responses, no plain samples: {why_not}" * bool(why_not)
            print(f"sums of the KL along the {prefix}'s responses: {sums}{notes}", flush=True)
            summaries[prefix] = {"plain_samples": not why_not, "bin": width} | summary
    return summaries


@torch.no_grad()
def token_kls(args, model, teacher, responses, vocab_size):
    """Of each Response (2, T): KL(p || q) and KL(q || p) where its tokens are predicted, in nats, float64."""
    kls = {}
    batches = batches_by_tokens([r.length for r in responses], args.micro_batch_tokens)
    for indices in tqdm(batches, desc="KL", unit="batch", leave=False):
        batch = [responses[i] for i in indices]
        student, signal = forward(model, batch, vocab_size), teacher.signal(batch)
        out = linear_streaming_kl(*student, signal.hidden, signal.head, fkl_weight=1.0)
        kl = torch.stack([out.fkl, out.rkl]).double().cpu()  # (2, N)
        kls |= zip(indices, kl.split([len(r.response_ids) for r in batch], 1))
        if artifacts.stop_requested():
            artifacts.stop(args)
    return [kls[i] for i in range(len(responses))]


def kl_summary(responses, kls, width):
    """Means of both KLs over responses, over tokens, and by position, with 95% intervals over problems.

    kls: of each response [fkl, rkl], lists of sums over `width` tokens. At a late position both the mean and
    its interval are of the problems with a response that long."""
    places = {id: i for i, id in enumerate(dict.fromkeys(r.id for r in responses))}
    bins = max(len(fkl) for fkl, _ in kls)
    sums = torch.zeros(2, len(places), bins, dtype=torch.float64)
    tokens, counts = torch.zeros(len(places), bins), torch.zeros(len(places))
    for r, kl in zip(responses, kls, strict=True):
        sums[:, places[r.id], : len(kl[0])] += torch.tensor(kl, dtype=torch.float64)
        tokens[places[r.id]] += (len(r.response_ids) - width * torch.arange(bins)).clamp(0, width)
        counts[places[r.id]] += 1
    reach = [sum(len(r.response_ids) > i * width for r in responses) for i in range(bins)]
    found = {"responses": len(responses), "responses_by_position": reach}
    for name, by_bin in zip(("fkl", "rkl"), sums):
        for unit, weights in {"sequence": counts, "token": tokens.sum(1)}.items():
            one = by_bin.sum(1).tolist(), weights.tolist()
            found |= {f"{unit}_{name}": mean_of(*one), f"{unit}_{name}_interval": interval(*one)}
        columns = [(v[t > 0].tolist(), t[t > 0].tolist()) for v, t in zip(by_bin.T, tokens.T)]
        found[f"{name}_by_position"] = [mean_of(*column) for column in columns]
        found[f"{name}_by_position_interval"] = [interval(*column) for column in columns]
    return found


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
    if args.figure and args.x == "position":
        figure.figure_by_position(args.figure, args.runs, args.y or ["rkl", "fkl"])
    elif args.figure:
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
    model = models.load_model(directory, "--model", args.dtype)
    models.check_head(model, "--model")
    teacher = None
    if args.teacher:
        teacher = live_teacher(models.model_dir(args.teacher, "--teacher"), args.dtype, size)
    engine = model
    if args.engine == "vllm":
        machine = args.dtype, args.tensor_parallel, args.gpu_memory_utilization
        engine = load_vllm(directory, size, *machine)
    for one, task in todo:
        evaluate_data_set(one, model, engine, task, origin, teacher)


if __name__ == "__main__":
    artifacts.run_stage(main, get_args())
