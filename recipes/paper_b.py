"""What paper B plots beside accuracy, of runs of train.py: gap recovery, overlap, and metrics by position.

    python -m recipes.paper_b out/paper_b/horizon_*

prints a table of the runs. before, teacher and after are Avg@n, a mean over data sets, of the evaluations of
a run's student, of its teacher and of its own end, as far as the directory that holds the run has them, and

    recovery = (after - before) / (teacher - before)         the gap recovery of arXiv 2604.13016, section 3.2

"a -> b" are means of the first and of the last --steps steps. Each run with --position_bins then has a table
by position in the response; its last row is the later half of the bins minus the earlier half."""

import argparse
import functools
import glob
import os

from distil import flags
from distil.artifacts import read_artifact
from distil.evaluation import mean_of
from reports.reading import read_results, read_run
from reports.tables import markdown

METRICS = ["loss", "overlap_ratio", "overlap_advantage", "entropy_gap", "student_entropy", "teacher_entropy"]


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="+", help="directories of finished runs")
    p.add_argument("--steps", type=flags.positive_int, default=20, help="steps at the start and at the end")
    p.set_defaults(out=None)  # it writes none; recipes/plan.py asks
    return p.parse_args(argv)


@functools.cache
def evaluated(directory):
    """{model as it was given to evaluate.py: its Avg@n, a mean over data sets} of all evaluations below."""
    found = {}
    for path in sorted(glob.glob(f"{glob.escape(directory)}/**/results.json", recursive=True)):
        read_artifact(os.path.dirname(path), "runs", "evaluate")
        results = read_results(os.path.dirname(path), "runs")
        found.setdefault(results["model"], []).append(results["avg"])
    return {model: mean_of(values) for model, values in found.items()}


def recovery(before, teacher, after):
    """Gap recovery; None where it is not known, or where there is no gap."""
    if None in (before, teacher, after) or teacher == before:
        return None
    return (after - before) / (teacher - before)


def by_position(rows):
    """{metric: [mean in each bin]} over some rows of metrics.jsonl, with every token weighing the same.

    "tokens": their numbers."""
    steps = [row["by_position"] for row in rows]
    counts = [sum(bin) for bin in columns(step["tokens"] for step in steps)]
    means = {"tokens": counts}
    for name in steps[0].keys() - means.keys():
        weighted = ([m * n for m, n in zip(step[name], step["tokens"])] for step in steps)
        means[name] = [sum(bin) / n for bin, n in zip(columns(weighted), counts)]
    return means


def columns(rows):
    """The columns of rows that may end early: [[1, 2], [3]] -> [[1, 3], [2]]."""
    rows = list(rows)
    return [[row[i] for row in rows if i < len(row)] for i in range(max(map(len, rows)))]


def later_minus_earlier(means, name):
    """Of by_position()'s means: that of the later half of the bins minus that of the earlier half."""
    half = (len(means["tokens"]) + 1) // 2
    parts = (means["tokens"][:half], means[name][:half]), (means["tokens"][half:], means[name][half:])
    earlier, later = (sum(n * m for n, m in zip(*part)) / max(1, sum(part[0])) for part in parts)
    return later - earlier


def position_table(first, last, size):
    """Markdown table "first -> last" of two by_position() results. size: positions in a bin."""
    names = [name for name in METRICS if name in first]
    lines = [["positions", "tokens", *names], ["---"] * (len(names) + 2)]
    for i in range(max(len(means["tokens"]) for means in (first, last))):
        pairs = [[means[name][i : i + 1] for means in (first, last)] for name in ("tokens", *names)]
        cells = [" -> ".join(f"{found[0]:.4g}" if found else "-" for found in pair) for pair in pairs]
        lines.append([f"{i * size} to {(i + 1) * size - 1}", *cells])
    ends = [[later_minus_earlier(means, name) for means in (first, last)] for name in names]
    return markdown([*lines, ["later - earlier", "", *(f"{a:+.4f} -> {b:+.4f}" for a, b in ends)]])


def main(args):
    lines = [["run", "before", "teacher", "after", "recovery", "overlap", "student entropy"], ["---"] * 7]
    tables = []
    for run in args.runs:
        run = os.path.normpath(run)
        meta, logs = read_run(run, "runs")
        made, rows, found = meta["args"], logs["metrics"], evaluated(os.path.dirname(run))
        scores = [found.get(model) for model in (made["student"], made["teacher"], f"{made['out']}/final")]
        first, last = rows[: args.steps], rows[-args.steps :]
        line = [os.path.basename(run), *("-" if score is None else f"{score:.3f}" for score in scores)]
        line.append("-" if recovery(*scores) is None else f"{recovery(*scores):.1%}")
        for name in ("overlap_ratio", "student_entropy"):
            means = [mean_of([row[name] for row in part]) for part in (first, last) if name in rows[0]]
            lines_of = " -> ".join(f"{mean:.3f}" for mean in means)
            line.append(lines_of or "-")
        lines.append(line)
        if made.get("position_bins"):
            title = f"{line[0]}, by position, means of {args.steps} steps at the start -> at the end"
            table = position_table(by_position(first), by_position(last), made["position_bins"])
            tables.append(f"{title}\n\n{table}")
    print(markdown(lines), *tables, sep="\n\n")


if __name__ == "__main__":
    main(get_args())
