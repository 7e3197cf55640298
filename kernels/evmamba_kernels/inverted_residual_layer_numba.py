"""Numba kernel of an inverted-residual block in bfloat16 or 8-bit integers, for inference on CPUs.

A call of the kernel computes the whole block, in phases of jobs:

1. the expansion, for a band of pixels and some columns;
2. the depthwise convolution, for some rows and channels, and the sum of its outputs;
3. the squeeze of squeeze-and-excitation, for some columns;
4. its expansion, for some columns;
5. the projection of the scaled feature map plus the input, for a band of pixels and some columns.

The input and the output are float32, and so is all arithmetic but the products of linear layers. Feature maps between
the phases are bfloat16.
"""

import math
from typing import NamedTuple

import torch


try:
    import numpy as np
    from numba import carray
except ImportError as error:
    raise ImportError("the CPU kernel of the inverted-residual block needs numba: pip install numba") from error

from .depthwise_conv_numba import Convolution, convolve_row
from .layer_parameters import InvertedResidualParameters
from .numba_products import (
    LINEAR_FIELDS,
    ROWS,
    Table,
    blocks_of_part,
    fill_row,
    linear_at,
    multiply_vector,
    number_of_blocks,
    pack_bias,
    pack_convolution,
    pack_linear,
    pack_vector_product,
    table_pointer,
    tile_at,
    tile_bytes,
    write_linear,
    write_linear_and_residual,
)
from .numba_simd import (
    LANES,
    RELU,
    SIGMOID,
    bfloat16_pointer,
    compiled,
    float32,
    float_pointer,
    load,
    load_first,
    mean_of_parts,
    multiply,
    splat,
    store,
    store_first,
    untyped,
)
from .numba_threads import (
    THREAD_COUNTERS,
    allocate,
    claim_job,
    claim_thread,
    compiled_kernel,
    finish_job,
    place,
    run_jobs,
    split_evenly,
    wait_for_jobs,
)


PIXELS_PER_BAND = 56  # approximate; a tile of them and its sums stay in the second-level cache
VECTORS_PER_JOB = 4  # of squeeze-and-excitation

MAPS = ("expanded", "convolved", "sums", "mean", "hidden", "factors")
WORK = np.dtype(
    [(field, np.int64) for field in (*THREAD_COUNTERS, "table", "x", "out", "thread_memory", "thread_bytes")]
    + [(field, np.int64) for field in ("values", "batch_size", "height", "width", "channels", "expanded_size")]
    + [(field, np.int64) for field in ("squeezed", "num_bands", "pixels_per_band", "num_parts", "num_row_bands")]
    + [(field, np.int64) for field in ("rows_per_band", "num_conv_parts", *MAPS)]
)


class Weights(NamedTuple):
    """Indices in the table of weights. A layer is a weight and a bias, unless it is a `Linear`."""

    expand_conv: int = 0
    project_conv: int = LINEAR_FIELDS
    depthwise_conv: int = 2 * LINEAR_FIELDS
    squeeze: int = 2 * LINEAR_FIELDS + 2
    expand: int = 2 * LINEAR_FIELDS + 4


WEIGHTS = Weights()


class Maps(NamedTuple):
    """Feature maps and vectors between the phases. M is the number of expanded channels."""

    expanded: int  # pointer to (B, H, W, M), bfloat16
    convolved: int  # pointer to (B, H, W, M), bfloat16
    sums: int  # pointer to (B, row bands, M), float32
    mean: int  # pointer to (B, padded M), float32
    hidden: int  # pointer to (B, padded M'), float32
    factors: int  # pointer to (B, padded M), float32


class Memory(NamedTuple):
    """Memory of a thread."""

    tile: int  # address of a tile
    values: int  # pointer to (M), float32


@compiled
def maps_in(work):
    return Maps(
        bfloat16_pointer(work.expanded),
        bfloat16_pointer(work.convolved),
        float_pointer(work.sums),
        float_pointer(work.mean),
        float_pointer(work.hidden),
        float_pointer(work.factors),
    )


@compiled
def band_of_job(job, work):
    """Return the image of a job, the first pixel of its band in the batch, the number of pixels, and its part."""
    part, band = job % work.num_parts, job // work.num_parts % work.num_bands
    image, num_pixels = job // work.num_parts // work.num_bands, work.height * work.width
    first = band * work.pixels_per_band
    return image, image * num_pixels + first, min(work.pixels_per_band, num_pixels - first), part


@compiled
def expand_band(job, work, table, maps, memory):
    """Apply the expansion to a band of the input."""
    x, channels, expand_conv = float_pointer(work.x), work.channels, linear_at(table, WEIGHTS.expand_conv)
    _, first, num_pixels, part = band_of_job(job, work)
    tile, blocks = tile_at(memory.tile, num_pixels, channels), blocks_of_part(expand_conv, part, work.num_parts)
    for pixel in range(num_pixels):
        fill_row(tile, pixel, x, (first + pixel) * channels, expand_conv)
    size = work.expanded_size
    write_linear(tile, num_pixels, expand_conv, blocks, RELU, maps.expanded, first * size, size)


@compiled
def convolve_rows(job, work, table, maps):
    """Apply the depthwise convolution to some rows and channels, and sum its outputs."""
    part, band = job % work.num_conv_parts, job // work.num_conv_parts % work.num_row_bands
    image = job // work.num_conv_parts // work.num_row_bands
    weight, bias = float_pointer(table[WEIGHTS.depthwise_conv]), float_pointer(table[WEIGHTS.depthwise_conv + 1])
    size, height, width = work.expanded_size, work.height, work.width
    convolution = Convolution(maps.expanded, size, height, width, size, weight, bias, RELU)
    num_vectors = (size + LANES - 1) // LANES
    first = num_vectors * part // work.num_conv_parts * LANES
    last = min(size, num_vectors * (part + 1) // work.num_conv_parts * LANES)
    start = (image * work.num_row_bands + band) * size
    for d in range(first, last, LANES):
        store_first(maps.sums, start + d, splat(float32(0.0)), min(LANES, last - d))
    sums = float_pointer(work.sums + 4 * start)
    for row in range(band * work.rows_per_band, min((band + 1) * work.rows_per_band, height)):
        pixel = (image * height + row) * width
        convolve_row(convolution, row, first, last, pixel, maps.convolved, pixel, sums)


@compiled
def squeeze_mean(job, work, table, maps, memory):
    """Compute the mean of an image, and some outputs of the squeeze."""
    num_vectors = (work.squeezed + LANES - 1) // LANES
    num_parts = (num_vectors + VECTORS_PER_JOB - 1) // VECTORS_PER_JOB
    part, image, size = job % num_parts, job // num_parts, work.expanded_size
    num_bands, num_pixels = work.num_row_bands, work.height * work.width
    mean_of_parts(maps.sums, image * num_bands, num_bands, size, num_pixels, memory.values, 0)
    weight, bias = bfloat16_pointer(table[WEIGHTS.squeeze]), float_pointer(table[WEIGHTS.squeeze + 1])
    first, last = part * VECTORS_PER_JOB, min((part + 1) * VECTORS_PER_JOB, num_vectors)
    hidden = float_pointer(work.hidden + 4 * image * num_vectors * LANES)
    multiply_vector(memory.values, size, weight, bias, first, last, RELU, hidden)


@compiled
def expand_squeezed(job, work, table, maps):
    """Compute some factors of squeeze-and-excitation."""
    num_vectors, hidden_vectors = (work.expanded_size + LANES - 1) // LANES, (work.squeezed + LANES - 1) // LANES
    num_parts = (num_vectors + VECTORS_PER_JOB - 1) // VECTORS_PER_JOB
    part, image = job % num_parts, job // num_parts
    weight, bias = bfloat16_pointer(table[WEIGHTS.expand]), float_pointer(table[WEIGHTS.expand + 1])
    first, last = part * VECTORS_PER_JOB, min((part + 1) * VECTORS_PER_JOB, num_vectors)
    hidden = float_pointer(work.hidden + 4 * image * hidden_vectors * LANES)
    factors = float_pointer(work.factors + 4 * image * num_vectors * LANES)
    multiply_vector(hidden, work.squeezed, weight, bias, first, last, SIGMOID, factors)


@compiled
def project_band(job, work, table, maps, memory):
    """Scale a band of the feature map, project it, and add the input."""
    project_conv, size, channels = linear_at(table, WEIGHTS.project_conv), work.expanded_size, work.channels
    image, first, num_pixels, part = band_of_job(job, work)
    tile, blocks = tile_at(memory.tile, num_pixels, size), blocks_of_part(project_conv, part, work.num_parts)
    num_vectors = (size + LANES - 1) // LANES
    for pixel in range(num_pixels):
        start = (first + pixel) * size
        for d in range(0, size, LANES):
            factor = load(maps.factors, image * num_vectors * LANES + d)
            scaled = multiply(load_first(maps.convolved, start + d, min(LANES, size - d)), factor)
            store(memory.values, d, scaled)
        fill_row(tile, pixel, memory.values, 0, project_conv)
    x, out = float_pointer(work.x), float_pointer(work.out)
    write_linear_and_residual(tile, num_pixels, project_conv, blocks, x, out, first * channels, channels)


def inverted_residual_layer_jobs(pointer):
    """Process jobs until none is left. `pointer` points to a record `WORK`."""
    work = carray(untyped(pointer), 1, WORK)[0]
    table, maps = table_pointer(work.table), maps_in(work)
    start = work.thread_memory + claim_thread(pointer) * work.thread_bytes
    memory = Memory(start, float_pointer(start + work.values))
    squeeze_parts = (work.squeezed + LANES * VECTORS_PER_JOB - 1) // (LANES * VECTORS_PER_JOB)
    expand_parts = (work.expanded_size + LANES * VECTORS_PER_JOB - 1) // (LANES * VECTORS_PER_JOB)
    to_convolve = work.batch_size * work.num_bands * work.num_parts  # the first job of each phase
    to_squeeze = to_convolve + work.batch_size * work.num_row_bands * work.num_conv_parts
    to_expand = to_squeeze + work.batch_size * squeeze_parts
    to_project = to_expand + work.batch_size * expand_parts
    job = claim_job(pointer)
    while job < work.num_jobs:
        if job < to_convolve:
            expand_band(job, work, table, maps, memory)
        elif job < to_squeeze:
            wait_for_jobs(pointer, to_convolve)
            convolve_rows(job - to_convolve, work, table, maps)
        elif job < to_expand:
            wait_for_jobs(pointer, to_squeeze)
            squeeze_mean(job - to_squeeze, work, table, maps, memory)
        elif job < to_project:
            wait_for_jobs(pointer, to_expand)
            expand_squeezed(job - to_expand, work, table, maps)
        else:
            wait_for_jobs(pointer, to_project)
            project_band(job - to_project, work, table, maps, memory)
        finish_job(pointer)
        job = claim_job(pointer)


class InvertedResidualLayer:
    """An inverted-residual block whose weights are packed for the kernel.

    Args:
        parameters: The parameters.
        dtype: Dtype of the products, `torch.bfloat16` or `torch.int8`. Weights of squeeze-and-excitation stay in
            bfloat16.
    """

    def __init__(self, parameters: InvertedResidualParameters, dtype: torch.dtype):
        self.squeezed, self.expanded_size = parameters.squeeze[0].shape
        self.table = Table(
            [
                *pack_linear(*parameters.expand_conv, dtype),
                *pack_linear(*parameters.project_conv, dtype),
                *pack_convolution(*parameters.depthwise_conv),
                pack_vector_product(parameters.squeeze[0], torch.bfloat16),
                pack_bias(parameters.squeeze[1]),
                pack_vector_product(parameters.expand[0], torch.bfloat16),
                pack_bias(parameters.expand[1]),
            ]
        )

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:  # (B, H, W, C), float32, both
        x = hidden_states.contiguous()
        batch_size, height, width, channels = x.shape
        size, squeezed = self.expanded_size, self.squeezed
        num_pixels, num_threads = height * width, torch.get_num_threads()
        num_vectors = math.ceil(size / LANES)
        num_bands, pixels_per_band = split_evenly(num_pixels, PIXELS_PER_BAND, ROWS)
        most_parts = number_of_blocks(math.ceil(channels / LANES))
        num_parts = min(most_parts, math.ceil(2 * num_threads / (batch_size * num_bands)))
        num_row_bands, rows_per_band = split_evenly(height, max(1, round(PIXELS_PER_BAND / 4 / width)), 1)
        num_conv_parts = min(num_vectors, math.ceil(4 * num_threads / (batch_size * num_row_bands)))
        jobs_of_image = 2 * num_bands * num_parts + num_row_bands * num_conv_parts
        jobs_of_image += math.ceil(size / LANES / VECTORS_PER_JOB) + math.ceil(squeezed / LANES / VECTORS_PER_JOB)

        map_bytes, padded = 2 * batch_size * num_pixels * size, 4 * batch_size * num_vectors * LANES
        sizes = [map_bytes, map_bytes, 4 * batch_size * num_row_bands * size, padded]
        maps = allocate([*sizes, 4 * batch_size * math.ceil(squeezed / LANES) * LANES, padded])
        offsets, thread_bytes = place([tile_bytes(pixels_per_band, max(channels, size)), 4 * num_vectors * LANES])
        (thread_memory,) = allocate([num_threads * thread_bytes])
        out = torch.empty_like(x)
        work = {
            "num_jobs": batch_size * jobs_of_image,
            "table": self.table.entries,
            "x": x,
            "out": out,
            "thread_memory": thread_memory,
            "thread_bytes": thread_bytes,
            "values": offsets[1],
            "batch_size": batch_size,
            "height": height,
            "width": width,
            "channels": channels,
            "expanded_size": size,
            "squeezed": squeezed,
            "num_bands": num_bands,
            "pixels_per_band": pixels_per_band,
            "num_parts": num_parts,
            "num_row_bands": num_row_bands,
            "rows_per_band": rows_per_band,
            "num_conv_parts": num_conv_parts,
            **dict(zip(MAPS, maps, strict=True)),
        }
        run_jobs(compiled_kernel(inverted_residual_layer_jobs, x.dtype), WORK, work)
        return out
