"""Markdown tables of what is finished: a row for each evaluation, and the differences of two."""

from distil import evaluation
from distil.artifacts import read_artifact, refuse
from distil.evaluation import data_names, mean_of
from distil.prompts import Prompting
from reports.reading import cost_of, evaluations_in, read_results, read_samples


def pairs_of(paths):
    """{data set: (first, second)} of the evaluations to compare; "" for the data set if there is one pair."""
    sides = [evaluations_in(path, "--compare") for path in paths]
    if len(sides[0]) == len(sides[1]) == 1:
        return {"": (sides[0][0], sides[1][0])}
    found = [{read_results(one, "--compare")["data"]: one for one in side} for side in sides]
    if found[0].keys() != found[1].keys() or list(map(len, found)) != list(map(len, sides)):
        listed = " and ".join(" ".join(side) for side in sides)
        refuse(f"--compare: not one evaluation on each side for each data set: {listed}; name two of them")
    return {data: (first, found[1][data]) for data, first in found[0].items()}


def table(paths):
    """Markdown table with a row for each evaluation, grouped by data set.

    TFLOPs are those of the run that made the checkpoint, without those of the model it started from."""
    results = [read_results(path, "--table") for path in paths]
    check_comparable(results)
    names = data_names(r["data"] for r in results)
    results.sort(key=lambda r: list(names).index(r["data"]))
    ks = sorted({k for r in results for k in r["pass"]}, key=int)
    same_n = len({r["n"] for r in results}) == 1
    left_out = {"Maj@1"}  # Avg@n again
    left_out |= {"data"} if len(names) == 1 else set()
    left_out |= {"n"} if same_n else set()
    rows = [table_row(r, names[r["data"]], ks, str(r["n"]) if same_n else "n") for r in results]
    header = [name for name in rows[0] if name not in left_out]
    return markdown([header, ["---"] * len(header), *([row[name] for name in header] for row in rows)])


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


def table_row(r, data, ks, n):
    """{column: text} of an evaluation's results; ks: those of the whole table; data, n: as shown."""
    low, high = r["avg_interval"]
    row = {"run": r["run"], "training": r["cell"].get("name", "-")}
    row |= {"data": data, "n": str(r["n"])}
    row[f"Avg@{n} [95%]"] = f"{r['avg']:.3f} [{low:.3f}, {high:.3f}]"
    for kind in ("pass", "maj"):
        for k in ks:
            row[f"{kind.title()}@{k}"] = f"{r[kind][k]:.3f}" if k in r[kind] else "-"
    row["length"] = f"{r['length']:.1f}"
    row["truncated"] = f"{r['truncated']:.1%}"
    row["entropy"] = f"{r['entropy']:.3f}"
    row["TFLOPs"] = cost_of(r)
    return row


def markdown(rows):
    """A Markdown table of rows of text, padded so that it reads as plain text too."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows)


def compare(paths):
    """Markdown table of two evaluations of the same problems: metrics, differences, paired intervals."""
    results = [read_results(path, "--compare") for path in paths]
    samples = [read_samples(path) for path in paths]
    problems = [list(dict.fromkeys((row["id"], row["answer"]) for row in rows)) for rows in samples]
    if problems[0] != problems[1]:
        refuse(f"--compare {' '.join(paths)}: they are not evaluations of the same problems")
    prompts = [Prompting.read(read_artifact(path, "--compare", "evaluate")["args"]) for path in paths]
    for flag, one, other in prompts[0].differences(prompts[1]):
        print(f"--compare: the prompts differ: {flag} was {one!r} in {paths[0]}, {other!r} in {paths[1]}")
    ks = [int(k) for k in results[0]["pass"] if k in results[1]["pass"]]
    first, second = (evaluation.values_by_problem(rows, r["n"], ks) for rows, r in zip(samples, results))
    lines = [["metric", *(f"{r['run']} (n = {r['n']})" for r in results), "difference [95%]"], ["---"] * 4]
    for name in first:
        before, after = mean_of(*first[name]), mean_of(*second[name])
        low, high = evaluation.percentile_interval(
            evaluation.bootstrap_means(*second[name]) - evaluation.bootstrap_means(*first[name])
        )
        difference = f"{after - before:+.3f} [{low:+.3f}, {high:+.3f}]"
        lines.append([name, f"{before:.3f}", f"{after:.3f}", difference])
    return markdown(lines)
