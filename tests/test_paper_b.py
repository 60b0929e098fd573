"""recipes/paper_b.py and toy_paper_b.py: what they compute from logs, by hand; the miniature's commands."""

import json
import random

import pytest

from distil import evaluation
from recipes import paper_b, toy_paper_b
from recipes.toy_grid import STAGES

SIZE = toy_paper_b.SIZE
NAMES = ["tokens", *toy_paper_b.LATER]


def steps_of(rng, count, lengths):
    """Rows of metrics.jsonl, each with as many bins of 8 positions as its longest response has."""
    rows = []
    for step in range(count):
        tokens = [
            sum(max(0, min(8, n - start)) for n in lengths[step]) for start in range(0, max(lengths[step]), 8)
        ]
        means = {name: [rng.uniform(-1, 1) for _ in tokens] for name in toy_paper_b.LATER}
        rows.append(
            {"step": step + 1, "overlap_ratio": rng.random(), "by_position": {"tokens": tokens} | means}
        )
    return rows


def test_means_by_position_weigh_tokens_and_later_bins_are_compared_with_earlier_ones():
    rows = steps_of(random.Random(0), 3, [[3, 20], [9], [30, 1, 17]])
    found = paper_b.by_position(rows)
    values = {name: [[], [], [], []] for name in toy_paper_b.LATER}  # a value for each token of a bin
    for row in rows:
        for name, bins in values.items():
            for i, count in enumerate(row["by_position"]["tokens"]):
                bins[i] += [row["by_position"][name][i]] * count
    assert found["tokens"] == [3 + 8 + 8 + 8 + 1 + 8, 8 + 1 + 8 + 8, 4 + 8 + 1, 6]
    for name, bins in values.items():
        assert found[name] == pytest.approx([sum(bin) / len(bin) for bin in bins])
        earlier, later = bins[0] + bins[1], bins[2] + bins[3]
        difference = sum(later) / len(later) - sum(earlier) / len(earlier)
        assert paper_b.later_minus_earlier(found, name) == pytest.approx(difference)
    table = paper_b.position_table(paper_b.by_position(rows[1:2]), found, 8)
    assert "| 24 to 31 " in table and "| - -> 6 " in table and table.count("\n") == 1 + 4 + 1


def test_gap_recovery():
    assert paper_b.recovery(0.2, 0.6, 0.5) == pytest.approx(0.75)
    assert paper_b.recovery(0.2, 0.2, 0.5) is None and paper_b.recovery(0.2, None, 0.5) is None


@pytest.fixture
def study(tmp_path):
    """(OUT, {run: accuracy}) of a finished study, as far as its report reads it."""
    rng, scores = random.Random(1), {}
    rows = [toy_paper_b.place(row, seed) for row in toy_paper_b.rows_of(SIZE) for seed in (1, 2)]
    for run in ["small", "large", "larger", "small_rl", "large_rl", *rows]:
        chance = {"small": 0.2, "large": 0.4}.get(run, 0.3 + 0.5 * rng.random())
        correct = [[rng.random() < chance for _ in range(4)] for _ in range(30)]
        samples = [{"id": f"t/{i}", "correct": right} for i, row in enumerate(correct) for right in row]
        log = steps_of(rng, 24, [[rng.randint(1, 60) for _ in range(3)] for _ in range(24)])
        (tmp_path / run / "eval").mkdir(parents=True)
        for name, lines in {"eval/samples.jsonl": samples, "metrics.jsonl": log}.items():
            (tmp_path / run / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        scores[run] = sum(map(sum, correct)) / 120
    return str(tmp_path), scores


def test_the_miniature_reports_what_its_runs_have(study, capsys, monkeypatch):
    monkeypatch.setattr(evaluation, "DRAWS", 100)
    out, scores = study
    toy_paper_b.report(SIZE, out, [1, 2])
    runs, claims, _, positions = capsys.readouterr().out.strip().split("\n\n")
    cells = {
        line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in runs.splitlines()
    }
    for row, (student, teacher, _) in toy_paper_b.rows_of(SIZE).items():
        after = [scores[toy_paper_b.place(row, seed)] for seed in (1, 2)]
        recovered = [(x - scores[student]) / (scores[teacher] - scores[student]) for x in after]
        expected = [f"{scores[student]:.3f}", f"{scores[teacher]:.3f}", " ".join(f"{x:.3f}" for x in after)]
        assert cells[row][1:5] == [*expected, " ".join(f"{x:.0%}" for x in recovered)]
    lines = [[c.strip() for c in line.split("|")[1:-1]] for line in claims.splitlines()[2:]]
    for (text, metric, seeds, mean, came), claim in zip(
        lines, toy_paper_b.CLAIMS.strip().splitlines(), strict=True
    ):
        name, kind, terms, *bound = claim.split(" | ")
        assert (text, metric) == (name, kind)
        if metric == "avg":
            pairs = [[scores[toy_paper_b.place(row, seed)] for row in terms.split(" - ")] for seed in (1, 2)]
            assert seeds == " ".join(f"{a - b:+.3f}" for a, b in pairs)
            low, high = map(float, mean.split("[")[1].rstrip("]").split(", "))
        values = [*map(float, seeds.split()), *([low, high] if metric == "avg" else [])]
        bound = float(bound[0]) if bound else 0
        verdict = "yes" if min(values) > bound else "the opposite" if max(values) < bound else "not clear"
        assert came == verdict or min(map(abs, (v - bound for v in values))) < 1e-3  # as printed
    assert len({line[4] for line in lines}) == 3  # every verdict is among these
    assert positions.splitlines()[-1].startswith("| later - earlier")


def test_the_commands_of_the_miniature():
    jobs = [job for jobs in toy_paper_b.phases(SIZE, "OUT", [1, 2, 3]) for job in jobs]
    parsed = [(words[0], STAGES[words[0]].get_args(words[1:])) for job in jobs for words in job]
    cells = {args.out[4:]: args for stage, args in parsed if stage == "train" and args.prefix == "student"}
    rows = toy_paper_b.rows_of(SIZE)
    assert len(cells) == 3 * len(rows) and {args.seed for args in cells.values()} == {1, 2, 3}
    made = {args.out for _, args in parsed}
    for row, (student, teacher, _) in rows.items():
        args = cells[toy_paper_b.place(row, 2)]
        assert (args.student, args.teacher) == (f"OUT/{student}/final", f"OUT/{teacher}/final")
        assert {f"OUT/{student}", f"OUT/{teacher}", f"{args.out}/eval"} <= made
        assert (args.kl, args.vocab, args.k, args.position_bins) == ("reverse", "topk", 4, toy_paper_b.BINS)
        kind, _, value = row.partition("/")
        assert args.topk_set == (value if kind == "set" else "student")
        assert args.max_response_tokens == (int(value) if kind == "horizon" else 80)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_that_fails_ends_the_miniature(workers, tmp_path, monkeypatch, refused):
    def call(words):
        (tmp_path / words[0]).touch()
        if words[0] == "bad":
            raise SystemExit(3)

    monkeypatch.setattr(toy_paper_b, "call", call)
    toy_paper_b.work([[["a"], ["b"]], [["c"]]], workers)
    assert {file.name for file in tmp_path.iterdir()} == {"a", "b", "c"}
    refused(lambda: toy_paper_b.work([[["bad"], ["never"]]], workers), "a run failed", code=1)
    assert not (tmp_path / "never").exists()
