"""The toy world with hints, for a student that learns from itself: recipes/toy_hint.sh.

    python -m recipes.toy_hint --world out/toy/world --out out/toy_hint/data

reads a world's problems and writes

    train.jsonl, test.jsonl    the problems with a column `hint`, their result: "=7"
    with_hint/test.jsonl       the same test problems, each with its hint in the problem
    both/                      rollouts: hasty solutions to the problems, gold ones to those with their hints

A model trained on `both` often stops too early, but not with a hint."""

import argparse
import json
import os
import random

from distil.artifacts import add_output_flags, finish_artifact, start_artifact
from distil.problems import load_problems
from distil.prompts import load_tokenizer
from recipes.toy_world import solve, write_solutions


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--world", required=True, help="directory written by recipes/toy_world.py")
    p.add_argument("--haste", type=float, default=0.25, help="chance that a hasty solution ends after a line")
    p.add_argument("--seed", type=int, default=42)
    add_output_flags(p, resume=False)
    return p.parse_args(argv)


def with_hint(problem):
    """The problem as train.py --teacher_context_column hint shows it to the teacher."""
    return problem | {"problem": f"{problem['problem']}\n\n{problem['hint']}"}


def write_problems(args, name, problems):
    os.makedirs(os.path.dirname(os.path.join(args.out, name)), exist_ok=True)
    with open(os.path.join(args.out, name), "w", encoding="utf-8") as file:
        for problem in problems:
            row = problem | {"id": int(problem["id"].rpartition("/")[2])}
            file.write(json.dumps(row) + "\n")


def main(args):
    start_artifact(args)
    sets, rng = {}, random.Random(args.seed)
    for name in ("train", "test"):
        problems = load_problems(os.path.join(args.world, f"{name}.jsonl"))
        sets[name] = [problem | {"hint": f"={problem['answer']}"} for problem in problems]
        write_problems(args, f"{name}.jsonl", sets[name])
    write_problems(args, "with_hint/test.jsonl", map(with_hint, sets["test"]))
    solutions = [(p, solve(p["problem"], rng, args.haste)) for p in sets["train"]]
    solutions += [(with_hint(p), solve(p["problem"], rng)) for p in sets["train"]]
    tokenizer = load_tokenizer(os.path.join(args.world, "student_init"), "--world")
    write_solutions(args, "both", solutions, tokenizer, [tokenizer.eos_token_id])
    finish_artifact(args, "toy_hint", ["train.jsonl", "test.jsonl", "with_hint/test.jsonl"])


if __name__ == "__main__":
    main(get_args())
