"""The study's differences, intervals and verdicts, beside brute force and known t quantiles."""

import math
import random

import pytest
import torch

from distil import evaluation
from recipes.toy_verdicts import (
    T_QUANTILES,
    Difference,
    bootstrap_interval,
    difference,
    t_interval,
    values_of,
    verdict,
)


def entry(correct, tokens, entropy, cut=None):
    """Of 8 responses to each problem."""
    texts = {"tokens": tokens, "entropy": entropy}
    texts = {key: " ".join(map(str, row)) for key, row in texts.items()}
    cut = "".join(map(str, cut or [0] * len(correct)))
    return {"n": 8, "correct": "".join(map(str, correct)), "cut": cut, **texts}


def random_entry(rng, lift=0, problems=12):
    correct = [rng.choice([0, 2, 4, 6]) + lift for _ in range(problems)]
    return entry(correct, [rng.randint(8, 60) for _ in correct], [rng.uniform(1, 9) for _ in correct])


@pytest.fixture
def found(monkeypatch):
    """a and b have the seeds 1, 2 and 3, and a also 4; c was made once. a is better than the others."""
    monkeypatch.setattr(evaluation, "DRAWS", 100)
    rng = random.Random(1)
    a = {seed: random_entry(rng, lift=2) for seed in (1, 2, 3, 4)}
    return {"a": a, "b": {seed: random_entry(rng) for seed in (1, 2, 3)}, "c": {None: random_entry(rng)}}


def by_hand(found, terms, metric, seeds, problems):
    """Mean over such seeds of sum(factor * metric) over such problems, a response's sum at a time."""
    total = 0.0
    for seed in seeds:
        for run, factor in terms.items():
            one = found[run].get(seed) or found[run][None]
            top = bottom = 0.0
            for i in problems:
                count, tokens = int(one["correct"][i]), int(one["tokens"].split()[i])
                entropy = float(one["entropy"].split()[i])
                values = {"avg": count / 8, "pass@8": count > 0, "length": tokens / 8, "entropy": entropy}
                top += values[metric]
                bottom += tokens if metric == "entropy" else 1
            total += factor * top / bottom
    return total / len(seeds)


@pytest.mark.parametrize("metric", ["avg", "pass@8", "length", "entropy"])
@pytest.mark.parametrize("terms", [{"a": 1, "b": -1}, {"a": 1, "b": -0.5, "c": -0.5}])
def test_the_bootstrap_draws_seeds_and_problems(found, metric, terms):
    seeds, everything = [1, 2, 3], range(12)
    these = torch.randint(12, (100, 12), generator=torch.Generator().manual_seed(0)).tolist()
    those = torch.randint(3, (100, 3), generator=torch.Generator().manual_seed(1)).tolist()
    draws = sorted(
        by_hand(found, terms, metric, [seeds[i] for i in picks], problems)
        for problems, picks in zip(these, those)
    )
    low, high = bootstrap_interval(found, terms, metric, seeds, 12)
    mean, lower, higher, each = difference(found, terms, metric)
    assert (lower, higher) == (min(low, t_interval(each)[0]), max(high, t_interval(each)[1]))
    assert mean == pytest.approx(by_hand(found, terms, metric, seeds, everything))
    assert each == pytest.approx([by_hand(found, terms, metric, [seed], everything) for seed in seeds])
    assert [low, high] == pytest.approx([draws[2], draws[96]])  # leaves out 2 below and 3 above


def test_runs_without_seeds_have_an_interval_over_problems_and_no_verdict(found):
    this = difference(found | {"d": {None: found["a"][1]}}, {"d": 1, "c": -1}, "avg")
    assert this.each == [] and this.low < this.mean < this.high
    assert verdict(this) == "no seeds"


def test_missing_runs_and_seeds(found):
    assert difference(found, {"a": 1, "x": -1}, "avg") is None
    assert difference(found | {"b": {7: found["b"][1]}}, {"a": 1, "b": -1}, "avg") is None
    assert verdict(None) == "not run yet"
    one = difference(found | {"b": {4: found["b"][1]}}, {"a": 1, "b": -1}, "avg")
    assert len(one.each) == 1 and verdict(one) == "too few seeds"
    assert verdict(Difference(0.2, 0.1, 0.3, [0.2, 0.2])) == "too few seeds"


def t_density(t, freedom):
    scale = math.gamma((freedom + 1) / 2) / math.sqrt(freedom * math.pi) / math.gamma(freedom / 2)
    return scale * (1 + t * t / freedom) ** (-(freedom + 1) / 2)


@pytest.mark.parametrize("seeds", T_QUANTILES)
def test_t_quantiles_leave_a_fortieth_above(seeds):
    steps, end = 2000, T_QUANTILES[seeds]
    edges = [t_density(end * i / steps, seeds - 1) * (1 if i in (0, steps) else 2) for i in range(steps + 1)]
    assert 0.5 + sum(edges) * end / steps / 2 == pytest.approx(0.975, abs=2e-6)


def test_a_t_interval_is_that_of_the_textbook():
    """1 to 5: mean 3, standard deviation sqrt(2.5), 2.7764 * sqrt(0.5) = 1.9632."""
    assert t_interval([1, 2, 3, 4, 5]) == pytest.approx((3 - 1.9632, 3 + 1.9632), abs=1e-4)


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("of_seeds, of_problems", [(1.0, 0.0), (1.0, 7.0), (0.1, 7.0)])
def test_where_there_is_nothing_few_verdicts_are_wrong(seeds, of_seeds, of_problems, monkeypatch):
    """Runs without a difference: deviations of seeds, and of 50 problems that all seeds share."""
    monkeypatch.setattr(evaluation, "DRAWS", 200)
    rng, wrong, trials, equal = random.Random(3), 0, 300, [1] * 50
    for _ in range(trials):
        shared, runs = [rng.gauss(0, of_problems) for _ in equal], {}
        for seed in range(seeds):
            level = rng.gauss(0, of_seeds)
            runs[seed] = {"correct": "0" * 50, "sums": {"x": [[level + one for one in shared], equal]}}
        wrong += verdict(difference({"a": runs}, {"a": 1}, "x")) in ("holds", "opposite")
    assert wrong / trials < 0.1  # with the bootstrap alone up to a quarter


def of_seeds(*levels):
    """A run whose seeds solve so many of 8 responses to each of 50 problems."""
    return {seed: entry([level] * 50, [40] * 50, [9.0] * 50) for seed, level in enumerate(levels)}


@pytest.mark.parametrize(
    "levels, expected",
    [
        ((6, 6, 7), "holds"),
        ((3, 2, 2), "opposite"),
        ((7, 2, 7), "not resolved"),  # the mean is above, and each seed's problems all agree
        ((2, 7, 1), "not resolved"),
        ((6, 6, 6, 6, 3), "not resolved"),  # t: mean +1.4, half width 1.67
        ((6, 6, 7, 6, 7), "holds"),
        ((2, 2, 3, 2, 1), "opposite"),
    ],
)
def test_verdicts_count_seeds(levels, expected, monkeypatch):
    monkeypatch.setattr(evaluation, "DRAWS", 1000)
    found = {"a": of_seeds(*levels), "b": of_seeds(*[4] * len(levels))}
    this = difference(found, {"a": 1, "b": -1}, "avg")
    assert this.each == pytest.approx([(level - 4) / 8 for level in levels])
    assert verdict(this) == expected
    opposite = {"holds": "opposite", "opposite": "holds"}.get(expected, expected)
    assert verdict(difference(found, {"a": -1, "b": 1}, "avg")) == opposite


def test_all_seeds_but_one_must_agree_and_bounds_move_the_line():
    assert verdict(Difference(0.2, 0.1, 0.3, [0.3, 0.3, -0.1])) == "holds"
    assert verdict(Difference(0.2, 0.1, 0.3, [0.8, -0.1, -0.1])) == "not resolved"
    assert verdict(Difference(-0.2, -0.3, -0.1, [-0.3, -0.3, 0.1])) == "opposite"
    assert verdict(Difference(-0.01, -0.015, 0.0, [-0.01, -0.01, -0.01]), bound=-0.02) == "holds"
    assert verdict(Difference(0.2, 0.1, 0.3, [0.2, 0.2, 0.2]), bound=0.4) == "opposite"


def test_values_are_those_of_the_counts():
    one = entry([8, 0, 4], [80, 40, 40], [8.0, 4.0, 12.0], cut=[0, 8, 1])
    assert values_of(one, "truncated")[0].tolist() == [0, 1, 1 / 8]
    values, weights = values_of(one, "entropy")
    assert values.sum() / weights.sum() == pytest.approx(24 / 160)
    assert values_of(one, "pass@4")[0].tolist() == pytest.approx([1, 0, 1 - 1 / 70])
