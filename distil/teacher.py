"""What is known of the teacher at response positions: from stored scores, from a live teacher, or nothing."""

import os
from typing import NamedTuple

import torch
from safetensors import safe_open

from distil import ranks
from distil.artifacts import file_sha256, read_artifact, refuse
from distil.models import model_dir, output_head, response_hidden


class Signal(NamedTuple):
    """What is known of the teacher at N positions. None: not known."""

    hidden: torch.Tensor = None  # (N, H)
    head: torch.Tensor = None  # (V, H)
    top_logps: torch.Tensor = None  # (N, k) fp32, of the whole distribution
    top_ids: torch.Tensor = None  # (N, k)
    logps: torch.Tensor = None  # (N,) fp32, of the response's tokens

    def cut(self, vocab_size):
        """Without the rows of the head that are padding."""
        return self if self.head is None else self._replace(head=self.head[:vocab_size])


class Scores:
    """Reader of a scores artifact; read(row) gives that rollouts row's tensors {name: (T, ...)}, from disk when asked for."""

    def __init__(self, path, rollouts):
        self.meta = read_artifact(path, "--scores", "score_teacher")
        if self.meta["rollouts_sha256"] != file_sha256(os.path.join(rollouts, "meta.json")):
            refuse(
                f"--scores {path}: were made for other rollouts ({self.meta['args']['rollouts']}) than --rollouts {rollouts}"
            )
        self.rows, self.shards, self.head = [], [], None  # row -> (shard, first token, end)
        for number, shard in enumerate(self.meta["shards"]):
            self.shards.append(safe_open(os.path.join(path, shard["file"]), framework="pt"))
            start = 0
            for tokens in shard["tokens"]:
                self.rows.append((number, start, start + tokens))
                start += tokens
        if self.meta["args"]["signal"] == "hidden":
            with safe_open(os.path.join(path, "head.safetensors"), framework="pt") as file:
                self.head = file.get_tensor("head")  # (V, H)

    def read(self, row):
        number, start, end = self.rows[row]
        tensors = {
            name: self.shards[number].get_slice(name)[start:end] for name in self.shards[number].keys()
        }
        return {name: tensor.long() if name == "top_ids" else tensor for name, tensor in tensors.items()}


def teacher_signal(args, items):
    """(function from a batch of Responses to the teacher's Signal, the teacher's config as a dict) of a training run: from the
    cache of --scores, else from the live --teacher, else (plain SFT) nothing."""
    if args.scores:
        scores = Scores(args.scores, args.rollouts)
        signal, k = scores.meta["args"]["signal"], scores.meta["args"]["k"]
        if (
            args.vocab
            not in {"hidden": ("full", "topk", "sampled"), "topk": ("topk",), "sampled": ("sampled",)}[signal]
        ):
            refuse(
                f"--scores {args.scores}: were made with --signal {signal}, from which --vocab {args.vocab} cannot be computed"
            )
        if signal == "topk" and (args.topk_set != "teacher" or args.k > k):
            refuse(
                f"--scores {args.scores}: hold the teacher's {k} likeliest tokens; use --topk_set teacher and --k up to {k}"
            )
        for item in items:
            _, start, end = scores.rows[item.row]
            if end - start < len(item.tokens):
                refuse(
                    f"--scores {args.scores}: hold {end - start} tokens of a response of which {len(item.tokens)} are trained "
                    "on; score with a larger --max_tokens, or give a smaller --max_response_tokens"
                )
        device = "cuda" if torch.cuda.is_available() else "cpu"
        head = scores.head.to(device) if signal == "hidden" else None

        def cached(batch):
            rows = [
                {name: tensor[: len(r.tokens)] for name, tensor in scores.read(r.row).items()} for r in batch
            ]
            return Signal(
                head=head, **{name: torch.cat([row[name] for row in rows]).to(device) for name in rows[0]}
            )

        return cached, scores.meta["teacher_config"]
    if args.teacher:
        teacher = ranks.load_sharded(model_dir(args.teacher, "--teacher"), "--teacher", args.dtype)
        output_head(teacher, "--teacher")  # refused before anything is written

        @torch.no_grad()
        def live(batch):
            hidden = response_hidden(teacher, [r.prompt for r in batch], [r.tokens for r in batch])
            return Signal(hidden, output_head(teacher, "--teacher"))

        return live, teacher.config.to_dict()
    return lambda batch: Signal(), None
