"""From a problem to prompt ids: tokenizer, chat template, stop ids, and hashes of what must agree."""

import datetime
import hashlib
import json
import os
import re

from distil.artifacts import refuse

PROMPT_DATE = datetime.datetime(2024, 7, 26)  # for templates that print it; Llama's own default


def load_tokenizer(directory, flag):
    """A local directory's tokenizer. Refused if it needs code of its own or has no working chat template."""
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
    """The prompt as text: one user turn, the generation prompt, thinking off. The only template code here."""
    messages = [{"role": "user", "content": content}]
    options = {"add_generation_prompt": True, "enable_thinking": False, "tokenize": False}
    return tokenizer.apply_chat_template(messages, strftime_now=PROMPT_DATE.strftime, **options)


def render_prompt(tokenizer, problem, suffix=""):
    """Token ids of the prompt. A special token in the problem, say "<|im_end|>", becomes plain text."""

    def encode(text, plain=False):
        return tokenizer(text, add_special_tokens=False, split_special_tokens=plain).input_ids

    text = prompt_text(tokenizer, problem + suffix)
    if not any(token in problem for token in tokenizer.get_added_vocab()):
        return encode(text)
    # Two marks show where the template puts the problem: once or often, quoted or trimmed.
    start, end = [mark for mark in map(chr, range(0xE000, 0xF900)) if mark not in problem + text][:2]
    for marked in (problem, problem.strip()):  # no template trims marked white space
        content = problem.replace(marked, start + marked + end, 1) + suffix
        pieces = re.split(f"(?s){start}(.*?){end}", prompt_text(tokenizer, content))
        if "".join(pieces) == text:  # [template, problem, template, ...]
            return [token for i, piece in enumerate(pieces) for token in encode(piece, plain=i % 2 == 1)]
    refuse(f"the chat template changes {problem[:60]!r}, so a special token in it cannot become plain text")


def encode_problems(problems, tokenizer, suffix, context, most, limit, flag="max_response_tokens"):
    """(problems, their prompt ids, number dropped): without prompts of more than `most` tokens (None: all).

    Refused if a prompt and a response of `limit` tokens, set by `flag`, exceed the context."""
    pairs = [(problem, render_prompt(tokenizer, problem["problem"], suffix)) for problem in problems]
    kept = [pair for pair in pairs if most is None or len(pair[1]) <= most]
    if dropped := len(pairs) - len(kept):
        problem, prompt = max(pairs, key=lambda pair: len(pair[1]))
        such = f"problems dropped, such as {problem['id']} with {len(prompt)} tokens"
        (print if kept else refuse)(f"--max_prompt_tokens {most}: {dropped} of {len(pairs)} {such}")
    for problem, prompt in kept:
        if len(prompt) + limit > context:
            refuse(
                f"problem {problem['id']}: its prompt has {len(prompt)} tokens (see --max_prompt_tokens); "
                f"with --{flag} {limit} that exceeds the model's context of {context}"
            )
    return [problem for problem, _ in kept], [prompt for _, prompt in kept], dropped


def tokenizer_sha256(tokenizer):
    """Hash of the map from tokens to ids: equal maps mean that ids have equal meanings."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def template_sha256(tokenizer, suffix=""):
    """Hash of what surrounds a problem in its prompt (template, suffix, thinking switch), as token ids."""
    return hashlib.sha256(json.dumps(render_prompt(tokenizer, "1+1=?", suffix)).encode()).hexdigest()


def stop_ids(tokenizer, *directories):
    """Every id that ends a response, sorted: the end tokens of the tokenizer and of each model directory.

    A model's are in its generation_config.json, or else in its config.json."""
    ids = {tokenizer.eos_token_id}
    for directory in directories:
        end = None
        for name in ("generation_config.json", "config.json"):
            path = os.path.join(directory, name)
            if end is None and os.path.isfile(path):
                end = json.load(open(path)).get("eos_token_id")
        ends = end if isinstance(end, list) else [] if end is None else [end]
        if not all(type(i) is int for i in ends):
            refuse(f"{directory}: eos_token_id must be a token id or a list of them, not {ends}")
        ids.update(ends)
    return sorted(ids - {None})
