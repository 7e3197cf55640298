"""Where blocks for inference get their depthwise convolutions from. A repository with remote code has the operators'
own file here."""

from evmamba_kernels.depthwise_conv import depthwise_conv, depthwise_conv_and_mean


__all__ = ["depthwise_conv", "depthwise_conv_and_mean"]
