"""train.py: objectives against float64 truth, which positions carry loss, the cost ledger, whole runs, exact resume."""

import argparse
import functools
import json
import math
import shutil
import subprocess
import sys
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file

import train
from conftest import ROOT
from distil import training
from distil.artifacts import read_artifact
from distil.models import Response, forward, load_model
from distil.rollouts import read_rollouts, stored_responses
from distil.teacher import Signal, Teacher, live_teacher, stored_teacher
from distil.training import optimizer_step, tflops, token_weights
from recipes.toy_world import make_model, make_tokenizer
from train import micro_batch_loss, objective

CELL = {"forward": ("full", 1.0), "reverse": ("full", 0.0), "mix": ("full", 0.3)}


def flags(kl="forward", vocab="full", fkl_weight=1.0, normalize="token", micro_batch_tokens=10**6):
    return argparse.Namespace(
        kl=kl,
        vocab=vocab,
        fkl_weight=fkl_weight,
        normalize=normalize,
        micro_batch_tokens=micro_batch_tokens,
        dtype="float32",
        k=4,
        topk_set="student",
        prefix="teacher",
    )


def kl(p_log, q_log):
    return (p_log.exp() * (p_log - q_log)).sum(-1)


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------------------------------------------------------
# The objective at single positions


def position_problem(n=6, v=9, padding=3):
    """Hidden states and heads of a student and a wider teacher, with padding rows in both heads that would dominate if read."""
    g = torch.Generator().manual_seed(0)
    student_hidden, student_head = torch.randn(n, 5, generator=g), torch.randn(v + padding, 5, generator=g)
    teacher_hidden, teacher_head = torch.randn(n, 7, generator=g), torch.randn(v + padding, 7, generator=g)
    student_head[v:] *= 50
    teacher_head[v:] *= 50
    tokens = torch.randint(v, (n,), generator=g)
    return (
        student_hidden.requires_grad_(),
        student_head.requires_grad_(),
        teacher_hidden,
        teacher_head,
        tokens,
        v,
    )


def doubled(student_hidden, student_head, teacher_hidden, teacher_head, v):
    """Leaves in float64, and the log-probabilities of teacher and student over the v real ids."""
    hidden, head = (x.detach().double().requires_grad_() for x in (student_hidden, student_head))
    q_log = (hidden @ head[:v].T).log_softmax(-1)
    p_log = (teacher_hidden.double() @ teacher_head[:v].double().T).log_softmax(-1)
    return hidden, head, p_log, q_log


@pytest.mark.parametrize("name", CELL)
def test_objective_is_the_weighted_kl_and_its_gradient(name):
    hidden, head, teacher_hidden, teacher_head, tokens, v = position_problem()
    weight, w = torch.tensor([0.5, 0.0, 1.0, 0.25, 2.0, 1.0]), CELL[name][1]
    loss, metrics = objective(
        flags(name, fkl_weight=w), hidden, head[:v], Signal(teacher_hidden, teacher_head[:v]), tokens, weight
    )
    loss.backward()

    hidden64, head64, p_log, q_log = doubled(hidden, head, teacher_hidden, teacher_head, v)
    truth = (weight.double() * (w * kl(p_log, q_log) + (1 - w) * kl(q_log, p_log))).sum()
    truth.backward()
    close(loss, truth)
    close(hidden.grad, hidden64.grad)
    close(head.grad, head64.grad)
    assert not head.grad[v:].any()
    counted = weight > 0
    for key, value in {
        "fkl": kl(p_log, q_log),
        "rkl": kl(q_log, p_log),
        "student_entropy": -(q_log.exp() * q_log).sum(-1),
        "teacher_entropy": -(p_log.exp() * p_log).sum(-1),
    }.items():
        close(metrics[key][counted], value[counted].detach())


def test_sampled_forward_is_cross_entropy():
    hidden, head, _, _, tokens, v = position_problem()
    weight = torch.rand(len(tokens))
    loss, metrics = objective(flags("forward", "sampled"), hidden, head[:v], Signal(), tokens, weight)
    loss.backward()
    hidden64, head64 = (x.detach().double().requires_grad_() for x in (hidden, head))
    nll = torch.nn.functional.cross_entropy(hidden64 @ head64[:v].T, tokens, reduction="none")
    (weight.double() * nll).sum().backward()
    close(metrics["nll"], nll.detach())
    close(hidden.grad, hidden64.grad)
    close(head.grad, head64.grad)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_sampled_gradient_is_the_exact_one_on_average(direction):
    """Proposition 1, by enumeration: every token once, weighted by its probability under the sampling policy."""
    hidden, head, teacher_hidden, teacher_head, _, v = position_problem(n=1)
    hidden64, head64, p_log, q_log = doubled(hidden, head, teacher_hidden, teacher_head, v)
    exact, policy = (kl(p_log, q_log), p_log) if direction == "forward" else (kl(q_log, p_log), q_log)
    exact.sum().backward()
    loss, _ = objective(
        flags(direction, "sampled"),
        hidden.expand(v, -1),
        head[:v],
        Signal(teacher_hidden.expand(v, -1), teacher_head[:v]),
        torch.arange(v),
        policy[0].detach().exp().float(),
    )
    loss.backward()
    close(hidden.grad, hidden64.grad, 1e-4)
    close(head.grad, head64.grad, 1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Batches of responses


@pytest.fixture(scope="module")
def pair():
    tokenizer = make_tokenizer()
    torch.manual_seed(1)
    return make_model(tokenizer, 32, 2, 1).eval(), make_model(tokenizer, 48, 1, 1).eval()


# Responses of unequal length; id 0 is what rows are padded with and is a stop token too, at an end and in a middle.
BATCH = [
    Response([1, 3, 20], [21, 22, 0], False),
    Response([1, 9], [2], False),
    Response([1, 3, 20, 11, 12], [13, 0, 14, 15, 16, 17, 2], True),
]


def live(teacher):
    @torch.no_grad()
    def signal(responses):
        return Signal(*forward(teacher, responses, teacher.config.vocab_size))

    return Teacher(signal)


def gradients_of(model, args, teacher, batch):
    """Sums of the metrics over tokens and gradients {name: tensor} of a batch's loss."""
    model.zero_grad(set_to_none=True)
    loss_of = functools.partial(micro_batch_loss, args, model, teacher, model.config.vocab_size, Counter())
    weights = token_weights(batch, args.normalize)
    sums = training.accumulate_gradients("cpu", batch, weights, args.micro_batch_tokens, loss_of)
    return sums, {name: p.grad.clone() for name, p in model.named_parameters()}


def truth_one_by_one(student, teacher, batch, weights, loss_of):
    """The batch's loss and gradients from each response alone, unpadded, with all its logits in float64."""
    student.zero_grad(set_to_none=True)
    total = 0.0
    for response, weight in zip(batch, weights):
        ids = torch.tensor([response.prompt_ids + response.response_ids])
        with torch.no_grad():
            p_log = teacher(input_ids=ids).logits[0].double().log_softmax(-1)
        q_log = student(input_ids=ids).logits[0].double().log_softmax(-1)
        for place, token in enumerate(response.response_ids, start=len(response.prompt_ids) - 1):
            loss = weight * loss_of(p_log[place], q_log[place], token)
            total += loss.item()
            loss.backward(retain_graph=True)
    return total, {name: p.grad.clone() for name, p in student.named_parameters()}


LOSSES = {
    "forward": (flags("forward"), lambda p, q, token: kl(p, q)),
    "reverse": (flags("reverse", fkl_weight=0.0), lambda p, q, token: kl(q, p)),
    "mix": (flags("mix", fkl_weight=0.3), lambda p, q, token: 0.3 * kl(p, q) + 0.7 * kl(q, p)),
    "sft": (flags("forward", "sampled"), lambda p, q, token: -q[token]),
    "reinforce": (flags("reverse", "sampled"), lambda p, q, token: (q[token] - p[token]).detach() * q[token]),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("normalize", ["token", "sequence"])
def test_gradients_of_a_padded_batch_are_those_of_its_responses_alone(pair, name, normalize):
    """Response positions and no others carry loss, the stop token's among them; nothing flows into the sampling of a prefix."""
    student, teacher = pair
    args, loss_of = LOSSES[name]
    args.normalize = normalize
    weights = [1 / 11] * 3 if normalize == "token" else [1 / (3 * 3), 1 / 3, 1 / (3 * 7)]
    sums, gradients = gradients_of(student, args, live(teacher), BATCH)
    loss, truth = truth_one_by_one(student, teacher, BATCH, weights, loss_of)
    assert sums["loss"] == pytest.approx(loss, rel=1e-4)
    for key in truth:
        close(gradients[key], truth[key], 2e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_micro_batches_change_nothing(pair, name):
    student, teacher = pair
    args = argparse.Namespace(**(vars(LOSSES[name][0]) | {"normalize": "sequence"}))
    whole, expected = gradients_of(student, args, live(teacher), BATCH)
    args.micro_batch_tokens = 1
    parts, found = gradients_of(student, args, live(teacher), BATCH)
    assert parts.pop("positions") == 11 + 10 < whole.pop("positions")
    assert parts == pytest.approx(whole, rel=1e-4)
    for key in expected:
        close(found[key], expected[key])


def test_a_response_of_only_the_stop_token_teaches_to_stop(pair):
    student, teacher = pair
    stop = [Response([1, 9], [2], False)]
    sums, gradients = gradients_of(student, flags("forward", "sampled"), live(teacher), stop)
    logits = student(input_ids=torch.tensor([[1, 9]])).logits[0, -1]
    assert sums["loss"] == pytest.approx(-logits.double().log_softmax(-1)[2].item(), rel=1e-5)
    assert any(g.abs().max() > 0 for g in gradients.values())


def test_token_weights():
    batch = [Response([1], [5], False), Response([1], [5, 6, 7], False)]
    assert token_weights(batch, "token") == [1 / 4, 1 / 4]
    assert token_weights(batch, "sequence") == [1 / 2, 1 / 6]


@pytest.mark.parametrize("horizon", [4, 12])
def test_cached_and_live_teacher_give_equal_gradients(world, rollouts, scores, horizon):
    """Also where training cuts the responses: the cache then gives the first hidden states of each."""
    student = load_model(str(world / "student_init"), "-", "float32")
    items = stored_responses(str(rollouts), horizon, 512, 29)
    cached = stored_teacher(str(scores), str(rollouts), items, "full", 16, "student")
    direct = live_teacher(str(world / "teacher_init"), "float32", 29)
    order = [7, 0, 11, 3]
    sums, expected = gradients_of(student, flags("forward"), direct, [items[i] for i in order])
    found_sums, found = gradients_of(student, flags("forward"), cached, [items[i] for i in order])
    assert found_sums == pytest.approx(sums, rel=1e-5)
    for key in expected:
        close(found[key], expected[key])
    assert tflops(cached.config, 3, 5, forwards=1) == tflops(direct.config, 3, 5, forwards=1) > 0


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs


def command(world, out, *more, steps=2):
    given = [
        "--student",
        world / "student_init",
        "--out",
        out,
        "--steps",
        steps,
        *"--normalize token --batch_size 3 --lr 1e-3 --max_response_tokens 8 --engine hf --dtype float32".split(),
        *more,
    ]
    return [str(word) for word in given]


def run(*words, **steps):
    """Two steps of train.py on the toy world, in this process."""
    train.main(train.get_args(command(*words, **steps)))


def teacher_prefix(rollouts, scores):
    return ["--prefix", "teacher", "--rollouts", rollouts, "--scores", scores]


def student_prefix(world):
    return ["--prefix", "student", "--teacher", world / "teacher_init", "--data", world / "train.jsonl"]


def read_rows(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


@pytest.mark.parametrize("prefix", ["teacher", "student"])
@pytest.mark.parametrize("name", ["forward", "reverse", "mix", "sampled"])
def test_every_cell_trains_and_leaves_a_complete_artifact(world, rollouts, scores, tmp_path, prefix, name):
    kind = {
        "mix": ["--kl", "mix", "--fkl_weight", 0.25],
        "sampled": ["--kl", "forward" if prefix == "teacher" else "reverse", "--vocab", "sampled"],
    }.get(name, ["--kl", name])
    source = student_prefix(world) if prefix == "student" else teacher_prefix(rollouts, scores)
    if prefix == "teacher" and name == "sampled":
        source = source[:4]  # hard labels need no scores
    run(world, tmp_path / "run", *source, *kind)
    meta = read_artifact(str(tmp_path / "run"), "--", "train")
    assert (
        meta["cell"]["prefix"] == prefix
        and meta["args"]["out"] == str(tmp_path / "run")
        and meta["stop_ids"] == [0, 2]
    )
    rows = read_rows(tmp_path / "run/metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert 0 < rows[0]["tflops"] < rows[1]["tflops"] and rows[0]["tflops_uncached"] >= rows[0]["tflops"]
    for row in rows:
        assert all(math.isfinite(value) for value in row.values())
        if name != "sampled":  # with --normalize token the loss is the mixture of the tokens' means
            w = {"forward": 1.0, "reverse": 0.0, "mix": 0.25}[name]
            assert row["loss"] == pytest.approx(w * row["fkl"] + (1 - w) * row["rkl"], rel=1e-5)
    before, after = (
        load_file(path / "model.safetensors") for path in (world / "student_init", tmp_path / "run/final")
    )
    assert before.keys() == after.keys() and all(not torch.equal(before[key], after[key]) for key in before)
    assert load_model(str(tmp_path / "run/final"), "-", "float32").generation_config.eos_token_id == [0, 2]


def test_bfloat16_is_only_the_arithmetic(world, tmp_path):
    """The passes are in bfloat16, the trained weights and the saved ones in float32; the loss is near that of float32."""
    rows = {}
    for dtype in ("float32", "bfloat16"):
        run(world, tmp_path / dtype, *student_prefix(world), "--kl", "reverse", "--dtype", dtype, steps=1)
        [rows[dtype]] = read_rows(tmp_path / dtype / "metrics.jsonl")
    weights = load_file(tmp_path / "bfloat16/final/model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert rows["float32"]["student_entropy"] != rows["bfloat16"]["student_entropy"]
    assert rows["float32"]["student_entropy"] == pytest.approx(rows["bfloat16"]["student_entropy"], rel=0.05)


def test_what_a_run_spent(world, rollouts, scores, tmp_path):
    """One step over all 12 responses. A stored score costs nothing again; a live teacher is always paid for."""
    configs = [
        load_model(str(world / name), "-", "float32").config.to_dict()
        for name in ("student_init", "teacher_init")
    ]
    run(
        world,
        tmp_path / "cached",
        *teacher_prefix(rollouts, scores),
        *"--kl forward --batch_size 12".split(),
        steps=1,
    )
    [row] = read_rows(tmp_path / "cached/metrics.jsonl")
    sizes = [(len(r["prompt_ids"]), min(8, len(r["response_ids"]))) for r in read_rollouts(rollouts)]
    student, teacher = (sum(tflops(config, *size, forwards=1) for size in sizes) for config in configs)
    assert row["response_tokens"] == sum(response for _, response in sizes)
    assert row["tflops"] == pytest.approx(3 * student) and row["tflops_uncached"] == pytest.approx(
        3 * student + teacher
    )
    run(world, tmp_path / "live", *student_prefix(world), "--kl", "forward", steps=1)
    [row] = read_rows(tmp_path / "live/metrics.jsonl")
    assert row["tflops"] == row["tflops_uncached"] > 0


def test_many_steps_bring_the_student_to_the_teacher(world, rollouts, scores, tmp_path):
    run(
        world,
        tmp_path / "run",
        *teacher_prefix(rollouts, scores),
        "--kl",
        "forward",
        "--lr",
        "1e-2",
        "--batch_size",
        12,
        steps=40,
    )
    rows = read_rows(tmp_path / "run/metrics.jsonl")
    assert rows[-1]["fkl"] < 0.3 * rows[0]["fkl"]


def test_evaluations_have_a_limit_of_their_own(world, rollouts, scores, tmp_path):
    flags = ["--kl", "forward", "--eval_data", world / "heldout.jsonl", "--eval_every", 1, "--eval_n", 8]
    for name, limit in (("same", []), ("longer", ["--eval_max_response_tokens", 30])):
        run(
            world,
            tmp_path / name,
            *teacher_prefix(rollouts, scores),
            *flags,
            *limit,
            "--max_response_tokens",
            5,
            steps=1,
        )
        assert read_rows(tmp_path / name / "metrics.jsonl")[0]["response_length"] <= 5
    lengths = {name: read_rows(tmp_path / name / "evals.jsonl")[0]["length"] for name in ("same", "longer")}
    assert lengths["same"] <= 5 < lengths["longer"] <= 30


class Killed(Exception):
    pass


@pytest.mark.parametrize("prefix", ["teacher", "student"])
def test_a_killed_run_continues_to_the_same_end_bit_for_bit(
    world, rollouts, scores, tmp_path, monkeypatch, prefix
):
    source = (
        teacher_prefix(rollouts, scores)
        if prefix == "teacher"
        else [*student_prefix(world), "--n", 2, "--refresh_every", 2]
    )
    source = [
        *source,
        *"--kl reverse --save_every 2 --eval_every 3 --eval_n 2 --eval_data".split(),
        world / "heldout.jsonl",
    ]
    run(world, tmp_path / "whole", *source, steps=6)
    (tmp_path / "again").mkdir()
    out = tmp_path / "again/whole"  # the same name: checkpoints hold the run's

    def killed_in_step_6(args, model, optimizer, step, ids):
        if step == 5:
            raise Killed
        return optimizer_step(args, model, optimizer, step, ids)

    with monkeypatch.context() as patch:
        patch.setattr(training, "optimizer_step", killed_in_step_6)
        with pytest.raises(Killed):
            run(world, out, *source, steps=6)
    assert not (out / "meta.json").exists() and len(read_rows(out / "metrics.jsonl")) == 5
    run(world, out, *source, "--resume", steps=6)

    def rows(path, name):
        return [{k: v for k, v in row.items() if "second" not in k} for row in read_rows(path / name)]

    for name in ("metrics.jsonl", "evals.jsonl"):
        assert rows(out, name) == rows(tmp_path / "whole", name) != []
    assert (out / "final/model.safetensors").read_bytes() == (
        tmp_path / "whole/final/model.safetensors"
    ).read_bytes()


def test_a_run_killed_while_it_was_finishing_can_be_resumed(world, rollouts, scores, tmp_path, monkeypatch):
    def killed(*words, **facts):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("distil.artifacts.finish_artifact", killed)
        with pytest.raises(Killed):
            run(world, tmp_path / "run", *teacher_prefix(rollouts, scores), "--kl", "forward")
    run(world, tmp_path / "run", *teacher_prefix(rollouts, scores), "--kl", "forward", "--resume")
    read_artifact(str(tmp_path / "run"), "--", "train")


def test_a_process_that_is_killed_for_real_can_be_resumed(world, rollouts, scores, tmp_path):
    """SIGKILL in the third step, after the second was saved: nothing was flushed or cleaned up for the occasion."""
    source = [*teacher_prefix(rollouts, scores), "--kl", "forward", "--save_every", 2]
    run(world, tmp_path / "whole", *source, steps=4)
    out = tmp_path / "again/whole"
    code = (
        "import os, signal, sys, train\nfrom distil import training\nstep_of = training.optimizer_step\n"
        "def killed(args, model, optimizer, step, ids):\n"
        "    return os.kill(os.getpid(), signal.SIGKILL) if step == 2 else step_of(args, model, optimizer, step, ids)\n"
        "training.optimizer_step = killed\ntrain.main(train.get_args(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *command(world, out, *source, steps=4)], cwd=ROOT, capture_output=True
    )
    assert done.returncode == -9, done.stderr
    run(world, out, *source, "--resume", steps=4)
    assert (out / "final/model.safetensors").read_bytes() == (
        tmp_path / "whole/final/model.safetensors"
    ).read_bytes()


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


TEACHER = "--prefix teacher --student s --rollouts r --out o "
STUDENT = "--prefix student --student s --teacher t --data d --out o "


@pytest.mark.parametrize(
    "line, word",
    [
        (TEACHER + "--scores c --kl mix", "--fkl_weight"),
        (TEACHER + "--scores c --kl forward --fkl_weight 0.5", "--fkl_weight"),
        (TEACHER + "--scores c --kl mix --fkl_weight 1.5", "--fkl_weight"),
        (TEACHER + "--kl reverse --vocab sampled", "--vocab sampled"),
        (STUDENT + "--kl forward --vocab sampled", "--vocab sampled"),
        (STUDENT + "--kl mix --fkl_weight 0.5 --vocab sampled", "--vocab sampled"),
        (TEACHER + "--kl forward", "--scores"),
        ("--prefix teacher --kl forward --student s --scores c --out o", "--rollouts"),
        (TEACHER + "--scores c --kl forward --teacher t", "--teacher"),
        (TEACHER + "--scores c --kl forward --data d", "--data"),
        ("--prefix student --kl forward --student s --data d --out o", "--teacher"),
        ("--prefix student --kl forward --student s --teacher t --out o", "--data"),
        (STUDENT + "--kl forward --rollouts r", "--rollouts"),
        (STUDENT + "--kl forward --scores c", "--scores"),
        (STUDENT + "--kl reverse --vocab sampled --scores c", "--scores"),
        (STUDENT + "--kl forward --refresh_every 0", "--refresh_every"),
        (STUDENT + "--kl forward --refresh_every 2 --save_every 3", "--refresh_every"),
        (STUDENT + "--kl forward --eval_every 3", "--eval_data"),
        (STUDENT + "--kl forward --eval_data e", "--eval_data"),
        (STUDENT + "--kl forward --steps 0", "--steps"),
        (STUDENT + "--kl forward --batch_size 0", "--batch_size"),
        (STUDENT + "--kl forward --micro_batch_tokens 0", "--micro_batch_tokens"),
        (STUDENT + "--kl forward --log_every 0", "--log_every"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(line, word, refused):
    message = refused(lambda: train.get_args(line.split()))
    assert word in message.split("error:")[1]


def test_a_legal_line_passes_and_sets_the_weight():
    assert train.get_args((TEACHER + "--scores c --kl forward").split()).fkl_weight == 1.0
    assert train.get_args((STUDENT + "--kl reverse").split()).fkl_weight == 0.0
    assert train.get_args((STUDENT + "--kl mix --fkl_weight 0.2").split()).fkl_weight == 0.2


def other_tokenizer(world, path):
    """A copy of the student whose tokenizer gives two tokens each other's ids."""
    shutil.copytree(world / "student_init", path)
    text = json.loads((path / "tokenizer.json").read_text())
    vocabulary = text["model"]["vocab"]
    vocabulary["0"], vocabulary["1"] = vocabulary["1"], vocabulary["0"]
    (path / "tokenizer.json").write_text(json.dumps(text))
    return path


def other_template(world, path):
    from transformers import AutoTokenizer

    shutil.copytree(world / "student_init", path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\n", "assistant ")
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("prefix", ["teacher", "student"])
def test_bad_input_is_refused_and_leaves_no_directory(world, rollouts, scores, tmp_path, refused, prefix):
    source = [
        *(teacher_prefix(rollouts, scores) if prefix == "teacher" else student_prefix(world)),
        *"--kl forward".split(),
    ]
    out = tmp_path / "run"

    def is_refused(more, *words):
        refused(lambda: run(world, out, *source, *more), *words)
        assert not out.exists()

    is_refused(["--student", other_tokenizer(world, tmp_path / "ids")], "--student", "tokenizer")
    is_refused(
        ["--student", other_template(world, tmp_path / "template")],
        "--student",
        "template",
        "--take_template",
    )
    is_refused(["--student", tmp_path / "absent"], "--student", "absent")
    is_refused(["--eval_every", 1, "--eval_data", tmp_path / "absent.jsonl"], "absent.jsonl")
    is_refused(["--eval_every", 1, "--eval_data", "gsm9k"], "gsm9k")
    if prefix == "teacher":
        is_refused(["--rollouts", world], "--rollouts", "toy_world")
        is_refused(["--rollouts", world / "gold"], "--scores", "other rollouts")
        is_refused(["--scores", rollouts], "--scores")
    else:
        is_refused(["--teacher", other_tokenizer(world, tmp_path / "ids2")], "--teacher", "tokenizer")
        is_refused(["--teacher", tmp_path / "absent"], "--teacher", "absent")
        is_refused(["--data", tmp_path / "absent.jsonl"], "absent.jsonl")
        is_refused(["--max_response_tokens", 600], "train/", "context of 512")
        is_refused(["--temperature", -1], "--temperature")


def test_take_template_gives_the_student_the_teachers(world, rollouts, scores, tmp_path):
    student = other_template(world, tmp_path / "student")
    run(
        world,
        tmp_path / "run",
        *teacher_prefix(rollouts, scores),
        "--kl",
        "forward",
        "--student",
        student,
        "--take_template",
    )
    meta = read_artifact(str(tmp_path / "run"), "--", "train")
    assert meta["template_sha256"] == read_artifact(str(rollouts), "--", "rollout")["template_sha256"]


def test_scores_that_are_too_short_and_responses_that_are_too_long(
    world, rollouts, scores, tmp_path, refused
):
    import score_teacher

    score_teacher.main(
        score_teacher.get_args(
            [
                *"--dtype float32 --max_tokens 4 --teacher".split(),
                str(world / "teacher_init"),
                "--rollouts",
                str(rollouts),
                "--out",
                str(tmp_path / "short"),
            ]
        )
    )
    refused(
        lambda: run(
            world, tmp_path / "run", *teacher_prefix(rollouts, tmp_path / "short"), "--kl", "forward"
        ),
        "--max_tokens",
    )
    model = load_model(str(world / "student_init"), "-", "float32")
    model.config.max_position_embeddings = 14
    model.save_pretrained(tmp_path / "narrow")
    make_tokenizer().save_pretrained(tmp_path / "narrow")
    source = [*teacher_prefix(rollouts, scores), "--kl", "forward", "--student", tmp_path / "narrow"]
    refused(lambda: run(world, tmp_path / "run", *source), "context of 14", "train/")
    assert not (tmp_path / "run").exists()
