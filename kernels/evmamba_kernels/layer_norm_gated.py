"""What follows the scan in a Mamba block: its normalized output times the SiLU of a gate.

As PyTorch operators these are three passes over the map, with two maps in between. For inference on CPUs there is a
kernel that reads both maps once. With gradients, on other devices and in compiled graphs PyTorch computes it.
"""

import torch
import torch.nn.functional as F

from .atrous_selective_scan import choose_backend


def layer_norm_gated(
    hidden_states: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """LayerNorm over the last dimension, times SiLU of the gate.

    Args:
        hidden_states: (..., D), any floating dtype.
        gate: (..., D), of the same shape and dtype.
        weight: (D).
        bias: (D).
        eps: is added to the variance.

    Returns:
        (..., D), in the dtype of `hidden_states`.

    Raises:
        ValueError: where `gate` has another shape.
    """
    if gate.shape != hidden_states.shape:
        raise ValueError(
            f"gate must have the shape of hidden_states, {tuple(hidden_states.shape)}, got {tuple(gate.shape)}"
        )
    tensors = (hidden_states, gate, weight, bias)
    if torch.compiler.is_compiling() or not is_for_cpu_kernel(tensors):
        return F.layer_norm(hidden_states, weight.shape, weight, bias, eps) * F.silu(gate)
    return gated_operator(*tensors, eps)


def is_for_cpu_kernel(tensors: tuple[torch.Tensor, ...]) -> bool:
    """Whether no gradient is asked for, and the scan of such maps runs in CPU kernels too."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    hidden_states = tensors[0]
    if any(tensor.dtype != torch.float32 for tensor in tensors) or hidden_states.numel() == 0:
        return False
    return choose_backend(hidden_states.device.type, hidden_states.dtype).backend == "numba"


@torch.library.custom_op("evmamba::layer_norm_gated", mutates_args=(), device_types="cpu")
def gated_operator(
    hidden_states: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    from .layer_norm_gated_numba import forward

    return forward(hidden_states, gate, weight, bias, eps)


@gated_operator.register_fake
def fake_gated(hidden_states, gate, weight, bias, eps):
    return hidden_states.new_empty(hidden_states.shape)
