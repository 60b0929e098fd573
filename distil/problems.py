"""Problems from the hub or from a local .jsonl file, as {"id", "problem", "answer"}."""

import math
import os
import re
import urllib.error
import urllib.request
from typing import NamedTuple

from distil import flags
from distil.artifacts import refuse
from distil.jsonl import read_jsonl


class DataSet(NamedTuple):
    """A data set of the hub and its columns. To add one, add it to DATASETS: --data takes the name."""

    repository: str
    configuration: str | None = None
    split: str = "train"
    problem: str = "problem"  # or "question", in a row without "problem"
    answer: str = "answer"


DATASETS = {
    "deepscaler": DataSet("agentica-org/DeepScaleR-Preview-Dataset"),
    "gsm8k_train": DataSet("openai/gsm8k", "main"),
    "gsm8k": DataSet("openai/gsm8k", "main", "test"),
    "math500": DataSet("HuggingFaceH4/MATH-500", split="test"),
    "aime24": DataSet("HuggingFaceH4/aime_2024"),
    "amc23": DataSet("math-ai/amc23", split="test"),
}
DATA_HELP = f"problems: {', '.join(DATASETS)}, a hub id name[:configuration[:split]], or a .jsonl file"


def add_problem_flags(p, required=True):
    p.add_argument("--data", type=flags.path, required=required, help=DATA_HELP)
    p.add_argument(
        "--limit", type=flags.non_negative_int, default=0, help="only the first N problems (0: all)"
    )
    p.add_argument("--prompt_suffix", default="", help="text put after every problem, inside the user turn")


def hub_reachable():
    """Whether the hub answers within seconds. If not, its clients are told to look in their cache only."""
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        try:
            urllib.request.urlopen(constants.ENDPOINT, timeout=5)
        except urllib.error.HTTPError:
            pass  # it answered
        except OSError:
            constants.HF_HUB_OFFLINE = True
    return not constants.HF_HUB_OFFLINE


def load_problems(data, limit=0):
    """The first `limit` problems (0: all) of a data set, a hub id or a local .jsonl file: dicts of strings.

    An id is the data set's name and the row's own `id` or `unique_id`, or else its index."""
    if os.path.isfile(data) or data.endswith(".jsonl"):
        name, dataset = os.path.splitext(os.path.basename(data))[0], DataSet(data)
        rows = read_jsonl(data)
    else:
        name, dataset, rows = load_from_hub(data)
    columns = [dataset.problem, "question"] if dataset.problem == "problem" else [dataset.problem]
    problems, seen = [], {}
    for index, (where, row) in enumerate(rows):
        key = next((row[column] for column in ("id", "unique_id") if row.get(column) is not None), index)
        if not isinstance(key, (str, int, float)):
            refuse(f"{where}: its id must be text or a number, not {key!r}")
        text = next((row[column] for column in columns if column in row), None)
        answer = gold_answer(row.get(dataset.answer))
        for names, value in ((columns, text), ([dataset.answer], answer)):
            if not isinstance(value, str) or not value.strip():
                refuse(f"{where}: no {' or '.join(names)}; it has {sorted(row)}")
        id = f"{name}/{key}"
        if id in seen:
            refuse(f"{where}: the id {key!r} was already used at {seen[id]}; ids must differ")
        seen[id] = where
        problems.append({"id": id, "problem": text, "answer": answer})
        if len(problems) == limit:
            break
    if not problems:
        refuse(f"--data {data}: no problems in it")
    return problems


def load_from_hub(data):
    """(name, DataSet, iterator of (where, row)) of one of DATASETS or of name[:configuration[:split]]."""
    if data not in DATASETS and "/" not in data:
        refuse(f"--data {data}: no file, no data set ({', '.join(DATASETS)}) and no hub id (owner/name)")
    name, configuration, split = (data.split(":") + ["", ""])[:3]
    dataset = DATASETS.get(data) or DataSet(name, configuration or None, split or "train")
    reachable = hub_reachable()
    from datasets import load_dataset

    name, configuration, split = dataset[:3]
    try:
        rows = load_dataset(name, configuration, split=split)
    except (OSError, ValueError) as error:  # not found, no network, no such configuration or split
        why = error if reachable else "the hub cannot be reached and the data set is not in the local cache"
        local = "pass a local file: --data problems.jsonl with `problem` and `answer` in each line"
        refuse(f"--data {data}: {name} could not be loaded: {why}\nWithout the hub, {local}")
    return f"{name}/{split}", dataset, ((f"{name} split {split} row {i}", row) for i, row in enumerate(rows))


def gold_answer(answer):
    """The final answer as text, of GSM8K's what follows ####; None, True and lists are returned as they are.

    27.0 -> "27"; "#### 1,234" -> "1234", "#### 1, 2" -> "1, 2", and "#### (1,234)" is a pair: "(1,234)"."""
    if isinstance(answer, float) and not math.isfinite(answer):
        return None
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        return str(answer)
    if not isinstance(answer, str) or "####" not in answer:
        return answer
    answer = answer.rsplit("####", 1)[1].strip()
    if re.search(r"[(\[{]", answer):
        return answer  # in brackets, commas separate
    thousands = r"(?<![\d,.])[1-9]\d{0,2}(,\d{3})+(?![\d,])"
    return re.sub(thousands, lambda match: match[0].replace(",", ""), answer)
