"""The study on the toy world: a miniature of it, its resumption, and its report recomputed by hand."""

import functools
import json
import os
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file

from conftest import ROOT
from distil import artifacts, evaluation, training
from recipes import toy_grid, toy_grid_report, toy_world

MINI = {
    "world": "--train 24 --heldout 2 --test 4 --terms 2 3 --restate 0.3 --slips 0.3 --student_width 32",
    "short": "4",
    "long": "12",
    "teacher": "--steps 1",
    "base": "--steps 1",
    "rollouts": "--limit 8",
    "own": "--limit 2",
    "collapsed": "--steps 1 --batch_size 2 --lr 1e-3",
    "cell": "--steps 2 --lr 1e-3 --save_every 1 --eval_every 2 --eval_n 4",
    "curriculum": "--horizons 4,12 --gate_every 1 --entropy_floor 0",
    "grpo": "--steps 1 --lr 1e-3 --n 2 --batch_size 2 --eval_every 1 --eval_n 4",
    "test": "--n 8 --k 1 4 8",
}


@pytest.fixture(scope="module", autouse=True)
def fewer_draws():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "DRAWS", 100)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """OUT of a miniature study, interrupted in the second step of its curriculum and started again."""
    out = str(tmp_path_factory.mktemp("study"))
    real = training.optimizer_step

    def interrupted(args, model, optimizer, step, ids):
        if step == 1 and args.out.endswith("curriculum_1"):
            raise KeyboardInterrupt
        return real(args, model, optimizer, step, ids)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(artifacts, "provenance", functools.cache(artifacts.provenance))
        patch.setattr(training, "optimizer_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            toy_grid.study(MINI, out, [1], 1)
        assert not os.path.exists(f"{out}/curriculum_1/meta.json")
        assert not os.path.exists(f"{out}/results.json")
        before = {
            entry.name: os.stat(f"{entry.path}/meta.json").st_mtime_ns
            for entry in os.scandir(out)
            if os.path.exists(f"{entry.path}/meta.json")
        }
        done = {"world", "teacher", "rollouts", "scores", "student_reverse_long_1", "mix_0.8_1"}
        assert done <= set(before)
        patch.setattr(training, "optimizer_step", real)
        toy_grid.study(MINI, out, [1], 1)
    for name, time in before.items():  # what was finished is kept
        assert os.stat(f"{out}/{name}/meta.json").st_mtime_ns == time
    return out


def test_every_run_is_in_the_results(finished):
    found = json.load(open(f"{finished}/results.json"))
    names = {entry["name"] for entry in found["results"]}
    assert {name for _, _, terms, _ in toy_grid_report.claims() for name in terms} <= names
    assert set(toy_grid.runs_of(MINI)) | {"teacher", "base", "base_endoftext", "collapsed"} <= names
    for entry in found["results"]:
        if entry["name"] in toy_grid.runs_of(MINI):
            results = json.load(open(f"{finished}/{entry['name']}_1/eval/results.json"))
            for metric in ("avg", "length", "truncated", "entropy"):
                mean = evaluation.mean_of(*toy_grid_report.values_of([entry], metric))
                assert mean == pytest.approx(results[metric], abs=0.02 if metric == "entropy" else 1e-9)
            mean = evaluation.mean_of(*toy_grid_report.values_of([entry], "pass@4"))
            assert mean == pytest.approx(results["pass"]["4"])
            assert [row["step"] for row in entry["curve"]] == ([0, 1] if entry["stage"] == "grpo" else [0, 2])


def test_the_interrupted_run_went_on_where_it_was(finished, tmp_path):
    first_commands = [job[0] for jobs in toy_grid.phases(MINI, finished, [1]) for job in jobs]
    [words] = [words for words in first_commands if words[-1].endswith("/curriculum_1")]
    toy_grid.call([*words[:-1], str(tmp_path / "whole")])
    one = load_file(f"{finished}/curriculum_1/final/model.safetensors")
    other = load_file(tmp_path / "whole/final/model.safetensors")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert "--resume" in json.load(open(f"{finished}/curriculum_1/meta.json"))["argv"]


def test_equal_flops_are_at_least_the_teacher_prefix_runs(finished):
    def spent(path):
        return json.load(open(f"{finished}/{path}/checkpoint.json"))["tflops"]

    first, final = spent("student_reverse_short_1/step_000001"), spent("student_reverse_short_1/final")
    enough = first if first >= spent("teacher_reverse_short_1/final") else final
    assert spent(toy_grid.equal_flops(finished, "reverse", "short", 1)) == enough
    results = json.load(open(f"{finished}/student_reverse_short_1/eval_equal_flops/results.json"))
    assert results["tflops"] == enough


def test_ends_differ_where_they_should(finished):
    def stops(run):
        return json.load(open(f"{finished}/{run}/meta.json"))["stop_ids"]

    assert stops("base") == stops("student_reverse_long_1") == stops("ends_both_1") == [0, 2]
    assert stops("base_endoftext") == stops("ends_student_1") == [0]
    for run in ("ends_student_1", "ends_student_forward_1"):
        assert stops(f"{run}/eval") == [0] and stops(f"{run}/eval_both") == [0, 2]
    assert stops("ends_student_curriculum_1") == [0] and stops("from_collapsed_1") == [0, 2]


def test_other_flags_are_refused(finished, refused):
    changed = MINI | {"cell": MINI["cell"].replace("1e-3", "2e-3")}
    refused(
        lambda: toy_grid.study(changed, finished, [1], 1), "--lr", "0.001", "0.002", "remove what is there"
    )


def test_jobs_run_in_forks_and_a_failure_ends_the_study(tmp_path, capfd):
    words = "toy_world --train 3 --heldout 1 --test 1 --terms 2 3 --out".split()
    toy_grid.work([[[*words, str(tmp_path / name)]] for name in "abc"], 2)
    assert all((tmp_path / name / "meta.json").is_file() for name in "abc")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").touch()
    with pytest.raises(SystemExit) as end:
        toy_grid.work([[[*words, str(tmp_path / "mine")]], [[*words, str(tmp_path / "d")]]], 2)
    assert end.value.code == 1 and "not this project's" in capfd.readouterr().err


def made_up(name, seed, correct, tokens, entropy):
    """An entry of 8 responses to each problem."""
    rows = {"correct": correct, "cut": [0] * len(correct), "tokens": tokens, "entropy": entropy}
    curve = [
        {"step": s, "tflops": s, "avg": 0.5, "pass@4": 0.5, "length": 9, "entropy": 1, "truncated": 0}
        for s in (0, 1)
    ]
    gates = [{"decision": decision, "entropy_floor": 0.3} for decision in ("advance", "hold")]
    return {
        "name": name,
        "seed": seed,
        "gates": gates if name == "curriculum" else [],
        "n": 8,
        "maj": 0.5,
        "tflops": 1.0,
        "curve": curve,
        **{key: " ".join(map(str, row)) for key, row in rows.items()},
    }


def by_hand(results, terms, metric):
    """Mean and bootstrap interval of sum(factor * metric), a loop at a time."""

    def metric_of(name, problems):
        top = bottom = 0.0
        for entry in (entry for entry in results if entry["name"] == name):
            for i in problems:
                correct, tokens, entropy = (
                    float(entry[key].split()[i]) for key in ("correct", "tokens", "entropy")
                )
                values = {"avg": correct / 8, "pass@8": correct > 0, "length": tokens / 8, "entropy": entropy}
                top += values[metric]
                bottom += tokens if metric == "entropy" else 1
        return top / bottom

    count, generator = len(results[0]["correct"].split()), torch.Generator().manual_seed(0)
    picks = [torch.randint(count, (count,), generator=generator).tolist() for _ in range(evaluation.DRAWS)]

    def total(problems):
        return sum(factor * metric_of(name, problems) for name, factor in terms.items())

    draws = sorted(total(pick) for pick in picks)  # 100: the interval leaves out 2 below and 3 above
    return total(range(count)), [draws[2], draws[96]]


@pytest.fixture
def synthetic():
    """12 problems; runs a and b with two seeds, c without: a beats b by a quarter, c is as good as b."""
    rng, results = random.Random(1), []
    for name, seeds, lift in (("a", (1, 2), 1), ("b", (1, 2), 0), ("c", (None,), 0)):
        for seed in seeds:
            correct = [rng.choice([0, 2, 4, 6]) + 2 * lift for _ in range(12)]
            tokens, entropy = [rng.randint(8, 60) for _ in correct], [rng.uniform(1, 9) for _ in correct]
            results.append(made_up(name, seed, correct, tokens, entropy))
    return results


@pytest.mark.parametrize("metric", ["avg", "pass@8", "length", "entropy"])
def test_differences_are_those_computed_by_hand(synthetic, metric):
    for terms in ({"a": 1, "b": -1}, {"a": 1, "b": -0.5, "c": -0.5}):
        mean, interval, each = toy_grid_report.difference(synthetic, terms, metric)
        truth, ends = by_hand(synthetic, terms, metric)
        assert mean == pytest.approx(truth) and interval == pytest.approx(ends)
        for seed, value in zip((1, 2), each, strict=True):
            alone = [entry for entry in synthetic if entry["seed"] in (seed, None)]
            assert value == pytest.approx(by_hand(alone, terms, metric)[0])


def test_the_three_verdicts(synthetic):
    def found(terms, margin=0):
        _, (low, high), _ = toy_grid_report.difference(synthetic, terms, "avg")
        return toy_grid_report.verdict(low, high, margin)

    assert found({"a": 1, "b": -1}) == "holds"
    assert found({"b": 1, "a": -1}) == "opposite"
    assert found({"b": 1, "c": -1}) == "not resolved"
    assert found({"b": 1, "c": -1}, margin=-0.9) == "holds"
    assert found({"a": 1, "b": -1}, margin=0.9) == "opposite"


def test_the_report_says_what_the_results_say(tmp_path, capsys):
    """Of 8, reverse runs solve 6, others 2; after GRPO 7 and 4: the claims say so."""

    def correct(name):
        reverse = "reverse" in name
        return (7 if reverse else 4) if name.startswith("grpo") else (6 if reverse else 2)

    names = {name: None for _, _, terms, _ in toy_grid_report.claims() for name in terms} | dict.fromkeys(
        toy_grid.runs_of(MINI)
    )
    results = [
        made_up(name, seed, [correct(name)] * 8, [40] * 8, [4.0 if "reverse" in name else 8.0] * 8)
        for name in names
        for seed in (1, 2)
    ]
    path = tmp_path / "toy_grid.json"
    origin = {"commit": "0" * 40, "device": "cpu", "versions": {"torch": "2"}, "seeds": [1, 2]}
    path.write_text(json.dumps(origin | {"results": results}))
    toy_grid.main(toy_grid.get_args(["--report", str(path)]))
    lines = (tmp_path / "toy_grid.md").read_text().splitlines()
    shown = {
        cells[1].strip(): [cell.strip() for cell in cells]
        for cells in (line.split("|") for line in lines)
        if len(cells) > 5
    }
    claim = "reverse KL scores higher, short horizon (reverse minus forward)"
    assert shown[claim][3:6] == ["+0.500 [+0.500, +0.500]", "+0.500 +0.500", "holds"]
    claim = "reverse KL has lower entropy, short horizon (forward minus reverse)"
    assert shown[claim][3] == "+0.100 [+0.100, +0.100]"
    claim = "GRPO gains more after forward KL, long (forward minus reverse)"
    assert shown[claim][3] == "+0.125 [+0.125, +0.125]"
    claim = "mix 0.8 loses less than 0.02 (mix 0.8 minus reverse; claim: above -0.02)"
    assert shown[claim][3:6:2] == ["-0.500 [-0.500, -0.500]", "opposite"]
    assert shown["student_reverse_long"][2].startswith("0.750 ")
    assert shown["student_forward_long"][2].startswith("0.250 ")
    assert "Gates of the curriculum that closed (entropy floor 0.3): 2 of 4." in lines  # two seeds
    assert capsys.readouterr().out.count("figure: ") == len(list(tmp_path.glob("*.png"))) == 6


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


VERDICTS = ("holds", "opposite", "not resolved")


def cells_of(text, columns):
    """The rows of Markdown tables with so many columns that end with a verdict."""
    lines = [line.strip().strip("|") for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.split("|")] for line in lines]
    return [row for row in rows if len(row) == columns and row[-1] in VERDICTS]


def test_the_study_page_says_what_the_committed_results_say(tmp_path, monkeypatch):
    """The claims are in docs/study.md, without the column of single seeds."""
    path = shutil.copy(f"{ROOT}/results/toy_grid.json", tmp_path)
    monkeypatch.setattr(toy_grid_report, "draw", lambda *args: None)
    monkeypatch.setattr(evaluation, "DRAWS", 1000)
    toy_grid_report.resampled_once.cache_clear()
    toy_grid_report.report(path)
    toy_grid_report.resampled_once.cache_clear()
    text = (tmp_path / "toy_grid.md").read_text()
    assert text == open(f"{ROOT}/results/toy_grid.md").read()
    page = f"{ROOT}/docs/study.md"
    if not os.path.isfile(page):
        page = f"{ROOT}/README.md"
    claims = [[claim, metric, shown, verdict] for claim, metric, shown, _, verdict in cells_of(text, 5)]
    assert cells_of(open(page, encoding="utf-8").read(), 4) == claims


def test_the_text_of_the_study_has_the_numbers_of_the_committed_results():
    results = json.load(open(f"{ROOT}/results/toy_grid.json"))["results"]
    page = " ".join(open(f"{ROOT}/docs/study.md", encoding="utf-8").read().split())

    def mean(run, metric="avg"):
        return toy_grid_report.difference(results, {run: 1}, metric)[0]

    def lead(step):
        """Reverse minus forward KL in the curves of the long student-prefix runs."""
        curves = {
            kl: [e["curve"] for e in results if e["name"] == f"student_{kl}_long"]
            for kl in ("forward", "reverse")
        }
        at = {kl: sum(p["avg"] for c in of for p in c if p["step"] == step) / 3 for kl, of in curves.items()}
        return at["reverse"] - at["forward"]

    gates = [gate for entry in results for gate in entry["gates"]]
    assert all(gate["decision"] == "advance" for gate in gates)
    low, *_, high = sorted(gate["entropy"] for gate in gates)
    assert all(lead(step) > 0 for step in (10, 20, 30)) and all(lead(step) < 0 for step in range(40, 121, 10))
    cut = (mean("ends_student_cut", "truncated") + mean("ends_student_forward_cut", "truncated")) / 2
    after = [mean(run) for run in {entry["name"] for entry in results} if run.startswith("grpo_")]
    for words in (
        f"Avg@8 {mean('teacher'):.2f} against {mean('base'):.2f}, "
        f"its entropy is {mean('teacher', 'entropy'):.2f}",
        f"None of {len(gates)} gates closed: the floor was {gates[0]['entropy_floor']}",
        f"entropies from {low:.2f} to {high:.2f}",
        f"by up to {max(map(lead, (10, 20, 30))):.3f} in the curves",
        f"{mean('student_reverse_short'):.3f} against {mean('student_forward_short'):.3f}",
        f"{mean('mix_0.5'):.2f} and {mean('mix_0.8'):.2f}; forward {mean('student_forward_long'):.2f}, "
        f"reverse {mean('student_reverse_long'):.2f}",
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
    ):
        assert words in page
