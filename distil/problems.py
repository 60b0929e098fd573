"""Problems from the hub or from a local .jsonl file, as {"id", "problem", "answer"}."""

import math
import os
import urllib.error
import urllib.request

from distil.artifacts import read_jsonl, refuse

# The hub data sets of the field: alias -> (hub id, configuration, split).
ALIASES = {
    "deepscaler": ("agentica-org/DeepScaleR-Preview-Dataset", None, "train"),
    "gsm8k_train": ("openai/gsm8k", "main", "train"),
    "gsm8k": ("openai/gsm8k", "main", "test"),
    "math500": ("HuggingFaceH4/MATH-500", None, "test"),
    "aime24": ("HuggingFaceH4/aime_2024", None, "train"),
    "amc23": ("math-ai/amc23", None, "test"),
}


DATA_HELP = (
    f"problems: {', '.join(ALIASES)}, a hub id as name[:configuration[:split]], or a local .jsonl file"
)


def add_problem_flags(p, required=True):
    p.add_argument("--data", required=required, help=DATA_HELP)
    p.add_argument("--limit", type=int, default=0, help="use only the first N problems (0: all)")
    p.add_argument("--prompt_suffix", default="", help="text put after every problem, inside the user turn")


def hub_reachable():
    """Whether the hub answers within seconds. Where it does not, its clients are told to look in their cache only."""
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
    """Problems of an alias, a hub id or a local .jsonl -> list of {"id", "problem", "answer"}, all strings.

    The id is the row's own `id` or `unique_id` where it has one, else its index, behind the data set's name and split."""
    if os.path.isfile(data) or data.endswith(".jsonl"):
        name, rows = os.path.splitext(os.path.basename(data))[0], read_jsonl(data)
    else:
        name, rows = load_from_hub(data)
    problems, seen = [], {}
    for index, (where, row) in enumerate(rows):
        key = next((row[name] for name in ("id", "unique_id") if row.get(name) is not None), index)
        if not isinstance(key, (str, int, float)):
            refuse(f"{where}: its id must be text or a number, not {key!r}")
        text = row.get("problem", row.get("question"))
        problem = {"id": f"{name}/{key}", "problem": text, "answer": gold_answer(row.get("answer"))}
        for column in ("problem", "answer"):
            if not isinstance(problem[column], str) or not problem[column].strip():
                refuse(
                    f"{where}: no `{column}`"
                    + (" (or `question`)" if column == "problem" else "")
                    + f"; it has {sorted(row)}"
                )
        if problem["id"] in seen:
            refuse(f"{where}: the id {key!r} was already used at {seen[problem['id']]}; ids must differ")
        seen[problem["id"]] = where
        problems.append(problem)
        if limit and len(problems) == limit:
            break
    if not problems:
        refuse(f"--data {data}: no problems in it")
    return problems


def load_from_hub(data):
    """(name, iterator of (where, row)) of an alias or of a hub id written as name[:configuration[:split]]."""
    if data in ALIASES:
        repo, config, split = ALIASES[data]
    elif "/" in data:
        repo, config, split = (data.split(":") + [None, None])[:3]
        split = split or "train"
    else:
        refuse(f"--data {data}: neither a file nor an alias ({', '.join(ALIASES)}) nor a hub id (owner/name)")
    reachable = hub_reachable()
    from datasets import load_dataset

    try:
        rows = load_dataset(repo, config or None, split=split)
    except (OSError, ValueError) as error:  # not found, no network, no such configuration or split
        why = error if reachable else "the hub cannot be reached and the data set is not in the local cache"
        refuse(
            f"--data {data}: {repo} could not be loaded: {why}\n"
            "To go on without the hub, pass a local file: --data problems.jsonl with `problem` and `answer` in each line"
        )
    return f"{repo}/{split}", ((f"{repo} split {split} row {i}", row) for i, row in enumerate(rows))


def gold_answer(answer):
    """The final answer as text: GSM8K's after its ####, whole floats without the .0 ("#### 1,234" -> "1234", 27.0 -> "27")."""
    if isinstance(answer, float) and not math.isfinite(answer):
        return None
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        answer = str(answer)
    if isinstance(answer, str) and "####" in answer:
        answer = answer.rsplit("####", 1)[1].strip().replace(",", "")
    return answer
