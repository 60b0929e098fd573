"""What the README and docs/ show, taken from their text and run; their sizes, links and commands."""

import ast
import importlib.util
import json
import math
import pathlib
import re
import subprocess
import types

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import evaluate
import grpo
import rollout
import score_teacher
import train
from conftest import ROOT
from distil.grading import Grade
from distil.models import Response
from streaming_kl import linear_divergence
from test_repo import commands, parses

ROOT = pathlib.Path(ROOT)
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "kernels/README.md"]
STAGES = {stage.__name__: stage for stage in (rollout, score_teacher, train, grpo, evaluate)}
AIME = {"question": "1+1=?", "answer": "2", "problem": "not this column"}


def blocks(language):
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```", README.read_text(encoding="utf-8"))


def block_with(language, words):
    [block] = [block for block in blocks(language) if words in block]
    return block


def fork(folder, name, registry):
    """The module ROOT/name with the README's lines below its dict `registry`, as a reader would put them."""
    file = ROOT / name
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    [end] = [
        node.end_lineno
        for node in ast.parse("".join(lines)).body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        and registry
        in {ast.unparse(target) for target in getattr(node, "targets", [getattr(node, "target", None)])}
    ]
    lines.insert(end, "\n" + block_with("python", f"{registry}[") + "\n")
    copy = folder / file.name
    copy.write_text("".join(lines), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"{file.stem}_fork", copy)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# The divergence


@pytest.fixture(scope="module")
def jensen_shannon():
    """The README's function alone."""
    names = {"torch": torch, "DIVERGENCES": {}}
    exec(block_with("python", "DIVERGENCES["), names)
    return names["DIVERGENCES"]["jensen_shannon"]


def exact(student_logits, teacher_logits):
    """In float64, by the definition: the mean of both distributions' KL to their mixture."""
    q, p = student_logits.double().softmax(-1), teacher_logits.double().softmax(-1)
    m = (p + q) / 2
    kl_p, kl_q = ((d.xlogy(d) - d.xlogy(m)).sum(-1) for d in (p, q))
    return (kl_p + kl_q) / 2


def value_and_gradient(function, student_logits, teacher_logits, weights):
    student_logits = student_logits.detach().clone().requires_grad_()
    value = function(student_logits, teacher_logits)
    (value * weights).sum().backward()
    return value.detach(), student_logits.grad


def pairs_of_logits(rows=5, vocabulary=300):
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(rows, vocabulary, generator=g) for _ in range(2))
    wide = torch.rand(rows, vocabulary, generator=g) * 200 - 100
    one_token = torch.full((rows, vocabulary), -100.0).scatter(1, torch.arange(rows)[:, None], 100.0)
    return {
        "apart": (a, b),
        "near": (a, a + 0.01 * b),
        "equal": (a, a),
        "range 200": (wide, wide.flip(-1)),
        "range 200, student certain": (one_token, wide),
        "range 200, teacher certain": (wide, one_token),
        "range 200, certain of different tokens": (one_token, one_token.flip(-1)),
        "far from zero": (a + 500, b - 500),
    }


@pytest.mark.parametrize("case", pairs_of_logits())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_divergence_equals_float64(jensen_shannon, case, dtype):
    """bfloat16: of logits that bfloat16 can hold, which the stages pass on as float32."""
    student, teacher = (logits.to(dtype).float() for logits in pairs_of_logits()[case])
    weights = torch.linspace(-2, 3, len(student))
    value, gradient = value_and_gradient(jensen_shannon, student, teacher, weights)
    true_value, true_gradient = value_and_gradient(exact, student.double(), teacher, weights.double())
    assert value.dtype == torch.float32 and value.shape == student.shape[:1]
    assert (value <= math.log(2) + 1e-6).all() and (value >= -1e-6).all()
    torch.testing.assert_close(value.double(), true_value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), true_gradient, rtol=1e-4, atol=1e-6)


def test_the_divergence_in_chunks_of_bfloat16_hidden_states(jensen_shannon):
    """As the stages call it: bfloat16 products are summed in float32, so float64 is their truth too."""
    g = torch.Generator().manual_seed(0)
    student_hidden, student_head, teacher_hidden, teacher_head = (
        torch.randn(*shape, generator=g).bfloat16() for shape in ((7, 16), (50, 16), (7, 24), (50, 24))
    )
    leaves = [t.clone().requires_grad_() for t in (student_hidden, student_head)]
    loss = linear_divergence(jensen_shannon, *leaves, teacher_hidden, teacher_head, chunk_tokens=3)
    loss.backward()
    truth = [t.double().requires_grad_() for t in (student_hidden, student_head)]
    true_loss = exact(truth[0] @ truth[1].T, teacher_hidden.double() @ teacher_head.double().T).sum()
    true_loss.backward()
    assert loss.item() == pytest.approx(true_loss.item(), rel=1e-5)
    for leaf, true in zip(leaves, truth, strict=True):  # a gradient is rounded once, to bfloat16
        torch.testing.assert_close(leaf.grad.double(), true.grad, rtol=2**-7, atol=1e-4)


def divergence_of_rollouts(world, rows, limit):
    """Mean over all response tokens, from whole models and float64."""
    size = len(AutoTokenizer.from_pretrained(world / "teacher_init"))
    models = [AutoModelForCausalLM.from_pretrained(world / f"{who}_init") for who in ("student", "teacher")]
    total, tokens = 0.0, 0
    for row in rows:
        response = row["response_ids"][:limit]
        ids = torch.tensor([row["prompt_ids"] + response])
        with torch.no_grad():
            logits = [model(ids).logits[0, len(row["prompt_ids"]) - 1 : -1, :size] for model in models]
        total += exact(*logits).sum().item()
        tokens += len(response)
    return total / tokens


def test_a_run_with_the_divergence(world, rollouts, scores, tmp_path):
    forked = fork(tmp_path, "train.py", "DIVERGENCES")
    rows = read_rows(rollouts / "rollouts.jsonl")
    words = "--prefix teacher --kl jensen_shannon --max_response_tokens 8 --normalize token --dtype float32"
    words += f" --steps 2 --batch_size {len(rows)} --student {world}/student_init"
    words += f" --rollouts {rollouts} --scores {scores} --out {tmp_path}/run"
    forked.main(forked.get_args(words.split()))
    first, second = read_rows(tmp_path / "run/metrics.jsonl")
    assert first["loss"] == pytest.approx(divergence_of_rollouts(world, rows, 8), rel=1e-4)
    assert 0 < second["loss"] < math.log(2)
    meta = json.loads((tmp_path / "run/meta.json").read_text())
    assert "jensen_shannon" in meta["cell"]["kl"]


def test_the_divergence_on_student_prefixes(world, tmp_path):
    forked = fork(tmp_path, "train.py", "DIVERGENCES")
    words = "--prefix student --kl jensen_shannon --max_response_tokens 6 --engine hf --dtype float32"
    words += f" --steps 1 --batch_size 2 --student {world}/student_init --teacher {world}/teacher_init"
    words += f" --data {world}/train.jsonl --out {tmp_path}/run"
    forked.main(forked.get_args(words.split()))
    [row] = read_rows(tmp_path / "run/metrics.jsonl")
    assert 0 < row["loss"] < math.log(2)


def test_a_divergence_without_an_entry_is_refused(refused):
    words = "--prefix teacher --kl no_such_divergence --student s --rollouts r --scores s --out o".split()
    refused(lambda: train.get_args(words), "--kl", "no_such_divergence")


# The reward


def test_a_run_with_the_reward(world, tmp_path):
    forked = fork(tmp_path, "grpo.py", "REWARDS")
    words = "--reward correct_and_short --steps 2 --batch_size 2 --n 4 --max_response_tokens 6 --lr 1e-3"
    words += f" --engine hf --dtype float32 --model {world}/student_init --data {world}/train.jsonl"
    words += f" --out {tmp_path}/run"
    forked.main(forked.get_args(words.split()))
    for row in read_rows(tmp_path / "run/metrics.jsonl"):
        assert 0 <= row["reward"] <= row["correct"]  # the next test has the values


def test_what_the_reward_is_given(tmp_path):
    reward = fork(tmp_path, "grpo.py", "REWARDS").REWARDS["correct_and_short"]
    args, problem = types.SimpleNamespace(), {"id": "p/1", "problem": "1+1=?", "answer": "2"}
    for length, correct, expected in ((1000, True, 0.9), (1000, False, 0.0), (0, True, 1.0)):
        response = Response([1], [2] * length, False)
        assert reward(args, problem, response, Grade("2", correct, False)) == pytest.approx(expected)


# The data set


def test_the_data_set(tmp_path, monkeypatch):
    import datasets

    problems, asked = fork(tmp_path, "distil/problems.py", "DATASETS"), []

    def load_dataset(*words, **options):
        asked.append((words, options))
        return [AIME, AIME | {"answer": 27.0}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(problems, "hub_reachable", lambda: True)
    first, second = problems.load_problems("aime25")
    assert asked == [(("opencompass/AIME2025", "AIME2025-I"), {"split": "test"})]
    assert (first["problem"], first["answer"], second["answer"]) == ("1+1=?", "2", "27")
    assert first["id"] != second["id"]
    assert "aime25" in problems.DATA_HELP


# Your own model and data


def test_your_own_model_and_data(world, tmp_path, monkeypatch, capsys):
    """bash reads the block and notes the commands down; then the stages run as told, with tiny models."""
    block = block_with("bash", "--preflight")
    for name in ("student", "teacher"):
        block, found = re.subn(rf"\b{name.upper()}=\S+", f"{name.upper()}={world}/{name}_init", block)
        assert found == 1
    block = block.replace("--max_response_tokens 1024", "--max_response_tokens 8")
    block = block.replace("--steps 100", "--steps 1")
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").touch()
    note = "make() { :; }\npython() { printf '%s\\0' \"$@\" >> calls; printf '\\n' >> calls; }\n"
    subprocess.run(["bash", "-euc", note + block], cwd=tmp_path, check=True)
    calls = [line.split("\0")[:-1] for line in (tmp_path / "calls").read_text().splitlines()]
    monkeypatch.chdir(tmp_path)
    for name, *words in calls:
        stage = STAGES[name.removesuffix(".py")]
        stage.main(stage.get_args(words))
    assert {name for name, *_ in calls} == {f"{name}.py" for name in STAGES}
    assert (tmp_path / "out/mine/grpo/final/config.json").is_file()
    printed = capsys.readouterr().out
    assert "preflight: " in printed
    table = printed[printed.index("| run ") :].splitlines()
    assert len([line for line in table if line.startswith("| ")]) == 4  # head, rule, two rows


# The pages


def test_sizes():
    assert README.stat().st_size <= 12_000
    for page in PAGES[1:]:
        assert len(page.read_text(encoding="utf-8").splitlines()) <= 150, page.name


def anchors(page):
    """GitHub's names of a page's headings."""
    headings = re.findall(r"(?m)^#+ (.+)$", page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            path, _, anchor = target.partition("#")
            linked = (page.parent / path).resolve() if path else page
            assert linked.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(linked), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_parse(page):
    for stage, words in commands(page.read_text(encoding="utf-8")):
        if stage in STAGES:
            parses(stage, words)


def test_every_metric_is_in_the_glossary(world, rollouts, scores, tmp_path):
    glossary = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    words = f"--prefix teacher --kl mix --fkl_weight 0.5 --student {world}/student_init --rollouts {rollouts}"
    words += (
        f" --scores {scores} --steps 1 --batch_size 2 --dtype float32 --engine hf --max_response_tokens 8"
    )
    words += f" --eval_data {world}/heldout.jsonl --eval_every 1 --eval_n 2 --out {tmp_path}/train"
    train.main(train.get_args(words.split()))
    words = f"--model {world}/student_init --data {world}/train.jsonl --n 2 --batch_size 2 --steps 1"
    words += " --policy truncated --kl_weight 0.1 --engine hf --dtype float32 --max_response_tokens 8"
    grpo.main(grpo.get_args([*words.split(), "--out", f"{tmp_path}/grpo"]))
    for name in ("train/metrics.jsonl", "train/evals.jsonl", "grpo/metrics.jsonl"):
        for metric in read_rows(tmp_path / name)[0]:
            known = metric.startswith("seconds") or metric.endswith("_interval") or f"`{metric}`" in glossary
            assert known, f"{name}: {metric} is not in docs/metrics.md"
