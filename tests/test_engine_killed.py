"""A vLLM worker that is really killed: the stage, in a process of its own, ends in one line and resumes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from conftest import ROOT, needs_vllm

pytestmark = needs_vllm


def descendants(pid):
    """{process id: its command line} of all processes below a process."""
    found = {}
    for child in map(int, open(f"/proc/{pid}/task/{pid}/children").read().split()):
        found[child] = open(f"/proc/{child}/cmdline").read()
        found |= descendants(child)
    return found


@pytest.mark.skipif(
    not os.path.exists(f"/proc/{os.getpid()}/task/{os.getpid()}/children"),
    reason="this kernel lists no children of a process",
)
@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="needs two GPUs, or a CPU")
def test_a_killed_worker_ends_a_rollout_that_resumes_to_the_same_rows(world, tmp_path):
    """kill -9 of one of two workers, in the middle. One more engine then resumes, and makes a whole run."""
    flags = f"--model {world}/student_init --data {world}/train.jsonl --engine vllm --tensor_parallel 2"
    flags += " --dtype float32 --max_response_tokens 24 --gpu_memory_utilization 0.1"
    flags += " --n 64 --sample_batch 64 --out"
    path = os.pathsep.join([ROOT, os.path.join(ROOT, "kernels")])
    environment = os.environ | {"PYTHONPATH": path}
    where = {"cwd": ROOT, "env": environment, "text": True, "stderr": subprocess.PIPE}
    marks = tmp_path / "out/progress.jsonl"

    command = [sys.executable, "rollout.py", *flags.split(), tmp_path / "out"]
    with open(tmp_path / "log", "w") as log:
        killed = subprocess.Popen(command, **where | {"stderr": log, "stdout": log})
        while not (marks.exists() and marks.read_text().count("\n") >= 2) and killed.poll() is None:
            time.sleep(0.01)
        processes = descendants(killed.pid)
        [worker] = [pid for pid, line in processes.items() if "VLLM::Worker_TP1" in line]
        os.kill(worker, signal.SIGKILL)
        assert killed.wait(timeout=60) == 1
    said, kept = (tmp_path / "log").read_text(), json.loads(marks.read_text().splitlines()[-1])["problems"]
    last = said.splitlines()[-1]
    assert last.startswith("error: --engine vllm: the engine failed: "), said
    assert said.count("\nerror: ") == 1 and 2 <= kept < 12 and "--resume continues" in last
    for _ in range(100):  # the other worker notices that its pipe has ended
        if not any(os.path.exists(f"/proc/{pid}") for pid in processes):
            break
        time.sleep(0.1)
    else:
        pytest.fail(f"left over: {processes}")

    code = f"""if True:
        import functools, rollout
        rollout.load_vllm = functools.cache(rollout.load_vllm)
        for out in ("out --resume", "whole"):
            rollout.main(rollout.get_args(f"{flags} {tmp_path}/{{out}}".split()))
    """
    (tmp_path / "both.py").write_text("if __name__ == '__main__':\n    " + code)
    done = subprocess.run([sys.executable, tmp_path / "both.py"], **where, stdout=subprocess.PIPE)
    assert done.returncode == 0, done.stderr
    assert f"{kept}/12" in done.stderr  # the bar begins with the finished problems
    rows = (tmp_path / "out/rollouts.jsonl").read_bytes()
    assert rows.count(b"\n") == 12 * 64 and rows == (tmp_path / "whole/rollouts.jsonl").read_bytes()
