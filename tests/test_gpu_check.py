"""benchmarks/gpu_check.py, at toy sizes without a GPU: it runs, and finds what is wrong."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import gpu_check, gpu_checks, kernel_accuracy, kernel_speed
from conftest import ROOT

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="takes ten minutes on a GPU")


@needs_no_gpu
def test_all_checks_pass_on_a_cpu(tmp_path):
    command = ["bash", f"{ROOT}/benchmarks/gpu_check.sh", "--out", "report"]
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    where = {"cwd": tmp_path, "env": os.environ | {"PATH": path}, "capture_output": True, "text": True}
    done = subprocess.run(command, **where)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report/gpu_check.json").read_text())
    checks = report["checks"]
    assert "random weights" in report["about"] and "transformers" in report["about"]
    assert {name: found["status"] for name, found in checks.items()} == {
        name: "SKIP" if name == "vllm" else "PASS" for name in gpu_check.CHECKS
    }
    assert checks["models"]["facts"]["tokens"] == "300 of 320 rows"
    assert float(checks["student_prefix"]["facts"]["seconds"]) > 0
    assert checks["resume"]["facts"]["largest difference of a loss"] == "0.0e+00"
    rows = (tmp_path / "report/gpu_check.md").read_text().splitlines()[4:]
    assert [row.split()[1] for row in rows] == list(gpu_check.CHECKS)


@needs_no_gpu
def test_a_failed_check_is_named_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    """Models run out of time; scores need them."""
    slow = gpu_check.CHECKS["models"]._replace(seconds=0.1)
    monkeypatch.setitem(gpu_check.CHECKS, "models", slow)
    with pytest.raises(SystemExit) as end:
        gpu_check.main(gpu_check.get_args(["--only", "scores", "device", "--out", str(tmp_path)]))
    assert end.value.code == 1
    checks = json.loads((tmp_path / "gpu_check.json").read_text())["checks"]
    assert list(checks) == ["device", "models", "scores"] and checks["device"]["status"] == "PASS"
    assert checks["models"]["status"] == "FAIL" and "not done after 0 seconds" in checks["models"]["reason"]
    assert checks["scores"]["reason"] == "needs models, which did not pass"
    said = capsys.readouterr().out
    assert "FAIL models" in said and "2 failed: models, scores" in said
    assert "| FAIL" in (tmp_path / "gpu_check.md").read_text()


@needs_no_gpu
def test_nothing_is_left_after_sigterm(tmp_path):
    (tmp_path / "temporary").mkdir()
    environment = os.environ | {"TMPDIR": str(tmp_path / "temporary"), "PYTHONPATH": f"{ROOT}:{ROOT}/kernels"}
    words = [sys.executable, "-m", "benchmarks.gpu_check", "--only", "models", "--out", str(tmp_path)]
    process = subprocess.Popen(words, env=environment, cwd=tmp_path)
    while not list(tmp_path.glob("temporary/*/student")):  # the check is at work
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    assert process.wait(60) == 143
    time.sleep(0.5)
    assert not list(tmp_path.glob("temporary/*"))


def outcome_of(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gpu_check.run_here(name)
    return json.loads((tmp_path / f"{name}.json").read_text())


def test_a_stage_that_fails_is_quoted(tmp_path, monkeypatch):
    found = outcome_of("scores", tmp_path, monkeypatch)
    assert found["status"] == "FAIL"
    assert "rollout.py ended with 2: error: --model teacher: no such directory" in found["reason"]


def test_a_check_that_a_refusal_ends_is_a_failure(tmp_path, monkeypatch):
    with open(tmp_path / "log", "w") as log:
        monkeypatch.setattr(gpu_check.sys, "executable", "false")
        found = gpu_check.run_apart("device", str(tmp_path), log, 20)
    assert found["status"] == "FAIL" and found["reason"].startswith("ended with 1")


@pytest.mark.parametrize("wrong", ["value", "gradient", "hidden"])
def test_a_wrong_kernel_fails(wrong, tmp_path, monkeypatch):
    """By a thousandth."""
    right, case = kernel_accuracy.ours, [*kernel_accuracy.cases().items()][0]
    monkeypatch.setattr(kernel_accuracy, "cases", lambda: dict([case]))
    if wrong == "hidden":
        linear = gpu_checks.linear_streaming_kl
        scaled = lambda *tensors, **named: linear(tensors[0] * 1.001, *tensors[1:], **named)
        monkeypatch.setattr(gpu_checks, "linear_streaming_kl", scaled)
    else:
        factors = (1.001, 1) if wrong == "value" else (1, 1.001)
        ours = lambda *given: [x * factor for x, factor in zip(right(*given), factors)]
        monkeypatch.setattr(kernel_accuracy, "ours", ours)
    found = outcome_of("kernels", tmp_path, monkeypatch)
    assert found["status"] == "FAIL" and found["reason"].startswith("AssertionError: ")
    assert ("hidden states" in found["reason"]) == (wrong == "hidden")


def test_a_kernel_slower_than_eager_torch_fails(tmp_path, monkeypatch):
    row = {"entry": "logits", "vocab": 300, "peak_gb": 1.0, "gradient_error": 0.0, "both_ratio": 1.0}
    report = {"copy_bytes_per_second": 1e12, "product_flops_per_second": 1e14}

    def main(args):
        os.makedirs(args.out, exist_ok=True)
        with open(f"{args.out}/bench.json", "w") as file:
            json.dump(report, file)

    monkeypatch.setattr(kernel_speed, "main", main)
    monkeypatch.setattr(kernel_speed, "CONTENDERS", {"hidden": {}})
    for ours, error, status in ((1.0, 0.0, "PASS"), (3.0, 0.0, "FAIL"), (1.0, 0.1, "FAIL")):
        mine = row | {"name": "streaming_kl", "both_ms": ours, "gradient_error": error}
        report["rows"] = [mine, row | {"name": "torch eager", "both_ms": 2.0}]
        assert outcome_of("speed", tmp_path, monkeypatch)["status"] == status


@needs_no_gpu
def test_a_gpu_that_torch_cannot_use_fails(tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 550.54.15\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    found = outcome_of("device", tmp_path, monkeypatch)
    assert found["status"] == "FAIL" and "driver 550.54.15" in found["reason"]
    assert "580 or later" in found["reason"]


def test_a_resumed_run_with_other_losses_fails(tmp_path, monkeypatch):
    """The check's stages replaced: run `killed` has a checkpoint and waits to be killed."""
    steps = gpu_checks.SIZES.steps
    code = f"import os, time; os.makedirs('killed/step_{steps // 2:06d}'); time.sleep(100)"
    monkeypatch.setattr(gpu_checks, "command", lambda *words: [sys.executable, "-c", code])

    def run_stage(stage, words):
        for run, loss in (("whole", 1.0), ("killed", 1.05)):
            (tmp_path / run).mkdir(exist_ok=True)
            lines = [json.dumps({"loss": loss}) + "\n"] * steps
            (tmp_path / run / "metrics.jsonl").write_text("".join(lines))

    monkeypatch.setattr(gpu_checks, "run_stage", run_stage)
    found = outcome_of("resume", tmp_path, monkeypatch)
    assert found["status"] == "FAIL" and "losses differ by 5.0e-02" in found["reason"]
