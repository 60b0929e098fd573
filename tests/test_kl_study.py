"""recipes/kl_study.py: its commands, what it keeps of a run, its claims on synthetic results."""

import json
import random
import shutil

import pytest

from conftest import ROOT, read_rows
from recipes import kl_study
from recipes.toy_grid import STAGES, with_needs


@pytest.mark.parametrize("name", kl_study.STUDIES)
def test_its_commands_parse_and_need_only_each_other(name):
    study = kl_study.STUDIES[name]
    jobs = kl_study.make_jobs(study)
    parsed = {}
    for place in with_needs(jobs, jobs):
        words = [command.format(out="OUT").split() for command in jobs[place].commands]
        parsed[place] = [(stage, STAGES[stage].get_args(flags)) for stage, *flags in words]
    assert [place for place in jobs if jobs[place].name] == [
        "start",
        *(f"{cell}_{seed}" for seed in study["seeds"] for cell in kl_study.CELLS),
    ]
    for place, found in parsed.items():
        if jobs[place].name and place != "start":
            (_, train), (_, evaluate) = found
            assert f"{train.prefix}_{train.kl}_{train.seed}" == place
            assert (evaluate.model, evaluate.rollouts) == (f"OUT/{place}/final", "OUT/asked")
            assert (evaluate.temperature, evaluate.top_p, evaluate.top_k) == (1, 1, 0)  # plain samples
    starts = {
        args.student
        for place, found in parsed.items()
        for stage, args in found
        if stage == "train" and jobs[place].seed
    }
    assert len(starts) == 1  # all cells start alike


def test_what_is_kept_of_a_run_is_what_it_measured(tmp_path, monkeypatch):
    """A miniature on the toy world: sums by problem, by half and by position, from kl.jsonl itself."""
    world = "toy_world --train 8 --heldout 2 --test 4 --terms 2 3 --student_width 32"
    base = "{sft} --steps 1 --batch_size 2 --student {out}/world/student_init --rollouts {out}/world/hasty"
    study = kl_study.STUDIES["toy"] | {"models": [("world", world), ("base", base)], "rollouts": "--limit 8"}
    study |= {
        "teacher": "{out}/world/teacher_init",
        "cell": "--steps 1 --batch_size 2",
        "tokens": 10,
        "seeds": [1],
    }
    monkeypatch.setitem(kl_study.STUDIES, "toy", study)
    line = ["toy", "--out", f"{tmp_path}/out", "--results", f"{tmp_path}/kl.jsonl", "--workers", "1"]
    kl_study.main(kl_study.get_args(line))
    entries = {entry["name"]: entry for entry in read_rows(tmp_path / "kl.jsonl")}
    assert list(entries) == ["start", *kl_study.CELLS]
    entry = entries["student_reverse"]
    rows = [row for row in read_rows(tmp_path / "out/student_reverse_1/eval/kl.jsonl")]
    for prefix, who in (("student", "own"), ("teacher", "teacher")):
        own = [row for row in rows if row["prefix"] == prefix]
        ids = list(dict.fromkeys(row["id"] for row in own))
        for name in ("fkl", "rkl"):
            sums, counts = entry["sums"][f"{who}_{name}"]
            assert counts == [4] * 4
            assert sums == pytest.approx(
                [sum(sum(r[name]) for r in own if r["id"] == id) for id in ids], abs=0.02
            )
            halves = [entry[half][f"{who}_{name}_by_token"] for half in ("early", "late")]
            assert [a + b for a, b in zip(halves[0][0], halves[1][0])] == pytest.approx(sums, abs=0.02)
            assert halves[0][1] == [sum(min(r["tokens"], 5) for r in own if r["id"] == id) for id in ids]
            assert sum(halves[0][1] + halves[1][1]) == sum(r["tokens"] for r in own)
            reaching = [[r[name][place] for r in own if r["tokens"] > place] for place in range(10)]
            means = [sum(values) / len(values) for values in reaching if values]
            assert entry["by_position"][who][name] == pytest.approx(means, rel=1e-3)
        assert entry["by_position"][who]["responses"] == [len(values) for values in reaching if values]
    before = (tmp_path / "kl.jsonl").read_text()
    (tmp_path / "kl.jsonl").unlink()  # collected again from the finished runs
    with monkeypatch.context() as patch:
        for stage in STAGES.values():
            patch.setattr(stage, "main", None)
        kl_study.main(kl_study.get_args(line))
    assert (tmp_path / "kl.jsonl").read_text() == before
    monkeypatch.setattr(kl_study, "collect", None)  # nothing is run or collected again
    kl_study.main(kl_study.get_args(line))
    assert (tmp_path / "kl.jsonl").read_text() == before
    kl_study.main(kl_study.get_args(["--report", f"{tmp_path}/kl.jsonl"]))
    assert "too few seeds" in (tmp_path / "kl.md").read_text() and (tmp_path / "kl.png").stat().st_size > 5000


def test_the_claims_have_the_signs_that_they_say(tmp_path, capsys):
    """Cells made so that all that was expected came; then the other way around."""
    for sign, word in ((1, "holds"), (-1, "opposite")):
        random.seed(2)
        lines = []
        for name, seed in [("start", None), *((cell, seed) for cell in kl_study.CELLS for seed in (1, 2, 3))]:
            student, reverse = "student" in name, "reverse" in name
            own = 4.0 if name == "start" else 4.0 - sign * (1 + student + reverse)
            forward = 3.0 if name == "start" else 3.0 - sign * (1 - reverse)
            noisy = lambda value: [[value + random.gauss(0, 0.05) for _ in range(20)], [1] * 20]
            sums = {f"own_{kl}": noisy(own) for kl in ("fkl", "rkl")} | {
                "teacher_fkl": noisy(forward),
                "teacher_rkl": noisy(1.0),
            }
            halves = {half: {f"{key}_by_token": noisy(1.0) for key in sums} for half in kl_study.HALVES}
            halves["late"]["own_rkl_by_token"] = noisy(own)
            same = {"n": 1, "correct": "0" * 20, "cut": "0" * 20, "tokens": "9 " * 20, "entropy": "1.0 " * 20}
            curve = {"fkl": [1.0, 2.0], "rkl": [1.0, 2.0], "bin": 1}
            lines.append(
                {"name": name, "seed": seed, "sums": sums, "by_position": {"own": curve, "teacher": curve}}
                | halves
                | same
            )
        path = tmp_path / f"{word}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        kl_study.report(str(path))
        claims = [line for line in capsys.readouterr().out.splitlines() if "minus" in line]
        claims = claims[: len(kl_study.CLAIMS)]
        assert len(claims) == len(kl_study.CLAIMS) and all(f"| {word} " in line for line in claims), claims


def test_cells_of_two_machines_are_refused_and_rare_positions_not_drawn(tmp_path, monkeypatch, refused):
    rows = read_rows(f"{ROOT}/results/kl_smollm2.jsonl")
    for row in rows:
        for who in row["by_position"].values():
            who["responses"] = [128] * 60 + [128 if row["seed"] == 1 else 6] * 4  # of 128: 5% are 6.4
    path, drawn = tmp_path / "kl.jsonl", []
    monkeypatch.setattr(kl_study, "save", lambda figure, path, axis: drawn.extend(axis.get_lines()))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kl_study.report(str(path))
    lengths = {line.get_label(): len(line.get_xdata()) for line in drawn if len(line.get_xdata()) > 1}
    assert lengths["student prefix, reverse KL"] == 60 and len(lengths) == 5
    rows[-1]["start"] = "another"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    refused(lambda: kl_study.report(str(path)), "students of 2 machines")
    path.write_text('{"name": "x"}\n')
    refused(lambda: kl_study.report(str(path)), "line 1", "no result")


@pytest.mark.parametrize("study", kl_study.STUDIES)
def test_the_page_has_the_committed_results(study, tmp_path, capsys):
    shutil.copy(f"{ROOT}/results/kl_{study}.jsonl", tmp_path)
    kl_study.report(f"{tmp_path}/kl_{study}.jsonl")
    text = (tmp_path / f"kl_{study}.md").read_text()
    assert text == open(f"{ROOT}/results/kl_{study}.md", encoding="utf-8").read()
    cells = [[cell.strip() for cell in line.split("|")] for line in text.splitlines()]
    page = [line.split("|") for line in open(f"{ROOT}/docs/kl_study.md", encoding="utf-8")]
    rows = [[cell.strip() for cell in line] for line in page if len(line) > 5 and "---" not in line[1]]
    shown = [
        row for row in rows if any(row[1] == line[1] and {*row} <= {*line} for line in cells if len(line) > 1)
    ]
    assert len(shown) == len(kl_study.CLAIMS) + len(kl_study.AFTERWARDS) + 5 + 3 * 2  # heads of both studies
    jobs, results = (
        kl_study.make_jobs(kl_study.STUDIES[study]),
        kl_study.read_results(f"{tmp_path}/kl_{study}.jsonl"),
    )
    assert [place for place in jobs if jobs[place].name] == sorted(results, key=[*jobs].index)
    kl_study.check_flags("results", results, jobs)
