"""The HTML report: one page that opens offline, with a table, curves, and responses token by token.

It is reports/page.html with the data in it as JSON. All numbers come from stored artifacts."""

import codecs
import json
import math
import os

from distil.artifacts import DAMAGE, refuse, write_file
from distil.evaluation import data_names
from distil.flops import text_of
from distil.jsonl import read_jsonl
from reports.reading import (
    EVAL_CURVES,
    STEP_CURVES,
    evaluations_in,
    read_evaluations,
    read_run,
    read_samples,
    without_repeats,
)

RESPONSES = 200  # of an evaluation that the page holds at most
PAGE_BYTES = 8_000_000  # of all responses on the page; evaluations have equal shares
POINTS = 200  # of a curve
SHOWN_FROM = 1e-3  # probability of a likely token that is shown beside the likeliest


# ----------------------------------------------------------------------------------------------------------
# How a token is written


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


def pieces(written):
    """What each token, [kind, text], adds to the text: a character in parts comes with the last of them."""
    decoder, found = codecs.getincrementaldecoder("utf-8")(errors="replace"), []
    for kind, text in written:
        if kind == "bytes":
            found.append(decoder.decode(bytes.fromhex(text)))
        else:
            found.append(decoder.decode(b"", final=True) + text)
            decoder.reset()
    return found


# ----------------------------------------------------------------------------------------------------------
# The page


def write_report(path, directories):
    """Write the page about some evaluations and runs; a run's directory stands for its evaluations too."""
    if os.path.isdir(path) or not path.lower().endswith((".html", ".htm")):
        refuse(f"--report {path}: must be a file that ends in .html")
    evaluations, runs = [], []
    for one in without_repeats(directories):
        is_run = os.path.isfile(os.path.join(one, "metrics.jsonl"))
        runs += [one] * is_run
        evaluations += evaluations_in(one, "--report", needed=not is_run)
    results, run_names = read_evaluations(evaluations, "--report", runs)
    share = PAGE_BYTES / max(1, len(results))
    data = {"evaluations": [evaluation_data(path, one, share) for path, one in results.items()]}
    names = data_names(dict.fromkeys(one["data"] for one in data["evaluations"]))
    for one in data["evaluations"]:
        one["data"] = one["cells"]["data"][0] = names[one["data"]]
    data["runs"] = [run_data(run, run_names[run]) for run in runs]
    data["curves"] = {"evals": EVAL_CURVES, "steps": STEP_CURVES}
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")  # no </script>
    with open(os.path.join(os.path.dirname(__file__), "page.html"), encoding="utf-8") as file:
        page = file.read().replace("@DATA@", text)
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    write_file(path, page.encode())
    shown, stored = (sum(one[name] for one in data["evaluations"]) for name in ("shown", "stored"))
    print(f"report: {path} ({len(page.encode()) / 1e6:.1f} MB, {shown} of {stored} responses)")


def evaluation_data(path, results, share):
    """What the page says of an evaluation; its responses take at most `share` bytes."""
    rows = read_samples(path)
    try:
        details, texts = read_details(path, {(row["id"], row["sample"]) for row in rows[:RESPONSES]})
        found = {"path": path, "run": results["run"], "data": results["data"], "cells": table_cells(results)}
        responses, numbers, size = [], {}, 0  # numbers: {token id: its place in the vocabulary}
        for row in rows[:RESPONSES]:
            response, known = response_data(row), len(numbers)
            if detail := details.get((row["id"], row["sample"])):
                tokens = token_data(row["response_ids"], detail, texts, numbers)
                added = sum(len(json.dumps(texts[i])) for i in list(numbers)[known:])
                if size + json_size(response | {"detail": tokens}) + added <= share:
                    response["detail"] = tokens
                    size += added
                else:
                    numbers = dict(list(numbers.items())[:known])
            size += json_size(response)
            if size > share:
                break
            responses.append(response)
    except DAMAGE as error:
        refuse(f"--report {path}: its files are not what this version writes ({error!r}); evaluate again")
    too_long = sum("detail" not in r and (r["id"], r["sample"]) in details for r in responses)
    found |= {"shown": len(responses), "stored": len(rows), "too_long": too_long, "responses": responses}
    found["details"] = results.get("token_details")
    return found | {"vocabulary": [[i, *texts[i]] for i in numbers]}


def json_size(value):
    return len(json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()) + 1


def read_details(path, wanted):
    """({(id, sample): row of tokens.jsonl} of the `wanted`, vocabulary.json); both empty if not stored."""
    if not os.path.isfile(os.path.join(path, "tokens.jsonl")):
        return {}, {}
    rows = (row for _, row in read_jsonl(os.path.join(path, "tokens.jsonl")))
    with open(os.path.join(path, "vocabulary.json"), encoding="utf-8") as file:
        texts = {int(i): text for i, text in json.load(file).items()}
    return {key: row for row in rows if (key := (row["id"], row["sample"])) in wanted}, texts


def response_data(row):
    names = ("id", "sample", "answer", "extracted", "correct", "tokens", "entropy", "timed_out")
    cut = {"problem": row.get("problem"), "cut": row["finish_reason"] == "length", "text": row["response"]}
    return {name: row[name] for name in names} | cut


def token_data(ids, detail, texts, numbers):
    """The tokens of a response for the page, each a list: its number in the vocabulary, fkl, rkl and both
    entropies in 1/1000 nats, its probabilities in 1/10000 (student, teacher), the likeliest tokens of both as
    [number, probability, ...], and of a token of bytes what it adds to the text."""
    columns = [detail[name] for name in ("fkl", "rkl", "student_entropy", "teacher_entropy")]
    logps = [detail[name] for name in ("student_logp", "teacher_logp")]
    tops = [(detail[f"{who}_top_ids"], detail[f"{who}_top_logps"]) for who in ("student", "teacher")]
    tokens = []
    for t, (i, piece) in enumerate(zip(ids, pieces(texts[i] for i in ids), strict=True)):
        token = [numbers.setdefault(i, len(numbers)), *(round(1000 * column[t]) for column in columns)]
        token += [parts(column[t]) for column in logps]
        for top_ids, top_logps in tops:
            likely = []
            for place, (top, logp) in enumerate(zip(top_ids[t], top_logps[t], strict=True)):
                if place == 0 or math.exp(logp) >= SHOWN_FROM:
                    likely += [numbers.setdefault(top, len(numbers)), parts(logp)]
            token.append(likely)
        tokens.append(token if piece == texts[i][1] else [*token, piece])
    return tokens


def parts(logp):
    """A log-probability as a probability in 1/10000."""
    return round(10_000 * math.exp(logp))


def table_cells(results):
    """{column: [value, interval]} as text; the interval is empty where there is none."""
    cells = {"run": results["run"], "training": results["cell"].get("name", "-"), "data": results["data"]}
    cells |= {"problems": str(results["problems"]), "n": str(results["n"])}
    cells = {name: [text, ""] for name, text in cells.items()}

    def add(column, value, bounds, form):
        low, high = (format(bound, form) for bound in bounds)
        cells[column] = [format(value, form), f"{low} – {high}"]

    add("Avg@n", results["avg"], results["avg_interval"], ".3f")
    for kind in ("pass", "maj"):
        for k, value in results[kind].items():
            if k == "1":  # Avg@n again
                continue
            add(f"{kind.title()}@{k}", value, results[f"{kind}_interval"][k], ".3f")
    for name, form in {"length": ".1f", "truncated": ".1%", "entropy": ".3f"}.items():
        add(name, results[name], results[f"{name}_interval"], form)
    cells["TFLOPs"] = ["-" if results["step"] is None else text_of(results["tflops"]), ""]
    return cells


def run_data(run, name):
    """A run's curves: {"evals", "steps": {name: values}, of which x is step or tflops}."""
    meta, logs = read_run(run, "--report")
    found = {"name": name, "training": meta["cell"]["name"], "every": 1, "evals": None}
    for log, key, curves in (("metrics", "steps", STEP_CURVES), ("evals", "evals", EVAL_CURVES)):
        rows = logs.get(log)
        if not rows:
            continue
        every = math.ceil(len(rows) / POINTS)
        rows = rows[::-1][:: max(1, every)][::-1]  # the last is drawn
        if log == "metrics":
            found["every"] = every
        names = ["step", "tflops", *curves, *(f"{curve}_interval" for curve in curves)]
        found[key] = {name: [row.get(name) for row in rows] for name in names if name in rows[0]}
    return found
