"""Compare optimized copies in float32, bfloat16 and 8-bit integers with the model: logits, first classes, and digits.

The networks are T, S and B with the deterministic weights of the golden tests. The images are noise of many scales,
contrasts and colors. The bundled model counts the held-out digits that each copy classifies correctly.

Example:
    python benchmarks/check_dtypes.py --variants tiny --images 64
"""

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from measure import RESULTS_DIR, describe_environment, print_table, write_csv
from rich.progress import track
from transformers import BitImageProcessorPil

from evmamba_demo.bundled import find_bundled_model
from evmamba_hub.convert.original_checkpoint import load_original_checkpoint
from modeling_evmamba import VARIANTS, EfficientVMambaForImageClassification, optimize_for_inference
from training_evmamba.digits import load_splits


sys.path.append(str(Path(__file__).parents[1] / "tests"))
from golden_values import original_state_dict  # the tests are not a package


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
SEED = 7  # of the golden logits
BATCH_SIZE = 8


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="default: all")
    parser.add_argument("--images", type=int, default=512, help="images for each network; default: 512")
    parser.add_argument(
        "--output-dir", type=Path, default=RESULTS_DIR, help="directory of the CSV files; default: benchmarks/results"
    )
    return parser.parse_args()


def load_network(variant: str) -> EfficientVMambaForImageClassification:
    with TemporaryDirectory() as folder:
        torch.save(original_state_dict(variant, SEED), Path(folder) / "weights.pth")
        checkpoint = load_original_checkpoint(Path(folder) / "weights.pth")
    model = EfficientVMambaForImageClassification(checkpoint.config).eval()
    model.load_state_dict(checkpoint.state_dict)
    return model


def create_images(count: int, generator: torch.Generator) -> torch.Tensor:
    """Return images `(count, 3, 224, 224)` of noise. Each has a scale, a contrast and a mean color of its own."""
    images = []
    for _ in range(count):
        size = int(torch.randint(2, 225, (), generator=generator))
        noise = F.interpolate(torch.randn(1, 3, size, size, generator=generator), 224, mode="bicubic")
        contrast, color = torch.rand((), generator=generator), torch.randn(1, 3, 1, 1, generator=generator)
        images.append(2 * contrast * noise + color)
    return torch.cat(images)


@torch.inference_mode()
def measure_differences(variant: str, num_images: int) -> list[dict[str, object]]:
    model, generator = load_network(variant), torch.Generator().manual_seed(0)
    copies = {name: optimize_for_inference(model, dtype) for name, dtype in DTYPES.items()}
    batches: dict[str, list[torch.Tensor]] = {name: [] for name in ("model", *copies)}
    for start in track(range(0, num_images, BATCH_SIZE), f"{variant}, {num_images} images"):
        images = create_images(min(BATCH_SIZE, num_images - start), generator)
        for name, each in (("model", model), *copies.items()):
            batches[name].append(each(images).logits)
    logits = {name: torch.cat(parts) for name, parts in batches.items()}
    expected, first = logits["model"], logits["model"].argmax(dim=1)
    return [
        {
            "network": variant,
            "dtype": name,
            "largest difference": (logits[name] - expected).abs().max().item(),
            "mean difference": (logits[name] - expected).abs().mean().item(),
            "standard deviation of logits": expected.std(dim=1).mean().item(),
            "same first class": (logits[name].argmax(dim=1) == first).sum().item(),
            "of": num_images,
            "first classes": len(first.unique()),
        }
        for name in DTYPES
    ]


@torch.inference_mode()
def measure_digits() -> list[dict[str, object]]:
    """Count the held-out digits that the bundled model classifies correctly."""
    checkpoint, (_, held_out) = find_bundled_model(), load_splits()
    image_processor = BitImageProcessorPil.from_pretrained(checkpoint)
    pixel_values = image_processor(held_out.images, return_tensors="pt").pixel_values
    model = EfficientVMambaForImageClassification.from_pretrained(checkpoint)
    models = {"model": model} | {name: optimize_for_inference(model, dtype) for name, dtype in DTYPES.items()}
    return [
        {
            "dtype": name,
            "correct": (each(pixel_values).logits.argmax(dim=1) == held_out.labels).sum().item(),
            "of": len(held_out.labels),
        }
        for name, each in models.items()
    ]


def main() -> None:
    arguments, environment = parse_arguments(), describe_environment()
    print_table("The bundled model on held-out digits", digits := measure_digits())
    write_csv(arguments.output_dir / "dtype_digits.csv", digits, environment)
    differences = [row for variant in arguments.variants for row in measure_differences(variant, arguments.images)]
    print_table("Logits of optimized copies, compared with the model", differences)
    write_csv(arguments.output_dir / "dtype_differences.csv", differences, environment)


if __name__ == "__main__":
    main()
