"""Optimized copies: the same outputs, and errors for everything else."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from golden_values import relative_error
from modeling_evmamba import (
    EfficientVMambaBackbone,
    EfficientVMambaConfig,
    EfficientVMambaForImageClassification,
    inference_evmamba,
    optimize_for_inference,
)
from modeling_evmamba.inference_evmamba import (
    LOWER_DTYPES,
    DepthwiseConv,
    LowerDtypeLayer,
    PackedLinear,
    multiplies_in_float16,
)


@pytest.fixture
def restore_threads():
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, *LOWER_DTYPES], ids=str)
def test_empty_batches(dtype):
    model, images = EfficientVMambaForImageClassification(small_config()), torch.randn(0, 3, 40, 37)
    if dtype == torch.float16:
        model, images = model.half(), images.half()
    with torch.no_grad():
        logits = optimize_for_inference(model, dtype)(images).logits
    assert logits.shape == (0, 10) and logits.dtype == images.dtype


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
        expected = model(images).logits
        assert relative_error(optimize_for_inference(model)(images).logits, expected) < 3e-6
        if config.conv_kernel == 3:
            for dtype, bound in LOWER_DTYPE_BOUNDS.items():
                assert relative_error(optimize_for_inference(model, dtype)(images).logits, expected) < bound


def test_backbones_too():
    model = with_statistics(EfficientVMambaBackbone(small_config(out_features=["stage1", "stage4"])))
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        pairs = zip(optimize_for_inference(model)(images).feature_maps, model(images).feature_maps, strict=True)
        assert all(relative_error(optimized, plain) < 3e-6 for optimized, plain in pairs)


def test_float16_is_folded_but_not_packed():
    model = with_statistics(EfficientVMambaForImageClassification(small_config())).half()
    optimized = optimize_for_inference(model)
    assert nn.BatchNorm2d not in modules_of(optimized) and PackedLinear not in modules_of(optimized)
    images = torch.randn(1, 3, 64, 64, dtype=torch.float16)
    with torch.no_grad():
        assert relative_error(optimized(images).logits.float(), model(images).logits.float()) < 1e-2


# relative errors of the logits: one rounding of bfloat16 is 2^-9, and a quantized row has 255 steps
LOWER_DTYPE_BOUNDS = {torch.bfloat16: 8e-3, torch.int8: 3e-2}


@pytest.mark.parametrize("dtype", LOWER_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 3, 224, 224), (3, 3, 65, 47), (5, 3, 32, 32), (2, 3, 36, 4)], ids=str)
def test_lower_dtypes(shape, dtype):
    model = with_statistics(EfficientVMambaForImageClassification(small_config()))
    optimized = optimize_for_inference(model, dtype)
    assert nn.BatchNorm2d not in modules_of(optimized) and LowerDtypeLayer in modules_of(optimized)
    images = torch.randn(shape)
    with torch.no_grad():
        logits, expected = optimized(images).logits, model(images).logits
        assert logits.dtype == torch.float32
        assert 1e-5 < relative_error(logits, expected) < LOWER_DTYPE_BOUNDS[dtype]
        assert torch.equal(torch.cat([optimized(image[None]).logits for image in images]), logits)
        assert torch.equal(optimized(images.bfloat16()).logits, optimized(images.bfloat16().float()).logits)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(optimized(images).logits, logits)
        images[0, 0, 0, 0] = torch.nan
        assert optimized(images).logits.isnan().any(dim=1).tolist() == [True] + [False] * (len(images) - 1)


@pytest.mark.parametrize("dtype", LOWER_DTYPES, ids=str)
def test_lower_dtypes_do_not_depend_on_threads(dtype, restore_threads):
    optimized = optimize_for_inference(with_statistics(EfficientVMambaForImageClassification(small_config())), dtype)
    images, logits = torch.randn(2, 3, 70, 50), []
    for num_threads in (1, 2, 5):
        torch.set_num_threads(num_threads)
        with torch.no_grad():
            logits.append(optimized(images).logits)
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


def test_models_in_bfloat16_are_packed():
    """The copy computes what one of the float32 model does, if the weights are the same."""
    model = with_statistics(EfficientVMambaForImageClassification(small_config())).bfloat16()
    images = torch.randn(1, 3, 64, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        logits = optimize_for_inference(model)(images).logits
        assert torch.equal(logits, optimize_for_inference(model.float(), torch.bfloat16)(images).logits)


def test_backbones_in_lower_dtypes():
    model = with_statistics(EfficientVMambaBackbone(small_config(out_features=["stage1", "stage4"])))
    images = torch.randn(1, 3, 64, 80)
    with torch.no_grad():
        for actual, expected in zip(
            optimize_for_inference(model, torch.bfloat16)(images).feature_maps, model(images).feature_maps, strict=True
        ):
            assert actual.dtype == torch.float32 and relative_error(actual, expected) < 1e-2


def test_graphs_in_lower_dtypes():
    """A compiled model calls the kernels between its graphs."""
    optimized = optimize_for_inference(EfficientVMambaForImageClassification(small_config()), torch.int8)
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert (
            relative_error(torch.compile(optimized, backend="eager")(images).logits, optimized(images).logits) < 1e-6
        )


@pytest.mark.parametrize(
    "dtype, config, message",
    [
        (torch.int32, {}, r"computes in a floating-point dtype or torch.int8, not in torch.int32"),
        (torch.bfloat16, {"conv_kernel": 5}, r"torch.bfloat16 needs a network with conv_kernel 3, and this one has 5"),
    ],
    ids=str,
)
def test_other_dtypes_are_refused(dtype, config, message):
    with pytest.raises(ValueError, match=message):
        optimize_for_inference(EfficientVMambaForImageClassification(small_config(**config)), dtype)


@pytest.mark.skipif(multiplies_in_float16(), reason="this processor multiplies in float16")
def test_float16_needs_a_processor():
    with pytest.raises(ValueError, match=r"does not multiply in torch.float16 \(AVX512-FP16\): use torch.bfloat16"):
        optimize_for_inference(EfficientVMambaForImageClassification(small_config()), torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_pytorch_without_the_operators_of_packed_weights(monkeypatch, dtype):
    """Such an operator is private to PyTorch."""
    model = with_statistics(EfficientVMambaForImageClassification(small_config())).eval()
    images = torch.randn(2, 3, 64, 64)
    packed = optimize_for_inference(model, dtype)
    monkeypatch.setattr(inference_evmamba, "PACKED_OPERATORS", ("_linear_pointwise", "_dropped"))
    with pytest.warns(UserWarning, match=r"has no operator mkldnn\._dropped, so linear layers"):
        unpacked = optimize_for_inference(model, dtype)
    assert PackedLinear in modules_of(packed) and PackedLinear not in modules_of(unpacked)
    with torch.no_grad():
        assert relative_error(unpacked(images).logits, packed(images).logits) < 3e-6


def test_lower_dtypes_need_numba(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    for name in [name for name in sys.modules if name.endswith("_numba") or ".numba_" in name]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"needs? numba: pip install numba"):
        optimize_for_inference(EfficientVMambaForImageClassification(small_config()), torch.bfloat16)


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


def test_changed_patch_mergings_are_refused_in_lower_dtypes():
    """In float32, they stay as they are."""
    model = EfficientVMambaForImageClassification(small_config())
    merging = model.efficientvmamba.encoder.stages[1].downsampling_layer
    merging.reduction = Adapted(merging.reduction)
    assert Adapted in modules_of(optimize_for_inference(model))
    with pytest.raises(TypeError, match=r"reduction of a block is a .*Adapted, .* merge adapters first"):
        optimize_for_inference(model, torch.bfloat16)


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
    with pytest.raises(TypeError, match="takes an EfficientVMamba model or one with its backbone, got a Linear"):
        optimize_for_inference(nn.Linear(2, 2))


@pytest.mark.filterwarnings("ignore")  # a trace reads every deprecated property
def test_traces_are_refused():
    optimized = optimize_for_inference(EfficientVMambaForImageClassification(small_config()))
    with pytest.raises(RuntimeError, match="quantize, adapt or trace the original"):
        torch.jit.trace(optimized, torch.randn(1, 3, 32, 32), strict=False)
