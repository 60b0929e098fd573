"""Tables, comparisons and figures of finished evaluations and runs."""

import io
import json
import os

from distil.artifacts import read_artifact, refuse, write_file
from distil.evaluation import bootstrap_means, data_names, mean_of, percentile_interval, values_by_problem
from distil.flops import text_of
from distil.jsonl import read_jsonl


def read_results(path, flag):
    """results.json of a finished evaluation, its checksum verified."""
    read_artifact(path, flag, "evaluate")
    with open(os.path.join(path, "results.json"), encoding="utf-8") as file:
        return json.load(file)


def read_samples(path):
    """The graded rows of an evaluation."""
    return [row for _, row in read_jsonl(os.path.join(path, "samples.jsonl"))]


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
    row["TFLOPs"] = "-" if r["step"] is None else text_of(r["tflops"])
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
    ks = [int(k) for k in results[0]["pass"] if k in results[1]["pass"]]
    first, second = (values_by_problem(rows, r["n"], ks) for rows, r in zip(samples, results))
    lines = [["metric", *(f"{r['run']} (n = {r['n']})" for r in results), "difference [95%]"], ["---"] * 4]
    for name in first:
        before, after = mean_of(*first[name]), mean_of(*second[name])
        low, high = percentile_interval(bootstrap_means(*second[name]) - bootstrap_means(*first[name]))
        difference = f"{after - before:+.3f} [{low:+.3f}, {high:+.3f}]"
        lines.append([name, f"{before:.3f}", f"{after:.3f}", difference])
    return markdown(lines)


def figure(path, runs, x):
    """Draw accuracy, entropy and length against x, "step" or "tflops", a line per run, as in the paper."""
    if os.path.isdir(path) or not path.lower().endswith((".png", ".pdf", ".svg")):
        refuse(f"--figure {path}: must be a file that ends in .png, .pdf or .svg")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    titles = {"avg": "accuracy", "entropy": "predictive entropy (nats)", "length": "response length (tokens)"}
    fig, axes = plt.subplots(1, len(titles), figsize=(13, 3.8), constrained_layout=True)
    for run in runs:
        meta = read_artifact(run, "--runs", "train", "grpo")
        if "evals.jsonl" not in meta["files"]:
            refuse(f"--runs {run}: was trained without --eval_every, so there is nothing to draw")
        rows = [row for _, row in read_jsonl(os.path.join(run, "evals.jsonl"))]
        if any(row[x] is None for row in rows):
            refuse(f"--x {x}: is unknown for --runs {run}; use --x step")
        cell = meta["cell"]
        color = {"forward": "tab:blue", "reverse": "tab:red"}.get(cell["kl"], "tab:green")
        line = {"teacher": "--", "student": "-"}.get(cell["prefix"], ":")
        style = {"color": color, "linestyle": line, "marker": "o", "markersize": 3, "label": cell["name"]}
        for axis, (key, title) in zip(axes, titles.items()):
            axis.plot([row[x] for row in rows], [row[key] for row in rows], **style)
            axis.set(xlabel={"step": "step", "tflops": "TFLOPs"}[x], title=title)
            axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    image = io.BytesIO()
    fig.savefig(image, dpi=150, format=path[-3:].lower())
    write_file(path, image.getvalue())
    plt.close(fig)
    print(f"figure: {path}")
