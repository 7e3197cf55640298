"""Optimized copies of models for inference.

The copy folds batch norms into the convolutions and linear layers before them. On CPUs in float32, it also:

- packs the weights of linear layers into oneDNN's layout;
- fuses activations, means and residuals into the layers of each block, channels-last throughout;
- splits large batches into micro-batches whose feature maps stay in the cache.

benchmarks/NOTES.md lists the gain of each step.
"""

import copy
from math import prod
from typing import NoReturn, SupportsIndex, TypeVar

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.utils.flop_counter import flop_registry, register_flop_formula

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

# Bytes of the widest feature map of a micro-batch: it and its neighbors fit into the cache (benchmarks/NOTES.md).
WIDEST_MAP_BYTES = 10 * 2**20

# for each block: a convolution or linear layer, and the batch norm that follows it
BATCH_NORMS = {
    EfficientVMambaLocalBranch: [("depthwise_conv", "batch_norm")],
    EfficientVMambaInvertedResidualLayer: [
        ("expand_conv", "expand_batch_norm"),
        ("depthwise_conv", "depthwise_batch_norm"),
        ("project_conv", "project_batch_norm"),
    ],
}


def optimize_for_inference(model: Model) -> Model:
    """Returns an optimized copy of a model for inference. Its outputs are the same up to rounding.

    The copy is in evaluation mode, computes no gradients, and cannot be saved. Packed weights cannot change their
    device or dtype. `model` is unchanged.

    Args:
        model: A model of this package, on any device. Weights are packed on CPUs in float32 only.

    Returns:
        The optimized copy, of the class of `model`.

    Raises:
        TypeError: If `model` is another model, its weights are no plain tensors, such as torchao's, or a layer of a
            block comes from elsewhere than PyTorch or this package, such as LoRA's.
        ValueError: If a layer of a block has hooks, which the copy would not call.
    """
    if not isinstance(model, EfficientVMambaPreTrainedModel):
        raise TypeError(f"optimize_for_inference takes an EfficientVMamba model, got a {type(model).__name__}")
    refuse_tensor_subclasses(model)
    refuse_changed_blocks(model)
    packs = model.device.type == "cpu" and model.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    model = copy.deepcopy(model).eval().requires_grad_(False)
    fold_batch_norms(model)
    if packs:
        register_packed_flops()
        write_channels_last(model)
        fuse_layers(model)
        pack_linear_layers(model)
        micro_batch_blocks(model)
        keep_freed_memory()
    for module in model.modules():  # submodules too: their names and weights also differ from the model's
        module.register_state_dict_pre_hook(refuse_to_save)
    model.register_forward_pre_hook(refuse_gradients, with_kwargs=True)
    return model


def fold_batch_norms(model: nn.Module) -> None:
    for module in list(model.modules()):
        for name, batch_norm in BATCH_NORMS.get(type(module), []):
            layer = getattr(module, name)
            fold = fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fuse_conv_bn_eval
            setattr(module, name, fold(layer, getattr(module, batch_norm)))
            setattr(module, batch_norm, nn.Identity())


def refuse_to_save(*_) -> NoReturn:
    raise RuntimeError(
        "this model was optimized for inference and can neither be saved nor copied: use the original, and call "
        "optimize_for_inference afterwards"
    )


def refuse_gradients(module: nn.Module, arguments: tuple, named_arguments: dict) -> None:
    if torch.is_grad_enabled() and any(
        isinstance(each, torch.Tensor) and each.requires_grad for each in (*arguments, *named_arguments.values())
    ):
        raise RuntimeError(
            "this model was optimized for inference and computes no gradients, but its input requires them: use the "
            "original, or torch.no_grad()"
        )


def keep_freed_memory() -> None:
    """Make glibc keep up to 60 MB of freed memory between calls.

    glibc returns freed memory to the system above twice the size of the largest block ever freed. A network with
    feature maps of a few MB would then fault in fresh pages in every call. Freeing one large block raises that limit.
    """
    torch.empty(30 * 2**20, dtype=torch.uint8)


def write_channels_last(model: nn.Module) -> None:
    """Make the patch embeddings write channels-last, which is the order that the next LayerNorm reads."""
    for module in model.modules():
        if isinstance(module, EfficientVMambaEmbeddings):
            module.patch_embeddings.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # its stub lacks it


def count_packed_flops(map_shape, *arguments, out_shape, **named_arguments) -> int:
    return 2 * prod(out_shape) * map_shape[-1]


def register_packed_flops() -> None:
    """Register the FLOPs of oneDNN's linear layers with PyTorch's `FlopCounterMode`, which does not know them."""
    operator = torch.ops.mkldnn._linear_pointwise
    if operator not in flop_registry:
        register_flop_formula(operator)(count_packed_flops)


class PackedLayer(nn.Module):
    """A layer whose weights are in oneDNN's layout, which no other operator can read."""

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:  # for pickle and copy
        refuse_to_save()

    def check_dtype(self, hidden_states: torch.Tensor) -> None:
        if hidden_states.dtype != torch.float32:
            raise TypeError(
                f"this model was optimized for inference in float32, got {hidden_states.dtype}: convert the original "
                "and optimize it again, or leave autocast"
            )


class PackedLinear(PackedLayer, nn.Linear):
    """A linear layer followed by an activation, in oneDNN.

    It is an `nn.Linear`, so that adapters and quantizers find it and raise the error of `weight`.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, activation: str = "none"):
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.packed_weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
        self.bias = bias  # type: ignore[assignment]  # folded batch norms and chunks are plain tensors
        self.activation = activation

    @property
    def weight(self) -> NoReturn:  # type: ignore[override]  # it has none that others can read
        raise RuntimeError(
            "this model was optimized for inference, and its packed weights can be neither read nor changed: "
            "quantize, adapt or trace the original"
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        self.check_dtype(hidden_states)
        return torch.ops.mkldnn._linear_pointwise.default(
            hidden_states, self.packed_weight, self.bias, self.activation, [], "none"
        )

    def add_to(self, residual: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """Returns `residual` plus the layer's output, without the activation."""
        if torch.compiler.is_compiling():  # the operator below has no form for fake tensors
            return residual + self(hidden_states)
        self.check_dtype(hidden_states)
        return torch.ops.mkldnn._linear_pointwise.binary(hidden_states, residual, self.packed_weight, self.bias, "add")


class DepthwiseConv(nn.Module):
    """A depthwise convolution followed by an activation. Its weight is in the order that the kernel reads."""

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
    """An EVSS block. It computes the gate of the scan right before its use, so the gate is still in the cache."""

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
        self.output_proj = PackedLinear(mixer.output_proj.weight, mixer.output_proj.bias)
        self.depthwise_conv = DepthwiseConv(local_branch.depthwise_conv, "gelu")
        self.pointwise_conv = PackedLinear(local_branch.pointwise_conv.weight, local_branch.pointwise_conv.bias)
        self.gate_layernorm = layer.gate.layernorm
        self.squeeze = PackedLinear(layer.gate.squeeze.weight, layer.gate.squeeze.bias, "gelu")
        self.expand = PackedLinear(layer.gate.expand.weight, layer.gate.expand.bias, "sigmoid")

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # (B, C, H, W) -> (B, C, H, W)
        hidden_states = hidden_states.permute(0, 2, 3, 1)
        normalized = self.layernorm(hidden_states)  # (B, H, W, C)
        mixed = atrous_selective_scan(self.conv2d(self.in_proj_u(normalized)), *self.scan_weights)  # (B, H, W, D)
        mixed = self.mixer_layernorm(mixed, self.in_proj_z(normalized))
        mixed = self.output_proj(mixed)
        local = self.pointwise_conv(self.depthwise_conv(normalized))
        means = torch.stack([self.gate_layernorm(mixed), self.gate_layernorm(local)])  # (2, B, C)
        for_mixed, for_local = self.expand(self.squeeze(means))[:, :, None, None]  # (B, 1, 1, C) each
        hidden_states = torch.addcmul(hidden_states, mixed, for_mixed).addcmul_(local, for_local)
        return hidden_states.permute(0, 3, 1, 2)


class FusedInvertedResidualLayer(nn.Module):
    """An inverted-residual block. The convolution also returns the mean for squeeze-and-excitation."""

    def __init__(self, layer: EfficientVMambaInvertedResidualLayer):
        super().__init__()
        squeeze, expand = layer.squeeze_excitation.squeeze, layer.squeeze_excitation.expand
        self.expand_conv = PackedLinear(layer.expand_conv.weight, layer.expand_conv.bias, "relu")
        self.depthwise_conv = DepthwiseConv(layer.depthwise_conv, "relu")
        self.squeeze = PackedLinear(squeeze.weight, squeeze.bias, "relu")
        self.expand = PackedLinear(expand.weight, expand.bias, "sigmoid")
        self.project_conv = PackedLinear(layer.project_conv.weight, layer.project_conv.bias)

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
    """Reject blocks with foreign layers or hooks, since fused layers use nothing but the weights of the parts.

    Raises:
        TypeError: If a part of a block is neither of PyTorch nor of this package.
        ValueError: If a part of a block has hooks.
    """
    blocks = [module for module in model.modules() if type(module) in FUSED_LAYERS]
    for name, part in (named_part for block in blocks for named_part in block.named_modules()):
        if not type(part).__module__.startswith(("torch.nn.", EfficientVMambaPreTrainedModel.__module__)):
            raise TypeError(
                f"{name} of a block is a {type(part).__module__}.{type(part).__name__}, which optimize_for_inference "
                "does not know: merge adapters first, or use the model as it is"
            )
        if part._forward_hooks or part._forward_pre_hooks:
            raise ValueError(
                f"{name or 'a block'} has hooks, which a model optimized for inference would not call: remove them "
                "first, or use the model as it is"
            )


def refuse_tensor_subclasses(model: nn.Module) -> None:
    """Reject weights that are no plain tensors, since folding and packing compute with them.

    Raises:
        TypeError: If there is one, such as torchao's.
    """
    for name, parameter in model.named_parameters():
        if type(parameter.data) is not torch.Tensor:
            raise TypeError(
                f"{name} is a {type(parameter.data).__name__}, which optimize_for_inference cannot "
                "pack: use the quantized or sharded model as it is"
            )


def pack_linear_layers(model: nn.Module) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:  # adapters and quantizers keep their own
                setattr(module, name, PackedLinear(child.weight, child.bias))


class MicroBatchedBlocks(nn.Module):
    """Blocks that process a large batch in micro-batches.

    Each micro-batch passes through all blocks before the next one, so its feature maps stay in the cache.

    Args:
        layers: The blocks.
        widest: The most channels of a feature map in a block. The input and the gate of a scan count together.
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
