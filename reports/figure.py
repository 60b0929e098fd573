"""The figure of some runs: their evaluations during training."""

import io
import os

from distil.artifacts import read_artifact, refuse, write_file
from reports.reading import EVAL_CURVES, read_log


def figure(path, runs, x):
    """Draw accuracy, entropy and length against x, "step" or "tflops", a line per run, as in the paper."""
    if os.path.isdir(path) or not path.lower().endswith((".png", ".pdf", ".svg")):
        refuse(f"--figure {path}: must be a file that ends in .png, .pdf or .svg")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, len(EVAL_CURVES), figsize=(13, 3.8), constrained_layout=True)
    for run in runs:
        meta = read_artifact(run, "--runs", "train", "grpo")
        if "evals.jsonl" not in meta["files"]:
            refuse(f"--runs {run}: was trained without --eval_every, so there is nothing to draw")
        rows = read_log(run, "evals.jsonl")
        if any(row[x] is None for row in rows):
            refuse(f"--x {x}: is unknown for --runs {run}; use --x step")
        cell = meta["cell"]
        color = {"forward": "tab:blue", "reverse": "tab:red"}.get(cell["kl"], "tab:green")
        line = {"teacher": "--", "student": "-"}.get(cell["prefix"], ":")
        style = {"color": color, "linestyle": line, "marker": "o", "markersize": 3, "label": cell["name"]}
        for axis, (key, title) in zip(axes, EVAL_CURVES.items()):
            axis.plot([row[x] for row in rows], [row[key] for row in rows], **style)
            axis.set(xlabel={"step": "step", "tflops": "TFLOPs"}[x], title=title)
            axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    image = io.BytesIO()
    fig.savefig(image, dpi=150, format=path[-3:].lower())
    write_file(path, image.getvalue())
    plt.close(fig)
    print(f"figure: {path}")
