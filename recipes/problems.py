"""Write the problems of a training set of the hub to the .jsonl that the recipes read.

    python -m recipes.problems dapo --out data/dapo.jsonl

    deepscaler      DeepScaleR-Preview
    dapo            DAPO-Math-17K, the questions alone
    dapo_original   the same questions inside the set's own instructions ("... Answer: $Answer ...")
    deepmath        DeepMath-103K
    openthoughts3   the mathematics prompts of OpenThoughts3-1.2M; its answers are all "none"

Each line has id, problem and answer. Rows without one of these, of another domain, or with a problem that was
written before, word for word, are left out and counted. --skip and --limit take a part of what is left.
"""

import argparse
import json
import os
from collections import Counter

from tqdm import tqdm

from distil import flags
from distil.artifacts import refuse
from distil.problems import gold_answer, load_rows

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
DAPO = "Solve the following math problem step by step.", "Remember to put your answer on its own line"


def without_instructions(prompt):
    """The question alone, without BOXED behind it or DAPO-Math-17K's paragraphs around it."""
    prompt = prompt.strip().removesuffix(BOXED).rstrip()
    before, _, rest = prompt.partition("\n\n")
    question, _, after = rest.rpartition("\n\n")
    return question if before.startswith(DAPO[0]) and after.startswith(DAPO[1]) else prompt


def dapo_original(row):
    return row["prompt"][0]["content"], row["reward_model"]["ground_truth"]


def dapo(row):
    prompt, answer = dapo_original(row)
    question = without_instructions(prompt)
    if question == prompt.strip():
        raise ValueError(f"without the instructions of DAPO-Math-17K: {prompt[:40]!r}")
    return question, answer


def openthoughts3(row):
    return (row["conversations"][0]["value"], "none") if row["domain"] == "math" else (None, None)


SETS = {  # name: (hub id, the problem and the answer of a row)
    "deepscaler": ("agentica-org/DeepScaleR-Preview-Dataset", lambda row: (row["problem"], row["answer"])),
    "dapo": ("BytedTsinghua-SIA/DAPO-Math-17k", dapo),
    "dapo_original": ("BytedTsinghua-SIA/DAPO-Math-17k", dapo_original),
    "deepmath": ("zwhe99/DeepMath-103K", lambda row: (row["question"], row["final_answer"])),
    "openthoughts3": ("open-thoughts/OpenThoughts3-1.2M", openthoughts3),
}


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("name", choices=SETS)
    p.add_argument("--source", type=flags.path, help="another hub id, or a file with the set's own columns")
    p.add_argument("--skip", type=flags.non_negative_int, default=0, help="leave out the first N that remain")
    p.add_argument("--limit", type=flags.non_negative_int, default=0, help="then write N (0: all)")
    p.add_argument("--out", type=flags.path, required=True, help="the .jsonl file to write")
    return p.parse_args(argv)


def problems(name, rows, counts):
    """Yields {"id", "problem", "answer"} of a set's rows [(where, row)]; counts what it leaves out."""
    hub_id, columns = SETS[name]
    seen = set()
    for index, (where, row) in enumerate(rows):
        try:
            problem, answer = columns(row)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            refuse(f"{where}: not a row of {hub_id} ({type(error).__name__}: {error})")
        answer = gold_answer(answer)
        if not problem or not answer:
            counts["without problem or answer"] += 1
        elif problem in seen:
            counts["repeated"] += 1
        else:
            seen.add(problem)
            yield {"id": str(index), "problem": problem, "answer": answer}


def main(args):
    source = args.source or SETS[args.name][0]
    if os.path.exists(args.out):
        refuse(f"--out {args.out}: exists; remove it, or name another file")
    rows = load_rows(source, flag="--source")[2]
    counts = Counter({"written": 0})
    os.makedirs(os.path.dirname(os.path.abspath(args.out)), exist_ok=True)
    with open(args.out + ".tmp", "w", encoding="utf-8") as file:
        for place, problem in enumerate(problems(args.name, tqdm(rows, unit="row"), counts)):
            if place < args.skip:
                counts["skipped"] += 1
                continue
            file.write(json.dumps(problem, ensure_ascii=False) + "\n")
            counts["written"] += 1
            if counts["written"] == args.limit:
                break
    if not counts["written"]:
        os.remove(args.out + ".tmp")
        refuse(f"{source}: no problem is left to write: {dict(counts)}", code=1)
    os.replace(args.out + ".tmp", args.out)
    print(f"{args.out}: " + ", ".join(f"{count} {what}" for what, count in counts.items()))


if __name__ == "__main__":
    main(get_args())
