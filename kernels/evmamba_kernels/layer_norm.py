"""Two fused uses of LayerNorm in an EVSS block: times the SiLU of a gate, and averaged over the feature map.

As PyTorch operators, these take two or three passes over the feature map, and store intermediates. The kernels read it
once:

- on CPUs, both operators have a kernel;
- for large feature maps on GPUs, the gated LayerNorm has one.

The kernels have gradients, and save nothing but their inputs.

All other cases, and compiled graphs, use PyTorch operators.
"""

import torch
import torch.nn.functional as F

from .backends import NAMESPACE, check_argument, is_for_cpu_kernel, is_for_gpu_kernel, register_gradient


LARGEST_CHANNELS_ON_GPU = 1024  # more do not fit into the registers of four warps

# Smallest feature map in bytes for which the GPU kernel pays. It saves four passes over the feature map (64 MiB, 20 us
# of an H100), but costs the host more time than PyTorch's three operators. An estimate, not measured on a GPU.
SMALLEST_MAP_ON_GPU = 2**24


def layer_norm_gated(
    hidden_states: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """Compute LayerNorm over the last dimension, times SiLU of the gate.

    Args:
        hidden_states: `(..., D)`, any floating-point dtype.
        gate: `(..., D)`, in the dtype of `hidden_states`.
        weight: `(D)`, in the dtype of `hidden_states`. May be float32 under autocast.
        bias: `(D)`, in the dtype of `weight`.
        eps: Epsilon that is added to the variance.

    Returns:
        `(..., D)`, in the dtype of `hidden_states`, also under autocast.

    Raises:
        ValueError: If shapes do not match, or the tensors are on several devices.
    """
    if hidden_states.ndim < 2:
        raise ValueError(f"hidden_states must have the shape (..., D), got {tuple(hidden_states.shape)}")
    check_argument("gate", gate, hidden_states, hidden_states.shape)
    check_argument("weight", weight, hidden_states, hidden_states.shape[-1:])
    check_argument("bias", bias, hidden_states, hidden_states.shape[-1:])
    tensors = (hidden_states, gate, weight, bias)
    if is_for_cpu_kernel((hidden_states, gate), (weight, bias)):
        return gated_operator(*tensors, eps)
    fits = gate.dtype == hidden_states.dtype and len(weight) <= LARGEST_CHANNELS_ON_GPU
    if fits and is_for_gpu_kernel(hidden_states, SMALLEST_MAP_ON_GPU):
        return gated_on_gpu_operator(*tensors, eps)
    return gated_in_pytorch(*tensors, eps)


def gated_in_pytorch(
    hidden_states: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    normalized = F.layer_norm(hidden_states, weight.shape, weight, bias, eps)  # autocast of GPUs returns float32
    return (normalized * F.silu(gate)).to(hidden_states.dtype)


def layer_norm_mean(hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """Compute LayerNorm over the last dimension, averaged over the feature map.

    Args:
        hidden_states: The feature map, `(B, H, W, D)`, any floating-point dtype.
        weight: `(D)`.
        bias: `(D)`.
        eps: Epsilon that is added to the variance.

    Returns:
        `(B, D)`, in the dtype of `hidden_states`, also under autocast.

    Raises:
        ValueError: If `hidden_states` does not have four dimensions, shapes do not match, or the tensors are on
            several devices.
    """
    if hidden_states.ndim != 4:
        raise ValueError(f"hidden_states must have the shape (B, H, W, D), got {tuple(hidden_states.shape)}")
    check_argument("weight", weight, hidden_states, hidden_states.shape[-1:])
    check_argument("bias", bias, hidden_states, hidden_states.shape[-1:])
    if is_for_cpu_kernel((hidden_states,), (weight, bias)):
        return mean_operator(hidden_states, weight, bias, eps)
    return mean_in_pytorch(hidden_states, weight, bias, eps)


def mean_in_pytorch(hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    normalized = F.layer_norm(hidden_states, weight.shape, weight, bias, eps)
    return normalized.mean(dim=(1, 2)).to(hidden_states.dtype)


@torch.library.custom_op(f"{NAMESPACE}::layer_norm_gated", mutates_args=(), device_types="cpu")
def gated_operator(
    hidden_states: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    from .layer_norm_numba import gated

    return gated(hidden_states, gate, weight, bias, eps)


@torch.library.custom_op(f"{NAMESPACE}::layer_norm_gated_backward", mutates_args=(), device_types="cpu")
def gated_bwd_operator(
    grad: torch.Tensor,
    hidden_states: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    from .layer_norm_numba_bwd import gated_bwd

    return gated_bwd(grad, hidden_states, gate, weight, bias, eps)


@torch.library.custom_op(f"{NAMESPACE}::layer_norm_gated_on_gpu", mutates_args=())
def gated_on_gpu_operator(
    hidden_states: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    from .layer_norm_triton import layer_norm_gated_fwd

    return layer_norm_gated_fwd(hidden_states, gate, weight, bias, eps)


@torch.library.custom_op(f"{NAMESPACE}::layer_norm_gated_on_gpu_backward", mutates_args=())
def gated_on_gpu_bwd_operator(
    grad: torch.Tensor,
    hidden_states: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    from .layer_norm_triton import layer_norm_gated_bwd

    return layer_norm_gated_bwd(grad, hidden_states, gate, weight, bias, eps)


@gated_operator.register_fake
@gated_on_gpu_operator.register_fake
def fake_gated(hidden_states, gate, weight, bias, eps):
    return hidden_states.new_empty(hidden_states.shape)


register_gradient(gated_operator, gated_bwd_operator, gated_in_pytorch)
register_gradient(gated_on_gpu_operator, gated_on_gpu_bwd_operator, gated_in_pytorch)


@torch.library.custom_op(f"{NAMESPACE}::layer_norm_mean", mutates_args=(), device_types="cpu")
def mean_operator(hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    from .layer_norm_numba import mean

    return mean(hidden_states, weight, bias, eps)


@torch.library.custom_op(f"{NAMESPACE}::layer_norm_mean_backward", mutates_args=(), device_types="cpu")
def mean_bwd_operator(
    grad: torch.Tensor, hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from .layer_norm_numba_bwd import mean_bwd

    return mean_bwd(grad, hidden_states, weight, bias, eps)


@mean_operator.register_fake
def fake_mean(hidden_states, weight, bias, eps):
    return hidden_states.new_empty(hidden_states.shape[0], hidden_states.shape[-1])


register_gradient(mean_operator, mean_bwd_operator, mean_in_pytorch)
