"""Parameters of the layers that `packed_layers.py` computes."""

from typing import NamedTuple

import torch


Affine = tuple[torch.Tensor, torch.Tensor | None]  # the weight and the bias of a layer


class EVSSParameters(NamedTuple):
    """The float32 parameters of an EVSS block. The batch norm is folded into the convolution before it."""

    norm: Affine  # (C), (C)
    in_proj: Affine  # (2D, C), (2D)
    conv2d: Affine  # (D, 1, 3, 3), (D)
    x_proj_weight: torch.Tensor  # (K, R + 2N, D)
    dt_proj: Affine  # (K, D, R), (K, D)
    A_log: torch.Tensor  # (K, D, N)
    D: torch.Tensor  # (K, D)
    mixer_norm: Affine  # (D), (D)
    output_proj: Affine  # (C, D), (C)
    local_conv: Affine  # (C, 1, 3, 3), (C)
    pointwise_conv: Affine  # (C, C), (C)
    gate_norm: Affine  # (C), (C)
    squeeze: Affine  # (C', C), (C')
    expand: Affine  # (C, C'), (C)
    eps: tuple[float, float, float]  # of the norms before the block, after the scan, and of the gate


class InvertedResidualParameters(NamedTuple):
    """The float32 parameters of an inverted-residual block. Batch norms are folded into the layers before them."""

    expand_conv: Affine  # (M, C), (M)
    depthwise_conv: Affine  # (M, 1, 3, 3), (M)
    squeeze: Affine  # (M', M), (M')
    expand: Affine  # (M, M'), (M)
    project_conv: Affine  # (C, M), (C)


class PatchMergingParameters(NamedTuple):
    """The float32 parameters of patch merging."""

    norm: Affine  # (4C), (4C)
    reduction: Affine  # (C', 4C), (C')
    eps: float


Parameters = EVSSParameters | InvertedResidualParameters | PatchMergingParameters
