"""Group relative policy optimisation (GRPO, arXiv 2402.03300) of a checkpoint on correct answers.

For each problem the current model samples a group of responses. With r_i the rewards of a group (1 if the
answer is correct, else 0), y_it the tokens of response i, pi the policy and pi_old the policy that sampled,

    A_i   = (r_i - mean(r)) / (std(r) + 1e-4)                  --scale_advantages none: not divided
    s_it  = pi(y_it | x, y_i<t) / pi_old(y_it | x, y_i<t)      1 with one update a batch (--updates)
    w_it  = min(pi_old(y_it | ..) / pi_vllm(y_it | ..), cap)   vLLM computes a little differently
    loss  = mean_it [ -w_it min(s_it A_i, clip(s_it, 1 - clip_low, 1 + clip_high) A_i)
                      + kl_weight KL(model || reference)_it ]

--policy says what pi is. full: the model, its softmax at temperature 1 over the whole vocabulary, even where
--temperature, --top_p or --top_k sample from something else. truncated: the distribution that was sampled
from, softmax(logits / temperature) over the tokens that top-k and top-p keep. Then the loss has the gradient
of the sampler's expected reward. With --updates, the kept tokens are those of pi_old.

The KL is exact, at temperature 1 over the whole vocabulary, in no more memory than the log-probabilities
take. A group whose rewards are all equal has no policy gradient; those groups are counted.

    checkpoint, problems  ->  run/final/ (a Hugging Face directory), run/metrics.jsonl, run/evals.jsonl,
                              run/meta.json; names: docs/metrics.md

    python grpo.py --model out/run/final --data deepscaler --out out/run_grpo

Not stated in arXiv 2605.16826: the division by the deviation, the mean over tokens, the clipping, what
happens to truncated responses, the policy, what its batch of 32 counts (here responses: 4 groups of 8).
"""

import functools
import math
from collections import Counter

import torch

from distil import artifacts, batches, flags, models, ranks, sampling
from distil.evaluation import origin_of
from distil.grading import grade
from distil.matching import check_tokenizers
from distil.models import forward
from distil.problems import add_problem_flags, asked
from distil.prompts import load_tokenizer, tokenizer_sha256, vocab_size_of
from runs import flops, training
from streaming_kl import (
    KeptSets,
    entropies,
    kept_sets,
    linear_streaming_kl,
    sampler_kl,
    sampler_logps,
    token_logps,
)

SHOWN = ("reward", "correct", "equal_groups", "trained", "loss", "entropy", "clip_fraction", "reference_kl")
SHOWN += ("mismatch", "sampler_kl", "outside", "response_length", "truncated")
NOTHING = "in each group the rewards are equal, or the responses masked (--overlong)"


def correct(args, problem, response, verdict):
    """1 for a correct answer, else 0."""
    return float(verdict.correct)


# Rewards, {name: function}: the name is then a choice of --reward. The function gets the flags, the problem
# {"id", "problem", "answer"}, the models.Response (with its text) and its grading.Grade; it returns a number.
REWARDS = {"correct": correct}


def get_args(argv=None):
    parser = flags.stage_parser(__doc__)
    p = parser.add_argument_group("what goes in")
    p.add_argument("--model", type=flags.path, required=True, help="directory or hub id to start from")
    add_problem_flags(p)
    p = parser.add_argument_group("sampling; --n is the group size")
    sampling.add_sampling_flags(p, n=8, top_p=0.95, gpu_memory_utilization=0.3)
    p = parser.add_argument_group("the loss")
    p.add_argument("--reward", choices=sorted(REWARDS), default="correct", help="what makes a response good")
    policy_help = "full: the model; truncated: what --temperature, --top_p and --top_k make of it"
    p.add_argument("--policy", choices=["full", "truncated"], default="full", help=policy_help)
    scales_help = "whether advantages are divided by the deviation of the group's rewards"
    p.add_argument("--scale_advantages", choices=["group", "none"], default="group", help=scales_help)
    units = ["token", "sequence"]
    p.add_argument("--normalize", choices=units, default="token", help="what the loss is a mean of")
    p.add_argument("--clip_low", type=flags.fraction, default=0.2, help="ratios are clipped at 1 - this")
    p.add_argument("--clip_high", type=flags.non_negative, default=0.2, help="ratios are clipped at 1 + this")
    p.add_argument(
        "--updates",
        type=flags.positive_int,
        default=1,
        help="split a sampled batch into N parts, an update each",
    )
    p.add_argument(
        "--kl_weight", type=flags.non_negative, default=0.0, help="weight of the KL to --reference"
    )
    p.add_argument("--reference", type=flags.path, help="directory or hub id (default: --model)")
    overlong_help = "whether truncated responses are trained on; their rewards count either way"
    p.add_argument("--overlong", choices=["keep", "mask"], default="keep", help=overlong_help)
    cap_help = "largest weight of a token for being likelier to the trainer than to vLLM (0: no weights)"
    p.add_argument("--importance_cap", type=flags.non_negative, default=2.0, help=cap_help)
    training.add_training_flags(parser, steps=1000, batch_size=4, lr=1e-6)
    artifacts.add_output_flags(parser)
    args = parser.parse_args(argv)
    check_args(parser, args)
    return args


def check_args(parser, args):
    """Refuse combinations of flags that mean nothing."""
    if args.n < 2:
        parser.error(f"--n {args.n}: a group needs at least 2 responses to be compared")
    if args.temperature == 0:
        parser.error("--temperature 0: the responses of a group would be the same")
    training.check_training_flags(parser, args)
    if args.batch_size % args.updates:
        parser.error(f"--updates {args.updates}: must divide the --batch_size of {args.batch_size} problems")
    if args.reference and not args.kl_weight:
        parser.error("--reference needs a --kl_weight above 0")


# ---------------------------------------------------------------------------------------------------------
# The method


def rewards_of(args, tokenizer, problems, groups):
    """Rewards and verdicts of each problem's group of n Responses: two (problems, n) tensors.

    The verdicts are 1.0 for a correct answer, else 0.0, whatever the reward is."""
    pairs = [(problem, r) for problem, group in zip(problems, groups, strict=True) for r in group]
    pairs = pairs[ranks.rank_slice(len(pairs))]
    texts = [tokenizer.decode(r.response_ids, skip_special_tokens=True) for _, r in pairs]
    verdicts = grade(texts, [problem["answer"] for problem, _ in pairs])
    reward = REWARDS[args.reward]
    found = []
    for (problem, response), text, verdict in zip(pairs, texts, verdicts, strict=True):
        value = float(reward(args, problem, response._replace(text=text), verdict))
        if not math.isfinite(value):
            artifacts.refuse(f"--reward {args.reward}: {value} for a response to {problem['id']}", code=1)
        found.append((value, float(verdict.correct)))
    rewards, verdicts = torch.tensor(ranks.gather(found)).unbind(1)
    return rewards.view(len(groups), -1), verdicts.view(len(groups), -1)


def advantages_of(rewards, scale="group"):
    """(problems, n) rewards -> advantages: centred in each group and, by "group", divided by its deviation.

    advantages_of([[1, 0], [1, 1]]) ~ [[0.71, -0.71], [0, 0]], by "none" [[0.5, -0.5], [0, 0]]"""
    centred = rewards - rewards.mean(1, keepdim=True)
    equal = (rewards == rewards[:, :1]).all(1, keepdim=True)
    centred = centred.masked_fill(equal, 0.0)  # exactly: the mean of equal numbers is rounded
    return centred if scale == "none" else centred / (rewards.std(1, keepdim=True) + 1e-4)


def policy_logps(args, hidden, head, tokens, kept=None):
    """log pi of the tokens (N,), with gradients, and how pi and the sampler differ: {name: (N,)}.

    kept: the KeptSets of the policy that sampled; None: those of this one."""
    sampler = args.temperature, args.top_p, args.top_k
    if sampling.is_plain(args):
        return token_logps(hidden, head, tokens), {}
    if args.policy == "full":
        return token_logps(hidden, head, tokens), {"sampler_kl": sampler_kl(hidden, head, *sampler)}
    logps, kl, outside = sampler_logps(hidden, head, tokens, *sampler, kept)
    return logps, {"sampler_kl": kl, "outside": outside.float()}


def policy_loss(args, logps, old_logps, advantages, weight):
    """The clipped loss over N tokens, and which of them are clipped, so without gradient.

    logps (N,) with gradient, old_logps (N,) under the policy that sampled, advantages (N,), weight (N,)."""
    ratio = torch.exp(logps - old_logps)
    bounded = ratio.clamp(1 - args.clip_low, 1 + args.clip_high)
    clipped = bounded * advantages < ratio * advantages
    return -(weight * torch.where(clipped, bounded, ratio) * advantages).sum(), clipped


def micro_batch_loss(args, model, reference, vocab_size, responses, tokens, weight):
    """The loss over the N tokens of some Responses, sum_i weight_i loss_i, and metrics {name: (N,)}."""
    hidden, head = forward(model, responses, vocab_size, args.dtype)
    kept = KeptSets(*map(torch.cat, zip(*[r.kept for r in responses]))) if responses[0].kept else None
    logps, metrics = policy_logps(args, hidden, head, tokens, kept)
    old_logps = logps.detach()
    if responses[0].old_logps is not None:
        old_logps = torch.cat([r.old_logps for r in responses]).to(tokens.device)
    importance = torch.ones_like(weight)
    if responses[0].sampler_logps is not None:
        vllm_logps = [logp for r in responses for logp in r.sampler_logps]
        log_ratio = old_logps - torch.tensor(vllm_logps, device=tokens.device)
        metrics["mismatch"] = log_ratio.abs()
        if args.importance_cap:
            importance = log_ratio.exp().clamp(max=args.importance_cap)
    advantage_list = [r.advantage for r in responses for _ in r.response_ids]
    advantages = torch.tensor(advantage_list, device=tokens.device)
    loss, clipped = policy_loss(args, logps, old_logps, advantages, weight * importance)
    metrics["clip_fraction"] = clipped.float()
    if reference is None:
        metrics["entropy"] = entropies(hidden, head)
    else:
        with torch.no_grad():
            other = forward(reference, responses, vocab_size)
        out = linear_streaming_kl(hidden, head, *other, fkl_weight=0.0, weight=weight)
        loss = loss + args.kl_weight * out.loss
        metrics |= {"entropy": out.student_entropy, "reference_kl": out.rkl}
    return loss, metrics


def train_step(args, run, reference, groups, step):
    """Split the groups of Responses into --updates parts and update with each: {metric: value}."""
    size = len(groups) // args.updates
    parts = [[r for group in groups[i : i + size] for r in group] for i in range(0, len(groups), size)]
    if args.updates > 1:  # the model is about to leave the policy that sampled
        parts = [add_old_logps(args, run.model, run.vocab_size, part) for part in parts]
    norms, sums = [], Counter()
    for part in parts:
        sums.update(accumulate_gradients(args, run.model, reference, run.vocab_size, part))
        ids = list(dict.fromkeys(r.id for r in part))
        norm, lr = training.optimizer_step(args, run.model, run.optimizer, step, ids)
        norms.append(norm)
    tokens = sum(len(r.response_ids) for part in parts for r in part)
    metrics = {"loss": sums.pop("loss") / args.updates}
    metrics |= {name: total / tokens for name, total in sums.items()}
    return metrics | {"grad_norm": sum(norms) / len(norms), "lr": lr}


def accumulate_gradients(args, model, reference, vocab_size, responses):
    """Add the gradient of the loss over a batch of Responses: {metric: sum over tokens} and the loss.

    Responses without a gradient go through the model for the metrics alone."""
    weights, sums = batches.token_weights(responses, args.normalize), Counter()
    loss_of = functools.partial(micro_batch_loss, args, model, reference, vocab_size)
    for backward in (True, False):
        chosen = [i for i, r in enumerate(responses) if has_gradient(args, r) == backward]
        batch, batch_weights = [responses[i] for i in chosen], [weights[i] for i in chosen]
        limit = args.micro_batch_tokens
        found = batches.accumulate_gradients(model.device, batch, batch_weights, limit, loss_of, backward)
        if not backward:
            del found["loss"]
        del found["positions"]
        sums.update(found)
    return sums


def has_gradient(args, response):
    return response.advantage != 0 or args.kl_weight > 0


@torch.no_grad()
def add_old_logps(args, model, vocab_size, responses):
    """The Responses with their log-probabilities under the policy as it is now, and what that keeps."""
    found = {}
    for indices, _ in batches.micro_batches(responses, args.micro_batch_tokens):
        batch = [responses[i] for i in indices]
        tokens = torch.tensor([token for r in batch for token in r.response_ids], device=model.device)
        hidden, head = forward(model, batch, vocab_size, args.dtype)
        lengths = [len(r.response_ids) for r in batch]
        logps = policy_logps(args, hidden, head, tokens)[0].cpu().split(lengths)
        kept = [None] * len(batch)
        if args.policy == "truncated" and (args.top_p < 1 or args.top_k):
            kept = kept_sets(hidden, head, args.temperature, args.top_p, args.top_k).split(lengths)
        found.update(zip(indices, zip(logps, kept)))
    found = dict(ranks.gather(list(found.items())))
    return [r._replace(old_logps=found[i][0], kept=found[i][1]) for i, r in enumerate(responses)]


# ---------------------------------------------------------------------------------------------------------


def load_reference(args, directory, tokenizer, vocab_size, longest):
    if longest > (context := models.context_of(directory, "--reference")):
        artifacts.refuse(
            f"--reference {directory}: its context is {context}, and rows have up to {longest} tokens"
        )
    other = load_tokenizer(directory, "--reference")
    check_tokenizers(tokenizer, "--model", tokenizer_sha256(other), "--reference")
    vocab_size_of(other, models.rows_of(directory), "--reference", vocab_size)
    return ranks.load_sharded(directory, "--reference", args.dtype)


def add_costs(args, run, reference, sampled, trained):
    """Add a step to the ledger: its samples, and the passes over what was trained on or just measured."""
    cost = 0.0
    for r in sampled:
        cost += flops.tflops(run.config, len(r.prompt_ids), len(r.response_ids), generations=1)
        run.spent["response_tokens"] += len(r.response_ids)
    for r in trained:
        size = len(r.prompt_ids), len(r.response_ids)
        passes = (3 if has_gradient(args, r) else 1) + (args.updates > 1)  # 1 more for old_logps
        cost += flops.tflops(run.config, *size, forwards=passes)
        if reference is not None:
            cost += flops.tflops(reference.config.to_dict(), *size, forwards=1)
    run.spent["tflops"] += cost
    run.spent["tflops_uncached"] += cost


def main(args):
    artifacts.check_out(args)
    sampling_of = functools.partial(sampling.sampling_from, args)
    task = sampling.load_task(args.model, asked(args, args.eval_data), sampling_of)
    config = task.sampling._replace(logprobs="raw" if args.policy == "full" else "processed")
    longest = max(map(len, task.prompts)) + args.max_response_tokens
    cell = origin_of(task.directory, args.model)["cell"]  # it was distilled in, if any
    cell = cell | {"name": f"{cell['name']}, then GRPO" if "name" in cell else "GRPO"}
    other = models.model_dir(args.reference, "--reference") if args.reference else task.directory
    other = other if args.kl_weight else None
    run = training.Run(args, task.directory, task.tokenizer, config, cell, longest, other)
    run.dropped["data"] = task.dropped
    about = task.tokenizer, config.vocab_size, longest
    reference = load_reference(args, other, *about) if other else None
    run.start()

    for step in range(run.first_step, args.steps):
        started = training.clock()
        picked = batches.batch_indices(len(task.problems), args.batch_size, step, args.seed)
        problems, prompts = [task.problems[i] for i in picked], [task.prompts[i] for i in picked]
        groups = run.sample(prompts, config, sampling.derive_seed(args.seed, "grpo", step))
        sampled = training.clock()
        rewards, verdicts = rewards_of(args, task.tokenizer, problems, groups)
        advantages = advantages_of(rewards, args.scale_advantages)
        graded = training.clock()
        trained = []
        for problem, group, row in zip(problems, groups, advantages.tolist(), strict=True):
            labelled = [r._replace(id=problem["id"], advantage=a) for r, a in zip(group, row, strict=True)]
            trained.append([r for r in labelled if not r.truncated or args.overlong == "keep"])
        metrics = train_step(args, run, reference, trained, step)
        ended = training.clock()

        responses = [r for group in groups for r in group]
        add_costs(args, run, reference, responses, [r for group in trained for r in group])
        tokens = sum(len(r.response_ids) for r in responses)
        equal_groups = (advantages == 0).all(1).float().mean().item()
        row = {"reward": rewards.mean().item(), "correct": verdicts.mean().item()}
        trained = sum(has_gradient(args, r) for group in trained for r in group) / len(responses)
        row |= {"equal_groups": equal_groups, "trained": trained, **metrics}
        row |= {"response_length": tokens / len(responses)}
        row |= {"truncated": sum(r.truncated for r in responses) / len(responses)}
        row |= {"seconds": ended - started, "seconds_sample": sampled - started}
        row |= {"seconds_grade": graded - sampled, "seconds_train": ended - graded}
        row |= {"tokens_per_second": tokens / (ended - started)}
        run.end_step(step + 1, row, SHOWN, NOTHING, last=step + 1 == args.steps)
    run.finish("grpo", args.steps)


if __name__ == "__main__":
    ranks.start()
    artifacts.run_stage(main, get_args())
    ranks.end()
