"""Measured limits of a GPU, and the lower bound that they set for the atrous selective scan."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from measure import median_times


COPIED_BYTES = 2**30  # many times the caches
EXPONENTIALS_PER_LANE = 2048
BLOCK = 1024
BLOCKS_PER_MULTIPROCESSOR = 16
REPEATS = 10


class Floor(NamedTuple):
    seconds: float
    binding: str  # "bytes" or "exponentials"


class Limits(NamedTuple):
    bytes_per_second: float  # of memory, read or written
    exponentials_per_second: float

    def find_floor(self, shape: Sequence[int], state_size: int, element_size: int, is_training: bool) -> Floor:
        """Return the lower bound of a scan's time: the maximum of its time for bytes and for exponentials.

        A forward pass reads u and writes y, and takes one exponential per state. A backward pass takes as many, since
        decays are not kept. It reads u and the gradient of y, and writes that of u. Intermediates, parameters and the
        softplus of the time steps do not count.

        Args:
            shape: Shape of the feature map, `(B, H, W, D)`.
            state_size: States per channel.
            element_size: Bytes of an element of the feature map.
            is_training: Whether a backward pass follows the forward pass.
        """
        elements = math.prod(shape)
        passes, maps = (2, 5) if is_training else (1, 2)
        seconds = {
            "bytes": maps * elements * element_size / self.bytes_per_second,
            "exponentials": passes * elements * state_size / self.exponentials_per_second,
        }
        binding = max(seconds, key=seconds.get)
        return Floor(seconds[binding], binding)


@triton.jit
def exponentials_kernel(values, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Compute `COUNT` consecutive exponentials of every value. Independent values keep the unit busy."""
    p_values = values + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_value = tl.load(p_values)
    for _ in range(COUNT):
        b_value = tl.exp2(-b_value)
    tl.store(p_values, b_value)


def measure_limits(device: torch.device) -> Limits:
    """Measure the limits with a copy of a large tensor, and with a kernel of exponentials alone."""
    source = torch.ones(COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    num_blocks = BLOCKS_PER_MULTIPROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count
    values = torch.rand(num_blocks * BLOCK, device=device)
    methods = {
        "copy": lambda: target.copy_(source),
        "exponentials": lambda: exponentials_kernel[(num_blocks,)](values, EXPONENTIALS_PER_LANE, BLOCK, num_warps=4),
    }
    with torch.cuda.device(device):  # Triton launches on the current device
        seconds = median_times(methods, REPEATS, "limits of the device")
    return Limits(
        bytes_per_second=2 * COPIED_BYTES / seconds["copy"],
        exponentials_per_second=values.numel() * EXPONENTIALS_PER_LANE / seconds["exponentials"],
    )
