"""From a problem to prompt ids: tokenizer, chat template, stop ids, and hashes of what must agree."""

import datetime
import hashlib
import inspect
import json
import os
import re
from typing import NamedTuple

from distil.artifacts import refuse

PROMPT_DATE = datetime.datetime(2024, 7, 26)  # for templates that print it; Llama's own default


class Prompting(NamedTuple):
    """What is in every prompt beside its problem; each field is the value of the flag of that name."""

    prompt_suffix: str = ""  # after the problem, inside the user turn
    system_prompt: str = ""  # a system turn before it; "": none
    thinking: str = "off"  # or "on", if the template has that switch
    template_kwargs: dict = {}  # more variables of the template

    @classmethod
    def read(cls, facts):
        """From a meta.json, or its args; what is older than a flag was made with the flag's default."""
        return cls(**{name: facts[name] for name in cls._fields if name in facts})

    def differences(self, other):
        """[(flag, own value, the other's)] of the flags that differ."""
        return [(f"--{name}", a, b) for name, a, b in zip(self._fields, self, other) if a != b]


PLAIN = Prompting()
PROMPT_OPTIONS = {"add_generation_prompt": True, "tokenize": False, "strftime_now": PROMPT_DATE.strftime}
PROMPT_OPTIONS |= {"enable_thinking": False}


def load_tokenizer(directory, flag):
    """A local directory's tokenizer, with or without a chat template. Refused if it needs code of its own."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        if len(tokenizer) < 2:
            raise ValueError("there is none in this directory")
        return tokenizer
    except Exception as error:  # json's, transformers' or Rust's: whatever is wrong with its files
        refuse(f"{flag} {directory}: its tokenizer cannot be loaded: {error}")


def check_template(tokenizer, flag, remedy, prompting=PLAIN, system_flag="--system_prompt"):
    """Refuse a tokenizer without a working chat template, or with one that ignores a part of `prompting`.

    remedy: the flag that names another one; system_flag: the one that gave the system prompt."""
    if prompting.system_prompt.isspace():
        refuse(f"{system_flag}: must be more than white space, not {prompting.system_prompt!r}")
    question, kwargs = "What is 1+1?", prompting.template_kwargs
    parts = {system_flag: {"system_prompt": ""}} if prompting.system_prompt else {}  # {flag: without it}
    parts |= {"--thinking on": {"thinking": "off"}} if prompting.thinking == "on" else {}
    taken = {*inspect.signature(tokenizer.apply_chat_template).parameters, *PROMPT_OPTIONS, "messages"}
    for name in kwargs:
        if name in taken:
            refuse(f"--template_kwargs {name}: this project sets it itself (see --thinking, --template_from)")
        others = {key: value for key, value in kwargs.items() if key != name}
        parts[f"--template_kwargs {name}"] = {"template_kwargs": others}
    where = f"{flag} {tokenizer.name_or_path}: its tokenizer's chat template"
    try:
        text, again = (prompt_text(tokenizer, question, prompting) for _ in range(2))
        if text != again:
            raise ValueError("it renders a problem in two ways")
        if question not in text:
            raise ValueError("it leaves out or changes the problem")
        render_prompt(tokenizer, question, prompting)  # bytes of a flag that are no text have no tokens
        less = {part: prompting._replace(**without) for part, without in parts.items()}
        ignored = [part for part in less if prompt_text(tokenizer, question, less[part]) == text]
    except Exception as error:  # jinja's or transformers': whatever is wrong with the template
        why = f"does not work ({error})" if tokenizer.chat_template else "is missing"
        refuse(f"{where} {why}; {' or '.join([*(f'leave out {part}' for part in parts), remedy])}")
    for part in ignored:
        say = print if part == "--thinking on" else refuse  # most models have no such switch
        say(f"{part}: {where} ignores it")


def prompt_text(tokenizer, content, prompting=PLAIN):
    """The prompt as text: one user turn, the generation prompt. The only template code here."""
    messages = [{"role": "user", "content": content}]
    if prompting.system_prompt:
        messages.insert(0, {"role": "system", "content": prompting.system_prompt})
    options = PROMPT_OPTIONS | {"enable_thinking": prompting.thinking == "on"}
    return tokenizer.apply_chat_template(messages, **prompting.template_kwargs | options)


def render_prompt(tokenizer, problem, prompting=PLAIN):
    """Token ids of the prompt. A special token in the problem, say "<|im_end|>", becomes plain text."""

    def encode(text, plain=False):
        return tokenizer(text, add_special_tokens=False, split_special_tokens=plain).input_ids

    content = problem + prompting.prompt_suffix
    text = prompt_text(tokenizer, content, prompting)
    if not any(token in problem for token in tokenizer.get_added_vocab()):
        return encode(text)
    # Two marks show where the template puts the problem: once or often, quoted or trimmed.
    start, end = [mark for mark in map(chr, range(0xE000, 0xF900)) if mark not in problem + text][:2]
    for marked in (problem, problem.strip()):  # no template trims marked white space
        content = problem.replace(marked, start + marked + end, 1) + prompting.prompt_suffix
        pieces = re.split(f"(?s){start}(.*?){end}", prompt_text(tokenizer, content, prompting))
        if "".join(pieces) == text:  # [template, problem, template, ...]
            return [token for i, piece in enumerate(pieces) for token in encode(piece, plain=i % 2 == 1)]
    refuse(f"the chat template changes {problem[:60]!r}, so a special token in it cannot become plain text")


def vocab_size_of(tokenizer, rows, flag, other=None):
    """The ids that a model uses are those below this: the largest id + 1, cut to the rows of its head.

    other: that of a model to compare it with; refused if it differs, for one would lose real tokens."""
    ids = tokenizer.get_vocab().values()
    unused = [i for i in ids if i >= rows]
    if unused:
        print(f"{flag}: has no rows for {len(unused)} tokens, from id {min(unused)} on, which are never used")
    size = min(max(ids, default=-1) + 1, rows)
    if other not in (None, size):
        refuse(f"{flag}: has rows for the token ids 0 to {size - 1}, the other model for 0 to {other - 1}")
    return size


def encode_problems(
    problems, tokenizer, prompting, size, context, most, limit, flag="max_response_tokens", whose="its"
):
    """(problems, their prompt ids, number dropped): without prompts of more than `most` tokens (None: all).

    Refused if one has an id from `size` on, or if it and a response of `limit` tokens, set by `flag`, exceed
    the context. whose: for the message."""
    pairs = [(problem, render_prompt(tokenizer, problem["problem"], prompting)) for problem in problems]
    kept = [pair for pair in pairs if most is None or len(pair[1]) <= most]
    if dropped := len(pairs) - len(kept):
        problem, prompt = max(pairs, key=lambda pair: len(pair[1]))
        such = f"problems dropped, such as {problem['id']} with {len(prompt)} tokens"
        (print if kept else refuse)(f"--max_prompt_tokens {most}: {dropped} of {len(pairs)} {such}")
    for problem, prompt in kept:
        name = f"problem {problem['id']}: {whose} prompt has"
        if max(prompt) >= size:
            refuse(f"{name} the token id {max(prompt)}, but the model's rows end at {size - 1}")
        if len(prompt) + limit > context:
            more = f"with --{flag} {limit} more than the context of {context}"
            refuse(f"{name} {len(prompt)} tokens (see --max_prompt_tokens); {more}")
    return [problem for problem, _ in kept], [prompt for _, prompt in kept], dropped


def tokenizer_sha256(tokenizer):
    """Hash of the map from tokens to ids: equal maps mean that ids have equal meanings."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def template_sha256(tokenizer, prompting=PLAIN):
    """Hash of what surrounds a problem in its prompt (the template and `prompting`), as token ids."""
    return hashlib.sha256(json.dumps(render_prompt(tokenizer, "1+1=?", prompting)).encode()).hexdigest()


def stop_ids(tokenizer, directory, vocab_size):
    """Every id that ends a model's response, sorted: the end tokens of its tokenizer and of its config.

    The latter are in its generation_config.json, or else in its config.json."""
    ends = {"tokenizer_config.json": tokenizer.eos_token_id}
    for name in ("config.json", "generation_config.json"):
        path = os.path.join(directory, name)
        ends[name] = json.load(open(path)).get("eos_token_id") if os.path.isfile(path) else None
    if ends["generation_config.json"] is not None:
        ends.pop("config.json")
    found = set()
    for name, end in ends.items():
        ids = end if isinstance(end, list) else [] if end is None else [end]
        if not all(type(i) is int and 0 <= i < vocab_size for i in ids):
            refuse(f"{directory}/{name}: eos_token_id must name ids from 0 to {vocab_size - 1}, not {end}")
        found.update(ids)
    return sorted(found)
