"""The repository as a whole: flags, imports, sizes, and commands that the README and the docstrings show."""

import ast
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from conftest import ROOT, STAGES, actions_of, stage_of

ROOT = pathlib.Path(ROOT)
ROOMS = {"distil": {"distil", "streaming_kl"}}  # {package: what it may import of ours}
ROOMS |= {"runs": ROOMS["distil"] | {"runs"}, "reports": ROOMS["distil"] | {"reports"}}
MODULES = [file for room in ROOMS for file in sorted((ROOT / room).glob("*.py"))]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]  # test_readme parses their commands
KERNEL = sorted((ROOT / "kernels").rglob("*.py"))
OURS = {*STAGES, *ROOMS, "streaming_kl", "recipes", "benchmarks", "tests"}
OWN_HELP = {
    "model",
    "teacher",
    "student",
    "rollouts",
    "dtype",
    "template",
}  # each stage says what it does with these


def source(name):
    return (ROOT / f"{name}.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("stage", STAGES)
def test_every_flag_is_read(stage):
    """As args.NAME or as a name in a list, in what stages share or in the stage outside get_args."""
    text = "".join(file.read_text(encoding="utf-8") for file in MODULES)
    text += re.sub(r"(?ms)^def get_args.*?(?=^(?:def|class|#|if) )", "", source(stage))
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
            assert first.setdefault(flag, kind) == kind, f"--{flag} of {stage}.py"


def imported(file, everywhere=True):
    """Full names of the modules that a file imports ("distil.models"); only at its top unless everywhere."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = [file.parent.name] * node.level + [node.module] * bool(node.module)  # at most `from .`
            yield ".".join(names)
            yield from (".".join([*names, alias.name]) for alias in node.names)


def packages(file, **options):
    return {name.split(".")[0] for name in imported(file, **options)}


def test_the_stages_are_the_only_python_files_at_the_top():
    assert {file.stem for file in ROOT.glob("*.py")} == set(STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_no_stage_imports_a_stage(stage):
    rooms = {"evaluate": {"reports"}, "rollout": set()}.get(stage, {"runs"})
    assert packages(ROOT / f"{stage}.py") & OURS <= ROOMS["distil"] | rooms


@pytest.mark.parametrize("file", MODULES, ids=lambda file: f"{file.parent.name}.{file.stem}")
def test_what_stages_share_imports_no_stage(file):
    assert packages(file) & OURS <= ROOMS[file.parent.name]


def test_there_are_no_circular_imports():
    name_of = lambda file: f"{file.parent.name}.{file.stem}"
    below = {name_of(file): set(imported(file)) - {name_of(file)} for file in MODULES}
    while free := [name for name, others in below.items() if not others & below.keys()]:
        for name in free:
            del below[name]
    assert not below, f"circular imports: {sorted(below)}"


@pytest.mark.parametrize("file", KERNEL, ids=lambda file: file.stem)
def test_the_kernel_stands_alone(file):
    assert packages(file) <= {"streaming_kl", "torch", "triton", *sys.stdlib_module_names}


def flags_read(tree):
    """The names X of every args.X and self.args.X in a syntax tree."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("args", "self.args"):
            yield node.attr


@pytest.mark.parametrize("file", MODULES, ids=lambda file: f"{file.parent.name}.{file.stem}")
def test_a_flag_is_read_only_where_it_is_added(file):
    """Functions take the values they use. Only artifacts, which records all flags, and Run keep them."""
    text = file.read_text(encoding="utf-8")
    added = set(re.findall(r"add_argument\(\s*\"--(\w+)\"", text))
    keep = {
        "training": ["Run", "optimizer_step", "plan_memory", "memory_job"],
        "rollouts": ["finish_rollouts"],
    }
    keep = (keep | {"details": ["store_token_details"]}).get(file.stem, [])
    for node in [] if file.stem == "artifacts" else ast.parse(text).body:
        if getattr(node, "name", None) not in keep:
            assert set(flags_read(node)) <= added, f"{file.stem}.py, line {node.lineno}"


def test_nothing_heavy_is_imported_at_the_top():
    heavy = {"vllm", "datasets", "transformers", "matplotlib", "math_verify", "wandb", "triton"}
    for file in [*MODULES, *(ROOT / f"{stage}.py" for stage in STAGES)]:
        if file.stem != "vllm_mask":  # vLLM itself imports it, by its name
            assert not packages(file, everywhere=False) & heavy, file.name
    code = "import grpo, sys; assert not {'vllm', 'datasets', 'matplotlib'} & set(sys.modules), 'heavy'"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def commands(text):
    """(stage, words) of each `python STAGE.py ...` or `torchrun ... -- STAGE.py ...` line.

    Two spaces or a # begin a comment; a backslash continues a line."""
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        found = re.match(r"\s*(?:python|torchrun [^#]*--) (\w+)\.py\b(?! \.\.\.)(.*)", line)
        if found:
            yield found[1], shlex.split(re.split(r"\s{2,}", found[2].strip())[0], comments=True)


def parses(stage, words):
    try:
        stage_of(stage).get_args(words)
    except SystemExit:
        pytest.fail(f"{stage}.py does not take: {' '.join(words)}")


@pytest.mark.parametrize("stage", STAGES)
def test_the_command_in_each_docstring_parses(stage):
    shown = list(commands(ast.get_docstring(ast.parse(source(stage)))))
    assert shown
    for name, words in shown:
        assert name == stage
        parses(name, words)


def test_the_readme_has_a_command_of_every_stage_and_all_parse():
    fences = re.findall(r"(?ms)^```\w*\n(.*?)^```", PAGES[0].read_text(encoding="utf-8"))
    shown = [command for fence in fences for command in commands(fence)]
    assert {stage for stage, _ in shown} == set(STAGES)
    for stage, words in shown:
        parses(stage, words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_name_only_flags_that_exist(page):
    known = {f"--{flag}" for stage in STAGES for flag in actions_of(stage)} | {"--help"}
    known |= {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint", "--rdzv_id"}  # torchrun's
    known |= {"--dist", "--logdir"}  # pytest's, tensorboard's
    known |= {"--tensor", "--max", "--generation", "--logits", "--additional"}  # vLLM's, to their first dash
    for file in [*ROOT.glob("recipes/*"), *ROOT.glob("benchmarks/*")]:
        if file.is_file():
            known |= set(re.findall(r"--[a-z_]+", file.read_text(encoding="utf-8")))
    assert set(re.findall(r"(?<![\w-])--[a-z_]+", page.read_text(encoding="utf-8"))) <= known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_name_only_make_targets_that_exist(page):
    targets = set(re.findall(r"(?m)^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8")))
    assert set(re.findall(r"(?m)(?:^|`)make ([a-z]+)", page.read_text(encoding="utf-8"))) <= targets


def test_no_tracked_file_holds_a_path_of_one_machine():
    listing = subprocess.run(
        "git ls-files --cached --others --exclude-standard".split(), cwd=ROOT, capture_output=True, text=True
    )
    if listing.returncode:
        pytest.skip("not a git checkout")
    for name in listing.stdout.split():
        file = ROOT / name
        if file.is_file() and file.suffix not in (".png", ".safetensors"):
            found = re.search(r"(?<![\w.])/(?:work|home|root|Users)/\w+", file.read_text(encoding="utf-8"))
            assert not found, f"{name}: {found and found[0]}"
