"""Time the Triton kernels with configurations other than the committed one, which is marked.

Put the fastest one of a device into `CONFIGS` of `atrous_selective_scan_triton.py`, and add a line to NOTES.md.

Tile and channels of a pass vary together, since both take registers. The number of programs that chunks are cut for,
and the precision of products in float32, vary alone.

Example:
    python benchmarks/bench_triton_configs.py --shapes 1,56,56,96 128,28,28,192
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from bench_operator import make_inputs, parse_shape
from measure import RESULTS_DIR, describe_environment, median_times, parse_device, print_table, write_csv

from evmamba_kernels import atrous_selective_scan_triton as kernels


TILES_AND_CHANNELS = [(4, 32), (4, 64), (4, 128), (8, 32), (8, 64), (16, 32)]
VARIATIONS = [
    *({"forward_tile": tile, "forward_channels": channels} for tile, channels in TILES_AND_CHANNELS),
    *({"backward_tile": tile, "backward_channels": channels} for tile, channels in TILES_AND_CHANNELS),
    *({"forward_programs": programs} for programs in (1, 4, 8, 11, 16, 32)),
    *({"backward_programs": programs} for programs in (1, 4, 8, 16, 32)),
    *({"precision": precision} for precision in ("tf32x3", "ieee")),
]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=parse_shape,
        default=[(batch, *size) for batch in (1, 128) for size in ((56, 56, 96), (28, 28, 192), (28, 28, 384))],
        metavar="B,H,W,D",
        help="shapes of the feature maps; default: the smallest and largest of T and B in batches of 1 and 128",
    )
    parser.add_argument("--state-size", type=int, default=16, metavar="N", help="states per channel; default: 16")
    parser.add_argument("--repeats", type=int, default=30, help="rounds to take the median of; default: 30")
    parser.add_argument("--device", type=parse_device, default="cuda", help="default: cuda")
    parser.add_argument(
        "--output-dir", type=Path, default=RESULTS_DIR, help="directory of the CSV file; default: benchmarks/results"
    )
    return parser.parse_args()


def find_candidates(key: tuple) -> dict[str, kernels.Config]:
    """Returns the committed configuration, and its variations in whole warps."""
    committed, (backend, warp_size, _) = kernels.CONFIGS[key], key
    candidates = {"committed": committed}
    for variation in VARIATIONS:
        candidate = committed._replace(**variation)
        is_whole_warps = candidate.forward_channels % warp_size == candidate.backward_channels % warp_size == 0
        is_known = candidate.precision == "ieee" or backend == "cuda"
        if is_whole_warps and is_known and candidate != committed:
            candidates[", ".join(f"{field} = {value}" for field, value in variation.items())] = candidate
    return candidates


def run_with(config: kernels.Config, key: tuple, function, *arguments: torch.Tensor) -> None:
    committed = kernels.CONFIGS[key]
    kernels.CONFIGS[key] = config
    try:
        function(*arguments)
    finally:
        kernels.CONFIGS[key] = committed


def main() -> None:
    arguments = parse_arguments()
    device = kernels.describe_device(arguments.device)
    config = kernels.find_config(device)
    (key,) = [key for key, value in kernels.CONFIGS.items() if value is config]
    candidates = find_candidates(key)
    rows = []
    for shape in arguments.shapes:
        inputs = [tensor.detach() for tensor in make_inputs(shape, arguments.state_size, arguments.device)]
        grad = torch.randn_like(inputs[0])
        methods = {}
        for name, candidate in candidates.items():
            methods[name, "forward"] = partial(run_with, candidate, key, kernels.forward, *inputs)
            methods[name, "backward"] = partial(run_with, candidate, key, kernels.backward, grad, *inputs)
        shape_name = "x".join(map(str, shape))
        seconds = median_times(methods, arguments.repeats, shape_name)
        rows += [
            {
                "shape": shape_name,
                "configuration": name,
                **{f"{pass_name} ms": 1e3 * seconds[name, pass_name] for pass_name in ("forward", "backward")},
            }
            for name in candidates
        ]
    print_table(f"Configurations on {device}", rows)
    environment = describe_environment() | {"repeats": str(arguments.repeats)}
    write_csv(arguments.output_dir / f"triton_configs_{arguments.device.type}.csv", rows, environment)


if __name__ == "__main__":
    main()
