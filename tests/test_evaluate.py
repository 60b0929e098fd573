"""evaluate.py: metrics by enumeration and by hand, resuming, data sets, tables."""

import itertools
import json
import os
import random
import shutil
import time
import tracemalloc

import pytest
import torch

import evaluate
import train
from distil import evaluation, models, problems, sampling
from distil.artifacts import read_artifact
from distil.evaluation import (
    bootstrap_means,
    interval,
    majority,
    mark_equal_answers,
    pass_at_k,
    predictive_entropy,
    summarise,
)
from distil.grading import extract_answer, is_correct
from distil.models import Response, load_model
from distil.problems import load_problems
from distil.prompts import render_prompt
from recipes.toy_world import make_model, make_tokenizer


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


def test_two_metrics_are_resampled_alike():
    """So that a comparison is paired: a plain and a weighted mean use the same problems in each draw."""
    random.seed(4)
    values = [random.random() for _ in range(9)]
    plain, weighted = bootstrap_means(values), bootstrap_means([2 * value for value in values], [2] * 9)
    assert len(plain) == 1000 and plain.std() > 0.01
    torch.testing.assert_close(plain, weighted)


def test_predictive_entropy_is_that_of_the_softmax():
    torch.manual_seed(7)
    model = make_model(make_tokenizer(), 32, 1, 1).eval()
    model.resize_token_embeddings(35, mean_resizing=False)  # rows 29 to 34 are padding
    responses = [Response([1, 3, 20], [5, 6, 2], False), Response([1], [7], True)]
    responses.append(Response([1, 9], [8, 9, 10, 11, 0], True))
    for budget in (1, 1000):
        entropies = predictive_entropy(model, responses, 29, budget)
        for response, found in zip(responses, entropies, strict=True):
            ids = torch.tensor([response.prompt_ids + response.response_ids])
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0, len(response.prompt_ids) - 1 : -1, :29]
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
    """1 of 2 and 2 of 2 responses are correct; entropy is a mean over tokens, not over responses."""
    rows = [
        graded("a", True, 2, 1.0),
        graded("a", False, 6, 2.0, "length", None, True),
        graded("b", True, 1, 0.0),
        graded("b", True, 1, 4.0),
    ]
    results = summarise(rows, 2, [1, 2])
    assert results["avg"] == 0.75 and results["length"] == 2.5 and results["truncated"] == 0.25
    assert results["pass"] == {"1": 0.75, "2": 1.0} and results["maj"] == {"1": 0.75, "2": 1.0}
    assert results["entropy"] == (2 + 12 + 0 + 4) / 10
    assert results["problems"] == 2 and results["n"] == 2 and results["timed_out"] == 1


def votes(n):
    """Random classes (some None) of n responses and which are correct: one class is, at most."""
    marks = [random.choice([None, 0, 1, 2]) for _ in range(n)]
    right = random.choice([0, 1, 5])
    return marks, [mark == right for mark in marks]


def elections_won(marks, correct, k):
    """Against every subset and, in a tie, every one of the leading answers."""
    won = []
    for subset in itertools.combinations(range(len(marks)), k):
        ballots = [marks[i] for i in subset if marks[i] is not None]
        best = max((ballots.count(mark) for mark in ballots), default=0)
        leaders = {mark for mark in ballots if ballots.count(mark) == best}
        wins = [any(correct[i] for i in subset if marks[i] == mark) for mark in leaders]
        won.append(sum(wins) / len(wins) if wins else 0)
    return sum(won) / len(won)


def test_majority_is_the_share_of_elections_won():
    """For all ways to give up to 6 responses to 3 classes or none, and for some with more responses."""
    sizes = itertools.chain(
        *(itertools.combinations_with_replacement([0, 1, 2, None], n) for n in range(1, 7))
    )
    cases = [(marks, [mark == 0 for mark in marks]) for marks in sizes]
    random.seed(1)
    cases += [votes(11) for _ in range(4)]
    for marks, correct in cases:
        for k in range(1, len(marks) + 1):
            assert majority(marks, correct, k) == pytest.approx(elections_won(marks, correct, k), abs=1e-12)


@pytest.mark.parametrize("n, k", [(32, 16), (64, 32)])
def test_majority_never_lists_the_subsets(n, k):
    """C(32, 16) is 601,080,390 and C(64, 32) is 1.8e18. By symmetry, equally many votes win equally often."""
    start = time.process_time()
    for size in (1, 2, n // 4):
        marks = [i // size for i in range(n)]
        chance = majority(marks, [mark == 0 for mark in marks], k)
        assert chance == pytest.approx(size / n, rel=1e-12)
    assert majority([0] * n, [True] * n, k) == 1.0 and majority([None] * n, [False] * n, k) == 0.0
    assert time.process_time() - start < 1
    tracemalloc.start()
    marks = [i % 8 or None for i in range(n)]
    majority(marks, [mark == 1 for mark in marks], k)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def test_equal_answers_vote_together():
    answers = ["0.5", None, r"\frac{1}{2}", "7", "1/2", r"x+\sqrt{8}", r"2\sqrt{2}+x", "7.0"]
    rows = [{"sample": i, "extracted": one, "correct": one in ("7", "7.0")} for i, one in enumerate(answers)]
    mark_equal_answers(rows)
    assert [row["same_as"] for row in rows] == [0, None, 0, 3, 0, 5, 5, 3]


def test_metrics_and_intervals_against_brute_force():
    """40 problems of 4 responses: every metric from the rows, every interval from a bootstrap of its own."""
    random.seed(2)
    groups = []
    for problem in range(40):
        marks, correct = votes(4)
        how = [(random.randint(1, 50), random.random(), random.choice(["stop", "length"])) for _ in marks]
        groups.append([graded(problem, *row) for row in zip(correct, *zip(*how), marks)])

    def measure(groups):
        rows = [row for group in groups for row in group]
        tokens = sum(row["tokens"] for row in rows)
        pairs = [pair for group in groups for pair in itertools.combinations(group, 2)]
        return {
            "avg": sum(row["correct"] for row in rows) / len(rows),
            "pass": sum(any(row["correct"] for row in pair) for pair in pairs) / len(pairs),
            "length": tokens / len(rows),
            "truncated": sum(row["finish_reason"] == "length" for row in rows) / len(rows),
            "entropy": sum(row["entropy"] * row["tokens"] for row in rows) / tokens,
        }

    results = summarise([row for group in groups for row in group], 4, [2])
    draws = [measure(random.choices(groups, k=40)) for _ in range(2000)]
    for name, value in measure(groups).items():
        found, bounds = results[name], results[f"{name}_interval"]
        if name == "pass":
            found, bounds = found["2"], bounds["2"]
        assert found == pytest.approx(value)
        ordered = sorted(draw[name] for draw in draws)
        low, high = ordered[50], ordered[1949]
        assert bounds == pytest.approx([low, high], abs=0.12 * (high - low)), name


# Whole evaluations, tables, figures
SMALL = "--engine hf --dtype float32 --max_response_tokens 6".split()


def call(*words):
    evaluate.main(evaluate.get_args([str(word) for word in words]))


def run(world, out, *more):
    model, data = world / "student_init", world / "test.jsonl"
    call("--model", model, "--data", data, "--out", out, "--n", 2, *SMALL, *more)


def run_benchmarks(world, out, *more):
    data = world / "test.jsonl", world / "heldout.jsonl"
    more = ["--n", 2, "--sample_batch", 4, *more]
    call("--model", world / "student_init", "--benchmarks", *data, "--out", out, *SMALL, *more)


def cells_of(printed):
    """The cells of a printed Markdown table, row after row, without the row of dashes."""
    header, dashes, *rows = [line for line in printed.splitlines() if line.startswith("|")]
    assert set(dashes) == {"|", " ", "-"} and len({len(line) for line in (header, dashes, *rows)}) == 1
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in (header, *rows)]


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def trained(world, rollouts, out, *more):
    how = "--prefix teacher --kl forward --vocab sampled --steps 2 --batch_size 2 --max_response_tokens 8"
    how += " --engine hf --dtype float32"
    paths = ["--rollouts", rollouts, "--student", world / "student_init", "--out", out]
    train.main(train.get_args([str(word) for word in (*how.split(), *paths, *more)]))


@pytest.fixture(scope="module")
def trained_run(world, rollouts):
    out = world.parent / "sft"
    trained(world, rollouts, out, "--eval_every", 1, "--eval_data", world / "heldout.jsonl", "--eval_n", 2)
    return out


def test_results_are_those_of_the_samples(world, tmp_path, capsys):
    run(world, tmp_path / "eval", "--k", 1, 2)
    read_artifact(str(tmp_path / "eval"), "--", "evaluate")
    results = json.loads((tmp_path / "eval/results.json").read_text())
    rows = lines_of(tmp_path / "eval/samples.jsonl")
    problems = [problem for problem in load_problems(str(world / "test.jsonl")) for _ in range(2)]
    tokenizer = make_tokenizer()
    assert results["length"] == sum(len(row["response_ids"]) for row in rows) / 8
    assert {row["finish_reason"] for row in rows} == {"stop", "length"}
    for i, (row, problem) in enumerate(zip(rows, problems, strict=True)):
        assert row["id"] == problem["id"] and row["answer"] == problem["answer"] and row["sample"] == i % 2
        assert row["prompt_ids"] == render_prompt(tokenizer, problem["problem"])
        assert row["response"] == tokenizer.decode(row["response_ids"], skip_special_tokens=True)
        assert row["finish_reason"] == ("stop" if row["response_ids"][-1] in (0, 2) else "length")
        assert row["tokens"] == len(row["response_ids"])
        assert row["extracted"] == extract_answer(row["response"])
        assert row["correct"] == is_correct(row["response"], problem["answer"])
    model = load_model(str(world / "student_init"), "-", "float32")
    responses = [Response(row["prompt_ids"], row["response_ids"], False) for row in rows]
    entropies = predictive_entropy(model, responses, 29, 10)
    assert [row["entropy"] for row in rows] == pytest.approx(entropies, rel=1e-5)
    assert set(results["pass"]) == {"1", "2"} and results["tflops"] is None
    assert "Avg@2" in capsys.readouterr().out


def test_a_float32_model_is_evaluated_in_the_dtype_of_its_training(world, tmp_path):
    words = ["--model", world / "student_init", "--data", world / "test.jsonl", "--out", tmp_path / "out"]
    task = evaluate.prepare(evaluate.get_args([str(word) for word in (*words, *SMALL, "--n", 2)]))
    model = load_model(task.directory, "-", "float32")
    entropies = {}
    for dtype in (None, "float32", "bfloat16"):
        _, rows = evaluation.evaluate(model, model, *task[1:5], 1, [2], 40, dtype)
        responses = [Response(row["prompt_ids"], row["response_ids"], False) for row in rows]
        entropies[dtype] = [row["entropy"] for row in rows]
        assert entropies[dtype] == predictive_entropy(model, responses, 29, 40, dtype)
    assert entropies[None] == entropies["float32"] != entropies["bfloat16"]


def test_right_responses_count(world, tmp_path, monkeypatch):
    """The sampler is replaced by one that boxes the right answer in the first of each two responses."""
    tokenizer = make_tokenizer()
    answers = iter([problem["answer"] for problem in load_problems(str(world / "test.jsonl"))])

    def solve(engine, prompts, sampling, seed, places):
        groups = {}
        for i, prompt in enumerate(prompts):
            ids = tokenizer(f"\\boxed{{{next(answers)}}}<|im_end|>").input_ids
            groups[places[i]] = [Response(prompt, ids, False), Response(prompt, ids[:2], True)]
        return [groups]

    monkeypatch.setattr(evaluation, "sample_stream", solve)
    run(world, tmp_path / "eval", "--k", 1, 2, "--sample_batch", 2)
    results = json.loads((tmp_path / "eval/results.json").read_text())
    assert results["avg"] == 0.5 and results["pass"] == {"1": 0.5, "2": 1.0} and results["truncated"] == 0.5


def test_table_shows_the_results(world, trained_run, tmp_path, capsys):
    run(world, tmp_path / "base")
    run(world, tmp_path / "sft", "--model", trained_run / "final")
    capsys.readouterr()
    call("--table", tmp_path / "base", tmp_path / "sft")
    header, base, sft = cells_of(capsys.readouterr().out)
    results = json.loads((tmp_path / "sft/results.json").read_text())
    low, high = results["avg_interval"]
    assert dict(zip(header, sft)) == {
        "run": "sft",
        "training": "teacher forward (sampled)",
        "Avg@2 [95%]": f"{results['avg']:.3f} [{low:.3f}, {high:.3f}]",
        "Pass@2": f"{results['pass']['2']:.3f}",
        "Maj@2": f"{results['maj']['2']:.3f}",
        "length": f"{results['length']:.1f}",
        "truncated": f"{results['truncated']:.1%}",
        "entropy": f"{results['entropy']:.3f}",
        "TFLOPs": f"{json.loads((trained_run / 'meta.json').read_text())['tflops']:.4g}",
    }
    assert base[:2] == [str(world / "student_init"), "-"] and base[-1] == "-"


@pytest.mark.parametrize("more", [["--n", 3, "--k", 2], ["--k", 1], ["--limit", 2]])
def test_evaluations_that_differ_are_not_put_in_one_table(more, world, tmp_path, refused):
    run(world, tmp_path / "a")
    run(world, tmp_path / "b", *more)
    refused(lambda: call("--table", tmp_path / "a", tmp_path / "b"), "--table", "cannot be compared")
    (tmp_path / "a/results.json").write_text("{}")
    refused(lambda: call("--table", tmp_path / "a"), "--table", "results.json")


class Killed(Exception):
    pass


def kill_at(monkeypatch, call):
    """The call-th sampling of a chunk never comes back."""
    real, calls = sampling.sample_hf, itertools.count(1)

    def sample(*args):
        if next(calls) == call:
            raise Killed
        return real(*args)

    monkeypatch.setattr(sampling, "sample_hf", sample)


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
    """vLLM finishes problems one by one, in any order: each is kept at once and is not sampled again."""
    run(world, tmp_path / "whole")
    real, asked = sampling.sample_stream, []

    def one_by_one(stop, engine, prompts, sampling, seed, places):
        asked.append(list(places))
        [groups] = real(engine, prompts, sampling, seed, places)
        for place in [*places[1:], places[0]][:stop]:
            yield {place: groups[place]}
        if stop:
            raise Killed

    monkeypatch.setattr(evaluation, "sample_stream", lambda *args: one_by_one(3, *args))
    with pytest.raises(Killed):
        run(world, tmp_path / "killed")
    monkeypatch.setattr(evaluation, "sample_stream", lambda *args: one_by_one(None, *args))
    run(world, tmp_path / "killed", "--resume")
    assert asked == [[0, 1, 2, 3], [0]] and "resumes after 3 problems" in capsys.readouterr().out
    rows = [lines_of(tmp_path / name / "samples.jsonl") for name in ("killed", "whole")]
    for found, expected in zip(*rows, strict=True):
        assert found.pop("entropy") == pytest.approx(expected.pop("entropy"), rel=1e-5) and found == expected
    assert sorted(os.listdir(tmp_path / "killed")) == ["meta.json", "results.json", "samples.jsonl"]


def test_benchmarks_are_the_single_evaluations_with_one_model_load(world, tmp_path, monkeypatch, capsys):
    run_benchmarks(world, tmp_path / "whole")
    run(world, tmp_path / "test", "--sample_batch", 4)
    assert files_of(tmp_path / "whole/test") == files_of(tmp_path / "test")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 4)  # the second chunk of the second data set
        run_benchmarks(world, tmp_path / "killed")
    loads, real = [], models.load_model
    monkeypatch.setattr(models, "load_model", lambda *args: loads.append(args) or real(*args))
    run_benchmarks(world, tmp_path / "killed", "--resume")
    for name in ("test", "heldout"):
        assert files_of(tmp_path / "killed" / name) == files_of(tmp_path / "whole" / name)
    run_benchmarks(world, tmp_path / "again")
    assert len(loads) == 2
    capsys.readouterr()
    call("--table", tmp_path / "whole")
    assert [row[2] for row in cells_of(capsys.readouterr().out)] == ["data", "heldout", "test", "mean"]


def test_columns_of_one_benchmark_do_not_end_the_one_that_has_its_own(world, tmp_path, monkeypatch):
    """--problem_column is for the file; the registered set beside it is evaluated too."""
    rows = [json.loads(line) for line in open(world / "test.jsonl")][:2]
    with open(tmp_path / "file.jsonl", "w") as file:
        file.writelines(json.dumps({"q": row["problem"], "answer": row["answer"]}) + "\n" for row in rows)
    monkeypatch.setitem(problems.DATASETS, "known", problems.DataSet("some/set"))
    read = lambda data, columns, flag: (
        data,
        problems.DATASETS[data],
        ((f"row {i}", row) for i, row in enumerate(rows)),
    )
    monkeypatch.setattr(problems, "load_from_hub", read)
    words = ["--benchmarks", tmp_path / "file.jsonl", "known", "--problem_column", "q", *SMALL]
    call("--model", world / "student_init", *words, "--out", tmp_path / "out")
    assert sorted(path.parent.name for path in tmp_path.glob("out/*/meta.json")) == ["file", "known"]


def test_benchmarks_do_not_go_into_an_artifact(world, tmp_path, refused):
    run(world, tmp_path / "eval")
    before = files_of(tmp_path / "eval")
    refused(lambda: run_benchmarks(world, tmp_path / "eval", "--overwrite"), "--out", "--benchmarks")
    assert files_of(tmp_path / "eval") == before


def test_benchmarks_have_the_papers_n():
    def settings(words):
        args = evaluate.get_args(["--model", "m", "--out", "o", *words.split()])
        return [(one.n, one.k, one.out) for one in evaluate.evaluations_of(args)]

    assert settings("--benchmarks aime24 amc23 data/math500.jsonl gsm8k other.jsonl") == [
        (5, [5], "o/aime24"),
        (5, [5], "o/amc23"),
        (3, [3], "o/math500"),
        (3, [3], "o/gsm8k"),
        (4, [4], "o/other"),
    ]
    assert settings("--data aime24 --n 8 --k 1 8") == [(8, [1, 8], "o")]
    assert settings("--benchmarks a/gsm8k.csv b/gsm8k.csv") == [(3, [3], "o/a-gsm8k"), (3, [3], "o/b-gsm8k")]


@pytest.mark.parametrize(
    "data, names",
    [
        ("math500 data/gsm8k.csv me/mine:hard:dev", "math500 gsm8k mine"),
        ("a/test.jsonl b/test.csv c.json", "a-test b-test c"),
        ("x/a/test.csv y/a/test.csv /z/test.csv", "x-a-test y-a-test z-test"),
        ("test.csv a/test.csv", "test.csv a-test"),
        ("test.csv test.json", "test.csv test.json"),
        ("a/test.csv a/test.json", "a-test.csv a-test.json"),
        ("gsm8k openai/gsm8k:main:train", "gsm8k gsm8k-main-train"),
        ("me/mine:easy me/mine:hard you/mine:hard", "mine-easy me-mine-hard you-mine-hard"),
        ("x/a/b.csv a-b.csv y/b.csv", "x-a-b a-b.csv y-b"),
    ],
)
def test_names_of_data_sets_differ(data, names):
    """With as few of their directories, or of a hub id's other words, as it takes."""
    found = evaluation.data_names(data.split())
    assert list(found) == data.split() and list(found.values()) == names.split()
    assert evaluation.data_names(reversed(data.split())) == found


def test_benchmarks_of_one_name_get_directories_and_rows_of_their_own(world, tmp_path, capsys):
    for name in "ab":
        (tmp_path / name).mkdir()
        shutil.copy(world / "test.jsonl", tmp_path / name)
    data = [tmp_path / name / "test.jsonl" for name in "ab"]
    words = ["--model", world / "student_init", "--n", 1, "--limit", 1, *SMALL]
    call(*words, "--benchmarks", *data, "--out", tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["a-test", "b-test"]
    capsys.readouterr()
    call("--table", tmp_path / "out")
    assert [row[2] for row in cells_of(capsys.readouterr().out)] == ["data", "a-test", "b-test", "mean"]


def test_only_evaluations_of_the_same_problems_are_compared(world, tmp_path, refused):
    run(world, tmp_path / "a")
    run(world, tmp_path / "b", "--limit", 3)
    refused(lambda: call("--compare", tmp_path / "a", tmp_path / "b"), "--compare", "same problems")
    refused(lambda: call("--compare", tmp_path / "a", world), f"--compare {world}", "no evaluation")


@pytest.mark.parametrize(
    "line, word",
    [
        ("--model m --data d --out o --n 2 --k 3", "--k"),
        ("--model m --data d --out o --k 0", "--k"),
        ("--model m --data d --out o --n 4 --k 1 5", "--k"),
        ("--model m --data d", "--out"),
        ("--figure f.png", "--runs"),
        ("--runs a b", "--figure"),
        ("--report a.html b --x tflops", "--x and --y are for --figure"),
        ("--report a.html b --y avg", "--x and --y are for --figure"),
        ("--table a --y loss", "--y"),
        ("", "--model"),
        ("--model m --data d --benchmarks e --out o", "--benchmarks"),
        ("--model m --benchmarks a/d.jsonl b/d.jsonl a/d.jsonl --out o", "--benchmarks"),
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
    is_refused(["--n", 2, "--k", 3], "--k")


def test_overwrite_never_deletes_the_checkpoint_under_evaluation(
    world, trained_run, tmp_path, refused, monkeypatch
):
    shutil.copytree(trained_run, tmp_path / "run")
    monkeypatch.setattr(models, "load_model", None)  # refused before a model is loaded
    more = ["--model", tmp_path / "run/final", "--overwrite"]
    refused(lambda: run(world, tmp_path / "run", *more), "--out", "--model")
    read_artifact(str(tmp_path / "run"), "--", "train")
