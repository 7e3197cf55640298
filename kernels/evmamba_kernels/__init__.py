"""The atrous selective scan of EfficientVMamba as an operator of its own. See `kernels/README.md`."""

from .atrous_selective_scan import Choice, atrous_selective_scan, choose_backend, use_backend


__all__ = ["Choice", "atrous_selective_scan", "choose_backend", "use_backend"]
