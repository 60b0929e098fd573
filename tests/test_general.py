"""recipes/general.sh, table 4 of the first paper: its own part with a harness that is replaced, and the real
lm-evaluation-harness, where it is installed, against accuracies computed from the model's own softmax."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import evaluate
from conftest import ROOT
from distil import artifacts
from recipes import general

FAKE = """#!{python}
import json, os, sys
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
task, out = flags["--tasks"], flags["--output_path"] + "/model"
with open({log!r}, "a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
if os.path.exists({fails!r}) and task == open({fails!r}).read():
    sys.exit(3)
values = {{"acc,none": 0.25, "acc_stderr,none": 0.02, "acc_norm,none": 0.5, "acc_norm_stderr,none": 0.01}}
if task == "mmlu":
    values = {{"acc,none": 0.75, "acc_stderr,none": "N/A"}}
found = {{"results": {{task: values}}, "lm_eval_version": "0.4.13"}}
found["n-samples"] = {{part: {{"original": 9, "effective": 7}} for part in ("a", "b")}}
os.makedirs(out)
json.dump(found, open(out + "/results_2026.json", "w"))
"""


@pytest.fixture
def harness(tmp_path, monkeypatch):
    """A program lm_eval that logs its words; with the task that is named in `fails` it ends with code 3."""
    (tmp_path / "bin").mkdir()
    fake, log, fails = tmp_path / "bin/lm_eval", tmp_path / "log", tmp_path / "fails"
    fake.write_text(FAKE.format(python=sys.executable, log=str(log), fails=str(fails)))
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}")
    return log, fails


def run(*words):
    general.main(general.get_args([str(word) for word in words]))


def asked(log):
    """(task, shots) of the runs of the harness so far."""
    words = [line.split() for line in log.read_text().splitlines()]
    return [(line[line.index("--tasks") + 1], line[line.index("--num_fewshot") + 1]) for line in words]


def test_a_row_of_table_4(world, tmp_path, harness, capsys, refused):
    log, fails = harness
    fails.write_text("mmlu")
    words = [world / "student_init", "--dtype", "float32", "--out", tmp_path / "out"]
    refused(lambda: run(*words), "exit code 3", "mmlu", code=1)
    assert asked(log) == [("arc_challenge", "25"), ("hellaswag", "10"), ("mmlu", "5")]
    assert not (tmp_path / "out/meta.json").exists()

    log.write_text("")
    fails.unlink()
    run(*words, "--resume")
    assert asked(log) == [("mmlu", "5"), ("piqa", "0")]  # the others were finished
    model = f"--model hf --model_args pretrained={world}/student_init,dtype=float32"
    assert log.read_text().startswith(f"{model} --tasks mmlu --num_fewshot 5 --batch_size auto")
    tasks = json.loads((tmp_path / "out/general.json").read_text())["tasks"]
    assert {name: (task["shots"], task["metric"]) for name, task in tasks.items()} == {
        "arc_challenge": (25, "acc_norm"),
        "hellaswag": (10, "acc_norm"),
        "mmlu": (5, "acc"),
        "piqa": (0, "acc_norm"),
    }
    assert all(task["problems"] == 14 for task in tasks.values())

    capsys.readouterr()
    evaluate.main(evaluate.get_args(["--table", str(tmp_path / "out")]))
    head, _, row = [line.strip("|").split("|") for line in capsys.readouterr().out.splitlines()]
    cells = dict(zip(map(str.strip, head), map(str.strip, row), strict=True))
    assert cells == {
        "run": f"{world}/student_init",
        "training": "-",
        "arc_challenge, 25-shot acc_norm [95%]": "0.5000 [0.4804, 0.5196]",
        "hellaswag, 10-shot acc_norm [95%]": "0.5000 [0.4804, 0.5196]",
        "mmlu, 5-shot acc [95%]": "0.7500",
        "piqa, 0-shot acc_norm [95%]": "0.5000 [0.4804, 0.5196]",
        "mean": "0.5625",
    }
    (tmp_path / "out/general.json").write_text("{}")
    refused(lambda: evaluate.main(evaluate.get_args(["--table", str(tmp_path / "out")])), "general.json")


def test_rows_that_cannot_be_compared_are_refused(world, tmp_path, harness, refused):
    for shots in (0, 1):
        run(world / "student_init", "--tasks", f"piqa:{shots}", "--out", tmp_path / f"runs/{shots}")
    table = ["--table", str(tmp_path / "runs")]
    refused(lambda: evaluate.main(evaluate.get_args(table)), "runs/0", "runs/1", "differ in")


def test_what_is_refused(world, tmp_path, monkeypatch, refused):
    student, out = str(world / "student_init"), str(tmp_path / "out")
    refused(lambda: general.get_args([student, "--tasks", "piqa"]), "--tasks piqa", "piqa:0")
    refused(lambda: general.get_args(["Qwen/Qwen3-0.6B-Base"]), "--out", "no directory")
    assert general.get_args([student]).out == str(world / "general")
    monkeypatch.setenv("PATH", str(tmp_path))
    refused(lambda: run(student, "--out", out), "pip install", "lm_eval[hf]==0.4.13")
    path = tmp_path / "piqa.json"
    path.write_text(json.dumps({"results": {"piqa": {"f1,none": 1.0}}}))
    refused(lambda: general.measured(path, "piqa"), "piqa.json", "acc_stderr,none", code=1)
    assert not os.path.exists(out)


def test_the_release_is_the_same_everywhere():
    for name in ("recipes/general.sh", "recipes/qwen3.sh", "docs/papers.md"):
        assert general.HARNESS in open(f"{ROOT}/{name}", encoding="utf-8").read(), name


# The real harness


TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc}}{more}]
"""


def accuracies(model, tokenizer, rows):
    """(acc, acc_norm) in float64: the likeliest choice; and that by log-probability per character."""
    right = torch.zeros(2)
    for row in rows:
        scores = []
        for choice in row["choices"]:
            prompt, whole = (
                tokenizer(text, add_special_tokens=False).input_ids
                for text in (row["question"], f"{row['question']} {choice}")
            )
            with torch.no_grad():
                logps = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
            scores.append(sum(logps[t - 1, whole[t]].item() for t in range(len(prompt), len(whole))))
        by_length = [score / len(choice) for score, choice in zip(scores, row["choices"])]
        for i, values in enumerate((scores, by_length)):
            right[i] += values.index(max(values)) == row["answer"]
    return (right / len(rows)).tolist()


@pytest.mark.peer
def test_the_harness_on_a_tiny_model(world, tmp_path, capfd):
    """A task and, as MMLU is one, a group, on sums; the answers to some of them differ in length."""
    if not shutil.which("lm_eval"):
        pytest.skip(f'lm_eval is not on PATH: pip install "{general.HARNESS}"')
    rows = []
    for i in range(24):
        a, b = i % 10, 3 * i % 10
        choices = [str(a), f"{b}={a}={b}"] if i < 8 else [str((a + 1) % 10), str((b + i) % 10)]
        rows.append({"question": f"a={a} b={b}\n+b{b}=", "choices": choices, "answer": int(i % 4 == 0)})
    (tmp_path / "tasks").mkdir()
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, more in (("sums", ", {metric: acc_norm}"), ("part_1", ""), ("part_2", "")):
        task = TASK.format(name=name, data=tmp_path / "sums.jsonl", more=more)
        (tmp_path / f"tasks/{name}.yaml").write_text(task)
    group = (
        "group: both\ntask: [part_1, part_2]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    (tmp_path / "tasks/both.yaml").write_text(group)
    words = ["bash", f"{ROOT}/recipes/general.sh", world / "student_init", "--dtype", "float32"]
    words += ["--tasks", "sums:0", "both:0", "--include_path", tmp_path / "tasks", "--out", tmp_path / "out"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    path = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"
    subprocess.run([*map(str, words)], env=os.environ | offline | {"PATH": path}, check=True)
    capfd.readouterr()
    tasks = json.loads((tmp_path / "out/general.json").read_text())["tasks"]
    model = AutoModelForCausalLM.from_pretrained(world / "student_init")
    acc, acc_norm = accuracies(model, AutoTokenizer.from_pretrained(world / "student_init"), rows)
    assert 0 < acc < 1 and 0 < acc_norm < 1 and acc != acc_norm
    assert tasks["sums"]["metric"] == "acc_norm" and tasks["sums"]["value"] == pytest.approx(acc_norm)
    assert tasks["both"]["metric"] == "acc" and tasks["both"]["value"] == pytest.approx(acc)
    assert [task["problems"] for task in tasks.values()] == [24, 48]
    assert artifacts.read_artifact(tmp_path / "out", "--out", "general")["stage"] == "general"
    evaluate.main(evaluate.get_args(["--table", str(tmp_path / "out")]))
    assert f" {acc_norm:.4f} [" in capfd.readouterr().out
