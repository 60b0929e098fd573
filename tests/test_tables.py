"""Tables, comparisons, means over data sets and the names of runs, from evaluations that no model made."""

import json
import os
import random
import re
import shutil
from fractions import Fraction

import pytest
import torch

import evaluate
from conftest import ROOT
from distil import artifacts, evaluation
from distil.evaluation import interval, summarise, values_by_problem
from reports import reading, tables
from test_evaluate import call, cells_of, graded

CELL = {"name": "student reverse", "prefix": "student", "kl": "reverse"}


def seal(path, stage, args, files, **facts):
    hashes = {name: artifacts.file_sha256(path / name) for name in files}
    meta = {"stage": stage, "args": args, "argv": [], "files": hashes, **facts, **artifacts.provenance()}
    meta |= dict.fromkeys(("started", "finished"), artifacts.now_utc())
    artifacts.write_sealed(str(path / "meta.json"), meta)


def write_checkpoint(path, **facts):
    path.mkdir(parents=True, exist_ok=True)
    origin = {"run": path.parent.name, "cell": CELL, "step": 5, "tflops": 2.5, "response_tokens": 70} | facts
    artifacts.write_sealed(str(path / "checkpoint.json"), origin | {"files": {}})


def write_evaluation(path, model, data, measured, benchmarks=False, given=None):
    """measured: (graded rows, n, ks), or results. A checkpoint.json in `model` makes it one of ours."""
    path.mkdir(parents=True)
    results = measured
    if isinstance(measured, tuple):
        rows, n, ks = measured
        results = summarise(rows, n, ks)
        (path / "samples.jsonl").write_text("".join(json.dumps(row | {"answer": "1"}) + "\n" for row in rows))
    else:
        (path / "samples.jsonl").touch()
    origin = evaluation.origin_of(str(model), given or str(model))
    (path / "results.json").write_text(json.dumps(results | {"data": data} | origin))
    args = {"model": str(given or model), "out": str(path), "data": data, "benchmarks": [data] * benchmarks}
    seal(path, "evaluate", args, ["samples.jsonl", "results.json"], model=os.path.realpath(model))
    return path


def results_of(n, avg=0.5, pass_rate=0.75, length=100.0, ks=()):
    by_k = {str(k): pass_rate for k in ks or [n]}
    found = {
        "problems": 10,
        "n": n,
        "avg": avg,
        "pass": by_k,
        "maj": by_k,
        "length": length,
        "truncated": 0.1,
    }
    found |= {"entropy": 0.2, "timed_out": 0}
    return found | {"avg_interval": [avg - 0.1, avg + 0.2]}


def rows_of(correct, tokens=10):
    """Graded rows; correct: for each problem which of its responses are."""
    return [graded(i, bool(c), tokens, 1.0) for i, responses in enumerate(correct) for c in responses]


def printed_rows(capsys):
    header, *rows = cells_of(capsys.readouterr().out)
    return [dict(zip(header, row)) for row in rows]


# Means over data sets


def paper_rows():
    """{row: [{"avg", "pass@n", "length"} of each benchmark]} of the paper, exactly, from recipes/qwen3.sh."""
    text = open(f"{ROOT}/recipes/qwen3.sh", encoding="utf-8").read()
    found = {}
    for line in re.findall(r"(?m)^table[123]/.*$", text):
        row, *benchmarks = line.split()
        values = [map(Fraction, one.split("/")) for one in benchmarks]
        found[row] = [dict(zip(("avg", "pass@n", "length"), one)) for one in values]
        assert len(found[row]) == 4
    return found


def test_the_means_of_the_paper():
    """Its headlines, by the function that --table takes its means from; with two decimals, as the paper."""
    means = {row: tables.mean_over(benchmarks) for row, benchmarks in paper_rows().items()}
    for size, gains in {"4b": (3.64, 5.87, 3.04), "8b": (3.60, 2.60, 2.93)}.items():
        fixed, curriculum = means[f"table3/{size}_fixed"], means[f"table3/{size}_curriculum"]
        found = [round(curriculum[name], 2) - round(fixed[name], 2) for name in ("avg", "pass@n")]
        assert [*map(float, found), float(round(fixed["length"] / curriculum["length"], 2))] == list(gains)
    gains = {}  # reverse minus forward KL, at 128 and 4096 tokens, mean over both prefixes and teachers
    for table in ("table1", "table2"):
        cells = [f"{table}/{prefix}_{size}" for prefix in ("student", "teacher") for size in ("4b", "8b")]
        pairs = [(means[f"{cell}_reverse"]["avg"], means[f"{cell}_forward"]["avg"]) for cell in cells]
        gains[table] = sum(reverse - forward for reverse, forward in pairs) / 4
    assert float(round(gains["table1"], 2)) == 3.68
    assert float(round((gains["table1"] + gains["table2"]) / 2, 2)) == 2.45


def test_a_table_ends_with_the_means_of_the_paper(tmp_path, capsys):
    """Pass is Pass@3 on two benchmarks and Pass@5 on the others."""
    n_of = {"gsm8k": 3, "math500": 3, "amc23": 5, "aime24": 5}
    paper = paper_rows()
    for row in ("4b_fixed", "4b_curriculum"):
        write_checkpoint(tmp_path / row / "final")
        for (data, n), values in zip(n_of.items(), paper[f"table3/{row}"]):
            results = results_of(n, *(float(values[name]) / 100 for name in ("avg", "pass@n")))
            results["length"] = float(values["length"])
            write_evaluation(tmp_path / row / "evals" / data, tmp_path / row / "final", data, results, True)
    call("--table", tmp_path / "4b_fixed", tmp_path / "4b_curriculum")
    printed = capsys.readouterr().out
    rows = [dict(zip(cells_of(printed)[0], row)) for row in cells_of(printed)[1:]]
    assert len(rows) == 10 and list(rows[0])[3:7] == ["n", "Avg@n [95%]", "Pass@n", "Maj@n"]
    fixed, curriculum = rows[-2:]
    assert [fixed["run"], curriculum["run"]] == ["4b_fixed", "4b_curriculum"]
    assert fixed["data"] == curriculum["data"] == "mean" and fixed["n"] == "5, 3"
    assert [row["Avg@n [95%]"].split()[0] for row in rows[-2:]] == ["0.364", "0.400"]
    assert float(curriculum["Pass@n"]) - float(fixed["Pass@n"]) == pytest.approx(0.0587, abs=1e-3)
    assert [fixed["length"], curriculum["length"], fixed["truncated"]] == ["8184.8", "2688.0", "10.0%"]
    assert printed.endswith("Pass@n, Maj@n: n is 5 on aime24, amc23; 3 on gsm8k, math500.\n")


def test_a_k_that_a_data_set_lacks_has_no_mean(tmp_path, capsys):
    """With one n for all, columns have its number; with several, that of k = n is @n."""
    for data, n, ks in (("a", 4, [1, 4]), ("b", 4, [2, 4])):
        write_evaluation(tmp_path / "x" / data, tmp_path / "m", data, results_of(n, ks=ks))
    call("--table", tmp_path / "x")
    a, b, mean = printed_rows(capsys)
    names = ["Avg@4 [95%]", "Pass@1", "Pass@2", "Pass@4", "Maj@2", "Maj@4"]
    assert [name for name in mean if "@" in name] == names and "n" not in mean
    assert [mean[name] for name in names[1:]] == ["-", "-", "0.750", "-", "0.750"]
    write_evaluation(tmp_path / "x" / "c", tmp_path / "m", "c", results_of(2, ks=[1, 2]))
    call("--table", tmp_path / "x")
    *_, c, mean = printed_rows(capsys)
    assert [name for name in mean if "Pass" in name] == ["Pass@1", "Pass@2", "Pass@n"]
    assert [c["Pass@2"], c["Pass@n"], mean["Pass@1"], mean["Pass@n"]] == ["0.750", "0.750", "-", "0.750"]


def test_a_run_without_all_data_sets_says_over_what_its_mean_is(tmp_path, capsys):
    for run, sets in {"x": "abc", "y": "ab", "z": "c"}.items():
        for data in sets:
            write_evaluation(tmp_path / run / data, tmp_path / f"{run}_model", data, results_of(4))
    call("--table", *(tmp_path / run for run in "xyz"))
    rows = printed_rows(capsys)
    assert len(rows) == 6 + 2
    assert [row["data"] for row in rows[-2:]] == ["mean", "mean of a, b"]


def test_the_interval_of_a_mean_in_the_table(tmp_path, capsys):
    """Against a bootstrap that resamples the problems of both data sets."""
    random.seed(5)
    correct = {
        data: [random.choices([0, 1], [1, weight], k=4) for _ in range(size)]
        for data, size, weight in (("a", 30, 1), ("b", 60, 4))
    }
    for data, values in correct.items():
        write_evaluation(tmp_path / "x" / data, tmp_path / "m", data, (rows_of(values), 4, [4]))
    call("--table", tmp_path / "x")
    _, low, high = (float(word.strip("[],")) for word in printed_rows(capsys)[-1]["Avg@4 [95%]"].split())
    problems = [[sum(one) / 4 for one in values] for values in correct.values()]
    draws = []
    for _ in range(4000):
        drawn = [random.choices(values, k=len(values)) for values in problems]
        draws.append(sum(sum(values) / len(values) for values in drawn) / 2)
    draws.sort()
    assert (low, high) == pytest.approx((draws[100], draws[3899]), abs=0.012)
    assert high - low < 0.8 * (interval(problems[0])[1] - interval(problems[0])[0])


def test_compare_pairs_the_problems(tmp_path, capsys):
    """The second evaluation is better on a third of the problems: certain when paired, else lost in noise."""
    random.seed(3)
    sides = [[], []]
    for problem in range(60):
        chance = random.choice([0, 1, 2])
        for side, more in zip(sides, (0, problem % 3 == 0)):
            for sample in range(4):
                side.append(graded(problem, sample < chance + more, 10 + problem % 7, 1.0))
    for name, rows in zip("ab", sides):
        write_evaluation(tmp_path / f"{name}_eval", tmp_path / name, "d", (rows, 4, [1, 2]), given=name)
    call("--compare", tmp_path / "a_eval", tmp_path / "b_eval")
    cells = {line[0]: line[1:] for line in cells_of(capsys.readouterr().out)}
    assert cells["metric"] == ["a (n = 4)", "b (n = 4)", "difference [95%]"]
    first, second = (sum(row["correct"] for row in rows) / 240 for rows in sides)
    assert cells["avg"][:2] == [f"{first:.3f}", f"{second:.3f}"] and second - first == pytest.approx(20 / 240)
    difference, low, high = (float(word.strip("[],")) for word in cells["avg"][2].split())
    assert difference == pytest.approx(20 / 240, abs=1e-3)
    deviation = (1 / 3 * 2 / 3 / 60) ** 0.5 / 4  # a third of the problems gain a quarter
    expected = (1 / 12 - 1.96 * deviation, 1 / 12 + 1.96 * deviation)
    assert (low, high) == pytest.approx(expected, abs=0.006) and low > 0
    assert cells["entropy"][2] == "+0.000 [+0.000, +0.000]"
    a, b = (interval(values_by_problem(rows, 4, [1])["avg"][0]) for rows in sides)
    assert a[1] > b[0]  # the two intervals overlap


def test_compare_ends_with_the_paired_difference_of_the_means(tmp_path, capsys):
    """Two data sets of 50 problems gain in the same places. Resampled alike, they would seem to be one data
    set, and the interval would be wider by the root of 2. The third, of 200 problems, weighs no more."""
    gains = {"a": [i % 2 for i in range(50)], "b": [i % 2 for i in range(50)], "c": [0] * 200}
    n_of = {"a": 2, "b": 2, "c": 3}
    for side, more in {"first": 0, "second": 1}.items():
        for data, found in gains.items():
            n = n_of[data]
            correct = [[more * gain] + [1] + [0] * (n - 2) for gain in found]
            measured = rows_of(correct, tokens=10 + 3 * more), n, [1, n]
            write_evaluation(tmp_path / side / data, tmp_path / f"model_{side}", data, measured, True)
    call("--compare", tmp_path / "first", tmp_path / "second")
    parts = re.split(r"(?m)^(\w+)\n\n", capsys.readouterr().out)
    found = dict(zip(parts[1::2], parts[2::2]))
    assert list(found) == ["a", "b", "c", "mean"]
    assert found["mean"].endswith("each with the same weight. Pass@n, Maj@n: n is 2 on a, b; 3 on c.\n")
    cells = {line[0]: line[1:] for line in cells_of(found["mean"])}
    assert list(cells) == "metric avg pass@1 maj@1 pass@n maj@n length truncated entropy".split()
    assert cells["metric"] == [
        str(tmp_path / "model_first"),
        str(tmp_path / "model_second"),
        "difference [95%]",
    ]
    assert cells["avg"][:2] == [f"{(1 / 2 + 1 / 2 + 1 / 3) / 3:.3f}", f"{(3 / 4 + 3 / 4 + 1 / 3) / 3:.3f}"]
    difference, low, high = (float(word.strip("[],")) for word in cells["avg"][2].split())
    assert difference == pytest.approx((1 / 4 + 1 / 4 + 0) / 3, abs=1e-3)
    deviation = (2 * (1 / 4) ** 2 / 50) ** 0.5 / 3  # of each problem 1/4
    assert (high - low) / 2 == pytest.approx(1.96 * deviation, rel=0.1)
    assert (high + low) / 2 == pytest.approx(difference, abs=0.004)
    assert cells["length"] == ["10.000", "13.000", "+3.000 [+3.000, +3.000]"]


def test_no_mean_of_a_side_with_several_models(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "DRAWS", 50)
    for side in ("first", "second"):
        for data in "ab":
            model = tmp_path / f"model_{data * (side == 'second')}"
            write_evaluation(tmp_path / side / data, model, data, (rows_of([[1, 0], [0, 0]]), 2, [2]))
    call("--compare", tmp_path / "first", tmp_path / "second")
    printed = capsys.readouterr().out
    assert "\nmean\n" not in printed and printed.endswith("no mean: a side has several models\n")


# Names


@pytest.mark.parametrize(
    "paths, names",
    [
        ("/o/sft /o/opd", "sft opd"),
        ("/o/a/sft /o/b/sft /o/opd", "a/sft b/sft opd"),
        ("/o/a/x/sft /o/b/x/sft", "a/x/sft b/x/sft"),
        ("/a/sft /x/a/sft", "/a/sft x/a/sft"),
        ("/o/sft/ /o/./sft /p/sft", "o/sft o/sft p/sft"),
        ("/o/opd/x /o/opd", "x opd"),
    ],
)
def test_names_have_as_many_parents_as_it_takes(paths, names):
    paths = paths.split()
    found = reading.distinct_names(paths)
    assert [found[path] for path in paths] == names.split()
    assert reading.distinct_names(reversed(paths)) == found


def names_in(capsys, *paths):
    call("--table", *paths)
    return [row["run"] for row in printed_rows(capsys)]


def test_two_runs_of_one_name_have_two_names(tmp_path, capsys):
    for folder in "ab":
        write_checkpoint(tmp_path / folder / "sft" / "final", response_tokens=ord(folder))
        run = tmp_path / folder / "sft"
        write_evaluation(run / "eval", run / "final", "d", results_of(2))
    assert names_in(capsys, tmp_path / "a", tmp_path / "b") == ["a/sft", "b/sft"]
    assert names_in(capsys, tmp_path / "a") == ["sft"]
    shutil.copytree(tmp_path / "a", tmp_path / "copy")  # which still says that its model is in a
    assert names_in(capsys, tmp_path / "a", tmp_path / "copy") == ["a/sft", "copy/sft"]
    os.rename(tmp_path / "b/sft", tmp_path / "b/renamed")
    assert names_in(capsys, tmp_path / "a", tmp_path / "b") == ["sft", "renamed"]
    shutil.rmtree(tmp_path / "b/renamed/final")
    assert names_in(capsys, tmp_path / "a", tmp_path / "b") == ["a/sft", "b/sft"]  # as it is recorded


def test_another_runs_model_beside_a_copied_evaluation_does_not_name_it(tmp_path, capsys):
    for run in "ab":
        write_checkpoint(tmp_path / run / "final", response_tokens=ord(run))
    write_evaluation(tmp_path / "a/eval", tmp_path / "a/final", "d", results_of(2))
    shutil.copytree(tmp_path / "a/eval", tmp_path / "b/eval")
    assert names_in(capsys, tmp_path / "b/eval") == ["a"]


def test_checkpoints_and_repeated_evaluations_of_a_run(tmp_path, capsys):
    run = tmp_path / "sft"
    for name, step in (("final", 5), ("best", 3), ("step_000002", 2)):
        write_checkpoint(run / name, step=step)
        write_evaluation(run / f"eval_{name}", run / name, "d", results_of(2))
    assert names_in(capsys, run) == ["sft/best", "sft", "sft/step_000002"]
    for seed in "12":
        for data in "de":
            write_evaluation(
                run / f"again_{seed}" / data, run / "final", data, results_of(2), benchmarks=True
            )
    found = ["sft (again_1)", "sft (again_2)", "sft/best", "sft (eval_final)", "sft/step_000002"]
    found += found[:2] * 2  # on the other data set, and their means
    assert names_in(capsys, run) == found
    assert names_in(capsys, run / "again_1", run / "again_1/d") == ["sft"] * 3  # a path given twice


def test_two_models_that_were_given_by_one_name(tmp_path, capsys):
    for folder in "ab":
        path = tmp_path / folder / "eval"
        write_evaluation(path, tmp_path / folder / "model", folder, results_of(2), given="model")
    assert names_in(capsys, tmp_path / "a", tmp_path / "b") == ["model (a/eval)", "model (b/eval)"]
    write_evaluation(tmp_path / "eval", tmp_path / "hub", "c", results_of(2), given="Qwen/Qwen3-4B")
    assert names_in(capsys, tmp_path / "eval") == ["Qwen/Qwen3-4B"]


def test_results_of_another_version_are_refused(tmp_path, refused):
    results = results_of(2)
    del results["maj"]
    path = write_evaluation(tmp_path / "eval", tmp_path / "m", "d", results)
    refused(lambda: call("--table", path), f"--table {path}", "no maj", "evaluate again")
    refused(lambda: evaluate.main(evaluate.get_args(["--compare", str(path), str(path)])), "--compare")


def test_one_metric_of_tensors():
    """mean_over() of bootstrapped differences."""
    found = tables.mean_over([{"a": torch.tensor([1.0, 2.0]), "b": 1}, {"a": torch.tensor([3.0, 6.0])}])
    assert list(found) == ["a"] and found["a"].tolist() == [2.0, 4.0]
