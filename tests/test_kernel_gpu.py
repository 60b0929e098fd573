"""What only a GPU can show: real sizes, memory, bandwidth, compilation, streams.

The other kernel tests run there too.
"""

from functools import partial

import pytest
import torch

from kernel_helpers import (
    MARKS,
    assert_close,
    assert_values,
    exact_logits,
    heads,
    randn,
    relative_rms,
    triton_kl,
    true_gradient,
    truth,
    value_and_gradient,
)
from streaming_kl import chunks, linear_streaming_kl, streaming_kl

pytestmark = [*MARKS, pytest.mark.gpu]


def test_more_than_2_to_the_31_logits():
    n, v = 14200, 151936
    torch.use_deterministic_algorithms(False)
    student, teacher = (torch.randn(n, v, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    rows = [0, 14133, 14134, n - 1]
    few = student[rows], teacher[rows]
    true = true_gradient(*few, 0.3)
    student.requires_grad_()
    out = streaming_kl(student, teacher, fkl_weight=0.3, reduction="none", inplace_backward=True)
    assert_values([x[rows] for x in out], *few, 0.3)
    (gradient,) = torch.autograd.grad(out.loss.sum(), student)
    assert_close(gradient[rows], true, 4e-3)


@pytest.mark.parametrize("vocab", [151936, 151669])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_no_worse_than_torch(dtype, vocab):
    """Loss and gradient errors against those of torch's own log_softmax in float32, on the same inputs."""
    student, teacher = (randn(64, vocab, seed=seed, scale=3, dtype=dtype) for seed in (0, 1))
    out, gradient = value_and_gradient(student, teacher, fkl_weight=1.0)
    eager = student.clone().requires_grad_()
    log_q, log_p = eager.float().log_softmax(-1), teacher.float().log_softmax(-1)
    loss = (log_p.exp() * (log_p - log_q)).sum(-1)
    (eager_gradient,) = torch.autograd.grad(loss.sum(), eager)
    expected, true = truth(student, teacher, 1.0).loss, true_gradient(student, teacher, 1.0)
    assert_values(out, student, teacher, 1.0)
    assert (out.loss - expected).abs().max() <= (loss - expected).abs().max() + 1e-6
    assert relative_rms(gradient, true) <= 1.05 * relative_rms(eager_gradient, true) + 1e-6


@pytest.mark.parametrize("vocab", [151936, 151669])
def test_hidden_states_of_a_real_vocabulary(vocab):
    """All of Qwen3's vocabulary, and its tokens alone: gradients have about two roundings to bfloat16."""
    tensors = heads(n=64, v=vocab, h=64, teacher_h=96, dtype=torch.bfloat16)
    logits = exact_logits(tensors)
    out = linear_streaming_kl(*tensors, fkl_weight=0.3, chunk_tokens=40)
    d_logits = true_gradient(*logits, 0.3)
    true = d_logits @ tensors[1].double(), d_logits.T @ tensors[0].double()
    assert_close(torch.autograd.grad(out.loss, tensors[:2]), true, 8e-3)
    assert_values(out[1:], *logits, 0.3)


def test_float32_results_of_half_precision_products():
    """cuBLAS's agree with the way that CPUs take: cast first."""
    a, b = randn(96, 64, dtype=torch.bfloat16), randn(64, 48, seed=1, dtype=torch.bfloat16)
    total = randn(96, 48, seed=2)
    expected = total + a.float() @ b.float()
    chunks.add_product(total, a, b)
    assert_close(total, expected)
    buffer = chunks.aligned_buffer(96, 48, torch.float32, torch.device("cuda"))
    assert_close(chunks.product(a, b, buffer), a.float() @ b.float())


@pytest.mark.parametrize("logits_dtype", [None, torch.bfloat16])
def test_memory(logits_dtype):
    """Beyond inputs and gradients: at most 3.2 GB for Qwen3, and no more for four times the tokens."""
    torch.use_deterministic_algorithms(False)
    v = 151669
    student_head = randn(v, 1024, dtype=torch.bfloat16).requires_grad_()
    teacher_head = randn(v, 2560, dtype=torch.bfloat16)
    extra = []
    for n in (8192, 32768):
        hidden = randn(n, 1024, dtype=torch.bfloat16).requires_grad_()
        tensors = hidden, student_head, randn(n, 2560, dtype=torch.bfloat16), teacher_head
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        linear_streaming_kl(*tensors, fkl_weight=0.5, logits_dtype=logits_dtype).loss.backward()
        peak = torch.cuda.max_memory_allocated() - before
        extra.append(peak - hidden.grad.nbytes - student_head.grad.nbytes)
        student_head.grad = None
    assert max(extra) < 3.2e9 and extra[1] - extra[0] < 0.1e9 < n * v


@pytest.mark.parametrize("vocab", [151936, 151669])
def test_bandwidth(vocab):
    """Forward and backward in place read the logits 4 times and write 1: at 80% of a copy's rate or more.

    With rows 151,936 apart, whether or not the last 267 logits count.
    """
    torch.use_deterministic_algorithms(False)
    student, teacher = (torch.randn(8192, 151936, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    student.requires_grad_()

    def both():
        options = {"vocab_size": vocab, "inplace_backward": True}
        loss = streaming_kl(student, teacher, fkl_weight=0.5, **options).loss
        torch.autograd.grad(loss, student)

    def seconds(function):
        for _ in range(3):
            function()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(10):
            function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e4

    target = torch.empty_like(teacher)
    copy = 2 * teacher.nbytes / seconds(partial(target.copy_, teacher))
    del target
    ours = 5 * teacher.nbytes / seconds(both)
    print(f"copy {copy / 1e9:.0f} GB/s, forward and backward {ours / 1e9:.0f} GB/s")
    assert ours > 0.8 * copy


def test_one_compilation():
    """Other numbers of tokens, mixes, temperatures and upstream gradients reuse the kernels; none spills."""
    device = torch.cuda.current_device()
    jitted = (triton_kl._statistics_kernel, triton_kl._gradient_kernel, triton_kl._fused_kernel)
    counts = []
    for n, fkl_weight, temperature in ((16, 0.3, 1.0), (17, 0.6, 2.0), (1000, 0.9, 0.5)):
        options = {"fkl_weight": fkl_weight, "temperature": temperature}
        value_and_gradient(randn(n, 8197), randn(n, 8197, seed=1), randn(n), **options)
        linear_streaming_kl(*heads(n=n, v=8197), **options).loss.backward()
        counts.append([len(kernel.device_caches[device][0]) for kernel in jitted])
    assert counts[0] == counts[1] == counts[2]
    for kernel in jitted:
        for compiled in kernel.device_caches[device][0].values():
            compiled._init_handles()
            assert compiled.n_spills == 0


def test_no_host_sync():
    """The host never waits for the device. (In linear_streaming_kl with a weight it does, once.)"""
    torch.use_deterministic_algorithms(False)
    student, teacher = randn(64, 1000).requires_grad_(), randn(64, 1000, seed=1)
    weight, tensors = torch.ones(64, device="cuda"), heads(n=64)
    for mode in ("default", "error"):  # the first round compiles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            for reduction in ("sum", "mean"):
                options = {"fkl_weight": 0.3, "reduction": reduction}
                streaming_kl(student, teacher, weight=weight, **options).loss.backward()
                linear_streaming_kl(*tensors, **options).loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_streams_and_devices():
    student, teacher = randn(64, 1000), randn(64, 1000, seed=1)
    _, expected = value_and_gradient(student, teacher, fkl_weight=0.3)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)  # whoever runs on another stream would be early
        late = student * 1
        _, gradient = value_and_gradient(late, teacher, fkl_weight=0.3)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(gradient, expected)
    if torch.cuda.device_count() > 1:  # not the current device
        _, other = value_and_gradient(student.to("cuda:1"), teacher.to("cuda:1"), fkl_weight=0.3)
        assert torch.equal(other.cpu(), expected.cpu())


def test_inductor():
    tensors = heads(n=64, v=1000)

    def function(x, w, xt, wt):
        linear = linear_streaming_kl(x * 2, w, xt, wt, fkl_weight=0.3)
        return linear.loss + streaming_kl(x @ w.T, xt @ wt.T, fkl_weight=0.3).loss

    results = []
    for f in (function, torch.compile(function, fullgraph=True)):
        loss = f(*tensors)
        results.append([loss, *torch.autograd.grad(loss, tensors[:2])])
    assert_close(*results, 1e-4)
