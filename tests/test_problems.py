"""Problems from files and from the hub, gold answers, and what is refused."""

import csv
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error

import pyarrow
import pytest
from pyarrow import parquet

from conftest import ROOT, read_rows, run_line, stage_of, untimed
from distil import problems
from distil.grading import is_correct
from distil.problems import DATASETS, DataSet, gold_answer, load_problems
from distil.prompts import render_prompt
from recipes.toy_world import make_tokenizer


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
        {"problem": None, "question": "n", "answer": 3, "id": None},
    )
    assert load_problems(path) == [
        {"id": "mine/0", "problem": "1+1?", "answer": "2"},
        {"id": "mine/x", "problem": "2+2?", "answer": "1,234"},
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
        (10**400, "1" + "0" * 400),
        ("007", "007"),
        (r"\frac12", r"\frac12"),
        ("1,234", "1,234"),
        ("#### 1 #### -1,000 ", "-1,000"),
        (None, None),
        (True, True),
        (float("inf"), float("inf")),
        (["1"], ["1"]),
    ],
)
def test_gold_answer(answer, gold):
    assert gold_answer(answer) == gold


@pytest.mark.parametrize(
    "gold, right, wrong",
    [
        ("1,234", r"1234 1,234 1{,}234 1\,234 \$1,234 1234.0", "1,235 (1,234) 234 12,34"),
        ("12,345,678", "12345678 12,345,678", "12,345,679 12345"),
        ("$1,234.50", r"1234.5 \$1,234.50 1,234.50", "1234 1,234.05"),
        ("-1,000", "-1000 -1,000", "1000"),
        ("3/1,000", "3/1000 0.003", "3"),
        ("1,000 and 2,000", "1000,2000 2000,1000", "1000 3000"),
        ("1, 2", "1,2 2,1", "12 1"),
        ("1,2", "1,2", "12 1.2"),
        ("1,2,3", "1,2,3", "123"),
        ("(1,234)", "(1,234)", "1234 (1234,1)"),
        ("(3, 4)", "(3,4)", "34 (4,3)"),
        ("[1,200]", "[1,200]", "1200 (1,200)"),
        (r"\{100,200\}", r"\{100,200\} \{200,100\}", "100200"),
    ],
)
@pytest.mark.parametrize("solution", ["{}", "so it is\n#### {}"])
def test_commas_of_a_gold_answer_separate_thousands_or_elements(gold, right, wrong, solution):
    """The grader decides, so that the answer alone and GSM8K's solutions are read alike."""
    answer = gold_answer(solution.format(gold))
    for found, expected in [(text, True) for text in right.split()] + [
        (text, False) for text in wrong.split()
    ]:
        assert is_correct(f"It is \\boxed{{{found}}}.", answer) == expected, found


KINDS = (".jsonl", ".json", ".csv", ".parquet")
COLUMN_MAPS = [("problem", "answer"), ("question", "answer"), ("prompt text", "final"), ("answer", "problem")]


def write_as(path, rows):
    """The rows in a file of the kind that its name says; a csv has an empty field for None."""
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with open(path, "w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        write(path, *rows)
    return str(path)


@pytest.mark.parametrize("columns", COLUMN_MAPS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_texts_that_stand_in_it(tmp_path, kind, columns):
    texts = ["2+2?", 'He said "1, 2".\nWhat next?', "é∑", " 7 ", "NA", "2024-01-01", "1e5", "9"]
    answers = ["007", "1,234", r"\frac12", "so\n#### 1,5", "NA", "2024-01-01", "1e5", "true"]
    first = {"question": "no", "problem": "no", "answer": "no", "other": None}
    rows = [first | dict(zip(columns, pair)) for pair in zip(texts, answers)]
    found = load_problems(write_as(tmp_path / f"p{kind}", rows), 0, columns)
    assert found == [
        {"id": f"p/{i}", "problem": text, "answer": answer.removeprefix("so\n#### ")}
        for i, (text, answer) in enumerate(zip(texts, answers))
    ]
    assert load_problems(str(tmp_path / f"p{kind}"), 3, columns) == found[:3]


@pytest.mark.parametrize("kind", KINDS)
def test_a_value_that_is_missing_is_none_in_every_kind_of_file(tmp_path, kind, refused):
    """The question takes the place of a null problem, the row's number that of a null id."""
    rows = [
        {"problem": "1?", "question": "no", "answer": "1", "id": "x"},
        {"problem": None, "question": "2?", "answer": "2", "id": None},
    ]
    assert load_problems(write_as(tmp_path / f"p{kind}", rows)) == [
        {"id": "p/x", "problem": "1?", "answer": "1"},
        {"id": "p/1", "problem": "2?", "answer": "2"},
    ]
    place = f"p{kind} {'line' if kind == '.jsonl' else 'row'} 2: "
    null = '""' if kind == ".csv" else "null"
    for change, words in (
        ({"question": None}, f"its 'problem' is {null}"),
        ({"answer": None}, f"its 'answer' is {null}"),
        ({"answer": "  "}, "its 'answer' is \"  \""),
        ({"answer": "so #### "}, "its 'answer' is \"so #### \""),
        ({"id": "x"}, "the id 'x' was already used at"),
    ):
        path = write_as(tmp_path / f"p{kind}", [rows[0], rows[1] | change])
        assert refused(lambda: load_problems(path), place + words).count("\n") == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_column_that_is_not_there_is_named_beside_those_that_are(tmp_path, kind, refused):
    path = write_as(tmp_path / f"p{kind}", [{"q, a": "1?", "answer": "1"}])
    place = f"{path} {'line' if kind == '.jsonl' else 'row'} 1: "
    has = "(see --problem_column, --answer_column); it has 'q, a', 'answer'\n"
    refused(lambda: load_problems(path), f"{place}no column 'problem' or 'question' {has}")
    refused(lambda: load_problems(path, 0, ("text", "answer")), f"{place}no column 'text' {has}")
    refused(lambda: load_problems(path, 0, ("q, a", "final")), f"{place}no column 'final' {has}")


@pytest.mark.parametrize("nan", [[float("nan"), 2.5], [None, 2.5]])
def test_numbers_of_a_parquet_file(tmp_path, nan, refused):
    table = {"problem": ["a", "b"], "answer": [27.0, 2.5], "id": [2**40, 1]}
    parquet.write_table(pyarrow.table(table), tmp_path / "p.parquet")
    assert [tuple(problem.values()) for problem in load_problems(str(tmp_path / "p.parquet"))] == [
        (f"p/{2**40}", "a", "27"),
        ("p/1", "b", "2.5"),
    ]
    parquet.write_table(pyarrow.table(table | {"answer": nan}), tmp_path / "p.parquet")
    refused(
        lambda: load_problems(str(tmp_path / "p.parquet")), "p.parquet row 1: its 'answer' is", ", not text"
    )


def test_json_may_have_an_object_a_line_and_spreadsheets_a_mark_of_their_encoding(tmp_path):
    rows = [{"problem": "1?", "answer": 1}, {"problem": "2?", "answer": "02"}]
    expected = [("p/0", "1?", "1"), ("p/1", "2?", "02")]
    texts = {
        "p.json": "".join(json.dumps(row) + "\n" for row in rows),
        "list/p.json": "\ufeff\n " + json.dumps(rows),
        "p.csv": "\ufeffproblem,answer\r\n1?,1\r\n\r\n2?,02\r\n",
        "[1]*/p.csv": "problem,answer,id\n1?,1\n2?,02,\n",
    }
    for name, text in texts.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="")
        assert [tuple(problem.values()) for problem in load_problems(str(path))] == expected, name
    write_as(tmp_path / "[1]*/p.parquet", [{"problem": "1?", "answer": "1"}])
    assert load_problems(str(tmp_path / "[1]*/p.parquet"))[0]["answer"] == "1"


@pytest.mark.parametrize(
    "bad, words",
    [
        ("{not json", ["line 2", "not JSON"]),
        ("[1, 2]", ["line 2", "not a JSON object"]),
        (
            {"answer": "1"},
            [
                "line 2",
                "no column 'problem' or 'question' (see --problem_column, --answer_column); it has 'answer'",
            ],
        ),
        ({"problem": "1", "solution": "1"}, ["line 2", "no column 'answer'", "'problem', 'solution'"]),
        ({"problem": "", "answer": "1"}, ["line 2", "its 'problem' is \"\", not text"]),
        ({"problem": 5, "answer": "1"}, ["line 2", "its 'problem' is 5, not text"]),
        ({"problem": None, "question": None, "answer": "1"}, ["line 2", "its 'problem' is null"]),
        ({"problem": "1", "answer": None}, ["line 2", "its 'answer' is null"]),
        ({"problem": "1", "answer": "####  "}, ["line 2", "its 'answer' is \"####  \", not"]),
        ({"problem": "1", "answer": ["1"]}, ["line 2", "its 'answer' is [\"1\"], not"]),
        ({"problem": "1", "answer": ["1"] * 999}, ["line 2", "its 'answer' is [\"1\", "]),
        ({"problem": "1", "answer": True}, ["line 2", "its 'answer' is true"]),
        ({"problem": "1", "answer": "1", "id": "a"}, ["line 2", "line 1", "'a'"]),
        ({"problem": "1", "answer": "1", "id": ["a"]}, ["line 2", "id", "['a']"]),
        ({"problem": "half a pair: \ud83d", "answer": "1"}, ["line 2", "surrogates"]),
        ({"problem": "1", "answer": float("nan")}, ["line 2", "its 'answer' is NaN"]),
        ('{"problem": "1", "answer": 1e999}', ["line 2", "its 'answer' is Infinity"]),
        ('{"problem": "1", "answer": ' + "1" * 5000 + "}", ["line 2", "not JSON"]),
        ("[" * 100_000, ["line 2", "not JSON"]),
    ],
)
def test_bad_lines_are_refused_with_file_and_line(tmp_path, refused, bad, words):
    path = write(tmp_path / "p.jsonl", {"problem": "1+1?", "answer": "2", "id": "a"}, bad)
    message = refused(lambda: load_problems(path), path, *words)
    assert message.count("\n") == 1 and len(message) < 300 + len(path)


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("p.json", "", "no problems in it"),
        ("p.json", "[]", "no problems in it"),
        ("p.json", "[1, 2]", "row 1: not an object"),
        ("p.json", '[{"problem": "1"', "after row 0: Expecting ',' delimiter"),
        ("p.json", '[{"problem": "\\ud83d", "answer": "1"}]', "surrogates not allowed"),
        ("p.json", "[" * 100_000, "after row 0: "),
        ("p.json", f'[{{"problem": "1", "answer": {"1" * 5000}}}]', "after row 0: "),
        ("p.json", '{"problem": "1", "answer": "1"}\n{"problem"', "line 2: not JSON"),
        ("p.json", '"hello"', "line 1: not a JSON object"),
        ("p.csv", "", "no problems in it"),
        ("p.csv", "problem,answer\n", "no problems in it"),
        (
            "p.csv",
            "problem,answer\n1,1\nWhat is 1,000?,2\n",
            "row 2: not an object, or more fields than columns",
        ),
        ("p.csv", "problem,answer\nWhat is 1,000?,2\n", "row 1: not an object, or more fields than columns"),
        ("p.csv", "problem,answer\n1,1\n2\n", "row 2: its 'answer' is null"),
        ("p.csv", 'problem,answer\n1,1\n"2,2\n', "after row 1: unexpected end of data"),
        ("p.csv", b"problem,answer\n\xe9,1\n", "after row 0: 'utf-8' codec"),
        (
            "p.csv",
            "problem;answer\n1;1\n",
            "row 1: no column 'problem' or 'question' (see --problem_column, --answer_column); "
            "it has 'problem;answer'",
        ),
        ("p.parquet", "", "after row 0: "),
        ("p.parquet", "no parquet at all", "after row 0: "),
        ("p.txt", '{"problem": "1", "answer": "1"}', ".jsonl/.json/.csv/.parquet"),
        ("problems", '{"problem": "1", "answer": "1"}', ".jsonl/.json/.csv/.parquet"),
    ],
)
def test_damaged_files_are_refused_in_one_line(tmp_path, refused, name, content, words):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refused(lambda: load_problems(str(path)), path, words)
    assert message.count("\n") == 1 and message.startswith("error: ")


def test_data_that_is_not_there_is_refused(tmp_path, refused):
    refused(lambda: load_problems(write(tmp_path / "empty.jsonl")), "--data", "empty.jsonl")
    for kind in KINDS:
        refused(lambda: load_problems(str(tmp_path / f"absent{kind}")), f"absent{kind}")
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


def test_a_column_map_is_for_hub_ids_and_not_for_data_sets_that_know_their_columns(asked):
    asked.rows = [{"question": "no", "answer": "no", "q": "1?", "a": "2"}]
    for data, found in (("me/mine:easy", ("1?", "2")), ("gsm8k", ("no", "no"))):
        (problem,) = load_problems(data, 0, ("q", "a"))
        assert (problem["problem"], problem["answer"]) == found


def test_a_fork_adds_a_data_set_by_its_entry_alone(asked, monkeypatch, refused):
    entry = DataSet("me/mine", "hard", "dev", problem="prompt", answer="final")
    monkeypatch.setitem(DATASETS, "mine", entry)
    asked.rows = [{"prompt": "1+1?", "final": 2, "answer": "because", "question": "no"}]
    assert load_problems("mine") == [{"id": "me/mine/dev/0", "problem": "1+1?", "answer": "2"}]
    assert asked == [("me/mine", "hard", "dev")]
    asked.rows = [{"question": "1+1?", "final": 2}]
    refused(
        lambda: load_problems("mine"),
        "me/mine split dev row 0",
        "no column 'prompt' (see --problem_column, --answer_column); it has 'question', 'final'",
    )
    asked.rows = [{"prompt": "1+1?", "answer": 2}]
    refused(
        lambda: load_problems("mine"),
        "me/mine split dev row 0",
        "no column 'final' (see --problem_column, --answer_column); it has 'prompt'",
    )
    monkeypatch.setitem(DATASETS, "mine", entry._replace(problem=None))
    refused(
        lambda: load_problems("mine"),
        "me/mine split dev row 0",
        "no column None (see --problem_column, --answer_column); it has 'prompt'",
    )
    refused(lambda: load_problems("yours"), "--data yours")


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


# ---------------------------------------------------------------------------------------------------------
# The stages read problems alike


SMALL = "--engine hf --dtype float32 --max_response_tokens 6"
TRAIN = f"{SMALL} --steps 2 --batch_size 2 --eval_every 1 --eval_n 1 --eval_data"
LINES = {  # {stage: its flags, with the directory of the data and the ending of its files}
    "rollout": "--model {world}/teacher_init --data {data}/train{kind} " + SMALL,
    "train": "--prefix student --kl mix --fkl_weight 0.5 --student {world}/student_init --teacher "
    "{world}/teacher_init --data {data}/train{kind} " + TRAIN + " {data}/heldout{kind}",
    "grpo": "--model {world}/student_init --n 2 --data {data}/train{kind} " + TRAIN + " {data}/heldout{kind}",
    "evaluate": "--model {world}/student_init --n 1 --benchmarks {data}/test{kind} {data}/heldout{kind} "
    + SMALL,
}
RESULTS = {
    "rollout": ["rollouts.jsonl"],
    "train": ["metrics.jsonl", "evals.jsonl"],
    "grpo": ["metrics.jsonl", "evals.jsonl"],
    "evaluate": ["test/samples.jsonl", "heldout/samples.jsonl"],
}


@pytest.mark.parametrize("stage, kind", [*zip(LINES, (".csv", ".parquet", ".json", ".csv"))])
def test_every_stage_maps_columns_and_drops_long_prompts(stage, kind, world, tmp_path, capsys):
    """As if the file had had the usual names, and the short problems alone."""
    tokenizer, most, dropped = make_tokenizer(), 19, {}  # of prompts of 15, 19 and 23 tokens
    for name in ("train", "heldout", "test"):
        rows = read_rows(world / f"{name}.jsonl")
        short = [row for row in rows if len(render_prompt(tokenizer, row["problem"])) <= most]
        dropped[name] = len(rows) - len(short)
        (tmp_path / "short").mkdir(exist_ok=True)
        write(tmp_path / f"short/{name}.jsonl", *short)
        renamed = [
            {"q": row["problem"], "a": row["answer"], "problem": None, "id": row["id"]} for row in rows
        ]
        write_as(tmp_path / f"{name}{kind}", renamed)
    assert dropped == {"train": 3, "heldout": 1, "test": 2}
    line = LINES[stage].format(world=world, data=tmp_path / "short", kind=".jsonl")
    run_line(stage_of(stage), f"{line} --out {tmp_path}/expected")
    capsys.readouterr()
    line = LINES[stage].format(world=world, data=tmp_path, kind=kind)
    columns = f"--problem_column q --answer_column a --max_prompt_tokens {most}"
    run_line(stage_of(stage), f"{line} {columns} --out {tmp_path}/found")
    said = capsys.readouterr().out
    assert f"--max_prompt_tokens {most}: {dropped['heldout' if stage == 'evaluate' else 'train']} of" in said
    for name in RESULTS[stage]:
        assert untimed(tmp_path / "found" / name) == untimed(tmp_path / "expected" / name)
    facts = {"data": dropped["train"]} | ({} if stage == "rollout" else {"eval_data": dropped["heldout"]})
    if stage == "evaluate":
        for name in ("test", "heldout"):
            results = json.loads((tmp_path / f"found/{name}/results.json").read_text())
            assert results["dropped_problems"] == dropped[name]
    else:
        meta = json.loads((tmp_path / "found/meta.json").read_text())
        assert meta["dropped_problems"] == facts


@pytest.mark.parametrize(
    "stage, line",
    [
        ("rollout", "--model {0} --data gsm8k"),
        ("train", "--prefix student --kl reverse --student {0} --teacher {0} --data gsm8k"),
        ("train", "--prefix teacher --kl forward --student {0} --rollouts r --scores s"),
        ("grpo", "--model {0} --data gsm8k --eval_data aime24 --eval_every 1"),
        ("evaluate", "--model {0} --data gsm8k"),
        ("evaluate", "--model {0} --benchmarks gsm8k aime24"),
    ],
)
@pytest.mark.parametrize("column", ["--problem_column q", "--answer_column a"])
def test_a_column_map_that_nothing_takes_is_refused(stage, line, column, world, tmp_path, refused):
    line = f"{line.format(world / 'student_init')} --out {tmp_path / 'out'} {column}"
    message = refused(lambda: run_line(stage_of(stage), line), "--problem_column, --answer_column")
    assert message.count("\n") == 1 and not (tmp_path / "out").exists()


def test_one_data_set_that_takes_the_column_map_is_enough():
    args = stage_of("rollout").get_args("--model m --data gsm8k --problem_column q --out o".split())
    assert problems.asked(args, None, "mine.csv").columns == ("q", "answer")
    assert problems.asked(args, "me/mine:main").columns == ("q", "answer")
