"""evaluate.py: grading, Pass@k by enumeration, entropy by hand, tables and figures."""
import itertools
import json
import shutil

import pytest
import torch

import evaluate
import train
from artifacts import read_artifact
from evaluate import extract_answer, interval, is_correct, pass_at_k, predictive_entropy, summarise
from inputs import load_model, load_problems
from recipes.toy_world import make_model, make_tokenizer

# ---------------------------------------------------------------------------------------------------------------------
# Grading


@pytest.mark.parametrize("response, found", [
    (r"\boxed{42}", "42"),
    (r"first \boxed{3}, no: \boxed{ \frac{1}{2} }.", r"\frac{1}{2}"),
    (r"\boxed{\{1, \{2\}\}}", r"\{1, \{2\}\}"),
    (r"so \boxed{\frac{\sqrt{2}}{2}} and } more", r"\frac{\sqrt{2}}{2}"),
    (r"\boxed{1} then \boxed{2", None),
    (r"\boxed{}", ""),
    ("so it is\n#### 18\nbye", "18"),
    ("#### 5 #### 6", "6"),
    (r"#### 5 \boxed{6}", "6"),
    ("####", None),
    ("the answer is 7", None),
    ("", None),
])
def test_extract_answer(response, found):
    assert extract_answer(response) == found


ACCEPTED = [
    (r"\boxed{42}", "42"), ("so\n#### 18", "18"), ("#### 1,234", "1234"), (r"\boxed{1,234,567}", "1234567"), (r"\boxed{3.0}", "3"),
    (r"\boxed{0.5}", r"\frac{1}{2}"), (r"\boxed{\frac12}", "0.5"), (r"\boxed{\frac{2}{4}}", r"\frac{1}{2}"),
    (r"\boxed{\dfrac{1}{2}}", r"\frac{1}{2}"), (r"\boxed{\sqrt{117}}", r"3\sqrt{13}"), (r"\boxed{-5}", "-5"),
    (r"\boxed{(3,\frac{\pi}{2})}", r"\left( 3, \frac{\pi}{2} \right)"),
    (r"\boxed{x=5}", "5"), (r"\boxed{\$18}", "18"), (r"\boxed{90^\circ}", "90"), (r"\boxed{\text{Evelyn}}", r"\text{Evelyn}"),
    (r"\boxed{Evelyn}", r"\text{Evelyn}"), (r"\boxed{p - q}", "p - q"), (r"\boxed{2} no \boxed{3}", "3"),
    (r"\boxed{1{,}234}", "1234"), (r"\boxed{1\,234}", "1234"), ("#### 18.", "18"),
]
REJECTED = [
    (r"\boxed{42}", "43"), (r"\boxed{-3}", "3"), (r"\boxed{12}", "1"), (r"\boxed{1}", "12"), (r"\boxed{1,2}", "12"),
    (r"\boxed{12,34}", "1234"),
    (r"\boxed{(2,1)}", "(1, 2)"), (r"\boxed{0.33}", r"\frac{1}{3}"), (r"\boxed{5x}", "5"), (r"\boxed{Bob}", r"\text{Evelyn}"),
    (r"\boxed{q - p}", "p - q"), (r"\boxed{3} no \boxed{2}", "3"), (r"\boxed{3} so \boxed{3", "3"), (r"\boxed{}", "0"),
    ("", "0"), ("0", "0"),
    ("the answer is 42", "42"), ("####", "0"), (r"\boxed{" + "9" * 2000 + "}", "9"),
]


@pytest.mark.parametrize("response, answer", ACCEPTED)
def test_right_answers_are_accepted(response, answer):
    assert is_correct(response, answer) is True


@pytest.mark.parametrize("response, answer", REJECTED)
def test_wrong_answers_are_rejected(response, answer):
    assert is_correct(response, answer) is False


def test_a_brutal_power_does_not_hang_the_grader():
    assert is_correct(r"\boxed{9^{9^{9^{9}}}}", "1") is False

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
                logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1:-1, :29]
            logps = logits.double().log_softmax(-1)
            assert found == pytest.approx(-(logps.exp() * logps).sum(-1).mean().item(), rel=1e-5)


def graded(correct, tokens, entropy, reason="stop"):
    return {"correct": correct, "tokens": tokens, "entropy": entropy, "finish_reason": reason}


def test_summarise_by_hand():
    """Two problems, two responses each: 1 of 2 and 2 of 2 correct; entropy is a mean over tokens, not over responses."""
    rows = [graded(True, 2, 1.0), graded(False, 6, 2.0, "length"), graded(True, 1, 0.0), graded(True, 1, 4.0)]
    results = summarise(rows, 2, [1, 2])
    assert results["avg"] == 0.75 and results["pass"] == {"1": 0.75, "2": 1.0}
    assert results["length"] == 2.5 and results["truncated"] == 0.25 and results["entropy"] == (2 + 12 + 0 + 4) / 10
    assert results["problems"] == 2 and results["n"] == 2

# ---------------------------------------------------------------------------------------------------------------------
# Whole evaluations, tables, figures


def run(world, out, *more):
    given = ["--model", world / "student_init", "--data", world / "test.jsonl", "--out", out,
             *"--n 2 --engine hf --dtype float32 --max_response_tokens 6".split(), *more]
    evaluate.main(evaluate.get_args([str(word) for word in given]))


def trained(world, rollouts, out, *more):
    given = [*"--prefix teacher --kl forward --vocab sampled --steps 2 --batch_size 2".split(), "--rollouts", rollouts,
             *"--engine hf --dtype float32 --max_response_tokens 8".split(), "--student", world / "student_init",
             "--out", out, *more]
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
    entropies = predictive_entropy(model, [row["prompt_ids"] for row in rows], [row["response_ids"] for row in rows], 29, 10)
    assert [row["entropy"] for row in rows] == pytest.approx(entropies, rel=1e-5)
    assert set(results["pass"]) == {"1", "2"} and results["tflops"] is None
    assert "Avg@2" in capsys.readouterr().out


def test_right_responses_count(world, tmp_path, monkeypatch):
    """The sampler is replaced by one that boxes the right answer in the first of each two responses."""
    tokenizer = make_tokenizer()
    answers = iter([p["answer"] for p in load_problems(str(world / "test.jsonl"))])

    def solve(engine, prompts, sampling, seed):
        ids = [tokenizer(f"\\boxed{{{answer}}}<|im_end|>").input_ids for answer in itertools.islice(answers, len(prompts))]
        return [[(good, "stop"), (good[:2], "length")] for good in ids]
    monkeypatch.setattr(evaluate, "sample", solve)
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
        "run": "sft", "prefix": "teacher", "KL": "forward (sampled)",
        "Avg@2 [95%]": f"{results['avg']:.3f} [{low:.3f}, {high:.3f}]",
        "Pass@2": f"{results['pass']['2']:.3f}", "length": f"{results['length']:.1f}", "cut off": f"{results['truncated']:.1%}",
        "entropy": f"{results['entropy']:.3f}", "TFLOPs": f"{json.loads((trained_run / 'meta.json').read_text())['tflops']:.4g}"}
    assert base[:3] == [str(world / "student_init"), "-", "-"] and base[-1] == "-"


def test_evaluations_that_differ_are_not_put_in_one_table(world, tmp_path, refused):
    run(world, tmp_path / "a")
    changes = {"n": ["--n", 3, "--k", 2], "k": ["--k", 1], "data": ["--data", world / "heldout.jsonl"], "limit": ["--limit", 2]}
    for name, more in changes.items():
        run(world, tmp_path / name, *more)
        refused(lambda: evaluate.main(evaluate.get_args(["--table", str(tmp_path / "a"), str(tmp_path / name)])), "--table")
    (tmp_path / "a/results.json").write_text("{}")
    refused(lambda: evaluate.main(evaluate.get_args(["--table", str(tmp_path / "a")])), "--table", "results.json")


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
        assert line.get_xdata().tolist() == [0, 1, 2] and line.get_ydata().tolist() == [row[key] for row in rows]


def test_a_run_without_evaluations_cannot_be_drawn(world, rollouts, tmp_path, refused):
    trained(world, rollouts, tmp_path / "run")
    args = evaluate.get_args(["--figure", str(tmp_path / "a.png"), "--runs", str(tmp_path / "run")])
    refused(lambda: evaluate.main(args), "--runs", "--eval_every")
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize("line, word", [
    ("--model m --data d --out o --n 2 --k 3", "--k"), ("--model m --data d --out o --k 0", "--k"),
    ("--model m --data d --out o --n 4 --k 1 5", "--k"), ("--model m --data d", "--out"),
    ("--figure f.png", "--runs"), ("", "--model"),
])
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
    refused(lambda: run(world, tmp_path / "run", "--model", tmp_path / "run/final", "--overwrite"), "--out", "--model")
    read_artifact(str(tmp_path / "run"), "--", "train")
