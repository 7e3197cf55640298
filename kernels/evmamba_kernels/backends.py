"""Which code computes: the backends of the scan, the choice among them with its reason, and when kernels run at all.

A backend is a file of the scan with a function `forward` and, for the gradients, `backward`, and an entry in
`BACKENDS`. The kernels of LayerNorm and of the depthwise convolution run where the scan's of the same backend do.
PyTorch sees every kernel as an operator of the namespace `NAMESPACE`.
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch
from torch.autograd import forward_ad


LOWER_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Backend(NamedTuple):
    """Where an implementation computes, and how to import its functions."""

    device_types: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]  # of the map
    load: Callable[
        [], tuple[Callable, Callable]
    ]  # forward and backward; raises ImportError where something is missing


def load_numba() -> tuple[Callable, Callable]:
    from .atrous_selective_scan_numba import backward, forward

    return forward, backward


def load_triton() -> tuple[Callable, Callable]:
    from .atrous_selective_scan_triton import backward, forward

    return forward, backward


# Triton's own switch to its interpreter, in which kernels run on tensors of the CPU, slowly: for tests
TRITON_DEVICE_TYPES = ("cpu",) if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda", "xpu")

# In the order of preference. What none of them computes, "torch" does.
BACKENDS = {
    "numba": Backend(("cpu",), LOWER_DTYPES, load_numba),
    "triton": Backend(TRITON_DEVICE_TYPES, LOWER_DTYPES, load_triton),
}

ENVIRONMENT_VARIABLE = "EVMAMBA_SCAN_BACKEND"

# Names of operators are global, and whoever defines one again frees the one that others still call. Repositories on
# the Hub carry copies of this file, each imported in a package of its own: the operators of a copy are named after it.
NAMESPACE = re.sub(r"\W", "_", __package__, flags=re.ASCII)

# what the environment or `use_backend` asks for; None leaves the choice to the device
preferred_backend: str | None = os.environ.get(ENVIRONMENT_VARIABLE) or None

# Bytes of a map from which on the four passes over it that a kernel of our own saves are worth what it takes the host
# more than PyTorch's three operators: 64 MiB, 20 us of an H100. An estimate, see benchmarks/NOTES.md.
SMALLEST_MAP_ON_GPU = 2**24


class Choice(NamedTuple):
    backend: str
    reason: str


@cache
def missing_requirement(backend: str) -> str | None:
    """Why a backend cannot be imported, None if it can."""
    try:
        BACKENDS[backend].load()
    except ImportError as error:
        return str(error)
    return None


def choose_backend(device_type: str, dtype: torch.dtype, backend: str | None = None) -> Choice:
    """The backend for maps on such a device and of such a dtype, and why it is the one.

    Args:
        device_type: "cpu", "cuda", ...
        dtype: of the map.
        backend: a name asks for that one; None for the preferred one, or the first that fits.

    Raises:
        ValueError: for an unknown name, and where the backend asked for does not compute on such maps.
        ImportError: where the backend asked for needs a package that is missing.
    """
    wanted = backend or preferred_backend
    if wanted is not None:
        if wanted != "torch":
            refuse_unfit(wanted, device_type, dtype)
        return Choice(wanted, "it was asked for")
    reasons = []
    for name, candidate in BACKENDS.items():
        if device_type not in candidate.device_types:
            reasons.append(f"{name} computes on {' and '.join(candidate.device_types)}")
        elif dtype not in candidate.dtypes:
            reasons.append(f"{name} does not compute in {dtype}")
        elif missing := missing_requirement(name):
            reasons.append(missing)
        else:
            return Choice(name, f"it is the first choice on {device_type}")
    return Choice("torch", "; ".join(reasons))


def refuse_unfit(backend: str, device_type: str, dtype: torch.dtype) -> None:
    if backend not in BACKENDS:
        names = ", ".join(map(repr, [*BACKENDS, "torch"]))
        raise ValueError(f"unknown backend {backend!r} of the atrous selective scan: choose one of {names}")
    if device_type not in BACKENDS[backend].device_types or dtype not in BACKENDS[backend].dtypes:
        raise ValueError(
            f"the backend {backend!r} computes on {' and '.join(BACKENDS[backend].device_types)} in "
            f"{', '.join(map(str, BACKENDS[backend].dtypes))}, not on {device_type} in {dtype}: "
            "leave the choice open (backend=None) or choose 'torch'"
        )
    if missing := missing_requirement(backend):
        raise ImportError(missing)


# Compilers take the answer as it is when they trace: the graph keeps its backend.
choose_backend_once = torch.compiler.assume_constant_result(choose_backend)


@contextmanager
def use_backend(backend: str | None) -> Iterator[None]:
    """Asks for a backend in all of the process while the context lasts; None leaves the choice to the device.

    The environment variable `EVMAMBA_SCAN_BACKEND` does the same from the start. An argument `backend` of the operator
    has precedence. Graphs that were compiled before keep the backend that they were traced with.

    Raises:
        ValueError: for an unknown name.
    """
    global preferred_backend
    if backend is not None and backend not in ("torch", *BACKENDS):
        refuse_unfit(backend, "cpu", torch.float32)
    previous, preferred_backend = preferred_backend, backend
    try:
        yield
    finally:
        preferred_backend = previous


def in_forward_mode() -> bool:
    """Whether PyTorch differentiates in forward mode (`torch.func.jvp`): it would take our operators for constants."""
    return forward_ad._current_level >= 0


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


def register_gradient(operator: torch.library.CustomOpDef, bwd_operator: torch.library.CustomOpDef) -> None:
    """Makes `bwd_operator` the derivative of `operator`, and tells what it does to fake tensors.

    The last argument of `operator` is no tensor. `bwd_operator` takes the gradient of its result and all of its
    arguments, which are all that is kept for it, and returns the gradients of the tensors.
    """

    def keep_arguments(ctx, inputs, output) -> None:
        *tensors, ctx.last = inputs
        ctx.save_for_backward(*tensors)

    def differentiate(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *bwd_operator(grad, *ctx.saved_tensors, ctx.last), None

    operator.register_autograd(differentiate, setup_context=keep_arguments)

    @bwd_operator.register_fake
    def fake_backward(grad, *arguments):
        *tensors, _ = arguments
        return tuple(tensor.new_empty(tensor.shape) for tensor in tensors)
