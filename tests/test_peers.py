"""Other projects' packages as judges. `python -m pytest -m peer -rs` lists those not installed."""

import argparse

import pytest
import torch

from distil.models import Response
from grpo import accumulate_gradients
from recipes.toy_world import make_model, make_tokenizer
from streaming_kl import streaming_kl

pytestmark = pytest.mark.peer

PROMPTS = [[1, 3, 20], [1, 3, 20], [1, 9], [1]]
TOKENS = [[5, 6, 2], [9, 0], [7, 8, 9, 10, 11], [2]]
ADVANTAGES = [0.7, -0.7, 0.0, 1.2]
SAMPLER = [[-2.0, -5.0, -3.5], [-9.0, -2.5], [-3.0, -3.1, -3.2, -3.3, -3.4], [-6.0]]


def padded(rows, side, dtype=torch.long):
    """(B, T) and its mask of ones. TRL pads prompts on the left and responses on the right."""
    width = max(map(len, rows))
    fill = [[0] * (width - len(row)) for row in rows]
    ones = [[1] * len(row) for row in rows]
    join = (lambda zeros, row: zeros + row) if side == "left" else (lambda zeros, row: row + zeros)
    values, mask = list(map(join, fill, rows)), list(map(join, fill, ones))
    return torch.tensor(values, dtype=dtype), torch.tensor(mask)


@pytest.mark.parametrize("normalize", ["token", "sequence"])
@pytest.mark.parametrize("moved", [False, True])  # whether the policy has left the one that sampled
@pytest.mark.parametrize("sampler", [False, True])  # whether vLLM's log-probabilities are known
def test_grpo_loss_and_gradient_are_trls(normalize, moved, sampler, tmp_path, record_property):
    """TRL's dapo is a mean over tokens, its grpo over responses. No KL: TRL only estimates it."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    record_property("trl", trl.__version__)
    torch.manual_seed(9)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, 32, 2, 1).eval()
    old = [-3.2 + 0.5 * torch.randn(len(tokens)) for tokens in TOKENS] if moved else None
    off = {"beta": 0.0, "bf16": False, "report_to": [], "gradient_checkpointing": False}
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "vllm_importance_sampling_correction": True}
    settings |= {"epsilon": 0.2, "epsilon_high": 0.28, "num_generations": 2, "per_device_train_batch_size": 4}
    loss_type = {"token": "dapo", "sequence": "grpo"}[normalize]
    config = trl.GRPOConfig(loss_type=loss_type, temperature=1.0, **settings, **off)
    no_reward = lambda completions, **_: [0.0] * len(completions)
    data = datasets.Dataset.from_dict({"prompt": ["a=1"] * 4})
    trainer = trl.GRPOTrainer(model, no_reward, config, data, processing_class=tokenizer)
    trainer.use_vllm = sampler  # only the loss asks: nothing is sampled here
    model.eval()
    inputs = dict(zip(("prompt_ids", "prompt_mask"), padded(PROMPTS, "left")))
    inputs |= dict(zip(("completion_ids", "completion_mask"), padded(TOKENS, "right")))
    count = torch.tensor(sum(map(len, TOKENS)))
    inputs |= {"advantages": torch.tensor(ADVANTAGES), "num_items_in_batch": count}
    if moved:
        inputs["old_per_token_logps"] = padded([row.tolist() for row in old], "right", torch.float32)[0]
    if sampler:
        now = old if moved else own_logps(model)
        ratios = [torch.exp(a - torch.tensor(b)).clamp(max=2.0).tolist() for a, b in zip(now, SAMPLER)]
        inputs["importance_sampling_ratio"] = padded(ratios, "right", torch.float32)[0]
    expected = trainer._compute_loss(model, inputs)
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    metrics = {name: values[-1] for name, values in trainer._metrics["eval"].items()}
    model.zero_grad(set_to_none=True)

    args = {"dtype": "float32", "micro_batch_tokens": 10**6, "normalize": normalize, "importance_cap": 2.0}
    args |= {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
    args = argparse.Namespace(**args, clip_low=0.2, clip_high=0.28, kl_weight=0.0)
    batch = []
    for i, (prompt, tokens) in enumerate(zip(PROMPTS, TOKENS)):
        known = {"sampler_logps": SAMPLER[i] if sampler else None, "old_logps": old[i] if moved else None}
        batch.append(Response(prompt, tokens, False, advantage=ADVANTAGES[i], **known))
    sums = accumulate_gradients(args, model, None, len(tokenizer), batch)
    assert sums["loss"] == pytest.approx(expected.item(), rel=1e-5, abs=1e-7)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=2e-5, atol=2e-6)
    assert sums["entropy"] / 11 == pytest.approx(metrics["entropy"], rel=1e-5)
    assert sums["clip_fraction"] / 11 == pytest.approx(metrics["clip_ratio/region_mean"])
    assert bool(sums["clip_fraction"]) == moved


@torch.no_grad()
def own_logps(model):
    found = []
    for prompt, tokens in zip(PROMPTS, TOKENS):
        logits = model(input_ids=torch.tensor([prompt + tokens])).logits[0]
        logps = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        found.append(logps[torch.arange(len(tokens)), tokens])
    return found


@pytest.mark.parametrize("beta, fkl_weight", [(0.0, 1.0), (1.0, 0.0)])
def test_the_kls_and_their_gradients_are_trls_at_the_ends(beta, fkl_weight, record_property):
    """GKD's generalised Jensen-Shannon divergence is forward KL at beta 0 and reverse KL at beta 1."""
    trl = pytest.importorskip("trl")
    gkd = pytest.importorskip("trl.experimental.gkd")
    record_property("trl", trl.__version__)
    torch.manual_seed(4)
    student, teacher = 3 * torch.randn(2, 4, 1000), 3 * torch.randn(2, 4, 1000)
    labels = torch.tensor([[1, 1, -100, 1], [-100, 1, 1, 1]])
    theirs, ours = student.clone().requires_grad_(), student.clone().requires_grad_()
    loss = gkd.GKDTrainer.generalized_jsd_loss(theirs, teacher, labels, beta=beta)
    loss.backward()
    weight = (labels.view(-1) > 0).float()
    ours_flat, teacher_flat = ours.view(-1, 1000), teacher.view(-1, 1000)
    out = streaming_kl(ours_flat, teacher_flat, fkl_weight=fkl_weight, weight=weight, reduction="mean")
    out.loss.backward()
    torch.testing.assert_close(out.loss, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7)
