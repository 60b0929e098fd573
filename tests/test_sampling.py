"""Sampling with transformers, against loops and frequencies computed here; flags, tasks, streams, weights."""

import argparse
import functools
import os
import sys
from unittest import mock

import pytest
import torch
from transformers import GenerationConfig

from distil import sampling
from distil.models import Response
from distil.problems import COLUMNS, Asked
from distil.prompts import Prompting
from distil.sampling import (
    SamplingConfig,
    add_sampling_flags,
    is_plain,
    load_task,
    sample,
    sample_stream,
    sampling_from,
    token_at,
    update_engine,
)
from distil.vllm_engine import load_vllm
from recipes.toy_world import make_model, make_tokenizer

PROMPTS = [[1, 3, 20], [1, 9, 12, 13, 14, 15, 16], [1], [1, 22]]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    return make_model(make_tokenizer(), 32, 2, 1).eval()


def make_config(**changes):
    default = SamplingConfig(
        n=1, temperature=1.0, top_p=1.0, top_k=0, max_response_tokens=16, stop_ids=[0, 2], vocab_size=29
    )
    return default._replace(**changes)


def greedy_loop(model, prompt, config):
    """(response ids, truncated), one forward pass a token."""
    ids = list(prompt)
    for _ in range(config.max_response_tokens):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1, : config.vocab_size]
        ids.append(logits.argmax().item())
        if ids[-1] in config.stop_ids:
            return ids[len(prompt) :], False
    return ids[len(prompt) :], True


def test_greedy_equals_a_loop_of_single_steps(model):
    """Prompts of four lengths in one padded batch; the stop ids decide where each response ends."""
    ends = set()
    for stops in ([0, 2], list(range(0, 29, 2)), [28]):
        greedy = make_config(temperature=0.0, stop_ids=stops)
        for prompt, [found] in zip(PROMPTS, sample(model, PROMPTS, greedy, seed=0)):
            assert found == Response(prompt, *greedy_loop(model, prompt, greedy))
            ends.add(found.truncated)
    assert ends == {True, False}


def test_batches_do_not_change_greedy_samples_or_their_order(model):
    together = sample(model, PROMPTS, make_config(temperature=0.0), seed=0)
    assert together == sample(model, PROMPTS, make_config(temperature=0.0, sample_batch=1), seed=0)
    assert together == sample(model, PROMPTS, make_config(temperature=0.0, sample_batch=3), seed=5)
    assert together == [
        sample(model, [prompt], make_config(temperature=0.0), seed=0)[0] for prompt in PROMPTS
    ]


def test_seed_decides_the_samples_and_nothing_else_does(model):
    state, training = torch.random.get_rng_state(), model.train().training
    first = sample(model, PROMPTS, make_config(n=4), seed=7)
    assert torch.equal(torch.random.get_rng_state(), state) and model.training == training
    model.eval()
    torch.rand(3)
    assert sample(model, PROMPTS, make_config(n=4), seed=7) == first
    assert sample(model, PROMPTS, make_config(n=4), seed=8) != first
    assert [len(group) for group in first] == [4] * 4
    assert len({tuple(s.response_ids) for s in first[0]}) == 4  # the samples of one problem differ


@pytest.mark.parametrize(
    "settings", [dict(), dict(temperature=0.6, top_p=0.95), dict(temperature=1.5, top_k=5)]
)
def test_what_is_sampled_beside_it_changes_no_sample(model, settings):
    """In one batch, one by one, reordered, and with the places that a resumed run or another rank gives."""
    together = sample(model, PROMPTS, make_config(n=3, **settings), seed=7)
    assert together == sample(model, PROMPTS, make_config(n=3, sample_batch=1, **settings), seed=7)
    assert together[::-1] == sample(
        model, PROMPTS[::-1], make_config(n=3, sample_batch=5, **settings), 7, range(3, -1, -1)
    )
    assert together[2:] == sample(model, PROMPTS[2:], make_config(n=3, **settings), 7, range(2, 4))
    assert together[2:] != sample(model, PROMPTS[2:], make_config(n=3, **settings), 7)


def test_the_models_own_generation_config_has_no_say(model):
    """Hugging Face models come with top-k, penalties, ...: only the flags count. The model keeps its own."""
    first, own = sample(model, PROMPTS, make_config(n=4), seed=7), model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=1, temperature=0.1, repetition_penalty=5.0, max_length=3
    )
    try:
        assert sample(model, PROMPTS, make_config(n=4), seed=7) == first
        assert model.generation_config.repetition_penalty == 5.0
    finally:
        model.generation_config = own


@pytest.mark.parametrize("vocab_size, block", [(29, 4), (40, 8), (7, 512), (1030, 512)])
def test_a_level_draws_the_token_at_which_the_distribution_function_exceeds_it(vocab_size, block):
    """Against the whole sum in float64; no level, the ends included, draws a token of probability 0."""
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(300, vocab_size, generator=generator)
    logits[torch.rand(logits.shape, generator=generator) < 0.6] = -torch.inf
    logits[:, vocab_size // 2] = 1.0  # at least one token
    logits[:, -2:] = -torch.inf
    levels = torch.rand(300, 1, generator=generator, dtype=torch.float64)
    levels[:50], levels[50:100] = 0.0, 1 - 2**-53
    found = token_at(logits, levels, block)
    probability = logits.double().softmax(-1)
    at, sums = probability.gather(1, found), probability.cumsum(-1).gather(1, found)
    assert (at > 0).all() and (sums > levels - 1e-6).all() and (sums - at < levels + 1e-6).all()
    exact = torch.searchsorted(probability.cumsum(-1), levels, right=True)[100:]
    assert (found[100:] == exact).float().mean() > 0.99  # float32 may move a border by 1e-7


def test_stop_token_is_kept_and_only_at_the_end(model):
    group = sample(model, [PROMPTS[0]], make_config(n=200), seed=1)[0]
    for response in group:
        ids = response.response_ids
        assert not {0, 2} & set(ids[:-1])
        assert (ids[-1] in (0, 2)) == (not response.truncated)
        assert len(ids) == 16 or not response.truncated
    assert {response.truncated for response in group} == {True, False}


def test_padded_vocabulary_rows_are_never_sampled():
    torch.manual_seed(3)
    model = make_model(make_tokenizer(), 32, 1, 1).eval()
    model.resize_token_embeddings(40, mean_resizing=False)
    with torch.no_grad():  # large logits, of either sign, on half of the padding rows each
        model.get_output_embeddings().weight[29:] *= 100
        assert model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1].argmax() >= 29
    for temperature in (0.0, 1.0):
        for group in sample(model, PROMPTS, make_config(n=5, temperature=temperature), seed=0):
            assert all(token < 29 for response in group for token in response.response_ids)


@pytest.mark.parametrize(
    "settings",
    [
        dict(temperature=1.0),
        dict(temperature=0.5),
        dict(temperature=1.5, top_k=5),
        dict(temperature=1.0, top_p=0.6),
    ],
)
def test_frequencies_are_those_of_the_softmax(settings):
    """One token, 4000 times: chi-square against exact probabilities, at most 6 deviations above its mean."""
    torch.manual_seed(3)
    model = make_model(make_tokenizer(), 32, 1, 1).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight *= 2  # probabilities from 0.005 to 0.4
        logits = model(input_ids=torch.tensor([PROMPTS[1]])).logits[0, -1].double()
    probabilities = (logits / settings["temperature"]).softmax(-1)
    kept, mass = [], 0.0
    for token in probabilities.argsort(descending=True).tolist():
        if len(kept) < settings.get("top_k", 29) and mass < settings.get("top_p", 1.0):
            kept.append(token)
            mass += probabilities[token].item()
    assert len(kept) == settings.get("top_k", 29) or mass < 0.9
    groups = sample(
        model, [PROMPTS[1]], make_config(n=4000, sample_batch=4000, max_response_tokens=1, **settings), seed=2
    )
    counts = torch.bincount(torch.tensor([one.response_ids[0] for one in groups[0]]), minlength=29)
    assert counts[kept].sum() == 4000
    expected = 4000 * probabilities[kept] / mass
    chi_square, freedom = ((counts[kept] - expected) ** 2 / expected).sum(), len(kept) - 1
    assert chi_square < freedom + 6 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [5, 3, 1, 0, 2, 4], [1, 0, 5, 4, 3, 2]])
@pytest.mark.parametrize("sample_batch", [1, 2, 4, 6, 7])
def test_a_prompt_is_handed_over_once_all_its_responses_are_there(monkeypatch, order, sample_batch):
    """Three prompts, n 2; an engine finishes the six requests in any order."""

    def generate(engine, config, queue):
        requests, queue[:] = queue[:], []
        assert len({r.seed for r in requests}) == 6
        assert [r.prompt for r in requests] == [[1], [1], [2], [2], [3], [3]]
        for i in order:
            yield requests[i], Response(requests[i].prompt, [i], False)

    monkeypatch.setattr(sampling, "sample_vllm", generate)
    config = make_config(n=2, sample_batch=sample_batch)
    found = list(sample_stream(None, [[1], [2], [3]], config, 7, range(4, 7)))
    ends = sorted(range(3), key=lambda i: max(order.index(2 * i), order.index(2 * i + 1)))
    chunk = max(1, sample_batch // 2)
    assert [list(groups) for groups in found] == [
        [4 + i for i in ends[start : start + chunk]] for start in range(0, 3, chunk)
    ]
    groups = {place: group for some in found for place, group in some.items()}
    assert groups == {4 + i: [Response([i + 1], [2 * i + j], False) for j in range(2)] for i in range(3)}


def test_transformers_samples_chunk_after_chunk(model):
    """Of at most sample_batch responses; each is handed over before the next begins."""
    config = make_config(n=2, sample_batch=5)  # two prompts
    found = list(sample_stream(model, PROMPTS[:3], config, 7, [3, 9, 4]))
    assert [list(groups) for groups in found] == [[3, 9], [4]]
    groups = {place: group for some in found for place, group in some.items()}
    assert [groups[place] for place in (3, 9, 4)] == sample(model, PROMPTS[:3], config, 7, [3, 9, 4])


def test_a_response_that_never_comes_is_an_error(monkeypatch):
    lost = lambda engine, config, queue: [(queue[0], Response([1], [5], False))]
    monkeypatch.setattr(sampling, "sample_vllm", lost)
    with pytest.raises(AssertionError):
        list(sample_stream(None, [[1], [2]], make_config(), 7, range(2)))


def parse(*words):
    parser = argparse.ArgumentParser()
    add_sampling_flags(parser)
    return parser.parse_args(list(words))


def test_the_config_of_the_flags():
    words = "--n 3 --temperature 0.5 --top_p 0.9 --top_k 4 --max_response_tokens 7 --sample_batch 5".split()
    args = parse(*words, "--extra_stop_ids", "9", "2")
    expected = SamplingConfig(3, 0.5, 0.9, 4, 7, [0, 2, 9], 29, sample_batch=5)
    assert sampling_from(args, 29, [2, 0]) == expected


def test_plain_is_the_models_own_distribution():
    assert is_plain(make_config()) and is_plain(parse())
    for change in (dict(temperature=0.9), dict(temperature=0.0), dict(top_p=0.99), dict(top_k=5)):
        assert not is_plain(make_config(**change))


def test_a_task_is_what_sampling_needs(world):
    make_sampling = functools.partial(sampling_from, parse("--max_response_tokens", "9"))
    wanted = Asked(str(world / "train.jsonl"), 2, COLUMNS, Prompting("="), None, None)
    task = load_task(str(world / "teacher_init"), wanted, make_sampling)
    assert len(task.problems) == len(task.prompts) == 2 and task.directory == str(world / "teacher_init")
    assert task.sampling == make_config(max_response_tokens=9)
    assert task.tokenizer.decode(task.prompts[0]).count(task.problems[0]["problem"] + "=<|im_end|>") == 1


def test_a_full_copy_of_the_model_gets_its_weights(model):
    torch.manual_seed(4)
    copy = make_model(make_tokenizer(), 32, 2, 1).eval()
    before = sample(model, PROMPTS, make_config(), seed=0)
    assert sample(copy, PROMPTS, make_config(), seed=0) != before
    update_engine(copy, model)
    assert sample(copy, PROMPTS, make_config(), seed=0) == before


def test_without_vllm_the_message_names_the_other_engine(monkeypatch, refused):
    monkeypatch.setitem(sys.modules, "vllm", None)  # as if it were not installed
    with mock.patch.dict(os.environ):  # variables for vLLM would switch off torch.compile in other tests
        refused(lambda: load_vllm("model", 29, "float32", 1, 0.9), "--engine vllm", "--engine hf")
