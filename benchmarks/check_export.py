"""Compare ONNX files of T, S and B in onnxruntime and OpenVINO with PyTorch: differences of logits, and latency.

Weights are random. Batch norms and linear layers are initialized so that images differ in their logits. The bundled
model measures the accuracy of each dtype on the held-out digits.

Example:
    python benchmarks/check_export.py --variants tiny --repeats 5
"""

import argparse
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from measure import RESULTS_DIR, describe_environment, median_times, print_table, write_csv
from torch import nn
from transformers import BitImageProcessorPil
from transformers.utils import logging

from evmamba_demo.bundled import find_bundled_model
from evmamba_hub.export.export import Logits, Runtime, create_check_images, load_exportable, load_onnx, write_file
from evmamba_hub.export.runtimes import load_openvino
from modeling_evmamba import (
    VARIANTS,
    EfficientVMambaConfig,
    EfficientVMambaForImageClassification,
    optimize_for_inference,
)
from training_evmamba.digits import load_splits


CPU = torch.device("cpu")
DTYPES = ("float32", "float16", "int8")
IMAGE_SIZES = ((224, 224), (225, 223), (37, 53))
CHECKED_BATCH_SIZES = (1, 5)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="default: all")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8], metavar="B", help="default: 1 8")
    parser.add_argument("--repeats", type=int, default=30, help="rounds to take the median of; default: 30")
    parser.add_argument(
        "--output-dir", type=Path, default=RESULTS_DIR, help="directory of the CSV files; default: benchmarks/results"
    )
    return parser.parse_args()


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


def make_runtimes(checkpoint: Path, folder: Path) -> dict[str, Runtime]:
    """Return PyTorch with the kernels of this package (as loaded, optimized, in bfloat16) and the ONNX runtimes.

    The ONNX files go to `folder`.
    """
    model = load_exportable(str(checkpoint), "float32").model
    half = load_exportable(str(checkpoint), "bfloat16").model
    runtimes = {
        "PyTorch": Logits(model),
        "optimized": Logits(optimize_for_inference(model)),
        "bfloat16": lambda pixel_values: half(pixel_values.bfloat16()).logits.float(),
    }
    for dtype in DTYPES:
        file = folder / f"{dtype}.onnx"
        write_file(str(checkpoint), "onnx", file, dtype=dtype)
        runtimes[f"ONNX {dtype}"] = load_onnx(file)
        runtimes[f"OpenVINO {dtype}"] = load_openvino(file, "f32")
    runtimes["OpenVINO float32, its precision"] = load_openvino(folder / "float32.onnx", None)
    return runtimes


@torch.inference_mode()
def measure_differences(variant: str, runtimes: dict[str, Runtime]) -> list[dict[str, object]]:
    config = EfficientVMambaConfig(**VARIANTS[variant])
    rows = []
    for height, width in IMAGE_SIZES:
        for batch_size in CHECKED_BATCH_SIZES:
            images = create_check_images(config, (batch_size, height, width))
            expected = runtimes["PyTorch"](images)
            row = {"network": variant, "image": f"{height} x {width}", "batch": batch_size}
            row["largest logit"] = expected.abs().max().item()
            for name, runtime in runtimes.items():
                if name != "PyTorch":
                    row[name] = (runtime(images) - expected).abs().max().item()
            rows.append(row)
    return rows


@torch.inference_mode()
def compare_latencies(
    variant: str, runtimes: dict[str, Runtime], arguments: argparse.Namespace
) -> list[dict[str, object]]:
    rows = []
    for batch_size in arguments.batch_sizes:
        images = torch.randn(batch_size, 3, 224, 224)
        methods = {name: partial(runtime, images) for name, runtime in runtimes.items()}
        seconds = median_times(methods, arguments.repeats, f"{variant}, batches of {batch_size}")
        for name in runtimes:
            rows.append(
                {
                    "network": variant,
                    "runtime": name,
                    "batch": batch_size,
                    "median ms": 1e3 * seconds[name],
                    "/ PyTorch": seconds[name] / seconds["PyTorch"],
                }
            )
    return rows


@torch.inference_mode()
def measure_digits() -> list[dict[str, object]]:
    """Measure the bundled model in each runtime on the held-out digits."""
    checkpoint = find_bundled_model()
    image_processor = BitImageProcessorPil.from_pretrained(checkpoint)
    _, held_out = load_splits()
    pixel_values = image_processor(held_out.images, return_tensors="pt").pixel_values
    with TemporaryDirectory() as folder:
        runtimes = make_runtimes(checkpoint, Path(folder))
        logits = {name: runtime(pixel_values) for name, runtime in runtimes.items()}
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
    logging.disable_progress_bar()
    print_table("The bundled model on held-out digits", digits := measure_digits())
    write_csv(arguments.output_dir / "export_digits.csv", digits, environment)
    differences, latencies = [], []
    for variant in arguments.variants:
        with TemporaryDirectory() as folder:
            save_checkpoint(variant, Path(folder))
            runtimes = make_runtimes(Path(folder), Path(folder))
            differences += measure_differences(variant, runtimes)
            latencies += compare_latencies(variant, runtimes, arguments)
    print_table("Largest difference of a logit to PyTorch in float32", differences)
    write_csv(arguments.output_dir / "export_differences.csv", differences, environment)
    print_table("Latency on a CPU, 224 x 224", latencies)
    write_csv(arguments.output_dir / "export_latency.csv", latencies, environment)


if __name__ == "__main__":
    main()
