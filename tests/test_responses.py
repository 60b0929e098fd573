"""rollout.py --responses: stored responses in the columns of real data sets become rollouts."""

import collections
import json
import math
import shutil

import pytest
from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedTokenizerFast

import rollout
import score_teacher
import train
from conftest import run_line
from distil.artifacts import read_artifact
from distil.problems import load_problems
from distil.prompts import PLAIN, render_prompt
from distil.sampling import SamplingConfig, Task
from recipes.toy_world import make_tokenizer

TEXT, OTHER = "1+2=3\n\\boxed{3}", "1+2=\\boxed{3}"
PROBLEM = "1+2"


def turns(*pairs, keys=("role", "content")):
    return [dict(zip(keys, pair)) for pair in pairs]


TALK = turns(("user", PROBLEM), ("assistant", TEXT))
SHAPES = {
    "problem and response": ({"problem": PROBLEM, "response": TEXT, "answer": 3}, "3"),
    "question": ({"question": PROBLEM, "response": TEXT, "answer": "so #### 3"}, "3"),
    "prompt and completion": ({"prompt": PROBLEM, "completion": TEXT}, ""),
    "TRL, as turns": ({"prompt": TALK[:1], "completion": TALK[1:]}, ""),
    "messages": ({"messages": turns(("system", "Be kind."), *[(t["role"], t["content"]) for t in TALK])}, ""),
    "OpenR1-Math": (
        {"problem": PROBLEM, "solution": "..", "answer": "3", "generations": [TEXT], "messages": TALK},
        "3",
    ),
    "OpenThoughts": (
        {
            "system": "Think.",
            "conversations": turns(("user", PROBLEM), ("assistant", TEXT), keys=("from", "value")),
        },
        "",
    ),
    "OpenThoughts3": (
        {"domain": "math", "conversations": turns(("human", PROBLEM), ("gpt", TEXT), keys=("from", "value"))},
        "",
    ),
}


def run(world, tmp_path, rows, more=""):
    source = tmp_path / "stored.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = f"--model {world}/teacher_init --responses {source} --out {tmp_path}/out --max_response_tokens 16"
    run_line(rollout, f"{line} {more}")
    return [json.loads(line) for line in open(tmp_path / "out/rollouts.jsonl")]


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_of_real_sets_become_rollouts(shape, world, tmp_path):
    row, answer = SHAPES[shape]
    (found,) = run(world, tmp_path, [row])
    tokenizer = make_tokenizer()
    assert found["prompt_ids"] == render_prompt(tokenizer, PROBLEM)
    assert tokenizer.decode(found["response_ids"]) == TEXT + tokenizer.eos_token
    assert (found["id"], found["sample"], found["answer"]) == ("stored/0", 0, answer)
    assert found["finish_reason"] == "stop"


def test_what_is_left_out_or_cut_is_counted(world, tmp_path, capsys):
    rows = [
        {"problem": PROBLEM, "generations": [TEXT, OTHER], "answer": "3"},
        {"problem": PROBLEM, "response": ""},
        {"problem": "", "response": TEXT},
        {"problem": "1+" * 20 + "2", "response": TEXT},
        {"problem": PROBLEM, "response": "1" * 16},  # its end token is the 17th
        {"problem": PROBLEM, "response": "1" * 15},
        {"problem": PROBLEM, "response": TEXT + "<|im_end|>\n"},
    ]
    found = run(world, tmp_path, rows, "--max_prompt_tokens 20 --drop truncated")
    assert [(row["id"], row["sample"]) for row in found] == [
        ("stored/0", 0),
        ("stored/0", 1),
        ("stored/5", 0),
        ("stored/6", 0),
    ]
    assert found[0]["response_ids"] == found[3]["response_ids"]  # one end token
    assert len(found[2]["response_ids"]) == 16
    faults = read_artifact(str(tmp_path / "out"), "--", "rollout")["counts"]["faults"]
    expected = {
        "rows without problem or response": 2,
        "rows with a longer prompt": 1,
        "rows without a text answer": 3,
        "truncated": 1,  # and not a second time as "cut"
    }
    assert {name: count for name, count in faults.items() if count} == expected
    shown = capsys.readouterr().out.splitlines()[-1]
    assert shown == "counts: " + ", ".join(f"{n} {name}" for name, n in faults.items() if n)
    assert "1 truncated" in shown


def test_nothing_to_count_is_not_printed(world, tmp_path, capsys):
    run(world, tmp_path, [{"problem": PROBLEM, "response": TEXT, "answer": "3"}])
    assert "counts" not in capsys.readouterr().out


def parts(*texts, kind="text"):
    return [{"type": kind, "text": text} for text in texts]


@pytest.mark.parametrize(
    "row, found",
    [
        ({"problem": PROBLEM, "response": parts(TEXT[:4], TEXT[4:])}, TEXT),
        ({"messages": turns(("user", parts("1+", "2")), ("assistant", parts(TEXT)))}, TEXT),
        (
            {"prompt": turns(("user", parts(PROBLEM))), "completion": turns(("assistant", parts(OTHER)))},
            OTHER,
        ),
        ({"messages": turns(("user", PROBLEM), ("assistant", parts(TEXT) + parts("", kind="image")))}, None),
        ({"messages": turns(("user", PROBLEM), ("assistant", [{"type": "text"}]))}, None),
        ({"messages": turns(("user", PROBLEM), ("assistant", []))}, None),
        ({"messages": turns(("user", parts("x", kind="image")), ("assistant", TEXT))}, None),
        ({"problem": PROBLEM, "generations": [None, TEXT]}, TEXT),
    ],
)
def test_text_parts_are_joined_and_what_is_no_text_is_counted(row, found, world, tmp_path):
    rows = run(world, tmp_path, [row, {"problem": PROBLEM, "response": "1"}])
    assert [row["response"] for row in rows] == [found, "1"][found is None :]
    faults = read_artifact(str(tmp_path / "out"), "--", "rollout")["counts"]["faults"]
    assert faults.get("rows without problem or response", 0) == (found is None)
    assert faults["responses without text"] == ("generations" in row)


@pytest.mark.parametrize(
    "answer, found",
    [
        (3.0, "3"),
        ("so #### 3", "3"),
        (0, "0"),
        (True, ""),
        (None, ""),
        ([3], ""),
        (math.nan, ""),
        ("#### ", ""),
    ],
)
def test_an_answer_is_text_or_a_number_and_others_are_counted(answer, found, world, tmp_path):
    [row] = run(world, tmp_path, [{"problem": PROBLEM, "response": TEXT, "answer": answer}])
    faults = read_artifact(str(tmp_path / "out"), "--", "rollout")["counts"]["faults"]
    assert row["answer"] == found and faults["rows without a text answer"] == (not found)


def test_columns_of_ones_own_stand_alone(world, tmp_path, refused):
    """A name that no row has is not another name for the usual columns."""
    row = {"q": PROBLEM, "text": TEXT, "gold": "3", "messages": TALK[:1] + turns(("assistant", OTHER))}
    own = "--problem_column q --response_column text --answer_column gold"
    [found] = run(world, tmp_path, [row], own)
    assert found["answer"] == "3" and found["response"] == TEXT
    [found] = run(world, tmp_path, [row], "--overwrite")
    assert found["response"] == OTHER
    again = lambda: run(world, tmp_path, [row], "--overwrite --response_column txet")
    refused(again, "--response_column", "1 has q, text, gold, messages")


def test_a_row_keeps_its_own_id_as_problems_do(world, tmp_path):
    row = {"id": "p7", "problem": PROBLEM, "response": TEXT}
    assert [found["id"] for found in run(world, tmp_path, [row])] == ["stored/p7"]


def test_rows_that_repeat_an_id_have_samples_of_one_problem(world, tmp_path, refused):
    row, other = {"problem": PROBLEM, "response": TEXT}, {"problem": "2+2", "response": TEXT}
    several = {"id": "1", "problem": PROBLEM, "generations": [OTHER, "1?2", TEXT]}
    found = run(world, tmp_path, [row | {"id": 1}, other | {"id": 7}, several, row | {"id": 1}])
    samples = [("stored/1", 0), ("stored/7", 0), ("stored/1", 1), ("stored/1", 3), ("stored/1", 4)]
    assert [(row["id"], row["sample"]) for row in found] == samples  # 2 has an end token inside
    shutil.rmtree(tmp_path / "out")
    again = lambda: run(world, tmp_path, [row | {"id": "1"}, row | {"id": 1}, other | {"id": 1}])
    refused(again, "line 3: the id 1 was already used at", "line 1")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("id", [None, math.nan, ""])
def test_a_row_whose_id_is_empty_is_named_by_its_index(id, world, tmp_path):
    rows = [{"id": id, "problem": problem, "response": TEXT} for problem in ("1+2", "2+2")]
    assert [row["id"] for row in run(world, tmp_path, rows)] == ["stored/0", "stored/1"]


@pytest.mark.parametrize("id", [[1], True, {}])
def test_an_id_is_text_or_a_number(id, world, tmp_path, refused):
    row = {"id": id, "problem": PROBLEM, "response": TEXT, "answer": "3"}
    refused(lambda: run(world, tmp_path, [row]), "line 1: its id must be text or a number")
    refused(lambda: load_problems(str(tmp_path / "stored.jsonl")), "line 1: its id must be text or a number")


def test_cut_responses_end_by_length(world, tmp_path):
    (found,) = run(world, tmp_path, [{"problem": PROBLEM, "response": "12345"}], "--max_response_tokens 5")
    assert len(found["response_ids"]) == 5 and found["finish_reason"] == "length"


def test_an_end_token_inside_a_response_leaves_it_out(world, tmp_path):
    """The toy tokenizer reads what it does not know as <|endoftext|>, which ends a response."""
    rows = [{"problem": PROBLEM, "response": text} for text in ("1?2", TEXT)]
    assert [row["id"] for row in run(world, tmp_path, rows)] == ["stored/1"]
    faults = read_artifact(str(tmp_path / "out"), "--", "rollout")["counts"]["faults"]
    assert faults["an end token inside"] == 1


TURN = "<s>u{{ messages[0]['content'] }}%s<s>m"


def stored(text, template, more=""):
    """(response as text, whether it was cut, counts) of a text; no response and None if it is dropped.

    The tokenizer reads characters."""
    characters = {chr(i): i for i in range(127)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab=characters, merges=[])),
        eos_token="<e>",
        additional_special_tokens=["<s>", "<t>"],
        chat_template=template,
    )
    tokenizer.add_tokens([AddedToken(token, special=False) for token in ("<think>", "</think>")])
    args = rollout.get_args(f"--model m --responses r --out o {more}".split())
    stops = sorted([*tokenizer.convert_tokens_to_ids(["<e>", "<t>"]), *args.extra_stop_ids])
    task = Task("m", tokenizer, [], [], SamplingConfig(1, 1, 1, 0, 0, stops, vocab_size=999), 0, PLAIN)
    rows, counts = [({}, render_prompt(tokenizer, PROBLEM), [text])], collections.Counter()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollout, "context_of", lambda directory: 999)
        [(_, [response])] = rollout.stored_groups(args, task, rows, counts)
    if response is None:
        return None, None, counts
    return "".join(tokenizer.convert_ids_to_tokens(response.response_ids)), response.truncated, counts


@pytest.mark.parametrize(
    "text, template, found",
    [
        ("ab", TURN % "", "ab<e>"),
        ("ab", TURN % "<t>", "ab<t>"),  # Gemma's <end_of_turn> beside <eos>
        ("ab", TURN % "<s>", "ab<e>"),  # ends a turn, but is no end token of the model
        ("ab<t> \n", TURN % "", "ab<t>"),
        ("ab<e>", TURN % "<t>", "ab<e>"),
        ("a<s>b", TURN % "", "a<s>b<e>"),
    ],
)
def test_the_end_token_is_the_texts_own_or_that_of_a_turn(text, template, found):
    response, cut, _ = stored(text, template)
    assert (response, cut) == (found, False)


def test_a_stop_token_of_the_command_does_not_follow_a_text():
    """m ends the prompt, as a newline does with real templates."""
    assert stored("ab", TURN % "", f"--extra_stop_ids {ord('m')}")[0] == "ab<e>"


@pytest.mark.parametrize(
    "text, prompt_end, found, unfinished, again",
    [
        ("<think>\na</think>b", "", "<think>\na</think>b<e>", 0, 0),
        ("<think>\na", "", "<think>\na", 1, 0),
        ("<think>\na</think>b", "<think>\n", "a</think>b<e>", 0, 0),
        ("a</think>b", "<think>\n", "a</think>b<e>", 0, 0),
        ("<think>\na", "<think>\n", "a", 1, 0),
        ("<think>", "<think>\n", "<e>", 0, 0),
        ("b", "<think>\n\n</think>\n\n", "b<e>", 0, 0),
        ("<think>a</think>b", "<think>\n\n</think>\n\n", "<think>a</think>b<e>", 0, 1),
        ("b: <think> is a tag", "", "b: <think> is a tag<e>", 0, 0),
    ],
)
def test_thinking_is_opened_once_and_ends_before_an_end_token(text, prompt_end, found, unfinished, again):
    response, cut, counts = stored(text, TURN % "" + prompt_end)
    assert (response, cut) == (found, bool(unfinished))
    assert counts["thinking that never ends, so no end token"] == counts["cut"] == unfinished
    assert counts["thinks after a prompt that ends thinking"] == again


def test_unfinished_thinking_is_dropped_as_truncated():
    response, _, counts = stored("<think>a", TURN % "", "--drop truncated")
    assert response is None and counts["truncated"] == 1


def test_messages_that_are_left_out_are_counted(world, tmp_path):
    rows = [
        {"messages": turns(("system", "x"), *[(t["role"], t["content"]) for t in TALK * 2])},
        {"system": "x", "problem": PROBLEM, "generations": [None, TEXT]},
        {"problem": PROBLEM, "response": TEXT, "prompt": 5, "messages": "x", "conversations": ["x", 5]},
    ]
    assert [row["id"] for row in run(world, tmp_path, rows)] == [f"stored/{i}" for i in range(3)]
    faults = read_artifact(str(tmp_path / "out"), "--", "rollout")["counts"]["faults"]
    assert faults["system messages left out"] == 2 and faults["rows with more turns, left out"] == 1


def test_nothing_kept_and_no_end_token_are_one_line(world, tmp_path, refused):
    row = {"problem": PROBLEM, "response": TEXT}
    unboxed = row | {"response": "1"}
    nothing = f"error: --responses {tmp_path}/stored.jsonl: no response to take (%s)\n"
    no_answer = "1 rows without a text answer, 1 %s"
    refused(lambda: run(world, tmp_path, [unboxed], "--drop unboxed"), nothing % no_answer % "unboxed")
    long = row | {"response": "1" * 600}
    too_long = nothing % no_answer % "longer than the context of 512"
    refused(lambda: run(world, tmp_path, [long], "--max_response_tokens 512"), too_long)
    assert not (tmp_path / "out").exists()
    refused(lambda: run(world, tmp_path, [row], "--max_prompt_tokens 1 --overwrite"), "1 rows with a longer")
    shutil.copytree(world / "teacher_init", tmp_path / "endless")
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        facts = json.loads((tmp_path / "endless" / name).read_text())
        facts.pop("eos_token_id", None), facts.pop("eos_token", None)
        (tmp_path / "endless" / name).write_text(json.dumps(facts))
    line = f"--model {tmp_path}/endless --overwrite"
    assert refused(lambda: run(world, tmp_path, [row], line), "--extra_stop_ids").count("\n") == 1


def test_scores_and_both_kls_work_on_them(world, tmp_path):
    run(world, tmp_path, [{"problem": f"{i}+2", "response": TEXT} for i in range(6)])
    common = f"--rollouts {tmp_path}/out --dtype float32"
    run_line(score_teacher, f"--teacher {world}/teacher_init {common} --out {tmp_path}/scores")
    for kl in ("forward", "reverse"):
        line = (
            f"--prefix teacher --kl {kl} --student {world}/student_init --scores {tmp_path}/scores {common}"
        )
        run_line(train, f"{line} --steps 2 --batch_size 3 --out {tmp_path}/{kl}")
        rows = [json.loads(line) for line in open(tmp_path / kl / "metrics.jsonl")]
        assert len(rows) == 2 and rows[0]["response_length"] == 10


def test_bad_input_is_one_line_and_leaves_nothing(world, tmp_path, refused):
    good = {"problem": PROBLEM, "response": TEXT}
    for row in (
        good | {"response": 5},
        {"text": "x"},
        {"messages": [5]},
        {"prompt": [["x"]], "completion": {}},
    ):
        refused(
            lambda: run(world, tmp_path, [row]), "--responses", "stored.jsonl line 1", "--response_column"
        )
    assert not (tmp_path / "out").exists()
    refused(lambda: run(world, tmp_path, [], ""), "stored.jsonl: no response to take (no rows)", "no columns")
    refused(lambda: run(world, tmp_path, [good], "--temperature 0.5"), "--temperature", "nothing is sampled")
    refused(lambda: run(world, tmp_path, [good], "--seed 7"), "--seed", "nothing is sampled")
    refused(lambda: run(world, tmp_path, [good], f"--data {world}/train.jsonl"), "--data", "--responses")
    refused(
        lambda: run(world, tmp_path, [good], f"--responses {tmp_path}/none.jsonl"),
        "--responses",
        "no such file",
    )
    refused(
        lambda: run_line(rollout, f"--model {world}/teacher_init --out {tmp_path}/x"), "--data", "--responses"
    )
    line = f"--model m --data d --response_column x --out {tmp_path}/x"
    refused(lambda: run_line(rollout, line), "--response_column")


@pytest.mark.parametrize("bad", ['{"probl', '{"problem": "1+2", "response": "\\ud800"}', "5"])
def test_a_damaged_row_is_found_before_anything_is_written(bad, world, tmp_path, refused):
    """Wherever it is, and its line is not the end of a progress bar's."""
    good, source = json.dumps({"problem": PROBLEM, "response": TEXT}), tmp_path / "damaged.jsonl"
    source.write_text("\n".join([good] * 20 + [bad]))
    line = f"--model {world}/teacher_init --responses {source} --out {tmp_path}/out"
    message = refused(lambda: run_line(rollout, line), f"{source} line 21: ")
    assert not (tmp_path / "out").exists()
    assert [line for line in message.splitlines() if line.startswith(f"error: {source}")]


def test_a_row_that_cannot_be_used_is_counted_wherever_it_is(world, tmp_path):
    rows = [{"text": "x"}, {"problem": PROBLEM, "response": TEXT}, {"problem": 5}]
    assert [row["id"] for row in run(world, tmp_path, rows)] == ["stored/1"]
    faults = read_artifact(str(tmp_path / "out"), "--", "rollout")["counts"]["faults"]
    assert faults["rows without problem or response"] == 2


def test_nothing_heavy_is_loaded(world, tmp_path, monkeypatch):
    monkeypatch.setattr(rollout, "load_model", lambda *words: pytest.fail("a model was loaded"))
    run(world, tmp_path, [{"problem": PROBLEM, "response": TEXT}])
