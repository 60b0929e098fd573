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

from distil import ranks
from distil.artifacts import add_output_flags, check_out, read_artifact, refuse, run_stage
from distil.diagnostics import diagnostics, exact_metrics, sampler_kl, teacher_top, truncates
from distil.models import (
    batches_by_tokens,
    context_of,
    model_dir,
    output_head,
    response_hidden,
    token_logps,
    top_tokens,
)
from distil.preflight import check_pair, check_signal, match_tokenizers, print_preflight
from distil.problems import add_problem_flags, load_problems
from distil.prompts import encode_problems, load_tokenizer, stop_ids
from distil.rollouts import read_rollouts
from distil.sampling import add_sampling_flags, derive_seed, sampling_from
from distil.teacher import teacher_signal
from distil.training import (
    Run,
    add_training_flags,
    autocast,
    batch_indices,
    check_training_flags,
    clock,
    optimizer_step,
    tflops,
    token_weights,
)
from streaming_kl import linear_streaming_kl

SHOWN = (
    "loss",
    "fkl",
    "rkl",
    "nll",
    "student_entropy",
    "teacher_entropy",
    "overlap_ratio",
    "response_length",
    "truncated",
)


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # the cell
    p.add_argument(
        "--prefix", choices=["teacher", "student"], required=True, help="whose responses are trained on"
    )
    p.add_argument("--kl", choices=["forward", "reverse", "mix"], required=True, help="the token-level KL")
    p.add_argument("--fkl_weight", type=float, help="weight of the forward KL, with --kl mix only")
    p.add_argument(
        "--vocab",
        choices=["full", "topk", "sampled"],
        default="full",
        help="the exact KL over the vocabulary; the KL on the --k likeliest tokens, renormalised; or the one-sample "
        "form at the response's own tokens: hard-label SFT (teacher prefix, forward) or REINFORCE with the "
        "log-ratio as reward (student prefix, reverse)",
    )
    p.add_argument(
        "--k",
        type=int,
        default=16,
        help="likeliest tokens in top-k training and scores, and in overlap metrics",
    )
    p.add_argument(
        "--topk_set",
        choices=["student", "teacher", "union", "intersection"],
        default="student",
        help="whose likeliest tokens",
    )
    # what goes in
    p.add_argument(
        "--student", required=True, help="Hugging Face directory or hub id of the student to start from"
    )
    p.add_argument("--teacher", help="Hugging Face directory or hub id of the teacher (student prefix)")
    p.add_argument("--rollouts", help="directory written by rollout.py (teacher prefix)")
    p.add_argument(
        "--scores",
        help="directory written by score_teacher.py from --rollouts (teacher prefix, --vocab full)",
    )
    add_problem_flags(p, required=False)
    p.add_argument(
        "--take_template",
        action="store_true",
        help="give the student the teacher's prompt template where they differ",
    )
    p.add_argument(
        "--stop_ids",
        choices=["both", "student", "teacher"],
        default="both",
        help="whose end tokens end a response",
    )
    # sampling (student prefix)
    add_sampling_flags(p, gpu_memory_utilization=0.3)
    p.add_argument(
        "--refresh_every",
        type=int,
        default=1,
        help="sample for N steps at once; 1: each from the current student",
    )
    # entropy-gated length curriculum; held-out problems are those of --eval_data
    p.add_argument(
        "--curriculum", choices=["entropy"], help="let responses grow while the student keeps its entropy"
    )
    p.add_argument(
        "--horizons",
        type=lambda text: [int(n) for n in text.split(",")],
        metavar="L0,L1,...",
        help="rising limits of response tokens; the last one takes the place of --max_response_tokens",
    )
    p.add_argument("--entropy_floor", type=float, help="nats; below it the limit rises no more")
    p.add_argument("--gate_every", type=int, help="steps at each horizon")
    p.add_argument(
        "--on_gate_fail",
        choices=["hold", "stop"],
        default="hold",
        help="train on at the last horizon, or end the run",
    )
    # optimisation
    p.add_argument(
        "--normalize",
        choices=["token", "sequence"],
        default="sequence",
        help="what weighs the same in a batch",
    )
    add_training_flags(p, steps=1000, batch_size=32, lr=5e-7)
    add_output_flags(p)
    args = p.parse_args(argv)
    if (args.kl == "mix") != (args.fkl_weight is not None):
        p.error("--fkl_weight goes with --kl mix, and only with it")
    if args.kl == "mix" and not 0 <= args.fkl_weight <= 1:
        p.error(f"--fkl_weight {args.fkl_weight}: must lie in [0, 1]")
    if args.vocab == "sampled" and (args.prefix, args.kl) not in (
        ("teacher", "forward"),
        ("student", "reverse"),
    ):
        p.error(
            "--vocab sampled: a response's own tokens are samples of the KL's expectation only for --prefix teacher "
            "--kl forward and for --prefix student --kl reverse"
        )
    for prefix, names in {"teacher": ["rollouts", "scores"], "student": ["teacher", "data"]}.items():
        for name in names:
            if args.prefix != prefix and getattr(args, name) is not None:
                p.error(f"--prefix {args.prefix} does not use --{name}")
            if (
                args.prefix == prefix
                and getattr(args, name) is None
                and (name, args.vocab) != ("scores", "sampled")
            ):
                p.error(f"--prefix {args.prefix} needs --{name}")
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
    """One response to train on. tokens: its ids, with the stop token; cut: it was cut off; id: the problem's; row: its place in the
    rollouts."""

    prompt: list
    tokens: list
    cut: bool
    id: str = ""
    row: int = -1


def objective(args, student_hidden, student_head, teacher, tokens, weight):
    """The cell's loss over N response positions, sum_i weight_i loss_i, and its metrics {name: (N,) per token, detached}.

    student_hidden (N, H) predicts the tokens (N,); student_head (V, H); teacher: Signal; weight (N,). A new objective goes here."""
    if args.vocab == "full":
        out = linear_streaming_kl(
            student_hidden,
            student_head,
            teacher.hidden,
            teacher.head,
            fkl_weight=args.fkl_weight,
            weight=weight,
            logits_dtype=torch.float32,
        )  # bfloat16 logits would bias small KLs
        return out.loss, exact_metrics(out)
    if args.vocab == "topk":
        return topk_objective(args, student_hidden, student_head, teacher, weight)
    log_q = token_logps(student_hidden, student_head, tokens)  # (N,) of the response's own tokens
    log_p = teacher.logps if teacher.hidden is None else token_logps(teacher.hidden, teacher.head, tokens)
    metrics = {"nll": -log_q.detach()} | ({} if log_p is None else {"log_ratio": (log_q - log_p).detach()})
    if args.kl == "forward":  # y ~ teacher:  grad KL(p||q) = -E[grad log q(y)]   (Proposition 1, i)
        return -(weight * log_q).sum(), metrics
    # y ~ student:  grad KL(q||p) = E[(log q(y) - log p(y)) grad log q(y)]   (Proposition 1, ii); the log-ratio is a constant
    return (weight * metrics["log_ratio"] * log_q).sum(), metrics


def topk_objective(args, student_hidden, student_head, teacher, weight):
    """KL between both distributions renormalised on a set of tokens (arXiv 2604.13016): the k likeliest of the student, of the
    teacher, those of either, or those of both. What the set leaves out of each distribution is its tail mass."""
    student_ids = top_tokens(student_hidden.detach(), student_head.detach(), args.k)[1]
    teacher_ids = teacher_top(args, teacher)[1]
    shared = (student_ids[:, :, None] == teacher_ids[:, None]).any(
        2
    )  # (N, k): the student's that are the teacher's too
    every = torch.ones_like(shared)
    ids, keep = {
        "student": (student_ids, every),
        "teacher": (teacher_ids, every),
        "intersection": (student_ids, shared),
        "union": (torch.cat([student_ids, teacher_ids], 1), torch.cat([~shared, every], 1)),
    }[args.topk_set]
    log_q = token_logps(student_hidden, student_head, ids)  # (N, m)
    with torch.no_grad():
        log_p = (
            teacher.top_logps[:, : args.k]
            if teacher.hidden is None
            else token_logps(teacher.hidden, teacher.head, ids)
        )
    q_bar, p_bar = (log.masked_fill(~keep, -1e30).log_softmax(1) for log in (log_q, log_p))
    fkl, rkl = (p_bar.exp() * (p_bar - q_bar)).sum(1), (q_bar.exp() * (q_bar - p_bar)).sum(1)
    loss = args.fkl_weight * fkl + (1 - args.fkl_weight) * rkl
    tails = {
        f"{name}_tail_mass": 1 - (log.exp() * keep).sum(1).detach()
        for name, log in (("student", log_q), ("teacher", log_p))
    }
    return (weight * loss).sum(), {"topk_fkl": fkl.detach(), "topk_rkl": rkl.detach(), **tails}


def accumulate_gradients(args, student, teacher, batch, vocab_size):
    """Adds the gradient of the batch's loss to the student. Returns {metric: value} and {phase: seconds}."""
    weights, device = token_weights(batch, args.normalize), student.device
    total, lengths = sum(len(r.tokens) for r in batch), [len(r.prompt) + len(r.tokens) for r in batch]
    sums, seconds = {"loss": 0.0, "padding": 0.0}, {"seconds_score": 0.0, "seconds_diagnostics": 0.0}
    for part, counts in ranks.split_micro_batches(batches_by_tokens(lengths, args.micro_batch_tokens)):
        micro = [batch[i] for i in part]
        tokens = torch.tensor(
            [token for response in micro for token in response.tokens], device=device
        )  # (N,)
        weight = torch.tensor(
            [counts * weights[i] for i in part for _ in batch[i].tokens], device=device
        )  # (N,)
        started = clock()
        signal = teacher(micro).cut(vocab_size)
        seconds["seconds_score"] += clock() - started
        with autocast(args):
            hidden = response_hidden(student, [r.prompt for r in micro], [r.tokens for r in micro])  # (N, H)
        hidden = hidden.to(getattr(torch, args.dtype))  # autocast leaves it in float32
        head = output_head(student, "--student")[:vocab_size].to(
            hidden.dtype
        )  # rows beyond the tokenizer's are padding
        loss, metrics = objective(args, hidden, head, signal, tokens, weight)
        started = clock()  # before the backward pass, after which FSDP has taken the head apart
        metrics = diagnostics(args, metrics, hidden.detach(), head.detach(), signal)
        if args.prefix == "student" and truncates(args):
            metrics["sampler_kl"] = sampler_kl(
                hidden.detach(), head.detach(), args.temperature, args.top_p, args.top_k
            )
        seconds["seconds_diagnostics"] += clock() - started
        loss.backward()
        sums["loss"] += loss.item()
        sums["padding"] += len(part) * max(
            lengths[i] for i in part
        )  # of all positions, until the tokens are taken off
        for name, values in metrics.items():
            sums[name] = sums.get(name, 0.0) + counts * values.sum().item() / total
    sums = ranks.sum_over_ranks(sums)
    return sums | {"padding": 1 - sum(lengths) / sums["padding"]}, seconds


def check_curriculum(p, args):
    if not args.horizons or args.entropy_floor is None or not args.gate_every or not args.eval_data:
        p.error("--curriculum entropy needs --horizons, --entropy_floor, --gate_every and --eval_data")
    if args.horizons[0] < 1 or any(a >= b for a, b in zip(args.horizons, args.horizons[1:])):
        p.error(f"--horizons {','.join(map(str, args.horizons))}: must be positive and rise")
    if args.gate_every < 1 or args.gate_every % args.refresh_every:
        p.error("--gate_every must be at least 1 and a multiple of --refresh_every")


def gate(args, run, step):
    """The curriculum's decision after `step` steps (paper, section 5.2): go on to the next horizon if the mean predictive entropy
    of the student's own samples on held-out problems, cut at the present horizon, is at least the floor; else never again.

    Changes run.curriculum = {"level", "open"}."""
    state = run.curriculum
    if not state["open"] or state["level"] + 1 == len(args.horizons) or step % args.gate_every:
        return
    horizon, results = args.horizons[state["level"]], run.measure(args.horizons[state["level"]])
    passed = results["entropy"] >= args.entropy_floor
    run.curriculum = {"level": state["level"] + passed, "open": passed}
    decision = "advance" if passed else args.on_gate_fail
    run.append(
        "gates.jsonl",
        {
            "step": step,
            "horizon": horizon,
            "entropy": results["entropy"],
            "entropy_floor": args.entropy_floor,
            "length": results["length"],
            "avg": results["avg"],
            "decision": decision,
        },
    )
    print(
        f"{run.name}: step {step} gate: entropy {results['entropy']:.4f} at horizon {horizon}, floor {args.entropy_floor}: "
        f"{decision}",
        flush=True,
    )


def ended(args, run):
    """Whether a failed gate has ended the run."""
    return bool(args.curriculum) and args.on_gate_fail == "stop" and not run.curriculum["open"]


# ---------------------------------------------------------------------------------------------------------------------


def stored_responses(args, context, vocab_size):
    """The rollouts as Responses, cut to --max_response_tokens."""
    responses, same = [], {}  # one int object for equal ids: 8 bytes a token, not 36
    for row, stored in enumerate(read_rollouts(args.rollouts, vocab_size)):
        prompt, ids = (
            [same.setdefault(i, i) for i in stored[name]] for name in ("prompt_ids", "response_ids")
        )
        tokens = ids[: args.max_response_tokens]
        length = len(prompt) + len(tokens)
        if length > context:
            refuse(
                f"--rollouts {args.rollouts}: {stored['id']} has {length} tokens, more than the student's context of {context}; "
                "give a smaller --max_response_tokens"
            )
        cut = stored["finish_reason"] == "length" or len(tokens) < len(stored["response_ids"])
        responses.append(Response(prompt, tokens, cut, stored["id"], row))
    return responses


def sampled_responses(args, run, items, sampling, step):
    """Responses to the problems (items: (id, prompt)) of the coming --refresh_every steps, sampled from the student as it is now."""
    picked = [
        items[i]
        for later in range(step, step + args.refresh_every)
        for i in batch_indices(len(items), args.batch_size, later, args.seed)
    ]
    groups = run.sample([prompt for _, prompt in picked], sampling, derive_seed(args.seed, "train", step))
    return [
        Response(prompt, one.response_ids, one.finish_reason == "length", id)
        for (id, prompt), group in zip(picked, groups, strict=True)
        for one in group
    ]


def first_look(args, run, teacher, responses, tokenizer, student_stops, teacher_stops):
    """The preflight on a few responses of the run itself."""
    signal, size = teacher(responses), len(tokenizer)
    with torch.no_grad(), autocast(args):
        hidden = response_hidden(run.model, [r.prompt for r in responses], [r.tokens for r in responses])
    hidden = hidden.to(getattr(torch, args.dtype))
    head = output_head(run.model, "--student").detach()
    teacher_rows = size if signal.head is None else len(signal.head)
    lines = check_pair(tokenizer, student_stops, teacher_stops, len(head), teacher_rows)
    print_preflight(lines + check_signal(hidden, head[:size].to(hidden.dtype), signal.cut(size), args.k))


def main(args):
    check_out(args)
    student_dir, on_policy = model_dir(args.student, "--student"), args.prefix == "student"
    tokenizer = load_tokenizer(student_dir, "--student")
    if on_policy:
        teacher_dir = model_dir(args.teacher, "--teacher")
        teacher_tokenizer = load_tokenizer(teacher_dir, "--teacher")
        teacher_stops = stop_ids(teacher_tokenizer, teacher_dir)
    else:
        rollouts = read_artifact(args.rollouts, "--rollouts", "rollout")
        teacher_tokenizer = load_tokenizer(os.path.join(args.rollouts, "tokenizer"), "--rollouts")
        teacher_stops = rollouts["stop_ids"]
        if rollouts["prompt_suffix"] != args.prompt_suffix:
            refuse(
                f"--prompt_suffix: is {args.prompt_suffix!r}, but --rollouts were made with {rollouts['prompt_suffix']!r}"
            )
    match_tokenizers(args, tokenizer, teacher_tokenizer, "--teacher" if on_policy else "--rollouts")
    if not 1 <= args.k <= len(tokenizer):
        refuse(f"--k {args.k}: must lie between 1 and the {len(tokenizer)} tokens of the vocabulary")
    student_stops = stop_ids(tokenizer, student_dir)
    stops = {
        "student": student_stops,
        "teacher": teacher_stops,
        "both": sorted({*student_stops, *teacher_stops}),
    }[args.stop_ids]
    sampling = sampling_from(args, tokenizer, stops)
    stops = sampling.stop_ids
    if on_policy:
        problems = load_problems(args.data, args.limit)
        prompts = encode_problems(args, problems, tokenizer, context_of(student_dir))
        items = [(problem["id"], prompt) for problem, prompt in zip(problems, prompts)]
    else:
        items = stored_responses(args, context_of(student_dir), len(tokenizer))
    teacher, teacher_config = teacher_signal(args, items)
    kl = (f"mix {args.fkl_weight:g}" if args.kl == "mix" else args.kl) + (
        "" if args.vocab == "full" else f" ({args.vocab})"
    )
    cell = {"name": f"{args.prefix} prefix, {kl} KL", "prefix": args.prefix, "kl": kl}
    run = Run(args, student_dir, tokenizer, stops, cell, samples=on_policy)
    if not run.first_step and teacher_config:
        if on_policy:
            short = sampling._replace(n=1, max_response_tokens=min(256, args.max_response_tokens))
            few = [
                Response(prompt, group[0].response_ids, False)
                for prompt, group in zip(prompts, run.sample(prompts[:8], short, args.seed))
            ]
        else:
            few = [response._replace(tokens=response.tokens[:256]) for response in items[:8]]
        first_look(args, run, teacher, few, tokenizer, student_stops, teacher_stops)
    if on_policy and truncates(args):
        print(
            f"{run.name}: WARNING: with --temperature {args.temperature} --top_p {args.top_p} --top_k {args.top_k} the student "
            "prefixes are not samples of the student; sampler_kl in the metrics says how far they are",
            flush=True,
        )
    if args.curriculum:
        run.curriculum = run.curriculum or {"level": 0, "open": True}

    queue, step = [], run.first_step  # steps done
    while step < args.steps and not ended(args, run):
        started = clock()
        horizon = args.horizons[run.curriculum["level"]] if args.curriculum else args.max_response_tokens
        if on_policy:
            if step % args.refresh_every == 0:
                queue = sampled_responses(
                    args, run, items, sampling._replace(max_response_tokens=horizon), step
                )
            batch, queue = queue[: args.batch_size * args.n], queue[args.batch_size * args.n :]
        else:
            picked = [items[i] for i in batch_indices(len(items), args.batch_size, step, args.seed)]
            batch = [
                r._replace(tokens=r.tokens[:horizon], cut=r.cut or len(r.tokens) > horizon) for r in picked
            ]
        sampled = clock()
        metrics, seconds = accumulate_gradients(args, run.model, teacher, batch, len(tokenizer))
        grad_norm, lr = optimizer_step(
            args, run.model, run.optimizer, step, [response.id for response in batch]
        )
        seconds |= {
            "seconds_sample": sampled - started,
            "seconds_train": clock() - sampled - sum(seconds.values()),
        }
        step += 1

        tokens = sum(len(r.tokens) for r in batch)
        student_cost = sum(
            tflops(run.config, len(r.prompt), len(r.tokens), forwards=3, generations=int(on_policy))
            for r in batch
        )
        teacher_cost = (
            sum(tflops(teacher_config, len(r.prompt), len(r.tokens), forwards=1) for r in batch)
            if teacher_config
            else 0
        )
        run.spent["tflops"] += (
            student_cost + teacher_cost * on_policy
        )  # a stored score was paid for once, before
        run.spent["tflops_uncached"] += student_cost + teacher_cost
        run.spent["response_tokens"] += tokens
        if args.curriculum:
            gate(args, run, step)
        row = {
            **metrics,
            "response_length": tokens / len(batch),
            "truncated": sum(r.cut for r in batch) / len(batch),
            "grad_norm": grad_norm,
            "lr": lr,
            "horizon": horizon,
            "staleness": (step - 1) % args.refresh_every,
            "seconds": sum(seconds.values()),
            **seconds,
            "tokens_per_second": tokens / sum(seconds.values()),
        }
        run.end_step(step, row, SHOWN, last=step == args.steps or ended(args, run))
    run.finish("train", step)


if __name__ == "__main__":
    ranks.start()
    run_stage(main, get_args())
    ranks.end()
