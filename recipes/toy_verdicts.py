"""Differences between runs of the study, their intervals over seeds and problems, and what these decide.

A difference is a sum of factor * metric over runs, and the mean of that over seeds. Its 95% interval holds
two: that of a hierarchical bootstrap, which draws seeds and problems, and a t interval over the seeds' own
differences. The first alone is too narrow where few seeds vary (of three, one draw in 27 has the lowest
thrice); the second alone knows nothing of the problems. With runs that have no seeds it is a bootstrap over
problems, which decides nothing.

A claim says that a difference is above a bound. It "holds" where the whole interval is above it and at least
all seeds but one are; it is "opposite" where both are below; else it is "not resolved". It takes three seeds.
"""

import functools
from typing import NamedTuple

import torch

from distil import evaluation
from distil.evaluation import pass_at_k, percentile_interval

FEWEST_SEEDS = 3  # for a verdict
T_QUANTILES = {
    3: 4.3027,
    4: 3.1824,
    5: 2.7764,
    6: 2.5706,
    7: 2.4469,
    8: 2.3646,
    9: 2.3060,
    10: 2.2622,
}  # {seeds: 97.5%}
ROUNDING = 1e-9


class Difference(NamedTuple):
    mean: float
    low: float
    high: float
    each: list  # of each seed; empty without seeds


def values_of(entry, metric):
    """(values, weights), float64 (P,): the metric is sum(values) / sum(weights) over problems. Every token
    has the same weight in an entropy, every problem in the other metrics."""
    if metric in entry.get("sums", {}):  # recipes/kl_study.py
        return tuple(map(tensor, entry["sums"][metric]))
    n = entry["n"]
    numbers = {key: entry[key].split() for key in ("tokens", "entropy")}
    numbers |= {key: [*entry[key]] for key in ("correct", "cut")}
    if metric == "entropy":
        return tensor(map(float, numbers["entropy"])), tensor(map(float, numbers["tokens"]))
    if metric.startswith("pass@"):
        k = int(metric.removeprefix("pass@"))
        values = tensor(pass_at_k(n, int(count), k) for count in numbers["correct"])
    else:
        key = {"avg": "correct", "length": "tokens", "truncated": "cut"}[metric]
        values = tensor(map(int, numbers[key])) / n
    return values, torch.ones_like(values)


def tensor(values):
    return torch.tensor([*values], dtype=torch.float64)


@functools.cache
def drawn(draws, size, seed):
    """How often each of `size` things is in each of so many bootstrap samples: (draws, size), float64."""
    picks = torch.randint(size, (draws, size), generator=torch.Generator().manual_seed(seed))
    ones = torch.ones(draws, size, dtype=torch.float64)
    return torch.zeros(draws, size, dtype=torch.float64).scatter_add_(1, picks, ones)


def by_seed(found, terms, metric, seeds, counts):
    """The difference in every seed, with problems counted as in counts (D, P): (D, S). found: {run: {seed:
    entry}}; a run that was made once, {None: entry}, is the same in every seed."""
    total = 0.0
    for run, factor in terms.items():
        columns = []
        for seed in [None] if None in found[run] else seeds:
            values, weights = values_of(found[run][seed], metric)
            columns.append((counts @ values) / (counts @ weights))
        total = total + factor * torch.stack(columns, 1)
    return total


def hierarchical_means(matrix, seed_counts):
    """The mean over seeds of (D, S), in which draw d has seed s seed_counts[d, s] times: (D,)."""
    return (matrix * seed_counts).sum(1) / seed_counts.sum(1)


def difference(found, terms, metric):
    """Difference of sum(factor * metric) over {run: factor}, on the same problems and seeds in all runs.
    Seeds that a run lacks are left out. None if a run, or every seed, is missing."""
    if any(run not in found for run in terms):
        return None
    seeded = [set(found[run]) for run in terms if None not in found[run]]
    seeds = sorted(set.intersection(*seeded)) if seeded else [None]
    if not seeds:
        return None
    problems = len(next(iter(found[next(iter(terms))].values()))["correct"])
    [each] = by_seed(found, terms, metric, seeds, torch.ones(1, problems, dtype=torch.float64)).tolist()
    mean = sum(each) / len(each)
    low, high = bootstrap_interval(found, terms, metric, seeds, problems)
    if len(seeds) >= FEWEST_SEEDS:
        ends = t_interval(each)
        low, high = min(low, ends[0]), max(high, ends[1])
    return Difference(mean, low, high, each if seeded else [])


def bootstrap_interval(found, terms, metric, seeds, problems):
    """95% interval of a difference from so many draws of the seeds, a list, and of the problems, a number."""
    matrix = by_seed(found, terms, metric, seeds, drawn(evaluation.DRAWS, problems, 0))
    return percentile_interval(hierarchical_means(matrix, drawn(evaluation.DRAWS, len(seeds), 1)))


def t_interval(values):
    """95% interval of the mean of independent normal values: 3 to 10 of them."""
    values = tensor(values)
    half = T_QUANTILES[len(values)] * values.std().item() / len(values) ** 0.5
    return values.mean().item() - half, values.mean().item() + half


def verdict(found, bound=0.0):
    """What a Difference, or None, says about the claim that it is above the bound."""
    if found is None:
        return "not run yet"
    if len(found.each) < FEWEST_SEEDS:
        return "too few seeds" if found.each else "no seeds"
    enough = len(found.each) - 1
    if found.low > bound + ROUNDING and sum(value > bound for value in found.each) >= enough:
        return "holds"
    if found.high < bound - ROUNDING and sum(value < bound for value in found.each) >= enough:
        return "opposite"
    return "not resolved"
