"""Measure latency and memory of EfficientVMamba-T (random weights) on growing images.

The network runs as loaded, with both backends, and as an optimized copy in each dtype.

Example:
    python benchmarks/bench_image_sizes.py --repeats 5 --image-sizes 224 512
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from measure import (
    RESULTS_DIR,
    describe_environment,
    in_fresh_process,
    median_times,
    peak_memory,
    print_table,
    return_freed_memory,
    write_csv,
)
from networks import create_ours, run_model
from torch import nn

from evmamba_kernels import use_backend
from modeling_evmamba import optimize_for_inference


CPU = torch.device("cpu")
LOADED = "EfficientVMamba-T"
OPTIMIZED = {  # dtypes of optimized copies
    "EfficientVMamba-T, optimized": torch.float32,
    "EfficientVMamba-T, optimized in bfloat16": torch.bfloat16,
    "EfficientVMamba-T, optimized in int8": torch.int8,
}
METHODS = [(LOADED, "numba"), *((name, "numba") for name in OPTIMIZED), (LOADED, "torch")]  # (network, backend)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--image-sizes",
        nargs="+",
        type=int,
        default=[224, 384, 512, 768, 1024],
        metavar="SIZE",
        help="default: 224 384 512 768 1024",
    )
    parser.add_argument("--repeats", type=int, default=30, help="rounds to take the median of; default: 30")
    parser.add_argument(
        "--output-dir", type=Path, default=RESULTS_DIR, help="directory of the CSV file; default: benchmarks/results"
    )
    return parser.parse_args()


def run_on_backend(model: nn.Module, images: torch.Tensor, backend: str) -> object:
    with use_backend(backend):
        return run_model(model, images)


def create(name: str) -> nn.Module:
    model = create_ours("tiny")
    return optimize_for_inference(model, OPTIMIZED[name]) if name in OPTIMIZED else model


def measure_memory(name: str, image_size: int, backend: str) -> float:
    """Return the peak memory of one forward pass. Call it in a fresh process."""
    model = create(name)
    run_on_backend(model, torch.randn(1, 3, 32, 32), backend)  # compiles, and starts the threads
    return_freed_memory()
    return peak_memory(partial(run_on_backend, model, torch.randn(1, 3, image_size, image_size), backend), CPU)


def measure_image_sizes(image_sizes: list[int], repeats: int) -> list[dict[str, object]]:
    models = {name: create(name) for name, _ in METHODS}
    methods = {
        (name, backend, size): partial(run_on_backend, models[name], torch.randn(1, 3, size, size), backend)
        for name, backend in METHODS
        for size in image_sizes
    }
    seconds = median_times(methods, repeats, "growing images")
    rows = []
    for name, backend in METHODS:
        first = seconds[name, backend, image_sizes[0]] / image_sizes[0] ** 2
        for size in image_sizes:
            per_pixel = seconds[name, backend, size] / size**2
            rows.append(
                {
                    "network": name,
                    "backend": backend,
                    "image": size,
                    "median ms": 1e3 * seconds[name, backend, size],
                    "ns per pixel": 1e9 * per_pixel,
                    f"relative to {image_sizes[0]}": per_pixel / first,
                    "peak MiB": in_fresh_process(measure_memory, name, size, backend) / 2**20,
                }
            )
    return rows


def main() -> None:
    arguments = parse_arguments()
    environment = describe_environment() | {"repeats": str(arguments.repeats)}
    torch.manual_seed(0)
    rows = measure_image_sizes(arguments.image_sizes, arguments.repeats)
    print_table("Growing images", rows)
    write_csv(arguments.output_dir / "model_image_sizes.csv", rows, environment)


if __name__ == "__main__":
    main()
