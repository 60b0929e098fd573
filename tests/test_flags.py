"""Every flag of every stage takes what is in its range, and refuses the rest by name."""

import json
import math
import os

import pytest

from conftest import STAGES, actions_of, stage_of
from distil import flags

INTEGERS = {flags.positive_int: 1, flags.non_negative_int: 0}  # {type: smallest}
NUMBERS = {  # {type: (values of its range, numbers outside of it)}
    flags.positive: (("1e-9", "3", "1e37"), ("0", "-1", "1.1e37")),
    flags.non_negative: (("0", "0.5", "1e37"), ("-1e-9", "-1", "1.1e37")),
    flags.fraction: (("0", "0.5", "1"), ("-0.1", "1.1")),
    flags.positive_fraction: (("0.1", "1"), ("0", "-0.1", "1.5")),
    flags.temperature: (("0", "0.01", "2"), ("1e-3", "1e-320", "-1")),
}
FREE_TEXT = {"prompt_suffix", "system_prompt", "problem_column", "answer_column", "response_column"}
FREE_TEXT |= {"teacher_system_prompt", "teacher_context_column", "y"}
SENSELESS = [
    "nan",
    "-nan",
    "inf",
    "-inf",
    "1e400",
    "",
    " ",
    "x",
    "1,2",
    "1 2",
    "0x10",
    "1+1",
    "None",
    "9" * 5000,
]
EVERY = [(stage, action) for stage in STAGES for action in actions_of(stage).values()]
SMALLEST = {  # a command line that a stage accepts
    "rollout": "--model m --data d --out o",
    "score_teacher": "--teacher t --rollouts r --out o",
    "train": "--prefix student --kl mix --fkl_weight 0.5 --student s --teacher t --data d --out o",
    "grpo": "--model m --data d --out o",
    "evaluate": "--model m --data d --out o",
}


def values_of(action):
    """(good, bad) texts for a flag."""
    if action.type in INTEGERS:
        low = INTEGERS[action.type]
        bad = [str(low - 1), "-5", "1.5", "1e3", str(flags.LARGEST + 1), "9" * 400, *SENSELESS]
        return [str(low), "7", str(flags.LARGEST)], bad
    if action.type in NUMBERS:
        good, bad = NUMBERS[action.type]
        return list(good), [*bad, *SENSELESS]
    if action.type is flags.rising:
        bad = ["0,1", "2,1", "1,1", "1,,2", ",", "1,nan", "1,1.5", "-1,2", "nan", "", "x", "1;2"]
        return ["5", "1,2,3"], bad
    if action.type is flags.json_object:
        return ["{}", '{"a": {"b": [1, null]}}'], [
            "",
            "x",
            "[]",
            "1",
            "null",
            "{a: 1}",
            '{"a": NaN}',
            "[" * 9**5,
        ]
    if action.type is flags.url:
        good = ["http://127.0.0.1:8000", "https://host/v1", "http://[::1]:80/v1/", "http://a.b-c:1/"]
        return good, ["host:8000", "ftp://host", "http://", "http://a b", "http://a/b", "/v1", *SENSELESS]
    if action.type is flags.path:
        return ["x", "~/x", "a b", "org/name"], ["", "  ", "a\0b", "a\nb", "a\udcff"]
    return [], []


@pytest.mark.parametrize("stage, action", EVERY, ids=lambda value: getattr(value, "dest", value))
def test_every_flag_has_a_kind(stage, action):
    """A switch, one of some words, free text, or a type of distil/flags.py: nothing else reaches a stage."""
    kinds = [action.nargs == 0, bool(action.choices), action.dest in FREE_TEXT, bool(values_of(action)[0])]
    assert sum(kinds) == 1, f"--{action.dest} of {stage}.py"


@pytest.mark.parametrize("stage, action", EVERY, ids=lambda value: getattr(value, "dest", value))
def test_every_default_is_in_the_range_of_its_flag(stage, action):
    if action.type and action.default not in (None, []):
        assert action.type(str(action.default)) == action.default, f"--{action.dest} of {stage}.py"


@pytest.mark.parametrize("stage, action", EVERY, ids=lambda value: getattr(value, "dest", value))
def test_every_value_outside_a_range_is_refused_by_name(stage, action, capsys):
    """While the command line is read, with exit code 2 and the range in the message."""
    for text in values_of(action)[1]:
        words = SMALLEST[stage].split()
        with pytest.raises(SystemExit) as end:
            given = [f"--{action.dest}", text, text] if action.nargs == 2 else [f"--{action.dest}={text}"]
            stage_of(stage).get_args([*words, *given])
        said = capsys.readouterr().err
        assert end.value.code == 2 and f"--{action.dest}: must " in said, (text, said[:200])
        assert said.startswith("error: ") and said.count("\n") == 1


@pytest.mark.parametrize("stage, action", EVERY, ids=lambda value: getattr(value, "dest", value))
def test_every_value_in_a_range_is_read(stage, action):
    for text in values_of(action)[0]:
        value = action.type(text)
        if action.type in INTEGERS or action.type in NUMBERS:
            assert value == float(text) and math.isfinite(value)
        elif action.type is flags.url:
            assert value == text.removesuffix("/").removesuffix("/v1")
        elif action.type is flags.path:
            assert value == os.path.expanduser(text)
        elif action.type is flags.json_object:
            assert value == json.loads(text)
        else:
            assert value == json.loads(f"[{text}]")


@pytest.mark.parametrize("stage", STAGES)
def test_lists_are_refused_by_each_of_their_values(stage, capsys):
    for name, action in actions_of(stage).items():
        if action.nargs in ("+", 2) and action.type and action.type is not flags.path:
            with pytest.raises(SystemExit):
                stage_of(stage).get_args([*SMALLEST[stage].split(), f"--{name}", "1", "-3"])
            assert f"--{name}: must be" in capsys.readouterr().err


@pytest.mark.parametrize("stage", STAGES)
def test_a_flag_is_given_by_its_whole_name(stage, capsys):
    assert stage_of(stage).get_args(SMALLEST[stage].split()).out == "o"
    with pytest.raises(SystemExit):
        stage_of(stage).get_args([*SMALLEST[stage].split(), "--see", "1"])
    assert "unrecognized arguments: --see" in capsys.readouterr().err


def test_home_is_expanded_in_every_path(monkeypatch):
    monkeypatch.setenv("HOME", "/h")
    words = "--student ~/s --rollouts ~/r --scores ~/t --out ~/o --eval_data ~/e.jsonl --eval_every 1".split()
    args = stage_of("train").get_args(["--prefix", "teacher", "--kl", "forward", *words])
    assert [args.student, args.rollouts, args.scores] == [f"/h/{name}" for name in "srt"]
    assert [args.out, args.eval_data] == ["/h/o", "/h/e.jsonl"]
    args = stage_of("evaluate").get_args(["--table", "~/a", "b"])
    assert args.table == ["/h/a", "b"]


@pytest.mark.parametrize("stage", STAGES)
def test_an_out_that_cannot_be_a_directory_is_one_line(stage, tmp_path, refused):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("mine")
    for name in ("link", "file"):
        words = SMALLEST[stage].replace("--out o", f"--out {tmp_path / name}").split()
        message = refused(
            lambda: stage_of(stage).main(stage_of(stage).get_args(words)),
            "--out",
            "a file, or a link to nothing",
        )
        assert message.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine" and not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("name", ["folder", "folder.png", "x", "x.txt", "x.png.exe"])
def test_a_figure_that_cannot_be_drawn_is_one_line(name, tmp_path, refused):
    for folder in ("folder", "folder.png"):
        (tmp_path / folder).mkdir()
    evaluate = stage_of("evaluate")
    args = evaluate.get_args(["--figure", str(tmp_path / name), "--runs", str(tmp_path)])
    assert refused(lambda: evaluate.main(args), "--figure", ".png").count("\n") == 1
