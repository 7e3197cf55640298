"""The network: parity with the authors' implementation, and its behavior in transformers."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounter
from transformers import (
    AutoBackbone,
    AutoModel,
    AutoModelForImageClassification,
)

from devices import BACKENDS, DEVICE
from evmamba_hub.convert.original_checkpoint import original_name
from evmamba_kernels import use_backend
from golden_values import GOLDEN_DIR, image, load_cases, original_state_dict, relative_error
from modeling_evmamba import (
    VARIANTS,
    EfficientVMambaBackbone,
    EfficientVMambaConfig,
    EfficientVMambaForImageClassification,
    EfficientVMambaModel,
)
from modeling_evmamba.modeling_evmamba import EfficientVMambaDropPath


FORWARD_CASES = load_cases("forward.safetensors")
FLOAT32_BOUND = 3e-6  # forward, relative norm
GRADIENT_BOUND = 3e-5

MICRO = {"hidden_sizes": [16, 32, 64, 128], "depths": [1, 1, 1, 1]}


GOLDEN_CONFIGS = {
    **{variant: {**fields, "num_labels": 1000} for variant, fields in VARIANTS.items()},
    "micro": {"hidden_sizes": [16, 32, 64, 128], "depths": [2, 1, 2, 1], "num_labels": 10},
}


def golden_model(variant: str, seed: int = 11) -> EfficientVMambaForImageClassification:
    model = EfficientVMambaForImageClassification(EfficientVMambaConfig(**GOLDEN_CONFIGS[variant]))
    original = original_state_dict(variant, seed)
    names = {name: original_name(name, model.config) for name in model.state_dict()}
    assert set(names.values()) == set(original)
    # the authors keep groups and channels of A_logs and Ds in one dimension
    model.load_state_dict(
        {name: original[names[name]].reshape(tensor.shape) for name, tensor in model.state_dict().items()}
    )
    return model


def parse_case(name: str) -> tuple[str, int, tuple[int, ...]]:
    variant, seed, shape = name.split("_")
    return variant, int(seed.removeprefix("seed")), tuple(int(side) for side in shape.split("x"))


@pytest.fixture
def in_float32(monkeypatch):
    """Disable tf32, to which cuDNN's convolutions round by default."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FORWARD_CASES)
def test_golden_forward(name, backend, in_float32):
    variant, seed, shape = parse_case(name)
    model = golden_model(variant, seed).to(DEVICE).eval()
    with torch.no_grad(), use_backend(backend):
        outputs = model(image(shape, seed).to(DEVICE), output_hidden_states=True)
    names = ["embeddings", "stage0", "stage1", "stage2", "stage3"]
    actual = {name: state.permute(0, 2, 3, 1) for name, state in zip(names, outputs.hidden_states, strict=True)}
    actual["logits"] = outputs.logits
    for output, expected in FORWARD_CASES[name].items():
        assert relative_error(actual[output].cpu(), expected) < FLOAT32_BOUND, output


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_gradients(backend, in_float32):
    expected = load_file(GOLDEN_DIR / "micro_gradients.safetensors")
    model = golden_model("micro").to(DEVICE).train()
    for module in model.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    pixel_values = image((4, 3, 72, 60), 11).to(DEVICE).requires_grad_()
    with use_backend(backend):
        loss = model(pixel_values, labels=torch.tensor([1, 3, 0, 9], device=DEVICE)).loss
    loss.backward()

    model.cpu()
    assert relative_error(loss.detach().cpu(), expected.pop("loss").reshape(())) < FLOAT32_BOUND
    assert relative_error(pixel_values.grad.cpu(), expected.pop("grad_pixel_values")) < GRADIENT_BOUND
    for name, parameter in model.named_parameters():
        gradient = expected.pop("grad." + original_name(name, model.config)).reshape(parameter.shape)
        if name.endswith("local_branch.depthwise_conv.bias"):  # before a batch norm: zero in exact arithmetic
            assert parameter.grad.norm() < 1e-6, name
        else:
            assert relative_error(parameter.grad, gradient) < GRADIENT_BOUND, name
    assert not expected


@pytest.mark.parametrize("variant, num_parameters", [("tiny", 6_493_660), ("small", 11_273_688), ("base", 33_717_136)])
def test_parameter_counts(variant, num_parameters):
    with torch.device("meta"):
        model = EfficientVMambaForImageClassification(EfficientVMambaConfig(**VARIANTS[variant], num_labels=1000))
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters


UNUSUAL_CONFIGS = {
    "one channel, patches of 2": {"num_channels": 1, "patch_size": 2},
    "five channels, patches of 3": {"num_channels": 5, "patch_size": 3},
    "expand 1": {"expand": 1},
    "expand 3": {"expand": 3},
    "state size 1": {"state_size": 1},
    "state size 5": {"state_size": 5},
    "rank 7": {"time_step_rank": 7},
    "kernel 5 without bias": {"conv_kernel": 5, "use_conv_bias": False},
    "projections with bias": {"use_bias": True},
    "two stages": {"hidden_sizes": [12, 20], "depths": [1, 2], "block_types": ["inverted_residual", "evss"]},
    "five stages": {"hidden_sizes": [8, 8, 8, 8, 8], "depths": [1] * 5, "block_types": ["evss"] * 5},
    "channels no multiple of anything": {"hidden_sizes": [5, 7, 11, 13]},
    "one block": {"hidden_sizes": [8], "depths": [1], "block_types": ["evss"]},
}


@pytest.mark.parametrize("fields", UNUSUAL_CONFIGS.values(), ids=UNUSUAL_CONFIGS)
def test_unusual_configurations_train(fields):
    config = EfficientVMambaConfig(**{**MICRO, **fields}, num_labels=3)
    model = EfficientVMambaForImageClassification(config).train()
    pixel_values = torch.randn(2, config.num_channels, 45, 38)
    outputs = model(pixel_values, labels=torch.tensor([0, 2]), output_hidden_states=True)
    outputs.loss.backward()
    assert len(outputs.hidden_states) == config.num_stages + 1
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    height, width = 45 // config.patch_size, 38 // config.patch_size
    for stage, state in enumerate(outputs.hidden_states):
        if stage > 1:  # the stem and the first stage share a size, every other stage halves it
            height, width = (height + 1) // 2, (width + 1) // 2
        assert state.shape == (2, config.hidden_sizes[max(0, stage - 1)], height, width)


@pytest.mark.parametrize("height, width", [(4, 4), (4, 7), (5, 4), (9, 70), (33, 31)])
def test_any_image_size_down_to_one_patch(height, width):
    model = EfficientVMambaForImageClassification(EfficientVMambaConfig(**MICRO, num_labels=3)).eval()
    with torch.no_grad():
        logits = model(torch.randn(2, 3, height, width)).logits
    assert logits.shape == (2, 3)
    assert logits.isfinite().all()


def test_pixels_that_fill_no_patch_are_dropped():
    model = EfficientVMambaForImageClassification(EfficientVMambaConfig(**MICRO)).eval()
    pixel_values = torch.randn(1, 3, 35, 34)
    with torch.no_grad():
        assert torch.equal(model(pixel_values).logits, model(pixel_values[..., :32, :32]).logits)


@pytest.mark.parametrize(
    "shape, message",
    [
        ((1, 1, 32, 32), "must have 3 channels, as in the configuration, got 1"),
        ((3, 32, 32), r"must have the shape \(batch_size, num_channels, height, width\), got \(3, 32, 32\)"),
        ((1, 3, 32, 3), "at least one patch of 4 x 4 pixels, got 32 x 3"),
    ],
    ids=str,
)
@pytest.mark.parametrize("model_class", [EfficientVMambaForImageClassification, EfficientVMambaBackbone])
def test_bad_images_are_refused(shape, message, model_class):
    with pytest.raises(ValueError, match=message):
        model_class(EfficientVMambaConfig(**MICRO))(torch.randn(shape))


def test_initialization_follows_the_paper():
    torch.manual_seed(0)
    model = EfficientVMambaModel(EfficientVMambaConfig())
    mixer = model.encoder.stages[0].layers[0].mixer
    assert torch.allclose(mixer.A_log.exp(), torch.arange(1.0, 17.0).expand(4, 96, 16))
    assert torch.equal(mixer.D, torch.ones(4, 96))
    dt = torch.nn.functional.softplus(mixer.dt_proj_bias)
    assert 1e-3 * 0.999 <= dt.min() < 1.5e-3 and 0.07 < dt.max() <= 0.1 * 1.001
    assert mixer.dt_proj_weight.abs().max() <= 3**-0.5  # rank 3
    assert mixer.x_proj_weight.abs().max() <= 96**-0.5
    assert 0.019 < mixer.in_proj.weight.std() < 0.021
    local_branch = model.encoder.stages[0].layers[0].local_branch
    assert 0.9 / 3 < local_branch.depthwise_conv.weight.abs().max() <= 1 / 3  # fan-in 9
    assert local_branch.depthwise_conv.bias.abs().max() > 0


def test_pointwise_convolutions_are_linear_layers_initialized_as_convolutions():
    torch.manual_seed(0)
    model = EfficientVMambaModel(EfficientVMambaConfig())
    local_branch = model.encoder.stages[0].layers[0].local_branch
    inverted_residual = model.encoder.stages[2].layers[0]
    squeeze_excitation = inverted_residual.squeeze_excitation
    for layer in (
        local_branch.pointwise_conv,
        inverted_residual.expand_conv,
        squeeze_excitation.squeeze,
        squeeze_excitation.expand,
        inverted_residual.project_conv,
    ):
        assert type(layer) is torch.nn.Linear  # which LoRA and quantizers look for
        bound = layer.in_features**-0.5
        assert 0.98 * bound < layer.weight.abs().max() <= bound
        if layer.bias is not None:
            assert 0.8 * bound < layer.bias.abs().max() <= bound


def test_no_weight_decay_names_the_scan_parameters():
    model = EfficientVMambaForImageClassification(EfficientVMambaConfig(**MICRO))
    names = model.no_weight_decay()
    assert len(names) == 4  # two stages of one EVSS block, A_log and D each
    assert all(name.endswith((".mixer.A_log", ".mixer.D")) for name in names)
    assert names <= {name for name, _ in model.named_parameters()}


def test_drop_path_rates_rise_linearly():
    model = EfficientVMambaModel(EfficientVMambaConfig(drop_path_rate=0.3))
    rates = [module.drop_prob for module in model.modules() if hasattr(module, "drop_prob")]
    assert rates == pytest.approx(torch.linspace(0, 0.3, 10).tolist())


def test_drop_path_keeps_the_expectation():
    torch.manual_seed(0)
    drop_path = EfficientVMambaDropPath(0.25).train()
    dropped = drop_path(torch.ones(4000, 2, 1, 1))
    assert dropped.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.05)
    assert torch.equal(dropped[:, 0], dropped[:, 1])  # whole samples
    assert torch.equal(drop_path.eval()(torch.ones(4, 2, 1, 1)), torch.ones(4, 2, 1, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_loading_keeps_the_recurrence_in_float32(tmp_path, dtype):
    model = EfficientVMambaForImageClassification(EfficientVMambaConfig(**MICRO, num_labels=3)).eval()
    model.save_pretrained(tmp_path)
    reloaded = EfficientVMambaForImageClassification.from_pretrained(tmp_path, dtype=dtype)
    in_float32 = {name for name, parameter in reloaded.named_parameters() if parameter.dtype == torch.float32}
    assert in_float32 == reloaded.no_weight_decay()
    pixel_values = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        logits = reloaded(pixel_values.to(dtype)).logits
        assert logits.dtype == dtype
        assert relative_error(logits.float(), model(pixel_values).logits) < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_new_models_in_half_precision_have_the_recurrence_in_float32(dtype):
    config = EfficientVMambaConfig(**MICRO)
    model = AutoModelForImageClassification.from_config(config, dtype=dtype)
    in_float32 = {name: parameter for name, parameter in model.named_parameters() if parameter.dtype == torch.float32}
    assert in_float32.keys() == model.no_weight_decay()
    expected = dict(EfficientVMambaForImageClassification(config).named_parameters())
    assert all(torch.equal(parameter, expected[name]) for name, parameter in in_float32.items())


def test_new_models_in_float64_are_in_float64():
    model = AutoModelForImageClassification.from_config(EfficientVMambaConfig(**MICRO), dtype=torch.float64)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}


def test_auto_classes(tmp_path):
    config = EfficientVMambaConfig(**MICRO, num_labels=3)
    model = EfficientVMambaForImageClassification(config).eval()
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(reloaded) is EfficientVMambaForImageClassification
    pixel_values = torch.randn(1, 3, 40, 40)
    with torch.no_grad():
        assert relative_error(reloaded(pixel_values).logits, model(pixel_values).logits) < FLOAT32_BOUND
    assert type(AutoModel.from_pretrained(tmp_path)) is EfficientVMambaModel
    assert type(AutoBackbone.from_config(config)) is EfficientVMambaBackbone


def test_backbone_loads_from_a_classifier_and_adds_only_its_norms(tmp_path):
    config = EfficientVMambaConfig(**MICRO)
    classifier = EfficientVMambaForImageClassification(config).eval()
    classifier.save_pretrained(tmp_path)
    backbone, report = EfficientVMambaBackbone.from_pretrained(
        tmp_path, out_features=["stage1", "stage4"], output_loading_info=True
    )
    assert set(report["missing_keys"]) == {
        f"hidden_states_norms.{stage}.{name}" for stage in ("stage1", "stage4") for name in ("weight", "bias")
    }
    assert set(report["unexpected_keys"]) == {
        f"{module}.{name}" for module in ("classifier", "efficientvmamba.layernorm") for name in ("weight", "bias")
    }
    assert not report["mismatched_keys"]
    pixel_values = torch.randn(1, 3, 37, 53)
    with torch.no_grad():
        feature_maps = backbone.eval()(pixel_values).feature_maps
        hidden_states = classifier(pixel_values, output_hidden_states=True).hidden_states
    assert backbone.channels == [16, 128]
    for feature_map, hidden_state in zip(feature_maps, (hidden_states[1], hidden_states[4]), strict=True):
        # the norms start as the identity on normalized feature maps
        expected = torch.nn.functional.layer_norm(hidden_state.permute(0, 2, 3, 1), hidden_state.shape[1:2], eps=1e-5)
        assert torch.allclose(feature_map, expected.permute(0, 3, 1, 2), atol=1e-6)


@pytest.mark.parametrize("height, width", [(64, 96), (225, 223), (37, 53)])
def test_feature_maps_have_the_strides_of_detectors(height, width):
    """A feature map of stride s covers the patches: odd sides are padded, not cropped."""
    stages = ["stage1", "stage2", "stage3", "stage4"]
    backbone = EfficientVMambaBackbone(EfficientVMambaConfig(**MICRO, out_features=stages)).eval()
    with torch.no_grad():
        feature_maps = backbone(torch.randn(2, 3, height, width)).feature_maps
    rows, columns = height // 4, width // 4
    for feature_map, channels, stride in zip(feature_maps, backbone.channels, (4, 8, 16, 32), strict=True):
        step = stride // 4
        assert feature_map.shape == (2, channels, -(-rows // step), -(-columns // step))


@pytest.mark.parametrize(
    "problem_type, num_labels, labels",
    [
        ("regression", 1, torch.tensor([0.5, 1.5])),
        ("regression", 3, torch.rand(2, 3)),
        ("single_label_classification", 3, torch.tensor([0, 2])),
        ("multi_label_classification", 3, torch.tensor([[1.0, 0, 1], [0, 0, 1]])),
    ],
)
def test_problem_types(problem_type, num_labels, labels):
    config = EfficientVMambaConfig(**MICRO, num_labels=num_labels, problem_type=problem_type)
    model = EfficientVMambaForImageClassification(config).eval()
    outputs = model(torch.randn(2, 3, 32, 32), labels=labels)
    expected = {
        "regression": lambda: torch.nn.functional.mse_loss(outputs.logits.squeeze(), labels),
        "single_label_classification": lambda: torch.nn.functional.cross_entropy(outputs.logits, labels),
        "multi_label_classification": lambda: torch.nn.functional.binary_cross_entropy_with_logits(
            outputs.logits, labels
        ),
    }[problem_type]()
    assert torch.allclose(outputs.loss, expected)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batches(backend, training):
    """As in ResNet: outputs without images, gradients of 0, and statistics of batch norms as before."""
    config = EfficientVMambaConfig(**MICRO, num_labels=5, out_features=["stage1", "stage4"])
    images = torch.randn(0, 3, 40, 37, device=DEVICE, requires_grad=True)
    for model_class, shapes in [
        (EfficientVMambaForImageClassification, {"logits": [(0, 5)]}),
        (EfficientVMambaModel, {"last_hidden_state": [(0, 128, 2, 2)], "pooler_output": [(0, 128)]}),
        (EfficientVMambaBackbone, {"feature_maps": [(0, 16, 10, 9), (0, 128, 2, 2)]}),
    ]:
        model = model_class(config).to(DEVICE).train(training)
        before = {name: buffer.clone() for name, buffer in model.named_buffers() if "running" in name}
        with use_backend(backend):
            outputs = model(images)
            maps = {name: outputs[name] if name == "feature_maps" else [outputs[name]] for name in shapes}
            assert {name: [tuple(each.shape) for each in maps[name]] for name in shapes} == shapes
            sum(each.sum() for name in shapes for each in maps[name]).backward()
        assert images.grad.shape == images.shape
        assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())
        after = dict(model.named_buffers())
        assert all(torch.equal(after[name], buffer) for name, buffer in before.items())


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_penalty(backend):
    """The gradient of the norm of a gradient, through every operator of the network in training."""
    torch.manual_seed(0)
    fields = {"patch_size": 2, "hidden_sizes": [8, 16], "depths": [1, 1], "block_types": ["evss", "inverted_residual"]}
    config = EfficientVMambaConfig(**fields, num_labels=3, drop_path_rate=0.0)
    model = EfficientVMambaForImageClassification(config).to(DEVICE).train()
    images = torch.randn(2, 3, 8, 8, device=DEVICE, requires_grad=True)
    penalties = []
    for name, network in ((backend, model), ("torch", copy.deepcopy(model).double())):
        dtype = next(network.parameters()).dtype
        with use_backend(name):
            logits = network(images.to(dtype)).logits
            [gradient] = torch.autograd.grad(logits.square().sum(), images, create_graph=True)
            (gradient.norm() - 1).square().backward()
        penalties.append([parameter.grad for parameter in network.parameters()])
    norm = torch.stack([gradient.norm() for gradient in penalties[1]]).norm()
    for actual, expected in zip(*penalties, strict=True):
        assert (actual - expected).norm() < 1e-5 * norm


def test_convolutions_take_the_arguments_of_their_base_class():
    """LoRA builds its own convolutions from the class of the convolution that it adapts."""
    model = EfficientVMambaForImageClassification(EfficientVMambaConfig(**MICRO))
    convolutions = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
    images = torch.randn(1, 8, 4, 4)
    for convolution in {type(module): module for module in convolutions}.values():
        low_rank = type(convolution)(8, 2, (1, 1), (1, 1), (0, 0), bias=False)
        expected = torch.nn.functional.conv2d(images, low_rank.weight)
        torch.testing.assert_close(low_rank(images), expected)


def test_float64_stays_float64():
    model = EfficientVMambaForImageClassification(EfficientVMambaConfig(**MICRO)).double().eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 32, 32, dtype=torch.float64)).logits.dtype == torch.float64


def test_compiles_to_one_graph():
    """One graph covers all batch sizes and image sizes, and another one batches of one."""
    model = EfficientVMambaForImageClassification(EfficientVMambaConfig(**MICRO)).eval()
    # traces without compiling, since the test counts graphs
    graphs = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=graphs)
    batches = [(2, 3, 64, 96), (2, 3, 96, 96), (5, 3, 225, 223), (3, 3, 37, 53), (2, 3, 77, 77), (7, 3, 512, 64)]
    single_images = [(1, 3, 64, 96), (1, 3, 225, 223), (1, 3, 77, 77)]
    with torch.no_grad():
        for num_graphs, shapes in enumerate((batches, single_images), start=1):
            for shape in shapes:
                pixel_values = torch.randn(shape)
                assert torch.allclose(compiled(pixel_values).logits, model(pixel_values).logits, atol=1e-5)
            assert graphs.frame_count == num_graphs


@pytest.mark.filterwarnings("ignore")  # PyTorch warns that tracing is deprecated, and of constants
def test_a_trace_takes_other_sides():
    model = EfficientVMambaForImageClassification(EfficientVMambaConfig(**MICRO)).eval()
    images = torch.randn(1, 3, 60, 52)
    with torch.no_grad():
        traced = torch.jit.trace(model, torch.randn(1, 3, 64, 64), strict=False)
        torch.testing.assert_close(traced(images)["logits"], model(images).logits)


def test_exports_with_dynamic_batch_height_and_width():
    class Logits(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, pixel_values):
            return self.model(pixel_values).logits

    model = Logits(EfficientVMambaForImageClassification(EfficientVMambaConfig(**MICRO)).eval())
    sizes = {0: torch.export.Dim("batch"), 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    program = torch.export.export(model, (torch.randn(2, 3, 96, 128),), dynamic_shapes=(sizes,))
    with torch.no_grad():
        for shape in [(2, 3, 96, 128), (5, 3, 37, 53), (3, 3, 225, 223)]:
            pixel_values = torch.randn(shape)
            assert torch.allclose(program.module()(pixel_values), model(pixel_values), atol=1e-5)
