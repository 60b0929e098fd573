"""grpo.py: advantages and clipping by hand, gradients against float64 and by enumeration, whole runs."""

import argparse
import copy
import itertools
import json
import math
import shutil
from collections import Counter

import pytest
import torch

import grpo
from conftest import killed_in_call, read_rows, run_line, swap_ids, untimed
from distil.artifacts import read_artifact
from distil.models import Response
from distil.sampling import SamplingConfig, sample
from grpo import accumulate_gradients, add_old_logps, advantages_of, policy_loss, rewards_of, train_step
from recipes.toy_world import make_model, make_tokenizer
from runs import training
from runs.flops import tflops

DEFAULTS = {"dtype": "float32", "micro_batch_tokens": 10**6, "normalize": "token", "reward": "correct"}
DEFAULTS |= {"policy": "full", "temperature": 1.0, "top_p": 1.0, "top_k": 0}
DEFAULTS |= {"clip_low": 0.2, "clip_high": 0.2, "updates": 1, "kl_weight": 0.0, "importance_cap": 2.0}
DEFAULTS["lr_schedule"] = "constant"


def settings(**changes):
    return argparse.Namespace(**DEFAULTS | changes)


def test_advantages_by_hand():
    """Mean 0.25, deviation (of a sample) 0.5."""
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0] * 4])
    found = advantages_of(rewards)
    assert found[0].tolist() == pytest.approx([0.75 / 0.5001] + [-0.25 / 0.5001] * 3)
    assert advantages_of(rewards, "none")[0].tolist() == [0.75, -0.25, -0.25, -0.25]
    assert not found[1:].any() and not advantages_of(rewards, "none")[1:].any()


@pytest.mark.parametrize("n", [3, 8, 16])
def test_equal_rewards_have_advantages_of_exactly_zero(n):
    """In float32 the mean of eight times 0.7 is not 0.7."""
    for value in (0.1, 0.3, 0.7, -0.9):
        assert not advantages_of(torch.full((2, n), value)).any()


def test_rewards_are_correct_answers():
    tokenizer = make_tokenizer()
    texts = [["\\boxed{4}<|im_end|>", "4<|im_end|>"], ["\\boxed{4}", "\\boxed{7}<|im_end|>"]]
    groups = [[Response([1], tokenizer(text).input_ids, False) for text in group] for group in texts]
    problems = [{"answer": "4"}, {"answer": "7"}]
    rewards, verdicts = rewards_of(settings(), tokenizer, problems, groups)
    assert rewards.tolist() == verdicts.tolist() == [[1, 0], [0, 1]]


def test_a_reward_of_ones_own(monkeypatch):
    """It sees flags, problem, response with text, and verdict; the share of correct answers is kept too."""
    tokenizer, seen = make_tokenizer(), []

    def short(args, problem, response, verdict):
        seen.append((args.n, problem["id"], response.text, verdict.extracted))
        return verdict.correct - len(response.response_ids) / 10

    monkeypatch.setitem(grpo.REWARDS, "short", short)
    args = grpo.get_args("--model m --data d --out o --reward short --n 2".split())
    texts = "\\boxed{4}<|im_end|>", "4<|im_end|>"
    group = [Response([1], tokenizer(text).input_ids, False) for text in texts]
    rewards, verdicts = rewards_of(args, tokenizer, [{"id": "a", "answer": "4"}], [group])
    assert rewards.tolist() == [pytest.approx([1 - 0.4, -0.2])] and verdicts.tolist() == [[1, 0]]
    assert seen == [(2, "a", "\\boxed{4}", "4"), (2, "a", "4", None)]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_reward_that_is_not_finite_is_refused_by_name(value, monkeypatch, refused):
    monkeypatch.setitem(grpo.REWARDS, "correct", lambda *given: value)
    group = [Response([1], make_tokenizer()("4").input_ids, False)]
    problem = {"id": "train/7", "answer": "4"}
    call = lambda: rewards_of(settings(), make_tokenizer(), [problem], [group])
    refused(call, "--reward correct", "train/7", code=1)


# ratio, advantage -> the term that is maximised, whether it is clipped; by hand, for bounds of 0.9 and 1.3
CLIPPING = [
    (1.0, 2.0, 2.0, False),
    (1.2, 2.0, 2.4, False),
    (1.5, 2.0, 2.6, True),
    (0.5, 2.0, 1.0, False),
    (1.5, -2.0, -3.0, False),
    (0.95, -2.0, -1.9, False),
    (0.5, -2.0, -1.8, True),
    (1.5, 0.0, 0.0, False),
]


@pytest.mark.parametrize("ratio, advantage, term, clipped", CLIPPING)
def test_clipping_by_hand(ratio, advantage, term, clipped):
    """A clipped token has no gradient; that of any other is ratio x advantage. The token's weight is 0.25."""
    args, weight = settings(clip_low=0.1, clip_high=0.3), torch.tensor([0.25])
    logps = torch.tensor([-1.0], requires_grad=True)
    old = logps.detach() - math.log(ratio)
    loss, found = policy_loss(args, logps, old, torch.tensor([advantage]), weight)
    loss.backward()
    assert loss.item() == pytest.approx(-0.25 * term, rel=1e-5) and found.tolist() == [clipped]
    assert logps.grad.item() == pytest.approx(0.0 if clipped else -0.25 * term, rel=1e-5)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(9)
    return make_model(make_tokenizer(), 32, 2, 1).eval()


@pytest.fixture(scope="module")
def others(model):
    """Two models near the first: the policy that sampled, and the reference."""
    torch.manual_seed(10)
    found = [copy.deepcopy(model).requires_grad_(False), copy.deepcopy(model).requires_grad_(False)]
    for other in found:
        for parameter in other.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return found


BATCH = [
    Response([1, 3, 20], [5, 6, 2], False, "a", advantage=0.7),
    Response([1, 3, 20], [9, 0], False, "a", advantage=-0.7),
    Response([1, 9], [7, 8, 9, 10, 11], True, "b", advantage=0.0),
    Response([1], [2], False, "c", advantage=1.2),
]
SAMPLER = [[-2.0, -5.0, -3.5], [-9.0, -2.5], [-3.0, -3.1, -3.2, -3.3, -3.4], [-6.0]]


def log_softmax(model, response):
    """(T, V) of a response's positions, float64."""
    logits = model(input_ids=torch.tensor([response.prompt_ids + response.response_ids])).logits[0].double()
    return logits.log_softmax(-1)[len(response.prompt_ids) - 1 : -1]


def kept_by(args, logps):
    """(T, V) Which tokens transformers' own top-k and top-p keep of a model's log-probabilities."""
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    scores = logps.detach() / args.temperature
    scores = TopKLogitsWarper(args.top_k)(None, scores) if args.top_k else scores
    return (TopPLogitsWarper(args.top_p)(None, scores) if args.top_p < 1 else scores) > -torch.inf


def restricted(args, logps, kept):
    """(T, V) The sampler's log-probabilities, over what is kept."""
    return (logps / args.temperature).masked_fill(~kept, -torch.inf).log_softmax(-1)


def truth(args, model, batch, sampler_model=None, reference=None):
    """The loss of the docstring, term by term in float64, and its metrics."""
    terms, metrics = [], Counter()
    for response in batch:
        whole, row = log_softmax(model, response), []
        whole_old = log_softmax(sampler_model or model, response).detach()
        ref = log_softmax(reference, response).detach() if reference else whole.detach()
        if args.policy == "full":
            full, old, kept = whole, whole_old, kept_by(args, whole)
        else:
            kept, tokens = kept_by(args, whole_old), torch.tensor(response.response_ids)[:, None]
            metrics["outside"] += (~kept.gather(1, tokens)).sum().item()
            kept = kept.scatter(1, tokens, True)
            full, old = restricted(args, whole, kept), restricted(args, whole_old, kept)
        s = restricted(args, whole, kept)
        metrics["sampler_kl"] += torch.where(kept, s.exp() * (s - whole), 0).sum().item()
        for t, token in enumerate(response.response_ids):
            ratio, weight = torch.exp(full[t, token] - old[t, token]), 1.0
            if response.sampler_logps:
                log_ratio = (old[t, token] - response.sampler_logps[t]).item()
                metrics["mismatch"] += abs(log_ratio)
                weight = min(math.exp(log_ratio), args.importance_cap) if args.importance_cap else 1.0
            bounded = ratio.clamp(1 - args.clip_low, 1 + args.clip_high) * response.advantage
            plain = ratio * response.advantage
            metrics["clip_fraction"] += int(bounded < plain)
            metrics["entropy"] -= (whole[t].exp() * whole[t]).sum().item()
            kl = (whole[t].exp() * (whole[t] - ref[t])).sum()
            metrics["reference_kl"] += kl.item()
            row.append(-weight * torch.minimum(plain, bounded) + args.kl_weight * kl)
        terms.append(torch.stack(row))
    means = torch.cat(terms) if args.normalize == "token" else torch.stack([row.mean() for row in terms])
    return means.mean(), metrics


@pytest.mark.parametrize("budget", [1, 10**6])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"normalize": "sequence"},
        {"old": True},
        {"old": True, "clip_low": 0.01, "clip_high": 0.02},
        {"sampler": True},
        {"sampler": True, "importance_cap": 0.0},
        {"kl_weight": 0.3},
        {"old": True, "sampler": True, "kl_weight": 0.3, "normalize": "sequence", "clip_high": 0.01},
        {"temperature": 0.7, "top_p": 0.8},
        {"policy": "truncated"},
        {"policy": "truncated", "temperature": 0.7, "top_p": 0.8, "sampler": True},
        {"policy": "truncated", "temperature": 1.5, "kl_weight": 0.3, "normalize": "sequence", "old": True},
        {"policy": "truncated", "top_p": 0.8, "top_k": 20, "old": True, "sampler": True, "kl_weight": 0.3},
    ],
)
def test_loss_gradient_and_metrics_are_those_of_full_logits(model, others, budget, changes):
    """Without changes it is REINFORCE over all 11 tokens; those without an advantage count in the mean."""
    chosen = {name: value for name, value in changes.items() if name in DEFAULTS}
    args = settings(micro_batch_tokens=budget, **chosen)
    batch, reference = BATCH, others[1] if args.kl_weight else None
    if "sampler" in changes:
        batch = [response._replace(sampler_logps=logps) for response, logps in zip(batch, SAMPLER)]
    sampler_model = others[0] if "old" in changes else None
    model.zero_grad(set_to_none=True)
    marked = add_old_logps(args, sampler_model, 29, batch) if sampler_model else batch
    metrics = accumulate_gradients(args, model, reference, 29, marked)
    value = metrics.pop("loss")
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    loss, expected = truth(args, model, batch, sampler_model, reference)
    loss.backward()
    assert value == pytest.approx(loss.item(), rel=1e-5, abs=1e-7)
    optional = {"mismatch"} if "sampler" in changes else set()
    optional |= {"reference_kl"} if reference else set()
    if {"temperature", "top_p"} & changes.keys():
        optional |= {"sampler_kl", "outside"} if args.policy == "truncated" else {"sampler_kl"}
        assert expected["sampler_kl"] > 0.01
    assert metrics.keys() == {"entropy", "clip_fraction"} | optional
    for name, value in metrics.items():
        assert value == pytest.approx(expected[name], rel=1e-5, abs=1e-5), name  # sums over tokens
    assert (metrics["clip_fraction"] > 0) == ("old" in changes)  # both cases were met
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=2e-5, atol=2e-6)


def all_responses(length):
    """(5^length, 2 + length) A prompt of two tokens with every response from a vocabulary of five."""
    return torch.tensor([[1, 3, *tokens] for tokens in itertools.product(range(5), repeat=length)])


def chances(args, rows, model, sampled_from=None):
    """(R,) The sampler's probability of each response, with gradient. sampled_from: whose sets it keeps."""

    def whole(model):
        return model(input_ids=rows).logits[:, 1:-1, :5].flatten(0, 1).log_softmax(-1)

    logps = restricted(args, whole(model), kept_by(args, whole(sampled_from or model)))
    return logps.gather(1, rows[:, 2:].reshape(-1, 1)).view(len(rows), -1).sum(1).exp()


def expected_gradient(args, rows, model, sampler, rewards, sampled_from=None):
    """Of the loss, over all groups of two responses, each with its chance of being sampled.

    The loss is linear in the advantages, so they can be averaged first. sampled_from: a model that sampled,
    if it is not the model."""
    pairs = torch.cartesian_prod(rewards, rewards)
    advantages = advantages_of(pairs, "none")[:, 0].view(len(rows), -1) @ sampler
    scaled = len(rows) * sampler * advantages  # the loss is a mean over all that are passed
    pairs = zip(rows.tolist(), scaled.tolist())
    batch = [Response(row[:2], row[2:], True, advantage=advantage) for row, advantage in pairs]
    batch = add_old_logps(args, sampled_from, 5, batch) if sampled_from else batch
    model.zero_grad(set_to_none=True)
    accumulate_gradients(args, model, None, 5, batch)
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def gradient_of(value, model):
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))])


@pytest.fixture(scope="module")
def sharp_models(model):
    """Two models in float64 whose distributions are far from uniform and from each other."""
    torch.manual_seed(11)
    found = [copy.deepcopy(model).double(), copy.deepcopy(model).double()]
    for one in found:
        for parameter in one.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return found


# temperature, top-p, top-k
SAMPLERS = [(1.0, 0.7, 0), (0.6, 1.0, 0), (1.0, 1.0, 2), (1.4, 0.8, 4)]


@pytest.mark.parametrize("temperature, top_p, top_k", SAMPLERS)
def test_the_truncated_policy_climbs_the_samplers_expected_reward(sharp_models, temperature, top_p, top_k):
    """By enumeration in float64: the mean gradient of the loss is minus that of the expected reward, over the
    3 tokens and with 1/2 for the mean of a group of 2, which contains oneself. The full policy's is not."""
    args = settings(policy="truncated", temperature=temperature, top_p=top_p, top_k=top_k, dtype=None)
    rows, model = all_responses(3), sharp_models[0]
    rewards = torch.rand(125, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sampler = chances(args, rows, model)
    assert sampler.sum().item() == pytest.approx(1)
    exact = -gradient_of(sampler @ rewards, model) / 3 / 2
    given = rows, model, sampler.detach(), rewards
    torch.testing.assert_close(expected_gradient(args, *given), exact, rtol=1e-5, atol=1e-8)
    args.policy = "full"
    error = (expected_gradient(args, *given) - exact).norm() / exact.norm()
    print(f"full policy: {error:.0%} off")
    assert error > 0.05


@pytest.mark.parametrize("temperature, top_p, top_k", SAMPLERS)
def test_later_updates_climb_on_the_sets_that_were_sampled_from(sharp_models, temperature, top_p, top_k):
    """Responses of a token: without clipping, the ratio makes the old weights' samples those of the new
    weights on the old sets. Those are not the new weights' sets."""
    args = settings(policy="truncated", temperature=temperature, top_p=top_p, top_k=top_k, dtype=None)
    args.clip_low, args.clip_high = 1.0, 1e9
    rows, (old, model) = all_responses(1), sharp_models
    rewards = torch.rand(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = -gradient_of(chances(args, rows, model, old) @ rewards, model) / 2
    found = expected_gradient(args, rows, model, chances(args, rows, old).detach(), rewards, old)
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-8)
    own = -gradient_of(chances(args, rows, model) @ rewards, model) / 2
    assert ((found - own).norm() > 0.05 * own.norm()) == (top_p < 1 or top_k > 0)


def test_equal_groups_have_no_gradient(model):
    model.zero_grad(set_to_none=True)
    batch = [r._replace(advantage=0.0) for r in BATCH]
    metrics = accumulate_gradients(settings(), model, None, 29, batch)
    assert metrics["loss"] == 0.0 and metrics["entropy"] > 0
    assert all(p.grad is None for p in model.parameters())


def test_updates_go_through_the_batch_against_the_policy_that_sampled(model):
    """Two updates of SGD by hand. The second group's ratio is to the weights before the first update."""
    groups = [[BATCH[0], BATCH[1]], [BATCH[2]._replace(advantage=-1.0), BATCH[3]]]
    args = settings(updates=2, lr=0.5, warmup=0.0, steps=1, max_grad_norm=1e9, clip_low=0.05, clip_high=0.05)
    ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
    run = argparse.Namespace(model=ours, optimizer=torch.optim.SGD(ours.parameters()), vocab_size=29)
    metrics = train_step(args, run, None, groups, 0)
    optimizer, losses, clipped = torch.optim.SGD(theirs.parameters(), lr=0.5), [], 0
    for group in groups:
        loss, found = truth(args, theirs, group, sampler_model=model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        clipped += found["clip_fraction"]
    assert metrics["loss"] == pytest.approx(sum(losses) / 2, rel=1e-4)
    assert metrics["clip_fraction"] == pytest.approx(clipped / 11) and clipped
    for mine, p in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(mine, p, rtol=1e-4, atol=1e-5)


def test_cost_of_an_update(model):
    """In forward passes: 3 with gradient or 1 without, 1 more before several updates, 1 of the reference."""
    one = tflops(model.config.to_dict(), 3, 3, forwards=1)

    def passes(response, reference=None, **changes):
        run = argparse.Namespace(config=model.config.to_dict(), spent=Counter())
        grpo.add_costs(settings(**changes), run, reference, [], [response])
        assert run.spent["tflops"] == run.spent["tflops_uncached"]
        return run.spent["tflops"] / one

    idle = BATCH[0]._replace(advantage=0.0)
    found = [passes(BATCH[0]), passes(idle), passes(idle, updates=4), passes(idle, model, kl_weight=0.1)]
    assert found == pytest.approx([3, 1, 2, 4])


def test_a_bandit_learns():
    """One problem, one token, reward 1 for an odd digit: in 40 steps its probability rises above 0.9."""
    torch.manual_seed(9)
    model = make_model(make_tokenizer(), 32, 1, 1).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    odd, prompt = [i + 11 for i in (1, 3, 5, 7, 9)], [1, 3, 20]
    assert make_tokenizer().convert_ids_to_tokens(odd) == list("13579")
    limits = {"top_p": 1.0, "top_k": 0, "max_response_tokens": 1, "stop_ids": [0, 2], "vocab_size": 29}
    sampling = SamplingConfig(n=32, temperature=1.0, **limits)

    def chance():
        with torch.no_grad():
            return model(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(-1)[odd].sum().item()

    assert chance() < 0.4
    for step in range(40):
        [group] = sample(model, [prompt], sampling, seed=step)
        rewards = torch.tensor([[float(one.response_ids[0] in odd) for one in group]])
        advantages = advantages_of(rewards)[0].tolist()
        batch = [one._replace(advantage=advantage) for one, advantage in zip(group, advantages)]
        accumulate_gradients(settings(), model, None, 29, batch)
        optimizer.step()
        optimizer.zero_grad()
    assert chance() > 0.9


# ------------------------------------------------------------------------------------------------------------
# Whole runs


def run(world, out, more=""):
    models = (
        f"--model {world}/student_init --data {world}/train.jsonl --out {out} --engine hf --dtype float32"
    )
    run_line(grpo, f"{models} --steps 2 --batch_size 2 --n 4 --max_response_tokens 6 {more}")


def weights(model):
    return (model / "model.safetensors").read_bytes()


def reward_the_first(args, tokenizer, problems, groups):
    """Rewards that an untrained model gets, never all of a group alike: 1 for the first of each group."""
    rewards = torch.tensor([[1.0] + [0.0] * (len(group) - 1) for group in groups])
    return rewards, rewards


def reward_nothing(args, tokenizer, problems, groups):
    rewards = torch.zeros(len(groups), len(groups[0]))
    return rewards, rewards


def test_a_run_keeps_the_cell_it_started_from(world, tmp_path, monkeypatch):
    monkeypatch.setattr(grpo, "rewards_of", reward_the_first)
    shutil.copytree(world / "student_init", tmp_path / "start")
    cell = {"name": "student prefix, mix 0.8 KL", "prefix": "student", "kl": "mix 0.8"}
    checkpoint = {"run": "a", "cell": cell, "step": 5, "tflops": 0.5}
    (tmp_path / "start/checkpoint.json").write_text(json.dumps(checkpoint))
    run(world, tmp_path / "run", f"--model {tmp_path}/start")
    cell["name"] += ", then GRPO"
    assert read_artifact(str(tmp_path / "run"), "--", "grpo")["cell"] == cell
    checkpoint = json.loads((tmp_path / "run/final/checkpoint.json").read_text())
    assert checkpoint["cell"] == cell and checkpoint["step"] == 2 and checkpoint["tflops"] > 0
    rows = read_rows(tmp_path / "run/metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert row["reward"] == 0.25 and row["equal_groups"] == 0 and row["grad_norm"] > 0


def test_untrained_checkpoints_and_equal_groups(world, tmp_path, monkeypatch, capsys):
    """All rewards 0: counted, said once, no gradient, weights unchanged. Such a run can be resumed too."""
    monkeypatch.setattr(grpo, "rewards_of", reward_nothing)
    run(world, tmp_path / "run", "--save_every 1")
    assert read_artifact(str(tmp_path / "run"), "--", "grpo")["cell"]["prefix"] == "-"
    for row in read_rows(tmp_path / "run/metrics.jsonl"):
        assert row["equal_groups"] == 1 and row["grad_norm"] == 0 and row["reward"] == row["trained"] == 0
    said = capsys.readouterr().out
    assert said.count("WARNING") == 1 and "WARNING: step 1 trains on nothing" in said
    assert said.count("trained 0 ") == 2
    assert weights(tmp_path / "run/final") == weights(world / "student_init")


@pytest.mark.parametrize("rewards", [reward_the_first, reward_nothing])
def test_a_killed_run_continues_to_the_same_end(world, tmp_path, monkeypatch, rewards):
    monkeypatch.setattr(grpo, "rewards_of", rewards)
    whole, out = tmp_path / "whole", tmp_path / "again/whole"  # the same name: checkpoints hold the run's
    run(world, whole, "--steps 3 --save_every 1")
    with killed_in_call(3, training, "optimizer_step"):
        run(world, out, "--steps 3 --save_every 1")
    run(world, out, "--steps 3 --save_every 1 --resume")
    assert weights(out / "final") == weights(whole / "final")
    assert untimed(out / "metrics.jsonl") == untimed(whole / "metrics.jsonl")


def test_a_run_with_every_choice_resumes_to_the_same_end(world, tmp_path, monkeypatch):
    """Two updates a batch, a reference, truncated responses masked, means over responses, no scaling, the
    truncated policy."""
    monkeypatch.setattr(grpo, "rewards_of", reward_the_first)
    more = "--updates 2 --kl_weight 0.1 --overlong mask --normalize sequence --scale_advantages none"
    more += " --save_every 1 --lr 0.001 --max_response_tokens 12 --policy truncated"
    whole, out = tmp_path / "whole", tmp_path / "again/whole"
    run(world, whole, more)
    first, second = read_rows(whole / "metrics.jsonl")
    assert 0 < first["truncated"] < 1 and first["entropy"] > 0
    assert 0 <= first["reference_kl"] < second["reference_kl"]  # the reference stays where the model started
    assert first["outside"] == second["outside"] == 0 and first["sampler_kl"] > 0.01
    with killed_in_call(2, grpo, "train_step"):
        run(world, out, more)
    run(world, out, f"{more} --resume")
    assert weights(out / "final") == weights(whole / "final")


def test_masked_responses_carry_no_loss_but_their_rewards_count(world, tmp_path, monkeypatch):
    """One response of each group ends and gets the reward; its advantage is 0.75 with or without the rest."""
    monkeypatch.setattr(grpo, "rewards_of", reward_the_first)

    def with_logps(self, prompts, sampling, seed):
        assert sampling.logprobs == "raw"  # vLLM is asked for the full policy's
        ends = Response([1], [5, 2], False, sampler_logps=[-1.0, -2.0])
        goes_on = Response([1], [6, 7, 8], True, sampler_logps=[-3.0] * 3)
        return [[ends, *[goes_on] * 3] for _ in prompts]

    monkeypatch.setattr(training.Run, "sample", with_logps)
    steps = []
    record = lambda args, run, reference, groups, step: steps.append(groups) or {"grad_norm": 1.0}
    monkeypatch.setattr(grpo, "train_step", record)
    for word in ("keep", "mask"):
        more = "--steps 1 --scale_advantages none --log_every 2"
        run(world, tmp_path / word, f"{more} --overlong {word}")
        [row] = read_rows(tmp_path / word / "metrics.jsonl")
        assert row["truncated"] == 0.75 and row["reward"] == 0.25 and row["response_length"] == 2.75
        assert row["trained"] == {"keep": 1, "mask": 0.25}[word]
    kept, masked = [[[r.advantage for r in group] for group in groups] for groups in steps]
    assert kept == [[0.75, -0.25, -0.25, -0.25]] * 2 and masked == [[0.75]] * 2
    assert all(group[0].sampler_logps == [-1.0, -2.0] for groups in steps for group in groups)


@pytest.mark.parametrize("more", ["", "--kl_weight 0.1 --updates 2"])
def test_a_step_whose_responses_are_all_masked_is_said_to_train_on_nothing(
    more, world, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(grpo, "rewards_of", reward_the_first)
    goes_on = lambda self, prompts, *given: [[Response([1], [6, 7, 8], True)] * 4 for _ in prompts]
    monkeypatch.setattr(training.Run, "sample", goes_on)
    run(world, tmp_path / "run", f"--overlong mask {more}")
    assert [row["trained"] for row in read_rows(tmp_path / "run/metrics.jsonl")] == [0, 0]
    said = capsys.readouterr().out
    assert said.count("WARNING") == 1 and "WARNING: step 1 trains on nothing" in said
    assert weights(tmp_path / "run/final") == weights(world / "student_init")


def test_a_batch_of_which_nothing_is_left_changes_nothing(model):
    run = argparse.Namespace(model=model, optimizer=torch.optim.SGD(model.parameters()), vocab_size=29)
    before = copy.deepcopy(model.state_dict())
    args = settings(lr=0.5, warmup=0.0, steps=1, max_grad_norm=1.0)
    assert train_step(args, run, None, [[], []], 0) == {"loss": 0.0, "grad_norm": 0.0, "lr": 0.5}
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_reference_with_another_tokenizer_is_refused(world, tmp_path, refused):
    shutil.copytree(world / "student_init", tmp_path / "other")
    swap_ids(tmp_path / "other", "a", "b")
    for reference in ("other", "absent"):
        more = f"--kl_weight 1 --reference {tmp_path}/{reference}"
        refused(lambda: run(world, tmp_path / "out", more), "--reference")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "line, word",
    [
        ("--n 1", "--n"),
        ("--steps 0", "--steps"),
        ("--eval_every 1", "--eval_data"),
        ("--temperature 0", "--temperature"),
        ("--updates 5", "--updates"),
        ("--updates 0", "--updates"),
        ("--clip_low 1.5", "--clip_low"),
        ("--clip_high -1", "--clip_high"),
        ("--kl_weight -1", "--kl_weight"),
        ("--importance_cap -1", "--importance_cap"),
        ("--reference m", "--reference"),
        ("--scale_advantages batch", "--scale_advantages"),
        ("--normalize 0", "--normalize"),
        ("--overlong drop", "--overlong"),
        ("--policy whole", "--policy"),
    ],
)
def test_bad_flags_are_refused(line, word, refused):
    message = refused(lambda: grpo.get_args(f"--model m --data d --out o {line}".split()))
    assert word in message.split("error:")[1]


def test_bad_input_is_refused_and_leaves_no_directory(world, tmp_path, refused):
    for more, word in [
        (f"--model {tmp_path}/absent", "--model"),
        ("--data gsm9k", "gsm9k"),
        ("--max_response_tokens 600", "context of 512"),
        (f"--eval_every 1 --eval_data {tmp_path}/absent.jsonl", "absent.jsonl"),
    ]:
        refused(lambda: run(world, tmp_path / "out", more), word)
        assert not (tmp_path / "out").exists()
