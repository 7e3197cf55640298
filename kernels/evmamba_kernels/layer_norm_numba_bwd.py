"""Numba kernels of the backward passes of both fused uses of LayerNorm.

They save nothing but the inputs, and recompute the rest. A job is a number of rows (pixels), processed 16 at a time.
`kernels/README.md` has the gradients of the gated LayerNorm. For the mean over the rows of an image, dL/dn is the same
in each of its rows:

    dL/dn  = dL/dmean / rows,    g = dL/dn weight
    dL/dx  = (g - mean(g) - x' mean(g x')) / sqrt(var + eps)
    dL/dweight = sum dL/dn x',    dL/dbias = sum dL/dn

Sums over rows have a fixed order, so two runs give the same bits.
"""

import math

import torch


try:
    import numpy as np
    from numba import carray
except ImportError as error:
    raise ImportError("the CPU kernels of LayerNorm need numba: pip install numba") from error

from .backends import as_rows
from .layer_norm_numba import ROWS_PER_MEAN_JOB, as_float32, find_statistics, new_statistics
from .numba_derivatives import silu_and_derivative
from .numba_simd import (
    LANES,
    add,
    add_to_sums,
    clear_part,
    compiled,
    divide,
    float32,
    float_pointer,
    lane_sums,
    load,
    load_first,
    load_splat,
    map_pointer,
    multiply,
    multiply_add,
    splat,
    store,
    store_first,
    subtract,
    sum_of_parts,
    untyped,
)
from .numba_threads import COUNTERS, claim_job, compiled_kernel, finish_job, readable, run_jobs


GATED_BWD_WORK = np.dtype(
    [(field, np.int64) for field in (*COUNTERS, "num_rows", "channels", "grad_stride", "row_stride", "gate_stride")]
    + [(field, np.int64) for field in ("grad", "hidden_states", "gate", "weight", "bias", "grad_x", "grad_gate")]
    + [(field, np.int64) for field in ("weight_sums", "bias_sums", "grad_weight", "grad_bias")]
    + [("eps", np.float64)]
)
MEAN_BWD_WORK = np.dtype(
    [(field, np.int64) for field in (*COUNTERS, "num_parts", "num_rows", "channels", "row_stride")]
    + [(field, np.int64) for field in ("grad", "hidden_states", "weight", "grad_x", "sums", "grad_weight")]
    + [("eps", np.float64)]
)

ROWS_PER_GATED_BWD_JOB = 128  # a multiple of 16


@compiled
def write_sum(sums, out, num_parts, channels):
    for d in range(0, channels, LANES):
        count = min(LANES, channels - d)
        store_first(out, d, sum_of_parts(sums, 0, num_parts, channels, d, count), count)


@compiled
def store_means(means, by_lane, channels):
    """Store the means over the channels of 16 rows from their sums by lane."""
    store(means, 0, divide(lane_sums(by_lane, 0), splat(float32(channels))))


def gated_bwd_jobs(pointer):
    """Process jobs until none is left. `pointer` points to a record `GATED_BWD_WORK`. Its type names the maps' dtype.

    A job writes the gradients of its rows, and its sums for the parameters to `weight_sums` and `bias_sums`
    `(jobs, channels)`. The last job adds the sums of all jobs.
    """
    work = carray(untyped(pointer), 1, GATED_BWD_WORK)[0]
    grad, x = map_pointer(pointer, work.grad), map_pointer(pointer, work.hidden_states)
    gate, grad_x = map_pointer(pointer, work.gate), map_pointer(pointer, work.grad_x)
    grad_gate, weight, bias = (
        map_pointer(pointer, work.grad_gate),
        float_pointer(work.weight),
        float_pointer(work.bias),
    )
    weight_sums, bias_sums, channels = float_pointer(work.weight_sums), float_pointer(work.bias_sums), work.channels
    statistics = new_statistics()
    padded = (channels + LANES - 1) // LANES * LANES
    scaled = np.zeros(LANES * padded, np.float32)  # g of each row
    scaled_by_lane, projected_by_lane = np.zeros(LANES * LANES, np.float32), np.zeros(LANES * LANES, np.float32)
    means, projections = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    job = claim_job(pointer)
    while job < work.num_jobs:
        clear_part(weight_sums, job, channels)
        clear_part(bias_sums, job, channels)
        sums_at = job * channels
        last = min((job + 1) * ROWS_PER_GATED_BWD_JOB, work.num_rows)
        for first in range(job * ROWS_PER_GATED_BWD_JOB, last, LANES):
            num_rows = min(LANES, last - first)
            find_statistics(statistics, x, first * work.row_stride, work.row_stride, num_rows, channels, work.eps)
            for row in range(num_rows):
                mean, scale = load_splat(statistics.means, row), load_splat(statistics.scales, row)
                pixel = first + row
                sum_scaled = sum_projected = splat(float32(0.0))
                for d in range(0, channels, LANES):
                    count = min(LANES, channels - d)
                    weight_d = load_first(weight, d, count)
                    grad_y = load_first(grad, pixel * work.grad_stride + d, count)
                    centered = subtract(load_first(x, pixel * work.row_stride + d, count), mean)
                    normalized = multiply(centered, scale)
                    silu, derivative = silu_and_derivative(load_first(gate, pixel * work.gate_stride + d, count))
                    affine = multiply_add(normalized, weight_d, load_first(bias, d, count))
                    store_first(grad_gate, pixel * channels + d, multiply(multiply(grad_y, affine), derivative), count)
                    grad_n = multiply(grad_y, silu)
                    scaled_d = multiply(grad_n, weight_d)
                    store(scaled, row * padded + d, scaled_d)
                    add_to_sums(weight_sums, sums_at + d, multiply(grad_n, normalized), count)
                    add_to_sums(bias_sums, sums_at + d, grad_n, count)
                    sum_scaled = add(sum_scaled, scaled_d)
                    sum_projected = multiply_add(scaled_d, normalized, sum_projected)
                store(scaled_by_lane, row * LANES, sum_scaled)
                store(projected_by_lane, row * LANES, sum_projected)
            store_means(means, scaled_by_lane, channels)
            store_means(projections, projected_by_lane, channels)
            for row in range(num_rows):
                mean, scale = load_splat(statistics.means, row), load_splat(statistics.scales, row)
                mean_scaled, projection = load_splat(means, row), load_splat(projections, row)
                pixel = first + row
                for d in range(0, channels, LANES):
                    count = min(LANES, channels - d)
                    centered = subtract(load_first(x, pixel * work.row_stride + d, count), mean)
                    along = multiply(multiply(centered, scale), projection)
                    rest = subtract(subtract(load(scaled, row * padded + d), mean_scaled), along)
                    store_first(grad_x, pixel * channels + d, multiply(rest, scale), count)
        if finish_job(pointer) == work.num_jobs - 1:
            write_sum(weight_sums, float_pointer(work.grad_weight), work.num_jobs, channels)
            write_sum(bias_sums, float_pointer(work.grad_bias), work.num_jobs, channels)
        job = claim_job(pointer)


def mean_bwd_jobs(pointer):
    """Process jobs until none is left. `pointer` points to a record `MEAN_BWD_WORK`. Its type names the maps' dtype.

    A job is a part of an image. It writes the gradients of its rows, and the sum of dL/dn x' to `sums`
    `(images, parts, channels)`. The last job adds the sums of all jobs.
    """
    work = carray(untyped(pointer), 1, MEAN_BWD_WORK)[0]
    x, grad_x = map_pointer(pointer, work.hidden_states), map_pointer(pointer, work.grad_x)
    grad, weight, sums = float_pointer(work.grad), float_pointer(work.weight), float_pointer(work.sums)
    channels = work.channels
    share = splat(float32(1.0 / work.num_rows))
    statistics = new_statistics()
    by_lane = np.zeros(LANES * LANES, np.float32)
    mean_of_all, projections = np.zeros(LANES, np.float32), np.empty(LANES, np.float32)
    scaled = np.zeros((channels + LANES - 1) // LANES * LANES, np.float32)  # g, the same for all rows
    job = claim_job(pointer)
    while job < work.num_jobs:
        image, part = job // work.num_parts, job % work.num_parts
        clear_part(sums, job, channels)
        sum_scaled = splat(float32(0.0))
        for d in range(0, channels, LANES):
            count = min(LANES, channels - d)
            grad_n = multiply(load_first(grad, image * channels + d, count), share)
            store(scaled, d, multiply(grad_n, load_first(weight, d, count)))
            sum_scaled = add(sum_scaled, load(scaled, d))
        store(by_lane, 0, sum_scaled)
        store_means(mean_of_all, by_lane, channels)
        mean_scaled = load_splat(mean_of_all, 0)
        last = min((part + 1) * ROWS_PER_MEAN_JOB, work.num_rows)
        for first in range(part * ROWS_PER_MEAN_JOB, last, LANES):
            num_rows = min(LANES, last - first)
            start = image * work.num_rows + first
            find_statistics(statistics, x, start * work.row_stride, work.row_stride, num_rows, channels, work.eps)
            for row in range(num_rows):
                mean, scale = load_splat(statistics.means, row), load_splat(statistics.scales, row)
                sum_projected = splat(float32(0.0))
                for d in range(0, channels, LANES):
                    count = min(LANES, channels - d)
                    centered = subtract(load_first(x, (start + row) * work.row_stride + d, count), mean)
                    normalized = multiply(centered, scale)
                    add_to_sums(sums, job * channels + d, normalized, count)
                    sum_projected = multiply_add(load(scaled, d), normalized, sum_projected)
                store(by_lane, row * LANES, sum_projected)
            store_means(projections, by_lane, channels)
            for row in range(num_rows):
                mean, scale = load_splat(statistics.means, row), load_splat(statistics.scales, row)
                projection = load_splat(projections, row)
                for d in range(0, channels, LANES):
                    count = min(LANES, channels - d)
                    centered = subtract(load_first(x, (start + row) * work.row_stride + d, count), mean)
                    along = multiply(multiply(centered, scale), projection)
                    rest = subtract(subtract(load(scaled, d), mean_scaled), along)
                    store_first(grad_x, (start + row) * channels + d, multiply(rest, scale), count)
        for d in range(0, channels, LANES):
            count = min(LANES, channels - d)
            grad_n = multiply(load_first(grad, image * channels + d, count), share)
            store_first(sums, job * channels + d, multiply(load_first(sums, job * channels + d, count), grad_n), count)
        if finish_job(pointer) == work.num_jobs - 1:
            write_sum(sums, float_pointer(work.grad_weight), work.num_jobs, channels)
        job = claim_job(pointer)


def gated_bwd(
    grad: torch.Tensor,  # (..., D)
    hidden_states: torch.Tensor,  # (..., D)
    gate: torch.Tensor,  # (..., D)
    weight: torch.Tensor,  # (D)
    bias: torch.Tensor,  # (D)
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of the four tensors of `gated`, each in the dtype of its tensor."""
    grad_y, x, z = (readable(as_rows(each)) for each in (grad.to(hidden_states.dtype), hidden_states, gate))
    num_rows, channels = x.shape
    num_jobs = math.ceil(num_rows / ROWS_PER_GATED_BWD_JOB)
    grad_x, grad_gate = x.new_empty(hidden_states.shape), z.new_empty(gate.shape)
    sums = weight.new_empty(2, num_jobs, channels, dtype=torch.float32)
    grad_weight, grad_bias = sums.new_empty(channels), sums.new_empty(channels)
    work = {
        "num_jobs": num_jobs,
        "num_rows": num_rows,
        "channels": channels,
        "grad_stride": grad_y.stride(0),
        "row_stride": x.stride(0),
        "gate_stride": z.stride(0),
        "grad": grad_y,
        "hidden_states": x,
        "gate": z,
        "weight": as_float32(weight),
        "bias": as_float32(bias),
        "grad_x": grad_x,
        "grad_gate": grad_gate,
        "weight_sums": sums[0],
        "bias_sums": sums[1],
        "grad_weight": grad_weight,
        "grad_bias": grad_bias,
        "eps": eps,
    }
    run_jobs(compiled_kernel(gated_bwd_jobs, x.dtype), GATED_BWD_WORK, work)
    return (
        grad_x.to(hidden_states.dtype),
        grad_gate.to(gate.dtype),
        grad_weight.to(weight.dtype),
        grad_bias.to(bias.dtype),
    )


def mean_bwd(
    grad: torch.Tensor,  # (B, D)
    hidden_states: torch.Tensor,  # (B, H, W, D)
    weight: torch.Tensor,  # (D)
    bias: torch.Tensor,  # (D)
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of the three tensors of `mean`, each in the dtype of its tensor."""
    x, grad_mean = readable(as_rows(hidden_states)), as_float32(grad)
    num_images, height, width, channels = hidden_states.shape
    num_rows = height * width
    num_parts = math.ceil(num_rows / ROWS_PER_MEAN_JOB)
    grad_x, sums = x.new_empty(hidden_states.shape), grad_mean.new_empty(num_images, num_parts, channels)
    grad_weight = grad_mean.new_empty(channels)
    work = {
        "num_jobs": num_images * num_parts,
        "num_parts": num_parts,
        "num_rows": num_rows,
        "channels": channels,
        "row_stride": x.stride(0),
        "grad": grad_mean,
        "hidden_states": x,
        "weight": as_float32(weight),
        "grad_x": grad_x,
        "sums": sums,
        "grad_weight": grad_weight,
        "eps": eps,
    }
    run_jobs(compiled_kernel(mean_bwd_jobs, x.dtype), MEAN_BWD_WORK, work)
    grad_bias = grad_mean.sum(dim=0)
    return grad_x.to(hidden_states.dtype), grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)
