"""Layers of the network in bfloat16 or 8-bit integers, for inference on CPUs.

A layer takes its parameters in float32 and packs them once. A call computes the whole layer in one kernel, which needs
Numba. `numba_products.py` describes the arithmetic.
"""

from collections.abc import Callable

import torch

from .backends import choose_backend
from .layer_parameters import EVSSParameters, InvertedResidualParameters, Parameters, PatchMergingParameters


PRODUCT_DTYPES = (torch.bfloat16, torch.int8)


def pack_layer(parameters: Parameters, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    """Pack a layer for inference on CPUs.

    Args:
        parameters: The parameters of the layer, float32, on the CPU.
        dtype: Dtype of the products of linear layers in blocks. With `torch.int8`, rows of feature maps are quantized
            while the network computes, and weights by output channel. Patch merging stays in bfloat16: it causes
            more than a third of the error, and gains no time (benchmarks/NOTES.md).

    Returns:
        A function that takes a feature map `(B, H, W, C)` in float32, and returns the output of the layer in float32.

    Raises:
        ImportError: If Numba is missing.
        ValueError: If `dtype` is neither `torch.bfloat16` nor `torch.int8`, or another backend than "numba" is
            requested.
    """
    if dtype not in PRODUCT_DTYPES:
        raise ValueError(f"packed layers compute in torch.bfloat16 or torch.int8, got {dtype}")
    from .evss_layer_numba import EVSSLayer
    from .inverted_residual_layer_numba import InvertedResidualLayer
    from .patch_merging_numba import PatchMerging

    backend = choose_backend("cpu", torch.float32).backend
    if backend != "numba":
        raise ValueError(
            f"on CPUs, {dtype} needs the backend 'numba', and {backend!r} is requested: leave the choice open or use "
            "torch.float32"
        )
    if isinstance(parameters, EVSSParameters):
        return EVSSLayer(parameters, dtype)
    if isinstance(parameters, InvertedResidualParameters):
        return InvertedResidualLayer(parameters, dtype)
    return PatchMerging(parameters)


__all__ = ["EVSSParameters", "InvertedResidualParameters", "Parameters", "PatchMergingParameters", "pack_layer"]
