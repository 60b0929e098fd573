"""The rows of a rollouts artifact: write, read, complete."""

import json
import os

from distil.artifacts import finish_artifact, read_jsonl, refuse
from distil.prompts import template_sha256, tokenizer_sha256


def write_rollouts(file, tokenizer, problems, prompts, groups):
    """Append one row a response to a rollouts.jsonl; a None in a group is a dropped one."""
    for problem, prompt, group in zip(problems, prompts, groups, strict=True):
        for index, one in ((index, one) for index, one in enumerate(group) if one):
            row = {
                "id": problem["id"],
                "sample": index,
                "prompt_ids": prompt,
                "response_ids": one.response_ids,
                "response": tokenizer.decode(one.response_ids, skip_special_tokens=True),
                "finish_reason": one.finish_reason,
                "answer": problem["answer"],
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_rollouts(path, vocab_size=2**31):
    """Yields the rows of a rollouts artifact whose meta.json was checked; a row that rollout.py cannot have written is refused."""
    for where, row in read_jsonl(os.path.join(path, "rollouts.jsonl")):
        for name in ("prompt_ids", "response_ids"):
            ids = row.get(name)
            if (
                not isinstance(ids, list)
                or set(map(type, ids)) != {int}
                or not 0 <= min(ids) <= max(ids) < vocab_size
            ):
                refuse(
                    f"{where}: `{name}` must be a list of token ids from 0 to {vocab_size - 1}, at least one"
                )
        for name, kind in {"id": str, "sample": int, "response": str, "answer": str}.items():
            if type(row.get(name)) is not kind:
                refuse(f"{where}: `{name}` must be of type {kind.__name__}")
        if row.get("finish_reason") not in ("stop", "length"):
            refuse(f"{where}: `finish_reason` must be stop or length")
        yield row


def finish_rollouts(args, tokenizer, faults=None, **facts):
    """Complete a rollouts artifact: its tokenizer, its counts, meta.json."""
    file = os.path.join(args.out, "rollouts.jsonl")
    os.replace(file + ".tmp", file)
    tokenizer.save_pretrained(os.path.join(args.out, "tokenizer"))
    names = [
        os.path.join("tokenizer", name) for name in sorted(os.listdir(os.path.join(args.out, "tokenizer")))
    ]
    lengths, cut = [], 0
    for row in read_rollouts(args.out):
        lengths.append(len(row["response_ids"]))
        cut += row["finish_reason"] == "length"
    if not lengths:
        refuse(f"--drop {' '.join(args.drop)}: every response was dropped: {dict(faults)}", code=1)
    counts = {
        "responses": len(lengths),
        "response_tokens": sum(lengths),
        "longest_response": max(lengths),
        "truncated": cut,
        "faults": faults or {},
    }
    suffix = getattr(args, "prompt_suffix", "")
    finish_artifact(
        args,
        "rollout",
        ["rollouts.jsonl", *names],
        counts=counts,
        tokenizer_sha256=tokenizer_sha256(tokenizer),
        template_sha256=template_sha256(tokenizer, suffix),
        prompt_suffix=suffix,
        **facts,
    )
    print(
        f"{args.out}: {len(lengths)} responses, {sum(lengths) / len(lengths):.1f} tokens on average, {cut} cut off"
        + "".join(f", {count} {reason}" for reason, count in (faults or {}).items())
    )
