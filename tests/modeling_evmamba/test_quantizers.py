"""Quantizers of other libraries reach the weights of linear layers, and the bundled model keeps its accuracy."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BitImageProcessorPil, BitsAndBytesConfig, QuantoConfig, TorchAoConfig

from evmamba_demo.bundled import find_bundled_model
from modeling_evmamba import (
    VARIANTS,
    EfficientVMambaConfig,
    EfficientVMambaForImageClassification,
    optimize_for_inference,
)
from training_evmamba.digits import load_splits


INSTALL = 'pip install ".[test]"'


def load_digits(**options) -> EfficientVMambaForImageClassification:
    return EfficientVMambaForImageClassification.from_pretrained(find_bundled_model(), **options).eval()


def create_tiny() -> EfficientVMambaForImageClassification:
    return EfficientVMambaForImageClassification(EfficientVMambaConfig(**VARIANTS["tiny"], num_labels=1000)).eval()


def quantize_by_torchao(model: nn.Module, config_name: str) -> None:
    torchao = pytest.importorskip("torchao.quantization", reason=f"needs torchao: {INSTALL}")
    torchao.quantize_(model, getattr(torchao, config_name)())


def quantize_by_quanto(model: nn.Module) -> None:
    quanto = pytest.importorskip("optimum.quanto", reason=f"needs optimum-quanto: {INSTALL}")
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)


def quantize_by_bitsandbytes(model: nn.Module) -> None:
    """Replace the linear layers as transformers does, for a model in memory."""
    bitsandbytes = pytest.importorskip("bitsandbytes", reason=f"needs bitsandbytes: {INSTALL}")
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                layer = bitsandbytes.nn.Linear8bitLt(
                    child.in_features, child.out_features, child.bias is not None, has_fp16_weights=False
                )
                layer.load_state_dict(child.state_dict())
                setattr(module, name, layer.to("cpu"))


QUANTIZERS = {
    "torchao, 8-bit weights": lambda model: quantize_by_torchao(model, "Int8WeightOnlyConfig"),
    "torchao, dynamic 8 bits": lambda model: quantize_by_torchao(model, "Int8DynamicActivationInt8WeightConfig"),
    "quanto, 8-bit weights": quantize_by_quanto,
    "bitsandbytes, 8 bits": quantize_by_bitsandbytes,
}


def quantized_weights(model: nn.Module) -> int:
    """Return the number of weights that are no plain floating-point tensors any more."""
    weights = [getattr(module, "weight", None) for module in model.modules()]
    return sum(
        weight.numel()
        for weight in weights
        if weight is not None and (type(weight.data) is not torch.Tensor or not weight.is_floating_point())
    )


Digits = tuple[torch.Tensor, torch.Tensor]  # pixel values (599, 3, H, W) and labels (599,)


@pytest.fixture(scope="module")
def digits() -> Digits:
    _, held_out = load_splits()
    image_processor = BitImageProcessorPil.from_pretrained(find_bundled_model())
    return image_processor(held_out.images, return_tensors="pt").pixel_values, held_out.labels


@torch.no_grad()
def count_correct(model: nn.Module, digits: Digits) -> int:
    pixel_values, labels = digits
    return (model(pixel_values).logits.argmax(dim=-1) == labels).sum().item()


@pytest.fixture(scope="module")
def plain_correct(digits) -> int:
    return count_correct(load_digits(), digits)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_quantizers_reach_the_weights(quantizer):
    model = create_tiny()
    num_parameters = model.num_parameters()
    QUANTIZERS[quantizer](model)
    assert quantized_weights(model) >= 0.95 * num_parameters


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_digits_keep_their_accuracy(quantizer, digits, plain_correct):
    model = load_digits()
    QUANTIZERS[quantizer](model)
    assert quantized_weights(model) > 0
    assert count_correct(model, digits) >= plain_correct - 3


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_optimized_copies_and_quantizers_refuse_each_other(quantizer):
    model = load_digits()
    optimized = optimize_for_inference(model)
    QUANTIZERS[quantizer](model)
    with pytest.raises(TypeError, match=r"cannot pack: use the quantized|does not know: merge adapters first"):
        optimize_for_inference(model)
    if quantizer.startswith("bitsandbytes"):
        return  # it only replaces layers while transformers loads a model
    with pytest.raises(RuntimeError, match="quantize, adapt or trace the original"):
        QUANTIZERS[quantizer](optimized)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    create_tiny().save_pretrained(folder)
    return folder


def check_configuration(config, folder: Path) -> EfficientVMambaForImageClassification:
    """Load the tiny variant with a configuration of transformers, check how much it quantizes, and return it."""
    model = EfficientVMambaForImageClassification.from_pretrained(folder, quantization_config=config).eval()
    assert quantized_weights(model) >= 0.95 * create_tiny().num_parameters()
    return model


def test_torchao_by_a_configuration(tiny, tmp_path):
    torchao = pytest.importorskip("torchao.quantization", reason=f"needs torchao: {INSTALL}")
    model = check_configuration(TorchAoConfig(torchao.Int8WeightOnlyConfig()), tiny)
    model.save_pretrained(tmp_path)
    loaded = EfficientVMambaForImageClassification.from_pretrained(tmp_path).eval()
    assert quantized_weights(loaded) == quantized_weights(model)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded(images).logits, model(images).logits)


def test_quanto_by_a_configuration(tiny):
    pytest.importorskip("optimum.quanto", reason=f"needs optimum-quanto: {INSTALL}")
    check_configuration(QuantoConfig(weights="int8"), tiny)


def test_bitsandbytes_by_a_configuration(tiny):
    pytest.importorskip("bitsandbytes", reason=f"needs bitsandbytes: {INSTALL}")
    check_configuration(BitsAndBytesConfig(load_in_8bit=True), tiny)
