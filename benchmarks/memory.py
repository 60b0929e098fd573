"""Peak memory of each stage against responses, their length, batch and vocabulary; and what a rank holds.

    OMP_NUM_THREADS=1 python -m benchmarks.memory --out out/memory
    OMP_NUM_THREADS=1 python -m benchmarks.memory --out out/memory --against_plan

prints two Markdown tables. The models have the toy architecture (student 64 wide, teacher 128, two layers),
random weights and a large vocabulary. The base point has 16 responses of 128 tokens, a vocabulary of 32,768
tokens, and batches of 16 responses in sampling (--sample_batch) and of 600 tokens in forward passes
(--micro_batch_tokens; a response of 1024 tokens exceeds it alone). Each other point changes one of these.
Training makes two steps of one micro-batch each, without the preflight.

Every point runs in a process of its own. Its peak is, on a GPU, the most that torch has allocated; on a
CPU, the largest resident set, minus that after the imports. Subtracted is the peak of a process that only
loads and saves what the stage holds: tokenizers, models and, where one is trained, gradients and moments.

--against_plan (Linux) compares train.py's own plan of its memory (runs/plan.py) with the peak of two steps
of several micro-batches, sampling included: the largest resident set minus that after a run of a tiny world.
glibc is told to return freed blocks at once; by itself it keeps many of those below 32 MiB.
"""

import argparse
import ctypes
import functools
import json
import os
import random
import resource
import socket
import sys
import types
from typing import NamedTuple

import torch

import evaluate
import grpo
import rollout
import score_teacher
import train
from distil import models, ranks
from distil.artifacts import add_output_flags, finish_artifact, start_artifact
from distil.models import Response, load_model
from distil.problems import load_problems
from distil.prompts import load_tokenizer, render_prompt, tokenizer_sha256
from distil.rollouts import finish_rollouts, write_rollouts
from recipes import toy_world
from reports.tables import markdown
from runs import plan

CONTEXT = torch.multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
COMMON = "--engine hf --dtype float32 --max_response_tokens {length}"
PROBLEMS = "--data {data} --limit {responses}"
SAMPLE = f"{COMMON} {PROBLEMS} --sample_batch {{rows}} --n 1"
TRAIN = f"{COMMON} --steps 2 --micro_batch_tokens {{tokens}}"


class Stage(NamedTuple):
    """flags: with names of point() in braces; models: what it loads; trained: whether it trains the first."""

    module: types.ModuleType
    flags: str
    models: tuple
    trained: bool = False


STAGES = {
    "rollout": Stage(rollout, f"--model {{teacher}} {SAMPLE}", ("teacher",)),
    "score_teacher": Stage(
        score_teacher,
        "--teacher {teacher} --rollouts {rollouts} --dtype float32 --shard_tokens 2048 "
        "--micro_batch_tokens {tokens}",
        ("teacher",),
    ),
    "train, teacher prefix": Stage(
        train,
        "--prefix teacher --kl forward --student {student} --rollouts {rollouts} --scores {scores} "
        f"--batch_size {{trained}} {TRAIN}",
        ("student",),
        trained=True,
    ),
    "train, student prefix": Stage(
        train,
        "--prefix student --kl reverse --student {student} --teacher {teacher} "
        f"{PROBLEMS} --batch_size {{trained}} {TRAIN}",
        ("student", "teacher"),
        trained=True,
    ),
    "grpo": Stage(
        grpo,
        f"--model {{student}} {PROBLEMS} --n 2 --batch_size {{groups}} --kl_weight 0.1 {TRAIN}",
        ("student", "student"),
        trained=True,
    ),
    "evaluate": Stage(
        evaluate, f"--model {{student}} --micro_batch_tokens {{tokens}} {SAMPLE}", ("student",)
    ),
}
BASE = {"responses": 16, "length": 128, "batch": 1, "vocabulary": 2**15}
POINTS = {  # the table's columns
    "base": {},
    "responses x4": {"responses": 64},
    "responses x16": {"responses": 256},
    "length x4": {"length": 512},
    "length x8": {"length": 1024},
    "batch x2": {"batch": 2},
    "batch x4": {"batch": 4},
    "vocabulary x2": {"vocabulary": 2**16},
    "vocabulary x4": {"vocabulary": 2**17},
}


TOY = (("teacher", (128, 2, 4)), ("student", (64, 2, 2)))


class Size(NamedTuple):
    """Of a run that is compared with its plan."""

    vocabulary: int
    student: tuple  # hidden, layers, heads
    teacher: tuple
    tokens: int  # of a micro-batch
    flags: str


SIZES = [
    Size(32_000, (256, 4, 8), (384, 4, 12), 1024, "--dtype float32"),
    Size(64_000, (384, 8, 12), (512, 4, 16), 1536, "--dtype float32"),
    Size(152_000, (512, 8, 16), (384, 4, 12), 1024, "--dtype float32 --activation_checkpointing on"),
]


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_output_flags(p, resume=False)
    p.add_argument("--against_plan", action="store_true", help="compare plans with peaks, for three sizes")
    return p.parse_args(argv)


@functools.cache
def in_process(function, *args):
    """Peak bytes of function(*args) above those at its start, in its own process; each call is made once."""
    receive, send = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=measure, args=(send, function, args))
    process.start()
    send.close()
    value = receive.recv()  # EOFError if it failed; its message is on the screen
    process.join()
    return value


def measure(send, function, args):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    function(*args)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    peak = unit * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    send.send(torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak)


def make_world(out, size, shapes=TOY, sharp=True):
    """Problems, a tokenizer of `size` tokens, and untrained models: (name, (hidden, layers, heads)) each."""
    words = toy_world.WORDS
    fillers = size - len(words) - len(toy_world.SPECIAL)
    toy_world.WORDS = words + [chr(0x10000 + i) for i in range(fillers)]
    tokenizer = toy_world.make_tokenizer()
    toy_world.WORDS = words
    for name, shape in shapes:
        model = toy_world.make_model(tokenizer, *shape)
        model.config.max_position_embeddings = 2048
        if sharp:
            with torch.no_grad():
                embeddings = model.get_input_embeddings().weight.mul_(4)  # distributions that are not flat
                embeddings[tokenizer.all_special_ids] = 0  # nothing stops
        model.save_pretrained(os.path.join(out, name))
        tokenizer.save_pretrained(os.path.join(out, name))
    with open(os.path.join(out, "problems.jsonl"), "w", encoding="utf-8") as file:
        for i in range(1000):
            file.write(json.dumps({"problem": f"a={i % 10} b={i // 10 % 10}", "answer": "0"}) + "\n")


def make_rollouts(out, world, responses, length):
    """A rollouts artifact of random tokens."""
    args = argparse.Namespace(out=out, resume=False, overwrite=True)
    rng = random.Random(0)
    tokenizer = load_tokenizer(os.path.join(world, "teacher"), "-")
    problems = load_problems(os.path.join(world, "problems.jsonl"), responses)
    start_artifact(args)
    with open(os.path.join(out, "rollouts.jsonl.tmp"), "w", encoding="utf-8") as file:
        for problem in problems:
            prompt = render_prompt(tokenizer, problem["problem"])
            response_ids = [rng.randrange(3, len(tokenizer)) for _ in range(length)]
            response = Response(prompt, response_ids, truncated=True)
            write_rollouts(file, tokenizer, problem, [response])
    finish_rollouts(args, tokenizer, model="random", stop_ids=[tokenizer.eos_token_id])


def hold(out, trained, *models):
    """Loads and saves what a stage does, with gradients and moments where the first model is trained."""
    tokenizers = [load_tokenizer(path, "-") for path in (models[0], models[-1])]
    tokenizer_sha256(tokenizers[0])
    first, *others = [load_model(path, "-", "float32") for path in models]
    if trained:
        optimizer = torch.optim.AdamW(first.parameters())
        for parameter in first.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        first.save_pretrained(out)
    tokenizers[0].save_pretrained(out)


def run(module, words, log):
    sys.stdout = sys.stderr = open(log, "a", encoding="utf-8")
    train.preflight.preflight = lambda *args: None
    module.main(module.get_args(words.split()))


def point(out, name, responses, length, batch, vocabulary):
    """MB of a stage beyond what it holds."""
    stage, log = STAGES[name], os.path.join(out, "log.txt")
    if stage.module is not train:
        responses = max(responses, 16 * batch)  # enough to fill a batch
    world = os.path.join(out, f"world_{vocabulary}")
    in_process(make_world, world, vocabulary)
    values = {
        "responses": responses,
        "length": length,
        "tokens": 600 * batch,
        "rows": 16 * batch,
        "trained": max(1, 512 * batch // length),
        "groups": max(1, 256 * batch // length),
        "teacher": f"{world}/teacher",
        "student": f"{world}/student",
        "data": f"{world}/problems.jsonl",
        "rollouts": f"{world}/rollouts_{responses}_{length}",
        "scores": f"{world}/scores_{responses}_{length}",
    }
    if "{rollouts}" in stage.flags:
        in_process(make_rollouts, values["rollouts"], world, responses, length)
    if "{scores}" in stage.flags:
        flags = STAGES["score_teacher"].flags.format(**values | {"tokens": 600})
        in_process(run, score_teacher, f"{flags} --out {values['scores']}", log)
    held = in_process(hold, f"{out}/held", stage.trained, *(values[model] for model in stage.models))
    words = f"{stage.flags.format(**values)} --overwrite --out {out}/run"
    return (in_process(run, stage.module, words, log) - held) / 1e6


def resident(name):
    """Bytes of a line of /proc/self/status: VmRSS now, VmHWM the most."""
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(name))


def against_plan(send, out, size):
    """Sends MiB of train.py's plan, its parts, and the peak beyond what a run of a tiny world leaves."""
    ctypes.CDLL(None).mallopt(-3, 2**16)  # M_MMAP_THRESHOLD: glibc returns each freed block of 64 KiB or more
    words = "--prefix student --kl reverse --engine hf --steps 2 --batch_size 16 --max_response_tokens"
    parts, memory_of = [], plan.memory

    def recorded(**job):
        parts[:] = memory_of(**job)
        return parts

    plan.memory = recorded
    for world, tokens, more in (("tiny", 256, "--dtype float32"), ("world", size.tokens, size.flags)):
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak is what there is now
        base, path = resident("VmRSS"), os.path.join(out, world)
        data = f"--student {path}/student --teacher {path}/teacher --data {path}/problems.jsonl"
        limit = f"{tokens // 5} --micro_batch_tokens {tokens} --overwrite --out {out}/run"  # 5 micro-batches
        run(train, f"{words} {limit} {data} {more}", os.path.join(out, "log.txt"))
    stays, goes = ([size / 2**20 for _, size, _ in rows] for rows in parts)
    send.send([sum(stays) + max(goes), sum(stays), max(goes), (resident("VmHWM") - base) / 2**20])


def local_bytes(tensor):
    """Bytes of a tensor, or of this rank's shard of it."""
    return tensor.to_local().nbytes if hasattr(tensor, "to_local") else tensor.nbytes


def as_rank(rank, count, port, directory, out):
    """Writes the MB of weights, gradients and moments that this rank holds after a step."""
    os.environ |= {  # what torchrun sets
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "memory",
    }
    ranks.start()
    model = ranks.load_sharded(directory, "-", "float32", trained=True)
    optimizer = torch.optim.AdamW(model.parameters())
    models.response_hidden(model, [models.Response([3, 4], [5, 6, 7], False)]).sum().backward()
    optimizer.step()
    weights = list(model.parameters())
    gradients = [weight.grad for weight in weights]
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    held = [sum(map(local_bytes, tensors)) / 1e6 for tensors in (weights, gradients, moments)]
    with open(os.path.join(out, f"{count}_{rank}.json"), "w") as file:
        json.dump(held, file)
    ranks.end()


def memory_of_ranks(out, count):
    """MB of weights, gradients and moments: the largest of `count` ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    teacher = os.path.join(out, f"world_{BASE['vocabulary']}", "teacher")
    start = torch.multiprocessing.start_processes
    start(as_rank, (count, port, teacher, out), nprocs=count, start_method=CONTEXT.get_start_method())
    held = [json.load(open(os.path.join(out, f"{count}_{rank}.json"))) for rank in range(count)]
    return [max(sizes) for sizes in zip(*held)]


def table_against_plan(out):
    lines = [["weights", "vocabulary", "tokens", "flags", "plan MiB", "passes", "peak MiB", "peak / plan"]]
    lines.append(["---"] * len(lines[0]))
    in_process(make_world, os.path.join(out, "tiny"), 500)
    for size in SIZES:
        shapes = tuple(zip(("student", "teacher"), (size.student, size.teacher)))
        in_process(make_world, os.path.join(out, "world"), size.vocabulary, shapes, False)
        receive, send = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(target=against_plan, args=(send, out, size))
        process.start()
        send.close()
        planned, _, passes, peak = receive.recv()
        process.join()
        weights = os.path.getsize(os.path.join(out, "world/student/model.safetensors")) / 4e6
        numbers = [f"{planned:.0f}", f"{passes:.0f}", f"{peak:.0f}", f"{peak / planned:.3f}"]
        lines.append([f"{weights:.0f} M", str(size.vocabulary), str(size.tokens), size.flags, *numbers])
        print(" ".join(lines[-1]), flush=True)
    print(markdown(lines))


def main(args):
    start_artifact(args)
    if args.against_plan:
        table_against_plan(args.out)
        return finish_artifact(args, "memory", [])
    lines = [["MB beyond what is held", *POINTS], ["---"] * (1 + len(POINTS))]
    for name in STAGES:
        found = [point(args.out, name, **BASE | change) for change in POINTS.values()]
        lines.append([name, *(f"{size:.0f}" for size in found)])
        print(" ".join(lines[-1]), flush=True)
    print(markdown(lines))
    lines = [["ranks", "weights MB", "gradients MB", "moments MB"], ["---"] * 4]
    for count in (1, 2, 4):
        if torch.cuda.is_available() and count > torch.cuda.device_count():
            break
        lines.append([str(count), *(f"{size:.2f}" for size in memory_of_ranks(args.out, count))])
    print(markdown(lines))
    finish_artifact(args, "memory", [])


if __name__ == "__main__":
    main(get_args())
