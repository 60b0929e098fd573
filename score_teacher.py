"""Score stored responses with the teacher, once, so that training needs no teacher in memory.

    rollouts/  ->  scores/shard_00000.safetensors, ..., scores/head.safetensors, scores/meta.json

    python score_teacher.py --teacher Qwen/Qwen3-4B --rollouts out/rollouts --out out/scores

What is stored is the teacher's last hidden state at every position that predicts a response token, in the dtype the teacher
computes in, and the output head once: hidden @ head.T are the teacher's logits, so training from the cache is exact over the
whole vocabulary, in either KL direction, at 5 KB a token (hidden size 2560, bf16) where the logits would take 304 KB.

This file also owns everything about teacher and student as a pair: the check that their ids mean the same, and how hidden states
and token log-probabilities of responses are computed.
"""
import argparse
import json
import math
import os
import shutil

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from artifacts import add_output_flags, check_out, file_sha256, finish_artifact, read_artifact, refuse, start_artifact
from inputs import default_dtype, load_model, load_tokenizer, model_dir, template_sha256, tokenizer_sha256
from rollout import read_rollouts


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--teacher", required=True, help="Hugging Face directory or hub id of the teacher")
    p.add_argument("--rollouts", required=True, help="directory written by rollout.py")
    p.add_argument("--max_tokens", type=int, default=0, help="score only the first N tokens of each response (0: all)")
    p.add_argument("--micro_batch_tokens", type=int, default=16384, help="tokens in one forward pass, padding included")
    p.add_argument("--shard_tokens", type=int, default=200_000, help="response tokens in one shard")
    p.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default=default_dtype(), help="dtype of the teacher")
    add_output_flags(p)
    return p.parse_args(argv)

# ---------------------------------------------------------------------------------------------------------------------
# Teacher and student as a pair


def check_tokenizers(tokenizer, flag, other_sha256, other_flag):
    """Refuse two tokenizers whose ids mean different tokens: a KL over their vocabularies would compare unrelated words."""
    if tokenizer_sha256(tokenizer) != other_sha256:
        refuse(f"{flag} and {other_flag} have different tokenizers (their maps from tokens to ids differ); "
               "distillation over the vocabulary needs one tokenizer for both")


def match_tokenizers(args, student, teacher, flag):
    """Same ids, and the same prompt around a problem; with --take_template the student takes the other's template, in place."""
    check_tokenizers(student, "--student", tokenizer_sha256(teacher), flag)
    if template_sha256(student) != template_sha256(teacher):
        if not args.take_template:
            refuse(f"--student and {flag} have different prompt templates: the teacher would score prompts that it was not "
                   "trained on; --take_template gives the student the teacher's")
        student.chat_template = teacher.chat_template
        print(f"--take_template: the student's prompt template is now that of {flag}")


def output_head(model, flag):
    """The output projection's weight (V, H); models that do more than hidden @ weight.T to get their logits are refused."""
    head = model.get_output_embeddings()
    for name in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        if getattr(model.config, name, None) not in (None, 1.0):
            refuse(f"{flag}: the model changes its logits by {name}, which the KL from hidden states does not support")
    if head is None or getattr(head, "bias", None) is not None:
        refuse(f"{flag}: the model has no plain output projection (none, or one with a bias)")
    return head.weight

# ---------------------------------------------------------------------------------------------------------------------
# Hidden states and log-probabilities of responses


def batches_by_tokens(lengths, budget):
    """Indices grouped by similar length, so that rows x longest <= budget in each batch (a longer row goes alone).

    batches_by_tokens([3, 9, 4, 2], 9) -> [[3, 0], [2], [1]]"""
    batches = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batches and (len(batches[-1]) + 1) * lengths[i] <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def response_hidden(model, prompts, responses):
    """Last hidden states (N, H) of the positions that predict the response tokens, row after row without padding.

    prompts, responses: lists of lists of token ids; N is the number of response tokens. With prompt [a b] and response [x y e]:
        input       a  b  x  y       the last token needs no input, it predicts nothing
        predicts    b  x  y  e
        taken          *  *  *       the positions from the prompt's last token on"""
    rows = [prompt + response[:-1] for prompt, response in zip(prompts, responses, strict=True)]
    width, device = max(map(len, rows)), model.device
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)          # (B, T), padded on the right
    length = torch.tensor([len(row) for row in rows], device=device)[:, None]
    first = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)[:, None]
    column = torch.arange(width, device=device)[None]
    hidden = model.get_decoder()(input_ids=ids, attention_mask=(column < length).long(), use_cache=False).last_hidden_state
    return hidden[(column >= first) & (column < length)]


def token_logps(hidden, head, tokens, vocab_size, chunk=4096):
    """log p(token) (N,) in fp32, from hidden states (N, H) and head (V, H); logits exist for `chunk` tokens at a time."""
    def logps(hidden, tokens):
        logits = (hidden @ head[:vocab_size].T.to(hidden.dtype)).float()
        return -torch.nn.functional.cross_entropy(logits, tokens, reduction="none")
    pieces = [checkpoint(logps, h, t, use_reentrant=False) for h, t in zip(hidden.split(chunk), tokens.split(chunk))]
    return torch.cat(pieces) if pieces else hidden.new_zeros(0, dtype=torch.float32)

# ---------------------------------------------------------------------------------------------------------------------
# The scores artifact


class Scores:
    """Reader of a scores artifact: hidden(row) is the (T, H) tensor of that rollouts row, read from disk when asked for."""

    def __init__(self, path, rollouts):
        self.meta = read_artifact(path, "--scores", "score_teacher")
        if self.meta["rollouts_sha256"] != file_sha256(os.path.join(rollouts, "meta.json")):
            refuse(f"--scores {path}: were made for other rollouts ({self.meta['args']['rollouts']}) than --rollouts {rollouts}")
        self.rows, self.shards = [], []  # row -> (shard, first token, end)
        for number, shard in enumerate(self.meta["shards"]):
            self.shards.append(safe_open(os.path.join(path, shard["file"]), framework="pt"))
            start = 0
            for tokens in shard["tokens"]:
                self.rows.append((number, start, start + tokens))
                start += tokens
        with safe_open(os.path.join(path, "head.safetensors"), framework="pt") as file:
            self.head = file.get_tensor("head")  # (V, H)

    def hidden(self, row):
        shard, start, end = self.rows[row]
        return self.shards[shard].get_slice("hidden")[start:end]


def teacher_states(args, items):
    """(function, teacher's config as a dict) of a training run. The function maps Responses to the teacher's hidden states (N, H)
    and head (V, H): from the cache of --scores, else from the live --teacher, else (plain SFT) to (None, None)."""
    if args.scores:
        scores = Scores(args.scores, args.rollouts)
        for item in items:
            _, start, end = scores.rows[item.row]
            if end - start < len(item.tokens):
                refuse(f"--scores {args.scores}: hold {end - start} tokens of a response of which {len(item.tokens)} are trained "
                       "on; score with a larger --max_tokens, or give a smaller --max_response_tokens")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        head = scores.head.to(device)

        def cached(batch):
            return torch.cat([scores.hidden(r.row)[:len(r.tokens)] for r in batch]).to(device), head
        return cached, scores.meta["teacher_config"]
    if args.teacher:
        teacher = load_model(model_dir(args.teacher, "--teacher"), "--teacher", args.dtype).requires_grad_(False)
        head = output_head(teacher, "--teacher")

        @torch.no_grad()
        def live(batch):
            return response_hidden(teacher, [r.prompt for r in batch], [r.tokens for r in batch]), head
        return live, teacher.config.to_dict()
    return lambda batch: (None, None), None


def shards_of(lengths, shard_tokens):
    """Consecutive rows grouped into shards of at most shard_tokens tokens (a longer row has a shard of its own)."""
    shards, total = [], 0
    for row, length in enumerate(lengths):
        if not shards or total + length > shard_tokens:
            shards.append([])
            total = 0
        shards[-1].append(row)
        total += length
    return shards


@torch.no_grad()
def score(model, prompts, responses, micro_batch_tokens):
    """The teacher's hidden states, a (T, H) tensor on the CPU for each response, computed in batches of similar length."""
    hidden = [None] * len(prompts)
    for batch in batches_by_tokens([len(p) + len(r) for p, r in zip(prompts, responses, strict=True)], micro_batch_tokens):
        states = response_hidden(model, [prompts[i] for i in batch], [responses[i] for i in batch]).cpu()
        for i, piece in zip(batch, states.split([len(responses[i]) for i in batch])):
            hidden[i] = piece
    return hidden

# ---------------------------------------------------------------------------------------------------------------------


def main(args):
    check_out(args)
    directory = model_dir(args.teacher, "--teacher")
    meta = read_artifact(args.rollouts, "--rollouts", "rollout")
    tokenizer = load_tokenizer(directory, "--teacher")
    check_tokenizers(tokenizer, "--teacher", meta["tokenizer_sha256"], "--rollouts")
    if template_sha256(tokenizer, meta["prompt_suffix"]) != meta["template_sha256"]:
        refuse(f"--rollouts {args.rollouts}: were made with another prompt template than the teacher's; "
               "a teacher that scores prompts it was not trained on gives a wrong signal")
    lengths = [len(row["response_ids"]) for row in read_rollouts(args.rollouts)]
    lengths = [min(length, args.max_tokens or length) for length in lengths]
    shards = shards_of(lengths, args.shard_tokens)

    from transformers import AutoConfig
    config = AutoConfig.from_pretrained(directory)
    token_bytes = config.hidden_size * getattr(torch, args.dtype).itemsize
    total = sum(lengths) * token_bytes + len(tokenizer) * token_bytes
    parent = os.path.dirname(os.path.abspath(args.out))
    free = shutil.disk_usage(parent if os.path.isdir(parent) else ".").free
    print(f"score_teacher: {len(lengths)} responses, {sum(lengths)} tokens, {token_bytes} bytes a token, {total / 1e9:.3g} GB")
    if total > free:
        refuse(f"--out {args.out}: the scores need {total / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB; "
               "give --max_tokens or another disk")
    model = load_model(directory, "--teacher", args.dtype)
    head = output_head(model, "--teacher")[:len(tokenizer)].detach().cpu().contiguous()
    start_artifact(args)
    save_file({"head": head}, os.path.join(args.out, "head.safetensors"))

    rows, index = read_rollouts(args.rollouts), []
    with tqdm(total=sum(lengths), unit="token") as bar:
        for number, shard in enumerate(shards):
            batch = [next(rows) for _ in shard]
            name, tokens = f"shard_{number:05d}.safetensors", [lengths[i] for i in shard]
            path = os.path.join(args.out, name)
            if not os.path.isfile(path):  # a resumed run keeps the shards it has
                hidden = score(model, [row["prompt_ids"] for row in batch],
                               [row["response_ids"][:n] for row, n in zip(batch, tokens)], args.micro_batch_tokens)
                save_file({"hidden": torch.cat(hidden)}, path + ".tmp")
                os.replace(path + ".tmp", path)
            index.append({"file": name, "tokens": tokens})
            bar.update(sum(tokens))
    finish_artifact(args, "score_teacher", ["head.safetensors"] + [shard["file"] for shard in index], shards=index,
                    teacher=os.path.realpath(directory), teacher_config=json.loads(config.to_json_string(use_diff=False)),
                    rollouts_sha256=file_sha256(os.path.join(args.rollouts, "meta.json")),
                    tokenizer_sha256=meta["tokenizer_sha256"], template_sha256=meta["template_sha256"],
                    counts={"responses": len(lengths), "response_tokens": sum(lengths), "longest_response": max(lengths),
                            "cut_by_max_tokens": meta["counts"]["response_tokens"] - sum(lengths)})
    print(f"{args.out}: {math.ceil(total / 1e6)} MB in {len(index)} shards")


if __name__ == "__main__":
    main(get_args())
