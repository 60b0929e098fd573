"""Tables and figures of the study on the toy world, from its results.json: recipes/toy_grid.py --report.

A claim says that a difference between runs, on the same test problems, is above a bound: 0 unless its row
has another. The difference is a mean over seeds, with a 95% bootstrap interval over problems. "holds": the
whole interval is above the bound; "opposite": all of it is below. The interval does not cover the variation
between seeds; each seed's own difference is printed beside it.
"""

import functools
import json
import os

from distil.evaluation import bootstrap_means, mean_of, pass_at_k, percentile_interval
from reports.tables import markdown

HORIZONS, PREFIXES, KLS = ("short", "long"), ("teacher", "student"), ("forward", "reverse")
CELLS = [f"{prefix}_{kl}_{horizon}" for horizon in HORIZONS for prefix in PREFIXES for kl in KLS]
METRICS = {  # head in the table, axis in a figure
    "avg": ("Avg@8", "accuracy"),
    "pass@4": ("Pass@4", "Pass@4"),
    "pass@8": ("Pass@8", "Pass@8"),
    "length": ("length", "length (tokens)"),
    "truncated": ("truncated", "truncated"),
    "entropy": ("entropy", "entropy (nats)"),
}

# claim (what is subtracted from what) | metrics | that difference, of runs or groups of runs | bound
CLAIMS = """
reverse KL scores higher, short horizon (reverse minus forward) | avg | reverse_short - forward_short
reverse KL has lower entropy, short horizon (forward minus reverse) | entropy | forward_short - reverse_short
reverse KL scores higher, long horizon (reverse minus forward) | avg | reverse_long - forward_long
reverse KL has lower entropy, long horizon (forward minus reverse) | entropy | forward_long - reverse_long
forward KL scores higher, long horizon (forward minus reverse) | pass@4 | forward_long - reverse_long
equal steps, short: student prefix wins (student minus teacher) | avg pass@4 | student_short - teacher_short
equal FLOPs, short: cached teacher wins (teacher minus student) | avg | teacher_short - matched_short
equal steps, long: student prefix wins (student minus teacher) | avg pass@4 | student_long - teacher_long
equal FLOPs, long: cached teacher wins (teacher minus student) | avg | teacher_long - matched_long
the long horizon scores higher (long minus short) | avg | long - short
the long horizon lowers entropy, reverse KL (short minus long) | entropy | reverse_short - reverse_long
mix 0.8 loses less than 0.02 (mix 0.8 minus reverse; claim: above -0.02) | avg | mix_0.8 - fixed | -0.02
mix 0.8 has higher entropy (mix 0.8 minus reverse) | entropy | mix_0.8 - fixed
mix 0.8 writes shorter responses (reverse minus mix 0.8) | length | fixed - mix_0.8
the curriculum scores higher (curriculum minus fixed long horizon) | avg pass@4 | curriculum - fixed
the curriculum writes shorter responses (fixed long horizon minus curriculum) | length | fixed - curriculum
GRPO gains more after forward KL, short (forward minus reverse) | avg | fkl_gain_short - rkl_gain_short
GRPO gains more after forward KL, long (forward minus reverse) | avg | fkl_gain_long - rkl_gain_long
same stop token: long reverse KL lowers entropy (base minus student) | entropy | base - fixed
same stop token: long reverse KL lengthens responses (student minus teacher) | length | fixed - teacher
control, same stop token: entropy lost by collapsing (base minus collapsed) | entropy | base - collapsed
control, same stop token: collapsing lengthens responses (collapsed minus base) | length | collapsed - base
control: collapsed, then reverse KL: writes more (student minus teacher) | length | from_collapsed - teacher
other stop token, both stop: more truncated (other minus same token) | truncated | ends_both - fixed
other stop token, only its own stops: more truncated (own minus both) | truncated | ends_student - ends_both
own stop only, short horizon: more truncated (other minus same token) | truncated | ends_short - same_short
own stop only, forward KL: more truncated (other minus same token) | truncated | ends_fkl - same_fkl
own stop only, forward KL: entropy falls meanwhile (base minus student) | entropy | base_endoftext - ends_fkl
both stop in evaluation only: more truncated (evaluation only minus both) | truncated | ends_cut - ends_both
own stop only: curriculum truncates less (fixed minus curriculum) | truncated | ends_student - ends_gated
own stop only: curriculum scores higher (curriculum minus fixed) | avg pass@4 | ends_gated - ends_student
top-k (4) loses less than 0.02 (top-k minus full vocabulary; claim: above -0.02) | avg | topk - fixed | -0.02
one sampled token scores lower (full vocabulary minus sampled) | avg | fixed - sampled
"""

# figure: ({panel: {label: run}}, metrics, x axis); the paper's figures 2 to 5 are "cells", 6 "flops", 7 "mix"
GRID = {h: {f"{p} prefix, {kl} KL": f"{p}_{kl}_{h}" for p in PREFIXES for kl in KLS} for h in HORIZONS}
HORIZON_PANELS = {f"{h} horizon": runs for h, runs in GRID.items()}
GRPO_PANELS = {
    f"GRPO after the {h} horizon": {label: f"grpo_{run}" for label, run in GRID[h].items()} for h in HORIZONS
}
MIXES = {
    "forward weight 0": "student_reverse_long",
    "0.2": "mix_0.2",
    "0.5": "mix_0.5",
    "0.8": "mix_0.8",
    "1": "student_forward_long",
}
CURRICULUM = {
    "fixed long": "student_reverse_long",
    "curriculum": "curriculum",
    "fixed short": "student_reverse_short",
}
STOPS = {
    "same stop token, long, reverse": "student_reverse_long",
    "other stop token, both stop": "ends_both",
    "other stop token, only its own stops": "ends_student",
    "own stop only, forward KL": "ends_student_forward",
    "own stop only, short horizon": "ends_student_short",
    "own stop only, curriculum": "ends_student_curriculum",
    "same stop token, from collapsed": "from_collapsed",
}
THREE = ("avg", "entropy", "length")
FIGURES = {
    "cells": (HORIZON_PANELS, THREE, "step"),
    "flops": (HORIZON_PANELS, ("avg", "pass@4"), "tflops"),
    "mix": ({"student prefix, long": MIXES}, THREE, "step"),
    "curriculum": ({"student prefix, reverse KL": CURRICULUM}, THREE, "step"),
    "grpo": (GRPO_PANELS, THREE, "step"),
    "ends": ({"student prefix": STOPS}, (*THREE, "truncated"), "step"),
}


# ----------------------------------------------------------------------------------------------------------
# Differences of runs


def make_groups():
    """{name: {run: factor}} of the names in CLAIMS that are no run's: short names, means, gains of GRPO."""
    groups = {
        "fixed": {"student_reverse_long": 1},
        "same_short": {"student_reverse_short": 1},
        "same_fkl": {"student_forward_long": 1},
        "ends_short": {"ends_student_short": 1},
        "ends_fkl": {"ends_student_forward": 1},
        "ends_gated": {"ends_student_curriculum": 1},
        "ends_cut": {"ends_student_cut": 1 / 2, "ends_student_forward_cut": 1 / 2},
    }
    for horizon in HORIZONS:
        groups[horizon] = {run: 1 / 4 for run in CELLS if run.endswith(horizon)}
        for word in (*PREFIXES, *KLS):
            pair = [run for run in groups[horizon] if word in run]
            groups[f"{word}_{horizon}"] = {run: 1 / 2 for run in pair}
            after = {f"grpo_{run}": 1 / 2 for run in pair}
            groups[f"{word[0]}kl_gain_{horizon}"] = after | {run: -1 / 2 for run in pair}
        groups[f"matched_{horizon}"] = {f"student_{kl}_{horizon}_equal_flops": 1 / 2 for kl in KLS}
    return groups


def claims():
    """[(claim, metric, {run: factor}, bound)]: the claim is sum(factor * metric) > bound."""
    groups, found = make_groups(), []
    for line in CLAIMS.strip().splitlines():
        claim, metrics, runs, *bound = [part.strip() for part in line.split("|")]
        this, that = [groups.get(name, {name: 1.0}) for name in runs.split(" - ")]
        terms = this | {run: -factor for run, factor in that.items()}
        found += [(claim, metric, terms, float(bound[0]) if bound else 0.0) for metric in metrics.split()]
    return found


def values_of(entries, metric):
    """(values, weights or None), one value a problem: the mean over the entries, one a seed.
    Every token has the same weight in an entropy, every problem in the other metrics."""

    def mean(key, share=float):
        rows = [[share(x) for x in entry[key].split()] for entry in entries]
        return tuple(sum(column) / len(rows) for column in zip(*rows, strict=True))

    n = entries[0]["n"]
    if metric == "entropy":
        return mean("entropy"), mean("tokens")
    if metric.startswith("pass@"):
        k = int(metric.removeprefix("pass@"))
        return mean("correct", lambda count: pass_at_k(n, int(count), k)), None
    key = {"avg": "correct", "length": "tokens", "truncated": "cut"}[metric]
    return mean(key, lambda total: int(total) / n), None


resampled_once = functools.cache(bootstrap_means)


def difference(results, terms, metric):
    """Sum of factor * metric over {run: factor}: (mean over seeds, its interval, [value of each seed]).
    The bootstrap draws the same problems for all runs."""

    def total(measure, seeds):
        value = 0.0
        for name, factor in terms.items():
            entries = [entry for entry in results if entry["name"] == name and entry["seed"] in seeds]
            value += factor * measure(*values_of(entries, metric))
        return value

    seeds = sorted({entry["seed"] for entry in results if entry["name"] in terms} - {None})
    shared = [None, *seeds]  # None: the runs that all seeds share
    each = [total(mean_of, [None, seed]) for seed in seeds]
    return total(mean_of, shared), percentile_interval(total(resampled_once, shared)), each


def verdict(low, high, bound):
    rounding = 1e-9
    if low > bound + rounding:
        return "holds"
    return "opposite" if high < bound - rounding else "not resolved"


# ----------------------------------------------------------------------------------------------------------
# Tables and figures


def claims_table(results):
    lines = [["claim", "metric", "difference [95%]", "each seed", "verdict"], ["---"] * 5]
    for claim, metric, terms, bound in claims():
        mean, (low, high), each = difference(results, terms, metric)
        shown = f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"
        seeds = " ".join(f"{value:+.3f}" for value in each)
        lines.append([claim, METRICS[metric][0], shown, seeds, verdict(low, high, bound)])
    return markdown(lines)


def runs_table(results):
    head = ["run", *(label for label, _ in METRICS.values()), "Maj@8", "TFLOPs"]
    lines = [head, ["---"] * len(head)]
    for name in dict.fromkeys(entry["name"] for entry in results):
        line = [name]
        for metric in METRICS:
            mean, (low, high), _ = difference(results, {name: 1}, metric)
            digits = 1 if metric == "length" else 3
            line.append(f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]")
        entries = [entry for entry in results if entry["name"] == name]
        line += [f"{sum(entry[key] for entry in entries) / len(entries):.3g}" for key in ("maj", "tflops")]
        lines.append(line)
    return markdown(lines)


def gates_text(results):
    """How many gates of the entropy-gated curriculum closed: one that only opens is a fixed schedule."""
    gates = [gate for entry in results for gate in entry.get("gates", [])]
    closed = sum(gate["decision"] != "advance" for gate in gates)
    floors = ", ".join(sorted({f"{gate['entropy_floor']:g}" for gate in gates}))
    return f"Gates of the curriculum that closed (entropy floor {floors}): {closed} of {len(gates)}."


def report(path):
    """Writes the tables of claims and of runs beside the results, prints them, and draws the figures."""
    found = json.load(open(path, encoding="utf-8"))
    results, stem = found["results"], os.path.splitext(path)[0]
    text = (
        f"Commit {found['commit'][:12]}, {found['device']}, torch {found['versions']['torch']}, "
        f"seeds {found['seeds']}, {len(results[0]['correct'].split())} test problems.\n\n"
        f"{gates_text(results)}\n\n{claims_table(results)}\n\n{runs_table(results)}\n"
    )
    with open(f"{stem}.md", "w", encoding="utf-8") as file:
        file.write(text)
    print(text)
    for name, (panels, metrics, x) in FIGURES.items():
        draw(f"{stem}_{name}.png", results, panels, metrics, x)


def draw(path, results, panels, metrics, x):
    """panels: {title: {label: run}}, a row each; metrics: columns. Thin lines are seeds, thick ones means."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = 4.2 * len(metrics), 3.2 * len(panels)
    fig, axes = plt.subplots(len(panels), len(metrics), figsize=size, squeeze=False, layout="constrained")
    for row, (title, runs) in zip(axes, panels.items()):
        for axis, metric in zip(row, metrics):
            for color, (label, run) in enumerate(runs.items()):
                seeds = [entry["curve"] for entry in results if entry["name"] == run]
                draw_run(axis, f"C{color}", label, seeds, x, metric)
            axis.set(title=f"{title}: {METRICS[metric][1]}", xlabel="TFLOPs" if x == "tflops" else x)
            axis.grid(alpha=0.3)
        row[-1].legend(fontsize=8)
    fig.savefig(path, dpi=90)
    plt.close(fig)
    print(f"figure: {path}")


def draw_run(axis, color, label, seeds, x, y):
    """seeds: the curve of each seed, a list of evaluations. The mean ends with the shortest curve."""
    curves = [([point[x] for point in curve], [point[y] for point in curve]) for curve in seeds]
    for curve in curves:
        axis.plot(*curve, color=color, linewidth=0.6, alpha=0.5)
    mean_x, mean_y = ([sum(same) / len(same) for same in zip(*column)] for column in zip(*curves))
    axis.plot(mean_x, mean_y, color=color, linewidth=2, marker="o", markersize=3, label=label)
