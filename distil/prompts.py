"""How a problem becomes prompt ids: tokenizer, chat template, the ids that end a response, and hashes to tell two of them apart."""

import hashlib
import json
import os

from distil.artifacts import refuse


def load_tokenizer(directory, flag):
    """The tokenizer of a local directory, with a chat template that works. A tokenizer with code of its own is refused."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        rendered = tokenizer.chat_template and render_prompt(tokenizer, "1+1=?")
    except Exception as error:  # json's, jinja's, transformers' or Rust's: whatever is wrong with its files
        refuse(f"{flag} {directory}: its tokenizer cannot be loaded: {error}")
    if not rendered:
        refuse(f"{flag} {directory}: its tokenizer has no chat template, so there is no prompt to render")
    return tokenizer


def prompt_text(tokenizer, content):
    """The prompt as text: one user turn, the generation prompt, thinking off. The project's only template code."""
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        enable_thinking=False,
        tokenize=False,
    )


def render_prompt(tokenizer, problem, suffix=""):
    """Token ids of the prompt. A problem that spells a special token (say "<|im_end|>") has it encoded as plain text and cannot end
    its own turn."""
    if not any(token in problem for token in tokenizer.get_added_vocab()):
        return tokenizer(prompt_text(tokenizer, problem + suffix), add_special_tokens=False).input_ids
    head, tail = prompt_text(tokenizer, "\0" + suffix).split("\0")
    parts = [(head, False), (problem, True), (tail, False)]
    return [
        i
        for text, plain in parts
        for i in tokenizer(text, add_special_tokens=False, split_special_tokens=plain).input_ids
    ]


def encode_problems(args, problems, tokenizer, context, limit="max_response_tokens"):
    """Prompt ids of every problem; refused where a prompt and a response as long as the flag `limit` allows exceed the context."""
    prompts, longest = (
        [render_prompt(tokenizer, problem["problem"], args.prompt_suffix) for problem in problems],
        getattr(args, limit),
    )
    for problem, prompt in zip(problems, prompts):
        if len(prompt) + longest > context:
            refuse(
                f"problem {problem['id']}: its prompt has {len(prompt)} tokens; with --{limit} {longest} that exceeds the model's "
                f"context of {context}"
            )
    return prompts


def tokenizer_sha256(tokenizer):
    """Hash of the map from tokens to ids: equal maps mean that ids have equal meanings."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def template_sha256(tokenizer, suffix=""):
    """Hash of what the model is shown around a problem (template, suffix and thinking switch, as token ids)."""
    return hashlib.sha256(json.dumps(render_prompt(tokenizer, "1+1=?", suffix)).encode()).hexdigest()


def stop_ids(tokenizer, *directories):
    """Every id that ends a response, sorted: the tokenizer's end token and those of each model's generation_config, or of its config
    where it has none."""
    ids = {tokenizer.eos_token_id}
    for directory in directories:
        paths = [os.path.join(directory, name) for name in ("generation_config.json", "config.json")]
        found = [json.load(open(path)).get("eos_token_id") for path in paths if os.path.isfile(path)]
        eos = next((eos for eos in found if eos is not None), [])
        eos = eos if isinstance(eos, list) else [eos]
        if not all(type(i) is int for i in eos):
            refuse(f"{directory}: eos_token_id must be a token id or a list of them, not {eos}")
        ids.update(eos)
    return sorted(ids - {None})
