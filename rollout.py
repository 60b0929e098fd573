"""Sample responses to problems from a teacher or a student, with vLLM or transformers.

    problems  ->  rollouts/rollouts.jsonl, rollouts/tokenizer/, rollouts/meta.json

    python rollout.py --model Qwen/Qwen3-4B --data deepscaler --n 1 --max_response_tokens 4096 --out out/rollouts

One row a response: id, sample, prompt_ids, response_ids, response, finish_reason, answer. The token ids are the truth: no
later stage tokenises text again. response_ids ends with the stop token when finish_reason is "stop"; "length" means cut off.

This file also owns sample(), the one way in which any stage samples, on either engine, and how a live vLLM gets new weights.
"""

import argparse
import os
from collections import Counter

from tqdm import tqdm

from distil.artifacts import GrowingFile, add_output_flags, run_stage, start_artifact, stop, stop_requested
from distil.models import default_dtype, load_model
from distil.problems import add_problem_flags
from distil.rollouts import finish_rollouts, write_rollouts
from distil.sampling import add_sampling_flags, derive_seed, prepare, sample
from distil.vllm_engine import load_vllm


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # what goes in
    p.add_argument(
        "--model", required=True, help="Hugging Face directory or hub id of the model that is sampled"
    )
    add_problem_flags(p)
    # how it is sampled
    add_sampling_flags(p, max_response_tokens=4096)
    p.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        default=default_dtype(),
        help="dtype of the model",
    )
    p.add_argument("--seed", type=int, default=42)
    # cold start: what is not worth learning from
    p.add_argument(
        "--drop",
        nargs="+",
        default=[],
        choices=["unboxed", "truncated", "degenerate"],
        help="sample again, and at last drop, responses without a boxed answer, cut off, or that repeat themselves",
    )
    p.add_argument(
        "--attempts",
        type=int,
        default=3,
        help="times a response is sampled, with --drop, before it is dropped",
    )
    # what comes out
    add_output_flags(p)
    args = p.parse_args(argv)
    if args.attempts < 1:
        p.error("--attempts must be at least 1")
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Sampling: an engine is a transformers model (sampled as it is now) or a vLLM LLM


# None where not asked for, and from transformers, which samples from the very weights that are trained


# ---------------------------------------------------------------------------------------------------------------------
# Filters of a cold start (arXiv 2604.13016 and its code)


def is_degenerate(response):
    """Whether a response repeats itself: a line of 20 characters or more five times, 100 characters three times (looked at every 10),
    or, in a response of more than 5000, some 50 characters three times in a row."""
    lines = [line.strip() for line in response.splitlines()]
    windows = [response[i : i + 100] for i in range(0, len(response) - 99, 10)]
    return (
        max(Counter(line for line in lines if len(line) >= 20).values(), default=0) >= 5
        or max(Counter(windows).values(), default=0) >= 3
        or len(response) > 5000
        and any(
            response[i : i + 50] == response[i + 50 : i + 100] == response[i + 100 : i + 150]
            for i in range(len(response) - 149)
        )
    )


def fault(response, finish_reason, drop):
    """The first reason in `drop` that holds for a response, or None."""
    holds = {
        "unboxed": lambda: "\\boxed" not in response,
        "truncated": lambda: finish_reason == "length",
        "degenerate": lambda: is_degenerate(response),
    }
    return next((reason for reason in drop if holds[reason]()), None)


def sample_kept(args, engine, tokenizer, prompts, sampling, seed, counts, first=0):
    """sample(), with faulty responses sampled again up to --attempts times in all; None where no attempt was good. Every faulty
    response is counted by its reason in `counts`, and every slot that was given up as "dropped". first: place of the first prompt."""
    groups = [
        list(group) for group in sample(engine, prompts, sampling, seed, range(first, first + len(prompts)))
    ]
    slots = [(i, j) for i in range(len(prompts)) for j in range(sampling.n)] if args.drop else []
    for attempt in range(1, args.attempts + 1):
        faults = {}
        for i, j in slots:
            response = tokenizer.decode(groups[i][j].response_ids, skip_special_tokens=True)
            faults[i, j] = fault(response, groups[i][j].finish_reason, args.drop)
        slots = [slot for slot in slots if faults[slot]]
        counts.update(faults[slot] for slot in slots)
        if slots and attempt < args.attempts:
            again = sample(
                engine,
                [prompts[i] for i, _ in slots],
                sampling._replace(n=1),
                derive_seed(seed, "attempt", attempt),
                [(first + i, j) for i, j in slots],
            )
            for (i, j), (one,) in zip(slots, again, strict=True):
                groups[i][j] = one
    for i, j in slots:
        groups[i][j] = None
    counts["dropped"] += len(slots)
    return groups


# ---------------------------------------------------------------------------------------------------------------------
# The rollouts artifact


# ---------------------------------------------------------------------------------------------------------------------


def main(args):
    directory, tokenizer, stops, problems, prompts, sampling = prepare(args)
    engine = (
        load_vllm(args, directory) if args.engine == "vllm" else load_model(directory, "--model", args.dtype)
    )
    start_artifact(args)
    print(
        f"rollout: {len(problems)} problems x {args.n}, engine {args.engine}, {args.dtype}, stop ids {stops}"
    )

    # Problems go through in chunks, so that a resumed run repeats at most one.
    chunk = max(1, args.sample_batch // args.n)
    path = os.path.join(args.out, "rollouts.jsonl.tmp")
    if os.path.isfile(path.removesuffix(".tmp")):  # killed while it was finishing
        os.replace(path.removesuffix(".tmp"), path)
    file = GrowingFile(path, problems=0, faults={})
    done, faults = file.done["problems"], Counter(file.done["faults"])
    with tqdm(total=len(problems), initial=done, unit="problem") as bar:
        for start in range(done, len(problems), chunk):
            if stop_requested():
                stop(args)
            rows = slice(start, start + chunk)
            groups = sample_kept(
                args,
                engine,
                tokenizer,
                prompts[rows],
                sampling,
                derive_seed(args.seed, "rollout"),
                faults,
                start,
            )
            write_rollouts(file, tokenizer, problems[rows], prompts[rows], groups)
            file.mark(problems=start + len(prompts[rows]), faults=faults)
            bar.update(len(prompts[rows]))
    finish_rollouts(args, tokenizer, faults, model=os.path.realpath(directory), stop_ids=stops)


if __name__ == "__main__":
    run_stage(main, get_args())
