"""`evmamba check-runtimes`: one checkpoint through every runtime that is here."""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from evmamba_kernels import use_backend
from hub_scripts.errors import UserError
from hub_scripts.export import (
    FORMATS,
    Logits,
    Runtime,
    check_images,
    check_sizes,
    load_exportable,
    require_compiler,
    without_chatter,
    write_and_open,
)
from modeling_evmamba import EfficientVMambaForImageClassification, optimize_for_inference


WARM_UP_CALLS, TIMED_CALLS = 3, 15


@dataclass
class Check:
    """What one runtime made of the checkpoint, or why it could not be tried."""

    runtime: str
    difference: float | None = None  # the largest of all logits
    milliseconds: float | None = None  # the median of a call with one image
    missing: str | None = None


@dataclass
class Checkpoint:
    """A folder or Hub id, and the classifier from there in float32."""

    name: str
    revision: str | None
    model: EfficientVMambaForImageClassification


def in_eager_mode(checkpoint: Checkpoint) -> Runtime:
    return Logits(checkpoint.model)


def in_plain_operators(checkpoint: Checkpoint) -> Runtime:
    def run(pixel_values: torch.Tensor) -> torch.Tensor:
        with use_backend("torch"):
            return checkpoint.model(pixel_values).logits

    return run


def optimized(checkpoint: Checkpoint) -> Runtime:
    return Logits(optimize_for_inference(checkpoint.model))


def in_bfloat16(checkpoint: Checkpoint) -> Runtime:
    model = load_exportable(checkpoint.name, "bfloat16", checkpoint.revision).model
    return lambda pixel_values: model(pixel_values.bfloat16()).logits.float()


def on_accelerator(checkpoint: Checkpoint) -> Runtime:
    if not torch.accelerator.is_available():
        raise UserError("PyTorch finds no accelerator")
    device = torch.accelerator.current_accelerator()
    model = deepcopy(checkpoint.model).to(device)
    return lambda pixel_values: model(pixel_values.to(device)).logits.cpu()


def compiled(checkpoint: Checkpoint) -> Runtime:
    require_compiler()
    return torch.compile(Logits(checkpoint.model), fullgraph=True, dynamic=True)


def exported(format: str, dtype: str = "float32") -> Callable[[Checkpoint], Runtime]:
    def build(checkpoint: Checkpoint) -> Runtime:
        with TemporaryDirectory() as folder:
            file = Path(folder) / f"model{FORMATS[format].suffix}"
            return write_and_open(checkpoint.name, format, file, dtype=dtype, revision=checkpoint.revision)

    return build


# name -> builder, which raises a UserError where something is missing
RUNTIMES: dict[str, Callable[[Checkpoint], Runtime]] = {
    "PyTorch": in_eager_mode,
    "PyTorch, optimize_for_inference": optimized,
    "PyTorch, scan in plain operators": in_plain_operators,
    "PyTorch, bfloat16": in_bfloat16,
    "PyTorch, accelerator": on_accelerator,
    "torch.compile": compiled,
    "torch.export": exported("torch-export"),
    "AOTInductor": exported("aoti"),
    "ONNX Runtime": exported("onnx"),
    "ONNX Runtime, float16": exported("onnx", "float16"),
    "ONNX Runtime, int8": exported("onnx", "int8"),
}


def check_runtimes(model: str, names: Iterable[str] = tuple(RUNTIMES), revision: str | None = None) -> Iterator[Check]:
    """Compares each runtime with PyTorch in float64, on several sizes of images, and takes its time for one image.

    Args:
        model: folder or Hub id.
        names: of `RUNTIMES`.
        revision: branch, tag or commit on the Hub.

    Raises:
        UserError: for a model that cannot be loaded, and for other networks.
    """
    checkpoint = Checkpoint(model, revision, load_exportable(model, "float32", revision).model)
    exact = deepcopy(checkpoint.model).double()
    batches = []
    for size in check_sizes(exact.config, None):
        images = check_images(exact.config, size)
        with torch.inference_mode():
            batches.append((images, exact(images.double()).logits))
    for name in names:
        try:
            runtime = RUNTIMES[name](checkpoint)
        except UserError as error:
            yield Check(name, missing=str(error))
            continue
        with without_chatter():  # of compilers, at the first call
            difference = find_largest_difference(runtime, batches)
        images, _ = batches[0]
        yield Check(name, difference, measure_latency(runtime, images))


@torch.inference_mode()
def find_largest_difference(runtime: Runtime, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Of all logits; NaN where one is."""
    return torch.stack([(runtime(images) - expected).abs().max() for images, expected in batches]).max().item()


@torch.inference_mode()
def measure_latency(runtime: Runtime, images: torch.Tensor) -> float:
    """Median milliseconds of a call."""
    milliseconds = []
    for _ in range(WARM_UP_CALLS + TIMED_CALLS):
        start = time.perf_counter()
        runtime(images)
        milliseconds.append(1e3 * (time.perf_counter() - start))
    return statistics.median(milliseconds[WARM_UP_CALLS:])
