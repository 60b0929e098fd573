"""The rows of a rollouts artifact: write them, read them, complete the artifact."""

import json
import os

from distil.artifacts import finish_artifact, refuse
from distil.jsonl import read_jsonl
from distil.models import Response
from distil.prompts import PLAIN, PROMPT_DATE, template_sha256, tokenizer_sha256


def write_rollouts(file, tokenizer, problem, group, start=0):
    """Write a row for each Response to a problem, samples start, start + 1, ... None: a dropped response."""
    for index, response in enumerate(group, start):
        if response is None:
            continue
        row = {"id": problem["id"], "sample": index}
        row |= {"prompt_ids": response.prompt_ids, "response_ids": response.response_ids}
        row["response"] = tokenizer.decode(response.response_ids, skip_special_tokens=True)
        row["finish_reason"] = "length" if response.truncated else "stop"
        row["answer"] = problem["answer"]
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_rollouts(path, vocab_size=2**31):
    """Yields the rows of a checked rollouts artifact. Refuses rows that rollout.py cannot have written."""
    for where, row in read_jsonl(os.path.join(path, "rollouts.jsonl")):
        for name in ("prompt_ids", "response_ids"):
            ids = row.get(name)
            is_ids = isinstance(ids, list) and set(map(type, ids)) == {int}
            if not is_ids or min(ids) < 0 or max(ids) >= vocab_size:
                refuse(f"{where}: `{name}` must be a non-empty list of token ids from 0 to {vocab_size - 1}")
        for name, kind in {"id": str, "sample": int, "response": str, "answer": str}.items():
            if type(row.get(name)) is not kind:
                refuse(f"{where}: `{name}` must be of type {kind.__name__}")
        if row.get("finish_reason") not in ("stop", "length"):
            refuse(f"{where}: `finish_reason` must be stop or length")
        yield row


def stored_responses(path, max_response_tokens, context, vocab_size):
    """The rows of a rollouts artifact as Responses of at most max_response_tokens tokens."""
    responses, same = [], {}  # one int object for equal ids: 8 bytes a token, not 36
    for row, stored in enumerate(read_rollouts(path, vocab_size)):
        prompt_ids = [same.setdefault(i, i) for i in stored["prompt_ids"]]
        response_ids = [same.setdefault(i, i) for i in stored["response_ids"]]
        truncated = stored["finish_reason"] == "length"
        response = Response(prompt_ids, response_ids, truncated, stored["id"], row=row)
        response = response.first(max_response_tokens)
        if response.length > context:
            what = f"{stored['id']} has {response.length} tokens, the student's context {context}"
            refuse(f"--rollouts {path}: {what}; give a smaller --max_response_tokens")
        responses.append(response)
    return responses


def listed(counts):
    """{what happened: count} as text, without zeros."""
    return ", ".join(f"{count} {what}" for what, count in counts.items() if count)


def finish_rollouts(args, tokenizer, faults=None, prompting=PLAIN, **facts):
    """Complete the artifact in args.out: tokenizer, counts, meta.json. faults: {what was dropped: count}."""
    file = os.path.join(args.out, "rollouts.jsonl")
    os.replace(file + ".tmp", file)
    tokenizer.save_pretrained(os.path.join(args.out, "tokenizer"))
    files = [f"tokenizer/{name}" for name in sorted(os.listdir(os.path.join(args.out, "tokenizer")))]
    ends = [(len(row["response_ids"]), row["finish_reason"]) for row in read_rollouts(args.out)]
    if not ends:
        refuse(f"every response was dropped (--drop): {listed(faults)}", code=1)
    lengths, truncated = [length for length, _ in ends], sum(reason == "length" for _, reason in ends)
    counts = {"responses": len(lengths), "response_tokens": sum(lengths), "longest_response": max(lengths)}
    facts["counts"] = counts | {"truncated": truncated, "faults": faults or {}}
    facts |= {**prompting._asdict(), "prompt_date": f"{PROMPT_DATE:%Y-%m-%d}"}
    facts["tokenizer_sha256"] = tokenizer_sha256(tokenizer)
    facts["template_sha256"] = template_sha256(tokenizer, prompting)
    finish_artifact(args, "rollout", ["rollouts.jsonl", *files], **facts)
    mean = sum(lengths) / len(lengths)
    print(f"{args.out}: {len(lengths)} responses, {mean:.1f} tokens on average, {truncated} truncated")
    if found := listed(faults or {}):
        print(f"counts: {found}")
