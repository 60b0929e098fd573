"""Sample responses to problems from a teacher or a student, with vLLM or transformers.

    problems  ->  rollouts/rollouts.jsonl, rollouts/tokenizer/, rollouts/meta.json

    python rollout.py --model Qwen/Qwen3-4B --data deepscaler --n 1 --max_response_tokens 4096 --out out/rollouts

One row a response: id, sample, prompt_ids, response_ids, response, finish_reason, answer. The token ids are the truth: no
later stage tokenises text again. response_ids ends with the stop token when finish_reason is "stop"; "length" means cut off.

This file also owns sample(), the one way in which any stage samples, on either engine, and how a live vLLM gets new weights.
"""
import argparse
import hashlib
import json
import os
import sys
import threading
import time
from collections import Counter
from typing import NamedTuple

import torch
from tqdm import tqdm

import ranks
from artifacts import (GrowingFile, add_output_flags, check_out, finish_artifact, read_jsonl, refuse, run_stage, start_artifact,
                       stop, stop_requested)
from inputs import (add_problem_flags, context_of, default_dtype, encode_problems, load_model, load_problems, load_tokenizer,
                    model_dir, stop_ids, template_sha256, tokenizer_sha256)

STALLED_SECONDS = 600  # a vLLM step, a token for each running response, that takes longer never ends


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # what goes in
    p.add_argument("--model", required=True, help="Hugging Face directory or hub id of the model that is sampled")
    add_problem_flags(p)
    # how it is sampled
    add_sampling_flags(p, max_response_tokens=4096)
    p.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default=default_dtype(), help="dtype of the model")
    p.add_argument("--seed", type=int, default=42)
    # cold start: what is not worth learning from
    p.add_argument("--drop", nargs="+", default=[], choices=["unboxed", "truncated", "degenerate"],
                   help="sample again, and at last drop, responses without a boxed answer, cut off, or that repeat themselves")
    p.add_argument("--attempts", type=int, default=3, help="times a response is sampled, with --drop, before it is dropped")
    # what comes out
    add_output_flags(p)
    args = p.parse_args(argv)
    if args.attempts < 1:
        p.error("--attempts must be at least 1")
    return args


def add_sampling_flags(p, n=1, temperature=1.0, top_p=1.0, top_k=0, max_response_tokens=4096, gpu_memory_utilization=0.9):
    """The one set of sampling flags; each stage passes its own defaults."""
    p.add_argument("--engine", choices=["vllm", "hf"], default="vllm" if torch.cuda.is_available() else "hf",
                   help="vLLM, or transformers' generate (default: vllm on a GPU, hf on a CPU)")
    p.add_argument("--n", type=int, default=n, help="responses sampled for each problem")
    p.add_argument("--temperature", type=float, default=temperature, help="0: greedy")
    p.add_argument("--top_p", type=float, default=top_p)
    p.add_argument("--top_k", type=int, default=top_k, help="0: off")
    p.add_argument("--max_response_tokens", type=int, default=max_response_tokens)
    p.add_argument("--extra_stop_ids", type=int, nargs="+", default=[], help="token ids that end a response, besides the model's own")
    p.add_argument("--sample_batch", type=int, default=256, help="responses sampled together")
    p.add_argument("--tensor_parallel", type=int, default=1, help="GPUs that vLLM spreads one model over (not while training)")
    p.add_argument("--gpu_memory_utilization", type=float, default=gpu_memory_utilization, help="vLLM's share of the GPU memory")


def derive_seed(*parts):
    """A 63-bit seed that depends on every part: derive_seed(42, "sample", step)."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1

# ---------------------------------------------------------------------------------------------------------------------
# Sampling: an engine is a transformers model (sampled as it is now) or a vLLM LLM


class Sampling(NamedTuple):
    """What sample() needs to know, the same for both engines. vocab_size: ids from here on are padding, never sampled."""
    n: int
    temperature: float
    top_p: float
    top_k: int
    max_response_tokens: int
    stop_ids: list
    vocab_size: int
    sample_batch: int = 256
    logprobs: bool = False   # whether the sampler's log-probabilities are wanted


class Sample(NamedTuple):
    response_ids: list   # with the stop token, when there is one
    finish_reason: str   # "stop" or "length"
    logps: list = None   # the model's log-probability of each response token as vLLM computed it, at temperature 1 and untruncated;
                         # None where not asked for, and from transformers, which samples from the very weights that are trained


def sampling_from(args, tokenizer, stops, **changes):
    """Sampling of a stage's flags; `changes` replace single fields."""
    fields = {name: getattr(args, name) for name in ("n", "temperature", "top_p", "top_k", "max_response_tokens", "sample_batch")}
    sampling = Sampling(stop_ids=sorted({*stops, *args.extra_stop_ids}), vocab_size=len(tokenizer), **(fields | changes))
    if not all(0 <= i < len(tokenizer) for i in args.extra_stop_ids):
        refuse(f"--extra_stop_ids: the tokenizer has the ids 0 to {len(tokenizer) - 1}")
    if sampling.n < 1 or sampling.max_response_tokens < 1 or sampling.sample_batch < 1:
        refuse("--n, --max_response_tokens and --sample_batch must be at least 1")
    if sampling.temperature < 0 or not 0 < sampling.top_p <= 1 or sampling.top_k < 0:
        refuse("--temperature and --top_k must be at least 0, --top_p in (0, 1]")
    return sampling


def prepare(args):
    """What a stage needs that samples --model on --data: (directory, tokenizer, stop ids, problems, prompts, Sampling)."""
    check_out(args)
    directory, problems = model_dir(args.model, "--model"), load_problems(args.data, args.limit)
    tokenizer = load_tokenizer(directory, "--model")
    stops = stop_ids(tokenizer, directory)
    sampling = sampling_from(args, tokenizer, stops)
    prompts = encode_problems(args, problems, tokenizer, context_of(directory))
    return directory, tokenizer, sampling.stop_ids, problems, prompts, sampling


def load_vllm(args, directory):
    """A vLLM engine in this process, on the GPU or, with the CPU build, on the CPU."""
    settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}
    if not torch.cuda.is_available():  # the CPU build refuses to start without a cache size; the rest is speed
        settings |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCHDYNAMO_DISABLE": "1"}
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    try:
        import vllm
    except ImportError as error:
        refuse(f"--engine vllm: vLLM cannot be imported ({error}); install it as the README says, or use --engine hf")
    more = {} if torch.cuda.is_available() else {  # prompts in one piece: the CPU build cannot seed a request that begins in two
        "enforce_eager": True, "enable_chunked_prefill": False, "max_num_batched_tokens": max(4096, context_of(directory))}
    return vllm.LLM(directory, dtype=args.dtype, max_model_len=context_of(directory), generation_config="vllm",
                    tensor_parallel_size=args.tensor_parallel, gpu_memory_utilization=args.gpu_memory_utilization,
                    distributed_executor_backend="external_launcher" if ranks.count() > 1 else None,  # an engine for each rank
                    **more)


def push_weights(engine, model):
    """Give an engine the model's current weights: a live vLLM, or each rank's whole copy of a model that is cut into pieces; else
    a transformers engine is the model itself and has them."""
    if engine is model:
        return
    weights = ranks.whole_weights(model)
    if isinstance(engine, torch.nn.Module):
        own = engine.state_dict()
        for name, tensor in weights:
            own[name].copy_(tensor)
        return
    engine.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
    engine.reset_prefix_cache()  # cached keys and values belong to the old weights


def sample(engine, prompts, sampling, seed, places=None):
    """prompts: list of lists of token ids -> for each prompt a list of n Samples.

    A sample depends on the model, its prompt, the seed, its prompt's place (`places`; by default 0, 1, ...) and its index among the
    n; but for rounding, it does not depend on what is sampled beside it. So batches, chunks and ranks (which share the prompts out)
    change no result."""
    mine, places, groups = ranks.mine(len(prompts)), range(len(prompts)) if places is None else places, {}
    for found in sample_as_finished(engine, prompts[mine], sampling, seed, places[mine]):
        groups |= found
    return ranks.gather([groups[i] for i in range(len(groups))])


def sample_as_finished(engine, prompts, sampling, seed, places):
    """sample() for one process, which yields {index of a prompt: its n Samples} as prompts are done: from vLLM one after the other,
    from transformers all at the end."""
    requests = [prompt for prompt in prompts for _ in range(sampling.n)]
    seeds = [derive_seed(seed, place, index) for place in places for index in range(sampling.n)]
    generate = sample_hf if isinstance(engine, torch.nn.Module) else sample_vllm
    found = {}  # request: its Sample
    for some in generate(engine, requests, sampling, seeds) if requests else ():
        found |= some
        groups = {i: range(i * sampling.n, (i + 1) * sampling.n) for i in sorted({request // sampling.n for request in some})}
        groups = {i: [found.pop(request) for request in group] for i, group in groups.items() if found.keys() >= {*group}}
        if groups:
            yield groups
    assert not found, found.keys()


def sample_vllm(llm, requests, sampling, seeds):
    import vllm
    from vllm.v1.engine.exceptions import EngineDeadError
    padded = range(sampling.vocab_size, llm.model_config.get_vocab_size())
    common = dict(temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k,
                  max_tokens=sampling.max_response_tokens, stop_token_ids=sampling.stop_ids, ignore_eos=True,  # our stop ids alone
                  logit_bias=dict.fromkeys(padded, -100.0) or None,  # the strongest that vLLM takes
                  logprobs=0 if sampling.logprobs else None, detokenize=False)
    params = [vllm.SamplingParams(seed=seed, **common) for seed in seeds]
    try:
        for outputs in run_vllm(llm, requests, params):
            for output in outputs.values():
                assert output.finish_reason in ("stop", "length"), f"vLLM gave up on a request: {output.finish_reason}"
            yield {i: Sample(list(output.token_ids), output.finish_reason, output.logprobs and [
                candidates[token].logprob for token, candidates in zip(output.token_ids, output.logprobs, strict=True)])
                   for i, output in outputs.items()}
    except (RuntimeError, TimeoutError, EngineDeadError) as error:  # a dead engine, out of memory, a worker that does not answer
        refuse(f"--engine vllm: the engine failed: {error}", code=1)


def run_vllm(llm, requests, params):
    """LLM.generate() step by step, until each request is done; yields {request: output} of those just done. Nothing waits for ever:
    a step that does not return ends the process, more steps than tokens to read and to write are a RuntimeError."""
    since, done = [None], threading.Event()  # since when a step is under way

    def watch():
        while not done.wait(STALLED_SECONDS / 60):
            if since[0] and time.monotonic() - since[0] > STALLED_SECONDS:
                print(f"error: --engine vllm: the engine hangs, a step for {STALLED_SECONDS} seconds", file=sys.stderr, flush=True)
                os._exit(1)
    threading.Thread(target=watch, daemon=True).start()
    try:
        names = llm.enqueue([{"prompt_token_ids": prompt} for prompt in requests], params, use_tqdm=False)
        waiting = {name.split("-")[0]: i for i, name in enumerate(names)}  # vLLM's own names end in a random mark
        steps = 2 * sum(len(prompt) + one.max_tokens for prompt, one in zip(requests, params, strict=True))
        while llm.llm_engine.has_unfinished_requests():
            since[0], steps = time.monotonic(), steps - 1
            outputs = {waiting.pop(request.request_id): request.outputs[0] for request in llm.llm_engine.step() if request.finished}
            since[0] = None
            if steps < 0:
                raise RuntimeError(f"{len(waiting)} of {len(requests)} requests do not end")
            yield outputs
    finally:
        done.set()


class Draw:
    """A logits processor that leaves one token in each row, drawn from the row's distribution by inversion: the first token at which
    the distribution function exceeds a number of the row's own, uniform in [0, 1). uniform: (rows, steps)."""
    def __init__(self, uniform, width):
        self.uniform, self.width = uniform, width

    def __call__(self, ids, logits):
        distribution = logits.softmax(-1, dtype=torch.float64).cumsum(-1)
        level = self.uniform[:, ids.shape[1] - self.width, None] * distribution[:, -1:]
        return torch.full_like(logits, -torch.inf).scatter(1, torch.searchsorted(distribution, level, right=True), 0.0)


@torch.no_grad()
def sample_hf(model, requests, sampling, seeds):
    from transformers import GenerationConfig, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
    samples, order = {}, sorted(range(len(requests)), key=lambda i: len(requests[i]))
    stops, pad, device = set(sampling.stop_ids), sampling.stop_ids[0], model.device
    warpers = [TemperatureLogitsWarper(sampling.temperature)] if sampling.temperature else []  # 0: greedy
    if sampling.temperature and sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.temperature and sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    config = GenerationConfig(max_new_tokens=sampling.max_response_tokens, eos_token_id=sampling.stop_ids, pad_token_id=pad,
                              suppress_tokens=list(range(sampling.vocab_size, model.config.vocab_size)) or None)
    own, model.generation_config = model.generation_config, GenerationConfig()  # else generate() mixes in its top-k, penalties, ...
    try:
        for start in range(0, len(order), sampling.sample_batch):
            rows = order[start:start + sampling.sample_batch]
            width = max(len(requests[i]) for i in rows)
            # left padding, as generate() needs it:  [pad pad p0 p1] [p0 p1 p2 p3] -> responses start in one column
            ids = torch.tensor([[pad] * (width - len(requests[i])) + requests[i] for i in rows], device=device)
            mask = torch.tensor([[0] * (width - len(requests[i])) + [1] * len(requests[i]) for i in rows], device=device)
            uniform = [torch.rand(sampling.max_response_tokens, generator=torch.Generator().manual_seed(seeds[i]), dtype=torch.float64)
                       for i in rows]
            draw = [Draw(torch.stack(uniform).to(device), width)] if sampling.temperature else []
            output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, logits_processor=warpers + draw)
            for i, response in zip(rows, output[:, width:].tolist()):
                end = next((t + 1 for t, token in enumerate(response) if token in stops), None)
                samples[i] = Sample(response[:end], "stop" if end else "length")
    finally:
        model.generation_config = own
    return [samples]

# ---------------------------------------------------------------------------------------------------------------------
# Filters of a cold start (arXiv 2604.13016 and its code)


def is_degenerate(response):
    """Whether a response repeats itself: a line of 20 characters or more five times, 100 characters three times (looked at every 10),
    or, in a response of more than 5000, some 50 characters three times in a row."""
    lines = [line.strip() for line in response.splitlines()]
    windows = [response[i:i + 100] for i in range(0, len(response) - 99, 10)]
    return (max(Counter(line for line in lines if len(line) >= 20).values(), default=0) >= 5
            or max(Counter(windows).values(), default=0) >= 3
            or len(response) > 5000 and any(response[i:i + 50] == response[i + 50:i + 100] == response[i + 100:i + 150]
                                            for i in range(len(response) - 149)))


def fault(response, finish_reason, drop):
    """The first reason in `drop` that holds for a response, or None."""
    holds = {"unboxed": lambda: "\\boxed" not in response, "truncated": lambda: finish_reason == "length",
             "degenerate": lambda: is_degenerate(response)}
    return next((reason for reason in drop if holds[reason]()), None)


def sample_kept(args, engine, tokenizer, prompts, sampling, seed, counts, first=0):
    """sample(), with faulty responses sampled again up to --attempts times in all; None where no attempt was good. Every faulty
    response is counted by its reason in `counts`, and every slot that was given up as "dropped". first: place of the first prompt."""
    groups = [list(group) for group in sample(engine, prompts, sampling, seed, range(first, first + len(prompts)))]
    slots = [(i, j) for i in range(len(prompts)) for j in range(sampling.n)] if args.drop else []
    for attempt in range(1, args.attempts + 1):
        faults = {}
        for i, j in slots:
            response = tokenizer.decode(groups[i][j].response_ids, skip_special_tokens=True)
            faults[i, j] = fault(response, groups[i][j].finish_reason, args.drop)
        slots = [slot for slot in slots if faults[slot]]
        counts.update(faults[slot] for slot in slots)
        if slots and attempt < args.attempts:
            again = sample(engine, [prompts[i] for i, _ in slots], sampling._replace(n=1), derive_seed(seed, "attempt", attempt),
                           [(first + i, j) for i, j in slots])
            for (i, j), (one,) in zip(slots, again, strict=True):
                groups[i][j] = one
    for i, j in slots:
        groups[i][j] = None
    counts["dropped"] += len(slots)
    return groups

# ---------------------------------------------------------------------------------------------------------------------
# The rollouts artifact


def write_rollouts(file, tokenizer, problems, prompts, groups):
    """Append one row a response to a rollouts.jsonl; a None in a group is a dropped one."""
    for problem, prompt, group in zip(problems, prompts, groups, strict=True):
        for index, one in ((index, one) for index, one in enumerate(group) if one):
            row = {"id": problem["id"], "sample": index, "prompt_ids": prompt, "response_ids": one.response_ids,
                   "response": tokenizer.decode(one.response_ids, skip_special_tokens=True), "finish_reason": one.finish_reason,
                   "answer": problem["answer"]}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_rollouts(path, vocab_size=2**31):
    """Yields the rows of a rollouts artifact whose meta.json was checked; a row that rollout.py cannot have written is refused."""
    for where, row in read_jsonl(os.path.join(path, "rollouts.jsonl")):
        for name in ("prompt_ids", "response_ids"):
            ids = row.get(name)
            if not isinstance(ids, list) or set(map(type, ids)) != {int} or not 0 <= min(ids) <= max(ids) < vocab_size:
                refuse(f"{where}: `{name}` must be a list of token ids from 0 to {vocab_size - 1}, at least one")
        for name, kind in {"id": str, "sample": int, "response": str, "answer": str}.items():
            if type(row.get(name)) is not kind:
                refuse(f"{where}: `{name}` must be of type {kind.__name__}")
        if row.get("finish_reason") not in ("stop", "length"):
            refuse(f"{where}: `finish_reason` must be stop or length")
        yield row


def finish_rollouts(args, tokenizer, faults=None, **facts):
    """Complete a rollouts artifact: its tokenizer, its counts, meta.json."""
    file = os.path.join(args.out, "rollouts.jsonl")
    os.replace(file + ".tmp", file)
    tokenizer.save_pretrained(os.path.join(args.out, "tokenizer"))
    names = [os.path.join("tokenizer", name) for name in sorted(os.listdir(os.path.join(args.out, "tokenizer")))]
    lengths, cut = [], 0
    for row in read_rollouts(args.out):
        lengths.append(len(row["response_ids"]))
        cut += row["finish_reason"] == "length"
    if not lengths:
        refuse(f"--drop {' '.join(args.drop)}: every response was dropped: {dict(faults)}", code=1)
    counts = {"responses": len(lengths), "response_tokens": sum(lengths), "longest_response": max(lengths), "truncated": cut,
              "faults": faults or {}}
    suffix = getattr(args, "prompt_suffix", "")
    finish_artifact(args, "rollout", ["rollouts.jsonl", *names], counts=counts, tokenizer_sha256=tokenizer_sha256(tokenizer),
                    template_sha256=template_sha256(tokenizer, suffix), prompt_suffix=suffix, **facts)
    print(f"{args.out}: {len(lengths)} responses, {sum(lengths) / len(lengths):.1f} tokens on average, {cut} cut off"
          + "".join(f", {count} {reason}" for reason, count in (faults or {}).items()))

# ---------------------------------------------------------------------------------------------------------------------


def main(args):
    directory, tokenizer, stops, problems, prompts, sampling = prepare(args)
    engine = load_vllm(args, directory) if args.engine == "vllm" else load_model(directory, "--model", args.dtype)
    start_artifact(args)
    print(f"rollout: {len(problems)} problems x {args.n}, engine {args.engine}, {args.dtype}, stop ids {stops}")

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
            groups = sample_kept(args, engine, tokenizer, prompts[rows], sampling, derive_seed(args.seed, "rollout"), faults, start)
            write_rollouts(file, tokenizer, problems[rows], prompts[rows], groups)
            file.mark(problems=start + len(prompts[rows]), faults=faults)
            bar.update(len(prompts[rows]))
    finish_rollouts(args, tokenizer, faults, model=os.path.realpath(directory), stop_ids=stops)


if __name__ == "__main__":
    run_stage(main, get_args())
