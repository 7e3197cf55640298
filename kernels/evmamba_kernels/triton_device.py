"""What the Triton kernels share: the import of Triton, the device that they compile for, and small host functions."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import NamedTuple

import torch


try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the GPU kernels need triton: pip install triton") from error


OLDEST_TRITON = (3, 4)  # with tuples that loops carry

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

INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: kernels run as NumPy, on CPU tensors


class Device(NamedTuple):
    """What a configuration depends on."""

    backend: str  # of Triton
    warp_size: int
    capability: int  # 90 for 9.0, 0 but for CUDA
    multiprocessors: int


@cache
def describe_device(device: torch.device) -> Device:
    """The device, which has to be the current one."""
    if INTERPRETED:
        return Device("interpreter", 1, 0, 1)
    driver = triton.runtime.driver.active
    target = driver.get_current_target()
    properties = driver.utils.get_device_properties(driver.get_current_device())
    capability = target.arch if target.backend == "cuda" else 0
    return Device(target.backend, target.warp_size, capability, properties["multiprocessor_count"])


def cdiv(dividend: int, divisor: int) -> int:
    """Rounded up. As `triton.cdiv`, which takes 2 us to find out that its arguments are numbers."""
    return -(-dividend // divisor)


def current_device(tensor: torch.Tensor) -> AbstractContextManager:
    """Triton launches on the current stream of the current device."""
    if tensor.device.type == "cpu":  # interpreted
        return nullcontext()
    return torch.get_device_module(tensor.device).device(tensor.device)


def new_buffer(like: torch.Tensor, *shape: int) -> torch.Tensor:
    return like.new_empty(shape, dtype=torch.float32)
