"""Where the model gets its LayerNorms from. A repository with remote code has the operators' own file here."""

from evmamba_kernels.layer_norm import layer_norm_gated, layer_norm_mean


__all__ = ["layer_norm_gated", "layer_norm_mean"]
