"""Where the model gets its scan from. A repository with remote code has the operator's own file in this place."""

from evmamba_kernels.atrous_selective_scan import atrous_selective_scan


__all__ = ["atrous_selective_scan"]
