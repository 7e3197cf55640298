"""The network in tools of PyTorch and transformers: derivatives, traces, graphs, vision towers, counters."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, vmap
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BertModel,
    VisionEncoderDecoderModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)

from evmamba_hub.info import measure_size
from golden_values import relative_error
from modeling_evmamba import (
    EfficientVMambaBackbone,
    EfficientVMambaConfig,
    EfficientVMambaForImageClassification,
    EfficientVMambaModel,
    EfficientVMambaPreTrainedModel,
    optimize_for_inference,
)
from modeling_evmamba.modeling_evmamba import apply_in_halves


SMALL = {"patch_size": 2, "hidden_sizes": [8, 16], "depths": [1, 1], "block_types": ["evss", "inverted_residual"]}
BOUND = 3e-6  # relative norm, float32


def create_model(
    model_class: type[EfficientVMambaPreTrainedModel] = EfficientVMambaForImageClassification, **fields
) -> EfficientVMambaPreTrainedModel:
    """Return a small network in evaluation mode. Its batch norms are not the identity."""
    torch.manual_seed(0)
    model = model_class(EfficientVMambaConfig(**{**SMALL, "num_labels": 3, "drop_path_rate": 0.0, **fields})).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model


def random_images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Logits(nn.Module):
    """Tools that take modules from tensors to tensors want this wrapper."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values).logits


def without_statistics(model: nn.Module) -> nn.Module:
    """Prepare a model in training for `vmap`, which cannot update running statistics."""
    return torch.func.replace_all_batch_norm_modules_(model.train())


@pytest.mark.parametrize("prepare", [nn.Module.eval, without_statistics], ids=["evaluation", "training"])
def test_gradients_per_image(prepare):
    """As Opacus computes them."""
    model = prepare(create_model())
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    images, labels = random_images(4, 3, 12, 10), torch.tensor([0, 2, 1, 2])

    def loss(parameters: dict, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return functional_call(model, (parameters, buffers), (image[None], label[None])).loss

    gradients = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, images, labels)
    norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
    for index in range(len(images)):
        model.zero_grad()
        model(images[index, None], labels[index, None]).loss.backward()
        for name, parameter in model.named_parameters():
            assert (gradients[name][index] - parameter.grad).norm() < 1e-6 * norm, name


def logits_of(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the logits as a function that leaves the statistics of batch norms as they are."""

    def compute(images: torch.Tensor) -> torch.Tensor:
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        return functional_call(model, buffers, images).logits

    return compute


def in_forward_mode(function: Callable, x: torch.Tensor, tangent: torch.Tensor) -> torch.Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent))).tangent


JVPS = {
    "torch.func.jvp": lambda function, x, tangent: torch.func.jvp(function, (x,), (tangent,))[1],
    "torch.autograd.functional.jvp": lambda function, x, tangent: torch.autograd.functional.jvp(function, x, tangent)[
        1
    ],
    "torch.autograd.forward_ad": in_forward_mode,
    "torch.func.jacrev": lambda function, x, tangent: torch.func.jacrev(function)(x).flatten(2) @ tangent.flatten(),
    "torch.func.jacfwd": lambda function, x, tangent: torch.func.jacfwd(function)(x).flatten(2) @ tangent.flatten(),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("jvp", JVPS.values(), ids=JVPS)
def test_jacobians(jvp, training):
    model = create_model().train(training)
    x, tangent = random_images(2, 3, 8, 6), random_images(2, 3, 8, 6, seed=1)
    exact = logits_of(copy.deepcopy(model).double())
    expected = torch.autograd.functional.jacobian(exact, x.double()).flatten(2) @ tangent.double().flatten()
    assert relative_error(jvp(logits_of(model), x, tangent), expected) < BOUND


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_hessians(training):
    model = create_model(num_channels=1).train(training)
    compute, exact = logits_of(model), logits_of(copy.deepcopy(model).double())
    x = random_images(2, 1, 4, 8)
    hessian = torch.func.hessian(lambda x: compute(x).square().sum())(x)
    expected = torch.autograd.functional.hessian(lambda x: exact(x).square().sum(), x.double())
    assert relative_error(hessian, expected) < 1e-5


def test_ensembles():
    models = [create_model(initializer_range=scale) for scale in (0.02, 0.05)]
    parameters, buffers = torch.func.stack_module_state(models)
    images = random_images(2, 3, 8, 6)

    def compute(parameters: dict, buffers: dict) -> torch.Tensor:
        return functional_call(models[0], (parameters, buffers), images).logits

    expected = torch.stack([model(images).logits for model in models])
    assert relative_error(vmap(compute)(parameters, buffers), expected) < BOUND
    with torch.no_grad():
        assert relative_error(vmap(compute)(parameters, buffers), expected) < BOUND


# how to trace a model, and its first tensor for a batch
TRACES: dict[str, tuple[Callable, Callable]] = {
    "wrapped": (
        lambda: Logits(create_model()).eval(),
        lambda model, images: model(images),
    ),
    "tuples": (
        lambda: create_model(return_dict=False),
        lambda model, images: model(images)[0],
    ),
    "dicts": (
        lambda: create_model(),
        lambda model, images: model(images)["logits"],
    ),
    "features": (
        lambda: create_model(EfficientVMambaModel, return_dict=False),
        lambda model, images: model(images)[0],
    ),
    "backbone": (
        lambda: create_model(EfficientVMambaBackbone, return_dict=False, out_features=["stage1", "stage2"]),
        lambda model, images: model(images)[0][1],
    ),
}


@pytest.mark.filterwarnings("ignore")  # PyTorch warns that traces are deprecated, and of sizes that could be constants
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("create, compute", TRACES.values(), ids=TRACES)
def test_traces(create, compute, mode, tmp_path):
    """A trace takes other batches and sides, has gradients, and can be saved."""
    model = create()
    with mode():
        trace = torch.jit.trace(model, random_images(2, 3, 16, 12), strict=False)
    torch.jit.save(trace, tmp_path / "trace.pt")
    trace = torch.jit.load(tmp_path / "trace.pt")
    images = random_images(3, 3, 21, 17)
    gradients = []
    for module in (trace, model):
        variable = images.clone().requires_grad_()
        y = compute(module, variable)
        gradients += [y, *torch.autograd.grad(y.square().sum(), variable)]
    torch.testing.assert_close(gradients[:2], gradients[2:])
    with torch.no_grad():
        torch.testing.assert_close(compute(trace, images), compute(model, images))


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_graph(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard", reason="needs the extra `train`")
    with tensorboard.SummaryWriter(tmp_path) as writer:
        writer.add_graph(Logits(create_model()).eval(), random_images(2, 3, 16, 12))
    [events] = tmp_path.iterdir()
    assert b"evmamba_kernels::atrous_selective_scan" in events.read_bytes()


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_symbolic_traces(training):
    """One graph for other batches and sides, odd ones too, which still refuses bad images."""
    model = create_model().train(training)
    graph = torch.fx.symbolic_trace(Logits(copy.deepcopy(model)).train(training))
    assert "atrous_selective_scan" in {node.name for node in graph.graph.nodes}
    for shape in [(2, 3, 16, 12), (3, 3, 21, 17)]:
        images = random_images(*shape)
        torch.testing.assert_close(graph(images), model(images).logits)
    with pytest.raises(ValueError, match="must have 3 channels"):
        graph(random_images(2, 1, 16, 12))


@pytest.mark.parametrize(
    "model_class", [EfficientVMambaForImageClassification, EfficientVMambaModel, EfficientVMambaBackbone]
)
def test_outputs_as_tuples(model_class):
    """The field `return_dict` of the configuration reaches the outputs, not the calls between parts."""
    model, images = create_model(model_class, return_dict=False), random_images(2, 3, 16, 12)
    outputs = model(images)
    assert isinstance(outputs, tuple)
    torch.testing.assert_close(outputs, model(images, return_dict=True).to_tuple())


TEXT = BertConfig(
    vocab_size=30,
    hidden_size=12,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=16,
    max_position_embeddings=8,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)


def test_vision_tower_of_a_dual_encoder(tmp_path):
    """The pair of CLIP learns, and is the same after saving."""
    torch.manual_seed(0)
    vision = EfficientVMambaConfig(**SMALL, drop_path_rate=0.0)
    model = VisionTextDualEncoderModel(VisionTextDualEncoderConfig.from_vision_text_configs(vision, TEXT))
    batch = {"input_ids": torch.arange(20).view(4, 5), "pixel_values": random_images(4, 3, 16, 12)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(6):
        loss = model(**batch, return_loss=True).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path)
    reloaded = VisionTextDualEncoderModel.from_pretrained(tmp_path)
    assert type(reloaded.vision_model) is EfficientVMambaModel
    assert reloaded.config.vision_config.hidden_size == 16
    torch.testing.assert_close(reloaded(**batch).logits_per_image, model(**batch).logits_per_image)


def test_dual_encoder_of_two_checkpoints(tmp_path):
    classifier = create_model()
    classifier.save_pretrained(tmp_path / "vision")
    BertModel(TEXT).save_pretrained(tmp_path / "text")
    model = VisionTextDualEncoderModel.from_vision_text_pretrained(tmp_path / "vision", tmp_path / "text").eval()
    images = random_images(2, 3, 16, 12)
    features = classifier.efficientvmamba(images).pooler_output
    torch.testing.assert_close(model.get_image_features(images).pooler_output, model.visual_projection(features))


def test_encoder_of_a_captioner():
    """As docs/tools.md says: the pixels of the last hidden state are the sequence."""
    torch.manual_seed(0)
    decoder = BertLMHeadModel(BertConfig(**TEXT.to_dict() | {"is_decoder": True, "add_cross_attention": True}))
    model = VisionEncoderDecoderModel(encoder=create_model(EfficientVMambaModel), decoder=decoder)
    features = model.encoder(random_images(2, 3, 16, 12)).last_hidden_state.flatten(2).mT  # (B, H * W, C)
    tokens = torch.arange(10).view(2, 5)
    outputs = model(encoder_outputs=(features,), decoder_input_ids=tokens, labels=tokens)
    assert outputs.logits.shape == (2, 5, 30)
    outputs.loss.backward()
    assert model.encoder.embeddings.patch_embeddings.weight.grad.abs().max() > 0


def count_flops(compute: Callable) -> dict[str, int]:
    """Return the FLOPs of each operator that PyTorch counts."""
    with FlopCounterMode(display=False) as counter:
        compute()
    return {str(operator): flops for operator, flops in counter.get_flop_counts()["Global"].items()}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("prepare", [nn.Module.eval, nn.Module.train, optimize_for_inference])
def test_counted_flops_are_those_of_info(prepare, mode):
    """A multiply-accumulate has two FLOPs. The sides of the feature maps are odd, and their padding does not count."""
    model = prepare(create_model(use_bias=True, hidden_sizes=[16, 32], depths=[2, 1]))
    with mode():
        flops = sum(count_flops(lambda: model(random_images(2, 3, 18, 10))).values())
    assert flops == 2 * 2 * measure_size(model.config, 18, 10).macs


def test_flops_of_a_backward_pass():
    """Each linear layer and each scan has twice the FLOPs of its forward pass."""
    model = create_model().train()
    images = random_images(2, 3, 18, 10).requires_grad_()
    forward = count_flops(lambda: model(images))
    total = count_flops(lambda: model(images).logits.sum().backward())
    scan = next(name for name in forward if "atrous_selective_scan" in name)
    assert total[f"{scan}_backward"] == 2 * forward[scan] > 0
    assert total[scan] == forward[scan]
    products = {"aten.mm", "aten.addmm"}
    assert sum(total[name] for name in products) == 3 * sum(forward[name] for name in products)


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_training_on_cpus_computes_dense_halves(bias):
    """The halves and all gradients are those of one product. Without gradients, there is one product."""
    layer, x = nn.Linear(8, 32, bias=bias), random_images(2, 5, 3, 8).requires_grad_()
    with torch.no_grad():
        assert not any(half.is_contiguous() for half in apply_in_halves(layer, x))
    halves = apply_in_halves(layer, x)
    expected = layer(x).chunk(2, dim=-1)
    grads = [random_images(*half.shape, seed=seed) for seed, half in enumerate(halves)]
    leaves = [x, *layer.parameters()]
    assert all(half.is_contiguous() for half in halves)
    torch.testing.assert_close(halves, expected)
    torch.testing.assert_close(
        torch.autograd.grad(halves, leaves, grads), torch.autograd.grad(expected, leaves, grads), rtol=1e-5, atol=1e-5
    )


class CountedLinear(nn.Linear):
    """An adapter in the place of a layer."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        self.num_calls += 1
        return super().forward(hidden_states)


def change_class(layer: nn.Linear) -> None:
    layer.__class__ = CountedLinear


def change_forward(layer: nn.Linear) -> None:
    """As accelerate does, which loads weights just before the call."""

    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        layer.num_calls += 1
        return nn.Linear.forward(layer, hidden_states)

    layer.forward = forward


def add_hook(register: str) -> Callable[[nn.Linear], object]:
    def add(layer: nn.Linear) -> object:
        def count(*_) -> None:
            layer.num_calls += 1

        return getattr(layer, register)(count)

    return add


def add_global_hook(layer: nn.Linear) -> object:
    def count(module: nn.Module, *_) -> None:
        layer.num_calls += module is layer

    return nn.modules.module.register_module_forward_hook(count)


@pytest.mark.parametrize(
    "change",
    [
        change_class,
        change_forward,
        add_global_hook,
        *map(add_hook, ("register_forward_hook", "register_forward_pre_hook")),
        *map(add_hook, ("register_full_backward_hook", "register_full_backward_pre_hook")),
    ],
    ids=["class", "forward", "global hook", "forward hook", "pre-hook", "backward hook", "backward pre-hook"],
)
def test_training_calls_a_changed_input_projection(change):
    model = create_model().train()
    layer = next(module for name, module in model.named_modules() if name.endswith("in_proj"))
    layer.num_calls = 0
    handle = change(layer)
    try:
        model(random_images(2, 3, 16, 16)).logits.sum().backward()
    finally:
        if handle is not None:
            handle.remove()
    assert layer.num_calls == 1
    assert layer.weight.grad.any()


def test_training_uses_the_products_of_tensor_subclasses():
    """Quantized weights have products of their own."""

    class Weight(torch.Tensor):
        num_products = 0

        @classmethod
        def __torch_function__(cls, function, types, arguments=(), named_arguments=None):
            cls.num_products += function is F.linear
            return super().__torch_function__(function, types, arguments, named_arguments or {})

    layer = nn.Linear(8, 32)
    weight = layer.weight.detach().as_subclass(Weight).requires_grad_()
    layer.weight = nn.Parameter(weight)
    apply_in_halves(layer, random_images(2, 5, 3, 8))
    assert Weight.num_products == 1


def test_flops_on_the_meta_device():
    model = create_model()
    totals = []
    for device in ("cpu", "meta"):
        model.to(device)
        images = torch.empty(2, 3, 18, 10, device=device)
        totals.append(sum(count_flops(lambda images=images: model(images).logits.sum().backward()).values()))
    assert totals[0] == totals[1] > 0


@pytest.mark.filterwarnings("ignore")
def test_counter_of_fvcore():
    """It knows no custom operators, and counts multiply-accumulates."""
    fvcore = pytest.importorskip("fvcore.nn", reason="fvcore is in no extra: pip install fvcore")
    model, images = create_model(), random_images(1, 3, 18, 10)
    counted = fvcore.FlopCountAnalysis(Logits(model).eval(), images).by_operator()
    flops = count_flops(lambda: model(images))
    scan = flops.pop("evmamba_kernels.atrous_selective_scan")
    assert counted["linear"] + counted["conv"] == sum(flops.values()) / 2
    assert measure_size(model.config, 18, 10).macs == (sum(flops.values()) + scan) / 2


def test_attributions_of_captum():
    """The attributions of integrated gradients sum up to the difference to the logit of the baseline."""
    captum = pytest.importorskip("captum.attr", reason="captum is in no extra: pip install captum")
    wrapper, images = Logits(create_model()).eval(), random_images(2, 3, 16, 12)
    integrated = captum.IntegratedGradients(wrapper)
    attributions = integrated.attribute(images, target=1, n_steps=100, internal_batch_size=8)
    difference = (wrapper(images) - wrapper(torch.zeros_like(images)))[:, 1]
    torch.testing.assert_close(attributions.sum(dim=(1, 2, 3)).float(), difference, atol=1e-4, rtol=1e-2)
