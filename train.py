"""Distil a teacher into a student in one cell of the grid: whose prefixes, which token-level KL.

    --prefix teacher, --kl forward    off-policy SFT           stored rollouts of the teacher, its soft labels
    --prefix student, --kl forward    DAgger-style SFT         the student's own samples, the teacher's soft labels
    --prefix teacher, --kl reverse    offline RL               stored rollouts, mode-seeking
    --prefix student, --kl reverse    on-policy distillation   the student's own samples, mode-seeking

At every position that predicts a response token, with p the teacher's distribution and q the student's over the whole vocabulary,

    loss = w KL(p || q) + (1 - w) KL(q || p)          w = 1 forward, 0 reverse, --fkl_weight for mix (the paper's lambda is 1 - w)

No gradient flows through the sampling of the prefix. Prompt and padding carry no loss; the stop token does.

    rollouts/, scores/                          ->  run/final/ (a Hugging Face directory), run/metrics.jsonl, run/evals.jsonl,
    or problems, sampled and scored live            run/meta.json

    python train.py --prefix teacher --kl forward --student Qwen/Qwen3-0.6B-Base --rollouts R --scores S --out run
    python train.py --prefix student --kl reverse --student Qwen/Qwen3-0.6B-Base --teacher Qwen/Qwen3-4B --data deepscaler --out run
"""
import argparse
import functools
import glob
import json
import os
import shutil
import time
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file

from artifacts import add_output_flags, check_out, finish_artifact, read_artifact, read_jsonl, refuse, start_artifact, write_json
from evaluate import EVAL_SAMPLING, evaluate
from inputs import (add_problem_flags, context_of, default_dtype, encode_problems, load_model, load_problems, load_tokenizer,
                    model_dir, stop_ids, template_sha256, tokenizer_sha256)
from kernels import linear_streaming_kl
from rollout import add_sampling_flags, derive_seed, load_vllm, push_weights, read_rollouts, sample, sampling_from
from score_teacher import batches_by_tokens, match_tokenizers, output_head, response_hidden, teacher_states, token_logps


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # the cell
    p.add_argument("--prefix", choices=["teacher", "student"], required=True, help="whose responses are trained on")
    p.add_argument("--kl", choices=["forward", "reverse", "mix"], required=True, help="the token-level KL")
    p.add_argument("--fkl_weight", type=float, help="weight of the forward KL, with --kl mix only")
    p.add_argument("--vocab", choices=["full", "sampled"], default="full",
                   help="the exact KL over the vocabulary, or its one-sample form at the response's own tokens: hard-label SFT "
                        "(teacher prefix, forward) or REINFORCE with a log-ratio reward (student prefix, reverse)")
    # what goes in
    p.add_argument("--student", required=True, help="Hugging Face directory or hub id of the student to start from")
    p.add_argument("--teacher", help="Hugging Face directory or hub id of the teacher (student prefix)")
    p.add_argument("--rollouts", help="directory written by rollout.py (teacher prefix)")
    p.add_argument("--scores", help="directory written by score_teacher.py from --rollouts (teacher prefix, --vocab full)")
    add_problem_flags(p, required=False)
    p.add_argument("--take_template", action="store_true", help="give the student the teacher's prompt template where they differ")
    # sampling (student prefix)
    add_sampling_flags(p, gpu_memory_utilization=0.3)
    p.add_argument("--refresh_every", type=int, default=1, help="sample for N steps at once; 1: each from the current student")
    # optimisation
    p.add_argument("--normalize", choices=["token", "sequence"], default="sequence", help="what weighs the same in a batch")
    add_training_flags(p, steps=1000, batch_size=32, lr=5e-7)
    add_output_flags(p)
    args = p.parse_args(argv)
    if (args.kl == "mix") != (args.fkl_weight is not None):
        p.error("--fkl_weight goes with --kl mix, and only with it")
    if args.kl == "mix" and not 0 <= args.fkl_weight <= 1:
        p.error(f"--fkl_weight {args.fkl_weight}: must lie in [0, 1]")
    if args.vocab == "sampled" and (args.prefix, args.kl) not in (("teacher", "forward"), ("student", "reverse")):
        p.error("--vocab sampled: a response's own tokens are samples of the KL's expectation only for --prefix teacher "
                "--kl forward and for --prefix student --kl reverse")
    needed = {"teacher": ["rollouts"] + ["scores"] * (args.vocab == "full"), "student": ["teacher", "data"]}
    for prefix, names in needed.items():
        for name in names:
            if (getattr(args, name) is not None) != (args.prefix == prefix):
                p.error(f"--prefix {args.prefix} " + ("needs" if args.prefix == prefix else "does not use") + f" --{name}")
    if args.scores and args.vocab == "sampled":
        p.error("--vocab sampled does not use --scores")
    if args.refresh_every < 1 or args.save_every % args.refresh_every:
        p.error("--refresh_every must be at least 1 and divide --save_every")
    check_training_flags(p, args)
    args.fkl_weight = {"forward": 1.0, "reverse": 0.0}.get(args.kl, args.fkl_weight)
    return args


def add_training_flags(p, steps, batch_size, lr):
    """The flags that train.py and grpo.py share."""
    p.add_argument("--steps", type=int, default=steps, help="optimizer steps")
    p.add_argument("--batch_size", type=int, default=batch_size, help="problems (or stored responses) in a step")
    p.add_argument("--lr", type=float, default=lr, help="constant after the warm-up")
    p.add_argument("--warmup", type=float, default=0.05, help="share of the steps over which the learning rate rises")
    p.add_argument("--max_grad_norm", type=float, default=1.0)
    p.add_argument("--micro_batch_tokens", type=int, default=16384, help="tokens in one forward pass, padding included")
    p.add_argument("--dtype", choices=["float32", "bfloat16"], default=default_dtype(), help="of forward passes; weights are float32")
    p.add_argument("--seed", type=int, default=42)
    p.add_argument("--eval_data", help="problems evaluated in training")
    p.add_argument("--eval_every", type=int, default=0, help="evaluate every N steps, and at the start and the end (0: never)")
    p.add_argument("--eval_n", type=int, default=4, help="responses for each evaluation problem")
    p.add_argument("--log_every", type=int, default=1, help="print every N-th step; metrics.jsonl has them all")
    p.add_argument("--save_every", type=int, default=0, help="save a checkpoint to resume from every N steps (0: only the last)")


def check_training_flags(p, args):
    if bool(args.eval_every) != bool(args.eval_data):
        p.error("--eval_every and --eval_data go together")
    for name in ("steps", "batch_size", "micro_batch_tokens", "log_every", "eval_n"):
        if getattr(args, name) < 1:
            p.error(f"--{name} must be at least 1")

# ---------------------------------------------------------------------------------------------------------------------
# The method


class Response(NamedTuple):
    """One response to train on. tokens: its ids, with the stop token; cut: it was cut off; row: its place in the rollouts."""
    prompt: list
    tokens: list
    cut: bool
    row: int = -1


def objective(args, student_hidden, student_head, teacher_hidden, teacher_head, tokens, weight, vocab_size):
    """The cell's loss over N response positions, sum_i weight_i loss_i, and its metrics {name: (N,) per token, detached}.

    hidden: (N, H) states that predict the tokens (N,); head: (V, H); weight: (N,). A new objective is written here."""
    if args.vocab == "full":
        out = linear_streaming_kl(student_hidden, student_head, teacher_hidden, teacher_head, fkl_weight=args.fkl_weight,
                                  weight=weight, vocab_size=vocab_size)
        return out.loss, {name: getattr(out, name) for name in ("fkl", "rkl", "student_entropy", "teacher_entropy")}
    logps = token_logps(student_hidden, student_head, tokens, vocab_size)  # (N,) log q(y)
    if args.kl == "forward":  # y ~ teacher:  grad KL(p||q) = -E[grad log q(y)]   (Proposition 1, i)
        return -(weight * logps).sum(), {"nll": -logps.detach()}
    # y ~ student:  grad KL(q||p) = E[(log q(y) - log p(y)) grad log q(y)]   (Proposition 1, ii); the log-ratio is a constant
    log_ratio = (logps - token_logps(teacher_hidden, teacher_head, tokens, vocab_size)).detach()
    return (weight * log_ratio * logps).sum(), {"sampled_rkl": log_ratio}


def token_weights(batch, normalize):
    """Weight of each response's tokens, such that the loss is the mean over tokens, or over responses of their mean over tokens.

    Counted over the whole batch before it is cut into micro-batches, so the result does not depend on the cut."""
    total = sum(len(response.tokens) for response in batch)
    return [1 / total if normalize == "token" else 1 / (len(batch) * len(response.tokens)) for response in batch]


def accumulate_gradients(args, student, teacher, batch, vocab_size):
    """Adds the gradient of the batch's loss to the student. Returns {metric: value} and the seconds that scoring took."""
    weights, device = token_weights(batch, args.normalize), student.device
    total, seconds, sums = sum(len(response.tokens) for response in batch), 0.0, {"loss": 0.0}
    for part in batches_by_tokens([len(r.prompt) + len(r.tokens) for r in batch], args.micro_batch_tokens):
        micro = [batch[i] for i in part]
        tokens = torch.tensor([token for response in micro for token in response.tokens], device=device)          # (N,)
        weight = torch.tensor([weights[i] for i in part for _ in batch[i].tokens], device=device)                 # (N,)
        started = clock()
        teacher_hidden, teacher_head = teacher(micro)
        seconds += clock() - started
        with autocast(args):
            hidden = response_hidden(student, [r.prompt for r in micro], [r.tokens for r in micro])               # (N, H)
        head = output_head(student, "--student").to(hidden.dtype)
        loss, metrics = objective(args, hidden, head, teacher_hidden, teacher_head, tokens, weight, vocab_size)
        loss.backward()
        sums["loss"] += loss.item()
        for name, values in metrics.items():
            sums[name] = sums.get(name, 0.0) + values.sum().item() / total
    return sums, seconds

# ---------------------------------------------------------------------------------------------------------------------
# The ledger


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

# ---------------------------------------------------------------------------------------------------------------------
# Plumbing, shared with grpo.py


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


def optimizer_step(args, model, optimizer, step):
    """Warm-up, clip, step: (gradient norm before clipping, learning rate). A gradient that is not finite ends the run."""
    lr = args.lr * min(1.0, (step + 1) / max(1, round(args.warmup * args.steps)))
    for group in optimizer.param_groups:
        group["lr"] = lr
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm).item()
    if norm != norm or norm == float("inf"):
        refuse(f"step {step + 1}: the gradient is {norm}; the run ends here, its checkpoints are in {args.out}", code=1)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, lr


class Run:
    """What train.py and grpo.py do alike around their loops: model, optimizer, engine, evaluations, checkpoints, totals spent."""

    def __init__(self, args, directory, tokenizer, stops, cell, samples=True):
        self.args, self.tokenizer, self.cell, self.name = args, tokenizer, cell, os.path.basename(os.path.normpath(args.out))
        if args.eval_every:
            self.problems = load_problems(args.eval_data)
            self.prompts = encode_problems(args, self.problems, tokenizer, context_of(directory))
            self.sampling = sampling_from(args, tokenizer, stops, n=args.eval_n, top_k=0, **EVAL_SAMPLING)
        saved = sorted(glob.glob(os.path.join(args.out, "step_" + "[0-9]" * 6))) if args.resume else []
        checkpoint = saved[-1] if saved else None
        state = json.load(open(os.path.join(checkpoint, "checkpoint.json"))) if checkpoint else {"step": 0}
        self.first_step = state["step"]
        self.spent = {name: state.get(name, 0) for name in ("tflops", "tflops_uncached", "response_tokens")}
        self.model = load_model(checkpoint or directory, "the starting model", "float32")
        self.model.generation_config.eos_token_id = stops  # the checkpoint ends its responses as they end here
        output_head(self.model, "the starting model")
        self.config = self.model.config.to_dict()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), weight_decay=0.0)  # PAPER: the optimizer is not stated
        if checkpoint:
            load_optimizer(os.path.join(checkpoint, "optimizer.safetensors"), self.model, self.optimizer)
        wants_vllm = args.engine == "vllm" and (samples or args.eval_every)
        self.engine = load_vllm(args, directory) if wants_vllm else self.model
        start_artifact(args)
        for file in (os.path.join(args.out, name) for name in ("metrics.jsonl", "evals.jsonl")):
            rows = [row for _, row in read_jsonl(file) if row["step"] <= self.first_step] if checkpoint else []
            with open(file, "w", encoding="utf-8") as out:  # what came after the checkpoint comes again
                out.writelines(json.dumps(row) + "\n" for row in rows)
        print(f"{self.name}: {cell['name']}, engine {args.engine}, stop ids {stops}"
              + (f", resumed from step {self.first_step} ({checkpoint})" if args.resume else ""), flush=True)
        if not self.first_step:
            self.evaluate(0)

    def sample(self, prompts, sampling, seed):
        """Samples of the model as it is now, on either engine."""
        push_weights(self.engine, self.model)
        with autocast(self.args):
            return sample(self.engine, prompts, sampling, seed)

    def evaluate(self, step):
        args = self.args
        if not args.eval_every or step % args.eval_every and step != args.steps:
            return
        push_weights(self.engine, self.model)
        with autocast(args):
            results, _ = evaluate(self.model, self.engine, self.tokenizer, self.problems, self.prompts, self.sampling, args.seed,
                                  [args.eval_n], args.micro_batch_tokens)
        self.append("evals.jsonl", {"step": step, **results, **self.spent})
        print(f"{self.name}: step {step} evaluation: Avg@{args.eval_n} {results['avg']:.3f}, Pass@{args.eval_n} "
              f"{results['pass'][str(args.eval_n)]:.3f}, length {results['length']:.1f}, entropy {results['entropy']:.3f}",
              flush=True)

    def end_step(self, step, shown, row):
        """Log the step (`shown` goes to the screen too), evaluate and save when it is time. step counts from 1."""
        self.append("metrics.jsonl", {"step": step, **shown, **row, **self.spent})
        if step % self.args.log_every == 0 or step == self.args.steps:
            values = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
            print(f"{self.name}: step {step}/{self.args.steps}  {values}", flush=True)
        self.evaluate(step)
        if self.args.save_every and step % self.args.save_every == 0 and step < self.args.steps:
            self.save(f"step_{step:06d}", step)

    def append(self, name, row):
        with open(os.path.join(self.args.out, name), "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def save(self, name, step):
        """A Hugging Face directory, complete by rename; with the optimizer's state unless it is the last one."""
        path = os.path.join(self.args.out, name)
        shutil.rmtree(path, ignore_errors=True)  # left by a run that was killed while it saved
        shutil.rmtree(path + ".tmp", ignore_errors=True)
        self.model.save_pretrained(path + ".tmp")
        self.tokenizer.save_pretrained(path + ".tmp")
        if name != "final":
            save_optimizer(os.path.join(path + ".tmp", "optimizer.safetensors"), self.model, self.optimizer)
        state = {"run": self.name, "cell": self.cell, "step": step, **self.spent}
        write_json(os.path.join(path + ".tmp", "checkpoint.json"), state)
        os.replace(path + ".tmp", path)

    def finish(self, stage):
        args = self.args
        self.save("final", args.steps)
        files = ["metrics.jsonl", "evals.jsonl"]
        files += [os.path.join("final", name) for name in sorted(os.listdir(os.path.join(args.out, "final")))]
        finish_artifact(args, stage, files, cell=self.cell, tokenizer_sha256=tokenizer_sha256(self.tokenizer),
                        template_sha256=template_sha256(self.tokenizer, args.prompt_suffix), **self.spent)
        print(f"{self.name}: {self.spent['tflops']:.4g} TFLOPs, {self.spent['response_tokens']} response tokens -> {args.out}/final")


def save_optimizer(path, model, optimizer):
    names = {parameter: name for name, parameter in model.named_parameters()}
    save_file({f"{names[p]}/{key}": value for p, state in optimizer.state.items() for key, value in state.items()}, path)


def load_optimizer(path, model, optimizer):
    state = load_file(path)
    for name, parameter in model.named_parameters():
        if f"{name}/step" not in state:
            continue  # GRPO without a gradient so far
        optimizer.state[parameter] = {key: state[f"{name}/{key}"].to("cpu" if key == "step" else parameter.device)
                                      for key in ("step", "exp_avg", "exp_avg_sq")}

# ---------------------------------------------------------------------------------------------------------------------


def stored_responses(args, context):
    """The rollouts as Responses, cut to --max_response_tokens."""
    responses = []
    for row, stored in enumerate(read_rollouts(args.rollouts)):
        tokens = stored["response_ids"][:args.max_response_tokens]
        length = len(stored["prompt_ids"]) + len(tokens)
        if length > context:
            refuse(f"--rollouts {args.rollouts}: {stored['id']} has {length} tokens, more than the student's context of {context}; "
                   "give a smaller --max_response_tokens")
        cut = stored["finish_reason"] == "length" or len(tokens) < len(stored["response_ids"])
        responses.append(Response(stored["prompt_ids"], tokens, cut, row))
    return responses


def main(args):
    check_out(args)
    student_dir = model_dir(args.student, "--student")
    tokenizer = load_tokenizer(student_dir, "--student")
    if args.prefix == "teacher":
        rollouts = read_artifact(args.rollouts, "--rollouts", "rollout")
        match_tokenizers(args, tokenizer, load_tokenizer(os.path.join(args.rollouts, "tokenizer"), "--rollouts"), "--rollouts")
        if rollouts["prompt_suffix"] != args.prompt_suffix:
            refuse(f"--prompt_suffix: is {args.prompt_suffix!r}, but --rollouts were made with {rollouts['prompt_suffix']!r}")
        stops = sorted({*stop_ids(tokenizer, student_dir), *rollouts["stop_ids"]})
        items = stored_responses(args, context_of(student_dir))
    else:
        teacher_dir = model_dir(args.teacher, "--teacher")
        match_tokenizers(args, tokenizer, load_tokenizer(teacher_dir, "--teacher"), "--teacher")
        stops = stop_ids(tokenizer, student_dir, teacher_dir)
        items = load_problems(args.data, args.limit)
        prompts = encode_problems(args, items, tokenizer, context_of(student_dir))
        sampling = sampling_from(args, tokenizer, stops)
    teacher, teacher_config = teacher_states(args, items)
    kl = (f"mix {args.fkl_weight:g}" if args.kl == "mix" else args.kl) + (" (sampled)" if args.vocab == "sampled" else "")
    cell = {"name": f"{args.prefix} prefix, {kl} KL", "prefix": args.prefix, "kl": kl}
    run = Run(args, student_dir, tokenizer, stops, cell, samples=args.prefix == "student")

    queue = []
    for step in range(run.first_step, args.steps):
        started = clock()
        if args.prefix == "teacher":
            batch = [items[i] for i in batch_indices(len(items), args.batch_size, step, args.seed)]
        else:
            if step % args.refresh_every == 0:  # the responses of the coming steps, from the student as it is now
                picked = [i for later in range(step, step + args.refresh_every)
                          for i in batch_indices(len(items), args.batch_size, later, args.seed)]
                groups = run.sample([prompts[i] for i in picked], sampling, derive_seed(args.seed, "train", step))
                queue = [Response(prompts[i], ids, reason == "length")
                         for i, group in zip(picked, groups, strict=True) for ids, reason in group]
            batch, queue = queue[:args.batch_size * args.n], queue[args.batch_size * args.n:]
        sampled = clock()
        metrics, score_seconds = accumulate_gradients(args, run.model, teacher, batch, len(tokenizer))
        grad_norm, lr = optimizer_step(args, run.model, run.optimizer, step)
        done = clock()

        live = args.prefix == "student"
        student_cost = sum(tflops(run.config, len(r.prompt), len(r.tokens), forwards=3, generations=int(live)) for r in batch)
        teacher_cost = sum(tflops(teacher_config, len(r.prompt), len(r.tokens), forwards=1) for r in batch) if teacher_config else 0
        run.spent["tflops"] += student_cost + teacher_cost * live  # a stored score was paid for once, before
        run.spent["tflops_uncached"] += student_cost + teacher_cost
        run.spent["response_tokens"] += sum(len(r.tokens) for r in batch)
        run.end_step(step + 1, {**metrics, "response_length": sum(len(r.tokens) for r in batch) / len(batch),
                                "truncated": sum(r.cut for r in batch) / len(batch), "seconds": done - started},
                     {"grad_norm": grad_norm, "lr": lr, "seconds_sample": sampled - started, "seconds_score": score_seconds,
                      "seconds_train": done - sampled - score_seconds,
                      "tokens_per_second": sum(len(r.tokens) for r in batch) / (done - started)})
    run.finish("train")


if __name__ == "__main__":
    main(get_args())
