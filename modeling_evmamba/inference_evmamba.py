"""A model made ready to classify and nothing else: fewer passes over its maps, weights as the processor wants them.

Both steps are PyTorch's own. Batch norms that follow a convolution are folded into it. On x86 CPUs, convolutions and
linear layers then take the layout of oneDNN's kernels, and the activations behind them are computed in passing, as
`torch.compile` does it, but without a compiler. What either gains: benchmarks/NOTES.md.
"""

import copy

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .modeling_evmamba import (
    EfficientVMambaES2D,
    EfficientVMambaInvertedResidualLayer,
    EfficientVMambaLocalBranch,
    EfficientVMambaPointwiseConv,
    EfficientVMambaPreTrainedModel,
    EfficientVMambaStage,
)


# Bytes of the widest map of a part of a batch: with some of its neighbours, it fits into the cache of a processor
# (benchmarks/NOTES.md)
WIDEST_MAP = 10 * 2**20

# names of activations for oneDNN
POST_OPS = {nn.SiLU: "swish", nn.GELU: "gelu", nn.ReLU: "relu"}

# of the blocks, in this order: a convolution, the batch norm behind it, the activation behind that
CHAINS = {
    EfficientVMambaES2D: [("conv2d", None, "activation")],
    EfficientVMambaLocalBranch: [("depthwise_conv", "batch_norm", "activation")],
    EfficientVMambaInvertedResidualLayer: [
        ("expand_conv", "expand_batch_norm", "activation"),
        ("depthwise_conv", "depthwise_batch_norm", "activation"),
        ("project_conv", "project_batch_norm", None),
    ],
}


def optimize_for_inference(model: EfficientVMambaPreTrainedModel) -> EfficientVMambaPreTrainedModel:
    """A copy of a model for inference alone: the same outputs to rounding, sooner.

    The copy is in evaluation mode, computes no gradients, and cannot be saved; packed weights stay on their device in
    their dtype. `model` stays as it is.

    Args:
        model: any of the models of this package, on any device. Weights are packed for CPUs, in float32.

    Raises:
        TypeError: for other models.
    """
    if not isinstance(model, EfficientVMambaPreTrainedModel):
        raise TypeError(f"optimize_for_inference takes an EfficientVMamba model, got a {type(model).__name__}")
    model = copy.deepcopy(model).eval().requires_grad_(False)
    packs = model.device.type == "cpu" and model.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    fold_batch_norms(model)
    if packs:
        for module in list(model.modules()):
            pack_chains(module)
        pack_linear_layers(model)
        split_batches(model)
        keep_freed_memory()
    for module in model.modules():  # also its parts: their names and weights are others
        module.register_state_dict_pre_hook(refuse_to_save)
    model.register_forward_pre_hook(refuse_gradients, with_kwargs=True)
    return model


def fold_batch_norms(model: nn.Module) -> None:
    for module in list(model.modules()):
        for convolution, batch_norm, _ in CHAINS.get(type(module), []):
            if batch_norm is not None:
                folded = fuse_conv_bn_eval(getattr(module, convolution), getattr(module, batch_norm))
                setattr(module, convolution, folded)
                setattr(module, batch_norm, nn.Identity())


def refuse_to_save(*_) -> None:
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


class Packed(nn.Module):
    """A layer whose weights lie as oneDNN wants them: nothing else can read them."""

    def __reduce_ex__(self, protocol: int) -> None:  # for pickle and copy
        refuse_to_save()

    def check_dtype(self, hidden_states: torch.Tensor) -> None:
        if hidden_states.dtype != torch.float32:
            raise TypeError(
                f"this model was optimized for inference in float32, got {hidden_states.dtype}: convert the model "
                "that it was made from, or leave autocast"
            )


class PackedLinear(Packed):
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


class PackedPointwiseConv(PackedLinear):
    """A 1 x 1 convolution with the activation behind it, in oneDNN."""

    def __init__(self, convolution: EfficientVMambaPointwiseConv, activation: str = "none"):
        super().__init__(convolution.weight.flatten(1), convolution.bias, activation)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # (B, C, H, W) -> (B, C', H, W)
        return super().forward(hidden_states.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PackedConv2d(Packed):
    """A convolution with the activation behind it, in oneDNN."""

    def __init__(self, convolution: nn.Conv2d, activation: str):
        super().__init__()
        self.geometry = (convolution.padding, convolution.stride, convolution.dilation, convolution.groups)
        self.packed_weight = torch.ops.mkldnn._reorder_convolution_weight(convolution.weight, *self.geometry, None)
        self.bias = convolution.bias
        self.activation = activation

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # (B, C, H, W) -> (B, C', H', W')
        self.check_dtype(hidden_states)
        return torch.ops.mkldnn._convolution_pointwise.default(
            hidden_states, self.packed_weight, self.bias, *self.geometry, self.activation, [], "none"
        )


def pack_chains(module: nn.Module) -> None:
    activations = set()
    for convolution_name, _, activation_name in CHAINS.get(type(module), []):
        convolution = getattr(module, convolution_name)
        post_op = "none" if activation_name is None else POST_OPS[type(getattr(module, activation_name))]
        is_pointwise = isinstance(convolution, EfficientVMambaPointwiseConv)
        packed_class = PackedPointwiseConv if is_pointwise else PackedConv2d
        setattr(module, convolution_name, packed_class(convolution, post_op))
        activations.add(activation_name)
    for name in activations - {None}:
        setattr(module, name, nn.Identity())


def pack_linear_layers(model: nn.Module) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, PackedLinear(child.weight, child.bias))
            elif isinstance(child, EfficientVMambaPointwiseConv):
                setattr(module, name, PackedPointwiseConv(child))


class BlocksOnParts(nn.Module):
    """Blocks that take a large batch in parts, all blocks one part before the next, whose maps stay in the cache.

    Args:
        layers: the blocks.
        widest: most channels of a map in a block.
    """

    def __init__(self, layers: nn.ModuleList, widest: int):
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.widest = widest

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # (B, C, H, W) -> (B, C, H, W)
        batch_size, _, height, width = hidden_states.shape
        part_size = max(1, WIDEST_MAP // (self.widest * height * width * hidden_states.element_size()))
        if batch_size <= part_size:
            return self.layers(hidden_states)
        return torch.cat([self.layers(part) for part in hidden_states.split(part_size)])


def split_batches(model: nn.Module) -> None:
    config = model.config
    stages = [module for module in model.modules() if isinstance(module, EfficientVMambaStage)]
    for stage, hidden_size, block_type in zip(stages, config.hidden_sizes, config.block_types, strict=True):
        widest = hidden_size * (2 * config.expand if block_type == "evss" else config.expand_ratio)
        stage.layers = nn.ModuleList([BlocksOnParts(stage.layers, widest)])


__all__ = ["optimize_for_inference"]
