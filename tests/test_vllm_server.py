"""A real vLLM server (on a CPU, its CPU build): its numbers are the local teacher's, and it may be killed."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
import urllib.request

import pytest
import torch

import rollout
import score_teacher
import train
from conftest import ROOT, needs_vllm, read_rows, run_line
from distil import artifacts, server
from distil.models import load_model
from distil.rollouts import read_rollouts
from distil.teacher import Scores
from test_ranks import free_port

pytestmark = needs_vllm

# The server is a group of processes. It ends with this pipe: with the test, in whatever way that ends.
SUPERVISED = 'setsid "$@" & read -r _; kill -9 -- -$!; wait'
FLAGS = "--dtype float32 --max-logprobs 29 --max-model-len 64 --generation-config vllm"
FLAGS += " --gpu-memory-utilization 0.1"
MASK = ["--logits-processors", "distil.vllm_mask:PaddingMask", "--additional-config", '{"vocab_size": 29}']
ON_CPU = "--enforce-eager --no-enable-chunked-prefill --max-num-batched-tokens 4096"
SETTINGS = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
CPU_SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "TORCHDYNAMO_DISABLE": "1",
}


class Served:
    """vLLM's server of a model, until kill()."""

    def __init__(self, model, log):
        port, on_cpu = free_port(), not torch.cuda.is_available()
        self.url, self.log = f"http://127.0.0.1:{port}", log
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        command += ["--host", "127.0.0.1", "--port", str(port), *FLAGS.split(), *MASK]
        command += ON_CPU.split() * on_cpu
        path = os.pathsep.join([ROOT, os.path.join(ROOT, "kernels")])
        environment = os.environ | SETTINGS | (CPU_SETTINGS if on_cpu else {}) | {"PYTHONPATH": path}
        with open(log, "w") as file:
            where = {"stdin": subprocess.PIPE, "stdout": file, "stderr": file, "env": environment}
            self.process = subprocess.Popen(["bash", "-c", SUPERVISED, "-", *command], **where)

    def wait(self):
        """Until it answers."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        for _ in range(900):
            try:
                opener.open(f"{self.url}/health").close()
                return self
            except OSError:
                time.sleep(0.2)
        pytest.fail(f"no server after 3 minutes: {open(self.log).read()[-3000:]}")

    def kill(self):
        """SIGKILL to every process of the server."""
        self.process.stdin.close()
        self.process.wait(60)


@pytest.fixture(scope="module")
def servers(world, tmp_path_factory):
    """Two of them, for one will be killed: most of a start is imports, so they start together."""
    logs = [tmp_path_factory.mktemp("server") / "log" for _ in range(2)]
    with contextlib.ExitStack() as stack:
        both = []
        for log in logs:
            both.append(Served(world / "teacher_init", log))
            stack.callback(both[-1].kill)
        yield [one.wait() for one in both]


@pytest.fixture
def served(servers):
    return servers[0]


def training(world, teacher, out, more):
    flags = f"--prefix student --kl reverse --engine hf --dtype float32 {teacher} --out {out}"
    models = f"--student {world}/student_init --teacher {world}/teacher_init --data {world}/train.jsonl"
    run_line(train, f"{flags} {models} --batch_size 4 --max_response_tokens 12 --lr 2e-3 {more}")


@pytest.mark.parametrize("signal", ["topk", "sampled"])
def test_scores_are_the_local_teachers(world, rollouts, served, tmp_path, signal):
    line = f"--teacher {world}/teacher_init --rollouts {rollouts} --signal {signal} --k 16 --dtype float32"
    run_line(score_teacher, f"{line} --out {tmp_path}/served --server {served.url}")
    run_line(score_teacher, f"{line} --out {tmp_path}/local")
    found, right = (Scores(str(tmp_path / name), str(rollouts)) for name in ("served", "local"))
    for row in range(12):
        for name, tensor in right.read(row).items():
            torch.testing.assert_close(found.read(row)[name], tensor, rtol=0, atol=1e-4)


@pytest.mark.parametrize("vocab", ["topk --topk_set teacher --k 16", "sampled"])
def test_two_steps_are_those_with_the_local_teacher(world, served, tmp_path, vocab):
    for name, teacher in (("local", ""), ("served", f"--teacher_server {served.url}")):
        training(world, teacher, tmp_path / name, f"--vocab {vocab} --steps 2")
    local, found = (read_rows(tmp_path / name / "metrics.jsonl") for name in ("local", "served"))
    for name in ("loss", "grad_norm", "tflops", "response_length"):
        assert [row[name] for row in found] == pytest.approx([row[name] for row in local], rel=1e-3)
    names = ("local", "served")
    one, two = (load_model(str(tmp_path / n / "final"), "-", "float32").state_dict() for n in names)
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-4)


def test_greedy_rollouts_are_those_of_transformers(world, served, tmp_path):
    line = f"--model {world}/teacher_init --data {world}/train.jsonl --max_response_tokens 12"
    line += " --temperature 0 --dtype float32"
    run_line(rollout, f"{line} --engine hf --out {tmp_path}/hf")
    run_line(rollout, f"{line} --engine server --server {served.url} --out {tmp_path}/served")
    rows = (tmp_path / "served/rollouts.jsonl").read_bytes()
    assert rows == (tmp_path / "hf/rollouts.jsonl").read_bytes()


def test_samples_depend_on_their_seeds_alone(world, served, tmp_path):
    """One at a time, or all together and in another order; and they come from the teacher's distribution."""
    line = f"--engine server --server {served.url} --model {world}/teacher_init --data {world}/train.jsonl"
    line += " --max_response_tokens 12 --n 8 --limit 4"
    run_line(rollout, f"{line} --server_requests 1 --out {tmp_path}/one")
    run_line(rollout, f"{line} --server_requests 32 --out {tmp_path}/all")
    run_line(rollout, f"{line} --server_requests 32 --seed 7 --out {tmp_path}/other")
    one, many, other = (list(read_rollouts(tmp_path / name)) for name in ("one", "all", "other"))
    assert one == many and len({tuple(row["response_ids"]) for row in one}) > 24 and other != one
    assert {row["finish_reason"] for row in one} == {"stop", "length"}


def test_what_the_server_refuses_is_one_line(world, rollouts, served, tmp_path, refused):
    line = f"--teacher {world}/student_init --rollouts {rollouts} --signal topk --server {served.url}"
    words = "serves", "teacher_init", "--served-model-name"
    message = refused(lambda: run_line(score_teacher, f"{line} --out {tmp_path}/out"), *words, code=1)
    assert message.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_killed_server_ends_a_run_that_goes_on_with_another(world, servers, tmp_path, capsys, monkeypatch):
    """kill -9 of all its processes in the middle, when the first rows are written."""
    monkeypatch.setattr(server, "PAUSE", 0.05)
    line = f"--engine server --model {world}/teacher_init --data {world}/train.jsonl --seed 3"
    line += " --max_response_tokens 12 --n 16 --sample_batch 16 --server_requests 4"
    killed, other = servers
    out, marks = tmp_path / "out", tmp_path / "out/progress.jsonl"
    run_line(rollout, f"{line} --server {killed.url} --out {tmp_path}/whole")

    def kill_when_some_are_written():
        while not (marks.exists() and marks.read_text().count("\n") >= 2):
            time.sleep(0.005)
        killed.kill()

    thread = threading.Thread(target=kill_when_some_are_written, daemon=True)
    thread.start()
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        words = f"{line} --server {killed.url} --out {out}".split()
        artifacts.run_stage(rollout.main, rollout.get_args(words))
    [message] = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert end.value.code == 1 and message.startswith(f"error: --server {killed.url}: /v1/completions failed")
    assert message.endswith("keeps what is finished; the same command with --resume continues")
    thread.join()
    kept = json.loads(marks.read_text().splitlines()[-1])["problems"]
    assert 0 < kept < 12
    run_line(rollout, f"{line} --server {other.url} --out {out} --resume")
    assert f"{kept}/12" in capsys.readouterr().err  # the bar begins with the finished problems
    assert (out / "rollouts.jsonl").read_bytes() == (tmp_path / "whole/rollouts.jsonl").read_bytes()
