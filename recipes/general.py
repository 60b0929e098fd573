"""Table 4 of arXiv 2605.16826: what a checkpoint knows beyond mathematics, by lm-evaluation-harness.

    bash recipes/general.sh out/run/final [--out out/run/general]

runs the harness once for each task, since each has its own number of examples in the prompt, and writes

    general.json    {task: metric, its value and standard error, examples, problems}; evaluate.py --table
                    shows it
    TASK.json       what the harness wrote

The metric is acc_norm where the harness reports it, otherwise acc (MMLU), as in the paper. Prompts are the
harness's own, without a chat template (ours: the paper does not say). --resume keeps finished tasks.
"""

import glob
import json
import os
import re
import shutil
import subprocess

from distil.artifacts import (
    add_output_flags,
    finish_artifact,
    refuse,
    run_stage,
    start_artifact,
    stop,
    stop_requested,
    write_json,
)
from distil.evaluation import origin_of
from distil.flags import stage_parser
from distil.models import default_dtype, model_dir

HARNESS = "lm_eval[hf]==0.4.13"
TASKS = ["arc_challenge:25", "hellaswag:10", "mmlu:5", "piqa:0"]  # and shots, as in appendix J


def get_args(argv=None):
    p = stage_parser(__doc__)
    p.add_argument("model", help="directory or hub id")
    p.add_argument("--tasks", nargs="+", default=TASKS, metavar="TASK:SHOTS", help="of the harness")
    p.add_argument("--include_path", metavar="DIR", help="tasks of your own, as the harness takes them")
    dtypes = ["float32", "bfloat16", "float16"]
    p.add_argument("--dtype", choices=dtypes, default=default_dtype(), help="dtype of the model")
    add_output_flags(p, required=False)
    args = p.parse_args(argv)
    for task in args.tasks:
        if not re.fullmatch(r"\w+:\d+", task):
            p.error(f"--tasks {task}: must be a task and its number of examples, such as piqa:0")
    if not args.out:
        if not os.path.isdir(args.model):
            p.error(f"--out: is needed, since {args.model} is no directory")
        args.out = os.path.join(os.path.dirname(os.path.abspath(args.model)), "general")
    return args


def run_harness(args, directory, task, shots):
    """Let the harness measure one task; OUT/TASK.json is what it wrote."""
    place = os.path.join(args.out, "harness")
    shutil.rmtree(place, ignore_errors=True)  # of an interrupted run
    words = ["lm_eval", "--model", "hf", "--model_args", f"pretrained={directory},dtype={args.dtype}"]
    words += ["--tasks", task, "--num_fewshot", shots, "--batch_size", "auto", "--output_path", place]
    words += ["--include_path", args.include_path] if args.include_path else []
    # on a path that names this project the harness would take our evaluate.py for the package evaluate
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    code = subprocess.run(words, env=environment, stdin=subprocess.DEVNULL).returncode
    if stop_requested():
        stop(args)
    written = glob.glob(os.path.join(glob.escape(place), "*", "results_*.json"))
    if code or len(written) != 1:
        refuse(f"lm_eval: exit code {code}, {len(written)} files of results for {task}; see above", code=1)
    os.replace(written[0], os.path.join(args.out, f"{task}.json"))
    shutil.rmtree(place)


def measured(path, task):
    """{metric, value, stderr, shots, problems, version} of a task, from what the harness wrote."""
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
        values = found["results"][task]
        metric = "acc_norm" if "acc_norm,none" in values else "acc"
        stderr = values[f"{metric}_stderr,none"]
        return {
            "metric": metric,
            "value": float(values[f"{metric},none"]),
            "stderr": stderr if isinstance(stderr, float) else None,  # "N/A": the harness has none
            "problems": sum(part["effective"] for part in found["n-samples"].values()),
            "lm_eval": found["lm_eval_version"],
        }
    except (KeyError, ValueError, TypeError) as error:
        refuse(f"{path}: no accuracy of {task} as lm_eval 0.4.13 writes it ({error!r})", code=1)


def main(args):
    if not shutil.which("lm_eval"):
        refuse(f'lm_eval is not installed, or not on PATH: pip install "{HARNESS}"')
    directory = model_dir(args.model, "MODEL")
    origin = origin_of(directory, args.model)
    start_artifact(args)
    tasks = {}
    for task, shots in (one.split(":") for one in args.tasks):
        path = os.path.join(args.out, f"{task}.json")
        if not os.path.isfile(path):
            run_harness(args, directory, task, shots)
        tasks[task] = {"shots": int(shots), **measured(path, task)}
    write_json(os.path.join(args.out, "general.json"), {"tasks": tasks, "model": args.model, **origin})
    files = ["general.json", *(f"{task}.json" for task in tasks)]
    finish_artifact(args, "general", files, model=os.path.realpath(directory))
    for task, row in tasks.items():
        print(
            f"{task}: {row['metric']} {row['value']:.4f}, {row['shots']} examples, {row['problems']} problems"
        )


if __name__ == "__main__":
    run_stage(main, get_args())
