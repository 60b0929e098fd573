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
import os
from typing import NamedTuple

import torch

from artifacts import add_output_flags, check_out, read_artifact, refuse
from inputs import add_problem_flags, context_of, encode_problems, load_problems, load_tokenizer, model_dir, stop_ids
from kernels import linear_streaming_kl
from rollout import add_sampling_flags, derive_seed, read_rollouts, sampling_from
from run import Run, add_training_flags, autocast, batch_indices, check_training_flags, clock, optimizer_step, tflops
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
    # entropy-gated length curriculum; held-out problems are those of --eval_data
    p.add_argument("--curriculum", choices=["entropy"], help="let responses grow while the student keeps its entropy")
    p.add_argument("--horizons", type=lambda text: [int(n) for n in text.split(",")], metavar="L0,L1,...",
                   help="rising limits of response tokens; the last one takes the place of --max_response_tokens")
    p.add_argument("--entropy_floor", type=float, help="nats; below it the limit rises no more")
    p.add_argument("--gate_every", type=int, help="steps at each horizon")
    p.add_argument("--on_gate_fail", choices=["hold", "stop"], default="hold", help="train on at the last horizon, or end the run")
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
    if args.curriculum:
        check_curriculum(p, args)
        args.max_response_tokens = args.horizons[-1]
    elif args.horizons or args.entropy_floor is not None or args.gate_every:
        p.error("--horizons, --entropy_floor and --gate_every need --curriculum entropy")
    check_training_flags(p, args)
    args.fkl_weight = {"forward": 1.0, "reverse": 0.0}.get(args.kl, args.fkl_weight)
    return args


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


def check_curriculum(p, args):
    if not args.horizons or args.entropy_floor is None or not args.gate_every or not args.eval_data:
        p.error("--curriculum entropy needs --horizons, --entropy_floor, --gate_every and --eval_data")
    if args.horizons[0] < 1 or any(a >= b for a, b in zip(args.horizons, args.horizons[1:])):
        p.error(f"--horizons {','.join(map(str, args.horizons))}: must be positive and rise")
    if args.gate_every < 1 or args.gate_every % args.refresh_every:
        p.error("--gate_every must be at least 1 and a multiple of --refresh_every")


def gate(args, run, step):
    """The curriculum's decision after `step` steps (paper, section 5.2): move on to the next horizon if the mean predictive entropy of
    the student's own samples on held-out problems, cut at the present horizon, is at least the floor; else never again.

    Changes run.curriculum = {"level", "open"}; returns whether the run goes on."""
    state = run.curriculum
    if not state["open"] or state["level"] + 1 == len(args.horizons) or step % args.gate_every:
        return True
    horizon, results = args.horizons[state["level"]], run.measure(args.horizons[state["level"]])
    passed = results["entropy"] >= args.entropy_floor
    run.curriculum = {"level": state["level"] + passed, "open": passed}
    decision = "advance" if passed else args.on_gate_fail
    run.append("gates.jsonl", {"step": step, "horizon": horizon, "entropy": results["entropy"], "entropy_floor": args.entropy_floor,
                               "length": results["length"], "avg": results["avg"], "decision": decision})
    print(f"{run.name}: step {step} gate: entropy {results['entropy']:.4f} against a floor of {args.entropy_floor} at horizon {horizon}: "
          f"{decision}", flush=True)
    return decision != "stop"

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

    if args.curriculum:
        run.curriculum = run.curriculum or {"level": 0, "open": True}
    queue, step = [], run.first_step
    for step in range(run.first_step, args.steps):
        started = clock()
        horizon = args.horizons[run.curriculum["level"]] if args.curriculum else args.max_response_tokens
        if args.prefix == "teacher":
            picked = [items[i] for i in batch_indices(len(items), args.batch_size, step, args.seed)]
            batch = [r._replace(tokens=r.tokens[:horizon], cut=r.cut or len(r.tokens) > horizon) for r in picked]
        else:
            if step % args.refresh_every == 0:  # the responses of the coming steps, from the student as it is now
                picked = [i for later in range(step, step + args.refresh_every)
                          for i in batch_indices(len(items), args.batch_size, later, args.seed)]
                groups = run.sample([prompts[i] for i in picked], sampling._replace(max_response_tokens=horizon),
                                    derive_seed(args.seed, "train", step))
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
        going_on = gate(args, run, step + 1) if args.curriculum else True
        run.end_step(step + 1, {**metrics, "response_length": sum(len(r.tokens) for r in batch) / len(batch),
                                "truncated": sum(r.cut for r in batch) / len(batch), "seconds": done - started},
                     {"grad_norm": grad_norm, "lr": lr, "horizon": horizon, "seconds_sample": sampled - started, "seconds_score": score_seconds,
                      "seconds_train": done - sampled - score_seconds,
                      "tokens_per_second": sum(len(r.tokens) for r in batch) / (done - started)})
        if not going_on:
            break
    run.finish("train", step + 1)


if __name__ == "__main__":
    main(get_args())
