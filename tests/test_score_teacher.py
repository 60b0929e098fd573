"""score_teacher.py: hidden states against single unpadded sequences, the scores artifact against the live teacher, and refusals."""

import collections
import json
import shutil

import pytest
import torch

import score_teacher
from distil.artifacts import read_artifact
from distil.models import Response, load_model, response_hidden
from distil.prompts import load_tokenizer
from distil.rollouts import read_rollouts
from distil.teacher import Scores
from recipes.toy_world import make_model, make_tokenizer
from score_teacher import score, split_into_shards


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(5)
    return make_model(make_tokenizer(), 32, 2, 1).eval()


PROMPTS, RESPONSES = [[1, 3, 20], [1], [1, 9, 12, 13]], [[21, 0, 2], [5, 6, 7, 8, 9, 2], [2]]


def test_shards_are_consecutive_and_bounded():
    assert split_into_shards([5, 5, 5, 11, 1, 2], 10) == [[0, 1], [2], [3], [4, 5]]


def test_score_keeps_the_order_whatever_the_batches(model):
    responses = [Response(*ids, False) for ids in zip(PROMPTS, RESPONSES)]
    for budget in (1, 9, 1000):
        scored = score(model, responses, 29, "hidden", 4, budget)
        for prompt, response, found in zip(PROMPTS, RESPONSES, scored, strict=True):
            with torch.no_grad():
                torch.testing.assert_close(found["hidden"], response_hidden(model, [prompt], [response]))


# ---------------------------------------------------------------------------------------------------------------------
# The artifact


def run(world, rollouts, out, *more):
    given = [
        "--teacher",
        world / "teacher_init",
        "--rollouts",
        rollouts,
        "--out",
        out,
        *"--dtype float32 --shard_tokens 30".split(),
        *more,
    ]
    score_teacher.main(score_teacher.get_args([str(word) for word in given]))


def shard_bytes(path):
    return {file.name: file.read_bytes() for file in sorted(path.glob("*.safetensors"))}


def test_stored_states_give_the_live_teachers_logits(world, rollouts, scores):
    reader, teacher = (
        Scores(str(scores), str(rollouts)),
        load_model(str(world / "teacher_init"), "-", "float32"),
    )
    rows = list(read_rollouts(rollouts))
    assert len(reader.shards) > 2 and len(reader.places) == len(rows) == 12
    for i, row in enumerate(rows):
        with torch.no_grad():
            logits = teacher(input_ids=torch.tensor([row["prompt_ids"] + row["response_ids"]])).logits[0]
        torch.testing.assert_close(
            reader.read(i)["hidden"] @ reader.head.T, logits[len(row["prompt_ids"]) - 1 : -1]
        )
    meta = read_artifact(str(scores), "--", "score_teacher")
    assert meta["counts"]["response_tokens"] == sum(len(row["response_ids"]) for row in rows)
    assert [sum(shard["tokens"]) <= 30 or len(shard["tokens"]) == 1 for shard in meta["shards"]] == [
        True
    ] * len(meta["shards"])


def test_max_tokens_stores_the_first_ones(world, rollouts, scores, tmp_path):
    run(world, rollouts, tmp_path / "short", "--max_tokens", 3)
    short, full = Scores(str(tmp_path / "short"), str(rollouts)), Scores(str(scores), str(rollouts))
    rows = list(read_rollouts(rollouts))
    for i, row in enumerate(rows):
        torch.testing.assert_close(short.read(i)["hidden"], full.read(i)["hidden"][:3])
    cut = sum(max(0, len(row["response_ids"]) - 3) for row in rows)
    assert short.meta["counts"]["cut_by_max_tokens"] == cut > 0


def test_padded_rows_of_the_teachers_head_are_not_stored(world, rollouts, tmp_path):
    teacher, tokenizer = (
        load_model(str(world / "teacher_init"), "-", "float32"),
        load_tokenizer(str(world / "teacher_init"), "-"),
    )
    teacher.resize_token_embeddings(40, mean_resizing=False)
    teacher.save_pretrained(tmp_path / "padded")
    tokenizer.save_pretrained(tmp_path / "padded")
    run(world, rollouts, tmp_path / "scores", "--teacher", tmp_path / "padded")
    assert Scores(str(tmp_path / "scores"), str(rollouts)).head.shape == (29, 128)


class Killed(Exception):
    pass


def killed_in_shard_3(monkeypatch):
    calls = []

    def patched(*words):
        calls.append(words)
        if len(calls) == 3:
            raise Killed
        return score(*words)

    monkeypatch.setattr(score_teacher, "score", patched)


def test_a_killed_run_is_resumed_and_keeps_its_shards(world, rollouts, scores, tmp_path, monkeypatch):
    out = tmp_path / "scores"
    with monkeypatch.context() as patch:
        killed_in_shard_3(patch)
        with pytest.raises(Killed):
            run(world, rollouts, out)
    assert not (out / "meta.json").exists()
    kept = {
        name: (out / name).stat().st_mtime_ns
        for name in ("shard_00000.safetensors", "shard_00001.safetensors")
    }
    run(world, rollouts, out, "--resume")
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept
    assert shard_bytes(out) == shard_bytes(scores)
    read_artifact(str(out), "--", "score_teacher")


def test_resume_over_rollouts_that_were_made_anew_is_refused(world, rollouts, tmp_path, monkeypatch, refused):
    source = tmp_path / "rollouts"
    shutil.copytree(rollouts, source)
    with monkeypatch.context() as patch:
        killed_in_shard_3(patch)
        with pytest.raises(Killed):
            run(world, source, tmp_path / "scores")
    shutil.rmtree(source)
    shutil.copytree(world / "gold", source)
    refused(lambda: run(world, source, tmp_path / "scores", "--resume"), "--resume", "rollouts")


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


def teacher_with(world, path, change):
    """A copy of the teacher whose tokenizer.json, read as text, was changed."""
    shutil.copytree(world / "teacher_init", path)
    change(path)
    return path


def swap_ids(path):
    text = json.loads((path / "tokenizer.json").read_text())
    words = text["model"]["vocab"]
    words["0"], words["1"] = words["1"], words["0"]
    (path / "tokenizer.json").write_text(json.dumps(text))


def change_template(path):
    file = path / "chat_template.jinja"
    file.write_text(file.read_text().replace("assistant\n", "assistant "))


def test_bad_input_is_refused_and_leaves_no_directory(world, rollouts, tmp_path, monkeypatch, refused):
    out = tmp_path / "out"

    def is_refused(more, *words):
        refused(lambda: run(world, rollouts, out, *more), *words)
        assert not out.exists()

    is_refused(["--teacher", tmp_path / "absent"], "--teacher", "absent")
    is_refused(["--rollouts", tmp_path / "absent"], "--rollouts", "meta.json")
    is_refused(["--rollouts", world], "--rollouts", "toy_world")
    is_refused(["--teacher", teacher_with(world, tmp_path / "ids", swap_ids)], "--teacher", "tokenizer")
    is_refused(
        ["--teacher", teacher_with(world, tmp_path / "template", change_template)], "--rollouts", "template"
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda path: collections.namedtuple("usage", "free")(1000))
    is_refused([], "--out", "disk", "--max_tokens")


def test_scores_of_other_rollouts_are_refused(world, scores, refused):
    refused(lambda: Scores(str(scores), str(world / "gold")), "--scores", "other rollouts", "gold")


def test_a_teacher_whose_head_is_refused_leaves_no_directory(world, rollouts, tmp_path, refused):
    def softcap(path):
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"final_logit_softcapping": 30.0}))

    teacher = teacher_with(world, tmp_path / "soft", softcap)
    refused(
        lambda: run(world, rollouts, tmp_path / "out", "--teacher", teacher),
        "--teacher",
        "final_logit_softcapping",
    )
    assert not (tmp_path / "out").exists()
