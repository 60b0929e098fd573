"""Group relative policy optimisation (GRPO, arXiv 2402.03300) of a checkpoint on the correctness of its answers.

For each problem the current model samples a group of responses; each is rewarded 1 if its answer is correct, else 0. With r_i the
rewards of a group and y_it the tokens of response i,

    A_i  = (r_i - mean(r)) / (std(r) + 1e-4)
    loss = - sum_i,t A_i  pi(y_it | x, y_i<t) / pi_old(y_it | x, y_i<t)  /  number of response tokens in the batch

There is one update a group, so pi_old is the current model, the ratio is 1 and clipping never acts; there is no KL term (beta 0).
A group whose rewards are all equal has no gradient; those groups are counted.

    checkpoint, problems  ->  run/final/ (a Hugging Face directory), run/metrics.jsonl, run/evals.jsonl, run/meta.json

    python grpo.py --model out/run/final --data deepscaler --out out/run_grpo
"""
import argparse
import json
import os

import torch

from artifacts import add_output_flags
from evaluate import is_correct
from inputs import add_problem_flags
from rollout import add_sampling_flags, derive_seed, prepare
from run import Run, add_training_flags, autocast, batch_indices, check_training_flags, clock, optimizer_step, tflops
from score_teacher import batches_by_tokens, output_head, response_hidden, token_logps

SHOWN = ("reward", "equal_groups", "loss", "response_length", "truncated")


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # what goes in
    p.add_argument("--model", required=True, help="Hugging Face directory or hub id of the checkpoint to start from")
    add_problem_flags(p)
    # sampling; --n is the group size
    add_sampling_flags(p, n=8, top_p=0.95, gpu_memory_utilization=0.3)
    # optimisation
    add_training_flags(p, steps=1000, batch_size=32, lr=1e-6)
    add_output_flags(p)
    args = p.parse_args(argv)
    if args.n < 2:
        p.error(f"--n {args.n}: a group needs at least 2 responses to be compared")
    check_training_flags(p, args)
    return args

# ---------------------------------------------------------------------------------------------------------------------
# The method


def rewards_of(tokenizer, problems, groups):
    """1.0 for a response with the correct answer, else 0.0: (problems, n)."""
    def reward(problem, response_ids):
        return float(is_correct(tokenizer.decode(response_ids, skip_special_tokens=True), problem["answer"]))
    return torch.tensor([[reward(problem, ids) for ids, *_ in group] for problem, group in zip(problems, groups, strict=True)])


def advantages_of(rewards):
    """(problems, n) rewards -> advantages of the same shape: centred in each group and divided by the group's deviation.

    advantages_of([[1, 0], [1, 1]]) ~ [[0.71, -0.71], [0, 0]]"""
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / (rewards.std(1, keepdim=True) + 1e-4)


def policy_loss(logps, old_logps, advantages, total_tokens):
    """The GRPO loss over N tokens: logps (N,) with gradient, old_logps (N,) of the sampling policy, advantages (N,)."""
    return -(advantages * torch.exp(logps - old_logps)).sum() / total_tokens


def accumulate_gradients(args, model, batch, vocab_size):
    """Adds the gradient of the loss over the batch, a list of (prompt ids, response ids, advantage). Returns the loss."""
    total, value = sum(len(response) for _, response, _ in batch), 0.0
    batch = [item for item in batch if item[2] != 0]  # no advantage, no gradient
    for part in batches_by_tokens([len(prompt) + len(response) for prompt, response, _ in batch], args.micro_batch_tokens):
        micro = [batch[i] for i in part]
        tokens = torch.tensor([token for _, response, _ in micro for token in response], device=model.device)              # (N,)
        advantages = torch.tensor([advantage for _, response, advantage in micro for _ in response], device=model.device)  # (N,)
        with autocast(args):
            hidden = response_hidden(model, [prompt for prompt, _, _ in micro], [response for _, response, _ in micro])    # (N, H)
        logps = token_logps(hidden, output_head(model, "--model")[:vocab_size], tokens)
        loss = policy_loss(logps, logps.detach(), advantages, total)
        loss.backward()
        value += loss.item()
    return value

# ---------------------------------------------------------------------------------------------------------------------


def main(args):
    directory, tokenizer, stops, problems, prompts, sampling = prepare(args)
    origin = os.path.join(directory, "checkpoint.json")  # which cell the checkpoint was distilled in, if it was
    cell = json.load(open(origin))["cell"] if os.path.isfile(origin) else {"name": args.model, "prefix": "-", "kl": "-"}
    run = Run(args, directory, tokenizer, stops, cell | {"name": cell["name"] + ", then GRPO"})

    for step in range(run.first_step, args.steps):
        started = clock()
        picked = batch_indices(len(problems), args.batch_size, step, args.seed)
        groups = run.sample([prompts[i] for i in picked], sampling, derive_seed(args.seed, "grpo", step))
        sampled = clock()
        rewards = rewards_of(tokenizer, [problems[i] for i in picked], groups)
        advantages = advantages_of(rewards)
        graded = clock()
        batch = [(prompts[i], ids, advantage) for i, group, row in zip(picked, groups, advantages.tolist())
                 for (ids, *_), advantage in zip(group, row)]
        loss = accumulate_gradients(args, run.model, batch, len(tokenizer))
        grad_norm, lr = optimizer_step(args, run.model, run.optimizer, step, [problems[i]["id"] for i in picked])
        done = clock()

        tokens = sum(len(ids) for _, ids, _ in batch)
        spent = sum(tflops(run.config, len(prompt), len(ids), forwards=3 * (advantage != 0), generations=1)
                    for prompt, ids, advantage in batch)
        run.spent["tflops"] += spent
        run.spent["tflops_uncached"] += spent
        run.spent["response_tokens"] += tokens
        row = {"reward": rewards.mean().item(), "equal_groups": (advantages == 0).all(1).float().mean().item(), "loss": loss,
               "response_length": tokens / len(batch),
               "truncated": sum(reason == "length" for group in groups for _, reason, _ in group) / len(batch),
               "grad_norm": grad_norm, "lr": lr, "seconds": done - started, "seconds_sample": sampled - started,
               "seconds_grade": graded - sampled, "seconds_train": done - graded, "tokens_per_second": tokens / (done - started)}
        run.end_step(step + 1, row, SHOWN, last=step + 1 == args.steps)
    run.finish("grpo", args.steps)


if __name__ == "__main__":
    main(get_args())
