"""How fast the grader is, and how often it agrees with the labels of tests/graded_answers.jsonl.

    python -m benchmarks.grading [--data math500.jsonl]

Prints the seconds for 256 answers as GRPO grades them (32 problems, 8 responses each): in a new process,
whose workers have yet to import sympy, then for 256 other answers; for 1,500 answers; and the agreement.
"""

import argparse
import json
import os
import random
import time

from distil.grading import grade, verdict_on

LABELLED = os.path.join(
    os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "tests/graded_answers.jsonl"
)


def get_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    help_text = "JSONL files of problems and answers; without any, the labelled responses of the tests"
    parser.add_argument("--data", nargs="*", default=[], help=help_text)
    return parser.parse_args(argv)


def read_jsonl(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def three_responses(answer, other):
    """The gold answer, the same in another spelling, and another problem's answer."""
    respelled = answer.replace("\\frac", "\\dfrac").replace(",", ", ") if "\\" in answer else f"{answer}.0"
    respelled = respelled if answer.strip("-").isdigit() or "\\" in answer else f"{{{answer}}}"
    return [f"so it is $\\boxed{{{found}}}$." for found in (answer, respelled, other)]


def pairs_of(paths):
    """(response, answer) pairs, the responses to one problem side by side."""
    if not paths:
        rows = sorted(read_jsonl(LABELLED), key=lambda row: row["answer"])
        return [(row["response"], row["answer"]) for row in rows]
    answers = [str(row["answer"]).rpartition("####")[2].strip() for path in paths for row in read_jsonl(path)]
    others = answers[1:] + answers[:1]
    return [
        (response, answer)
        for answer, other in zip(answers, others, strict=True)
        for response in three_responses(answer, other)
    ]


def seconds_for(pairs):
    started = time.perf_counter()
    grades = grade([response for response, _ in pairs], [answer for _, answer in pairs])
    seconds = time.perf_counter() - started
    timed_out = sum(found.timed_out for found in grades)
    right = sum(found.correct for found in grades)
    return f"{seconds:6.2f} s  ({len(pairs)} answers, {right} right, {timed_out} timed out)"


def main(args):
    pairs = pairs_of(args.data)
    problems = sorted({answer for _, answer in pairs})
    random.Random(0).shuffle(problems)
    responses = {answer: [] for answer in problems}
    for response, answer in pairs:
        responses[answer].append(response)
    groups = [
        [(responses[answer][i % len(responses[answer])], answer) for i in range(8)] for answer in problems
    ]
    first, second = groups[:32], groups[32:64]
    print("GRPO, cold:   ", seconds_for([pair for group in first for pair in group]), flush=True)
    print("GRPO, warm:   ", seconds_for([pair for group in second for pair in group]), flush=True)
    verdict_on.cache_clear()
    print("1,500 answers:", seconds_for(pairs[:1500]), flush=True)
    verdict_on.cache_clear()
    rows = read_jsonl(LABELLED)
    grades = grade([row["response"] for row in rows], [row["answer"] for row in rows])
    agreed = sum(found.correct == row["correct"] for row, found in zip(rows, grades, strict=True))
    accepted = sum(found.correct and not row["correct"] for row, found in zip(rows, grades, strict=True))
    share = f"{agreed} of {len(rows)} ({100 * agreed / len(rows):.2f}%)"
    print(f"agreement:     {share}, {accepted} wrong answers accepted")


if __name__ == "__main__":
    main(get_args())
