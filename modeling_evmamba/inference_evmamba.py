"""Optimized copies of models for inference.

The copy folds batch norms into the convolutions and linear layers before them. On CPUs in float32, it also:

- packs the weights of linear layers into oneDNN's layout;
- fuses activations, means and residuals into the layers of each block, channels-last throughout;
- splits large batches into micro-batches whose feature maps stay in the cache.

benchmarks/NOTES.md lists the gain of each step.
"""

import copy
import warnings
from collections.abc import Callable, Container
from math import prod
from typing import NoReturn, SupportsIndex, TypeVar

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.utils.flop_counter import flop_registry, register_flop_formula
from transformers import PreTrainedModel

from .atrous_selective_scan import atrous_selective_scan
from .depthwise_conv import depthwise_conv, depthwise_conv_and_mean
from .modeling_evmamba import (
    EfficientVMambaBackbone,
    EfficientVMambaEmbeddings,
    EfficientVMambaEVSSLayer,
    EfficientVMambaInvertedResidualLayer,
    EfficientVMambaLocalBranch,
    EfficientVMambaPatchMerging,
    EfficientVMambaPreTrainedModel,
    EfficientVMambaStage,
)
from .packed_layers import (
    EVSSParameters,
    InvertedResidualParameters,
    Parameters,
    PatchMergingParameters,
    pack_layer,
)


Model = TypeVar("Model", bound=PreTrainedModel)
Network = TypeVar("Network", bound=EfficientVMambaPreTrainedModel)

# Bytes of the widest feature map of a micro-batch: it and its neighbors fit into the cache (benchmarks/NOTES.md).
WIDEST_MAP_BYTES = 10 * 2**20

# Detectors of transformers have it as a constant of the class.
FROZEN_BATCH_NORM_EPS = 1e-5

# On CPUs, separate kernels compute whole layers in these dtypes.
LOWER_DTYPES = (torch.bfloat16, torch.int8)

# Operators of oneDNN that PyTorch keeps private, so a release may drop them.
PACKED_OPERATORS = ("_linear_pointwise", "_reorder_linear_weight")

# for each block: a convolution or linear layer, and the batch norm that follows it
BATCH_NORMS = {
    EfficientVMambaLocalBranch: [("depthwise_conv", "batch_norm")],
    EfficientVMambaInvertedResidualLayer: [
        ("expand_conv", "expand_batch_norm"),
        ("depthwise_conv", "depthwise_batch_norm"),
        ("project_conv", "project_batch_norm"),
    ],
}


def optimize_for_inference(model: Model, dtype: torch.dtype | None = None) -> Model:
    """Return an optimized copy of a model for inference. Its outputs are the same up to rounding.

    In a head of transformers around an `EfficientVMambaBackbone`, the backbone is optimized. The head has the dtype of
    the copy. On CPUs, it computes in float32 if that dtype is `torch.bfloat16` or `torch.int8`.

    The copy is in evaluation mode, computes no gradients, and cannot be saved. Packed weights cannot change their
    device or dtype. `model` is unchanged.

    On CPUs, a copy in a lower dtype takes images of any floating-point dtype and returns float32. Its linear layers
    multiply in that dtype. Feature maps inside a block are bfloat16. The scan, norms, sums and maps between blocks are
    float32.

    Args:
        model: A model of this package, or one with its backbone, on any device.
        dtype: Dtype of the copy. `None` keeps the dtype of `model`. On CPUs, `torch.bfloat16` and `torch.int8` need
            Numba, and are faster than float32 if the processor multiplies in them (AVX512-BF16, AVX512-VNNI).
            `torch.int8` quantizes weights by output channel, and feature maps by pixel while the network computes.
            Other devices have no `torch.int8`.

    Returns:
        The optimized copy, of the class of `model`.

    Raises:
        ImportError: If a lower dtype needs Numba, which is missing.
        TypeError: If `model` is another model, or its weights are tensor subclasses, such as torchao's. Also if a
            layer of a block is neither PyTorch's nor this package's, such as LoRA's.
        ValueError: If a layer of a block has hooks, which the copy would not call. Also if the device does not compute
            in `dtype`, or if a lower dtype needs another backend than the requested one.
    """
    if isinstance(model, EfficientVMambaPreTrainedModel):
        return optimize_network(model, dtype or model.dtype)
    return optimize_head(model, dtype)


def optimize_network(model: Network, dtype: torch.dtype) -> Network:
    """Return an optimized copy of a model of this package. `optimize_for_inference` has the errors."""
    refuse_dtype(dtype, model)
    refuse_tensor_subclasses(model)
    is_on_cpu = model.device.type == "cpu"
    refuse_changed_layers(model, LOWER_DTYPE_PARAMETERS if is_on_cpu and dtype in LOWER_DTYPES else FUSED_LAYERS)
    model = copy.deepcopy(model).eval().requires_grad_(False)
    if is_on_cpu and dtype in LOWER_DTYPES:
        optimize_in_lower_dtype(model.float(), dtype)
    elif is_on_cpu and dtype == model.dtype == torch.float32 and has_packed_operators():
        optimize_in_float32(model)
    else:
        fold_batch_norms(model)
        convert(model, dtype)
    for module in model.modules():  # submodules too: their names and weights also differ from the model's
        module.register_state_dict_pre_hook(refuse_to_save)
    model.register_forward_pre_hook(refuse_gradients, with_kwargs=True)
    return model


def optimize_head(model: Model, dtype: torch.dtype | None) -> Model:
    """Return a copy of a head of transformers with an optimized backbone. `optimize_for_inference` has the errors."""
    backbones = ((name, each) for name, each in model.named_modules() if isinstance(each, EfficientVMambaBackbone))
    name, backbone = next(backbones, (None, None))
    if name is None or backbone is None:
        raise TypeError(
            "optimize_for_inference takes an EfficientVMamba model or one with its backbone, got a "
            f"{type(model).__name__}"
        )
    dtype = dtype or model.dtype
    optimized = optimize_network(thaw_batch_norms(backbone), dtype)
    model = copy.deepcopy(model).eval().requires_grad_(False)
    head_dtype = torch.float32 if model.device.type == "cpu" and dtype in LOWER_DTYPES else dtype
    model.to(dtype=head_dtype)  # type: ignore[call-arg]  # transformers' stub lacks it
    model.set_submodule(name, optimized)
    return model


def thaw_batch_norms(model: EfficientVMambaBackbone) -> EfficientVMambaBackbone:
    """Return a copy with batch norms in place of the frozen ones that detectors put into their backbone."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("FrozenBatchNorm2d"):
                weight = child.get_buffer("weight")
                batch_norm = nn.BatchNorm2d(len(weight), eps=FROZEN_BATCH_NORM_EPS).to(weight)
                batch_norm.load_state_dict(child.state_dict(), strict=False)  # frozen ones count no batches
                setattr(module, name, batch_norm)
    return model


def refuse_dtype(dtype: torch.dtype, model: EfficientVMambaPreTrainedModel) -> None:
    """Check the dtype of an optimized copy.

    Raises:
        ValueError: If the device of the model does not compute in it, or no kernel does.
    """
    device_type = model.device.type
    if not dtype.is_floating_point and dtype != torch.int8:
        raise ValueError(f"optimize_for_inference computes in a floating-point dtype or torch.int8, not in {dtype}")
    if device_type != "cpu":
        if dtype == torch.int8:
            raise ValueError(
                f"optimize_for_inference computes in torch.int8 on CPUs only, and the model is on {device_type}: use "
                "torch.bfloat16 there"
            )
        return
    if dtype == torch.float16 != model.dtype and not multiplies_in_float16():
        raise ValueError("this processor does not multiply in torch.float16 (AVX512-FP16): use torch.bfloat16")
    if dtype in LOWER_DTYPES and "evss" in model.config.block_types and model.config.conv_kernel != 3:
        raise ValueError(
            f"on CPUs, {dtype} needs a network with conv_kernel 3, and this one has {model.config.conv_kernel}: use "
            "torch.float32"
        )


def multiplies_in_float16() -> bool:
    """Return whether oneDNN multiplies in float16 on this processor. Some builds of PyTorch lack oneDNN."""
    is_supported = getattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", None)
    return is_supported is not None and is_supported()


def has_packed_operators() -> bool:
    """Return whether this PyTorch multiplies with packed weights. Warns if a release has dropped the operators."""
    if not torch.backends.mkldnn.is_available():
        return False
    missing = [name for name in PACKED_OPERATORS if not hasattr(torch.ops.mkldnn, name)]
    if missing:
        warnings.warn(
            f"PyTorch {torch.__version__} has no operator mkldnn.{missing[0]}, so linear layers of optimized copies "
            "run unpacked and slower: install an older PyTorch",
            stacklevel=3,
        )
    return not missing


def convert(model: EfficientVMambaPreTrainedModel, dtype: torch.dtype) -> None:
    """Convert a model to a dtype, except for the parameters that stay in float32."""
    kept = {
        name: parameter.data
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[2] in (model._keep_in_fp32_modules_strict or ())
    }
    model.to(dtype=dtype)  # type: ignore[call-arg]  # transformers' stub lacks it
    for name, data in kept.items():
        model.get_parameter(name).data = data


def optimize_in_float32(model: EfficientVMambaPreTrainedModel) -> None:
    fold_batch_norms(model)
    register_packed_flops()
    write_channels_last(model)
    fuse_layers(model)
    pack_linear_layers(model)
    micro_batch_blocks(model, bytes_per_number=4)
    keep_freed_memory()


def optimize_in_lower_dtype(model: EfficientVMambaPreTrainedModel, dtype: torch.dtype) -> None:
    fold_batch_norms(model)
    write_channels_last(model)
    pack_layers(model, dtype)
    if has_packed_operators():
        pack_linear_layers(model)  # the classifier
    micro_batch_blocks(model, bytes_per_number=2)
    keep_freed_memory()


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


def refuse_to_read() -> NoReturn:
    raise RuntimeError(
        "this model was optimized for inference, and its packed weights can be neither read nor changed: "
        "quantize, adapt or trace the original"
    )


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
        refuse_to_read()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        self.check_dtype(hidden_states)
        return torch.ops.mkldnn._linear_pointwise.default(
            hidden_states, self.packed_weight, self.bias, self.activation, [], "none"
        )

    def add_to(self, residual: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return `residual` plus the layer's output, without the activation."""
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
        self.x_proj_weight, self.dt_proj_weight = mixer.x_proj_weight, mixer.dt_proj_weight
        self.dt_proj_bias, self.A_log, self.D = mixer.dt_proj_bias, mixer.A_log, mixer.D
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
        mixed = atrous_selective_scan(  # (B, H, W, D)
            self.conv2d(self.in_proj_u(normalized)),
            self.x_proj_weight,
            self.dt_proj_weight,
            self.dt_proj_bias,
            self.A_log,
            self.D,
        )
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


def affine(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the weight and the bias of a layer."""
    bias = getattr(layer, "bias", None)
    return layer.get_parameter("weight").detach(), None if bias is None else bias.detach()


def evss_parameters(layer: EfficientVMambaEVSSLayer) -> EVSSParameters:
    mixer, local_branch, gate = layer.mixer, layer.local_branch, layer.gate
    return EVSSParameters(
        affine(layer.layernorm),
        affine(mixer.in_proj),
        affine(mixer.conv2d),
        mixer.x_proj_weight.detach(),
        (mixer.dt_proj_weight.detach(), mixer.dt_proj_bias.detach()),
        mixer.A_log.detach(),
        mixer.D.detach(),
        affine(mixer.layernorm),
        affine(mixer.output_proj),
        affine(local_branch.depthwise_conv),
        affine(local_branch.pointwise_conv),
        affine(gate.layernorm),
        affine(gate.squeeze),
        affine(gate.expand),
        (layer.layernorm.eps, mixer.layernorm.eps, gate.layernorm.eps),
    )


def inverted_residual_parameters(layer: EfficientVMambaInvertedResidualLayer) -> InvertedResidualParameters:
    return InvertedResidualParameters(
        affine(layer.expand_conv),
        affine(layer.depthwise_conv),
        affine(layer.squeeze_excitation.squeeze),
        affine(layer.squeeze_excitation.expand),
        affine(layer.project_conv),
    )


def patch_merging_parameters(layer: EfficientVMambaPatchMerging) -> PatchMergingParameters:
    return PatchMergingParameters(affine(layer.layernorm), affine(layer.reduction), layer.layernorm.eps)


LOWER_DTYPE_PARAMETERS: dict[type[nn.Module], Callable[..., Parameters]] = {
    EfficientVMambaEVSSLayer: evss_parameters,
    EfficientVMambaInvertedResidualLayer: inverted_residual_parameters,
    EfficientVMambaPatchMerging: patch_merging_parameters,
}


class LowerDtypeLayer(PackedLayer):
    """A layer that one kernel computes, whose weights are packed in a lower dtype."""

    def __init__(self, parameters: Parameters, dtype: torch.dtype):
        super().__init__()
        self.compute = pack_layer(parameters, dtype)

    @torch.compiler.disable  # the kernel reads addresses, which a graph does not have
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # (B, C, H, W) -> (B, C', H', W'), float32
        if torch.jit.is_tracing():
            refuse_to_read()
        if hidden_states.shape[0] == 0:
            return self(hidden_states.new_zeros(1, *hidden_states.shape[1:]))[:0]
        return self.compute(hidden_states.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class LowerDtypeEmbeddings(nn.Module):
    """Patch embeddings in float32, of images in any floating-point dtype, under autocast too."""

    def __init__(self, embeddings: EfficientVMambaEmbeddings):
        super().__init__()
        self.embeddings = embeddings

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.embeddings(pixel_values.float())


def pack_layers(model: nn.Module, dtype: torch.dtype) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is EfficientVMambaEmbeddings:
                setattr(module, name, LowerDtypeEmbeddings(child))
            elif type(child) in LOWER_DTYPE_PARAMETERS:
                setattr(module, name, LowerDtypeLayer(LOWER_DTYPE_PARAMETERS[type(child)](child), dtype))


FUSED_LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    EfficientVMambaEVSSLayer: FusedEVSSLayer,
    EfficientVMambaInvertedResidualLayer: FusedInvertedResidualLayer,
}


def fuse_layers(model: nn.Module) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) in FUSED_LAYERS:
                setattr(module, name, FUSED_LAYERS[type(child)](child))


def refuse_changed_layers(model: nn.Module, replaced: Container[type[nn.Module]]) -> None:
    """Reject layers with foreign parts or hooks, since fused layers use nothing but the weights of the parts.

    Args:
        model: The model.
        replaced: Classes of the layers that fused ones replace.

    Raises:
        TypeError: If a part of a layer is neither of PyTorch nor of this package.
        ValueError: If a part of a layer has hooks.
    """
    layers = [module for module in model.modules() if type(module) in replaced]
    for name, part in (named_part for layer in layers for named_part in layer.named_modules()):
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
    """Reject weights that are tensor subclasses, since folding and packing compute with plain tensors.

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
        widest: Bytes per pixel of the widest feature map in a block. The input and the gate of a scan count together.
    """

    def __init__(self, layers: nn.ModuleList, widest: int):
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.widest = widest

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # (B, C, H, W) -> (B, C, H, W)
        batch_size, _, height, width = hidden_states.shape
        micro_batch_size = max(1, WIDEST_MAP_BYTES // (self.widest * height * width))
        if batch_size <= micro_batch_size:
            return self.layers(hidden_states)
        return torch.cat([self.layers(micro_batch) for micro_batch in hidden_states.split(micro_batch_size)])


def micro_batch_blocks(model: EfficientVMambaPreTrainedModel, bytes_per_number: int) -> None:
    config = model.config
    stages = [module for module in model.modules() if isinstance(module, EfficientVMambaStage)]
    for stage, hidden_size, block_type in zip(stages, config.hidden_sizes, config.block_types, strict=True):
        widest = hidden_size * (2 * config.expand if block_type == "evss" else config.expand_ratio)
        stage.layers = nn.ModuleList([MicroBatchedBlocks(stage.layers, bytes_per_number * widest)])


__all__ = ["optimize_for_inference"]
