"""When the kernels for inference on CPUs compute, and those of large maps on GPUs; what they share about arguments."""

import torch

from .atrous_selective_scan import LOWER_DTYPES, choose_backend, in_forward_mode


# Bytes of a map from which on the four passes over it that a kernel of our own saves are worth what it takes the host
# more than PyTorch's three operators: 64 MiB, 20 us of an H100. An estimate, see benchmarks/NOTES.md.
SMALLEST_MAP_ON_GPU = 2**24


def is_plain_call() -> bool:
    """Whether PyTorch neither traces nor transforms what is called: else it should see operators of its own."""
    return not (torch.compiler.is_compiling() or in_forward_mode() or in_function_transform())


def is_for_cpu_kernel(tensors: tuple[torch.Tensor, ...]) -> bool:
    """Whether no derivative is asked for, and the scan of such maps runs in CPU kernels too. The map comes first."""
    if not is_plain_call():
        return False
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    hidden_states = tensors[0]
    if any(tensor.dtype != torch.float32 for tensor in tensors) or hidden_states.numel() == 0:
        return False
    return choose_backend(hidden_states.device.type, hidden_states.dtype).backend == "numba"


def is_for_gpu_kernel(tensors: tuple[torch.Tensor, ...]) -> bool:
    """Whether the scan of such maps runs in GPU kernels, and the map, which comes first, is large enough."""
    if not is_plain_call():  # first: a graph must not depend on the size of the map
        return False
    hidden_states = tensors[0]
    num_bytes = hidden_states.numel() * hidden_states.element_size()
    if num_bytes < SMALLEST_MAP_ON_GPU or hidden_states.dtype not in LOWER_DTYPES:
        return False
    return choose_backend(hidden_states.device.type, hidden_states.dtype).backend == "triton"


def in_function_transform() -> bool:
    """Whether `torch.func` transforms a function: under `vmap`, tensors do not say whether they require gradients."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """As (rows, D), channels dense: a view where rows are evenly spaced, as in half of the channels of another map."""
    rows = tensor.flatten(0, -2)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def check_argument(name: str, tensor: torch.Tensor, hidden_states: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Raises ValueError where a tensor that belongs to a map has not that shape, or lies on another device."""
    if tensor.shape != shape:
        raise ValueError(
            f"{name} must have the shape {tuple(shape)} for hidden_states {tuple(hidden_states.shape)}, "
            f"got {tuple(tensor.shape)}"
        )
    if tensor.device != hidden_states.device:
        raise ValueError(f"{name} must be on {hidden_states.device}, like hidden_states, got {tensor.device}")
