"""Where the time of EfficientVMamba (random weights) goes on a device: images per second and the costliest operators,
with and without torch.compile, and on GPUs with the scan of mamba_ssm in the place of ours.

The list of operators of the compiled network names what the compiler has fused: of the EVSS block that are LayerNorm
times gate, and depthwise convolution and SiLU.

Example:
    python benchmarks/profile_model.py --device cuda --variants tiny --batch-sizes 1 128 --dtype bfloat16
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from measure import (
    RESULTS_DIR,
    console,
    describe_environment,
    median_times,
    peak_memory,
    print_table,
    write_csv,
)
from rivals import mamba_ssm_scan
from torch import nn
from torch.profiler import ProfilerActivity, profile

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
    parser.add_argument("--repeats", type=int, default=20, help="rounds of which the median is taken; default: 20")
    parser.add_argument("--device", type=torch.device, default="cuda", help="default: cuda")
    parser.add_argument(
        "--output-dir", type=Path, default=RESULTS_DIR, help="folder of CSV files; default: benchmarks/results"
    )
    return parser.parse_args()


@contextmanager
def scan_of_mamba_ssm() -> Iterator[None]:
    """Networks compute with mamba_ssm's kernel instead of ours."""
    ours = network.atrous_selective_scan
    network.atrous_selective_scan = mamba_ssm_scan
    try:
        yield
    finally:
        network.atrous_selective_scan = ours


def infer(model: nn.Module, images: torch.Tensor) -> None:
    with torch.inference_mode():
        model(images)


def train(model: nn.Module, images: torch.Tensor) -> None:
    """Forward and backward pass; what the optimizer does is not the network's."""
    labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    model(images, labels=labels).loss.backward()
    model.zero_grad(set_to_none=True)


def run_with_mamba_ssm(run: Callable[[], None]) -> None:
    with scan_of_mamba_ssm():
        run()


def list_operators(run: Callable[[], None], device: torch.device) -> list[tuple[str, float, int]]:
    """Operators or kernels of one call by their own time: name, milliseconds, number of calls."""
    activities = [ProfilerActivity.CPU]
    if device.type != "cpu":
        activities.append(getattr(ProfilerActivity, device.type.upper()))
    with profile(activities=activities) as profiler:
        run()
    is_cpu = device.type == "cpu"
    events = [
        (event.key, (event.self_cpu_time_total if is_cpu else event.self_device_time_total) / 1e3, event.count)
        for event in profiler.key_averages()
    ]
    return sorted((event for event in events if event[1] > 0), key=lambda event: -event[1])


def main() -> None:
    arguments = parse_arguments()
    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    environment = describe_environment(device)
    environment |= {"repeats": str(arguments.repeats), "dtype": arguments.dtype, "image": str(arguments.image_size)}
    has_mamba_ssm = device.type == "cuda" and find_spec("mamba_ssm") is not None
    if not has_mamba_ssm:
        console.print("without mamba_ssm: it is not installed, or this is no CUDA device")

    speeds, operators = [], []
    for variant in arguments.variants:
        config = EfficientVMambaConfig(**VARIANTS[variant], num_labels=1000)
        model = EfficientVMambaForImageClassification(config).to(device, dtype)
        model.to(memory_format=torch.channels_last)
        compiled = torch.compile(model)
        for pass_name in arguments.passes:
            run, is_training = (train, True) if pass_name == "training step" else (infer, False)
            model.train(is_training)
            for batch_size in arguments.batch_sizes:
                size = (batch_size, 3, arguments.image_size, arguments.image_size)
                images = torch.randn(size, device=device, dtype=dtype).to(memory_format=torch.channels_last)
                methods = {"eager": partial(run, model, images), "compiled": partial(run, compiled, images)}
                if has_mamba_ssm:
                    methods["mamba_ssm"] = partial(run_with_mamba_ssm, methods["eager"])
                where = {"network": variant, "pass": pass_name, "batch": batch_size}
                seconds = median_times(methods, arguments.repeats, device, " ".join(map(str, where.values())))
                for name, method in methods.items():
                    speeds.append(
                        where
                        | {
                            "method": name,
                            "median ms": 1e3 * seconds[name],
                            "images/s": batch_size / seconds[name],
                            "peak MiB": peak_memory(method, device) / 2**20 if device.type == "cuda" else float("nan"),
                        }
                    )
                    listed = list_operators(method, device)
                    total = sum(milliseconds for _, milliseconds, _ in listed)
                    for operator, milliseconds, count in listed[:LISTED_OPERATORS]:
                        operators.append(
                            where
                            | {
                                "method": name,
                                "operator": operator,
                                "ms": milliseconds,
                                "percent": 100 * milliseconds / total,
                                "calls": count,
                            }
                        )
    print_table("Speed", speeds)
    suffix = f"{device.type}_{arguments.dtype}"
    write_csv(arguments.output_dir / f"model_{suffix}.csv", speeds, environment)
    write_csv(arguments.output_dir / f"model_operators_{suffix}.csv", operators, environment)


if __name__ == "__main__":
    main()
