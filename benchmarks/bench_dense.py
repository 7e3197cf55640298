"""Measure latency and memory of segmentation and detection on a CPU, with random weights.

EfficientVMamba, Swin-T and ResNet-50 are backbones of the same heads of transformers. UperNet segments 150 classes.
It has 256 channels, half of its default, beside which backbones hardly count. RT-DETR detects 80 classes with 300
queries. EfficientVMamba runs as loaded, and with `optimize_for_inference`.

Example:
    python benchmarks/bench_dense.py --repeats 2 --heads UperNet
"""

import argparse
import math
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

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
from networks import run_model
from torch import nn
from transformers import (
    AutoBackbone,
    PreTrainedConfig,
    ResNetConfig,
    RTDetrConfig,
    RTDetrForObjectDetection,
    SwinConfig,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from modeling_evmamba import VARIANTS, EfficientVMambaConfig, optimize_for_inference


CPU = torch.device("cpu")
IMAGE_SIZES = [(512, 512), (800, 1280)]  # height, width
SMALL = (256, 256)  # has as many places as RT-DETR has queries
STAGES = ["stage1", "stage2", "stage3", "stage4"]


class Backbone(NamedTuple):
    config: Callable[..., PreTrainedConfig]
    millions: float  # parameters of the published classifier without its head and last norm, in four stages
    optimize: torch.dtype | None = None  # dtype of the optimized copy


def create_evmamba_config(variant: str, **fields) -> EfficientVMambaConfig:
    return EfficientVMambaConfig(**VARIANTS[variant], **fields)


BACKBONES = {
    "EfficientVMamba-T": Backbone(partial(create_evmamba_config, "tiny"), 6.1),
    "EfficientVMamba-T, optimized": Backbone(partial(create_evmamba_config, "tiny"), 6.1, torch.float32),
    "EfficientVMamba-T, optimized in bfloat16": Backbone(partial(create_evmamba_config, "tiny"), 6.1, torch.bfloat16),
    "EfficientVMamba-B, optimized": Backbone(partial(create_evmamba_config, "base"), 32.9, torch.float32),
    "Swin-T": Backbone(partial(SwinConfig, embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24]), 27.5),
    "ResNet-50": Backbone(ResNetConfig, 23.5),
}


def create_upernet(backbone_config: PreTrainedConfig, channels: list[int]) -> nn.Module:
    return UperNetForSemanticSegmentation(
        UperNetConfig(
            backbone_config=backbone_config, hidden_size=256, auxiliary_in_channels=channels[2], num_labels=150
        )
    )


def create_rt_detr(backbone_config: PreTrainedConfig, channels: list[int]) -> nn.Module:
    return RTDetrForObjectDetection(
        RTDetrConfig(backbone_config=backbone_config, encoder_in_channels=channels, num_labels=80)
    )


class Head(NamedTuple):
    create: Callable[[PreTrainedConfig, list[int]], nn.Module]
    stages: list[str]


HEADS = {"UperNet": Head(create_upernet, STAGES), "RT-DETR": Head(create_rt_detr, STAGES[1:])}


FILES = {"UperNet": "dense_upernet.csv", "RT-DETR": "dense_rt_detr.csv"}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=list(HEADS), metavar="HEAD", help="default: all")
    parser.add_argument(
        "--repeats", type=int, default=3, help="rounds of the largest images to take the median of; default: 3"
    )
    parser.add_argument(
        "--output-dir", type=Path, default=RESULTS_DIR, help="directory of the CSV files; default: benchmarks/results"
    )
    return parser.parse_args()


def create_as_loaded(name: str, head: str) -> nn.Module:
    """Create a model in evaluation mode.

    Raises:
        ValueError: If the backbone has not the published number of parameters.
    """
    backbone, stages = BACKBONES[name], HEADS[head].stages
    with torch.device("meta"):
        whole = AutoBackbone.from_config(backbone.config(out_features=STAGES))
    millions = sum(parameter.numel() for parameter in whole.parameters()) / 1e6
    if abs(millions - backbone.millions) > 0.1:
        raise ValueError(f"{name} has {millions:.2f} M parameters, not {backbone.millions} M")
    return HEADS[head].create(backbone.config(out_features=stages), whole.channels[-len(stages) :]).eval()


def create(name: str, head: str) -> nn.Module:
    """Create a model in evaluation mode, optimized if its name says so."""
    model, dtype = create_as_loaded(name, head), BACKBONES[name].optimize
    return model if dtype is None else optimize_for_inference(model, dtype)


def measure_memory(name: str, head: str, height: int, width: int) -> float:
    """Return the peak memory of one forward pass. Call it in a fresh process."""
    model = create(name, head)
    run_model(model, torch.randn(1, 3, *SMALL))  # compiles, and starts the threads
    return_freed_memory()
    return peak_memory(partial(run_model, model, torch.randn(1, 3, height, width)), CPU)


def count_rounds(size: tuple[int, int]) -> int:
    """Return how many rounds of images of this size take about as long as one of the largest."""
    return round(max(map(math.prod, IMAGE_SIZES)) / math.prod(size))


def measure_head(head: str, repeats: int) -> list[dict[str, object]]:
    models = {name: create(name, head) for name in BACKBONES}
    seconds: dict[tuple[str, tuple[int, int]], float] = {}
    for size in IMAGE_SIZES:
        methods = {(name, size): partial(run_model, model, torch.randn(1, 3, *size)) for name, model in models.items()}
        # a call takes seconds, beside which caches and allocator hardly count
        rounds = {"warm_up_rounds": 1, "calls_per_turn": 1, "untimed_calls": 0}
        seconds |= median_times(methods, repeats * count_rounds(size), f"{head}, {size[0]} x {size[1]}", **rounds)
    rows = []
    for name, size in product(models, IMAGE_SIZES):
        (height, width), median = size, seconds[name, size]
        rows.append(
            {
                "head": head,
                "backbone": name,
                "image": f"{height}x{width}",
                "median ms": 1e3 * median,
                "/ Swin-T": median / seconds["Swin-T", size],
                "/ ResNet-50": median / seconds["ResNet-50", size],
                "ns per pixel": 1e9 * median / (height * width),
                "peak MiB": in_fresh_process(measure_memory, name, head, height, width) / 2**20,
            }
        )
    return rows


def main() -> None:
    arguments = parse_arguments()
    environment = describe_environment() | {"repeats": str(arguments.repeats)}
    torch.manual_seed(0)
    for head in arguments.heads:
        rows = measure_head(head, arguments.repeats)
        print_table(head, rows)
        write_csv(arguments.output_dir / FILES[head], rows, environment)


if __name__ == "__main__":
    main()
