"""Tables, comparisons and figures of finished evaluations and runs."""

import json
import os

from distil.artifacts import read_artifact, read_jsonl, refuse
from distil.evaluation import by_problem, data_name, mean_of, middle, resampled


def read_results(path, flag):
    """results.json of a finished evaluation, its checksum verified."""
    read_artifact(path, flag, "evaluate")
    return json.load(open(os.path.join(path, "results.json")))


def evaluations_in(path):
    """The path itself, or the evaluations that --benchmarks left in it."""
    inner = sorted(entry.path for entry in os.scandir(path) if entry.is_dir()) if os.path.isdir(path) else []
    return inner if inner and not os.path.isfile(os.path.join(path, "meta.json")) else [path]


def table(paths):
    """Markdown table, a row an evaluation. TFLOPs are those of the run that made the checkpoint, not of its starting point."""
    results = [read_results(inner, "--table") for path in paths for inner in evaluations_in(path)]
    sets = {}  # data set -> the first evaluation on it
    for r in results:
        first = sets.setdefault(r["data"], r)
        for name in ("problems", "n", "pass"):
            if (list(r["pass"]) != list(first["pass"])) if name == "pass" else r[name] != first[name]:
                refuse(
                    f"--table: the evaluations on {r['data']} differ in {name}, so their numbers cannot be compared"
                )
    several = len(sets) > 1
    results.sort(key=lambda r: list(sets).index(r["data"]))
    n = results[0]["n"] if len({r["n"] for r in results}) == 1 else "n"
    ks = sorted({k for r in results for k in r["pass"]}, key=int)
    header = [
        "run",
        "prefix",
        "KL",
        *["data"] * several,
        *["n"] * (n == "n"),
        f"Avg@{n} [95%]",
        *[f"Pass@{k}" for k in ks],
        *[f"Maj@{k}" for k in ks if k != "1"],
        "length",
        "cut off",
        "entropy",
        "TFLOPs",
    ]
    lines = [header, ["---"] * len(header)]
    for r in results:
        low, high = r["avg_interval"]
        lines.append(
            [
                r["run"],
                r["cell"]["prefix"],
                r["cell"]["kl"],
                *[data_name(r["data"])] * several,
                *[str(r["n"])] * (n == "n"),
                f"{r['avg']:.3f} [{low:.3f}, {high:.3f}]",
                *[f"{r['pass'][k]:.3f}" if k in r["pass"] else "-" for k in ks],
                *[f"{r['maj'][k]:.3f}" if k in r["maj"] else "-" for k in ks if k != "1"],
                f"{r['length']:.1f}",
                f"{r['truncated']:.1%}",
                f"{r['entropy']:.3f}",
                f"{r['tflops']:.4g}" if r["tflops"] else "-",
            ]
        )
    return markdown(lines)


def markdown(lines):
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines
    )


def compare(paths):
    """Markdown table of two evaluations of the same problems: each metric, the difference and its paired bootstrap interval."""
    results = [read_results(path, "--compare") for path in paths]
    rows = [[row for _, row in read_jsonl(os.path.join(path, "samples.jsonl"))] for path in paths]
    problems = [list(dict.fromkeys((row["id"], row["answer"]) for row in side)) for side in rows]
    if problems[0] != problems[1]:
        refuse(f"--compare {' '.join(paths)}: they are not evaluations of the same problems")
    ks = [int(k) for k in results[0]["pass"] if k in results[1]["pass"]]
    first, second = (by_problem(side, r["n"], ks) for side, r in zip(rows, results))
    lines = [["metric", *(f"{r['run']} (n = {r['n']})" for r in results), "difference [95%]"], ["---"] * 4]
    for name in first:
        before, after = mean_of(*first[name]), mean_of(*second[name])
        low, high = middle(resampled(*second[name]) - resampled(*first[name]))
        lines.append(
            [name, f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f} [{low:+.3f}, {high:+.3f}]"]
        )
    return markdown(lines)


def figure(path, runs, x):
    """Accuracy, entropy and response length against step or TFLOPs, a line a run (as figures 2 to 5 of the paper)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [
        ("avg", "accuracy"),
        ("entropy", "predictive entropy (nats)"),
        ("length", "response length (tokens)"),
    ]
    fig, axes = plt.subplots(1, len(panels), figsize=(13, 3.8), constrained_layout=True)
    for run in runs:
        meta = read_artifact(run, "--runs", "train", "grpo")
        rows = (
            [row for _, row in read_jsonl(os.path.join(run, "evals.jsonl"))]
            if "evals.jsonl" in meta["files"]
            else []
        )
        if not rows:
            refuse(f"--runs {run}: was trained without --eval_every, so there is nothing to draw")
        style = {
            "color": {"forward": "tab:blue", "reverse": "tab:red"}.get(meta["cell"]["kl"], "tab:green"),
            "linestyle": {"teacher": "--", "student": "-"}.get(meta["cell"]["prefix"], ":"),
            "marker": "o",
            "markersize": 3,
        }
        for axis, (key, label) in zip(axes, panels):
            axis.plot(
                [row[x] for row in rows], [row[key] for row in rows], label=meta["cell"]["name"], **style
            )
            axis.set(xlabel={"step": "step", "tflops": "TFLOPs"}[x], title=label)
            axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    fig.savefig(path, dpi=150)
    plt.close(fig)
    print(f"figure: {path}")
