"""What the Triton kernels take on a GPU, found by compiling them for it. Needs no GPU.

    python -m benchmarks.kernel_resources [--json FILE]

Kernels are built for sm_80, sm_90 and sm_100 as they are launched for mixed directions, with every dtype of
logits, and float32 logits with a bfloat16 gradient (training under autocast). Sizes:

    odd V      row strides are multiples of 16 entries, V is not: chunks of Qwen3's 151,669 tokens
    aligned    V is too: 151,936
    unaligned  neither: contiguous logits (N, 151669), whose rows begin anywhere

Registers and shared memory set how many programs fit on a multiprocessor. Spills are bytes of stack and local
memory; the command fails if there are any. Then, from the machine code: the instructions of each loop (the
statistics; the same again, for a row with -inf; the gradient), and the global loads and stores in the loops
by their width in bits. A gradient kernel has no loop: all of it counts, with six loads of a row's numbers, 32
bits each.
"""

import argparse
import collections
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

KERNELS = ("statistics", "gradient", "fused")
DTYPES = ("bf16", "fp16", "fp32")
SHARED_MEMORY = {80: 164, 90: 228, 100: 228}  # KiB on a multiprocessor, by architecture
REGISTERS, WARPS = 65536, 64  # on a multiprocessor of any of them
CONSTANTS = {"WEIGHTED": True, "FKL": True, "RKL": True, "BLOCK": triton_kl.BLOCK, "STAGES": triton_kl.STAGES}
COLUMNS = ("kernel", "arch", "logits", "gradient", "sizes", "registers", "spills", "programs")
COLUMNS += ("instructions", "loads", "stores")


def variants():
    """(kernel, architecture, dtype of both logits, dtype of the gradient, sizes)"""
    found = []
    for architecture in SHARED_MEMORY:
        for name, dtype in itertools.product(KERNELS, DTYPES):
            found.append((name, architecture, dtype, "-" if name == "statistics" else dtype, "odd V"))
        found.append(("fused", architecture, "fp32", "bf16", "odd V"))
    found.append(("gradient tail", 90, "bf16", "bf16", "odd V"))
    for sizes in ("aligned", "unaligned"):
        found.append(("statistics", 90, "bf16", "-", sizes))
        found += [(name, 90, "bf16", "bf16", sizes) for name in ("gradient", "gradient tail", "fused")]
        found.append(("fused", 90, "fp32", "bf16", sizes))
    return found


def compile_kernel(name, architecture, dtype, gradient_dtype, sizes):
    """Dtypes as Triton spells them."""
    kernel = getattr(triton_kl, f"_{name.split()[0]}_kernel")
    constant = CONSTANTS | {"TAIL": name.endswith("tail")}
    pointers = {"student": dtype, "teacher": dtype}
    if name != "statistics":
        pointers["out"] = gradient_dtype
    signature, constants, hints = {}, {}, {}
    for i, argument in enumerate(kernel.arg_names):
        is_stride = argument.endswith("_stride")
        if argument in constant:
            signature[argument] = "constexpr"
            constants[(i,)] = constant[argument]
        elif argument in ("scale", "fkl_weight"):
            signature[argument] = "fp32"
        elif is_stride or argument in ("N", "V"):
            signature[argument] = "i32"
        else:
            signature[argument] = f"*{pointers.get(argument, 'fp32')}"
        aligned = (is_stride and sizes != "unaligned") or (argument == "V" and sizes == "aligned")
        if signature[argument].startswith("*") or aligned:
            hints[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, hints)
    target = GPUTarget("cuda", architecture, 32)
    return triton.compile(source, target=target, options=triton_kl.launch_options(triton_kl.BLOCK))


def read_machine_code(listing):
    """The instructions of each loop, and {width in bits: how many} of the global loads and stores in them."""
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", listing)]
    loops = []
    for at, text in code:
        branch = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if branch and int(branch[1], 16) < at:
            loops.append((int(branch[1], 16), at))
    instructions, loads, stores = [], collections.Counter(), collections.Counter()
    for first, last in sorted(loops) or [(0, code[-1][0])]:
        body = [text for at, text in code if first <= at <= last]
        instructions.append(len(body))
        for text in body:
            access = re.search(r"\b(LDG|LDGSTS|STG)\.E(\S*)", text)
            if access:
                width = re.search(r"\.[US]?(8|16|64|128|256)\b", access[2])
                (stores if access[1] == "STG" else loads)[int(width[1]) if width else 32] += 1
    return {"instructions": instructions, "loads": dict(loads), "stores": dict(stores)}


def resources(name, architecture, dtype, gradient_dtype, sizes):
    compiled = compile_kernel(name, architecture, dtype, gradient_dtype, sizes)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, listing = (
            subprocess.run(
                [triton.knobs.nvidia.cuobjdump.path, option, file.name],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    found = {"kernel": name, "arch": f"sm_{architecture}", "logits": dtype, "gradient": gradient_dtype}
    found["sizes"] = sizes
    dumped = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    found |= {"registers": dumped["REG"], "spills": dumped["STACK"] + dumped["LOCAL"]}
    found["shared"] = compiled.metadata.shared
    warps = compiled.metadata.num_warps
    allocated = -(-found["registers"] // 8) * 8  # a thread's registers come in eights
    found["programs"] = min(
        REGISTERS // (allocated * 32 * warps),
        WARPS // warps,
        SHARED_MEMORY[architecture] * 1024 // (found["shared"] + 1024),
    )
    return found | read_machine_code(listing)


def cell(value):
    """[772, 968] as 772 + 968; {128: 8, 32: 6} as 8 x 128, 6 x 32."""
    if isinstance(value, list):
        return " + ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{count} x {width}" for width, count in sorted(value.items(), reverse=True))
    return str(value)


def main(args):
    rows = []
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    with ProcessPoolExecutor() as pool:
        for row in pool.map(resources, *zip(*variants())):
            rows.append(row)
            print("| " + " | ".join(cell(row[name]) for name in COLUMNS) + " |", flush=True)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)
    spilled = [row for row in rows if row["spills"]]
    if spilled:
        raise SystemExit(f"{len(spilled)} of {len(rows)} kernels spill registers")


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", help="write the table here")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(get_args())
