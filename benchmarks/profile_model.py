"""Profile EfficientVMamba (random weights) and an EVSS block of its first stage on a device.

The tables have images per second, peak memory and the most expensive operators, with and without torch.compile. On
GPUs, they also have variants with PyTorch's LayerNorm and with mamba_ssm's scan instead of this package's kernels.

The operators of the compiled network show what the compiler fuses, such as LayerNorm times gate, or depthwise
convolution and SiLU.

Example:
    python benchmarks/profile_model.py --device cuda --variants tiny --batch-sizes 1 128 --dtype bfloat16
"""

import argparse
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from importlib.util import find_spec
from itertools import chain, product
from pathlib import Path
from typing import NamedTuple

import torch
from baselines import mamba_ssm_scan
from measure import (
    RESULTS_DIR,
    console,
    describe_environment,
    median_times,
    parse_device,
    pause_for,
    peak_memory,
    print_table,
    write_csv,
)
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from evmamba_kernels import layer_norm
from modeling_evmamba import VARIANTS, EfficientVMambaConfig, EfficientVMambaForImageClassification
from modeling_evmamba import modeling_evmamba as network


PASSES = ("inference", "training step")
LISTED_OPERATORS = 15


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="default: all")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 128], metavar="B", help="default: 1 128")
    parser.add_argument("--image-size", type=int, default=224, metavar="SIZE", help="default: 224")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="default: float32")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES), help="default: both")
    parser.add_argument("--repeats", type=int, default=20, help="rounds to take the median of; default: 20")
    parser.add_argument("--device", type=parse_device, default="cuda", help="default: cuda")
    parser.add_argument(
        "--output-dir", type=Path, default=RESULTS_DIR, help="directory of the CSV files; default: benchmarks/results"
    )
    return parser.parse_args()


@contextmanager
def norms_of_pytorch() -> Iterator[None]:
    """Make networks use PyTorch operators for LayerNorm times gate, whatever the size of the feature map."""
    smallest, layer_norm.SMALLEST_MAP_ON_GPU = layer_norm.SMALLEST_MAP_ON_GPU, math.inf
    try:
        yield
    finally:
        layer_norm.SMALLEST_MAP_ON_GPU = smallest


@contextmanager
def scan_of_mamba_ssm() -> Iterator[None]:
    """Make networks use mamba_ssm's kernel, and none of this package's kernels."""
    ours, network.atrous_selective_scan = network.atrous_selective_scan, mamba_ssm_scan
    try:
        with norms_of_pytorch():
            yield
    finally:
        network.atrous_selective_scan = ours


class Part(NamedTuple):
    name: str
    module: nn.Module
    size: tuple[int, int, int]  # of its input, (C, H, W)


def make_parts(variant: str, image_size: int, device: torch.device, dtype: torch.dtype) -> list[Part]:
    """Return the network, and the first EVSS block of its first stage."""
    config = EfficientVMambaConfig(**VARIANTS[variant], num_labels=1000)
    model = EfficientVMambaForImageClassification(config).to(device, dtype)
    model.to(memory_format=torch.channels_last)
    block = next(module for module in model.modules() if isinstance(module, network.EfficientVMambaEVSSLayer))
    side = image_size // config.patch_size
    return [
        Part(variant, model, (config.num_channels, image_size, image_size)),
        Part(f"{variant}, EVSS block", block, (config.hidden_sizes[0], side, side)),
    ]


def infer(module: Callable, inputs: torch.Tensor) -> None:
    with torch.inference_mode():
        module(inputs)


def train(module: Callable, inputs: torch.Tensor) -> None:
    """Run the forward and backward pass, without an optimizer step. Gradients are not kept."""
    outputs = module(inputs)
    outputs = outputs if isinstance(outputs, torch.Tensor) else outputs.logits
    torch.autograd.grad(outputs.sum(), [inputs, *module.parameters()])


def run_within(context: Callable[[], AbstractContextManager], run: Callable[[], None]) -> None:
    with context():
        run()


def list_operators(run: Callable[[], None], device: torch.device) -> list[dict[str, object]]:
    """Return the most expensive operators or kernels of one call, by their own time."""
    activities = [ProfilerActivity.CPU]
    if device.type != "cpu":
        activities.append(getattr(ProfilerActivity, device.type.upper()))
    with profile(activities=activities) as profiler:
        run()
    if device.type == "cpu":
        events = {event.key: (event.self_cpu_time_total, event.count) for event in profiler.key_averages()}
    else:  # kernels alone, since the device time of an operator counts its kernels again
        events = {
            event.key: (event.self_device_time_total, event.count)
            for event in profiler.key_averages()
            if event.device_type != DeviceType.CPU and not event.is_user_annotation
        }
    total = sum(microseconds for microseconds, _ in events.values())
    costliest = sorted(events.items(), key=lambda item: -item[1][0])[:LISTED_OPERATORS]
    return [
        {"operator": name, "ms": microseconds / 1e3, "percent": 100 * microseconds / total, "calls": count}
        for name, (microseconds, count) in costliest
    ]


def main() -> None:
    arguments = parse_arguments()
    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    environment = describe_environment()
    environment |= {"repeats": str(arguments.repeats), "dtype": arguments.dtype, "image": str(arguments.image_size)}
    has_mamba_ssm = device.type == "cuda" and find_spec("mamba_ssm") is not None
    if not has_mamba_ssm:
        console.print("without mamba_ssm: it is not installed, or this is not a CUDA device")

    speeds, operators = [], []
    for part in chain.from_iterable(
        make_parts(variant, arguments.image_size, device, dtype) for variant in arguments.variants
    ):
        torch.compiler.reset()  # all parts share their code, and PyTorch limits the number of compiled versions
        compiled = torch.compile(part.module, dynamic=False)
        for pass_name, batch_size in product(arguments.passes, arguments.batch_sizes):
            run = train if pass_name == "training step" else infer
            part.module.train(run is train)
            inputs = torch.randn((batch_size, *part.size), device=device, dtype=dtype)
            inputs = inputs.to(memory_format=torch.channels_last).requires_grad_(run is train)
            methods = {"eager": partial(run, part.module, inputs), "compiled": partial(run, compiled, inputs)}
            if device.type != "cpu":
                methods["PyTorch's LayerNorm"] = partial(run_within, norms_of_pytorch, methods["eager"])
            if has_mamba_ssm:
                methods["mamba_ssm"] = partial(run_within, scan_of_mamba_ssm, methods["eager"])
            where = {"part": part.name, "pass": pass_name, "batch": batch_size}
            description = " ".join(map(str, where.values()))
            seconds = median_times(methods, arguments.repeats, description, pause=pause_for(device))
            for name, method in methods.items():
                speed = {"median ms": 1e3 * seconds[name], "images/s": batch_size / seconds[name]}
                if device.type == "cuda":
                    speed["peak MiB"] = peak_memory(method, device) / 2**20
                speeds.append(where | {"method": name} | speed)
                operators += [where | {"method": name} | operator for operator in list_operators(method, device)]
    print_table("Speed", speeds)
    suffix = f"{device.type}_{arguments.dtype}"
    write_csv(arguments.output_dir / f"model_{suffix}.csv", speeds, environment)
    write_csv(arguments.output_dir / f"model_operators_{suffix}.csv", operators, environment)


if __name__ == "__main__":
    main()
