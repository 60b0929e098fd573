"""What the Triton kernels take on a GPU, found by compiling them for it. Needs no GPU.

    python -m benchmarks.kernel_resources [--json FILE]

Kernels are built as they are launched for a vocabulary of 151,936: for sm_80, sm_90 and sm_100, every dtype,
mixed directions; and once for rows that start at odd addresses, where loads cannot be wide. Registers and
shared memory set how many programs fit on a multiprocessor; stack and local memory are spills. Fails if there
are any.
"""

import argparse
import itertools
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
DTYPES = ("bf16", "fp16", "fp32")
SHARED_MEMORY = {80: 164, 90: 228, 100: 228}  # KiB on a multiprocessor, by architecture
REGISTERS, WARPS = 65536, 64  # on a multiprocessor of any of them
CONSTANTS = {"WEIGHTED": True, "FKL": True, "RKL": True, "BLOCK": triton_kl.BLOCK, "STAGES": triton_kl.STAGES}
COLUMNS = {  # and their widths
    "kernel": 20,
    "arch": 6,
    "dtype": 5,
    "rows": 9,
    "registers": 9,
    "stack": 5,
    "local": 5,
    "shared": 6,
    "programs_per_sm": 15,
}


def compile_kernel(name, architecture, dtype, aligned):
    """dtype of both logits, as Triton spells it. aligned: V and all row strides are multiples of 16."""
    kernel = getattr(triton_kl, name)
    signature, constants, hints = {}, {}, {}
    for i, argument in enumerate(kernel.arg_names):
        is_logits = argument in ("student", "teacher") or (name == "_gradient_kernel" and argument == "out")
        is_size = argument == "V" or argument.endswith("_stride")
        if argument in CONSTANTS:
            signature[argument] = "constexpr"
            constants[(i,)] = CONSTANTS[argument]
        elif argument in ("scale", "fkl_weight"):
            signature[argument] = "fp32"
        elif is_size or argument == "N":
            signature[argument] = "i32"
        else:
            signature[argument] = f"*{dtype}" if is_logits else "*fp32"
        if signature[argument].startswith("*") or (is_size and aligned):
            hints[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, hints)
    target = GPUTarget("cuda", architecture, 32)
    return triton.compile(source, target=target, options=triton_kl.launch_options(triton_kl.BLOCK))


def resources(name, architecture, dtype, aligned):
    compiled = compile_kernel(name, architecture, dtype, aligned)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {}
    for key, name_in_dump in (("registers", "REG"), ("stack", "STACK"), ("local", "LOCAL")):
        found[key] = int(re.search(rf"\b{name_in_dump}:(\d+)", usage)[1])
    found["shared"] = compiled.metadata.shared
    warps = compiled.metadata.num_warps
    allocated = -(-found["registers"] // 8) * 8  # a thread's registers come in eights
    found["programs_per_sm"] = min(
        REGISTERS // (allocated * 32 * warps),
        WARPS // warps,
        SHARED_MEMORY[architecture] * 1024 // (found["shared"] + 1024),
    )
    return found


def main(args):
    variants = [(*variant, True) for variant in itertools.product(KERNELS, SHARED_MEMORY, DTYPES)]
    variants += [(name, 90, "bf16", False) for name in KERNELS]
    rows = []
    print(" ".join(name.rjust(width) for name, width in COLUMNS.items()))
    with ProcessPoolExecutor() as pool:
        for variant, row in zip(variants, pool.map(resources, *zip(*variants))):
            name, architecture, dtype, aligned = variant
            row |= {"kernel": name.strip("_"), "arch": f"sm_{architecture}", "dtype": dtype}
            row["rows"] = "aligned" if aligned else "unaligned"
            rows.append(row)
            print(" ".join(str(row[name]).rjust(width) for name, width in COLUMNS.items()))
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
