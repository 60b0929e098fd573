"""grpo.py: advantages by hand, the policy gradient against REINFORCE on full logits, a bandit that learns, whole runs."""
import argparse
import json
import math

import pytest
import torch

import grpo
from artifacts import read_artifact
from grpo import accumulate_gradients, advantages_of, policy_loss, rewards_of
from recipes.toy_world import make_model, make_tokenizer
from rollout import Sample, Sampling, sample

ARGS = argparse.Namespace(dtype="float32", micro_batch_tokens=10 ** 6)


def test_advantages_by_hand():
    """Mean 0.25, deviation (of a sample) 0.5."""
    found = advantages_of(torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0] * 4]))
    assert found[0].tolist() == pytest.approx([0.75 / 0.5001] + [-0.25 / 0.5001] * 3)
    assert not found[1:].any()


def test_rewards_are_correct_answers():
    tokenizer = make_tokenizer()
    groups = [[Sample(tokenizer(text).input_ids, "stop") for text in texts]
              for texts in (["\\boxed{4}<|im_end|>", "4<|im_end|>"], ["\\boxed{4}", "\\boxed{7}<|im_end|>"])]
    assert rewards_of(tokenizer, [{"answer": "4"}, {"answer": "7"}], groups).tolist() == [[1, 0], [0, 1]]


def test_policy_loss_and_its_slope_at_ratios_other_than_one():
    logps = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    old, advantages = torch.tensor([-1.5, -2.0, -0.25]), torch.tensor([1.0, -2.0, 0.5])
    loss = policy_loss(logps, old, advantages, total_tokens=10)
    loss.backward()
    ratio = [math.exp(0.5), 1.0, math.exp(-0.25)]
    assert loss.item() == pytest.approx(-(ratio[0] - 2 * ratio[1] + 0.5 * ratio[2]) / 10, rel=1e-5)
    assert logps.grad.tolist() == pytest.approx([-ratio[0] / 10, 2 * ratio[1] / 10, -0.5 * ratio[2] / 10])


BATCH = [([1, 3, 20], [5, 6, 2], 0.7), ([1, 3, 20], [9, 0], -0.7), ([1, 9], [7, 8, 9, 10, 11], 0.0), ([1], [2], 1.2)]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(9)
    return make_model(make_tokenizer(), 32, 2, 1).eval()


@pytest.mark.parametrize("budget", [1, 10 ** 6])
def test_gradient_is_reinforce_over_all_response_tokens(model, budget):
    """-sum A log pi(y) / 11: the response without an advantage has no gradient, but its 5 tokens count in the mean."""
    model.zero_grad(set_to_none=True)
    accumulate_gradients(argparse.Namespace(dtype="float32", micro_batch_tokens=budget), model, BATCH, 29)
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    for prompt, response, advantage in BATCH:
        logps = model(input_ids=torch.tensor([prompt + response])).logits[0].double().log_softmax(-1)[len(prompt) - 1:-1]
        (-advantage * logps[torch.arange(len(response)), response].sum() / 11).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=2e-5, atol=2e-6)


def test_equal_groups_have_no_gradient(model):
    model.zero_grad(set_to_none=True)
    assert accumulate_gradients(ARGS, model, [(p, r, 0.0) for p, r, _ in BATCH], 29) == 0.0
    assert all(p.grad is None for p in model.parameters())


def test_a_bandit_learns():
    """One problem, one token: reward 1 for an odd digit. 40 steps raise its probability from about 5 / 29 to above 0.9."""
    torch.manual_seed(9)
    model = make_model(make_tokenizer(), 32, 1, 1).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    odd, prompt = [i + 11 for i in (1, 3, 5, 7, 9)], [1, 3, 20]
    assert make_tokenizer().convert_ids_to_tokens(odd) == list("13579")
    sampling = Sampling(n=32, temperature=1.0, top_p=1.0, top_k=0, max_response_tokens=1, stop_ids=[0, 2], vocab_size=29)

    def chance():
        with torch.no_grad():
            return model(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(-1)[odd].sum().item()
    assert chance() < 0.4
    for step in range(40):
        [group] = sample(model, [prompt], sampling, seed=step)
        rewards = torch.tensor([[float(ids[0] in odd) for ids, _ in group]])
        accumulate_gradients(ARGS, model, [(prompt, ids, a) for (ids, _), a in zip(group, advantages_of(rewards)[0].tolist())], 29)
        optimizer.step()
        optimizer.zero_grad()
    assert chance() > 0.9

# ---------------------------------------------------------------------------------------------------------------------
# Whole runs


def run(world, out, *more):
    given = ["--model", world / "student_init", "--data", world / "train.jsonl", "--out", out,
             *"--steps 2 --batch_size 2 --n 4 --engine hf --dtype float32 --max_response_tokens 6".split(), *more]
    grpo.main(grpo.get_args([str(word) for word in given]))


def read_rows(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def reward_short_responses(tokenizer, problems, groups):
    """Rewards that an untrained model gets often, and never all of a group alike: 1 for the first of each group."""
    return torch.tensor([[1.0] + [0.0] * (len(group) - 1) for group in groups])


def test_a_run_keeps_the_cell_it_started_from(world, tmp_path, monkeypatch):
    import shutil
    monkeypatch.setattr(grpo, "rewards_of", reward_short_responses)
    shutil.copytree(world / "student_init", tmp_path / "start")
    cell = {"name": "student prefix, mix 0.8 KL", "prefix": "student", "kl": "mix 0.8"}
    (tmp_path / "start/checkpoint.json").write_text(json.dumps({"cell": cell}))
    run(world, tmp_path / "run", "--model", tmp_path / "start")
    cell["name"] += ", then GRPO"
    assert read_artifact(str(tmp_path / "run"), "--", "grpo")["cell"] == cell
    checkpoint = json.loads((tmp_path / "run/final/checkpoint.json").read_text())
    assert checkpoint["cell"] == cell and checkpoint["step"] == 2 and checkpoint["tflops"] > 0
    rows = read_rows(tmp_path / "run/metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2] and all(row["reward"] == 0.25 and row["equal_groups"] == 0 for row in rows)
    assert all(row["grad_norm"] > 0 for row in rows)


def test_untrained_checkpoints_and_equal_groups(world, tmp_path, monkeypatch):
    """All rewards 0: counted, no gradient, weights as they were; and such a run can be resumed."""
    monkeypatch.setattr(grpo, "rewards_of", lambda tokenizer, problems, groups: torch.zeros(len(groups), len(groups[0])))
    run(world, tmp_path / "run", "--save_every", 1)
    assert read_artifact(str(tmp_path / "run"), "--", "grpo")["cell"]["prefix"] == "-"
    for row in read_rows(tmp_path / "run/metrics.jsonl"):
        assert row["equal_groups"] == 1 and row["grad_norm"] == 0 and row["reward"] == 0
    assert (tmp_path / "run/final/model.safetensors").read_bytes() == (world / "student_init/model.safetensors").read_bytes()


class Killed(Exception):
    pass


@pytest.mark.parametrize("rewards", [reward_short_responses, lambda t, p, groups: torch.zeros(len(groups), len(groups[0]))])
def test_a_killed_run_continues_to_the_same_end(world, tmp_path, monkeypatch, rewards):
    monkeypatch.setattr(grpo, "rewards_of", rewards)
    more = ["--steps", 3, "--save_every", 1]
    run(world, tmp_path / "whole", *more)
    (tmp_path / "again").mkdir()
    out, step_of = tmp_path / "again/whole", grpo.optimizer_step

    def killed_in_step_3(args, model, optimizer, step, ids):
        if step == 2:
            raise Killed
        return step_of(args, model, optimizer, step, ids)
    with monkeypatch.context() as patch:
        patch.setattr(grpo, "optimizer_step", killed_in_step_3)
        with pytest.raises(Killed):
            run(world, out, *more)
    run(world, out, *more, "--resume")
    assert (out / "final/model.safetensors").read_bytes() == (tmp_path / "whole/final/model.safetensors").read_bytes()

    def rows(path):
        return [{k: v for k, v in row.items() if "second" not in k} for row in read_rows(path / "metrics.jsonl")]
    assert rows(out) == rows(tmp_path / "whole")


@pytest.mark.parametrize("line, word", [("--n 1", "--n"), ("--steps 0", "--steps"), ("--eval_every 1", "--eval_data")])
def test_bad_flags_are_refused(line, word, refused):
    assert word in refused(lambda: grpo.get_args(["--model", "m", "--data", "d", "--out", "o", *line.split()])).split("error:")[1]


def test_bad_input_is_refused_and_leaves_no_directory(world, tmp_path, refused):
    for more, word in [(["--model", tmp_path / "absent"], "--model"), (["--data", "gsm9k"], "gsm9k"),
                       (["--max_response_tokens", 600], "context of 512"),
                       (["--eval_every", 1, "--eval_data", tmp_path / "absent.jsonl"], "absent.jsonl")]:
        refused(lambda: run(world, tmp_path / "out", *more), word)
        assert not (tmp_path / "out").exists()
