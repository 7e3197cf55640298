"""Import the layers for inference in lower precision.

A repository with remote code replaces this file with the layers themselves.
"""

from evmamba_kernels.packed_layers import (
    EVSSParameters,
    InvertedResidualParameters,
    Parameters,
    PatchMergingParameters,
    pack_layer,
)


__all__ = ["EVSSParameters", "InvertedResidualParameters", "Parameters", "PatchMergingParameters", "pack_layer"]
