"""The filters of a cold start: repetition at the edges of its rules, resampling, counts, drops, resuming."""

import argparse
import functools
import json
import random
from collections import Counter, defaultdict

import pytest
import torch

import rollout
from conftest import killed_in_call
from distil import sampling
from distil.artifacts import read_artifact
from distil.models import Response
from distil.sampling import SamplingConfig, derive_seed
from rollout import fault, is_degenerate, judge

LETTERS = random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=9000)


def text(length, start=0):
    """Text that repeats nothing."""
    return "".join(LETTERS[start : start + length])


@pytest.mark.parametrize(
    "response, degenerate",
    [
        (text(3000), False),
        ("\n".join(["x" * 20] * 5), True),
        ("\n".join(["x" * 20] * 4 + ["y"]), False),
        ("\n".join(["  " + "x" * 19] * 5), False),
        ("\n".join(f"{text(21)}\n{i}" for i in range(5)), True),
        (text(100) * 3, True),
        (text(100) + text(100, 200) + text(100), False),  # windows start at multiples of 10
        (text(4000) + text(40, 5000) * 9, True),  # windows of 100 that recur after 40
        (text(5000) + text(50, 6000) * 3 + text(30, 7000), True),
        (text(4800) + text(50, 6000) * 2 + text(30, 7000), False),
    ],
)
def test_repetition_rules(response, degenerate):
    assert is_degenerate(response) == degenerate


def test_the_rule_of_three_blocks_needs_a_long_response_and_any_offset():
    block = text(50, 6000)
    assert is_degenerate(text(5001) + block * 3) and is_degenerate(text(5007) + block * 3)
    assert not is_degenerate(text(301) + text(33, 6000) * 3)  # short: no window of 100 occurs three times


def test_the_first_fault_that_is_asked_for_is_the_reason():
    drop = ["unboxed", "truncated", "degenerate"]
    assert fault(r"\boxed{1}", False, drop) is None
    assert fault("1", True, drop) == "unboxed"
    assert fault(r"\boxed{1}", True, drop) == "truncated"
    assert fault(r"\boxed{12}" + text(100) * 3, False, drop) == "degenerate"
    assert fault("1", True, []) is None and fault("1", False, ["truncated"]) is None


class Words:
    """A tokenizer whose ids are words: 0 is a response without a box, 1 a good one."""

    def decode(self, ids, skip_special_tokens):
        return {0: "so 3", 1: r"\boxed{3}"}[ids[0]]


def test_faulty_slots_are_sampled_again_and_dropped_at_last(monkeypatch):
    """Seeds of the first samplings depend on place and index, those of later ones on the attempt too."""
    rounds = []
    answers = [
        [0, 1, 0, 0],  # faulty: slots (4, 0), (5, 0) and (5, 1)
        [1, 0, 0],  # (5, 0) and (5, 1)
        [0, 1],  # (5, 0)
    ]

    def sample_hf(model, config, queue):
        while queue:
            requests, queue[:] = queue[:], []
            rounds.append([(r.place, r.index, r.prompt, r.seed) for r in requests])
            for request, word in zip(requests, answers[len(rounds) - 1], strict=True):
                yield request, Response(request.prompt, [word], False)

    monkeypatch.setattr(sampling, "sample_hf", sample_hf)
    args, faults = argparse.Namespace(drop=["unboxed"], attempts=3), defaultdict(Counter)
    judged = functools.partial(judge, args, Words(), 5, faults)
    config = SamplingConfig(2, 1.0, 1.0, 0, 9, [2], 9)
    [groups] = sampling.sample_stream(torch.nn.Linear(1, 1), [[7], [8]], config, 5, [4, 5], judged)
    found = {p: [response and response.response_ids for response in group] for p, group in groups.items()}
    assert found == {4: [[1], [1]], 5: [None, [1]]}
    slots = [(4, 0, [7]), (4, 1, [7]), (5, 0, [8]), (5, 1, [8])]
    assert rounds[0] == [(p, i, prompt, derive_seed(5, p, i)) for p, i, prompt in slots]
    for attempt, at in ((1, (0, 2, 3)), (2, (2, 3))):
        seed = derive_seed(5, "attempt", attempt)
        right = [(p, i, prompt, derive_seed(seed, (p, i), 0)) for p, i, prompt in (slots[j] for j in at)]
        assert rounds[attempt] == right
    assert faults == {4: {"unboxed": 1}, 5: {"unboxed": 2 + 2 + 1, "dropped": 1}}


def roll(world, out, *flags):
    words = ["--model", world / "teacher_init", "--data", world / "train.jsonl", "--out", out]
    words += "--n 2 --engine hf --dtype float32 --max_response_tokens 12 --sample_batch 8".split()
    rollout.main(rollout.get_args([str(word) for word in [*words, *flags]]))
    return [json.loads(line) for line in open(out / "rollouts.jsonl")]


def test_main_keeps_the_good_ones_and_counts_the_rest(world, tmp_path):
    everything, kept = (
        roll(world, tmp_path / "all"),
        roll(world, tmp_path / "kept", "--drop", "truncated", "--attempts", 2),
    )
    assert any(row["finish_reason"] == "length" for row in everything) and kept
    assert all(row["finish_reason"] == "stop" for row in kept)
    good = [row for row in everything if row["finish_reason"] == "stop"]
    assert all(row in kept for row in good)  # what was good at once is as it was
    counts = read_artifact(str(tmp_path / "kept"), "--rollouts", "rollout")["counts"]
    assert counts["responses"] == len(kept) == 24 - counts["faults"]["dropped"]
    first_round = sum(row["finish_reason"] == "length" for row in everything)
    assert first_round < counts["faults"]["truncated"] <= 2 * first_round


def test_a_killed_run_with_drops_continues_to_the_same_file(world, tmp_path):
    whole = roll(world, tmp_path / "whole", "--drop", "truncated")
    with killed_in_call(3, sampling, "sample_hf"):
        roll(world, tmp_path / "again", "--drop", "truncated")
    with open(tmp_path / "again/rollouts.jsonl.tmp", "a") as file:
        file.write('{"id": "half a li')  # what a kill in the middle of a write leaves
    assert roll(world, tmp_path / "again", "--drop", "truncated", "--resume") == whole
    metas = [
        read_artifact(str(tmp_path / name), "--rollouts", "rollout")["counts"] for name in ("whole", "again")
    ]
    assert metas[0] == metas[1]


def test_problems_are_written_in_their_order_and_with_their_own_faults(world, tmp_path, monkeypatch):
    """An engine finishes the first problem last. Killed before that, a run keeps nothing, not even counts."""
    whole = roll(world, tmp_path / "whole", "--drop", "truncated")
    real = sampling.sample_hf

    def first_comes_last(llm, config, queue):
        """As vLLM does it: all requests are there at once."""
        done = list(real(llm, config, [r for r in queue if r.place])) if queue else []
        first, queue[:] = [r for r in queue if not r.place], []
        yield from done
        while queue:
            yield from real(llm, config, queue)
        if killed:
            raise KeyboardInterrupt
        queue += first
        yield from real(llm, config, queue)

    llm = rollout.load_model(str(world / "teacher_init"), "-", "float32")
    monkeypatch.setattr(rollout, "load_vllm", lambda *args: argparse.Namespace(model=llm))
    monkeypatch.setattr(sampling, "sample_vllm", lambda llm, *rest: first_comes_last(llm.model, *rest))
    killed, flags = True, ("--drop", "truncated", "--engine", "vllm")
    with pytest.raises(KeyboardInterrupt):
        roll(world, tmp_path / "again", *flags)
    assert not (tmp_path / "again/rollouts.jsonl.tmp").read_text()
    killed = False
    assert roll(world, tmp_path / "again", *flags, "--resume") == whole
    counts = [read_artifact(str(tmp_path / name), "-", "rollout")["counts"] for name in ("whole", "again")]
    assert counts[0] == counts[1]


def test_a_run_that_drops_everything_fails(world, tmp_path, refused):
    flags = "--drop unboxed truncated --attempts 2 --max_response_tokens 1".split()  # no box in one token
    refused(lambda: roll(world, tmp_path / "none", *flags), "every response was dropped", code=1)
