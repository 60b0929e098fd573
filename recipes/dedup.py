"""Remove from one problem set the problems that another one contains, exactly or in other words.

    python -m recipes.dedup --data train.jsonl --against aime24 --out out/train_without_aime24

writes OUT/problems.jsonl (kept), OUT/dropped.jsonl (with the reason and the nearest problem) and
OUT/meta.json.

Instructions around a question that recipes/problems.py knows are left out of the comparison. Exact: equal if
case and white space are ignored. Semantic: the cosine similarity of the sentence embeddings
to any problem of --against is at least --threshold. The threshold of 0.6 with all-mpnet-base-v2 is that of
arXiv 2604.13016's code. It needs the package sentence-transformers, which this project does not depend on.
"""

import argparse
import json
import os

import torch
from tqdm import tqdm

from distil.artifacts import add_output_flags, check_out, finish_artifact, refuse, start_artifact
from distil.problems import DATA_HELP, load_problems
from recipes.problems import without_instructions


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", required=True, help=DATA_HELP)
    p.add_argument("--against", required=True, help="the problems to remove: the same forms as --data")
    p.add_argument(
        "--method", choices=["exact", "semantic"], default="semantic", help="semantic includes exact"
    )
    p.add_argument(
        "--encoder", default="sentence-transformers/all-mpnet-base-v2", help="of sentence-transformers"
    )
    p.add_argument(
        "--threshold", type=float, default=0.6, help="least cosine similarity of two equal problems"
    )
    add_output_flags(p, resume=False)
    return p.parse_args(argv)


def canonical(problem):
    return " ".join(without_instructions(problem).lower().split())


def nearest(encode, texts, others, batch=256):
    """For each text the most similar of `others`: (similarities (n,), indices (n,)).
    encode: list of n str -> (n, D) tensor."""

    def unit(texts):
        return torch.nn.functional.normalize(encode(texts).float(), dim=-1)

    target, best = unit(others), []
    for start in tqdm(range(0, len(texts), batch), unit="batch"):
        best.append((unit(texts[start : start + batch]) @ target.T).max(-1))
    return torch.cat([part.values for part in best]), torch.cat([part.indices for part in best])


def duplicates(problems, others, encode=None, threshold=0.6):
    """{index into problems: (reason, index into others, similarity)}; only exact ones if `encode` is None."""
    where = {canonical(other["problem"]): i for i, other in enumerate(others)}
    found = {}
    for i, problem in enumerate(problems):
        if canonical(problem["problem"]) in where:
            found[i] = ("exact", where[canonical(problem["problem"])], 1.0)
    if encode:
        texts = [[without_instructions(row["problem"]) for row in rows] for rows in (problems, others)]
        similarity, index = nearest(encode, *texts)
        for i in range(len(problems)):
            if i not in found and similarity[i] >= threshold:
                found[i] = ("semantic", index[i].item(), similarity[i].item())
    return found


def load_encoder(name):
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        refuse("--method semantic needs sentence-transformers: pip install it, or use --method exact")
    model = SentenceTransformer(name)
    return lambda texts: model.encode(texts, convert_to_tensor=True, show_progress_bar=False)


def main(args):
    check_out(args)
    problems, others = load_problems(args.data), load_problems(args.against)
    encode = load_encoder(args.encoder) if args.method == "semantic" else None
    found = duplicates(problems, others, encode, args.threshold)
    start_artifact(args)
    counts = {"problems": len(problems), "kept": 0, "dropped_exact": 0, "dropped_semantic": 0}
    with (
        open(os.path.join(args.out, "problems.jsonl"), "w", encoding="utf-8") as kept,
        open(os.path.join(args.out, "dropped.jsonl"), "w", encoding="utf-8") as dropped,
    ):
        for i, problem in enumerate(problems):
            if i not in found:
                counts["kept"] += 1
                kept.write(json.dumps(problem, ensure_ascii=False) + "\n")
                continue
            reason, other, similarity = found[i]
            counts[f"dropped_{reason}"] += 1
            row = {**problem, "reason": reason, "nearest": others[other], "similarity": similarity}
            dropped.write(json.dumps(row, ensure_ascii=False) + "\n")
    finish_artifact(args, "dedup", ["problems.jsonl", "dropped.jsonl"], counts=counts)
    print("  ".join(f"{name} {value}" for name, value in counts.items()))


if __name__ == "__main__":
    main(get_args())
