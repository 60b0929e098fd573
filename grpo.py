"""Group relative policy optimisation (GRPO, arXiv 2402.03300) of a checkpoint on the correctness of its answers.

For each problem the current model samples a group of responses; each is rewarded 1 if its answer is correct, else 0. With r_i the
rewards of a group, y_it the tokens of response i, pi the model, pi_old the model that sampled, all at temperature 1,

    A_i   = (r_i - mean(r)) / (std(r) + 1e-4)                     --scale_advantages none: not divided
    s_it  = pi(y_it | x, y_i<t) / pi_old(y_it | x, y_i<t)         1 with one update a batch, so clipping acts only with --updates
    w_it  = min(pi_old(y_it | ..) / pi_vllm(y_it | ..), cap)      where vLLM and the trainer compute otherwise; 1 with --engine hf
    loss  = mean_it [ -w_it min(s_it A_i, clip(s_it, 1 - clip_low, 1 + clip_high) A_i) + kl_weight KL(pi || reference)_it ]

The KL is the exact one over the vocabulary, at no more memory than the log-probabilities take. A group whose rewards are all equal
has no policy gradient; those groups are counted. Four functions are the method: rewards_of, advantages_of, policy_loss, train_step.

    checkpoint, problems  ->  run/final/ (a Hugging Face directory), run/metrics.jsonl, run/evals.jsonl, run/meta.json

    python grpo.py --model out/run/final --data deepscaler --out out/run_grpo

PAPER: the division by the deviation, the mean over tokens, the clipping and what happens to responses that are cut off are not
stated. Tokens are sampled with top-p 0.95 there and here, while pi and pi_old are the whole softmax.
"""

import argparse
from collections import Counter
from typing import NamedTuple

import torch

from distil import ranks
from distil.artifacts import add_output_flags, run_stage
from distil.evaluation import origin_of
from distil.grading import grade
from distil.models import batches_by_tokens, model_dir, output_head, response_hidden, token_logps
from distil.preflight import check_tokenizers
from distil.problems import add_problem_flags
from distil.prompts import load_tokenizer, tokenizer_sha256
from distil.sampling import add_sampling_flags, derive_seed, prepare
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
    "reward",
    "equal_groups",
    "loss",
    "entropy",
    "clip_fraction",
    "reference_kl",
    "mismatch",
    "response_length",
    "truncated",
)


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # what goes in
    p.add_argument(
        "--model", required=True, help="Hugging Face directory or hub id of the checkpoint to start from"
    )
    add_problem_flags(p)
    # sampling; --n is the group size
    add_sampling_flags(p, n=8, top_p=0.95, gpu_memory_utilization=0.3)
    # the loss
    p.add_argument(
        "--scale_advantages",
        choices=["group", "none"],
        default="group",
        help="divide advantages by the deviation of the group's rewards, or not",
    )
    p.add_argument(
        "--normalize", choices=["token", "sequence"], default="token", help="what weighs the same in a batch"
    )
    p.add_argument(
        "--clip_low", type=float, default=0.2, help="the ratio to the sampling policy is clipped at 1 - this"
    )
    p.add_argument(
        "--clip_high", type=float, default=0.2, help="the ratio to the sampling policy is clipped at 1 + this"
    )
    p.add_argument(
        "--updates", type=int, default=1, help="parts into which a sampled batch is cut, with an update each"
    )
    p.add_argument(
        "--kl_weight", type=float, default=0.0, help="weight of the KL to the reference (0: none is loaded)"
    )
    p.add_argument(
        "--reference",
        help="Hugging Face directory or hub id of the reference, with --kl_weight (default: --model)",
    )
    p.add_argument(
        "--overlong",
        choices=["keep", "mask"],
        default="keep",
        help="responses that were cut off count as any other, or carry no loss; their rewards count either way",
    )
    p.add_argument(
        "--importance_cap",
        type=float,
        default=2.0,
        help="largest weight of a token for being likelier to the trainer than to vLLM (0: no weights)",
    )
    # optimisation
    add_training_flags(p, steps=1000, batch_size=32, lr=1e-6)
    add_output_flags(p)
    args = p.parse_args(argv)
    if args.n < 2:
        p.error(f"--n {args.n}: a group needs at least 2 responses to be compared")
    if args.temperature == 0:
        p.error("--temperature 0: the responses of a group would be the same")
    check_training_flags(p, args)
    if not 0 <= args.clip_low <= 1 or args.clip_high < 0:
        p.error(
            f"--clip_low {args.clip_low:g} --clip_high {args.clip_high:g}: must lie in [0, 1] and be at least 0"
        )
    if args.updates < 1 or args.batch_size % args.updates:
        p.error(f"--updates {args.updates}: must divide the --batch_size of {args.batch_size} problems")
    if args.kl_weight < 0 or args.importance_cap < 0:
        p.error("--kl_weight and --importance_cap must be at least 0")
    if args.reference and not args.kl_weight:
        p.error("--reference needs a --kl_weight above 0")
    return args


# ---------------------------------------------------------------------------------------------------------------------
# The method


class Response(NamedTuple):
    """One response to train on. tokens: its ids, with the stop token; sampler: their log-probabilities from vLLM (None: not known);
    old: those from the policy that sampled, as the trainer computes them (None: it is the model as it is)."""

    id: str
    prompt: list
    tokens: list
    advantage: float
    sampler: list = None
    old: torch.Tensor = None


def rewards_of(tokenizer, problems, groups):
    """1.0 for a response with the correct answer, else 0.0: (problems, n)."""
    pairs = [
        (one.response_ids, problem["answer"])
        for problem, group in zip(problems, groups, strict=True)
        for one in group
    ]
    pairs = pairs[ranks.rank_slice(len(pairs))]
    verdicts = grade(
        [tokenizer.decode(ids, skip_special_tokens=True) for ids, _ in pairs], [answer for _, answer in pairs]
    )
    return torch.tensor(ranks.gather([float(verdict.correct) for verdict in verdicts])).view(len(groups), -1)


def advantages_of(rewards, scale="group"):
    """(problems, n) rewards -> advantages of the same shape: centred in each group and, by "group", divided by its deviation.

    advantages_of([[1, 0], [1, 1]]) ~ [[0.71, -0.71], [0, 0]], by "none" [[0.5, -0.5], [0, 0]]"""
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred if scale == "none" else centred / (rewards.std(1, keepdim=True) + 1e-4)


def policy_loss(args, logps, old_logps, advantages, weight):
    """The clipped loss over N tokens, and which of them are clipped, so without gradient: logps (N,) with gradient, old_logps (N,)
    of the sampling policy, advantages (N,), weight (N,)."""
    ratio = torch.exp(logps - old_logps)
    bounded = ratio.clamp(1 - args.clip_low, 1 + args.clip_high)
    clipped = bounded * advantages < ratio * advantages
    return -(weight * torch.where(clipped, bounded, ratio) * advantages).sum(), clipped


def train_step(args, run, reference, groups, vocab_size, step):
    """Cuts the groups of Responses into --updates parts and makes an update with each. Returns {metric: value}."""
    size = len(groups) // args.updates
    parts = [[r for group in groups[i : i + size] for r in group] for i in range(0, len(groups), size)]
    if args.updates > 1:  # the model is about to leave the policy that sampled
        parts = [add_old_logps(args, run.model, part, vocab_size) for part in parts]
    loss, norms, sums = 0.0, [], Counter()
    for part in parts:
        value, part_sums = accumulate_gradients(args, run.model, reference, part, vocab_size)
        norm, lr = optimizer_step(
            args, run.model, run.optimizer, step, list(dict.fromkeys(r.id for r in part))
        )
        loss += value / args.updates
        norms.append(norm)
        sums.update(part_sums)
    tokens = sum(len(r.tokens) for part in parts for r in part)
    return {
        "loss": loss,
        **{name: value / tokens for name, value in sums.items()},
        "grad_norm": sum(norms) / len(norms),
        "lr": lr,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Its forward passes


def accumulate_gradients(args, model, reference, batch, vocab_size):
    """Adds the gradient of the loss over the batch of Responses. Returns the loss, and metrics summed over tokens {metric: sum}."""
    weights, loss, sums = token_weights(batch, args.normalize), 0.0, Counter()
    for trains in (True, False):  # the others are measured alone
        chosen = [i for i, r in enumerate(batch) if has_gradient(args, r) == trains]
        lengths = [len(batch[i].prompt) + len(batch[i].tokens) for i in chosen]
        for part, counts in ranks.split_micro_batches(batches_by_tokens(lengths, args.micro_batch_tokens)):
            micro = [batch[chosen[i]] for i in part]
            weight = [counts * weights[chosen[i]] for i in part for _ in batch[chosen[i]].tokens]
            weight = torch.tensor(weight, device=model.device)  # (N,)
            with torch.set_grad_enabled(trains):
                value, metrics = micro_batch_loss(args, model, reference, micro, weight, vocab_size)
            if trains:
                value.backward()
                loss += value.item()
            sums.update({name: counts * values.sum().item() for name, values in metrics.items()})
    sums = ranks.sum_over_ranks({"loss": loss, **sums})
    return sums.pop("loss"), sums


def has_gradient(args, response):
    return response.advantage != 0 or args.kl_weight > 0


def micro_batch_loss(args, model, reference, micro, weight, vocab_size):
    """The loss over the N tokens of some Responses, sum_i weight_i loss_i, and metrics {name: (N,), detached}."""

    def per_token(values):
        return torch.tensor(values, device=model.device)

    hidden, head = forward(args, model, micro, vocab_size)
    logps = token_logps(hidden, head, per_token([token for r in micro for token in r.tokens]))
    old = logps.detach() if micro[0].old is None else torch.cat([r.old for r in micro]).to(model.device)
    importance, metrics = torch.ones_like(weight), {}
    if micro[0].sampler is not None:
        log_ratio = old - per_token([logp for r in micro for logp in r.sampler])
        metrics["mismatch"] = log_ratio.abs()
        if args.importance_cap:
            importance = log_ratio.exp().clamp(max=args.importance_cap)
    advantages = per_token([r.advantage for r in micro for _ in r.tokens])
    loss, clipped = policy_loss(args, logps, old, advantages, weight * importance)
    metrics["clip_fraction"] = clipped.float()
    if reference is None:
        with torch.no_grad():
            same = hidden.detach(), head.detach()
            metrics["entropy"] = linear_streaming_kl(
                *same, *same, fkl_weight=1.0, logits_dtype=torch.float32
            ).student_entropy
    else:
        with torch.no_grad():
            other = forward(args, reference, micro, vocab_size)
        out = linear_streaming_kl(
            hidden, head, *other, fkl_weight=0.0, weight=weight, logits_dtype=torch.float32
        )
        loss = loss + args.kl_weight * out.loss
        metrics |= {"entropy": out.student_entropy, "reference_kl": out.rkl}
    return loss, metrics


def forward(args, model, batch, vocab_size):
    """Hidden states (N, H) of the positions that predict the response tokens, and the head (V, H) without its padding."""
    with autocast(args):
        hidden = response_hidden(model, [r.prompt for r in batch], [r.tokens for r in batch])
    hidden = hidden.to(getattr(torch, args.dtype))  # autocast leaves it in float32
    return hidden, output_head(model, "--model")[:vocab_size].to(hidden.dtype)


@torch.no_grad()
def add_old_logps(args, model, batch, vocab_size):
    """The Responses with the log-probabilities of the model as it is now."""
    old = {}
    for part, _ in ranks.split_micro_batches(
        batches_by_tokens([len(r.prompt) + len(r.tokens) for r in batch], args.micro_batch_tokens)
    ):
        tokens = torch.tensor([token for i in part for token in batch[i].tokens], device=model.device)
        logps = token_logps(*forward(args, model, [batch[i] for i in part], vocab_size), tokens)
        for i, piece in zip(part, logps.split([len(batch[i].tokens) for i in part])):
            old[i] = piece.cpu()
    old = dict(ranks.gather(list(old.items())))
    return [r._replace(old=old[i]) for i, r in enumerate(batch)]


# ---------------------------------------------------------------------------------------------------------------------


def load_reference(args, tokenizer):
    directory = model_dir(args.reference or args.model, "--reference")
    check_tokenizers(
        tokenizer, "--model", tokenizer_sha256(load_tokenizer(directory, "--reference")), "--reference"
    )
    return ranks.load_sharded(directory, "--reference", args.dtype)


def training_tflops(args, run, reference, response):
    """Of an update with a response; one without a gradient is still measured."""
    size = len(response.prompt), len(response.tokens)
    spent = tflops(
        run.config, *size, forwards=(3 if has_gradient(args, response) else 1) + (args.updates > 1)
    )
    return spent + (tflops(reference.config.to_dict(), *size, forwards=1) if reference else 0.0)


def main(args):
    directory, tokenizer, stops, problems, prompts, sampling = prepare(args)
    sampling = sampling._replace(logprobs=True)
    reference = load_reference(args, tokenizer) if args.kl_weight else None
    cell = origin_of(args, directory)["cell"]  # in which the checkpoint was distilled, if it was
    run = Run(
        args, directory, tokenizer, stops, cell | {"name": cell.get("name", args.model) + ", then GRPO"}
    )

    for step in range(run.first_step, args.steps):
        started = clock()
        picked = batch_indices(len(problems), args.batch_size, step, args.seed)
        sampled = run.sample([prompts[i] for i in picked], sampling, derive_seed(args.seed, "grpo", step))
        seconds = {"seconds_sample": clock() - started}
        rewards = rewards_of(tokenizer, [problems[i] for i in picked], sampled)
        advantages = advantages_of(rewards, args.scale_advantages)
        seconds["seconds_grade"] = clock() - started - sum(seconds.values())
        groups = [
            [
                Response(problems[i]["id"], prompts[i], one.response_ids, advantage, one.logps)
                for one, advantage in zip(group, row)
                if one.finish_reason == "stop" or args.overlong == "keep"
            ]
            for i, group, row in zip(picked, sampled, advantages.tolist())
        ]
        metrics = train_step(args, run, reference, groups, len(tokenizer), step)
        seconds["seconds_train"] = clock() - started - sum(seconds.values())

        lengths = [len(one.response_ids) for group in sampled for one in group]
        spent = sum(
            tflops(run.config, len(prompts[i]), len(one.response_ids), generations=1)
            for i, group in zip(picked, sampled)
            for one in group
        )
        spent += sum(
            training_tflops(args, run, reference, response) for group in groups for response in group
        )
        run.spent["tflops"] += spent
        run.spent["tflops_uncached"] += spent
        run.spent["response_tokens"] += sum(lengths)
        row = {
            "reward": rewards.mean().item(),
            "equal_groups": (advantages == 0).all(1).float().mean().item(),
            **metrics,
            "response_length": sum(lengths) / len(lengths),
            "truncated": sum(one.finish_reason == "length" for group in sampled for one in group)
            / len(lengths),
            "seconds": sum(seconds.values()),
            **seconds,
            "tokens_per_second": sum(lengths) / sum(seconds.values()),
        }
        run.end_step(step + 1, row, SHOWN, last=step + 1 == args.steps)
    run.finish("grpo", args.steps)


if __name__ == "__main__":
    ranks.start()
    run_stage(main, get_args())
    ranks.end()
