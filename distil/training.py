"""What a training run is, whatever it minimises: its flags, order of data, optimizer steps, evaluations, checkpoints and costs.

train.py and grpo.py are the loops; this file is what they do alike. A run directory grows as it goes:

    metrics.jsonl    a row a step     evals.jsonl    a row an evaluation     gates.jsonl    a row a decision of the curriculum
    step_000100/     a checkpoint to resume from (Hugging Face directory, optimizer.safetensors, checkpoint.json)
    final/           the result (Hugging Face directory, checkpoint.json)
"""

import functools
import glob
import json
import os
import shutil
import time

import torch
from safetensors.torch import load_file, save_file

from distil import ranks
from distil.artifacts import (
    defer_signals,
    file_sha256,
    finish_artifact,
    read_checkpoint,
    refuse,
    rewind_log,
    start_artifact,
    stop,
    stop_requested,
    write_json,
    write_sealed,
)
from distil.evaluation import EVAL_SAMPLING, evaluate
from distil.models import context_of, default_dtype, load_model, output_head
from distil.problems import load_problems
from distil.prompts import encode_problems, template_sha256, tokenizer_sha256
from distil.sampling import derive_seed, push_weights, sample, sampling_from
from distil.vllm_engine import load_vllm

LOGS = ("metrics.jsonl", "evals.jsonl", "gates.jsonl")


def add_training_flags(p, steps, batch_size, lr):
    """The flags that train.py and grpo.py share."""
    p.add_argument("--steps", type=int, default=steps, help="optimizer steps")
    p.add_argument(
        "--batch_size", type=int, default=batch_size, help="problems (or stored responses) in a step"
    )
    p.add_argument("--lr", type=float, default=lr, help="constant after the warm-up")
    p.add_argument(
        "--warmup", type=float, default=0.05, help="share of the steps over which the learning rate rises"
    )
    p.add_argument("--max_grad_norm", type=float, default=1.0)
    p.add_argument(
        "--micro_batch_tokens", type=int, default=16384, help="tokens in one forward pass, padding included"
    )
    p.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default=default_dtype(),
        help="of forward passes; weights are float32",
    )
    p.add_argument("--seed", type=int, default=42)
    p.add_argument("--eval_data", help="problems evaluated in training")
    p.add_argument(
        "--eval_every",
        type=int,
        default=0,
        help="evaluate every N steps, and at the start and the end (0: never)",
    )
    p.add_argument("--eval_n", type=int, default=4, help="responses for each evaluation problem")
    p.add_argument(
        "--eval_max_response_tokens",
        type=int,
        help="limit of response tokens in evaluations (default: the run's own)",
    )
    p.add_argument(
        "--log_every", type=int, default=1, help="print every N-th step; metrics.jsonl has them all"
    )
    p.add_argument(
        "--save_every",
        type=int,
        default=0,
        help="save a checkpoint to resume from every N steps (0: only the last)",
    )
    p.add_argument("--keep_checkpoints", type=int, default=0, help="of these, keep the newest N (0: all)")


def check_training_flags(p, args):
    if bool(args.eval_data) != bool(args.eval_every or getattr(args, "curriculum", None)):
        p.error("--eval_every and --eval_data go together")
    args.eval_max_response_tokens = args.eval_max_response_tokens or args.max_response_tokens
    for name in (
        "steps",
        "batch_size",
        "micro_batch_tokens",
        "log_every",
        "eval_n",
        "eval_max_response_tokens",
    ):
        if getattr(args, name) < 1:
            p.error(f"--{name} must be at least 1")
    if args.keep_checkpoints < 0:
        p.error("--keep_checkpoints must be at least 0")


def tflops(config, prompt, response, forwards=0, generations=0):
    """TFLOPs of a model on one sequence (paper, appendix H.1), from the true projection sizes; multiply-add counts 2.

    Per token: N [2H (Q + 2 KV) + 2QH + 6HI] + 2HV, and 4QL a layer for attention; generation attends to half of L on average.
    A forward and backward pass is three forwards. config: a dict of the Hugging Face names."""
    hidden, layers, heads = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    q, kv, length = heads * head_dim, config["num_key_value_heads"] * head_dim, prompt + response
    layer = 2 * hidden * (q + 2 * kv) + 2 * q * hidden + 6 * hidden * config["intermediate_size"]
    dense, attention = layers * layer + 2 * hidden * config["vocab_size"], layers * 4 * q * length
    return length * (forwards * (dense + attention) + generations * (dense + attention / 2)) / 1e12


def clock():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def autocast(args):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.autocast(device, getattr(torch, args.dtype), enabled=args.dtype != "float32")


def batch_indices(count, batch_size, step, seed):
    """Indices of a step's items: epoch after epoch, each a permutation of its own. A function of the step, so nothing to save."""
    picked = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, place = divmod(position, count)
        picked.append(permutation(count, derive_seed(seed, "epoch", epoch))[place])
    return picked


@functools.lru_cache(maxsize=2)
def permutation(count, seed):
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def optimizer_step(args, model, optimizer, step, ids):
    """Warm-up, clip, step: (gradient norm before clipping, learning rate). A gradient that is not finite ends the run, with the ids
    of the step's problems in failed_step.json; a loss that is not finite has no finite gradient."""
    lr = args.lr * min(1.0, (step + 1) / max(1, round(args.warmup * args.steps)))
    for group in optimizer.param_groups:
        group["lr"] = lr
    ranks.reshard(model)
    norm = ranks.full_tensor(torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)).item()
    if norm != norm or norm == float("inf"):
        if ranks.rank() == 0:
            write_json(
                os.path.join(args.out, "failed_step.json"),
                {"step": step + 1, "grad_norm": str(norm), "ids": ids},
            )
        refuse(
            f"step {step + 1}: the gradient is {norm}; the run ends here. Its checkpoints are kept in {args.out}, the ids of the "
            "step's problems are in failed_step.json there",
            code=1,
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, lr


class Run:
    """What train.py and grpo.py do alike around their loops: model, optimizer, engine, evaluations, checkpoints, totals spent."""

    def __init__(self, args, directory, tokenizer, stops, cell, samples=True):
        self.args, self.tokenizer, self.cell, self.name = (
            args,
            tokenizer,
            cell,
            os.path.basename(os.path.normpath(args.out)),
        )
        if args.eval_data:
            self.problems = load_problems(args.eval_data)
            self.prompts = encode_problems(
                args, self.problems, tokenizer, context_of(directory), "eval_max_response_tokens"
            )
            self.sampling = sampling_from(args, tokenizer, stops, n=args.eval_n, top_k=0, **EVAL_SAMPLING)
        checkpoint = ([None] + checkpoints(args.out))[-1] if args.resume else None
        state = read_checkpoint(checkpoint, "--resume") if checkpoint else {"step": 0}
        self.first_step, self.curriculum = state["step"], state.get("curriculum")
        self.spent = {name: state.get(name, 0) for name in ("tflops", "tflops_uncached", "response_tokens")}
        self.model = ranks.load_sharded(
            checkpoint or directory, "the starting model", "float32", trained=True
        )
        self.model.generation_config.eos_token_id = (
            stops  # the checkpoint ends its responses as they end here
        )
        output_head(self.model, "the starting model")
        self.config = self.model.config.to_dict()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), weight_decay=0.0
        )  # PAPER: the optimizer is not stated
        if checkpoint:
            load_optimizer(os.path.join(checkpoint, "optimizer.safetensors"), self.model, self.optimizer)
        if args.tensor_parallel != 1:
            refuse(
                "--tensor_parallel: training gives its weights to a vLLM engine in its own process, on one GPU; use 1"
            )
        self.engine = self.model
        if (
            samples or args.eval_every
        ):  # pieces of a model cannot sample: then each rank samples from a whole copy
            if args.engine == "vllm":
                self.engine = load_vllm(args, directory)
            elif ranks.world_size() > 1:
                self.engine = load_model(directory, "the starting model", "float32")
        ranks.barrier()  # all have found --out as it should be
        if ranks.rank() == 0:
            start_artifact(args)
            for name in os.listdir(args.out):
                if name.startswith(("step_", "final")) and name.endswith(
                    ".tmp"
                ):  # left by a run that was killed while it saved
                    shutil.rmtree(os.path.join(args.out, name))
            for name in LOGS:
                rewind_log(
                    os.path.join(args.out, name), self.first_step if checkpoint else -1
                )  # what came after it comes again
        else:
            defer_signals()
        print(
            f"{self.name}: {cell['name']}, engine {args.engine}, stop ids {stops}"
            + (f", {ranks.world_size()} ranks" if ranks.world_size() > 1 else "")
            + (f", resumed from {checkpoint or 'the start'}" if args.resume else ""),
            flush=True,
        )
        if not self.first_step:
            self.evaluate(0)

    def sample(self, prompts, sampling, seed):
        """Samples of the model as it is now, on either engine."""
        push_weights(self.engine, self.model)
        with autocast(self.args):
            return sample(self.engine, prompts, sampling, seed)

    def measure(self, max_response_tokens):
        """Results of the model as it is now on --eval_data."""
        push_weights(self.engine, self.model)
        with autocast(self.args):
            results, _ = evaluate(
                self.model,
                self.engine,
                self.tokenizer,
                self.problems,
                self.prompts,
                self.sampling._replace(max_response_tokens=max_response_tokens),
                self.args.seed,
                [self.args.eval_n],
                self.args.micro_batch_tokens,
            )
        return results

    def evaluate(self, step, last=False):
        args = self.args
        if not args.eval_every or step % args.eval_every and not last:
            return
        results = self.measure(args.eval_max_response_tokens)
        self.append("evals.jsonl", {"step": step, **results, **self.spent})
        print(
            f"{self.name}: step {step} evaluation: Avg@{args.eval_n} {results['avg']:.3f}, Pass@{args.eval_n} "
            f"{results['pass'][str(args.eval_n)]:.3f}, length {results['length']:.1f}, entropy {results['entropy']:.3f}",
            flush=True,
        )

    def end_step(self, step, row, shown, last):
        """Log the step's row of metrics, those named in `shown` on the screen too; evaluate and save when it is time; stop, where a
        signal has asked for it and the next step samples anew."""
        self.append("metrics.jsonl", {"step": step, **row, **self.spent})
        if step % self.args.log_every == 0 or last:
            values = "  ".join(f"{name} {row[name]:.4g}" for name in shown if name in row)
            phases = ", ".join(
                f"{name[8:]} {value:.2f}" for name, value in row.items() if name.startswith("seconds_")
            )
            print(
                f"{self.name}: step {step}/{self.args.steps}  {values}  {row['seconds']:.2f} s ({phases}), "
                f"{row['tokens_per_second']:.0f} tokens/s",
                flush=True,
            )
        self.evaluate(step, last)
        signal = (
            ranks.largest(stop_requested() or 0) if step % getattr(self.args, "refresh_every", 1) == 0 else 0
        )
        if not last and (signal or self.args.save_every and step % self.args.save_every == 0):
            self.save(f"step_{step:06d}", step)
        if not last and signal:
            stop(self.args, signal)

    def append(self, name, row):
        if ranks.rank():
            return
        with open(os.path.join(self.args.out, name), "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def save(self, name, step):
        """A Hugging Face directory, complete by rename; with the optimizer's state and all files' checksums unless it is the last one.
        Then the oldest are removed of which --keep_checkpoints has no need."""
        path = os.path.join(self.args.out, name)
        once = {
            name for name, _ in (*self.model.named_parameters(), *self.model.named_buffers())
        }  # of a tied tensor's names one
        weights = whole_state(
            (name, tensor) for name, tensor in ranks.full_weights(self.model) if name in once
        )
        moments = whole_state(optimizer_state(self.model, self.optimizer)) if name != "final" else None
        if ranks.rank():
            return
        shutil.rmtree(path, ignore_errors=True)  # left by a run that was killed while it finished
        self.model.save_pretrained(path + ".tmp", state_dict=weights)
        self.tokenizer.save_pretrained(path + ".tmp")
        if moments is not None:
            save_file(moments, os.path.join(path + ".tmp", "optimizer.safetensors"))
        state = {
            "run": self.name,
            "cell": self.cell,
            "step": step,
            "curriculum": self.curriculum,
            **self.spent,
        }
        if name == "final":  # its checksums are in meta.json
            write_json(os.path.join(path + ".tmp", "checkpoint.json"), state)
        else:
            files = {
                file: file_sha256(os.path.join(path + ".tmp", file))
                for file in sorted(os.listdir(path + ".tmp"))
            }
            write_sealed(os.path.join(path + ".tmp", "checkpoint.json"), state | {"files": files})
        os.replace(path + ".tmp", path)
        if self.args.keep_checkpoints:
            for old in checkpoints(self.args.out)[: -self.args.keep_checkpoints]:
                shutil.rmtree(old)

    def finish(self, stage, step):
        args = self.args
        self.save("final", step)
        if ranks.rank():
            return
        files = [name for name in LOGS if os.path.getsize(os.path.join(args.out, name))]
        files += [os.path.join("final", name) for name in sorted(os.listdir(os.path.join(args.out, "final")))]
        finish_artifact(
            args,
            stage,
            files,
            cell=self.cell,
            stop_ids=self.model.generation_config.eos_token_id,
            tokenizer_sha256=tokenizer_sha256(self.tokenizer),
            template_sha256=template_sha256(self.tokenizer, args.prompt_suffix),
            **self.spent,
        )
        print(
            f"{self.name}: {step} steps, {self.spent['tflops']:.4g} TFLOPs, {self.spent['response_tokens']} response tokens "
            f"-> {args.out}/final"
        )


def checkpoints(out):
    """The run's checkpoints to resume from, oldest first."""
    return sorted(glob.glob(os.path.join(glob.escape(out), "step_" + "[0-9]" * 6)))


def optimizer_state(model, optimizer):
    """Yields ("parameter/key", tensor): AdamW's step and moments of every parameter that has had a gradient."""
    for name, parameter in model.named_parameters():
        for key, tensor in optimizer.state.get(parameter, {}).items():
            yield f"{name}/{key}", ranks.full_tensor(tensor)


def whole_state(tensors):
    """The pairs (name, tensor) as a dict on the CPU of rank 0; the others take part in putting the tensors together."""
    return {name: tensor.cpu() for name, tensor in tensors if ranks.rank() == 0}


def load_optimizer(path, model, optimizer):
    state = load_file(path)
    for name, parameter in model.named_parameters():
        if f"{name}/step" not in state:
            continue  # GRPO without a gradient so far
        optimizer.state[parameter] = {"step": state[f"{name}/step"]} | {
            key: ranks.local_shard(state[f"{name}/{key}"], parameter) for key in ("exp_avg", "exp_avg_sq")
        }


def token_weights(batch, normalize):
    """Weight of each response's tokens, such that the loss is the mean over tokens, or over responses of their mean over tokens.

    Counted over the whole batch before it is cut into micro-batches, so the result does not depend on the cut."""
    total = sum(len(response.tokens) for response in batch)
    return [
        1 / total if normalize == "token" else 1 / (len(batch) * len(response.tokens)) for response in batch
    ]
