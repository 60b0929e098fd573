"""--figure: which columns are drawn, where lines have gaps and bands, and that no two runs look alike."""

import json

import pytest

from conftest import read_rows
from reports.figure import line_styles
from test_evaluate import call, trained
from test_report import write
from test_tables import CELL, results_of, seal, write_checkpoint, write_evaluation


@pytest.fixture
def drawn(monkeypatch):
    """The matplotlib figures that were written."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    return figures


def write_run(path, metrics, evals=(), **cell):
    """A finished run with these logs."""
    path.mkdir(parents=True)
    logs = {"metrics.jsonl": metrics, "evals.jsonl": evals}
    for name, rows in logs.items():
        if rows:
            (path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = [name for name, rows in logs.items() if rows]
    seal(path, "train", {}, files, cell=CELL | cell)
    return path


def steps(**columns):
    """Rows of a log: a value of each column for each step."""
    rows = [dict(zip(columns, values)) for values in zip(*columns.values())]
    return [{"step": i + 1, "tflops": 0.5 * (i + 1)} | row for i, row in enumerate(rows)]


def line_of(axis):
    [line] = axis.get_lines()
    return line.get_xdata().tolist(), line.get_ydata().tolist()


def looks_of(axis):
    """Of the lines of a panel or a legend."""
    return [(one.get_color(), one.get_linestyle(), one.get_marker()) for one in axis.get_lines()]


def labels_of(figure):
    [legend] = figure.legends
    return [text.get_text() for text in legend.get_texts()]


@pytest.mark.parametrize("x, label", [("step", "step"), ("tflops", "TFLOPs")])
def test_by_default_evaluations_are_drawn(x, label, world, rollouts, tmp_path, drawn, monkeypatch):
    import matplotlib.pyplot as plt

    run, data = world.parent / "drawn", world / "heldout.jsonl"
    if not run.exists():
        trained(world, rollouts, run, "--eval_every", 1, "--eval_data", data, "--eval_n", 2)
    call("--figure", tmp_path / "new" / "cells.png", "--runs", run, "--x", x)
    image = plt.imread(tmp_path / "new" / "cells.png")
    assert image.shape[0] > 300 and image.shape[1] > 1000 and image.std() > 0.05
    rows = read_rows(run / "evals.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2] and len({row["tflops"] for row in rows}) == 3
    for axis, key in zip(drawn[0].axes, ("avg", "entropy", "length"), strict=True):
        assert line_of(axis) == ([row[x] for row in rows], [row[key] for row in rows])
        assert axis.get_xlabel() == label
        bounds = {(row[x], bound) for row in rows for bound in row[f"{key}_interval"]}
        bands = [path.vertices.tolist() for one in axis.collections for path in one.get_paths()]
        assert [{*map(tuple, band)} for band in bands] == ([bounds] if key != "avg" else [])  # avg is 0
    call("--figure", tmp_path / "a.svg", "--runs", run, "--y", "pass", "maj@2", "loss", "nll", "lr", "--x", x)
    panels = drawn[1].axes
    assert line_of(panels[0])[1] == [row["pass"]["2"] for row in rows]
    assert line_of(panels[1])[1] == [row["maj"]["2"] for row in rows]
    metrics = read_rows(run / "metrics.jsonl")
    for axis, name in zip(panels[2:], ("loss", "nll", "lr"), strict=True):
        assert line_of(axis) == ([row[x] for row in metrics], [row[name] for row in metrics])
        assert not axis.collections and axis.get_title() == f"{name}, in training"


def test_null_is_a_gap_and_a_column_of_both_logs_has_two_names(tmp_path, drawn, capsys):
    training = steps(entropy=[3.0, None, 4.0], overlap_ratio=[0.1, 0.2, 0.3])
    write_run(tmp_path / "a", training, steps(entropy=[1.0, 2.0], entropy_interval=[[0, 2], [1, 3]]))
    write_run(tmp_path / "b", steps(entropy=[5.0]))
    names = ["entropy", "metrics/entropy", "evals/entropy", "overlap_ratio", "tflops"]
    call("--figure", tmp_path / "a.pdf", "--runs", tmp_path / "a", tmp_path / "b", "--y", *names)
    first, second, third, fourth, fifth = drawn[0].axes
    assert line_of(first) == line_of(third) == ([1, 2], [1.0, 2.0])
    a, b = second.get_lines()
    assert str(a.get_ydata().tolist()) == "[3.0, nan, 4.0]" and b.get_ydata().tolist() == [5.0]
    assert second.get_title() == "entropy, in training" and line_of(fourth)[1] == [0.1, 0.2, 0.3]
    assert line_of(fifth) == ([1, 2], [0.5, 1.0])
    printed = capsys.readouterr().out
    assert printed.count("figure: no entropy in evals.jsonl of b\n") == 2
    assert "figure: no overlap_ratio in metrics.jsonl of b\n" in printed


def test_bad_columns_are_one_line_that_lists_what_there_is(tmp_path, refused):
    rows = steps(**{"pass": [{"2": 0.5, "4": 0.75}], "avg": [0.5], "avg_interval": [[0, 1]], "text": ["x"]})
    run = write_run(tmp_path / "a", steps(loss=[1.0], unknown=[None]), rows)
    alone = write_run(tmp_path / "b", steps(loss=[2.0]))

    def is_refused(*names, words=(), runs=(run,), x="step"):
        line = ["--figure", tmp_path / "a.png", "--x", x, "--runs", *runs]
        line += ["--y", *names] if names else []
        message = refused(lambda: call(*line), *words)
        assert message.count("\n") == 1 and not (tmp_path / "a.png").exists()

    has = "evals.jsonl has avg pass@2 pass@4 step tflops; metrics.jsonl has loss step tflops"
    for name in ("overlap", "pass", "pass@3", "evals/loss", "text", "avg_interval", "unknown", "gates/step"):
        is_refused("loss", name, words=[f"--y {name}: no such column", has])
    is_refused(runs=[alone], words=["--y avg", "--runs", "--eval_every", "evals.jsonl has no rows"])
    is_refused("avg", runs=[run, alone], words=[f"--runs {alone}", "none of the columns", "--eval_every"])
    unknown = write_run(tmp_path / "c", [{"step": 1, "tflops": None, "loss": 1.0}])
    is_refused("loss", runs=[unknown], x="tflops", words=["--x tflops", f"--runs {unknown}", "--x step"])
    is_refused("loss", runs=[tmp_path], words=["--runs", "no meta.json"])
    (run / "metrics.jsonl").write_text("{}\n")
    is_refused("loss", words=["--runs", "metrics.jsonl", "was changed"])


def test_colour_and_line_say_kl_and_prefix_where_that_tells_runs_apart(tmp_path, drawn):
    cells = [(prefix, kl) for prefix in ("teacher", "student") for kl in ("forward", "reverse")]
    runs = [write_run(tmp_path / f"{p}_{kl}", steps(loss=[1.0]), prefix=p, kl=kl) for p, kl in cells]
    call("--figure", tmp_path / "a.png", "--runs", *runs, "--y", "loss")
    found = dict(zip(cells, looks_of(drawn[0].axes[0]), strict=True))
    for one, other in ((a, b) for a in cells for b in cells if a != b):
        colours, lines = ((found[one][i], found[other][i]) for i in (0, 1))
        assert (colours[0] == colours[1]) == (one[1] == other[1])
        assert (lines[0] == lines[1]) == (one[0] == other[0])
    assert {found["student", kl][1] for kl in ("forward", "reverse")} == {"-"}
    fixed = write_run(tmp_path / "fixed", steps(loss=[1.0]), prefix="student", kl="reverse")
    call("--figure", tmp_path / "a.png", "--runs", *runs, fixed, "--y", "loss")
    assert len({color for color, *_ in looks_of(drawn[1].axes[0])}) == 5


@pytest.mark.parametrize("count", [2, 7, 20, 224])
def test_no_two_runs_look_alike(count, refused):
    styles = line_styles([CELL] * count)
    looks = {(style["color"], style["linestyle"], style["marker"]) for style in styles}
    assert len(looks) == count and len({style["color"] for style in styles}) == min(count, 7)
    assert len({(style["color"], style["linestyle"]) for style in styles}) == min(count, 28)
    refused(lambda: line_styles([CELL] * 225), "--runs")


def test_twenty_runs_of_one_cell_and_directory_have_a_line_and_a_name_each(tmp_path, drawn):
    """And a name with $ is not read as mathematics."""
    runs = [write_run(tmp_path / f"{i}" / "a$_run$", steps(loss=[i, 1])) for i in range(20)]
    call("--figure", tmp_path / "a.png", "--runs", *runs, runs[0], "--y", "loss")
    [axis] = drawn[0].axes
    assert len({*looks_of(axis)}) == len(axis.get_lines()) == 20
    assert labels_of(drawn[0]) == [rf"{i}/a\$_run\$" for i in range(20)]
    keys = [
        (key.get_color(), key.get_linestyle(), key.get_marker()) for key in drawn[0].legends[0].get_lines()
    ]
    assert keys == looks_of(axis)
    box, panel = drawn[0].legends[0].get_window_extent(), axis.get_window_extent()
    assert box.y1 < panel.y0 and panel.height > 200


def test_what_no_font_shows_is_one_line_and_other_fonts_fill_in(
    tmp_path, drawn, capsys, monkeypatch, recwarn
):
    from matplotlib.font_manager import fontManager
    from matplotlib.ft2font import FT2Font

    fonts = [font for font in fontManager.ttflist if font.name.startswith(("DejaVu Sans", "STIXGeneral"))]
    monkeypatch.setattr(fontManager, "ttflist", fonts)
    paths = {font.name: font.fname for font in fonts}
    filled = {*FT2Font(paths["STIXGeneral"]).get_charmap()} - {*FT2Font(paths["DejaVu Sans"]).get_charmap()}
    for name in ("日", next(filter(str.isprintable, map(chr, sorted(filled))))):
        run = write_run(tmp_path / f"run{name}", steps(loss=[1.0]))
        call("--figure", tmp_path / "a.png", "--runs", run, "--y", "loss")
    shown, done = capsys.readouterr(), f"figure: {tmp_path}/a.png\n"
    assert shown.out == f"figure: no font here shows 日: boxes take their place\n{done}{done}"
    assert not recwarn.list and not shown.err


def test_the_report_names_runs_and_evaluations_alike(tmp_path):
    for folder in "ab":
        run = write_run(tmp_path / folder / "sft", steps(loss=[1.0]))
        write_checkpoint(run / "final", response_tokens=ord(folder))
        write_evaluation(run / "eval", run / "final", "d", results_of(2) | intervals())
    data = write(tmp_path / "a.html", tmp_path / "a/sft", tmp_path / "b/sft", tmp_path / "a/../a/sft")
    assert [run["name"] for run in data["runs"]] == ["a/sft", "b/sft"]
    assert [one["name"] for one in data["evaluations"]] == ["a/sft", "b/sft"]
    assert [one["cells"]["run"][0] for one in data["evaluations"]] == ["a/sft", "b/sft"]
    data = write(tmp_path / "a.html", tmp_path / "a/sft")
    assert [data["runs"][0]["name"], data["evaluations"][0]["name"]] == ["sft", "sft"]


def intervals():
    plain = {f"{name}_interval": [0.0, 1.0] for name in ("avg", "length", "truncated", "entropy")}
    return plain | {"pass_interval": {"2": [0.0, 1.0]}, "maj_interval": {"2": [0.0, 1.0]}}
