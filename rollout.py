"""Sample responses to problems from a teacher or a student, with vLLM, transformers, or a vLLM server.

    problems  ->  rollouts/rollouts.jsonl, rollouts/tokenizer/, rollouts/meta.json

    python rollout.py --model Qwen/Qwen3-4B --data deepscaler --max_response_tokens 4096 --out out/rollouts

Each response is a row: id, sample, prompt_ids, response_ids, response, finish_reason, answer. The token ids
are the truth: no later stage tokenises text again. finish_reason is "stop" if response_ids ends with a stop
token, and "length" if --max_response_tokens truncated the response.

--drop keeps what is not worth learning from out of a cold start: faulty responses are sampled again, up to
--attempts times in all, and then dropped (arXiv 2604.13016 and its code).
"""

import functools
import os
from collections import Counter, defaultdict
from concurrent.futures import FIRST_COMPLETED, wait

from tqdm import tqdm

from distil import flags
from distil.artifacts import add_output_flags, check_out, run_stage, start_artifact, stop, stop_requested
from distil.jsonl import GrowingFile
from distil.models import Response, default_dtype, load_model
from distil.problems import add_problem_flags, asked
from distil.rollouts import finish_rollouts, write_rollouts
from distil.sampling import add_sampling_flags, derive_seed, load_task, sample_stream, sampling_from
from distil.server import add_server_flags, connect
from distil.vllm_engine import load_vllm


def get_args(argv=None):
    parser = flags.stage_parser(__doc__)
    p = parser.add_argument_group("what goes in")
    p.add_argument(
        "--model", type=flags.path, required=True, help="directory or hub id of the model to sample"
    )
    add_problem_flags(p)
    p = parser.add_argument_group("sampling")
    add_sampling_flags(p, more=["server"])
    add_server_flags(p, "server")
    dtypes = ["float32", "bfloat16", "float16"]
    p.add_argument("--dtype", choices=dtypes, default=default_dtype(), help="dtype of the model")
    p.add_argument("--seed", type=flags.non_negative_int, default=42, help="of data order and sampling")
    p = parser.add_argument_group("filters of a cold start")
    p.add_argument(
        "--drop",
        nargs="+",
        default=[],
        choices=["unboxed", "truncated", "degenerate"],
        help="resample, then drop, responses that have no boxed answer, are truncated, or repeat themselves",
    )
    attempts_help = "with --drop, times a response is sampled before it is dropped"
    p.add_argument("--attempts", type=flags.positive_int, default=3, help=attempts_help)
    add_output_flags(parser)
    args = parser.parse_args(argv)
    if (args.engine == "server") != bool(args.server):
        parser.error("--engine server needs --server, and only it takes one")
    return args


# ----------------------------------------------------------------------------------------------------------
# Filters of a cold start


def is_degenerate(response):
    """Whether a response repeats itself. Any of these is enough:

    - a line of 20 characters or more occurs 5 times
    - 100 characters occur 3 times, among the windows that start at 0, 10, 20, ...
    - in a response of more than 5000 characters, some 50 characters occur 3 times in a row"""
    lines = [line.strip() for line in response.splitlines()]
    long_lines = Counter(line for line in lines if len(line) >= 20)
    if max(long_lines.values(), default=0) >= 5:
        return True
    windows = Counter(response[i : i + 100] for i in range(0, len(response) - 99, 10))
    if max(windows.values(), default=0) >= 3:
        return True
    if len(response) <= 5000:
        return False
    for i in range(len(response) - 149):
        if response[i : i + 50] == response[i + 50 : i + 100] == response[i + 100 : i + 150]:
            return True
    return False


def fault(response, truncated, drop):
    """The first reason in `drop` to reject a response, given as text, or None."""
    for reason in drop:
        if reason == "unboxed" and "\\boxed" not in response:
            return reason
        if reason == "truncated" and truncated:
            return reason
        if reason == "degenerate" and is_degenerate(response):
            return reason
    return None


def judge(args, tokenizer, seed, faults, request, response):
    """A response if it is good; else the Request to sample again, or None after --attempts of them.

    faults: a Counter for each place, of the reasons to reject its problem's responses."""
    text = tokenizer.decode(response.response_ids, skip_special_tokens=True)
    reason = fault(text, response.truncated, args.drop)
    if not reason:
        return response
    faults[request.place][reason] += 1
    if request.attempt == args.attempts:
        faults[request.place]["dropped"] += 1
        return None
    again = derive_seed(derive_seed(seed, "attempt", request.attempt), (request.place, request.index), 0)
    return request._replace(seed=again, attempt=request.attempt + 1)


# ----------------------------------------------------------------------------------------------------------
# A model behind a server

PLAIN = {"min_p": 0, "repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0}


def sample_served(server, config, queue):
    """Yields (Request, Response) as they finish until the queue, to which one may add, is empty."""
    running = {}
    while queue or running:
        queue.sort(key=lambda request: request.place)  # what is sampled again goes first
        while queue and len(running) < server.requests:
            request = queue.pop(0)
            running[server.pool.submit(sample_one, server, config, request)] = request
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            yield running.pop(future), future.result()


def sample_one(server, config, request):
    """A request with a seed of its own: its Response does not depend on the others, but for rounding."""
    body = {name: getattr(config, name) for name in ("temperature", "top_p", "top_k")} | PLAIN
    body |= {"stop_token_ids": config.stop_ids, "ignore_eos": True, "return_token_ids": True}
    body |= {"max_tokens": config.max_response_tokens, "seed": request.seed, "prompt": request.prompt}

    def read(answer):
        [choice] = answer["choices"]
        return choice["token_ids"], max(choice["token_ids"]), choice["finish_reason"]

    tokens, largest, reason = server.ask("/v1/completions", read, **body)
    if largest >= config.vocab_size:
        mask = f"""distil.vllm_mask:PaddingMask --additional-config '{{"vocab_size": {config.vocab_size}}}'"""
        raise server.fail(f"sampled the padding row {largest}; start it with --logits-processors {mask}")
    stopped, limited = tokens[-1] in config.stop_ids, len(tokens) == config.max_response_tokens
    if reason != ("stop" if stopped else "length" if limited else None):
        ended = f"ended a response after {len(tokens)} tokens with {tokens[-1]} ({reason})"
        raise server.fail(f"{ended}; start it with --generation-config vllm")
    return Response(request.prompt, tokens, truncated=not stopped)


# ----------------------------------------------------------------------------------------------------------


def main(args):
    check_out(args)
    make_sampling = functools.partial(sampling_from, args)
    task = load_task(args.model, asked(args), make_sampling, weights=args.engine != "server")
    problems, stop_ids = task.problems, task.sampling.stop_ids
    if args.engine == "vllm":
        machine = args.dtype, args.tensor_parallel, args.gpu_memory_utilization
        engine = load_vllm(task.directory, task.sampling.vocab_size, *machine)
    elif args.engine == "server":
        about = args.model, task.directory, task.sampling.vocab_size
        longest = max(map(len, task.prompts)) + args.max_response_tokens
        limits = args.server_requests, args.server_timeout
        served = connect(args.server, "--server", *about, longest, *limits)
        engine = functools.partial(sample_served, served)
    else:
        engine = load_model(task.directory, "--model", args.dtype)
    start_artifact(args)
    how = f"engine {args.engine}, {args.dtype}, stop ids {stop_ids}"
    print(f"rollout: {len(problems)} problems x {args.n}, {how}")

    path = os.path.join(args.out, "rollouts.jsonl")
    if os.path.isfile(path):  # an earlier run was killed while it was finishing
        os.replace(path, path + ".tmp")
    file = GrowingFile(path + ".tmp", problems=0, faults={})
    done, fault_counts = file.done["problems"], Counter({"dropped": 0} | file.done["faults"])
    seed, places = derive_seed(args.seed, "rollout"), range(done, len(problems))
    ready, faults = {}, defaultdict(Counter)  # of problems that wait for one before them, by their places
    judged = functools.partial(judge, args, task.tokenizer, seed, faults) if args.drop else None
    stream = sample_stream(engine, task.prompts[done:], task.sampling, seed, places, judged)
    with tqdm(total=len(problems), initial=done, unit="problem") as bar:
        for finished in stream:
            ready |= finished
            while done in ready:  # in the order of the problems
                write_rollouts(file, task.tokenizer, [problems[done]], [ready.pop(done)])
                fault_counts.update(faults.pop(done, {}))
                done += 1
            if done > file.done["problems"]:
                file.mark(problems=done, faults=fault_counts)
            bar.update(done - bar.n)
            if stop_requested():
                stop(args)
    model = os.path.realpath(task.directory)
    facts = {"model": model, "stop_ids": stop_ids, "dropped_problems": {"data": task.dropped}}
    finish_rollouts(args, task.tokenizer, fault_counts, args.prompt_suffix, **facts)


if __name__ == "__main__":
    run_stage(main, get_args())
