"""Tokenizers as models have them, through rollout, score_teacher, train, evaluate: exact, or one line."""

import datetime
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

import evaluate
import grpo
import rollout
import score_teacher
import train
from conftest import read_rows, run_line
from distil.artifacts import read_artifact
from recipes.toy_world import SPECIAL, TEMPLATE, WORDS, make_model

END = "<|im_end|>"
LETTERS = sorted({*"system Today Date: 26 Jul 2024", *"<|im_start|>", *"<|im_end|>", *'"n\\\\'} - {*WORDS})
IDS = {token: i for i, token in enumerate([*SPECIAL, *WORDS, *LETTERS])}
COUNT = len(IDS)
DATED = (
    "{% if not date_string is defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}{% else %}{% set date_string = '26 Jul 2024' %}"
    "{% endif %}{% endif %}<|im_start|>system\nToday Date: {{ date_string }}<|im_end|>\n" + TEMPLATE
)  # as Llama 3.2's
OTHER = TEMPLATE.replace("assistant\n", "assistant: ")
SAMPLING = "--engine hf --dtype float32 --max_response_tokens 24"


def make_tokenizer(ids=(), end=END, template=TEMPLATE, start=None):
    """The toy world's tokenizer with letters. ids: {token: id} that are added or changed."""
    words = Tokenizer(models.WordLevel(IDS | dict(ids), unk_token="<|endoftext|>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"<extra>|user|assistant|\\boxed\{|[\s\S]"), "isolated")
    words.decoder = decoders.Fuse()
    named = {"eos_token": end, "bos_token": start, "pad_token": "<|endoftext|>", "chat_template": template}
    named = {name: value for name, value in named.items() if value}
    more = {"additional_special_tokens": SPECIAL, "clean_up_tokenization_spaces": False}
    return PreTrainedTokenizerFast(tokenizer_object=words, **named, **more)


def write_model(path, tokenizer, rows, seed):
    """An untrained model with `rows` rows; no end token but the tokenizer's."""
    torch.manual_seed(seed)
    model = make_model(tokenizer, 32, 1, 1)
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_(std=0.1)
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def pair(tmp_path):
    """pair(rows, **tokenizer) writes teacher and student; per side: teacher={...}, student={...}."""

    def write(rows=COUNT, teacher=(), student=(), **common):
        sides = {"teacher": {"rows": rows} | dict(teacher), "student": {"rows": rows} | dict(student)}
        for seed, (name, options) in enumerate(sides.items()):
            tokenizer = make_tokenizer(**common | {key: options[key] for key in options if key != "rows"})
            write_model(tmp_path / name, tokenizer, options["rows"], seed)
        return tmp_path

    return write


@pytest.fixture
def data(world):
    return world / "train.jsonl"


def make_rollouts(path, data, more=""):
    line = f"--model {path}/teacher --data {data} --out {path}/rollouts --n 2 {SAMPLING} {more}"
    run_line(rollout, line)
    return read_rows(path / "rollouts/rollouts.jsonl")


def make_scores(path, more=""):
    run_line(score_teacher, f"--teacher {path}/teacher --rollouts {path}/rollouts --out {path}/scores {more}")


def train_one_step(path, name, more):
    line = f"--kl forward --student {path}/student --out {path}/{name} --steps 1 --lr 1e-9 --k 4 {SAMPLING}"
    run_line(train, f"{line} {more}")
    return read_rows(path / name / "metrics.jsonl")[0]


def stages(path, data, more="", template="", scoring="", sampling=""):
    """All stages with both prefixes; the rollouts, and each run's only step."""
    rows = make_rollouts(path, data, f"{more} {sampling}")
    make_scores(path, scoring)
    stored = f"--prefix teacher --rollouts {path}/rollouts --scores {path}/scores --normalize token"
    live = f"--prefix student --teacher {path}/teacher --data {data}"
    by_teacher = train_one_step(path, "stored", f"{stored} --batch_size {len(rows)} {more} {template}")
    by_student = train_one_step(path, "live", f"{live} --batch_size 4 {more} {template}")
    for run in ("stored", "live"):
        model = f"--model {path}/{run}/final --data {data} --n 2 --out {path}/{run}/eval {SAMPLING} {more}"
        run_line(evaluate, model)
    return rows, by_teacher, by_student


@torch.no_grad()
def mean_fkl(path, rows, size):
    """KL(teacher || student) over the ids below `size`, in float64, averaged over response tokens."""
    kls = []
    pair = [AutoModelForCausalLM.from_pretrained(path / name) for name in ("teacher", "student")]
    for row in rows:
        ids = torch.tensor([row["prompt_ids"] + row["response_ids"]])
        start = len(row["prompt_ids"]) - 1
        logits = [model(ids).logits[0, start:-1, :size].double() for model in pair]
        p, q = (x.log_softmax(-1) for x in logits)
        kls.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(kls).mean().item()


KINDS = {  # {kind: (ids, rows, size of the vocabulary)}
    "padded rows": ({}, COUNT + 28, COUNT),
    "gaps": ({"7": COUNT + 11, "q": COUNT + 30, "<extra>": COUNT + 40}, COUNT + 50, COUNT + 41),
    "end beyond len()": ({END: COUNT + 9}, COUNT + 20, COUNT + 10),
    "end in the last row": ({END: COUNT + 9}, COUNT + 10, COUNT + 10),
    "tokens without rows": ({"<extra>": COUNT + 5, "<extra2>": COUNT + 9}, COUNT, COUNT),
    "a gap at the end of the rows": ({"<extra>": COUNT + 9}, COUNT + 4, COUNT + 4),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_id_below_the_bound_counts_and_no_other(pair, data, capsys, kind):
    ids, rows, size = KINDS[kind]
    path = pair(rows, ids=ids)
    for name in ("teacher", "student"):  # rows beyond the bound would win everything
        model = AutoModelForCausalLM.from_pretrained(path / name)
        with torch.no_grad():
            model.get_input_embeddings().weight[size:] *= 100
        model.save_pretrained(path / name)
    end = (IDS | ids)[END]
    rows, step, live = stages(path, data)
    assert ("has no rows for" in capsys.readouterr().out) == (max((IDS | ids).values()) >= size)
    stopped = [row for row in rows if row["finish_reason"] == "stop"]
    assert stopped and all(row["response_ids"].index(end) == len(row["response_ids"]) - 1 for row in stopped)
    evaluated = [row for run in ("stored", "live") for row in read_rows(path / run / "eval/samples.jsonl")]
    for row in rows + evaluated:
        assert max(row["prompt_ids"] + row["response_ids"]) < size
        assert (row["finish_reason"] == "stop") == (row["response_ids"][-1] == end)
    assert load_file(path / "scores/head.safetensors")["head"].shape[0] == size
    assert step["fkl"] == pytest.approx(mean_fkl(path, rows, size), rel=1e-4)
    assert 0 < live["fkl"] < 5


def test_a_student_and_a_teacher_with_rows_for_other_tokens_are_refused(pair, data, tmp_path, refused):
    path = pair(ids={"<extra>": COUNT + 5}, rows=COUNT + 8, student={"rows": COUNT + 5})
    make_rollouts(path, data, "--limit 2 --max_response_tokens 3")  # too few to hold the token
    make_scores(path)
    stored = f"--prefix teacher --rollouts {path}/rollouts --scores {path}/scores"
    words = f"0 to {COUNT + 5}", f"0 to {COUNT + 4}"
    one_line(refused, lambda: train_one_step(path, "run", stored), "--scores", *words)
    live = f"--prefix student --teacher {path}/teacher --data {data}"
    one_line(refused, lambda: train_one_step(path, "run", live), "--teacher", *words)
    check = f"--preflight --teacher {path}/teacher --student {path}/student"
    one_line(refused, lambda: run_line(score_teacher, check), "--teacher", *words)
    reference = f"--model {path}/student --reference {path}/teacher --kl_weight 1 --data {data} {SAMPLING}"
    one_line(refused, lambda: run_line(grpo, f"{reference} --out {path}/run"), "--reference", *words)
    assert not (path / "run").exists()


def one_line(refused, call, *words):
    message = refused(call, *words)
    assert message.startswith("error: ") and message.count("\n") == 1, message


def test_an_id_without_a_row_is_refused_wherever_it_stands(pair, data, tmp_path, refused):
    path = pair(ids={"<extra>": COUNT + 5})
    problems = tmp_path / "extra.jsonl"
    problems.write_text('{"id": "x", "problem": "1<extra>", "answer": "1"}\n')
    one_line(refused, lambda: make_rollouts(path, problems), "extra/x", str(COUNT + 5), str(COUNT - 1))
    line = f"--prefix student --teacher {path}/teacher --data {problems}"
    one_line(refused, lambda: train_one_step(path, "run", line), "extra/x", str(COUNT + 5))
    extra = f"--extra_stop_ids {COUNT + 5}"
    one_line(refused, lambda: make_rollouts(path, data, extra), "--extra_stop_ids", str(COUNT + 5))
    wide = pair(ids={"<extra>": COUNT + 5}, teacher={"rows": COUNT + 6})
    make_rollouts(wide, problems)
    write_model(wide / "teacher", make_tokenizer({"<extra>": COUNT + 5}), COUNT, 0)
    one_line(refused, lambda: make_scores(wide), "line 1", "prompt_ids", str(COUNT - 1))
    stored = f"--prefix teacher --vocab sampled --rollouts {wide}/rollouts"
    one_line(refused, lambda: train_one_step(wide, "run", stored), "line 1", "prompt_ids")
    assert not (wide / "scores").exists() and not (path / "run").exists()


@pytest.mark.parametrize("side", ["teacher", "student", "both"])
def test_without_an_end_token_one_is_asked_for_and_then_works(pair, data, refused, side):
    without = {"end": None}
    path = pair(**{name: without for name in ("teacher", "student") if side in (name, "both")})
    extra, live = f"--extra_stop_ids {IDS['7']}", f"--prefix student --teacher {path}/teacher --data {data}"
    if side != "student":
        one_line(refused, lambda: make_rollouts(path, data), "no end token", "--extra_stop_ids")
    if side == "both":
        one_line(refused, lambda: train_one_step(path, "run", live), "no end token", "--extra_stop_ids")
        check = f"--preflight --teacher {path}/teacher --student {path}/student"
        one_line(refused, lambda: run_line(score_teacher, check), "no end token", "--extra_stop_ids")
        assert not (path / "run").exists()
    else:
        one_line(refused, lambda: train_one_step(path, "run", f"{live} --stop_ids {side}"), "no end token")
    rows, *_ = stages(path, data, extra)
    assert any(row["response_ids"][-1] == IDS["7"] for row in rows)
    assert all(IDS["7"] not in row["response_ids"][:-1] for row in rows)
    ids = json.loads((path / "stored/final/generation_config.json").read_text())["eos_token_id"]
    assert ids == sorted({IDS["7"], *([] if side == "both" else [IDS[END]])})


@pytest.mark.parametrize("end", [-1, COUNT, True, [2, -1]])
def test_an_end_token_that_is_no_id_of_the_model_is_refused(pair, data, refused, end):
    path = pair()
    (path / "teacher/generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    words = "teacher/generation_config.json", "eos_token_id", f"0 to {COUNT - 1}"
    one_line(refused, lambda: make_rollouts(path, data), *words)
    live = f"--prefix student --teacher {path}/teacher --data {data}"
    one_line(refused, lambda: train_one_step(path, "run", live), *words)


def test_an_end_token_of_the_tokenizer_without_a_row_is_refused(pair, data, refused):
    path = pair(ids={END: COUNT + 5}, template="{{ messages[0].content }}=")
    words = "teacher/tokenizer_config.json", "eos_token_id", f"0 to {COUNT - 1}", str(COUNT + 5)
    one_line(refused, lambda: make_rollouts(path, data), *words)


# ---------------------------------------------------------------------------------------------------------
# Templates


def prompts_end_with(rows, text):
    tokenizer = make_tokenizer()
    return all(tokenizer.decode(row["prompt_ids"]).endswith(text) for row in rows)


@pytest.mark.parametrize("teacher, student", [(TEMPLATE, None), (None, TEMPLATE), (TEMPLATE, OTHER)])
@pytest.mark.parametrize("chosen", ["teacher", "student"])
def test_either_sides_template_serves_both(pair, data, refused, teacher, student, chosen):
    """With stored rollouts, the student's is that of the rollouts, by rollout.py --template_from."""
    path = pair(teacher={"template": teacher}, student={"template": student})
    live = f"--prefix student --teacher {path}/teacher --data {data}"
    missing = "missing" if None in (teacher, student) else "different prompt templates"
    one_line(refused, lambda: train_one_step(path, "run", live), "--template", missing)
    check = f"--preflight --teacher {path}/teacher --student {path}/student"
    one_line(refused, lambda: run_line(score_teacher, check), "--template", missing)
    if not {"teacher": teacher, "student": student}[chosen]:
        one_line(refused, lambda: train_one_step(path, "run", f"{live} --template {chosen}"), "missing")
        one_line(refused, lambda: make_rollouts(path, data, f"--template_from {path}/{chosen}"), "missing")
        if chosen == "teacher":
            one_line(refused, lambda: make_rollouts(path, data), "--template_from")
        assert not (path / "run").exists() and not (path / "rollouts").exists()
        return
    run_line(score_teacher, f"{check} --template {chosen}")
    from_student = chosen == "student"
    more = f"--template_from {path}/student" if from_student else ""
    rows = make_rollouts(path, data, more)
    if from_student:
        one_line(refused, lambda: make_scores(path), "--template rollouts")
    make_scores(path, "--template rollouts" if from_student else "")
    stored = f"--prefix teacher --rollouts {path}/rollouts --scores {path}/scores --normalize token"
    if not from_student:
        one_line(refused, lambda: train_one_step(path, "run", stored), "--template", missing)
        stored += " --template teacher"
    step = train_one_step(path, "stored", f"{stored} --batch_size {len(rows)}")
    assert step["fkl"] == pytest.approx(mean_fkl(path, rows, COUNT), rel=1e-4)
    train_one_step(path, "live", f"{live} --batch_size 4 --template {chosen}")
    right = "assistant: " if student == OTHER and from_student else "assistant\n"
    for run in ("stored", "live"):
        run_line(
            evaluate, f"--model {path}/{run}/final --data {data} --n 1 --out {path}/{run}/eval {SAMPLING}"
        )
        rows += read_rows(path / run / "eval/samples.jsonl")
        meta = read_artifact(str(path / run), "-", "train")
        assert meta["template_sha256"] == read_artifact(str(path / "rollouts"), "-")["template_sha256"]
    assert prompts_end_with(rows, right)


def test_stages_without_a_side_take_the_template_of_a_model(pair, data, refused, monkeypatch):
    path = pair(student={"template": None})
    common = f"--model {path}/student --data {data} {SAMPLING}"
    for stage, more in ((evaluate, "--n 1"), (grpo, "--n 2 --steps 1 --batch_size 2")):
        out = path / stage.__name__
        one_line(refused, lambda: run_line(stage, f"{common} {more} --out {out}"), "--template_from")
        assert not out.exists()
        run_line(stage, f"{common} {more} --out {out} --template_from {path}/teacher")
    assert prompts_end_with(read_rows(path / "evaluate/samples.jsonl"), "assistant\n")
    saved = AutoTokenizer.from_pretrained(path / "grpo/final")
    assert saved.chat_template == TEMPLATE


def test_stored_rollouts_keep_their_template(capsys):
    line = "--prefix teacher --kl forward --student s --rollouts r --scores c --out o --template student"
    with pytest.raises(SystemExit):
        train.get_args(line.split())
    assert "rollout.py --template_from" in capsys.readouterr().err
    for line in ("--rollouts r --out o --template student", "--preflight --student s --template rollouts"):
        with pytest.raises(SystemExit):
            score_teacher.get_args(f"--teacher t {line}".split())
        assert "--template" in capsys.readouterr().err


def test_a_template_that_prints_other_special_tokens_is_refused(pair, data, refused):
    """The same text would be another prompt: its eos_token is each tokenizer's own."""
    prints = TEMPLATE + "{{ eos_token }}"
    path = pair(teacher={"template": prints}, student={"end": "<|endoftext|>"})
    live = f"--prefix student --teacher {path}/teacher --data {data} --template teacher"
    one_line(refused, lambda: train_one_step(path, "run", live), "eos_token")
    line = f"--model {path}/student --template_from {path}/teacher --data {data} --out {path}/run {SAMPLING}"
    one_line(refused, lambda: run_line(rollout, line), "--template_from", "eos_token")


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no') }}", "{% if %}", "{{ messages[5].content }}", ""]
)
def test_a_template_that_does_not_work_is_refused(pair, data, refused, template):
    path = pair()
    (path / "teacher/chat_template.jinja").write_text(template)
    one_line(refused, lambda: make_rollouts(path, data), "--model", "chat template", "--template_from")


def test_a_template_with_a_date_prints_the_same_on_every_day(pair, data, monkeypatch):
    path, clock = pair(template=DATED), iter(range(10**6))

    def now():
        return datetime.datetime(2026, 1, 1) + datetime.timedelta(days=next(clock))

    monkeypatch.setattr(chat_template_utils, "datetime", SimpleNamespace(now=now))
    tokenizer = AutoTokenizer.from_pretrained(path / "teacher")
    moved = [tokenizer.apply_chat_template([{"role": "user", "content": "1"}], tokenize=False) for _ in "ab"]
    assert moved[0] != moved[1]  # the clock moves, and the template does print it
    rows, step, _ = stages(path, data)
    assert step["fkl"] == pytest.approx(mean_fkl(path, rows, COUNT), rel=1e-4)
    rows += read_rows(path / "stored/eval/samples.jsonl") + read_rows(path / "live/eval/samples.jsonl")
    start = "<|im_start|>system\nToday Date: 26 Jul 2024<|im_end|>\n<|im_start|>user\n"
    assert all(tokenizer.decode(row["prompt_ids"]).startswith(start) for row in rows)
    assert read_artifact(str(path / "rollouts"), "-", "rollout")["prompt_date"] == "2024-07-26"


def test_special_tokens_in_problems_go_through_all_stages(pair, tmp_path):
    twice = TEMPLATE.replace("message['content']", "message['content'] | trim | tojson")
    path, problems = pair(template=twice), tmp_path / "special.jsonl"
    texts = [f" 1{END}\n<|im_start|>", f'"{END}"', "1+1"]
    problems.write_text("".join(json.dumps({"problem": text, "answer": "1"}) + "\n" for text in texts))
    rows, step, _ = stages(path, problems)
    assert step["fkl"] == pytest.approx(mean_fkl(path, rows, COUNT), rel=1e-4)
    plain = rows[-1]["prompt_ids"]
    tokenizer = make_tokenizer()
    for row, text in zip(rows[::2], texts, strict=True):
        shown = json.dumps(text.strip())
        assert (
            tokenizer.decode(row["prompt_ids"]) == f"<|im_start|>user\n{shown}{END}\n<|im_start|>assistant\n"
        )
        for token in SPECIAL:
            assert row["prompt_ids"].count(IDS[token]) == plain.count(IDS[token])
