"""Sample responses to problems with vLLM, transformers or a vLLM server, or take responses that are stored.

    problems  ->  rollouts/rollouts.jsonl, rollouts/tokenizer/, rollouts/meta.json

    python rollout.py --model Qwen/Qwen3-4B --data deepscaler --max_response_tokens 4096 --out out/rollouts
    python rollout.py --model Qwen/Qwen3-4B --responses open-r1/OpenR1-Math-220k --out out/rollouts

Each response is a row: id, sample, prompt_ids, response_ids, response, finish_reason, answer. The token ids
are the truth: no later stage tokenises text again. finish_reason is "stop" if response_ids ends with a stop
token, and "length" if --max_response_tokens truncated the response.

--drop keeps what is not worth learning from out of a cold start: faulty responses are sampled again, up to
--attempts times in all, and then dropped (arXiv 2604.13016 and its code).

--responses takes the place of --data: its rows hold problems and responses as text, which get --model's
prompts and token ids; its weights are not read. docs/data.md has the columns.
"""

import functools
import itertools
import os
from collections import Counter, defaultdict, deque
from concurrent.futures import FIRST_COMPLETED, wait

from tqdm import tqdm

from distil import artifacts, flags, sampling
from distil.jsonl import GrowingFile
from distil.models import Response, context_of, default_dtype, load_model
from distil.problems import add_problem_flags, asked, gold_answer, load_rows, own_id
from distil.prompts import prompt_text, render_prompt, stop_ids
from distil.rollouts import finish_rollouts, listed, write_rollouts
from distil.server import add_server_flags, connect
from distil.vllm_engine import load_vllm


def get_args(argv=None):
    parser = flags.stage_parser(__doc__)
    p = parser.add_argument_group("what goes in")
    model_help = "directory or hub id of the model to sample"
    p.add_argument("--model", type=flags.path, required=True, help=model_help)
    add_problem_flags(p, required=False)
    stored_help = "stored responses, in place of --data: hub id or file"
    p.add_argument("--responses", type=flags.path, help=stored_help)
    p.add_argument("--response_column", default="response", help="else completion, generations, messages")
    p = parser.add_argument_group("sampling")
    sampling.add_sampling_flags(p, more=["server"])
    add_server_flags(p, "server")
    dtypes = ["float32", "bfloat16", "float16"]
    p.add_argument("--dtype", choices=dtypes, default=default_dtype(), help="dtype of the model")
    p.add_argument("--seed", type=flags.non_negative_int, default=42, help="of data order and sampling")
    p = parser.add_argument_group("filters of a cold start")
    faults = ["unboxed", "truncated", "degenerate"]
    drop_help = "resample, then drop, responses that have no boxed answer, are truncated or repeat themselves"
    p.add_argument("--drop", nargs="+", default=[], choices=faults, help=drop_help)
    attempts_help = "with --drop, times a response is sampled before it is dropped"
    p.add_argument("--attempts", type=flags.positive_int, default=3, help=attempts_help)
    artifacts.add_output_flags(parser)
    args = parser.parse_args(argv)
    if bool(args.data) == bool(args.responses):
        parser.error("give --data to sample responses, or --responses to take stored ones")
    if args.data and args.response_column != parser.get_default("response_column"):
        parser.error("--response_column: is for --responses")
    unused = "engine n temperature top_p top_k sample_batch tensor_parallel gpu_memory_utilization attempts"
    for name in f"{unused} dtype seed".split() if args.responses else []:
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name}: nothing is sampled with --responses")
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
    faulty = {"unboxed": lambda: "\\boxed" not in response, "truncated": lambda: truncated}
    faulty["degenerate"] = lambda: is_degenerate(response)
    return next((reason for reason in drop if faulty[reason]()), None)


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
    place, seed = (request.place, request.index), sampling.derive_seed(seed, "attempt", request.attempt)
    return request._replace(seed=sampling.derive_seed(seed, place, 0), attempt=request.attempt + 1)


# ----------------------------------------------------------------------------------------------------------
# Stored responses

ROLES = {"user": ("user", "human"), "assistant": ("assistant", "gpt")}
TURNS = ("messages", "conversations")  # columns of whole conversations


def text_of(content):
    """A text, or those of a list of text parts, {"type": "text", "text"}; None: anything else, or blank."""
    if isinstance(content, list) and all(isinstance(x, dict) and x.get("type") == "text" for x in content):
        texts = [part.get("text") for part in content]
        content = "".join(texts) if all(isinstance(text, str) for text in texts) else None
    return content if isinstance(content, str) and content.strip() else None


def said(value, role):
    """The text_of a value; in turns, {"role", "content"} or {"from", "value"}, of what a role says first."""
    for turn in value if isinstance(value, list) else []:
        if isinstance(turn, dict) and turn.get("role", turn.get("from")) in ROLES[role]:
            return text_of(turn.get("content", turn.get("value")))
    return text_of(value)


def exchange(row, problem_column, response_column):
    """(problem, [responses]) of a row as text; None: no text there. A column of one's own stands alone."""
    problems = ["problem", "question", "prompt", *TURNS] if problem_column == "problem" else [problem_column]
    responses = ["response", "completion", "generations", *TURNS]
    responses = responses if response_column == "response" else [response_column]
    problem, response = (next((row[n] for n in names if row.get(n)), None) for names in (problems, responses))
    several = isinstance(response, list) and any(isinstance(x, str) for x in response)
    found = list(map(text_of, response)) if several else [said(response, "assistant")]
    return said(problem, "user"), found


def stored_rows(args, task, counts):
    """Yields ({"id", "answer", "start"}, prompt ids, [response as text]) of rows; counts what is left out."""
    name, _, rows = load_rows(args.responses, flag="--responses")
    seen, starts = {}, Counter()  # rows that repeat an id go on with its samples, at starts[id]
    for index, (where, row) in enumerate(itertools.islice(rows, args.limit or None)):
        problem, responses = exchange(row, args.problem_column, args.response_column)
        if not problem or not any(responses):
            counts["rows without problem or response"] += 1
            continue
        prompt_ids = render_prompt(task.tokenizer, problem, task.prompting)
        if args.max_prompt_tokens and len(prompt_ids) > args.max_prompt_tokens:
            counts["rows with a longer prompt"] += 1
            continue
        talks = [row[name] for name in ("prompt", *TURNS) if isinstance(row.get(name), list)]
        roles = [turn.get("role", turn.get("from")) for turn in sum(talks, []) if isinstance(turn, dict)]
        counts["system messages left out"] += "system" in roles or bool(row.get("system"))
        counts["rows with more turns, left out"] += sum(role in ROLES["user"] for role in roles) > 1
        counts["responses without text"] += responses.count(None)
        answer = gold_answer(row.get(args.answer_column))
        answer = answer if isinstance(answer, str) else ""
        counts["rows without a text answer"] += not answer
        id, texts = own_id(seen, name, where, row, index, problem), list(filter(None, responses))
        yield {"id": id, "answer": answer, "start": starts[id]}, prompt_ids, texts
        starts[id] += len(texts)


def encode_response(tokenizer, text, end, stops, limit, unfinished):
    """(token ids, whether they are cut). `end`, or the end token written there, follows a finished text."""
    for stop_id in stops:
        written = tokenizer.convert_ids_to_tokens(stop_id)
        if text.rstrip().endswith(written):
            text, end = text.rstrip().removesuffix(written), stop_id
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    if not unfinished:
        ids.append(end)
    return ids[:limit], unfinished or len(ids) > limit


def stored_groups(args, task, rows, counts):
    """Yields (problem, [Response or None]) of stored_rows, and counts what is dropped or else changed."""
    begin = prompt_text(task.tokenizer, "PROBLEM", task.prompting).rpartition("PROBLEM")[2].rstrip()
    opened, context, limit = begin.endswith("<think>"), context_of(task.directory), args.max_response_tokens
    stops, eos = task.sampling.stop_ids, task.tokenizer.eos_token_id
    own = [i for i in stops if i not in args.extra_stop_ids] or stops
    for problem, prompt_ids, texts in rows:
        # what ends the user's turn, such as Gemma's <end_of_turn>, ends the model's too
        end = next(i for i in (*reversed(prompt_ids), eos, *own) if i in own)
        group = []
        for text in texts:
            thinks = text.lstrip().startswith("<think>")
            if thinks and opened:  # it is in the prompt
                text = text.lstrip().removeprefix("<think>").lstrip("\n")
            unfinished = (thinks or opened) and "</think>" not in text and bool(text)
            response_ids, cut = encode_response(task.tokenizer, text, end, stops, limit, unfinished)
            reason = fault(text, cut, args.drop)
            if len(prompt_ids) + len(response_ids) > context:
                reason = f"longer than the context of {context}"
            if max(prompt_ids + response_ids) >= task.sampling.vocab_size:
                reason = "a token without a row in the model"
            if {*stops}.intersection(response_ids[:-1]):  # of a tokenizer that reads unknown text as one
                reason = "an end token inside"
            changes = {"cut": cut, "thinking that never ends, so no end token": unfinished}
            changes["thinks after a prompt that ends thinking"] = thinks and "</think>" in begin
            counts.update([reason] if reason else [name for name, found in changes.items() if found])
            group.append(None if reason else Response(prompt_ids, response_ids, cut))
        yield problem, group


def take_responses(args):
    """--responses: rows with text become the artifact that sampling makes, once all have been read."""
    prompting = asked(args, args.responses).prompting
    about = args.model, args.template_from, prompting
    directory, tokenizer, size = sampling.load_template(*about, weights=False)
    config = sampling.sampling_from(args, size, stop_ids(tokenizer, directory, size))
    task = sampling.Task(directory, tokenizer, [], [], config, 0, prompting)
    counts = Counter()
    bar = tqdm(stored_rows(args, task, counts), desc="check", unit="row")
    rows = iter(bar)
    some = any(any(group) for _, group in stored_groups(args, task, rows, counts))
    deque(rows, maxlen=0)  # reads the rest, so that damage is found before anything is written
    if not some:
        why = f"no response to take ({listed(counts) or 'no rows'})"
        if not bar.n:
            where, first = next(load_rows(args.responses, flag="--responses")[2], ("it", {}))
            has = f"{where} has {', '.join(first) or 'no columns'}"
            why += f"; see --problem_column and --response_column; {has}"
        artifacts.refuse(f"--responses {args.responses}: {why}")
    artifacts.start_artifact(args)
    path, counts = os.path.join(args.out, "rollouts.jsonl"), Counter()
    rows = tqdm(stored_rows(args, task, counts), total=bar.n, unit="row")
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        for problem, group in stored_groups(args, task, rows, counts):
            write_rollouts(file, tokenizer, problem, group, problem["start"])
            if artifacts.stop_requested():
                artifacts.stop(args)
    facts = {"model": os.path.realpath(directory), "stop_ids": config.stop_ids}
    finish_rollouts(args, tokenizer, counts, prompting, **facts)


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
    artifacts.check_out(args)
    if args.responses:
        return take_responses(args)
    make_sampling = functools.partial(sampling.sampling_from, args)
    wanted = asked(args)
    task = sampling.load_task(args.model, wanted, make_sampling, weights=args.engine != "server")
    problems, stops = task.problems, task.sampling.stop_ids
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
    artifacts.start_artifact(args)
    how = f"engine {args.engine}, {args.dtype}, stop ids {stops}"
    print(f"rollout: {len(problems)} problems x {args.n}, {how}")

    path = os.path.join(args.out, "rollouts.jsonl")
    if os.path.isfile(path):  # an earlier run was killed while it was finishing
        os.replace(path, path + ".tmp")
    file = GrowingFile(path + ".tmp", problems=0, faults={})
    done, fault_counts = file.done["problems"], Counter({"dropped": 0} | file.done["faults"])
    seed, places = sampling.derive_seed(args.seed, "rollout"), range(done, len(problems))
    ready, faults = {}, defaultdict(Counter)  # of problems that wait for one before them, by their places
    judged = functools.partial(judge, args, task.tokenizer, seed, faults) if args.drop else None
    stream = sampling.sample_stream(engine, task.prompts[done:], task.sampling, seed, places, judged)
    with tqdm(total=len(problems), initial=done, unit="problem") as bar:
        for finished in stream:
            ready |= finished
            while done in ready:  # in the order of the problems
                write_rollouts(file, task.tokenizer, problems[done], ready.pop(done))
                fault_counts.update(faults.pop(done, {}))
                done += 1
            if done > file.done["problems"]:
                file.mark(problems=done, faults=fault_counts)
            bar.update(done - bar.n)
            if artifacts.stop_requested():
                artifacts.stop(args)
    model = os.path.realpath(task.directory)
    facts = {"model": model, "stop_ids": stops, "dropped_problems": {"data": task.dropped}}
    finish_rollouts(args, task.tokenizer, fault_counts, wanted.prompting, **facts)


if __name__ == "__main__":
    artifacts.run_stage(main, get_args())
