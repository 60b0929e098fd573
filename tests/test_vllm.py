"""vLLM (on a CPU, its CPU build) samples what transformers samples, from the weights that it got last."""

import argparse
import os
import random
import subprocess
import sys

import pytest
import torch

from conftest import ROOT, needs_vllm
from distil import artifacts
from distil.models import forward
from distil.sampling import SamplingConfig, derive_seed, sample, sample_stream, update_engine
from distil.vllm_engine import load_vllm
from recipes.toy_world import make_model, make_tokenizer
from streaming_kl import token_logps

# On a GPU the engines of this file share one: the module's own lives as long as those of the stages.
SHARE = 0.1
STAGE = f"--dtype float32 --max_response_tokens 12 --gpu_memory_utilization {SHARE}"
ROUNDING = 1e-4 if torch.cuda.is_available() else 2e-5  # of a log-probability, between two devices or on one

pytestmark = [needs_vllm, pytest.mark.usefixtures("no_trace_of_vllm")]

ROWS = 1200  # of the padded model; its tokenizer has 29 ids
PROMPTS = [
    [1, 3, 20],
    [1, 9, 12, 13, 14, 15, 16],
    [1],
    [1, 22],
    [1, 3, 20, 11, 12, 13, 14, 15, 16, 17, 18, 19],
]


def make_config(**changes):
    default = SamplingConfig(
        n=1, temperature=0.0, top_p=1.0, top_k=0, max_response_tokens=16, stop_ids=[0, 2], vocab_size=29
    )
    return default._replace(**changes)


def padded_model(seed):
    """Padding rows, some of which win every argmax, and more than the 1,024 that logit_bias takes."""
    torch.manual_seed(seed)
    model = make_model(make_tokenizer(), 64, 2, 2)
    model.resize_token_embeddings(ROWS, mean_resizing=False)
    with torch.no_grad():
        model.get_output_embeddings().weight[29:] *= 20
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return padded_model(seed=1)


@pytest.fixture(scope="module")
def engine(model, tmp_path_factory):
    path = str(tmp_path_factory.mktemp("vllm"))
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return load_vllm(path, 29, "float32", tensor_parallel=1, memory=SHARE)


@pytest.mark.parametrize("stops", [[0, 2], [5, 6, 7, 8, 9, 10], list(range(0, 29, 3)), [28]])
def test_greedy_samples_are_equal(engine, model, stops):
    """Five prompt lengths; the stop ids decide where responses end."""
    config = make_config(stop_ids=stops)
    found = sample(engine, PROMPTS, config, seed=0)
    assert found == sample(model, PROMPTS, config, seed=0)
    for [response] in found:
        assert response.truncated == (response.response_ids[-1] not in stops)


def test_some_responses_stop_and_some_are_truncated(engine):
    groups = sample(engine, PROMPTS, make_config(temperature=1.0, n=20), seed=0)
    assert {response.truncated for group in groups for response in group} == {True, False}


def test_padded_vocabulary_rows_are_never_sampled(engine, model):
    with torch.no_grad():
        assert model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1].argmax() >= 29
    for temperature in (0.0, 1.0, 2.0):
        for group in sample(engine, PROMPTS, make_config(n=10, temperature=temperature), seed=0):
            assert all(token < 29 for one in group for token in one.response_ids)


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 0.8)])
def test_the_samplers_log_probabilities_are_the_trainers(engine, model, temperature, top_p):
    """At any temperature those of the model itself, over its whole output with the padding rows."""
    config = make_config(n=4, temperature=temperature, top_p=top_p, logprobs="raw")
    for group in sample(engine, PROMPTS, config, seed=3):
        for response in group:
            with torch.no_grad():
                hidden, head = forward(model, [response], vocab_size=ROWS)
                right = token_logps(hidden, head, torch.tensor(response.response_ids))
            torch.testing.assert_close(torch.tensor(response.sampler_logps), right, rtol=0, atol=ROUNDING)


def test_an_engine_that_fails_in_a_step_ends_the_stage_with_a_message(engine, monkeypatch, capfd):
    """Its process is dead, or the model's forward pass fails; the engine survives the latter."""
    from vllm.v1.engine.exceptions import EngineDeadError

    def fails(*args, **more):
        raise RuntimeError("out of memory\nTry less.")

    def dies():
        raise EngineDeadError()

    worker = engine.llm_engine.engine_core.engine_core.model_executor.driver_worker
    model_class = type(worker.worker.model_runner.model)
    main = lambda args: sample(engine, PROMPTS, make_config(), seed=0)
    for place, name, fault in ((engine.llm_engine, "step", dies), (model_class, "forward", fails)):
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
            patch.setattr(place, name, fault)
            patch.setattr(artifacts, "writing", True)
            artifacts.run_stage(main, argparse.Namespace(out="OUT"))
        *_, last = capfd.readouterr().err.splitlines()
        assert end.value.code == 1 and last.startswith("error: --engine vllm: the engine failed: ")
        assert last.endswith("; OUT keeps what is finished; the same command with --resume continues")
        engine.llm_engine.abort_request(
            list(engine.llm_engine.output_processor.request_states), internal=True
        )
        while engine.llm_engine.has_unfinished_requests():
            engine.llm_engine.step()


def test_an_engine_that_does_not_start_is_one_message(world, monkeypatch, refused):
    """vLLM raises a bare Exception if a worker of --tensor_parallel dies while it loads the model."""
    import vllm

    def dies(*args, **options):
        raise Exception("WorkerProc initialization failed")

    monkeypatch.setattr(vllm, "LLM", dies)
    start = lambda: load_vllm(str(world / "student_init"), 29, "float32", 2, 0.3)
    assert refused(start, "--engine vllm", "WorkerProc initialization", code=1).count("\n") == 1


class FakeEngine:
    """An LLM, and its LLMEngine, whose requests never end, or whose steps do not. It notes its calls."""

    def __init__(self, step, sleeps=False, resets=True):
        self.step, self.resets, self.asleep, self.calls = step, resets, False, []
        self.llm_engine = self
        self.model_config = argparse.Namespace(enable_sleep_mode=sleeps)

    def enqueue(self, prompts, params, priority, use_tqdm):
        self.names = [str(i) for i in range(len(prompts))]
        return [f"{name}-mark" for name in self.names]

    def is_sleeping(self):
        return self.asleep

    def sleep(self, level):
        self.calls.append(f"sleep {level}")
        self.asleep = True

    def wake_up(self, tags):
        self.calls += tags
        self.asleep = "kv_cache" not in tags

    def collective_rpc(self, name, kwargs):
        self.calls.append(name)

    def reset_prefix_cache(self):
        self.calls.append("reset_prefix_cache")
        return self.resets


def test_a_request_that_never_ends_is_an_error():
    steps = []
    engine = FakeEngine(lambda: steps.append(1) or [])
    with pytest.raises(ChildProcessError, match="--engine vllm: .*5 requests do not end"):
        sample(engine, PROMPTS, make_config(), seed=0)
    assert len(steps) > 5 * 16


def test_a_step_that_never_returns_ends_the_process():
    """A hang in C, a collective that waits for a dead rank: no exception can be raised there."""
    code = (
        "import time, test_vllm; from distil import sampling, vllm_engine\n"
        "vllm_engine.STALLED_SECONDS = 0.5\n"
        "engine = test_vllm.FakeEngine(lambda: time.sleep(100))\n"
        "next(vllm_engine.sample_vllm(engine, test_vllm.make_config(), [sampling.Request(0, 0, [1], 7)]))"
    )
    path = os.pathsep.join([os.path.join(ROOT, "tests"), ROOT, os.path.join(ROOT, "kernels")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1 and "error: --engine vllm: the engine hangs" in done.stderr


def test_prompts_are_handed_over_when_they_are_finished(engine):
    """So an evaluation that is killed keeps them; about sample_batch responses together."""
    config = make_config(n=3, temperature=1.0, sample_batch=7)
    found = list(sample_stream(engine, PROMPTS, config, 7, range(5)))
    groups = {place: group for some in found for place, group in some.items()}
    assert [len(some) for some in found] == [2, 2, 1]
    assert [groups[place] for place in range(5)] == sample(engine, PROMPTS, config, 7)


def test_all_prompts_are_queued_at_once_and_what_is_sampled_again_goes_first(engine, monkeypatch):
    """Responses that begin with an even id are sampled again, three times in all."""
    config = make_config(n=2, temperature=1.0, sample_batch=2)
    queued, enqueue = [], engine.enqueue
    noted = lambda *args, priority, **more: (
        queued.append(priority) or enqueue(*args, priority=priority, **more)
    )
    is_bad = lambda response: response.response_ids[0] % 2 == 0

    def judge(request, response):
        if not is_bad(response):
            return response
        seed = derive_seed(derive_seed(7, "attempt", request.attempt), (request.place, request.index), 0)
        return request._replace(attempt=request.attempt + 1, seed=seed) if request.attempt < 3 else None

    with monkeypatch.context() as patch:
        patch.setattr(engine, "enqueue", noted)
        found = list(sample_stream(engine, PROMPTS, config, 7, range(10, 15), judge))
    assert queued[0] == [place for place in range(10, 15) for _ in range(2)]
    right = {10 + i: group for i, group in enumerate(sample(engine, PROMPTS, config, 7, range(10, 15)))}
    rounds = [sorted(priority) for priority in queued[1:]]
    again = []
    for attempt in (1, 2, 3):
        bad = [(p, i) for p in right for i in range(2) if right[p][i] and is_bad(right[p][i])]
        again += [place for place, _ in bad] if attempt < 3 else []
        for place, i in bad:
            one = config._replace(n=1), derive_seed(7, "attempt", attempt), [(place, i)]
            right[place][i] = None if attempt == 3 else sample(engine, [PROMPTS[place - 10]], *one)[0][0]
    assert again and None in sum(right.values(), []) and sorted(sum(rounds, [])) == sorted(again)
    assert {place: group for some in found for place, group in some.items()} == right


def test_an_engine_sleeps_after_sampling_and_wakes_for_new_weights(model):
    """Its weights are written between waking those and the cache; a cache before that would not fit."""
    done = argparse.Namespace(finish_reason="stop", token_ids=[2], logprobs=None)
    ended = lambda: [argparse.Namespace(finished=True, request_id=n, outputs=[done]) for n in engine.names]
    engine = FakeEngine(ended, sleeps=True)
    update_engine(engine, model)
    sample(engine, PROMPTS, make_config(), seed=0)
    update_engine(engine, model)
    first = ["reload_weights", "reset_prefix_cache"]
    assert engine.calls == [*first, "sleep 2", "weights", "reload_weights", "kv_cache", "reset_prefix_cache"]


def test_an_engine_that_cannot_sleep_is_refused_by_the_flag(world, refused):
    start = lambda: load_vllm(str(world / "student_init"), 29, "float32", 1, 0.3, sleep=True)
    assert refused(start, "--engine_sleep", "leave it out").count("\n") == 1


def test_a_cache_of_the_old_weights_that_stays_is_an_error(model, refused):
    engine = FakeEngine(None, resets=False)
    assert refused(lambda: update_engine(engine, model), "--engine vllm", "old", code=1).count("\n") == 1


def test_more_prompts_than_a_step_holds(engine, model):
    """12,000 tokens; a step takes 4096. None is read in two pieces, which the CPU build cannot seed."""
    generator = random.Random(3)
    prompts = [[generator.randrange(3, 29) for _ in range(200)] for _ in range(60)]
    settings = make_config(temperature=1.0, max_response_tokens=2)
    found = sample(engine, prompts, settings, seed=3)
    assert len(found) == 60 and sample(engine, prompts[40:], settings, 3, range(40, 60)) == found[40:]


def test_seed_decides_the_samples(engine):
    first = sample(engine, PROMPTS, make_config(n=3, temperature=1.0), seed=7)
    assert sample(engine, PROMPTS, make_config(n=3, temperature=1.0), seed=7) == first
    assert sample(engine, PROMPTS, make_config(n=3, temperature=1.0), seed=8) != first
    assert len({tuple(one.response_ids) for one in first[0]}) == 3


@pytest.mark.parametrize(
    "settings", [dict(temperature=0.7), dict(temperature=1.5, top_k=5), dict(temperature=1.0, top_p=0.6)]
)
def test_both_engines_sample_from_one_distribution(engine, model, settings):
    """First tokens of 2000 responses each: chi-square of two samples, at most 6 deviations above its mean."""
    counts = []
    for one in (engine, model):
        config = make_config(n=2000, sample_batch=2000, max_response_tokens=1, **settings)
        [group] = sample(one, [PROMPTS[1]], config, seed=3)
        counts.append(torch.bincount(torch.tensor([s.response_ids[0] for s in group]), minlength=29).double())
    both = counts[0] + counts[1] > 0
    chi_square = ((counts[0] - counts[1])[both] ** 2 / (counts[0] + counts[1])[both]).sum()
    freedom = both.sum() - 1
    assert freedom > 2 and chi_square < freedom + 6 * (2 * freedom) ** 0.5


def test_after_a_push_the_engine_samples_from_the_new_weights(engine, model):
    old = sample(engine, PROMPTS, make_config(), seed=0)
    trained = padded_model(seed=1).train()
    optimizer, ids = (
        torch.optim.AdamW(trained.parameters(), lr=3e-2),
        torch.tensor([PROMPTS[1] + [20, 21, 22]]),
    )
    for _ in range(2):
        trained(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    new = sample(trained, PROMPTS, make_config(), seed=0)
    assert new != old and sample(engine, PROMPTS, make_config(), seed=0) == old
    update_engine(engine, trained)
    assert sample(engine, PROMPTS, make_config(), seed=0) == new
    update_engine(engine, model)
    assert sample(engine, PROMPTS, make_config(), seed=0) == old


def test_a_push_forgets_what_was_cached_with_the_old_weights(engine, model):
    def cached():
        """Tokens of a prompt of several cache blocks that vLLM did not compute again."""
        return engine.generate([{"prompt_token_ids": [1, 3, 20] * 100}], use_tqdm=False)[0].num_cached_tokens

    cached()
    assert cached() > 0
    update_engine(engine, model)
    assert cached() == 0


# ----------------------------------------------------------------------------------------------------------
# Stages
