"""Shared code of the Triton kernels: the import of Triton, the description of the device, and host functions."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import NamedTuple

import torch


try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the GPU kernels need triton: pip install triton (on XPU, install PyTorch again)") from error


OLDEST_TRITON = (3, 4)  # the first with tuples as loop-carried values

if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST_TRITON:
    raise ImportError(
        f"the GPU kernels need triton {'.'.join(map(str, OLDEST_TRITON))} or newer, "
        f"found {triton.__version__}: install a newer PyTorch"
    )


__all__ = [
    "INTERPRETED",
    "Device",
    "cdiv",
    "current_device",
    "describe_device",
    "new_buffer",
    "tl",
    "triton",
]

INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: kernels run in NumPy, on CPU tensors


class Device(NamedTuple):
    """Properties of a device that the configuration depends on."""

    backend: str  # of Triton
    warp_size: int
    capability: int  # compute capability of CUDA, 90 for 9.0; 0 on other backends
    multiprocessors: int


@cache
def describe_device(device: torch.device) -> Device:
    """Return the description of a device, which must be the current one."""
    if INTERPRETED:
        return Device("interpreter", 1, 0, 1)
    driver = triton.runtime.driver.active
    target = driver.get_current_target()
    properties = driver.utils.get_device_properties(driver.get_current_device())
    capability = target.arch if target.backend == "cuda" else 0
    return Device(target.backend, target.warp_size, capability, properties["multiprocessor_count"])


def cdiv(dividend: int, divisor: int) -> int:
    """Return the quotient, rounded up. `triton.cdiv` does the same, but takes 2 us to check its arguments."""
    return -(-dividend // divisor)


def current_device(tensor: torch.Tensor) -> AbstractContextManager:
    """Make the tensor's device the current one, since Triton launches on the current stream of the current device."""
    if tensor.device.type == "cpu":  # interpreted
        return nullcontext()
    return torch.get_device_module(tensor.device).device(tensor.device)


def new_buffer(like: torch.Tensor, *shape: int) -> torch.Tensor:
    return like.new_empty(shape, dtype=torch.float32)
