"""The README's change of the objective, taken from its text and trained with."""
import json
import math
import re

import torch

import train
from conftest import ROOT
from score_teacher import Signal


def code_blocks():
    return re.findall(r"```python\n(.*?)```", open(f"{ROOT}/README.md", encoding="utf-8").read(), re.DOTALL)


def objective_of_the_readme():
    [code] = [block for block in code_blocks() if "def objective(" in block]
    names = {}
    exec(code, names)
    return names["objective"]


def test_it_is_the_jensen_shannon_divergence():
    torch.manual_seed(0)
    hidden, head, teacher = torch.randn(3, 5), torch.randn(7, 5), Signal(torch.randn(3, 4), torch.randn(7, 4))
    weight = torch.tensor([1.0, 0.0, 2.0])
    loss, _ = objective_of_the_readme()(None, hidden, head, teacher, None, weight)
    q, p = (hidden @ head.T).double().softmax(-1), (teacher.hidden @ teacher.head.T).double().softmax(-1)
    m = (p + q) / 2
    truth = (weight * ((p * (p / m).log() + q * (q / m).log()).sum(-1) / 2)).sum()
    assert abs(loss.item() - truth.item()) < 1e-5 and 0 < truth < 3 * math.log(2)


def test_train_runs_with_it(world, rollouts, scores, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "objective", objective_of_the_readme())
    train.main(train.get_args([str(word) for word in [
        "--prefix", "teacher", "--kl", "forward", "--student", world / "student_init", "--rollouts", rollouts, "--scores", scores, "--dtype",
        "float32", "--engine", "hf", "--normalize", "token", "--lr", 1e-2, "--batch_size", 12, "--steps", 12, "--out", tmp_path / "run"]]))
    rows = [json.loads(line) for line in open(tmp_path / "run/metrics.jsonl")]
    assert 0 < rows[-1]["loss"] < 0.7 * rows[0]["loss"] < math.log(2)
    assert rows[-1]["fkl"] < rows[0]["fkl"]  # the diagnostics are there whatever the objective


def test_the_kernels_example_runs():
    [code] = [block for block in code_blocks() if "total_variation" in block]
    torch.manual_seed(0)
    names = {"student_hidden": torch.randn(4, 5, requires_grad=True), "student_head": torch.randn(7, 5, requires_grad=True),
             "teacher_hidden": torch.randn(4, 6), "teacher_head": torch.randn(7, 6), "mask": torch.tensor([1, 1, 0, 1]),
             "student_logits": torch.randn(4, 7, requires_grad=True), "teacher_logits": torch.randn(4, 7)}
    exec(code, names)
    q, p = ((names[f"{who}_hidden"] @ names[f"{who}_head"].T).softmax(-1) for who in ("student", "teacher"))
    assert abs(names["loss"].item() - ((q - p).abs().sum() / 2).item()) < 1e-5
