"""When the kernels for inference on CPUs compute, and the checks of what they are given."""

import torch

from .atrous_selective_scan import choose_backend, in_forward_mode


def is_for_cpu_kernel(tensors: tuple[torch.Tensor, ...]) -> bool:
    """Whether no derivative is asked for, and the scan of such maps runs in CPU kernels too. The map comes first."""
    if torch.compiler.is_compiling() or in_forward_mode() or in_function_transform():
        return False
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    hidden_states = tensors[0]
    if any(tensor.dtype != torch.float32 for tensor in tensors) or hidden_states.numel() == 0:
        return False
    return choose_backend(hidden_states.device.type, hidden_states.dtype).backend == "numba"


def in_function_transform() -> bool:
    """Whether `torch.func` transforms a function: under `vmap`, tensors do not say whether they require gradients."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def check_argument(name: str, tensor: torch.Tensor, hidden_states: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Raises ValueError where a tensor that belongs to a map has not that shape, or lies on another device."""
    if tensor.shape != shape:
        raise ValueError(
            f"{name} must have the shape {tuple(shape)} for hidden_states {tuple(hidden_states.shape)}, "
            f"got {tuple(tensor.shape)}"
        )
    if tensor.device != hidden_states.device:
        raise ValueError(f"{name} must be on {hidden_states.device}, like hidden_states, got {tensor.device}")
