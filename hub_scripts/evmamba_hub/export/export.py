"""`evmamba export`: export a classifier as a file for another runtime, and compare its logits with PyTorch's."""

import json
import logging
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from transformers import BaseImageProcessor
from transformers.utils import CONFIG_NAME

from evmamba_hub.errors import UserError, check_versions, require
from evmamba_hub.files import staged
from evmamba_hub.inference.classify import load_pipeline
from evmamba_kernels import use_backend
from modeling_evmamba import EfficientVMambaConfig, EfficientVMambaForImageClassification
from modeling_evmamba.inference_evmamba import fold_batch_norms


Runtime = Callable[[torch.Tensor], torch.Tensor]  # pixel values (B, C, H, W) -> logits (B, labels), both float32
Sizes = list[tuple[int, int, int]]  # batch size, height and width

# The largest accepted difference of a logit, in units of the largest logit (at least 1)
BOUNDS = {"float32": 1e-4, "float16": 1e-2, "int8": 1e-1}

CHECK_BATCH_SIZES = (1, 5, 2)


class Logits(nn.Module):
    """A classifier that takes one tensor and returns one."""

    def __init__(self, model: EfficientVMambaForImageClassification):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values).logits


class LogitsOfAnyDtype(Logits):
    """A classifier whose logits have the dtype of the pixel values, whatever its own is."""

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return super().forward(pixel_values.to(self.model.dtype)).to(pixel_values.dtype)


@dataclass
class ExportReport:
    """The result of an export, with the differences of its logits to PyTorch's."""

    images: str  # the images that the file takes
    differences: dict[tuple[int, int, int], float]  # (batch size, height, width) -> largest difference of a logit


@dataclass
class Exportable:
    """A classifier of this package on the CPU, with its image processor."""

    model: EfficientVMambaForImageClassification
    image_processor: BaseImageProcessor
    input_dtype: torch.dtype = torch.float32  # of pixel values and logits in the file


def load_exportable(model: str, dtype: str, revision: str | None = None) -> Exportable:
    """Load the classifier of a directory or Hub id on the CPU.

    Raises:
        UserError: If the model cannot be found, or is another network.
    """
    classifier = load_pipeline(model, "cpu", dtype, revision, optimize=False)
    if not isinstance(classifier.model, EfficientVMambaForImageClassification):
        raise UserError(f"{model!r} is another kind of network: only EfficientVMamba can be exported")
    assert classifier.image_processor is not None  # the pipeline requires one
    return Exportable(classifier.model, classifier.image_processor)


def smallest_side(config: EfficientVMambaConfig) -> int:
    """Return the smallest side in pixels for a graph of any size.

    PyTorch traces sizes of 1 as constants, so each side of the last stage needs at least two positions.
    """
    return config.patch_size * (2 ** (config.num_stages - 1) + 1)


def choose_check_sizes(config: EfficientVMambaConfig, image_size: tuple[int, int] | None) -> Sizes:
    """Return the sizes on which an export is checked.

    If the size is not fixed, they are the model's own size, odd sides that no patch divides, and small images.
    """
    if image_size is not None:
        return [(batch_size, *image_size) for batch_size in CHECK_BATCH_SIZES]
    smallest = smallest_side(config)
    size = config.image_size if isinstance(config.image_size, int) else max(config.image_size)
    size = max(size, smallest + 1)
    sides = [(size, size), (size + 1, size - 1), (smallest + 1, smallest + 17)]
    return [(batch_size, *pair) for batch_size, pair in zip(CHECK_BATCH_SIZES, sides, strict=True)]


def create_check_images(config: EfficientVMambaConfig, size: tuple[int, int, int]) -> torch.Tensor:
    """Return noise `(B, C, H, W)` on a different color for every image, because their logits must differ."""
    batch_size, height, width = size
    generator = torch.Generator().manual_seed(0)
    colors = torch.randn(batch_size, config.num_channels, 1, 1, generator=generator)
    return colors + torch.randn(batch_size, config.num_channels, height, width, generator=generator)


@torch.inference_mode()
def check_logits(
    runtime: Runtime,
    reference: EfficientVMambaForImageClassification,
    image_size: tuple[int, int] | None,
    bound: float,
) -> dict[tuple[int, int, int], float]:
    """Compare the logits of a runtime with those of the reference.

    Args:
        runtime: The exported network.
        reference: The network in PyTorch.
        image_size: The height and width of all images, or None for images of any size.
        bound: The largest accepted difference, in units of the largest logit (at least 1).

    Returns:
        The largest difference of a logit by batch size, height and width.

    Raises:
        UserError: If a difference is beyond the bound, or not a number.
    """
    differences = {}
    for size in choose_check_sizes(reference.config, image_size):
        images = create_check_images(reference.config, size)
        expected = reference(images).logits
        differences[size] = (runtime(images) - expected).abs().max().item()
        if not differences[size] <= bound * max(1.0, expected.abs().max().item()):
            raise UserError(
                f"the logits of the export differ from PyTorch's by {differences[size]:.2g} for images of "
                f"{size[1]} x {size[2]}, more than {bound:g} of the largest: nothing was written"
            )
    return differences


def check_labels(config: EfficientVMambaConfig) -> None:
    """Check that each class has a label.

    Raises:
        UserError: If a class has none.
    """
    labels = config.id2label or {}
    missing = sorted(set(range(len(labels))) - labels.keys())
    if missing:
        raise UserError(
            f"id2label in {CONFIG_NAME} has no label for class {missing[0]}: name the classes 0 to {len(labels) - 1}"
        )


def export_model(
    model: str,
    output: Path,
    format: str,
    *,
    image_size: tuple[int, int] | None = None,
    dtype: str = "float32",
    half_inputs: bool = False,
    revision: str | None = None,
    float32_file: Path | None = None,
) -> ExportReport:
    """Export a classifier to one file, which takes `pixel_values` (B, C, H, W) and returns `logits` (B, labels).

    Pixel values and logits are in float32, whatever the dtype of the weights.

    Args:
        model: Directory or Hub id.
        output: The file to write. It is created or replaced only if its logits equal PyTorch's up to `BOUNDS`.
        format: A key of `FORMATS`.
        image_size: The height and width to fix, or None for images of any size. The batch size is never fixed.
        dtype: "float32", "float16" or, for ONNX, "int8" (8-bit weights in linear layers).
        half_inputs: Take pixel values and return logits in float16. It is for the dtype "float16".
        revision: Branch, tag or commit on the Hub.
        float32_file: An ONNX file of the same model in float32. "int8" quantizes it instead of a new one.

    Raises:
        UserError: If the model cannot be loaded, the file cannot be written, a package or compiler is missing, or
            logits differ from PyTorch's.
    """
    suffix = FORMATS[format].suffix
    output = output.absolute()
    if output.suffix != suffix:
        raise UserError(f"files of the format {format} end in {suffix}: rename {output.name}")
    if output.is_dir() or not output.parent.is_dir():
        raise UserError(f"{output} cannot be written: it is a directory, or its parent directory does not exist")
    if dtype == "int8" and format != "onnx":
        raise UserError(f"int8 is for the format onnx: {format} takes float32 or float16")
    if half_inputs and dtype != "float16":
        raise UserError(f"half inputs are for files in float16, and this one is in {dtype}: set the dtype to float16")
    reference = load_exportable(model, "float32", revision).model
    config = reference.config
    check_labels(config)
    if image_size is not None and min(image_size) < config.patch_size:
        raise UserError(
            f"images must have at least {config.patch_size} x {config.patch_size} pixels, the size of a patch"
        )
    with staged(output) as file:
        write_file(
            model,
            format,
            file,
            image_size=image_size,
            dtype=dtype,
            half_inputs=half_inputs,
            revision=revision,
            float32_file=float32_file,
        )
        differences = check_logits(open_file(format, file, half_inputs), reference, image_size, BOUNDS[dtype])
    if image_size is None:
        smallest = smallest_side(config)
        return ExportReport(f"images of any size from {smallest} x {smallest} pixels", differences)
    return ExportReport("images of {} x {} pixels".format(*image_size), differences)


def write_file(
    model: str,
    format: str,
    file: Path,
    *,
    image_size: tuple[int, int] | None = None,
    dtype: str = "float32",
    half_inputs: bool = False,
    revision: str | None = None,
    float32_file: Path | None = None,
) -> None:
    """Write an exported file, without comparing logits. `export_model` describes the arguments."""
    if dtype == "int8" and float32_file is not None:
        return quantize_onnx(float32_file, file)
    network_dtype = "float16" if dtype == "float16" else "float32"  # int8 is quantized from float32
    classifier = load_exportable(model, network_dtype, revision)
    classifier.input_dtype = torch.float16 if half_inputs else torch.float32
    fold_batch_norms(classifier.model)
    FORMATS[format].write(classifier, image_size, file)
    if dtype == "int8":
        quantize_onnx(file, file)


def open_file(format: str, file: Path, half_inputs: bool) -> Runtime:
    """Open an exported file, which takes pixel values in float16 if `half_inputs` is set."""
    run = FORMATS[format].load(file)
    input_dtype = torch.float16 if half_inputs else torch.float32
    return lambda pixel_values: run(pixel_values.to(input_dtype)).float()


@contextmanager
def quiet_exporters() -> Iterator[None]:
    """Hide the warnings and logs of exporters, which address their developers."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def trace(classifier: Exportable, image_size: tuple[int, int] | None, backend: str) -> ExportedProgram:
    """Trace the network to a graph, with the scan of the given backend."""
    check_versions()  # older PyTorch fails here
    config = classifier.model.config
    smallest = smallest_side(config)
    height, width = image_size or (2 * smallest, 3 * smallest)  # any sizes without special cases
    pixel_values = torch.zeros(2, config.num_channels, height, width, dtype=classifier.input_dtype)
    dynamic = {0: Dim.DYNAMIC} if image_size else {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    with torch.no_grad(), use_backend(backend), quiet_exporters():
        return torch.export.export(LogitsOfAnyDtype(classifier.model), (pixel_values,), dynamic_shapes=(dynamic,))


def describe_inputs(classifier: Exportable) -> dict[str, str]:
    """Return the labels and the preprocessing as JSON, which a user of the file needs."""
    id2label = classifier.model.config.id2label or {}
    return {
        "labels": json.dumps([label for _, label in sorted(id2label.items())], ensure_ascii=False),
        "preprocessing": json.dumps(classifier.image_processor.to_dict(), ensure_ascii=False),
    }


def write_onnx(classifier: Exportable, image_size: tuple[int, int] | None, file: Path) -> None:
    require("onnx", "onnxruntime", "onnxscript", extra="export")
    from onnxscript import optimizer

    from evmamba_hub.export import onnx_scan

    # a kernel's scan is a single node, which `onnx_scan` translates
    program = trace(classifier, image_size, "numba")
    with quiet_exporters():
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=onnx_scan.OPSET,
            custom_translation_table={torch.ops.evmamba_kernels.atrous_selective_scan.default: onnx_scan.scan},
            input_names=["pixel_values"],
            output_names=["logits"],
            dynamic_shapes=({0: "batch", 2: "height", 3: "width"} if image_size is None else {0: "batch"},),
            verbose=False,
        )
        assert exported is not None  # always true with dynamo=True
        # transpose all weights now, instead of whenever the file is opened
        optimizer.optimize(exported.model, input_size_limit=sys.maxsize, output_size_limit=sys.maxsize)
    for node in exported.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces of our code, two thirds of a small file
    exported.model.metadata_props.update(describe_inputs(classifier))
    exported.save(file)


def quantize_onnx(source: Path, file: Path) -> None:
    """Quantize the weights of linear layers to 8 bits. Their inputs are quantized at run time."""
    import onnx
    from onnxruntime.quantization import quantize_dynamic

    model = onnx.load(source)
    matrices = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) == 2}
    products_of_scan = [  # batched over the groups of the scan, or without weights
        node.name for node in model.graph.node if node.op_type == "MatMul" and matrices.isdisjoint(node.input)
    ]
    with quiet_exporters():
        quantize_dynamic(
            model, file, op_types_to_quantize=["MatMul"], per_channel=True, nodes_to_exclude=products_of_scan
        )


def load_onnx(file: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    from onnxruntime import InferenceSession, SessionOptions

    options = SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda pixel_values: torch.from_numpy(session.run(None, {"pixel_values": pixel_values.numpy()})[0])


def write_torch_export(classifier: Exportable, image_size: tuple[int, int] | None, file: Path) -> None:
    # with the scan in PyTorch operators, the file does not need this package
    program = trace(classifier, image_size, "torch")
    extra_files = {f"{name}.json": text for name, text in describe_inputs(classifier).items()}
    with quiet_exporters():
        torch.export.save(program, file, extra_files=extra_files)


def load_torch_export(file: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    with quiet_exporters():
        program = torch.export.load(file)
    return program.module()


def require_compiler() -> None:
    """Check that TorchInductor finds a C++ compiler.

    Raises:
        UserError: If it finds none.
    """
    from torch._inductor import config

    compiler = config.cpp.cxx[-1]
    if shutil.which(compiler) is None:
        raise UserError(f"there is no C++ compiler {compiler} here: install one, or name yours in the variable CXX")


def write_aoti(classifier: Exportable, image_size: tuple[int, int] | None, file: Path) -> None:
    require_compiler()
    # the scan as a call of our kernel, because PyTorch operators would compile for many minutes
    program = trace(classifier, image_size, "numba")
    with quiet_exporters():
        torch._inductor.aoti_compile_and_package(program, package_path=str(file))


def load_aoti(file: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    with quiet_exporters():
        return torch._inductor.aoti_load_package(str(file))


class Format(NamedTuple):
    """A file format: its suffix, and functions that write and open a file."""

    suffix: str
    write: Callable[[Exportable, tuple[int, int] | None, Path], None]
    load: Callable[[Path], Callable[[torch.Tensor], torch.Tensor]]  # pixel values -> logits, in the file's dtype


FORMATS = {
    "onnx": Format(".onnx", write_onnx, load_onnx),
    "torch-export": Format(".pt2", write_torch_export, load_torch_export),
    "aoti": Format(".pt2", write_aoti, load_aoti),
}
