"""No operation allocates tokens x vocabulary, and a chunk of tokens stays within its budget of bytes."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernel_helpers import MARKS, heads, randn, triton_kl
from streaming_kl import (
    chunk_of,
    chunks,
    kept_sets,
    linear_divergence,
    linear_streaming_kl,
    reference,
    sampler_logps,
    streaming_kl,
)

pytestmark = MARKS
GPU, CPU = torch.device("cuda"), torch.device("cpu")
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


class Allocations(TorchDispatchMode):
    """Bytes of the largest storage that any operation inside makes, and the most that live at a time."""

    def __init__(self, *inputs):
        super().__init__()
        self.known = {StorageWeakRef(x.untyped_storage()).cdata for x in inputs}
        self.live, self.largest, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                reference, size = StorageWeakRef(x.untyped_storage()), x.untyped_storage().nbytes()
                if reference.cdata not in self.known:
                    self.live[reference.cdata] = reference, size
                    self.largest = max(self.largest, size)
        self.live = {key: pair for key, pair in self.live.items() if not pair[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return result


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_no_tensor_of_tokens_by_vocabulary(impl, reduction, monkeypatch):
    """Forward and backward with few and with many tokens: the largest allocation is the chunk, in both."""
    if triton_kl is not None:
        monkeypatch.setattr(triton_kl, "BLOCK", 4096)
    v, chunk = 600, 2
    monkeypatch.setattr(reference, "CHUNK_BYTES", dict.fromkeys(("cpu", "cuda"), chunk * v * 4))
    for n in (4, 12):
        tensors = heads(n=n, v=v, h=2, teacher_h=2)
        options = {"fkl_weight": 0.3, "reduction": reduction, "chunk_tokens": chunk, "impl": impl}
        with Allocations(*tensors) as linear:
            linear_streaming_kl(*tensors, **options).loss.sum().backward()
        assert chunk * v * 4 <= linear.largest <= chunk * (v + 16) * 4
    student, teacher = randn(n, v).requires_grad_(), randn(n, v, seed=1)
    with Allocations(student, teacher) as forward:
        loss = streaming_kl(student, teacher, fkl_weight=0.3, impl=impl, inplace_backward=True).loss
    with Allocations(student, teacher) as backward:
        loss.backward()
    assert max(forward.largest, backward.largest) <= chunk * v * 4


def jensen_shannon(student_logits, teacher_logits):
    log_q, log_p = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    log_m = torch.logaddexp(log_p, log_q) - 0.7
    return ((log_p.exp() * (log_p - log_m)).sum(-1) + (log_q.exp() * (log_q - log_m)).sum(-1)) / 2


@pytest.mark.parametrize(
    "dtype, logits_dtype", [(F32, None), (BF16, None), (BF16, BF16), (F32, BF16), (F64, None)]
)
@pytest.mark.parametrize("loss", ["kl", "divergence"])
def test_the_default_chunk_stays_within_its_budget(loss, dtype, logits_dtype, monkeypatch):
    """And uses it. What is counted is all that lives at the peak, with more tokens than fit one chunk."""
    budget, v, n = 2**19, 1000, 200
    monkeypatch.setattr(chunks, "LOGITS_BYTES", {"cpu": budget, "cuda": 0})
    monkeypatch.setattr(reference, "CHUNK_BYTES", {"cpu": 2 * v * 4, "cuda": 1})  # two rows at a time
    tensors = [x.cpu().detach().requires_grad_(x.requires_grad) for x in heads(n, v, 2, 2, dtype)]
    with Allocations(*tensors) as run:
        if loss == "kl":
            linear_streaming_kl(*tensors, fkl_weight=0.3, logits_dtype=logits_dtype, impl="torch")
        else:
            linear_divergence(jensen_shannon, *tensors, logits_dtype=logits_dtype)
    # beyond the chunk: two rows' temporaries, both heads' casts and gradients; columns and hidden states
    rest = 8 * (2 * 8 * v + 8 * v + 10 * n)
    assert 0.8 * budget < run.peak < budget + rest


def test_the_samplers_memory_is_a_chunks(monkeypatch):
    """Forward and backward: the most that lives at a time does not grow with the tokens."""
    monkeypatch.setattr(chunks, "LOGITS_BYTES", {"cpu": 16 * 600 * 4})  # four tokens a chunk
    peaks = []
    for n in (8, 80):
        hidden, head = torch.randn(n, 2, requires_grad=True), torch.randn(600, 2, requires_grad=True)
        sets = kept_sets(hidden, head, 1.0, 0.1, 0)
        for kept in (None, sets):
            with Allocations(hidden, head) as run:
                found = sampler_logps(hidden, head, torch.arange(n), 0.9, 0.5, 0, kept)
                found.logps.sum().backward()
            peaks.append(run.peak - 100 * n)  # numbers a token
            assert run.largest <= 8 * 4 * 608
    assert max(peaks) < 32 * 4 * 608, peaks


class Products(TorchDispatchMode):
    """Row strides of the (n, v) and (v, n) matrices that products write, and of a dtype that they read."""

    def __init__(self, n, v, dtype):
        super().__init__()
        self.shape, self.dtype, self.strides = {n, v}, dtype, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = (kwargs or {}).get("out")
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            read = [x for x in args if isinstance(x, torch.Tensor) and x.dtype == self.dtype]
            written = [] if out is None else [out]
            self.strides += [max(x.stride()) for x in read + written if set(x.shape) == self.shape]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype, logits_dtype", [(F32, None), (BF16, None), (BF16, BF16), (F32, BF16)])
@pytest.mark.parametrize("loss", ["kl", "divergence"])
def test_rows_stay_aligned(loss, dtype, logits_dtype):
    """With an odd vocabulary, the rows of logits and gradients begin at multiples of 16 in every product.

    Except in the casts to float32 that CPUs need.
    """
    n, v = 4, 601
    tensors = heads(n, v, 2, 3, dtype)
    with Products(n, v, dtype) as products:
        if loss == "kl":
            out = linear_streaming_kl(*tensors, fkl_weight=0.3, logits_dtype=logits_dtype, impl="torch")
            out.loss.backward()
        else:
            linear_divergence(jensen_shannon, *tensors, logits_dtype=logits_dtype).backward()
    assert len(products.strides) >= 3 and set(products.strides) == {608}


@pytest.mark.parametrize(
    "dtypes, extra, tokens",
    [
        ((BF16, BF16), 0, 4096),
        ((BF16, F32), 0, 1536),
        ((F16, F32), 0, 1536),
        ((F32, F32), 0, 2048),
        ((F64, F64), 0, 1024),
        ((BF16, F32), 8, 384),
    ],
)
def test_few_large_chunks_on_a_gpu(dtypes, extra, tokens):
    """Of Qwen3, in 2.5 GB: multiples of 128. dtypes of the products and of the logits."""
    product, logits = dtypes
    assert chunks.default_chunk([product] * 2, [logits] * 2, 151936, extra, GPU) == tokens


def test_chunks_of_extreme_vocabularies():
    assert chunks.default_chunk([F32] * 2, [F32] * 2, 64, 0, CPU) > 100_000
    assert chunks.default_chunk([F32] * 2, [F32] * 2, 10**9, 0, CPU) == 1
    assert chunks.default_chunk([F32] * 2, [F32] * 2, 10**9, 0, GPU) == 128
    assert chunk_of(torch.empty(1, 1)) > 10**6
    assert chunk_of(torch.empty(1, 1).expand(10**9, 1)) == 1
