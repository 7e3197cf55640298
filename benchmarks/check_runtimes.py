"""Compare T, S and B in the runtimes of `evmamba check-runtimes`: differences of logits, and latency of one image.

Weights are random. Batch norms and linear layers are initialized so that images differ in their logits. The bundled
model measures the accuracy of each runtime on the held-out digits.

Each network has a process of its own, since one that has loaded OpenVINO may die when it starts a compiler.

Example:
    python benchmarks/check_runtimes.py --variants tiny --runtimes PyTorch "ONNX Runtime" --repeats 3
"""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from measure import (
    RESULTS_DIR,
    console,
    describe_environment,
    error_console,
    in_fresh_process,
    print_table,
    write_csv,
)
from rich.progress import track
from torch import nn
from transformers import BitImageProcessorPil
from transformers.utils import logging

from evmamba_demo.bundled import find_bundled_model
from evmamba_hub.errors import UserError
from evmamba_hub.export.export import load_exportable, quiet_exporters
from evmamba_hub.export.runtimes import RUNTIMES, Candidate, compare_runtimes
from modeling_evmamba import VARIANTS, EfficientVMambaConfig, EfficientVMambaForImageClassification
from training_evmamba.digits import load_splits


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="default: all")
    parser.add_argument(
        "--runtimes", nargs="+", choices=RUNTIMES, default=list(RUNTIMES), help="beside PyTorch; default: all"
    )
    parser.add_argument("--repeats", type=int, default=30, help="rounds to take the median of; default: 30")
    parser.add_argument(
        "--output-dir", type=Path, default=RESULTS_DIR, help="directory of the CSV files; default: benchmarks/results"
    )
    return parser.parse_args()


def show(items: Sequence, activity: str) -> Iterable:
    return track(items, activity, console=error_console, transient=True)


def save_checkpoint(variant: str, folder: Path) -> None:
    torch.manual_seed(0)
    model = EfficientVMambaForImageClassification(EfficientVMambaConfig(**VARIANTS[variant], num_labels=1000))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    model.save_pretrained(folder)
    BitImageProcessorPil(crop_size={"height": 224, "width": 224}).save_pretrained(folder)


def measure_variant(variant: str, names: list[str], repeats: int) -> list[dict[str, object]]:
    """Compare the runtimes, of which PyTorch is the first. Name those that are missing, and leave them out."""
    logging.disable_progress_bar()
    with TemporaryDirectory() as folder:
        save_checkpoint(variant, Path(folder))
        reports = compare_runtimes(folder, names, rounds=repeats, track=show)
    rows = []
    for report in reports:
        if report.missing is not None:
            console.print(f"{variant}: no {report.runtime}: {report.missing}", soft_wrap=True, markup=False)
            continue
        rows.append(
            {
                "network": variant,
                "runtime": report.runtime,
                "largest difference": report.difference,
                "median ms": report.milliseconds,
                "/ PyTorch": report.milliseconds / reports[0].milliseconds,
            }
        )
    return rows


@torch.inference_mode()
def measure_digits(names: list[str]) -> list[dict[str, object]]:
    """Measure the bundled model in each runtime on the held-out digits."""
    logging.disable_progress_bar()
    checkpoint = find_bundled_model()
    image_processor = BitImageProcessorPil.from_pretrained(checkpoint)
    _, held_out = load_splits()
    pixel_values = image_processor(held_out.images, return_tensors="pt").pixel_values
    logits = {}
    with TemporaryDirectory() as folder:
        candidate = Candidate(str(checkpoint), None, load_exportable(str(checkpoint), "float32").model, Path(folder))
        for name in show(names, "digits"):
            try:
                runtime = RUNTIMES[name](candidate)
            except UserError:
                continue  # named for the networks
            with quiet_exporters():
                logits[name] = runtime(pixel_values)
    return [
        {
            "runtime": name,
            "correct": (each.argmax(dim=-1) == held_out.labels).sum().item(),
            "of": len(held_out.labels),
            "largest difference": (each - logits["PyTorch"]).abs().max().item(),
        }
        for name, each in logits.items()
    ]


def main() -> None:
    arguments = parse_arguments()
    environment = describe_environment() | {"repeats": str(arguments.repeats)}
    names = list(dict.fromkeys(["PyTorch", *arguments.runtimes]))
    rows = []
    for variant in arguments.variants:
        rows += in_fresh_process(measure_variant, variant, names, arguments.repeats)
    print_table("Runtimes on a CPU, one image of 224 x 224", rows)
    write_csv(arguments.output_dir / "runtimes.csv", rows, environment)
    print_table("The bundled model on held-out digits", digits := in_fresh_process(measure_digits, names))
    write_csv(arguments.output_dir / "runtimes_digits.csv", digits, environment)


if __name__ == "__main__":
    main()
