"""The atrous selective scan of EfficientVMamba, and the operators around it in a block. See `kernels/README.md`."""

from .atrous_selective_scan import atrous_selective_scan
from .backends import Choice, choose_backend, use_backend
from .depthwise_conv import depthwise_conv, depthwise_conv_and_mean
from .layer_norm import layer_norm_gated, layer_norm_mean


__all__ = [
    "Choice",
    "atrous_selective_scan",
    "choose_backend",
    "depthwise_conv",
    "depthwise_conv_and_mean",
    "layer_norm_gated",
    "layer_norm_mean",
    "use_backend",
]
