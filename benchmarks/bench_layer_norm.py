"""Time the GPU kernel of the gated LayerNorm against PyTorch's operators, on feature maps of growing size.

The result is a value of `SMALLEST_MAP_ON_GPU` in `layer_norm.py`: from which size on the kernel is faster. Calls
follow each other without waiting for the device, as in a network. So a call takes the longer of its times on host and
device.

Example:
    python benchmarks/bench_layer_norm.py --dtypes float32 --channels 192
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from measure import (
    RESULTS_DIR,
    console,
    describe_environment,
    median_times,
    parse_gpu,
    print_table,
    write_csv,
)

from evmamba_kernels import layer_norm


METHODS = {"kernel": layer_norm.gated_on_gpu_operator, "PyTorch": layer_norm.gated_in_pytorch}
MODES = ("forward", "forward + backward")
CALLS = 20  # that follow each other
EPS = 1e-5

Row = dict[str, object]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--kib",
        nargs="+",
        type=int,
        default=[2**power for power in range(8, 18)],
        metavar="SIZE",
        help="sizes of the feature map in KiB; default: powers of two from 256 to 131072",
    )
    parser.add_argument("--channels", nargs="+", type=int, default=[96, 384], metavar="D", help="default: 96 384")
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=["float32", "bfloat16", "float16"],
        default=["float32", "bfloat16"],
        help="default: float32 bfloat16",
    )
    parser.add_argument("--repeats", type=int, default=20, help="rounds to take the median of; default: 20")
    parser.add_argument("--device", type=parse_gpu, default="cuda", help="default: cuda")
    parser.add_argument(
        "--output-dir", type=Path, default=RESULTS_DIR, help="directory of the CSV file; default: benchmarks/results"
    )
    return parser.parse_args()


def make_tensors(kib: int, channels: int, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    """Return a feature map of about `kib` KiB, its gate, weight and bias."""
    rows = max(1, round(kib * 2**10 / (channels * dtype.itemsize)))
    sizes = ((rows, channels), (rows, channels), (channels,), (channels,))
    return [torch.randn(size, device=device, dtype=dtype, requires_grad=True) for size in sizes]


def run(method: Callable, mode: str, tensors: list[torch.Tensor], grad: torch.Tensor) -> None:
    for _ in range(CALLS):
        if mode == "forward":
            with torch.inference_mode():
                method(*tensors, EPS)
        else:
            torch.autograd.grad(method(*tensors, EPS), tensors, grad)


def measure_size(kib: int, channels: int, dtype: str, arguments: argparse.Namespace) -> list[Row]:
    """Return a row for each pass over a feature map."""
    tensors = make_tensors(kib, channels, getattr(torch, dtype), arguments.device)
    grad = torch.randn_like(tensors[0])
    methods = {
        (name, mode): partial(run, method, mode, tensors, grad) for name, method in METHODS.items() for mode in MODES
    }
    seconds = median_times(methods, arguments.repeats, f"{dtype} {channels} x {kib} KiB", pause=0)
    return [
        {"dtype": dtype, "channels": channels, "pass": mode, "KiB": kib}
        | {f"{name} us": 1e6 * seconds[name, mode] / CALLS for name in METHODS}
        for mode in MODES
    ]


def find_threshold(rows: list[Row]) -> int | None:
    """Return the size in KiB from which on the kernel is faster in all rows, or None if it never is."""
    threshold = None
    for kib in sorted({row["KiB"] for row in rows}, reverse=True):
        if any(row["kernel us"] >= row["PyTorch us"] for row in rows if row["KiB"] == kib):
            break
        threshold = kib
    return threshold


def main() -> None:
    arguments = parse_arguments()
    rows = [
        row
        for dtype in arguments.dtypes
        for channels in arguments.channels
        for kib in arguments.kib
        for row in measure_size(kib, channels, dtype, arguments)
    ]
    print_table("Gated LayerNorm", rows)
    for mode in MODES:
        threshold = find_threshold([row for row in rows if row["pass"] == mode])
        result = "is never faster" if threshold is None else f"is faster from {threshold} KiB on"
        console.print(f"{mode}: the kernel {result}")
    environment = describe_environment() | {"repeats": str(arguments.repeats)}
    write_csv(arguments.output_dir / f"layer_norm_{arguments.device.type}.csv", rows, environment)


if __name__ == "__main__":
    main()
