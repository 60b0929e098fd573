"""What the stages are given: problems and models, from the hub or from disk, and how a problem becomes a prompt.

There is one prompt template, one rule for the ids that end a response, and one way to tell two tokenizers apart; all are here.
"""
import hashlib
import json
import math
import os
import re
import urllib.error
import urllib.request

import torch
from safetensors import SafetensorError

from artifacts import read_artifact, read_checkpoint, read_jsonl, refuse

# The hub data sets of the field: alias -> (hub id, configuration, split).
ALIASES = {
    "deepscaler": ("agentica-org/DeepScaleR-Preview-Dataset", None, "train"),
    "gsm8k_train": ("openai/gsm8k", "main", "train"),
    "gsm8k": ("openai/gsm8k", "main", "test"),
    "math500": ("HuggingFaceH4/MATH-500", None, "test"),
    "aime24": ("HuggingFaceH4/aime_2024", None, "train"),
    "amc23": ("math-ai/amc23", None, "test"),
}
DATA_HELP = f"problems: {', '.join(ALIASES)}, a hub id as name[:configuration[:split]], or a local .jsonl file"


def add_problem_flags(p, required=True):
    p.add_argument("--data", required=required, help=DATA_HELP)
    p.add_argument("--limit", type=int, default=0, help="use only the first N problems (0: all)")
    p.add_argument("--prompt_suffix", default="", help="text put after every problem, inside the user turn")


def default_dtype():
    return "bfloat16" if torch.cuda.is_available() else "float32"

# ---------------------------------------------------------------------------------------------------------------------
# Problems


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
                refuse(f"{where}: no `{column}`" + (" (or `question`)" if column == "problem" else "") + f"; it has {sorted(row)}")
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
        refuse(f"--data {data}: {repo} could not be loaded: {why}\n"
               "To go on without the hub, pass a local file: --data problems.jsonl with `problem` and `answer` in each line")
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

# ---------------------------------------------------------------------------------------------------------------------
# Models' directories, prompts, stop ids


def model_dir(name, flag):
    """The local directory of a model given as a directory or as a hub id; only safetensors weights are fetched."""
    if os.path.isdir(name):
        if not os.path.isfile(os.path.join(name, "config.json")):
            refuse(f"{flag} {name}: no config.json in this directory, so it is not a model")
        for path in (os.path.join(name, file) for file in ("config.json", "generation_config.json")):
            try:
                damaged = os.path.isfile(path) and not isinstance(json.load(open(path, encoding="utf-8")), dict)
            except (ValueError, RecursionError):
                damaged = True
            if damaged:
                refuse(f"{flag} {name}: {os.path.basename(path)} is not a JSON object")
        run = os.path.dirname(os.path.realpath(name))
        if os.path.isfile(os.path.join(run, "meta.json")):  # of a finished artifact, as final/ is: its checksums are there
            read_artifact(run, flag)
        if re.fullmatch(r"step_\d{6}", os.path.basename(os.path.realpath(name))):
            read_checkpoint(name, flag)
        return name
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        refuse(f"{flag} {name}: no such directory")
    reachable = hub_reachable()
    from huggingface_hub import snapshot_download
    try:
        return snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"])
    except (OSError, ValueError) as error:
        why = f"does not give it: {error}" if reachable else "cannot be reached"
        refuse(f"{flag} {name}: no such directory, and the hub {why}")


def load_tokenizer(directory, flag):
    """The tokenizer of a local directory, with a chat template that works. A tokenizer with code of its own is refused."""
    from transformers import AutoTokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        rendered = tokenizer.chat_template and render_prompt(tokenizer, "1+1=?")
    except Exception as error:  # json's, jinja's, transformers' or Rust's: whatever is wrong with its files
        refuse(f"{flag} {directory}: its tokenizer cannot be loaded: {error}")
    if not rendered:
        refuse(f"{flag} {directory}: its tokenizer has no chat template, so there is no prompt to render")
    return tokenizer


def load_model(directory, flag, dtype, device="cuda" if torch.cuda.is_available() else "cpu"):
    """The causal language model of a local directory, on the GPU if there is one. Only safetensors are read."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging
    logging.disable_progress_bar()
    try:
        model, report = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, use_safetensors=True, trust_remote_code=False,
                                                             output_loading_info=True)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, SafetensorError) as error:
        refuse(f"{flag} {directory}: the model cannot be loaded: {error}")
    if wrong := [*report["missing_keys"], *report["mismatched_keys"]]:  # these weights would be random
        refuse(f"{flag} {directory}: {len(wrong)} of its weights are missing or of another shape, such as {sorted(map(str, wrong))[0]}")
    return model.to(device).eval()


def prompt_text(tokenizer, content):
    """The prompt as text: one user turn, the generation prompt, thinking off. The project's only template code."""
    return tokenizer.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True,
                                         enable_thinking=False, tokenize=False)


def render_prompt(tokenizer, problem, suffix=""):
    """Token ids of the prompt. A problem that spells a special token (say "<|im_end|>") has it encoded as plain text and cannot end
    its own turn."""
    if not any(token in problem for token in tokenizer.get_added_vocab()):
        return tokenizer(prompt_text(tokenizer, problem + suffix), add_special_tokens=False).input_ids
    head, tail = prompt_text(tokenizer, "\0" + suffix).split("\0")
    parts = [(head, False), (problem, True), (tail, False)]
    return [i for text, plain in parts for i in tokenizer(text, add_special_tokens=False, split_special_tokens=plain).input_ids]


def encode_problems(args, problems, tokenizer, context, limit="max_response_tokens"):
    """Prompt ids of every problem; refused where a prompt and a response as long as the flag `limit` allows exceed the context."""
    prompts, longest = [render_prompt(tokenizer, problem["problem"], args.prompt_suffix) for problem in problems], getattr(args, limit)
    for problem, prompt in zip(problems, prompts):
        if len(prompt) + longest > context:
            refuse(f"problem {problem['id']}: its prompt has {len(prompt)} tokens; with --{limit} {longest} that exceeds the model's "
                   f"context of {context}")
    return prompts


def context_of(directory):
    """Tokens that a model's positions are made for."""
    from transformers import AutoConfig
    try:
        return int(AutoConfig.from_pretrained(directory, trust_remote_code=False).max_position_embeddings)
    except Exception as error:  # whatever is wrong with the file; or a model with code of its own, which is never run
        refuse(f"{directory}: its config.json cannot be used: {error}")


def tokenizer_sha256(tokenizer):
    """Hash of the map from tokens to ids: equal maps mean that ids have equal meanings."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def template_sha256(tokenizer, suffix=""):
    """Hash of what the model is shown around a problem (template, suffix and thinking switch, as token ids)."""
    return hashlib.sha256(json.dumps(render_prompt(tokenizer, "1+1=?", suffix)).encode()).hexdigest()


def stop_ids(tokenizer, *directories):
    """Every id that ends a response, sorted: the tokenizer's end token and those of each model's generation_config, or of its config
    where it has none."""
    ids = {tokenizer.eos_token_id}
    for directory in directories:
        paths = [os.path.join(directory, name) for name in ("generation_config.json", "config.json")]
        found = [json.load(open(path)).get("eos_token_id") for path in paths if os.path.isfile(path)]
        eos = next((eos for eos in found if eos is not None), [])
        eos = eos if isinstance(eos, list) else [eos]
        if not all(type(i) is int for i in eos):
            refuse(f"{directory}: eos_token_id must be a token id or a list of them, not {eos}")
        ids.update(eos)
    return sorted(ids - {None})
