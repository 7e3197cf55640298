"""Time the backends of the atrous selective scan against the plain recurrence, mambapy, and mamba_ssm on CUDA.

All methods take turns in every round, after a comparison of their outputs and gradients. On CUDA, the table also has
peak memory, and the lower bound by bytes and exponentials, at the device's measured rates.

Example:
    python benchmarks/bench_operator.py --repeats 5 --shapes 1,28,28,192
"""

import argparse
import math
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import matplotlib
import torch
from baselines import mamba_ssm_scan, mambapy_pscan, plain_recurrence
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from measure import (
    RESULTS_DIR,
    console,
    describe_environment,
    in_fresh_process,
    median_times,
    parse_device,
    pause_for,
    peak_memory,
    print_table,
    save_figure,
    write_csv,
)

from evmamba_kernels import atrous_selective_scan, choose_backend
from evmamba_kernels.atrous_selective_scan_reference import random_arguments
from evmamba_kernels.backends import BACKENDS


PLAIN = "plain recurrence"
MAMBAPY = "mambapy pscan"
MAMBA_SSM = "mamba_ssm"
BASELINES = {PLAIN: plain_recurrence, MAMBAPY: mambapy_pscan, MAMBA_SSM: mamba_ssm_scan}
MODES = ("forward", "forward + backward")
# Relative to the largest value. Float32 sums over pixels in different orders (measured: below 1e-5). The other dtypes
# round the feature map.
LARGEST_DIFFERENCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3}

Shape = tuple[int, int, int, int]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=parse_shape,
        default=[(1, 56, 56, 96), (8, 56, 56, 96), (1, 28, 28, 192)],
        metavar="B,H,W,D",
        help="shapes of the feature maps; default: 1,56,56,96 8,56,56,96 1,28,28,192, stages 1 and 2 of "
        "EfficientVMamba-T",
    )
    parser.add_argument("--state-size", type=int, default=16, metavar="N", help="states per channel; default: 16")
    parser.add_argument("--repeats", type=int, default=30, help="rounds to take the median of; default: 30")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        default="float32",
        help="dtype of the feature map; default: float32",
    )
    parser.add_argument(
        "--baselines",
        nargs="+",
        choices=BASELINES,
        default=list(BASELINES),
        help="baselines to time if they are installed; the first one is the reference for results and times",
    )
    parser.add_argument("--device", type=parse_device, default="cpu", help="cpu (default), cuda, ...")
    parser.add_argument(
        "--scaling", action="store_true", help="also measure time per pixel and peak memory of growing feature maps"
    )
    parser.add_argument(
        "--sides",
        nargs="+",
        type=int,
        default=[56, 112, 224, 256],
        metavar="SIDE",
        help="heights and widths for --scaling; default: 56 112 224 256, for images of 224 to 1024 pixels",
    )
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=RESULTS_DIR,
        help="directory of the CSV files and the plot; default: benchmarks/results",
    )
    return parser.parse_args()


def parse_shape(text: str) -> Shape:
    shape = tuple(map(int, text.split(",")))
    if len(shape) != 4:
        raise argparse.ArgumentTypeError(f"a shape must be four integers B,H,W,D, got {text}")
    return shape


def find_backends(device: torch.device) -> list[str]:
    backends = []
    for name in [*BACKENDS, "torch"]:
        try:
            choose_backend(device.type, torch.float32, name)
        except (ValueError, ImportError) as error:
            console.print(f"without {name}: {error}", soft_wrap=True)
        else:
            backends.append(name)
    return backends


def find_baselines(names: list[str], device: torch.device) -> list[str]:
    baselines = []
    for name in names:
        package = {MAMBAPY: "mambapy", MAMBA_SSM: "mamba_ssm"}.get(name)
        if package and not find_spec(package):
            console.print(f"without {name}: {package} is not installed")
        elif name == MAMBA_SSM and device.type != "cuda":
            console.print(f"without {name}: it supports CUDA only")
        else:
            baselines.append(name)
    return baselines


def get_method(name: str) -> Callable:
    return BASELINES.get(name) or partial(atrous_selective_scan, backend=name)


def make_inputs(
    shape: Shape, state_size: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    """Return random arguments with the sizes of a network. The feature map has the `dtype`."""
    rank = math.ceil(shape[-1] / 32)  # a sixteenth of the stage's channels, and D is twice the channels
    inputs = random_arguments(*shape, state_size, rank, dtype=dtype, device=device)
    return [tensor.requires_grad_() for tensor in inputs]


def run_forward(method: Callable, inputs: list[torch.Tensor]) -> torch.Tensor:
    with torch.inference_mode():
        return method(*inputs)


def run_forward_backward(method: Callable, inputs: list[torch.Tensor], grad: torch.Tensor) -> list[torch.Tensor]:
    output = method(*inputs)
    return [output, *torch.autograd.grad(output, inputs, grad)]


def check_equality(name: str, results: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """Check that the outputs and all gradients agree.

    Raises:
        AssertionError: If they differ.
    """
    bound = LARGEST_DIFFERENCE[expected[0].dtype]
    for result, reference in zip(results, expected, strict=True):
        difference = ((result - reference).abs().max() / reference.abs().max()).item()
        assert difference < bound, f"{name} differs from the first baseline by {difference:.1e}"


def measure_shape(
    shape: Shape, names: list[str], arguments: argparse.Namespace, limits=None
) -> list[dict[str, object]]:
    """Return the rows of a shape. `limits` are the `gpu_limits.Limits` of a GPU, or None on a CPU."""
    inputs = make_inputs(shape, arguments.state_size, arguments.device, getattr(torch, arguments.dtype))
    grad = torch.randn_like(inputs[0])
    reference = next((name for name in names if name in BASELINES), "torch")
    expected = run_forward_backward(get_method(reference), inputs, grad)
    shape_name = "x".join(map(str, shape))
    methods = {}
    for name in names:
        method = get_method(name)
        try:
            results = run_forward_backward(method, inputs, grad)
        except torch.OutOfMemoryError:
            console.print(f"without {name} at {shape_name}: the device's memory is too small")
            continue
        check_equality(name, results, expected)
        methods[name, "forward"] = partial(run_forward, method, inputs)
        methods[name, "forward + backward"] = partial(run_forward_backward, method, inputs, grad)
    seconds = median_times(methods, arguments.repeats, shape_name, pause=pause_for(arguments.device))
    rows = [
        {
            "shape": shape_name,
            "pass": mode,
            "method": name,
            "median ms": 1e3 * seconds[name, mode],
            f"{reference.split()[0]} / this": seconds[reference, mode] / seconds[name, mode],
        }
        for mode in MODES
        for name in names
        if (name, mode) in methods
    ]
    if limits is not None:
        for row in rows:
            is_training = row["pass"] == "forward + backward"
            floor = limits.find_floor(shape, arguments.state_size, inputs[0].element_size(), is_training)
            row["floor ms"] = 1e3 * floor.seconds
            row["binds"] = floor.binding
            row["floor / this"] = floor.seconds / seconds[row["method"], row["pass"]]
            # on CPUs, this needs a fresh process
            row["peak MiB"] = peak_memory(methods[row["method"], row["pass"]], arguments.device) / 2**20
    return rows


def measure_memory(name: str, side: int, state_size: int, device: torch.device) -> float:
    """Return the peak memory of one forward pass. Call it in a fresh process."""
    method = get_method(name)
    run_forward(method, make_inputs((1, 4, 4, 96), state_size, device))  # compiles, and starts the threads
    return peak_memory(partial(run_forward, method, make_inputs((1, side, side, 96), state_size, device)), device)


def measure_scaling(names: list[str], arguments: argparse.Namespace) -> list[dict[str, object]]:
    methods = {
        (name, side): partial(
            run_forward, get_method(name), make_inputs((1, side, side, 96), arguments.state_size, arguments.device)
        )
        for name in names
        for side in arguments.sides
    }
    seconds = median_times(methods, arguments.repeats, "growing maps", pause=pause_for(arguments.device))
    rows = []
    for name in names:
        first = seconds[name, arguments.sides[0]] / arguments.sides[0] ** 2
        for side in arguments.sides:
            memory = in_fresh_process(measure_memory, name, side, arguments.state_size, arguments.device)
            per_pixel = seconds[name, side] / side**2
            rows.append(
                {
                    "shape": f"1x{side}x{side}x96",
                    "method": name,
                    "median ms": 1e3 * seconds[name, side],
                    "ns per pixel": 1e9 * per_pixel,
                    f"relative to {arguments.sides[0]}": per_pixel / first,
                    "peak MiB": memory / 2**20,
                }
            )
    return rows


def plot(rows: list[dict[str, object]], names: list[str], environment: dict[str, str]) -> Figure:
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    figure, axes = plt.subplots(1, len(MODES), figsize=(11, 4), sharey=True, layout="constrained")
    width = 0.8 / len(names)
    for ax, mode in zip(axes, MODES, strict=True):
        for i, name in enumerate(names):
            heights = [row["median ms"] for row in rows if (row["pass"], row["method"]) == (mode, name)]
            places = [place + (i - (len(names) - 1) / 2) * width for place in range(len(shapes))]
            bars = ax.bar(places, heights, width, label=name)
            ax.bar_label(bars, fmt="{:.3g}", fontsize=7)
        ax.set(title=mode, yscale="log", xticks=range(len(shapes)), xticklabels=shapes)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("median time in ms")
    axes[0].legend(frameon=False, fontsize=8)
    is_cpu = environment["device"] == "cpu"
    device = f"{environment['cpu']}, {environment['threads']} threads" if is_cpu else environment["accelerator"]
    figure.suptitle(f"Atrous selective scan of maps B x H x W x D, {environment['dtype']}, {device}", fontsize=11)
    return figure


def main() -> None:
    arguments = parse_arguments()
    matplotlib.use("Agg")
    environment = {**describe_environment(), "device": arguments.device.type}
    environment |= {"repeats": str(arguments.repeats), "dtype": arguments.dtype}
    device, dtype = arguments.device.type, arguments.dtype
    file_name = "_".join(
        ["operator", *([device] if device != "cpu" else []), *([dtype] if dtype != "float32" else [])]
    )
    backends = find_backends(arguments.device)
    names = [*backends, *find_baselines(arguments.baselines, arguments.device)]

    limits = None
    if device == "cuda":
        from gpu_limits import measure_limits  # needs triton

        limits = measure_limits(arguments.device)
        environment |= {
            "TB/s": f"{limits.bytes_per_second / 1e12:.3f}",
            "exponentials/ns": f"{limits.exponentials_per_second / 1e9:.0f}",
        }
    rows = [row for shape in arguments.shapes for row in measure_shape(shape, names, arguments, limits)]
    print_table("Atrous selective scan", rows)
    write_csv(arguments.output_dir / f"{file_name}.csv", rows, environment)
    save_figure(partial(plot, rows, names, environment), arguments.output_dir / f"{file_name}.png")
    if arguments.scaling:
        rows = measure_scaling([*backends, PLAIN], arguments)
        print_table("Growing maps, forward", rows)
        write_csv(arguments.output_dir / f"{file_name}_scaling.csv", rows, environment)


if __name__ == "__main__":
    main()
