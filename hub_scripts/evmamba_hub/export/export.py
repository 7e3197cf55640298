"""`evmamba export`: a classifier as a file for other runtimes, compared with PyTorch before it is left on the disk."""

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

from evmamba_hub.errors import UserError, require
from evmamba_hub.files import staged
from evmamba_hub.inference.classify import load_classifier
from evmamba_kernels import use_backend
from modeling_evmamba import EfficientVMambaConfig, EfficientVMambaForImageClassification
from modeling_evmamba.inference_evmamba import fold_batch_norms


Runtime = Callable[[torch.Tensor], torch.Tensor]  # pixel values, (B, C, H, W), to logits, (B, labels), both float32
Sizes = list[tuple[int, int, int]]  # batch size, height and width

# The largest difference of a logit that is let pass, in units of the largest logit, of 1 at least
BOUNDS = {"float32": 1e-4, "float16": 1e-2, "int8": 1e-1}

CHECK_BATCH_SIZES = (1, 5, 2)


class Logits(nn.Module):
    """A classifier that takes one tensor and returns one."""

    def __init__(self, model: EfficientVMambaForImageClassification):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values).logits


@dataclass
class ExportReport:
    """What was written, and how far its logits are from PyTorch's."""

    images: str  # which ones it takes
    differences: dict[tuple[int, int, int], float]  # by batch size, height and width, the largest of all logits


@dataclass
class Exportable:
    """A classifier of this package on the CPU."""

    model: EfficientVMambaForImageClassification
    image_processor: BaseImageProcessor


def load_exportable(model: str, dtype: str, revision: str | None = None) -> Exportable:
    """The classifier of a folder or Hub id, on the CPU.

    Raises:
        UserError: for a model that cannot be found, and for other networks.
    """
    classifier = load_classifier(model, "cpu", dtype, revision)
    if not isinstance(classifier.model, EfficientVMambaForImageClassification):
        raise UserError(f"only EfficientVMamba is exported here, {model!r} is another kind of network")
    assert classifier.image_processor is not None  # the pipeline needs one
    return Exportable(classifier.model, classifier.image_processor)


def smallest_side(config: EfficientVMambaConfig) -> int:
    """Pixels from which on a graph for all sizes holds: the last stage has more than one place a side.

    PyTorch traces sizes of 1 as constants.
    """
    return config.patch_size * (2 ** (config.num_stages - 1) + 1)


def choose_check_sizes(config: EfficientVMambaConfig, image_size: tuple[int, int] | None) -> Sizes:
    """What an export is tried on: the model's own size, odd sides that no patch divides, small images."""
    if image_size is not None:
        return [(batch_size, *image_size) for batch_size in CHECK_BATCH_SIZES]
    smallest = smallest_side(config)
    size = config.image_size if isinstance(config.image_size, int) else max(config.image_size)
    size = max(size, smallest + 1)
    sides = [(size, size), (size + 1, size - 1), (smallest + 1, smallest + 17)]
    return [(batch_size, *pair) for batch_size, pair in zip(CHECK_BATCH_SIZES, sides, strict=True)]


def create_check_images(config: EfficientVMambaConfig, size: tuple[int, int, int]) -> torch.Tensor:
    """Noise on a colour of its own for every image, so that their logits differ."""
    batch_size, height, width = size
    generator = torch.Generator().manual_seed(0)
    colours = torch.randn(batch_size, config.num_channels, 1, 1, generator=generator)
    return colours + torch.randn(batch_size, config.num_channels, height, width, generator=generator)


@torch.inference_mode()
def check_logits(
    runtime: Runtime,
    reference: EfficientVMambaForImageClassification,
    image_size: tuple[int, int] | None,
    bound: float,
) -> dict[tuple[int, int, int], float]:
    """The largest difference of a logit by batch size, height and width.

    Raises:
        UserError: where one is beyond the bound, in units of the largest logit (of 1 at least), or no number.
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


def export_model(
    model: str,
    output: Path,
    format: str,
    *,
    image_size: tuple[int, int] | None = None,
    dtype: str = "float32",
    revision: str | None = None,
) -> ExportReport:
    """Writes one file, which takes `pixel_values` (B, C, H, W) and returns `logits` (B, labels), both in `dtype`.

    Args:
        model: folder or Hub id.
        output: the file. It appears, or is replaced, when its logits are those of PyTorch, and not before.
        format: a name in `FORMATS`.
        image_size: height and width, where they shall be fixed; batches may have any size.
        dtype: "float32", "float16", or "int8" for ONNX: the weights of linear and pointwise layers in 8 bits.
        revision: branch, tag or commit on the Hub.

    Raises:
        UserError: for a model that cannot be loaded, a file that cannot be written, a package or compiler that is
            missing, and where the logits of the file are not those of PyTorch.
    """
    suffix = FORMATS[format].suffix
    output = output.absolute()
    if output.suffix != suffix:
        raise UserError(f"files of the format {format} end in {suffix}, {output.name} does not")
    if output.is_dir() or not output.parent.is_dir():
        raise UserError(f"{output} cannot be written: it is a folder, or the folder for it does not exist")
    if dtype == "int8" and format != "onnx":
        raise UserError(f"int8 is for the format onnx, {format} takes float32 or float16")
    reference = load_exportable(model, "float32", revision).model
    config = reference.config
    if image_size is not None and min(image_size) < config.patch_size:
        raise UserError(f"images must have {config.patch_size} x {config.patch_size} pixels at least, a patch")
    with staged(output) as file:
        runtime = write_and_open(model, format, file, image_size=image_size, dtype=dtype, revision=revision)
        differences = check_logits(runtime, reference, image_size, BOUNDS[dtype])
    if image_size is None:
        smallest = smallest_side(config)
        return ExportReport(f"images of any size from {smallest} x {smallest} pixels", differences)
    return ExportReport("images of {} x {} pixels".format(*image_size), differences)


def write_and_open(
    model: str,
    format: str,
    file: Path,
    *,
    image_size: tuple[int, int] | None = None,
    dtype: str = "float32",
    revision: str | None = None,
) -> Runtime:
    """Writes the file of an export without comparing anything, and opens it. Arguments as those of `export_model`."""
    network_dtype = "float16" if dtype == "float16" else "float32"  # int8 is made of float32
    classifier = load_exportable(model, network_dtype, revision)
    fold_batch_norms(classifier.model)
    FORMATS[format].write(classifier, image_size, file)
    if dtype == "int8":
        quantize_onnx(file)
    run = FORMATS[format].load(file)
    return lambda pixel_values: run(pixel_values.to(classifier.model.dtype)).float()


@contextmanager
def quiet_exporters() -> Iterator[None]:
    """Keeps what exporters say to their developers off the terminal."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def trace(
    model: EfficientVMambaForImageClassification, image_size: tuple[int, int] | None, backend: str
) -> ExportedProgram:
    """The network as a graph, in which the scan is what `backend` makes of it."""
    smallest = smallest_side(model.config)
    height, width = image_size or (2 * smallest, 3 * smallest)  # any will do that are not special
    pixel_values = torch.zeros(2, model.config.num_channels, height, width, dtype=model.dtype)
    dynamic = {0: Dim.DYNAMIC} if image_size else {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    with torch.no_grad(), use_backend(backend), quiet_exporters():
        return torch.export.export(Logits(model), (pixel_values,), dynamic_shapes=(dynamic,))


def describe_inputs(classifier: Exportable) -> dict[str, str]:
    """What a user of the logits has to know besides: names of the labels, and how images become pixel values."""
    id2label = classifier.model.config.id2label or {}
    return {
        "labels": json.dumps([label for _, label in sorted(id2label.items())], ensure_ascii=False),
        "preprocessing": json.dumps(classifier.image_processor.to_dict(), ensure_ascii=False),
    }


def write_onnx(classifier: Exportable, image_size: tuple[int, int] | None, file: Path) -> None:
    require("onnx", "onnxruntime", "onnxscript", extra="export")
    from onnxscript import optimizer

    from evmamba_hub.export import onnx_scan

    # the scan as one node, whichever the kernel, which `onnx_scan` translates
    program = trace(classifier.model, image_size, "numba")
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
        assert exported is not None  # it is for the exporter with dynamo=True
        # weights of any size are transposed here, not whenever a file is opened
        optimizer.optimize(exported.model, input_size_limit=sys.maxsize, output_size_limit=sys.maxsize)
    for node in exported.model.graph.all_nodes():
        node.metadata_props.clear()  # lines of our code, two thirds of a small file
    exported.model.metadata_props.update(describe_inputs(classifier))
    exported.save(file)


def quantize_onnx(file: Path) -> None:
    """Replaces the weights of linear and pointwise layers by 8 bits; inputs of theirs are rounded as they come."""
    import onnx
    from onnxruntime.quantization import quantize_dynamic

    model = onnx.load(file)
    matrices = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) == 2}
    products_of_scan = [  # one for each of its groups, or none of weights
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
    # the scan in PyTorch's operators: the file needs nothing of this package
    program = trace(classifier.model, image_size, "torch")
    extra_files = {f"{name}.json": text for name, text in describe_inputs(classifier).items()}
    with quiet_exporters():
        torch.export.save(program, file, extra_files=extra_files)


def load_torch_export(file: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    with quiet_exporters():
        program = torch.export.load(file)
    return program.module()


def require_compiler() -> None:
    """Raises a `UserError` where TorchInductor finds no C++ compiler."""
    from torch._inductor import config

    compiler = config.cpp.cxx[-1]
    if shutil.which(compiler) is None:
        raise UserError(f"there is no C++ compiler {compiler} here: install one, or name yours in the variable CXX")


def write_aoti(classifier: Exportable, image_size: tuple[int, int] | None, file: Path) -> None:
    require_compiler()
    # the scan as a call of our kernel: in PyTorch's operators, it would take many minutes to compile
    program = trace(classifier.model, image_size, "numba")
    with quiet_exporters():
        torch._inductor.aoti_compile_and_package(program, package_path=str(file))


def load_aoti(file: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    with quiet_exporters():
        return torch._inductor.aoti_load_package(str(file))


class Format(NamedTuple):
    """How a kind of file is called, written and opened."""

    suffix: str
    write: Callable[[Exportable, tuple[int, int] | None, Path], None]
    load: Callable[[Path], Callable[[torch.Tensor], torch.Tensor]]  # pixel values to logits in the file's dtype


FORMATS = {
    "onnx": Format(".onnx", write_onnx, load_onnx),
    "torch-export": Format(".pt2", write_torch_export, load_torch_export),
    "aoti": Format(".pt2", write_aoti, load_aoti),
}
