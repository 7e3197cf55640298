"""Operators for inference on CPUs: their registration, when they compute, and the checks of what they are given."""

from collections.abc import Callable

import torch

from .atrous_selective_scan import NAMESPACE, choose_backend, in_forward_mode


# Each operator's own. One that is dropped takes the operator along, so that a module can be imported again.
libraries: dict[str, torch.library.Library] = {}


def inference_operator(name: str, fake: Callable) -> Callable[[Callable], torch._ops.OpOverload]:
    """Registers a function as an operator on CPUs that has no derivative, with what it does to fake tensors.

    So does `torch.library.custom_op`, which looks for derivatives and aliases in Python at every call. That takes as
    long as the operators themselves on the small maps of an image (benchmarks/NOTES.md).
    """

    def register(compute: Callable) -> torch._ops.OpOverload:
        library = libraries[name] = torch.library.Library(NAMESPACE, "FRAGMENT")
        schema = torch.library.infer_schema(compute, mutates_args=(), op_name=name)
        library.define(schema, tags=torch.Tag.pt2_compliant_tag)
        library.impl(name, compute, "CPU")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
        return getattr(getattr(torch.ops, NAMESPACE), name).default

    return register


def is_for_cpu_kernel(tensors: tuple[torch.Tensor, ...]) -> bool:
    """Whether no derivative is asked for, and the scan of such maps runs in CPU kernels too. The map comes first."""
    if torch.compiler.is_compiling() or in_forward_mode():
        return False
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    hidden_states = tensors[0]
    if any(tensor.dtype != torch.float32 for tensor in tensors) or hidden_states.numel() == 0:
        return False
    return choose_backend(hidden_states.device.type, hidden_states.dtype).backend == "numba"


def check_argument(name: str, tensor: torch.Tensor, hidden_states: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Raises ValueError where a tensor that belongs to a map has not that shape, or lies on another device."""
    if tensor.shape != shape:
        raise ValueError(
            f"{name} must have the shape {tuple(shape)} for hidden_states {tuple(hidden_states.shape)}, "
            f"got {tuple(tensor.shape)}"
        )
    if tensor.device != hidden_states.device:
        raise ValueError(f"{name} must be on {hidden_states.device}, like hidden_states, got {tensor.device}")
