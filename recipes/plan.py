"""Shows what the commands of a recipe cost, and runs them one after the other.

    bash recipes/qwen3.sh --row table1/student_4b_reverse --dry_run

A recipe pipes its commands into this program, one a line. "# ROW TOKENS" begins a row, and says how many tokens a response of that
row has on average where nothing cuts it off. Commands that several rows need are run once; one whose --out is finished is skipped,
and an unfinished one is resumed. A command that is no stage of this project is only shown.

GPU hours: the floating point operations of the command's own flags by run.tflops, those of evaluations too (a generation and a
forward pass), divided by --tflops_per_second. Loading, diagnostics and grading are not in it.
Disk: 12 bytes a token of rollouts and samples; scores as score_teacher.py stores them; checkpoints in float32, with the optimizer's
two moments where training can be resumed from them.
"""

import argparse
import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
from collections import Counter
from typing import NamedTuple

from distil.artifacts import refuse
from distil.problems import load_problems
from distil.training import tflops
from evaluate import evaluations_of

NAMES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "tie_word_embeddings",
)
MODELS = {
    name: dict(zip(NAMES, sizes))
    for name, sizes in {  # from their config.json, so that a plan needs no network
        "Qwen3-0.6B-Base": (1024, 3072, 28, 16, 8, 128, 151936, True),
        "Qwen3-1.7B-Base": (2048, 6144, 28, 16, 8, 128, 151936, True),
        "Qwen3-4B": (2560, 9728, 36, 32, 8, 128, 151936, True),
        "Qwen3-4B-Base-GRPO": (2560, 9728, 36, 32, 8, 128, 151936, True),
        "Qwen3-8B": (4096, 12288, 36, 32, 8, 128, 151936, False),
        "DeepSeek-R1-Distill-Qwen-1.5B": (1536, 8960, 28, 12, 2, 128, 151936, False),
        "JustRL-DeepSeek-1.5B": (1536, 8960, 28, 12, 2, 128, 151936, False),
        "DeepSeek-R1-Distill-Qwen-7B": (3584, 18944, 28, 28, 4, 128, 152064, False),
    }.items()
}
PROBLEMS = {
    "deepscaler": 40315,
    "math500": 500,
    "gsm8k": 1319,
    "gsm8k_train": 7473,
    "aime24": 30,
    "amc23": 40,
    "minyichen/AIME2025::test": 30,
}
MACHINE = (
    "resume",
    "overwrite",
    "tensor_parallel",
)  # flags that may differ between a finished artifact and the plan


class Command(NamedTuple):
    """One command of a row. tokens: mean response of the row; module and args: None for a command that is only shown."""

    row: str
    tokens: int
    words: list
    module: str
    args: argparse.Namespace


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--dry_run", action="store_true", help="show the commands and what they cost, and run nothing"
    )
    p.add_argument("--prompt_tokens", type=int, required=True, help="mean prompt")
    p.add_argument(
        "--tflops_per_second", type=float, required=True, help="sustained rate of a GPU, sampling included"
    )
    return p.parse_args(argv)


def read_commands(lines):
    """The Commands of a recipe's lines, each once."""
    commands, row, tokens, seen = [], None, 0, set()
    for line in lines:
        words = shlex.split(line)
        if words[:1] == ["#"]:
            row, tokens = words[1], int(words[2])
        elif words and line not in seen:
            seen.add(line)
            module, args, name = (
                None,
                None,
                next((word for word in words if word.endswith(".py") or word == "-m"), None),
            )
            if name:
                flags = words[words.index(name) + 1 :]
                module = flags.pop(0) if name == "-m" else name.removesuffix(".py")
                args = importlib.import_module(module).get_args(flags)
            commands.append(Command(row, tokens, words, module, args))
    return commands


# ---------------------------------------------------------------------------------------------------------------------
# What a command costs


def config_of(model, made):
    """Sizes of a model, a dict of the Hugging Face names: `made` by an earlier command, a directory, known here, or on the hub."""
    if model in made:
        return made[model]
    if os.path.isfile(os.path.join(model, "config.json")):
        return json.load(open(os.path.join(model, "config.json"), encoding="utf-8"))
    if os.path.basename(model) in MODELS:
        return MODELS[os.path.basename(model)]
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model).to_dict()
    except OSError as error:
        refuse(f"plan: the sizes of the model {model} are not known, and it cannot be loaded: {error}")


def parameters(config):
    """Weights of a model; without norms and biases, which are less than a thousandth."""
    hidden, head_dim = (
        config["hidden_size"],
        config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
    )
    heads = 2 * config["num_attention_heads"] + 2 * config["num_key_value_heads"]
    layer = hidden * head_dim * heads + 3 * hidden * config["intermediate_size"]
    return config["num_hidden_layers"] * layer + config["vocab_size"] * hidden * (
        1 if config.get("tie_word_embeddings") else 2
    )


def problems_of(data, limit=0):
    return limit or PROBLEMS.get(data) or len(load_problems(data))


def cost(command, prompt, made):
    """(TFLOPs, bytes on disk) of a command. made: {path: what earlier commands leave there}, a model's config or the (responses,
    mean tokens) of rollouts; what this command leaves is added."""
    module, args = command.module, command.args
    if not module or not args.out:  # only shown, or a table
        return 0.0, 0
    if module == "rollout":
        count, tokens = (
            problems_of(args.data, args.limit) * args.n,
            min(args.max_response_tokens, command.tokens),
        )
        made[args.out] = count, tokens
        return count * tflops(config_of(args.model, made), prompt, tokens, generations=1), count * (
            prompt + tokens
        ) * 12
    if module == "score_teacher":
        config, (count, tokens) = config_of(args.teacher, made), made[args.rollouts]
        tokens, state = min(args.max_tokens or tokens, tokens), 2 * config["hidden_size"]  # bytes in bfloat16
        return count * tflops(config, prompt, tokens, forwards=1), state * (
            count * tokens + config["vocab_size"]
        )
    if module == "evaluate":
        count = sum(problems_of(part.data, part.limit) * part.n for part in evaluations_of(args))
        size = prompt, min(args.max_response_tokens, command.tokens)
        return count * tflops(config_of(args.model, made), *size, forwards=1, generations=1), count * sum(
            size
        ) * 12
    if module in ("train", "grpo"):
        return training_cost(command, prompt, made)
    return 0.0, 0  # recipes.dedup


def training_cost(command, prompt, made):
    args = command.args
    config = made[os.path.join(args.out, "final")] = config_of(
        args.student if command.module == "train" else args.model, made
    )
    mean, count, generations, teacher = command.tokens, args.batch_size, 1, None
    if command.module == "grpo":
        count *= args.n
    elif args.prefix == "student":
        count, teacher = count * args.n, config_of(args.teacher, made)
    else:
        mean, generations = made[args.rollouts][1], 0
    horizons = getattr(args, "horizons", None) or [
        args.max_response_tokens
    ]  # of the curriculum, as if every gate were passed
    gate_every, spent = getattr(args, "gate_every", None) or args.steps, 0.0
    for horizon, steps in Counter(
        horizons[min(step // gate_every, len(horizons) - 1)] for step in range(args.steps)
    ).items():
        size = prompt, min(mean, horizon)
        student = tflops(config, *size, forwards=3, generations=generations)
        spent += steps * count * (student + (tflops(teacher, *size, forwards=1) if teacher else 0.0))
    if args.eval_every:
        limits = [args.eval_max_response_tokens] * (-(-args.steps // args.eval_every) + 1) + horizons[:-1]
        spent += (
            problems_of(args.eval_data)
            * args.eval_n
            * sum(
                tflops(config, prompt, min(command.tokens, limit), forwards=1, generations=1)
                for limit in limits
            )
        )
    saved = (args.steps - 1) // args.save_every if args.save_every else 0
    saved = min(saved, args.keep_checkpoints or saved)
    return spent, parameters(config) * (4 + 12 * saved)


# ---------------------------------------------------------------------------------------------------------------------
# Running


def state_of(command):
    """ "new", "unfinished" or "finished", from what lies in --out; finished with other flags is refused."""
    if not command.module or not command.args.out:
        return "new"
    artifacts = list(evaluations_of(command.args)) if command.module == "evaluate" else [command.args]
    finished = [finished_as(part, command.row) for part in artifacts]
    begun = any(finished) or any(
        os.path.isfile(os.path.join(part.out, "meta.partial.json")) for part in artifacts
    )
    return "finished" if all(finished) else "unfinished" if begun else "new"


def finished_as(args, row):
    """Whether args.out holds a finished artifact; one with other flags is refused."""
    path = os.path.join(args.out, "meta.json")
    if not os.path.isfile(path):
        return False
    try:
        before, now = json.load(open(path, encoding="utf-8"))["args"], json.loads(json.dumps(vars(args)))
    except (ValueError, KeyError, TypeError) as error:
        refuse(f"{path} is damaged: {error!r}")
    for name in now:
        if name in before and before[name] != now[name] and name not in MACHINE:
            refuse(
                f"{args.out} is finished with --{name} {before[name]!r}, and {row} wants {now[name]!r}: give the recipe "
                "another --out, or remove what is there"
            )
    return True


def shown(words, width=128):
    """The command as shell text, folded before flags into lines of at most `width` characters."""
    program, *flags = shlex.join(words).split(" --")
    lines = [program]
    for flag in flags:
        if len(f"{lines[-1]} --{flag}") > width:
            lines.append("   ")
        lines[-1] += f" --{flag}"
    return " \\\n".join(lines)


def execute(words):
    """Run a command to its end: its exit code. Ctrl-C is for the command, which may save before it ends."""
    before = signal.signal(signal.SIGINT, lambda *ignored: None)
    try:
        return subprocess.run(words, stdin=subprocess.DEVNULL).returncode
    finally:
        signal.signal(signal.SIGINT, before)


def hours(args, spent):
    return f"{spent / args.tflops_per_second / 3600:.3g} GPU hours"


def main(args):
    commands, made, row = read_commands(sys.stdin), {}, None
    states, todo = [state_of(command) for command in commands], [0, 0.0, 0]
    for command, state in zip(commands, states):
        spent, size = cost(command, args.prompt_tokens, made)
        if command.row != row:
            row = command.row
            print(
                f"\n# {row}"
                + (
                    f": responses of {command.tokens} tokens where nothing cuts them off"
                    if command.tokens
                    else ""
                )
            )
        about = [] if command.module else ["shown, not run here"]
        about += [state] if state != "new" else []
        about += [f"{spent:.3g} TFLOPs, {hours(args, spent)}, {size / 1e9:.3g} GB"] if spent else []
        print(*([f"# {'; '.join(about)}"] if about else []), shown(command.words), sep="\n")
        if state != "finished":
            todo = [todo[0] + bool(command.module), todo[1] + spent, todo[2] + size]
    print(
        f"\n# to do: {todo[0]} commands, {todo[1]:.3g} TFLOPs, {hours(args, todo[1])} at {args.tflops_per_second:g} TFLOP/s, "
        f"{todo[2] / 1e9:.3g} GB",
        flush=True,
    )
    for command, state in zip(commands, states):
        if args.dry_run or not command.module or state == "finished":
            continue
        again = (
            ["--overwrite" if command.module == "recipes.dedup" else "--resume"]
            if state == "unfinished"
            else []
        )
        print(f"\n== {command.row}: {shown(command.words + again)}", flush=True)
        if code := execute(command.words + again):
            refuse(
                f"{command.row}: {command.module} ended with exit code {code}; run the recipe again to go on from here",
                code=1,
            )


if __name__ == "__main__":
    main(get_args())
