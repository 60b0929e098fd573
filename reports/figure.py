"""Figures: columns of the logs of runs against steps or TFLOPs; KLs of evaluations against position."""

import io
import os
import warnings

from distil.artifacts import refuse, write_file
from distil.evaluation import data_names
from reports.reading import (
    EVAL_CURVES,
    STEP_CURVES,
    columns_of,
    distinct_names,
    evaluations_in,
    kls_of,
    read_evaluations,
    read_run,
    without_repeats,
)

TITLES = {"evals": EVAL_CURVES, "metrics": STEP_CURVES}
# Okabe and Ito's colours, which the colour-blind can tell apart; their yellow is too pale for white paper
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
LINES, MARKERS = ["-", "--", "-.", ":"], "os^DvP*X"
PANELS = 3  # side by side
POINTS = 20  # of a line that have a marker
REACHED = 0.05  # share of responses below which the KL at a position is not drawn


def figure(path, runs, names, x):
    """Draw columns of evals.jsonl and metrics.jsonl, a panel for each name, against the column x.

    A name is that of a column, pass@4 for a nested one, and if both logs have it the one of evals.jsonl is
    drawn; evals/NAME and metrics/NAME say which. Bands are 95% intervals; null leaves a gap."""
    check_path(path)
    runs = without_repeats(runs)
    read = {run: read_run(run, "--runs") for run in runs}
    logs = {run: {log: list(map(columns_of, rows)) for log, rows in read[run][1].items()} for run in runs}
    panels = [find_column(name, logs) for name in names]
    curves = {run: [curve(logs[run].get(log, []), column, x) for log, column in panels] for run in runs}
    labels = distinct_names(runs)
    check_curves(curves, labels, panels, x)
    styles = dict(zip(runs, line_styles([read[run][0]["cell"] for run in runs])))
    draw(path, panels, curves, styles, labels, {"step": "step", "tflops": "TFLOPs"}[x])


def figure_by_position(path, directories, names):
    """Draw KLs along responses against the position of their tokens: a line for each evaluation by --teacher
    and whose responses they are, the model's own (solid) or the teacher's (dashed).

    Where the KL on its own prefixes grows faster than on the teacher's, errors lead to prefixes on which the
    model knows less (exposure bias). names: fkl, rkl."""
    check_path(path)
    if unknown := {*names} - {"fkl", "rkl"}:
        refuse(f"--y {' '.join(sorted(unknown))}: by position there are fkl and rkl")
    paths = [one for directory in directories for one in evaluations_in(directory, "--runs")]
    results, _ = read_evaluations(paths, "--runs")
    curves, styles, labels = {}, {}, {}
    names_of = data_names(dict.fromkeys(found["data"] for found in results.values()))
    on = {one: f" on {names_of[found['data']]}" * (len(names_of) > 1) for one, found in results.items()}
    for place, (one, found) in enumerate(results.items()):
        if not kls_of(found):
            print(f"figure: {found['run']} on {found['data']} was evaluated without --teacher: left out")
        look = {"color": COLORS[place % len(COLORS)], "markersize": 3}
        look["marker"] = MARKERS[place // len(COLORS) % len(MARKERS)]
        for prefix, kl in kls_of(found).items():
            key, width = (one, prefix), kl["bin"]
            enough = sum(count >= REACHED * kl["responses"] for count in kl["responses_by_position"])
            columns = [zip(kl[f"{name}_by_position"], kl[f"{name}_by_position_interval"]) for name in names]
            curves[key] = [
                [((i + 0.5) * width, value, *bounds) for i, (value, bounds) in enumerate(column)][:enough]
                for column in columns
            ]
            styles[key] = look | {"linestyle": {"student": "-", "teacher": "--"}[prefix]}
            labels[key] = f"{found['run']}{on[one]}, {prefix}'s prefixes"
            labels[key] += "" if kl["plain_samples"] else " (no plain samples)"
    if not curves:
        refuse("--x position: none of --runs was evaluated with --teacher")
    titles = {"fkl": "KL(teacher‖student) (nats)", "rkl": "KL(student‖teacher) (nats)"}
    panels = [("evals", titles[name]) for name in names]
    draw(path, panels, curves, styles, labels, f"position, as far as {REACHED:.0%} of the responses reach")


def check_path(path):
    if os.path.isdir(path) or not path.lower().endswith((".png", ".pdf", ".svg")):
        refuse(f"--figure {path}: must be a file that ends in .png, .pdf or .svg")


def find_column(name, logs):
    """(log, column) that a name of --y stands for; pass is pass@4 if there is no other k."""
    known = {"evals": set(), "metrics": set()}
    for found in logs.values():
        for log, rows in found.items():
            known[log] |= {one for row in rows for one, value in row.items() if is_number(value)}
    asked, _, column = name.rpartition("/")
    for log in [asked] if asked else known:
        nested = [one for one in known.get(log, ()) if one.startswith(f"{column}@")]
        if column in known.get(log, ()) or len(nested) == 1:
            return log, column if column in known[log] else nested[0]
    has = [f"{log}.jsonl has {' '.join(sorted(columns)) or 'no rows'}" for log, columns in known.items()]
    why = "no such column in the logs of --runs (--eval_every writes evals.jsonl)"
    refuse(f"--y {name}: {why}; {'; '.join(has)}")


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def curve(rows, column, x):
    """[(x, value, low, high)] of a column of a log, without an interval low = high = value; null is NaN."""
    points = []
    for row in rows:
        value = float("nan") if row.get(column) is None else row[column]
        low, high = row.get(f"{column}_interval") or (value, value)
        points.append((row[x], value, low, high))
    return points if any(is_number(row.get(column)) for row in rows) else []


def check_curves(curves, labels, panels, x):
    """Refuse a run without anything to draw; print what the logs of others lack."""
    for run, found in curves.items():
        if not any(found):
            why = "has none of the columns of --y (avg, entropy, length by default)"
            refuse(f"--runs {run}: {why}; evals.jsonl needs --eval_every")
        if any(point[0] is None for points in found for point in points):
            refuse(f"--x {x}: is unknown for --runs {run}; use --x step")
    for place, (log, column) in enumerate(panels):
        lacking = [labels[run] for run, found in curves.items() if not found[place]]
        if lacking:
            print(f"figure: no {column} in {log}.jsonl of {', '.join(lacking)}")


def line_styles(cells):
    """How the line of each run looks, as plot() takes it. No two look alike.

    As in the paper the colour shows the KL and the kind of line whose prefixes, if that tells all apart."""
    colors = {"forward": COLORS[0], "reverse": COLORS[1]}
    lines = {"teacher": "--", "student": "-"}
    looks = [(colors.get(cell["kl"], COLORS[2]), lines.get(cell["prefix"], ":"), "o") for cell in cells]
    if len({*looks}) < len(looks):
        pairs = [(color, line) for line in LINES for color in COLORS]
        looks = []
        for i in range(len(cells)):
            marker = MARKERS[(i + i // len(pairs)) % len(MARKERS)]  # each time around the pairs another one
            looks.append((*pairs[i % len(pairs)], marker))
    if len({*looks}) < len(looks):
        refuse(f"--runs: {len(looks)} runs in one figure would not be told apart; draw fewer")
    names, sizes = ("color", "linestyle", "marker"), {"markersize": 3.5, "linewidth": 1.2}
    return [dict(zip(names, look)) | sizes for look in looks]


def fonts_for(text):
    """Installed font families that have what matplotlib's own lacks of a text. What none has is printed."""
    from matplotlib import font_manager, ft2font

    others = [(font.name, font.fname) for font in font_manager.fontManager.ttflist]
    own = font_manager.findfont(font_manager.FontProperties())
    missing, families = {ord(character) for character in text if character.isprintable()}, []
    for name, path in [("", own), *others]:
        if missing and "Last Resort" not in name:  # a font of boxes
            found = missing & ft2font.FT2Font(path).get_charmap().keys()
            families += [name] if found and name else []
            missing -= found
    if missing:
        print(f"figure: no font here shows {''.join(map(chr, sorted(missing)))}: boxes take their place")
    return families


def draw(path, panels, curves, styles, labels, xlabel):
    """Write the file. curves: {run: points of each panel}."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(PANELS, len(panels))
    rows = -(-len(panels) // columns)
    names = {run: label.replace("$", r"\$") for run, label in labels.items()}  # $: not mathematics
    width = max(6.5, 4.3 * columns)
    beside = max(1, min(len(names), int(11 * width / (max(map(len, names.values())) + 10))))
    height = 3.5 * rows + 0.2 * (-(-len(names) // beside))
    plt.rcParams["font.family"] = [*plt.rcParams["font.family"], *fonts_for("".join(labels.values()))]
    fig = plt.figure(figsize=(width, height), constrained_layout=True)
    for place, (log, column) in enumerate(panels):
        axis = fig.add_subplot(rows, columns, place + 1)
        for run, found in curves.items():
            if not found[place]:
                continue
            xs, ys, low, high = zip(*found[place])
            axis.plot(xs, ys, markevery=-(-len(xs) // POINTS), **styles[run])
            if low != ys or high != ys:
                axis.fill_between(xs, low, high, color=styles[run]["color"], alpha=0.12, linewidth=0)
        title = TITLES[log].get(column, column)
        axis.set(xlabel=xlabel, title=title if log == "evals" else f"{title}, in training")
        axis.grid(alpha=0.3)
    keys = [plt.Line2D([], [], label=names[run], **styles[run]) for run in curves]
    fig.legend(handles=keys, loc="outside lower center", ncols=beside, fontsize=8, handlelength=5)
    image = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # fonts_for() has said so
        fig.savefig(image, dpi=150, format=path[-3:].lower())
    write_file(path, image.getvalue())
    plt.close(fig)
    print(f"figure: {path}")
