"""recipes/qwen3.sh and paper_b.sh: commands have the papers' values; some rows run with tiny models.

bash gives the recipes' commands; recipes/plan.py, which shows and runs them, is called in this process."""

import argparse
import contextlib
import functools
import glob
import importlib
import io
import json
import os
import random
import re
import shlex
import subprocess
import sys
from collections import Counter

import pytest
import torch

import grpo
from conftest import ROOT
from recipes import general, plan, toy_claim
from reports import figure
from runs.flops import tflops
from test_repo import parses

FAKE = (
    '#!/bin/sh\necho "$@"\ncat\n'  # instead of python: prints how it was called, and what was piped into it
)


def bash(tmp_path, name, *flags):
    """A recipe's exit code, its words for plan.py, its lines of commands, and stderr."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    for program in ("python", "lm_eval"):  # bash only looks whether there is an lm_eval
        (tmp_path / "bin" / program).write_text(FAKE)
        (tmp_path / "bin" / program).chmod(0o755)
    done = subprocess.run(
        ["bash", f"{ROOT}/recipes/{name}.sh", *map(str, flags)],
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"},
    )
    called, *lines = done.stdout.splitlines() or [""]
    return done.returncode, called.split(), lines, done.stderr


def printed_by(tmp_path, name, *flags):
    """What plan.py prints, and does, on the recipe's commands."""
    code, called, lines, error = bash(tmp_path, name, *flags)
    assert code == 0 and called[:2] == ["-m", "recipes.plan"], error
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
        plan.main(plan.get_args(called[2:]))
    return printed.getvalue()


@pytest.fixture
def recipe(tmp_path):
    return functools.partial(printed_by, tmp_path)


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """dry_run(name): a recipe's whole plan, made once: ({row: [(module, args)]}, [(Command, GPU hours)],
    {row: (GiB, whether it checkpoints activations)})."""

    @functools.cache
    def call(name):
        hours, memory, show = [], {}, plan.show

        def record(command, state, spent, size, rate, taken, gpu):
            hours.append((command, spent / rate))
            memory.update({command.row: taken} if taken else {})
            show(command, state, spent, size, rate, taken, gpu)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plan, "show", record)
            return rows(printed_by(tmp_path_factory.mktemp(name), name, "--dry_run")), hours, memory

    return call


def rows(printed):
    """{row: [(module, args)]} of what plan.py printed; every command must parse."""
    found, row = {}, None
    for line in printed.split("\n# to do")[0].replace(" \\\n", "").splitlines():
        words = shlex.split(line)
        if line.startswith("# ") and "TFLOPs" not in line:
            row = words[1].rstrip(":")
        elif words and words[0] != "#":
            found.setdefault(row, []).append(plan.stage_of(words))
    return found


def has(args, **values):
    assert {name: getattr(args, name) for name in values} == values


def listed(tmp_path, name):
    _, _, lines, _ = bash(tmp_path, name, "--list")
    return [line.split()[0] for line in lines if line and line[0] not in "#"]


def figures_of(found):
    """{file: the directories of its runs} of the figures that a recipe ends with, which all draw Pass@k."""
    drawn = [args for stage, args in found["results"] if stage == "evaluate" and args.figure]
    assert drawn and all({"avg", "pass", "length"} <= {*args.y} for args in drawn)
    return {os.path.basename(args.figure): [os.path.basename(run) for run in args.runs] for args in drawn}


def check_figures_of_the_first_paper(found):
    figures = figures_of(found)
    cells = [f"{prefix}_SIZE_{kl}" for prefix in ("student", "teacher") for kl in ("forward", "reverse")]
    for size in ("4b", "8b"):
        for table, name in enumerate(("cells_128", "cells_4096", "", "", "grpo_128", "grpo_4096"), 1):
            if name:
                runs = figures.pop(f"{name}_{size}.png")
                assert runs == [f"table{table}_{cell.replace('SIZE', size)}" for cell in cells]
    assert figures == {
        "figure6.png": ["table1_student_4b_reverse", "table1_teacher_4b_reverse"],
        "figure7.png": [
            *("table2_student_4b_forward", "table2_student_4b_reverse"),
            *(f"figure7_student_4b_mix_{weight}" for weight in ("0.2", "0.5", "0.8")),
        ],
        "curriculum.png": [
            *("table2_student_4b_reverse", "table2_student_8b_reverse"),
            *("table3_4b_curriculum", "table3_8b_curriculum"),
        ],
    }
    assert [args.x for _, args in found["results"] if args.figure].count("tflops") == 1
    trained = [args for commands in found.values() for stage, args in commands if stage in ("train", "grpo")]
    assert {args.eval_n for args in trained} == {3}  # with 1 Pass@k would be Avg again


def test_every_row_of_the_first_paper_has_its_hyperparameters(dry_run, tmp_path):
    found, *_ = dry_run("qwen3")
    shared = {"table3/4b_fixed", "table3/8b_fixed"}  # are table2/student_4b_reverse and student_8b_reverse
    assert set(found) == {*listed(tmp_path, "qwen3"), "rollouts_4b", "rollouts_8b", "results"} - shared
    for size, teacher in {"4b": "Qwen/Qwen3-4B", "8b": "Qwen/Qwen3-8B"}.items():
        (_, rollouts), *scores = found[f"rollouts_{size}"]
        has(
            rollouts,
            model=teacher,
            data="deepscaler",
            temperature=1.0,
            top_p=0.95,
            top_k=20,
            sample_batch=128,
        )
        assert [args.max_tokens for _, args in scores] == [128, 4096] and all(
            args.signal == "hidden" for _, args in scores
        )
        for table, tokens, start in (("table1", 128, "table5"), ("table2", 4096, "table6")):
            for prefix in ("student", "teacher"):
                for kl in ("forward", "reverse"):
                    row = f"{prefix}_{size}_{kl}"
                    (_, train), (_, evaluation) = found[f"{table}/{row}"]
                    has(
                        train,
                        prefix=prefix,
                        kl=kl,
                        vocab="full",
                        student="Qwen/Qwen3-0.6B-Base",
                        lr=5e-7,
                        batch_size=32,
                        steps=1000,
                        warmup=0.05,
                        seed=42,
                        max_response_tokens=tokens,
                        eval_data="math500",
                        eval_every=30,
                        save_every=40,
                        eval_max_response_tokens=4096,
                        dtype="bfloat16",
                        teacher=teacher if prefix == "student" else None,
                    )
                    has(
                        evaluation,
                        model=f"out/qwen3/{table}_{row}/final",
                        temperature=0.6,
                        top_p=0.95,
                        max_response_tokens=8192,
                        benchmarks=["aime24", "amc23", "math500", "gsm8k"],
                    )
                    (_, rl), (_, evaluation) = found[f"{start}/{row}"]
                    has(
                        rl,
                        model=f"out/qwen3/{table}_{row}/final",
                        n=8,
                        lr=1e-6,
                        steps=1000,
                        max_response_tokens=4096,
                        temperature=1.0,
                        top_p=0.95,
                        kl_weight=0.0,
                        updates=1,
                        warmup=0.05,
                        data="deepscaler",
                    )
                    assert rl.batch_size * rl.n == 32
                    assert rl.batch_size == grpo.get_args("--model m --data d --out o".split()).batch_size
        (_, curriculum), _ = found[f"table3/{size}_curriculum"]
        has(
            curriculum,
            prefix="student",
            kl="reverse",
            curriculum="entropy",
            max_response_tokens=4096,
            teacher=teacher,
        )
    assert [found[f"figure7/student_4b_mix_{w}"][0][1].fkl_weight for w in (0.2, 0.5, 0.8)] == [0.2, 0.5, 0.8]
    check_figures_of_the_first_paper(found)
    for row, model in {"base": "Qwen/Qwen3-0.6B-Base"}.items() | {
        (f"{cell}_4b_{kl}", f"out/qwen3/table1_{cell}_4b_{kl}/final")
        for cell in ("teacher", "student")
        for kl in ("forward", "reverse")
    }:
        [(module, general)] = found[f"table4/{row}"]
        assert module == "recipes.general"
        has(general, model=model, dtype="bfloat16", include_path=None)
        assert set(general.tasks) == {"mmlu:5", "arc_challenge:25", "hellaswag:10", "piqa:0"}


def test_every_row_of_the_second_paper_has_its_hyperparameters(dry_run, tmp_path):
    found, *_ = dry_run("paper_b")
    shared = {"template/aligned", "problems/near", "size/1.5b_own", "size/1.5b_larger"}  # other rows
    assert set(found) == {*listed(tmp_path, "paper_b"), "models", "sft", "results"} - shared
    opd = {
        row: next(args for stage, args in commands if stage == "train")
        for row, commands in found.items()
        if row not in ("models", "sft", "results")
    }
    for row, args in opd.items():
        has(
            args,
            prefix="student",
            kl="reverse",
            batch_size=64,
            n=4,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            lr=1e-6,
            warmup=0.0,
            max_response_tokens=int(row[8:]) if row.startswith("horizon/") else 7168,
            position_bins=512,
            normalize="token",
            eval_every=20,
            eval_n=16,
            steps={"reverse": 600, "horizon": 260}.get(row.split("/")[0], 200),
        )
        has(found[row][-1][1], n=16, temperature=0.7, top_p=0.95, max_response_tokens=31744)
        if not row.startswith("topk"):
            has(args, vocab="topk", k=16, topk_set="student")
    assert [(args.vocab, args.k, args.topk_set) for row, args in opd.items() if row.startswith("topk")] == [
        ("sampled", 16, "student"),
        ("topk", 4, "student"),
        ("topk", 16, "student"),
        ("topk", 64, "student"),
        ("topk", 16, "teacher"),
        ("topk", 16, "union"),
        ("topk", 16, "intersection"),
        ("topk", 16, "symmetric_difference"),
        ("topk", 16, "difference"),
    ]
    assert {3072, 5120, 7168, 15360} < {a.max_response_tokens for r, a in opd.items() if r[:8] == "horizon/"}
    r1, r1_large = opd["topk/k16"].student, opd["reverse/r1_7b"].teacher
    skywork, chat = "Skywork/Skywork-OR1-Math-7B", "Qwen/Qwen3-4B"
    rl_math = "Keven16/Qwen3-4B-Non-Thinking-RL-Math-Step500"
    for row, student, teacher in (
        ("knowledge/r1_7b", r1, r1_large),
        ("knowledge/skywork", r1, skywork),
        ("knowledge/chat", "Qwen/Qwen3-1.7B", chat),
        ("knowledge/rl_math", "Qwen/Qwen3-1.7B", rl_math),
        ("size/7b_own", r1_large, skywork),
        ("size/7b_larger", r1_large, "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B"),
        ("horizon/15360", r1, opd["topk/k16"].teacher),
    ):
        has(opd[row], student=student, teacher=teacher)
        if row[0] != "h":  # both are evaluated, for the gap between them
            assert {student, teacher} <= {args.model for _, args in found["models"]}
    has(
        opd["topk/k16"],
        student="deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
        teacher="hbx/JustRL-DeepSeek-1.5B",
        prompt_suffix=" Please reason step by step, and put your final answer within \\boxed{}.",
    )
    has(
        opd["reverse/r1_1.5b"],
        student="hbx/JustRL-DeepSeek-1.5B",
        teacher="deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
    )
    assert opd["template/original"].prompt_suffix == ""
    (_, rollouts), (_, sft) = found["sft"]
    has(
        rollouts,
        temperature=0.7,
        top_p=0.95,
        max_response_tokens=12288,
        limit=200000,
        attempts=3,
        drop=["unboxed", "truncated", "degenerate"],
    )
    has(sft, prefix="teacher", vocab="sampled", kl="forward", lr=1e-5, warmup=0.05, lr_schedule="cosine")
    assert sft.steps * sft.batch_size == 2 * 200000
    figures = figures_of(found)
    same = {"template_aligned": "topk_k16", "problems_near": "topk_k16", "size_1.5b_own": "topk_k16"}
    same["size_1.5b_larger"] = "knowledge_r1_7b"
    for group in {row.split("/")[0] for row in listed(tmp_path, "paper_b")}:
        runs = [row.replace("/", "_") for row in listed(tmp_path, "paper_b") if row.split("/")[0] == group]
        assert {*figures.pop(f"{group}.png")} == {same.get(run, run) for run in runs}
    assert not figures
    assert opd["cold_start/sft"].student == sft.out + "/final"
    assert opd["cold_start/direct"].student == sft.student


def test_several_gpus_and_flags_that_do_not_exist(recipe, tmp_path):
    flags = "--row table5/teacher_4b_forward --gpus 4 --steps 7 --dry_run".split()
    printed = recipe("qwen3", *flags).replace(" \\\n", "")
    launched = [line.split(".py")[0] for line in printed.splitlines() if "torchrun" in line]
    assert launched == [f"torchrun --standalone --nproc_per_node 4 -- {stage}" for stage in ("train", "grpo")]
    assert printed.count("--steps 7") == 2
    assert printed.count("--tensor_parallel 4") == 3  # the rollouts, two evaluations
    for flags, word in (
        (["--row", "table9"], "table9"),
        (["--path", "x"], "--path"),
        (["--steps"], "--steps"),
        (["x"], "flag x"),
    ):
        code, _, lines, error = bash(tmp_path, "qwen3", *flags)
        assert code == 2 and not lines and word in error


def test_the_plan_adds_up_what_the_paper_counts(tmp_path, monkeypatch):
    """With its query widths, a step of the 128-token rows costs the 83.98 and 23.19 TFLOPs of appendix
    H.1. One of GRPO with responses as short costs the first less the teacher's 53.13. One of the second
    paper, with those models and lengths and 256 responses instead of 32, costs eight times the first."""
    for name, heads in {"Qwen3-0.6B-Base": 8, "Qwen3-4B": 20}.items():
        monkeypatch.setitem(plan.MODELS[name], "num_attention_heads", heads)
    flags = "--row table1/student_4b_forward --row table5/teacher_4b_forward --long 128"
    _, _, lines, _ = bash(tmp_path, "qwen3", *flags.split())
    flags = "--row topk/k16 --r1 Qwen3-0.6B-Base --justrl Qwen3-4B --tokens 128"
    _, _, others, _ = bash(tmp_path, "paper_b", *flags.split())
    made, step = {}, {}
    for command in plan.read_commands([*lines, *others]):
        spent, size = plan.cost(command, 92, made)
        if command.module in ("train", "grpo"):
            # evaluations at the start, after every 30th (20th) step, and at the end
            responses = 11 * 30 * 16 if command.row == "topk/k16" else 35 * 500 * 3
            config = plan.MODELS["Qwen3-0.6B-Base"]
            evaluations = responses * tflops(config, 92, command.tokens, forwards=1, generations=1)
            step[command.row] = (spent - evaluations) / command.args.steps
        if command.module == "score_teacher":
            assert size == 2 * 2560 * (40315 * 128 + 151936)
    expected = {
        "table1/student_4b_forward": 83.98,
        "table1/teacher_4b_forward": 23.19,
        "table5/teacher_4b_forward": 83.98 - 53.13,
        "topk/k16": 8 * 83.98,
    }
    assert step == pytest.approx(expected, rel=0.005)


def test_the_hours_on_the_pages_are_those_of_the_plans(dry_run):
    page = open(f"{ROOT}/docs/papers.md", encoding="utf-8").read()
    costs = [cost for name in ("qwen3", "paper_b") for cost in dry_run(name)[1]]
    hours = Counter()
    for command, spent in costs:
        hours[command.row] += spent

    def span(*rows):
        found = [spent for row, spent in hours.items() if row.startswith(rows)]
        low, high = (f"{value:.2g}" if value < 100 else f"{value:.0f}" for value in (min(found), max(found)))
        return low if low == high else f"{low} to {high}"

    def stored(tokens):
        """Hours of a teacher's rollouts and of the scores of their first tokens, 4B and 8B."""
        for size in ("4b", "8b"):
            of = [cost for cost in costs if cost[0].row == f"rollouts_{size}"]
            yield sum(h for c, h in of if c.module == "rollout" or c.args.max_tokens == tokens)

    def average(module, *rows):
        found = [h for c, h in costs if c.module == module and c.row.startswith(rows)]
        return sum(found) / len(found)

    def hours_of(command, **changes):
        """Hours of a training command with other flags; the student is the size of Qwen3-0.6B-Base."""
        args = argparse.Namespace(**vars(command.args) | changes)
        made = {getattr(args, "model", None): plan.MODELS["Qwen3-0.6B-Base"]}
        return plan.training_cost(command._replace(args=args), 92, made)[0] / 25 / 3600

    def mean_of(module, *rows, **changes):
        commands = [c for c, _ in costs if c.module == module and c.row.startswith(rows)]
        return sum(hours_of(command, **changes) for command in commands) / len(commands)

    students = "train", "table1/student", "table2/student"
    evaluations = [average(*of) - mean_of(*of, eval_every=0) for of in (students, ("grpo", "table"))]
    for words in (
        f"takes {average(*students):.1f} hours on average",
        f"`grpo.py` {average('grpo', 'table'):.1f} (paper A: about 14)",
        "of which {:.1f} and {:.1f} are evaluations in training".format(*evaluations),
        "scores, 128 tokens (4B; 8B) | {:.0f}; {:.0f} |".format(*stored(128)),
        "scores, 4096 tokens (4B; 8B) | {:.0f}; {:.0f} |".format(*stored(4096)),
        f"| {span('table1/teacher')}; {span('table1/student')} |",
        f"| {span('table2/teacher')}; {span('table2/student')} |",
        f"| {span('table3/4b')}; {span('table3/8b')} |",
        f"mixes | {span('figure7')} |",
        f"tables 1 and 2 | {span('table5', 'table6')} |",
        f"| {span('pattern', 'cold_start')}; {span('topk', 'template')}; {span('knowledge/r1')} |",
        f"| {span('size/7b_own')}; {span('size/7b_larger')} |",
        f"15,360 tokens | {span('horizon')} |",
        f"| {span('reverse/r1_1.5b')}; {span('reverse/r1_7b')} |",
        f"SFT | {span('sft')} |",
    ):
        assert words in page
    totals = [sum(spent for _, spent in dry_run(name)[1]) for name in ("qwen3", "paper_b")]
    assert f"{totals[0]:.0f} GPU hours and" in page and f"{round(totals[1], -1):,.0f} GPU hours and" in page
    wide = f"{mean_of('grpo', 'table', batch_size=32):.0f}"
    page = open(f"{ROOT}/docs/grpo.md", encoding="utf-8").read()
    assert f"{average(*students):.1f} hours, GRPO with 4 problems {average('grpo', 'table'):.1f}, and" in page
    assert f"(`--grpo_problems 32`) {wide}." in page
    assert f"would take {wide} hours" in open(f"{ROOT}/recipes/qwen3.sh", encoding="utf-8").read()
    page = open(f"{ROOT}/docs/claims.md", encoding="utf-8").read()
    assert f"by arithmetic {average(*students):.1f} and {average('grpo', 'table'):.1f}" in page


def test_the_memory_on_the_page_is_that_of_the_plans(dry_run, recipe):
    page = open(f"{ROOT}/docs/papers.md", encoding="utf-8").read()
    sizes = {name: dry_run(name)[2] for name in ("qwen3", "paper_b")}
    larger = {row: size for row, size in sizes["paper_b"].items() if size[0] > 79}
    rest = {row: size for row, size in sizes["paper_b"].items() if row not in larger}
    for found in (sizes["qwen3"], rest):
        assert f"{min(found.values())[0]:.0f} to {max(found.values())[0]:.0f} GiB" in page
    assert [row for row, (_, on) in rest.items() if on] == [
        "horizon/15360"
    ] and "only `horizon/15360`" in page
    assert not any(on for _, on in sizes["qwen3"].values())
    assert [*larger] == ["size/7b_own", "size/7b_larger"]
    assert "{:.0f} and {:.0f} GiB".format(*(size for size, _ in larger.values())) in page
    printed = recipe("paper_b", "--row", "size/7b_own", "--row", "size/7b_larger", "--gpus", "4", "--dry_run")
    sizes = [float(size) for size in re.findall(r"([\d.]+) GiB of GPU memory", printed)]
    assert len(sizes) == 2 and all(60 < size < 79 for size in sizes) and "fit with\n`--gpus 4`" in page


@pytest.mark.parametrize(
    "row", ["table1/student_8b_reverse", "table2/teacher_4b_forward", "table5/student_4b"]
)
def test_the_memory_of_a_row_is_what_its_stage_plans(row, tiny, executed, recipe, tmp_path, monkeypatch):
    """The stage itself plans from the models and data that are there, the recipe before there are any."""
    planned, fit = [], plan.runs.plan.fit

    def record(job, checkpointing, device):
        planned.append(job)
        return fit(job, checkpointing, device)

    row += "_forward" * row.endswith("4b")
    _, _, lines, _ = bash(tmp_path, "qwen3", "--row", row, *tiny["qwen3"])
    commands = plan.read_commands(lines)
    recipe("qwen3", "--row", row, *tiny["qwen3"])
    monkeypatch.setattr(plan.runs.plan, "fit", record)
    made = {}
    for command in commands:
        plan.cost(command, 0, made)
        if command.module in ("train", "grpo"):
            planned.clear()
            args = argparse.Namespace(**vars(command.args) | {"plan": True, "out": f"{tmp_path}/planned"})
            with pytest.raises(SystemExit):
                importlib.import_module(command.module).main(args)
            longest = planned[0]["sampled"][1]
            plan.memory(command, longest - command.args.max_response_tokens, made, 80, str(tmp_path))
            stage, before = planned
            if before["teacher"] is None:
                assert stage["head"] == pytest.approx(before["head"], rel=0.05)  # its file has a header
            same = [name for name in before if name not in ("student", "teacher", "head", "pool")]
            assert {name: before[name] for name in same} == {name: stage[name] for name in same}
            sizes = [fit(job | {"pool": None, "head": 0}, "off", 80 * 2**30)[0] for job in planned]
            assert sizes[0] == sizes[1]


def test_rows_that_no_gpu_holds_are_refused_before_anything_runs(recipe, tiny, executed, refused):
    flags = ["--row", "table1/teacher_4b_forward", *tiny["qwen3"], "--gpu_gib", "0.0001"]
    refused(lambda: recipe("qwen3", *flags), "table1/teacher_4b_forward", "0.0001 GiB", "--gpus")
    assert not executed
    printed = recipe("qwen3", *flags, "--dry_run")
    assert "GiB of GPU memory, checkpointing on; WARNING: more than the 0.0001 GiB" in printed


def test_problems_that_are_not_there_are_named_before_anything_runs(recipe, tiny, executed, refused):
    flags = ["--row", "topk/k4", *tiny["paper_b"], "--data", "data/none.jsonl"]
    assert "# missing: data/none.jsonl; " in recipe("paper_b", *flags, "--dry_run")
    refused(lambda: recipe("paper_b", *flags), "no such files: data/none.jsonl")
    assert not executed


@pytest.mark.parametrize("script", sorted(glob.glob(f"{ROOT}/recipes/*.sh")), ids=os.path.basename)
def test_every_script_has_help_and_refuses_what_it_does_not_know(script, tmp_path):
    path = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"

    def run(*words):
        words, env = ["bash", script, *words], os.environ | {"PATH": path}
        return subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=env)

    done = run("--help")
    assert done.returncode == 0 and f"recipes/{os.path.basename(script)}" in done.stdout
    done = run("--nonsense", "x")
    assert done.returncode == 2 and "error: " in done.stderr and not done.stdout


@pytest.mark.parametrize("name", ["Qwen3-0.6B-Base", "Qwen3-8B"])
def test_checkpoints_are_as_large_as_their_models(name, tmp_path):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    with torch.device("meta"):
        weights = Qwen3ForCausalLM(Qwen3Config(**plan.MODELS[name])).num_parameters()
    flags = f"--row table2/student_4b_forward --student Qwen/{name}"
    _, _, lines, _ = bash(tmp_path, "qwen3", *flags.split())
    [command] = [command for command in plan.read_commands(lines) if command.module == "train"]
    _, size = plan.cost(command, 92, {})
    assert size == pytest.approx(
        4 * weights * (1 + 2 * 3), rel=1e-3
    )  # the last; two with AdamW's two moments


@pytest.fixture
def tiny(world, tmp_path):
    """{recipe: flags} that replace the models, data and sizes of both papers by tiny ones."""
    student, teacher = world / "student_init", world / "teacher_init"
    train, test = world / "train.jsonl", world / "test.jsonl"
    common = f"""--engine hf --dtype float32 --gpus 1 --out {tmp_path}/out --data {train} --steps 2
        --batch_size 2 --eval_data {world}/heldout.jsonl --benchmarks {test} --eval_every 2 --eval_n 1
        --eval_tokens 8"""
    qwen3 = f"""--student {student} --teacher_4b {teacher} --teacher_8b {teacher} --limit 6 --short 4 --long 8
        --test_tokens 8 --horizons 4,8 --gate_every 1 --grpo_problems 2"""
    paper_b = f"""--r1 {student} --r1_large {teacher} --r1_larger {teacher} --skywork {teacher}
        --justrl {teacher} --base {student} --chat {teacher}
        --rl {teacher} --chat_small {student} --rl_math {teacher} --original_data {train} --far_data {test}
        --sft_data {train} --cold_data {test} --reverse_steps 1 --tokens 8 --n 2 --sft_limit 8
        --sft_tokens 60 --sft_steps 2 --sft_batch_size 2 --dedup exact"""
    return {"qwen3": f"{common} {qwen3}".split(), "paper_b": f"{common} {paper_b}".split()}


def write_half(args, directory, task, shots):
    """Instead of the harness: half of 8 problems are right."""
    found = {"results": {task: {"acc,none": 0.5, "acc_stderr,none": 0.1}}, "lm_eval_version": "0"}
    found["n-samples"] = {task: {"effective": 8}}
    with open(f"{args.out}/{task}.json", "w") as file:
        json.dump(found, file)


@pytest.fixture
def executed(monkeypatch):
    """Stages run in this process; the names of those that ran, of figures their files. No figure is drawn."""
    names = []
    monkeypatch.setattr(figure, "draw", lambda path, *drawn: names.append(os.path.basename(path)))

    def execute(words):
        name, args = plan.stage_of(words)
        names.append(name + " --resume" * ("--resume" in words))
        importlib.import_module(name).main(args)
        return 0

    monkeypatch.setattr(plan, "execute", execute)
    return names


def test_rows_of_the_first_paper_run_and_are_not_run_twice(
    recipe, tiny, executed, tmp_path, refused, monkeypatch
):
    monkeypatch.setenv("PATH", f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}")  # has an lm_eval
    monkeypatch.setattr(general, "run_harness", write_half)
    picked = ["--row", "table3/4b_curriculum", "--row", "table5/teacher_4b_reverse", "--row", "table4/base"]
    printed = recipe("qwen3", *picked, *tiny["qwen3"])
    cell = ["train", "evaluate"]
    figures = ["cells_128_4b.png", "grpo_128_4b.png", "figure6.png", "curriculum.png"]
    results = ["evaluate", *(word for name in figures for word in ("evaluate", name))]
    stages = [*cell, "rollout", "score_teacher", *cell, "grpo", "evaluate", "recipes.general"]
    assert executed == [*stages, *results]
    _, table, knowledge = printed.split("| run")
    assert knowledge.count("| 0.5000 ") == 5  # four tasks and their mean
    for run in ("table1_teacher_4b_reverse", "table3_4b_curriculum", "table5_teacher_4b_reverse"):
        assert f"| {run} " in table
    cells = {
        run: json.load(open(tmp_path / f"out/{run}/evals/test/results.json"))["cell"]["name"]
        for run in ("table3_4b_curriculum", "table5_teacher_4b_reverse")
    }
    assert cells == {
        "table3_4b_curriculum": "student reverse",
        "table5_teacher_4b_reverse": "teacher reverse, then GRPO",
    }
    assert json.load(open(tmp_path / "out/scores_4b_4/meta.json"))["counts"]["longest_response"] == 4

    executed.clear()
    run = tmp_path / "out/table5_teacher_4b_reverse"
    os.rename(run / "meta.json", run / "meta.partial.json")  # as a killed run leaves it
    printed = recipe("qwen3", *picked, *tiny["qwen3"])
    assert executed == ["grpo --resume", *results]
    assert printed.count("# finished") == 8 and printed.count("# unfinished; ") == 1
    changed = [*picked, *tiny["qwen3"], "--steps", 3]
    refused(lambda: recipe("qwen3", *changed), "--steps 2", "wants 3", "table3/4b_curriculum")
    printed = recipe("qwen3", *picked, *tiny["qwen3"], "--dry_run")
    assert executed == ["grpo --resume", *results] and "to do: 5 commands, 0 TFLOPs" in printed


def test_table_4_needs_the_harness_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    bash(tmp_path, "qwen3", "--list")
    (tmp_path / "bin/lm_eval").unlink()
    words = ["bash", f"{ROOT}/recipes/qwen3.sh", "--row", "table1/student_4b_forward", "--row", "table4/base"]
    path = f"{tmp_path}/bin:/usr/bin:/bin"
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"PATH": path})
    assert done.returncode == 2 and done.stdout == ""
    assert general.HARNESS in done.stderr and done.stderr.count("\n") == 1


def test_rows_of_the_second_paper_run(recipe, tiny, executed, tmp_path):
    picked = "--row cold_start/sft --row topk/set_non_overlap --row knowledge/rl_math".split()
    printed = recipe("paper_b", *picked, *tiny["paper_b"])
    first = ["rollout", "train", "recipes.dedup", *["train", "evaluate"] * 2]
    figures = ["cold_start.png", "topk.png", "knowledge.png"]
    assert executed == [
        *(*first, *["evaluate"] * 2, "train", *["evaluate"] * 2, "recipes.paper_b"),
        *(word for name in figures for word in ("evaluate", name)),
    ]
    [row] = [line for line in printed.splitlines() if line.startswith("| knowledge_rl_math") and "->" in line]
    student, teacher, after = (
        json.load(open(tmp_path / f"out/{run}/test/results.json"))["avg"]
        for run in ("models/student_init", "models/teacher_init", "knowledge_rl_math/evals")
    )
    assert [cell.strip() for cell in row.split("|")[2:5]] == [f"{x:.3f}" for x in (student, teacher, after)]
    assert json.load(open(tmp_path / "out/sft_rollouts/meta.json"))["counts"]["faults"]["dropped"] > 0
    opd = json.load(open(tmp_path / "out/cold_start_sft/meta.json"))["args"]
    assert opd["student"] == f"{tmp_path}/out/sft/final"
    assert opd["data"] == f"{tmp_path}/out/cold_problems/problems.jsonl"


@pytest.mark.parametrize("name", ["qwen3", "paper_b"])
def test_a_row_of_every_group_runs(name, recipe, tiny, executed, tmp_path, monkeypatch):
    """The last of each: of tables, mixes and references; of top-k sets, patterns, sizes and all others."""
    monkeypatch.setenv("PATH", f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}")  # has an lm_eval
    monkeypatch.setattr(general, "run_harness", write_half)
    picked = {row.split("/")[0]: row for row in listed(tmp_path, name)}
    assert len(picked) == {"qwen3": 8, "paper_b": 9}[name]
    picked.pop("horizon", None)  # topk/k16 with lengths for which the tiny models have too few positions
    printed = recipe(name, *(word for row in picked.values() for word in ("--row", row)), *tiny[name])
    found, same = rows(printed.split("\n\n# to do")[0]), {"table3": "table2/", "template": "topk/k16"}
    for group, row in picked.items():
        assert any(ran.startswith(same.get(group, row)) for ran in found), row
    outs = [args.out for commands in found.values() for module, args in commands if args.out]
    assert len(outs) > len(picked)
    assert all(glob.glob(f"{out}/**/meta.json", recursive=True) for out in outs)


def test_a_plan_by_hand_may_start_from_what_is_there(
    prefix_flags, world, tmp_path, monkeypatch, capsys, refused
):
    flags = ["--dry_run", "--prompt_tokens", "20", "--tflops_per_second", "1", "--gpu_gib", "79"]

    def show(*lines):
        monkeypatch.setattr(sys, "stdin", [f"{line}\n" for line in lines])
        plan.main(plan.get_args(flags))
        return capsys.readouterr().out

    more = f"--kl reverse --eval_data {world}/heldout.jsonl --eval_every 1 --engine hf --out {tmp_path}/run"
    shown = show("# mine 8", f"python train.py {prefix_flags['teacher']} {more}")
    assert "GPU hours" in shown and "GiB of GPU memory" in shown
    lacking = prefix_flags["teacher"].replace("--rollouts ", "--rollouts x")
    refused(lambda: show("# mine 8", f"python train.py {lacking} {more}"), "--rollouts")
    refused(lambda: show("# mine"), "# ROW TOKENS")


def test_a_failed_command_ends_the_recipe(recipe, tiny, monkeypatch, refused):
    ran = []
    monkeypatch.setattr(plan, "execute", lambda words: ran.append(words) or len(ran) == 2 and 3)
    refused(
        lambda: recipe("qwen3", "--row", "table1/teacher_8b_forward", *tiny["qwen3"]),
        "rollouts_8b",
        "score_teacher",
        "exit code 3",
        code=1,
    )
    assert [words[1] for words in ran] == ["rollout.py", "score_teacher.py"]


def test_execute_gives_the_exit_code():
    assert plan.execute(["sh", "-c", "cat; exit 7"]) == 7


def test_the_recipe_with_hints_in_miniature(tmp_path, capsys):
    """Its own commands in their order, with smaller sizes."""
    code, called, lines, error = bash(tmp_path, "toy_hint", tmp_path / "out")
    assert code == 0, error
    small = {"recipes.toy_world": "--train 12 --heldout 2 --test 4 --terms 2 4", "recipes.toy_hint": ""}
    small["train"] = "--steps 1 --batch_size 2 --max_response_tokens 8"
    small["evaluate"] = "--limit 2 --n 1 --k 1 --max_response_tokens 8"
    for name, *words in [called, *map(str.split, filter(None, lines))]:
        name = words.pop(0) if name == "-m" else name.removesuffix(".py")
        words += small[name].split() if "--out" in words else []
        stage = importlib.import_module(name)
        stage.main(stage.get_args(words))
    printed = capsys.readouterr().out
    assert printed.count("| avg ") == 3 and printed.count("| self_") == 3 + 3  # a table, three comparisons
    for seed in (1, 2, 3):
        args = json.load(open(tmp_path / f"out/self_{seed}/meta.json"))["args"]
        base = f"{tmp_path}/out/base/final"
        assert [args["student"], args["teacher"], args["seed"]] == [base, base, seed]
    data = tmp_path / "out/data"
    rows = [json.loads(line) for line in open(data / "both/rollouts.jsonl")]
    hinted = [json.loads(line)["problem"] for line in open(data / "with_hint/test.jsonl")]
    assert len({row["id"] for row in rows}) == 12 and len(rows) == 24 and "\n\n=" in hinted[0]
    for alone, shown in zip(rows[:12], rows[12:]):
        assert len(shown["prompt_ids"]) == len(alone["prompt_ids"]) + 4  # \n \n = 7
        assert len(alone["response_ids"]) <= len(shown["response_ids"])
        assert shown["response"].endswith(f"\\boxed{{{shown['answer']}}}")


def test_the_commands_of_the_demo_parse_and_it_ends_with_the_report(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").write_text('#!/bin/sh\necho "python $@"\n')
    (tmp_path / "bin/python").chmod(0o755)
    done = subprocess.run(
        ["bash", f"{ROOT}/recipes/toy.sh", str(tmp_path)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"},
    )
    assert done.returncode == 0, done.stderr
    shown = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("python ")]
    stages = [(words[0].removesuffix(".py"), words[1:]) for words in shown if words[0] != "-m"]
    for stage, words in stages:
        parses(stage, words)
    assert {stage for stage, _ in stages} == {"train", "rollout", "score_teacher", "grpo", "evaluate"}
    assert sum("--token_details" in words for _, words in stages) == 6
    runs = "teacher base teacher_forward teacher_reverse student_forward student_reverse grpo".split()
    last = ["--report", f"{tmp_path}/report.html", *(f"{tmp_path}/{run}" for run in runs)]
    assert sorted(shown[-1][1:]) == sorted(last) and shown[-1][1:5] == last[:4]
    assert done.stdout.splitlines()[-1].startswith("python evaluate.py --report")


@pytest.mark.parametrize("worst, code", [(0.9, 0), (0.45, 1)])
def test_the_claim_of_the_demo_is_checked(worst, code, monkeypatch, capsys):
    """Of four cells one is no better than the base student, or all are."""
    chances = dict.fromkeys(toy_claim.CELLS, 0.9) | {"base": 0.45, "student_forward": worst}
    random.seed(1)

    def samples(path):
        chance = chances[path.split("/")[-2]]
        facts = {"finish_reason": "stop", "same_as": None, "tokens": 1, "entropy": 0.0}
        return [{"id": i // 4, "correct": random.random() < chance, **facts} for i in range(1024)]

    monkeypatch.setattr(toy_claim, "read_results", lambda path, flag: {"n": 4})
    monkeypatch.setattr(toy_claim, "read_samples", samples)
    with pytest.raises(SystemExit) as end:
        toy_claim.main(argparse.Namespace(out="out"))
    assert end.value.code == code
    printed = capsys.readouterr().out
    assert printed.count(" holds") == 4 - code and printed.count("DOES NOT HOLD") == code
