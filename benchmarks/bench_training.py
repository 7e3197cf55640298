"""Measure a training step of EfficientVMamba-T on CPUs against networks of its size (random weights).

A step is the forward pass, the loss and the backward pass. The step of AdamW is measured apart. All networks take
turns in every round, in float32 and under autocast to bfloat16.

Example:
    python benchmarks/bench_training.py --repeats 5 --dtypes bfloat16
"""

import argparse
import resource
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import RESULTS_DIR, describe_environment, median_times, print_table, write_csv
from networks import PEERS
from torch import nn
from transformers import AutoModelForImageClassification, PreTrainedConfig

from modeling_evmamba import VARIANTS, EfficientVMambaConfig


OURS = "EfficientVMamba-T"
IMAGE_SIZE = 224
NUM_LABELS = 1000


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=8, metavar="B", help="default: 8")
    parser.add_argument(
        "--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"], help="default: both"
    )
    parser.add_argument("--repeats", type=int, default=10, help="rounds to take the median of; default: 10")
    parser.add_argument(
        "--output-dir", type=Path, default=RESULTS_DIR, help="directory of the CSV file; default: benchmarks/results"
    )
    return parser.parse_args()


def make_networks() -> dict[str, nn.Module]:
    configs: dict[str, PreTrainedConfig] = {OURS: EfficientVMambaConfig(**VARIANTS["tiny"])}
    configs |= {name: PEERS[name].config() for name in ("DeiT-Ti", "EfficientNet-B0")}
    networks = {}
    for name, config in configs.items():
        config.num_labels = NUM_LABELS
        networks[name] = AutoModelForImageClassification.from_config(config).train()
    return networks


def run_step(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype) -> None:
    """Compute the gradients of a batch. Frees those of the last one first, as training does."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits = model(images).logits
    F.cross_entropy(logits.float(), labels).backward()


def count_page_faults(model: nn.Module, *arguments) -> int:
    """Return the pages that the system hands out in a step."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    run_step(model, *arguments)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(0)
    networks = make_networks()
    images = torch.randn(arguments.batch_size, 3, IMAGE_SIZE, IMAGE_SIZE)
    labels = torch.randint(NUM_LABELS, (arguments.batch_size,))
    rows = []
    for name_of_dtype in arguments.dtypes:
        dtype = getattr(torch, name_of_dtype)
        methods = {name: partial(run_step, model, images, labels, dtype) for name, model in networks.items()}
        seconds = median_times(methods, arguments.repeats, f"training steps in {name_of_dtype}")
        updates = {
            name: torch.optim.AdamW(model.parameters(), fused=True).step for name, model in networks.items()
        }  # on the gradients of the last step
        update_seconds = median_times(updates, arguments.repeats, "steps of AdamW")
        for name, model in networks.items():
            rows.append(
                {
                    "network": name,
                    "dtype": name_of_dtype,
                    "batch": arguments.batch_size,
                    "median ms": 1e3 * seconds[name],
                    "/ DeiT-Ti": seconds[name] / seconds["DeiT-Ti"],
                    "/ EfficientNet-B0": seconds[name] / seconds["EfficientNet-B0"],
                    "AdamW ms": 1e3 * update_seconds[name],
                    "page faults": count_page_faults(model, images, labels, dtype),
                }
            )
    print_table("Training steps on a CPU", rows)
    environment = describe_environment() | {"repeats": str(arguments.repeats), "image": str(IMAGE_SIZE)}
    write_csv(arguments.output_dir / "training_cpu.csv", rows, environment)


if __name__ == "__main__":
    main()
