"""The one way in which any stage samples, with transformers or vLLM, and how a live engine gets new weights."""

import hashlib
from typing import NamedTuple

import torch

from distil import ranks
from distil.artifacts import check_out, refuse
from distil.models import context_of, model_dir
from distil.problems import load_problems
from distil.prompts import encode_problems, load_tokenizer, stop_ids
from distil.vllm_engine import sample_vllm


def add_sampling_flags(
    p, n=1, temperature=1.0, top_p=1.0, top_k=0, max_response_tokens=4096, gpu_memory_utilization=0.9
):
    """The one set of sampling flags; each stage passes its own defaults."""
    p.add_argument(
        "--engine",
        choices=["vllm", "hf"],
        default="vllm" if torch.cuda.is_available() else "hf",
        help="vLLM, or transformers' generate (default: vllm on a GPU, hf on a CPU)",
    )
    p.add_argument("--n", type=int, default=n, help="responses sampled for each problem")
    p.add_argument("--temperature", type=float, default=temperature, help="0: greedy")
    p.add_argument("--top_p", type=float, default=top_p)
    p.add_argument("--top_k", type=int, default=top_k, help="0: off")
    p.add_argument("--max_response_tokens", type=int, default=max_response_tokens)
    p.add_argument(
        "--extra_stop_ids",
        type=int,
        nargs="+",
        default=[],
        help="token ids that end a response, besides the model's own",
    )
    p.add_argument("--sample_batch", type=int, default=256, help="responses sampled together")
    p.add_argument(
        "--tensor_parallel",
        type=int,
        default=1,
        help="GPUs that vLLM spreads one model over (not while training)",
    )
    p.add_argument(
        "--gpu_memory_utilization",
        type=float,
        default=gpu_memory_utilization,
        help="vLLM's share of the GPU memory",
    )


def derive_seed(*parts):
    """A 63-bit seed that depends on every part: derive_seed(42, "sample", step)."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


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
    logprobs: bool = False  # whether the sampler's log-probabilities are wanted


class Sample(NamedTuple):
    response_ids: list  # with the stop token, when there is one
    finish_reason: str  # "stop" or "length"
    logps: list = None  # the model's log-probability of each response token as vLLM computed it, at temperature 1 and untruncated;


def sampling_from(args, tokenizer, stops, **changes):
    """Sampling of a stage's flags; `changes` replace single fields."""
    fields = {
        name: getattr(args, name)
        for name in ("n", "temperature", "top_p", "top_k", "max_response_tokens", "sample_batch")
    }
    sampling = Sampling(
        stop_ids=sorted({*stops, *args.extra_stop_ids}), vocab_size=len(tokenizer), **(fields | changes)
    )
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


def push_weights(engine, model):
    """Give an engine the model's current weights: a live vLLM, or each rank's whole copy of a model that is cut into pieces; else
    a transformers engine is the model itself and has them."""
    if engine is model:
        return
    weights = ranks.full_weights(model)
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
    mine, places, groups = ranks.rank_slice(len(prompts)), range(len(prompts)) if places is None else places, {}
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
        found |= {request: Sample(*one) for request, one in some.items()}
        groups = {
            i: range(i * sampling.n, (i + 1) * sampling.n)
            for i in sorted({request // sampling.n for request in some})
        }
        groups = {
            i: [found.pop(request) for request in group]
            for i, group in groups.items()
            if found.keys() >= {*group}
        }
        if groups:
            yield groups
    assert not found, found.keys()


class Draw:
    """A logits processor that leaves one token in each row, drawn from the row's distribution by inversion: the first token at which
    the distribution function exceeds a number of the row's own, uniform in [0, 1). uniform: (rows, steps)."""

    def __init__(self, uniform, width):
        self.uniform, self.width = uniform, width

    def __call__(self, ids, logits):
        distribution = logits.softmax(-1, dtype=torch.float64).cumsum(-1)
        level = self.uniform[:, ids.shape[1] - self.width, None] * distribution[:, -1:]
        return torch.full_like(logits, -torch.inf).scatter(
            1, torch.searchsorted(distribution, level, right=True), 0.0
        )


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
    config = GenerationConfig(
        max_new_tokens=sampling.max_response_tokens,
        eos_token_id=sampling.stop_ids,
        pad_token_id=pad,
        suppress_tokens=list(range(sampling.vocab_size, model.config.vocab_size)) or None,
    )
    own, model.generation_config = (
        model.generation_config,
        GenerationConfig(),
    )  # else generate() mixes in its top-k, penalties, ...
    try:
        for start in range(0, len(order), sampling.sample_batch):
            rows = order[start : start + sampling.sample_batch]
            width = max(len(requests[i]) for i in rows)
            # left padding, as generate() needs it:  [pad pad p0 p1] [p0 p1 p2 p3] -> responses start in one column
            ids = torch.tensor(
                [[pad] * (width - len(requests[i])) + requests[i] for i in rows], device=device
            )
            mask = torch.tensor(
                [[0] * (width - len(requests[i])) + [1] * len(requests[i]) for i in rows], device=device
            )
            uniform = [
                torch.rand(
                    sampling.max_response_tokens,
                    generator=torch.Generator().manual_seed(seeds[i]),
                    dtype=torch.float64,
                )
                for i in rows
            ]
            draw = [Draw(torch.stack(uniform).to(device), width)] if sampling.temperature else []
            output = model.generate(
                input_ids=ids, attention_mask=mask, generation_config=config, logits_processor=warpers + draw
            )
            for i, response in zip(rows, output[:, width:].tolist()):
                end = next((t + 1 for t, token in enumerate(response) if token in stops), None)
                samples[i] = response[:end], "stop" if end else "length"
    finally:
        model.generation_config = own
    return [samples]
