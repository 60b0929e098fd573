"""train.py: objectives against float64, which positions carry loss, costs, whole runs, exact resume."""

import argparse
import functools
import math
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import score_teacher
import train
from conftest import ROOT, killed_in_call, read_rows, replace_text, run_line, swap_ids, untimed
from distil import artifacts, batches
from distil.artifacts import read_artifact
from distil.batches import token_weights
from distil.models import Response, forward, load_model
from distil.rollouts import read_rollouts, stored_responses
from distil.teacher import Signal, Teacher, live_teacher, stored_teacher
from recipes.toy_world import make_model, make_tokenizer
from runs import diagnostics, training
from runs.flops import tflops
from train import micro_batch_loss, objective


def flags(kl="forward", vocab="full", fkl_weight=1.0, **more):
    common = {"normalize": "token", "micro_batch_tokens": 10**6, "dtype": "float32", "k": 4}
    common |= {"topk_set": "student", "prefix": "teacher", "position_bins": None, "max_response_tokens": 9}
    return argparse.Namespace(kl=kl, vocab=vocab, fkl_weight=fkl_weight, **common | more)


def kl(p_log, q_log):
    return (p_log.exp() * (p_log - q_log)).sum(-1)


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------------------------
# The objective at single positions


def position_problem(n=6, v=9, padding=3):
    """Hidden states and heads of a student and a wider teacher. Padding rows of the heads would dominate."""
    g = torch.Generator().manual_seed(0)
    student_hidden, student_head = torch.randn(n, 5, generator=g), torch.randn(v + padding, 5, generator=g)
    teacher_hidden, teacher_head = torch.randn(n, 7, generator=g), torch.randn(v + padding, 7, generator=g)
    student_head[v:] *= 50
    teacher_head[v:] *= 50
    tokens = torch.randint(v, (n,), generator=g)
    student = student_hidden.requires_grad_(), student_head.requires_grad_()
    return *student, teacher_hidden, teacher_head, tokens, v


def doubled(student_hidden, student_head, teacher_hidden, teacher_head, v):
    """Leaves in float64, and the log-probabilities of teacher and student over the v real ids."""
    hidden, head = (x.detach().double().requires_grad_() for x in (student_hidden, student_head))
    q_log = (hidden @ head[:v].T).log_softmax(-1)
    p_log = (teacher_hidden.double() @ teacher_head[:v].double().T).log_softmax(-1)
    return hidden, head, p_log, q_log


@pytest.mark.parametrize("name, w", [("forward", 1.0), ("reverse", 0.0), ("mix", 0.3)])
def test_objective_is_the_weighted_kl_and_its_gradient(name, w):
    hidden, head, teacher_hidden, teacher_head, tokens, v = position_problem()
    weight = torch.tensor([0.5, 0.0, 1.0, 0.25, 2.0, 1.0])
    teacher = Signal(teacher_hidden, teacher_head[:v])
    loss, metrics = objective(flags(name, fkl_weight=w), hidden, head[:v], teacher, tokens, weight)
    loss.backward()

    hidden64, head64, p_log, q_log = doubled(hidden, head, teacher_hidden, teacher_head, v)
    truth = (weight.double() * (w * kl(p_log, q_log) + (1 - w) * kl(q_log, p_log))).sum()
    truth.backward()
    close(loss, truth)
    close(hidden.grad, hidden64.grad)
    close(head.grad, head64.grad)
    assert not head.grad[v:].any()
    counted = weight > 0
    entropies = {"student_entropy": -(q_log.exp() * q_log).sum(-1)}
    entropies["teacher_entropy"] = -(p_log.exp() * p_log).sum(-1)
    for key, value in {"fkl": kl(p_log, q_log), "rkl": kl(q_log, p_log), **entropies}.items():
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
    """Proposition 1, by enumeration: every token, weighted by its probability under the sampling policy."""
    hidden, head, teacher_hidden, teacher_head, _, v = position_problem(n=1)
    hidden64, head64, p_log, q_log = doubled(hidden, head, teacher_hidden, teacher_head, v)
    exact, policy = (kl(p_log, q_log), p_log) if direction == "forward" else (kl(q_log, p_log), q_log)
    exact.sum().backward()
    teacher, weight = Signal(teacher_hidden.expand(v, -1), teacher_head[:v]), policy[0].detach().exp().float()
    args = flags(direction, "sampled")
    loss, _ = objective(args, hidden.expand(v, -1), head[:v], teacher, torch.arange(v), weight)
    loss.backward()
    close(hidden.grad, hidden64.grad, 1e-4)
    close(head.grad, head64.grad, 1e-4)


# ------------------------------------------------------------------------------------------------------------
# Batches of responses


@pytest.fixture(scope="module")
def pair():
    tokenizer = make_tokenizer()
    torch.manual_seed(1)
    return make_model(tokenizer, 32, 2, 1).eval(), make_model(tokenizer, 48, 1, 1).eval()


# Responses of unequal length. Id 0 pads rows and is a stop token too: here at an end and in a middle.
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
    loss_of = functools.partial(micro_batch_loss, args, model, teacher, model.config.vocab_size, [])
    weights = token_weights(batch, args.normalize)
    sums = batches.accumulate_gradients("cpu", batch, weights, args.micro_batch_tokens, loss_of)
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
    """Only response positions carry loss, the stop token included. No gradient flows through the sampling."""
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


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("micro_batch_tokens", [1, 10**6])
def test_metrics_by_position_are_means_over_the_tokens_of_a_bin(pair, name, micro_batch_tokens):
    """Against each response alone; bins of 3 positions: 0 to 2, 3 to 5, 6; there is none from 9 on."""
    student, teacher = pair
    args, loss_of = LOSSES[name]
    more = {"normalize": "sequence", "micro_batch_tokens": micro_batch_tokens, "position_bins": 3}
    sums, _ = gradients_of(student, argparse.Namespace(**vars(args) | more), live(teacher), BATCH)
    found = diagnostics.position_means(sums)["by_position"]
    bins = [[], [], []]
    for response in BATCH:
        ids = torch.tensor([response.prompt_ids + response.response_ids])
        p, q = (model(input_ids=ids).logits[0].double().log_softmax(-1) for model in (teacher, student))
        for place, token in enumerate(response.response_ids):
            p_log, q_log = (logs[len(response.prompt_ids) - 1 + place].detach() for logs in (p, q))
            of_both = {*p_log.topk(4).indices.tolist()} & {*q_log.topk(4).indices.tolist()}
            values = {"loss": loss_of(p_log, q_log, token), "student_entropy": -(q_log.exp() * q_log).sum()}
            bins[place // 3].append(values | {"overlap_ratio": torch.tensor(len(of_both) / 4)})
    assert found["tokens"] == [7, 3, 1] == [len(rows) for rows in bins]
    for metric in bins[0][0]:
        truth = [sum(row[metric].item() for row in rows) / len(rows) for rows in bins]
        assert found[metric] == pytest.approx(truth, rel=1e-4)
    assert not any(isinstance(key, tuple) for key in sums) and not diagnostics.position_means(sums)


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
    """Also where training truncates responses: the cache then gives the first hidden states of each."""
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


# ------------------------------------------------------------------------------------------------------------
# Whole runs

COMMON = "--steps 2 --normalize token --batch_size 3 --lr 1e-3 --max_response_tokens 8"


def run(out, flags):
    """train.py on the toy world, two steps unless the flags say otherwise."""
    run_line(train, f"{COMMON} --out {out} {flags}")


def final_weights(out):
    return (out / "final/model.safetensors").read_bytes()


def test_a_run_with_empty_sets_is_said_once_to_train_on_nothing(world, prefix_flags, tmp_path, capsys):
    """The --k likeliest of the student without those of the teacher; --k is the vocabulary."""
    empty = "--vocab topk --k 29 --topk_set difference --kl reverse"
    run(tmp_path / "run", f"{prefix_flags['teacher']} {empty}")
    assert [row["grad_norm"] for row in read_rows(tmp_path / "run/metrics.jsonl")] == [0, 0]
    said = capsys.readouterr().out
    assert said.count("WARNING") == 1 and "WARNING: step 1 trains on nothing: the sets of --topk_set" in said


@pytest.mark.parametrize("prefix", ["teacher", "student"])
@pytest.mark.parametrize("name", ["forward", "reverse", "mix", "sampled"])
def test_every_cell_trains_and_leaves_a_complete_artifact(world, prefix_flags, tmp_path, prefix, name):
    sampled = {"teacher": "forward --vocab sampled", "student": "reverse --vocab sampled"}[prefix]
    source, kl = prefix_flags[prefix], {"mix": "mix --fkl_weight 0.25", "sampled": sampled}.get(name, name)
    if prefix == "teacher" and name == "sampled":
        source = source.split("--scores")[0]  # hard labels need no scores
    run(tmp_path / "run", f"{source} --kl {kl}")
    meta = read_artifact(str(tmp_path / "run"), "--", "train")
    assert meta["cell"]["prefix"] == prefix
    assert meta["args"]["out"] == str(tmp_path / "run") and meta["stop_ids"] == [0, 2]
    rows = read_rows(tmp_path / "run/metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert 0 < rows[0]["tflops"] < rows[1]["tflops"] and rows[0]["tflops_uncached"] >= rows[0]["tflops"]
    for row in rows:
        assert all(math.isfinite(value) for value in row.values())
        if name != "sampled":  # with --normalize token the loss is the mixture of the tokens' means
            w = {"forward": 1.0, "reverse": 0.0, "mix": 0.25}[name]
            assert row["loss"] == pytest.approx(w * row["fkl"] + (1 - w) * row["rkl"], rel=1e-5)
    before = load_file(world / "student_init/model.safetensors")
    after = load_file(tmp_path / "run/final/model.safetensors")
    assert before.keys() == after.keys() and all(not torch.equal(before[key], after[key]) for key in before)
    assert load_model(str(tmp_path / "run/final"), "-", "float32").generation_config.eos_token_id == [0, 2]


def test_bfloat16_is_only_the_arithmetic(prefix_flags, tmp_path):
    """Passes run in bfloat16; trained and saved weights are float32. The loss is near that of float32."""
    rows = {}
    for dtype in ("float32", "bfloat16"):
        run(tmp_path / dtype, f"{prefix_flags['student']} --kl reverse --dtype {dtype} --steps 1")
        [rows[dtype]] = read_rows(tmp_path / dtype / "metrics.jsonl")
    weights = load_file(tmp_path / "bfloat16/final/model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert rows["float32"]["student_entropy"] != rows["bfloat16"]["student_entropy"]
    assert rows["float32"]["student_entropy"] == pytest.approx(rows["bfloat16"]["student_entropy"], rel=0.05)


def test_what_a_run_spent(world, rollouts, prefix_flags, tmp_path):
    """One step over all 12 responses. Stored scores cost nothing again; a live teacher always costs."""
    models = [load_model(str(world / f"{name}_init"), "-", "float32") for name in ("student", "teacher")]
    run(tmp_path / "cached", f"{prefix_flags['teacher']} --kl forward --batch_size 12 --steps 1")
    [row] = read_rows(tmp_path / "cached/metrics.jsonl")
    sizes = [(len(r["prompt_ids"]), min(8, len(r["response_ids"]))) for r in read_rollouts(rollouts)]
    student, teacher = (sum(tflops(m.config.to_dict(), *size, forwards=1) for size in sizes) for m in models)
    assert row["response_tokens"] == sum(response for _, response in sizes)
    assert row["tflops"] == pytest.approx(3 * student)
    assert row["tflops_uncached"] == pytest.approx(3 * student + teacher)
    run(tmp_path / "live", f"{prefix_flags['student']} --kl forward --steps 1")
    [row] = read_rows(tmp_path / "live/metrics.jsonl")
    assert row["tflops"] == row["tflops_uncached"] > 0


def test_many_steps_bring_the_student_to_the_teacher(prefix_flags, tmp_path):
    run(tmp_path / "run", f"{prefix_flags['teacher']} --kl forward --lr 1e-2 --batch_size 12 --steps 40")
    rows = read_rows(tmp_path / "run/metrics.jsonl")
    assert rows[-1]["fkl"] < 0.3 * rows[0]["fkl"]


def test_evaluations_have_a_limit_of_their_own(world, prefix_flags, tmp_path):
    flags = f"{prefix_flags['teacher']} --kl forward --steps 1 --max_response_tokens 5"
    flags += f" --eval_data {world}/heldout.jsonl --eval_every 1 --eval_n 8"
    for name, limit in (("same", ""), ("longer", "--eval_max_response_tokens 30")):
        run(tmp_path / name, f"{flags} {limit}")
        assert read_rows(tmp_path / name / "metrics.jsonl")[0]["response_length"] <= 5
    lengths = {name: read_rows(tmp_path / name / "evals.jsonl")[0]["length"] for name in ("same", "longer")}
    assert lengths["same"] <= 5 < lengths["longer"] <= 30


@pytest.mark.parametrize("prefix", ["teacher", "student"])
def test_a_killed_run_continues_to_the_same_end_bit_for_bit(world, prefix_flags, tmp_path, prefix):
    flags = f"{prefix_flags[prefix]} {'--n 2 --refresh_every 2' if prefix == 'student' else ''} --kl reverse"
    flags += f" --steps 6 --save_every 2 --eval_every 3 --eval_n 2 --eval_data {world}/heldout.jsonl"
    whole, out = tmp_path / "whole", tmp_path / "again/whole"  # the same name: checkpoints hold the run's
    run(whole, flags)
    with killed_in_call(6, training, "optimizer_step"):
        run(out, flags)
    assert not (out / "meta.json").exists() and len(read_rows(out / "metrics.jsonl")) == 5
    run(out, f"{flags} --resume")
    for name in ("metrics.jsonl", "evals.jsonl"):
        assert untimed(out / name) == untimed(whole / name) != []
    assert final_weights(out) == final_weights(whole)


def test_a_run_killed_while_it_was_finishing_can_be_resumed(prefix_flags, tmp_path):
    flags = f"{prefix_flags['teacher']} --kl forward"
    with killed_in_call(1, artifacts, "finish_artifact"):
        run(tmp_path / "run", flags)
    run(tmp_path / "run", f"{flags} --resume")
    read_artifact(str(tmp_path / "run"), "--", "train")


KILL = """
import os, signal, sys, train
from runs import training
real_step = training.optimizer_step
def killed(args, model, optimizer, step, ids):
    if step == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return real_step(args, model, optimizer, step, ids)
training.optimizer_step = killed
train.main(train.get_args(sys.argv[1:]))
"""


def test_a_process_that_is_killed_for_real_can_be_resumed(prefix_flags, tmp_path):
    """SIGKILL in the third step, after the second was saved: nothing gets a chance to flush or clean up."""
    flags = f"{prefix_flags['teacher']} --kl forward --save_every 2 --steps 4"
    whole, out = tmp_path / "whole", tmp_path / "again/whole"
    run(whole, flags)
    command = [sys.executable, "-c", KILL, *f"{COMMON} --out {out} {flags}".split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True)
    assert done.returncode == -9, done.stderr
    run(out, f"{flags} --resume")
    assert final_weights(out) == final_weights(whole)


# ------------------------------------------------------------------------------------------------------------
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
    swap_ids(path, "0", "1")
    return path


def other_template(world, path):
    shutil.copytree(world / "student_init", path)
    replace_text(path / "chat_template.jinja", "assistant\n", "assistant ")
    return path


@pytest.mark.parametrize("prefix", ["teacher", "student"])
def test_bad_input_is_refused_and_leaves_no_directory(world, prefix_flags, tmp_path, refused, prefix):
    out, absent = tmp_path / "run", tmp_path / "absent"

    def is_refused(more, *words):
        refused(lambda: run(out, f"{prefix_flags[prefix]} --kl forward {more}"), *words)
        assert not out.exists()

    is_refused(f"--student {other_tokenizer(world, tmp_path / 'ids')}", "--student", "tokenizer")
    template = other_template(world, tmp_path / "template")
    is_refused(f"--student {template}", "--student", "template", "--template")
    is_refused(f"--student {absent}", "--student", "absent")
    is_refused(f"--eval_every 1 --eval_data {absent}.jsonl", "absent.jsonl")
    is_refused("--eval_every 1 --eval_data gsm9k", "gsm9k")
    if prefix == "teacher":
        is_refused(f"--rollouts {world}", "--rollouts", "toy_world")
        is_refused(f"--rollouts {world}/gold", "--scores", "other rollouts")
        is_refused(f"--scores {world.parent}/rollouts", "--scores")
    else:
        is_refused(f"--teacher {other_tokenizer(world, tmp_path / 'ids2')}", "--teacher", "tokenizer")
        is_refused(f"--teacher {absent}", "--teacher", "absent")
        is_refused(f"--data {absent}.jsonl", "absent.jsonl")
        is_refused("--max_response_tokens 600", "train/", "context of 512")
        is_refused("--temperature -1", "--temperature")


def test_the_student_takes_the_teachers_template(world, rollouts, prefix_flags, tmp_path):
    student = other_template(world, tmp_path / "student")
    run(tmp_path / "run", f"{prefix_flags['teacher']} --kl forward --student {student} --template teacher")
    meta = read_artifact(str(tmp_path / "run"), "--", "train")
    assert meta["template_sha256"] == read_artifact(str(rollouts), "--", "rollout")["template_sha256"]


def test_short_scores_and_long_responses_are_refused(world, rollouts, prefix_flags, tmp_path, refused):
    short = f"--max_tokens 4 --teacher {world}/teacher_init --rollouts {rollouts} --out {tmp_path}/short"
    run_line(score_teacher, f"--dtype float32 {short}")
    flags = f"{prefix_flags['teacher']} --kl forward"
    refused(lambda: run(tmp_path / "run", f"{flags} --scores {tmp_path}/short"), "--max_tokens")
    model = load_model(str(world / "student_init"), "-", "float32")
    model.config.max_position_embeddings = 14
    model.save_pretrained(tmp_path / "narrow")
    make_tokenizer().save_pretrained(tmp_path / "narrow")
    narrow = f"{flags} --student {tmp_path}/narrow"
    refused(lambda: run(tmp_path / "run", narrow), "context 14", "train/")
    assert not (tmp_path / "run").exists()
