"""The device of the tests of operators and golden values: the CPU, unless the environment names another one.

`make test-triton` runs the Triton kernels in Triton's interpreter (`TRITON_INTERPRET=1`), on tensors of the CPU.
`make test-gpu` runs them on a GPU (`EVMAMBA_TEST_DEVICE=cuda`). The tests of the scan's contract take every backend of
`BACKENDS`, so a new entry there is tested without another line.
"""

import os
from typing import TypeVar

import torch

from evmamba_kernels.backends import BACKENDS as ALL_BACKENDS


Size = TypeVar("Size")

DEVICE = torch.device(os.environ.get("EVMAMBA_TEST_DEVICE", "cpu"))
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ["torch", *(name for name, backend in ALL_BACKENDS.items() if DEVICE.type in backend.device_types)]


def sized(usual: Size, interpreted: Size) -> Size:
    """Return a smaller size in Triton's interpreter, which takes about a millisecond for a step of a state."""
    return interpreted if IS_INTERPRETED else usual
