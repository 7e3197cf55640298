"""The atrous selective scan of EfficientVMamba, and the LayerNorms behind it. See `kernels/README.md`."""

from .atrous_selective_scan import Choice, atrous_selective_scan, choose_backend, use_backend
from .layer_norm import layer_norm_gated, layer_norm_mean


__all__ = ["Choice", "atrous_selective_scan", "choose_backend", "layer_norm_gated", "layer_norm_mean", "use_backend"]
