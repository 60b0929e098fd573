"""Sample, grade and measure: Avg@n, Pass@k, Maj@k, length, predictive entropy, with bootstrap intervals."""

import itertools
import json
import math
import os
import random

import torch
from tqdm import tqdm

from distil import ranks
from distil.artifacts import refuse
from distil.grading import grade, verdict_on
from distil.models import batches_by_tokens, output_head, response_hidden
from distil.sampling import derive_seed, sample, sample_as_finished
from streaming_kl import linear_streaming_kl

EVAL_SAMPLING = {"temperature": 0.6, "top_p": 0.95}  # the paper's, for evaluations in training and after it
PAPER_N = {"aime24": 5, "amc23": 5, "math500": 3, "gsm8k": 3}  # responses to each problem; 4 for other data
DRAWS = 1000  # of the bootstrap, and at most of the subsets of a vote


def data_name(data):
    """The short name of an alias, a hub id or a file: "math500" of data/math500.jsonl."""
    return os.path.splitext(os.path.basename(data.split(":")[0]))[0]


def pass_at_k(n, correct, k):
    """Chance that k responses drawn without replacement from n, of which `correct` are right, hold a right one."""
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def majority(classes, correct, k):
    """Chance that the answer given most often by k of the responses is right. classes: for each response the mark of its answer,
    or None; correct: whether it is right. Ties are drawn; where no response has an answer, there is no vote.

    majority([0, 0, 2], [True, True, False], 3) -> 1.0;  majority([0, 1], [True, False], 2) -> 0.5"""
    right = {mark for mark, good in zip(classes, correct) if good}
    subsets = list(itertools.combinations(classes, k))
    if len(subsets) > DRAWS:
        subsets = random.Random(0).sample(subsets, DRAWS)
    chance = 0.0
    for subset in subsets:
        votes = {mark: subset.count(mark) for mark in subset if mark is not None}
        first = [mark for mark, count in votes.items() if count == max(votes.values())]
        chance += sum(mark in right for mark in first) / max(1, len(first))
    return chance / len(subsets)


def resampled(values, weights=None):
    """DRAWS bootstrap means over problems of sum(values) / sum(weights). Equal lengths draw the same problems, so that
    two evaluations can be compared draw by draw."""
    values = torch.tensor(values, dtype=torch.float64)
    weights = torch.ones_like(values) if weights is None else torch.tensor(weights, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    picked = (torch.randint(len(values), (len(values),), generator=generator) for _ in range(DRAWS))
    return torch.stack([values[i].sum() / weights[i].sum() for i in picked])


def middle(draws):
    """The interval that holds the middle 95% of the draws."""
    draws = draws.sort().values.tolist()
    return [draws[int(0.025 * DRAWS)], draws[int(0.975 * DRAWS) - 1]]


def interval(values, weights=None):
    """95% bootstrap interval, over problems, of sum(values) / sum(weights); of the mean without weights."""
    return middle(resampled(values, weights))


@torch.no_grad()
def predictive_entropy(model, prompts, responses, vocab_size, micro_batch_tokens):
    """A number for each response: the mean over its tokens of the model's full-softmax entropy (nats, temperature 1)."""
    entropies, lengths = (
        {},
        [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)],
    )
    for batch, _ in ranks.split_micro_batches(batches_by_tokens(lengths, micro_batch_tokens)):
        hidden = response_hidden(model, [prompts[i] for i in batch], [responses[i] for i in batch])
        head = output_head(model, "--model").detach().to(hidden.dtype)
        entropy = linear_streaming_kl(
            hidden, head, hidden, head, fkl_weight=1.0, vocab_size=vocab_size
        ).student_entropy
        for i, piece in zip(batch, entropy.split([len(responses[i]) for i in batch])):
            entropies[i] = piece.mean().item()
    entropies = dict(ranks.gather(list(entropies.items())))
    return [entropies[i] for i in range(len(prompts))]


def evaluate(model, engine, tokenizer, problems, prompts, sampling, seed, ks, micro_batch_tokens):
    """Sample, grade and measure: (results, rows). `engine` samples; `model` gives the entropies (they may be the same)."""
    rows = {}
    for found in evaluate_problems(
        model, engine, tokenizer, problems, prompts, sampling, seed, micro_batch_tokens
    ):
        rows |= found
    rows = [row for place in range(len(problems)) for row in rows[place]]
    return summarise(rows, sampling.n, ks), rows


def evaluate_problems(
    model, engine, tokenizer, problems, prompts, sampling, seed, micro_batch_tokens, done=()
):
    """Yields {place of a problem: its n graded rows} as problems are done, without those whose places are in `done`. Problems go
    through in chunks that depend on nothing that came before, so what is made again after a kill is the same."""
    size = max(1, sampling.sample_batch // sampling.n) * ranks.world_size()
    chunks = [
        [place for place in range(start, min(start + size, len(problems))) if place not in done]
        for start in range(0, len(problems), size)
    ]
    with tqdm(
        total=len(problems),
        initial=len(done),
        unit="problem",
        desc="evaluate",
        leave=False,
        disable=len(problems) <= size or ranks.rank() > 0,
    ) as bar:
        for todo in filter(None, chunks):
            given = engine, [prompts[place] for place in todo], sampling, derive_seed(seed, "evaluate"), todo
            for groups in (
                sample_as_finished(*given) if ranks.world_size() == 1 else [dict(enumerate(sample(*given)))]
            ):
                places = [todo[i] for i in groups]
                yield dict(
                    zip(
                        places,
                        grade_groups(
                            model,
                            tokenizer,
                            [problems[place] for place in places],
                            [prompts[place] for place in places],
                            groups.values(),
                            micro_batch_tokens,
                        ),
                    )
                )
                bar.update(len(groups))


def grade_groups(model, tokenizer, problems, prompts, groups, micro_batch_tokens):
    """For each problem the rows of its group of Samples: the response, its verdict and its entropy."""
    groups = [
        [
            {
                "id": problem["id"],
                "sample": index,
                "prompt_ids": prompt,
                "response_ids": ids,
                "response": tokenizer.decode(ids, skip_special_tokens=True),
                "answer": problem["answer"],
                "finish_reason": reason,
                "tokens": len(ids),
            }
            for index, (ids, reason, *_) in enumerate(group)
        ]
        for problem, prompt, group in zip(problems, prompts, groups, strict=True)
    ]
    rows = [row for group in groups for row in group]
    mine = rows[ranks.rank_slice(len(rows))]
    grades = ranks.gather(grade([row["response"] for row in mine], [row["answer"] for row in mine]))
    entropies = predictive_entropy(
        model,
        [row["prompt_ids"] for row in rows],
        [row["response_ids"] for row in rows],
        len(tokenizer),
        micro_batch_tokens,
    )
    for row, verdict, entropy in zip(rows, grades, entropies, strict=True):
        row |= {**verdict._asdict(), "entropy": entropy}
    for group in groups:
        mark_equal_answers(group)
    return groups


def mark_equal_answers(rows):
    """Gives each response to one problem `same_as`: the first sample with an equal answer; None where there is no answer."""
    for i, row in enumerate(rows):
        equal = (
            other["sample"]
            for other in rows[:i]
            if other["same_as"] == other["sample"]
            and (
                other["correct"]
                and row["correct"]
                or other["correct"] == row["correct"]
                and verdict_on(row["extracted"], other["extracted"]) == "right"
            )
        )
        row["same_as"] = next(equal, row["sample"]) if row["extracted"] else None


def by_problem(rows, n, ks):
    """{metric: (values, weights or None)}, a value a problem: the metric is the sum of the values over that of the weights, or the
    mean of the values. rows: n graded ones for each problem, in order."""
    groups = [rows[i : i + n] for i in range(0, len(rows), n)]
    assert all(len({row["id"] for row in group}) == 1 and len(group) == n for group in groups), (
        "not n rows a problem"
    )
    correct = [sum(row["correct"] for row in group) for group in groups]
    metrics = {"avg": ([c / n for c in correct], None)}
    for k in ks:
        metrics[f"pass@{k}"] = [pass_at_k(n, c, k) for c in correct], None
        metrics[f"maj@{k}"] = (
            [
                majority([row["same_as"] for row in group], [row["correct"] for row in group], k)
                for group in groups
            ],
            None,
        )
    tokens = [sum(row["tokens"] for row in group) for group in groups]
    metrics["length"] = [count / n for count in tokens], None
    metrics["truncated"] = (
        [sum(row["finish_reason"] == "length" for row in group) / n for group in groups],
        None,
    )
    metrics["entropy"] = [sum(row["entropy"] * row["tokens"] for row in group) for group in groups], tokens
    return metrics


def mean_of(values, weights):
    return sum(values) / (len(values) if weights is None else sum(weights))


def summarise(rows, n, ks):
    """Results over graded rows, n of them for each problem, in order: each metric and its interval."""
    results = {
        "problems": len(rows) // n,
        "n": n,
        "pass": {},
        "pass_interval": {},
        "maj": {},
        "maj_interval": {},
        "timed_out": sum(row["timed_out"] for row in rows),
    }
    for name, (values, weights) in by_problem(rows, n, ks).items():
        kind, _, k = name.partition("@")
        if k:
            results[kind][k], results[f"{kind}_interval"][k] = (
                mean_of(values, weights),
                interval(values, weights),
            )
        else:
            results[kind], results[f"{kind}_interval"] = mean_of(values, weights), interval(values, weights)
    return results


def origin_of(args, directory):
    """Where the model comes from, by the checkpoint.json of train.py and grpo.py: run, cell, step, what was spent."""
    path = os.path.join(directory, "checkpoint.json")
    if not os.path.isfile(path):
        return {"run": args.model, "cell": {"prefix": "-", "kl": "-"}, "step": None, "tflops": None}
    try:
        with open(path, encoding="utf-8") as file:
            origin = json.load(file)
        cell = origin["cell"] | {name: str(origin["cell"][name]) for name in ("prefix", "kl")}
        known = {
            "run": str(origin["run"]),
            "cell": cell,
            "step": int(origin["step"]),
            "tflops": float(origin["tflops"]),
        }
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        refuse(f"--model {args.model}: its checkpoint.json is damaged ({error!r})")
    return {
        name: value for name, value in origin.items() if name not in ("schema", "sha256", "files")
    } | known
