"""What the Triton kernels take on a GPU, found by compiling them for it. Needs no GPU. Fails if any kernel spills registers to memory.

    python -m benchmarks.kernel_resources [--json FILE]

Kernels are built as they are launched for a vocabulary of 151,936: for sm_80, sm_90 and sm_100, every dtype, mixed directions; and once
for rows that start at odd addresses, where loads cannot be wide. Registers and shared memory set how many programs fit on a
multiprocessor; stack and local memory are spills.
"""

import argparse
import json
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from streaming_kl import triton_kl

KERNELS = ("_statistics_kernel", "_gradient_kernel", "_fused_kernel")
ARCHITECTURES = {80: 164, 90: 228, 100: 228}  # KiB of shared memory on a multiprocessor; all have 65536 registers and 64 warps
CONSTANTS = {"WEIGHTED": True, "FKL": True, "RKL": True, "BLOCK": triton_kl.BLOCK, "STAGES": triton_kl.STAGES}


def compile_kernel(name, architecture, dtype, aligned):
    """dtype of both logits, as Triton spells it. aligned: V and all row strides are multiples of 16."""
    kernel = getattr(triton_kl, name)
    signature, constants, hints = {}, {}, {}
    for i, argument in enumerate(kernel.arg_names):
        logits = argument in ("student", "teacher") or argument == "out" and name == "_gradient_kernel"
        size = argument == "V" or argument.endswith("_stride")
        if argument in CONSTANTS:
            signature[argument], constants[(i,)] = "constexpr", CONSTANTS[argument]
        elif argument in ("scale", "fkl_weight"):
            signature[argument] = "fp32"
        else:
            signature[argument] = "i32" if size or argument == "N" else f"*{dtype if logits else 'fp32'}"
        if signature[argument].startswith("*") or size and aligned:
            hints[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, hints)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=triton_kl.launch_options(triton_kl.BLOCK))


def resources(name, architecture, dtype, aligned):
    compiled = compile_kernel(name, architecture, dtype, aligned)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"\b{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    fits = [65536 // (-(-registers // 8) * 8 * 32 * warps), 64 // warps, ARCHITECTURES[architecture] * 1024 // (shared + 1024)]
    return {"registers": registers, "stack": stack, "local": local, "shared": shared, "programs_per_sm": min(fits)}


def main(args):
    variants = [(name, arch, dtype, True) for name in KERNELS for arch in ARCHITECTURES for dtype in ("bf16", "fp16", "fp32")]
    variants += [(name, 90, "bf16", False) for name in KERNELS]
    rows = []
    form = "{kernel:20} {arch:>6} {dtype:>5} {rows:>9} {registers:>9} {stack:>5} {local:>5} {shared:>6} {programs_per_sm:>15}"
    print(form.format(**{name: name for name in re.findall(r"{(\w+)", form)}))
    with ProcessPoolExecutor() as pool:
        for (name, architecture, dtype, aligned), row in zip(variants, pool.map(resources, *zip(*variants))):
            row |= {"kernel": name.strip("_"), "arch": f"sm_{architecture}", "dtype": dtype, "rows": "aligned" if aligned else "unaligned"}
            rows.append(row)
            print(form.format(**row))
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)
    spilled = [row for row in rows if row["stack"] or row["local"]]
    if spilled:
        raise SystemExit(f"{len(spilled)} of {len(rows)} kernels spill registers")


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", help="write the table here")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(get_args())
