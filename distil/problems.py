"""Problems from the hub or from a local file, as {"id", "problem", "answer"}."""

import csv
import itertools
import json
import math
import os
import re
import urllib.error
import urllib.request
from typing import NamedTuple

from distil import flags
from distil.artifacts import DAMAGE, refuse
from distil.jsonl import read_jsonl
from distil.prompts import Prompting


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
COLUMNS = ("problem", "answer")  # of other data
FILES = (".jsonl", ".json", ".csv", ".parquet")
DATA_HELP = f"{', '.join(DATASETS)}, a hub id name[:configuration[:split]], or a {'/'.join(FILES)} file"
TEMPLATE_HELP = "directory or hub id of a model whose chat template is used (default: the model's own)"


def add_problem_flags(p, required=True, template=True, prompts=True):
    p.add_argument("--data", type=flags.path, required=required, help=DATA_HELP)
    p.add_argument("--problem_column", default="problem", help="of hub ids and files; else question")
    p.add_argument("--answer_column", default="answer", help="of hub ids and files")
    if not prompts:
        return
    p.add_argument("--limit", type=flags.non_negative_int, default=0, help="only the first N (0: all)")
    p.add_argument("--max_prompt_tokens", type=flags.positive_int, help="drop problems with longer ones")
    p.add_argument("--prompt_suffix", default="", help="text put after every problem, inside the user turn")
    p.add_argument("--system_prompt", default="", help="text of a system turn before every problem")
    thinking_help = "the chat template's switch enable_thinking"
    p.add_argument("--thinking", choices=["on", "off"], default="off", help=thinking_help)
    kwargs_help = 'more variables of the chat template, as in \'{"reasoning_effort": "high"}\''
    p.add_argument("--template_kwargs", type=flags.json_object, default={}, metavar="JSON", help=kwargs_help)
    if template:
        p.add_argument("--template_from", type=flags.path, metavar="MODEL", help=TEMPLATE_HELP)


class Asked(NamedTuple):
    """What --data and the flags beside it ask for."""

    data: str
    limit: int
    columns: tuple  # of problem and answer, in data that is not one of DATASETS
    prompting: Prompting
    max_prompt_tokens: int | None
    template_from: str | None


def columns_of(args, *more):
    """(--problem_column, --answer_column). Refused if neither --data nor `more` data sets use them."""
    columns = args.problem_column, args.answer_column
    if columns != COLUMNS and {args.data, *more} <= {*DATASETS, None}:
        refuse("--problem_column, --answer_column: this command reads no file or hub id to use them for")
    return columns


def asked(args, *more):
    """The flags of add_problem_flags(); more: data sets beside --data."""
    prompting = Prompting(args.prompt_suffix, args.system_prompt, args.thinking, args.template_kwargs)
    template_from = getattr(args, "template_from", None)
    columns = columns_of(args, *more)
    return Asked(args.data, args.limit, columns, prompting, args.max_prompt_tokens, template_from)


def hub_reachable():
    """Whether the hub answers within seconds. If not, its clients are told to look in their cache only."""
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        try:
            urllib.request.urlopen(constants.ENDPOINT, timeout=5)
        except OSError as error:
            constants.HF_HUB_OFFLINE = not isinstance(error, urllib.error.HTTPError)  # it answered
    return not constants.HF_HUB_OFFLINE


def load_problems(data, limit=0, columns=COLUMNS, context=None):
    """The first `limit` problems (0: all) of a data set, a hub id or a local file: dicts of strings.

    An id is the data set's name and the row's own `id` or `unique_id`, or else its index. columns: of
    problem and answer, in data that is not one of DATASETS. context: a column that gives `context`."""
    name, dataset, rows = load_rows(data, columns)
    names = ["problem", "question"] if dataset.problem == "problem" else [dataset.problem]
    problems, seen = [], {}
    for index, (where, row) in enumerate(itertools.islice(rows, limit or None)):
        values, id = filled(row), own_id(seen, name, where, row, index)
        text = next((values[column] for column in names if column in values), None)
        answer = gold_answer(values.get(dataset.answer))
        see = "--problem_column, --answer_column"
        needed = [(names, text, see), ([dataset.answer], answer, see)]
        if context is not None:
            needed.append(([context], values.get(context), "--teacher_context_column"))
        for wanted, value, see in needed:
            if not isinstance(value, str) or not value.strip():
                if has := [column for column in wanted if column in row]:
                    refuse(f"{where}: its {has[0]!r} is {json.dumps(row[has[0]], default=str):.80}, not text")
                names, has = " or ".join(map(repr, wanted)), ", ".join(map(repr, row))
                refuse(f"{where}: no column {names} (see {see}); it has {has}")
        hint = {} if context is None else {"context": values[context]}
        problems.append({"id": id, "problem": text, "answer": answer, **hint})
    if not problems:
        refuse(f"--data {data}: no problems in it")
    return problems


def filled(row):
    """What a row has: its columns that are not null, NaN or empty."""
    return {column: x for column, x in row.items() if x not in (None, "") and x == x}


def own_id(seen, name, where, row, index, problem=None):
    """NAME/ and a row's own `id` or `unique_id`, or else its index; seen: {id: its first row}, kept here.

    Refused if it is neither text nor a number, or if another row has it, but for responses to one problem."""
    values = filled(row)
    key = values.get("id", values.get("unique_id", index))
    if type(key) not in (str, int, float):
        refuse(f"{where}: its id must be text or a number, not {key!r}")
    first, same = seen.setdefault(f"{name}/{key}", (where, hash(problem)))
    if first != where and (problem is None or same != hash(problem)):
        refuse(f"{where}: the id {key!r} was already used at {first}; ids of different problems must differ")
    return f"{name}/{key}"


def load_rows(data, columns=COLUMNS, flag="--data"):
    """(name, DataSet, iterator of (where, row)) of a local file, one of DATASETS or a hub id."""
    name, kind = os.path.splitext(os.path.basename(data))
    if kind in FILES:
        return name, DataSet(data, None, "", *columns), read_file(data, kind, flag)
    return load_from_hub(data, columns, flag)


def read_file(path, kind, flag="--data"):
    """Yield (place, row). Not by the loaders of `datasets`: they make 7 of "007" and null of "NA"."""
    if not os.path.isfile(path):
        refuse(f"{flag} {path}: no such file")
    number = 0
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if kind == ".parquet":
                from pyarrow import parquet

                rows = parquet.ParquetFile(path).read().to_pylist()
            elif kind == ".csv":
                rows = csv.DictReader(file, strict=True)
            elif kind == ".json" and (text := file.read()).lstrip().startswith("["):
                rows = json.loads(text)
                json.dumps(rows, ensure_ascii=False).encode()  # half of a surrogate pair is no character
            else:
                return (yield from read_jsonl(path))
            for number, row in enumerate(rows, 1):
                if not isinstance(row, dict) or None in row:
                    refuse(f"{path} row {number}: not an object, or more fields than columns")
                yield f"{path} row {number}", row
    except (OSError, csv.Error, NotImplementedError, *DAMAGE) as error:
        refuse(f"cannot read {path} after row {number}: {error}")


def load_from_hub(data, columns, flag):
    """load_rows() of one of DATASETS or of name[:configuration[:split]]."""
    if data not in DATASETS and (os.path.isfile(data) or not re.match(r"[\w.-]+/[\w.-]+(:|$)", data)):
        refuse(f"{flag} {data}: must be {DATA_HELP}")
    name, configuration, split = (data.split(":") + ["", ""])[:3]
    dataset = DATASETS.get(data) or DataSet(name, configuration or None, split or "train", *columns)
    reachable = hub_reachable()
    from datasets import exceptions, load_dataset

    name, configuration, split = dataset[:3]
    try:
        rows = load_dataset(name, configuration, split=split)
    except (OSError, ValueError, exceptions.DatasetsError) as error:  # not found, no network
        why = error if reachable else "the hub cannot be reached and the data set is not in the local cache"
        refuse(f"{flag} {data}: cannot load {name}: {why}; without the hub, pass a .jsonl file")
    return f"{name}/{split}", dataset, ((f"{name} split {split} row {i}", row) for i, row in enumerate(rows))


def gold_answer(answer):
    """The final answer as text: "27" of 27.0, and what follows #### (GSM8K); other types as they are.

    Commas stay: distil/grading.py knows the number 1,234 from the list 1, 2 and the pair (1,234)."""
    if type(answer) in (int, float) and abs(answer) < math.inf:
        return str(answer).removesuffix(".0")
    return answer.rpartition("####")[2].strip() if isinstance(answer, str) else answer
