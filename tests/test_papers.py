"""docs/claims.md: every row of both recipes is in its tables, and every command in them can be run."""

import pathlib
import re
import shlex
from decimal import Decimal

import pytest

from conftest import ROOT
from recipes import kl_study, plan
from test_recipes import bash, listed
from test_repo import parses

ROOT = pathlib.Path(ROOT)
PAGE = (ROOT / "docs/claims.md").read_text(encoding="utf-8")
TABLES = [
    [cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line[:2] == "| "
]
COMMANDS = [found for _, cell, *_ in TABLES for found in re.findall(r"`([^`]+)`", cell)]


def picked(name):
    """The rows and groups of rows that commands of recipes/NAME.sh in the tables pick."""
    words = [shlex.split(line) for line in COMMANDS]
    return {
        flag
        for line in words
        if f"recipes/{name}.sh" in line
        for before, flag in zip(line, line[1:])
        if before == "--row"
    }


@pytest.mark.parametrize("name", ["qwen3", "paper_b"])
def test_every_row_of_a_recipe_is_in_the_tables(name, tmp_path):
    rows = listed(tmp_path, name)
    assert rows and [row for row in rows if not {row, row.split("/")[0]} & picked(name)] == []


def test_every_line_of_the_tables_is_whole():
    for cells in TABLES:
        assert len(cells) == 4 and all(cells), cells
        _, command, _, here = cells
        assert command in ("command", "none", "the same two") or re.fullmatch(r"`[^`]+`", command), command
        tested = "test" in command or "by a test" in here or "kl_study.md" in here
        assert here == "here" or "not run" in here or tested, cells


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_parses(line, tmp_path):
    program, *words = shlex.split(line)
    if words[:2] == ["-m", "recipes.paper_b"]:
        plan.stage_of([program, *words])
    elif words[:2] == ["-m", "recipes.kl_study"]:
        assert (ROOT / kl_study.get_args(words[2:]).report).is_file()
    elif words[0] == "-m":
        assert program == "python" and words[1] == "pytest", line
        [file] = [word for word in words if word.endswith(".py")]
        tests = re.findall(r"(?m)^def (test_\w+)", (ROOT / file).read_text(encoding="utf-8"))
        wanted = words[words.index("-k") + 1] if "-k" in words else ""
        assert any(wanted in name for name in tests)
    elif program == "bash":
        name, *flags = pathlib.Path(words[0]).stem, *words[1:]
        code, called, lines, error = bash(tmp_path, name, *flags)
        assert code == 0 and called[:2] == ["-m", "recipes.plan"] and lines, error
    else:
        assert program == "python"
        parses(words[0].removesuffix(".py"), words[1:])


def test_runs_that_figures_and_comparisons_name_are_rows(tmp_path):
    """out/qwen3/table1_*_4b_* stands for at least one run that the recipe makes."""
    made = {
        f"out/{name}/{row.replace('/', '_')}"
        for name in ("qwen3", "paper_b")
        for row in listed(tmp_path, name)
    }
    for line in COMMANDS:
        words = shlex.split(line)
        if words[0] == "python" and {"--compare", "--runs", "recipes.paper_b"} & set(words):
            for word in words:
                if word.startswith("out/") and word.count("/") == 2:
                    assert any(pathlib.PurePath(run).match(word) for run in made), word


def test_results_of_the_toy_world_are_those_of_the_study():
    study = (ROOT / "results/toy_grid.md").read_text(encoding="utf-8")
    found = re.findall(r"[+-]\d\.\d{3} \[[^\]]+\]", PAGE)
    assert len(found) > 15
    for interval in found:
        assert interval in study, interval
    for closed, gates, floor in re.findall(
        r"(\d+) of (\d+)(?: gates closed)? at (?:a floor of )?(0\.\d+)", PAGE
    ):
        counts = re.findall(rf"\| {floor} +\| (\d+) +\| (\d+) ", study)
        assert [sum(map(int, column)) for column in zip(*counts)] == [int(gates), int(closed)], floor


def test_what_paper_a_claims_follows_from_its_tables(tmp_path):
    """Differences of means over the rows and data sets of tables 1 and 2, as the recipe lists them."""
    _, _, lines, _ = bash(tmp_path, "qwen3", "--list")
    rows = {}
    for line in lines:
        if re.match("table[12]/", line):
            name, *cells = line.split()
            rows[name] = [sum(Decimal(cell.split("/")[i]) for cell in cells) / 4 for i in (0, 1)]

    def minus(one, other, where="", kind=0):
        """Mean of Avg (kind 0) or Pass (1) of rows with `one` in their names, minus that with `other`."""
        found = [[r[kind] for n, r in rows.items() if word in n and where in n] for word in (one, other)]
        assert len(found[0]) == len(found[1]) > 0
        return f"{sum(found[0]) / len(found[0]) - sum(found[1]) / len(found[1]):+.2f}"

    kls, prefixes, lengths = ("reverse", "forward"), ("/student", "/teacher"), ("table2", "table1")
    for words in (
        f"Avg {minus(*kls)} ({minus(*kls, 'table1')} at 128 tokens, {minus(*kls, 'table2')} at 4096)",
        f"Pass {minus(*kls, 'table1', 1)} at 128 tokens, {minus(*kls, 'table2', 1)} at 4096",
        f"Avg {minus(*prefixes)}, Pass {minus(*prefixes, '', 1)} (Avg {minus(*prefixes, 'table2')} at 4096",
        f"Avg {minus(*lengths)}, Pass {minus(*lengths, '', 1)}; forward {minus(*lengths, 'forward')}, "
        f"reverse {minus(*lengths, 'reverse')}",
    ):
        assert words in PAGE
