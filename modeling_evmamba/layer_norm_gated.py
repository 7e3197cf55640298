"""Where the model gets its gated LayerNorm from. A repository with remote code has the operator's own file here."""

from evmamba_kernels.layer_norm_gated import layer_norm_gated


__all__ = ["layer_norm_gated"]
