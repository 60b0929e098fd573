"""What a new GPU shows in ten minutes and without a network: PASS, FAIL or SKIP for each check.

    bash benchmarks/gpu_check.sh                            all checks, for one GPU of 80 GB
    bash benchmarks/gpu_check.sh --only device kernels      these, and what they need

Models have random weights and the sizes of Qwen3-0.6B (student) and Qwen3-4B (teacher); where vLLM is not
installed, transformers samples. Each check is a process of its own: it frees its memory, ends when its
time is over, and its crash leaves the others alone. --out gets gpu_check.json and gpu_check.md (a table),
written again after each check, and gpu_check.log, what checks and stages said. Temporary files: 25 GB.
Without a GPU the same checks run at toy sizes on the CPU, to show that they work.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
from collections.abc import Callable
from typing import NamedTuple

from benchmarks import gpu_checks
from benchmarks.gpu_checks import ENGINE, GPU, ROOT
from distil import artifacts
from reports.tables import markdown

TOTAL_SECONDS = 600


class Check(NamedTuple):
    function: Callable
    seconds: int  # that it may take
    needs: tuple = ()  # checks that leave behind what it uses


CHECKS = {
    "device": Check(gpu_checks.device, 60),
    "kernels": Check(gpu_checks.kernels, 90),
    "speed": Check(gpu_checks.speed, 150),
    "models": Check(gpu_checks.make_models, 90),
    "vllm": Check(gpu_checks.vllm, 150, ("models",)),
    "scores": Check(gpu_checks.scores, 150, ("models",)),
    "teacher_prefix": Check(gpu_checks.teacher_prefix, 120, ("models", "scores")),
    "student_prefix": Check(gpu_checks.student_prefix, 200, ("models",)),
    "resume": Check(gpu_checks.resume, 150, ("models", "scores")),
}


def get_args(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    out = "results" if GPU else "out/gpu_check"
    p.add_argument("--out", default=out, help=f"folder of the report (default: {out})")
    p.add_argument("--only", choices=CHECKS, nargs="+", default=[*CHECKS], help="and the checks they need")
    p.add_argument("--run", choices=CHECKS, help=argparse.SUPPRESS)  # one check, in this process
    return p.parse_args(argv)


def run_here(name):
    """One check, in this process, which runs in a folder of its own. Its outcome goes to NAME.json."""
    print(f"== check {name}", flush=True)
    try:
        outcome = {"status": "PASS", "facts": CHECKS[name].function()}
    except gpu_checks.Skipped as why:
        outcome = {"status": "SKIP", "reason": str(why)}
    except Exception as failure:  # whatever it is: it is what the check found
        traceback.print_exc()
        reason = gpu_checks.last_line(str(failure))
        outcome = {"status": "FAIL", "reason": f"{type(failure).__name__}: {reason}"}
    artifacts.write_json(f"{name}.json", outcome)


def run_apart(name, folder, log, seconds):
    """One check in its own process, killed with all that it started after so many seconds. Its outcome."""
    words, outcome = [sys.executable, "-m", "benchmarks.gpu_check", "--run", name], f"{folder}/{name}.json"
    path = os.pathsep.join([ROOT, os.path.join(ROOT, "kernels")])
    where = {"env": os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}, "cwd": folder}
    process = subprocess.Popen(words, **where, stdout=log, stderr=log, start_new_session=True)
    try:
        reason = f"ended with {process.wait(seconds)}"
    except subprocess.TimeoutExpired:
        reason = f"not done after {seconds:.0f} seconds"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if not os.path.isfile(outcome):  # its end was not its own doing, or a refusal
        with open(log.name, encoding="utf-8") as said:
            return {"status": "FAIL", "reason": f"{reason}: {gpu_checks.last_line(said.read())}"}
    with open(outcome, encoding="utf-8") as file:
        return json.load(file)


def text_of(outcome):
    return outcome.get("reason") or "; ".join(f"{name} {value}" for name, value in outcome["facts"].items())


def main(args):
    if args.run:
        return run_here(args.run)
    for number in (signal.SIGTERM, signal.SIGHUP):  # the check that runs is to end too
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    wanted = {*args.only}.union(*(CHECKS[name].needs for name in args.only))
    samples = {"vllm": "vLLM", "hf": "transformers"}[ENGINE]
    sizes = "Qwen3-0.6B and Qwen3-4B" if GPU else "toy sizes on a CPU"
    about = f"{sizes}, random weights, sampled with {samples}"
    print(f"gpu_check: {about}; at most {TOTAL_SECONDS / 60:.0f} minutes", flush=True)
    report = {"about": about, "started": artifacts.now_utc(), "argv": sys.argv[1:], "checks": {}}
    os.makedirs(args.out, exist_ok=True)
    path, began = os.path.join(args.out, "gpu_check"), time.monotonic()
    with tempfile.TemporaryDirectory() as folder, open(f"{path}.log", "w", encoding="utf-8") as log:
        for name in (name for name in CHECKS if name in wanted):
            started = time.monotonic()
            left = min(CHECKS[name].seconds, TOTAL_SECONDS - (started - began))
            passed = [name for name, outcome in report["checks"].items() if outcome["status"] == "PASS"]
            missing = [need for need in CHECKS[name].needs if need not in passed]
            outcome = {"status": "FAIL", "reason": f"needs {', '.join(missing)}, which did not pass"}
            if not missing:
                outcome = run_apart(name, folder, log, max(left, 0))
            outcome["seconds"] = round(time.monotonic() - started, 1)
            report["checks"][name] = outcome
            line = f"{outcome['status']} {name}  {outcome['seconds']} s  {text_of(outcome)}"
            print(textwrap.fill(line, 110, subsequent_indent="    "), flush=True)
            write_report(path, report)
    failed = [name for name, outcome in report["checks"].items() if outcome["status"] == "FAIL"]
    end = f"{len(failed)} failed: {', '.join(failed)}; see {path}.log" if failed else "none failed"
    print(f"gpu_check: {time.monotonic() - began:.0f} s, {end}; wrote {path}.json and {path}.md")
    if failed:
        raise SystemExit(1)


def write_report(path, report):
    artifacts.write_json(f"{path}.json", report)
    rows = [["check", "result", "seconds", "what it found"], ["---"] * 4]
    for name, outcome in report["checks"].items():
        found = text_of(outcome).replace("|", "\\|")
        rows.append([name, outcome["status"], str(outcome["seconds"]), found])
    head = f"`bash benchmarks/gpu_check.sh`, {report['started']}: {report['about']}.\n\n"
    artifacts.write_file(f"{path}.md", (head + markdown(rows) + "\n").encode())


if __name__ == "__main__":
    main(get_args())
