"""Batches: which responses are in a step, in which micro-batches, with what weights; and their gradients."""

import functools

import torch

from distil import ranks
from distil.sampling import derive_seed


def batches_by_tokens(lengths, budget):
    """Indices grouped by similar length, with rows x longest <= budget in a batch; a longer row goes alone.

    A batch with at least a 32nd of the budget takes no row that makes more than a tenth of it padding.
    batches_by_tokens([60, 90, 62, 2], 1024) -> [[3, 0], [2], [1]]"""
    batches, tokens = [], 0
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        padded = (len(batches[-1]) + 1) * lengths[i] if batches else 0
        dense = tokens < budget / 32 or tokens + lengths[i] >= 0.9 * padded
        if batches and padded <= budget and dense:
            batches[-1].append(i)
            tokens += lengths[i]
        else:
            batches.append([i])
            tokens = lengths[i]
    return batches


def batch_indices(count, batch_size, step, seed):
    """Which of `count` items are in a step: epoch after epoch, each in an order of its own.

    A function of the step alone, so a resumed run needs no saved state."""
    positions = range(step * batch_size, (step + 1) * batch_size)
    return [permutation(count, derive_seed(seed, "epoch", i // count))[i % count] for i in positions]


@functools.lru_cache(maxsize=2)
def permutation(count, seed):
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def token_weights(responses, normalize):
    """The weight of each response's tokens; over the batch they sum to 1, however it is split.

    "token": the loss is the mean over all tokens; "sequence": the mean over responses of their means."""
    total = sum(len(r.response_ids) for r in responses)
    if normalize == "token":
        return [1 / total for _ in responses]
    return [1 / (len(responses) * len(r.response_ids)) for r in responses]


def micro_batches(responses, micro_batch_tokens):
    """This rank's part of a batch of Responses, as ranks.split_micro_batches gives it."""
    lengths = [max(r.length, len(r.teacher_prompt_ids or ()) + len(r.response_ids)) for r in responses]
    return ranks.split_micro_batches(batches_by_tokens(lengths, micro_batch_tokens))


def own_responses(responses, micro_batch_tokens):
    """The Responses of a batch that this rank will compute."""
    return [responses[i] for indices, _ in micro_batches(responses, micro_batch_tokens) for i in indices]


def accumulate_gradients(device, responses, weights, micro_batch_tokens, micro_batch_loss, backward=True):
    """The loop over micro-batches: adds the gradients of the loss over a batch of Responses.

    micro_batch_loss(responses, tokens (N,), weight (N,)) returns sum_i weight_i loss_i over N response
    tokens and metrics {name: (..., N)}, detached; weights: of each response's tokens. Returns {metric: sum
    over all tokens}, the loss, and `positions`: how many went through the model, padding included."""
    positions, totals = 0, {"loss": torch.zeros((), dtype=torch.float64, device=device)}
    for indices, is_real in micro_batches(responses, micro_batch_tokens):
        micro_batch = [responses[i] for i in indices]
        tokens = [token for r in micro_batch for token in r.response_ids]
        weight = [is_real * weights[i] for i in indices for _ in responses[i].response_ids]
        tokens, weight = torch.tensor(tokens, device=device), torch.tensor(weight, device=device)  # (N,) each
        with torch.set_grad_enabled(backward):
            loss, metrics = micro_batch_loss(micro_batch, tokens, weight)
        if backward:
            loss.backward()
        positions += len(indices) * max(r.length for r in micro_batch)
        for name, values in (("loss", loss.detach()), *metrics.items()):  # summed where they are: no waiting
            total = values.sum(-1).double() * (1 if name == "loss" else is_real)
            totals[name] = totals.get(name, 0.0) + total
    totals["positions"] = torch.tensor(positions)
    sums = ranks.sum_over_ranks({name: total.cpu() for name, total in totals.items()})
    return {name: total.tolist() for name, total in sums.items()}
