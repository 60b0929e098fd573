"""Do two models have the same token ids and prompts? Others cannot be compared token by token."""

import os

from distil.artifacts import read_artifact, refuse
from distil.models import rows_of
from distil.prompts import (
    PLAIN,
    Prompting,
    check_template,
    load_tokenizer,
    stop_ids,
    template_sha256,
    tokenizer_sha256,
    vocab_size_of,
)


def check_tokenizers(tokenizer, flag, other_sha256, other_flag):
    """Refuse two tokenizers whose ids mean different tokens: a KL would compare unrelated words."""
    if tokenizer_sha256(tokenizer) != other_sha256:
        refuse(f"{flag} and {other_flag} have different tokenizers: their maps from tokens to ids differ")


def match_tokenizers(first, second, flag, second_flag, template=None, prompting=PLAIN):
    """Refuse two tokenizers with different ids or with different prompts.

    template: the one of them whose chat template the other gets, in place; None: they must have the same."""
    check_tokenizers(first, flag, tokenizer_sha256(second), second_flag)
    remedy = "--template says whose both use"
    for tokenizer, name in ((first, flag), (second, second_flag)):
        if template is None or template is tokenizer:
            check_template(tokenizer, name, remedy, prompting)
    if template:
        first.chat_template = second.chat_template = template.chat_template
        print(f"prompts: {flag} and {second_flag} have the chat template of {template.name_or_path}")
        remedy = "it prints special tokens, such as eos_token, that differ"
    if template_sha256(first, prompting) != template_sha256(second, prompting):
        refuse(f"{flag} and {second_flag} have different prompt templates; {remedy}")


def match_teacher(directory, tokenizer, vocab_size, template, prompting=PLAIN):
    """match_tokenizers for a student's tokenizer and a teacher's directory; returns its stop ids."""
    other = load_tokenizer(directory, "--teacher")
    template = {"student": tokenizer, "teacher": other}.get(template)
    match_tokenizers(tokenizer, other, "--student", "--teacher", template, prompting)
    vocab_size_of(other, rows_of(directory), "--teacher", vocab_size)
    return stop_ids(other, directory, vocab_size)


def match_rollouts(path, prompting, tokenizer, template):
    """match_tokenizers for a student's tokenizer and stored rollouts; returns their stop ids."""
    meta = read_artifact(path, "--rollouts", "rollout")
    for flag, here, there in prompting.differences(Prompting.read(meta)):
        refuse(f"{flag}: is {here!r}, but --rollouts were made with {there!r}")
    stored = load_tokenizer(os.path.join(path, "tokenizer"), "--rollouts")
    match_tokenizers(tokenizer, stored, "--student", "--rollouts", template and stored, prompting)
    return meta["stop_ids"]
