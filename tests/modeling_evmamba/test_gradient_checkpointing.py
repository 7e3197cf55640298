"""Gradient checkpointing changes neither gradients, nor weights, nor the statistics of batch norms."""

import copy
from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.utils.checkpoint import checkpoint

from modeling_evmamba import EfficientVMambaBackbone, EfficientVMambaConfig, EfficientVMambaForImageClassification
from modeling_evmamba.modeling_evmamba import (
    EfficientVMambaInvertedResidualLayer,
    EfficientVMambaLocalBranch,
    EfficientVMambaStage,
)


Model = TypeVar("Model", bound=nn.Module)

VARIANTS = pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])

# how models enable it, by the oldest version of transformers that is supported, and by transformers 5.23 or newer
METHODS = ["gradient_checkpointing_enable", "activation_checkpointing_enable"]


def create_model(model_class: type[Model] = EfficientVMambaForImageClassification) -> Model:
    """Return a network with stochastic depth, which must draw the same numbers in both computations."""
    torch.manual_seed(0)
    fields = {"patch_size": 2, "hidden_sizes": [8, 16], "depths": [2, 2], "block_types": ["evss", "inverted_residual"]}
    return model_class(EfficientVMambaConfig(**fields, drop_path_rate=0.5, num_labels=3))


def train(model: nn.Module, compute: Callable | None = None) -> dict[str, list[torch.Tensor]]:
    """Take two steps of gradient descent.

    Args:
        model: Its parameters are trained.
        compute: Returns the output for a batch, by default the first output of the model.

    Returns:
        The gradients of the second step, and the parameters and buffers after it.
    """
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for seed in range(2):
        torch.manual_seed(seed)  # of stochastic depth
        optimizer.zero_grad()
        images = torch.randn(4, 3, 16, 12, generator=generator).requires_grad_()
        output = model(images)[0] if compute is None else compute(images)
        output.square().mean().backward()
        optimizer.step()
    return {
        "gradients": [parameter.grad for parameter in model.parameters()],
        "weights": list(model.parameters()),
        "buffers": list(model.buffers()),
    }


def check_same(actual: dict[str, list[torch.Tensor]], expected: dict[str, list[torch.Tensor]]) -> None:
    """Check that two results of `train` are the same. Reentrant checkpoints sum gradients in another order."""
    for kind, tensors in expected.items():
        torch.testing.assert_close(actual[kind], tensors, rtol=1e-5, atol=1e-6)


def batch_norms_of(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def enable_checkpointing(model: nn.Module, use_reentrant: bool = True) -> nn.Module:
    """Return the model, with checkpoints by the newest method that it has."""
    name = [name for name in METHODS if hasattr(model, name)][-1]
    getattr(model, name)({"use_reentrant": use_reentrant})
    return model


@VARIANTS
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("name", METHODS)
def test_method_of_the_model(name, use_reentrant):
    model = create_model()
    if not hasattr(model, name):
        pytest.skip("transformers 5.17 lacks this name")
    checkpointed = copy.deepcopy(model)
    getattr(checkpointed, name)({"use_reentrant": use_reentrant})
    check_same(train(checkpointed), train(model))
    assert all(norm.num_batches_tracked == 2 for norm in batch_norms_of(checkpointed))


@VARIANTS
def test_whole_network_in_one_checkpoint(use_reentrant):
    model = create_model()
    checkpointed = copy.deepcopy(model)

    def compute(images):
        return checkpoint(lambda images: checkpointed(images).logits, images, use_reentrant=use_reentrant)

    check_same(train(checkpointed, compute), train(model))


@pytest.mark.parametrize(
    "part", [EfficientVMambaStage, EfficientVMambaInvertedResidualLayer, EfficientVMambaLocalBranch]
)
def test_wrapped_parts(part):
    """As accelerate checkpoints with FSDP."""
    model = create_model()
    checkpointed = copy.deepcopy(model)
    apply_activation_checkpointing(checkpointed, check_fn=lambda module: isinstance(module, part))
    check_same(train(checkpointed), train(model))


@VARIANTS
def test_nested_checkpoints(use_reentrant):
    model = create_model()
    checkpointed = enable_checkpointing(copy.deepcopy(model), use_reentrant)

    def compute(images):
        return checkpoint(lambda images: checkpointed(images).logits, images, use_reentrant=use_reentrant)

    check_same(train(checkpointed, compute), train(model))


def average_all(model: nn.Module) -> nn.Module:
    for norm in batch_norms_of(model):
        norm.momentum = None
    return model


def freeze_statistics(model: nn.Module) -> nn.Module:
    for norm in batch_norms_of(model):
        norm.eval()
    return model


def keep_no_statistics(model: nn.Module) -> nn.Module:
    for norm in batch_norms_of(model):
        norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
    return model


def wrap(model: nn.Module) -> nn.Module:
    """As PEFT's `modules_to_save` does."""
    for layer in model.efficientvmamba.encoder.stages[1].layers:
        layer.project_batch_norm = nn.Sequential(layer.project_batch_norm)
    return model


@VARIANTS
@pytest.mark.parametrize(
    "change",
    [average_all, freeze_statistics, keep_no_statistics, wrap, nn.SyncBatchNorm.convert_sync_batchnorm],
    ids=lambda change: change.__name__,
)
def test_other_batch_norms(change, use_reentrant):
    model = change(create_model())
    checkpointed = enable_checkpointing(copy.deepcopy(model), use_reentrant)
    check_same(train(checkpointed), train(model))


def test_batch_norms_keep_their_buffers():
    """Others may hold them too, such as DistributedDataParallel."""
    model = create_model()
    before = dict(model.named_buffers())
    enable_checkpointing(model)
    train(model)
    assert all(buffer is before[name] for name, buffer in model.named_buffers())


@VARIANTS
def test_frozen_stem(use_reentrant):
    """As PEFT freezes it: the inputs of the first checkpoint need no gradients unless the model is told so."""
    model = create_model()
    model.efficientvmamba.embeddings.requires_grad_(False)
    model.enable_input_require_grads()
    checkpointed = enable_checkpointing(copy.deepcopy(model), use_reentrant)
    actual, expected = train(checkpointed), train(model)
    check_same(actual, expected)
    assert sum(gradient is None for gradient in actual["gradients"]) == 4


@VARIANTS
def test_backbone(use_reentrant):
    backbone = create_model(EfficientVMambaBackbone)
    checkpointed = enable_checkpointing(copy.deepcopy(backbone), use_reentrant)
    actual, expected = (
        train(each, lambda images, each=each: each(images).feature_maps[0]) for each in (checkpointed, backbone)
    )
    check_same(actual, expected)


@pytest.mark.slow
@VARIANTS
def test_compiled(use_reentrant):
    """As PyTorch differentiates graphs, without generated code."""
    model = create_model()
    checkpointed = enable_checkpointing(copy.deepcopy(model), use_reentrant)
    torch._dynamo.reset()
    compiled = torch.compile(checkpointed, backend="aot_eager")
    check_same(train(checkpointed, lambda images: compiled(images).logits), train(model))
