"""Import the depthwise convolutions for inference.

A repository with remote code replaces this file with the operators themselves.
"""

from evmamba_kernels.depthwise_conv import depthwise_conv, depthwise_conv_and_mean


__all__ = ["depthwise_conv", "depthwise_conv_and_mean"]
