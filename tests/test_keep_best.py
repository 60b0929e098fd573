"""--keep_best: which weights best/ holds, also after a kill, and that evaluate.py takes it."""

import errno
import json
import os
import shutil

import pytest
from safetensors.torch import load_file

import evaluate
import grpo
import train
from conftest import killed_in_call, read_rows, run_line
from distil import artifacts
from runs import training


@pytest.fixture
def line(prefix_flags, world):
    return (
        f"{prefix_flags['student']} --kl reverse --steps 6 --batch_size 2 --max_response_tokens 4 --lr 1e-2"
        f" --eval_data {world}/heldout.jsonl --eval_every 1 --eval_n 2 --keep_best avg"
    )


@pytest.fixture
def accuracy(monkeypatch):
    """{step: Avg@n} that evaluations find; the first is the starting model's."""
    real, values = training.Run.measure, {}

    def measure(run, limit):
        done = [int(state["step"]) for state in run.optimizer.state.values()]
        return real(run, limit) | {"avg": values[max(done, default=0)]}

    monkeypatch.setattr(training.Run, "measure", measure)
    return values


def set_values(accuracy, *values):
    accuracy.clear()
    accuracy.update(enumerate(values))


def weights(path):
    return (path / "model.safetensors").read_bytes()


def best_of(out):
    meta = artifacts.read_artifact(str(out), "-", "train", "grpo")
    assert {"best/model.safetensors", "best/checkpoint.json"} <= {*meta["files"]}
    assert not [path for path in out.rglob("*.tmp")] and not (out / "best/best").exists()
    assert artifacts.read_checkpoint(str(out / "best"), "-")["step"] == meta["best"]["step"]
    return meta["best"]


@pytest.mark.parametrize(
    "values, step",
    [
        ((0.1, 0.3, 0.2, 0.3, 0.6, 0.4, 0.6), 4),
        ((0.5, 0.4, 0.3, 0.2, 0.1, 0.0, 0.5), 0),
        ((0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6), 6),
    ],
)
def test_best_is_the_first_of_the_best_evaluations(values, step, line, accuracy, world, tmp_path):
    set_values(accuracy, *values)
    out = tmp_path / "run"
    run_line(train, f"{line} --out {out} --save_every 1")
    assert best_of(out) == {"metric": "avg", "value": values[step], "step": step}
    same = {0: world / "student_init", 6: out / "final"}.get(step, out / f"step_{step:06d}")
    one, two = load_file(same / "model.safetensors"), load_file(out / "best/model.safetensors")
    assert one.keys() == two.keys() and all(one[name].equal(two[name]) for name in one)
    assert not (out / "best/optimizer.safetensors").exists()


@pytest.mark.parametrize(
    "values, killed_at", [((0.1, 0.3, 0.2, 0.3, 0.6, 0.4, 0.5), 6), ((0.5, 0.1, 0.1, 0.1, 0.1, 0.7, 0.7), 4)]
)
def test_a_killed_run_ends_with_the_same_best(values, killed_at, line, accuracy, tmp_path):
    set_values(accuracy, *values)
    line = f"{line} --save_every 3 --lr_schedule cosine --weight_decay 0.1"
    run_line(train, f"{line} --out {tmp_path}/whole")
    with killed_in_call(killed_at, training, "optimizer_step"):
        run_line(train, f"{line} --out {tmp_path}/run")
    run_line(train, f"{line} --out {tmp_path}/run --resume")
    assert best_of(tmp_path / "run") == best_of(tmp_path / "whole")
    for name in ("best", "final", "step_000003", "step_000003/best"):
        assert weights(tmp_path / "run" / name) == weights(tmp_path / "whole" / name)


@pytest.mark.parametrize("links", [True, False])
def test_checkpoints_share_the_files_of_best(links, line, accuracy, tmp_path, monkeypatch):
    """Where the disk has hard links; otherwise each has a copy."""

    def no_links(*paths):
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    set_values(accuracy, 0.1, 0.3, 0.2, 0.2, 0.4, 0.1, 0.1)
    out = tmp_path / "run"
    run_line(train, f"{line} --out {out} --save_every 1")
    same = lambda *names: len({(out / f"{name}/model.safetensors").stat().st_ino for name in names}) == 1
    assert same("step_000001/best", "step_000002/best", "step_000003/best") == links
    assert same("step_000004/best", "step_000005/best", "best") == links
    assert not same("step_000003/best", "best") and not same("step_000001/best", "step_000001")
    assert weights(out / "step_000003/best") == weights(out / "step_000001")
    assert weights(out / "step_000005/best") == weights(out / "best") == weights(out / "step_000004")


def test_a_best_later_than_the_checkpoint_is_forgotten_with_its_steps(line, accuracy, tmp_path):
    """As where a GPU's second try differs: then the best of the checkpoint's past is the best."""
    out = tmp_path / "run"
    set_values(accuracy, 0.1, 0.3, 0.2, 0.3, 0.6, 0.4, 0.5)
    with killed_in_call(6, training, "optimizer_step"):
        run_line(train, f"{line} --out {out} --save_every 1 --keep_checkpoints 9")
    kept, step_1 = weights(out / "best"), weights(out / "step_000001")
    assert kept == weights(out / "step_000004") != step_1
    for step in (4, 5):
        (out / f"step_{step:06d}").rename(tmp_path / str(step))
    set_values(accuracy, 0.1, 0.3, 0.2, 0.3, 0.2, 0.2, 0.2)
    run_line(train, f"{line} --out {out} --save_every 1 --keep_checkpoints 9 --resume")
    assert best_of(out)["step"] == 1 and weights(out / "best") == step_1


@pytest.mark.parametrize("metric", ["avg", "pass", "maj"])
def test_grpo_keeps_the_best_by_each_metric_of_its_evaluations(metric, world, tmp_path):
    line = (
        f"--model {world}/student_init --data {world}/train.jsonl --n 2 --max_response_tokens 6 --engine hf"
    )
    line += f" --dtype float32 --steps 2 --batch_size 2 --eval_data {world}/heldout.jsonl --eval_every 1"
    run_line(grpo, f"{line} --eval_n 2 --keep_best {metric} --out {tmp_path}/run")
    rows = read_rows(tmp_path / "run/evals.jsonl")
    values = [row["avg"] if metric == "avg" else row[metric]["2"] for row in rows]
    assert best_of(tmp_path / "run") == {
        "metric": metric,
        "value": max(values),
        "step": values.index(max(values)),
    }


def test_the_best_is_evaluated_with_its_provenance_and_not_if_it_was_changed(
    line, accuracy, world, tmp_path, refused
):
    set_values(accuracy, 0.1, 0.3, 0.2, 0.1, 0.1, 0.1, 0.1)
    out = tmp_path / "run"
    words = f"--model {out}/best --data {world}/test.jsonl --n 1 --max_response_tokens 4 --engine hf"
    words += " --dtype float32"
    with killed_in_call(3, training, "optimizer_step"):
        run_line(train, f"{line} --out {out}")
    file = out / "best/model.safetensors"
    for again in (False, True):  # of an unfinished run, of a finished one
        if again:
            run_line(train, f"{line} --out {out} --resume")
        run_line(evaluate, f"{words} --out {tmp_path}/{again}")
        results = json.loads((tmp_path / f"{again}/results.json").read_text())
        assert (results["run"], results["step"]) == ("run", 1)
        assert results["cell"]["name"] == "student reverse"
        data = file.read_bytes()
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        refused(lambda: run_line(evaluate, f"{words} --out {tmp_path}/bad"), "--model", "model.safetensors")
        file.write_bytes(data)
    shutil.copytree(world / "student_init", tmp_path / "best")  # a model of that name that is not a run's
    run_line(evaluate, f"{words} --model {tmp_path}/best --out {tmp_path}/other")


def test_a_damaged_copy_in_a_checkpoint_is_refused_by_the_checkpoints_name(line, accuracy, tmp_path, refused):
    set_values(accuracy, 0.1, 0.3, 0.2, 0.1, 0.1, 0.1, 0.1)
    with killed_in_call(4, training, "optimizer_step"):
        run_line(train, f"{line} --out {tmp_path}/run --save_every 3")
    (tmp_path / "run/step_000003/best/model.safetensors").unlink()
    again = lambda: run_line(train, f"{line} --out {tmp_path}/run --save_every 3 --resume")
    refused(again, "--resume", "step_000003", "best/model.safetensors")


@pytest.mark.parametrize(
    "words, named",
    [
        ("--keep_best avg", "--keep_best needs --eval_every"),
        ("--keep_best length --eval_every 1 --eval_data x", "--keep_best"),
        ("--track mlflow", "--track"),
    ],
)
def test_flags_that_mean_nothing_are_refused(words, named, refused):
    given = f"--prefix student --kl forward --student s --teacher t --data d --out o {words}".split()
    assert refused(lambda: train.get_args(given), named).count("\n") == 1
