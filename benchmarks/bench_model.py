"""Measure the latency of EfficientVMamba (random weights) against networks of its size, and growing images.

All networks take turns in every round. The other networks come from timm if it is installed, else from transformers.
Their parameter counts must match their papers.

Example:
    python benchmarks/bench_model.py --repeats 5 --batch-sizes 1 --image-sizes 224 512
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from measure import (
    RESULTS_DIR,
    console,
    describe_environment,
    in_fresh_process,
    median_times,
    peak_memory,
    print_table,
    save_figure,
    write_csv,
)
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    EfficientNetConfig,
    MobileViTConfig,
    PreTrainedConfig,
    SwinConfig,
    ViTConfig,
)

from evmamba_kernels import use_backend
from modeling_evmamba import VARIANTS, EfficientVMambaConfig, optimize_for_inference


CPU = torch.device("cpu")
OURS = {"EfficientVMamba-T": "tiny", "EfficientVMamba-S": "small", "EfficientVMamba-B": "base"}
OPTIMIZED = {name: f"{name}, optimized" for name in OURS}  # by `optimize_for_inference`
# (network, backend of its scan) for growing images
GROWING = [("EfficientVMamba-T", "numba"), ("EfficientVMamba-T, optimized", "numba"), ("EfficientVMamba-T", "torch")]


class Peer(NamedTuple):
    timm_name: str
    config: Callable[[], PreTrainedConfig]  # the same architecture in transformers
    millions: float  # parameters according to its paper
    image_size: int = 224


PEERS = {
    # DeiT without its distillation token is a ViT
    "DeiT-Ti": Peer(
        "deit_tiny_patch16_224",
        partial(ViTConfig, hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768),
        5.7,
    ),
    "EfficientNet-B0": Peer(
        "efficientnet_b0",
        partial(
            EfficientNetConfig,
            width_coefficient=1.0,
            depth_coefficient=1.0,
            image_size=224,
            hidden_dim=1280,
            dropout_rate=0.2,
        ),
        5.3,
    ),
    "MobileViT-S": Peer("mobilevit_s", MobileViTConfig, 5.6, image_size=256),
    "Swin-T": Peer("swin_tiny_patch4_window7_224", partial(SwinConfig, embed_dim=96, depths=[2, 2, 6, 2]), 28.3),
}

# ImageNet-1k top-1 accuracy in percent, for one crop at the network's own image size
PUBLISHED_ACCURACY = {
    "EfficientVMamba-T": (76.5, "the authors' training log"),
    "EfficientVMamba-S": (78.7, "the authors' training log"),
    "EfficientVMamba-B": (81.8, "the authors' training log"),
    "DeiT-Ti": (72.2, "arXiv 2012.12877"),
    "EfficientNet-B0": (77.1, "arXiv 1905.11946"),
    "MobileViT-S": (78.4, "arXiv 2110.02178"),
    "Swin-T": (81.3, "arXiv 2103.14030"),
}

# offsets of names, for points with something else at the lower right
LABELS = {
    "EfficientVMamba-S": (4, -20, "left"),
    "EfficientVMamba-B": (8, 5, "left"),
    "EfficientNet-B0": (-8, 4, "right"),
    "MobileViT-S": (8, -3, "left"),
}


class Network(NamedTuple):
    source: str
    model: nn.Module
    image_size: int


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8], metavar="B", help="default: 1 8")
    parser.add_argument(
        "--image-sizes",
        nargs="*",
        type=int,
        default=[224, 384, 512, 768, 1024],
        metavar="SIZE",
        help="also measure EfficientVMamba-T at these image sizes, with each backend; pass no size to skip this; "
        "default: 224 384 512 768 1024",
    )
    parser.add_argument("--repeats", type=int, default=30, help="rounds to take the median of; default: 30")
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=RESULTS_DIR,
        help="directory of the CSV files and the plot; default: benchmarks/results",
    )
    return parser.parse_args()


def make_ours(variant: str) -> nn.Module:
    config = EfficientVMambaConfig(**VARIANTS[variant], num_labels=1000)
    return AutoModelForImageClassification.from_config(config).eval()


def make_networks() -> dict[str, Network]:
    networks = {name: Network("this package", make_ours(variant), 224) for name, variant in OURS.items()}
    for name, optimized in OPTIMIZED.items():
        networks[optimized] = networks[name]._replace(model=optimize_for_inference(networks[name].model))
    try:
        import timm
    except ImportError as error:
        console.print(f"timm cannot be imported, using transformers instead: {error}", soft_wrap=True)
        timm = None
    for name, peer in PEERS.items():
        if timm:
            network = Network("timm", timm.create_model(peer.timm_name, pretrained=False), peer.image_size)
        else:
            config = peer.config()
            config.num_labels = 1000
            network = Network("transformers", AutoModelForImageClassification.from_config(config), peer.image_size)
        if abs(count_millions(network.model) - peer.millions) > 0.05:
            raise ValueError(f"{name} has {count_millions(network.model):.2f} M parameters, not {peer.millions} M")
        network.model.eval()
        networks[name] = network
    return networks


def count_millions(model: nn.Module) -> float:
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


def run_network(model: nn.Module, images: torch.Tensor, backend: str | None = None) -> object:
    with torch.inference_mode(), use_backend(backend):
        return model(images)


def compare_latencies(networks: dict[str, Network], arguments: argparse.Namespace) -> list[dict[str, object]]:
    rows = []
    for batch_size in arguments.batch_sizes:
        methods = {
            name: partial(
                run_network, network.model, torch.randn(batch_size, 3, network.image_size, network.image_size)
            )
            for name, network in networks.items()
        }
        seconds = median_times(methods, arguments.repeats, f"batches of {batch_size}")
        for name, network in networks.items():
            rows.append(
                {
                    "network": name,
                    "from": network.source,
                    "image": network.image_size,
                    "batch": batch_size,
                    "median ms": 1e3 * seconds[name],
                    "images/s": batch_size / seconds[name],
                    "/ DeiT-Ti": seconds[name] / seconds["DeiT-Ti"],
                    "/ EfficientNet-B0": seconds[name] / seconds["EfficientNet-B0"],
                    "/ Swin-T": seconds[name] / seconds["Swin-T"],
                }
            )
    return rows


def measure_memory(image_size: int, backend: str) -> float:
    """Returns the peak memory of one forward pass. Call it in a fresh process."""
    model = make_ours("tiny")
    run_network(model, torch.randn(1, 3, 32, 32), backend)  # compiles, and starts the threads
    return peak_memory(partial(run_network, model, torch.randn(1, 3, image_size, image_size), backend), CPU)


def measure_image_sizes(networks: dict[str, Network], arguments: argparse.Namespace) -> list[dict[str, object]]:
    methods = {
        (name, backend, size): partial(run_network, networks[name].model, torch.randn(1, 3, size, size), backend)
        for name, backend in GROWING
        for size in arguments.image_sizes
    }
    seconds = median_times(methods, arguments.repeats, "growing images")
    rows = []
    for name, backend in GROWING:
        first = seconds[name, backend, arguments.image_sizes[0]] / arguments.image_sizes[0] ** 2
        for size in arguments.image_sizes:
            per_pixel = seconds[name, backend, size] / size**2
            # an optimized network reuses memory from its creation, so it has no visible peak
            has_peak = name in OURS
            rows.append(
                {
                    "network": name,
                    "backend": backend,
                    "image": size,
                    "median ms": 1e3 * seconds[name, backend, size],
                    "ns per pixel": 1e9 * per_pixel,
                    f"relative to {arguments.image_sizes[0]}": per_pixel / first,
                    "peak MiB": in_fresh_process(measure_memory, size, backend) / 2**20 if has_peak else None,
                }
            )
    return rows


def plot(rows: list[dict[str, object]], environment: dict[str, str]) -> Figure:
    latencies = {row["network"]: row["median ms"] for row in rows if row["batch"] == 1}
    figure, ax = plt.subplots(figsize=(7, 4.5), layout="constrained")
    points = {name: (latencies[name], accuracy) for name, (accuracy, _) in PUBLISHED_ACCURACY.items()}
    ax.plot(
        *zip(*(points[name] for name in OURS), strict=True), "o-", color="#c2410c", markersize=8, label="as loaded"
    )
    optimized = [(latencies[OPTIMIZED[name]], points[name][1]) for name in OURS]
    ax.plot(*zip(*optimized, strict=True), "o--", color="#fb923c", markersize=6, label="optimize_for_inference")
    ax.plot(*zip(*(points[name] for name in PEERS), strict=True), "s", color="#8b949e", markersize=7)
    for name, point in points.items():
        color = "#c2410c" if name in OURS else "#8b949e"
        x, y, alignment = LABELS.get(name, (8, -12, "left"))
        ax.annotate(name, point, xytext=(x, y), textcoords="offset points", color=color, fontsize=9, ha=alignment)
    ax.set_xlim(0, 1.4 * max(latencies.values()))
    ax.margins(y=0.12)
    ax.set(xlabel="median latency of one image in ms (measured)", ylabel="ImageNet-1k top-1 in % (published)")
    ax.set_title(f"{environment['cpu']}, {environment['threads']} threads, float32", fontsize=10)
    ax.grid(alpha=0.25)
    ax.legend(frameon=False, fontsize=8, loc="lower right")
    ax.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    arguments = parse_arguments()
    matplotlib.use("Agg")
    environment = describe_environment() | {"repeats": str(arguments.repeats)}
    torch.manual_seed(0)
    networks = make_networks()

    rows = compare_latencies(networks, arguments)
    print_table("Latency on a CPU", rows)
    accuracies = {name: f"{accuracy} ({source})" for name, (accuracy, source) in PUBLISHED_ACCURACY.items()}
    write_csv(
        arguments.output_dir / "model.csv", rows, environment | {f"top-1 of {k}": v for k, v in accuracies.items()}
    )
    if 1 in arguments.batch_sizes:
        save_figure(partial(plot, rows, environment), arguments.output_dir / "accuracy_latency.png")
    if arguments.image_sizes:
        rows = measure_image_sizes(networks, arguments)
        print_table("Growing images", rows)
        write_csv(arguments.output_dir / "model_image_sizes.csv", rows, environment)


if __name__ == "__main__":
    main()
