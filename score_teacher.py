"""Score stored responses with the teacher, once, so that training needs no teacher in memory.

    rollouts/  ->  scores/shard_00000.safetensors, ..., scores/head.safetensors, scores/meta.json

    python score_teacher.py --teacher Qwen/Qwen3-4B --rollouts out/rollouts --out out/scores

What is stored for every position that predicts a response token, in the dtype the teacher computes in:

    --signal hidden     its last hidden state, and the output head once. hidden @ head.T are the teacher's logits, so training is
                        exact over the vocabulary: 5 KB a token (hidden size 2560, bf16) where the logits would take 304 KB
    --signal topk       the --k likeliest tokens and their log-probabilities: 8 bytes each
    --signal sampled    the log-probability of the response's own token: 4 bytes

This file also owns everything about teacher and student as a pair: the preflight, which train.py runs too, and how hidden states,
log-probabilities and overlaps are computed. The preflight alone:

    python score_teacher.py --preflight --teacher Qwen/Qwen3-4B --student Qwen/Qwen3-0.6B-Base
"""

import argparse
import json
import math
import os

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from distil.artifacts import (
    GrowingFile,
    add_output_flags,
    check_out,
    check_space,
    file_sha256,
    finish_artifact,
    read_artifact,
    read_jsonl,
    refuse,
    run_stage,
    start_artifact,
    stop,
    stop_requested,
)
from distil.models import (
    batches_by_tokens,
    default_dtype,
    load_model,
    model_dir,
    output_head,
    response_hidden,
    token_logps,
    top_tokens,
)
from distil.preflight import check_tokenizers, preflight
from distil.prompts import load_tokenizer, template_sha256
from distil.rollouts import read_rollouts


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--teacher", required=True, help="Hugging Face directory or hub id of the teacher")
    p.add_argument("--rollouts", help="directory written by rollout.py")
    p.add_argument(
        "--signal",
        choices=["hidden", "topk", "sampled"],
        default="hidden",
        help="what is stored of each position",
    )
    p.add_argument(
        "--k",
        type=int,
        default=16,
        help="likeliest tokens in top-k training and scores, and in overlap metrics",
    )
    p.add_argument(
        "--max_tokens", type=int, default=0, help="score only the first N tokens of each response (0: all)"
    )
    p.add_argument(
        "--micro_batch_tokens", type=int, default=16384, help="tokens in one forward pass, padding included"
    )
    p.add_argument("--shard_tokens", type=int, default=200_000, help="response tokens in one shard")
    p.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        default=default_dtype(),
        help="dtype of the teacher",
    )
    add_output_flags(p, required=False)
    # only check whether a pair can work
    p.add_argument(
        "--preflight", action="store_true", help="check --teacher against --student, print a table, and end"
    )
    p.add_argument("--student", help="Hugging Face directory or hub id of the student, with --preflight only")
    args = p.parse_args(argv)
    if (bool(args.rollouts), bool(args.out), bool(args.student)) != (
        not args.preflight,
        not args.preflight,
        args.preflight,
    ):
        p.error(
            "give --teacher, --rollouts and --out to score; or --preflight, --teacher and --student to check a pair"
        )
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Teacher and student as a pair


# ---------------------------------------------------------------------------------------------------------------------
# Hidden states and log-probabilities of responses


# ---------------------------------------------------------------------------------------------------------------------
# The scores artifact


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
def score(args, model, head, prompts, responses):
    """What --signal stores of each response, a list of {name: (T, ...) tensor on the CPU}; batched by length."""
    scored = [None] * len(prompts)
    for batch in batches_by_tokens(
        [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)], args.micro_batch_tokens
    ):
        tensors = {
            "hidden": response_hidden(model, [prompts[i] for i in batch], [responses[i] for i in batch])
        }
        if args.signal == "topk":
            top_logps, top_ids = top_tokens(tensors["hidden"], head, args.k)
            tensors = {"top_logps": top_logps, "top_ids": top_ids.int()}
        elif args.signal == "sampled":
            tokens = torch.tensor([token for i in batch for token in responses[i]], device=model.device)
            tensors = {"logps": token_logps(tensors["hidden"], head, tokens)}
        pieces = {
            name: tensor.cpu().split([len(responses[i]) for i in batch]) for name, tensor in tensors.items()
        }
        for place, i in enumerate(batch):
            scored[i] = {name: piece[place] for name, piece in pieces.items()}
    return scored


# ---------------------------------------------------------------------------------------------------------------------


def main(args):
    if args.preflight:
        return preflight(args)
    check_out(args)
    directory = model_dir(args.teacher, "--teacher")
    meta = read_artifact(args.rollouts, "--rollouts", "rollout")
    tokenizer = load_tokenizer(directory, "--teacher")
    check_tokenizers(tokenizer, "--teacher", meta["tokenizer_sha256"], "--rollouts")
    if template_sha256(tokenizer, meta["prompt_suffix"]) != meta["template_sha256"]:
        refuse(
            f"--rollouts {args.rollouts}: were made with another prompt template than the teacher's; "
            "a teacher that scores prompts it was not trained on gives a wrong signal"
        )
    lengths = [
        len(row["response_ids"][: args.max_tokens or None])
        for row in read_rollouts(args.rollouts, len(tokenizer))
    ]
    shards = shards_of(lengths, args.shard_tokens)

    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    if not 1 <= args.k <= len(tokenizer):
        refuse(f"--k {args.k}: must lie between 1 and the {len(tokenizer)} tokens of the vocabulary")
    state = config.hidden_size * getattr(torch, args.dtype).itemsize
    token_bytes = {"hidden": state, "topk": 8 * args.k, "sampled": 4}[args.signal]
    total = sum(lengths) * token_bytes + len(tokenizer) * state * (args.signal == "hidden")
    print(
        f"score_teacher: {len(lengths)} responses, {sum(lengths)} tokens, {token_bytes} bytes a token, {total / 1e9:.3g} GB"
    )
    check_space(args.out, total)
    model = load_model(directory, "--teacher", args.dtype)
    head = output_head(model, "--teacher")[: len(tokenizer)].detach()
    start_artifact(args)
    if args.signal == "hidden":
        save_file({"head": head.cpu().contiguous()}, os.path.join(args.out, "head.safetensors"))

    finished = GrowingFile(
        os.path.join(args.out, "shards.jsonl")
    )  # {"file", "sha256"} a shard, for a resumed run
    known = {row["file"]: row["sha256"] for _, row in read_jsonl(finished.path)}
    rows, index = read_rollouts(args.rollouts), []
    with tqdm(total=sum(lengths), unit="token") as bar:
        for number, shard in enumerate(shards):
            batch = [next(rows) for _ in shard]
            name, tokens = f"shard_{number:05d}.safetensors", [lengths[i] for i in shard]
            path = os.path.join(args.out, name)
            if not os.path.isfile(path) or file_sha256(path) != known.get(
                name
            ):  # missing, or not as it was written
                if stop_requested():
                    stop(args)
                scored = score(
                    args,
                    model,
                    head,
                    [row["prompt_ids"] for row in batch],
                    [row["response_ids"][:n] for row, n in zip(batch, tokens)],
                )
                save_file({key: torch.cat([row[key] for row in scored]) for key in scored[0]}, path + ".tmp")
                known[name] = file_sha256(path + ".tmp")
                finished.write(json.dumps({"file": name, "sha256": known[name]}) + "\n")
                finished.mark()
                os.replace(path + ".tmp", path)
            index.append({"file": name, "tokens": tokens})
            bar.update(sum(tokens))
    files = ["head.safetensors"] * (args.signal == "hidden") + [shard["file"] for shard in index]
    finish_artifact(
        args,
        "score_teacher",
        files,
        known,
        shards=index,
        teacher=os.path.realpath(directory),
        teacher_config=json.loads(config.to_json_string(use_diff=False)),
        tokenizer_sha256=meta["tokenizer_sha256"],
        template_sha256=meta["template_sha256"],
        rollouts_sha256=file_sha256(os.path.join(args.rollouts, "meta.json")),
        counts={
            "responses": len(lengths),
            "response_tokens": sum(lengths),
            "longest_response": max(lengths),
            "cut_by_max_tokens": meta["counts"]["response_tokens"] - sum(lengths),
        },
    )
    print(f"{args.out}: {math.ceil(total / 1e6)} MB in {len(index)} shards")


if __name__ == "__main__":
    run_stage(main, get_args())
