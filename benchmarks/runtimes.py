"""The runtimes in which networks are compared on CPUs.

A runtime is a function that takes a network, its images, and a directory for files that the network's runtimes share.
It returns a call that classifies these images.
"""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from networks import run_model
from torch import nn
from transformers import BitImageProcessorPil

from evmamba_hub.export.export import Exportable, load_onnx, quantize_onnx, quiet_exporters, write_onnx
from modeling_evmamba import optimize_for_inference
from modeling_evmamba.inference_evmamba import fold_batch_norms


Call = Callable[[], object]
Build = Callable[[nn.Module, torch.Tensor, Path], Call]

# for networks and images: convolutions are fastest channels-last (NOTES.md)
BFLOAT16 = {"dtype": torch.bfloat16, "memory_format": torch.channels_last}

CALIBRATION_BATCHES = 4  # of noise, since latency does not depend on the scales


# PyTorch


def build_eager(model: nn.Module, images: torch.Tensor, folder: Path) -> Call:
    return partial(run_model, model, images)


def build_bfloat16(model: nn.Module, images: torch.Tensor, folder: Path) -> Call:
    return partial(run_model, copy.deepcopy(model).to(**BFLOAT16), images.to(**BFLOAT16))


def build_compiled(model: nn.Module, images: torch.Tensor, folder: Path) -> Call:
    from torch._inductor import config

    compiled = torch.compile(model)
    with config.patch(freezing=True):
        run_model(compiled, images)
    return partial(run_model, compiled, images)


def build_compiled_bfloat16(model: nn.Module, images: torch.Tensor, folder: Path) -> Call:
    return build_compiled(copy.deepcopy(model).to(**BFLOAT16), images.to(**BFLOAT16), folder)


def build_optimized(model: nn.Module, images: torch.Tensor, folder: Path) -> Call:
    return partial(run_model, optimize_for_inference(model), images)


def build_optimized_bfloat16(model: nn.Module, images: torch.Tensor, folder: Path) -> Call:
    return partial(run_model, optimize_for_inference(model, dtype=torch.bfloat16), images)


def build_optimized_int8(model: nn.Module, images: torch.Tensor, folder: Path) -> Call:
    return partial(run_model, optimize_for_inference(model, dtype=torch.int8), images)


# ONNX Runtime


def export_ours(model: nn.Module, folder: Path) -> Path:
    """Write the ONNX file of `evmamba export`, for images of any size, unless the directory has it."""
    file = folder / "float32.onnx"
    if not file.exists():
        folded = copy.deepcopy(model)
        fold_batch_norms(folded)
        write_onnx(Exportable(folded, BitImageProcessorPil()), None, file)
    return file


def build_our_onnx(model: nn.Module, images: torch.Tensor, folder: Path) -> Call:
    return partial(load_onnx(export_ours(model, folder)), images)


def build_our_onnx_dynamic_int8(model: nn.Module, images: torch.Tensor, folder: Path) -> Call:
    file = folder / "dynamic_int8.onnx"
    quantize_onnx(export_ours(model, folder), file)
    return partial(load_onnx(file), images)


def export_peer(model: nn.Module, images: torch.Tensor, folder: Path) -> Path:
    """Write an ONNX file for images of this shape, unless the directory has it."""
    from evmamba_hub.export.onnx_scan import OPSET

    file = folder / "float32.onnx"
    if not file.exists():
        with quiet_exporters():
            exported = torch.onnx.export(
                model,
                (images,),
                dynamo=True,
                opset_version=OPSET,
                input_names=["pixel_values"],
                output_names=["logits"],
                verbose=False,
            )
        exported.save(file)
    return file


def build_onnx(model: nn.Module, images: torch.Tensor, folder: Path) -> Call:
    return partial(load_onnx(export_peer(model, images, folder)), images)


def build_onnx_dynamic_int8(model: nn.Module, images: torch.Tensor, folder: Path) -> Call:
    """Quantize the weights of linear layers. Dynamic convolutions are many times slower than those in float32."""
    from onnxruntime.quantization import quantize_dynamic

    file = folder / "dynamic_int8.onnx"
    with quiet_exporters():
        quantize_dynamic(
            export_peer(model, images, folder), file, op_types_to_quantize=["MatMul", "Gemm"], per_channel=True
        )
    return partial(load_onnx(file), images)


def build_onnx_static_int8(model: nn.Module, images: torch.Tensor, folder: Path) -> Call:
    """Quantize weights and activations. On x86, unsigned activations with signed weights are fastest."""
    from onnxruntime.quantization import QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared, file = folder / "prepared.onnx", folder / "static_int8.onnx"
    with quiet_exporters():
        quant_pre_process(export_peer(model, images, folder), prepared)
        quantize_static(
            prepared,
            file,
            Noise(images),
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
        )
    return partial(load_onnx(file), images)


class Noise:
    """The calibration data of `quantize_static`: noise of the images' shape."""

    def __init__(self, images: torch.Tensor):
        self.batches = iter([torch.randn_like(images).numpy() for _ in range(CALIBRATION_BATCHES)])

    def get_next(self) -> dict[str, object] | None:
        batch = next(self.batches, None)
        return None if batch is None else {"pixel_values": batch}


OUR_RUNTIMES: dict[str, Build] = {
    "PyTorch": build_eager,
    "bfloat16": build_bfloat16,
    "optimized": build_optimized,
    "optimized bfloat16": build_optimized_bfloat16,
    "optimized int8": build_optimized_int8,
    "ONNX": build_our_onnx,
    "ONNX dynamic int8": build_our_onnx_dynamic_int8,
}
PEER_RUNTIMES: dict[str, Build] = {
    "PyTorch": build_eager,
    "bfloat16": build_bfloat16,
    "compiled": build_compiled,
    "compiled bfloat16": build_compiled_bfloat16,
    "ONNX": build_onnx,
    "ONNX dynamic int8": build_onnx_dynamic_int8,
    "ONNX static int8": build_onnx_static_int8,
}
RUNTIMES = list(OUR_RUNTIMES | PEER_RUNTIMES)
