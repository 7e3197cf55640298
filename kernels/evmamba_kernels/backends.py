"""Backends of the scan, the choice of one, and when kernels run instead of PyTorch operators.

A backend is a module with the functions `forward` and `backward` of the scan, and an entry in `BACKENDS`. PyTorch sees
every kernel as an operator in the namespace `NAMESPACE`.

    forward(hidden_states, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D) -> y
    backward(grad, hidden_states, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D) -> six gradients

The contract of both functions:

- The arguments are checked: shapes and devices match, and no feature map is empty.
- `hidden_states` and `grad` are in a dtype of the backend. Parameters are in any floating-point dtype.
- Arguments have any strides, those of expanded tensors included. The result has the same bits for all strides.
- `y` has the shape and dtype of `hidden_states`. Gradients follow the order of the arguments of `forward`, each in the
  shape and dtype of its argument.
- Results are new and contiguous, and share no memory with an argument.
- The arithmetic is float32. A NaN in an argument reaches the results that depend on it. Results are open if `A_log`
  is above 88, where exp(`A_log`) overflows.
- Two calls with the same arguments give the same bits, on CPUs with the same number of threads. So sums have a fixed
  order, without atomic additions.
- GPU kernels run on the current stream. The functions neither synchronize with the device nor read its data, so CUDA
  graphs can capture them.
- Autograd records nothing inside: `backward` computes the gradients itself. Autocast may be active: disable it around
  PyTorch operators with `without_autocast` of `atrous_selective_scan_torch.py`.
- Several Python threads may call at the same time.

The choice of a backend depends on the device type and the dtype alone:

- The entry lists the dtypes, at least float32. For others, the next backend that supports them computes. A request for
  this backend is then an error.
- Without a package or the hardware, the import of the module raises `ImportError`. Then the next backend computes too.
- Beyond a limit of sizes, a call raises `ValueError` with the limit, as `make_plan` of "triton" does. It also does so
  on a device of these types that the backend does not know, as `find_config` does. No other backend computes instead.

The kernels of LayerNorm and of the depthwise convolution belong to "numba" and "triton". They run unless another
backend is requested, whatever the scan chooses by itself.
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import NamedTuple

import torch
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula


LOWER_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Backend(NamedTuple):
    """What a backend supports, and how to import its functions."""

    device_types: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]  # of the feature map
    # Returns forward and backward, and imports them only then. Raises ImportError if a package is missing, with the
    # sentence that users read.
    load: Callable[[], tuple[Callable, Callable]]


def load_numba() -> tuple[Callable, Callable]:
    from .atrous_selective_scan_numba import backward, forward

    return forward, backward


def load_triton() -> tuple[Callable, Callable]:
    from .atrous_selective_scan_triton import backward, forward

    return forward, backward


# Triton's variable for its interpreter, which runs kernels on CPU tensors. It is slow, and meant for tests.
TRITON_DEVICE_TYPES = ("cpu",) if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda", "xpu")

# In order of preference. "torch" is the fallback.
BACKENDS = {
    "numba": Backend(("cpu",), LOWER_DTYPES, load_numba),
    "triton": Backend(TRITON_DEVICE_TYPES, LOWER_DTYPES, load_triton),
}

ENVIRONMENT_VARIABLE = "EVMAMBA_SCAN_BACKEND"

# Operator names are global: a second definition frees the first one while others still call it. Repositories on the
# Hub carry copies of this file, so each copy names its operators after its own package.
NAMESPACE = re.sub(r"\W", "_", __package__, flags=re.ASCII)

# the backend that the environment or `use_backend` asks for; None chooses automatically
preferred_backend: str | None = os.environ.get(ENVIRONMENT_VARIABLE) or None


class Choice(NamedTuple):
    backend: str
    reason: str


@cache
def missing_requirement(backend: str) -> str | None:
    """Return the reason why a backend cannot be imported, or None if it can."""
    try:
        BACKENDS[backend].load()
    except ImportError as error:
        return str(error)
    return None


def choose_backend(device_type: str, dtype: torch.dtype, backend: str | None = None) -> Choice:
    """Choose the backend for feature maps of a device and dtype.

    Args:
        device_type: Device type of the feature map, such as `"cpu"` or `"cuda"`.
        dtype: Dtype of the feature map.
        backend: Name of the requested backend. `None` uses the one that `use_backend` or the environment requests, or
            else the first one that supports the device and dtype.

    Returns:
        The name of the backend, and the reason for the choice.

    Raises:
        ValueError: If the name is unknown, or the requested backend does not support the device and dtype.
        ImportError: If the requested backend needs a missing package.
    """
    wanted = backend or preferred_backend
    if wanted is not None:
        if wanted != "torch":
            refuse_unfit(wanted, device_type, dtype)
        return Choice(wanted, "it was requested")
    reasons = []
    for name in BACKENDS:
        reason = why_not(name, device_type, dtype)
        if reason is None:
            return Choice(name, f"the first backend in the list that supports {device_type}")
        reasons.append(reason)
    return Choice("torch", "; ".join(reasons))


def why_not(backend: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Return the reason why a backend does not compute on a device in a dtype, or None if it does."""
    candidate = BACKENDS[backend]
    if device_type not in candidate.device_types:
        return f"{backend} computes on {' and '.join(candidate.device_types)}"
    if dtype not in candidate.dtypes:
        return f"{backend} does not compute in {dtype}"
    return missing_requirement(backend)


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


# Compilers evaluate the choice once, while tracing. The graph keeps its backend.
choose_backend_once = torch.compiler.assume_constant_result(choose_backend)


@contextmanager
def use_backend(backend: str | None) -> Iterator[None]:
    """Request a backend in the whole process while the context lasts.

    The context overrides the environment variable `EVMAMBA_SCAN_BACKEND`. The operator's argument `backend` overrides
    the context. Compiled graphs keep the backend that they were traced with.

    Args:
        backend: Name of the backend, or `None` to choose automatically.

    Raises:
        ValueError: If the name is unknown.
    """
    global preferred_backend
    if backend is not None and backend not in ("torch", *BACKENDS):
        refuse_unfit(backend, "cpu", torch.float32)
    previous, preferred_backend = preferred_backend, backend
    try:
        yield
    finally:
        preferred_backend = previous


def is_transformed() -> bool:
    """Return whether PyTorch differentiates in forward mode, or applies a transform of `torch.func`.

    Both need PyTorch operators. Forward mode would treat custom operators as constants, and most of them do not
    support the transforms. Under `vmap`, `requires_grad` is unreliable.
    """
    if forward_ad._current_level >= 0:
        return True
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def is_plain_call() -> bool:
    """Return whether PyTorch neither traces nor transforms the call. Otherwise it must see PyTorch operators."""
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing() or is_transformed())


def runs_kernels_of(backend: str, hidden_states: torch.Tensor) -> bool:
    """Return whether the kernels of a backend may replace PyTorch operators.

    A requested backend decides for the scan and all other operators. Without a request, the backend only needs to
    support the feature map. So a new backend of the scan leaves the other kernels as they are.
    """
    if hidden_states.is_meta:
        return False
    device_type, dtype = hidden_states.device.type, hidden_states.dtype
    if preferred_backend is not None:
        return choose_backend(device_type, dtype).backend == backend
    return why_not(backend, device_type, dtype) is None


def is_for_cpu_kernel(maps: tuple[torch.Tensor, ...], parameters: tuple[torch.Tensor, ...]) -> bool:
    """Return whether CPU kernels can replace PyTorch operators.

    They can if no other backend is requested, and they support the dtypes.

    Args:
        maps: The feature map, followed by others that the kernel reads with it.
        parameters: The other tensors.
    """
    if not is_plain_call():
        return False
    hidden_states, *others = maps
    if hidden_states.dtype not in LOWER_DTYPES or hidden_states.numel() == 0:
        return False
    if any(other.dtype != hidden_states.dtype for other in others):
        return False
    if any(parameter.dtype not in (torch.float32, hidden_states.dtype) for parameter in parameters):
        return False
    return runs_kernels_of("numba", hidden_states)


def is_for_cpu_inference_kernel(maps: tuple[torch.Tensor, ...], parameters: tuple[torch.Tensor, ...]) -> bool:
    """Return whether CPU kernels without gradients can replace PyTorch operators, as in `is_for_cpu_kernel`."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*maps, *parameters)):
        return False
    return is_for_cpu_kernel(maps, parameters)


def is_for_gpu_kernel(hidden_states: torch.Tensor, smallest_map: int) -> bool:
    """Return whether GPU kernels should replace PyTorch operators.

    They should if no other backend is requested, and the feature map is large. The operator checks its other tensors.

    Args:
        hidden_states: The feature map.
        smallest_map: Bytes of the smallest feature map for which the kernel pays.
    """
    if not is_plain_call():  # before the size: a graph must not depend on it
        return False
    if hidden_states.nbytes < smallest_map or hidden_states.dtype not in LOWER_DTYPES:
        return False
    return runs_kernels_of("triton", hidden_states)


def as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor as `(rows, D)` with dense channels.

    It is a view if the rows are evenly spaced, as in half of the channels of another feature map.
    """
    rows = tensor.flatten(0, -2)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def check_argument(name: str, tensor: torch.Tensor, hidden_states: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Check the shape and the device of a tensor that belongs to a feature map.

    Raises:
        ValueError: If the tensor has another shape, or is on another device than `hidden_states`.
    """
    if tensor.shape != shape:
        raise ValueError(
            f"{name} must have the shape {tuple(shape)} for hidden_states {tuple(hidden_states.shape)}, "
            f"got {tuple(tensor.shape)}"
        )
    if tensor.device != hidden_states.device:
        raise ValueError(f"{name} must be on {hidden_states.device}, like hidden_states, got {tensor.device}")


def register_gradient(
    operator: torch.library.CustomOpDef,
    bwd_operator: torch.library.CustomOpDef,
    in_pytorch: Callable,
    num_kept: int = 0,
) -> None:
    """Register `bwd_operator` as the backward pass of `operator`, its fake implementation, and its own gradient.

    Autograd saves nothing but the arguments of an operator, and what `operator` keeps.

    Args:
        operator: Its arguments are tensors, except for the last one.
        bwd_operator: Takes the gradient of the output, what `operator` keeps, and all arguments of `operator`. Returns
            the gradients of the tensors among these arguments.
        in_pytorch: Computes `operator` from the same arguments in PyTorch operators, for higher derivatives and for
            transforms of the backward pass.
        num_kept: Number of outputs after the first one. They have no gradients, and only `bwd_operator` reads them.
    """

    def keep_for_backward(ctx, inputs, output) -> None:
        *tensors, ctx.last = inputs
        kept = output[1:] if num_kept else ()
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)  # for `kept`: a backward pass without a gradient of the output does not run
        ctx.save_for_backward(*kept, *tensors)

    def keep_arguments(ctx, inputs, output) -> None:
        *tensors, ctx.last = inputs
        ctx.save_for_backward(*tensors)

    def backward_in_pytorch(last, grad: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        pull_back = torch.func.vjp(lambda *tensors: in_pytorch(*tensors, last), *tensors)[1]
        return pull_back(grad)

    def differentiate(ctx, grad: torch.Tensor, *_) -> tuple[torch.Tensor | None, ...]:
        if is_transformed():
            return *backward_in_pytorch(ctx.last, grad, *ctx.saved_tensors[num_kept:]), None
        return *bwd_operator(grad, *ctx.saved_tensors, ctx.last), None

    def differentiate_twice(ctx, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad, *others = ctx.saved_tensors
        pull_back = torch.func.vjp(partial(backward_in_pytorch, ctx.last), grad, *others[num_kept:])[1]
        grad_of_grad, *gradients = pull_back(grads)
        return grad_of_grad, *[None] * num_kept, *gradients, None

    operator.register_autograd(differentiate, setup_context=keep_for_backward)
    bwd_operator.register_autograd(differentiate_twice, setup_context=keep_arguments)

    @bwd_operator.register_fake
    def fake_backward(grad, *arguments):
        *tensors, _ = arguments
        return tuple(tensor.new_empty(tensor.shape) for tensor in tensors[num_kept:])


def register_flops(operator: torch.library.CustomOpDef, count: Callable[..., int]) -> None:
    """Register the FLOPs of `operator` with PyTorch's `FlopCounterMode`, where a multiply-accumulate has two.

    Args:
        operator: The operator.
        count: Takes the shapes of all arguments, and the shape of the output as `out_shape`. Arguments that are no
            tensors stay as they are.
    """
    namespace, name = operator._qualname.split("::")
    register_flop_formula(getattr(getattr(torch.ops, namespace), name))(count)
