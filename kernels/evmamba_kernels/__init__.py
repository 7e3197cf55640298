"""The atrous selective scan of EfficientVMamba, and the gated LayerNorm behind it. See `kernels/README.md`."""

from .atrous_selective_scan import Choice, atrous_selective_scan, choose_backend, use_backend
from .layer_norm_gated import layer_norm_gated


__all__ = ["Choice", "atrous_selective_scan", "choose_backend", "layer_norm_gated", "use_backend"]
