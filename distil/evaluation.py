"""Sample, grade and measure: Avg@n, Pass@k, Maj@k, length, predictive entropy, with bootstrap intervals."""

import json
import math
import os
from collections import Counter
from fractions import Fraction

import torch
from tqdm import tqdm

from distil import ranks
from distil.artifacts import refuse
from distil.batches import micro_batches
from distil.grading import grade, verdict_on
from distil.jsonl import finite
from distil.models import autocast, forward
from distil.sampling import derive_seed, sample, sample_stream
from streaming_kl import entropies

EVAL_SAMPLING = {"temperature": 0.6, "top_p": 0.95}  # the paper's, in training and after it
PAPER_N = {"aime24": 5, "amc23": 5, "math500": 3, "gsm8k": 3}  # responses to each problem; 4 for other data
DRAWS = 1000  # bootstrap samples


def data_names(data):
    """{data set: its short name, longer if others share it}: a-test and b-test of a/test.csv, b/test.csv."""
    choices = {}  # {data set: its names, from short to long}
    for one in data:
        parts = os.path.splitext(one)[0].replace(":", "-").split("/")
        names = ["-".join(parts[-length:]) for length in range(1, len(parts) + 1)]
        short = os.path.splitext(os.path.basename(one.split(":")[0]))[0]
        choices[one] = [short, *names, one.replace("/", "-")]
    uses = Counter(name for names in choices.values() for name in set(names))
    return {one: next((n for n in names if uses[n] == 1), names[-1]) for one, names in choices.items()}


def pass_at_k(n, correct, k):
    """Chance that k responses, drawn from n without replacement, include one of the `correct` right ones."""
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def majority(classes, correct, k):
    """Chance that the most frequent answer among k responses, drawn without replacement, is right.

    classes: for each response the class of its answer, None if it has none; correct: whether it is right.
    Ties are broken at random; k responses without any answer are wrong. Exact, by counting.
    majority([0, 0, 2], [True, True, False], 3) -> 1.0;  majority([0, 1], [True, False], 2) -> 0.5"""
    sizes = Counter(classes)
    unanswered = sizes.pop(None, 0)
    wins = Fraction(0)
    for right in {mark for mark, is_right in zip(classes, correct) if is_right} - {None}:
        others = [size for mark, size in sizes.items() if mark != right]
        for votes in range(1, min(k, sizes[right]) + 1):
            for (taken, ties), ways in ways_to_draw(others, k - votes, votes).items():
                ways *= math.comb(sizes[right], votes) * math.comb(unanswered, k - votes - taken)
                wins += Fraction(ways, ties + 1)
    return float(wins / math.comb(len(classes), k))


def ways_to_draw(sizes, limit, most):
    """{(responses drawn, classes with `most`): ways}: at most `limit` responses, at most `most` from a class.

    sizes: of the classes. ways_to_draw([2, 1], 2, 1) -> {(0, 0): 1, (1, 1): 3, (2, 2): 2}"""
    ways = {(0, 0): 1}
    for size in sizes:
        extended = Counter()
        for (taken, ties), count in ways.items():
            for votes in range(min(size, most, limit - taken) + 1):
                extended[taken + votes, ties + (votes == most)] += count * math.comb(size, votes)
        ways = extended
    return ways


def mean_of(values, weights=None):
    """sum(values) / sum(weights); the mean without weights."""
    return sum(values) / (len(values) if weights is None else sum(weights))


def bootstrap_means(values, weights=None):
    """mean_of in DRAWS resamplings of the problems (float64); equally many problems are resampled alike."""
    values = torch.tensor(values, dtype=torch.float64)
    weights = torch.ones_like(values) if weights is None else torch.tensor(weights, dtype=torch.float64)
    picks = torch.randint(len(values), (DRAWS, len(values)), generator=torch.Generator().manual_seed(0))
    return values[picks].sum(1) / weights[picks].sum(1)


def percentile_interval(means):
    """[low, high] that holds the middle 95% of the DRAWS means."""
    ordered = means.sort().values.tolist()
    return [ordered[int(0.025 * DRAWS)], ordered[int(0.975 * DRAWS) - 1]]


def interval(values, weights=None):
    """95% bootstrap interval of mean_of, over problems."""
    return percentile_interval(bootstrap_means(values, weights))


@torch.no_grad()
def predictive_entropy(model, responses, vocab_size, micro_batch_tokens, dtype=None):
    """Mean full-softmax entropy of each Response's tokens, in nats, temperature 1; dtype as in forward()."""
    means = {}
    for indices, _ in micro_batches(responses, micro_batch_tokens):
        batch = [responses[i] for i in indices]
        entropy = entropies(*forward(model, batch, vocab_size, dtype))  # (N,)
        per_response = entropy.split([len(response.response_ids) for response in batch])
        means |= {i: values.mean().item() for i, values in zip(indices, per_response)}
    means = dict(ranks.gather(list(means.items())))
    return [means[i] for i in range(len(responses))]


def evaluate(model, engine, tokenizer, problems, prompts, sampling, seed, ks, micro_batch_tokens, dtype=None):
    """Sample, grade and measure: (results, rows). `engine` samples; `model` gives the entropies."""
    rows_of = {}
    with autocast(dtype):  # for the sampling of an engine that is a float32 model
        asked = tokenizer, problems, prompts, sampling, seed, micro_batch_tokens, dtype
        for finished in evaluate_problems(model, engine, *asked):
            rows_of |= finished
    rows = [row for place in range(len(problems)) for row in rows_of[place]]
    return summarise(rows, sampling.n, ks), rows


def evaluate_problems(
    model, engine, tokenizer, problems, prompts, sampling, seed, micro_batch_tokens, dtype=None, done=()
):
    """Yield {place of a problem: its n graded rows} as problems finish, without the places in `done`."""
    todo = [place for place in range(len(problems)) if place not in done]
    hide = len(problems) * sampling.n <= sampling.sample_batch or ranks.rank() > 0
    look = {"desc": "evaluate", "unit": "problem", "leave": False, "disable": hide}
    asked = engine, [prompts[place] for place in todo], sampling, derive_seed(seed, "evaluate"), todo
    stream = sample_stream(*asked) if ranks.world_size() == 1 else [dict(zip(todo, sample(*asked)))]
    with tqdm(total=len(problems), initial=len(done), **look) as bar:
        for groups in stream:
            yield grade_groups(model, tokenizer, sampling, problems, groups, micro_batch_tokens, dtype)
            bar.update(len(groups))


def grade_groups(model, tokenizer, sampling, problems, groups, micro_batch_tokens, dtype=None):
    """{place of a problem: its graded rows of samples.jsonl}; groups: {place: Responses to that problem}."""
    responses = [response for group in groups.values() for response in group]
    rows_of = {place: [] for place in groups}
    for place, group in groups.items():
        for index, r in enumerate(group):
            row = {"id": problems[place]["id"], "sample": index, "problem": problems[place]["problem"]}
            row |= {"prompt_ids": r.prompt_ids, "response_ids": r.response_ids}
            row["response"] = tokenizer.decode(r.response_ids, skip_special_tokens=True)
            row["answer"] = problems[place]["answer"]
            row |= {"finish_reason": "length" if r.truncated else "stop", "tokens": len(r.response_ids)}
            rows_of[place].append(row)
    rows = [row for group in rows_of.values() for row in group]
    own = rows[ranks.rank_slice(len(rows))]
    grades = ranks.gather(grade([row["response"] for row in own], [row["answer"] for row in own]))
    entropies = predictive_entropy(model, responses, sampling.vocab_size, micro_batch_tokens, dtype)
    for row, verdict, entropy in zip(rows, grades, entropies, strict=True):
        row |= finite({**verdict._asdict(), "entropy": entropy}, f"{row['id']}, sample {row['sample']}")
    for group in rows_of.values():
        mark_equal_answers(group)
    return rows_of


def mark_equal_answers(rows):
    """Give each row of a problem `same_as`: the first sample with an equal answer; None without an answer."""
    firsts = []  # the first row of each answer
    for row in rows:
        equal = (first["sample"] for first in firsts if have_equal_answers(first, row))
        row["same_as"] = next(equal, row["sample"]) if row["extracted"] else None
        if row["same_as"] == row["sample"]:
            firsts.append(row)


def have_equal_answers(first, second):
    if first["correct"] or second["correct"]:
        return first["correct"] and second["correct"]
    return verdict_on(second["extracted"], first["extracted"]) == "right"


def values_by_problem(rows, n, ks):
    """{metric: (a value per problem, weights or None)} for mean_of. rows: graded, n per problem, in order."""
    groups = [rows[i : i + n] for i in range(0, len(rows), n)]
    assert all([row["id"] for row in group] == [group[0]["id"]] * n for group in groups), "not n per problem"
    correct = [[row["correct"] for row in group] for group in groups]
    classes = [[row["same_as"] for row in group] for group in groups]
    tokens = [sum(row["tokens"] for row in group) for group in groups]
    truncated = [sum(row["finish_reason"] == "length" for row in group) for group in groups]
    metrics = {"avg": ([sum(c) / n for c in correct], None)}
    for k in ks:
        metrics[f"pass@{k}"] = [pass_at_k(n, sum(c), k) for c in correct], None
        metrics[f"maj@{k}"] = [majority(marks, c, k) for marks, c in zip(classes, correct)], None
    metrics["length"] = [count / n for count in tokens], None
    metrics["truncated"] = [count / n for count in truncated], None
    metrics["entropy"] = [sum(row["entropy"] * row["tokens"] for row in group) for group in groups], tokens
    return metrics


def summarise(rows, n, ks):
    """results.json of graded rows, n for each problem, in order: each metric and its interval."""
    results = {"problems": len(rows) // n, "n": n}
    results |= {"pass": {}, "pass_interval": {}, "maj": {}, "maj_interval": {}}
    results["timed_out"] = sum(row["timed_out"] for row in rows)
    for name, (values, weights) in values_by_problem(rows, n, ks).items():
        kind, _, k = name.partition("@")
        mean, bounds = mean_of(values, weights), interval(values, weights)
        if k:
            results[kind][k], results[f"{kind}_interval"][k] = mean, bounds
        else:
            results |= {kind: mean, f"{kind}_interval": bounds}
    return results


def origin_of(directory, name):
    """run, cell, step and TFLOPs of a checkpoint, from its checkpoint.json; else `name` as the run."""
    path = os.path.join(directory, "checkpoint.json")
    if not os.path.isfile(path):
        return {"run": name, "cell": {"prefix": "-", "kl": "-"}, "step": None, "tflops": None}
    try:
        with open(path, encoding="utf-8") as file:
            origin = json.load(file)
        cell = origin["cell"] | {key: str(origin["cell"][key]) for key in ("name", "prefix", "kl")}
        origin |= {"run": str(origin["run"]), "cell": cell}
        cost = origin["tflops"]  # null: unknown
        origin |= {"step": int(origin["step"]), "tflops": None if cost is None else float(cost)}
        json.dumps(origin, allow_nan=False)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        refuse(f"--model {name}: its checkpoint.json is damaged ({error!r})")
    return {key: value for key, value in origin.items() if key not in ("schema", "sha256", "files")}
