"""LayerNorm times SiLU of a gate on CPUs, for inference: a Numba kernel on vectors of 16 channels.

A job is a number of rows (pixels). A row is read for its mean, for its variance and for the result; after the first
time it lies in the first-level cache.
"""

import math

import numpy as np
import torch


try:
    from numba import carray, njit
except ImportError as error:
    raise ImportError("the CPU kernel of the gated LayerNorm needs numba: pip install numba") from error

from .atrous_selective_scan_numba_simd import (
    LANES,
    add,
    divide,
    float32,
    float_pointer,
    keep_first,
    lane_sums,
    load_first,
    load_splat,
    multiply,
    multiply_add,
    silu,
    splat,
    square_root,
    store,
    store_first,
    subtract,
)
from .atrous_selective_scan_numba_threads import COUNTERS, claim_job, compiled_kernel, finish_job, run_jobs


# a multiple of the 16 rows that are normalized together
ROWS_PER_JOB = 64

POINTERS = ("hidden_states", "gate", "weight", "bias", "out")

WORK = np.dtype(
    [(field, np.int64) for field in (*COUNTERS, "num_rows", "channels", "row_stride", "gate_stride", *POINTERS)]
    + [("eps", np.float64)]
)

compiled = njit(boundscheck=False, error_model="numpy")


@compiled
def normalize_rows(first, num_rows, x, x_stride, gate, gate_stride, weight, bias, out, channels, eps, space):
    """At most 16 rows. What is a number for a row is a vector for all of them: one division, not 16."""
    by_lane, means, scales = space
    size = splat(float32(channels))
    for row in range(num_rows):
        start, sums = (first + row) * x_stride, splat(float32(0.0))
        for d in range(0, channels, LANES):
            sums = add(sums, load_first(x, start + d, min(LANES, channels - d)))
        store(by_lane, row * LANES, sums)
    store(means, 0, divide(lane_sums(by_lane, 0), size))

    for row in range(num_rows):
        start, mean, squares = (first + row) * x_stride, load_splat(means, row), splat(float32(0.0))
        for d in range(0, channels, LANES):
            count = min(LANES, channels - d)
            centered = keep_first(subtract(load_first(x, start + d, count), mean), count)
            squares = multiply_add(centered, centered, squares)
        store(by_lane, row * LANES, squares)
    variance = divide(lane_sums(by_lane, 0), size)
    store(scales, 0, divide(splat(float32(1.0)), square_root(add(variance, splat(float32(eps))))))

    for row in range(num_rows):
        start, gate_start, out_start = (first + row) * x_stride, (first + row) * gate_stride, (first + row) * channels
        mean, scale = load_splat(means, row), load_splat(scales, row)
        for d in range(0, channels, LANES):
            count = min(LANES, channels - d)
            normalized = multiply(subtract(load_first(x, start + d, count), mean), scale)
            affine = multiply_add(normalized, load_first(weight, d, count), load_first(bias, d, count))
            gated = multiply(affine, silu(load_first(gate, gate_start + d, count)))
            store_first(out, out_start + d, gated, count)


def normalize_jobs(pointer):
    """Does jobs until none is left. `pointer` leads to a record `WORK`."""
    work = carray(pointer, 1, WORK)[0]
    x, gate, out = float_pointer(work.hidden_states), float_pointer(work.gate), float_pointer(work.out)
    weight, bias = float_pointer(work.weight), float_pointer(work.bias)
    space = np.zeros(LANES * LANES, np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    job = claim_job(pointer)
    while job < work.num_jobs:
        for first in range(job * ROWS_PER_JOB, min((job + 1) * ROWS_PER_JOB, work.num_rows), LANES):
            normalize_rows(
                first,
                min(LANES, work.num_rows - first),
                x,
                work.row_stride,
                gate,
                work.gate_stride,
                weight,
                bias,
                out,
                work.channels,
                work.eps,
                space,
            )
        finish_job(pointer)
        job = claim_job(pointer)


def as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """As (rows, D), channels dense: a view where rows are evenly spaced, as in half of the channels of another map."""
    rows = tensor.flatten(0, -2)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def forward(
    hidden_states: torch.Tensor,  # (..., D)
    gate: torch.Tensor,  # (..., D)
    weight: torch.Tensor,  # (D)
    bias: torch.Tensor,  # (D)
    eps: float,
) -> torch.Tensor:  # (..., D)
    """The operator for float32."""
    x, gate, weight, bias = as_rows(hidden_states), as_rows(gate), weight.contiguous(), bias.contiguous()
    num_rows, channels = x.shape
    out = x.new_empty(hidden_states.shape)
    work = {
        "num_jobs": math.ceil(num_rows / ROWS_PER_JOB),
        "num_rows": num_rows,
        "channels": channels,
        "row_stride": x.stride(0),
        "gate_stride": gate.stride(0),
        "eps": eps,
    }
    tensors = (x, gate, weight, bias, out)
    pointers = {name: tensor.data_ptr() for name, tensor in zip(POINTERS, tensors, strict=True)}
    run_jobs(compiled_kernel(normalize_jobs), WORK, work | pointers)
    return out
