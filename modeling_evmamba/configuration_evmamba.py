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
"""EfficientVMamba model configuration (arXiv 2403.09977)"""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin
from transformers.utils import auto_docstring


BLOCK_TYPES = ("evss", "inverted_residual")

# Fields that are not stored, and the field that each one follows from.
DERIVED_FIELDS = {"hidden_size": "hidden_sizes", "num_stages": "depths", "num_hidden_layers": "depths"}

# The published networks (paper, table 1). They share the defaults below for all other fields.
VARIANTS: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_sizes": [48, 96, 192, 384], "depths": [2, 2, 4, 2]},
    "small": {"hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 4, 2]},
    "base": {"hidden_sizes": [96, 192, 384, 768], "depths": [2, 2, 9, 2]},
}


@auto_docstring(checkpoint="TerryPei/EfficientVMamba-Tiny")
@strict
class EfficientVMambaConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""
    block_types (`list[str]`, *optional*, defaults to `["evss", "evss", "inverted_residual", "inverted_residual"]`):
        Block type of each stage: `"evss"` (atrous selective scan and a local convolution in parallel) or
        `"inverted_residual"` (MobileNetV2 block with squeeze-and-excitation).
    state_size (`int`, *optional*, defaults to 16):
        State size per channel of the selective scan, `N` in the Mamba paper.
    expand (`int`, *optional*, defaults to 2):
        Expansion factor of the channels that the scan runs on, relative to the stage's channels.
    time_step_rank (`int` or `str`, *optional*, defaults to `"auto"`):
        Rank of the projection to the time steps. `"auto"` sets it to `ceil(hidden_size / 16)` in each stage.
    time_step_min (`float`, *optional*, defaults to 0.001):
        Smallest time step at initialization.
    time_step_max (`float`, *optional*, defaults to 0.1):
        Largest time step at initialization.
    time_step_floor (`float`, *optional*, defaults to 0.0001):
        Lower bound that clamps the time steps at initialization.
    conv_kernel (`int`, *optional*, defaults to 3):
        Kernel size of the depthwise convolution before the scan. Must be odd.
    use_conv_bias (`bool`, *optional*, defaults to `True`):
        Whether the depthwise convolution before the scan has a bias.
    use_bias (`bool`, *optional*, defaults to `False`):
        Whether the input and output projections of the scan have biases.
    expand_ratio (`int`, *optional*, defaults to 4):
        Expansion factor of the channels in inverted-residual blocks.
    squeeze_expansion_ratio (`float`, *optional*, defaults to 0.125):
        Ratio of the bottleneck channels to the gated channels, in the channel gates of both block types.
    batch_norm_eps (`float`, *optional*, defaults to 1e-05):
        The epsilon of the batch normalization layers.

    Example:
    ```python
    >>> from modeling_evmamba import VARIANTS, EfficientVMambaConfig, EfficientVMambaModel

    >>> # Initializing an EfficientVMamba-T style configuration (VARIANTS also holds "small" and "base")
    >>> configuration = EfficientVMambaConfig(**VARIANTS["tiny"])

    >>> # Initializing a model (with random weights) from the configuration
    >>> model = EfficientVMambaModel(configuration)

    >>> # Accessing the model configuration
    >>> configuration = model.config
    ```"""

    model_type = "efficientvmamba"
    attribute_map = {"num_hidden_layers": "num_stages"}

    num_channels: int = 3
    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int = 4
    hidden_sizes: list[int] | tuple[int, ...] = (48, 96, 192, 384)
    depths: list[int] | tuple[int, ...] = (2, 2, 4, 2)
    block_types: list[str] | tuple[str, ...] = ("evss", "evss", "inverted_residual", "inverted_residual")
    state_size: int = 16
    expand: int = 2
    time_step_rank: int | str = "auto"
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    conv_kernel: int = 3
    use_conv_bias: bool = True
    use_bias: bool = False
    expand_ratio: int = 4
    squeeze_expansion_ratio: float = 0.125
    drop_path_rate: float | int = 0.1
    layer_norm_eps: float = 1e-5
    batch_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs):
        # a configuration must equal the one that its JSON file loads, which holds lists
        self.hidden_sizes = list(self.hidden_sizes)
        self.depths = list(self.depths)
        self.block_types = list(self.block_types)
        self.stage_names = ["stem"] + [f"stage{idx}" for idx in range(1, len(self.depths) + 1)]
        self.set_output_features_output_indices(
            out_indices=kwargs.pop("out_indices", None), out_features=kwargs.pop("out_features", None)
        )
        for name, source in DERIVED_FIELDS.items():
            if name in kwargs and (value := kwargs.pop(name)) != getattr(self, name):
                raise ValueError(
                    f"`{name}` follows from `{source}` and is {getattr(self, name)}, got {value}: leave it out"
                )
        super().__post_init__(**kwargs)

    @property
    def num_stages(self) -> int:
        return len(self.depths)

    @property
    def hidden_size(self) -> int | None:
        """Channels of the pooled features, which models with a vision tower read."""
        return self.hidden_sizes[-1] if self.hidden_sizes else None

    def validate_architecture(self):
        """Validate the architecture. `@strict` calls it.

        Raises:
            ValueError: If no network can be built from a field. The message names the field.
        """
        for field in ("num_channels", "patch_size", "state_size", "expand", "conv_kernel", "expand_ratio"):
            if getattr(self, field) < 1:
                raise ValueError(f"`{field}` must be a positive integer, got {getattr(self, field)}")
        image_sides = [self.image_size] if isinstance(self.image_size, int) else self.image_size
        if any(side < 1 for side in image_sides):
            raise ValueError(f"`image_size` must be one positive integer or two, got {self.image_size}")
        if self.conv_kernel % 2 == 0:
            raise ValueError(f"`conv_kernel` must be odd to keep the size of the feature map, got {self.conv_kernel}")

        if not len(self.hidden_sizes) == len(self.depths) == len(self.block_types) > 0:
            raise ValueError(
                "`hidden_sizes`, `depths` and `block_types` must have one entry per stage, got "
                f"{self.hidden_sizes}, {self.depths} and {self.block_types}"
            )
        for field in ("hidden_sizes", "depths"):
            if any(value < 1 for value in getattr(self, field)):
                raise ValueError(f"`{field}` must hold positive integers, got {getattr(self, field)}")
        if unknown := [block_type for block_type in self.block_types if block_type not in BLOCK_TYPES]:
            raise ValueError(f"`block_types` accepts {' and '.join(map(repr, BLOCK_TYPES))}, got {unknown[0]!r}")

        if self.time_step_rank != "auto" and (isinstance(self.time_step_rank, str) or self.time_step_rank < 1):
            raise ValueError(f"`time_step_rank` must be 'auto' or a positive integer, got {self.time_step_rank!r}")
        if not 0 < self.time_step_min <= self.time_step_max:
            raise ValueError(
                "`time_step_min` and `time_step_max` must satisfy 0 < time_step_min <= time_step_max, "
                f"got {self.time_step_min} and {self.time_step_max}"
            )
        if self.time_step_floor <= 0:
            raise ValueError(f"`time_step_floor` must be positive, got {self.time_step_floor}")
        if not 0 < self.squeeze_expansion_ratio <= 1:
            raise ValueError(f"`squeeze_expansion_ratio` must lie in (0, 1], got {self.squeeze_expansion_ratio}")
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"`drop_path_rate` must lie in [0, 1), got {self.drop_path_rate}")
        for field in ("layer_norm_eps", "batch_norm_eps", "initializer_range"):
            if getattr(self, field) <= 0:
                raise ValueError(f"`{field}` must be positive, got {getattr(self, field)}")


__all__ = ["VARIANTS", "EfficientVMambaConfig"]
