"""What train.py and grpo.py share: flags, memory, optimizer, evaluations, checkpoints, costs.

A run directory grows as the run goes on:

    metrics.jsonl    a row for each step
    evals.jsonl      a row for each evaluation
    gates.jsonl      a row for each decision of the curriculum
    step_000100/     a checkpoint to resume from: a Hugging Face directory with optimizer and checkpoint.json
    best/            --keep_best: the same without the optimizer, of the best evaluation so far
    final/           the result: the same without the optimizer
"""

import json
import math
import os
import resource
import shutil
import sys
import time

import torch
from safetensors.torch import save_file

from distil import artifacts, flags, models, ranks
from distil.evaluation import EVAL_SAMPLING, evaluate
from distil.jsonl import finite
from distil.models import autocast, context_of, default_dtype, load_model
from distil.problems import asked, load_problems
from distil.prompts import encode_problems, template_sha256, tokenizer_sha256
from distil.sampling import sample, update_engine
from distil.vllm_engine import load_vllm
from runs import plan, track
from runs.checkpoints import (
    checkpoints,
    files_in,
    link,
    load_optimizer,
    on_rank_0,
    optimizer_state,
    rewind_log,
)
from runs.flops import for_file, text_of

LOGS = ("metrics.jsonl", "evals.jsonl", "gates.jsonl")


def add_training_flags(parser, steps, batch_size, lr):
    """The flags that train.py and grpo.py share."""
    p = parser.add_argument_group("optimisation")
    p.add_argument("--steps", type=flags.positive_int, default=steps, help="optimizer steps")
    p.add_argument("--batch_size", type=flags.positive_int, default=batch_size, help="problems or responses")
    p.add_argument("--lr", type=flags.positive, default=lr, help="the largest, after the warm-up")
    schedules, falls_help = ["constant", "linear", "cosine"], "after the warm-up; the others fall towards 0"
    p.add_argument("--lr_schedule", choices=schedules, default="constant", help=falls_help)
    p.add_argument("--warmup", type=flags.fraction, default=0.05, help="share of steps in which lr rises")
    p.add_argument("--weight_decay", type=flags.non_negative, default=0.0, help="AdamW's, of all weights")
    p.add_argument("--max_grad_norm", type=flags.positive, default=1.0, help="of gradients, by clipping")
    tokens_help = "tokens in one forward pass"
    p.add_argument("--micro_batch_tokens", type=flags.positive_int, default=8192, help=tokens_help)
    modes, less_help = ["auto", "on", "off"], "keep less for the backward pass; auto: if it does not fit else"
    p.add_argument("--activation_checkpointing", choices=modes, default="auto", help=less_help)
    p.add_argument("--plan", action="store_true", help="print what memory the run takes, and end")
    dtypes = ["float32", "bfloat16"]
    p.add_argument("--dtype", choices=dtypes, default=default_dtype(), help="of passes; weights are float32")
    p.add_argument("--seed", type=flags.non_negative_int, default=42, help="of data order and sampling")
    p.add_argument("--engine_sleep", action="store_true", help="vLLM keeps no GPU memory between samplings")
    p = parser.add_argument_group("evaluations in training, logs, checkpoints")
    p.add_argument("--eval_data", type=flags.path, help="problems to evaluate on; as --data")
    p.add_argument("--eval_every", type=flags.non_negative_int, default=0, help="steps between them; 0: none")
    p.add_argument("--eval_n", type=flags.positive_int, default=4, help="responses for each problem")
    p.add_argument("--eval_max_response_tokens", type=flags.positive_int, help="default: as in training")
    p.add_argument("--keep_best", choices=["avg", "pass", "maj"], help="best/ is the best of evals by this")
    p.add_argument("--track", choices=["tensorboard", "wandb", "trackio"], help="show the logs there, too")
    p.add_argument("--log_every", type=flags.positive_int, default=1, help="print every N-th step")
    p.add_argument("--save_every", type=flags.non_negative_int, default=0, help="0: only when stopped")
    p.add_argument("--keep_checkpoints", type=flags.non_negative_int, default=0, help="the newest N (0: all)")


def check_training_flags(parser, args, curriculum=None):
    if bool(args.eval_data) != bool(args.eval_every or curriculum):
        parser.error("--eval_every and --eval_data go together")
    if args.keep_best and not args.eval_every:
        parser.error("--keep_best needs --eval_every")
    if args.lr_schedule != "constant" and args.steps > 1 and learning_rate(args, args.steps - 1) == args.lr:
        parser.error(f"--warmup {args.warmup}: leaves no step where --lr_schedule {args.lr_schedule} falls")


def memory_job(args, student, teacher, head, vocab_size, longest, n, device, samples):
    """What plan.memory() takes, for a run with these flags.

    longest: tokens of the longest prompt with its response; device: bytes of a GPU, None on a CPU; samples:
    whether training samples."""
    responses = args.batch_size * args.n
    tokens = min(max(args.micro_batch_tokens, longest), responses * longest)
    together = min(args.sample_batch, responses * getattr(args, "refresh_every", 1))
    job = {"student": student, "teacher": teacher, "head": head, "vocab_size": vocab_size, "n": n}
    job |= {"shape": (tokens // longest, tokens // (tokens // longest)), "sampled": (together, longest)}
    job |= {"dtype": args.dtype, "engine": args.engine if samples or args.eval_every else None}
    return job | {"pool": device and args.gpu_memory_utilization * device, "sleeps": args.engine_sleep}


def plan_memory(args, student, vocab_size, longest, other=None, samples=True, table=False):
    """Print or refuse the memory of a run; returns whether to checkpoint activations. --plan ends here.

    student: its directory; other: that of a second model, or of scores, which bring its head."""
    stored = os.path.join(other or "", "head.safetensors")
    head = os.path.getsize(stored) if os.path.isfile(stored) else 0
    teacher = None if os.path.isfile(os.path.join(other or "", "meta.json")) else other
    device = plan.device_bytes() if torch.cuda.is_available() else None
    about = student, teacher, head, vocab_size, longest, ranks.world_size(), device, samples
    checkpointing = plan.plan(memory_job(args, *about), args.activation_checkpointing, table or args.plan)
    if args.plan:
        raise SystemExit(0)
    return checkpointing


def clock():
    """Seconds, once the GPU has done what was asked of it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def mark():
    """A moment in the GPU's work, without waiting for it; on a CPU seconds."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(pairs):
    """The sum over pairs of marks. Waits for the GPU."""
    if not torch.cuda.is_available():
        return sum(end - start for start, end in pairs)
    torch.cuda.synchronize()
    return sum(start.elapsed_time(end) for start, end in pairs) / 1000


def peak_memory():
    """GiB: the most that torch has allocated on the GPU, or else that this process has had resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def learning_rate(args, step):
    """That of a step (from 0). No step has a rate of 0, in which it would train nothing.

    It rises to lr in W steps, the warm-up's share of all S. Then, with x = (step - W) / (S - W), it is lr,
    lr (1 - x) or lr (1 + cos(pi x)) / 2, as in transformers' get_*_schedule_with_warmup."""
    warmup = round(args.warmup * args.steps)
    x = max(0, step - warmup) / max(1, args.steps - warmup)
    share = {"constant": 1.0, "linear": 1 - x, "cosine": (1 + math.cos(math.pi * x)) / 2}[args.lr_schedule]
    return args.lr * min(share, (step + 1) / max(1, warmup))


def optimizer_step(args, model, optimizer, step, ids):
    """Warm-up, clip, update. Returns the gradient norm before clipping and the learning rate.

    A gradient that is not finite ends the run; the ids of the step's problems go to failed_step.json."""
    lr = learning_rate(args, step)
    for group in optimizer.param_groups:
        group["lr"] = lr
    ranks.reshard(model)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
    norm = ranks.full_tensor(norm).item()
    if norm != norm or norm == float("inf"):
        if ranks.rank() == 0:
            failed = {"step": step + 1, "grad_norm": str(norm), "ids": ids}
            artifacts.write_json(os.path.join(args.out, "failed_step.json"), failed)
        kept = f"{args.out} keeps its checkpoints and failed_step.json, the ids of the step's problems"
        artifacts.refuse(f"step {step + 1}: the gradient is {norm}; the run ends here. {kept}", code=1)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, lr


class Run:
    """What surrounds both training loops: model, optimizer, engine, evaluations, checkpoints, costs.

    config: a SamplingConfig. cell: {"name", "prefix", "kl"}, for tables. samples: whether it samples.
    longest, other: for plan_memory()."""

    def __init__(self, args, directory, tokenizer, config, cell, longest, other=None, samples=True):
        track.check_installed(args.track)
        self.args, self.tokenizer, self.cell, self.dropped = args, tokenizer, cell, {}
        self.vocab_size, self.logprobs, stops = config.vocab_size, config.logprobs, config.stop_ids
        self.name = os.path.basename(os.path.normpath(args.out))
        wanted = asked(args, args.eval_data)
        self.prompting = wanted.prompting
        if args.eval_data:
            self.eval_limit = limit = args.eval_max_response_tokens or args.max_response_tokens
            problems = load_problems(args.eval_data, columns=wanted.columns)
            about = tokenizer, wanted.prompting, self.vocab_size, context_of(directory)
            about += wanted.max_prompt_tokens, limit, "eval_max_response_tokens"
            self.problems, self.prompts, self.dropped["eval_data"] = encode_problems(problems, *about)
            self.sampling = config._replace(n=args.eval_n, top_k=0, logprobs="", **EVAL_SAMPLING)
        if args.tensor_parallel != 1:
            artifacts.refuse("--tensor_parallel: in training vLLM shares the trainer's GPU; use 1")
        if args.engine_sleep and args.engine != "vllm":
            artifacts.refuse("--engine_sleep: vLLM alone can sleep; use --engine vllm")
        self.checkpoint = checkpoint = ([None] + checkpoints(args.out))[-1] if args.resume else None
        if args.resume and not checkpoint and os.path.isfile(os.path.join(args.out, "meta.json")):
            why = "is finished without a checkpoint (--save_every): use its final/"
            artifacts.refuse(f"--resume: {args.out} {why}")
        state = artifacts.read_checkpoint(checkpoint, "--resume") if checkpoint else {"step": 0}
        self.first_step, self.curriculum = state["step"], state.get("curriculum")
        self.warned = False  # of a step without a gradient
        self.best = state.get("best")  # {"metric", "value", "step"} of the best evaluation so far
        costs = {name: state.get(name, 0) for name in ("tflops", "tflops_uncached", "response_tokens")}
        self.spent = {name: math.nan if cost is None else cost for name, cost in costs.items()}
        checkpointing = plan_memory(args, directory, self.vocab_size, longest, other, samples)
        start = checkpoint or directory
        self.model = ranks.load_sharded(start, "the starting model", "float32", trained=True)
        if checkpointing:
            models.checkpoint_activations(self.model)
            ranks.reshard(self.model)  # get_decoder() has gathered it
        from transformers import GenerationConfig

        # checkpoints end responses as this run does; the rest of a model's own file may not even be valid
        self.model.generation_config = GenerationConfig(eos_token_id=stops)
        self.config = self.model.config.to_dict()
        # arXiv 2605.16826 does not state its optimizer
        decay = args.weight_decay
        self.optimizer = torch.optim.AdamW(self.model.parameters(), weight_decay=decay, fused=True)
        if checkpoint:
            load_optimizer(os.path.join(checkpoint, "optimizer.safetensors"), self.model, self.optimizer)
        self.engine = self.load_engine(directory) if samples or args.eval_every else self.model

    def say(self, text):
        print(f"{self.name}: {text}", flush=True)

    def load_engine(self, directory):
        """vLLM; or the model itself; or, where that is sharded, a whole copy on each rank."""
        args = self.args
        if args.engine == "vllm":
            machine = args.dtype, args.tensor_parallel, args.gpu_memory_utilization, "float32"
            return load_vllm(directory, self.vocab_size, *machine, args.engine_sleep, self.logprobs)
        if ranks.world_size() > 1:
            return load_model(directory, "the starting model", "float32")
        return self.model

    def start(self):
        """Begin or go on with --out, in which nothing has been touched so far, and evaluate the start."""
        args = self.args
        ranks.barrier()  # every rank has found --out as it should be
        if ranks.rank() == 0:
            artifacts.start_artifact(args)
            for name in os.listdir(args.out):
                if name.endswith(".tmp") and name.startswith(("step_", "final", "best")):  # a killed save
                    shutil.rmtree(os.path.join(args.out, name))
            best = os.path.join(args.out, "best")
            shutil.rmtree(best, ignore_errors=True)
            if self.best:  # as it was then: every checkpoint has it
                shutil.copytree(os.path.join(self.checkpoint, "best"), best + ".tmp", copy_function=link)
                os.replace(best + ".tmp", best)
            last = self.first_step if self.checkpoint else -1  # what came after it comes again
            rows = {name: rewind_log(os.path.join(args.out, name), last) for name in LOGS}["metrics.jsonl"]
            rates = [learning_rate(args, int(row["step"]) - 1) for row in rows]
            if rates != [row.get("lr") for row in rows]:
                why = "other --steps, so another warm-up or fall; --lr_schedule constant --warmup 0: none"
                self.say(f"WARNING: an uninterrupted run would have had other learning rates ({why})")
        step = self.first_step + 1 if self.checkpoint else 0
        self.tracker = track.Tracker(None if ranks.rank() else args.track, args.out, vars(args), step)
        artifacts.defer_signals()
        stops = self.model.generation_config.eos_token_id
        self.say(f"{self.cell['name']}, engine {args.engine}, stop ids {stops}, ranks {ranks.world_size()}")
        if args.resume:
            self.say(f"resumed from {self.checkpoint or 'the start'}")
        if not self.first_step:
            self.evaluate(0)

    def sample(self, prompts, sampling, seed):
        """Responses of the model as it is now, n for each prompt."""
        update_engine(self.engine, self.model)
        with autocast(self.args.dtype):
            return sample(self.engine, prompts, sampling, seed)

    def measure(self, max_response_tokens):
        """Results of the model as it is now on --eval_data."""
        args = self.args
        update_engine(self.engine, self.model)
        sampling = self.sampling._replace(max_response_tokens=max_response_tokens)
        about = self.tokenizer, self.problems, self.prompts, sampling, args.seed, [args.eval_n]
        return evaluate(self.model, self.engine, *about, args.micro_batch_tokens, args.dtype)[0]

    def evaluate(self, step, last=False):
        """Evaluate and log the results, if it is time."""
        args = self.args
        if not args.eval_every or step % args.eval_every and not last:
            return
        results = self.measure(self.eval_limit)
        self.append("evals.jsonl", {"step": step, **results, **for_file(self.spent)})
        n, accuracy, pass_rate = args.eval_n, results["avg"], results["pass"][str(args.eval_n)]
        quality = f"Avg@{n} {accuracy:.3f}, Pass@{n} {pass_rate:.3f}"
        rest = f"length {results['length']:.1f}, entropy {results['entropy']:.3f}"
        self.say(f"step {step} evaluation: {quality}, {rest}")
        value = {"avg": accuracy, "pass": pass_rate, "maj": results["maj"][str(n)]}.get(args.keep_best)
        if args.keep_best and (not self.best or value > self.best["value"]):  # of equal ones the first
            self.best = {"metric": args.keep_best, "value": value, "step": step}
            self.save("best", step)

    def end_step(self, step, row, shown, nothing, last, can_stop=True):
        """Log a step's metrics, print those named in `shown`; evaluate and save when it is time.

        nothing: why a step may have no gradient, said the first time that one has none. If a signal has asked
        to stop, save and stop. can_stop: whether no sampled responses would be lost."""
        args = self.args
        if not row["grad_norm"] and not self.warned:
            self.warned = True
            self.say(f"WARNING: step {step} trains on nothing: {nothing}")
        row = {"step": step, **row, "peak_memory": peak_memory(), **for_file(self.spent)}
        self.append("metrics.jsonl", row)
        if step % args.log_every == 0 or last:
            values = "  ".join(f"{name} {row[name]:.4g}" for name in shown if name in row)
            phases = [f"{name[8:]} {value:.2f}" for name, value in row.items() if name.startswith("seconds_")]
            speed = f"{row['seconds']:.2f} s ({', '.join(phases)}), {row['tokens_per_second']:.0f} tokens/s"
            self.say(f"step {step}/{args.steps}  {values}  {speed}")
        self.evaluate(step, last)
        signal = ranks.largest(artifacts.stop_requested() or 0) if can_stop else 0
        if not last and (signal or args.save_every and step % args.save_every == 0):
            self.save(f"step_{step:06d}", step)
        if not last and signal:
            self.tracker.finish()
            artifacts.stop(args, signal)

    def append(self, name, row):
        """Add a row to a .jsonl log."""
        finite(row, f"step {row['step']}, {name}")
        if ranks.rank() == 0:
            with open(os.path.join(self.args.out, name), "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            self.tracker.log(name, row)

    def save(self, name, step):
        """Write a checkpoint, complete by rename; best/ and final/ without what only --resume needs."""
        path = os.path.join(self.args.out, name)
        resumable = name.startswith("step_")
        once = {name for name, _ in (*self.model.named_parameters(), *self.model.named_buffers())}  # if tied
        weights = on_rank_0((name, w) for name, w in ranks.full_weights(self.model) if name in once)
        moments = on_rank_0(optimizer_state(self.model, self.optimizer)) if resumable else None
        if ranks.rank():
            return
        for weight, tensor in weights.items():
            if not tensor.isfinite().all():
                what = f"step {step}: {weight} is not finite (too large a --lr?)"
                artifacts.refuse(f"{what}; {name} is not written, earlier checkpoints stay", code=1)
        shutil.rmtree(path, ignore_errors=True)  # of a run killed while it finished
        self.model.save_pretrained(path + ".tmp", state_dict=weights)
        self.tokenizer.save_pretrained(path + ".tmp")
        if resumable:
            save_file(moments, os.path.join(path + ".tmp", "optimizer.safetensors"))
        if resumable and self.best:
            best = os.path.join(self.args.out, "best")
            shutil.copytree(best, os.path.join(path + ".tmp", "best"), copy_function=link)
        files = {n: artifacts.file_sha256(os.path.join(path + ".tmp", n)) for n in files_in(path + ".tmp")}
        state = {"run": self.name, "cell": self.cell, "step": step, "curriculum": self.curriculum}
        state |= {**for_file(self.spent), "best": self.best, "files": files}
        artifacts.write_sealed(os.path.join(path + ".tmp", "checkpoint.json"), state)
        os.replace(path + ".tmp", path)
        if self.args.keep_checkpoints:
            for old in checkpoints(self.args.out)[: -self.args.keep_checkpoints]:
                shutil.rmtree(old)

    def finish(self, stage, step):
        """Write final/ and meta.json."""
        args = self.args
        self.save("final", step)
        if ranks.rank():
            return
        files = [n for n in files_in(args.out) if n in LOGS or n.split(os.sep)[0] in ("final", "best")]
        facts = {"cell": self.cell, "stop_ids": self.model.generation_config.eos_token_id, "best": self.best}
        facts |= for_file(self.spent)
        facts["tokenizer_sha256"] = tokenizer_sha256(self.tokenizer)
        facts["template_sha256"] = template_sha256(self.tokenizer, self.prompting)
        artifacts.finish_artifact(args, stage, files, dropped_problems=self.dropped, **facts)
        spent = f"{text_of(self.spent['tflops'])} TFLOPs, {self.spent['response_tokens']} response tokens"
        self.tracker.finish()
        self.say(f"{step} steps, {spent} -> {args.out}/final")
