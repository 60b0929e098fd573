"""What the README shows to fork and to call, taken from its text: the diffs are applied to a copy of the files and run."""
import json
import math
import re
import shutil
import subprocess
import sys

import torch

from conftest import ROOT


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", open(f"{ROOT}/README.md", encoding="utf-8").read(), re.DOTALL)


FORK = """
import json, sys
import datasets, torch
import grpo, inputs, train
from grading import Grade
from score_teacher import Signal

torch.manual_seed(0)
hidden, head, teacher = torch.randn(3, 5), torch.randn(7, 5), Signal(torch.randn(3, 4), torch.randn(7, 4))
weight = torch.tensor([1.0, 0.0, 2.0])
loss, _ = train.objective(train.argparse.Namespace(vocab="full"), hidden, head, teacher, None, weight)
q, p = (hidden @ head.T).double().softmax(-1), (teacher.hidden @ teacher.head.T).double().softmax(-1)
m = (p + q) / 2
truth = (weight * ((p * (p / m).log() + q * (q / m).log()).sum(-1) / 2)).sum()
train.main(train.get_args(sys.argv[1:]))

asked = []
datasets.load_dataset = lambda *words, **more: asked.append((words, more)) or [{"question": "1+1", "answer": 2}]
problems = inputs.load_problems("aime25")

class Tokenizer:
    decode = lambda self, ids, **more: "so " * len(ids)
grpo.grade = lambda responses, answers: [Grade("2", answer == "2", False) for answer in answers]
one = type("Sample", (), {"response_ids": [5] * 1000})
rewards = grpo.rewards_of(Tokenizer(), [{"answer": "2"}, {"answer": "3"}], [[one, one], [one, one]])
print(json.dumps([loss.item(), truth.item(), problems, asked, rewards.tolist()]))
"""


def test_the_forks_apply_and_run(world, rollouts, scores, tmp_path):
    for file in ("artifacts inputs ranks rollout score_teacher equality grading evaluate run train grpo").split():
        shutil.copy(f"{ROOT}/{file}.py", tmp_path)
    shutil.copytree(f"{ROOT}/kernels", tmp_path / "kernels")
    assert len(blocks("diff")) == 3
    for number, diff in enumerate(blocks("diff")):
        (tmp_path / f"{number}.diff").write_text(diff)
        subprocess.run(["git", "apply", "--verbose", f"{number}.diff"], cwd=tmp_path, check=True)
    (tmp_path / "fork.py").write_text(FORK)
    flags = ["--prefix", "teacher", "--kl", "forward", "--student", world / "student_init", "--rollouts", rollouts, "--scores", scores,
             *"--dtype float32 --engine hf --normalize token --lr 1e-2 --batch_size 12 --steps 12".split(), "--out", tmp_path / "run"]
    done = subprocess.run([sys.executable, "fork.py", *map(str, flags)], cwd=tmp_path, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    loss, truth, problems, asked, rewards = json.loads(done.stdout.splitlines()[-1])
    assert abs(loss - truth) < 1e-5 and 0 < truth < 3 * math.log(2)
    rows = [json.loads(line) for line in open(tmp_path / "run/metrics.jsonl")]
    assert 0 < rows[-1]["loss"] < 0.7 * rows[0]["loss"] < math.log(2)
    assert rows[-1]["fkl"] < rows[0]["fkl"]  # the diagnostics are there whatever the objective
    assert asked == [[["opencompass/AIME2025", "AIME2025-I"], {"split": "test"}]]
    assert [(p["problem"], p["answer"]) for p in problems] == [("1+1", "2")]
    assert torch.allclose(torch.tensor(rewards), torch.tensor([[0.9, 0.9], [-0.1, -0.1]]))


def test_the_kernels_example_runs():
    [code] = [block for block in blocks("python") if "total_variation" in block]
    torch.manual_seed(0)
    names = {"student_hidden": torch.randn(4, 5, requires_grad=True), "student_head": torch.randn(7, 5, requires_grad=True),
             "teacher_hidden": torch.randn(4, 6), "teacher_head": torch.randn(7, 6), "mask": torch.tensor([1, 1, 0, 1]),
             "student_logits": torch.randn(4, 7, requires_grad=True), "teacher_logits": torch.randn(4, 7)}
    exec(code, names)
    q, p = ((names[f"{who}_hidden"] @ names[f"{who}_head"].T).softmax(-1) for who in ("student", "teacher"))
    assert abs(names["loss"].item() - ((q - p).abs().sum() / 2).item()) < 1e-5
