"""Score stored responses with the teacher, once, so that training needs no teacher in memory.

    rollouts/  ->  scores/shard_00000.safetensors, ..., scores/head.safetensors, scores/meta.json

    python score_teacher.py --teacher Qwen/Qwen3-4B --rollouts out/rollouts --out out/scores

What is stored for every position that predicts a response token, in the dtype the teacher computes in:

    --signal hidden     its last hidden state, and the output head once. The teacher's logits are
                        hidden @ head.T, so training is exact over the vocabulary: 5 KB a token (hidden size
                        2560, bfloat16) where the logits would take 304 KB
    --signal topk       the --k likeliest tokens and their log-probabilities: 8 bytes each
    --signal sampled    the log-probability of the response's own token: 4 bytes

The last two can also come from a teacher behind vLLM's server: --server (docs/scaling.md).

Whether a teacher and a student can work together is checked by train.py before its first step, and by

    python score_teacher.py --preflight --teacher Qwen/Qwen3-4B --student Qwen/Qwen3-0.6B-Base
"""

import argparse
import functools
import json
import math
import os
import pathlib
import shutil

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from distil import artifacts, batches, flags, matching, models, sampling
from distil.jsonl import GrowingFile, read_jsonl
from distil.models import Response, forward
from distil.problems import add_problem_flags, columns_of, load_problems
from distil.prompts import (
    PLAIN,
    Prompting,
    check_template,
    encode_problems,
    load_tokenizer,
    render_prompt,
    stop_ids,
    template_sha256,
    vocab_size_of,
)
from distil.rollouts import read_rollouts
from distil.server import add_server_flags, connect
from distil.teacher import add_teacher_prompt_flags, live_teacher, own_prompts
from runs import preflight, training
from streaming_kl import token_logps, top_tokens

PROBES = [
    "What is 17 * 23?",
    "A train covers 120 km in 1.5 hours. What is its average speed in km/h?",
    "If 3x + 5 = 20, what is x?",
    "How many positive divisors does 36 have?",
]
LIMIT = 64  # response tokens of a probe


def get_args(argv=None):
    parser = flags.stage_parser(__doc__)
    p = parser.add_argument_group("what goes in")
    p.add_argument("--teacher", type=flags.path, required=True, help="directory or hub id of the teacher")
    p.add_argument("--rollouts", type=flags.path, help="directory written by rollout.py")
    template_help = (
        "whose chat template the prompts have: rollouts, if not the teacher's; in --preflight, student or "
        "teacher, if they have different ones"
    )
    p.add_argument("--template", choices=["teacher", "rollouts", "student"], help=template_help)
    p = parser.add_argument_group("a prompt of the teacher's own; --data has the problems of the rollouts")
    add_problem_flags(p, required=False, prompts=False)
    add_teacher_prompt_flags(p)
    p = parser.add_argument_group("what is stored")
    signals = ["hidden", "topk", "sampled"]
    p.add_argument("--signal", choices=signals, default="hidden", help="what is stored of each position")
    p.add_argument("--k", type=flags.positive_int, default=16, help="likeliest tokens, in top-k and overlap")
    p.add_argument(
        "--max_tokens", type=flags.non_negative_int, default=0, help="score a response's first N (0: all)"
    )
    p.add_argument(
        "--shard_tokens", type=flags.positive_int, default=200_000, help="response tokens in a shard"
    )
    p = parser.add_argument_group("computation")
    p.add_argument(
        "--micro_batch_tokens", type=flags.positive_int, default=16384, help="tokens in one forward pass"
    )
    dtypes = ["float32", "bfloat16", "float16"]
    p.add_argument("--dtype", choices=dtypes, default=models.default_dtype(), help="dtype of the teacher")
    add_server_flags(p, "server")
    artifacts.add_output_flags(parser, required=False)
    p = parser.add_argument_group("only check whether a pair can work")
    p.add_argument("--preflight", action="store_true", help="check --teacher against --student, and end")
    p.add_argument("--student", type=flags.path, help="student, with --preflight only")
    args = parser.parse_args(argv)
    given = bool(args.rollouts), bool(args.out), bool(args.student)
    if given != (not args.preflight, not args.preflight, args.preflight):
        parser.error(
            "give --teacher, --rollouts and --out to score; or --preflight, --teacher and --student to check"
        )
    own = args.teacher_system_prompt is not None or args.teacher_context_column is not None
    if own != bool(args.data) or own and args.preflight:
        flags_of_own = "--teacher_system_prompt and --teacher_context_column"
        parser.error(f"--data goes with {flags_of_own}, not without them and not with --preflight")
    if args.server and (args.preflight or args.signal == "hidden"):
        parser.error("--server: a server gives no hidden states; it needs --signal topk or sampled")
    if args.template == ("rollouts" if args.preflight else "student"):
        parser.error(
            f"--template {args.template}: is for {'scoring' if args.preflight else '--preflight'} only"
        )
    return args


# ---------------------------------------------------------------------------------------------------------
# The scores


def split_into_shards(lengths, shard_tokens):
    """Consecutive rows grouped into shards of at most shard_tokens tokens; a longer row goes alone."""
    shards, total = [], 0
    for row, length in enumerate(lengths):
        if not shards or total + length > shard_tokens:
            shards.append([])
            total = 0
        shards[-1].append(row)
        total += length
    return shards


@torch.no_grad()
def score(model, responses, vocab_size, signal, k, micro_batch_tokens):
    """What --signal stores of each Response: a list of {name: (T, ...) tensor on the CPU}."""
    scored = [None] * len(responses)
    for indices in batches.batches_by_tokens([r.length for r in responses], micro_batch_tokens):
        batch = [responses[i] for i in indices]
        hidden, head = forward(model, batch, vocab_size)  # (N, H), (V, H)
        if signal == "hidden":
            tensors = {"hidden": hidden}
        elif signal == "topk":
            top_logps, top_ids = top_tokens(hidden, head, k)
            tensors = {"top_logps": top_logps, "top_ids": top_ids.int()}
        else:
            tokens = torch.tensor([token for r in batch for token in r.response_ids], device=model.device)
            tensors = {"logps": token_logps(hidden, head, tokens)}
        sizes = [len(r.response_ids) for r in batch]
        pieces = {name: tensor.cpu().split(sizes) for name, tensor in tensors.items()}
        for place, i in enumerate(indices):
            scored[i] = {name: piece[place] for name, piece in pieces.items()}
            refuse_not_finite(scored[i], responses[i].id)
    return scored


def score_served(served, responses, k):
    """score(), by a server.Server: the k likeliest tokens, or with 0 the response's own."""
    scored = list(served.pool.map(lambda response: served.score(response, k), responses))
    for tensors, response in zip(scored, responses, strict=True):
        refuse_not_finite(tensors, response.id)
    return [{name: t.int() if name == "top_ids" else t for name, t in tensors.items()} for tensors in scored]


def refuse_not_finite(tensors, name):
    """Refuse the scores {name: (T, ...)} of a response if there is NaN or infinity in them."""
    for kind, tensor in tensors.items():
        bad = (~tensor.isfinite()).nonzero()
        if len(bad):
            place = f"token {bad[0, 0].item()} (from 0) of the response {name}"
            artifacts.refuse(f"--teacher: `{kind}` at {place} is not finite; use another --dtype", code=1)


def bytes_per_token(signal, hidden_bytes, k):
    return {"hidden": hidden_bytes, "topk": 8 * k, "sampled": 4}[signal]


def prompts_of_its_own(args, tokenizer, prompting, size):
    """{id of a problem: the ids of the teacher's own prompt}; {} if it has none.

    Refused if --data lacks a problem of the rollouts, or has one that their prompt does not hold."""
    if not args.data:
        return {}
    if args.template == "rollouts":
        stored = load_tokenizer(os.path.join(args.rollouts, "tokenizer"), "--rollouts")
        tokenizer.chat_template = stored.chat_template
    problems = load_problems(args.data, columns=columns_of(args), context=args.teacher_context_column)
    problems, answered = {problem["id"]: problem for problem in problems}, {}
    for row in read_rollouts(args.rollouts, size):
        if row["id"] in answered:
            continue
        if row["id"] not in problems:
            artifacts.refuse(f"--data {args.data}: has no problem {row['id']}, which --rollouts answer")
        answered[row["id"]] = problem = problems[row["id"]]
        if render_prompt(tokenizer, problem["problem"], prompting) != row["prompt_ids"]:
            artifacts.refuse(f"--data {args.data}: its {row['id']} is not the problem that --rollouts answer")
    about = prompting, args.teacher_system_prompt, size, math.inf, None, 0
    answered, _ = own_prompts([*answered.values()], tokenizer, *about)
    return {problem["id"]: problem["teacher_prompt_ids"] for problem in answered}


def check_models(args):
    """--preflight: the student answers a few problems, and both models are compared on its answers."""
    student_dir, teacher_dir = (
        models.model_dir(args.student, "--student"),
        models.model_dir(args.teacher, "--teacher"),
    )
    tokenizer = load_tokenizer(student_dir, "--student")
    size = vocab_size_of(tokenizer, models.rows_of(student_dir), "--student")
    stops = stop_ids(tokenizer, student_dir, size)
    teacher_stops = matching.match_teacher(teacher_dir, tokenizer, size, args.template)
    context = min(models.context_of(student_dir), models.context_of(teacher_dir))
    problems = [{"id": text, "problem": text} for text in PROBES]
    _, prompts, _ = encode_problems(problems, tokenizer, PLAIN, size, context, None, LIMIT)
    parser = argparse.ArgumentParser()  # train.py's defaults
    sampling.add_sampling_flags(parser, gpu_memory_utilization=0.3)
    training.add_training_flags(parser, steps=1000, batch_size=32, lr=5e-7)
    defaults = parser.parse_args([])
    longest = min(max(map(len, prompts)) + defaults.max_response_tokens, context)
    training.plan_memory(defaults, student_dir, size, longest, teacher_dir, table=True)
    student = models.load_model(student_dir, "--student", args.dtype)
    models.check_head(student, "--student")
    teacher = live_teacher(teacher_dir, args.dtype, size)
    defaults.max_response_tokens, defaults.sample_batch = LIMIT, len(PROBES)
    config = sampling.sampling_from(defaults, size, stops + teacher_stops)
    responses = [group[0] for group in sampling.sample(student, prompts, config, seed=0)]
    k = min(args.k, size)
    compared = tokenizer, size, stops, teacher, teacher_stops, responses
    preflight.preflight(student, *compared, k, None, PLAIN)


# ---------------------------------------------------------------------------------------------------------


def check_space(out, size):
    """Refuse `size` bytes that the disk cannot hold. Files already in `out` count as free space."""
    out = pathlib.Path(out).absolute()
    free = shutil.disk_usage(next(folder for folder in (out, *out.parents) if folder.is_dir())).free
    free += sum(file.stat().st_size for file in out.glob("*") if file.is_file())
    if size > free:
        needs = f"needs {size / 1e9:.3g} GB and the disk has {free / 1e9:.3g}"
        artifacts.refuse(f"--out {out}: {needs}; use another, or store less (--max_tokens)")


def main(args):
    if args.preflight:
        return check_models(args)
    artifacts.check_out(args)
    directory = models.model_dir(args.teacher, "--teacher", weights=not args.server)
    meta = artifacts.read_artifact(args.rollouts, "--rollouts", "rollout")
    tokenizer = load_tokenizer(directory, "--teacher")
    matching.check_tokenizers(tokenizer, "--teacher", meta["tokenizer_sha256"], "--rollouts")
    size = vocab_size_of(tokenizer, models.rows_of(directory), "--teacher")
    prompting = Prompting.read(meta)
    if args.template != "rollouts":
        check_template(tokenizer, "--teacher", "--template rollouts uses that of the rollouts", prompting)
        if template_sha256(tokenizer, prompting) != meta["template_sha256"]:
            artifacts.refuse(
                f"--rollouts {args.rollouts}: were made with another prompt template than the teacher's, so "
                "it would score prompts that it was not trained on; --template rollouts allows it"
            )
    if args.k > size:
        artifacts.refuse(f"--k {args.k}: the vocabulary has {size} tokens")
    own_prompt_of = prompts_of_its_own(args, tokenizer, prompting, size)
    limit = args.max_tokens or None
    context, lengths, longest = models.context_of(directory, "--teacher"), [], 0
    for row in read_rollouts(args.rollouts, size):
        lengths.append(len(row["response_ids"][:limit]))
        length = len(own_prompt_of.get(row["id"], row["prompt_ids"])) + lengths[-1]
        if length > context:
            what = f"{row['id']} has {length} tokens, the teacher's context {context}"
            artifacts.refuse(f"--rollouts {args.rollouts}: {what}; give a --max_tokens")
        longest = max(longest, length)
    shards = split_into_shards(lengths, args.shard_tokens)

    config = models.config_of(directory, "--teacher")
    hidden_bytes = config.get_text_config().hidden_size * getattr(torch, args.dtype).itemsize
    token_bytes = bytes_per_token(args.signal, hidden_bytes, args.k)
    total = sum(lengths) * token_bytes
    if args.signal == "hidden":
        total += size * hidden_bytes  # the head
    about = (
        f"{len(lengths)} responses, {sum(lengths)} tokens, {token_bytes} bytes a token, {total / 1e9:.3g} GB"
    )
    print(f"score_teacher: {about}")
    check_space(args.out, total)
    if args.server:
        about = args.teacher, directory, size, longest + 1, args.server_requests, args.server_timeout
        served = connect(args.server, "--server", *about)
        score_shard = functools.partial(score_served, served, k=args.k if args.signal == "topk" else 0)
    else:
        model = models.load_model(directory, "--teacher", args.dtype)
        models.check_head(model, "--teacher")
        head = models.output_head(model)[:size].detach()
        about = size, args.signal, args.k, args.micro_batch_tokens
        score_shard = lambda responses: score(model, responses, *about)
    artifacts.start_artifact(args)
    if args.signal == "hidden":
        save_file({"head": head.cpu().contiguous()}, os.path.join(args.out, "head.safetensors"))

    finished = GrowingFile(os.path.join(args.out, "shards.jsonl"))  # for a resumed run
    known = {row["file"]: row["sha256"] for _, row in read_jsonl(finished.path)}
    rows, index = read_rollouts(args.rollouts), []
    with tqdm(total=sum(lengths), unit="token") as bar:
        for number, shard in enumerate(shards):
            responses = []
            for _, stored in zip(shard, rows):
                name = f"{stored['id']}, sample {stored['sample']}"
                prompt = own_prompt_of.get(stored["id"], stored["prompt_ids"])
                responses.append(Response(prompt, stored["response_ids"][:limit], False, name))
            name = f"shard_{number:05d}.safetensors"
            path = os.path.join(args.out, name)
            if not os.path.isfile(path) or artifacts.file_sha256(path) != known.get(name):
                if artifacts.stop_requested():
                    artifacts.stop(args)
                scored = score_shard(responses)
                tensors = {key: torch.cat([row[key] for row in scored]) for key in scored[0]}
                save_file(tensors, path + ".tmp")
                known[name] = artifacts.file_sha256(path + ".tmp")
                finished.write(json.dumps({"file": name, "sha256": known[name]}) + "\n")
                finished.mark()
                os.replace(path + ".tmp", path)
            tokens = [lengths[i] for i in shard]
            index.append({"file": name, "tokens": tokens})
            bar.update(sum(tokens))
    files = ["head.safetensors"] if args.signal == "hidden" else []
    files += [shard["file"] for shard in index]
    counts = {"responses": len(lengths), "response_tokens": sum(lengths), "longest_response": max(lengths)}
    counts["cut_by_max_tokens"] = meta["counts"]["response_tokens"] - sum(lengths)
    facts = {"shards": index, "teacher": os.path.realpath(directory), "counts": counts}
    facts["teacher_prompt_tokens"] = {id: len(prompt) for id, prompt in own_prompt_of.items()}
    facts["teacher_config"] = json.loads(config.to_json_string(use_diff=False))
    facts |= {name: meta[name] for name in ("tokenizer_sha256", "template_sha256")}
    facts["rollouts_sha256"] = artifacts.file_sha256(os.path.join(args.rollouts, "meta.json"))
    artifacts.finish_artifact(args, "score_teacher", files, known, **facts)
    print(f"{args.out}: {math.ceil(total / 1e6)} MB in {len(index)} shards")


if __name__ == "__main__":
    artifacts.run_stage(main, get_args())
