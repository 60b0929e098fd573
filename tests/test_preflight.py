"""The preflight: what it refuses, what it warns of, and that a sound pair passes; the scores' signals; sampling honesty."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import score_teacher
import train
from distil.diagnostics import sampler_kl
from distil.preflight import check_pair, check_signal
from distil.teacher import Signal


def pair(world, tmp_path):
    """Copies of the toy teacher and student, to be spoilt."""
    for name in ("teacher", "student"):
        shutil.copytree(world / f"{name}_init", tmp_path / name)
    return tmp_path / "teacher", tmp_path / "student"


def preflight(teacher, student):
    score_teacher.main(
        score_teacher.get_args(
            ["--preflight", "--teacher", str(teacher), "--student", str(student), "--dtype", "float32"]
        )
    )


def set_stops(model, *ids):
    path = model / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": list(ids)}))


def test_a_sound_pair_passes_without_a_warning(world, tmp_path, capsys):
    preflight(*pair(world, tmp_path))
    out = capsys.readouterr().out
    for line in (
        "token maps",
        "padded rows",
        "stop ids",
        "prompt",
        "KL of teacher with itself",
        "entropies",
        "overlap of the top 16",
    ):
        assert f"preflight: {line}" in out
    assert "WARNING" not in out and "equal, 29 tokens" in out


def test_base_student_and_chat_teacher_that_end_differently(world, tmp_path, capsys):
    teacher, student = pair(world, tmp_path)
    tokenizer = student / "tokenizer_config.json"
    tokenizer.write_text(
        tokenizer.read_text().replace('"eos_token": "<|im_end|>"', '"eos_token": "<|endoftext|>"')
    )
    set_stops(student, 0)
    set_stops(teacher, 2)
    preflight(teacher, student)
    out = capsys.readouterr().out
    assert "student ['<|endoftext|>'], teacher ['<|im_end|>']" in out and "--stop_ids both" in out
    given = [
        *"--prefix student --kl reverse --student".split(),
        student,
        "--teacher",
        teacher,
        "--data",
        world / "train.jsonl",
        *"--dtype float32 --engine hf --steps 1 --batch_size 2 --max_response_tokens 4".split(),
    ]
    for choice, ids in {"both": [0, 2], "student": [0], "teacher": [2]}.items():
        train.main(
            train.get_args(
                [str(x) for x in [*given, "--stop_ids", choice, "--out", tmp_path / f"run_{choice}"]]
            )
        )
        assert json.load(open(tmp_path / f"run_{choice}/final/generation_config.json"))["eos_token_id"] == ids
        assert "end differently" in capsys.readouterr().out


def test_a_teacher_without_weights_is_refused(world, tmp_path, refused):
    teacher, student = pair(world, tmp_path)
    weights = load_file(teacher / "model.safetensors")
    save_file(
        {name: torch.zeros_like(tensor) for name, tensor in weights.items()},
        teacher / "model.safetensors",
        metadata={"format": "pt"},
    )
    refused(lambda: preflight(teacher, student), "entropy", "weights are missing")


def test_broken_weights_are_refused(world, tmp_path, refused):
    teacher, student = pair(world, tmp_path)
    weights = load_file(teacher / "model.safetensors")
    save_file(
        {name: tensor * float("nan") for name, tensor in weights.items()},
        teacher / "model.safetensors",
        metadata={"format": "pt"},
    )
    refused(lambda: preflight(teacher, student), "not sound")


def test_a_teacher_that_is_the_student_is_noticed(world, tmp_path, capsys):
    preflight(world / "student_init", world / "student_init")
    assert "teacher and student are the same" in capsys.readouterr().out


def test_another_template_and_another_tokenizer(world, tmp_path, capsys, refused):
    teacher, student = pair(world, tmp_path)
    template = teacher / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant", "user"))
    preflight(teacher, student)
    assert "--take_template" in capsys.readouterr().out
    tokenizer = json.loads((teacher / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (teacher / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(lambda: preflight(teacher, student), "--student", "--teacher", "different tokenizers")


def test_models_far_apart_get_the_advice_of_a_cold_start():
    hidden, head = torch.eye(40)[:5] * 9, torch.eye(40)
    student, teacher = Signal(hidden, head), Signal(hidden.flip(1), head)
    warnings = [warning for _, _, warning in check_signal(*student[:2], teacher, 1)]
    assert any("first train on the teacher's rollouts" in warning for warning in warnings)
    assert not any(
        warning
        for what, _, warning in check_signal(*student[:2], Signal(hidden + 0.1, head), 1)
        if "overlap" in what
    )


def test_padded_heads_of_different_sizes_train_together(world, tmp_path, capsys):
    """Qwen2.5's 151,936 against 152,064 rows: rows beyond the tokenizer are masked in both."""
    from transformers import AutoModelForCausalLM

    teacher, student = pair(world, tmp_path)
    for path, rows in ((teacher, 40), (student, 32)):
        model = AutoModelForCausalLM.from_pretrained(path)
        model.resize_token_embeddings(rows)
        with torch.no_grad():
            model.get_output_embeddings().weight[29:] *= 100  # they would win, were they not masked
        model.save_pretrained(path)
    train.main(
        train.get_args(
            [
                str(x)
                for x in [
                    *"--prefix student --kl forward --student".split(),
                    student,
                    "--teacher",
                    teacher,
                    "--data",
                    world / "train.jsonl",
                    *"--dtype float32 --engine hf --steps 1 --batch_size 4 --max_response_tokens 8 --out".split(),
                    tmp_path / "run",
                ]
            ]
        )
    )
    assert "student 3, teacher 11; masked" in capsys.readouterr().out
    row = json.loads(open(tmp_path / "run/metrics.jsonl").readline())
    assert 0 < row["fkl"] < 5 and row["teacher_entropy"] < 3.37  # ln 29


@pytest.fixture(scope="module")
def signals(world, rollouts):
    """Scores of the same rollouts with each signal."""
    paths = {}
    for signal in ("hidden", "topk", "sampled"):
        paths[signal] = world.parent / f"scores_{signal}"
        score_teacher.main(
            score_teacher.get_args(
                [
                    str(x)
                    for x in [
                        "--teacher",
                        world / "teacher_init",
                        "--rollouts",
                        rollouts,
                        *"--dtype float32 --signal".split(),
                        signal,
                        *"--k 6 --shard_tokens 30 --out".split(),
                        paths[signal],
                    ]
                ]
            )
        )
    return paths


def train_on(world, rollouts, scores, out, *flags):
    given = [
        *"--prefix teacher --student".split(),
        world / "student_init",
        "--rollouts",
        rollouts,
        "--scores",
        scores,
        *"--dtype float32 --steps 2 --batch_size 4 --lr 0.001 --out".split(),
        out,
        *flags,
    ]
    train.main(train.get_args([str(x) for x in given]))
    return [json.loads(line) for line in open(out / "metrics.jsonl")]


def test_each_signal_trains_like_the_hidden_states_do(world, rollouts, signals, tmp_path):
    """Top-k and sampled-token training give the same losses whether the teacher is known whole or by that signal only."""
    for signal, flags in {
        "topk": ["--kl", "reverse", "--vocab", "topk", "--topk_set", "teacher", "--k", 5],
        "sampled": ["--kl", "forward", "--vocab", "sampled"],
    }.items():
        whole = train_on(world, rollouts, signals["hidden"], tmp_path / f"{signal}_whole", *flags)
        stored = train_on(world, rollouts, signals[signal], tmp_path / f"{signal}_stored", *flags)
        names = (
            ["loss", "topk_rkl", "teacher_tail_mass", "overlap_ratio"]
            if signal == "topk"
            else ["loss", "nll", "log_ratio"]
        )
        for a, b in zip(whole, stored, strict=True):
            for name in names:
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
def test_scores_that_cannot_serve_are_refused(
    world, rollouts, signals, tmp_path, refused, signal, flags, words
):
    refused(lambda: train_on(world, rollouts, signals[signal], tmp_path / "run", *flags.split()), *words)
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
    torch.testing.assert_close(
        sampler_kl(hidden, head, temperature, top_p, top_k), right, rtol=1e-5, atol=1e-6
    )


def test_truncated_sampling_is_announced_and_measured(world, tmp_path, capsys):
    given = [
        *"--prefix student --kl reverse --student".split(),
        world / "student_init",
        "--teacher",
        world / "teacher_init",
        "--data",
        world / "train.jsonl",
        *"--dtype float32 --engine hf --steps 2 --batch_size 2 --max_response_tokens 4".split(),
    ]
    for name, more in {"honest": [], "truncated": ["--top_p", 0.5, "--refresh_every", 2]}.items():
        train.main(train.get_args([str(x) for x in [*given, *more, "--out", tmp_path / name]]))
        rows = [json.loads(line) for line in open(tmp_path / name / "metrics.jsonl")]
        assert ("not plain samples of the student" in capsys.readouterr().out) == (name == "truncated")
        assert all(("sampler_kl" in row) == (name == "truncated") for row in rows)
    assert rows[0]["sampler_kl"] > 0.3 and [row["staleness"] for row in rows] == [0, 1]


def test_a_head_smaller_than_the_vocabulary_is_refused(world, tmp_path, refused):
    from transformers import AutoModelForCausalLM

    teacher, student = pair(world, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(teacher)
    model.resize_token_embeddings(20)
    model.save_pretrained(teacher)
    refused(lambda: preflight(teacher, student), "20 (teacher)", "29 tokens")


def test_thinking_is_off_in_the_prompt_and_a_prompt_that_thinks_is_warned_of(world, tmp_path, capsys):
    teacher, student = pair(world, tmp_path)
    for path in (teacher, student):
        template = path / "chat_template.jinja"
        template.write_text(
            template.read_text().replace(
                "<|im_start|>assistant\n",
                "<|im_start|>assistant\n{% if enable_thinking %}a{% else %}b{% endif %}",
            )
        )
    preflight(teacher, student)
    out = capsys.readouterr().out
    assert "assistant\\nb'" in out and "<think>" not in out
    assert "thinking is off" in check_pair(Thinker(), [2], [2], 29, 29)[3][2]


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
    world, rollouts, signals, tmp_path, refused, monkeypatch
):
    objective, calls = train.objective, []

    def spoilt(*given):
        calls.append(1)
        loss, metrics = objective(*given)
        return loss * (float("nan") if len(calls) > 2 else 1), metrics

    monkeypatch.setattr(train, "objective", spoilt)
    flags = [*"--kl forward --micro_batch_tokens 9999 --save_every 1 --steps 4 --batch_size 1".split()]
    refused(
        lambda: train_on(world, rollouts, signals["hidden"], tmp_path / "run", *flags),
        "step 3",
        "failed_step.json",
        code=1,
    )
    failed = json.load(open(tmp_path / "run/failed_step.json"))
    assert failed["step"] == 3 and len(failed["ids"]) == 1 and failed["ids"][0].startswith("train/")
    assert (tmp_path / "run/step_000002/model.safetensors").exists() and not (
        tmp_path / "run/step_000003"
    ).exists()
