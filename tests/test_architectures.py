"""Tiny random models of many families: every stage is exact with them, or refuses them in one line."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

import evaluate
import grpo
import rollout
import score_teacher
import train
from conftest import killed_in_call, read_rows, run_line
from distil.sampling import SamplingConfig, sample
from recipes.toy_world import make_tokenizer
from runs import training
from runs.flops import flops_per_token

SIZES = {"vocab_size": 29, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
HEAD = SIZES | {"head_dim": 8}
GPT = {"vocab_size": 29, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
GPT |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS = {"num_experts_per_tok": 2, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4}
EXPERTS |= {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
STATE = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}
LATENT = {"n_group": 1, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8}
LATENT |= {"qk_nope_head_dim": 8, "v_head_dim": 12, "first_k_dense_replace": 1, "num_key_value_heads": 4}
LINEAR = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2}
LINEAR |= {"linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention"]}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}

FAMILIES = {
    "llama": HEAD,
    "llama, tied": HEAD | {"tie_word_embeddings": True},
    "qwen2": SIZES,
    "qwen3": HEAD,
    "mistral": HEAD | {"sliding_window": 4},
    "gemma": HEAD,
    "gemma3_text": HEAD | {"sliding_window": 4},
    "gemma3": {"text_config": HEAD, "vision_config": VISION},
    "phi3": SIZES,
    "gpt2": GPT,
    "gpt_neo": SIZES | {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "gpt_neox": SIZES,
    "bloom": GPT | {"hidden_size": 32},
    "opt": SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "falcon": SIZES,
    "mpt": {"vocab_size": 29, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 256},
    "stablelm": SIZES,
    "starcoder2": SIZES,
    "olmo2": SIZES,
    "cohere": SIZES | {"logit_scale": 0.3},
    "cohere2": SIZES | {"logit_scale": 0.3},
    "granite": SIZES | {"logits_scaling": 3.0},
    "granitemoe": SIZES | EXPERTS | {"logits_scaling": 3.0},
    "mixtral": SIZES | EXPERTS,
    "qwen2_moe": SIZES | EXPERTS,
    "qwen3_moe": HEAD | EXPERTS,
    "olmoe": SIZES | EXPERTS,
    "deepseek_v3": SIZES | EXPERTS | LATENT,
    "gpt_oss": HEAD | EXPERTS,
    "mamba": SIZES | {"state_size": 8, "time_step_rank": 4},
    "mamba2": SIZES | {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    "falcon_h1": HEAD | STATE | {"mamba_d_ssm": 64, "lm_head_multiplier": 0.3},
    "jamba": SIZES | EXPERTS | {"mamba_d_state": 8, "attn_layer_period": 2, "attn_layer_offset": 1},
    "qwen3_next": HEAD | EXPERTS | LINEAR,
    "bamba": SIZES | STATE | {"attn_layer_indices": [1]},
    "minimax": HEAD | EXPERTS,
    "smollm3": HEAD,
    "exaone4": HEAD,
    "glm4": HEAD,
    "hunyuan_v1_dense": HEAD,
    "nemotron": HEAD,
    "ernie4_5": HEAD,
    "lfm2": SIZES | {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
}
REFUSED = {
    "gemma2": (HEAD | {"final_logit_softcapping": 5.0}, "times its output head"),  # a cap
    "recurrent_gemma": (HEAD | {"lru_width": 32, "num_hidden_layers": 3}, "generates"),  # ignores padding
    "rwkv": (SIZES | {"attention_hidden_size": 32}, "generates"),  # its cache is wrong
    "phi": (SIZES, "no plain output projection"),  # a bias
    "gptj": (GPT | {"rotary_dim": 4}, "no plain output projection"),
    "llama4_text": (HEAD | EXPERTS | {"intermediate_size_mlp": 48}, "no last hidden states"),
    "hyperclovax": (HEAD | {"logits_scaling": 3.0}, "times its output head"),  # Granite divides by it
}
UNCOVERED = "mamba mamba2 falcon_h1 jamba qwen3_next bamba minimax lfm2".split()  # by the FLOP formula
PROBLEMS = ["a=3", "a=3 b=7 c=2 d=5 e=6", "b=1 c=2"]


def build(family, sizes):
    """A random model whose logits have a deviation of 2, whatever the family does to them."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family.split(",")[0], **sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        logits = model(input_ids=torch.arange(3, 20)[None]).logits
        model.get_output_embeddings().weight.mul_(2 / logits.std())
    model.generation_config.eos_token_id = 2
    return model


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("architectures") / "problems.jsonl"
    path.write_text("".join(json.dumps({"problem": text, "answer": "1"}) + "\n" for text in PROBLEMS))
    return path


def write(path, family, sizes):
    model, tokenizer = build(family, sizes), make_tokenizer()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return model


def own_logps(model, rows):
    """transformers' own log-probabilities in float64, (T, V) of each row alone, at its response tokens."""
    model.set_experts_implementation("eager")  # the fast ones take no float64
    model = model.double()
    for row in rows:
        prompt, response = row["prompt_ids"], row["response_ids"]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + response])).logits[0].double()
        yield logits[len(prompt) - 1 : -1].log_softmax(-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_stage_is_exact(family, data, tmp_path):
    """The KL of train.py, and the entropy of evaluate.py, from transformers' own logits in float64."""
    model = write(tmp_path / "teacher", family, FAMILIES[family])
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "student")
    make_tokenizer().save_pretrained(tmp_path / "student")
    sampled = f"--data {data} --engine hf --dtype float32 --max_response_tokens 7 --out {tmp_path}"
    run_line(rollout, f"--model {tmp_path}/teacher {sampled}/rollouts")
    made = f"--rollouts {tmp_path}/rollouts --dtype float32 --out {tmp_path}"
    run_line(score_teacher, f"--teacher {tmp_path}/teacher {made}/scores")
    line = f"--student {tmp_path}/student --scores {tmp_path}/scores {made}/run --engine hf --kl forward"
    run_line(train, f"{line} --prefix teacher --steps 1 --batch_size 3 --lr 1e-3 --normalize token")
    run_line(evaluate, f"--model {tmp_path}/student --n 1 --micro_batch_tokens 99 {sampled}/eval")

    teacher, student = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("teacher", "student")
    )
    rows = read_rows(tmp_path / "rollouts/rollouts.jsonl")
    log_p, log_q = (torch.cat([*own_logps(m, rows)]) for m in (teacher, student))
    row = read_rows(tmp_path / "run/metrics.jsonl")[0]
    assert row["fkl"] == pytest.approx((log_p.exp() * (log_p - log_q)).sum(1).mean().item(), rel=1e-4)
    assert row["rkl"] == pytest.approx((log_q.exp() * (log_q - log_p)).sum(1).mean().item(), rel=1e-4)
    assert row["fkl"] > 1e-3
    assert (row["tflops"] is None) == (family in UNCOVERED)
    graded = read_rows(tmp_path / "eval/samples.jsonl")
    for row, logps in zip(graded, own_logps(student, graded), strict=True):
        assert row["entropy"] == pytest.approx(-(logps.exp() * logps).sum(1).mean().item(), rel=1e-4)


@pytest.mark.parametrize("family", REFUSED)
def test_what_is_not_exact_is_refused_wherever_it_is_loaded(family, data, tmp_path, refused):
    sizes, words = REFUSED[family]
    write(tmp_path / "model", family, sizes)
    write(tmp_path / "plain", "llama", HEAD)
    model, plain, out = f"{tmp_path}/model", f"{tmp_path}/plain", f"--dtype float32 --out {tmp_path}/out"
    sampled = f"--data {data} --engine hf --max_response_tokens 7 {out}"
    own_data = f"{sampled} --prefix student --kl reverse"
    lines = {
        "--teacher": (score_teacher, f"--teacher {model} --student {plain} --preflight"),
        "--student": (score_teacher, f"--teacher {plain} --student {model} --preflight"),
        "--model": (evaluate, f"--model {model} {sampled}"),
        "--teacher ": (train, f"--teacher {model} --student {plain} {own_data}"),
        "the starting model": (train, f"--teacher {plain} --student {model} {own_data}"),
        "the starting model ": (grpo, f"--model {model} {sampled}"),
        "--reference": (grpo, f"--model {plain} --reference {model} --kl_weight 1 {sampled}"),
    }
    for flag, (stage, line) in lines.items():
        message = refused(lambda: run_line(stage, line), f"error: {flag.strip()}", words)
        assert message.count("\n") == 1
    assert not (tmp_path / "out").exists()
    if words == "generates":
        refused(lambda: run_line(rollout, f"--model {model} {sampled}"), f"error: --model {model}", words)
    else:  # a rollout needs no head
        run_line(rollout, f"--model {model} {sampled}")


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_do_not_depend_on_the_batch(family):
    """Prompts of different lengths share a batch, or each is alone: the same tokens."""
    model = build(family, FAMILIES[family])
    config = SamplingConfig(2, 1.0, 1.0, 0, max_response_tokens=6, stop_ids=[2], vocab_size=29)
    prompts = [[3, 4, 5], [6, 7, 8, 9, 10, 11, 12, 13], [14], [15, 16, 17]]
    together, alone = (
        [r.response_ids for group in sample(model, prompts, batched, 0) for r in group]
        for batched in (config, config._replace(sample_batch=1))
    )
    assert together == alone
    assert len({*map(tuple, together)}) > 3


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in UNCOVERED])
def test_flops_are_those_that_torch_counts(family):
    """In a forward pass over n tokens; within 0.2%, for torch also counts the angles of positions."""
    model = build(family, FAMILIES[family])
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")  # torch counts no grouped products

    def count(length):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(input_ids=torch.arange(length)[None] % 29, use_cache=False)
        return counter.get_total_flops()

    dense, attention = flops_per_token(json.dumps(model.config.to_dict(), default=str))
    for length in (8, 32):
        assert count(length) == pytest.approx(length * dense + length**2 * attention, rel=2e-3)


def test_an_unknown_cost_is_called_so(data, tmp_path, capsys, refused):
    """In files, where it is null, in what is printed, after --resume and in tables; figures refuse it."""
    write(tmp_path / "student", "mamba", FAMILIES["mamba"])
    write(tmp_path / "teacher", "llama", HEAD)
    out = f"--engine hf --dtype float32 --max_response_tokens 4 --out {tmp_path}"
    run_line(rollout, f"--model {tmp_path}/teacher --data {data} {out}/rollouts")
    made = f"--rollouts {tmp_path}/rollouts --dtype float32 --out {tmp_path}"
    run_line(score_teacher, f"--teacher {tmp_path}/teacher {made}/scores")
    line = (
        f"--prefix teacher --kl forward --rollouts {tmp_path}/rollouts --scores {tmp_path}/scores --steps 2"
    )
    line += f" --batch_size 2 --save_every 1 --eval_every 1 --eval_n 1 --eval_data {data} {out}"
    with killed_in_call(2, training, "optimizer_step"):
        run_line(train, f"{line}/run --student {tmp_path}/student")
    capsys.readouterr()
    run_line(train, f"{line}/run --student {tmp_path}/student --resume")
    assert "run: 2 steps, unknown TFLOPs, " in capsys.readouterr().out
    for row in [
        *read_rows(tmp_path / "run/metrics.jsonl"),
        json.loads((tmp_path / "run/meta.json").read_text()),
    ]:
        assert row["tflops"] is None and row["tflops_uncached"] is None and row["response_tokens"] > 0
    run_line(evaluate, f"--model {tmp_path}/run/final --data {data} --n 1 {out}/eval")
    capsys.readouterr()
    run_line(evaluate, f"--table {tmp_path}/eval")
    header, _, row = capsys.readouterr().out.splitlines()
    assert row.split("|")[header.split("|").index(" TFLOPs  ")].strip() == "unknown"
    draw = f"--figure {tmp_path}/a.png --runs {tmp_path}/run --x"
    refused(lambda: run_line(evaluate, f"{draw} tflops"), f"--x tflops: is unknown for --runs {tmp_path}/run")
    run_line(evaluate, f"{draw} step")
    # of a stored teacher of unknown cost only the total without stored scores is unknown
    known = f"{line}/known --student {tmp_path}/teacher --overwrite".replace("/scores ", "/other ")
    run_line(score_teacher, f"--teacher {tmp_path}/student {made}/other")
    run_line(train, known)
    row = read_rows(tmp_path / "known/metrics.jsonl")[0]
    assert row["tflops"] > 0 and row["tflops_uncached"] is None
