"""The preflight: what it refuses and warns of; that a sound pair passes; the kinds of scores; sampling."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import score_teacher
import train
from conftest import read_rows, replace_text, run_line, swap_ids
from distil.prompts import PLAIN
from distil.teacher import Signal
from runs.preflight import check_pair, check_signal
from streaming_kl import sampler_kl


@pytest.fixture
def pair(world, tmp_path):
    """Paths of copies of the toy teacher and student, to be spoilt."""
    for name in ("teacher", "student"):
        shutil.copytree(world / f"{name}_init", tmp_path / name)
    return tmp_path / "teacher", tmp_path / "student"


def preflight(teacher, student, more=""):
    run_line(score_teacher, f"--preflight --teacher {teacher} --student {student} --dtype float32 {more}")


def change_weights(model, change):
    weights = {name: change(tensor) for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def resize_head(model, rows, scale=1):
    """Gives a saved model a head of `rows` rows; those beyond the 29 tokens are scaled."""
    loaded = AutoModelForCausalLM.from_pretrained(model)
    loaded.resize_token_embeddings(rows)
    with torch.no_grad():
        loaded.get_output_embeddings().weight[29:] *= scale
    loaded.save_pretrained(model)


def set_stops(model, *ids):
    path = model / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": list(ids)}))


def test_a_sound_pair_passes_without_a_warning(pair, capsys):
    preflight(*pair)
    out = capsys.readouterr().out
    first = "token maps, padded rows, stop ids, prompt, KL of teacher with itself, entropies".split(", ")
    for line in [*first, "overlap of the top 16"]:
        assert f"preflight: {line}" in out
    assert "WARNING" not in out and "equal, 29 tokens" in out


def test_base_student_and_chat_teacher_that_end_differently(world, pair, tmp_path, capsys):
    teacher, student = pair
    end, other_end = '"eos_token": "<|im_end|>"', '"eos_token": "<|endoftext|>"'
    replace_text(student / "tokenizer_config.json", end, other_end)
    set_stops(student, 0)
    set_stops(teacher, 2)
    preflight(teacher, student)
    out = capsys.readouterr().out
    assert "student ['<|endoftext|>'], teacher ['<|im_end|>']" in out and "--stop_ids both" in out
    for choice, ids in {"both": [0, 2], "student": [0], "teacher": [2]}.items():
        run = tmp_path / f"run_{choice}"
        train_student(world, run, f"--student {student} --teacher {teacher} --kl reverse --stop_ids {choice}")
        assert json.load(open(run / "final/generation_config.json"))["eos_token_id"] == ids
        assert "end differently" in capsys.readouterr().out


def train_student(world, out, flags):
    line = f"--prefix student --data {world}/train.jsonl --out {out} --dtype float32 --engine hf"
    run_line(train, f"{line} --steps 1 --batch_size 2 --max_response_tokens 4 {flags}")


def test_a_teacher_without_weights_is_refused(pair, refused):
    change_weights(pair[0], torch.zeros_like)
    refused(lambda: preflight(*pair), "entropy", "weights are missing")


def test_broken_weights_are_refused(pair, refused):
    change_weights(pair[0], lambda tensor: tensor * float("nan"))
    refused(lambda: preflight(*pair), f"--teacher {pair[0]}: weight", "is not finite (first of 24)")


def test_a_teacher_that_is_the_student_is_noticed(world, capsys):
    preflight(world / "student_init", world / "student_init")
    assert "teacher and student are the same" in capsys.readouterr().out


def test_another_template_and_another_tokenizer(pair, capsys, refused):
    replace_text(pair[0] / "chat_template.jinja", "assistant", "user")
    refused(lambda: preflight(*pair), "--student", "--teacher", "templates", "--template")
    preflight(*pair, "--template teacher")
    assert "<|im_start|>user" in capsys.readouterr().out.split("prompt  ")[1]
    swap_ids(pair[0], "a", "b")
    refused(lambda: preflight(*pair), "--student", "--teacher", "different tokenizers")


def test_models_far_apart_get_the_advice_of_a_cold_start():
    hidden, head = torch.eye(40)[:5] * 9, torch.eye(40)
    student, teacher = Signal(hidden, head), Signal(hidden.flip(1), head)
    warnings = [warning for _, _, warning in check_signal(*student[:2], teacher, 1)]
    assert any("first train on the teacher's rollouts" in warning for warning in warnings)
    near = check_signal(*student[:2], Signal(hidden + 0.1, head), 1)
    assert not any(warning for what, _, warning in near if "overlap" in what)


def test_padded_heads_of_different_sizes_train_together(world, pair, tmp_path, capsys):
    """Qwen2.5's 151,936 against 152,064 rows: rows beyond the tokenizer are masked in both."""
    teacher, student = pair
    resize_head(teacher, 40, 100)  # the new rows would win if they were not masked
    resize_head(student, 32, 100)
    more = "--kl forward --batch_size 4 --max_response_tokens 8"
    train_student(world, tmp_path / "run", f"--student {student} --teacher {teacher} {more}")
    assert "student 3, teacher 11; masked" in capsys.readouterr().out
    row = read_rows(tmp_path / "run/metrics.jsonl")[0]
    assert 0 < row["fkl"] < 5 and row["teacher_entropy"] < 3.37  # ln 29


@pytest.fixture(scope="module")
def signals(world, rollouts):
    """Scores of the same rollouts with each signal."""
    paths = {signal: world.parent / f"scores_{signal}" for signal in ("hidden", "topk", "sampled")}
    for signal, path in paths.items():
        line = f"--teacher {world}/teacher_init --rollouts {rollouts} --dtype float32 --out {path}"
        run_line(score_teacher, f"{line} --signal {signal} --k 6 --shard_tokens 30")
    return paths


def train_on(prefix_flags, scores, out, flags):
    source = f"{prefix_flags['teacher']} --scores {scores} --out {out}"
    run_line(train, f"{source} --steps 2 --batch_size 4 --lr 0.001 {flags}")
    return read_rows(out / "metrics.jsonl")


def test_each_signal_trains_like_the_hidden_states_do(prefix_flags, signals, tmp_path):
    """Top-k and sampled-token training give the same losses from hidden states and from their own signal."""
    topk = "--kl reverse --vocab topk --topk_set teacher --k 5"
    for signal, flags, names in [
        ("topk", topk, "loss topk_rkl teacher_tail_mass overlap_ratio"),
        ("sampled", "--kl forward --vocab sampled", "loss nll log_ratio"),
    ]:
        whole = train_on(prefix_flags, signals["hidden"], tmp_path / f"{signal}_whole", flags)
        stored = train_on(prefix_flags, signals[signal], tmp_path / f"{signal}_stored", flags)
        for a, b in zip(whole, stored, strict=True):
            for name in names.split():
                assert abs(a[name] - b[name]) < 1e-5, (signal, name, a[name], b[name])
        assert "fkl" in whole[0] and "fkl" not in stored[0]  # exact metrics need the whole distribution


@pytest.mark.parametrize(
    "signal, flags, words",
    [
        ("topk", "--kl forward", ("--signal topk", "--vocab full")),
        ("sampled", "--kl forward --vocab topk", ("--signal sampled", "--vocab topk")),
        ("topk", "--kl forward --vocab topk --topk_set student", ("--topk_set teacher",)),
        ("topk", "--kl forward --vocab topk --topk_set teacher --k 7", ("--k up to 6",)),
        ("hidden", "--kl forward --vocab topk --k 30", ("--k 30", "29 tokens")),
    ],
)
def test_scores_that_cannot_serve_are_refused(prefix_flags, signals, tmp_path, refused, signal, flags, words):
    refused(lambda: train_on(prefix_flags, signals[signal], tmp_path / "run", flags), *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "temperature, top_p, top_k",
    [(1.0, 1.0, 0), (0.6, 1.0, 0), (1.0, 0.7, 0), (1.0, 1.0, 3), (0.7, 0.8, 4), (0.0, 1.0, 0)],
)
def test_sampler_kl_is_that_of_the_distribution_transformers_samples_from(temperature, top_p, top_k):
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    torch.manual_seed(0)
    hidden, head = torch.randn(6, 5), torch.randn(11, 5)
    logits = hidden @ head.T
    if temperature == 0:
        right = -logits.log_softmax(-1).amax(-1)  # all the sampler's mass is on the likeliest token
    else:
        scores = TemperatureLogitsWarper(temperature)(None, logits) if temperature != 1 else logits
        scores = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
        scores = TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores
        s = scores.softmax(-1)
        right = torch.where(s > 0, s * (s.log() - logits.log_softmax(-1)), 0).sum(-1)
    found = sampler_kl(hidden, head, temperature, top_p, top_k)
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6)


def test_truncated_sampling_is_announced_and_measured(world, tmp_path, capsys):
    models = f"--student {world}/student_init --teacher {world}/teacher_init --kl reverse --steps 2"
    for name, more in {"honest": "", "truncated": "--top_p 0.5 --refresh_every 2"}.items():
        train_student(world, tmp_path / name, f"{models} {more}")
        rows = read_rows(tmp_path / name / "metrics.jsonl")
        assert ("not plain samples of the student" in capsys.readouterr().out) == (name == "truncated")
        assert all(("sampler_kl" in row) == (name == "truncated") for row in rows)
    assert rows[0]["sampler_kl"] > 0.3 and [row["staleness"] for row in rows] == [0, 1]


def test_a_head_smaller_than_the_vocabulary_is_refused(pair, refused):
    resize_head(pair[0], 20)
    refused(lambda: preflight(*pair), "--teacher", "0 to 19", "0 to 28")


def test_thinking_is_off_in_the_prompt_and_a_prompt_that_thinks_is_warned_of(pair, capsys):
    begin = "<|im_start|>assistant\n"
    for path in pair:
        template = begin + "{% if enable_thinking %}a{% else %}b{% endif %}"
        replace_text(path / "chat_template.jinja", begin, template)
    preflight(*pair)
    out = capsys.readouterr().out
    assert "assistant\\nb'" in out and "<think>" not in out
    assert "thinking is off" in check_pair(Thinker(), [2], [2], 0, 0, PLAIN)[3][2]


class Thinker:
    """A tokenizer whose template opens a thinking block whatever it is told."""

    chat_template = "<think>"

    def __len__(self):
        return 29

    def apply_chat_template(self, messages, **options):
        assert options["enable_thinking"] is False
        return messages[0]["content"] + "<think>"

    def get_added_vocab(self):
        return {}

    def __call__(self, text, **options):
        return type("Encoded", (), {"input_ids": list(text)})

    def decode(self, ids):
        return "".join(ids)

    def convert_ids_to_tokens(self, ids):
        return list(map(str, ids))


def test_a_gradient_that_is_not_finite_ends_the_run_and_names_the_problems(
    prefix_flags, signals, tmp_path, refused, monkeypatch
):
    objective, calls = train.objective, []

    def spoilt(*given):
        calls.append(1)
        loss, metrics = objective(*given)
        return loss * (float("nan") if len(calls) > 2 else 1), metrics

    monkeypatch.setattr(train, "objective", spoilt)
    flags = "--kl forward --micro_batch_tokens 9999 --save_every 1 --steps 4 --batch_size 1"
    go = lambda: train_on(prefix_flags, signals["hidden"], tmp_path / "run", flags)
    refused(go, "step 3", "failed_step.json", code=1)
    failed = json.load(open(tmp_path / "run/failed_step.json"))
    assert failed["step"] == 3 and len(failed["ids"]) == 1 and failed["ids"][0].startswith("train/")
    assert (tmp_path / "run/step_000002/model.safetensors").exists()
    assert not (tmp_path / "run/step_000003").exists()
