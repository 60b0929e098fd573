"""The repository as a whole: flags, imports, sizes, and commands that the README and the docstrings show."""
import argparse
import ast
import importlib
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from conftest import ROOT

ROOT = pathlib.Path(ROOT)
# imports point to the left only
ORDER = ["kernels", "artifacts", "inputs", "ranks", "rollout", "score_teacher", "equality", "grading", "evaluate", "run", "train", "grpo"]
SHARED = ORDER[1:]
STAGES = ["rollout", "score_teacher", "evaluate", "train", "grpo"]
OWN_HELP = {"model", "teacher", "student", "rollouts", "dtype"}  # of these each stage says what it does with them


def source(name):
    return (ROOT / f"{name}.py").read_text(encoding="utf-8")


class Parsed(Exception):
    pass


def actions_of(stage):
    """{flag: argparse action} of a stage's parser."""
    def stop(parser, argv=None):
        raise Parsed(parser)
    real, argparse.ArgumentParser.parse_args = argparse.ArgumentParser.parse_args, stop
    try:
        importlib.import_module(stage).get_args([])
    except Parsed as caught:
        return {action.dest: action for action in caught.args[0]._actions if action.dest != "help"}
    finally:
        argparse.ArgumentParser.parse_args = real


@pytest.mark.parametrize("stage", STAGES)
def test_every_flag_is_read(stage):
    """As args.NAME or as a name in a list, in the stage or in what it imports; that get_args reads it is not enough."""
    text = ""
    for name in SHARED[:SHARED.index(stage) + 1]:
        text += re.sub(r"(?ms)^def get_args.*?(?=^(?:def|class|#|if) )", "", source(name))
    for flag in actions_of(stage):
        assert re.search(rf"\bargs\.{flag}\b|(?<!-)\"{flag}\"", text), f"{stage}.py never reads --{flag}"


def test_shared_flags_agree():
    first = {}
    for stage in STAGES:
        for flag, action in actions_of(stage).items():
            if stage == "evaluate" and flag == "k":
                continue  # of Pass@k there, of the k likeliest tokens elsewhere: both are the field's terms
            assert re.fullmatch(r"[a-z_]+", flag) and action.option_strings == [f"--{flag}"]
            help_text = None if flag in OWN_HELP else action.help
            kind = (action.type, action.nargs, type(action).__name__, help_text)
            assert first.setdefault(flag, kind) == kind, f"--{flag} of {stage}.py differs from another stage's"


def imported(tree):
    """Modules imported by the given statements, without their submodules."""
    names = set()
    for node in tree:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.split(".")[0])
    return names


def test_imports_point_to_the_left():
    for place, name in enumerate(ORDER):
        files = sorted((ROOT / "kernels").glob("*.py")) if name == "kernels" else [ROOT / f"{name}.py"]
        for file in files:
            found = imported(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
            wrong = found & {*ORDER[place + 1:], "recipes", "tests"}
            assert not wrong, f"{file.name} imports {wrong}"


def test_nothing_heavy_is_imported_at_the_top():
    heavy = {"vllm", "datasets", "transformers", "matplotlib", "math_verify", "wandb", "triton"}
    for name in SHARED:
        assert not imported(ast.parse(source(name)).body) & heavy, name
    code = "import grpo, sys; assert not {'vllm', 'datasets', 'matplotlib'} & set(sys.modules), 'heavy'"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_files_stay_short():
    for name in SHARED:
        lines = source(name).count("\n")
        assert lines <= {"train": 450, "artifacts": 420, "equality": 450}.get(name, 400), f"{name}.py has {lines} lines"


def commands(text):
    """(stage, words) of each `python STAGE.py ...` or `torchrun ... -- STAGE.py ...` line. Two spaces or a # begin a comment; a backslash continues a line."""
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        found = re.match(r"\s*(?:python|torchrun [^#]*--) (\w+)\.py\b(?! \.\.\.)(.*)", line)
        if found:
            yield found[1], shlex.split(re.split(r"\s{2,}", found[2].strip())[0], comments=True)


def parses(stage, words):
    try:
        importlib.import_module(stage).get_args(words)
    except SystemExit:
        pytest.fail(f"{stage}.py does not take: {' '.join(words)}")


@pytest.mark.parametrize("stage", STAGES)
def test_the_command_in_each_docstring_parses(stage):
    shown = list(commands(ast.get_docstring(ast.parse(source(stage)))))
    assert shown
    for name, words in shown:
        assert name == stage
        parses(name, words)


@pytest.fixture
def readme():
    if not (ROOT / "README.md").is_file():
        pytest.skip("there is no README.md yet")
    return (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_commands_parse(readme):
    fences = re.findall(r"(?ms)^```\w*\n(.*?)^```", readme)
    shown = [command for fence in fences for command in commands(fence)]
    assert {stage for stage, _ in shown} == set(STAGES)
    for stage, words in shown:
        parses(stage, words)


def test_readme_names_only_flags_that_exist(readme):
    known = {f"--{flag}" for stage in STAGES for flag in actions_of(stage)} | {"--help"}
    known |= {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint", "--rdzv_id"}  # torchrun's
    known.add("--dist")  # pytest's
    for file in [*ROOT.glob("recipes/*"), *ROOT.glob("kernels/*.py")]:
        if file.is_file():
            known |= set(re.findall(r"--[a-z_]+", file.read_text(encoding="utf-8")))
    assert set(re.findall(r"(?<![\w-])--[a-z_]+", readme)) <= known


def test_readme_names_only_make_targets_that_exist(readme):
    targets = set(re.findall(r"(?m)^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8")))
    assert set(re.findall(r"(?m)(?:^|`)make ([a-z]+)", readme)) <= targets


def test_no_tracked_file_holds_a_path_of_one_machine():
    listing = subprocess.run("git ls-files --cached --others --exclude-standard".split(), cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    for name in listing.stdout.split():
        file = ROOT / name
        if file.is_file() and file.suffix not in (".png", ".safetensors"):
            found = re.search(r"(?<![\w.])/(?:work|home|root|Users)/\w+", file.read_text(encoding="utf-8"))
            assert not found, f"{name}: {found and found[0]}"
