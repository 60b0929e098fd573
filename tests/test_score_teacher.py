"""score_teacher.py: hidden states against single sequences, scores against the live teacher, refusals."""

import collections
import json
import shutil
import threading

import pytest
import torch

import score_teacher
import train
from conftest import killed_in_call, replace_text, run_line, swap_ids
from distil.artifacts import read_artifact
from distil.models import Response, load_model, response_hidden
from distil.prompts import load_tokenizer
from distil.rollouts import read_rollouts, stored_responses
from distil.teacher import Scores, stored_teacher
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
        for response, found in zip(responses, scored, strict=True):
            with torch.no_grad():
                torch.testing.assert_close(found["hidden"], response_hidden(model, [response]))


# ------------------------------------------------------------------------------------------------------------
# The artifact


def run(world, rollouts, out, more=""):
    line = f"--teacher {world}/teacher_init --rollouts {rollouts} --out {out}"
    run_line(score_teacher, f"{line} --dtype float32 --shard_tokens 30 {more}")


def shard_bytes(path):
    return {file.name: file.read_bytes() for file in sorted(path.glob("*.safetensors"))}


def test_stored_states_give_the_live_teachers_logits(world, rollouts, scores):
    reader = Scores(str(scores), str(rollouts))
    teacher = load_model(str(world / "teacher_init"), "-", "float32")
    rows = list(read_rollouts(rollouts))
    assert len(reader.places) == len(rows) == 12
    for i, row in enumerate(rows):
        with torch.no_grad():
            logits = teacher(input_ids=torch.tensor([row["prompt_ids"] + row["response_ids"]])).logits[0]
        live = logits[len(row["prompt_ids"]) - 1 : -1]
        torch.testing.assert_close(reader.read(i)["hidden"] @ reader.head.T, live)
    assert len(reader.shards) > 2
    meta = read_artifact(str(scores), "--", "score_teacher")
    assert meta["counts"]["response_tokens"] == sum(len(row["response_ids"]) for row in rows)
    assert all(sum(shard["tokens"]) <= 30 or len(shard["tokens"]) == 1 for shard in meta["shards"])


def test_what_is_read_ahead_is_read_once_by_another_thread(rollouts, scores, monkeypatch):
    responses = stored_responses(str(rollouts), 5, 64, 29)
    teacher = stored_teacher(str(scores), str(rollouts), responses, "full", 4, "student")
    direct, reads, read = teacher.signal(responses), [], Scores.read
    monkeypatch.setattr(Scores, "read", lambda *a: reads.append(threading.current_thread()) or read(*a))
    teacher.read_ahead(responses[:8])
    ahead = teacher.signal(responses)
    assert torch.equal(ahead.hidden, direct.hidden)
    assert len(reads) == len(responses) and threading.main_thread() not in reads


def test_a_shard_is_checked_when_training_reaches_it(world, rollouts, scores, tmp_path, refused):
    """The run ends in one line and keeps what it had; with the shard as it was it goes on."""
    shutil.copytree(scores, tmp_path / "scores")
    shard = sorted((tmp_path / "scores").glob("shard_*"))[-1]  # the preflight reads the first ones
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    line = f"--prefix teacher --kl forward --student {world}/student_init --rollouts {rollouts} --scores "
    line += f"{tmp_path}/scores --batch_size 1 --steps 12 --save_every 1 --max_response_tokens 8"
    line += f" --dtype float32 --seed 1 --out {tmp_path}/run"
    refused(lambda: run_line(train, line), f"--scores {tmp_path}/scores: {shard.name}", "changed")
    done = len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert 0 < done < 12
    shard.write_bytes(whole)
    run_line(train, f"{line} --resume")
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 12


def test_max_tokens_stores_the_first_ones(world, rollouts, scores, tmp_path):
    run(world, rollouts, tmp_path / "short", "--max_tokens 3")
    short, full = Scores(str(tmp_path / "short"), str(rollouts)), Scores(str(scores), str(rollouts))
    rows = list(read_rollouts(rollouts))
    for i in range(len(rows)):
        torch.testing.assert_close(short.read(i)["hidden"], full.read(i)["hidden"][:3])
    cut = sum(max(0, len(row["response_ids"]) - 3) for row in rows)
    assert short.meta["counts"]["cut_by_max_tokens"] == cut > 0


def test_padded_rows_of_the_teachers_head_are_not_stored(world, rollouts, tmp_path):
    teacher = load_model(str(world / "teacher_init"), "-", "float32")
    tokenizer = load_tokenizer(str(world / "teacher_init"), "-")
    teacher.resize_token_embeddings(40, mean_resizing=False)
    teacher.save_pretrained(tmp_path / "padded")
    tokenizer.save_pretrained(tmp_path / "padded")
    run(world, rollouts, tmp_path / "scores", f"--teacher {tmp_path}/padded")
    assert Scores(str(tmp_path / "scores"), str(rollouts)).head.shape == (29, 128)


def test_a_killed_run_is_resumed_and_keeps_its_shards(world, rollouts, scores, tmp_path):
    out = tmp_path / "scores"
    with killed_in_call(3, score_teacher, "score"):
        run(world, rollouts, out)
    assert not (out / "meta.json").exists()
    kept = {file: file.stat().st_mtime_ns for file in (out / f"shard_0000{i}.safetensors" for i in (0, 1))}
    run(world, rollouts, out, "--resume")
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    assert shard_bytes(out) == shard_bytes(scores)
    read_artifact(str(out), "--", "score_teacher")


def test_resume_over_rollouts_that_were_made_anew_is_refused(world, rollouts, tmp_path, refused):
    source = tmp_path / "rollouts"
    shutil.copytree(rollouts, source)
    with killed_in_call(3, score_teacher, "score"):
        run(world, source, tmp_path / "scores")
    shutil.rmtree(source)
    shutil.copytree(world / "gold", source)
    refused(lambda: run(world, source, tmp_path / "scores", "--resume"), "--resume", "rollouts")


# ------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.fixture
def teacher(world, tmp_path):
    """A copy of the teacher, to be changed."""
    return shutil.copytree(world / "teacher_init", tmp_path / "teacher")


def test_bad_input_is_refused_and_leaves_no_directory(
    world, rollouts, teacher, tmp_path, monkeypatch, refused
):
    out = tmp_path / "out"

    def is_refused(more, *words):
        refused(lambda: run(world, rollouts, out, more), *words)
        assert not out.exists()

    is_refused(f"--teacher {tmp_path}/absent", "--teacher", "absent")
    is_refused(f"--rollouts {tmp_path}/absent", "--rollouts", "meta.json")
    is_refused(f"--rollouts {world}", "--rollouts", "toy_world")
    swap_ids(teacher, "0", "1")
    is_refused(f"--teacher {teacher}", "--teacher", "tokenizer")
    swap_ids(teacher, "0", "1")
    replace_text(teacher / "chat_template.jinja", "assistant\n", "assistant ")
    is_refused(f"--teacher {teacher}", "--rollouts", "template")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: collections.namedtuple("usage", "free")(1000))
    is_refused("", "--out", "disk", "--max_tokens")


def test_scores_of_other_rollouts_are_refused(world, scores, refused):
    refused(lambda: Scores(str(scores), str(world / "gold")), "--scores", "other rollouts", "gold")


def test_a_teacher_whose_head_is_refused_leaves_no_directory(world, rollouts, teacher, tmp_path, refused):
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(config | {"logit_scale": 0.5}))  # Qwen3 does not scale
    go = lambda: run(world, rollouts, tmp_path / "out", f"--teacher {teacher}")
    refused(go, "--teacher", "its output head (a soft cap?): they differ by 0.5")
    assert not (tmp_path / "out").exists()
