"""What is known of the teacher at response positions: from stored scores, a model, a server, or nothing."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from safetensors import safe_open

from distil import ranks
from distil.artifacts import check_files, file_sha256, read_artifact, refuse
from distil.models import config_of, default_device, forward, output_head, rows_of
from distil.prompts import check_template, encode_problems
from distil.server import connect

USES = {"hidden": ("full", "topk", "sampled"), "topk": ("topk",), "sampled": ("sampled",)}  # by --signal


class Signal(NamedTuple):
    """The teacher at N positions, each of which predicts a response token. None: not known."""

    hidden: torch.Tensor | None = None  # (N, H)
    head: torch.Tensor | None = None  # (V, H); the logits are hidden @ head.T
    top_logps: torch.Tensor | None = None  # (N, k) float32, log-probabilities under the whole distribution
    top_ids: torch.Tensor | None = None  # (N, k)
    logps: torch.Tensor | None = None  # (N,) float32, of the response's own tokens


class Teacher(NamedTuple):
    """The teacher of a run, wherever its signal comes from."""

    signal: Callable = lambda responses: Signal()  # from a list of Responses to their Signal
    config: dict | None = None  # of its model, for the cost ledger
    head_rows: int | None = None  # of its output head, or of the scored part of it
    read_ahead: Callable = lambda responses: None  # from a disk or a server, while the device is busy
    prompt_tokens: Callable = lambda response: len(response.teacher_prompt_ids or response.prompt_ids)


def add_teacher_prompt_flags(p):
    """The flags that give the teacher a prompt of its own, before the same response tokens."""
    system_help = "the teacher's own system prompt, in place of the student's"
    p.add_argument("--teacher_system_prompt", metavar="TEXT", help=system_help)
    context_help = "column of --data, such as a solution, that the teacher alone sees after the problem"
    p.add_argument("--teacher_context_column", metavar="COLUMN", help=context_help)


def own_prompts(problems, tokenizer, prompting, system, size, context, most, limit):
    """(problems, with `teacher_prompt_ids` if the teacher has prompts of its own, number dropped).

    Its user turn is the problem, a blank line and the problem's `context`, if it has one; system: its system
    prompt (None: that of the student's `prompting`); the rest is as in encode_problems()."""
    if system is None and "context" not in problems[0]:
        return problems, 0  # it sees the student's
    if system is not None:
        prompting = prompting._replace(system_prompt=system)
    check_template(tokenizer, "--teacher", "use another", prompting, "--teacher_system_prompt")
    hints = [f"\n\n{p['context']}" if "context" in p else "" for p in problems]
    seen = [p | {"problem": p["problem"] + hint, "plain": p} for p, hint in zip(problems, hints)]
    about = size, context, most, limit
    kept, prompts, dropped = encode_problems(seen, tokenizer, prompting, *about, whose="the teacher's")
    return [p["plain"] | {"teacher_prompt_ids": ids} for p, ids in zip(kept, prompts)], dropped


def live_teacher(directory, dtype, vocab_size):
    """A model in memory, which scores responses when they are needed."""
    model = ranks.load_sharded(directory, "--teacher", dtype)
    rows = len(output_head(model))

    @torch.no_grad()
    def signal(responses):
        return Signal(*forward(model, list(map(as_taught, responses)), vocab_size))

    return Teacher(signal, model.config.to_dict(), rows)


def stored_teacher(path, rollouts, responses, vocab, k, topk_set):
    """The scores that score_teacher.py stored for these rollouts; refused if not enough for the run.

    path: None if there are none."""
    if path is None:
        return Teacher()
    scores = Scores(path, rollouts)
    kind, stored_k = scores.meta["args"]["signal"], scores.meta["args"]["k"]
    if vocab not in USES[kind]:
        refuse(f"--scores {path}: made with --signal {kind}, from which --vocab {vocab} cannot be computed")
    if kind == "topk" and (topk_set != "teacher" or k > stored_k):
        what = f"hold the teacher's {stored_k} likeliest tokens"
        refuse(f"--scores {path}: {what}; use --topk_set teacher and --k up to {stored_k}")
    for response in responses:
        stored, trained = scores.tokens(response.row), len(response.response_ids)
        if stored < trained:
            what = f"hold {stored} tokens of a response of which {trained} are trained on"
            refuse(f"--scores {path}: {what}; a larger --max_tokens, or a smaller --max_response_tokens")
    for name in ("teacher_system_prompt", "teacher_context_column"):
        if (value := scores.meta["args"].get(name)) is not None:
            print(f"--scores {path}: made with --{name} {value!r}")
    config = scores.meta["teacher_config"]
    head = scores.head.to(default_device()) if kind == "hidden" else None
    read = lambda r: scores.read(r.row, len(r.response_ids))
    own = scores.meta.get("teacher_prompt_tokens", {})
    prompt_tokens = lambda r: own.get(r.id, len(r.prompt_ids))
    rows = config["vocab_size"] if head is None else len(head)
    signal, read_ahead = reader(read, ThreadPoolExecutor(1), head)
    return Teacher(signal, config, rows, read_ahead, prompt_tokens)


def served_teacher(url, model, directory, vocab_size, longest, k, requests, timeout):
    """A teacher behind a server: its k likeliest tokens or, if k is 0, the response's own."""
    about = model, directory, vocab_size, longest + 1, requests, timeout  # 1: a server always samples
    server = connect(url, "--teacher_server", *about)
    signal, read_ahead = reader(lambda r: server.score(as_taught(r), k), server.pool)
    return Teacher(signal, config_of(directory).to_dict(), rows_of(directory), read_ahead)


def as_taught(response):
    """The Response behind the prompt that the teacher sees."""
    return response._replace(prompt_ids=response.teacher_prompt_ids or response.prompt_ids)


def reader(read, pool, head=None):
    """(signal, read_ahead) of a Teacher; read(response), in the pool, gives its tensors {name: (T, ...)}."""
    device, ahead = default_device(), {}
    key = lambda r: (r.id, r.row, *r.prompt_ids, -1, *r.response_ids)

    def read_pinned(response):
        tensors = read(response)
        return {name: t.pin_memory() if device == "cuda" else t for name, t in tensors.items()}

    def read_ahead(responses):
        for r in responses:
            ahead[key(r)] = pool.submit(read_pinned, r)

    def signal(responses):
        waiting = [ahead.pop(key(r), None) or pool.submit(read_pinned, r) for r in responses]
        rows = [future.result() for future in waiting]
        tensors = {n: torch.cat([r[n].to(device, non_blocking=True) for r in rows]) for n in rows[0]}
        return Signal(head=head, **tensors)

    return signal, read_ahead


class Scores:
    """Reader of a scores artifact. Shards are checked when first read, tensors read when asked for."""

    def __init__(self, path, rollouts):
        self.path, self.shards = path, {}  # {number: open file}
        self.meta = read_artifact(path, "--scores", "score_teacher", later="shard_")
        if self.meta["rollouts_sha256"] != file_sha256(os.path.join(rollouts, "meta.json")):
            made_for = self.meta["args"]["rollouts"]
            refuse(f"--scores {path}: were made for other rollouts ({made_for}) than --rollouts {rollouts}")
        self.head, self.places = None, []  # of each rollouts row: (shard, first token, end)
        for number, shard in enumerate(self.meta["shards"]):
            start = 0
            for tokens in shard["tokens"]:
                self.places.append((number, start, start + tokens))
                start += tokens
        if self.meta["args"]["signal"] == "hidden":
            with safe_open(os.path.join(path, "head.safetensors"), framework="pt") as file:
                self.head = file.get_tensor("head")  # (V, H)

    def tokens(self, row):
        """How many tokens of a rollouts row are scored."""
        _, start, end = self.places[row]
        return end - start

    def read(self, row, count=None):
        """The tensors {name: (T, ...)} of the first `count` tokens of a rollouts row, or of all of them."""
        number, start, end = self.places[row]
        end = end if count is None else start + count
        if number not in self.shards:
            name = self.meta["shards"][number]["file"]
            check_files(self.path, "--scores", {name: self.meta["files"][name]}, "make it again")
            self.shards[number] = safe_open(os.path.join(self.path, name), framework="pt")
        shard = self.shards[number]
        tensors = {name: shard.get_slice(name)[start:end] for name in shard.keys()}
        return {name: tensor.long() if name == "top_ids" else tensor for name, tensor in tensors.items()}
