"""Import the scan for the model. A repository with remote code replaces this file with the operator itself."""

from evmamba_kernels.atrous_selective_scan import atrous_selective_scan


__all__ = ["atrous_selective_scan"]
