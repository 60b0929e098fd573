"""A teacher with a prompt of its own, live and from stored scores; the prompt's flags in every stage."""

import json
import shutil

import pytest
import torch

import evaluate
import rollout
import score_teacher
import train
from conftest import read_rows, replace_text, run_line
from distil.artifacts import read_artifact
from distil.batches import micro_batches
from distil.models import Response, load_model
from distil.prompts import Prompting, load_tokenizer, render_prompt
from distil.rollouts import read_rollouts
from distil.teacher import Scores, live_teacher
from runs.flops import tflops

TINY = "--engine hf --dtype float32 --max_response_tokens 6"


@pytest.fixture(scope="module")
def hints(world):
    """The toy world's training problems with a column `hint`."""
    path = world.parent / "hints" / "train.jsonl"
    path.parent.mkdir()
    rows = read_rows(world / "train.jsonl")
    path.write_text("".join(json.dumps(row | {"hint": f"={row['answer']}"}) + "\n" for row in rows))
    return path


def own_prompt(world, problem, system=""):
    tokenizer = load_tokenizer(str(world / "teacher_init"), "-")
    return render_prompt(tokenizer, f"{problem['problem']}\n\n={problem['answer']}", Prompting("", system))


def logits_after(model, prompt, response):
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0]
    return logits[len(prompt) - 1 : -1]


@pytest.fixture(scope="module")
def own_scores(world, rollouts, hints):
    path = world.parent / "own_scores"
    line = f"--teacher {world}/teacher_init --rollouts {rollouts} --data {hints} --dtype float32 --out {path}"
    run_line(score_teacher, f"{line} --teacher_context_column hint --teacher_system_prompt a")
    return path


def test_stored_scores_are_those_after_the_teachers_own_prompt(world, rollouts, own_scores):
    reader, model = Scores(own_scores, rollouts), load_model(str(world / "teacher_init"), "-", "float32")
    problems = {f"train/{row['id']}": row for row in read_rows(world / "train.jsonl")}
    for i, row in enumerate(read_rollouts(rollouts)):
        prompt = own_prompt(world, problems[row["id"]], "a")
        right = logits_after(model, prompt, row["response_ids"])
        torch.testing.assert_close(reader.read(i)["hidden"] @ reader.head.T, right)
        assert reader.meta["teacher_prompt_tokens"][row["id"]] == len(prompt)
    assert reader.meta["args"]["teacher_context_column"] == "hint"


def test_a_live_teacher_scores_the_same_tokens_after_its_own_prompt(world, monkeypatch):
    problem = read_rows(world / "train.jsonl")[0]
    teacher = live_teacher(str(world / "teacher_init"), "float32", 29)
    own, model = own_prompt(world, problem), load_model(str(world / "teacher_init"), "-", "float32")
    responses = [Response([1, 2, 3], [4, 5, 2], False, teacher_prompt_ids=own), Response([1, 3], [6], False)]
    signal = teacher.signal(responses)
    right = torch.cat([logits_after(model, own, [4, 5, 2]), logits_after(model, [1, 3], [6])])
    torch.testing.assert_close(signal.hidden @ signal.head.T, right)
    # and no micro-batch is larger than allowed in either model
    assert len(list(micro_batches(responses * 2, 2 * (len(own) + 3)))) == 2


def self_distillation(world, hints, out, more="", *words):
    line = f"--prefix student --kl reverse --student {world}/student_init --teacher {world}/student_init"
    line += f" --data {hints} --steps 2 --batch_size 2 --lr 1e-3 --out {out} {TINY}"
    train.main(train.get_args([*line.split(), *more.split(), *words]))
    return read_rows(out / "metrics.jsonl")


def test_a_student_distils_itself_and_its_costs_count_the_teachers_prompt(world, hints, tmp_path, capsys):
    plain = self_distillation(world, hints, tmp_path / "plain")
    assert plain[0]["rkl"] < 1e-6 and "teacher and student are the same" in capsys.readouterr().out
    own = self_distillation(world, hints, tmp_path / "own", "--teacher_context_column hint")
    said = capsys.readouterr().out
    assert own[0]["rkl"] > 1e-5 and "preflight: teacher's prompt" in said and "\\n\\n=" in said
    assert own[0]["response_tokens"] == plain[0]["response_tokens"]  # the same samples
    config = json.load(open(world / "student_init/config.json"))
    least = 2 * (tflops(config, 16, 0, forwards=1) - tflops(config, 13, 0, forwards=1))
    assert own[0]["tflops"] - plain[0]["tflops"] == pytest.approx(least, rel=0.5)


def test_scores_with_an_own_prompt_train_are_announced_and_counted(
    world, rollouts, scores, own_scores, tmp_path, capsys
):
    spent = []
    for path in (scores, own_scores):
        line = f"--prefix teacher --kl forward --student {world}/student_init --rollouts {rollouts} --scores"
        run_line(train, f"{line} {path} --steps 1 --batch_size 2 --out {tmp_path}/{path.name} {TINY}")
        spent.append(read_rows(tmp_path / path.name / "metrics.jsonl")[0])
        said = "made with --teacher_context_column 'hint'" in capsys.readouterr().out
        assert said == (path == own_scores)
    assert (
        spent[0]["tflops"] == spent[1]["tflops"] < spent[0]["tflops_uncached"] < spent[1]["tflops_uncached"]
    )


LONG = "--teacher_system_prompt " + "1" * 600  # more than the context of 512


@pytest.mark.parametrize(
    "more, words",
    [
        ("--teacher_context_column clue", ["no column 'clue' (see --teacher_context_column)", "line 1"]),
        (LONG, ["problem train/", "the teacher's prompt has 6", "context of 512"]),
        ("--teacher_context_column hint --max_prompt_tokens 1", ["12 of 12 problems dropped"]),
    ],
)
def test_bad_own_prompts_are_refused_in_one_line(world, hints, tmp_path, refused, more, words):
    go = lambda: self_distillation(world, hints, tmp_path / "run", more)
    assert refused(go, *words).count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag", ["--system_prompt", "--teacher_system_prompt"])
def test_a_system_prompt_of_white_space_is_refused_by_its_flag(flag, world, hints, tmp_path, refused):
    """Empty is none; a suffix, say a newline, may be white space."""
    go = lambda *more: self_distillation(world, hints, tmp_path / "run", "", *more)
    message = refused(lambda: go(flag, " \n"), f"{flag}: must be more than white space, not ' \\n'")
    assert message.count("\n") == 1 and not (tmp_path / "run").exists()
    if flag == "--teacher_system_prompt":
        go(flag, "", "--prompt_suffix", "\n")


def test_score_teacher_refuses_data_that_does_not_fit_the_rollouts(world, rollouts, hints, tmp_path, refused):
    line = f"--teacher {world}/teacher_init --rollouts {rollouts} --out {tmp_path}/out --dtype float32"
    line += " --teacher_context_column hint --data"
    few = tmp_path / "few" / "train.jsonl"
    few.parent.mkdir()
    few.write_text(hints.read_text().splitlines(keepends=True)[-1])
    refused(lambda: run_line(score_teacher, f"{line} {few}"), f"--data {few}: has no problem train/0")
    other = tmp_path / "train.jsonl"
    other.write_text(hints.read_text().replace('"a=', '"b='))
    words = f"--data {other}: its train/0 is not the problem that --rollouts answer"
    refused(lambda: run_line(score_teacher, f"{line} {other}"), words)
    refused(lambda: run_line(score_teacher, f"{line} {hints} {LONG}"), "the teacher's context 512")
    assert not (tmp_path / "out").exists()


def test_flags_of_an_own_prompt_go_together(refused):
    own = "--teacher_context_column c"
    line = "--teacher t --rollouts r --out o"
    refused(lambda: score_teacher.get_args(f"{line} {own}".split()), "--data goes with")
    refused(lambda: score_teacher.get_args(f"{line} --data d".split()), "--data goes with")
    preflight = f"--preflight --teacher t --student s --data d {own}"
    refused(lambda: score_teacher.get_args(preflight.split()), "not with --preflight")
    line = f"--prefix teacher --kl forward --student s --rollouts r --scores c --out o {own}"
    refused(lambda: train.get_args(line.split()), "--prefix teacher does not use --teacher_context_column")


PARTS = {
    "prompt_suffix": ("--prompt_suffix =", "="),
    "system_prompt": ("--system_prompt a", "a"),
    "thinking": ("--thinking on", "on"),
    "template_kwargs": ('--template_kwargs {"mood":"b"}', {"mood": "b"}),
}


@pytest.fixture(scope="module")
def switched(world, tmp_path_factory):
    """The student with a template that has every switch."""
    path = shutil.copytree(world / "student_init", tmp_path_factory.mktemp("switched") / "model")
    switches = "assistant\n{% if enable_thinking %}c{% endif %}{{ mood }}"
    replace_text(path / "chat_template.jinja", "assistant\n", switches)
    return path


@pytest.mark.parametrize("name", PARTS)
def test_each_part_of_the_prompt_is_recorded_and_must_be_the_same_in_training(
    name, world, switched, tmp_path, refused, capsys
):
    flag, value = PARTS[name]
    roll = f"--model {switched} --data {world}/train.jsonl --limit 2 {TINY} --out {tmp_path}/rollouts {flag}"
    run_line(rollout, roll)
    meta = read_artifact(str(tmp_path / "rollouts"), "-", "rollout")
    assert meta[name] == value
    line = (
        f"--prefix teacher --kl forward --vocab sampled --student {switched} --steps 1 --batch_size 2 {TINY}"
    )
    line += f" --rollouts {tmp_path}/rollouts --out {tmp_path}/run"
    message = refused(lambda: run_line(train, line), f"--{name}: is ", "but --rollouts were made with")
    assert message.count("\n") == 1
    run_line(train, f"{line} {flag} --save_every 1")
    assert read_artifact(f"{tmp_path}/run", "-", "train")["template_sha256"] == meta["template_sha256"]
    refused(lambda: run_line(train, f"{line} --resume --save_every 1 --steps 2"), f"--resume: --{name} was")
    evaluation = f"--model {switched} --data {world}/test.jsonl --limit 2 --n 1 {TINY} --out {tmp_path}"
    run_line(evaluate, f"{evaluation}/a")
    run_line(evaluate, f"{evaluation}/b {flag}")
    capsys.readouterr()
    run_line(evaluate, f"--compare {tmp_path}/a {tmp_path}/b")
    assert f"the prompts differ: --{name} was " in capsys.readouterr().out
    hashes = [read_artifact(f"{tmp_path}/{one}", "-")["template_sha256"] for one in "ab"]
    assert hashes[0] != hashes[1] == meta["template_sha256"]
