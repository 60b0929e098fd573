"""The HTML report: one page that opens offline, with a table, curves, and responses token by token.

It is reports/page.html with the data in it as JSON. All numbers come from stored artifacts."""

import codecs
import json
import math
import os
import shlex

from distil.artifacts import DAMAGE, now_utc, read_sealed, refuse, write_file
from distil.evaluation import data_names
from distil.jsonl import read_jsonl
from reports.reading import (
    EVAL_CURVES,
    STEP_CURVES,
    cost_of,
    evaluations_in,
    read_evaluations,
    read_run,
    read_samples,
    without_repeats,
)

RESPONSES = 200  # of an evaluation that the page holds at most
PAGE_BYTES = 8_000_000  # of all responses on the page; evaluations have equal shares
POINTS = 1000  # of a curve
SHOWN_FROM = 1e-3  # probability of a likely token that is shown beside the likeliest


# ----------------------------------------------------------------------------------------------------------
# How a token is written


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
    """Write the page about some evaluations and runs; a run's directory stands for its evaluations too.

    Refused, with nothing written, if one of them is damaged or unfinished."""
    if os.path.isdir(path) or not path.lower().endswith((".html", ".htm")):
        refuse(f"--report {path}: must be a file that ends in .html")
    evaluations, runs = [], []
    for one in without_repeats(directories):
        is_run = os.path.isfile(os.path.join(one, "metrics.jsonl"))
        runs += [one] * is_run
        evaluations += evaluations_in(one, "--report", needed=not is_run)
    unfinished = [one for one in runs + evaluations if not os.path.isfile(os.path.join(one, "meta.json"))]
    if unfinished:
        advice = "unfinished (no meta.json); finish it with --resume, or leave it out"
        refuse(f"--report {' '.join(unfinished)}: {advice}")
    results, run_names = read_evaluations(evaluations, "--report", runs)
    share = PAGE_BYTES / max(1, len(results))
    data = {"evaluations": [read(evaluation_data, one, results[one], share) for one in results]}
    data |= {"runs": [read(run_data, one, run_names[one]) for one in runs], "written": now_utc()}
    data |= {"curves": {"evals": EVAL_CURVES, "steps": STEP_CURVES}}
    names = data_names(dict.fromkeys(one["data"] for one in data["evaluations"]))
    for one in data["evaluations"]:
        one["data"] = one["cells"]["data"][0] = names[one["data"]]
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")  # no </script>
    with open(os.path.join(os.path.dirname(__file__), "page.html"), encoding="utf-8") as file:
        page = file.read().replace("@DATA@", text)
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    write_file(path, page.encode())
    shown, stored = (sum(one[name] for one in data["evaluations"]) for name in ("shown", "stored"))
    print(f"report: {path} ({len(page.encode()) / 1e6:.1f} MB, {shown} of {stored} responses)")


def read(read_one, path, *more):
    """read_one(path, *more). Refused if its files, though unchanged, lack what the page needs."""
    try:
        return read_one(path, *more)
    except (*DAMAGE, IndexError) as error:
        advice = "make it again, or leave it out"
        refuse(f"--report {path}: its files are not what this version writes ({error!r}); {advice}")


def made(path, meta):
    """{what: text}: where an artifact is and how it was made, from its meta.json."""
    versions = [f"Python {meta['python']}", *(" ".join(one) for one in meta["versions"].items())]
    words = []
    for name, value in meta["args"].items():
        if value is not None and value is not False and value not in ("", [], {}):
            values = [] if value is True else value if isinstance(value, list) else [value]
            words += [f"--{name}", *(one if isinstance(one, str) else json.dumps(one) for one in values)]
    return {
        "directory": path,
        "stage": meta["stage"],
        "started": meta["started"],
        "finished": meta["finished"],
        "commit": (meta["commit"] or "unknown") + " with uncommitted changes" * meta["dirty"],
        "device": meta["device"],
        "versions": ", ".join(versions),
        "command": shlex.join(meta["argv"]),
        "all flags": shlex.join(words),
    }


def evaluation_data(path, results, share):
    """What the page says of an evaluation; its responses take at most `share` bytes."""
    rows = read_samples(path)
    details, texts = read_details(path, {(row["id"], row["sample"]) for row in rows[:RESPONSES]})
    found = {"name": results["run"], "data": results["data"], "cells": table_cells(results)}
    found["trained"] = results["step"] is not None
    found["made"] = made(path, read_sealed(os.path.join(path, "meta.json"), f"--report {path}"))
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
    cells["TFLOPs"] = [cost_of(results), ""]
    return cells


def run_data(run, name):
    """A run's curves: {"evals", "steps": {name: values}}; of each log one row in "every" is drawn."""
    meta, logs = read_run(run, "--report")
    found = {"name": name, "training": meta["cell"]["name"], "made": made(run, meta)}
    found |= {"evals": None, "every": {}}
    for log, key, curves in (("metrics", "steps", STEP_CURVES), ("evals", "evals", EVAL_CURVES)):
        if log not in logs:
            continue
        rows = logs[log]
        every = found["every"][key] = max(1, math.ceil(len(rows) / POINTS))
        rows = rows[::-1][::every][::-1]  # the last is drawn
        names = ["step", "tflops", *curves, *(f"{curve}_interval" for curve in curves)]
        found[key] = {name: [row.get(name) for row in rows] for name in names if name in rows[0]}
    return found
