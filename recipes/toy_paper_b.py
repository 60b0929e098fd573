"""Paper B's rows on the toy world, three seeds each: new knowledge, sizes, sets of tokens, long horizons.

    python -m recipes.toy_paper_b --out out/toy_paper_b

runs them, prints their results, and says what was expected and whether it came. Three base models of one
family, small, large and larger, learn from the same hasty solutions; GRPO makes small_rl and large_rl. Every
row is on-policy distillation by reverse KL on the student's 4 likeliest tokens, or on another set of them:

    knowledge   the small student from the large model, before and after that one's own RL
    size        a student from its own RL'd self, or from the next larger model: small, and large again
    set         the small student from its RL'd self, on other sets of tokens
    horizon     the same with other limits of response tokens than 80

On a CPU a run takes one core, and all cores are used. Started again, it keeps what is finished.
"""

import argparse
import os
import signal
import sys

import torch

from distil.evaluation import interval, mean_of
from distil.jsonl import read_jsonl
from recipes.paper_b import by_position, later_minus_earlier, position_table, recovery
from recipes.toy_grid import work
from recipes.toy_runs import COMMON, Job
from reports.reading import read_samples
from reports.tables import markdown

BINS, ENDS = 8, 10  # positions in a bin; steps at the start and at the end whose metrics are compared
SIZE = {
    "world": "--terms 4 8 --haste 0.15 --slips 0.3",
    "models": {  # the slowest first
        "larger": "--steps 400 --lr_schedule cosine",
        "large": "--steps 350",
        "small": "--steps 600",
    },
    "rl": "--steps 40 --lr 2e-4 --n 8 --batch_size 16",
    "cell": "--steps 60 --lr 1e-4 --batch_size 32 --k 4",
    "limit": 80,
    "horizons": [8, 16, 32],
    "test": "--n 4 --k 4",
}
INITIAL = {"larger": "world/teacher_init", "large": "world_64/student_init", "small": "world/student_init"}

# expected | metric | the difference of two rows, or a row | bound, if it is not 0
CLAIMS = """
new knowledge: the large model teaches more after its own RL | avg | knowledge/after - knowledge/before
new knowledge: a larger part of the gap is recovered then | recovery | knowledge/after - knowledge/before
new knowledge: the overlap rises more then | rise | knowledge/after - knowledge/before
small student: its RL'd self teaches more than the larger model | avg | size/small_own - knowledge/before
small student: a larger part of the gap is recovered | recovery | size/small_own - knowledge/before
small student: the overlap rises more | rise | size/small_own - knowledge/before
large student: its RL'd self teaches more than the larger model | avg | size/large_own - size/large_larger
large student: a larger part of the gap is recovered | recovery | size/large_own - size/large_larger
large student: the overlap rises more | rise | size/large_own - size/large_larger
the intersection is enough (above -0.02) | avg | set/intersection - size/small_own | -0.02
the student's tokens that are not the teacher's teach less | avg | set/intersection - set/difference
tokens of one model alone teach less | avg | set/intersection - set/symmetric_difference
a limit of 8 tokens teaches less than one of 32 | avg | horizon/32 - horizon/8
80 tokens teach no more than 32 (above -0.02) | avg | horizon/32 - size/small_own | -0.02
later positions: a higher loss (later minus earlier half) | loss | size/small_own
later positions: a larger entropy gap (later minus earlier half) | entropy_gap | size/small_own
later positions: less overlap (earlier minus later half) | overlap_ratio | size/small_own
later positions: a lower advantage (earlier minus later half) | overlap_advantage | size/small_own
"""
LATER = {"loss": 1, "entropy_gap": 1, "overlap_ratio": -1, "overlap_advantage": -1}


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", required=True, help="directory of all runs")
    p.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of training and sampling")
    return p.parse_args(argv)


# ----------------------------------------------------------------------------------------------------------
# Commands


def rows_of(size):
    """{row: (student, teacher, flags)}."""
    rows = {"knowledge/before": ("small", "large", ""), "knowledge/after": ("small", "large_rl", "")}
    rows["size/small_own"] = "small", "small_rl", ""
    rows["size/large_own"] = "large", "large_rl", ""
    rows["size/large_larger"] = "large", "larger", ""
    for name in ("intersection", "difference", "symmetric_difference"):
        rows[f"set/{name}"] = "small", "small_rl", f"--topk_set {name}"
    for tokens in size["horizons"]:
        rows[f"horizon/{tokens}"] = "small", "small_rl", f"--max_response_tokens {tokens}"
    return rows


def place(row, seed):
    """The name of a row's run, below --out."""
    return f"{row.replace('/', '_')}_{seed}"


def make_jobs(size, seeds):
    """{directory below {out}: Job}, the slowest first."""
    common = f"--max_response_tokens {size['limit']} --log_every 20 {COMMON}"
    problems, jobs = "--data {out}/world/train.jsonl", {}
    for name, width in {"world": 32, "world_64": 64}.items():
        jobs[name] = Job([f"toy_world {size['world']} --student_width {width} --out {{out}}/{name}"])

    def add(run, command):
        data = f"--data {{out}}/world/test.jsonl {size['test']} --sample_batch 1024"
        flags = f"--max_response_tokens {size['limit']} {COMMON} --out {{out}}/{run}/eval"
        evaluation = f"evaluate --model {{out}}/{run}/final {data} {flags}"
        jobs[run] = Job([f"{command} --out {{out}}/{run}", evaluation])

    learn = "train --prefix teacher --kl forward --vocab sampled --normalize token --batch_size 64 --lr 3e-3"
    for model, steps in size["models"].items():
        start = f"--student {{out}}/{INITIAL[model]} --rollouts {{out}}/world/hasty"
        add(model, f"{learn} {start} {steps} {common}")
    for model in ("large", "small"):
        add(f"{model}_rl", f"grpo --model {{out}}/{model}/final {problems} {size['rl']} {common}")
    cell = f"train --prefix student --kl reverse --vocab topk --normalize token {problems} {size['cell']}"
    for seed in seeds:
        for row, (student, teacher, flags) in rows_of(size).items():
            pair = f"--student {{out}}/{student}/final --teacher {{out}}/{teacher}/final --seed {seed}"
            add(place(row, seed), f"{cell} {pair} --position_bins {BINS} {common} {flags}")
    return jobs


# ----------------------------------------------------------------------------------------------------------
# Results


def accuracy(run):
    """The share of right responses to each problem, in the order of the problems."""
    groups = {}
    for row in read_samples(f"{run}/eval"):
        groups.setdefault(row["id"], []).append(row["correct"])
    return [mean_of(group) for group in groups.values()]


def ends(out, row, seed):
    """Rows of metrics.jsonl of the run's first ENDS steps and of its last ones."""
    log = [row for _, row in read_jsonl(f"{out}/{place(row, seed)}/metrics.jsonl")]
    return log[:ENDS], log[-ENDS:]


def measures(size, out, seed):
    """{row: {metric: number}} of a seed; `avg` has a number for each problem."""
    found = {}
    for row, (student, teacher, _) in rows_of(size).items():
        after = accuracy(f"{out}/{place(row, seed)}")
        scores = mean_of(accuracy(f"{out}/{student}")), mean_of(accuracy(f"{out}/{teacher}")), mean_of(after)
        start, end = (mean_of([step["overlap_ratio"] for step in part]) for part in ends(out, row, seed))
        last = by_position(ends(out, row, seed)[1])
        found[row] = {"avg": after, "scores": scores, "recovery": recovery(*scores)}
        found[row] |= {"start": start, "end": end, "rise": end - start}
        found[row] |= {name: sign * later_minus_earlier(last, name) for name, sign in LATER.items()}
    return found


def run_table(size, found):
    """Markdown table of the rows, with each seed's values. found: measures() of each seed."""
    lines = [["row", "student <- teacher", "before", "teacher", "after", "recovery", "overlap"], ["---"] * 7]
    for row, (student, teacher, _) in rows_of(size).items():
        seeds = [one[row] for one in found]
        line = [row, f"{student} <- {teacher}", *(f"{score:.3f}" for score in seeds[0]["scores"][:2])]
        line.append(" ".join(f"{one['scores'][2]:.3f}" for one in seeds))
        line.append(" ".join("-" if one["recovery"] is None else f"{one['recovery']:.0%}" for one in seeds))
        line.append(" ".join(f"{one['start']:.2f}->{one['end']:.2f}" for one in seeds))
        lines.append(line)
    return markdown(lines)


def claim_table(found):
    """Markdown table of CLAIMS: each seed's difference, their mean, and whether it came as expected.

    "yes": every seed is above the bound; for `avg` the 95% bootstrap interval over problems of the mean over
    seeds is, too. "the opposite": all of that is below the bound."""
    lines = [["expected", "metric", "each seed", "mean [95%]", "came"], ["---"] * 5]
    for text, metric, terms, *bound in (line.split(" | ") for line in CLAIMS.strip().splitlines()):
        row, _, other = terms.partition(" - ")
        differences = []
        for one in found:
            values = [one[name][metric] for name in (row, other) if name]
            values = values if metric == "avg" else [[value] for value in values]
            differences.append([problem[0] - sum(problem[1:]) for problem in zip(*values, strict=True)])
        seeds = list(map(mean_of, differences))
        form = "+.4f" if metric in LATER else "+.3f"
        mean, extremes, bound = format(mean_of(seeds), form), list(seeds), float(bound[0] if bound else 0)
        if metric == "avg":
            extremes += interval([mean_of(problem) for problem in zip(*differences)])
            mean += f" [{extremes[-2]:+.3f}, {extremes[-1]:+.3f}]"
        came = "yes" if min(extremes) > bound else "the opposite" if max(extremes) < bound else "not clear"
        lines.append([text, metric, " ".join(format(value, form) for value in seeds), mean, came])
    return markdown(lines)


def report(size, out, seeds):
    found = [measures(size, out, seed) for seed in seeds]
    parts = zip(*(ends(out, "size/small_own", seed) for seed in seeds))
    title = f"size/small_own by position, all seeds: the first {ENDS} steps -> the last {ENDS}"
    positions = position_table(*(by_position(sum(part, [])) for part in parts), BINS)
    print("", run_table(size, found), claim_table(found), title, positions, sep="\n\n")


def main(args):
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends the forks too
    jobs = make_jobs(SIZE, args.seeds)
    for _ in work(jobs, jobs, {}, args.out, 1 if torch.cuda.is_available() else os.cpu_count()):
        pass
    report(SIZE, args.out, args.seeds)


if __name__ == "__main__":
    main(get_args())
