"""Problems from files and from the hub, gold answers, and what is refused."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error

import pytest

from conftest import ROOT
from distil import problems
from distil.problems import DATASETS, DataSet, gold_answer, load_problems


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def test_problems_of_a_local_file(tmp_path):
    path = write(
        tmp_path / "mine.jsonl",
        {"problem": "1+1?", "answer": "2"},
        "",
        {"question": "2+2?", "answer": "a\nso 4\n#### 1,234", "id": "x"},
        {"problem": "3?", "answer": 27.0, "unique_id": "test/7"},
        {"problem": "é?", "answer": 2.5},
        {"problem": "n", "answer": 3, "id": None},
    )
    assert load_problems(path) == [
        {"id": "mine/0", "problem": "1+1?", "answer": "2"},
        {"id": "mine/x", "problem": "2+2?", "answer": "1234"},
        {"id": "mine/test/7", "problem": "3?", "answer": "27"},
        {"id": "mine/3", "problem": "é?", "answer": "2.5"},
        {"id": "mine/4", "problem": "n", "answer": "3"},
    ]
    assert [p["id"] for p in load_problems(path, limit=2)] == ["mine/0", "mine/x"]


@pytest.mark.parametrize(
    "answer, gold",
    [
        ("5", "5"),
        (5, "5"),
        (5.0, "5"),
        (0.5, "0.5"),
        (-3.0, "-3"),
        (r"\frac12", r"\frac12"),
        ("1,234", "1,234"),  # only what follows #### is changed
        ("#### 1 #### -1,000 ", "-1000"),
        (None, None),
        (True, True),
        (float("inf"), None),
        (["1"], ["1"]),
    ],
)
def test_gold_answer(answer, gold):
    assert gold_answer(answer) == gold


@pytest.mark.parametrize(
    "answer, gold",
    [
        # numbers
        ("1,234", "1234"),
        ("12,345.5", "12345.5"),
        ("1,234,567", "1234567"),
        ("-1,000", "-1000"),
        ("$1,234", "$1234"),
        ("1,234.50 dollars", "1234.50 dollars"),
        ("3/1,000", "3/1000"),
        ("1,000%", "1000%"),
        ("1,000 and 2,000", "1000 and 2000"),
        # lists, pairs, intervals, decimal commas
        ("1,2", "1,2"),
        ("1, 2", "1, 2"),
        ("1,2,3", "1,2,3"),
        ("1,234,5", "1,234,5"),
        ("1, 234", "1, 234"),
        ("(3, 4)", "(3, 4)"),
        ("(1,234)", "(1,234)"),
        ("[1,200]", "[1,200]"),
        (r"\{100,200\}", r"\{100,200\}"),
        ("0,125", "0,125"),
        ("3.14,159", "3.14,159"),
        ("1234,567", "1234,567"),
        ("1,2345", "1,2345"),
        ("x,y", "x,y"),
    ],
)
def test_only_thousands_separators_go(answer, gold):
    assert gold_answer(f"so it is\n#### {answer}") == gold


@pytest.mark.parametrize(
    "bad, words",
    [
        ("{not json", ["line 2", "not JSON"]),
        ("[1, 2]", ["line 2", "not a JSON object"]),
        ({"answer": "1"}, ["line 2", "problem", "question"]),
        ({"problem": "1", "solution": "1"}, ["line 2", "answer", "solution"]),
        ({"problem": "", "answer": "1"}, ["line 2", "problem"]),
        ({"problem": "1", "answer": None}, ["line 2", "answer"]),
        ({"problem": "1", "answer": "####  "}, ["line 2", "answer"]),
        ({"problem": "1", "answer": ["1"]}, ["line 2", "answer"]),
        ({"problem": "1", "answer": "1", "id": "a"}, ["line 2", "line 1", "'a'"]),
        ({"problem": "1", "answer": "1", "id": ["a"]}, ["line 2", "id", "['a']"]),
        ({"problem": "half a pair: \ud83d", "answer": "1"}, ["line 2", "surrogates"]),
        ({"problem": "1", "answer": float("nan")}, ["line 2", "answer"]),
        ('{"problem": "1", "answer": 1e999}', ["line 2", "answer"]),
        ('{"problem": "1", "answer": ' + "1" * 5000 + "}", ["line 2", "not JSON"]),
        ("[" * 100_000, ["line 2", "not JSON"]),
    ],
)
def test_bad_lines_are_refused_with_file_and_line(tmp_path, refused, bad, words):
    path = write(tmp_path / "p.jsonl", {"problem": "1+1?", "answer": "2", "id": "a"}, bad)
    refused(lambda: load_problems(path), path, *words)


def test_data_that_is_not_there_is_refused(tmp_path, refused):
    refused(lambda: load_problems(write(tmp_path / "empty.jsonl")), "--data", "empty.jsonl")
    refused(lambda: load_problems(str(tmp_path / "absent.jsonl")), "absent.jsonl")
    refused(lambda: load_problems("gsm9k"), "--data gsm9k", "deepscaler", "math500")
    (tmp_path / "latin.jsonl").write_bytes(b'{"problem": "\xe9", "answer": "1"}\n')
    refused(lambda: load_problems(str(tmp_path / "latin.jsonl")), "latin.jsonl")


@pytest.fixture
def asked(monkeypatch):
    """What load_dataset was asked for. It answers with the rows in asked.rows."""
    import datasets

    class Asked(list):
        rows = [{"question": "1+1?", "answer": "#### 2"}, {"question": "2?", "answer": "#### 2"}]

    calls = Asked()

    def load_dataset(repository, configuration, split):
        calls.append((repository, configuration, split))
        return iter(calls.rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(problems, "hub_reachable", lambda: True)
    return calls


@pytest.mark.parametrize(
    "data, repository, configuration, split",
    [
        ("deepscaler", "agentica-org/DeepScaleR-Preview-Dataset", None, "train"),
        ("gsm8k_train", "openai/gsm8k", "main", "train"),
        ("gsm8k", "openai/gsm8k", "main", "test"),
        ("math500", "HuggingFaceH4/MATH-500", None, "test"),
        ("aime24", "HuggingFaceH4/aime_2024", None, "train"),
        ("amc23", "math-ai/amc23", None, "test"),
        ("me/mine", "me/mine", None, "train"),
        ("me/mine:easy", "me/mine", "easy", "train"),
        ("me/mine::dev", "me/mine", None, "dev"),
    ],
)
def test_data_sets_and_hub_ids(asked, data, repository, configuration, split):
    assert load_problems(data) == [
        {"id": f"{repository}/{split}/0", "problem": "1+1?", "answer": "2"},
        {"id": f"{repository}/{split}/1", "problem": "2?", "answer": "2"},
    ]
    assert asked == [(repository, configuration, split)]


def test_a_fork_adds_a_data_set_by_its_entry_alone(asked, monkeypatch, refused):
    entry = DataSet("me/mine", "hard", "dev", problem="prompt", answer="final")
    monkeypatch.setitem(DATASETS, "mine", entry)
    asked.rows = [{"prompt": "1+1?", "final": 2, "answer": "because", "question": "no"}]
    assert load_problems("mine") == [{"id": "me/mine/dev/0", "problem": "1+1?", "answer": "2"}]
    assert asked == [("me/mine", "hard", "dev")]
    asked.rows = [{"question": "1+1?", "final": 2}]
    refused(lambda: load_problems("mine"), "me/mine split dev row 0", "no prompt", "question")
    asked.rows = [{"prompt": "1+1?", "answer": 2}]
    refused(lambda: load_problems("mine"), "me/mine split dev row 0", "no final", "answer")
    refused(lambda: load_problems("yours"), "mine")


@pytest.fixture
def hub(monkeypatch):
    """huggingface_hub's constants, as on a machine that was not told to stay offline."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return constants


def test_hub_reachable(monkeypatch, hub):
    def answer(result):
        def urlopen(url, timeout):
            assert url == hub.ENDPOINT and timeout <= 10
            if isinstance(result, Exception):
                raise result

        monkeypatch.setattr(problems.urllib.request, "urlopen", urlopen)

    answer(None)
    assert problems.hub_reachable()
    answer(urllib.error.HTTPError("url", 503, "busy", {}, None))
    assert problems.hub_reachable() and not hub.HF_HUB_OFFLINE
    answer(urllib.error.URLError("no route"))
    assert not problems.hub_reachable() and hub.HF_HUB_OFFLINE


def test_a_hub_that_accepts_and_never_answers_is_given_up_within_seconds(monkeypatch, hub):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(hub, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        assert not problems.hub_reachable()
    assert time.monotonic() - started < 60  # it gives up after 5


def test_without_the_hub_the_command_ends_in_seconds_and_names_the_local_way(world, tmp_path):
    """A real process and a hub address where nobody listens, whatever network the machine has."""
    env = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    env |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "cache")}
    command = [
        sys.executable,
        "rollout.py",
        "--model",
        world / "teacher_init",
        "--data",
        "gsm8k",
        "--out",
        tmp_path / "out",
    ]
    started = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert time.monotonic() - started < 120  # the hub's own clients retry for longer
    assert done.returncode == 2, done.stderr
    assert "openai/gsm8k" in done.stderr and ".jsonl" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
