"""--token_details: what student and teacher say at each token of some responses, stored for the page."""

import itertools
import json
import os

import torch

from distil import artifacts
from distil.batches import batches_by_tokens
from distil.jsonl import finite
from distil.models import Response, forward
from streaming_kl import linear_streaming_kl, token_logps

TOP = 5  # likeliest tokens of both models


def store_token_details(args, model, teacher, task, rows):
    """Write tokens.jsonl, of the first responses of up to --token_details tokens, and vocabulary.json."""
    total, first = len(rows), rows[0]["tokens"]
    ends = itertools.accumulate(row["tokens"] for row in rows)
    rows = [row for row, end in zip(rows, ends) if end <= args.token_details]
    responses = [Response(row["prompt_ids"], row["response_ids"], False) for row in rows]
    size, ids = task.sampling.vocab_size, set()
    with open(os.path.join(args.out, "tokens.jsonl"), "w", encoding="utf-8") as file:
        for indices in batches_by_tokens([r.length for r in responses], args.micro_batch_tokens):
            batch = [responses[i] for i in indices]
            details = token_details(model, teacher, batch, size, min(TOP, size))
            for i, detail in zip(indices, details, strict=True):
                name = {"id": rows[i]["id"], "sample": rows[i]["sample"]}
                file.write(json.dumps(name | finite(detail, f"{name['id']}, sample {name['sample']}")) + "\n")
                ids.update(rows[i]["response_ids"], *detail["student_top_ids"], *detail["teacher_top_ids"])
            if artifacts.stop_requested():
                artifacts.stop(args)
    texts = token_texts(task.tokenizer, sorted(ids))
    artifacts.write_json(os.path.join(args.out, "vocabulary.json"), texts)
    hint = "" if rows else f"; the first one needs --token_details {first}"
    print(f"--token_details {args.token_details}: {len(rows)} of {total} responses stored{hint}", flush=True)
    return {"responses": len(rows), "left_out": total - len(rows)}


@torch.no_grad()
def token_details(model, teacher, responses, vocab_size, k):
    """What student and teacher say at each token of some Responses: for each {name: a value per token}.

    teacher: a live teacher.Teacher; k: how many of both models' likeliest tokens."""
    hidden, head = forward(model, responses, vocab_size)
    signal = teacher.signal(responses)
    out, top = linear_streaming_kl(hidden, head, signal.hidden, signal.head, fkl_weight=1.0, top_k=k)
    tokens = torch.tensor([token for r in responses for token in r.response_ids], device=hidden.device)
    names = ("fkl", "rkl", "student_entropy", "teacher_entropy")
    columns = {name: getattr(out, name) for name in names}
    columns["student_logp"] = token_logps(hidden, head, tokens)
    columns["teacher_logp"] = token_logps(signal.hidden, signal.head, tokens)
    columns |= {"student_top_ids": top.student_ids, "student_top_logps": top.student_logps}
    columns |= {"teacher_top_ids": top.teacher_ids, "teacher_top_logps": top.teacher_logps}
    for name, values in columns.items():
        columns[name] = values.double().round(decimals=5) if values.is_floating_point() else values
    sizes = [len(r.response_ids) for r in responses]
    pieces = {name: values.cpu().split(sizes) for name, values in columns.items()}
    return [{name: piece[i].tolist() for name, piece in pieces.items()} for i in range(len(responses))]


def token_texts(tokenizer, ids):
    """{id: [kind, text]} for vocabulary.json. kind: text, special, or bytes, which are not whole characters.

    The text of bytes is hexadecimal, or else what the vocabulary has. A token is decoded behind another one,
    since some tokenizers drop the white space in front of the first."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    special = {*tokenizer.all_special_ids}
    special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    before = tokenizer("a", add_special_tokens=False).input_ids[-1:]
    start = tokenizer.decode(before)
    texts = {}
    for i in ids:
        entry = tokenizer.convert_ids_to_tokens(i) or ""  # None: an id without a token
        text = tokenizer.decode([*before, i])
        text = text[len(start) :] if text.startswith(start) else tokenizer.decode([i])
        if i in special:
            texts[i] = ["special", entry]
        elif "\ufffd" not in text:
            texts[i] = ["text", text]
        elif entry.startswith("<0x") and len(entry) == 6:  # SentencePiece's
            texts[i] = ["bytes", entry[3:5]]
        elif all(character in byte_of for character in entry):
            texts[i] = ["bytes", bytes(byte_of[character] for character in entry).hex(" ").upper()]
        else:
            texts[i] = ["text", entry]
    return texts
