"""Peak memory of each stage against responses, response length, batch and vocabulary; and what a rank holds. Two Markdown tables.

    OMP_NUM_THREADS=1 python -m benchmarks.memory --out out/memory

The toy architecture (student 64 wide, teacher 128, two layers) with random weights and a large vocabulary. One thing is changed at
a time from: 16 responses of 128 tokens, a vocabulary of 32,768 tokens, batches of 16 responses in sampling (--sample_batch) and of
600 tokens in forward passes (--micro_batch_tokens), which a response of 1024 tokens exceeds alone. A point is a process of its own:
on a GPU the most that torch has allocated, on a CPU the largest resident set above that after the imports. Subtracted is the peak
of a process that only loads and saves what the stage does: tokenizers, models and, where one is trained, gradients and moments.
Training makes two steps with a micro-batch each, without the preflight.
"""

import argparse
import functools
import json
import os
import random
import resource
import socket
import sys

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
from distil.prompts import load_tokenizer, render_prompt, stop_ids, tokenizer_sha256
from distil.report import markdown
from distil.rollouts import finish_rollouts, write_rollouts
from recipes import toy_world

CONTEXT = torch.multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
FLAGS = "--engine hf --dtype float32 --max_response_tokens {length}"
SAMPLE = FLAGS + " --data {data} --limit {responses} --sample_batch {rows} --n 1"
TRAIN = FLAGS + " --steps 2 --micro_batch_tokens {tokens}"
STAGES = {  # file, models that it loads, whether the first is trained, flags
    "rollout": (rollout, ["teacher"], False, "--model {teacher} " + SAMPLE),
    "score_teacher": (
        score_teacher,
        ["teacher"],
        False,
        "--teacher {teacher} --rollouts {rollouts} --dtype float32 "
        "--shard_tokens 2048 --micro_batch_tokens {tokens}",
    ),
    "train, teacher prefix": (
        train,
        ["student"],
        True,
        "--prefix teacher --kl forward --student {student} --rollouts {rollouts} "
        "--scores {scores} --batch_size {trained} " + TRAIN,
    ),
    "train, student prefix": (
        train,
        ["student", "teacher"],
        True,
        "--prefix student --kl reverse --student {student} "
        "--teacher {teacher} --data {data} --limit {responses} --batch_size {trained} " + TRAIN,
    ),
    "grpo": (
        grpo,
        ["student", "student"],
        True,
        "--model {student} --data {data} --limit {responses} --n 2 --batch_size {groups} "
        "--kl_weight 0.1 " + TRAIN,
    ),
    "evaluate": (evaluate, ["student"], False, "--model {student} --micro_batch_tokens {tokens} " + SAMPLE),
}
BASE = {"responses": 16, "length": 128, "batch": 1, "vocabulary": 2**15}
POINTS = {
    "MB": {},
    "responses x4": {"responses": 64},
    "x16": {"responses": 256},
    "length x4": {"length": 512},
    "x8": {"length": 1024},
    "batch x2": {"batch": 2},
    "x4": {"batch": 4},
    "vocabulary x2": {"vocabulary": 2**16},
    "x4 ": {"vocabulary": 2**17},
}


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_output_flags(p, resume=False)
    return p.parse_args(argv)


@functools.cache
def in_process(function, *args):
    """Bytes at the peak of function(*args) above those at its begin, in a process of its own; the same call is made once."""
    receive, send = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=measure, args=(send, function, args))
    process.start()
    send.close()
    value = receive.recv()  # EOFError where it failed; its message is on the screen
    process.join()
    return value


def measure(send, function, args):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    function(*args)
    peak = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    send.send(torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak)


def make_world(out, size):
    """Problems, a tokenizer of `size` tokens, and the two untrained models."""
    words, toy_world.WORDS = (
        toy_world.WORDS,
        toy_world.WORDS + [chr(0x10000 + i) for i in range(size - len(toy_world.WORDS) - 3)],
    )
    tokenizer, toy_world.WORDS = toy_world.make_tokenizer(), words
    for name, shape in {"teacher": (128, 2, 4), "student": (64, 2, 2)}.items():
        model = toy_world.make_model(tokenizer, *shape)
        model.config.max_position_embeddings = 2048
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(4)[tokenizer.all_special_ids] = (
                0  # distributions with a signal; nothing stops
            )
        model.save_pretrained(os.path.join(out, name))
        tokenizer.save_pretrained(os.path.join(out, name))
    with open(os.path.join(out, "problems.jsonl"), "w", encoding="utf-8") as file:
        for i in range(1000):
            file.write(json.dumps({"problem": f"a={i % 10} b={i // 10 % 10}", "answer": "0"}) + "\n")


def make_rollouts(out, world, responses, length):
    """A rollouts artifact of random tokens."""
    args, rng = argparse.Namespace(out=out, resume=False, overwrite=True), random.Random(0)
    tokenizer = load_tokenizer(os.path.join(world, "teacher"), "-")
    problems = load_problems(os.path.join(world, "problems.jsonl"), responses)
    start_artifact(args)
    with open(os.path.join(out, "rollouts.jsonl.tmp"), "w", encoding="utf-8") as file:
        for problem in problems:
            ids = [rng.randrange(3, len(tokenizer)) for _ in range(length)]
            response = Response(render_prompt(tokenizer, problem["problem"]), ids, truncated=True)
            write_rollouts(file, tokenizer, [problem], [[response]])
    finish_rollouts(args, tokenizer, model="random", stop_ids=stop_ids(tokenizer))


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


def run(stage, words, log):
    sys.stdout = sys.stderr = open(log, "a", encoding="utf-8")
    train.first_look = lambda *args: None
    stage.main(stage.get_args(words.split()))


def point(out, name, responses, length, batch, vocabulary):
    """MB of a stage beyond what it holds."""
    stage, models, trained, flags = STAGES[name]
    world = os.path.join(out, f"world_{vocabulary}")
    in_process(make_world, world, vocabulary)
    if "prefix" not in name:
        responses = max(responses, 16 * batch)  # enough to fill a batch
    sizes = {
        "tokens": 600 * batch,
        "rows": 16 * batch,
        "trained": max(1, 512 * batch // length),
        "groups": max(1, 256 * batch // length),
    }
    paths = {
        "teacher": os.path.join(world, "teacher"),
        "student": os.path.join(world, "student"),
        "data": os.path.join(world, "problems.jsonl"),
        "rollouts": os.path.join(world, f"rollouts_{responses}_{length}"),
        "scores": os.path.join(world, f"scores_{responses}_{length}"),
    }
    if "{rollouts}" in flags:
        in_process(make_rollouts, paths["rollouts"], world, responses, length)
    if "{scores}" in flags:
        make = STAGES["score_teacher"][3] + " --out " + paths["scores"]
        in_process(run, score_teacher, make.format(**paths, tokens=600), os.path.join(out, "log.txt"))
    words = f"{flags} --overwrite --out {os.path.join(out, 'run')}".format(
        **paths, **sizes, responses=responses, length=length
    )
    held = in_process(hold, os.path.join(out, "held"), trained, *(paths[model] for model in models))
    return (in_process(run, stage, words, os.path.join(out, "log.txt")) - held) / 1e6


def as_rank(rank, count, port, directory, out):
    """Writes the bytes of weights, gradients and moments that this rank holds after a step."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "memory",
    }  # what torchrun sets
    ranks.start()
    model = ranks.load_sharded(directory, "-", "float32", trained=True)
    optimizer = torch.optim.AdamW(model.parameters())
    models.response_hidden(model, [[3, 4]], [[5, 6, 7]]).sum().backward()
    optimizer.step()
    parameters = list(model.parameters())
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    held = [
        [getattr(tensor, "to_local", lambda: tensor)().nbytes for tensor in tensors]
        for tensors in (parameters, [parameter.grad for parameter in parameters], moments)
    ]
    with open(os.path.join(out, f"{count}_{rank}.json"), "w") as file:
        json.dump([sum(sizes) / 1e6 for sizes in held], file)
    ranks.end()


def main(args):
    start_artifact(args)
    lines = [["MB beyond what is held", *POINTS], ["---"] * (1 + len(POINTS))]
    for name in STAGES:
        lines.append([name, *(f"{point(args.out, name, **BASE | change):.0f}" for change in POINTS.values())])
        print(" ".join(lines[-1]), flush=True)
    print(markdown(lines))
    directory, lines = os.path.join(args.out, f"world_{BASE['vocabulary']}", "teacher"), []
    for count in (1, 2, 4):
        if torch.cuda.is_available() and count > torch.cuda.device_count():
            break
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        torch.multiprocessing.start_processes(
            as_rank, (count, port, directory, args.out), nprocs=count, start_method=CONTEXT.get_start_method()
        )
        held = [json.load(open(os.path.join(args.out, f"{count}_{rank}.json"))) for rank in range(count)]
        lines.append([str(count), *(f"{max(sizes):.2f}" for sizes in zip(*held))])
    print(markdown([["ranks", "weights MB", "gradients MB", "moments MB"], ["---"] * 4, *lines]))
    finish_artifact(args, "memory", [])


if __name__ == "__main__":
    main(get_args())
