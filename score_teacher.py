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
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import ranks
from artifacts import (GrowingFile, add_output_flags, check_out, check_space, file_sha256, finish_artifact, read_artifact, read_jsonl,
                       refuse, run_stage, start_artifact, stop, stop_requested)
from inputs import (default_dtype, load_model, load_tokenizer, model_dir, prompt_text, render_prompt, stop_ids, template_sha256,
                    tokenizer_sha256)
from streaming_kl import chunk_of, linear_streaming_kl
from rollout import Sampling, read_rollouts, sample

PROBES = ["What is 17 * 23?", "A train covers 120 km in 1.5 hours. What is its average speed in km/h?",
          "If 3x + 5 = 20, what is x?", "How many positive divisors does 36 have?"]


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--teacher", required=True, help="Hugging Face directory or hub id of the teacher")
    p.add_argument("--rollouts", help="directory written by rollout.py")
    p.add_argument("--signal", choices=["hidden", "topk", "sampled"], default="hidden", help="what is stored of each position")
    p.add_argument("--k", type=int, default=16, help="likeliest tokens in top-k training and scores, and in overlap metrics")
    p.add_argument("--max_tokens", type=int, default=0, help="score only the first N tokens of each response (0: all)")
    p.add_argument("--micro_batch_tokens", type=int, default=16384, help="tokens in one forward pass, padding included")
    p.add_argument("--shard_tokens", type=int, default=200_000, help="response tokens in one shard")
    p.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default=default_dtype(), help="dtype of the teacher")
    add_output_flags(p, required=False)
    # only check whether a pair can work
    p.add_argument("--preflight", action="store_true", help="check --teacher against --student, print a table, and end")
    p.add_argument("--student", help="Hugging Face directory or hub id of the student, with --preflight only")
    args = p.parse_args(argv)
    if (bool(args.rollouts), bool(args.out), bool(args.student)) != (not args.preflight, not args.preflight, args.preflight):
        p.error("give --teacher, --rollouts and --out to score; or --preflight, --teacher and --student to check a pair")
    return args

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


def check_pair(student, student_stops, teacher_stops, student_rows, teacher_rows):
    """Lines of the preflight that need no forward pass: [(what, finding, warning or "")]. student: its tokenizer; rows: of the output
    heads. Different token maps are refused before, by match_tokenizers."""
    size = len(student)
    if min(student_rows, teacher_rows) < size:
        refuse(f"preflight: the output heads have {student_rows} (student) and {teacher_rows} (teacher) rows, but the tokenizer has "
               f"{size} tokens")
    end = "" if student_stops == teacher_stops else (
        "they end differently: a student that is taught another end than it samples grows to the length limit; "
        "keep --stop_ids both, or choose one side")
    prompt = prompt_text(student, "PROBLEM")
    thinking = "" if "<think>" not in prompt or "</think>" in prompt else "the prompt opens a <think> block although thinking is off"
    return [("token maps", f"equal, {size} tokens", ""),
            ("padded rows", f"student {student_rows - size}, teacher {teacher_rows - size}; masked in loss and sampling", ""),
            ("stop ids", "student {}, teacher {}".format(*map(student.convert_ids_to_tokens, (student_stops, teacher_stops))), end),
            ("prompt", repr(prompt), thinking)]


@torch.no_grad()
def check_signal(student_hidden, student_head, teacher, k):
    """Lines of the preflight over a few responses; a teacher without a signal is refused."""
    if teacher.hidden is None:
        return [("distributions", "not known from this --signal", "")]
    top = math.log(len(teacher.head))
    self_kl = linear_streaming_kl(teacher.hidden, teacher.head, teacher.hidden, teacher.head, fkl_weight=1.0).fkl.abs().max().item()
    out = linear_streaming_kl(student_hidden, student_head, teacher.hidden, teacher.head, fkl_weight=1.0)
    numbers = {name: getattr(out, name).mean().item() for name in ("fkl", "rkl", "student_entropy", "teacher_entropy")}
    if not all(map(math.isfinite, [self_kl, *numbers.values()])) or self_kl > 1e-3:
        refuse(f"preflight: the distributions are not sound: KL of the teacher with itself {self_kl}, {numbers}")
    if numbers["teacher_entropy"] > 0.98 * top:
        refuse(f"preflight: the teacher's entropy is {numbers['teacher_entropy']:.3f} nats, a uniform distribution's is {top:.3f}: "
               "its weights are missing or not trained")
    tops = *top_tokens(student_hidden, student_head, k), *top_tokens(teacher.hidden, teacher.head, k)
    ratio = overlap(*tops)["overlap_ratio"].mean().item()
    far = "" if ratio >= 0.5 else "far apart (0.7 is a usual start): first train on the teacher's rollouts, and align the prompts"
    return [("KL of teacher with itself", f"{self_kl:.1e} nats", ""),
            ("KL teacher||student", f"{numbers['fkl']:.4f} nats; reverse {numbers['rkl']:.4f}",
             "" if numbers["fkl"] > 1e-6 else "none: teacher and student are the same"),
            ("entropies", f"student {numbers['student_entropy']:.3f}, teacher {numbers['teacher_entropy']:.3f} of {top:.3f} nats", ""),
            (f"overlap of the top {k}", f"{ratio:.3f}", far)]


def print_preflight(lines):
    for what, finding, warning in lines:
        print(f"preflight: {what:26} {finding}" + (f"   WARNING: {warning}" if warning else ""), flush=True)


def preflight(args):
    """The preflight as a command of its own: the student answers a few problems, and both models are compared on its answers."""
    student_dir, teacher_dir = model_dir(args.student, "--student"), model_dir(args.teacher, "--teacher")
    tokenizer, teacher_tokenizer = load_tokenizer(student_dir, "--student"), load_tokenizer(teacher_dir, "--teacher")
    check_tokenizers(tokenizer, "--student", tokenizer_sha256(teacher_tokenizer), "--teacher")
    student, teacher = load_model(student_dir, "--student", args.dtype), load_model(teacher_dir, "--teacher", args.dtype)
    heads = [output_head(model, flag).detach() for model, flag in ((student, "--student"), (teacher, "--teacher"))]
    stops = [stop_ids(tokenizer, student_dir), stop_ids(teacher_tokenizer, teacher_dir)]
    lines = check_pair(tokenizer, *stops, *map(len, heads))
    if template_sha256(tokenizer) != template_sha256(teacher_tokenizer):
        lines.append(("prompt of the teacher", repr(prompt_text(teacher_tokenizer, "PROBLEM")),
                      "another template than the student's: train.py refuses the pair unless --take_template is given"))
    prompts = [render_prompt(teacher_tokenizer, problem) for problem in PROBES]
    sampling = Sampling(1, 1.0, 1.0, 0, 64, sorted({*stops[0], *stops[1]}), len(tokenizer))
    responses = [group[0].response_ids for group in sample(student, prompts, sampling, seed=0)]
    with torch.no_grad():
        hidden = [response_hidden(model, prompts, responses) for model in (student, teacher)]
    heads = [head[:len(tokenizer)] for head in heads]
    print_preflight(lines + check_signal(hidden[0], heads[0], Signal(hidden[1], heads[1]), min(args.k, len(tokenizer))))


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
    """Indices grouped by similar length, so that rows x longest <= budget in each batch (a longer row goes alone), and a batch that
    has a 32nd of the budget takes no row with which more than a tenth of it would be padding.

    batches_by_tokens([60, 90, 62, 2], 1024) -> [[3, 0], [2], [1]]"""
    batches, tokens = [], 0
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        padded = (len(batches[-1]) + 1) * lengths[i] if batches else 0
        if batches and padded <= budget and (tokens < budget / 32 or tokens + lengths[i] >= 0.9 * padded):
            batches[-1].append(i)
            tokens += lengths[i]
        else:
            batches.append([i])
            tokens = lengths[i]
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


def token_logps(hidden, head, tokens):
    """log p(token) in fp32, from hidden states (N, H), head (V, H) and tokens (N,) or (N, m): the shape of `tokens`.

    Logits exist for chunk_of(head) positions at a time, and are computed again in the backward pass."""
    def logps(hidden, tokens):
        return (hidden @ head.T.to(hidden.dtype)).float().log_softmax(-1).gather(1, tokens)
    picked = tokens if tokens.dim() == 2 else tokens[:, None]
    chunks = zip(hidden.split(chunk_of(head)), picked.split(chunk_of(head)))
    pieces = [checkpoint(logps, h, t, use_reentrant=False) for h, t in chunks]
    return torch.cat(pieces).view_as(tokens)


@torch.no_grad()
def top_tokens(hidden, head, k):
    """The k likeliest tokens of each position, likeliest first: (log-probabilities (N, k) fp32, ids (N, k))."""
    tops = [(h @ head.T.to(h.dtype)).float().log_softmax(-1).topk(k) for h in hidden.split(chunk_of(head))]
    return torch.cat([top.values for top in tops]), torch.cat([top.indices for top in tops])


def overlap(log_q, student_ids, log_p, teacher_ids):
    """How the k likeliest tokens S of the student (probabilities q) and T of the teacher (p) overlap, {name: (N,)}, from their
    log-probabilities and ids, each (N, k) (arXiv 2604.13016, equations 6 and 7 and appendix B.1):

        overlap_ratio       |S and T| / k
        overlap_mass        sum of q over S and T; overlap_mass_teacher: of p
        overlap_advantage   mean over v in S and T of q'(v) (log p'(v) - log q'(v)), renormalised on S and T; 0 where it is empty"""
    same = student_ids[:, :, None] == teacher_ids[:, None]                                    # (N, k, k)
    shared, count = same.any(2), same.sum((1, 2))
    log_p = torch.where(shared, log_p.gather(1, same.int().argmax(2)), 0.0)                   # the teacher's, at the student's tokens
    q_bar, p_bar = (log.masked_fill(~shared, -1e30).log_softmax(1) for log in (log_q, log_p))
    return {"overlap_ratio": count / student_ids.shape[1], "overlap_mass": (log_q.exp() * shared).sum(1),
            "overlap_mass_teacher": (log_p.exp() * shared).sum(1),
            "overlap_advantage": (q_bar.exp() * (p_bar - q_bar) * shared).sum(1) / count.clamp(min=1)}

# ---------------------------------------------------------------------------------------------------------------------
# The scores artifact


class Signal(NamedTuple):
    """What is known of the teacher at N positions. None: not known."""
    hidden: torch.Tensor = None      # (N, H)
    head: torch.Tensor = None        # (V, H)
    top_logps: torch.Tensor = None   # (N, k) fp32, of the whole distribution
    top_ids: torch.Tensor = None     # (N, k)
    logps: torch.Tensor = None       # (N,) fp32, of the response's tokens

    def cut(self, vocab_size):
        """Without the rows of the head that are padding."""
        return self if self.head is None else self._replace(head=self.head[:vocab_size])


class Scores:
    """Reader of a scores artifact; read(row) gives that rollouts row's tensors {name: (T, ...)}, from disk when asked for."""

    def __init__(self, path, rollouts):
        self.meta = read_artifact(path, "--scores", "score_teacher")
        if self.meta["rollouts_sha256"] != file_sha256(os.path.join(rollouts, "meta.json")):
            refuse(f"--scores {path}: were made for other rollouts ({self.meta['args']['rollouts']}) than --rollouts {rollouts}")
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
        tensors = {name: self.shards[number].get_slice(name)[start:end] for name in self.shards[number].keys()}
        return {name: tensor.long() if name == "top_ids" else tensor for name, tensor in tensors.items()}


def teacher_signal(args, items):
    """(function from a batch of Responses to the teacher's Signal, the teacher's config as a dict) of a training run: from the
    cache of --scores, else from the live --teacher, else (plain SFT) nothing."""
    if args.scores:
        scores = Scores(args.scores, args.rollouts)
        signal, k = scores.meta["args"]["signal"], scores.meta["args"]["k"]
        if args.vocab not in {"hidden": ("full", "topk", "sampled"), "topk": ("topk",), "sampled": ("sampled",)}[signal]:
            refuse(f"--scores {args.scores}: were made with --signal {signal}, from which --vocab {args.vocab} cannot be computed")
        if signal == "topk" and (args.topk_set != "teacher" or args.k > k):
            refuse(f"--scores {args.scores}: hold the teacher's {k} likeliest tokens; use --topk_set teacher and --k up to {k}")
        for item in items:
            _, start, end = scores.rows[item.row]
            if end - start < len(item.tokens):
                refuse(f"--scores {args.scores}: hold {end - start} tokens of a response of which {len(item.tokens)} are trained "
                       "on; score with a larger --max_tokens, or give a smaller --max_response_tokens")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        head = scores.head.to(device) if signal == "hidden" else None

        def cached(batch):
            rows = [{name: tensor[:len(r.tokens)] for name, tensor in scores.read(r.row).items()} for r in batch]
            return Signal(head=head, **{name: torch.cat([row[name] for row in rows]).to(device) for name in rows[0]})
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
    for batch in batches_by_tokens([len(p) + len(r) for p, r in zip(prompts, responses, strict=True)], args.micro_batch_tokens):
        tensors = {"hidden": response_hidden(model, [prompts[i] for i in batch], [responses[i] for i in batch])}
        if args.signal == "topk":
            top_logps, top_ids = top_tokens(tensors["hidden"], head, args.k)
            tensors = {"top_logps": top_logps, "top_ids": top_ids.int()}
        elif args.signal == "sampled":
            tokens = torch.tensor([token for i in batch for token in responses[i]], device=model.device)
            tensors = {"logps": token_logps(tensors["hidden"], head, tokens)}
        pieces = {name: tensor.cpu().split([len(responses[i]) for i in batch]) for name, tensor in tensors.items()}
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
        refuse(f"--rollouts {args.rollouts}: were made with another prompt template than the teacher's; "
               "a teacher that scores prompts it was not trained on gives a wrong signal")
    lengths = [len(row["response_ids"][:args.max_tokens or None]) for row in read_rollouts(args.rollouts, len(tokenizer))]
    shards = shards_of(lengths, args.shard_tokens)

    from transformers import AutoConfig
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    if not 1 <= args.k <= len(tokenizer):
        refuse(f"--k {args.k}: must lie between 1 and the {len(tokenizer)} tokens of the vocabulary")
    state = config.hidden_size * getattr(torch, args.dtype).itemsize
    token_bytes = {"hidden": state, "topk": 8 * args.k, "sampled": 4}[args.signal]
    total = sum(lengths) * token_bytes + len(tokenizer) * state * (args.signal == "hidden")
    print(f"score_teacher: {len(lengths)} responses, {sum(lengths)} tokens, {token_bytes} bytes a token, {total / 1e9:.3g} GB")
    check_space(args.out, total)
    model = load_model(directory, "--teacher", args.dtype)
    head = output_head(model, "--teacher")[:len(tokenizer)].detach()
    start_artifact(args)
    if args.signal == "hidden":
        save_file({"head": head.cpu().contiguous()}, os.path.join(args.out, "head.safetensors"))

    finished = GrowingFile(os.path.join(args.out, "shards.jsonl"))  # {"file", "sha256"} a shard, for a resumed run
    known = {row["file"]: row["sha256"] for _, row in read_jsonl(finished.path)}
    rows, index = read_rollouts(args.rollouts), []
    with tqdm(total=sum(lengths), unit="token") as bar:
        for number, shard in enumerate(shards):
            batch = [next(rows) for _ in shard]
            name, tokens = f"shard_{number:05d}.safetensors", [lengths[i] for i in shard]
            path = os.path.join(args.out, name)
            if not os.path.isfile(path) or file_sha256(path) != known.get(name):  # missing, or not as it was written
                if stop_requested():
                    stop(args)
                scored = score(args, model, head, [row["prompt_ids"] for row in batch],
                               [row["response_ids"][:n] for row, n in zip(batch, tokens)])
                save_file({key: torch.cat([row[key] for row in scored]) for key in scored[0]}, path + ".tmp")
                known[name] = file_sha256(path + ".tmp")
                finished.write(json.dumps({"file": name, "sha256": known[name]}) + "\n")
                finished.mark()
                os.replace(path + ".tmp", path)
            index.append({"file": name, "tokens": tokens})
            bar.update(sum(tokens))
    files = ["head.safetensors"] * (args.signal == "hidden") + [shard["file"] for shard in index]
    finish_artifact(args, "score_teacher", files, known, shards=index, teacher=os.path.realpath(directory),
                    teacher_config=json.loads(config.to_json_string(use_diff=False)), tokenizer_sha256=meta["tokenizer_sha256"],
                    template_sha256=meta["template_sha256"], rollouts_sha256=file_sha256(os.path.join(args.rollouts, "meta.json")),
                    counts={"responses": len(lengths), "response_tokens": sum(lengths), "longest_response": max(lengths),
                            "cut_by_max_tokens": meta["counts"]["response_tokens"] - sum(lengths)})
    print(f"{args.out}: {math.ceil(total / 1e6)} MB in {len(index)} shards")


if __name__ == "__main__":
    run_stage(main, get_args())
