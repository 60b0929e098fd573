"""What the README shows to call, taken from its text and run."""

import re

import torch

from conftest import ROOT


def blocks(language):
    return re.findall(
        rf"```{language}\n(.*?)```", open(f"{ROOT}/README.md", encoding="utf-8").read(), re.DOTALL
    )


def test_the_kernels_example_runs():
    [code] = [block for block in blocks("python") if "total_variation" in block]
    torch.manual_seed(0)
    names = {
        "student_hidden": torch.randn(4, 5, requires_grad=True),
        "student_head": torch.randn(7, 5, requires_grad=True),
        "teacher_hidden": torch.randn(4, 6),
        "teacher_head": torch.randn(7, 6),
        "mask": torch.tensor([1, 1, 0, 1]),
        "student_logits": torch.randn(4, 7, requires_grad=True),
        "teacher_logits": torch.randn(4, 7),
    }
    exec(code, names)
    q, p = ((names[f"{who}_hidden"] @ names[f"{who}_head"].T).softmax(-1) for who in ("student", "teacher"))
    assert abs(names["loss"].item() - ((q - p).abs().sum() / 2).item()) < 1e-5
