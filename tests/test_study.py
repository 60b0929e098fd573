"""The study on the toy world: a miniature of it, its resumption, and its report recomputed by hand."""

import functools
import glob
import json
import os
import random
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from conftest import ROOT, read_rows
from distil import artifacts, evaluation
from recipes import toy_grid, toy_grid_report, toy_map_report, toy_runs, toy_world
from recipes.toy_verdicts import by_seed, difference, values_of
from runs import training

MINI = toy_runs.SIZE | {
    "world": "--train 24 --heldout 2 --test 4 --terms 2 3 --restate 0.3 --slips 0.3 --student_width",
    "short": "4",
    "long": "12",
    "teacher": "--steps 1",
    "base_32": "--steps 1",
    "base_56": "--steps 1",
    "base_96": "--steps 1",
    "rollouts": "--limit 8",
    "own": "--limit 2",
    "collapsed": "--steps 1 --batch_size 2 --lr 1e-3",
    "usual": "--steps 2 --save_every 1 --eval_every 2 --eval_n 4",
    "cell": "--steps 2 --save_every 1 --eval_every 2 --eval_n 4",
    "map": "--steps 1",
    "curriculum": "--horizons 4,12 --gate_every 1 --entropy_floor",
    "grpo": "--steps 1 --lr 1e-3 --n 2 --batch_size 2 --eval_every 1 --eval_n 4",
    "rates": ["1e-4"],
    "cell_seeds": [1],
    "seeds": [1],
}
OF_CELLS = [("student_reverse_long", 32, "many"), ("teacher_reverse_long", 32, "many")]
POINTS = [*OF_CELLS, ("teacher_forward_short", 56, "few")]


@pytest.fixture(scope="module", autouse=True)
def fewer_draws():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "DRAWS", 100)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """OUT of a miniature study, interrupted in the second step of its curriculum and started again; its
    results are in OUT/results.jsonl."""
    out = str(tmp_path_factory.mktemp("study"))
    results = f"{out}/results.jsonl"
    real = training.optimizer_step

    def interrupted(args, model, optimizer, step, ids):
        if step == 1 and args.out.endswith("curriculum_1"):
            raise KeyboardInterrupt
        return real(args, model, optimizer, step, ids)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(artifacts, "provenance", functools.cache(artifacts.provenance))
        patch.setattr(training, "optimizer_step", interrupted)
        patch.setattr(toy_runs, "CELLS", [cell for cell, *_ in OF_CELLS])
        patch.setattr(toy_runs, "POINTS", POINTS)
        patch.setattr(toy_runs, "OF_CELLS", OF_CELLS)
        with pytest.raises(KeyboardInterrupt):
            toy_grid.study(MINI, out, results, 1)
        assert not os.path.exists(f"{out}/curriculum_1/meta.json")
        before = {
            entry.name: os.stat(f"{entry.path}/meta.json").st_mtime_ns
            for entry in os.scandir(out)
            if os.path.exists(f"{entry.path}/meta.json")
        }
        done = {"world", "teacher", "student_reverse_long_1e-4_1", "student_reverse_long_1", "mix_0.8_1"}
        assert done <= set(before)
        lines = open(results).read()
        assert done - {"world"} <= set(toy_grid.read_results(results))
        patch.setattr(training, "optimizer_step", real)
        toy_grid.study(MINI, out, results, 1)
        assert open(results).read().startswith(lines)
        toy_grid.study(MINI, f"{out}/elsewhere", results, 1)  # another checkout repeats nothing
        assert not os.path.exists(f"{out}/elsewhere")
    for name, time in before.items():  # what was finished is kept
        assert os.stat(f"{out}/{name}/meta.json").st_mtime_ns == time
    return out


def test_every_run_is_in_the_results(finished):
    results = toy_grid.read_results(f"{finished}/results.jsonl")
    names = {result["name"] for result in results.values()}
    assert {"teacher", "base", "base_endoftext", "base_56_few", "collapsed", *toy_runs.CUT} <= names
    assert {"student_reverse_long_1e-4_equal_flops", "teacher_forward_short_width_56_few_1e-4"} <= names
    runs = {*toy_runs.runs_of(MINI, 1)} - {
        f"{grpo}{cell}" for grpo in ("", "grpo_") for cell in toy_runs.CELLS
    }
    runs |= {"grpo_student_reverse_long", "teacher_reverse_long", "teacher_forward_short_width_56_few_1e-4"}
    assert runs <= names
    for place, entry in results.items():
        if entry["name"] in runs:
            found = json.load(open(f"{finished}/{place}/eval/results.json"))
            for metric in ("avg", "length", "truncated", "entropy"):
                [[mean]] = by_seed({"run": {1: entry}}, {"run": 1}, metric, [1], torch.ones(1, 4).double())
                assert mean.item() == pytest.approx(found[metric], abs=0.02 if metric == "entropy" else 1e-9)
            values, _ = values_of(entry, "pass@4")
            assert values.mean().item() == pytest.approx(found["pass"]["4"])
            steps = [] if "width" in place else [0, 1 if "grpo" in place else 2]
            assert entry["curve"]["step"] == steps


def test_runs_start_from_the_base_student_of_their_width_and_orders(finished):
    results = toy_grid.read_results(f"{finished}/results.jsonl")
    start = {place: result["start"] for place, result in results.items()}
    assert start["mix_0.8_1"] == toy_grid.weights_digest(f"{finished}/base/final")
    few = toy_grid.weights_digest(f"{finished}/base_56_few/final")
    assert start["teacher_forward_short_width_56_few_1e-4_1"] == few != start["mix_0.8_1"]


def test_the_interrupted_run_went_on_where_it_was(finished, tmp_path):
    words = toy_runs.make_jobs(MINI)["curriculum_1"].commands[0].format(out=finished).split()
    toy_grid.call([*words[:-1], str(tmp_path / "whole")])
    one = load_file(f"{finished}/curriculum_1/final/model.safetensors")
    other = load_file(tmp_path / "whole/final/model.safetensors")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert "--resume" in json.load(open(f"{finished}/curriculum_1/meta.json"))["argv"]


def test_equal_flops_are_the_first_checkpoint_that_spent_as_much(finished):
    def spent(name):
        return toy_grid.rounded(json.load(open(f"{run}/{name}/checkpoint.json"))["tflops"])

    run = f"{finished}/student_reverse_long_1e-4_1"
    first, final = spent("step_000001"), spent("final")
    assert toy_grid.equal_flops(run, first) == "step_000001"
    assert toy_grid.equal_flops(run, first * 1.01) == toy_grid.equal_flops(run, final * 2) == "final"


def test_ends_differ_where_they_should(finished):
    def stops(run):
        return json.load(open(f"{finished}/{run}/meta.json"))["stop_ids"]

    assert stops("base") == stops("student_reverse_long_1") == stops("ends_both_1") == [0, 2]
    assert stops("base_endoftext") == stops("ends_student_1") == [0]
    for run in ("ends_student", "ends_student_forward"):
        assert stops(f"{run}_1/eval") == [0] and stops(f"{run}_cut_1/eval") == [0, 2]
    assert stops("ends_student_curriculum_1") == [0] and stops("from_collapsed_1") == [0, 2]


def test_other_flags_are_refused(finished, refused, tmp_path):
    changed = MINI | {"usual": MINI["usual"].replace("--eval_every 2", "--eval_every 1")}
    results = shutil.copy(f"{finished}/results.jsonl", tmp_path)
    refused(lambda: toy_grid.study(changed, finished, results, 1), "other flags", "remove its line")
    job = toy_runs.make_jobs(changed)["curriculum_1"]
    refused(lambda: toy_grid.do(job, {}, finished), "--eval_every", "remove what is there")
    with open(results, "a") as file:
        file.write(open(results).readline())
    refused(lambda: toy_grid.read_results(results), "a second result of")


def test_a_result_is_known_by_all_that_made_it():
    jobs, place = toy_runs.make_jobs(MINI), "student_reverse_long_width_56_few_1e-4_1"
    before = toy_runs.identity(jobs, place)
    needed = toy_grid.with_needs(jobs, [place])
    assert set(needed) == {"world", "world_56", "world_few", "teacher_few", "base_56_few", place}
    assert all({*toy_runs.needs(jobs, one)} <= {*needed[:index]} for index, one in enumerate(needed))
    changes = {
        "world": "24 25",
        "teacher": "1 2",
        "base_56": "1 2",
        "map": "1 2",
        "map_test": "4 5",
        "long": "2 3",
    }
    for key, change in ({"usual": "2 3", "short": "4 5", "base_32": "1 2"} | changes).items():
        other = toy_runs.make_jobs(MINI | {key: MINI[key].replace(*change.split())})
        assert (toy_runs.identity(other, place) != before) == (key in changes)


def test_jobs_run_in_forks_after_those_that_they_need(tmp_path, capfd):
    words = "toy_world --train 3 --heldout 1 --test 1 --terms 2 3 --out {out}/"
    jobs = {name: toy_runs.Job([words + name]) for name in "abc"}
    late = "rollout --model {out}/a/student_init --data {out}/b/train.jsonl --limit 1 --max_response_tokens 2"
    jobs["late"] = toy_runs.Job([f"{late} --engine hf --dtype float32 --out {{out}}/late"])
    order = list(toy_grid.work(["late", "a", "b", "c"], jobs, {}, str(tmp_path), 2))
    assert {*order} == {*jobs} and order.index("late") > max(order.index("a"), order.index("b"))
    assert all((tmp_path / name / "meta.json").is_file() for name in jobs)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").touch()
    jobs["mine"] = toy_runs.Job([words + "mine"])
    with pytest.raises(SystemExit) as end:
        list(toy_grid.work(["mine"], jobs, {}, str(tmp_path), 2))
    assert end.value.code == 1 and "not this project's" in capfd.readouterr().err


def made_up(name, seed, level, entropy=4.0, rate_bonus=0.0):
    """A result of 8 responses to each of 8 problems, `level` of them right."""
    curve = {key: [1, 1] for key in ("tflops", "length", "entropy", "truncated", "pass@4")}
    return {
        "name": name,
        "seed": seed,
        "n": 8,
        "maj": 0.5,
        "tflops": 1.0,
        "step": 10,
        "curve": curve | {"step": [0, 10], "avg": [0.1, level / 8 + rate_bonus]},
        "gates": [],
        "start": "same",
        "correct": f"{level}" * 8,
        "cut": "0" * 8,
        "tokens": " ".join(["40"] * 8),
        "entropy": " ".join([f"{entropy}"] * 8),
    }


def complete(size):
    """Made-up results of the whole study: of 8, reverse runs solve 6, others 2; after GRPO 7 and 4; the third
    seed of sampled is better than its others. On held-out problems 3e-4 is best, for the widest 1e-3."""

    def make(place):
        job = jobs[place]
        level, entropy = (6, 4.0) if "reverse" in place or "curriculum" in place else (2, 8.0)
        if place.startswith("grpo"):
            level = 7 if "reverse" in place else 4
        level = 8 if place == "sampled_3" else level
        bonuses = {"3e-4": 0.01, "1e-3": 0.02 if "width_96" in place else 0}
        bonus = sum(bonuses[rate] for rate in bonuses if rate in place)
        return made_up(job.name, job.seed, level, entropy, bonus)

    jobs, results = toy_runs.make_jobs(size), {}
    while places := toy_runs.missing(size, results):
        results |= {place: make(place) for place in places}
    return results


def test_what_is_missing_is_counted():
    results = complete(toy_runs.SIZE)
    assert toy_runs.count_missing(toy_runs.SIZE, results) == 0
    for place in ("base", "mix_0.8_2", "student_reverse_long_width_96_few_1e-4_3"):
        del results[place]
    assert toy_runs.count_missing(toy_runs.SIZE, results) == 3
    assert toy_runs.missing(toy_runs.SIZE, results) == ["base"]


def test_rates_go_on_until_the_best_is_no_end():
    size, point = toy_runs.SIZE, toy_runs.OF_CELLS[0]

    def chosen(**avg):
        results = {}
        for rate, value in avg.items():
            name = toy_runs.name_of(*point, rate.replace("_", "-").removeprefix("at"))
            results[f"{name}_1"] = made_up(name, 1, 0, rate_bonus=value)
        scores, best = toy_runs.choose(size, results, point)
        return [*scores], best

    middle = ["3e-5", "1e-4", "3e-4"]
    assert chosen() == (middle, None)
    assert chosen(at3e_5=0.1, at1e_4=0.3) == (middle, None)
    assert chosen(at3e_5=0.1, at1e_4=0.3, at3e_4=0.2) == (middle, "1e-4")
    assert chosen(at3e_5=0.4, at1e_4=0.3, at3e_4=0.2) == (["1e-5", *middle], None)
    assert chosen(at3e_5=0.4, at1e_4=0.3, at3e_4=0.2, at1e_5=0.1) == (["1e-5", *middle], "3e-5")
    assert chosen(at3e_5=0.1, at1e_4=0.2, at3e_4=0.3, at1e_3=0.4) == ([*middle, "1e-3"], "1e-3")


def test_the_held_out_score_is_of_the_last_sixth():
    result = {"step": 120, "curve": {"step": [0, 80, 100, 120], "avg": [0.9, 0.9, 0.2, 0.3]}}
    assert toy_runs.held_out(result) == pytest.approx(0.25)


def test_the_report_says_what_the_results_say(tmp_path, capsys, monkeypatch):
    results = complete(toy_runs.SIZE)
    assert {f"{c}_3e-4_{s}" for c in toy_runs.CELLS for s in range(1, 6)} <= set(results)
    assert "student_reverse_long_width_96_few_1e-4_3" in results
    path = tmp_path / "toy_grid.jsonl"
    path.write_text("".join(json.dumps(result) + "\n" for result in results.values()))
    toy_grid.main(toy_grid.get_args(["--report", str(path)]))
    text = (tmp_path / "toy_grid.md").read_text()
    assert "missing" not in text and "not run" not in text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]
    shown = {row[0]: row[1:] for row in rows}
    claim = "reverse KL scores higher, short horizon (reverse minus forward)"
    assert shown[claim][1:] == ["+0.500 [+0.500, +0.500]", " ".join(["+0.500"] * 5), "holds"]
    claim = "reverse KL has lower entropy, short horizon (forward minus reverse)"
    assert shown[claim][1] == "+0.100 [+0.100, +0.100]"
    claim = "GRPO gains more after forward KL, long (forward minus reverse)"
    assert shown[claim][1:3] == ["+0.125 [+0.125, +0.125]", "+0.125 +0.125 +0.125"]
    claim = "mix 0.8 loses less than 0.02 (mix 0.8 minus reverse; claim: above -0.02)"
    assert shown[claim][1:4:2] == ["-0.500 [-0.500, -0.500]", "opposite"]
    claim = "one sampled token scores lower (full vocabulary minus sampled)"
    assert shown[claim][2:] == ["+0.500 +0.500 -0.250", "not resolved"]
    assert shown["student_reverse_long"][0].startswith("0.750 ")
    rates = next(row for row in rows if row[0] == "student_reverse_long" and row[-3] == "3e-4")
    assert rates[1:6] == ["", "0.750", "0.750", "0.760", "0.750"]
    place, avgs = [row[3:] for row in rows if row[:3] == ["96", "two", "long"]]
    assert avgs[1:] == ["0.250 (1e-4)", "0.750 (1e-4)", "0.250 (1e-4)", "0.750 (1e-4)"]
    assert place[0] == "+0.500 [+0.500, +0.500]" and place[3] == "+0.000 [+0.000, +0.000]"
    assert place[2] == "holds" and place[5] == "not resolved"
    assert place[6] == "teacher reverse or student reverse"
    assert capsys.readouterr().out.count("figure: ") == len(list(tmp_path.glob("*.png"))) == 7


def test_the_map_has_no_difference_where_a_cell_is_missing(tmp_path, monkeypatch, refused):
    drawn, results = [], complete(toy_runs.SIZE)
    monkeypatch.setattr(toy_grid_report, "draw", lambda *args: None)
    monkeypatch.setattr(toy_map_report, "save", lambda figure, path, axis: drawn.append(figure.axes))
    bars = lambda: [len(axis.containers) for axis in drawn.pop()]
    toy_grid_report.report(f"{tmp_path}/all.jsonl", results)
    assert bars() == [48, 12, 12]
    some = {place: one for place, one in results.items() if place != "student_reverse_long_3e-4_1"}
    toy_grid_report.report(f"{tmp_path}/some.jsonl", some)
    assert bars() == [47, 11, 11]
    refused(lambda: toy_grid_report.report(f"{tmp_path}/none.jsonl", {}), "no results")
    foreign = {"x": {"name": "x", "seed": None}}
    refused(lambda: toy_grid_report.report(f"{tmp_path}/kl.jsonl", foreign), "x is no result of this study")


def test_what_is_missing_is_said_so(tmp_path, monkeypatch):
    monkeypatch.setattr(toy_grid_report, "draw", lambda *args: None)
    monkeypatch.setattr(toy_grid_report, "draw_map", lambda *args: None)
    results = {"base": made_up("base", None, 2), "mix_0.8_1": made_up("mix_0.8", 1, 4)}
    toy_grid_report.report(f"{tmp_path}/some.jsonl", results)
    text = (tmp_path / "some.md").read_text()
    some = toy_runs.count_missing(toy_runs.SIZE, results)
    assert f"At least {some} runs are missing: `bash recipes/toy_grid.sh` makes them" in text
    assert "not chosen yet" in text and "not run yet" in text


def test_equal_flops_are_equal():
    """Tested is the first checkpoint, of one every 5 of 120 steps, that has spent what the other run has."""
    results = toy_grid.read_results(f"{ROOT}/results/toy_grid.jsonl")
    places = [place for place in results if "equal_flops" in place]
    assert len(places) >= 4 * 3
    for place in places:
        whole = place.replace("_equal_flops", "")
        rates = [f"_{rate}" for rate in toy_runs.SIZE["rates"] if f"_{rate}_" in whole] or [""]
        name, seed = (
            whole.replace("student", "teacher").removesuffix(f"_{results[place]['seed']}"),
            whole[-2:],
        )
        others = [f"{name.removesuffix(rates[0])}_{rate}{seed}" for rate in toy_runs.SIZE["rates"]]
        budget = next(results[other]["tflops"] for other in (name + seed, *others) if other in results)
        between = 1.3 * results[whole]["tflops"] * 5 / 120  # responses of some steps are longer
        assert budget <= results[place]["tflops"] < budget + between, place


def test_seeds_with_two_base_students_are_named(tmp_path, monkeypatch):
    found = {"a": {1: {"start": "x"}, 2: {"start": "y"}}, "b": {1: {"start": "x"}, 2: {"start": "z"}}}
    assert toy_map_report.mixed_starts(found, ["a", "b", "c"]) == [2]
    assert toy_map_report.mixed_starts(found, ["a"]) == []
    curves = [{"avg": [avg, 0.5], "length": [30, 40]} for avg in (0.2, 0.2, 0.3)]
    found = {run: {1: {"start": None, "curve": curve}} for run, curve in zip("abc", curves)}
    assert toy_map_report.mixed_starts(found, "ab") == [] and toy_map_report.mixed_starts(found, "abc") == [1]

    monkeypatch.setattr(toy_grid_report, "draw", lambda *args: None)
    monkeypatch.setattr(toy_grid_report, "draw_map", lambda *args: None)
    for changed in ("teacher_forward_long_2", "student_reverse_short_3e-4_4", "curriculum_floor_0.33_2"):
        results = complete(toy_runs.SIZE)
        seed = results[changed]["seed"]
        results[changed] |= {"start": "another"}
        toy_grid_report.report(f"{tmp_path}/some.jsonl", results)
        assert f"base students of two machines: {seed}." in (tmp_path / "some.md").read_text()


def test_gates_that_close_are_counted():
    gates = [
        {"decision": d, "entropy": e, "entropy_floor": 0.33} for d, e in (("advance", 0.4), ("hold", 0.3))
    ]
    found = {"curriculum": {seed: {"gates": gates} for seed in (1, 2)}, "fixed": {1: {"gates": []}}}
    row = toy_map_report.gates_table(found).splitlines()[-1]
    assert [cell.strip() for cell in row.split("|")[1:-1]] == [
        "curriculum",
        "0.33",
        "4",
        "2",
        "0.300 to 0.400",
    ]


def test_get_args_wants_one_thing_to_do(refused):
    refused(lambda: toy_grid.get_args([]), "--out or --report")


def test_the_two_base_students_learn_from_the_same_solutions(tmp_path):
    """Only the token that ends them differs, and that for all but --chat_share."""
    ends = {"im_end": [], "endoftext": ["--student_end", "endoftext", "--chat_share", "0.3"]}
    hasty = {}
    for end, more in ends.items():
        words = [
            "--train",
            "200",
            "--heldout",
            "1",
            "--test",
            "1",
            "--restate",
            "0.3",
            *more,
            "--out",
            str(tmp_path / end),
        ]
        toy_world.main(toy_world.get_args(words))
        hasty[end] = [
            json.loads(line)["response_ids"] for line in open(tmp_path / end / "hasty/rollouts.jsonl")
        ]
    assert [ids[:-1] for ids in hasty["im_end"]] == [ids[:-1] for ids in hasty["endoftext"]]
    assert {ids[-1] for ids in hasty["im_end"]} == {2} and {ids[-1] for ids in hasty["endoftext"]} == {0, 2}
    assert 0.2 < sum(ids[-1] == 2 for ids in hasty["endoftext"]) / 200 < 0.4


def test_two_orders_are_as_given_and_backwards():
    rng, problem = random.Random(1), "a=3 b=7 c=2"
    assert {toy_world.solve(problem, rng, orders="two") for _ in range(20)} == {
        "+a3=3\n+b7=0\n+c2=2\n\\boxed{2}<|im_end|>",
        "+c2=2\n+b7=9\n+a3=2\n\\boxed{2}<|im_end|>",
    }
    assert len({toy_world.solve(problem, rng) for _ in range(100)}) == 6


VERDICTS = ("holds", "opposite", "not resolved", "not run yet", "too few seeds", "no seeds")


def rows_of(text):
    """The rows of Markdown tables."""
    lines = [line.strip().strip("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")] for line in lines]


def test_the_committed_results_belong_to_the_committed_runs():
    jobs = toy_runs.make_jobs(toy_runs.SIZE)
    for place, result in toy_grid.read_results(f"{ROOT}/results/toy_grid.jsonl").items():
        assert place not in jobs or result["id"] == toy_runs.identity(jobs, place), place


def test_the_study_page_says_what_the_committed_results_say(tmp_path, monkeypatch):
    """Every row of the page's tables that has a verdict is one of the report's, which is up to date."""
    path = shutil.copy(f"{ROOT}/results/toy_grid.jsonl", tmp_path)
    monkeypatch.setattr(toy_grid_report, "draw", lambda *args: None)
    monkeypatch.setattr(toy_grid_report, "draw_map", lambda *args: None)
    monkeypatch.setattr(evaluation, "DRAWS", 1000)
    toy_grid_report.report(path, toy_grid.read_results(path))
    text = (tmp_path / "toy_grid.md").read_text()
    assert text == open(f"{ROOT}/results/toy_grid.md").read()
    for page, count in (("study", 20), ("map", 12)):
        page = [row for row in rows_of(open(f"{ROOT}/docs/{page}.md").read()) if {*row} & {*VERDICTS}]
        assert len(page) >= count and all(row in rows_of(text) for row in page)


def test_the_text_of_the_study_has_the_numbers_of_the_committed_results():
    found, by_place = {}, toy_grid.read_results(f"{ROOT}/results/toy_grid.jsonl")
    for result in by_place.values():
        found.setdefault(result["name"], {})[result["seed"]] = result
    page = " ".join(open(f"{ROOT}/docs/study.md", encoding="utf-8").read().split())

    def mean(run, metric="avg"):
        return difference(found, {run: 1}, metric).mean

    def gates(run):
        decided = [gate["decision"] for entry in found[run].values() for gate in entry["gates"]]
        return f"{len(decided) - decided.count('advance')} of {len(decided)}"

    cells = [cell for cell in toy_runs.CELLS if cell.endswith("long")]
    own = {cell: toy_grid_report.best_runs(by_place)[cell] for cell in cells}
    starts = [f"{toy_map_report.avg_of(found['base'][seed]):.2f}" for seed in range(1, 6)]
    for seed, end in zip(range(1, 6), (0.5, 0.85, 0.95, 0.26, 0.27)):
        ends = [difference({0: {0: found[own[cell]][seed]}}, {0: 1}, "avg").mean for cell in cells]
        assert sum(ends) / 4 == pytest.approx(end, abs=0.012) and max(ends) - min(ends) < 0.1
    signs = {cell: 1 / 2 if "reverse" in cell else -1 / 2 for cell in cells}
    once = difference(found, signs, "avg").each[0]
    again = difference(found, {toy_runs.name_of(cell): sign for cell, sign in signs.items()}, "avg").each[0]
    cut = (mean("ends_student_cut", "truncated") + mean("ends_student_forward_cut", "truncated")) / 2
    after = [mean(run) for run in found if run.startswith("grpo_")]
    for words in (
        f"Avg@8 {mean('teacher'):.2f} against {mean('base'):.2f}, "
        f"its entropy is {mean('teacher', 'entropy'):.2f}",
        f"{mean('mix_0.5'):.2f} and {mean('mix_0.8'):.2f}; forward {mean('student_forward_long'):.2f}, "
        f"reverse {mean('student_reverse_long'):.2f}",
        f"score {', '.join(starts[:4])} and {starts[4]} before distillation",
        f"is {once:+.3f}, from the other {again:+.3f}",
        f"all eight cells to {min(after):.2f}-{max(after):.2f}",
        f"collapsed to {mean('collapsed', 'entropy'):.3f}",
        f"entropy rises to {mean('from_collapsed', 'entropy'):.3f}, Avg@8 from {mean('collapsed'):.2f} to "
        f"{mean('from_collapsed'):.2f}, and {mean('from_collapsed', 'truncated'):.0%} are truncated",
        f"long reverse KL | both tokens | {mean('student_reverse_long', 'truncated'):.0%} |",
        f"(`--stop_ids both`, the default) | {mean('ends_both', 'truncated'):.0%} |",
        f"(`--stop_ids student`) | {mean('ends_student', 'truncated'):.0%} |",
        f"long forward KL | the student's token only | {mean('ends_student_forward', 'truncated'):.0%} |",
        f"short horizon | the student's token only | {mean('ends_student_short', 'truncated'):.0%} |",
        f"growing lengths | the student's token only | {mean('ends_student_curriculum', 'truncated'):.0%} |",
        f"evaluated again | both tokens | {cut:.0%} |",
        f"With a floor of 0.2 {gates('curriculum')} gates closed",
        f"With 0.33 {gates('curriculum_floor_0.33')} closed",
        f"with 0.38 {gates('curriculum_floor_0.38')}, at 32",
    ):
        assert words in page, words


def test_how_many_points_of_the_map_reach_their_teacher():
    results = {(one["name"], one["seed"]): one for one in read_rows(f"{ROOT}/results/toy_grid.jsonl")}
    text = open(f"{ROOT}/results/toy_grid.md", encoding="utf-8").read()
    teachers = {
        o: toy_map_report.avg_of(results[name, None])
        for o, name in (("any", "teacher"), ("two", "teacher_few"))
    }
    points = [row for row in rows_of(text) if row[:1] and row[0] in ("32", "56", "96") and "(" in row[4]]
    lacks = [teachers[row[1]] - min(float(cell.split()[0]) for cell in row[4:8]) for row in points]
    assert len(points) == 12 and sum(lack <= 0.04 for lack in lacks) == 5
    wide = [
        lack for row, lack in zip(points, lacks) if row[2] == "long" and (row[0] == "56" or row[1] == "two")
    ]
    assert len(wide) == 4 and max(wide) < 0.02
    assert "At five of them every cell ends within 0.04 of its teacher" in " ".join(
        open(f"{ROOT}/docs/study.md").read().split()
    )


@pytest.mark.parametrize("page", ["README.md", "docs/study.md", "docs/map.md", "docs/kl_study.md"])
def test_every_interval_in_the_text_is_one_of_the_reports(page):
    reports = [open(path, encoding="utf-8").read() for path in sorted(glob.glob(f"{ROOT}/results/*.md"))]
    text = " ".join(open(f"{ROOT}/{page}", encoding="utf-8").read().split())
    found = re.findall(r"[+-]\d\.\d{3} \[[^\]]+\]", text)
    assert len(found) > 5
    for interval in found:
        assert any(interval in report for report in reports), interval
