"""How every stage samples, with transformers or vLLM, and how a live engine gets new weights."""

import functools
import hashlib
from typing import NamedTuple

import torch

from distil import flags, ranks
from distil.artifacts import refuse
from distil.matching import match_tokenizers
from distil.models import Response, context_of, model_dir, rows_of
from distil.problems import load_problems
from distil.prompts import Prompting, check_template, encode_problems, load_tokenizer, stop_ids, vocab_size_of
from distil.vllm_engine import sample_vllm


def add_sampling_flags(
    p, n=1, temperature=1.0, top_p=1.0, top_k=0, max_response_tokens=4096, gpu_memory_utilization=0.9, more=()
):
    """The sampling flags of every stage, each with its own defaults. more: engines beside vLLM and hf."""
    engines, engine = ["vllm", "hf", *more], "vllm" if torch.cuda.is_available() else "hf"
    p.add_argument("--engine", choices=engines, default=engine, help="vLLM, or transformers (hf)")
    p.add_argument("--n", type=flags.positive_int, default=n, help="responses sampled for each problem")
    p.add_argument("--temperature", type=flags.temperature, default=temperature, help="0: greedy")
    p.add_argument("--top_p", type=flags.positive_fraction, default=top_p, help="1: off")
    p.add_argument("--top_k", type=flags.non_negative_int, default=top_k, help="0: off")
    limit = {"type": flags.positive_int, "default": max_response_tokens}
    p.add_argument("--max_response_tokens", **limit, help="then truncated")
    p.add_argument(
        "--extra_stop_ids", type=flags.non_negative_int, nargs="+", default=[], help="more end tokens"
    )
    p.add_argument("--sample_batch", type=flags.positive_int, default=256, help="responses sampled together")
    p.add_argument("--tensor_parallel", type=flags.positive_int, default=1, help="vLLM's GPUs; 1 in training")
    share = {"type": flags.positive_fraction, "default": gpu_memory_utilization}
    p.add_argument("--gpu_memory_utilization", **share, help="for vLLM")


class SamplingConfig(NamedTuple):
    """How responses are sampled."""

    n: int  # responses for each prompt
    temperature: float  # 0: greedy
    top_p: float
    top_k: int  # 0: off
    max_response_tokens: int
    stop_ids: list
    vocab_size: int  # prompts.vocab_size_of(); ids from here on are never sampled
    sample_batch: int = 256  # responses sampled together
    logprobs: str = ""  # that vLLM returns: "raw", the model's, or "processed", the sampler's


def is_plain(config):
    """Whether the samples come from the model's own distribution: temperature 1, no top-p, no top-k."""
    return config.temperature == 1 and config.top_p == 1 and config.top_k == 0


def sampling_from(args, vocab_size, stops):
    """The SamplingConfig of a stage's flags. stops: the model's stop ids."""
    names = ("n", "temperature", "top_p", "top_k", "max_response_tokens", "sample_batch")
    fields = {name: getattr(args, name) for name in names}
    stops = sorted({*stops, *args.extra_stop_ids})
    if not stops:
        refuse("the model has no end token, so nothing ends a response; name one with --extra_stop_ids")
    if stops[-1] >= vocab_size:
        refuse(f"--extra_stop_ids: {stops[-1]} cannot end a response: the ids are 0 to {vocab_size - 1}")
    return SamplingConfig(stop_ids=stops, vocab_size=vocab_size, **fields)


class Task(NamedTuple):
    """What it takes to sample a model's responses to problems."""

    directory: str  # the model's
    tokenizer: object
    problems: list  # of {"id", "problem", "answer"}
    prompts: list  # token ids, one list for each problem
    sampling: SamplingConfig
    dropped: int  # problems, by --max_prompt_tokens
    prompting: Prompting  # what is in the prompts beside the problems


def load_task(model, asked, make_sampling, weights=True):
    """The Task of --model on what is `asked`. make_sampling(vocabulary size, stop ids) is its sampling."""
    directory, tokenizer, size = load_template(model, asked.template_from, asked.prompting, weights)
    problems = load_problems(asked.data, asked.limit, asked.columns)
    config = make_sampling(size, stop_ids(tokenizer, directory, size))
    about = tokenizer, asked.prompting, size, context_of(directory), asked.max_prompt_tokens
    problems, prompts, dropped = encode_problems(problems, *about, config.max_response_tokens)
    return Task(directory, tokenizer, problems, prompts, config, dropped, asked.prompting)


def load_template(model, template_from, prompting, weights):
    """(directory, tokenizer, vocabulary size) of --model, with the chat template that its prompts get."""
    directory = model_dir(model, "--model", weights)
    tokenizer = load_tokenizer(directory, "--model")
    if template_from:
        other = load_tokenizer(model_dir(template_from, "--template_from"), "--template_from")
        match_tokenizers(tokenizer, other, "--model", "--template_from", other, prompting)
    remedy = "--template_from names a model whose template is used"
    check_template(tokenizer, "--model", remedy, prompting)
    return directory, tokenizer, vocab_size_of(tokenizer, rows_of(directory), "--model")


def update_engine(engine, model):
    """Give an engine the model's current weights.

    engine: the model itself, a vLLM engine, or a rank's own full copy of a model sharded over the ranks."""
    if engine is model:
        return
    weights = ranks.full_weights(model)
    if isinstance(engine, torch.nn.Module):
        own = engine.state_dict()
        for name, tensor in weights:
            own[name].copy_(tensor)
    else:
        asleep = engine.llm_engine.is_sleeping()
        if asleep:
            engine.wake_up(["weights"])
        engine.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if asleep:
            engine.wake_up(["kv_cache"])
        if not engine.reset_prefix_cache():
            refuse("--engine vllm: keys and values of the old weights cannot be removed", code=1)


def derive_seed(*parts):
    """A 63-bit seed that depends on every part: derive_seed(42, "sample", step)."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def sample(engine, prompts, config, seed, places=None):
    """For each prompt, a list of token ids, a list of n Responses. Their id is left empty.

    A response depends on the model, its prompt, the seed, its prompt's place (by default 0, 1, ...) and its
    index among the n: batches, chunks and ranks, which share the prompts, change it by rounding at most."""
    places = range(len(prompts)) if places is None else places
    mine = ranks.rank_slice(len(prompts))
    groups = {}
    for finished in sample_stream(engine, prompts[mine], config, seed, places[mine]):
        groups |= finished
    return ranks.gather([groups[place] for place in places[mine]])


class Request(NamedTuple):
    """A response that is to be sampled."""

    place: int  # the prompt's
    index: int  # among the prompt's n
    prompt: list  # token ids
    seed: int
    attempt: int = 1


def sample_stream(engine, prompts, config, seed, places, judge=None):
    """sample() in one process, yielding {place of a prompt: its n Responses}, about sample_batch together:
    what is done with them holds up the engine, so it is not done after every step.

    With vLLM all prompts are queued at once and come as they finish; transformers takes chunk after chunk.
    The engine may also be a function of config and queue, such as sample_vllm with its engine.
    judge(Request, Response) gives what is kept: a Response, None, or a Request to be sampled instead."""
    chunk = max(1, config.sample_batch // config.n)  # prompts
    generate, at_once = engine, len(prompts) or 1
    if isinstance(engine, torch.nn.Module):
        generate, at_once = functools.partial(sample_hf, engine), chunk
    elif not callable(engine):
        generate = functools.partial(sample_vllm, engine)
    for start in range(0, len(prompts), at_once):
        part, queue, ready = slice(start, start + at_once), [], {}
        for prompt, place in zip(prompts[part], places[part], strict=True):
            queue += [Request(place, i, prompt, derive_seed(seed, place, i)) for i in range(config.n)]
        pending = {request.place: {} for request in queue}  # {place: {index among its n: Response}}
        for request, response in generate(config, queue):
            kept = judge(request, response) if judge else response
            if isinstance(kept, Request):
                queue.append(kept)
                continue
            group = pending[request.place]
            group[request.index] = kept
            if len(group) == config.n:
                ready[request.place] = [group[i] for i in range(config.n)]
                del pending[request.place]
            if len(ready) == chunk or not pending:
                yield ready
                ready = {}
        assert not pending, pending.keys()


@torch.no_grad()
def sample_hf(model, config, queue):
    """Yields (Request, Response), with transformers, until the queue, to which one may add, is empty."""
    from transformers import GenerationConfig

    steps, stops, pad = config.max_response_tokens, config.stop_ids, config.stop_ids[0]
    own_config = model.generation_config
    while queue:
        queue.sort(key=lambda request: len(request.prompt))
        batch, queue[:] = queue[: config.sample_batch], queue[config.sample_batch :]
        # Padded on the left, so that all responses begin in one column: [pad pad p0 p1] [p0 p1 p2 p3]
        width = len(batch[-1].prompt)
        ids = [[pad] * (width - len(r.prompt)) + r.prompt for r in batch]
        mask = [[0] * (width - len(r.prompt)) + [1] * len(r.prompt) for r in batch]
        # else generate() mixes in its top-k, penalties, ...
        model.generation_config = GenerationConfig(max_new_tokens=steps, eos_token_id=stops, pad_token_id=pad)
        try:
            output = model.generate(
                input_ids=torch.tensor(ids, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                generation_config=model.generation_config,
                logits_processor=[
                    functools.partial(refuse_nan, [r.place for r in batch]),
                    Draw(config, [r.seed for r in batch], width, model.device),
                ],
            )
        finally:
            model.generation_config = own_config
        for request, row in zip(batch, output[:, width:].tolist(), strict=True):
            length = next((t + 1 for t, token in enumerate(row) if token in stops), None)
            yield request, Response(request.prompt, row[:length], truncated=length is None)


def refuse_nan(places, ids, logits):
    """A logits processor: from NaN or infinity no token can be drawn. places: of the prompts of the rows."""
    bad = (~logits.amax(-1).isfinite()).nonzero()  # -inf alone is a token that is masked
    if len(bad):
        text = f"the logits for prompt {places[bad[0].item()]} (from 0) are not finite"
        refuse(f"--engine hf: {text}: the model's weights or its --dtype do not suffice", code=1)
    return logits


class Draw:
    """A logits processor that leaves a token in each row: the likeliest, or one drawn with the row's seed."""

    def __init__(self, config, seeds, width, device):
        from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        self.width = width  # of the prompts
        self.vocab_size = config.vocab_size
        self.uniform, self.warpers = None, []
        if config.temperature == 0:
            return
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        steps = config.max_response_tokens
        rows = [torch.rand(steps, generator=generator, dtype=torch.float64) for generator in generators]
        self.uniform = torch.stack(rows).to(device)  # (B, T) in [0, 1)
        if config.temperature != 1:
            self.warpers.append(TemperatureLogitsWarper(config.temperature))
        if config.top_k:
            self.warpers.append(TopKLogitsWarper(config.top_k))
        if config.top_p < 1:
            self.warpers.append(TopPLogitsWarper(config.top_p))

    def __call__(self, ids, logits):
        scores = logits[:, : self.vocab_size]  # the rest is padding
        for warper in self.warpers:
            scores = warper(ids, scores)
        if self.uniform is None:
            token = scores.argmax(-1, keepdim=True)
        else:
            token = token_at(scores, self.uniform[:, ids.shape[1] - self.width, None])
        return logits.fill_(-torch.inf).scatter_(1, token, 0.0)


def token_at(logits, level, block=512):
    """(B, 1) The first token at which the distribution function exceeds the level in [0, 1).

    logits (B, V), level (B, 1) float64. First the block of tokens is found from the blocks' sums, then the
    token in it: a sum over all tokens in float64 would take most of the time of a step."""
    weights = (logits - logits.amax(-1, keepdim=True)).exp_()
    weights = torch.nn.functional.pad(weights, (0, -logits.shape[1] % block)).unflatten(1, (-1, block))
    sums = weights.sum(-1, dtype=torch.float64).cumsum(-1)  # (B, blocks)
    level = below(level * sums[:, -1:], sums)
    at = torch.searchsorted(sums, level, right=True)  # (B, 1)
    inside = weights.take_along_dim(at[:, :, None], 1).squeeze(1).double().cumsum(-1)  # (B, block)
    level = below(level - (sums.gather(1, at) - inside[:, -1:]), inside)
    return at * block + torch.searchsorted(inside, level, right=True)


def below(level, sums):
    """The level, in [0, the last of the sums): rounding must not reach a token of probability 0."""
    last = sums[:, -1:]
    return torch.minimum(level, last.nextafter(torch.zeros_like(last))).clamp(min=0)
