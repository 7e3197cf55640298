"""The atrous selective scan of EfficientVMamba as an operator of its own. See `kernels/README.md`."""

from .atrous_selective_scan import atrous_selective_scan


__all__ = ["atrous_selective_scan"]
