"""The package from outside: what it imports and refuses, torch.compile, FSDP, what measures it."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import streaming_kl as package
from benchmarks import kernel_accuracy, kernel_speed
from kernel_helpers import COMPILER, DEVICE, MARKS, NAN, assert_close, heads, randn
from streaming_kl import linear_divergence, linear_streaming_kl, streaming_kl

pytestmark = MARKS
ROOT = Path(__file__).parent.parent
README = ROOT / "kernels" / "README.md"


@pytest.fixture(scope="module", autouse=True)
def resource_report(request, tmp_path_factory):
    """benchmarks.kernel_resources, begun before the first test: it takes long, and needs no interpreter."""
    if not any(item.name == "test_kernels_compile_without_spilling" for item in request.session.items):
        yield None
        return
    path = tmp_path_factory.mktemp("resources") / "resources.json"
    command = [sys.executable, "-m", "benchmarks.kernel_resources", "--json", str(path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, env=COMPILER, **pipes)
    yield process, path
    process.kill()
    process.wait()


# ---------------------------------------------------------------------------------- the package


def test_it_imports_only_torch_triton_and_the_standard_library():
    for file in Path(package.__file__).parent.glob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        names = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(node.module.split(".")[0])
        assert names <= {"torch", "triton", *sys.stdlib_module_names}, file.name
        assert "triton" not in names or file.name == "triton_kl.py"
        if file.name == "__init__.py":  # only hands on names
            assert {type(node) for node in tree.body} == {ast.Expr, ast.ImportFrom, ast.Assign}
        assert file.read_text(encoding="utf-8").count("\n") <= 350, f"{file.name} is long"
    assert all(hasattr(package, name) for name in package.__all__)


def run_python(code, **options):
    command, options = [sys.executable, "-c", code], {"cwd": ROOT, "capture_output": True, **options}
    return subprocess.run(command, text=True, check=False, **options)


def test_it_works_without_triton():
    done = run_python("""
import sys; sys.modules["triton"] = None
import torch; from streaming_kl import *
hidden, head = torch.randn(3, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
linear_streaming_kl(hidden, head, hidden.detach(), head.detach(), fkl_weight=0.5).loss.backward()
streaming_kl(hidden @ head.T, torch.randn(3, 9), fkl_weight=0.5).loss.backward()
try: streaming_kl(hidden, hidden.detach(), fkl_weight=0.5, impl="triton")
except ImportError: pass
else: raise SystemExit("triton was not needed")
""")
    assert not done.returncode, done.stderr


def test_triton_on_a_cpu_is_refused():
    code = "import torch, streaming_kl as s; x = torch.ones(2, 3); "
    done = run_python(code + 's.streaming_kl(x, x, fkl_weight=0.5, impl="triton")', env=COMPILER)
    assert done.returncode and 'impl="triton" needs CUDA tensors' in done.stderr


def test_wrong_options_are_refused():
    logits, tensors, good = randn(3, 50), heads(n=3), {"fkl_weight": 1.0}
    for wrong, message in [
        ({"fkl_weight": 1.5}, r"\[0, 1\]"),
        ({"fkl_weight": NAN}, r"\[0, 1\]"),
        ({"temperature": 0.0}, "positive"),
        ({"temperature": NAN}, "positive"),
        ({"reduction": "batchmean"}, "reduction"),
        ({"impl": "cuda"}, "impl"),
        ({"weight": torch.ones(4, device=DEVICE)}, "one number per token"),
        ({"weight": torch.ones(3, device=DEVICE, requires_grad=True)}, "weight.detach"),
        ({"vocab_size": 51}, "does not fit"),
        ({"vocab_size": 0}, "does not fit"),
    ]:
        for call in (streaming_kl, linear_streaming_kl):
            arguments = (logits, logits) if call is streaming_kl else tensors
            with pytest.raises(ValueError, match=message):
                call(*arguments, **good | wrong)
    with pytest.raises(ValueError, match="chunk_tokens"):
        linear_streaming_kl(*tensors, chunk_tokens=0, **good)
    for top_k in (-1, 51):
        with pytest.raises(ValueError, match="top_k"):
            linear_streaming_kl(*tensors, top_k=top_k, **good)
    with pytest.raises(TypeError, match="fkl_weight"):
        streaming_kl(logits, logits)
    with pytest.raises(TypeError, match="softcap"):
        streaming_kl(logits, logits, fkl_weight=1.0, softcap=30.0)


def test_wrong_tensors_are_refused():
    logits, (x, w, xt, wt) = randn(3, 50), heads()
    for bad, message in [
        ((logits, logits[:2]), "3 tokens"),
        ((logits[0], logits[0]), "matrix"),
        ((logits.long(), logits), "matrix of floats"),
        ((logits, logits.clone().requires_grad_()), r"teacher_logits.detach\(\)"),
        ((logits, randn(3, 51)), "vocabularies of 50 and 51"),
    ]:
        with pytest.raises(ValueError, match=message):
            streaming_kl(*bad, fkl_weight=1.0)
    for bad, message in [
        ((x, w, xt[:2], wt), "5 tokens"),
        ((x, w.half(), xt, wt), "does not go with"),
        ((x, w, xt[:, :5], wt), "does not go with"),
        ((x, w, xt.clone().requires_grad_(), wt), r"teacher_hidden.detach\(\)"),
        ((x, w, xt, wt.clone().requires_grad_()), r"teacher_head.detach\(\)"),
        ((x, w, xt, randn(51, 12)), "vocabularies of 50 and 51"),
    ]:
        with pytest.raises(ValueError, match=message):
            linear_streaming_kl(*bad, fkl_weight=1.0)
        with pytest.raises(ValueError, match=message):
            linear_divergence(lambda s, t: s.sum(-1), *bad)


# ------------------------------------------------------------------------- torch.compile and FSDP


def test_torch_compile(impl):
    """Both KLs compile whole (fullgraph), with the same numbers; linear_divergence splits the graph."""
    weight = torch.tensor([1.0, 0, 2, 1, 1], device=DEVICE)

    def both(x, w, xt, wt, reduction, logits_dtype):
        options = {"fkl_weight": 0.3, "weight": weight, "reduction": reduction, "impl": impl}
        out, top = linear_streaming_kl(x, w, xt, wt, logits_dtype=logits_dtype, top_k=3, **options)
        other = streaming_kl(x @ w.T, xt @ wt.T, **options)
        return (out.loss * 2).sum() + other.loss.sum() + out.fkl.sum() + top.student_logps.sum()

    def divergence(x, w, xt, wt, reduction, logits_dtype):
        def total_variation(s, t):
            return (s.softmax(-1) - t.softmax(-1)).abs().sum(-1)

        options = {"reduction": reduction, "logits_dtype": logits_dtype}
        return linear_divergence(total_variation, x, w, xt, wt, **options) * 2

    cases = [(both, "mean", torch.bfloat16), (both, "none", None)]
    if impl == "torch":
        cases.append((divergence, "sum", None))
    for function, reduction, logits_dtype in cases:
        torch._dynamo.reset()
        tensors = heads(n=5, dtype=torch.bfloat16)
        compiled = torch.compile(function, backend="aot_eager", fullgraph=function is both)
        results = []
        for f in (function, compiled):
            loss = f(*tensors, reduction, logits_dtype)
            results.append([loss, *torch.autograd.grad(loss, tensors[:2])])
        assert [x.dtype for x in results[1]] == [x.dtype for x in results[0]]
        assert_close(*results[::-1])
    torch._dynamo.reset()

    def in_place(logits):
        return streaming_kl(logits, logits, fkl_weight=1.0, inplace_backward=True).loss

    with pytest.raises(Exception, match="inplace_backward"):
        torch.compile(in_place, backend="eager", fullgraph=True)(tensors[3])


FSDP_CODE = """
import sys, torch, torch.nn as nn, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Partial
from streaming_kl import linear_streaming_kl
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
mesh = dist.init_device_mesh("cpu", (2,))
torch.manual_seed(0)
tokens, teacher_hidden, teacher_head = torch.randn(8, 6), torch.randn(8, 5), torch.randn(11, 5)
options = {"fkl_weight": 0.3, "reduction": "mean"}

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 4), nn.Linear(4, 11, bias=False)
    def forward(self, tokens, teacher_hidden):  # the loss inside the root's forward, where the head is whole
        tensors = self.body(tokens), self.head.weight, teacher_hidden, teacher_head
        return linear_streaming_kl(*tensors, **options).loss

def check(gradient, expected):
    assert (gradient.full_tensor() - expected).norm() < 1e-5 * expected.norm()

plain = Model()
plain(tokens, teacher_hidden).backward()
expected = [p.grad for p in plain.parameters()]
mine = slice(4 * rank, 4 * rank + 4)
model = Model()
model.load_state_dict(plain.state_dict())
fully_shard(model, mesh=mesh)
model(tokens[mine], teacher_hidden[mine]).backward()
for p, e in zip(model.parameters(), expected):
    check(p.grad, e)

hidden = torch.randn(8, 4)
loss = linear_streaming_kl(hidden, plain.head.weight, teacher_hidden, teacher_head, **options).loss
(expected,) = torch.autograd.grad(loss, plain.head.weight)
model.reshard()
head = model.head.weight
try: linear_streaming_kl(hidden[mine], head, teacher_hidden[mine], teacher_head, **options)
except TypeError as error: assert "full_tensor" in str(error)
else: raise SystemExit("a sharded head was taken")
whole = head.full_tensor(grad_placements=[Partial("avg")])
loss = linear_streaming_kl(hidden[mine], whole, teacher_hidden[mine], teacher_head, **options).loss
check(torch.autograd.grad(loss, head)[0], expected)
dist.barrier()  # a rank that leaves first can make gloo abort the other
dist.destroy_process_group()
"""


def test_fsdp(tmp_path):
    """Two ranks: it works inside FSDP's forward; a sharded head is refused, with a way to gather it."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ranks = []
    for rank in range(2):
        command = [sys.executable, "-c", FSDP_CODE, str(rank), str(tmp_path / "store")]
        ranks.append(subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True))
    for process in ranks:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors


# ------------------------------------------------------------------------------- what measures it


def test_the_accuracy_table(monkeypatch, capsys):
    """It runs, and errors are of the size of float32's rounding."""
    monkeypatch.setattr(kernel_accuracy, "V", 5000)
    kernel_accuracy.main()
    header, _, *rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if "|" in line]
    names = [name.strip() for name in header]
    kl, error = names.index("KL"), names.index("KL: torch")
    assert len(rows) == 5
    assert all(float(row[error]) < 2e-6 * (1 + float(row[kl])) for row in rows)


def test_the_speed_table(tmp_path):
    """What CPUs can run of it: every row has its times, or says why not."""
    sizes = ["--n=8", "--vocab=100", "--hidden=8", "--teacher_hidden=12", "--repeats=1", "--dtype=float32"]
    kernel_speed.main(kernel_speed.get_args([*sizes, "--out", str(tmp_path)]))
    report = json.loads((tmp_path / "bench.json").read_text())
    ran = [row for row in report["rows"] if "why" not in row]
    assert len(report["rows"]) == 3 * sum(map(len, kernel_speed.CONTENDERS.values()))
    assert {"streaming_kl torch", "linear_streaming_kl torch", "torch eager"} <= {row["name"] for row in ran}
    assert all(max(row["loss_error"], row["gradient_error"]) < 1e-5 and row["both_ms"] > 0 for row in ran)


CONTENDERS = [(entry, name) for entry, names in kernel_speed.CONTENDERS.items() for name in names]


@pytest.mark.peer
@pytest.mark.parametrize("entry, name", CONTENDERS)
def test_peers_agree(entry, name):
    """Every implementation in the benchmark that is installed computes the KLs that it claims."""
    args = kernel_speed.get_args(["--dtype", "float32", "--hidden", "64", "--teacher_hidden", "96"])
    reasons = []
    for fkl_weight in (1.0, 0.0):
        try:
            function = kernel_speed.CONTENDERS[entry][name](fkl_weight)
        except (kernel_speed.Unavailable, ImportError) as reason:
            reasons.append(str(reason))
            continue
        assert max(kernel_speed.error(entry, function, fkl_weight, args, DEVICE)) < 1e-3
    if len(reasons) == 2:
        pytest.skip(reasons[0])


def test_kernels_compile_without_spilling(resource_report):
    """Every kernel for sm_80, sm_90 and sm_100, in every dtype. Last, because it waits for the report.

    At a vocabulary like 151,669 too, all loops over logits load and store 128 bits at a time.
    """
    process, path = resource_report
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    rows = json.loads(path.read_text())
    assert all(row["spills"] == 0 and row["programs"] >= 3 for row in rows)

    whole = [row for row in rows if row["sizes"] != "unaligned" and row["kernel"] != "gradient tail"]
    odd = {(row["kernel"], row["arch"], row["logits"]) for row in whole if row["sizes"] == "odd V"}
    assert len(odd) == 3 * 3 * 3 and {arch for _, arch, _ in odd} == {"sm_80", "sm_90", "sm_100"}
    for row in whole:
        kernel = row["kernel"]
        vectors = {"bf16": 4, "fp16": 4, "fp32": 8, "-": 0}  # of 128 bits: a thread's share of a block
        loops = {"statistics": 2, "gradient": 1, "fused": 3}[kernel]
        scalars = {"32": 6} if kernel == "gradient" else {}
        assert row["loads"] == {"128": 2 * loops * vectors[row["logits"]]} | scalars, row
        stores = vectors[row["gradient"]] * (2 if kernel == "gradient" else 1)  # a gradient, or zeros
        assert row["stores"] == ({"128": stores} if stores else {}), row
        assert len(row["instructions"]) == loops, row
        assert row["registers"] <= {"statistics": 128, "gradient": 64, "fused": 144}[kernel], row
    table = [line for line in README.read_text(encoding="utf-8").splitlines() if " | sm_90 | " in line]
    assert len(table) > 9 and set(table) <= set(output.splitlines())
