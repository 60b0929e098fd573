"""Errors of the KL and of its gradient against float64 on the same float32 logits, as a Markdown table.

    python -m benchmarks.kernel_accuracy                       on a GPU, or on a CPU without the Triton column
    TRITON_INTERPRET=1 python -m benchmarks.kernel_accuracy    on a CPU with it, in Triton's interpreter

"formula" is the textbook, softmax(y) * (log_softmax(y) - log_softmax(z)) in float32, with autograd. "KL"
columns are the largest error of the forward KL of all rows, in nats; "gradient" columns are of the even mix:
the root mean square of the error over that of the gradient.
"""

import argparse
import os

import torch

from streaming_kl import streaming_kl

V, ROWS = 151_669, 3  # tokens of Qwen3


def cases():
    """{name: (student logits, teacher logits)} (ROWS, V) float32."""
    noise = torch.randn(4, ROWS, V, generator=torch.Generator().manual_seed(0))
    near = 3 * noise[0], 3 * noise[0] + 0.015 * noise[1]
    return {
        "standard deviation 3": (3 * noise[0], 3 * noise[1]),
        "near convergence": near,
        "near convergence, teacher + 500": (near[0], near[1] + 500),
        "standard deviation 30": (30 * noise[2], 30 * noise[3]),
        "student near -900, teacher near -300": (3 * noise[0] - 900, 3 * noise[1] - 300),
    }


def formula(student, teacher):
    """(forward KL (N,), gradient of the even mix) by log_softmax, in the logits' dtype."""
    student = student.clone().requires_grad_()
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    fkl = (log_p.exp() * (log_p - log_q)).sum(-1)
    rkl = (log_q.exp() * (log_q - log_p)).sum(-1)
    return fkl.detach(), torch.autograd.grad((0.5 * fkl + 0.5 * rkl).sum(), student)[0]


def ours(student, teacher, impl):
    student = student.clone().requires_grad_()
    out = streaming_kl(student, teacher, fkl_weight=0.5, impl=impl)
    return out.fkl, torch.autograd.grad(out.loss, student)[0]


def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ways = {"formula": formula, "torch": lambda s, t: ours(s, t, "torch")}
    if device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        ways["Triton"] = lambda s, t: ours(s, t, "triton")
    header = ["case", "KL"]
    header += [f"KL: {way}" for way in ways]
    header += [f"gradient: {way}" for way in ways]
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    print(f"device {name}, torch {torch.__version__}, {ROWS} x {V} float32\n")
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for case, (student, teacher) in cases().items():
        fkl, gradient = formula(student.double(), teacher.double())
        errors, gradient_errors = [], []
        for way in ways.values():
            found, found_gradient = (x.double().cpu() for x in way(student.to(device), teacher.to(device)))
            errors.append((found - fkl).abs().max().item())
            gradient_errors.append(((found_gradient - gradient).norm() / gradient.norm()).item())
        numbers = " | ".join(f"{error:.1e}" for error in errors + gradient_errors)
        print(f"| {case} | {fkl.mean():.2g} | {numbers} |", flush=True)


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=raw).parse_args()
    main()
