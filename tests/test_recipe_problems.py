"""recipes/problems.py: rows in the columns of the hub's own sets."""

import json

import pytest

from distil.problems import load_problems
from recipes import problems

INSTRUCTIONS = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n{}\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)


def dapo_row(question, answer):
    prompt = [{"content": INSTRUCTIONS.format(question), "role": "user"}]
    reward = {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"}
    more = {"data_source": "math_dapo", "ability": "MATH", "extra_info": {"index": "9a9b6eb4"}}
    return {"prompt": prompt, "reward_model": reward, **more}


def thought(prompt, domain="math"):
    turns = [{"from": "human", "value": prompt}, {"from": "gpt", "value": "<think>\n...</think>\n4"}]
    return {
        "difficulty": 8,
        "source": "ai2-adapt-dev/openmath-2-math",
        "domain": domain,
        "conversations": turns,
    }


TWO_PARTS = "In triangle $ABC$,\n\n$AB = 3$. Find $BC$."
ROWS = {
    "deepscaler": [
        {"problem": "1+1?", "answer": "2", "solution": "It is 2."},
        {"problem": "2+2?", "answer": 4},
    ],
    "dapo": [dapo_row(TWO_PARTS, "34"), dapo_row("1+1?", "2"), dapo_row(TWO_PARTS, "34")],
    "deepmath": [{"question": "Evaluate $x$.", "final_answer": "0", "difficulty": 4.5, "topic": "Calculus"}],
    "openthoughts3": [thought("Write a program.", "code"), thought("What is 2+2?"), thought("What is 2+2?")],
}
ROWS["dapo_original"] = ROWS["dapo"]
EXPECTED = {
    "deepscaler": [("1+1?", "2"), ("2+2?", "4")],
    "dapo": [(TWO_PARTS, "34"), ("1+1?", "2")],
    "dapo_original": [(INSTRUCTIONS.format(TWO_PARTS), "34"), (INSTRUCTIONS.format("1+1?"), "2")],
    "deepmath": [("Evaluate $x$.", "0")],
    "openthoughts3": [("What is 2+2?", "none")],
}


def run(tmp_path, name, rows, *more):
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "new" / "problems.jsonl"
    problems.main(problems.get_args([name, "--source", str(source), "--out", str(out), *more]))
    return [(problem["problem"], problem["answer"]) for problem in load_problems(str(out))]


@pytest.mark.parametrize("name", problems.SETS)
def test_each_set_becomes_problems_that_the_stages_read(name, tmp_path, capsys):
    assert run(tmp_path, name, ROWS[name]) == EXPECTED[name]
    left_out = len(ROWS[name]) - len(EXPECTED[name])
    counted = capsys.readouterr().out.split(": ")[-1]
    numbers = [int(part.split()[0]) for part in counted.split(", ")]
    assert numbers[0] == len(EXPECTED[name]) and sum(numbers[1:]) == left_out


def test_parts_do_not_overlap(tmp_path):
    rows = [thought(f"What is {i}+1?") for i in range(5)]
    first, rest = tmp_path / "first", tmp_path / "rest"
    first.mkdir(), rest.mkdir()
    parts = run(first, "openthoughts3", rows, "--limit", "2"), run(rest, "openthoughts3", rows, "--skip", "2")
    assert parts[0] + parts[1] == [(f"What is {i}+1?", "none") for i in range(5)]


def test_other_rows_are_refused_by_their_place_and_nothing_is_written(tmp_path, refused):
    for name, rows in {"deepmath": ROWS["deepscaler"], "dapo": [dapo_row("x", "1") | {"prompt": []}]}.items():
        refused(lambda: run(tmp_path, name, rows), "rows.jsonl", problems.SETS[name][0])
    other = dapo_row("x", "1")
    other["prompt"][0]["content"] = "What is 1+1?"
    refused(lambda: run(tmp_path, "dapo", [other]), "without the instructions of DAPO-Math-17K")
    refused(lambda: run(tmp_path, "openthoughts3", [thought("x", "code")]), "no problem is left", code=1)
    assert not list(tmp_path.glob("new/problems.jsonl"))


def test_a_file_is_not_overwritten(tmp_path, refused):
    run(tmp_path, "deepmath", ROWS["deepmath"])
    refused(lambda: run(tmp_path, "deepmath", ROWS["deepmath"]), "--out", "exists")
