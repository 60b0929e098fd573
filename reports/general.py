"""The table of what recipes/general.py measured: a row for each checkpoint, a column for each task."""

import json
import os

from distil.artifacts import read_artifact, refuse
from reports.reading import directories_with, evaluations_in
from reports.tables import markdown, table


def tables_of(paths):
    """Markdown: the table of the evaluations at these paths, and the one of their general knowledge."""
    general, evaluations = [], []
    for path in paths:
        found = directories_with("general.json", path)
        general += found
        evaluations += evaluations_in(path, "--table", needed=not found)
    parts = [table(evaluations)] if evaluations else []
    return "\n\n".join([*parts, general_table(general)] if general else parts)


def general_table(paths):
    """Accuracies with 95% intervals from the harness's standard errors, and their mean as in the paper."""
    rows, first = [], None
    for path in paths:
        read_artifact(path, "--table", "general")
        with open(os.path.join(path, "general.json"), encoding="utf-8") as file:
            found = json.load(file)
        tasks = found["tasks"]
        about = {
            name: (task["shots"], task["metric"], task["problems"], task["lm_eval"])
            for name, task in tasks.items()
        }
        if first and about != first:
            refuse(f"--table: {paths[0]} and {path} differ in tasks, examples, problems or lm_eval's release")
        first = about
        mean = sum(task["value"] for task in tasks.values()) / len(tasks)
        cells = [found["run"], found["cell"].get("name", "-"), *map(accuracy, tasks.values())]
        rows.append([*cells, f"{mean:.4f}"])
    heads = [f"{name}, {shots}-shot {metric} [95%]" for name, (shots, metric, *_) in first.items()]
    head = ["run", "training", *heads, "mean"]
    return markdown([head, ["---"] * len(head), *rows])


def accuracy(task):
    """A task's value and, unless the harness gave no standard error, its normal interval."""
    if task["stderr"] is None:
        return f"{task['value']:.4f}"
    half = 1.96 * task["stderr"]
    return f"{task['value']:.4f} [{task['value'] - half:.4f}, {task['value'] + half:.4f}]"
