"""The filters of a cold start: repetition at the edges of its rules, resampling, counts, drops, resuming."""

import json
import random
from collections import Counter

import pytest

import rollout
from distil.artifacts import read_artifact
from distil.models import Response
from distil.sampling import SamplingConfig
from rollout import fault, is_degenerate, sample_with_retries

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
    calls = []
    answers = [
        [[0, 1], [0, 0]],  # faulty: slots (0, 0), (1, 0) and (1, 1)
        [[1], [0], [0]],  # (1, 0) and (1, 1)
        [[0], [1]],  # (1, 0)
    ]

    def sample(engine, prompts, config, seed, places):
        calls.append((prompts, config.n, seed, list(places)))
        groups = zip(prompts, answers[len(calls) - 1])
        return [[Response(prompt, [word], False) for word in words] for prompt, words in groups]

    monkeypatch.setattr(rollout, "sample", sample)
    counts, config = Counter(), SamplingConfig(2, 1.0, 1.0, 0, 9, [2], 9)
    groups = sample_with_retries(
        None, Words(), [[7], [8]], config, 5, drop=["unboxed"], attempts=3, fault_counts=counts, first=4
    )
    found = [[response and response.response_ids for response in group] for group in groups]
    assert found == [[[1], [1]], [None, [1]]]
    assert [prompts for prompts, *_ in calls] == [[[7], [8]], [[7], [8], [8]], [[8], [8]]]
    assert [n for _, n, *_ in calls] == [2, 1, 1]
    assert len({seed for *_, seed, _ in calls}) == 3
    assert [places for *_, places in calls] == [[4, 5], [(4, 0), (5, 0), (5, 1)], [(5, 0), (5, 1)]]
    assert counts == {"unboxed": 3 + 2 + 1, "dropped": 1}


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


def test_a_killed_run_with_drops_continues_to_the_same_file(world, tmp_path, monkeypatch):
    whole = roll(world, tmp_path / "whole", "--drop", "truncated")
    calls, real = [], rollout.sample_with_retries

    def killed(*given):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*given)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(rollout, "sample_with_retries", killed)
        roll(world, tmp_path / "again", "--drop", "truncated")
    with open(tmp_path / "again/rollouts.jsonl.tmp", "a") as file:
        file.write('{"id": "half a li')  # what a kill in the middle of a write leaves
    assert roll(world, tmp_path / "again", "--drop", "truncated", "--resume") == whole
    metas = [
        read_artifact(str(tmp_path / name), "--rollouts", "rollout")["counts"] for name in ("whole", "again")
    ]
    assert metas[0] == metas[1]


def test_a_run_that_drops_everything_fails(world, tmp_path, refused):
    flags = "--drop unboxed truncated --attempts 2 --max_response_tokens 1".split()  # no box in one token
    refused(lambda: roll(world, tmp_path / "none", *flags), "every response was dropped", code=1)
