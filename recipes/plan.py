"""Shows what the commands of a recipe cost, and runs them one after the other.

    bash recipes/qwen3.sh --row table1/student_4b_reverse --dry_run

A recipe pipes its commands into this program, one a line. "# ROW TOKENS" begins a row; TOKENS is the mean
length of its responses where nothing truncates them. A command that several rows need is run once. One
whose --out is finished is skipped, an unfinished one is resumed.

GPU hours: floating point operations, by flops.tflops from the command's own flags, divided by
--tflops_per_second. Evaluations count as a generation and a forward pass. Loading, diagnostics, grading and
recipes/general.sh are not counted. Memory: what training takes on a GPU of --gpu_gib, as runs/plan.py counts
it, with mean prompts; what would not fit is refused before anything runs. Disk: 12 bytes a token of rollouts
and samples; scores as score_teacher.py stores them; checkpoints in float32, those that training can resume
from with the optimizer's two moments.
"""

import argparse
import functools
import hashlib
import importlib
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from typing import NamedTuple

import torch

import runs.plan
from distil.artifacts import read_artifact, refuse
from distil.problems import load_problems
from evaluate import evaluations_of
from runs import training
from runs.flops import tflops

# From the models' config.json, so that a plan needs no network: hidden, intermediate size, layers, heads,
# key-value heads, head_dim, vocabulary, embedding and head
SIZES = """
Qwen3-0.6B-Base               1024  3072 28 16 8 128 151936 tied
Qwen3-1.7B-Base               2048  6144 28 16 8 128 151936 tied
Qwen3-1.7B                    2048  6144 28 16 8 128 151936 tied
Qwen3-4B                      2560  9728 36 32 8 128 151936 tied
Qwen3-4B-Base-GRPO            2560  9728 36 32 8 128 151936 tied
Qwen3-4B-Non-Thinking-RL-Math-Step500 2560 9728 36 32 8 128 151936 tied
Qwen3-8B                      4096 12288 36 32 8 128 151936 separate
DeepSeek-R1-Distill-Qwen-1.5B 1536  8960 28 12 2 128 151936 separate
JustRL-DeepSeek-1.5B          1536  8960 28 12 2 128 151936 separate
DeepSeek-R1-Distill-Qwen-7B   3584 18944 28 28 4 128 152064 separate
Skywork-OR1-Math-7B           3584 18944 28 28 4 128 152064 separate
DeepSeek-R1-Distill-Qwen-14B  5120 13824 48 40 8 128 152064 separate
"""
NAMES = """hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
vocab_size tie_word_embeddings""".split()
MODELS = {}
for model, *sizes, tied in map(str.split, SIZES.strip().splitlines()):
    MODELS[model] = {"model_type": "llama"} | dict(
        zip(NAMES, [*map(int, sizes), tied == "tied"], strict=True)
    )
PROBLEMS = {
    "deepscaler": 40315,
    "math500": 500,
    "gsm8k": 1319,
    "gsm8k_train": 7473,
    "aime24": 30,
    "amc23": 40,
    "minyichen/AIME2025::test": 30,
}
MAY_DIFFER = ("resume", "overwrite", "tensor_parallel")  # between a finished artifact and the plan


class Command(NamedTuple):
    """A command of a row. tokens: mean response."""

    row: str
    tokens: int
    words: list
    module: str
    args: argparse.Namespace


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dry_run", action="store_true", help="show commands and costs, and run nothing")
    p.add_argument("--prompt_tokens", type=int, required=True, help="mean prompt")
    p.add_argument(
        "--tflops_per_second", type=float, required=True, help="sustained rate of a GPU, sampling included"
    )
    p.add_argument("--gpu_gib", type=float, required=True, help="memory of a GPU")
    return p.parse_args(argv)


def read_commands(lines):
    """The Commands of a recipe's lines, each once."""
    commands, row, tokens, seen = [], None, 0, set()
    for line in lines:
        words = shlex.split(line)
        if words[:1] == ["#"]:
            if len(words) != 3 or not words[2].isdecimal():
                refuse(f"plan: {line.strip()!r} must be # ROW TOKENS")
            row, tokens = words[1], int(words[2])
        elif words and line not in seen:
            seen.add(line)
            commands.append(Command(row, tokens, words, *stage_of(words)))
    return commands


def stage_of(words):
    """(module, its args) of `... STAGE.py FLAGS`, `... -m MODULE FLAGS` or `bash recipes/RECIPE.sh FLAGS`."""
    for place, word in enumerate(words):
        if word.endswith((".py", ".sh")):
            module, flags = word[:-3].replace("/", "."), words[place + 1 :]
        elif word == "-m":
            module, flags = words[place + 1], words[place + 2 :]
        else:
            continue
        return module, importlib.import_module(module).get_args(flags)
    refuse(f"plan: no command of this project: {shlex.join(words)}")


# ----------------------------------------------------------------------------------------------------------
# What a command costs


def config_of(model, made):
    """Sizes of a model that an earlier command makes, of a directory, of MODELS, or of the hub."""
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
        refuse(f"plan: the sizes of the model {model} are unknown, and it cannot be loaded: {error}")


def parameters(config):
    """Weights of a model, without norms and biases, which are less than a thousandth."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    attention = hidden * head_dim * 2 * (heads + config["num_key_value_heads"])
    layer = attention + 3 * hidden * config["intermediate_size"]
    embeddings = 1 if config.get("tie_word_embeddings") else 2
    return config["num_hidden_layers"] * layer + embeddings * config["vocab_size"] * hidden


def rollouts_of(path, made):
    """(number, mean tokens) of rollouts that an earlier command makes, or that are there."""
    if path not in made:
        counts = read_artifact(path, "--rollouts", "rollout")["counts"]
        made[path] = counts["responses"], counts["response_tokens"] / counts["responses"]
    return made[path]


def problems_of(data, limit=0):
    return limit or PROBLEMS.get(data) or len(load_problems(data))


def cost(command, prompt, made):
    """(TFLOPs, bytes on disk) of a command. prompt: tokens. made: {path: what earlier commands leave there},
    the config of a model or (number, mean tokens) of rollouts; what this command leaves is added."""
    module, args = command.module, command.args
    if not args.out:  # a table
        return 0.0, 0
    if module == "rollout":
        count = problems_of(args.data, args.limit) * args.n
        tokens = min(args.max_response_tokens, command.tokens)
        made[args.out] = count, tokens
        spent = tflops(config_of(args.model, made), prompt, tokens, generations=1)
        return count * spent, 12 * count * (prompt + tokens)
    if module == "score_teacher":
        config, (count, tokens) = config_of(args.teacher, made), rollouts_of(args.rollouts, made)
        tokens = min(args.max_tokens or tokens, tokens)
        state = 2 * config["hidden_size"]  # bytes in bfloat16
        made[args.out] = config
        spent = tflops(config, prompt, tokens, forwards=1)
        return count * spent, state * (count * tokens + config["vocab_size"])
    if module == "evaluate":
        count = sum(problems_of(part.data, part.limit) * part.n for part in evaluations_of(args))
        tokens = min(args.max_response_tokens, command.tokens)
        spent = tflops(config_of(args.model, made), prompt, tokens, forwards=1, generations=1)
        return count * spent, 12 * count * (prompt + tokens)
    if module in ("train", "grpo"):
        return training_cost(command, prompt, made)
    return 0.0, 0  # recipes.dedup, recipes.general


def training_cost(command, prompt, made):
    args = command.args
    config = config_of(args.student if command.module == "train" else args.model, made)
    made[os.path.join(args.out, "final")] = config
    responses, tokens, generations, teacher = args.batch_size, command.tokens, 1, None
    if command.module == "grpo":
        responses *= args.n
    elif args.prefix == "student":
        responses *= args.n
        teacher = config_of(args.teacher, made)
    else:
        tokens, generations = rollouts_of(args.rollouts, made)[1], 0
    horizons = getattr(args, "horizons", None) or [args.max_response_tokens]
    gate_every = getattr(args, "gate_every", None) or args.steps
    spent = 0.0
    for step in range(args.steps):  # as if every gate of the curriculum were passed
        size = prompt, min(tokens, horizons[min(step // gate_every, len(horizons) - 1)])
        of_response = tflops(config, *size, forwards=3, generations=generations)
        if teacher:
            of_response += tflops(teacher, *size, forwards=1)
        spent += responses * of_response
    if args.eval_every:
        times = -(-args.steps // args.eval_every) + 1
        for limit in [args.eval_max_response_tokens or args.max_response_tokens] * times + horizons[:-1]:
            size = prompt, min(command.tokens, limit)
            count = problems_of(args.eval_data) * args.eval_n
            spent += count * tflops(config, *size, forwards=1, generations=1)
    saved = (args.steps - 1) // args.save_every if args.save_every else 0
    saved = min(saved, args.keep_checkpoints or saved)
    return spent, parameters(config) * (4 + 12 * saved)


def memory(command, prompt, made, gpu, folder):
    """(GiB that a training command takes on a GPU of so many GiB, whether it checkpoints activations). made:
    as cost() leaves it; folder: for configs."""
    args, scored = command.args, 0
    if command.module == "train":
        student, teacher, samples = args.student, args.teacher, args.prefix == "student"
        scored = made[args.scores]["hidden_size"] if args.scores in made else 0
    else:
        student, teacher, samples = args.model, args.reference or args.model, True
        teacher = teacher if args.kl_weight else None
    student, teacher = (model and written(config_of(model, made), folder) for model in (student, teacher))
    vocab_size = json.load(open(f"{student}/config.json"))["vocab_size"]
    launch = command.words[: command.words.index(f"{command.module}.py")]
    ranks = int(launch[launch.index("--nproc_per_node") + 1]) if "--nproc_per_node" in launch else 1
    head = scored * vocab_size * getattr(torch, args.dtype).itemsize
    if command.module == "train" and args.scores and not scored:  # made before this plan
        read_artifact(args.scores, "--scores", "score_teacher")
        head = os.path.getsize(os.path.join(args.scores, "head.safetensors"))
    about = student, teacher, head, vocab_size, prompt + args.max_response_tokens, ranks, gpu * 2**30, samples
    size, on = fit(args.activation_checkpointing, gpu, **training.memory_job(args, *about))
    return size / 2**30, on


@functools.cache
def fit(checkpointing, gpu, **job):
    return runs.plan.fit(job, checkpointing, gpu * 2**30)[:2]


def written(config, folder):
    """A directory below `folder` with this config.json."""
    text = json.dumps(config, sort_keys=True)
    path = os.path.join(folder, hashlib.sha256(text.encode()).hexdigest())
    os.makedirs(path, exist_ok=True)
    with open(f"{path}/config.json", "w", encoding="utf-8") as file:
        file.write(text)
    return path


# ----------------------------------------------------------------------------------------------------------
# Running


def state_of(command):
    """ "new", "unfinished" or "finished", from what is in --out."""
    if not command.args.out:
        return "new"
    artifacts = artifacts_of(command.module, command.args)
    finished = [is_finished(part, command.row) for part in artifacts]
    if all(finished):
        return "finished"
    begun = [os.path.isfile(os.path.join(part.out, "meta.partial.json")) for part in artifacts]
    return "unfinished" if any(finished) or any(begun) else "new"


def artifacts_of(module, args):
    """The args of each artifact that a command makes: an evaluation on several data sets makes several."""
    return list(evaluations_of(args)) if module == "evaluate" else [args]


def is_finished(args, row):
    """Whether args.out holds a finished artifact; one that was made with other flags is refused."""
    path = os.path.join(args.out, "meta.json")
    if not os.path.isfile(path):
        return False
    try:
        before = json.load(open(path, encoding="utf-8"))["args"]
        now = json.loads(json.dumps(vars(args)))
        changed = [name for name in now if name in before and before[name] != now[name]]
    except (ValueError, KeyError, TypeError) as error:
        refuse(f"{path} is damaged: {error!r}")
    for name in changed:
        if name not in MAY_DIFFER:
            flags = f"--{name} {before[name]!r}, and {row} wants {now[name]!r}"
            refuse(f"{args.out} is finished with {flags}: choose another --out, or remove what is there")
    return True


def shown(words, width=110):
    """The command as shell text, folded before flags to lines of at most `width` characters."""
    program, *flags = shlex.join(words).split(" --")
    lines = [program]
    for flag in flags:
        if len(f"{lines[-1]} --{flag} \\") > width:
            lines.append("   ")
        lines[-1] += f" --{flag}"
    return " \\\n".join(lines)


def missing_files(commands):
    """Problems that are neither there nor made by one of the commands."""
    made = {command.args.out for command in commands}
    paths = [getattr(command.args, name, None) for command in commands for name in ("data", "against")]
    paths = {path for path in paths if path and path.endswith(".jsonl") and os.path.dirname(path) not in made}
    return sorted(path for path in paths if not os.path.isfile(path))


def execute(words):
    """Runs a command to its end: its exit code. Ctrl-C is for the command, which may save before it ends."""
    before = signal.signal(signal.SIGINT, lambda *ignored: None)
    try:
        return subprocess.run(words, stdin=subprocess.DEVNULL).returncode
    finally:
        signal.signal(signal.SIGINT, before)


def show(command, state, spent, size, rate, taken, gpu):
    """Prints a command below what it costs. rate: TFLOPs per GPU hour; taken: of memory(), for training; gpu:
    GiB of a GPU."""
    about = [] if state == "new" else [state]
    if spent:
        about.append(f"{spent:.3g} TFLOPs, {spent / rate:.3g} GPU hours, {size / 1e9:.3g} GB")
    if taken:
        about.append(f"{taken[0]:.3g} GiB of GPU memory, checkpointing {'on' if taken[1] else 'off'}")
        about += [f"WARNING: more than the {gpu:g} GiB of --gpu_gib"] * (gpu < taken[0] < math.inf)
        about += ["WARNING: vLLM's share of it is less than its weights and one response"] * (
            taken[0] == math.inf
        )
    if about:
        print(f"# {'; '.join(about)}")
    print(shown(command.words))


def main(args):
    commands, made, row = read_commands(sys.stdin), {}, None
    states = [state_of(command) for command in commands]
    rate = args.tflops_per_second * 3600
    count, all_spent, all_size, too_large = 0, 0.0, 0, []
    folder = tempfile.TemporaryDirectory()
    for command, state in zip(commands, states):
        if command.row != row:
            row = command.row
            mean = f": responses of {command.tokens} tokens where nothing truncates them"
            print(f"\n# {row}{mean if command.tokens else ''}")
        spent, size = cost(command, args.prompt_tokens, made)
        taken = None
        if command.module in ("train", "grpo"):
            taken = memory(command, args.prompt_tokens, made, args.gpu_gib, folder.name)
            too_large += [command.row] * (taken[0] > args.gpu_gib and state != "finished")
        show(command, state, spent, size, rate, taken, args.gpu_gib)
        if state != "finished":
            count += 1
            all_spent += spent
            all_size += size
    print(f"\n# to do: {count} commands, {all_spent:.3g} TFLOPs, {all_spent / rate:.3g} GPU hours", end=" ")
    print(f"at {args.tflops_per_second:g} TFLOP/s, {all_size / 1e9:.3g} GB", flush=True)
    lacking = " ".join(missing_files(commands))
    if lacking:
        print(f"# missing: {lacking}; the head of the recipe says how to make them", flush=True)
    if too_large and not args.dry_run:
        rows = f"{' '.join(too_large)}: more memory than the {args.gpu_gib:g} GiB of --gpu_gib"
        refuse(f"{rows}, or than vLLM's share of it; give more --gpus, or shorter responses")
    if lacking and not args.dry_run:
        refuse(f"no such files: {lacking}")
    for command, state in zip(commands, states):
        if args.dry_run or state == "finished":
            continue
        words = list(command.words)
        if state == "unfinished":
            words.append("--overwrite" if command.module == "recipes.dedup" else "--resume")
        print(f"\n== {command.row}: {shown(words)}", flush=True)
        if code := execute(words):
            failed = f"{command.row}: {command.module} ended with exit code {code}"
            refuse(f"{failed}; run the recipe again to resume", code=1)


if __name__ == "__main__":
    main(get_args())
