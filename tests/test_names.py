"""Names of ours that others have too: Hugging Face publishes packages named `kernels` and `evaluate`.

The root comes before installed packages on the path of a stage, and of what `python -m` starts there.
"""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from conftest import ROOT
from recipes import general

ROOT = pathlib.Path(ROOT)
PACKAGES = ("recipes", "benchmarks", "distil", "reports")
OURS = r"(?:recipes|benchmarks|distil)\.\w+"
HARMLESS = {"pip", "pytest", "venv", "zipfile"}  # import none of our names


def install(site, package, version="1.0", init=""):
    """An installed distribution with one package, which says so when it is imported."""
    (site / package).mkdir(parents=True)
    (site / package / "__init__.py").write_text(f"print('IMPORTED {package}')\n{init}", encoding="utf-8")
    (site / f"{package}-{version}.dist-info").mkdir()
    metadata = f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
    (site / f"{package}-{version}.dist-info" / "METADATA").write_text(metadata, encoding="utf-8")
    (site / f"{package}-{version}.dist-info" / "top_level.txt").write_text(f"{package}\n", encoding="utf-8")


def run(site, *words):
    """The output of a Python program that is started in the root, with the packages of `site` installed."""
    path = os.pathsep.join([str(ROOT / "kernels"), str(site)])
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.parametrize("installed", [True, False])
def test_a_stage_runs_beside_hugging_faces_kernels(world, tmp_path, installed):
    """transformers imports a dozen names from it if it is installed; our directory must not pass for it."""
    if installed:
        any_name = "def __getattr__(name):\n    return lambda *words, **options: lambda function: function\n"
        install(tmp_path / "site", "kernels", "0.17.0", any_name)
    output = run(
        tmp_path / "site",
        "rollout.py",
        *(
            "--model",
            str(world / "student_init"),
            "--data",
            str(world / "train.jsonl"),
            "--out",
            str(tmp_path / "out"),
        ),
        *"--engine hf --dtype float32 --limit 2 --n 1 --max_response_tokens 4".split(),
    )
    assert ("IMPORTED kernels" in output) == installed
    assert (tmp_path / "out/meta.json").is_file()


def test_no_installed_package_hides_ours(tmp_path):
    """A directory without __init__.py would give way to a package of its name anywhere on the path."""
    for package in PACKAGES:
        install(tmp_path, package)
    modules = ["recipes.plan", "benchmarks.memory", "distil.artifacts", "reports.tables"]
    output = run(tmp_path, "-c", f"import {', '.join(modules)}; print({', '.join(modules)})")
    assert "IMPORTED" not in output


def commands_with_m(text):
    """(options before -m, module) of each `python ... -m MODULE`; console scripts have no -m."""
    for options, module in re.findall(r"python[\d.]*((?: -[A-Za-z]+)*?) -m ([\w.]+)", text):
        yield options.split(), module


def test_no_other_tool_is_started_where_our_names_hide_its_imports():
    """`python -m lm_eval` would import our evaluate.py for Hugging Face's `evaluate`; -P prevents that."""
    places = [ROOT / "Makefile", ROOT / "README.md", ROOT / "kernels/README.md"]
    places += [*ROOT.glob("*.py"), *ROOT.glob("docs/*.md"), *ROOT.glob(".github/workflows/*")]
    places += [file for folder in PACKAGES for file in (ROOT / folder).glob("*.*")]
    seen = set()
    for place in places:
        for options, module in commands_with_m(place.read_text(encoding="utf-8")):
            seen.add(module)
            alone = {"-P", "-I"} & set(options) or re.fullmatch(OURS, module) or module in HARMLESS
            assert alone, f"{place.name}: python {' '.join(options)} -m {module} needs -P"
    assert {"recipes.plan", "pip"} <= seen
    assert list(commands_with_m("python -m lm_eval --x; python3 -P -m lm_eval")) == [
        ([], "lm_eval"),
        (["-P"], "lm_eval"),
    ]


def test_the_harness_of_table_4_does_not_find_our_evaluate(tmp_path, monkeypatch):
    """It is a console script, whose directory is first on its path, and PYTHONPATH is not handed on."""
    code = "import sys, importlib.util\nspec = importlib.util.find_spec('evaluate')\n"
    code += "path = sys.argv[sys.argv.index('--output_path') + 1] + '.found'\n"
    code += "open(path, 'w').write(str(spec and spec.origin))\n"
    (tmp_path / "lm_eval").write_text(f"#!{sys.executable}\n{code}")
    (tmp_path / "lm_eval").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    args = general.get_args(["model", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):  # it wrote no results
        general.run_harness(args, "model", "piqa", "0")
    assert not (tmp_path / "harness.found").read_text().startswith(str(ROOT))
