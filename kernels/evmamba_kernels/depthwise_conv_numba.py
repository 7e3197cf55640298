"""Numba kernel of the depthwise 3 x 3 convolution and its activation, for inference on CPUs.

A job is a band of rows of an image. It processes a row in tiles of 7 pixels, 16 channels at a time. The sums of a tile
stay in registers while the kernel reads the three rows of pixels around it. Each pixel is read once for the three sums
that it contributes to.
"""

import math
from typing import NamedTuple

import torch


try:
    import numpy as np
    from numba import carray
except ImportError as error:
    raise ImportError("the CPU kernel of the depthwise convolution needs numba: pip install numba") from error

from .backends import as_rows
from .numba_simd import (
    GELU,
    LANES,
    NONE,
    RELU,
    SILU,
    activate,
    add,
    add_to_sums,
    clear_part,
    compiled,
    float32,
    float_pointer,
    load,
    load_first,
    map_pointer,
    mean_of_parts,
    multiply_add,
    splat,
    store,
    store_first,
    untyped,
)
from .numba_threads import COUNTERS, claim_job, compiled_kernel, finish_job, readable, run_jobs


WORK = np.dtype(
    [(field, np.int64) for field in (*COUNTERS, "num_bands", "rows_per_band", "height", "width", "channels")]
    + [(field, np.int64) for field in ("pixel_stride", "activation")]
    + [(field, np.int64) for field in ("hidden_states", "weight", "bias", "out", "sums", "mean")]
)

ACTIVATIONS = {"none": NONE, "relu": RELU, "silu": SILU, "gelu": GELU}

TILE = 7  # pixels; their sums, a row of weights and a row of pixels fill 19 of the 32 registers of AVX-512
NUMBERS_PER_JOB = 2**15  # approximate number of outputs, 128 kB


class Convolution(NamedTuple):
    """The feature map of a depthwise convolution, its weights, and what follows."""

    x: int  # pointer to (H, W, D)
    pixel_stride: int
    height: int
    width: int
    channels: int  # D
    weight: int  # pointer to (9, D)
    bias: int  # pointer to (D)
    activation: int


@compiled
def load_if(condition, array, index, count):
    if condition:
        return load_first(array, index, count)
    return splat(float32(0.0))


@compiled
def load_weights(weight, at, channels, count):
    """Load the weights of one row of the window."""
    return (
        load_first(weight, at, count),
        load_first(weight, at + channels, count),
        load_first(weight, at + 2 * channels, count),
    )


@compiled
def products(left, middle, right, weights, total):
    """Add the products of three neighboring pixels to `total`."""
    return multiply_add(right, weights[2], multiply_add(middle, weights[1], multiply_add(left, weights[0], total)))


@compiled
def add_row_to_tile(totals, x, at, stride, has_left, has_right, weights):
    """Add the contribution of a row to the outputs of a tile. `at` is the row's element in the tile's first column."""
    p0 = load_if(has_left, x, at - stride, LANES)
    p1, p2, p3, p4 = load(x, at), load(x, at + stride), load(x, at + 2 * stride), load(x, at + 3 * stride)
    p5, p6, p7 = load(x, at + 4 * stride), load(x, at + 5 * stride), load(x, at + 6 * stride)
    p8 = load_if(has_right, x, at + 7 * stride, LANES)
    return (
        products(p0, p1, p2, weights, totals[0]),
        products(p1, p2, p3, weights, totals[1]),
        products(p2, p3, p4, weights, totals[2]),
        products(p3, p4, p5, weights, totals[3]),
        products(p4, p5, p6, weights, totals[4]),
        products(p5, p6, p7, weights, totals[5]),
        products(p6, p7, p8, weights, totals[6]),
    )


@compiled
def add_row_to_pixel(total, x, at, stride, has_left, has_right, weights, count):
    """Add the contribution of a row to the output of a pixel. `at` is the row's element in the pixel's column."""
    left, right = load_if(has_left, x, at - stride, count), load_if(has_right, x, at + stride, count)
    return products(left, load_first(x, at, count), right, weights, total)


@compiled
def convolve_row(convolution, row, first, last, pixel, out, out_pixel, sums):
    """Write the channels from `first` to `last` of a row of the output, and add them to `sums` `(channels)`.

    Args:
        convolution: The convolution.
        row: Row of the feature map.
        first: First channel, a multiple of 16.
        last: Channel after the last one: a multiple of 16, or the number of channels.
        pixel: Index in the feature map of the first pixel of the row.
        out: Receives the output, with dense channels.
        out_pixel: Index in `out` of the first pixel of the row.
        sums: Sums of the outputs by channel.
    """
    x, stride, height, width, channels, weight, bias, activation = convolution
    tiled_width, full_channels = width // TILE * TILE, last // LANES * LANES
    rows_of_window = range(max(0, 1 - row), min(3, height - row + 1))  # without the padding
    for column in range(0, tiled_width, TILE):
        has_left, has_right = column > 0, column + TILE < width
        for d in range(first, full_channels, LANES):
            start = load(bias, d)
            totals = (start, start, start, start, start, start, start)
            for i in rows_of_window:
                at = (pixel + column + (i - 1) * width) * stride + d
                weights = load_weights(weight, 3 * i * channels + d, channels, LANES)
                totals = add_row_to_tile(totals, x, at, stride, has_left, has_right, weights)
            sum_of_tile = splat(float32(0.0))
            for i in range(TILE):
                result = activate(totals[i], activation)
                store(out, (out_pixel + column + i) * channels + d, result)
                sum_of_tile = add(sum_of_tile, result)
            add_to_sums(sums, d, sum_of_tile, LANES)

    for column in range(width):  # the pixels after the last tile, and the channels that fill no vector
        has_left, has_right = column > 0, column + 1 < width
        for d in range(full_channels if column < tiled_width else first, last, LANES):
            count = min(LANES, channels - d)
            result = load_first(bias, d, count)
            for i in rows_of_window:
                at = (pixel + column + (i - 1) * width) * stride + d
                weights = load_weights(weight, 3 * i * channels + d, channels, count)
                result = add_row_to_pixel(result, x, at, stride, has_left, has_right, weights, count)
            result = activate(result, activation)
            store_first(out, (out_pixel + column) * channels + d, result, count)
            add_to_sums(sums, d, result, count)


@compiled
def write_means(work):
    """Compute the means from the sums of all bands."""
    sums, mean, channels = float_pointer(work.sums), float_pointer(work.mean), work.channels
    num_bands, num_pixels = work.num_bands, work.height * work.width
    for image in range(work.num_jobs // num_bands):
        mean_of_parts(sums, image * num_bands, num_bands, channels, num_pixels, mean, image * channels)


def depthwise_conv_jobs(pointer):
    """Process jobs until none is left. `pointer` points to a record `WORK`. Its type names the dtype of the maps.

    A job writes the sums of its outputs to `sums` `(images, bands, channels)`. The last job computes the means.
    """
    work = carray(untyped(pointer), 1, WORK)[0]
    x, out = map_pointer(pointer, work.hidden_states), map_pointer(pointer, work.out)
    weight, bias, channels = float_pointer(work.weight), float_pointer(work.bias), work.channels
    shape = work.pixel_stride, work.height, work.width, channels
    convolution = Convolution(x, *shape, weight, bias, work.activation)
    job = claim_job(pointer)
    while job < work.num_jobs:
        image, band = job // work.num_bands, job % work.num_bands
        sums = float_pointer(work.sums + 4 * job * channels)
        clear_part(sums, 0, channels)
        for row in range(band * work.rows_per_band, min((band + 1) * work.rows_per_band, work.height)):
            pixel = (image * work.height + row) * work.width
            convolve_row(convolution, row, 0, channels, pixel, out, pixel, sums)
        if finish_job(pointer) == work.num_jobs - 1:
            write_means(work)
        job = claim_job(pointer)


def convolve(
    hidden_states: torch.Tensor,  # (B, H, W, D)
    weight: torch.Tensor,  # (D, 1, 3, 3)
    bias: torch.Tensor | None,  # (D)
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor]:  # (B, H, W, D) and (B, D)
    """Return the output and its mean over the feature map, in the dtype of the feature map."""
    batch_size, height, width, channels = hidden_states.shape
    rows_per_band = max(1, round(NUMBERS_PER_JOB / (width * channels)))
    num_bands = math.ceil(height / rows_per_band)
    pixels = readable(as_rows(hidden_states))
    out = pixels.new_empty(hidden_states.shape)
    weight = weight.float().flatten(1).t().contiguous()  # (9, D)
    bias = weight.new_zeros(channels) if bias is None else bias.float().contiguous()
    sums, mean = weight.new_empty(batch_size, num_bands, channels), weight.new_empty(batch_size, channels)
    work = {
        "num_jobs": batch_size * num_bands,
        "num_bands": num_bands,
        "rows_per_band": rows_per_band,
        "height": height,
        "width": width,
        "channels": channels,
        "pixel_stride": pixels.stride(0),
        "activation": ACTIVATIONS[activation],
        "hidden_states": pixels,
        "weight": weight,
        "bias": bias,
        "out": out,
        "sums": sums,
        "mean": mean,
    }
    run_jobs(compiled_kernel(depthwise_conv_jobs, out.dtype), WORK, work)
    return out.to(hidden_states.dtype), mean.to(hidden_states.dtype)
