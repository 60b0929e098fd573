"""Tables and figures of the study on the toy world, from its results: recipes/toy_grid.py --report.

recipes/toy_verdicts.py says what a difference and a verdict are. Claims about cells are judged twice: at
the usual learning rate, where all seeds share a base student, and at each cell's own.
"""

import os

from distil.artifacts import refuse
from recipes.toy_map_report import (
    avg_table,
    draw_map,
    gates_table,
    interval,
    map_table,
    mixed_starts,
    points_of,
    rates_table,
    save,
    signed,
    subplots,
)
from recipes.toy_runs import (
    CELLS,
    CUT,
    FLOORS,
    HORIZONS,
    KLS,
    OF_CELLS,
    PREFIXES,
    SIZE,
    USUAL,
    choose,
    count_missing,
    name_of,
    runs_of,
)
from recipes.toy_verdicts import difference, verdict
from reports.figure import line_styles
from reports.tables import markdown

METRICS = {  # head in the table, axis in a figure
    "avg": ("Avg@8", "accuracy"),
    "pass@4": ("Pass@4", "Pass@4"),
    "pass@8": ("Pass@8", "Pass@8"),
    "length": ("length", "length (tokens)"),
    "truncated": ("truncated", "truncated"),
    "entropy": ("entropy", "entropy (nats)"),
}

# claim (what is subtracted from what) | metrics | that difference, of runs or groups of runs | bound
CELL_CLAIMS = """
reverse KL scores higher, short horizon (reverse minus forward) | avg | reverse_short - forward_short
reverse KL scores higher, teacher prefix, short (reverse minus forward) | avg | tr_short - tf_short
reverse KL scores higher, student prefix, short (reverse minus forward) | avg | sr_short - sf_short
reverse KL has lower entropy, short horizon (forward minus reverse) | entropy | forward_short - reverse_short
reverse KL scores higher, long horizon (reverse minus forward) | avg | reverse_long - forward_long
reverse KL scores higher, teacher prefix, long (reverse minus forward) | avg | tr_long - tf_long
reverse KL scores higher, student prefix, long (reverse minus forward) | avg | sr_long - sf_long
reverse KL has lower entropy, long horizon (forward minus reverse) | entropy | forward_long - reverse_long
forward KL scores higher, long horizon (forward minus reverse) | pass@4 | forward_long - reverse_long
equal steps, short: student prefix wins (student minus teacher) | avg pass@4 | student_short - teacher_short
equal FLOPs, short: cached teacher wins (teacher minus student) | avg | teacher_short - matched_short
equal FLOPs, short, forward KL: cached teacher wins (teacher minus student) | avg | tf_short - matched_f_short
equal FLOPs, short, reverse KL: cached teacher wins (teacher minus student) | avg | tr_short - matched_r_short
equal steps, long: student prefix wins (student minus teacher) | avg pass@4 | student_long - teacher_long
equal FLOPs, long: cached teacher wins (teacher minus student) | avg | teacher_long - matched_long
equal FLOPs, long, forward KL: cached teacher wins (teacher minus student) | avg | tf_long - matched_f_long
equal FLOPs, long, reverse KL: cached teacher wins (teacher minus student) | avg | tr_long - matched_r_long
the long horizon scores higher (long minus short) | avg | long - short
the long horizon lowers entropy, reverse KL (short minus long) | entropy | reverse_short - reverse_long
"""
OTHER_CLAIMS = """
mix 0.8 loses less than 0.02 (mix 0.8 minus reverse; claim: above -0.02) | avg | mix_0.8 - fixed | -0.02
mix 0.8 has higher entropy (mix 0.8 minus reverse) | entropy | mix_0.8 - fixed
mix 0.8 writes shorter responses (reverse minus mix 0.8) | length | fixed - mix_0.8
the curriculum scores higher (curriculum minus fixed long horizon) | avg pass@4 | curriculum - fixed
curriculum with floor 0.33 scores higher (curriculum minus fixed) | avg | gated_0.33 - fixed_again
curriculum with floor 0.38 scores higher (curriculum minus fixed) | avg | gated_0.38 - fixed_again
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
    "same stop token, entropy collapsed before": "from_collapsed",
}
OWN = "own learning rates, each seed from its own base student"
THREE = ("avg", "entropy", "length")


def figures():
    """{name: ({panel: {label: run}}, metrics, x axis)}; the paper's figures 2 to 5 are "cells", 6 "flops", 7
    "mix"."""
    grid = {h: {f"{p} prefix, {kl} KL": f"{p}_{kl}_{h}" for p in PREFIXES for kl in KLS} for h in HORIZONS}
    cells = {f"{h} horizon": grid[h] for h in HORIZONS}
    after = {
        f"GRPO after the {h} horizon": {label: f"grpo_{cell}" for label, cell in grid[h].items()}
        for h in HORIZONS
    }
    return {
        "cells": (cells, THREE, "step"),
        "flops": (cells, ("avg", "pass@4"), "tflops"),
        "mix": ({"student prefix, long": MIXES}, THREE, "step"),
        "curriculum": ({"student prefix, reverse KL": CURRICULUM}, THREE, "step"),
        "grpo": (after, THREE, "step"),
        "ends": ({"student prefix": STOPS}, (*THREE, "truncated"), "step"),
    }


# ----------------------------------------------------------------------------------------------------------
# Claims


def best_runs(results):
    """{cell: its run at the chosen learning rate}; "not chosen" until all rates were tried."""
    rates = {point[0]: choose(SIZE, results, point)[1] for point in OF_CELLS}
    return {cell: name_of(cell, rate=rate) if rate else "not chosen" for cell, rate in rates.items()}


def make_groups(best):
    """{name: {run: factor}} of the names in claims that are no run's: short names, means, gains of GRPO."""
    groups = {
        "fixed": {"student_reverse_long": 1},
        "fixed_again": {name_of("student_reverse_long"): 1},  # from the base students of the next two
        "gated_0.33": {"curriculum_floor_0.33": 1},
        "gated_0.38": {"curriculum_floor_0.38": 1},
        "same_short": {"student_reverse_short": 1},
        "same_fkl": {"student_forward_long": 1},
        "ends_short": {"ends_student_short": 1},
        "ends_fkl": {"ends_student_forward": 1},
        "ends_gated": {"ends_student_curriculum": 1},
        "ends_cut": {"ends_student_cut": 1 / 2, "ends_student_forward_cut": 1 / 2},
    }
    for cell in CELLS:
        prefix, kl, horizon = cell.split("_")
        groups[f"{prefix[0]}{kl[0]}_{horizon}"] = {best[cell]: 1}
    for horizon in HORIZONS:
        cells = [cell for cell in CELLS if cell.endswith(horizon)]
        groups[horizon] = {best[cell]: 1 / 4 for cell in cells}
        for word in (*PREFIXES, *KLS):
            pair = [cell for cell in cells if word in cell]
            groups[f"{word}_{horizon}"] = {best[cell]: 1 / 2 for cell in pair}
            after = {f"grpo_{cell}": 1 / 2 for cell in pair}
            groups[f"{word[0]}kl_gain_{horizon}"] = after | {cell: -1 / 2 for cell in pair}
        students = [best[cell] for cell in cells if cell.startswith("student")]
        groups[f"matched_{horizon}"] = {f"{run}_equal_flops": 1 / 2 for run in students}
        for kl in KLS:
            groups[f"matched_{kl[0]}_{horizon}"] = {f"{best[f'student_{kl}_{horizon}']}_equal_flops": 1}
    return groups


def claims(text, best):
    """[(claim, metric, {run: factor}, bound)]: the claim is sum(factor * metric) > bound."""
    groups, found = make_groups(best), []
    for line in text.strip().splitlines():
        claim, metrics, runs, *bound = [part.strip() for part in line.split("|")]
        this, that = [groups.get(name, {name: 1.0}) for name in runs.split(" - ")]
        terms = this | {run: -factor for run, factor in that.items()}
        found += [(claim, metric, terms, float(bound[0]) if bound else 0.0) for metric in metrics.split()]
    return found


def claims_table(text, best, found):
    """text: CELL_CLAIMS or OTHER_CLAIMS; best: {cell: run}; found: {run: {seed: entry}}."""
    lines = [["claim", "metric", "difference [95%]", "each seed", "verdict"], ["---"] * 5]
    for claim, metric, terms, bound in claims(text, best):
        this = difference(found, terms, metric)
        lines.append([claim, METRICS[metric][0], *signed(this), verdict(this, bound)])
    return markdown(lines)


# ----------------------------------------------------------------------------------------------------------
# Runs and figures


def runs_table(names, found):
    head = ["run", *(label for label, _ in METRICS.values()), "Maj@8", "TFLOPs"]
    lines = [head, ["---"] * len(head)]
    for name in (name for name in names if name in found):
        line = [name]
        for metric in METRICS:
            mean, low, high, _ = difference(found, {name: 1}, metric)
            if metric not in ("length", "entropy"):
                low, high = max(low, 0), min(high, 1)  # of a t interval
            digits = 1 if metric == "length" else 3
            line.append(f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]")
        entries = found[name]
        entries = [entries[None]] if None in entries else entries.values()
        line += [f"{sum(entry[key] for entry in entries) / len(entries):.3g}" for key in ("maj", "tflops")]
        lines.append(line)
    return markdown(lines)


def report(path, results):
    """Writes the tables of claims and of runs beside the results, prints them, and draws the figures.
    results: {place: result}."""
    stem, best, found = os.path.splitext(path)[0], best_runs(results), {}
    if not results:
        refuse(f"--report {path}: no results in it")
    for place, result in results.items():
        if "gates" not in result:
            refuse(f"--report {path}: {place} is no result of this study")
        found.setdefault(result["name"], {})[result["seed"]] = result
    usual = {cell: cell for cell in CELLS}
    matched = [f"{run}_equal_flops" for run in best.values() if run.startswith("student")]
    shared = [name for name in found if None in found[name]]
    names = [*shared, *best.values(), *matched, *runs_of(SIZE, 1), *CUT]
    lacking = count_missing(SIZE, results)
    state = f"At least {lacking} runs are missing: `bash recipes/toy_grid.sh` makes them." if lacking else ""
    problems = {len(result["correct"]) for result in results.values()}
    floors = [name_of("student_reverse_long"), *(f"curriculum_floor_{floor}" for floor in FLOORS[1:])]
    mixed = {seed for names in (CELLS, best.values(), floors) for seed in mixed_starts(found, names)}
    mixed |= {seed for *_, names in points_of(results) for seed in mixed_starts(found, names.values())}
    mixed = " ".join(map(str, sorted(mixed))) or "none"
    parts = {
        f"{len(results)} results, {max(problems)} test problems. {state}".strip(): "",
        f"## Cells at {USUAL}, all seeds from one base student": claims_table(CELL_CLAIMS, usual, found),
        f"## Cells at their {OWN}": claims_table(CELL_CLAIMS, best, found),
        f"Seeds with cells that are compared and start from base students of two machines: {mixed}.": "",
        f"## Other runs, at {USUAL}": claims_table(OTHER_CLAIMS, usual, found),
        "## Learning rates": rates_table(results),
        "## Map": map_table(results, found),
        "## Avg on the map, and rates": avg_table(results, found),
        "## Gates of the curriculum": gates_table(found),
        "## Runs": runs_table(names, found),
    }
    text = "\n\n".join(f"{head}\n\n{table}".strip() for head, table in parts.items()) + "\n"
    with open(f"{stem}.md", "w", encoding="utf-8") as file:
        file.write(text)
    print(text)
    for name, (panels, metrics, x) in figures().items():
        draw(f"{stem}_{name}.png", found, panels, metrics, x)
    if any("width" in run for run in found):
        draw_map(f"{stem}_map.png", results, found)


def draw(path, found, panels, metrics, x):
    """panels: {title: {label: run}}, a row each; metrics: columns. Thin lines are seeds, thick ones their
    means, in evaluations on held-out problems; at the right the final tests with 95% intervals."""
    fig, axes = subplots(len(panels), len(metrics), 2.6)
    for row, (title, runs) in zip(axes, panels.items()):
        styles = line_styles([cell_of(run) for run in runs.values()])
        for axis, metric in zip(row, metrics):
            for place, (style, (label, run)) in enumerate(zip(styles, runs.items())):
                curves = [entry["curve"] for entry in found.get(run, {}).values()]
                if curves:
                    draw_run(axis, style, label, curves, x, metric)
                    end = max(curve[x][-1] for curve in curves) * (1.04 + 0.03 * place)
                    look = {"filled": style["linestyle"] != "--", "upright": True}
                    interval(axis, style["color"], end, difference(found, {run: 1}, metric), **look)
            axis.set_title(METRICS[metric][1] if axis is not row[0] else f"{title}: {METRICS[metric][1]}")
            axis.set_xlabel("TFLOPs" if x == "tflops" else x)
    save(fig, path, axes[0][0])


def cell_of(run):
    """{"prefix", "kl"} of a cell's run, or of GRPO after it; None where a run is no cell."""
    words = run.removeprefix("grpo_").split("_") if run.removeprefix("grpo_") in CELLS else [None, None]
    return {"prefix": words[0], "kl": words[1]}


def draw_run(axis, style, label, curves, x, y):
    """curves: of each seed. The mean ends with the shortest curve."""
    for curve in curves:
        axis.plot(curve[x], curve[y], color=style["color"], linewidth=0.5, alpha=0.4)
    mean_x, mean_y = ([sum(same) / len(same) for same in zip(*(c[k] for c in curves))] for k in (x, y))
    axis.plot(mean_x, mean_y, **style, label=label)
