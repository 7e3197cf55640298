"""The contract of the atrous selective scan: arguments, checks, and the call of the backend.

The operator is ES2D of "EfficientVMamba: Atrous Selective Scan for Light Weight Visual Mamba", arXiv 2403.09977, with
its projections. `kernels/README.md` has the definition, symbols and derivations.

PyTorch sees every backend as the operator `torch.ops.evmamba_kernels.atrous_selective_scan`. The exception is "torch",
which consists of PyTorch operators: compilers trace through it. With gradients and outside of graphs, "numba" is the
operator `atrous_selective_scan_keeping_states`. Its backward pass need not compute the states between chunks again.
"""

from math import prod

import torch

from .atrous_selective_scan_torch import NUM_GROUPS, atrous_selective_scan_torch
from .backends import (
    BACKENDS,
    NAMESPACE,
    choose_backend_once,
    is_plain_call,
    is_transformed,
    register_flops,
    register_gradient,
)


MACS_PER_STATE = 9  # multiply-accumulates of the recurrence per pixel, channel and state, as the authors count


def atrous_selective_scan(
    hidden_states: torch.Tensor,
    x_proj_weight: torch.Tensor,
    dt_proj_weight: torch.Tensor,
    dt_proj_bias: torch.Tensor,
    A_log: torch.Tensor,
    D: torch.Tensor,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """Scan a feature map along four skip-sampled sequences, each with its own parameters (K = 4 groups).

    Group k holds the pixels whose row has parity k % 2 and whose column has parity k // 2. Even groups visit their
    pixels row by row, odd groups column by column. Each sequence runs the selective scan of Mamba (arXiv 2312.00752):

        dt, B, C = split(x_proj_weight[k] u)                            (R), (N), (N)
        delta    = softplus(dt_proj_weight[k] dt + dt_proj_bias[k])     (D)
        h        = exp(delta A) h + delta u B,  A = -exp(A_log[k])      (D, N)
        y        = h C + D[k] u                                         (D)

    A row or column of zeros pads an odd side. Its steps decay the state, and its outputs are dropped.

    Args:
        hidden_states: The feature map u, `(B, H, W, D)`, in any floating-point dtype. Channels-last memory is fastest.
        x_proj_weight: Projection from u to dt, B and C, `(K, R + 2N, D)`.
        dt_proj_weight: Projection from dt to delta, `(K, D, R)`.
        dt_proj_bias: Bias of the projection to delta, `(K, D)`.
        A_log: Logarithm of -A, `(K, D, N)`.
        D: Skip weight, `(K, D)`.
        backend: `"numba"` (CPU), `"triton"` (GPU), `"torch"` (any device), or `None` to choose automatically, see
            `choose_backend`.

    Returns:
        The feature map y, `(B, H, W, D)`, in the dtype of `hidden_states`. The recurrence runs in float32, or in
        float64 if `hidden_states` is float64. Forward-mode differentiation, transforms of `torch.func`, and second
        derivatives always use the backend "torch".

    Raises:
        ValueError: If shapes do not match, a feature map is empty, or the tensors are on several devices. Also if
            the backend is unknown, or does not support the device and dtype.
        TypeError: If a tensor is not floating-point.
        ImportError: If the requested backend needs a missing package.
    """
    arguments = (hidden_states, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D)
    check_arguments(*arguments)
    if hidden_states.is_meta and not is_transformed():
        return scan_operator(*arguments, "torch")  # computes nothing, and counters of FLOPs see it
    choice = choose_backend_once(hidden_states.device.type, hidden_states.dtype, backend)
    if choice.backend == "torch" or is_transformed():
        return atrous_selective_scan_torch(*arguments)
    needs_gradients = torch.is_grad_enabled() and any(argument.requires_grad for argument in arguments)
    if choice.backend == "numba" and needs_gradients and is_plain_call():
        return scan_keeping_states_operator(*arguments, choice.backend)[0]
    return scan_operator(*arguments, choice.backend)


def check_arguments(
    hidden_states: torch.Tensor,
    x_proj_weight: torch.Tensor,
    dt_proj_weight: torch.Tensor,
    dt_proj_bias: torch.Tensor,
    A_log: torch.Tensor,
    D: torch.Tensor,
) -> None:
    """Check the arguments of `atrous_selective_scan`.

    Raises:
        ValueError: If a shape or device breaks the contract. The message names the first such argument.
        TypeError: If a tensor is not floating-point.
    """
    arguments = {
        "hidden_states": hidden_states,
        "x_proj_weight": x_proj_weight,
        "dt_proj_weight": dt_proj_weight,
        "dt_proj_bias": dt_proj_bias,
        "A_log": A_log,
        "D": D,
    }
    for name, tensor in arguments.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating point tensor, got {tensor.dtype}")
        if tensor.device != hidden_states.device:
            raise ValueError(f"{name} is on {tensor.device}, but hidden_states is on {hidden_states.device}")

    if hidden_states.ndim != 4:
        raise ValueError(f"hidden_states must have the shape (B, H, W, D), got {tuple(hidden_states.shape)}")
    if 0 in hidden_states.shape[1:]:
        raise ValueError(
            f"feature maps in hidden_states must not be empty, got the shape {tuple(hidden_states.shape)}"
        )
    if A_log.ndim != 3 or dt_proj_weight.ndim != 3:
        raise ValueError(
            "A_log must have the shape (K, D, N) and dt_proj_weight the shape (K, D, R), "
            f"got {tuple(A_log.shape)} and {tuple(dt_proj_weight.shape)}"
        )
    channels, state_size, rank = hidden_states.shape[-1], A_log.shape[-1], dt_proj_weight.shape[-1]
    if state_size == 0 or rank == 0:
        raise ValueError(f"the state size N and the rank R must be positive, got N = {state_size}, R = {rank}")
    expected_shapes = {
        "x_proj_weight": (NUM_GROUPS, rank + 2 * state_size, channels),
        "dt_proj_weight": (NUM_GROUPS, channels, rank),
        "dt_proj_bias": (NUM_GROUPS, channels),
        "A_log": (NUM_GROUPS, channels, state_size),
        "D": (NUM_GROUPS, channels),
    }
    for name, shape in expected_shapes.items():
        if arguments[name].shape != shape:
            raise ValueError(
                f"{name} must have the shape {shape} for {channels} channels, state size {state_size} "
                f"and rank {rank}, got {tuple(arguments[name].shape)}"
            )


@torch.library.custom_op(f"{NAMESPACE}::atrous_selective_scan", mutates_args=())
def scan_operator(
    hidden_states: torch.Tensor,
    x_proj_weight: torch.Tensor,
    dt_proj_weight: torch.Tensor,
    dt_proj_bias: torch.Tensor,
    A_log: torch.Tensor,
    D: torch.Tensor,
    backend: str,
) -> torch.Tensor:
    if len(hidden_states) == 0:  # kernels take at least one feature map
        return hidden_states.new_empty(hidden_states.shape)
    forward, _ = BACKENDS[backend].load()
    return forward(hidden_states, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D)


@torch.library.custom_op(f"{NAMESPACE}::atrous_selective_scan_backward", mutates_args=())
def scan_bwd_operator(
    grad: torch.Tensor,
    hidden_states: torch.Tensor,
    x_proj_weight: torch.Tensor,
    dt_proj_weight: torch.Tensor,
    dt_proj_bias: torch.Tensor,
    A_log: torch.Tensor,
    D: torch.Tensor,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    arguments = (hidden_states, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D)
    if len(hidden_states) == 0:
        return tuple(argument.new_zeros(argument.shape) for argument in arguments)  # type: ignore[return-value]  # six
    _, backward = BACKENDS[backend].load()
    return backward(grad, *arguments)


@scan_operator.register_fake
def fake_scan(hidden_states, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D, backend):
    return hidden_states.new_empty(hidden_states.shape)


register_gradient(scan_operator, scan_bwd_operator, lambda *arguments: atrous_selective_scan_torch(*arguments[:-1]))


@torch.library.custom_op(f"{NAMESPACE}::atrous_selective_scan_keeping_states", mutates_args=(), device_types="cpu")
def scan_keeping_states_operator(
    hidden_states: torch.Tensor,
    x_proj_weight: torch.Tensor,
    dt_proj_weight: torch.Tensor,
    dt_proj_bias: torch.Tensor,
    A_log: torch.Tensor,
    D: torch.Tensor,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    from .atrous_selective_scan_numba import forward_keeping_states

    if len(hidden_states) == 0:
        return hidden_states.new_empty(hidden_states.shape), A_log.new_empty(0, dtype=torch.float32)
    return forward_keeping_states(hidden_states, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D)


@torch.library.custom_op(
    f"{NAMESPACE}::atrous_selective_scan_keeping_states_backward", mutates_args=(), device_types="cpu"
)
def scan_from_states_bwd_operator(
    grad: torch.Tensor,
    states: torch.Tensor,
    hidden_states: torch.Tensor,
    x_proj_weight: torch.Tensor,
    dt_proj_weight: torch.Tensor,
    dt_proj_bias: torch.Tensor,
    A_log: torch.Tensor,
    D: torch.Tensor,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    from .atrous_selective_scan_numba import backward_from_states

    arguments = (hidden_states, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D)
    if len(hidden_states) == 0:
        return tuple(argument.new_zeros(argument.shape) for argument in arguments)  # type: ignore[return-value]  # six
    return backward_from_states(grad, states, *arguments)  # type: ignore[return-value]  # six


@scan_keeping_states_operator.register_fake
def fake_scan_keeping_states(hidden_states, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D, backend):
    from .atrous_selective_scan_numba import shape_of_states

    shape = shape_of_states(hidden_states, A_log) if len(hidden_states) else (0,)
    return hidden_states.new_empty(hidden_states.shape), A_log.new_empty(shape, dtype=torch.float32)


register_gradient(
    scan_keeping_states_operator,
    scan_from_states_bwd_operator,
    lambda *arguments: atrous_selective_scan_torch(*arguments[:-1]),
    num_kept=1,
)


def count_flops(map_shape, x_proj_shape, dt_proj_shape, dt_bias_shape, A_shape, D_shape, backend, *, out_shape) -> int:
    """Count the FLOPs of the projections and the recurrence for the pixels of the feature map, without the padding."""
    _, num_outputs, _ = x_proj_shape
    rank, state_size = dt_proj_shape[-1], A_shape[-1]
    return 2 * prod(map_shape) * (num_outputs + rank + MACS_PER_STATE * state_size)


def count_bwd_flops(grad_shape, *shapes, out_shape) -> int:
    """Count twice the FLOPs of the forward pass, as PyTorch does for linear layers."""
    return 2 * count_flops(*shapes, out_shape=grad_shape)


def count_bwd_flops_from_states(grad_shape, states_shape, *shapes, out_shape) -> int:
    return count_bwd_flops(grad_shape, *shapes, out_shape=out_shape)


register_flops(scan_operator, count_flops)
register_flops(scan_bwd_operator, count_bwd_flops)
register_flops(scan_keeping_states_operator, count_flops)
register_flops(scan_from_states_bwd_operator, count_bwd_flops_from_states)
