"""The cost of a model's passes, from its config alone."""

import functools
import json
import math

import torch


def tflops(config, prompt, response, forwards=0, generations=0):
    """TFLOPs of a model on one sequence (arXiv 2605.16826, appendix H.1), a multiply-add as 2; NaN: unknown.

    Per token 2 for each matrix element that it meets, 2HV of them the head's, and 4QL a layer for attention,
    of which generation needs half on average. Forward and backward are three forwards. config: a dict."""
    dense, attention = flops_per_token(json.dumps(config, default=str))
    length = prompt + response
    attention *= length
    return length * (forwards * (dense + attention) + generations * (dense + attention / 2)) / 1e12


@functools.lru_cache(maxsize=8)
def flops_per_token(config):
    """(FLOPs of the matrices, of attention for each token attended to) of a config in JSON; NaN: unknown.

    The model is built without memory and its matrices counted, so sizes need no names. Unknown are models
    with layers that are not softmax attention, or that transformers cannot build."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    config = json.loads(config)
    try:
        config = AutoConfig.for_model(config.pop("model_type"), **config).get_text_config()
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        dense = 2 * sum(elements_met(module, config) for module in model.modules())
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        q, v = (getattr(config, name, None) or head_dim for name in ("qk_head_dim", "v_head_dim"))
        attention = 2 * config.num_attention_heads * (q + v) * config.num_hidden_layers
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError, StrictDataclassError):
        return math.nan, math.nan
    kinds = {*(getattr(config, "layer_types", None) or ())}
    covered = kinds <= {"full_attention", "sliding_attention", "chunked_attention"}
    return (dense, attention) if covered else (math.nan, math.nan)


def elements_met(module, config):
    """Elements of a module's own matrices that a token is multiplied by.

    Embeddings are looked up. Experts are stacked, (experts, in, out): a token meets num_experts_per_tok."""
    if isinstance(module, torch.nn.Embedding):
        return 0
    if isinstance(module, torch.nn.modules.conv._ConvNd):
        return math.nan
    weights = [w for name, w in module.named_parameters(recurse=False) if "bias" not in name and w.dim() > 1]
    return sum(w.numel() if w.dim() == 2 else w[0].numel() * config.num_experts_per_tok for w in weights)


def for_file(costs):
    """{name: cost} as JSON has it: null where a cost is unknown."""
    return {name: None if cost != cost else cost for name, cost in costs.items()}


def text_of(cost):
    return "unknown" if cost is None or cost != cost else f"{cost:.4g}"
