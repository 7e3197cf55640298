# Copyright 2026 The EfficientVMamba-on-the-Hub authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""PyTorch EfficientVMamba model.

Paper: "EfficientVMamba: Atrous Selective Scan for Light Weight Visual Mamba", Pei, Huang and Xu, arXiv 2403.09977.
The authors' code is at https://github.com/TerryPei/EfficientVMamba. This implementation copies none of it. Where the
paper and the released weights differ, the network follows the weights.

Feature maps between modules have the shape (B, C, H, W), as in other vision models of transformers. In memory they are
channels-last, so the permutations to (B, H, W, C) inside the modules copy nothing.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithNoAttention,
    BaseModelOutputWithPoolingAndNoAttention,
    ImageClassifierOutputWithNoAttention,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .atrous_selective_scan import atrous_selective_scan
from .configuration_evmamba import EfficientVMambaConfig
from .layer_norm import layer_norm_gated, layer_norm_mean


NUM_SCAN_GROUPS = 4  # skip sampling with step 2: one group per parity of row and column

# Graphs of `torch.fx.symbolic_trace` call these functions as they are, since they branch on sizes.
torch.fx.wrap("atrous_selective_scan")
torch.fx.wrap("layer_norm_gated")
torch.fx.wrap("layer_norm_mean")


class EfficientVMambaLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of a feature map (B, C, H, W)."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class EfficientVMambaGatedLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of a feature map, multiplied by the SiLU of a gate."""

    # (B, H, W, D) each; the base class takes no gate
    def forward(self, hidden_states: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return layer_norm_gated(hidden_states, gate, self.weight, self.bias, self.eps)


class EfficientVMambaMeanLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of a feature map, averaged over the pixels."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # (B, H, W, C) -> (B, C)
        return layer_norm_mean(hidden_states, self.weight, self.bias, self.eps)


def pointwise_conv(in_channels: int, out_channels: int, bias: bool = True) -> nn.Linear:
    """Return a 1 x 1 convolution of channels-last feature maps: a linear layer, initialized as a convolution."""
    layer = nn.Linear(in_channels, out_channels, bias=bias)
    layer.is_pointwise_conv = True  # type: ignore[assignment]  # for `_init_weights`: tools want no subclass of nn.Linear
    return layer


def apply_to_pixels(layer: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:  # (B, H, W, C) -> (B, H, W, C')
    """Apply a linear layer to each pixel. Some quantizers, such as bitsandbytes, take at most three dimensions."""
    return layer(hidden_states.flatten(1, 2)).unflatten(1, hidden_states.shape[1:3])


def is_ordinary(layer: nn.Linear) -> bool:
    """Return whether calling a layer computes `F.linear` of its plain parameters, and nothing else.

    Adapters and quantizers change the class of a layer, its `forward`, or the class of its weight. Others add hooks.
    """
    has_hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return (
        type(layer) is nn.Linear
        and "forward" not in vars(layer)
        and not has_hooks
        and not torch.nn.modules.module._has_any_global_hook()
        and type(layer.weight) in (torch.Tensor, nn.Parameter)
    )


def apply_in_halves(layer: nn.Linear, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Apply a linear layer to each pixel, and split the channels: (B, H, W, C) -> two maps (B, H, W, C' / 2).

    Training on CPUs takes two products, so each half is dense. Then the convolution of one half copies no map, and
    autograd joins the gradients of half a weight each, not of half a map each.
    """
    is_for_training = (
        torch.is_grad_enabled()
        and type(hidden_states) is torch.Tensor  # not in graphs
        and hidden_states.device.type == "cpu"
        and not (torch.compiler.is_compiling() or torch.jit.is_tracing())
    )
    if not (is_for_training and is_ordinary(layer)):
        return apply_to_pixels(layer, hidden_states).chunk(2, dim=-1)
    pixels, shape = hidden_states.flatten(1, 2), hidden_states.shape[1:3]
    biases = (None, None) if layer.bias is None else layer.bias.chunk(2)
    parameters = zip(layer.weight.chunk(2), biases, strict=True)
    return tuple(F.linear(pixels, weight, bias).unflatten(1, shape) for weight, bias in parameters)


class EfficientVMambaDropPath(nn.Module):
    """Stochastic depth per sample (https://arxiv.org/abs/1603.09382). It is the identity outside of training."""

    def __init__(self, drop_prob: float):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return hidden_states
        keep_prob = 1 - self.drop_prob
        kept = hidden_states.new_empty(hidden_states.shape[0], 1, 1, 1).bernoulli_(keep_prob)
        return hidden_states * (kept / keep_prob)

    def extra_repr(self) -> str:
        return f"p={self.drop_prob}"


@torch.fx.wrap
def check_pixel_values(pixel_values: torch.Tensor, num_channels: int, patch_size: int) -> None:
    """Check the shape of a batch of images.

    Raises:
        ValueError: If the network cannot take the images. The message names the reason.
    """
    if pixel_values.ndim != 4:
        raise ValueError(
            "pixel_values must have the shape (batch_size, num_channels, height, width), "
            f"got {tuple(pixel_values.shape)}"
        )
    _, actual_channels, height, width = pixel_values.shape
    if actual_channels != num_channels:
        raise ValueError(
            f"pixel_values must have {num_channels} channels, as in the configuration, got {actual_channels}"
        )
    if height < patch_size or width < patch_size:
        raise ValueError(
            f"images must hold at least one patch of {patch_size} x {patch_size} pixels, got {height} x {width}"
        )


class EfficientVMambaEmbeddings(nn.Module):
    """Patch embeddings. Drops the pixels at the bottom and right that fill no patch."""

    def __init__(self, config: EfficientVMambaConfig):
        super().__init__()
        self.num_channels = config.num_channels
        self.patch_size = config.patch_size
        self.patch_embeddings = nn.Conv2d(
            config.num_channels, config.hidden_sizes[0], kernel_size=config.patch_size, stride=config.patch_size
        )
        self.layernorm = EfficientVMambaLayerNorm(config.hidden_sizes[0], eps=config.layer_norm_eps)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        check_pixel_values(pixel_values, self.num_channels, self.patch_size)
        return self.layernorm(self.patch_embeddings(pixel_values))


class EfficientVMambaES2D(nn.Module):
    """ES2D: Mamba's mixer with the atrous selective scan in place of the 1D scan (paper, section 3.2)."""

    def __init__(self, config: EfficientVMambaConfig, hidden_size: int):
        super().__init__()
        intermediate_size = config.expand * hidden_size  # D
        state_size = config.state_size  # N
        rank = math.ceil(hidden_size / 16) if isinstance(config.time_step_rank, str) else config.time_step_rank  # R
        self.time_step_min = config.time_step_min
        self.time_step_max = config.time_step_max
        self.time_step_floor = config.time_step_floor

        self.in_proj = nn.Linear(hidden_size, 2 * intermediate_size, bias=config.use_bias)
        self.conv2d = nn.Conv2d(
            intermediate_size,
            intermediate_size,
            kernel_size=config.conv_kernel,
            padding=config.conv_kernel // 2,
            groups=intermediate_size,
            bias=config.use_conv_bias,
        )
        self.x_proj_weight = nn.Parameter(torch.empty(NUM_SCAN_GROUPS, rank + 2 * state_size, intermediate_size))
        self.dt_proj_weight = nn.Parameter(torch.empty(NUM_SCAN_GROUPS, intermediate_size, rank))
        self.dt_proj_bias = nn.Parameter(torch.empty(NUM_SCAN_GROUPS, intermediate_size))
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)  # see `_keep_in_fp32_modules_strict`
        self.A_log = nn.Parameter(torch.empty(NUM_SCAN_GROUPS, intermediate_size, state_size, dtype=dtype))
        self.D = nn.Parameter(torch.empty(NUM_SCAN_GROUPS, intermediate_size, dtype=dtype))
        self.activation = nn.SiLU()
        self.layernorm = EfficientVMambaGatedLayerNorm(intermediate_size, eps=config.layer_norm_eps)
        # not Mamba's `out_proj`, which transformers renames in checkpoints of DETR and its relatives
        self.output_proj = nn.Linear(intermediate_size, hidden_size, bias=config.use_bias)

    def init_scan_weights(self):
        _, channels, rank = self.dt_proj_weight.shape
        state_size = self.A_log.shape[-1]
        init.uniform_(self.x_proj_weight, -(channels**-0.5), channels**-0.5)  # the default of nn.Linear
        init.uniform_(self.dt_proj_weight, -(rank**-0.5), rank**-0.5)
        # Mamba's initialization: time steps are log-uniform, and the bias is their inverse softplus
        log_range = math.log(self.time_step_max) - math.log(self.time_step_min)
        dt = torch.exp(torch.rand_like(self.dt_proj_bias) * log_range + math.log(self.time_step_min))
        dt = dt.clamp(min=self.time_step_floor)
        init.copy_(self.dt_proj_bias, dt + torch.log(-torch.expm1(-dt)))
        A_log = torch.arange(1, state_size + 1, dtype=self.A_log.dtype, device=self.A_log.device).log()
        init.copy_(self.A_log, A_log.expand_as(self.A_log))
        init.ones_(self.D)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # (B, H, W, C) -> (B, H, W, C)
        hidden_states, z = apply_in_halves(self.in_proj, hidden_states)  # (B, H, W, D) each
        hidden_states = self.activation(self.conv2d(hidden_states.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        hidden_states = atrous_selective_scan(
            hidden_states,
            self.x_proj_weight,
            self.dt_proj_weight,
            self.dt_proj_bias,
            self.A_log,
            self.D,
        )
        hidden_states = self.layernorm(hidden_states, z)
        return apply_to_pixels(self.output_proj, hidden_states)


def normalize_batch(batch_norm: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """Apply a batch norm. Its running statistics count each batch once, also with gradient checkpointing.

    Gradient checkpointing computes the feature maps again in the backward pass, which then updates copies of the
    statistics. Without any update, autograd would save other tensors than in the forward pass, which is an error.

    Args:
        batch_norm: A batch norm, or a module that wraps one, such as PEFT's.
        hidden_states: `(B, C, H, W)`.
    """
    # compiled graphs update the statistics once by themselves; the id is -1 outside of backward passes
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
        return batch_norm(hidden_states)
    copies = {name: buffer.clone() for name, buffer in batch_norm.named_buffers()}
    return torch.func.functional_call(batch_norm, copies, hidden_states)


class EfficientVMambaLocalBranch(nn.Module):
    """Convolutional branch in parallel to the scan, with the channels of the block."""

    def __init__(self, config: EfficientVMambaConfig, hidden_size: int):
        super().__init__()
        self.depthwise_conv = nn.Conv2d(hidden_size, hidden_size, kernel_size=3, padding=1, groups=hidden_size)
        self.batch_norm = nn.BatchNorm2d(hidden_size, eps=config.batch_norm_eps)
        self.activation = nn.GELU()
        self.pointwise_conv = pointwise_conv(hidden_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # (B, H, W, C) -> (B, H, W, C)
        hidden_states = normalize_batch(self.batch_norm, self.depthwise_conv(hidden_states.permute(0, 3, 1, 2)))
        return apply_to_pixels(self.pointwise_conv, self.activation(hidden_states).permute(0, 2, 3, 1))


class EfficientVMambaChannelGate(nn.Module):
    """Return factors in (0, 1) for the channels of each feature map, from the mean of the normalized feature map."""

    def __init__(self, config: EfficientVMambaConfig, hidden_size: int):
        super().__init__()
        squeezed_size = max(1, int(hidden_size * config.squeeze_expansion_ratio))
        self.layernorm = EfficientVMambaMeanLayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.squeeze = nn.Linear(hidden_size, squeezed_size)
        self.expand = nn.Linear(squeezed_size, hidden_size)

    def forward(self, *maps: torch.Tensor) -> torch.Tensor:  # M times (B, H, W, C) -> (M, B, 1, 1, C)
        means = torch.stack([self.layernorm(each) for each in maps])  # (M, B, C)
        factors = torch.sigmoid(self.expand(F.gelu(self.squeeze(means))))
        return factors[:, :, None, None]


class EfficientVMambaEVSSLayer(GradientCheckpointingLayer):
    """EVSS block (paper, section 3.3): a scan over the whole feature map, and a local branch around each pixel."""

    def __init__(self, config: EfficientVMambaConfig, hidden_size: int, drop_path_rate: float):
        super().__init__()
        self.layernorm = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.mixer = EfficientVMambaES2D(config, hidden_size)
        self.local_branch = EfficientVMambaLocalBranch(config, hidden_size)
        self.gate = EfficientVMambaChannelGate(config, hidden_size)  # both branches share its weights
        self.drop_path = EfficientVMambaDropPath(drop_path_rate)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # (B, C, H, W) -> (B, C, H, W)
        normalized = self.layernorm(hidden_states.permute(0, 2, 3, 1))  # (B, H, W, C)
        mixed, local = self.mixer(normalized), self.local_branch(normalized)
        for_mixed, for_local = self.gate(mixed, local)  # (B, 1, 1, C) each
        update = torch.addcmul(mixed * for_mixed, local, for_local)
        return hidden_states + self.drop_path(update.permute(0, 3, 1, 2))


class EfficientVMambaSqueezeExcitation(nn.Module):
    """Squeeze-and-excitation: scales each channel by a factor in (0, 1) from the mean of the feature map."""

    def __init__(self, config: EfficientVMambaConfig, hidden_size: int):
        super().__init__()
        squeezed_size = max(1, int(hidden_size * config.squeeze_expansion_ratio))
        self.squeeze = pointwise_conv(hidden_size, squeezed_size)
        self.expand = pointwise_conv(squeezed_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # (B, H, W, M) -> (B, H, W, M)
        mean = hidden_states.mean(dim=(1, 2))  # (B, M)
        factors = torch.sigmoid(self.expand(F.relu(self.squeeze(mean))))
        return hidden_states * factors[:, None, None]


class EfficientVMambaInvertedResidualLayer(GradientCheckpointingLayer):
    """Inverted-residual block of MobileNetV2 (https://arxiv.org/abs/1801.04381) with squeeze-and-excitation."""

    def __init__(self, config: EfficientVMambaConfig, hidden_size: int, drop_path_rate: float):
        super().__init__()
        expanded_size = config.expand_ratio * hidden_size  # M
        self.expand_conv = pointwise_conv(hidden_size, expanded_size, bias=False)
        self.expand_batch_norm = nn.BatchNorm2d(expanded_size, eps=config.batch_norm_eps)
        self.depthwise_conv = nn.Conv2d(
            expanded_size, expanded_size, kernel_size=3, padding=1, groups=expanded_size, bias=False
        )
        self.depthwise_batch_norm = nn.BatchNorm2d(expanded_size, eps=config.batch_norm_eps)
        self.activation = nn.ReLU()
        self.squeeze_excitation = EfficientVMambaSqueezeExcitation(config, expanded_size)
        self.project_conv = pointwise_conv(expanded_size, hidden_size, bias=False)
        self.project_batch_norm = nn.BatchNorm2d(hidden_size, eps=config.batch_norm_eps)
        self.drop_path = EfficientVMambaDropPath(drop_path_rate)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # (B, C, H, W) -> (B, C, H, W)
        update = apply_to_pixels(self.expand_conv, hidden_states.permute(0, 2, 3, 1))  # (B, H, W, M)
        update = self.activation(normalize_batch(self.expand_batch_norm, update.permute(0, 3, 1, 2)))
        update = self.activation(normalize_batch(self.depthwise_batch_norm, self.depthwise_conv(update)))
        update = self.squeeze_excitation(update.permute(0, 2, 3, 1))  # (B, H, W, M)
        update = apply_to_pixels(self.project_conv, update)  # (B, H, W, C)
        update = normalize_batch(self.project_batch_norm, update.permute(0, 3, 1, 2))
        return hidden_states + self.drop_path(update)


@torch.fx.wrap
def pad_map(hidden_states: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Pad a feature map (B, C, H, W) with zeros at the bottom and right."""
    missing_rows, missing_columns = height - hidden_states.shape[2], width - hidden_states.shape[3]
    is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # one graph for odd and even sides
    if is_traced or missing_rows or missing_columns:
        return F.pad(hidden_states, (0, missing_columns, 0, missing_rows))
    return hidden_states


class EfficientVMambaPatchMerging(nn.Module):
    """Patch merging: turns each cell of 2 x 2 pixels into one. Pads an odd side with zeros."""

    def __init__(self, config: EfficientVMambaConfig, in_channels: int, out_channels: int):
        super().__init__()
        self.layernorm = nn.LayerNorm(4 * in_channels, eps=config.layer_norm_eps)
        self.reduction = nn.Linear(4 * in_channels, out_channels, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # (B, C, H, W) -> (B, C', ceil(H/2), ceil(W/2))
        height, width = hidden_states.shape[2:]
        rows, columns = (height + 1) // 2, (width + 1) // 2
        padded = pad_map(hidden_states, 2 * rows, 2 * columns)
        cells = padded.permute(0, 2, 3, 1).unflatten(1, (rows, 2)).unflatten(3, (columns, 2))  # (B, H/2, 2, W/2, 2, C)
        cells = cells.permute(0, 1, 3, 4, 2, 5).flatten(3)  # (B, H/2, W/2, 4C), column-major inside a cell
        return apply_to_pixels(self.reduction, self.layernorm(cells)).permute(0, 3, 1, 2)


LAYER_CLASSES = {"evss": EfficientVMambaEVSSLayer, "inverted_residual": EfficientVMambaInvertedResidualLayer}


class EfficientVMambaStage(nn.Module):
    """Stage of the network: patch merging (except in the first stage) and blocks of one type."""

    def __init__(self, config: EfficientVMambaConfig, stage_idx: int):
        super().__init__()
        hidden_size = config.hidden_sizes[stage_idx]
        if stage_idx == 0:
            self.downsampling_layer: nn.Module = nn.Identity()
        else:
            self.downsampling_layer = EfficientVMambaPatchMerging(
                config, config.hidden_sizes[stage_idx - 1], hidden_size
            )

        # the rate of stochastic depth grows linearly from 0 at the first block of the network to the last
        first_block, num_blocks = sum(config.depths[:stage_idx]), sum(config.depths)
        layer_class = LAYER_CLASSES[config.block_types[stage_idx]]
        self.layers = nn.ModuleList(
            layer_class(config, hidden_size, config.drop_path_rate * block_idx / max(1, num_blocks - 1))
            for block_idx in range(first_block, first_block + config.depths[stage_idx])
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.downsampling_layer(hidden_states)
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return hidden_states


@auto_docstring
class EfficientVMambaPreTrainedModel(PreTrainedModel):
    config: EfficientVMambaConfig
    base_model_prefix = "efficientvmamba"
    main_input_name = "pixel_values"
    input_modalities = ("image",)  # type: ignore[assignment]  # a tuple, as in transformers' own vision models
    supports_gradient_checkpointing = True
    _input_embed_layer = "patch_embeddings"
    _no_split_modules = ["EfficientVMambaEVSSLayer", "EfficientVMambaInvertedResidualLayer"]
    _keep_in_fp32_modules_strict = ["A_log", "D"]
    _can_record_outputs = {"hidden_states": EfficientVMambaStage}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, nn.Linear) and not hasattr(module, "is_pointwise_conv"):
            init.trunc_normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Linear | nn.Conv2d):  # PyTorch's default of convolutions
            fan_in = module.weight[0].numel()
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                init.uniform_(module.bias, -(fan_in**-0.5), fan_in**-0.5)
        elif isinstance(module, EfficientVMambaES2D):
            module.init_scan_weights()
        else:
            super()._init_weights(module)

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters without weight decay, besides biases and norms: `A_log` and `D` of Mamba."""
        return {name for name, _ in self.named_parameters() if name.rpartition(".")[2] in ("A_log", "D")}


class EfficientVMambaEncoder(EfficientVMambaPreTrainedModel):
    main_input_name = "hidden_states"

    def __init__(self, config: EfficientVMambaConfig):
        super().__init__(config)
        self.stages = nn.ModuleList(EfficientVMambaStage(config, stage_idx) for stage_idx in range(config.num_stages))
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithNoAttention:
        for stage in self.stages:
            hidden_states = stage(hidden_states)
        return BaseModelOutputWithNoAttention(last_hidden_state=hidden_states)


@auto_docstring
class EfficientVMambaModel(EfficientVMambaPreTrainedModel):
    def __init__(self, config: EfficientVMambaConfig):
        super().__init__(config)
        self.embeddings = EfficientVMambaEmbeddings(config)
        self.encoder = EfficientVMambaEncoder(config)
        self.layernorm = EfficientVMambaLayerNorm(config.hidden_sizes[-1], eps=config.layer_norm_eps)
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self, pixel_values: torch.Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPoolingAndNoAttention:
        if pixel_values is None:
            raise ValueError("You have to specify pixel_values")
        encoder_outputs = self.encoder(self.embeddings(pixel_values), return_dict=True, **kwargs)
        last_hidden_state = encoder_outputs.last_hidden_state  # (B, C, H, W)
        return BaseModelOutputWithPoolingAndNoAttention(
            last_hidden_state=last_hidden_state,
            pooler_output=self.layernorm(last_hidden_state).mean(dim=(2, 3)),  # (B, C)
            hidden_states=encoder_outputs.hidden_states,
        )


@auto_docstring(
    custom_intro="""
    EfficientVMamba Model with an image classification head on top (a linear layer on top of the pooled features), e.g.
    for ImageNet.
    """
)
class EfficientVMambaForImageClassification(EfficientVMambaPreTrainedModel):
    accepts_loss_kwargs = False

    def __init__(self, config: EfficientVMambaConfig):
        super().__init__(config)
        self.num_labels: int = config.num_labels or 0
        self.efficientvmamba = EfficientVMambaModel(config)
        self.classifier = nn.Linear(config.hidden_sizes[-1], self.num_labels) if self.num_labels > 0 else nn.Identity()
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ImageClassifierOutputWithNoAttention:
        r"""
        labels (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
            Labels for computing the image classification/regression loss. Indices should be in `[0, ...,
            config.num_labels - 1]`. If `config.num_labels == 1` a regression loss is computed (Mean-Square loss), If
            `config.num_labels > 1` a classification loss is computed (Cross-Entropy).
        """
        outputs = self.efficientvmamba(pixel_values, return_dict=True, **kwargs)
        logits = self.classifier(outputs.pooler_output)

        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)

        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


@auto_docstring(
    custom_intro="""
    EfficientVMamba backbone, to be used with frameworks like UperNet, DETR and MaskFormer.
    """
)
class EfficientVMambaBackbone(BackboneMixin, EfficientVMambaPreTrainedModel):
    has_attentions = False

    def __init__(self, config: EfficientVMambaConfig):
        super().__init__(config)
        self.embeddings = EfficientVMambaEmbeddings(config)
        self.encoder = EfficientVMambaEncoder(config)
        self.num_features = [config.hidden_sizes[0], *config.hidden_sizes]
        self.hidden_states_norms = nn.ModuleDict(
            {
                stage: EfficientVMambaLayerNorm(num_channels, eps=config.layer_norm_eps)
                for stage, num_channels in zip(self.out_features, self.channels, strict=True)
            }
        )
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    @auto_docstring
    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> BackboneOutput:
        r"""
        Examples:

        ```python
        >>> import torch
        >>> from modeling_evmamba import EfficientVMambaBackbone, EfficientVMambaConfig

        >>> config = EfficientVMambaConfig(out_features=["stage1", "stage2", "stage3", "stage4"])
        >>> backbone = EfficientVMambaBackbone(config)
        >>> feature_maps = backbone(torch.randn(1, 3, 224, 224)).feature_maps
        >>> [tuple(feature_map.shape[1:]) for feature_map in feature_maps]
        [(48, 56, 56), (96, 28, 28), (192, 14, 14), (384, 7, 7)]
        ```"""
        encoder_outputs = self.encoder(self.embeddings(pixel_values), return_dict=True, **kwargs)
        # inside a model that records outputs too, transformers records each state twice
        hidden_states = tuple(dict.fromkeys(encoder_outputs.hidden_states))
        by_stage = dict(zip(self.stage_names, hidden_states, strict=True))
        feature_maps = tuple(self.hidden_states_norms[stage](by_stage[stage]) for stage in self.out_features)
        return BackboneOutput(feature_maps=feature_maps, hidden_states=hidden_states)


__all__ = [
    "EfficientVMambaBackbone",
    "EfficientVMambaForImageClassification",
    "EfficientVMambaModel",
    "EfficientVMambaPreTrainedModel",
]
