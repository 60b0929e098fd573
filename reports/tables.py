"""Markdown tables of what is finished: a row for each evaluation, and the differences of two.

Both end with means over data sets: every data set has the same weight, however many problems it has."""

import math
import os

from distil.artifacts import read_sealed, refuse
from distil.evaluation import bootstrap_means, data_names, mean_of, percentile_interval, values_by_problem
from distil.prompts import Prompting
from reports.reading import (
    KLS,
    cost_of,
    evaluations_in,
    kls_by_problem,
    metrics_of,
    read_evaluations,
    read_samples,
)

SEQUENCE_KLS = [f"sequence_{kl}" for kl in KLS.values()]
FORMS = {"length": ".1f", "truncated": ".1%"}  # of the other metrics .3f


def mean_over(measured):
    """{metric: mean over data sets} of the metrics that all have. measured: {metric: value} of each data set.

    The paper's Avg over benchmarks; values are numbers, or tensors of bootstrap means."""
    shared = [name for name in measured[0] if all(name in one for one in measured)]
    return {name: sum(one[name] for one in measured) / len(measured) for name in shared}


def by_n(values, n, common_n):
    """{metric: value}, and if data sets differ in n also pass@n and maj@n, which are those of k = n."""
    found = {}
    for name, value in values.items():
        found[name] = value
        if not common_n and name.endswith(f"@{n}"):
            found[f"{name.partition('@')[0]}@n"] = value
    return found


def note(n_of):
    """What is said below means. n_of: {data set: n}."""
    text = "mean: over data sets, each with the same weight."
    if len({*n_of.values()}) > 1:
        sets = {n: ", ".join(data for data, other in n_of.items() if other == n) for n in n_of.values()}
        text += f" Pass@n, Maj@n: n is {'; '.join(f'{n} on {listed}' for n, listed in sets.items())}."
    return text


# ----------------------------------------------------------------------------------------------------------
# --table


def table(paths):
    """Markdown table with a row for each evaluation, grouped by data set, then a row "mean" for each run.

    TFLOPs are those of the run that made the checkpoint, without those of the model it started from."""
    results = list(read_evaluations(paths, "--table")[0].values())
    check_comparable(results)
    names = data_names(r["data"] for r in results)
    n_of = {names[r["data"]]: r["n"] for r in results}
    common_n = len({*n_of.values()}) == 1
    rows, runs = [], {}
    for r in sorted(results, key=lambda r: list(names).index(r["data"])):
        row = {name: r[name] for name in ("run", "cell", "step", "tflops", "avg_interval")}
        row |= {"data": names[r["data"]], "n": str(r["n"]), "values": by_n(metrics_of(r), r["n"], common_n)}
        rows.append(row)
        runs.setdefault(r["run"], []).append(row)
    means = [mean_row(found, n_of) for found in runs.values() if len(found) > 1]
    rows += means
    # a k that is n wherever it was measured is in the column of n
    ks = {k for row in rows for k in ks_of(row["values"]) if common_n or k != row["n"]}
    ks = sorted(ks, key=lambda k: math.inf if k == "n" else int(k))
    left_out = {"Maj@1"}  # Avg@n again
    left_out |= {"data"} if len(names) == 1 else set()
    left_out |= {"n"} if common_n else set()
    left_out |= {name for name in SEQUENCE_KLS if not any(name in row["values"] for row in rows)}
    cells = [table_row(row, ks, row["n"] if common_n else "n") for row in rows]
    header = [name for name in cells[0] if name not in left_out]
    text = markdown([header, ["---"] * len(header), *([row[name] for name in header] for row in cells)])
    notes = [note(n_of)] if means else []
    return "\n\n".join([text, *notes, *kl_notes(results)])


def ks_of(values):
    return {name.partition("@")[2] for name in values} - {""}


def kl_notes(results):
    """What is to be said of the sequence KLs among some evaluations: one text, or none."""
    measured = [r for r in results if any(name in metrics_of(r) for name in SEQUENCE_KLS)]
    if not measured:
        return []
    text = "sequence_rkl, sequence_fkl: KL(q‖p), KL(p‖q) of whole responses, in nats; p: the teacher."
    teachers = {r["run"]: r["teacher"] for r in measured}
    if len({*teachers.values()}) > 1:
        each = "; ".join(f"{teacher} of {run}" for run, teacher in teachers.items())
        text += f" They cannot be compared, for the teachers differ: {each}."
    return [text]


def check_comparable(results):
    """Refuse evaluations on one data set that differ in problems, n or k."""
    first_on = {}  # data set: the first evaluation on it
    for r in results:
        first = first_on.setdefault(r["data"], r)
        for name in ("problems", "n", "pass"):
            values = [list(one[name]) if name == "pass" else one[name] for one in (first, r)]
            if values[0] != values[1]:
                why = f"differ in {name}, so their numbers cannot be compared"
                refuse(f"--table: the evaluations on {r['data']} {why}")


def mean_row(rows, n_of):
    """The row of a run over its data sets; it names them if the table has more.

    Half-widths of the intervals add in quadrature, as the data sets are independent (MOVER, Zou & Donner
    2008, doi 10.1002/sim.3095)."""
    values = mean_over([row["values"] for row in rows])
    arms = [[abs(bound - row["values"]["avg"]) for bound in row["avg_interval"]] for row in rows]
    low, high = (math.hypot(*side) / len(rows) for side in zip(*arms))
    sets = [row["data"] for row in rows]
    label = "mean" if len(sets) == len(n_of) else f"mean of {', '.join(sets)}"
    n = ", ".join(dict.fromkeys(row["n"] for row in rows))
    interval = values["avg"] - low, values["avg"] + high
    return rows[0] | {"data": label, "n": n, "values": values, "avg_interval": interval}


def table_row(row, ks, n):
    """{column: text} of a row; ks: those of the whole table; n: as in the head of Avg@n."""
    values = row["values"]
    shown = {name: format(value, FORMS.get(name, ".3f")) for name, value in values.items()}
    low, high = row["avg_interval"]
    cells = {"run": row["run"], "training": row["cell"].get("name", "-"), "data": row["data"], "n": row["n"]}
    cells[f"Avg@{n} [95%]"] = f"{shown['avg']} [{low:.3f}, {high:.3f}]"
    for kind in ("pass", "maj"):
        cells |= {f"{kind.title()}@{k}": shown.get(f"{kind}@{k}", "-") for k in ks}
    cells |= {name: shown[name] for name in ("length", "truncated", "entropy")}
    cells |= {name: shown.get(name, "-") for name in SEQUENCE_KLS}
    cells["TFLOPs"] = cost_of(row)
    return cells


def markdown(rows):
    """A Markdown table of rows of text, padded so that it reads as plain text too."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows)


# ----------------------------------------------------------------------------------------------------------
# --compare


def compare(paths):
    """Markdown tables of how the second differs from the first on the same problems: one for each data set
    and, if there are several, one of the means over them.

    Intervals are paired. In those of means, problems are resampled within each data set, independently."""
    sides = [list(map(os.path.realpath, evaluations_in(path, "--compare"))) for path in paths]
    results, _ = read_evaluations([*sides[0], *sides[1]], "--compare")
    pairs = pairs_of(sides, results)
    names = data_names(pairs)
    measured, tables, n_of = [], [], {}
    for data, pair in pairs.items():
        both = [results[path] for path in pair]
        measured.append(measure(pair, both))
        tables.append(differences([f"{r['run']} (n = {r['n']})" for r in both], *measured[-1]))
        n_of[names[data]] = " and ".join(dict.fromkeys(str(r["n"]) for r in both))
    notes = kl_notes(results.values())
    if len(pairs) == 1:
        return "\n\n".join([*tables, *notes])
    texts = [f"{name}\n\n{text}" for name, text in zip(names.values(), tables)]
    runs = [{results[path]["run"] for path in side} for side in sides]
    if list(map(len, runs)) == [1, 1]:
        means = mean_differences([one for [one] in runs], measured, n_of)
        texts += [f"mean\n\n{means}", note(n_of)]
    else:
        texts.append("no mean: a side has several models")
    return "\n\n".join([*texts, *notes])


def mean_differences(heads, measured, n_of):
    """Markdown table of the means over data sets. measured: of each, as measure() returns it."""
    common_n = len({*n_of.values()}) == 1
    named = [[by_n(one, n, common_n) for one in values] for values, n in zip(measured, n_of.values())]
    before, after, draws = zip(*named)
    # the bootstrap draws the same problems of data sets of one size: shifted, its draws are independent
    draws = [{name: one[name].roll(place) for name in one} for place, one in enumerate(draws)]
    return differences(heads, *map(mean_over, (before, after, draws)))


def pairs_of(sides, results):
    """{data set: (first, second)} of the evaluations to compare, from those of each side."""
    found = [{results[path]["data"]: path for path in side} for side in sides]
    single = list(map(len, sides)) == [1, 1]  # measure() refuses two that differ in their problems
    if not single and (found[0].keys() != found[1].keys() or list(map(len, found)) != list(map(len, sides))):
        listed = " and ".join(" ".join(side) for side in sides)
        refuse(f"--compare: not one evaluation on each side for each data set: {listed}; name two of them")
    return {data: (path, sides[1][0] if single else found[1][data]) for data, path in found[0].items()}


def measure(pair, results):
    """({metric: value} of the first and of the second, {metric: its bootstrapped differences})."""
    samples = [read_samples(path) for path in pair]
    problems = [list(dict.fromkeys((row["id"], row["answer"]) for row in rows)) for rows in samples]
    if problems[0] != problems[1]:
        refuse(f"--compare {' '.join(pair)}: they are not evaluations of the same problems")
    args = [read_sealed(os.path.join(path, "meta.json"), "--compare")["args"] for path in pair]
    prompts = list(map(Prompting.read, args))
    for flag, one, other in prompts[0].differences(prompts[1]):
        print(f"--compare: the prompts differ: {flag} was {one!r} in {pair[0]}, {other!r} in {pair[1]}")
    for name in ("temperature", "top_p", "top_k", "max_response_tokens"):
        one, other = (made.get(name) for made in args)
        if one != other:
            print(f"--compare: the sampling differs: --{name} was {one} in {pair[0]}, {other} in {pair[1]}")
    ks = [int(k) for k in results[0]["pass"] if k in results[1]["pass"]]
    first, second = (values_by_problem(rows, r["n"], ks) for rows, r in zip(samples, results))
    kls = [kls_by_problem(path, r) for path, r in zip(pair, results)]
    for name in SEQUENCE_KLS:
        problems = kls[0].get(name, {}).keys()
        if problems != kls[1].get(name, {}).keys():
            print(f"--compare: {name} is left out: not both have it of plain samples, on the same problems")
        elif problems:
            first[name], second[name] = (list(zip(*(kl[name][id] for id in problems))) for kl in kls)
    draws = {name: bootstrap_means(*second[name]) - bootstrap_means(*first[name]) for name in first}
    return *({name: mean_of(*one[name]) for name in one} for one in (first, second)), draws


def differences(heads, before, after, draws):
    """Markdown table with a row for each metric: both values, and their difference with its interval."""
    lines = [["metric", *heads, "difference [95%]"], ["---"] * 4]
    for name in draws:
        low, high = percentile_interval(draws[name])
        difference = f"{after[name] - before[name]:+.3f} [{low:+.3f}, {high:+.3f}]"
        lines.append([name, f"{before[name]:.3f}", f"{after[name]:.3f}", difference])
    return markdown(lines)
