"""recipes/qwen3.sh and paper_b.sh: commands have the papers' values; some rows run with tiny models.

bash gives the recipes' commands; recipes/plan.py, which shows and runs them, is called in this process."""

import importlib
import io
import json
import os
import shlex
import subprocess

import pytest
import torch

from conftest import ROOT
from distil.flops import tflops
from recipes import plan
from test_repo import parses

FAKE = (
    '#!/bin/sh\necho "$@"\ncat\n'  # instead of python: prints how it was called, and what was piped into it
)


def bash(tmp_path, name, *flags):
    """A recipe's exit code, its words for plan.py, its lines of commands, and stderr."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    (tmp_path / "bin/python").write_text(FAKE)
    (tmp_path / "bin/python").chmod(0o755)
    done = subprocess.run(
        ["bash", f"{ROOT}/recipes/{name}.sh", *map(str, flags)],
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"},
    )
    called, *lines = done.stdout.splitlines() or [""]
    return done.returncode, called.split(), lines, done.stderr


@pytest.fixture
def recipe(tmp_path, monkeypatch, capsys):
    """recipe(name, *flags): plan.py on the recipe's commands; returns what it printed."""

    def call(name, *flags):
        code, called, lines, error = bash(tmp_path, name, *flags)
        assert code == 0 and called[:2] == ["-m", "recipes.plan"], error
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
        capsys.readouterr()
        plan.main(plan.get_args(called[2:]))
        return capsys.readouterr().out

    return call


def rows(printed):
    """{row: [(stage, args), or (program, words)]} of what plan.py printed; every command must parse."""
    found, row = {}, None
    for line in printed.split("\n# to do")[0].replace(" \\\n", "").splitlines():
        words = shlex.split(line)
        if line.startswith("# ") and "TFLOPs" not in line and line != "# shown, not run here":
            row = words[1].rstrip(":")
        elif words and words[0] != "#":
            commands = found.setdefault(row, [])
            name = next((word for word in words if word.endswith(".py")), None)
            if name:
                stage, flags = name.removesuffix(".py"), words[words.index(name) + 1 :]
                parses(stage, flags)
                commands.append((stage, importlib.import_module(stage).get_args(flags)))
            else:
                commands.append((words[0], words))
    return found


def has(args, **values):
    assert {name: getattr(args, name) for name in values} == values


def listed(tmp_path, name):
    _, _, lines, _ = bash(tmp_path, name, "--list")
    return [line.split()[0] for line in lines if line and line[0] not in "#"]


def test_every_row_of_the_first_paper_has_its_hyperparameters(recipe, tmp_path):
    found = rows(recipe("qwen3", "--dry_run"))
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
    shots = {}
    for program, words in found["table4/base"]:
        assert program == "lm_eval"  # with python -m, our evaluate.py would hide the package that it imports
        shots[words[words.index("--tasks") + 1]] = words[words.index("--num_fewshot") + 1]
    assert shots == {"mmlu": "5", "arc_challenge": "25", "hellaswag": "10", "piqa": "0"}


def test_every_row_of_the_second_paper_has_its_hyperparameters(recipe, tmp_path):
    found = rows(recipe("paper_b", "--dry_run"))
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
            responses = 11 * 30 * 16 if command.row == "topk/k16" else 35 * 500
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
    paper_b = f"""--r1 {student} --r1_large {teacher} --justrl {teacher} --base {student} --chat {teacher}
        --rl {teacher} --chat_small {student} --rl_math {teacher} --original_data {train} --far_data {train}
        --sft_data {train} --cold_data {test} --reverse_steps 1 --tokens 8 --n 2 --sft_limit 8
        --sft_tokens 60 --sft_steps 2 --sft_batch_size 2 --dedup exact"""
    return {"qwen3": f"{common} {qwen3}".split(), "paper_b": f"{common} {paper_b}".split()}


@pytest.fixture
def executed(monkeypatch):
    """Stages run in this process; the names of those that ran."""
    names = []

    def execute(words):
        name = next(word for word in words if word.endswith(".py") or word == "-m")
        flags = words[words.index(name) + 1 :]
        module = importlib.import_module(flags.pop(0) if name == "-m" else name[:-3])
        names.append(module.__name__ + " --resume" * ("--resume" in flags))
        module.main(module.get_args(flags))
        return 0

    monkeypatch.setattr(plan, "execute", execute)
    return names


def test_rows_of_the_first_paper_run_and_are_not_run_twice(recipe, tiny, executed, tmp_path, refused):
    picked = ["--row", "table3/4b_curriculum", "--row", "table5/teacher_4b_reverse", "--row", "table4/base"]
    printed = recipe("qwen3", *picked, *tiny["qwen3"])
    cell = ["train", "evaluate"]
    assert executed == [*cell, "rollout", "score_teacher", *cell, "grpo", "evaluate", "evaluate"]
    table = printed.split("| run")[1]
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
    assert executed == ["grpo --resume", "evaluate"]
    assert printed.count("# finished; ") == 7 and printed.count("# unfinished; ") == 1
    changed = [*picked, *tiny["qwen3"], "--steps", 3]
    refused(lambda: recipe("qwen3", *changed), "--steps 2", "wants 3", "table3/4b_curriculum")
    printed = recipe("qwen3", *picked, *tiny["qwen3"], "--dry_run")
    assert executed == ["grpo --resume", "evaluate"] and "to do: 1 commands, 0 TFLOPs" in printed


def test_rows_of_the_second_paper_run(recipe, tiny, executed, tmp_path):
    picked = "--row cold_start/sft --row topk/set_non_overlap --row knowledge/rl_math".split()
    printed = recipe("paper_b", *picked, *tiny["paper_b"])
    first = ["rollout", "train", "recipes.dedup", *["train", "evaluate"] * 2]
    assert executed == [*first, *["evaluate"] * 2, "train", *["evaluate"] * 2, "recipes.paper_b"]
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
