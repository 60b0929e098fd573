"""Does what recipes/toy.sh says of its runs hold in them? Exit code 1 if not.

    python -m recipes.toy_claim out/toy

The claim: each of the four cells ends above the base student, in Avg@4 on the same test problems, with the
whole 95% bootstrap interval of the difference, paired by problem, above 0. One seed decides no more: which
cell is best differs from machine to machine."""

import argparse
import os
import sys

from distil.evaluation import bootstrap_means, percentile_interval, values_by_problem
from reports.reading import read_results, read_samples

CELLS = [f"{prefix}_{kl}" for prefix in ("teacher", "student") for kl in ("forward", "reverse")]


def correct_by_problem(path):
    """{id of a problem: its share of correct responses} of an evaluation."""
    results, rows = read_results(path, "OUT"), read_samples(path)
    ids = list(dict.fromkeys(row["id"] for row in rows))
    return dict(zip(ids, values_by_problem(rows, results["n"], [])["avg"][0], strict=True))


def main(args):
    base = correct_by_problem(os.path.join(args.out, "base", "eval"))
    print("Every cell should end above the base student:")
    all_hold = True
    for name in CELLS:
        cell = correct_by_problem(os.path.join(args.out, name, "eval"))
        gains = [cell[id] - base[id] for id in base]
        low, high = percentile_interval(bootstrap_means(gains))
        all_hold &= low > 0
        gain = f"{sum(gains) / len(gains):+.3f} [{low:+.3f}, {high:+.3f}] in Avg@4"
        print(f"  {name:16} {gain}  {'holds' if low > 0 else 'DOES NOT HOLD'}")
    sys.exit(not all_hold)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", help="what recipes/toy.sh wrote")
    main(parser.parse_args())
