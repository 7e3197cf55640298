"""A model made ready to classify and nothing else: fewer passes over its maps, weights as the processor wants them.

Batch norms that follow a convolution are folded into it. On CPUs, linear layers and pointwise convolutions then take
the layout of oneDNN's kernels, and blocks are put together anew, channels last throughout: activations and means are
computed in passing, as a compiler would do it. What each step gains: benchmarks/NOTES.md.
"""

import copy
from typing import NoReturn, SupportsIndex, TypeVar

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .atrous_selective_scan import atrous_selective_scan
from .depthwise_conv import depthwise_conv, depthwise_conv_and_mean
from .modeling_evmamba import (
    EfficientVMambaEmbeddings,
    EfficientVMambaEVSSLayer,
    EfficientVMambaInvertedResidualLayer,
    EfficientVMambaLocalBranch,
    EfficientVMambaPreTrainedModel,
    EfficientVMambaStage,
)


Model = TypeVar("Model", bound=EfficientVMambaPreTrainedModel)

# Bytes of the widest map of a micro-batch: with some of its neighbours, it fits into the cache of a processor
# (benchmarks/NOTES.md)
WIDEST_MAP_BYTES = 10 * 2**20

# of the blocks: a convolution and the batch norm behind it
BATCH_NORMS = {
    EfficientVMambaLocalBranch: [("depthwise_conv", "batch_norm")],
    EfficientVMambaInvertedResidualLayer: [
        ("expand_conv", "expand_batch_norm"),
        ("depthwise_conv", "depthwise_batch_norm"),
        ("project_conv", "project_batch_norm"),
    ],
}


def optimize_for_inference(model: Model) -> Model:
    """A copy of a model for inference alone: the same outputs to rounding, sooner.

    The copy is in evaluation mode, computes no gradients, and cannot be saved; packed weights stay on their device in
    their dtype. `model` stays as it is.

    Args:
        model: any of the models of this package, on any device. Weights are packed for CPUs, in float32.

    Raises:
        TypeError: for other models, and where layers in its blocks are not of this package or PyTorch, as LoRA's.
        ValueError: where layers in its blocks have hooks, which the copy would not call.
    """
    if not isinstance(model, EfficientVMambaPreTrainedModel):
        raise TypeError(f"optimize_for_inference takes an EfficientVMamba model, got a {type(model).__name__}")
    packs = model.device.type == "cpu" and model.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    if packs:
        refuse_changed_blocks(model)
    model = copy.deepcopy(model).eval().requires_grad_(False)
    fold_batch_norms(model)
    if packs:
        write_channels_last(model)
        fuse_layers(model)
        pack_linear_layers(model)
        micro_batch_blocks(model)
        keep_freed_memory()
    for module in model.modules():  # also its parts: their names and weights are others
        module.register_state_dict_pre_hook(refuse_to_save)
    model.register_forward_pre_hook(refuse_gradients, with_kwargs=True)
    return model


def fold_batch_norms(model: nn.Module) -> None:
    for module in list(model.modules()):
        for convolution, batch_norm in BATCH_NORMS.get(type(module), []):
            folded = fuse_conv_bn_eval(getattr(module, convolution), getattr(module, batch_norm))
            setattr(module, convolution, folded)
            setattr(module, batch_norm, nn.Identity())


def refuse_to_save(*_) -> NoReturn:
    raise RuntimeError(
        "this model was optimized for inference and can neither be saved nor copied: take the one that it was made "
        "from, and call optimize_for_inference afterwards"
    )


def refuse_gradients(module: nn.Module, arguments: tuple, named_arguments: dict) -> None:
    if torch.is_grad_enabled() and any(
        isinstance(each, torch.Tensor) and each.requires_grad for each in (*arguments, *named_arguments.values())
    ):
        raise RuntimeError(
            "this model was optimized for inference and computes no gradients, but its input requires them: use the "
            "model that it was made from, or torch.no_grad()"
        )


def keep_freed_memory() -> None:
    """Lets glibc keep up to 60 MB between calls.

    It gives freed memory back to the system once that is more than twice the largest block that was ever freed. A
    network whose maps have a few MB would get its memory anew, page by page, in every call. So a large one is freed.
    """
    torch.empty(30 * 2**20, dtype=torch.uint8)


def write_channels_last(model: nn.Module) -> None:
    """Lets the convolution that cuts the image into patches write its map as the LayerNorm behind it reads it."""
    for module in model.modules():
        if isinstance(module, EfficientVMambaEmbeddings):
            module.patch_embeddings.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # its stub lacks it


class PackedLayer(nn.Module):
    """A layer whose weights lie as oneDNN wants them: nothing else can read them."""

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:  # for pickle and copy
        refuse_to_save()

    def check_dtype(self, hidden_states: torch.Tensor) -> None:
        if hidden_states.dtype != torch.float32:
            raise TypeError(
                f"this model was optimized for inference in float32, got {hidden_states.dtype}: convert the model "
                "that it was made from, or leave autocast"
            )


class PackedLinear(PackedLayer):
    """A linear layer with the activation behind it, in oneDNN."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, activation: str = "none"):
        super().__init__()
        self.packed_weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
        self.bias = bias
        self.activation = activation

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        self.check_dtype(hidden_states)
        return torch.ops.mkldnn._linear_pointwise.default(
            hidden_states, self.packed_weight, self.bias, self.activation, [], "none"
        )

    def add_to(self, residual: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """`residual` plus the layer's output, without the activation."""
        if torch.compiler.is_compiling():  # the operator below has no form for fake tensors
            return residual + self(hidden_states)
        self.check_dtype(hidden_states)
        return torch.ops.mkldnn._linear_pointwise.binary(hidden_states, residual, self.packed_weight, self.bias, "add")


class DepthwiseConv(nn.Module):
    """A depthwise convolution with the activation behind it, its weight in the order of the kernel."""

    def __init__(self, convolution: nn.Conv2d, activation: str):
        super().__init__()
        weight = convolution.weight.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = convolution.bias
        self.activation = activation

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # (B, H, W, D) -> (B, H, W, D)
        return depthwise_conv(hidden_states, self.weight, self.bias, self.activation)

    def with_mean(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # and (B, D)
        return depthwise_conv_and_mean(hidden_states, self.weight, self.bias, self.activation)


class FusedEVSSLayer(nn.Module):
    """An EVSS block. The gate of the scan is computed when it is needed, and then still lies in the cache."""

    def __init__(self, layer: EfficientVMambaEVSSLayer):
        super().__init__()
        mixer, local_branch = layer.mixer, layer.local_branch
        self.layernorm = layer.layernorm
        weights = mixer.in_proj.weight.chunk(2)
        biases = (None, None) if mixer.in_proj.bias is None else mixer.in_proj.bias.chunk(2)
        self.in_proj_u, self.in_proj_z = map(PackedLinear, weights, biases)
        self.conv2d = DepthwiseConv(mixer.conv2d, "silu")
        self.scan_weights = nn.ParameterList(
            [mixer.x_proj_weight, mixer.dt_proj_weight, mixer.dt_proj_bias, mixer.A_log, mixer.D]
        )
        self.mixer_layernorm = mixer.layernorm
        self.out_proj = PackedLinear(mixer.out_proj.weight, mixer.out_proj.bias)
        self.depthwise_conv = DepthwiseConv(local_branch.depthwise_conv, "gelu")
        self.pointwise_conv = PackedLinear(
            local_branch.pointwise_conv.weight.flatten(1), local_branch.pointwise_conv.bias
        )
        self.gate_layernorm = layer.gate.layernorm
        self.squeeze = PackedLinear(layer.gate.squeeze.weight, layer.gate.squeeze.bias, "gelu")
        self.expand = PackedLinear(layer.gate.expand.weight, layer.gate.expand.bias, "sigmoid")

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # (B, C, H, W) -> (B, C, H, W)
        hidden_states = hidden_states.permute(0, 2, 3, 1)
        normalized = self.layernorm(hidden_states)  # (B, H, W, C)
        mixed = atrous_selective_scan(self.conv2d(self.in_proj_u(normalized)), *self.scan_weights)  # (B, H, W, D)
        mixed = self.mixer_layernorm(mixed, self.in_proj_z(normalized))
        mixed = self.out_proj(mixed)
        local = self.pointwise_conv(self.depthwise_conv(normalized))
        means = torch.stack([self.gate_layernorm(mixed), self.gate_layernorm(local)])  # (2, B, C)
        for_mixed, for_local = self.expand(self.squeeze(means))[:, :, None, None]  # (B, 1, 1, C) each
        hidden_states = torch.addcmul(hidden_states, mixed, for_mixed).addcmul_(local, for_local)
        return hidden_states.permute(0, 3, 1, 2)


class FusedInvertedResidualLayer(nn.Module):
    """An inverted-residual block. The mean for squeeze-and-excitation comes with the convolution."""

    def __init__(self, layer: EfficientVMambaInvertedResidualLayer):
        super().__init__()
        squeeze, expand = layer.squeeze_excitation.squeeze, layer.squeeze_excitation.expand
        self.expand_conv = PackedLinear(layer.expand_conv.weight.flatten(1), layer.expand_conv.bias, "relu")
        self.depthwise_conv = DepthwiseConv(layer.depthwise_conv, "relu")
        self.squeeze = PackedLinear(squeeze.weight.flatten(1), squeeze.bias, "relu")
        self.expand = PackedLinear(expand.weight.flatten(1), expand.bias, "sigmoid")
        self.project_conv = PackedLinear(layer.project_conv.weight.flatten(1), layer.project_conv.bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # (B, C, H, W) -> (B, C, H, W)
        hidden_states = hidden_states.permute(0, 2, 3, 1)
        expanded, mean = self.depthwise_conv.with_mean(self.expand_conv(hidden_states))  # (B, H, W, M), (B, M)
        expanded *= self.expand(self.squeeze(mean))[:, None, None]
        return self.project_conv.add_to(hidden_states, expanded).permute(0, 3, 1, 2)


FUSED_LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    EfficientVMambaEVSSLayer: FusedEVSSLayer,
    EfficientVMambaInvertedResidualLayer: FusedInvertedResidualLayer,
}


def fuse_layers(model: nn.Module) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) in FUSED_LAYERS:
                setattr(module, name, FUSED_LAYERS[type(child)](child))


def refuse_changed_blocks(model: nn.Module) -> None:
    """Fused layers compute with the weights of the parts alone."""
    blocks = [module for module in model.modules() if type(module) in FUSED_LAYERS]
    for name, part in (named_part for block in blocks for named_part in block.named_modules()):
        if not type(part).__module__.startswith(("torch.nn.", EfficientVMambaPreTrainedModel.__module__)):
            raise TypeError(
                f"{name} of a block is a {type(part).__module__}.{type(part).__name__}, which optimize_for_inference "
                "does not know: merge adapters first, or take the model as it is"
            )
        if part._forward_hooks or part._forward_pre_hooks:
            raise ValueError(
                f"{name or 'a block'} has hooks, which a model optimized for inference would not call: remove them "
                "first, or take the model as it is"
            )


def pack_linear_layers(model: nn.Module) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, PackedLinear(child.weight, child.bias))


class MicroBatchedBlocks(nn.Module):
    """Blocks that take a large batch in micro-batches.

    One passes all blocks before the next, and its maps stay in the cache.

    Args:
        layers: the blocks.
        widest: most channels of a map in a block, map and gate of a scan together.
    """

    def __init__(self, layers: nn.ModuleList, widest: int):
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.widest = widest

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # (B, C, H, W) -> (B, C, H, W)
        batch_size, _, height, width = hidden_states.shape
        micro_batch_size = max(1, WIDEST_MAP_BYTES // (self.widest * height * width * hidden_states.element_size()))
        if batch_size <= micro_batch_size:
            return self.layers(hidden_states)
        return torch.cat([self.layers(micro_batch) for micro_batch in hidden_states.split(micro_batch_size)])


def micro_batch_blocks(model: EfficientVMambaPreTrainedModel) -> None:
    config = model.config
    stages = [module for module in model.modules() if isinstance(module, EfficientVMambaStage)]
    for stage, hidden_size, block_type in zip(stages, config.hidden_sizes, config.block_types, strict=True):
        widest = hidden_size * (2 * config.expand if block_type == "evss" else config.expand_ratio)
        stage.layers = nn.ModuleList([MicroBatchedBlocks(stage.layers, widest)])


__all__ = ["optimize_for_inference"]
