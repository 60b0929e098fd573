"""The runs of the study on the toy world: their names, commands and order, and what each of them needs.

In a command, {out} is the directory of all runs. A command may read what other jobs leave below it: it needs
the jobs with the names of those directories. {matched} is the checkpoint of an evaluation at equal FLOPs.

A horizon is the limit of response tokens in training: only the shortest solutions fit into the short one,
nearly all into the long one. The runs ends_* start from a base student whose stop token is not the
teacher's. `collapsed` is the base student after many epochs on few responses of its own.

Runs with a rate in their name, student_reverse_long_3e-5, are for the comparison of cells that have their
own learning rate each: `choose` chooses it. Each of their seeds has a base student of its own; these decide
as much as the seed of the run. All other runs have the usual rate and share a base student.

The map has the cells at the usual rate, each seed from a base student of its own, for students of several
widths and a teacher that solves a problem in many orders or in two. Its points with the narrowest student and
many orders are those of that comparison, at their own rates.
"""

import hashlib
import re
from typing import NamedTuple

HORIZONS, PREFIXES, KLS = ("short", "long"), ("teacher", "student"), ("forward", "reverse")
CELLS = [f"{prefix}_{kl}_{horizon}" for horizon in HORIZONS for prefix in PREFIXES for kl in KLS]
WIDTHS, SPREADS, USUAL = (32, 56, 96), ("many", "few"), "1e-4"
POINTS = [(cell, width, spread) for width in WIDTHS[::-1] for spread in SPREADS for cell in CELLS]
OF_CELLS = [(cell, WIDTHS[0], "many") for cell in CELLS]
SIZE = {
    "world": "--terms 4 8 --haste 0.15 --slips 0.4 --restate 0.15 --student_width",
    "short": "32",
    "long": "160",
    "teacher": "--steps 600",
    "base_32": "--steps 800",
    "base_56": "--steps 600",
    "base_96": "--steps 400",
    "rollouts": "--limit 4000",
    "own": "--limit 100",
    "collapsed": "--steps 200 --batch_size 32 --lr 1e-3",
    "usual": "--steps 120 --save_every 5 --eval_every 10 --eval_n 4",
    "cell": "--steps 120 --save_every 5 --eval_every 20 --eval_n 4",
    "map": "--steps 120",
    "curriculum": "--horizons 16,32,64,160 --gate_every 15 --entropy_floor",
    "grpo": "--steps 30 --lr 1e-4 --n 8 --batch_size 16 --save_every 10 --eval_every 10 --eval_n 4",
    "test": "--n 8 --k 1 4 8",
    "map_test": "--n 4 --k 1 4",
    "rates": ["1e-5", "3e-5", "1e-4", "3e-4", "1e-3"],
    "cell_seeds": [1, 2, 3, 4, 5],  # of the comparison of cells
    "seeds": [1, 2, 3],  # of the map and of all other runs
}
FIRST = 1  # the seed with which learning rates are chosen, and whose base student most runs share
FLOORS = ("0.2", "0.33", "0.38")  # of the curriculum's entropy; the teacher's own is 0.236
CUT = ("ends_student_cut", "ends_student_forward_cut")  # evaluated again, where both stop tokens stop
COMMON = "--engine hf --dtype float32"


class Job(NamedTuple):
    """Commands, in order. With a name, the evaluation that they end with is a result of the study."""

    commands: list
    name: str = None
    seed: int = None  # None: made once, for all seeds
    run: str = None  # directory of the training that it evaluates
    budget: tuple = ()  # {matched} has spent as much as one of these places, which all cost the same


# ----------------------------------------------------------------------------------------------------------
# Commands


def make_jobs(size):
    """{directory below {out}: Job} of everything that the study may run."""
    jobs = {}

    def add(name, command, seed=None, count=size["test"]):
        place = name if seed is None else f"{name}_{seed}"
        commands = [f"{command} --out {{out}}/{place}", test(size, place, place, seed or 42, count=count)]
        jobs[place] = Job(commands, name, seed, place)

    add_starts(size, jobs, add)
    for seed in seeds_of(size):
        for name, command in runs_of(size, seed).items():
            add(name, command, seed)
        for name in CUT:
            run, place = f"{name.removesuffix('_cut')}_{seed}", f"{name}_{seed}"
            jobs[place] = Job([test(size, run, place, seed, "--extra_stop_ids 2")], name, seed, run)
        for cell in CELLS:
            if cell.startswith("student"):
                add_matched(size, jobs, cell, seed, [cell.replace("student", "teacher")])
        for point in POINTS:
            for rate in size["rates"] if point in OF_CELLS else [USUAL]:
                add_point(size, jobs, add, point, rate, seed)
    return jobs


def add_matched(size, jobs, name, seed, budgets):
    """The test of a run at equal FLOPs. budgets: names of runs that all cost the same."""
    run, place = f"{name}_{seed}", f"{name}_equal_flops_{seed}"
    budget = tuple(f"{other}_{seed}" for other in budgets)
    jobs[place] = Job(
        [test(size, run, place, seed, checkpoint="{matched}")], f"{name}_equal_flops", seed, run, budget
    )


def add_point(size, jobs, add, point, rate, seed):
    """A cell at a point of the map; at a point of the comparison of cells also its test at equal FLOPs."""
    cell, width, spread = point
    name, (prefix, kl, horizon) = name_of(*point, rate), cell.split("_")
    kind = "cell" if point in OF_CELLS else "map"
    logs = watched(size, seed) if kind == "cell" else f"--log_every 20 {COMMON} --seed {seed}"
    base, settings = base_of(width, spread, seed), f"{size[kind]} --lr {rate} {logs}"
    command = distil(size, seed, f"--kl {kl}", horizon, prefix, spread, base, settings)
    add(name, command, seed, size["test" if kind == "cell" else "map_test"])
    if kind == "cell" and prefix == "student":
        add_matched(
            size, jobs, name, seed, [name_of(f"teacher_{kl}_{horizon}", rate=r) for r in size["rates"]]
        )


def add_starts(size, jobs, add):
    """Worlds, teachers, base students, the teachers' responses and their scores."""
    many, other_stop = f"toy_world {size['world']}", "--student_end endoftext --chat_share 0.1"
    worlds = {"world": f"{many} 32", "world_endoftext": f"{many} 32 {other_stop}"}
    worlds |= {f"world_{width}": f"{many} {width}" for width in WIDTHS[1:]}
    worlds["world_few"] = f"{many} 32 --orders two"
    for name, command in worlds.items():
        jobs[name] = Job([f"{command} --out {{out}}/{name}"])

    def learn(name, init, solutions, flags, seed=None):
        source = f"--student {{out}}/{init} --rollouts {{out}}/{solutions}"
        add(name, fine_tune(size, f"--batch_size 64 --lr 3e-3 {source} {flags}"), seed)

    sample = f"--data {{out}}/world/train.jsonl --max_response_tokens {size['long']} {COMMON}"
    for spread in SPREADS:
        few = "_few" if spread == "few" else ""
        learn(f"teacher{few}", f"world{few}/teacher_init", f"world{few}/gold", size["teacher"])
        rollout = f"rollout --model {{out}}/teacher{few}/final {size['rollouts']} {sample}"
        score = f"score_teacher --teacher {{out}}/teacher{few}/final --rollouts {{out}}/rollouts{few}"
        jobs[f"rollouts{few}"] = Job([f"{rollout} --out {{out}}/rollouts{few}"])
        jobs[f"scores{few}"] = Job([f"{score} --dtype float32 --out {{out}}/scores{few}"])
        for width, seed in ((width, seed) for width in WIDTHS for seed in seeds_of(size)):
            world = "world" if width == WIDTHS[0] else f"world_{width}"
            own = (
                (size[f"base_{width}"], None)
                if seed == FIRST
                else (f"{size[f'base_{width}']} --seed {seed}", seed)
            )
            learn(base_of(width, spread), f"{world}/student_init", f"world{few}/hasty", *own)
    learn("base_endoftext", "world_endoftext/student_init", "world_endoftext/hasty", size["base_32"])
    own = f"rollout --model {{out}}/base/final {size['own']} --temperature 0.6 --top_p 0.95 {sample}"
    jobs["own"] = Job([f"{own} --out {{out}}/own"])
    collapse = f"--student {{out}}/base/final --rollouts {{out}}/own {size['collapsed']}"
    add("collapsed", fine_tune(size, collapse))


def runs_of(size, seed):
    """{name: command without --out} of the runs at the usual rate."""
    curriculum = f"--curriculum entropy {size['curriculum']}"
    own_stop = "--stop_ids student"
    runs = {}
    for name in CELLS:
        prefix, kl, horizon = name.split("_")
        runs[name] = distil(size, seed, f"--kl {kl}", horizon, prefix)
    for weight in ("0.2", "0.5", "0.8"):
        runs[f"mix_{weight}"] = distil(size, seed, f"--kl mix --fkl_weight {weight}")
    for floor in FLOORS:
        first = floor == FLOORS[0]
        base = "base" if first else base_of(WIDTHS[0], "many", seed)
        name = "curriculum" if first else f"curriculum_floor_{floor}"
        runs[name] = distil(size, seed, f"--kl reverse {curriculum} {floor}", base=base)
    runs["topk"] = distil(size, seed, "--kl reverse --vocab topk --k 4")
    runs["sampled"] = distil(size, seed, "--kl reverse --vocab sampled")
    runs["from_collapsed"] = distil(size, seed, "--kl reverse", base="collapsed")
    for name, flags, horizon in (
        ("ends_both", "--kl reverse --stop_ids both", "long"),
        ("ends_student", f"--kl reverse {own_stop}", "long"),
        ("ends_student_forward", f"--kl forward {own_stop}", "long"),
        ("ends_student_short", f"--kl reverse {own_stop}", "short"),
        ("ends_student_curriculum", f"--kl reverse {own_stop} {curriculum} {FLOORS[0]}", "long"),
    ):
        runs[name] = distil(size, seed, flags, horizon, base="base_endoftext")
    for name in CELLS:
        runs[f"grpo_{name}"] = (
            f"grpo --model {{out}}/{name}_{seed}/final --data {{out}}/world/train.jsonl "
            f"--max_response_tokens {size['long']} {size['grpo']} {watched(size, seed)}"
        )
    return runs


def distil(size, seed, flags, horizon="long", prefix="student", spread="many", base="base", settings=None):
    settings = settings or f"{size['usual']} --lr {USUAL} {watched(size, seed)}"
    few = "_few" if spread == "few" else ""
    data = f"--rollouts {{out}}/rollouts{few} --scores {{out}}/scores{few}"
    if prefix == "student":
        data = f"--teacher {{out}}/teacher{few}/final --data {{out}}/world/train.jsonl"
    return (
        f"train --prefix {prefix} {flags} --student {{out}}/{base}/final {data} "
        f"--normalize token --max_response_tokens {size[horizon]} --batch_size 32 {settings}"
    )


def watched(size, seed):
    """The flags of evaluations in training."""
    held_out = "--eval_data {out}/world/heldout.jsonl"
    return f"{held_out} --eval_max_response_tokens {size['long']} --log_every 20 {COMMON} --seed {seed}"


def fine_tune(size, flags):
    """Hard-label supervised fine-tuning."""
    return (
        f"train --prefix teacher --kl forward --vocab sampled --normalize token --stop_ids student "
        f"--max_response_tokens {size['long']} --log_every 100 {COMMON} {flags}"
    )


def test(size, run, place, seed, flags="", checkpoint="final", count=None):
    return (
        f"evaluate --model {{out}}/{run}/{checkpoint} --data {{out}}/world/test.jsonl "
        f"{count or size['test']} --sample_batch 1024 --max_response_tokens {size['long']} {COMMON} "
        f"--seed {seed} {flags} --out {{out}}/{place}/eval"
    )


def seeds_of(size):
    return sorted({FIRST, *size["seeds"], *size["cell_seeds"]})


def base_of(width, spread, seed=FIRST):
    name = "base" + (f"_{width}" if width != WIDTHS[0] else "") + ("_few" if spread == "few" else "")
    return name if seed == FIRST else f"{name}_{seed}"


def name_of(cell, width=WIDTHS[0], spread="many", rate=USUAL):
    """The name of a cell at a point of the map: student_reverse_long_width_96_few_3e-4."""
    width = f"_width_{width}" if width != WIDTHS[0] else ""
    return cell + width + ("_few" if spread == "few" else "") + f"_{rate}"


def needs(jobs, place):
    """Places that a job reads from, apart from its own."""
    read = re.findall(r"\{out\}/([^/ ]+)", " ".join(jobs[place].commands))
    return [other for other in dict.fromkeys(read) if other != place]


def identity(jobs, place):
    """Hex digest of a job's commands and of those of all that it needs: of every flag that matters."""
    text = [" ".join(command.split()) for command in jobs[place].commands]
    text += [identity(jobs, other) for other in needs(jobs, place)]
    return hashlib.sha256("\n".join(text).encode()).hexdigest()[:12]


# ----------------------------------------------------------------------------------------------------------
# Order, and the choice of learning rates


def held_out(result):
    """Mean Avg in the evaluations on held-out problems in the last sixth of training."""
    curve = result["curve"]
    late = [avg for step, avg in zip(curve["step"], curve["avg"]) if step >= 5 / 6 * result["step"]]
    return sum(late) / len(late)


def choose(size, results, point):
    """(each learning rate to try and the first seed's held-out Avg, None where that is missing; the best
    rate, None until all were tried) of a point (cell, width, spread).

    The first rates to try are the usual one and those next to it. While the best is an end, the next one
    beyond it follows."""
    rates, middle = size["rates"], size["rates"].index(USUAL)

    def score(rate):
        first = f"{name_of(*point, rate)}_{FIRST}"
        return held_out(results[first]) if first in results else None

    low, high = max(0, middle - 1), min(middle + 1, len(rates) - 1)
    while True:
        scores = {rate: score(rate) for rate in rates[low : high + 1]}
        if None in scores.values():
            return scores, None
        best = max(scores, key=scores.get)
        if best == rates[low] and low > 0:
            low -= 1
        elif best == rates[high] and high < len(rates) - 1:
            high += 1
        else:
            return scores, best


def rate_at(size, results, point):
    """The learning rate of a point of the map; None until it is chosen."""
    return choose(size, results, point)[1] if point in OF_CELLS else USUAL


def parts(size, results):
    """Yields lists of places whose results the study wants, in order; each list needs the results of those
    before it."""

    def with_seeds(names, seeds):
        return [f"{name}_{seed}" for seed in seeds for name in names]

    def at_rates(points):
        return [name_of(*point, rate) for point in points for rate in choose(size, results, point)[0]]

    def at_best(points):
        return [name_of(*point, choose(size, results, point)[1]) for point in points]

    yield with_seeds(at_rates(OF_CELLS), [FIRST])
    yield with_seeds(at_best(OF_CELLS), size["seeds"])
    yield with_seeds([f"curriculum_floor_{floor}" for floor in FLOORS[1:]], size["seeds"])
    yield with_seeds(at_best(OF_CELLS), size["cell_seeds"])
    matched = [f"{name}_equal_flops" for name in at_best(OF_CELLS) if name.startswith("student")]
    yield with_seeds(matched, size["cell_seeds"])
    yield ["teacher", "base", "base_endoftext", "collapsed"]
    yield with_seeds([*runs_of(size, FIRST), *CUT, name_of("student_reverse_long")], size["seeds"])
    yield with_seeds([f"{cell}_equal_flops" for cell in CELLS if cell.startswith("student")], size["seeds"])
    yield [base_of(width, spread) for width in WIDTHS for spread in SPREADS] + ["teacher_few"]
    yield with_seeds([name_of(*point) for point in POINTS if point not in OF_CELLS], size["seeds"])


def missing(size, results):
    """Places of the first part of the study that lacks results; none if it is complete."""
    for part in parts(size, results):
        if lacking := [place for place in part if place not in results]:
            return lacking
    return []


def count_missing(size, results):
    """How many results the study lacks, without learning rates beyond the first that are to be tried."""
    places = {place for part in parts(size, results) for place in part}
    unknown = f"_None_{FIRST}"  # the first seed at the best rate is one of those that choose it
    return sum(place not in results and not place.endswith(unknown) for place in places)
