"""De-duplication with an encoder whose vectors are known."""

import json
import sys

import pytest
import torch

from distil.artifacts import read_artifact
from recipes import dedup

VECTORS = {
    "one plus one": [1.0, 0.0],
    "1 + 1": [0.7, 0.7],
    "area of a circle": [0.0, 1.0],
    "ONE  plus one": [5.0, 5.0],
    "far": [-1.0, 0.1],
    "down": [0.0, -1.0],
}


def encode(texts):
    return torch.tensor([VECTORS[text] for text in texts])


def problems(*texts):
    return [{"id": str(i), "problem": text, "answer": "2"} for i, text in enumerate(texts)]


def test_exact_ignores_case_and_white_space():
    found = dedup.duplicates(problems("ONE  plus one", "far"), problems("area of a circle", "one plus one"))
    assert found == {0: ("exact", 1, 1.0)}


def test_semantic_drops_at_the_threshold_and_names_the_nearest():
    others = problems("down", "one plus one")
    found = dedup.duplicates(problems("1 + 1", "far"), others, encode, threshold=0.7)
    assert found.keys() == {0} and found[0][:2] == ("semantic", 1)
    assert abs(found[0][2] - 0.5**0.5) < 1e-6  # the cosine, whatever the vectors' lengths
    assert dedup.duplicates(problems("1 + 1"), problems("one plus one"), encode, threshold=0.71) == {}


def test_instructions_are_not_compared():
    """Two questions with the same instructions are not alike, and one question with two is the same."""
    boxed = " Please reason step by step, and put your final answer within \\boxed{}."
    first = "Solve the following math problem step by step. The last line ..."
    last = 'Remember to put your answer on its own line after "Answer:".'
    dapo = [f"{first}\n\n{question}\n\n{last}" for question in ("far", "1 + 1")]
    others = problems("far" + boxed, "down" + boxed)
    found = dedup.duplicates(problems("far" + boxed, "1 + 1" + boxed, *dapo), others, encode, threshold=0.9)
    assert {i: found[i][:2] for i in found} == {0: ("exact", 0), 2: ("exact", 0)}


def test_main_writes_what_is_kept_and_what_is_dropped(tmp_path, monkeypatch):
    monkeypatch.setattr(dedup, "load_encoder", lambda name: encode)
    sets = {"data": problems("1 + 1", "far", "ONE  plus one"), "against": problems("one plus one")}
    for name, rows in sets.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    words = ["--data", f"{tmp_path}/data.jsonl", "--against", f"{tmp_path}/against.jsonl", "--out", str(out)]
    dedup.main(dedup.get_args(words))
    assert [json.loads(line)["problem"] for line in open(out / "problems.jsonl")] == ["far"]
    dropped = [json.loads(line) for line in open(out / "dropped.jsonl")]
    assert [(row["problem"], row["reason"], row["nearest"]["problem"]) for row in dropped] == [
        ("1 + 1", "semantic", "one plus one"),
        ("ONE  plus one", "exact", "one plus one"),
    ]
    counts = read_artifact(str(out), "--data", "dedup")["counts"]
    assert counts == {"problems": 3, "kept": 1, "dropped_exact": 1, "dropped_semantic": 1}


def test_semantic_without_the_package_is_refused(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(SystemExit) as end:
        dedup.load_encoder("any")
    assert end.value.code == 2 and "--method exact" in capsys.readouterr().err
