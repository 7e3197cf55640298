"""The contract of the atrous selective scan: what goes in, what comes out, and which backend computes it.

The operator is ES2D of "EfficientVMamba: Atrous Selective Scan for Light Weight Visual Mamba", arXiv 2403.09977,
projections included. Its definition, symbols and derivation stand in `kernels/README.md`.

A backend is a file beside this one with a function `forward` and, for the gradients, `backward`, and an entry in
`BACKENDS`. PyTorch sees all of them as one operator, `torch.ops.evmamba_kernels.atrous_selective_scan`, but for
the backend "torch": made of PyTorch operators, it needs none, and compilers look inside.
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch
from torch.autograd import forward_ad

from .atrous_selective_scan_torch import atrous_selective_scan_torch


NUM_GROUPS = 4  # skip sampling with step 2 in both directions

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
    if backend not in (None, "torch", *BACKENDS):
        refuse_unfit(backend, "cpu", torch.float32)
    previous, preferred_backend = preferred_backend, backend
    try:
        yield
    finally:
        preferred_backend = previous


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
    """Scans a map in four skip-sampled sequences, each with its own parameters (K = 4 groups).

    Group k holds the pixels whose row has parity k % 2 and whose column has parity k // 2; even groups are visited row
    by row, odd ones column by column. Along each sequence runs the selective scan of Mamba (arXiv 2312.00752):

        dt, B, C = split(x_proj_weight[k] u)                            (R), (N), (N)
        delta    = softplus(dt_proj_weight[k] dt + dt_proj_bias[k])     (D)
        h        = exp(delta A) h + delta u B,  A = -exp(A_log[k])      (D, N)
        y        = h C + D[k] u                                         (D)

    An odd side is continued by one row or column of zeros, whose steps decay the state and whose outputs are dropped.

    Args:
        hidden_states: the map u, (B, H, W, D), any floating dtype; channels last in memory is fastest.
        x_proj_weight: (K, R + 2N, D).
        dt_proj_weight: (K, D, R).
        dt_proj_bias: (K, D).
        A_log: (K, D, N).
        D: the skip weight, (K, D).
        backend: "numba" (CPU), "triton" (GPU), "torch" (any device), or None to choose; see `choose_backend`.

    Returns:
        The map y, (B, H, W, D), in the dtype of `hidden_states`. The recurrence runs in float32, in float64 for
        float64 maps. In forward-mode differentiation it is PyTorch's, whichever the backend.

    Raises:
        ValueError: for shapes that do not fit together, an empty map, tensors on several devices, an unknown backend
            or one that does not compute on such maps.
        TypeError: for tensors that are not floating point.
        ImportError: where the backend asked for needs a package that is missing.
    """
    arguments = (hidden_states, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D)
    check_arguments(*arguments)
    choice = choose_backend_once(hidden_states.device.type, hidden_states.dtype, backend)
    if choice.backend == "torch" or in_forward_mode():
        return atrous_selective_scan_torch(*arguments)
    return scan_operator(*arguments, choice.backend)


def in_forward_mode() -> bool:
    """Whether PyTorch differentiates in forward mode (`torch.func.jvp`): it would take our operators for constants."""
    return forward_ad._current_level >= 0


def check_arguments(
    hidden_states: torch.Tensor,
    x_proj_weight: torch.Tensor,
    dt_proj_weight: torch.Tensor,
    dt_proj_bias: torch.Tensor,
    A_log: torch.Tensor,
    D: torch.Tensor,
) -> None:
    """Raises a `ValueError` or `TypeError` that names the first argument breaking the contract."""
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
    if hidden_states.numel() == 0:
        raise ValueError(f"hidden_states must not be empty, got the shape {tuple(hidden_states.shape)}")
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
    forward, _ = BACKENDS[backend].load()
    return forward(hidden_states, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D)


@torch.library.custom_op(f"{NAMESPACE}::atrous_selective_scan_backward", mutates_args=())
def adjoint_operator(
    grad: torch.Tensor,
    hidden_states: torch.Tensor,
    x_proj_weight: torch.Tensor,
    dt_proj_weight: torch.Tensor,
    dt_proj_bias: torch.Tensor,
    A_log: torch.Tensor,
    D: torch.Tensor,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    _, backward = BACKENDS[backend].load()
    return backward(grad, hidden_states, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D)


@scan_operator.register_fake
def fake_scan(hidden_states, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D, backend):
    return hidden_states.new_empty(hidden_states.shape)


def register_gradient(operator: torch.library.CustomOpDef, adjoint: torch.library.CustomOpDef) -> None:
    """Makes `adjoint` the derivative of `operator`, and tells what it does to fake tensors.

    The last argument of `operator` is no tensor. `adjoint` takes the gradient of its result and all of its arguments,
    which are all that is kept for it, and returns the gradients of the tensors.
    """

    def keep_arguments(ctx, inputs, output) -> None:
        *tensors, ctx.last = inputs
        ctx.save_for_backward(*tensors)

    def differentiate(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *adjoint(grad, *ctx.saved_tensors, ctx.last), None

    operator.register_autograd(differentiate, setup_context=keep_arguments)

    @adjoint.register_fake
    def fake_adjoint(grad, *arguments):
        *tensors, _ = arguments
        return tuple(tensor.new_empty(tensor.shape) for tensor in tensors)


register_gradient(scan_operator, adjoint_operator)
