"""runs/training.py: data order, optimizer step, costs. Whole runs are in test_train and test_grpo."""

import argparse
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import get_scheduler

import grpo
import train
from conftest import run_line
from distil.batches import batch_indices
from runs.flops import tflops
from runs.training import learning_rate, optimizer_step


def test_batch_indices_are_permutations_and_a_function_of_the_step():
    steps = [batch_indices(5, 2, step, seed=3) for step in range(5)]
    flat = [i for step in steps for i in step]
    assert sorted(flat[:5]) == sorted(flat[5:]) == [0, 1, 2, 3, 4]
    assert flat[:5] != flat[5:]
    assert [batch_indices(5, 2, step, seed=3) for step in reversed(range(5))] == steps[::-1]
    assert batch_indices(40, 40, 0, seed=3) != batch_indices(40, 40, 0, seed=4)


def test_learning_rate_rises_then_stays_and_gradients_are_clipped():
    args = argparse.Namespace(
        lr=0.5, lr_schedule="constant", warmup=0.4, steps=10, max_grad_norm=1.0, out="-"
    )
    model = torch.nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters())
    rates = []
    for step in range(6):
        before = model.weight.detach().clone()
        model.weight.grad = torch.tensor([[3.0, 4.0]])
        norm, rate = optimizer_step(args, model, optimizer, step, [])
        assert norm == pytest.approx(5.0)
        torch.testing.assert_close(before - model.weight.detach(), rate * torch.tensor([[0.6, 0.8]]))
        rates.append(rate)
    assert rates == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5, 0.5])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_ends_the_run_before_the_weights_change(bad, refused, tmp_path):
    args = argparse.Namespace(
        lr=0.5, lr_schedule="constant", warmup=0.0, steps=10, max_grad_norm=1.0, out=str(tmp_path)
    )
    model = torch.nn.Linear(2, 1, bias=False)
    before = model.weight.detach().clone()
    model.weight.grad = torch.tensor([[bad, 1.0]])
    step = lambda: optimizer_step(args, model, torch.optim.SGD(model.parameters()), 6, ["a/1"])
    refused(step, "step 7", tmp_path, code=1)
    assert torch.equal(model.weight, before)


def config_of(hidden, intermediate, layers, heads, kv_heads, vocab, **more):
    config = {"model_type": "llama", "hidden_size": hidden, "intermediate_size": intermediate}
    config |= {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    return config | {"vocab_size": vocab} | more


def test_tflops_are_those_the_paper_prints():
    """Appendix H.1: prompts of 92, responses of 128, batch 32, query width equal to the hidden size."""
    student = config_of(1024, 3072, 28, 8, 8, 151936, head_dim=128)
    teacher = config_of(2560, 9728, 36, 20, 8, 151936, head_dim=128)
    cost = lambda config, **passes: 32 * tflops(config, 92, 128, **passes)
    step = {"F_s": cost(student, forwards=1), "C_off": cost(student, forwards=3)}
    step |= {"G_s": cost(student, generations=1), "F_t": cost(teacher, forwards=1)}
    step["C_on"] = cost(student, forwards=3, generations=1) + step["F_t"]
    step["B_s"] = step["C_off"] - step["F_s"]
    printed = {"F_s": 7.73, "B_s": 15.46, "C_off": 23.19, "G_s": 7.66, "F_t": 53.13, "C_on": 83.98}
    assert step == pytest.approx(printed, rel=0.005)
    assert step["C_on"] / step["C_off"] == pytest.approx(3.62, rel=0.005)


def test_tflops_without_head_dim_take_it_from_the_hidden_size():
    config = config_of(8, 3, 2, 4, 2, 10)
    per_token = 2 * (2 * 8 * (8 + 2 * 4) + 2 * 8 * 8 + 6 * 8 * 3) + 2 * 8 * 10 + 2 * 4 * 8 * 5
    assert tflops(config, 2, 3, forwards=1) == pytest.approx(5 * per_token / 1e12)


@pytest.mark.parametrize("warmup", [0, 0.1, 0.5])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedules_are_those_of_transformers(schedule, warmup):
    steps, name = 20, "constant_with_warmup" if schedule == "constant" else schedule
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-3)
    theirs = get_scheduler(name, optimizer, round(warmup * steps), steps)
    rates = []  # theirs of steps 0, 1, ..., 20: their warm-up begins at 0, so it is a step behind ours
    for _ in range(steps + 1):
        rates.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    args = argparse.Namespace(lr=3e-3, lr_schedule=schedule, warmup=warmup, steps=steps)
    for step in range(steps):
        expected = rates[step + 1] if step < round(warmup * steps) else rates[step]
        found = learning_rate(args, step)
        assert found == pytest.approx(expected) and found > 0


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedules_at_their_ends(schedule, steps, refused):
    """One that falls and never would is refused."""
    for warmup in (0, 0.1, 0.5, 0.8, 0.9, 1):
        rises = round(warmup * steps)
        args = argparse.Namespace(lr=1.0, lr_schedule=schedule, warmup=warmup, steps=steps)
        rates = [learning_rate(args, step) for step in range(steps)]
        assert rates[:rises] == pytest.approx([(step + 1) / rises for step in range(rises)])
        assert 0 < min(rates) and max(rates) == 1
        line = f"--model m --data d --out o --steps {steps} --warmup {warmup} --lr_schedule {schedule}"
        if schedule == "constant" or rises < steps - 1 or steps == 1:
            grpo.get_args(line.split())
            x = max(0, steps - rises - 1) / max(1, steps - rises)
            last = {"linear": 1 - x, "cosine": math.cos(math.pi * x / 2) ** 2, "constant": 1}[schedule]
            assert rates[-1] == pytest.approx(last) and (last < 1) == (schedule != "constant" and steps > 1)
        else:
            refused(lambda: grpo.get_args(line.split()), f"--warmup {float(warmup)}", f"{schedule} falls")


def test_weight_decay_is_decoupled_and_of_all_weights(world, prefix_flags, tmp_path):
    """The first update is the same without it, less lr times decay times the weights themselves."""
    line = (
        f"{prefix_flags['student']} --kl forward --steps 1 --batch_size 2 --max_response_tokens 4 --lr 1e-2"
    )
    run_line(train, f"{line} --out {tmp_path}/without")
    run_line(train, f"{line} --out {tmp_path}/with --weight_decay 0.5")
    start, without, decayed = (
        load_file(path / "model.safetensors")
        for path in (world / "student_init", tmp_path / "without/final", tmp_path / "with/final")
    )
    assert any(weight.dim() == 1 for weight in start.values())
    for name, weight in start.items():
        torch.testing.assert_close(without[name] - decayed[name], 1e-2 * 0.5 * weight, rtol=1e-3, atol=1e-7)
