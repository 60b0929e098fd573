"""evaluate.py --teacher: KLs along responses in float64, and the KL of whole responses by enumeration."""

import json
import math
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import evaluate
import rollout
from conftest import read_rows, run_line
from distil import artifacts, evaluation
from distil.models import Response
from recipes.toy_world import make_model
from reports import figure

SMALL = "--engine hf --dtype float32 --max_response_tokens 3"
PLAIN = "--temperature 1 --top_p 1"
KLS = ("fkl", "rkl")


@pytest.fixture(scope="module")
def pair(world, tmp_path_factory):
    """Two models with random, uneven distributions over 29 tokens: a plain evaluation of one by the other."""
    folder = tmp_path_factory.mktemp("pair")
    tokenizer = AutoTokenizer.from_pretrained(world / "student_init")
    for seed, name in enumerate(["student", "teacher"]):
        torch.manual_seed(seed)
        model = make_model(tokenizer, 32, 1, 1)
        with torch.no_grad():
            model.get_input_embeddings().weight.normal_(std=0.3)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    sampled = f"--data {world}/train.jsonl --limit 12 --n 16 {SMALL}"
    run_line(rollout, f"--model {folder}/teacher {sampled} --out {folder}/rollouts")
    teacher = f"--teacher {folder}/teacher --rollouts {folder}/rollouts"
    run_line(evaluate, f"--model {folder}/student {sampled} {PLAIN} {teacher} --out {folder}/eval")
    return folder


def logps_of(folder, name):
    """A function of a sequence of ids: its next tokens' log-probabilities (29,), float64."""
    model = AutoModelForCausalLM.from_pretrained(folder / name).double()
    vocab_size = len(AutoTokenizer.from_pretrained(folder / name))

    @torch.no_grad()
    def logps(rows):
        return model(torch.tensor(rows)).logits[:, :, :vocab_size].log_softmax(-1)

    return logps


def test_the_kls_along_responses_are_those_of_whole_softmaxes(pair):
    student, teacher = logps_of(pair, "student"), logps_of(pair, "teacher")
    sources = {
        "student": read_rows(pair / "eval/samples.jsonl"),
        "teacher": read_rows(pair / "rollouts/rollouts.jsonl"),
    }
    stored = iter(read_rows(pair / "eval/kl.jsonl"))
    for prefix, rows in sources.items():
        for row, kl in zip(rows, stored):
            assert (kl["prefix"], kl["id"], kl["tokens"]) == (prefix, row["id"], len(row["response_ids"]))
            ids, start = [row["prompt_ids"] + row["response_ids"]], len(row["prompt_ids"]) - 1
            log_q, log_p = (logps(ids)[0, start:-1] for logps in (student, teacher))
            fkl, rkl = (log_p.exp() * (log_p - log_q)).sum(1), (log_q.exp() * (log_q - log_p)).sum(1)
            for name, truth in {"fkl": fkl, "rkl": rkl}.items():
                torch.testing.assert_close(torch.tensor(kl[name]).double(), truth, rtol=1e-4, atol=1e-5)
    assert not list(stored)


def enumerated(prompt, sampler, other, stop, tokens):
    """(KL(sampler || other) of whole responses of at most `tokens`, the same from its next tokens' KLs)."""
    whole = chained = 0.0
    alive = [([], 0.0, 0.0)]  # responses that go on: (ids, their log-probabilities under both)
    for last in (False,) * (tokens - 1) + (True,):
        rows = [prompt + ids for ids, _, _ in alive]
        longer = []
        for (ids, a, b), next_a, next_b in zip(alive, sampler(rows)[:, -1], other(rows)[:, -1]):
            chained += math.exp(a) * (next_a.exp() * (next_a - next_b)).sum().item()
            both = zip((a + next_a).tolist(), (b + next_b).tolist())
            longer += [(ids + [token], *logps) for token, logps in enumerate(both)]
        ended = [one for one in longer if last or one[0][-1] == stop]
        whole += sum(math.exp(a) * (a - b) for _, a, b in ended)
        alive = [one for one in longer if one[0][-1] != stop]
    return whole, chained


@pytest.mark.parametrize("prefix, name", [("student", "rkl"), ("teacher", "fkl")])
def test_their_mean_estimates_the_kl_of_whole_responses(prefix, name, pair):
    """Enumerated: every response of up to 3 tokens."""
    kl = json.loads((pair / "eval/results.json").read_text())["kl"][prefix]
    stop = AutoTokenizer.from_pretrained(pair / "student").eos_token_id
    models = [
        logps_of(pair, one) for one in (["student", "teacher"] if name == "rkl" else ["teacher", "student"])
    ]
    prompts = {row["id"]: row["prompt_ids"] for row in read_rows(pair / "rollouts/rollouts.jsonl")}
    exact = [enumerated(prompt, *models, stop, 3) for prompt in prompts.values()]
    for whole, chained in exact:
        assert whole == pytest.approx(chained, abs=1e-6) and whole > 0.1
    truth = sum(whole for whole, _ in exact) / len(exact)
    low, high = kl[f"sequence_{name}_interval"]
    assert kl["plain_samples"] and kl["responses"] == 12 * 16 and low < truth < high
    sums = {}
    for row in read_rows(pair / "eval/kl.jsonl"):
        if row["prefix"] == prefix:
            sums.setdefault(row["id"], []).append(sum(row[name]))
    sums = torch.tensor(list(sums.values()), dtype=torch.float64)  # (problems, samples)
    assert kl[f"sequence_{name}"] == pytest.approx(sums.mean().item())
    noise = (sums.var(1).mean() / sums.numel()).sqrt().item()  # of the 16 samples to each problem alone
    assert abs(kl[f"sequence_{name}"] - truth) < 4 * noise


def test_means_over_tokens_and_positions(pair):
    """In bins of two positions, from the rows themselves."""
    rows = [row for row in read_rows(pair / "eval/kl.jsonl") if row["prefix"] == "student"]
    responses = [Response([1], [2] * row["tokens"], False, row["id"]) for row in rows]
    binned = [
        [[sum(row[name][i : i + 2]) for i in (0, 2)][: -(-row["tokens"] // 2)] for name in KLS]
        for row in rows
    ]
    found = evaluate.kl_summary(responses, binned, 2)
    results = json.loads((pair / "eval/results.json").read_text())["kl"]["student"]
    for name in KLS:
        every = [value for row in rows for value in row[name]]
        late = [row[name][2] for row in rows if row["tokens"] > 2]
        early = [value for row in rows for value in row[name][:2]]
        assert found[f"token_{name}"] == pytest.approx(sum(every) / len(every))
        assert found[f"{name}_by_position"] == pytest.approx([sum(one) / len(one) for one in (early, late)])
        assert [len(one) for one in found[f"{name}_by_position_interval"]] == [2, 2]
        assert found[f"sequence_{name}"] == results[f"sequence_{name}"]


def test_what_is_no_plain_sample_is_said(pair, world, tmp_path, capsys):
    """Top-p, or rollouts of another model: sums, but of no KL of whole responses."""
    line = f"--model {pair}/student --data {world}/test.jsonl --n 1 {SMALL} --teacher {pair}/teacher"
    others = tmp_path / "rollouts"
    run_line(rollout, f"--model {pair}/student --data {world}/test.jsonl {SMALL} --out {others}")
    capsys.readouterr()
    run_line(evaluate, f"{line} --top_p 0.9 --rollouts {others} --out {tmp_path}/eval")
    printed = capsys.readouterr().out
    for prefix, why in {"student": "temperature 0.6, top-p 0.9", "teacher": "another model"}.items():
        assert not json.loads((tmp_path / "eval/results.json").read_text())["kl"][prefix]["plain_samples"]
        assert f"no plain samples: {why}" in printed


@pytest.mark.parametrize(
    "flags, why", [("--top_p 0.9", "temperature 1.0, top-p 0.9"), ("--drop degenerate", "made with --drop")]
)
def test_the_teachers_own_rollouts_may_be_no_plain_samples(flags, why, pair, world, tmp_path, capsys):
    sampled = f"--data {world}/test.jsonl {SMALL}"
    run_line(rollout, f"--model {pair}/teacher {sampled} {flags} --out {tmp_path}/rollouts")
    line = f"--model {pair}/student {sampled} --n 1 {PLAIN} --teacher {pair}/teacher"
    run_line(evaluate, f"{line} --rollouts {tmp_path}/rollouts --out {tmp_path}/eval")
    assert f"no plain samples: {why}" in capsys.readouterr().out
    kls = json.loads((tmp_path / "eval/results.json").read_text())["kl"]
    assert kls["student"]["plain_samples"] and not kls["teacher"]["plain_samples"]


def test_refusals(pair, world, tmp_path, refused):
    line = f"--model {pair}/student --data {world}/test.jsonl --n 1 {SMALL} --out {tmp_path}/eval"
    refused(lambda: evaluate.get_args(f"{line} --rollouts x".split()), "--rollouts needs --teacher")
    many = line.replace("--data", "--benchmarks") + f" --teacher {pair}/teacher --rollouts {pair}/rollouts"
    refused(lambda: evaluate.get_args(many.split()), "--rollouts", "--data")
    line += f" --teacher {pair}/teacher"
    other = f"{line} --rollouts {pair}/rollouts --prompt_suffix !"
    refused(lambda: run_line(evaluate, other), f"--rollouts {pair}/rollouts", "prompts")
    refused(lambda: run_line(evaluate, f"{line} --rollouts {pair}/eval"), "--rollouts", "made by 'evaluate'")
    assert not (tmp_path / "eval").exists()


def test_tables_comparisons_and_figures_show_them(pair, world, tmp_path, capsys):
    line = f"--data {world}/train.jsonl --limit 12 --n 16 {SMALL} {PLAIN}"
    run_line(evaluate, f"--model {pair}/teacher {line} --teacher {pair}/teacher --out {tmp_path}/itself")
    run_line(evaluate, f"--model {pair}/student {line} --out {tmp_path}/without")
    capsys.readouterr()
    run_line(evaluate, f"--table {pair}/eval {tmp_path}/itself {tmp_path}/without")
    head, _, *rows, _, note = capsys.readouterr().out.splitlines()
    columns = [cell.strip() for cell in head.split("|")]
    cells = [dict(zip(columns, (cell.strip() for cell in row.split("|")))) for row in rows]
    kl = json.loads((pair / "eval/results.json").read_text())["kl"]
    rkl, fkl = kl["student"]["sequence_rkl"], kl["teacher"]["sequence_fkl"]
    assert [row["sequence_rkl"] for row in cells] == [f"{rkl:.3f}", "0.000", "-"]
    assert [row["sequence_fkl"] for row in cells] == [f"{fkl:.3f}", "-", "-"] and "whole responses" in note
    run_line(evaluate, f"--compare {tmp_path}/itself {pair}/eval")
    printed = capsys.readouterr().out
    [row] = [line for line in printed.splitlines() if line.startswith("| sequence_rkl")]
    assert "sequence_fkl is left out" in printed and "whole responses" in printed
    low, high = kl["student"]["sequence_rkl_interval"]
    assert f"| {rkl:+.3f} [{low:+.3f}, {high:+.3f}] |" in row  # the other's is 0 for every problem
    path, runs = tmp_path / "kl.svg", f"--runs {pair}/eval {tmp_path}/itself {tmp_path}/without"
    run_line(evaluate, f"--figure {path} {runs} --x position")
    assert path.stat().st_size > 5000 and "without --teacher: left out" in capsys.readouterr().out


def test_the_figure_refuses_what_has_no_position(pair, tmp_path, refused):
    line = f"--figure {tmp_path}/a.png --x position --runs"
    refused(lambda: run_line(evaluate, f"{line} {pair}/eval --y avg"), "--y avg", "fkl and rkl")


def test_comparisons_pair_problems_and_say_what_they_cannot_compare(pair, world, tmp_path, capsys):
    """The same responses stored in another order, with a weaker sampler, and against another teacher."""
    lines = (world / "train.jsonl").read_text().splitlines()
    (tmp_path / "a").mkdir()
    (tmp_path / "a/train.jsonl").write_text("\n".join(lines[:12][::-1]))
    other = f"--data {tmp_path}/a/train.jsonl --n 16 {SMALL}"
    rows = [json.loads(line) for line in lines[:12]]
    assert all("id" in row for row in rows)  # or else they would be numbered
    run_line(rollout, f"--model {pair}/teacher {other} --out {tmp_path}/reversed")
    line = f"--model {pair}/student --data {world}/train.jsonl --limit 12 --n 16 {SMALL}"
    teacher = f"--teacher {pair}/teacher --rollouts {tmp_path}/reversed"
    run_line(evaluate, f"{line} {PLAIN} {teacher} --out {tmp_path}/same")
    run_line(evaluate, f"{line} {PLAIN} --teacher {pair}/student --out {tmp_path}/other")
    capsys.readouterr()
    run_line(evaluate, f"--compare {pair}/eval {tmp_path}/same")
    [row] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| sequence_fkl")]
    sums = {}
    for place in (pair / "eval", tmp_path / "same"):
        for one in read_rows(place / "kl.jsonl"):
            if one["prefix"] == "teacher":
                sums.setdefault(one["id"], {}).setdefault(place, []).append(sum(one["fkl"]))
    differences = [
        (torch.tensor(b).mean() - torch.tensor(a).mean()).item() for a, b in map(dict.values, sums.values())
    ]
    low, high = evaluation.interval(differences)
    assert f"{sum(differences) / 12:+.3f} [{low:+.3f}, {high:+.3f}]" in row
    run_line(evaluate, f"--table {pair}/eval {tmp_path}/other")
    assert f"the teachers differ: {pair}/teacher of" in capsys.readouterr().out


def test_rollouts_to_other_problems_are_left_out_or_refused(pair, world, tmp_path, capsys, refused):
    line = f"--model {pair}/student --n 1 {SMALL} {PLAIN} --teacher {pair}/teacher --rollouts {pair}/rollouts"
    run_line(evaluate, f"{line} --data {world}/train.jsonl --limit 5 --out {tmp_path}/five")
    assert "; 112 responses to other problems left out" in capsys.readouterr().out
    found = json.loads((tmp_path / "five/results.json").read_text())["kl"]["teacher"]
    assert found["responses"] == 5 * 16 and found["plain_samples"]
    none = f"{line} --data {world}/test.jsonl --out {tmp_path}/none"
    refused(lambda: run_line(evaluate, none), f"--rollouts {pair}/rollouts", "other problems")


def test_a_teacher_that_has_changed_since_is_another(pair, world, tmp_path, capsys):
    shutil.copytree(pair / "teacher", tmp_path / "teacher")
    sampled = f"--data {world}/train.jsonl --limit 2 {SMALL}"
    run_line(rollout, f"--model {tmp_path}/teacher {sampled} --out {tmp_path}/rollouts")
    teacher = f"--teacher {tmp_path}/teacher --rollouts {tmp_path}/rollouts"
    for changed, out in ((False, "before"), (True, "after")):
        if changed:
            shutil.copy(pair / "student/model.safetensors", tmp_path / "teacher/model.safetensors")
        run_line(evaluate, f"--model {pair}/student {sampled} --n 1 {PLAIN} {teacher} --out {tmp_path}/{out}")
        found = json.loads((tmp_path / out / "results.json").read_text())["kl"]["teacher"]
        assert found["plain_samples"] != changed
    assert "or it has changed" in capsys.readouterr().out


def test_the_figure_draws_what_was_measured_as_far_as_enough_responses_reach(pair, tmp_path, monkeypatch):
    """Half of the responses must reach a position here; an evaluation at temperature 0.6 is marked."""
    drawn = []
    monkeypatch.setattr(figure, "draw", lambda *given: drawn.append(given))
    monkeypatch.setattr(figure, "REACHED", 0.5)
    shutil.copytree(pair / "eval", tmp_path / "eval")
    results = json.loads((tmp_path / "eval/results.json").read_text())
    results["kl"]["teacher"] |= {"responses_by_position": [192, 96, 95], "bin": 2, "plain_samples": False}
    (tmp_path / "eval/results.json").write_text(json.dumps(results))
    meta = artifacts.read_sealed(str(tmp_path / "eval/meta.json"), "-")
    meta["files"]["results.json"] = artifacts.file_sha256(tmp_path / "eval/results.json")
    artifacts.write_sealed(str(tmp_path / "eval/meta.json"), meta)
    run_line(evaluate, f"--figure {tmp_path}/a.png --runs {tmp_path}/eval --x position --y fkl")
    [(_, panels, curves, styles, labels, _)] = drawn
    assert len(panels) == 1 and len({*labels.values()}) == 2
    for (_, prefix), [points] in curves.items():
        kl, looks = results["kl"][prefix], styles[_, prefix]
        shown = 2 if prefix == "teacher" else sum(n >= 96 for n in kl["responses_by_position"])
        values = zip(kl["fkl_by_position"], kl["fkl_by_position_interval"])
        right = [((i + 0.5) * kl["bin"], value, *bounds) for i, (value, bounds) in enumerate(values)]
        assert points == right[:shown] and looks["linestyle"] == {"student": "-", "teacher": "--"}[prefix]
        assert ("no plain samples" in labels[_, prefix]) == (prefix == "teacher")
