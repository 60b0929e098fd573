"""Distil a teacher into a student in one cell of the grid: whose prefixes, which token-level KL.

    --prefix teacher, --kl forward    off-policy SFT           stored rollouts, the teacher's soft labels
    --prefix student, --kl forward    DAgger-style SFT         its own samples, the teacher's soft labels
    --prefix teacher, --kl reverse    offline RL               stored rollouts, mode-seeking
    --prefix student, --kl reverse    on-policy distillation   its own samples, mode-seeking

At every position that predicts a response token, with p the teacher's distribution and q the student's over
the whole vocabulary,

    loss = w KL(p || q) + (1 - w) KL(q || p)     w = 1 forward, 0 reverse, --fkl_weight for mix

(the paper's lambda is 1 - w). No gradient flows through the sampling of the prefix. Prompt and padding carry
no loss; the stop token does.

    rollouts/, scores/                   ->  run/final/ (a Hugging Face directory), run/metrics.jsonl,
    or problems, sampled and scored live     run/evals.jsonl, run/meta.json; names: docs/metrics.md

    python train.py --prefix teacher --kl forward --student Qwen/Qwen3-0.6B-Base \\
        --rollouts out/rollouts --scores out/scores --template teacher --out out/run
    python train.py --prefix student --kl reverse --student Qwen/Qwen3-0.6B-Base \\
        --teacher Qwen/Qwen3-4B --template teacher --data deepscaler --out out/run
"""

import functools

import torch

from distil import artifacts, batches, flags, matching, models, ranks, sampling
from distil import teacher as teachers
from distil.problems import add_problem_flags, asked, load_problems
from distil.prompts import encode_problems, load_tokenizer, stop_ids, vocab_size_of
from distil.rollouts import stored_responses
from distil.server import add_server_flags
from runs import diagnostics, flops, preflight, training
from streaming_kl import linear_divergence, linear_streaming_kl, sampler_kl, token_logps

# Divergences beside the KLs, {name: function}: the name is then a choice of --kl; the function gets the
# logits (n, V) of student and teacher at n positions, in float32, and returns n losses in nats.
DIVERGENCES = {}

SHOWN = "loss fkl rkl nll student_entropy teacher_entropy overlap_ratio response_length truncated".split()
NOTHING = "the sets of --topk_set are empty, or both models say the same"


def get_args(argv=None):
    parser = flags.stage_parser(__doc__)
    p = parser.add_argument_group("the cell")
    kls = ["forward", "reverse", "mix", *DIVERGENCES]
    assert len({*kls}) == len(kls), "an entry of DIVERGENCES has the name of a KL"
    p.add_argument("--prefix", choices=["teacher", "student"], required=True, help="whose responses")
    p.add_argument("--kl", choices=kls, required=True, help="the token-level divergence")
    p.add_argument("--fkl_weight", type=flags.fraction, help="weight of the forward KL, with --kl mix only")
    vocab_help = "the exact KL; the KL on the --k likeliest tokens; or one sample, the response's own tokens"
    p.add_argument("--vocab", choices=["full", "topk", "sampled"], default="full", help=vocab_help)
    p.add_argument("--k", type=flags.positive_int, default=16, help="likeliest tokens, in top-k and overlap")
    sets = ["student", "teacher", "union", "intersection", "difference", "symmetric_difference"]
    p.add_argument("--topk_set", choices=sets, default="student", help="of both models' likeliest tokens")
    units = ["token", "sequence"]
    p.add_argument("--normalize", choices=units, default="sequence", help="what the loss is a mean of")
    p.add_argument("--position_bins", type=flags.positive_int, help="log means of bins of so many positions")
    p = parser.add_argument_group("what goes in")
    p.add_argument("--student", type=flags.path, required=True, help="directory or hub id to start from")
    p.add_argument("--teacher", type=flags.path, help="directory or hub id of the teacher (student prefix)")
    add_server_flags(p, "teacher_server")
    p.add_argument("--rollouts", type=flags.path, help="directory written by rollout.py (teacher prefix)")
    p.add_argument("--scores", type=flags.path, help="directory written by score_teacher.py (teacher prefix)")
    add_problem_flags(p, required=False, template=False)
    template_help = "whose chat template both models use, if they have different ones"
    p.add_argument("--template", choices=["student", "teacher"], help=template_help)
    ends = ["both", "student", "teacher"]
    p.add_argument("--stop_ids", choices=ends, default="both", help="whose end tokens end a response")
    teachers.add_teacher_prompt_flags(p)
    p = parser.add_argument_group("sampling (student prefix)")
    sampling.add_sampling_flags(p, gpu_memory_utilization=0.3)
    p.add_argument("--refresh_every", type=flags.positive_int, default=1, help="steps between samplings")
    p = parser.add_argument_group("entropy-gated length curriculum; its held-out problems are --eval_data")
    p.add_argument("--curriculum", choices=["entropy"], help="grow the responses while entropy lasts")
    limits_help = "rising limits of response tokens; the last takes the place of --max_response_tokens"
    p.add_argument("--horizons", type=flags.rising, metavar="L0,L1,...", help=limits_help)
    p.add_argument("--entropy_floor", type=flags.non_negative, help="nats; below it the limit stays as it is")
    p.add_argument("--gate_every", type=flags.positive_int, help="steps between decisions")
    p.add_argument("--on_gate_fail", choices=["hold", "stop"], default="hold", help="keep the limit, or end")
    training.add_training_flags(parser, steps=1000, batch_size=32, lr=5e-7)
    artifacts.add_output_flags(parser)
    args = parser.parse_args(argv)
    check_args(parser, args)
    args.fkl_weight = {"forward": 1.0, "reverse": 0.0}.get(args.kl, args.fkl_weight)
    return args


def check_args(parser, args):
    """Refuse combinations of flags that mean nothing."""
    if (args.kl == "mix") != (args.fkl_weight is not None):
        parser.error("--kl mix needs --fkl_weight, and only it takes one")
    if args.kl in DIVERGENCES and args.vocab != "full":
        parser.error(f"--vocab {args.vocab}: --kl {args.kl} needs the full vocabulary")
    # Only there are a response's own tokens samples of the KL's expectation.
    unbiased = [("teacher", "forward"), ("student", "reverse")]
    if args.vocab == "sampled" and (args.prefix, args.kl) not in unbiased:
        parser.error("--vocab sampled needs --prefix teacher --kl forward, or student and reverse")
    own_prompt = ["teacher_system_prompt", "teacher_context_column"]
    needed = {"teacher": ["rollouts", "scores"], "student": ["teacher", "data", *own_prompt]}
    optional = own_prompt + ["scores"] * (args.vocab == "sampled")  # hard labels need no teacher
    for prefix, names in needed.items():
        for name in names:
            given = getattr(args, name) is not None
            if given and args.prefix != prefix:
                parser.error(f"--prefix {args.prefix} does not use --{name}")
            if not given and args.prefix == prefix and name not in optional:
                parser.error(f"--prefix {args.prefix} needs --{name}")
    served = args.vocab == "sampled" or args.vocab == "topk" and args.topk_set == "teacher"
    if args.teacher_server and not (served and args.prefix == "student"):
        parser.error("--teacher_server needs --prefix student, --vocab sampled or --topk_set teacher")
    if args.prefix == "teacher" and args.template == "student":
        parser.error("--template student: rollouts keep the template of rollout.py --template_from")
    if args.save_every % args.refresh_every:
        parser.error("--refresh_every must divide --save_every")
    if args.curriculum:
        if not args.horizons or args.entropy_floor is None or not args.gate_every or not args.eval_data:
            others = "--horizons, --entropy_floor, --gate_every and --eval_data"
            parser.error(f"--curriculum entropy needs {others}")
        if args.gate_every % args.refresh_every:
            parser.error("--gate_every must be a multiple of --refresh_every")
        args.max_response_tokens = args.horizons[-1]
    elif args.horizons or args.entropy_floor is not None or args.gate_every:
        parser.error("--horizons, --entropy_floor and --gate_every need --curriculum entropy")
    training.check_training_flags(parser, args, args.curriculum)


# ---------------------------------------------------------------------------------------------------------
# The method


def objective(args, hidden, head, signal, tokens, weight):
    """The cell's loss over N response positions, sum_i weight_i loss_i, and metrics {name: (N,)}, detached.

    The student's hidden (N, H) predict the tokens (N,) by its head (V, H); signal: the teacher at the same
    positions (teacher.Signal); weight (N,). The metric `loss` is loss_i; an entry of DIVERGENCES has none."""
    pair = hidden, head, signal.hidden, signal.head
    if args.vocab == "full" and args.kl not in DIVERGENCES:
        out, top = linear_streaming_kl(*pair, fkl_weight=args.fkl_weight, weight=weight, top_k=args.k)
        token_loss = args.fkl_weight * out.fkl + (1 - args.fkl_weight) * out.rkl
        return out.loss, diagnostics.exact_metrics(out, top) | {"loss": token_loss}
    metrics, top = diagnostics.measure(hidden.detach(), head.detach(), signal, args.k)
    if args.kl in DIVERGENCES:
        return linear_divergence(DIVERGENCES[args.kl], *pair, weight=weight), metrics
    if args.vocab == "topk":
        loss, more = topk_objective(args, hidden, head, signal, top, weight)
    else:
        loss, more = sampled_objective(args, hidden, head, signal, tokens, weight)
    return loss, metrics | more


def sampled_objective(args, hidden, head, signal, tokens, weight):
    """The one-sample form of the KL at the response's own tokens y (Proposition 1 of arXiv 2605.16826)."""
    log_q = token_logps(hidden, head, tokens)  # (N,)
    log_p = signal.logps if signal.hidden is None else token_logps(signal.hidden, signal.head, tokens)
    metrics = {"nll": -log_q.detach()}
    if log_p is not None:
        metrics["log_ratio"] = (log_q - log_p).detach()
    if args.kl == "forward":  # y ~ teacher:  grad KL(p||q) = -E[grad log q(y)]
        loss = -log_q
    else:  # y ~ student:  grad KL(q||p) = E[(log q(y) - log p(y)) grad log q(y)], the log-ratio a constant
        loss = metrics["log_ratio"] * log_q
    return (weight * loss).sum(), metrics | {"loss": loss.detach()}


def topk_objective(args, hidden, head, signal, top, weight):
    """KL between p and q renormalised on a set of likely tokens (arXiv 2604.13016): --topk_set.

    top: the --k likeliest tokens of both, S of the student and T of the teacher. The set is S, T, S | T,
    S & T, S - T or S ^ T; an empty one has no loss. What it leaves out of a distribution is its tail mass."""
    student_ids, teacher_ids = top.student_ids, top.teacher_ids  # (N, k) each
    both = torch.cat([student_ids, teacher_ids], 1)
    same = student_ids[:, :, None] == teacher_ids[:, None]  # (N, k, k)
    in_teacher, in_student = same.any(2), same.any(1)  # (N, k): which of S are in T, which of T in S
    every = torch.ones_like(in_teacher)
    sets = {
        "student": (student_ids, every),
        "teacher": (teacher_ids, every),
        "union": (both, torch.cat([every, ~in_student], 1)),
        "intersection": (student_ids, in_teacher),
        "difference": (student_ids, ~in_teacher),
        "symmetric_difference": (both, ~torch.cat([in_teacher, in_student], 1)),
    }
    ids, keep = sets[args.topk_set]  # (N, m), and which of them are in the set
    log_q = token_logps(hidden, head, ids)
    log_p = top.teacher_logps if signal.hidden is None else token_logps(signal.hidden, signal.head, ids)
    # finite, not -inf: an empty set then gives 0, not NaN
    log_q_set = log_q.masked_fill(~keep, -1e30).log_softmax(1)
    log_p_set = log_p.masked_fill(~keep, -1e30).log_softmax(1)
    fkl = (log_p_set.exp() * (log_p_set - log_q_set)).sum(1)
    rkl = (log_q_set.exp() * (log_q_set - log_p_set)).sum(1)
    loss = args.fkl_weight * fkl + (1 - args.fkl_weight) * rkl
    metrics = {"loss": loss.detach(), "topk_fkl": fkl.detach(), "topk_rkl": rkl.detach()}
    metrics["student_tail_mass"] = 1 - (log_q.exp() * keep).sum(1).detach()
    metrics["teacher_tail_mass"] = 1 - (log_p.exp() * keep).sum(1)
    return (weight * loss).sum(), metrics


def micro_batch_loss(args, student, teacher, vocab_size, scored, responses, tokens, weight):
    """The loss over the N tokens of some Responses, and all metrics {name: (N,)}."""
    started = training.mark()
    signal = teacher.signal(responses)
    scored.append((started, training.mark()))
    hidden, head = models.forward(student, responses, vocab_size, args.dtype)
    loss, metrics = objective(args, hidden, head, signal, tokens, weight)
    if args.prefix == "student" and not sampling.is_plain(args):
        sampler = args.temperature, args.top_p, args.top_k
        metrics["sampler_kl"] = sampler_kl(hidden.detach(), head.detach(), *sampler)
    if args.position_bins:
        metrics |= diagnostics.by_position(metrics, responses, args.position_bins, args.max_response_tokens)
    metrics.pop("loss", None)
    return loss, metrics


def train_step(args, run, teacher, batch, step):
    """One optimizer step on a batch of Responses: {metric: value}."""
    tokens, scored = sum(len(r.response_ids) for r in batch), []
    weights = batches.token_weights(batch, args.normalize)
    loss_of = functools.partial(micro_batch_loss, args, run.model, teacher, run.vocab_size, scored)
    sums = batches.accumulate_gradients(run.model.device, batch, weights, args.micro_batch_tokens, loss_of)
    grad_norm, lr = training.optimizer_step(args, run.model, run.optimizer, step, [r.id for r in batch])
    metrics = {"loss": sums.pop("loss"), "padding": 1 - sum(r.length for r in batch) / sums.pop("positions")}
    metrics |= diagnostics.position_means(sums) | {name: total / tokens for name, total in sums.items()}
    return metrics | {"grad_norm": grad_norm, "lr": lr, "seconds_score": training.seconds_between(scored)}


def gate(args, run, step):
    """The curriculum's decision after `step` steps (arXiv 2605.16826, section 5.2).

    Go on to the next horizon if the mean predictive entropy of the student's own samples on held-out
    problems, limited to the present horizon, is at least the floor; else never again."""
    state = run.curriculum
    if not state["open"] or state["level"] + 1 == len(args.horizons) or step % args.gate_every:
        return
    horizon = args.horizons[state["level"]]
    results = run.measure(horizon)
    passed = results["entropy"] >= args.entropy_floor
    run.curriculum = {"level": state["level"] + int(passed), "open": passed}
    decision = "advance" if passed else args.on_gate_fail
    row = {"step": step, "horizon": horizon, "entropy_floor": args.entropy_floor, "decision": decision}
    run.append("gates.jsonl", row | {name: results[name] for name in ("entropy", "length", "avg")})
    found = f"entropy {results['entropy']:.4f} at horizon {horizon}, floor {args.entropy_floor}"
    run.say(f"step {step} gate: {found}: {decision}")


def gate_ended(args, run):
    """Whether a failed gate has ended the run."""
    return bool(args.curriculum) and args.on_gate_fail == "stop" and not run.curriculum["open"]


# ---------------------------------------------------------------------------------------------------------
# What goes in


def sampled_responses(args, run, problems, prompts, config, step):
    """Responses of the student as it is now, to the problems of the coming --refresh_every steps."""
    steps = range(step, step + args.refresh_every)
    picked = [i for s in steps for i in batches.batch_indices(len(prompts), args.batch_size, s, args.seed)]
    groups = run.sample([prompts[i] for i in picked], config, sampling.derive_seed(args.seed, "train", step))
    pairs = [(problems[i], r) for i, group in zip(picked, groups, strict=True) for r in group]
    return [r._replace(id=p["id"], teacher_prompt_ids=p.get("teacher_prompt_ids")) for p, r in pairs]


def add_costs(args, run, teacher, batch):
    """Add a step to the ledger. A stored score was paid for before: it counts in tflops_uncached only."""
    for r in batch:
        size = len(r.prompt_ids), len(r.response_ids)
        live = args.prefix == "student"
        student_cost = flops.tflops(run.config, *size, forwards=3, generations=int(live))
        size = teacher.prompt_tokens(r), len(r.response_ids)
        teacher_cost = flops.tflops(teacher.config, *size, forwards=1) if teacher.config else 0
        run.spent["tflops"] += student_cost + (teacher_cost if live else 0)
        run.spent["tflops_uncached"] += student_cost + teacher_cost
        run.spent["response_tokens"] += len(r.response_ids)


def main(args):
    artifacts.check_out(args)
    on_policy, wanted = args.prefix == "student", asked(args, args.eval_data)
    student_dir = models.model_dir(args.student, "--student")
    tokenizer, context = load_tokenizer(student_dir, "--student"), models.context_of(student_dir)
    size = vocab_size_of(tokenizer, models.rows_of(student_dir), "--student")
    student_stops = stop_ids(tokenizer, student_dir, size)
    teacher_dir = on_policy and models.model_dir(args.teacher, "--teacher", not args.teacher_server)
    if args.k > size:
        artifacts.refuse(f"--k {args.k}: there are only {size} tokens")
    if on_policy:
        teacher_stops = matching.match_teacher(teacher_dir, tokenizer, size, args.template, wanted.prompting)
    else:
        teacher_stops = matching.match_rollouts(args.rollouts, wanted.prompting, tokenizer, args.template)
    stops = {"student": student_stops, "teacher": teacher_stops, "both": student_stops + teacher_stops}
    config = sampling.sampling_from(args, size, stops[args.stop_ids])
    if on_policy:
        problems = load_problems(args.data, args.limit, wanted.columns, args.teacher_context_column)
        about, limits = (tokenizer, wanted.prompting), (args.max_prompt_tokens, args.max_response_tokens)
        teacher_context = models.context_of(teacher_dir, "--teacher")
        own = args.teacher_system_prompt, size, teacher_context, *limits
        problems, own_dropped = teachers.own_prompts(problems, *about, *own)
        if "teacher_prompt_ids" not in problems[0]:
            context = min(context, teacher_context)
        problems, prompts, dropped = encode_problems(problems, *about, size, context, *limits)
        taught = [p["teacher_prompt_ids"] for p in problems if "teacher_prompt_ids" in p]
        longest = max(map(len, prompts + taught)) + args.max_response_tokens
    else:
        stored = stored_responses(args.rollouts, args.max_response_tokens, context, size)
        about = args.rollouts, stored, args.vocab, args.k, args.topk_set
        teacher = teachers.stored_teacher(args.scores, *about)
        if args.scores:
            vocab_size_of(tokenizer, teacher.head_rows, "--scores", size)
        longest = max(response.length for response in stored)
    kl = f"mix {args.fkl_weight:g}" if args.kl == "mix" else args.kl
    kl += "" if args.vocab == "full" else f" ({args.vocab})"
    cell = {"name": f"{args.prefix} {kl}", "prefix": args.prefix, "kl": kl}
    given = args, student_dir, tokenizer, config, cell, longest
    run = training.Run(*given, None if args.teacher_server else teacher_dir or args.scores, on_policy)
    if on_policy:
        run.dropped["data"] = dropped + own_dropped
        if args.teacher_server:
            limits = longest, args.k * (args.vocab == "topk"), args.server_requests, args.server_timeout
            teacher = teachers.served_teacher(args.teacher_server, args.teacher, teacher_dir, size, *limits)
        else:
            teacher = teachers.live_teacher(teacher_dir, args.dtype, size)

    if not run.first_step and teacher.config:
        if on_policy:
            few = config._replace(n=1, max_response_tokens=min(256, args.max_response_tokens))
            groups = run.sample(prompts[:8], few, args.seed)
            own = taught or [None] * len(prompts)
            first = [group[0]._replace(teacher_prompt_ids=ids) for ids, group in zip(own, groups)]
        else:
            first = [response.first(256) for response in stored[:8]]
        compared = tokenizer, size, student_stops, teacher, teacher_stops, first
        preflight.preflight(run.model, *compared, args.k, args.dtype, wanted.prompting)
    run.start()
    if on_policy and not sampling.is_plain(config):
        flags = f"--temperature {args.temperature} --top_p {args.top_p} --top_k {args.top_k}"
        run.say(f"WARNING: {flags}: not plain samples of the student; sampler_kl says how far they are")
    run.curriculum = run.curriculum or args.curriculum and {"level": 0, "open": True}

    step, sampled_ahead = run.first_step, []  # steps done; responses sampled for later steps
    while step < args.steps and not gate_ended(args, run):
        started = training.clock()
        horizon = args.horizons[run.curriculum["level"]] if args.curriculum else args.max_response_tokens
        if on_policy:
            if step % args.refresh_every == 0:
                limited = config._replace(max_response_tokens=horizon)
                sampled_ahead = sampled_responses(args, run, problems, prompts, limited, step)
            count = args.batch_size * args.n
            batch, sampled_ahead = sampled_ahead[:count], sampled_ahead[count:]
            teacher.read_ahead(batches.own_responses(batch, args.micro_batch_tokens))
        else:
            steps = (batches.batch_indices(len(stored), args.batch_size, step + s, args.seed) for s in (0, 1))
            batch, coming = ([stored[i].first(horizon) for i in picked] for picked in steps)
            if step + 1 < args.steps:
                teacher.read_ahead(batches.own_responses(coming, args.micro_batch_tokens))
        sampled = training.clock()
        metrics = train_step(args, run, teacher, batch, step)
        seconds = {"seconds_sample": sampled - started, "seconds_score": metrics.pop("seconds_score")}
        seconds["seconds_train"] = training.clock() - started - sum(seconds.values())
        step += 1

        add_costs(args, run, teacher, batch)
        if args.curriculum:
            gate(args, run, step)
        tokens, total = sum(len(r.response_ids) for r in batch), sum(seconds.values())
        metrics |= {"response_length": tokens / len(batch), "staleness": (step - 1) % args.refresh_every}
        metrics |= {"truncated": sum(r.truncated for r in batch) / len(batch), "horizon": horizon}
        metrics |= {"seconds": total, **seconds, "tokens_per_second": tokens / total}
        last = step == args.steps or gate_ended(args, run)
        run.end_step(step, metrics, SHOWN, NOTHING, last, can_stop=not sampled_ahead)
    run.finish("train", step)


if __name__ == "__main__":
    ranks.start()
    artifacts.run_stage(main, get_args())
    ranks.end()
