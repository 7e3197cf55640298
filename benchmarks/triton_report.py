"""Report the compiled Triton kernels of several GPUs: registers, shared memory, spills, and instructions per state.

The instructions are those of a state in the loops over tiles. "Unequal" counts sums over lanes into which each lane
fuses its own product. The lanes round differently, so the bits depend on the lane that stores the sum.

This needs no GPU, since Triton includes the assemblers.

Example:
    python benchmarks/triton_report.py --targets sm_90 gfx942 --kernels scan_fwd scan_bwd
"""

import argparse
import os
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import triton
from measure import RESULTS_DIR, format_value, write_csv
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from evmamba_kernels import atrous_selective_scan_triton as host
from evmamba_kernels import (
    atrous_selective_scan_triton_bwd,
    atrous_selective_scan_triton_fwd,
    layer_norm_triton,
    triton_device,
)


TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

KERNELS = {
    "project_fwd": atrous_selective_scan_triton_fwd.project_fwd_kernel,
    "chunk_state_fwd": atrous_selective_scan_triton_fwd.chunk_state_fwd_kernel,
    "state_passing": atrous_selective_scan_triton_fwd.state_passing_kernel,
    "scan_fwd": atrous_selective_scan_triton_fwd.scan_fwd_kernel,
    "chunk_state_bwd": atrous_selective_scan_triton_bwd.chunk_state_bwd_kernel,
    "scan_bwd": atrous_selective_scan_triton_bwd.scan_bwd_kernel,
    "project_bwd_input": atrous_selective_scan_triton_bwd.project_bwd_input_kernel,
    "project_bwd_weight": atrous_selective_scan_triton_bwd.project_bwd_weight_kernel,
    "layer_norm_gated_fwd": layer_norm_triton.layer_norm_gated_fwd_kernel,
    "layer_norm_gated_bwd": layer_norm_triton.layer_norm_gated_bwd_kernel,
}
MATRIX_KERNELS = ("project_fwd", "project_bwd_input", "project_bwd_weight")
KERNELS_OF_STATES = ("chunk_state_fwd", "scan_fwd", "chunk_state_bwd", "scan_bwd")
NORM_BLOCK_ELEMENTS = {
    "layer_norm_gated_fwd": layer_norm_triton.FORWARD_BLOCK_ELEMENTS,
    "layer_norm_gated_bwd": layer_norm_triton.BACKWARD_BLOCK_ELEMENTS,
}
OPTIONS = dict.fromkeys(MATRIX_KERNELS, host.MATRIX_WARPS) | dict.fromkeys(
    NORM_BLOCK_ELEMENTS, layer_norm_triton.FOUR_WARPS
)
BACKWARD_KERNELS = ("chunk_state_bwd", "scan_bwd", "project_bwd_input", "project_bwd_weight")

NORM_CHANNELS = 96  # stage 1 of T

INTEGERS = {
    *("num_rows", "height", "width", "channels", "outputs", "state_size", "rank", "unit"),
    *("num_tiles", "chunk_tiles", "segment_tiles", "num_chunks", "num_blocks", "part_blocks"),
    *("ends_per_chunk", "times_per_chunk", "first", "direction"),
}

# classes of instructions in the table; the first match applies
CLASSES = {
    "exp": r"MUFU\.EX2|v_exp_f32",
    "shuffle": r"SHFL|ds_bpermute|ds_swizzle|v_permlane|.*_dpp",
    "fp32": r"F(FMA|MUL|ADD)|v_(pk_)?(fma|fmac|mul|add|sub)_f32",
    "load": r"LDG|global_load|buffer_load",
    "store": r"STG|global_store|buffer_store",
    "local": r"LDL|STL|scratch_",
}


WIDTH = 160  # of the table, in characters


class Instruction(NamedTuple):
    address: int  # or number of the line
    name: str
    operands: str
    target: int | None = None  # of a branch


class Report(NamedTuple):
    registers: int
    shared_bytes: int
    spilled_bytes: int
    unequal_sums: int  # see `count_unequal_sums`; 0 except on CUDA
    loop: Counter  # instructions of a lane for a tile, by class
    states: int  # that a lane computes for a tile; 0 if the kernel computes none, or the code has an unknown form

    def per_state(self, name: str) -> float:
        count = sum(self.loop.values()) if name == "all" else self.loop[name]
        return count / self.states


def compile_kernel(name: str, target: str, dtype: str = "fp32", state_size: int = 16, rank: int = 3) -> Report:
    """Compile a kernel with the options of the host code.

    Args:
        name: A key of `KERNELS`.
        target: A key of `TARGETS`.
        dtype: Triton's name of the feature map's dtype: `"fp32"`, `"bf16"` or `"fp16"`.
        state_size: States per channel.
        rank: Rank of the projection to the time steps.
    """
    kernel, gpu = KERNELS[name], TARGETS[target]
    capability = gpu.arch if gpu.backend == "cuda" else 0
    config = host.find_config(triton_device.Device(gpu.backend, gpu.warp_size, capability, multiprocessors=1))
    is_matrix, is_scan_bwd = name in MATRIX_KERNELS, name == "scan_bwd"
    tile = config.backward_tile if name in BACKWARD_KERNELS else config.forward_tile
    channels = config.backward_channels if is_scan_bwd else config.forward_channels
    values = {
        "N": state_size,
        "FIRST_STATE": 0,
        "STATES": min(state_size, config.states),
        "R": rank,
        "T": tile,
        "CHUNKS": tile,
        "CHANNELS": host.MATRIX_CHANNELS if is_matrix else channels,
        "LANE_CHANNELS": channels // gpu.warp_size,
        "STEPS": config.projected_steps if name == "project_fwd" else host.MATRIX_STEPS,
        "DEPTH": host.MATRIX_DEPTH,
        "OUTPUTS": host.MATRIX_OUTPUTS,
        "PRECISION": config.precision,
        "LONG_LINES": not is_matrix,
        "WIDE": False,
    }
    maps = {"u", "y", "grad"} | ({"grad_u"} if name == "project_bwd_input" else set())
    if name in NORM_BLOCK_ELEMENTS:
        values |= layer_norm_triton.block_sizes(NORM_CHANNELS, NORM_BLOCK_ELEMENTS[name])
        maps |= {"x", "gate", "grad_x", "grad_gate"}
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        if parameter.is_constexpr:
            signature[parameter.name], constants[i,] = "constexpr", values[parameter.name]
        elif parameter.name in INTEGERS or "stride" in parameter.name:
            signature[parameter.name] = "i32"
            # num_rows is the only one that is not specialized
            if name in NORM_BLOCK_ELEMENTS and NORM_CHANNELS % 16 == 0 and parameter.name != "num_rows":
                attributes[i,] = [["tt.divisibility", 16]]
        elif parameter.name == "eps":
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = f"*{dtype}" if parameter.name in maps else "*fp32"
            attributes[i,] = [["tt.divisibility", 16]]  # like PyTorch's memory
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=gpu, options=OPTIONS.get(name, host.ONE_WARP))

    if gpu.backend == "cuda":
        registers, spilled, code = read_cubin(compiled.asm["cubin"])
    else:
        registers, spilled, code = read_amdgcn(compiled.asm["amdgcn"])
    unequal = count_unequal_sums(code)
    if name not in KERNELS_OF_STATES:
        return Report(registers, compiled.metadata.shared, spilled, unequal, Counter(), states=0)
    steps = tile * channels // gpu.warp_size  # of a lane, in a tile
    # scan_bwd_kernel has two separate loops over states
    num_loops, unrolled, repeated = (2, 1, state_size) if is_scan_bwd else (1, values["STATES"], 1)
    loop = count_tile(code, num_loops, steps * unrolled, repeated)
    states = steps * unrolled * repeated if loop else 0
    return Report(registers, compiled.metadata.shared, spilled, unequal, loop, states)


def read_cubin(cubin: bytes) -> tuple[int, int, list[Instruction]]:
    """Return registers, bytes of stack (spills), and code."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
        sass = subprocess.run([tool, "-sass", path], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ +)?([A-Z][\w.]*)([^;]*);", sass)
    code = []
    for address, name, operands in lines:
        target = re.search(r"0x([0-9a-f]+)", operands) if name.startswith("BRA") else None
        code.append(Instruction(int(address, 16), name, operands, int(target[1], 16) if target else None))
    return registers, stack, code


def read_amdgcn(text: str) -> tuple[int, int, list[Instruction]]:
    """Return the same as `read_cubin`, with line numbers as addresses.

    Scalar registers spill into vector registers, which count.
    """
    registers = int(re.search(r"\.vgpr_count: +(\d+)", text)[1])
    spilled = 4 * int(re.search(r"\.vgpr_spill_count: +(\d+)", text)[1])
    lines = text.splitlines()
    labels = {line.split(":")[0]: i for i, line in enumerate(lines) if re.match(r"\.LBB\w+:", line)}
    code = []
    for i, line in enumerate(lines):
        if match := re.match(r"\s+([sv]_\w+|global_\w+|buffer_\w+|ds_\w+|scratch_\w+)(.*)", line):
            target = re.search(r"(\.LBB\w+)", match[2]) if "branch" in match[1] else None
            name = match[1] + ("_dpp" if "row_" in match[2] else "")
            code.append(Instruction(i, name, match[2], labels[target[1]] if target else None))
    return registers, spilled, code


def count_unequal_sums(code: list[Instruction]) -> int:
    """Return the number of sums of two lanes in which each lane fuses its own product: fma(a, b, value of the other).

    The lanes of the pair round differently. A sum over lanes is a butterfly of SHFL.BFLY in the code of CUDA.
    """

    def find_registers(operand: str, is_pair: bool) -> set[int]:
        first = {int(number) for number in re.findall(r"\bR(\d+)", operand)}
        return first | {number + 1 for number in first} if is_pair else first

    count = 0
    for i, instruction in enumerate(code):
        if not instruction.name.startswith("SHFL.BFLY"):
            continue
        _predicate, result, *_ = instruction.operands.split(",")
        (received,) = find_registers(result, is_pair=False)
        for later in code[i + 1 :]:
            result, *sources = later.operands.split(",")
            if any(received in find_registers(source, "F32x2" in source) for source in sources):
                count += later.name.startswith("FFMA")
                break
            if received in find_registers(result, later.name.endswith("2")):  # such as FADD2
                break
    return count


def count_tile(code: list[Instruction], num_loops: int, states: int, repeats: int) -> Counter:
    """Return the instructions of a tile by class, from the innermost loops with an exponential per state.

    A loop that repeats for a tile counts `repeats` times, plus the code around it in the loop over tiles. In that
    code, loops over the rank count once. The result is empty if there are not `num_loops` such loops.
    """

    def count(first: int, last: int) -> Counter:
        instructions = (instruction for instruction in code if first <= instruction.address <= last)
        return Counter(
            next((name for name, form in CLASSES.items() if re.match(form, instruction.name)), "other")
            for instruction in instructions
        )

    branches = ((instruction.target, instruction.address) for instruction in code if instruction.target is not None)
    loops = [(target, address) for target, address in branches if target < address]
    counts = {loop: count(*loop) for loop in loops}

    def is_inside(loop: tuple[int, int], other: tuple[int, int]) -> bool:
        return loop != other and other[0] <= loop[0] and loop[1] <= other[1]

    # preparing loops store everything that they compute
    with_states = [loop for loop in counts if counts[loop]["exp"] >= max(states, 2 * counts[loop]["store"])]
    innermost = [loop for loop in with_states if not any(is_inside(other, loop) for other in with_states)]
    total = Counter()
    for loop in innermost if len(innermost) == num_loops else []:
        total += counts[loop]
        if repeats > 1:
            times = repeats / (counts[loop]["exp"] // states) - 1  # the compiler may have unrolled the loop
            total += Counter({name: times * number for name, number in counts[loop].items()})
            surrounding = [other for other in counts if is_inside(loop, other)]
            around = min(surrounding, key=lambda other: other[1] - other[0], default=loop)
            total += counts[around] - counts[loop]
    return total


def describe(report: Report) -> dict[str, object]:
    """Return the columns of a report. Instructions are per state."""
    counts = {
        "registers": report.registers,
        "shared": report.shared_bytes,
        "spilled": report.spilled_bytes,
        "unequal": report.unequal_sums,
    }
    per_state = {name: report.per_state(name) if report.states else None for name in (*CLASSES, "other", "all")}
    return counts | per_state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), help="default: all")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS), help="default: all")
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=["fp32", "bf16", "fp16"],
        default=["fp32", "bf16"],
        help="dtypes of the feature map; default: fp32 bf16",
    )
    parser.add_argument("--state-size", type=int, default=16, metavar="N", help="default: 16")
    parser.add_argument("--rank", type=int, default=3, metavar="R", help="default: 3")
    parser.add_argument(
        "--output-dir", type=Path, default=RESULTS_DIR, help="directory of the CSV file; default: benchmarks/results"
    )
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("Triton's interpreter compiles nothing: unset TRITON_INTERPRET")

    rows = [
        {"kernel": name, "target": target, "dtype": dtype}
        | describe(compile_kernel(name, target, dtype, arguments.state_size, arguments.rank))
        for dtype in arguments.dtypes
        for name in arguments.kernels
        for target in arguments.targets
    ]
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*map(format_value, row.values()))
    Console(width=WIDTH).print(table)
    version = ".".join(triton.__version__.split(".")[:2])
    environment = {"triton": triton.__version__, "N": str(arguments.state_size), "R": str(arguments.rank)}
    write_csv(arguments.output_dir / f"triton_report_{version}.csv", rows, environment)


if __name__ == "__main__":
    main()
