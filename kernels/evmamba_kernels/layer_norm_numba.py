"""Numba kernels of the forward passes of LayerNorm times SiLU of a gate, and of the mean of LayerNorm, on CPUs.

A job is a number of rows (pixels). It reads a row for its mean, for its variance, and for the output. After the first
read, the row is in the first-level cache.
"""

import math
from typing import NamedTuple

import torch


try:
    import numpy as np
    from numba import carray
except ImportError as error:
    raise ImportError("the CPU kernels of LayerNorm need numba: pip install numba") from error

from .backends import as_rows
from .numba_simd import (
    LANES,
    add,
    clear_part,
    compiled,
    divide,
    float32,
    float_pointer,
    keep_first,
    lane_sums,
    load_first,
    load_splat,
    map_pointer,
    mean_of_parts,
    multiply,
    multiply_add,
    silu,
    splat,
    square_root,
    store,
    store_first,
    subtract,
    untyped,
)
from .numba_threads import COUNTERS, claim_job, compiled_kernel, finish_job, readable, run_jobs


GATED_WORK = np.dtype(
    [(field, np.int64) for field in (*COUNTERS, "num_rows", "channels", "row_stride", "gate_stride")]
    + [(field, np.int64) for field in ("hidden_states", "gate", "weight", "bias", "out")]
    + [("eps", np.float64)]
)
MEAN_WORK = np.dtype(
    [(field, np.int64) for field in (*COUNTERS, "num_parts", "num_rows", "channels", "row_stride")]
    + [(field, np.int64) for field in ("hidden_states", "weight", "bias", "sums", "out")]
    + [("eps", np.float64)]
)

# multiples of 16, the number of rows whose statistics are computed together
ROWS_PER_GATED_JOB = 64
ROWS_PER_MEAN_JOB = 784  # a quarter of a feature map of 56 x 56


class Statistics(NamedTuple):
    """Statistics of up to 16 rows. A vector holds a number per row, so one division serves all of them."""

    means: np.ndarray  # (16)
    scales: np.ndarray  # (16), 1 / standard deviation
    by_lane: np.ndarray  # (16, 16), sums of each row by lane


@compiled
def new_statistics():
    return Statistics(np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.zeros(LANES * LANES, np.float32))


STATISTICS_BYTES = 4 * LANES * (LANES + 2)


@compiled
def statistics_at(address):
    """Return statistics in the memory at an address."""
    lanes = 4 * LANES  # bytes of a vector
    return Statistics(float_pointer(address), float_pointer(address + lanes), float_pointer(address + 2 * lanes))


@compiled
def find_statistics(statistics, x, start, stride, num_rows, channels, eps):
    """Compute the statistics of `num_rows` rows from `start`."""
    means, scales, by_lane = statistics
    size = splat(float32(channels))
    for row in range(num_rows):
        at, sums = start + row * stride, splat(float32(0.0))
        for d in range(0, channels, LANES):
            sums = add(sums, load_first(x, at + d, min(LANES, channels - d)))
        store(by_lane, row * LANES, sums)
    store(means, 0, divide(lane_sums(by_lane, 0), size))

    for row in range(num_rows):
        at, mean, squares = start + row * stride, load_splat(means, row), splat(float32(0.0))
        for d in range(0, channels, LANES):
            count = min(LANES, channels - d)
            centered = keep_first(subtract(load_first(x, at + d, count), mean), count)
            squares = multiply_add(centered, centered, squares)
        store(by_lane, row * LANES, squares)
    variance = divide(lane_sums(by_lane, 0), size)
    store(scales, 0, divide(splat(float32(1.0)), square_root(add(variance, splat(float32(eps))))))


@compiled
def normalize_row(statistics, row, x, at, channels, weight, bias, out, start):
    """Write the row at `at`, normalized by the statistics of row `row`, times weight plus bias, to `out`."""
    mean, scale = load_splat(statistics.means, row), load_splat(statistics.scales, row)
    for d in range(0, channels, LANES):
        count = min(LANES, channels - d)
        normalized = multiply(subtract(load_first(x, at + d, count), mean), scale)
        affine = multiply_add(normalized, load_first(weight, d, count), load_first(bias, d, count))
        store_first(out, start + d, affine, count)


def gated_jobs(pointer):
    """Process jobs until none is left. `pointer` points to a record `GATED_WORK`. Its type names the maps' dtype."""
    work = carray(untyped(pointer), 1, GATED_WORK)[0]
    x, gate = map_pointer(pointer, work.hidden_states), map_pointer(pointer, work.gate)
    out = map_pointer(pointer, work.out)
    weight, bias, channels = float_pointer(work.weight), float_pointer(work.bias), work.channels
    statistics = new_statistics()
    job = claim_job(pointer)
    while job < work.num_jobs:
        for first in range(job * ROWS_PER_GATED_JOB, min((job + 1) * ROWS_PER_GATED_JOB, work.num_rows), LANES):
            num_rows = min(LANES, work.num_rows - first)
            find_statistics(statistics, x, first * work.row_stride, work.row_stride, num_rows, channels, work.eps)
            for row in range(num_rows):
                mean, scale = load_splat(statistics.means, row), load_splat(statistics.scales, row)
                x_at, gate_at = (first + row) * work.row_stride, (first + row) * work.gate_stride
                for d in range(0, channels, LANES):
                    count = min(LANES, channels - d)
                    normalized = multiply(subtract(load_first(x, x_at + d, count), mean), scale)
                    affine = multiply_add(normalized, load_first(weight, d, count), load_first(bias, d, count))
                    result = multiply(affine, silu(load_first(gate, gate_at + d, count)))
                    store_first(out, (first + row) * channels + d, result, count)
        finish_job(pointer)
        job = claim_job(pointer)


@compiled
def write_mean(sums, image, num_parts, num_rows, channels, weight, bias, out, start):
    """Compute the mean of an image from the sums of its parts. Weight and bias apply to the mean alone."""
    mean_of_parts(sums, image * num_parts, num_parts, channels, num_rows, out, start)
    for d in range(0, channels, LANES):
        count = min(LANES, channels - d)
        mean, weights = load_first(out, start + d, count), load_first(weight, d, count)
        store_first(out, start + d, multiply_add(mean, weights, load_first(bias, d, count)), count)


@compiled
def write_means(work):
    """Compute the means of all images."""
    sums, out, channels = float_pointer(work.sums), float_pointer(work.out), work.channels
    weight, bias = float_pointer(work.weight), float_pointer(work.bias)
    for image in range(work.num_jobs // work.num_parts):
        write_mean(sums, image, work.num_parts, work.num_rows, channels, weight, bias, out, image * channels)


@compiled
def add_normalized(statistics, x, start, stride, num_rows, channels, eps, sums, at):
    """Add `num_rows` normalized rows from `start` to `sums` from `at`."""
    find_statistics(statistics, x, start, stride, num_rows, channels, eps)
    for d in range(0, channels, LANES):
        count = min(LANES, channels - d)
        total = load_first(sums, at + d, count)
        for row in range(num_rows):
            centered = subtract(load_first(x, start + row * stride + d, count), load_splat(statistics.means, row))
            total = multiply_add(centered, load_splat(statistics.scales, row), total)
        store_first(sums, at + d, total, count)


def mean_jobs(pointer):
    """Process jobs until none is left. `pointer` points to a record `MEAN_WORK`. Its type names the map's dtype.

    A job is a part of an image. It writes the sum of its normalized rows to `sums` `(images, parts, channels)`. The
    last job computes the means.
    """
    work = carray(untyped(pointer), 1, MEAN_WORK)[0]
    x, sums, channels = map_pointer(pointer, work.hidden_states), float_pointer(work.sums), work.channels
    statistics = new_statistics()
    job = claim_job(pointer)
    while job < work.num_jobs:
        image, part = job // work.num_parts, job % work.num_parts
        clear_part(sums, job, channels)
        for first in range(part * ROWS_PER_MEAN_JOB, min((part + 1) * ROWS_PER_MEAN_JOB, work.num_rows), LANES):
            num_rows = min(LANES, work.num_rows - first)
            start = (image * work.num_rows + first) * work.row_stride
            at = job * channels
            add_normalized(statistics, x, start, work.row_stride, num_rows, channels, work.eps, sums, at)
        if finish_job(pointer) == work.num_jobs - 1:
            write_means(work)
        job = claim_job(pointer)


def as_float32(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.float().contiguous()


def gated(
    hidden_states: torch.Tensor,  # (..., D)
    gate: torch.Tensor,  # (..., D)
    weight: torch.Tensor,  # (D)
    bias: torch.Tensor,  # (D)
    eps: float,
) -> torch.Tensor:  # (..., D)
    """Compute LayerNorm times SiLU of the gate, in float32. The result has the dtype of both feature maps."""
    x, gate = readable(as_rows(hidden_states)), readable(as_rows(gate))
    weight, bias = as_float32(weight), as_float32(bias)
    num_rows, channels = x.shape
    out = x.new_empty(hidden_states.shape)
    work = {
        "num_jobs": math.ceil(num_rows / ROWS_PER_GATED_JOB),
        "num_rows": num_rows,
        "channels": channels,
        "row_stride": x.stride(0),
        "gate_stride": gate.stride(0),
        "hidden_states": x,
        "gate": gate,
        "weight": weight,
        "bias": bias,
        "out": out,
        "eps": eps,
    }
    run_jobs(compiled_kernel(gated_jobs, out.dtype), GATED_WORK, work)
    return out.to(hidden_states.dtype)


def mean(
    hidden_states: torch.Tensor,  # (B, H, W, D)
    weight: torch.Tensor,  # (D)
    bias: torch.Tensor,  # (D)
    eps: float,
) -> torch.Tensor:  # (B, D)
    """Compute the mean of LayerNorm over the feature map, in float32. It has the dtype of the feature map."""
    x, weight, bias = readable(as_rows(hidden_states)), as_float32(weight), as_float32(bias)
    num_images, height, width, channels = hidden_states.shape
    num_rows = height * width
    num_parts = math.ceil(num_rows / ROWS_PER_MEAN_JOB)
    sums, out = weight.new_empty(num_images, num_parts, channels), weight.new_empty(num_images, channels)
    work = {
        "num_jobs": num_images * num_parts,
        "num_parts": num_parts,
        "num_rows": num_rows,
        "channels": channels,
        "row_stride": x.stride(0),
        "hidden_states": x,
        "weight": weight,
        "bias": bias,
        "sums": sums,
        "out": out,
        "eps": eps,
    }
    run_jobs(compiled_kernel(mean_jobs, x.dtype), MEAN_WORK, work)
    return out.to(hidden_states.dtype)
