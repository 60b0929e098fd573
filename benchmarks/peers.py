"""This project beside TRL, Liger and eager torch on a CPU: the same models, tokens and losses.

    pip install trl==1.16.0 liger-kernel==0.8.5
    python -m benchmarks.peers            # one table: seconds, memory, agreement, and the ratios

step    a training step of reverse KL: forward passes, loss, backward, clipping, AdamW; --vocab as in Qwen3.
        This project's includes the metrics of docs/metrics.md, which the others do not compute.
kl      the reverse KL alone from hidden states, with its gradients

Each contender runs in a process of its own, one after the other, --rounds times; a row has the median of its
iterations (the first is left out) and the largest resident memory above what its inputs take.
"""

import argparse
import functools
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time

import torch

from benchmarks import kernel_speed
from benchmarks.memory import resident
from reports.tables import markdown

LR, SEED = 1e-4, 0


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--vocab", type=int, default=151_936, help="rows of both heads")
    p.add_argument("--responses", type=int, default=8, help="of a batch")
    p.add_argument("--prompt_tokens", type=int, default=64, help="of each")
    p.add_argument("--response_tokens", type=int, default=256, help="of each")
    p.add_argument("--ragged", action="store_true", help="lengths from an eighth of --response_tokens to all")
    p.add_argument("--iterations", type=int, default=4)
    p.add_argument("--rounds", type=int, default=2)
    p.add_argument("--json", help="write all rows here")
    p.add_argument("--run", choices=sorted(CONTENDERS), help="run this contender in this process")
    p.add_argument("--models", help="directory of the two models, with --run")
    return p.parse_args(argv)


def make_models(args, path):
    """Random Qwen3 models with tied heads, of 41 and 81 million weights, most of them in the vocabulary."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from recipes.toy_world import make_tokenizer

    torch.manual_seed(SEED)
    for name, hidden, layers in (("student", 256, 4), ("teacher", 512, 6)):
        sizes = {"vocab_size": args.vocab, "hidden_size": hidden, "intermediate_size": 3 * hidden}
        heads = {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 128, "head_dim": 64}
        tokens = {"bos_token_id": None, "pad_token_id": 0, "eos_token_id": 2}
        more = {"num_hidden_layers": layers, "tie_word_embeddings": True, "initializer_range": 0.05}
        model = Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, **tokens, **more))
        model.get_input_embeddings().weight.data.mul_(3)  # sharper distributions
        model.save_pretrained(f"{path}/{name}")
        make_tokenizer().save_pretrained(f"{path}/{name}")


def batch_of(args):
    """Prompts and responses, lists of token ids."""
    rng = random.Random(1)
    low = args.response_tokens // 8 if args.ragged else args.response_tokens
    lengths = [rng.randint(low, args.response_tokens) for _ in range(args.responses)]
    draw = lambda count: [rng.randrange(3, args.vocab) for _ in range(count)]
    return [draw(args.prompt_tokens) for _ in lengths], [draw(length) for length in lengths]


# ---------------------------------------------------------------------------------------------------------
# Contenders: functions that call tick() when their work begins, and tick(loss) after each iteration


def step_ours(args, tick):
    import train
    from distil import batches, models, teacher
    from runs import training

    words = f"--prefix student --kl reverse --student x --teacher x --data x --out x --lr {LR} --warmup 0"
    flags = train.get_args([*words.split(), "--normalize", "token", "--dtype", "float32"])
    live = teacher.live_teacher(f"{args.models}/teacher", "float32", args.vocab)
    student = models.load_model(f"{args.models}/student", "student", "float32")
    optimizer = torch.optim.AdamW(student.parameters(), weight_decay=0.0, fused=True)
    batch = [models.Response(*ids, False) for ids in zip(*batch_of(args))]
    weights = batches.token_weights(batch, flags.normalize)
    tick()
    for step in range(args.iterations):
        loss_of = functools.partial(train.micro_batch_loss, flags, student, live, args.vocab, [])
        limit = flags.micro_batch_tokens
        sums = batches.accumulate_gradients(student.device, batch, weights, limit, loss_of)
        training.optimizer_step(flags, student, optimizer, step, [])
        tick(sums["loss"])


def step_trl(args, tick):
    """trl.DistillationTrainer, which computes its divergence in chunks of tokens."""
    import datasets
    import trl
    from transformers import AutoTokenizer, TrainerCallback

    class Tick(TrainerCallback):
        def on_train_begin(self, *_, **__):
            tick()

        def on_step_end(self, *_, **__):
            tick(losses[-1])

    student, teacher = load_pair(args)
    work = {"per_device_train_batch_size": args.responses, "gradient_accumulation_steps": 1}
    work |= {"max_steps": args.iterations, "max_completion_length": args.response_tokens}
    rate = {"learning_rate": LR, "lr_scheduler_type": "constant", "weight_decay": 0.0, "max_grad_norm": 1.0}
    off = {"report_to": [], "save_strategy": "no", "gradient_checkpointing": False, "disable_tqdm": True}
    off |= {"bf16": False, "use_cpu": True, "shuffle_dataset": False, "output_dir": f"{args.models}/trl"}
    trainer = trl.DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=trl.DistillationConfig(beta=1.0, **work, **rate, **off),
        train_dataset=datasets.Dataset.from_dict({"prompt": ["a=1"] * args.responses * args.iterations}),
        processing_class=AutoTokenizer.from_pretrained(f"{args.models}/student"),
        callbacks=[Tick()],
    )
    prompts, responses = batch_of(args)
    trainer._generate = lambda inputs: (prompts, responses, None, None, [])  # both train on the same tokens
    compute, losses = trainer.compute_loss, []

    def compute_loss(*inputs, **named):
        found = compute(*inputs, **named)
        losses.append((found[0] if isinstance(found, tuple) else found).item())
        return found

    trainer.compute_loss = compute_loss
    trainer.train()


def step_eager(args, tick):
    """Whole logits of both models, log_softmax, torch's kl_div."""
    student, teacher = load_pair(args)
    optimizer = torch.optim.AdamW(student.parameters(), lr=LR, weight_decay=0.0)
    prompts, responses = batch_of(args)
    rows = [prompt + response for prompt, response in zip(prompts, responses)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    length = torch.tensor([len(row) for row in rows])[:, None]
    column = torch.arange(width)[None]
    predicts = (column >= args.prompt_tokens - 1) & (column < length - 1)
    tick()
    for _ in range(args.iterations):
        with torch.no_grad():
            log_p = teacher(input_ids=ids).logits[predicts].log_softmax(-1)
        log_q = student(input_ids=ids).logits[predicts].log_softmax(-1)
        loss = torch.nn.functional.kl_div(log_p, log_q, reduction="sum", log_target=True) / len(log_q)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tick(loss.item())


def load_pair(args):
    from transformers import AutoModelForCausalLM

    paths = [f"{args.models}/{name}" for name in ("student", "teacher")]
    return [AutoModelForCausalLM.from_pretrained(path, dtype="float32") for path in paths]


def kl_ours(*tensors):
    from streaming_kl import linear_streaming_kl

    return linear_streaming_kl(*tensors, fkl_weight=0.0, reduction="mean").loss


def kl_trl(student_hidden, student_head, teacher_hidden, teacher_head):
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    pair = student_hidden, student_head, None, teacher_hidden, teacher_head, None
    return ChunkedDivergenceFunction.apply(*pair, 1.0, 1.0)[0].mean()


def kl_liger(student_hidden, student_head, teacher_hidden, teacher_head):
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction

    target = torch.zeros(len(student_hidden), dtype=torch.long)
    pair = student_hidden, student_head, teacher_hidden, teacher_head, target, None, None
    weights = 0.0, 1.0, 1.0, -100, 1.0  # hard labels, soft labels, beta, ignored label, temperature
    return LigerFusedLinearJSDFunction.apply(*pair, *weights, False, 256)


def kl_eager(student_hidden, student_head, teacher_hidden, teacher_head):
    log_q = (student_hidden @ student_head.T).log_softmax(-1)
    log_p = (teacher_hidden @ teacher_head.T).log_softmax(-1)
    return torch.nn.functional.kl_div(log_p, log_q, reduction="sum", log_target=True) / len(log_q)


def kl_alone(function, args, tick):
    """The loss and its gradients for hidden states and head, for as many tokens as the batch has."""
    torch.manual_seed(SEED)
    tokens = sum(map(len, batch_of(args)[1]))
    tensors = []
    for width in (256, 512):
        tensors += [torch.randn(tokens, width), torch.randn(args.vocab, width).mul_(3 / width**0.5)]
    tick()
    for _ in range(args.iterations):
        pair = [tensor.detach().requires_grad_() for tensor in tensors[:2]]
        loss = function(*pair, *tensors[2:])
        loss.backward()
        tick(loss.item())


STEPS = {"this project": step_ours, "TRL": step_trl, "eager torch": step_eager}
KLS = {"this project": kl_ours, "TRL": kl_trl, "Liger": kl_liger, "eager torch": kl_eager}
CONTENDERS = {f"step, {name}": function for name, function in STEPS.items()}
CONTENDERS |= {f"kl, {name}": functools.partial(kl_alone, function) for name, function in KLS.items()}


# ---------------------------------------------------------------------------------------------------------


def run_one(args):
    """One contender in this process: prints its row as JSON."""
    seconds, losses, before, last = [], [], 0.0, 0.0

    def tick(loss=None):
        nonlocal last, before
        if loss is None:
            with open("/proc/self/clear_refs", "w", encoding="utf-8") as file:
                file.write("5")  # VmHWM begins anew
            before = resident("VmRSS")
        else:
            losses.append(loss)
            seconds.append(time.perf_counter() - last)
        last = time.perf_counter()

    CONTENDERS[args.run](args, tick)
    row = {"seconds": seconds, "losses": losses, "peak_gb": (resident("VmHWM") - before) / 1e9}
    print("ROW " + json.dumps(row), flush=True)


def main(args):
    if args.run:
        return run_one(args)
    versions = kernel_speed.versions("transformers", "trl")
    needs = {"TRL": "trl", "Liger": "liger-kernel"}
    names = [name for name in CONTENDERS if versions.get(needs.get(name.split(", ")[1], "torch"))]
    for name in set(CONTENDERS) - set(names):
        print(f"left out: {name} is not installed")
    rows = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as path:
        make_models(args, path)
        for turn in range(args.rounds):
            for name in names:
                command = [sys.executable, "-m", "benchmarks.peers", *sys.argv[1:], "--run", name]
                done = subprocess.run([*command, "--models", path], capture_output=True, text=True)
                found = [line for line in done.stdout.splitlines() if line.startswith("ROW ")]
                if not found:
                    raise SystemExit(f"{name} failed:\n{done.stderr}")
                rows[name].append(json.loads(found[0][4:]))
                print(f"round {turn + 1}: {name} {rows[name][-1]['seconds']}", file=sys.stderr, flush=True)
    tokens = sum(map(len, batch_of(args)[1]))
    about = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    print(f"{tokens} response tokens, vocabulary {args.vocab}, {torch.get_num_threads()} threads; {about}\n")
    print(table(rows))
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"versions": versions, "flags": vars(args), "rows": rows}, file, indent=1)


def table(rows):
    """Markdown: each contender beside this project on the same work."""
    lines = [
        ["work", "by", "seconds", "ratio", "peak GB above its inputs", "ratio", "first loss", "last loss"]
    ]
    lines.append(["---"] * len(lines[0]))
    for name, runs in rows.items():
        work, by = name.split(", ")
        ours, own = (summary(runs) for runs in (rows[f"{work}, this project"], runs))
        cells = [f"{own[0]:.2f}", f"{own[0] / ours[0]:.2f}", f"{own[1]:.2f}", f"{own[1] / ours[1]:.2f}"]
        lines.append([work, by, *cells, *(f"{runs[0]['losses'][i]:.6f}" for i in (0, -1))])
    return markdown(lines)


def summary(runs):
    """Median seconds of all iterations but the first of each run; the largest peak."""
    seconds = [value for run in runs for value in run["seconds"][1:] or run["seconds"]]
    return statistics.median(seconds), max(run["peak_gb"] for run in runs)


if __name__ == "__main__":
    main(get_args())
