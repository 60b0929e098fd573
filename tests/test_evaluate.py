"""evaluate.py: metrics by enumeration and by hand, entropy, resuming, several data sets, tables, comparisons and figures."""

import itertools
import json
import os
import random
import shutil

import pytest
import torch

import evaluate
import train
from distil import evaluation, models, report, sampling
from distil.artifacts import read_artifact
from distil.evaluation import (
    by_problem,
    interval,
    majority,
    mark_equal_answers,
    mean_of,
    pass_at_k,
    predictive_entropy,
    summarise,
)
from distil.grading import extract_answer, is_correct
from distil.models import load_model
from distil.problems import load_problems
from recipes.toy_world import make_model, make_tokenizer

# ---------------------------------------------------------------------------------------------------------------------
# Metrics


def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_one():
    for n in range(1, 6):
        for correct in range(n + 1):
            for k in range(1, n + 1):
                draws = list(itertools.combinations([True] * correct + [False] * (n - correct), k))
                assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_interval_covers_the_mean_and_shrinks():
    values = [0.0, 1.0] * 50
    low, high = interval(values)
    assert low < 0.5 < high
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 10, rel=0.15)
    assert interval([0.25] * 9) == [0.25, 0.25] and interval(values) == [low, high]


def test_predictive_entropy_is_that_of_the_softmax():
    torch.manual_seed(7)
    model = make_model(make_tokenizer(), 32, 1, 1).eval()
    model.resize_token_embeddings(35, mean_resizing=False)  # rows 29 to 34 are padding
    prompts, responses = [[1, 3, 20], [1], [1, 9]], [[5, 6, 2], [7], [8, 9, 10, 11, 0]]
    for budget in (1, 1000):
        entropies = predictive_entropy(model, prompts, responses, 29, budget)
        for prompt, response, found in zip(prompts, responses, entropies, strict=True):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + response])).logits[
                    0, len(prompt) - 1 : -1, :29
                ]
            logps = logits.double().log_softmax(-1)
            assert found == pytest.approx(-(logps.exp() * logps).sum(-1).mean().item(), rel=1e-5)


def graded(problem, correct, tokens, entropy, reason="stop", same_as=0, timed_out=False):
    return {
        "id": problem,
        "correct": correct,
        "tokens": tokens,
        "entropy": entropy,
        "finish_reason": reason,
        "same_as": same_as,
        "timed_out": timed_out,
    }


def test_summarise_by_hand():
    """Two problems, two responses each: 1 of 2 and 2 of 2 correct; entropy is a mean over tokens, not over responses."""
    rows = [
        graded("a", True, 2, 1.0),
        graded("a", False, 6, 2.0, "length", None, True),
        graded("b", True, 1, 0.0),
        graded("b", True, 1, 4.0),
    ]
    results = summarise(rows, 2, [1, 2])
    assert (
        results["avg"] == 0.75
        and results["pass"] == {"1": 0.75, "2": 1.0}
        and results["maj"] == {"1": 0.75, "2": 1.0}
    )
    assert (
        results["length"] == 2.5
        and results["truncated"] == 0.25
        and results["entropy"] == (2 + 12 + 0 + 4) / 10
    )
    assert results["problems"] == 2 and results["n"] == 2 and results["timed_out"] == 1


def votes(n):
    """Random classes (some None) of n responses and which are correct: one class is, at most."""
    marks = [random.choice([None, 0, 1, 2]) for _ in range(n)]
    right = random.choice([0, 1, 5])
    return marks, [mark == right for mark in marks]


def test_majority_is_the_share_of_elections_won():
    """Against every subset and, in a tie, every one of the leading answers."""
    random.seed(1)
    for _ in range(200):
        n = random.randint(1, 6)
        marks, correct = votes(n)
        for k in range(1, n + 1):
            won = []
            for subset in itertools.combinations(range(n), k):
                ballots = [marks[i] for i in subset if marks[i] is not None]
                best = max((ballots.count(mark) for mark in ballots), default=0)
                leaders = {mark for mark in ballots if ballots.count(mark) == best}
                wins = [any(correct[i] for i in subset if marks[i] == mark) for mark in leaders]
                won.append(sum(wins) / len(wins) if wins else 0)
            assert majority(marks, correct, k) == pytest.approx(sum(won) / len(won))


def test_equal_answers_vote_together():
    answers = ["0.5", None, r"\frac{1}{2}", "7", "1/2", r"x+\sqrt{8}", r"2\sqrt{2}+x", "7.0"]
    rows = [{"sample": i, "extracted": one, "correct": one in ("7", "7.0")} for i, one in enumerate(answers)]
    mark_equal_answers(rows)
    assert [row["same_as"] for row in rows] == [0, None, 0, 3, 0, 5, 5, 3]


def test_metrics_and_intervals_against_brute_force():
    """40 problems of 4 responses: every metric recomputed from the rows, every interval from a bootstrap of its own."""
    random.seed(2)
    rows = []
    for problem in range(40):
        marks, correct = votes(4)
        rows += [
            graded(
                problem, good, random.randint(1, 50), random.random(), random.choice(["stop", "length"]), mark
            )
            for good, mark in zip(correct, marks)
        ]

    def measure(rows):
        groups = [rows[i : i + 4] for i in range(0, len(rows), 4)]
        pairs = [
            any(row["correct"] for row in pair)
            for group in groups
            for pair in itertools.combinations(group, 2)
        ]
        return {
            "avg": sum(row["correct"] for row in rows) / len(rows),
            "pass": sum(pairs) / len(pairs),
            "length": sum(row["tokens"] for row in rows) / len(rows),
            "truncated": sum(row["finish_reason"] == "length" for row in rows) / len(rows),
            "entropy": sum(row["entropy"] * row["tokens"] for row in rows)
            / sum(row["tokens"] for row in rows),
        }

    results, expected = summarise(rows, 4, [2]), measure(rows)
    draws = []
    for _ in range(2000):
        picked = [random.randrange(40) for _ in range(40)]
        draws.append(measure([row for i in picked for row in rows[4 * i : 4 * i + 4]]))
    for name, value in expected.items():
        found, bounds = results[name], results[f"{name}_interval"]
        if name == "pass":
            found, bounds = found["2"], bounds["2"]
        assert found == pytest.approx(value)
        ordered = sorted(draw[name] for draw in draws)
        width = ordered[1949] - ordered[50]
        assert bounds == pytest.approx([ordered[50], ordered[1949]], abs=0.12 * width), name


# ---------------------------------------------------------------------------------------------------------------------
# Whole evaluations, tables, figures


def run(world, out, *more):
    given = [
        "--model",
        world / "student_init",
        "--data",
        world / "test.jsonl",
        "--out",
        out,
        *"--n 2 --engine hf --dtype float32 --max_response_tokens 6".split(),
        *more,
    ]
    evaluate.main(evaluate.get_args([str(word) for word in given]))


def trained(world, rollouts, out, *more):
    given = [
        *"--prefix teacher --kl forward --vocab sampled --steps 2 --batch_size 2".split(),
        "--rollouts",
        rollouts,
        *"--engine hf --dtype float32 --max_response_tokens 8".split(),
        "--student",
        world / "student_init",
        "--out",
        out,
        *more,
    ]
    train.main(train.get_args([str(word) for word in given]))


@pytest.fixture(scope="module")
def trained_run(world, rollouts):
    out = world.parent / "sft"
    trained(world, rollouts, out, "--eval_every", 1, "--eval_data", world / "heldout.jsonl", "--eval_n", 2)
    return out


def test_results_are_those_of_the_samples(world, tmp_path, capsys):
    run(world, tmp_path / "eval", "--k", 1, 2)
    read_artifact(str(tmp_path / "eval"), "--", "evaluate")
    results = json.loads((tmp_path / "eval/results.json").read_text())
    rows = [json.loads(line) for line in open(tmp_path / "eval/samples.jsonl")]
    problems, tokenizer = load_problems(str(world / "test.jsonl")), make_tokenizer()
    assert [row["id"] for row in rows] == [p["id"] for p in problems for _ in range(2)]
    assert results["length"] == sum(len(row["response_ids"]) for row in rows) / 8
    for row, problem in zip(rows, [p for p in problems for _ in range(2)]):
        assert row["response"] == tokenizer.decode(row["response_ids"], skip_special_tokens=True)
        assert row["extracted"] == extract_answer(row["response"])
        assert row["correct"] == is_correct(row["response"], problem["answer"])
    model = load_model(str(world / "student_init"), "-", "float32")
    entropies = predictive_entropy(
        model, [row["prompt_ids"] for row in rows], [row["response_ids"] for row in rows], 29, 10
    )
    assert [row["entropy"] for row in rows] == pytest.approx(entropies, rel=1e-5)
    assert set(results["pass"]) == {"1", "2"} and results["tflops"] is None
    assert "Avg@2" in capsys.readouterr().out


def test_right_responses_count(world, tmp_path, monkeypatch):
    """The sampler is replaced by one that boxes the right answer in the first of each two responses."""
    tokenizer = make_tokenizer()
    answers = iter([p["answer"] for p in load_problems(str(world / "test.jsonl"))])

    def solve(engine, prompts, sampling, seed, places):
        ids = [
            tokenizer(f"\\boxed{{{answer}}}<|im_end|>").input_ids
            for answer in itertools.islice(answers, len(prompts))
        ]
        return [{i: [(good, "stop"), (good[:2], "length")] for i, good in enumerate(ids)}]

    monkeypatch.setattr(evaluation, "sample_as_finished", solve)
    run(world, tmp_path / "eval", "--k", 1, 2, "--sample_batch", 2)
    results = json.loads((tmp_path / "eval/results.json").read_text())
    assert results["avg"] == 0.5 and results["pass"] == {"1": 0.5, "2": 1.0} and results["truncated"] == 0.5


def test_table_shows_the_results(world, trained_run, tmp_path, capsys):
    run(world, tmp_path / "base")
    run(world, tmp_path / "sft", "--model", trained_run / "final")
    capsys.readouterr()
    evaluate.main(evaluate.get_args(["--table", str(tmp_path / "base"), str(tmp_path / "sft")]))
    lines = capsys.readouterr().out.strip().splitlines()
    header, _, base, sft = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    results = json.loads((tmp_path / "sft/results.json").read_text())
    low, high = results["avg_interval"]
    assert dict(zip(header, sft)) == {
        "run": "sft",
        "prefix": "teacher",
        "KL": "forward (sampled)",
        "Avg@2 [95%]": f"{results['avg']:.3f} [{low:.3f}, {high:.3f}]",
        "Pass@2": f"{results['pass']['2']:.3f}",
        "Maj@2": f"{results['maj']['2']:.3f}",
        "length": f"{results['length']:.1f}",
        "cut off": f"{results['truncated']:.1%}",
        "entropy": f"{results['entropy']:.3f}",
        "TFLOPs": f"{json.loads((trained_run / 'meta.json').read_text())['tflops']:.4g}",
    }
    assert base[:3] == [str(world / "student_init"), "-", "-"] and base[-1] == "-"


def test_evaluations_that_differ_are_not_put_in_one_table(world, tmp_path, refused):
    run(world, tmp_path / "a")
    changes = {"n": ["--n", 3, "--k", 2], "k": ["--k", 1], "limit": ["--limit", 2]}
    for name, more in changes.items():
        run(world, tmp_path / name, *more)
        refused(
            lambda: evaluate.main(evaluate.get_args(["--table", str(tmp_path / "a"), str(tmp_path / name)])),
            "--table",
        )
    (tmp_path / "a/results.json").write_text("{}")
    refused(
        lambda: evaluate.main(evaluate.get_args(["--table", str(tmp_path / "a")])), "--table", "results.json"
    )


def test_figure_is_a_png_with_a_line_for_each_run(trained_run, tmp_path, monkeypatch):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    evaluate.main(evaluate.get_args(["--figure", str(tmp_path / "cells.png"), "--runs", str(trained_run)]))
    image = plt.imread(tmp_path / "cells.png")
    assert image.shape[0] > 300 and image.shape[1] > 1000 and image.std() > 0.05
    rows = [json.loads(line) for line in open(trained_run / "evals.jsonl")]
    assert [row["step"] for row in rows] == [0, 1, 2]
    for axis, key in zip(figures[0].axes, ("avg", "entropy", "length")):
        [line] = axis.get_lines()
        assert line.get_xdata().tolist() == [0, 1, 2] and line.get_ydata().tolist() == [
            row[key] for row in rows
        ]


def test_figure_against_tflops(trained_run, tmp_path, monkeypatch):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    evaluate.main(
        evaluate.get_args(["--figure", str(tmp_path / "a.png"), "--runs", str(trained_run), "--x", "tflops"])
    )
    rows = [json.loads(line) for line in open(trained_run / "evals.jsonl")]
    spent = [row["tflops"] for row in rows]
    assert spent == sorted(set(spent)) and figures[0].axes[0].get_lines()[0].get_xdata().tolist() == spent
    assert figures[0].axes[0].get_xlabel() == "TFLOPs"


class Killed(Exception):
    pass


def kill_at(monkeypatch, call):
    """The call-th sampling of a chunk never comes back."""
    real, calls = sampling.sample_as_finished, itertools.count(1)

    def sample(*args):
        if next(calls) == call:
            raise Killed
        return real(*args)

    monkeypatch.setattr(evaluation, "sample_as_finished", sample)


def files_of(path):
    return {name: (path / name).read_text() for name in ("samples.jsonl", "results.json")}


def test_a_killed_evaluation_goes_on_where_it_was(world, tmp_path, monkeypatch, refused):
    chunks = ["--sample_batch", 2, "--k", 1, 2]
    run(world, tmp_path / "whole", *chunks)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 3)
        run(world, tmp_path / "killed", *chunks)
    with open(tmp_path / "killed/samples.jsonl.tmp", "a") as file:
        file.write('{"id": "half a li')
    refused(lambda: run(world, tmp_path / "killed", *chunks), "--resume")
    refused(lambda: run(world, tmp_path / "killed", *chunks, "--resume", "--seed", 7), "--seed")
    with monkeypatch.context() as patch:
        kill_at(patch, 3)  # two of the four chunks are left to do
        run(world, tmp_path / "killed", *chunks, "--resume")
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")
    assert not (tmp_path / "killed/progress.jsonl").exists()
    read_artifact(str(tmp_path / "killed"), "--", "evaluate")


def test_an_evaluation_with_vllm_goes_on_at_the_problem(world, tmp_path, monkeypatch, capsys):
    """vLLM finishes one problem after the other, in an order of its own: each is kept at once, and those alone are not made again."""
    run(world, tmp_path / "whole")
    real, asked = sampling.sample_as_finished, []

    def one_by_one(stop, engine, prompts, sampling, seed, places):
        asked.append(list(places))
        [groups] = real(engine, prompts, sampling, seed, places)
        for i in (*range(1, len(places)), 0)[:stop]:
            yield {i: groups[i]}
        if stop:
            raise Killed

    monkeypatch.setattr(evaluation, "sample_as_finished", lambda *args: one_by_one(3, *args))
    with pytest.raises(Killed):
        run(world, tmp_path / "killed")
    monkeypatch.setattr(evaluation, "sample_as_finished", lambda *args: one_by_one(None, *args))
    run(world, tmp_path / "killed", "--resume")
    assert asked == [[0, 1, 2, 3], [0]] and "goes on after 3 problems" in capsys.readouterr().out
    rows = [
        [json.loads(line) for line in open(tmp_path / name / "samples.jsonl")] for name in ("killed", "whole")
    ]
    for found, expected in zip(*rows, strict=True):
        assert found.pop("entropy") == pytest.approx(expected.pop("entropy"), rel=1e-5) and found == expected
    assert sorted(os.listdir(tmp_path / "killed")) == ["meta.json", "results.json", "samples.jsonl"]


def run_benchmarks(world, out, *more):
    given = [
        "--model",
        world / "student_init",
        "--benchmarks",
        world / "test.jsonl",
        world / "heldout.jsonl",
        "--out",
        out,
        *"--engine hf --dtype float32 --max_response_tokens 6 --sample_batch 4".split(),
        *more,
    ]
    evaluate.main(evaluate.get_args([str(word) for word in given]))


def test_benchmarks_are_the_single_evaluations_with_one_model_load(world, tmp_path, monkeypatch, capsys):
    run_benchmarks(world, tmp_path / "whole", "--n", 2)
    run(world, tmp_path / "test", "--sample_batch", 4)
    assert files_of(tmp_path / "whole/test") == files_of(tmp_path / "test")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 4)  # the second chunk of the second data set
        run_benchmarks(world, tmp_path / "killed", "--n", 2)
    loads, real = [], models.load_model
    monkeypatch.setattr(evaluate, "load_model", lambda *args: loads.append(args) or real(*args))
    run_benchmarks(world, tmp_path / "killed", "--n", 2, "--resume")
    for name in ("test", "heldout"):
        assert files_of(tmp_path / "killed" / name) == files_of(tmp_path / "whole" / name)
    run_benchmarks(world, tmp_path / "again", "--n", 2)
    assert len(loads) == 2
    capsys.readouterr()
    evaluate.main(evaluate.get_args(["--table", str(tmp_path / "whole")]))
    lines = capsys.readouterr().out.strip().splitlines()
    assert [[cell.strip() for cell in line.strip("|").split("|")][3] for line in lines] == [
        "data",
        "---",
        "heldout",
        "test",
    ]


def test_benchmarks_have_the_papers_n(refused):
    args = evaluate.get_args(
        "--model m --out o --benchmarks aime24 amc23 data/math500.jsonl gsm8k mine.jsonl".split()
    )
    assert [(part.n, part.k, part.out) for part in evaluate.parts(args)] == [
        (5, [5], "o/aime24"),
        (5, [5], "o/amc23"),
        (3, [3], "o/math500"),
        (3, [3], "o/gsm8k"),
        (4, [4], "o/mine"),
    ]
    args = evaluate.get_args("--model m --out o --data aime24 --n 8 --k 1 8".split())
    assert [(part.n, part.k, part.out) for part in evaluate.parts(args)] == [(8, [1, 8], "o")]


def test_compare_pairs_the_problems(tmp_path, monkeypatch, capsys):
    """The second evaluation is better on each problem by a little: certain when paired, lost in the noise when not."""
    random.seed(3)
    sides = [[], []]
    for problem in range(60):
        chance = random.choice([0, 1, 2])
        for side, more in zip(sides, (0, problem % 3 == 0)):
            side += [
                graded(problem, sample < chance + more, 10 + problem % 7, 1.0) | {"answer": "1"}
                for sample in range(4)
            ]
    paths = [str(tmp_path / name) for name in "ab"]
    for path, rows in zip(paths, sides):
        (tmp_path / path[-1]).mkdir()
        (tmp_path / path[-1] / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = {path: summarise(rows, 4, [1, 2]) | {"run": path[-1]} for path, rows in zip(paths, sides)}
    monkeypatch.setattr(report, "read_results", lambda path, flag: results[path])
    evaluate.main(evaluate.get_args(["--compare", *paths]))
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in capsys.readouterr().out.strip().splitlines()
    ]
    cells = {line[0]: line[1:] for line in lines[2:]}
    first, second = (mean_of(*by_problem(rows, 4, [1])["avg"]) for rows in sides)
    assert second - first == pytest.approx(20 / 240)
    difference, low, high = (float(word.strip("[],")) for word in cells["avg"][2].split())
    assert difference == pytest.approx(20 / 240, abs=1e-3)
    share, deviation = 1 / 3, (1 / 3 * 2 / 3 / 60) ** 0.5 / 4  # a third of the problems gain a quarter
    assert (low, high) == pytest.approx(
        (share / 4 - 1.96 * deviation, share / 4 + 1.96 * deviation), abs=0.006
    ) and low > 0
    assert cells["entropy"][2] == "+0.000 [+0.000, +0.000]"
    a, b = (interval(by_problem(rows, 4, [1])["avg"][0]) for rows in sides)
    assert a[1] > b[0]  # the two intervals overlap


def test_only_evaluations_of_the_same_problems_are_compared(world, tmp_path, refused):
    run(world, tmp_path / "a")
    run(world, tmp_path / "b", "--limit", 3)
    for other, word in ((tmp_path / "b", "same problems"), (world, "toy_world")):
        refused(
            lambda: evaluate.main(evaluate.get_args(["--compare", str(tmp_path / "a"), str(other)])),
            "--compare",
            word,
        )


def test_a_run_without_evaluations_cannot_be_drawn(world, rollouts, tmp_path, refused):
    trained(world, rollouts, tmp_path / "run")
    args = evaluate.get_args(["--figure", str(tmp_path / "a.png"), "--runs", str(tmp_path / "run")])
    refused(lambda: evaluate.main(args), "--runs", "--eval_every")
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    "line, word",
    [
        ("--model m --data d --out o --n 2 --k 3", "--k"),
        ("--model m --data d --out o --k 0", "--k"),
        ("--model m --data d --out o --n 4 --k 1 5", "--k"),
        ("--model m --data d", "--out"),
        ("--figure f.png", "--runs"),
        ("", "--model"),
        ("--model m --data d --benchmarks e --out o", "--benchmarks"),
        ("--model m --benchmarks a/d.jsonl b/d.jsonl --out o", "--benchmarks"),
        ("--model m --benchmarks aime24 gsm8k --k 5 --out o", "gsm8k"),
    ],
)
def test_bad_flags_are_refused(line, word, refused):
    assert word in refused(lambda: evaluate.get_args(line.split())).split("error:")[1]


def test_bad_input_is_refused_and_leaves_no_directory(world, tmp_path, refused):
    def is_refused(more, *words):
        refused(lambda: run(world, tmp_path / "out", *more), *words)
        assert not (tmp_path / "out").exists()

    is_refused(["--model", tmp_path / "absent"], "--model", "absent")
    is_refused(["--data", tmp_path / "absent.jsonl"], "absent.jsonl")
    is_refused(["--max_response_tokens", 600], "test/", "context of 512")
    is_refused(["--n", 0, "--k", 0], "--k")


def test_overwrite_never_deletes_the_checkpoint_under_evaluation(world, trained_run, tmp_path, refused):
    shutil.copytree(trained_run, tmp_path / "run")
    refused(
        lambda: run(world, tmp_path / "run", "--model", tmp_path / "run/final", "--overwrite"),
        "--out",
        "--model",
    )
    read_artifact(str(tmp_path / "run"), "--", "train")
