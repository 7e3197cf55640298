"""Optimized copies: the same outputs, and errors for everything else."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from golden_values import relative_error
from modeling_evmamba import (
    EfficientVMambaBackbone,
    EfficientVMambaConfig,
    EfficientVMambaForImageClassification,
    optimize_for_inference,
)
from modeling_evmamba.inference_evmamba import DepthwiseConv, PackedLinear


def small_config(**changes) -> EfficientVMambaConfig:
    return EfficientVMambaConfig(
        **{"hidden_sizes": [16, 32, 64, 128], "depths": [2, 1, 2, 1], "num_labels": 10} | changes
    )


def with_statistics(model: nn.Module) -> nn.Module:
    """Randomize batch norms, since a new one is the identity."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.weight.data, module.bias.data):
                tensor.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    return model.eval()


def modules_of(model: nn.Module) -> set[type]:
    return {type(module) for module in model.modules()}


@pytest.mark.parametrize("shape", [(1, 3, 224, 224), (3, 3, 65, 47), (5, 3, 32, 32)], ids=str)
def test_logits_stay_the_same(shape):
    model = with_statistics(EfficientVMambaForImageClassification(small_config()))
    optimized = optimize_for_inference(model)
    assert nn.BatchNorm2d not in modules_of(optimized)
    assert {PackedLinear, DepthwiseConv} <= modules_of(optimized)
    images = torch.randn(shape)
    with torch.no_grad():
        assert relative_error(optimized(images).logits, model(images).logits) < 3e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_empty_batches(dtype):
    model = EfficientVMambaForImageClassification(small_config()).to(dtype)
    with torch.no_grad():
        logits = optimize_for_inference(model)(torch.randn(0, 3, 40, 37, dtype=dtype)).logits
    assert logits.shape == (0, 10) and logits.dtype == dtype


def test_large_batches_are_taken_in_parts(monkeypatch):
    """Hidden states are still those of the whole batch."""
    model = with_statistics(EfficientVMambaForImageClassification(small_config()))
    optimized = optimize_for_inference(model)
    images = torch.randn(5, 3, 64, 96)
    # 2.5 images in the first stage
    monkeypatch.setattr("modeling_evmamba.inference_evmamba.WIDEST_MAP_BYTES", 250_000)
    sizes = []
    first_stage = optimized.efficientvmamba.encoder.stages[0]
    first_stage.layers[0].layers[1].register_forward_hook(lambda layer, inputs, output: sizes.append(len(output)))
    with torch.no_grad():
        actual, expected = (each(images, output_hidden_states=True) for each in (optimized, model))
    assert sizes == [2, 2, 1]
    assert relative_error(actual.logits, expected.logits) < 3e-6
    for maps in zip(actual.hidden_states, expected.hidden_states, strict=True):
        assert relative_error(*maps) < 3e-6


@pytest.mark.parametrize(
    "changes",
    [
        {"block_types": ["inverted_residual", "evss", "inverted_residual", "evss"]},
        {"use_bias": True},
        {"use_conv_bias": False},
        {"conv_kernel": 5},
    ],
    ids=str,
)
def test_other_networks(changes):
    config = small_config(**changes)
    model = with_statistics(EfficientVMambaForImageClassification(config))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert relative_error(optimize_for_inference(model)(images).logits, model(images).logits) < 3e-6


def test_backbones_too():
    model = with_statistics(EfficientVMambaBackbone(small_config(out_features=["stage1", "stage4"])))
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        pairs = zip(optimize_for_inference(model)(images).feature_maps, model(images).feature_maps, strict=True)
        assert all(relative_error(optimized, plain) < 3e-6 for optimized, plain in pairs)


def test_lower_dtypes_are_folded_but_not_packed():
    model = with_statistics(EfficientVMambaForImageClassification(small_config())).bfloat16()
    optimized = optimize_for_inference(model)
    assert nn.BatchNorm2d not in modules_of(optimized) and PackedLinear not in modules_of(optimized)
    images = torch.randn(1, 3, 64, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        assert relative_error(optimized(images).logits.float(), model(images).logits.float()) < 3e-2


def test_the_model_stays_as_it_is():
    model = EfficientVMambaForImageClassification(small_config()).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimized = optimize_for_inference(model)
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert not optimized.training and not any(parameter.requires_grad for parameter in optimized.parameters())
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def save(model: nn.Module, folder: Path) -> None:
    model.save_pretrained(folder)


@pytest.mark.parametrize(
    "use",
    [
        save,
        lambda model, folder: save(model.efficientvmamba, folder),
        lambda model, folder: torch.save(model, folder / "model.pt"),
        lambda model, folder: copy.deepcopy(model),
        lambda model, folder: optimize_for_inference(model),
    ],
    ids=["save", "save a part", "pickle", "copy", "optimize again"],
)
def test_optimized_models_refuse_to_be_saved_or_copied(use, tmp_path):
    optimized = optimize_for_inference(EfficientVMambaForImageClassification(small_config()))
    with pytest.raises(RuntimeError, match="neither be saved nor copied: use the original, and call"):
        use(optimized, tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_graphs_of_optimized_models():
    model = with_statistics(EfficientVMambaForImageClassification(small_config()))
    optimized, images = optimize_for_inference(model), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(images).logits
        compiled = torch.compile(optimized, fullgraph=True, backend="eager")
        exported = torch.export.export(optimized, (images,)).module()
        for graph in (compiled, exported):
            assert relative_error(graph(images).logits, expected) < 3e-6


class Adapted(nn.Module):
    """A layer like the adapters of other libraries, whose output depends on more than its weight."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear, self.weight, self.bias = linear, linear.weight, linear.bias

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return 2 * self.linear(hidden_states)


def test_changed_blocks_are_refused():
    model = EfficientVMambaForImageClassification(small_config())
    layer = model.efficientvmamba.encoder.stages[0].layers[1]
    handle = layer.mixer.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="mixer has hooks, which a model optimized for inference would not call"):
        optimize_for_inference(model)
    handle.remove()
    layer.mixer.in_proj = Adapted(layer.mixer.in_proj)
    with pytest.raises(TypeError, match=r"mixer\.in_proj of a block is a .*Adapted, .* merge adapters first"):
        optimize_for_inference(model)
    layer.mixer.in_proj = layer.mixer.in_proj.linear
    layer = model.efficientvmamba.encoder.stages[3].layers[0]  # one whose batch norms are folded
    layer.expand_conv = Adapted(layer.expand_conv)
    with pytest.raises(TypeError, match=r"expand_conv of a block is a .*Adapted, .* merge adapters first"):
        optimize_for_inference(model)


def test_what_optimized_models_do_not_compute_is_refused():
    optimized = optimize_for_inference(EfficientVMambaForImageClassification(small_config()))
    images = torch.randn(1, 3, 64, 64)
    assert not optimized(pixel_values=images).logits.requires_grad
    with pytest.raises(RuntimeError, match="computes no gradients, but its input requires them"):
        optimized(pixel_values=images.requires_grad_())
    with torch.no_grad():
        assert optimized(images).logits.isfinite().all()
        with (
            pytest.raises(TypeError, match=r"optimized for inference in float32, got torch\.bfloat16"),
            torch.autocast("cpu", torch.bfloat16),
        ):
            optimized(images)


def test_other_models_are_refused():
    with pytest.raises(TypeError, match="takes an EfficientVMamba model, got a Linear"):
        optimize_for_inference(nn.Linear(2, 2))


@pytest.mark.filterwarnings("ignore")  # a trace reads every deprecated property
def test_traces_are_refused():
    optimized = optimize_for_inference(EfficientVMambaForImageClassification(small_config()))
    with pytest.raises(RuntimeError, match="quantize, adapt or trace the original"):
        torch.jit.trace(optimized, torch.randn(1, 3, 32, 32), strict=False)
