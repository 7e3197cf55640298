"""Times the Triton kernels with other configurations than the committed one, which is marked. What is the fastest on a
device belongs into `CONFIGS` of `atrous_selective_scan_triton.py`, with a line in NOTES.md.

Forward and backward tiles and channels are varied one at a time, so are the programs that chunks are cut for.

Example:
    python benchmarks/bench_triton_configs.py --shapes 1,56,56,96 128,28,28,192
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from bench_operator import make_inputs, parse_shape
from measure import RESULTS_DIR, describe_environment, median_times, print_table, write_csv

from evmamba_kernels import atrous_selective_scan_triton as kernels


VARIATIONS = {
    "forward_tile": (4, 8, 16),
    "forward_channels": (32, 64, 128),
    "backward_tile": (4, 8, 16),
    "backward_channels": (32, 64, 128),
    "programs_per_multiprocessor": (1, 4, 8, 11, 16, 32),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=parse_shape,
        default=[(batch, *size) for batch in (1, 128) for size in ((56, 56, 96), (28, 28, 192), (28, 28, 384))],
        metavar="B,H,W,D",
        help="maps to scan; default: batches of 1 and 128 of the smallest and largest of T and B",
    )
    parser.add_argument("--state-size", type=int, default=16, metavar="N", help="states per channel; default: 16")
    parser.add_argument("--repeats", type=int, default=30, help="rounds of which the median is taken; default: 30")
    parser.add_argument("--device", type=torch.device, default="cuda", help="default: cuda")
    parser.add_argument(
        "--output-dir", type=Path, default=RESULTS_DIR, help="folder of the CSV file; default: benchmarks/results"
    )
    return parser.parse_args()


def find_candidates(key: tuple) -> dict[str, kernels.Config]:
    """The committed configuration, and those that differ from it in one value."""
    committed = kernels.CONFIGS[key]
    candidates = {"committed": committed}
    for field, values in VARIATIONS.items():
        for value in values:
            is_whole_warps = "channels" not in field or value % key[1] == 0
            if is_whole_warps and value != getattr(committed, field):
                candidates[f"{field} = {value}"] = committed._replace(**{field: value})
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
        seconds = median_times(methods, arguments.repeats, arguments.device, shape_name)
        rows += [
            {
                "shape": shape_name,
                "configuration": name,
                **{f"{pass_name} ms": 1e3 * seconds[name, pass_name] for pass_name in ("forward", "backward")},
            }
            for name in candidates
        ]
    print_table(f"Configurations on {device}", rows)
    environment = describe_environment(arguments.device) | {"repeats": str(arguments.repeats)}
    write_csv(arguments.output_dir / f"triton_configs_{arguments.device.type}.csv", rows, environment)


if __name__ == "__main__":
    main()
