"""Time the Triton kernels with constants other than the committed ones, which are marked.

Put the fastest values of a device into `CONFIGS` of `atrous_selective_scan_triton.py`, and add a line to NOTES.md.

Tile and channels of a pass vary together, since both take registers. The number of programs that chunks are cut for,
the precision of products in float32, and `CHUNK_COST` vary alone. `CHUNK_COST` limits the chunks of small batches, so
its default feature maps have batches of 1 and 4.

Example:
    python benchmarks/bench_triton_configs.py --vary chunk_cost --output-dir build/bench
    python benchmarks/bench_triton_configs.py --vary forward_tile backward_tile --shapes 1,56,56,96 128,28,28,192
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from bench_operator import Shape, make_inputs, parse_shape
from measure import RESULTS_DIR, describe_environment, median_times, parse_gpu, print_table, write_csv

from evmamba_kernels import atrous_selective_scan_triton as kernels


TILES_AND_CHANNELS = [(4, 32), (4, 64), (4, 128), (8, 32), (8, 64), (16, 32)]
VARIATIONS = {
    "forward_tile": [{"forward_tile": tile, "forward_channels": channels} for tile, channels in TILES_AND_CHANNELS],
    "backward_tile": [{"backward_tile": tile, "backward_channels": channels} for tile, channels in TILES_AND_CHANNELS],
    "forward_programs": [{"forward_programs": programs} for programs in (1, 4, 8, 11, 16, 32)],
    "backward_programs": [{"backward_programs": programs} for programs in (1, 4, 8, 16, 32)],
    "precision": [{"precision": precision} for precision in ("tf32x3", "ieee")],
    "chunk_cost": [{"chunk_cost": 4.0**power} for power in range(-6, 3)],
}
SIZES = ((56, 56, 96), (28, 28, 192), (28, 28, 384))  # the smallest and largest of T and B


class Candidate(NamedTuple):
    """Constants of `atrous_selective_scan_triton.py`."""

    config: kernels.Config
    chunk_cost: float = kernels.CHUNK_COST


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vary", nargs="+", choices=VARIATIONS, default=list(VARIATIONS), help="default: all")
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=parse_shape,
        metavar="B,H,W,D",
        help="shapes of the feature maps; default: the smallest and largest of T and B in batches of 1 and 128, "
        "or 1 and 4 for chunk_cost",
    )
    parser.add_argument("--state-size", type=int, default=16, metavar="N", help="states per channel; default: 16")
    parser.add_argument("--repeats", type=int, default=30, help="rounds to take the median of; default: 30")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        default="float32",
        help="dtype of the feature map; default: float32",
    )
    parser.add_argument("--device", type=parse_gpu, default="cuda", help="default: cuda")
    parser.add_argument(
        "--output-dir", type=Path, default=RESULTS_DIR, help="directory of the CSV file; default: benchmarks/results"
    )
    return parser.parse_args()


def default_shapes(field: str) -> list[Shape]:
    """Return the feature maps on which a field matters. Few programs leave room for chunks in small batches alone."""
    return [(batch, *size) for batch in ((1, 4) if field == "chunk_cost" else (1, 128)) for size in SIZES]


def find_candidates(key: tuple, field: str) -> dict[str, Candidate]:
    """Return the committed constants, and their variations in whole warps."""
    committed, (backend, warp_size, _) = Candidate(kernels.CONFIGS[key]), key
    candidates = {"committed": committed}
    for variation in VARIATIONS[field]:
        if field == "chunk_cost":
            candidate = committed._replace(**variation)
        else:
            candidate = committed._replace(config=committed.config._replace(**variation))
        config = candidate.config
        is_whole_warps = config.forward_channels % warp_size == config.backward_channels % warp_size == 0
        is_known = config.precision == "ieee" or backend == "cuda"
        if is_whole_warps and is_known and candidate != committed:
            candidates[", ".join(f"{name} = {value}" for name, value in variation.items())] = candidate
    return candidates


def run_with(candidate: Candidate, key: tuple, function: Callable, *arguments: torch.Tensor) -> object:
    committed = Candidate(kernels.CONFIGS[key], kernels.CHUNK_COST)
    kernels.CONFIGS[key], kernels.CHUNK_COST = candidate
    try:
        return function(*arguments)
    finally:
        kernels.CONFIGS[key], kernels.CHUNK_COST = committed


def measure_field(field: str, shape: Shape, key: tuple, arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Return a row per candidate, with the chunks of a sequence and the times of both passes."""
    dtype = getattr(torch, arguments.dtype)
    inputs = [tensor.detach() for tensor in make_inputs(shape, arguments.state_size, arguments.device, dtype)]
    grad = torch.randn_like(inputs[0])
    candidates = find_candidates(key, field)
    methods = {}
    for name, candidate in candidates.items():
        methods[name, "forward"] = partial(run_with, candidate, key, kernels.forward, *inputs)
        methods[name, "backward"] = partial(run_with, candidate, key, kernels.backward, grad, *inputs)
    shape_name = "x".join(map(str, shape))
    seconds = median_times(methods, arguments.repeats, f"{field} {shape_name}", pause=0)
    return [
        {
            "constant": field,
            "shape": shape_name,
            "value": name,
            "forward chunks": run_with(candidate, key, kernels.make_plan, inputs[0]).num_chunks,
            "forward ms": 1e3 * seconds[name, "forward"],
            "backward chunks": run_with(candidate, key, partial(kernels.make_plan, inputs[0], True)).num_chunks,
            "backward ms": 1e3 * seconds[name, "backward"],
        }
        for name, candidate in candidates.items()
    ]


def main() -> None:
    arguments = parse_arguments()
    device = kernels.describe_device(arguments.device)
    config = kernels.find_config(device)
    (key,) = [key for key, value in kernels.CONFIGS.items() if value is config]
    environment = describe_environment() | {"repeats": str(arguments.repeats), "dtype": arguments.dtype}
    suffix = arguments.device.type if arguments.dtype == "float32" else f"{arguments.device.type}_{arguments.dtype}"
    for field in arguments.vary:
        rows = []
        for shape in arguments.shapes or default_shapes(field):
            rows += measure_field(field, shape, key, arguments)
        print_table(f"{field} on {device}", rows)
        write_csv(arguments.output_dir / f"triton_{field}_{suffix}.csv", rows, environment)


if __name__ == "__main__":
    main()
