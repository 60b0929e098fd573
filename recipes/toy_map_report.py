"""The report's tables of learning rates, gates and the map of cells, and the map's figure."""

from recipes.toy_runs import (
    CELLS,
    HORIZONS,
    OF_CELLS,
    SIZE,
    SPREADS,
    WIDTHS,
    base_of,
    choose,
    name_of,
    rate_at,
)
from recipes.toy_verdicts import difference, verdict
from reports.figure import COLORS, line_styles
from reports.tables import markdown

LABELS = {cell: cell.rsplit("_", 1)[0].replace("_", " ") for cell in CELLS}  # "student reverse"
ORDERS = {"many": "any", "few": "two"}
CONTRASTS = [("reverse", "forward"), ("student", "teacher")]
WIDTH = 9.0  # inches of a figure: at a page's width its letters are as large as the page's


def signed(found, digits=3):
    """A Difference as text: mean [interval], and each seed's value."""
    if found is None:
        return "", ""
    mean, low, high, each = found
    shown = f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
    return shown, " ".join(f"{value:+.{digits}f}" for value in each)


def rates_table(results):
    """Held-out Avg@4 of every cell at every learning rate that was tried; results: {place: result}."""
    rates, lines = SIZE["rates"], []
    for point in OF_CELLS:
        scores, best = choose(SIZE, results, point)
        shown = [f"{scores[rate]:.3f}" if scores.get(rate) is not None else "" for rate in rates]
        tested = [results.get(f"{name_of(*point, best)}_{seed}") for seed in SIZE["cell_seeds"]]
        values = [avg_of(entry) for entry in tested if entry]
        mean = f"{sum(values) / len(values):.3f}" if values else ""
        each = " ".join(f"{value:.3f}" for value in values)
        lines.append([point[0], *shown, best or "not chosen yet", mean, each])
    head = ["cell", *(f"held out, {rate}" for rate in rates), "rate", "test Avg@8", "each seed"]
    return markdown([head, ["---"] * len(head), *lines])


def avg_of(entry):
    return sum(map(int, entry["correct"])) / len(entry["correct"]) / entry["n"]


def mixed_starts(found, names):
    """Seeds whose runs start from different weights: a base student that is made again on another machine
    differs. names: of the runs that are compared. Results that lack a digest of the weights are told apart by
    their first evaluation, whose seed is the run's."""
    starts = {}
    for name in names:
        for seed, entry in found.get(name, {}).items():
            start = entry["start"] or str([entry["curve"][metric][:1] for metric in ("avg", "length")])
            starts.setdefault(seed, set()).add(start)
    return [seed for seed, ones in sorted(starts.items()) if len(ones) > 1]


def gates_table(found):
    """How often the gates of the entropy curriculum closed; found: {run: {seed: entry}}."""
    lines = [["run", "entropy floor", "gates", "closed", "entropy at the gates"], ["---"] * 5]
    for run, entries in found.items():
        gates = [gate for entry in entries.values() for gate in entry["gates"]]
        if gates:
            closed = sum(gate["decision"] != "advance" for gate in gates)
            entropies = [gate["entropy"] for gate in gates]
            between = f"{min(entropies):.3f} to {max(entropies):.3f}"
            lines.append([run, f"{gates[0]['entropy_floor']:g}", f"{len(gates)}", f"{closed}", between])
    return markdown(lines)


# ----------------------------------------------------------------------------------------------------------
# The map


def points_of(results):
    """(width, orders, horizon, {cell: rate}, {cell: its run, where the rate is chosen}) of every point."""
    for width in WIDTHS:
        for spread in SPREADS:
            for horizon in HORIZONS:
                cells = [cell for cell in CELLS if cell.endswith(horizon)]
                rates = {cell: rate_at(SIZE, results, (cell, width, spread)) for cell in cells}
                names = {cell: name_of(cell, width, spread, rates[cell]) for cell in cells if rates[cell]}
                yield width, spread, horizon, rates, names


def contrast(names, plus, minus):
    """{run: factor} of the mean over cells with a word in their name minus that of those with another."""
    signs = {cell: (plus in cell) - (minus in cell) for cell in names}
    return {names[cell]: sign / 2 for cell, sign in signs.items()}


def starts_of(found, width, spread):
    """Avg of the base students of a point. That of the comparison's first seed was made again on another
    machine: its result has the seed 1, the one from which the other runs start has none."""
    entries = found.get(base_of(width, spread), {})
    return [
        avg_of(entry) for seed, entry in entries.items() if seed or (width, spread) != (WIDTHS[0], "many")
    ]


def map_table(results, found):
    """Both differences and the best cells at every point. Last, for each horizon, the means over its points
    but the first; their seeds are blocks, although base students of different points are different models."""
    head = ["width", "orders", "horizon"]
    head += ["reverse minus forward", "each seed", "reverse higher"]
    head += ["student minus teacher", "each seed", "student higher", "best"]
    rows = []
    for width, spread, horizon, _, names in points_of(results):
        row = [f"{width}", ORDERS[spread], horizon]
        for pair in CONTRASTS:
            this = difference(found, contrast(names, *pair), "avg") if len(names) == 4 else None
            row += [*signed(this), verdict(this)]
        rows.append([*row, best_of(found, names)])
    for horizon in HORIZONS:
        new = [
            point for point in points_of(results) if point[2] == horizon and point[:2] != (WIDTHS[0], "many")
        ]
        row = ["mean of the five others", "", horizon]
        for pair in CONTRASTS:
            pairs = [item for *_, names in new for item in contrast(names, *pair).items()]
            terms = {run: sign / len(new) for run, sign in pairs}
            this = difference(found, terms, "avg")
            row += [*signed(this), verdict(this)]
        rows.append([*row, ""])
    return markdown([head, ["---"] * len(head), *rows])


def avg_table(results, found):
    """Avg of cells and of their base students, means over seeds, and learning rates at every point."""
    head, rows = ["width", "orders", "horizon", "base", *dict.fromkeys(LABELS.values())], []
    for width, spread, horizon, rates, names in points_of(results):
        row = [f"{width}", ORDERS[spread], horizon]
        starts = starts_of(found, width, spread)
        row.append(f"{sum(starts) / len(starts):.3f}" if starts else "")
        for cell, rate in rates.items():
            this = difference(found, {names.get(cell): 1}, "avg")
            row.append(f"{this.mean:.3f} ({rate})" if this else "")
        rows.append(row)
    return markdown([head, ["---"] * len(head), *rows])


def best_of(found, names):
    """The cell with the highest Avg, with those that are not resolved from it. names: {cell: run}."""
    if len(names) < 4 or any(name not in found for name in names.values()):
        return "not run yet"
    means = {cell: difference(found, {name: 1}, "avg").mean for cell, name in names.items()}
    best = max(means, key=means.get)
    close = [
        cell
        for cell in sorted(means, key=means.get, reverse=True)
        if cell == best or verdict(difference(found, {names[best]: 1, names[cell]: -1}, "avg")) != "holds"
    ]
    return "all four" if len(close) == 4 else " or ".join(LABELS[cell] for cell in close)


def draw_map(path, results, found):
    """A row for each point of the map; Avg of its cells and its base student, and both differences, with 95%
    intervals. Small dots are seeds."""
    fig, axes = subplots(1, 3, 6.5, sharey=True)
    points = [*points_of(results)]
    titles = ["Avg", "reverse minus forward KL", "student minus teacher prefixes"]
    labels = [f"{width}, {ORDERS[spread]}, {horizon}" for width, spread, horizon, *_ in points]
    labels[:2] = [f"{label}*" for label in labels[:2]]
    for axis, title in zip(axes[0], titles):
        axis.set(title=title, ylim=(len(points) - 0.5, -0.5))
        axis.set_yticks(range(len(points)), labels)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_xlabel("Avg" if title == "Avg" else "difference in Avg")
    axes[0][0].set(xlim=(0, 1), ylabel="student's width, orders, horizon (*: five seeds, own rates)")
    looks = [dict(zip(("prefix", "kl"), LABELS[cell].split())) for cell in CELLS[:4]]
    styles = dict(zip(dict.fromkeys(LABELS.values()), line_styles(looks)))
    for y, (width, spread, _, _, names) in enumerate(points):
        starts = starts_of(found, width, spread)
        if teacher := found.get("teacher" if spread == "many" else "teacher_few"):
            label = None if y else "teacher"
            axes[0][0].plot(avg_of(teacher[None]), y, "|", color="black", markersize=14, label=label)
        bars = {"color": "gray", "markersize": 14, "label": None if y else "base students"}
        axes[0][0].plot(starts, [y] * len(starts), "|", **bars)
        for cell, name in names.items():
            style, place = styles[LABELS[cell]], [*styles].index(LABELS[cell])
            look = {
                "marker": "o" if cell.startswith("student") else "s",
                "label": None if y else LABELS[cell],
            }
            this = difference(found, {name: 1}, "avg")
            interval(axes[0][0], style["color"], y + 0.18 * (place - 1.5), this, **look)
        for axis, pair in zip(axes[0][1:], CONTRASTS if len(names) == len(styles) else []):
            interval(axis, COLORS[2], y, difference(found, contrast(names, *pair), "avg"))
    save(fig, path, axes[0][0])


# ----------------------------------------------------------------------------------------------------------
# Figures


def subplots(rows, columns, height, **options):
    """(figure, axes of shape (rows, columns)) as wide as a page, each row so many inches high."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 8, "axes.grid": True, "grid.alpha": 0.3, "lines.linewidth": 1.5})
    size = WIDTH, height * rows + 0.5
    return plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **options)


def interval(axis, color, place, found, upright=False, marker="o", filled=True, label=None):
    """A Difference at a place on the other axis: its mean, 95% interval and seeds. None draws nothing."""
    if found is not None:
        errors = [[found.mean - found.low], [found.high - found.mean]]
        at = (place, found.mean) if upright else (found.mean, place)
        bars = {"yerr" if upright else "xerr": errors, "fmt": marker, "markersize": 4, "label": label}
        bars["markerfacecolor"] = color if filled else "white"
        axis.errorbar(*at, **bars, color=color, elinewidth=1.2)
        if not upright:
            axis.plot(found.each, [place] * len(found.each), ".", color=color, alpha=0.4, markersize=4)


def save(figure, path, axis):
    """Write the figure with the legend of that axis below it."""
    import matplotlib.pyplot as plt

    handles, labels = axis.get_legend_handles_labels()
    ncols = 4 if max(map(len, labels), default=0) < 30 else 3
    figure.legend(handles, labels, loc="outside lower center", ncols=ncols)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"figure: {path}")
