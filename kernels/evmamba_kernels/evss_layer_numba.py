"""Numba kernel of an EVSS block in bfloat16 or 8-bit integers, for inference on CPUs.

A call of the kernel computes the whole block, in phases of jobs:

1. LayerNorm of the input, and both halves of the input projection, for a band of pixels;
2. the depthwise convolution before the scan, for a row; the local branch, for some rows;
3. the scan, for a group;
4. LayerNorm of the scan, times the gate z, and the output projection, for a band of pixels;
5. the factors of the channel gate, for an image;
6. the sum of the input and of both branches times their factors, for a band of pixels.

The input and the output are float32, and so is all arithmetic but the products of linear layers. Feature maps between
the phases are bfloat16. Tiles of the products exist for one job only, and stay in the caches.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F


try:
    import numpy as np
    from numba import carray
except ImportError as error:
    raise ImportError("the CPU kernel of the EVSS block needs numba: pip install numba") from error

from .atrous_selective_scan_numba import (
    CHUNK_LENGTH,
    LOG2_E,
    Chunk,
    PackedParameters,
    Sizes,
    Strides,
    find_pixels,
    load_u_and_delta,
    scan_block,
)
from .atrous_selective_scan_torch import NUM_GROUPS
from .depthwise_conv_numba import Convolution, convolve_row
from .layer_norm_numba import (
    STATISTICS_BYTES,
    Statistics,
    add_normalized,
    find_statistics,
    normalize_row,
    statistics_at,
    write_mean,
)
from .layer_parameters import EVSSParameters
from .numba_products import (
    LINEAR_FIELDS,
    ROWS,
    Table,
    aligned,
    all_blocks,
    fill_row,
    linear_at,
    multiply_vector,
    pack_bias,
    pack_convolution,
    pack_linear,
    pack_vector_product,
    table_pointer,
    tile_at,
    tile_bytes,
    write_linear,
)
from .numba_simd import (
    GELU,
    LANES,
    NONE,
    SIGMOID,
    SILU,
    bfloat16_pointer,
    clear_part,
    compiled,
    float_pointer,
    load,
    load_first,
    multiply,
    multiply_add,
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


MAPS = ("normalized", "u", "convolved", "z", "mixed", "local", "mixed_sums", "local_sums", "factors")
MEMORY = ("values", "sums", "statistics", "steps", "chunk", "h")  # offsets in the memory of a thread

PIXELS_PER_BAND = 56  # approximate; a tile of them and its sums stay in the second-level cache
WORK = np.dtype(
    [(field, np.int64) for field in (*THREAD_COUNTERS, "table", "x", "out", "thread_memory", "thread_bytes")]
    + [(field, np.int64) for field in ("batch_size", "height", "width", "channels", "inner", "rank", "state_size")]
    + [(field, np.int64) for field in ("projected", "squeezed", "num_bands", "pixels_per_band", "num_row_bands")]
    + [(field, np.int64) for field in ("rows_per_band", "num_conv_parts", "num_splits")]
    + [(field, np.int64) for field in (*MAPS, *MEMORY)]
    + [(field, np.float64) for field in ("eps", "mixer_eps", "gate_eps")]
)


class Weights(NamedTuple):
    """Indices in the table of weights."""

    in_proj_u: int = 0
    in_proj_z: int = LINEAR_FIELDS
    output_proj: int = 2 * LINEAR_FIELDS
    pointwise_conv: int = 3 * LINEAR_FIELDS
    x_proj: int = 4 * LINEAR_FIELDS  # of the four groups
    norm: int = 8 * LINEAR_FIELDS  # weight and bias, likewise below
    conv2d: int = 8 * LINEAR_FIELDS + 2
    dt_proj: int = 8 * LINEAR_FIELDS + 4
    A: int = 8 * LINEAR_FIELDS + 6
    D: int = 8 * LINEAR_FIELDS + 7
    mixer_norm: int = 8 * LINEAR_FIELDS + 8
    local_conv: int = 8 * LINEAR_FIELDS + 10
    gate_norm: int = 8 * LINEAR_FIELDS + 12
    squeeze: int = 8 * LINEAR_FIELDS + 14
    expand: int = 8 * LINEAR_FIELDS + 16


WEIGHTS = Weights()


class Maps(NamedTuple):
    """Feature maps and partial sums between the phases."""

    normalized: int  # pointer to (B, H, W, C), bfloat16
    u: int  # pointer to (B, H, W, D), bfloat16, later y
    convolved: int  # pointer to (B, H, W, D), bfloat16
    z: int  # pointer to (B, H, W, D), bfloat16, after SiLU
    mixed: int  # pointer to (B, H, W, C), bfloat16
    local: int  # pointer to (B, H, W, C), bfloat16
    mixed_sums: int  # pointer to (B, bands, C), float32
    local_sums: int  # pointer to (B, row bands, C), float32
    factors: int  # pointer to (B, 2, padded C), float32


class Memory(NamedTuple):
    """Memory of a thread."""

    tile: int  # address of a tile
    values: int  # pointer to float32 numbers: rows before they are stored in a tile
    sums: int  # pointer to (padded D), float32
    statistics: Statistics
    chunk: Chunk
    h: int  # pointer to (blocks, N, 16), float32


@compiled
def maps_in(work):
    return Maps(
        bfloat16_pointer(work.normalized),
        bfloat16_pointer(work.u),
        bfloat16_pointer(work.convolved),
        bfloat16_pointer(work.z),
        bfloat16_pointer(work.mixed),
        bfloat16_pointer(work.local),
        float_pointer(work.mixed_sums),
        float_pointer(work.local_sums),
        float_pointer(work.factors),
    )


@compiled
def memory_of_thread(work, thread):
    start = work.thread_memory + thread * work.thread_bytes
    steps, chunk = start + work.steps, start + work.chunk
    vectors, projected = 4 * CHUNK_LENGTH * LANES, 4 * CHUNK_LENGTH * work.projected  # bytes
    return Memory(
        start,
        float_pointer(start + work.values),
        float_pointer(start + work.sums),
        statistics_at(start + work.statistics),
        Chunk(
            table_pointer(steps),
            table_pointer(steps + 8 * CHUNK_LENGTH),
            table_pointer(steps + 16 * CHUNK_LENGTH),
            float_pointer(chunk),
            float_pointer(chunk + projected),
            float_pointer(chunk + projected + vectors),
            float_pointer(chunk + projected + 2 * vectors),
        ),
        float_pointer(start + work.h),
    )


@compiled
def vector_at(table, i):
    return float_pointer(table[i])


@compiled
def band_of_job(job, work):
    """Return the first pixel of a band in the batch, and its number of pixels."""
    image, band = job // work.num_bands, job % work.num_bands
    num_pixels = work.height * work.width
    first = band * work.pixels_per_band
    return image * num_pixels + first, min(work.pixels_per_band, num_pixels - first)


@compiled
def project_input(job, work, table, maps, memory):
    """Normalize a band of the input, and project it to u and z."""
    channels = work.channels
    x, weight, bias = float_pointer(work.x), vector_at(table, WEIGHTS.norm), vector_at(table, WEIGHTS.norm + 1)
    in_proj_u, in_proj_z = linear_at(table, WEIGHTS.in_proj_u), linear_at(table, WEIGHTS.in_proj_z)
    first, num_pixels = band_of_job(job, work)
    tile = tile_at(memory.tile, num_pixels, channels)
    statistics, values = memory.statistics, memory.values
    for group in range(0, num_pixels, LANES):
        num_rows = min(LANES, num_pixels - group)
        find_statistics(statistics, x, (first + group) * channels, channels, num_rows, channels, work.eps)
        for row in range(num_rows):
            at = (first + group + row) * channels
            normalize_row(statistics, row, x, at, channels, weight, bias, values, 0)
            for d in range(0, channels, LANES):
                count = min(LANES, channels - d)
                store_first(maps.normalized, at + d, load_first(values, d, count), count)
            fill_row(tile, group + row, values, 0, in_proj_u)
    start = first * work.inner
    write_linear(tile, num_pixels, in_proj_u, all_blocks(in_proj_u), NONE, maps.u, start, work.inner)
    write_linear(tile, num_pixels, in_proj_z, all_blocks(in_proj_z), SILU, maps.z, start, work.inner)


@compiled
def convolve_input(job, work, table, maps, memory):
    """Apply the depthwise convolution before the scan to some rows and channels."""
    part, band = job % work.num_conv_parts, job // work.num_conv_parts % work.num_row_bands
    image = job // work.num_conv_parts // work.num_row_bands
    weight, bias = vector_at(table, WEIGHTS.conv2d), vector_at(table, WEIGHTS.conv2d + 1)
    inner, height, width = work.inner, work.height, work.width
    convolution = Convolution(maps.u, inner, height, width, inner, weight, bias, SILU)
    num_vectors = (inner + LANES - 1) // LANES
    first = num_vectors * part // work.num_conv_parts * LANES
    last = min(inner, num_vectors * (part + 1) // work.num_conv_parts * LANES)
    for row in range(band * work.rows_per_band, min((band + 1) * work.rows_per_band, height)):
        pixel = (image * height + row) * width
        convolve_row(convolution, row, first, last, pixel, maps.convolved, pixel, memory.sums)


@compiled
def compute_local_branch(job, work, table, maps, memory):
    """Compute the local branch for some rows, and the sum of its normalized pixels."""
    image, band = job // work.num_row_bands, job % work.num_row_bands
    weight, bias = vector_at(table, WEIGHTS.local_conv), vector_at(table, WEIGHTS.local_conv + 1)
    channels, height, width = work.channels, work.height, work.width
    convolution = Convolution(maps.normalized, channels, height, width, channels, weight, bias, GELU)
    pointwise_conv = linear_at(table, WEIGHTS.pointwise_conv)
    first_row, last_row = band * work.rows_per_band, min((band + 1) * work.rows_per_band, height)
    num_pixels = (last_row - first_row) * width
    for row in range(first_row, last_row):
        pixel, out_pixel = (image * height + row) * width, (row - first_row) * width
        convolve_row(convolution, row, 0, channels, pixel, memory.values, out_pixel, memory.sums)
    tile = tile_at(memory.tile, num_pixels, channels)
    for pixel in range(num_pixels):
        fill_row(tile, pixel, memory.values, pixel * channels, pointwise_conv)
    start = (image * height + first_row) * width * channels
    write_linear(tile, num_pixels, pointwise_conv, all_blocks(pointwise_conv), NONE, maps.local, start, channels)
    add_normalized_band(maps.local, start, num_pixels, work, memory, maps.local_sums, job * channels)


@compiled
def add_normalized_band(x, start, num_pixels, work, memory, sums, at):
    """Write the sum of the normalized pixels of a band to `sums` from `at`, for the mean of the channel gate."""
    channels = work.channels
    clear_part(sums, at // channels, channels)
    for group in range(0, num_pixels, LANES):
        first, num_rows = start + group * channels, min(LANES, num_pixels - group)
        add_normalized(memory.statistics, x, first, channels, num_rows, channels, work.gate_eps, sums, at)


@compiled
def sizes_in(work):
    return Sizes(work.height, work.width, work.inner, work.rank, work.state_size, work.projected)


@compiled
def parameters_of_group(table, k, sizes):
    """Return the parameters of the recurrence of group k. The projection is a linear layer of its own."""
    padded = (sizes.channels + LANES - 1) // LANES * LANES
    bytes_of_row = 4 * k * padded
    return PackedParameters(
        float_pointer(table[WEIGHTS.A]),  # not read
        float_pointer(table[WEIGHTS.dt_proj] + bytes_of_row * sizes.rank),
        float_pointer(table[WEIGHTS.dt_proj + 1] + bytes_of_row),
        float_pointer(table[WEIGHTS.A] + bytes_of_row * sizes.state_size),
        float_pointer(table[WEIGHTS.D] + bytes_of_row),
    )


@compiled
def scan_group(job, work, table, maps, memory):
    """Scan one group of an image, or a part of its channels."""
    split, k = job % work.num_splits, job // work.num_splits % NUM_GROUPS
    image = job // work.num_splits // NUM_GROUPS
    sizes, inner = sizes_in(work), work.inner
    packed, x_proj = parameters_of_group(table, k, sizes), linear_at(table, WEIGHTS.x_proj + k * LINEAR_FIELDS)
    strides = Strides(work.height * work.width * inner, work.width * inner, inner)
    num_blocks = (inner + LANES - 1) // LANES
    first, last = num_blocks * split // work.num_splits, num_blocks * (split + 1) // work.num_splits
    clear_part(memory.h, 0, num_blocks * sizes.state_size * LANES)
    length = (sizes.height + 1) // 2 * ((sizes.width + 1) // 2)
    chunk, tile = memory.chunk, tile_at(memory.tile, CHUNK_LENGTH, inner)
    for t in range(0, length, CHUNK_LENGTH):
        count = min(CHUNK_LENGTH, length - t)
        find_pixels(chunk, t, count, image, k, strides, sizes)
        copy_steps(chunk, count, maps.convolved, tile, inner)
        write_linear(tile, count, x_proj, all_blocks(x_proj), NONE, chunk.projected, 0, sizes.projected)
        for block in range(first, last):
            load_u_and_delta(chunk, count, block, maps.convolved, packed, sizes)
            scan_block(chunk, count, block, packed, sizes, memory.h, maps.u, image * strides.image)


@compiled
def copy_steps(chunk, count, u, tile, channels):
    """Copy the steps of a chunk from the feature map u to a tile. In the padding, they are zero."""
    halves = bfloat16_pointer(tile.address)
    for i in range(count):
        source = chunk.source[i]
        for d in range(0, channels, LANES):
            existing = min(LANES, channels - d) if source >= 0 else 0
            store(halves, 2 * i * tile.row_words + d, load_first(u, source + d, existing))


@compiled
def project_output(job, work, table, maps, memory):
    """Normalize a band of the scan, multiply it by the gate, and project it. Sums its normalized pixels."""
    inner, channels, statistics, values = work.inner, work.channels, memory.statistics, memory.values
    weight, bias = vector_at(table, WEIGHTS.mixer_norm), vector_at(table, WEIGHTS.mixer_norm + 1)
    output_proj, y = linear_at(table, WEIGHTS.output_proj), maps.u
    first, num_pixels = band_of_job(job, work)
    tile = tile_at(memory.tile, num_pixels, inner)
    for group in range(0, num_pixels, LANES):
        num_rows = min(LANES, num_pixels - group)
        find_statistics(statistics, y, (first + group) * inner, inner, num_rows, inner, work.mixer_eps)
        for row in range(num_rows):
            at = (first + group + row) * inner
            normalize_row(statistics, row, y, at, inner, weight, bias, values, 0)
            for d in range(0, inner, LANES):
                count = min(LANES, inner - d)
                store_first(
                    values, d, multiply(load_first(values, d, count), load_first(maps.z, at + d, count)), count
                )
            fill_row(tile, group + row, values, 0, output_proj)
    start = first * channels
    write_linear(tile, num_pixels, output_proj, all_blocks(output_proj), NONE, maps.mixed, start, channels)
    add_normalized_band(maps.mixed, start, num_pixels, work, memory, maps.mixed_sums, job * channels)


@compiled
def find_factors(image, work, table, maps, memory):
    """Compute the factors of the channel gate for both branches of an image."""
    channels, squeezed, mean, hidden = work.channels, work.squeezed, memory.values, memory.sums
    weight, bias = vector_at(table, WEIGHTS.gate_norm), vector_at(table, WEIGHTS.gate_norm + 1)
    num_pixels = work.height * work.width
    squeeze, squeeze_bias = vector_at(table, WEIGHTS.squeeze), vector_at(table, WEIGHTS.squeeze + 1)
    expand, expand_bias = vector_at(table, WEIGHTS.expand), vector_at(table, WEIGHTS.expand + 1)
    num_vectors, hidden_vectors = (channels + LANES - 1) // LANES, (squeezed + LANES - 1) // LANES
    for branch in range(2):
        if branch == 0:
            write_mean(maps.mixed_sums, image, work.num_bands, num_pixels, channels, weight, bias, mean, 0)
        else:
            write_mean(maps.local_sums, image, work.num_row_bands, num_pixels, channels, weight, bias, mean, 0)
        multiply_vector(mean, channels, squeeze, squeeze_bias, 0, hidden_vectors, GELU, hidden)
        factors = float_pointer(work.factors + 4 * (2 * image + branch) * num_vectors * LANES)
        multiply_vector(hidden, squeezed, expand, expand_bias, 0, num_vectors, SIGMOID, factors)


@compiled
def add_branches(job, work, maps):
    """Write the input plus both branches times their factors, for a band."""
    x, out, channels = float_pointer(work.x), float_pointer(work.out), work.channels
    num_vectors = (channels + LANES - 1) // LANES
    first, num_pixels = band_of_job(job, work)
    for_mixed = 2 * (job // work.num_bands) * num_vectors * LANES
    for_local = for_mixed + num_vectors * LANES
    for pixel in range(first, first + num_pixels):
        for d in range(0, channels, LANES):
            at, count = pixel * channels + d, min(LANES, channels - d)
            total = load_first(x, at, count)
            total = multiply_add(load_first(maps.mixed, at, count), load(maps.factors, for_mixed + d), total)
            total = multiply_add(load_first(maps.local, at, count), load(maps.factors, for_local + d), total)
            store_first(out, at, total, count)


def evss_layer_jobs(pointer):
    """Process jobs until none is left. `pointer` points to a record `WORK`."""
    work = carray(untyped(pointer), 1, WORK)[0]
    table, maps = table_pointer(work.table), maps_in(work)
    memory = memory_of_thread(work, claim_thread(pointer))
    row_jobs = work.batch_size * work.num_row_bands
    conv_jobs = row_jobs * work.num_conv_parts
    to_convolve = work.batch_size * work.num_bands  # the first job of each phase
    to_scan = to_convolve + conv_jobs + row_jobs
    to_project = to_scan + work.batch_size * NUM_GROUPS * work.num_splits
    to_gate = to_project + work.batch_size * work.num_bands
    to_add = to_gate + work.batch_size
    job = claim_job(pointer)
    while job < work.num_jobs:
        if job < to_convolve:
            project_input(job, work, table, maps, memory)
        elif job < to_scan:
            wait_for_jobs(pointer, to_convolve)
            if job < to_convolve + conv_jobs:
                convolve_input(job - to_convolve, work, table, maps, memory)
            else:
                compute_local_branch(job - to_convolve - conv_jobs, work, table, maps, memory)
        elif job < to_project:
            wait_for_jobs(pointer, to_scan)
            scan_group(job - to_scan, work, table, maps, memory)
        elif job < to_gate:
            wait_for_jobs(pointer, to_project)
            project_output(job - to_project, work, table, maps, memory)
        elif job < to_add:
            wait_for_jobs(pointer, to_gate)
            find_factors(job - to_gate, work, table, maps, memory)
        else:
            wait_for_jobs(pointer, to_add)
            add_branches(job - to_add, work, maps)
        finish_job(pointer)
        job = claim_job(pointer)


class EVSSLayer:
    """An EVSS block whose weights are packed for the kernel.

    Args:
        parameters: The parameters.
        dtype: Dtype of the products, `torch.bfloat16` or `torch.int8`. The projection of the scan and the gate of the
            channels stay in bfloat16 and float32.
    """

    def __init__(self, parameters: EVSSParameters, dtype: torch.dtype):
        self.inner, self.rank = parameters.dt_proj[0].shape[1:]
        self.state_size, self.eps = parameters.A_log.shape[-1], parameters.eps
        self.squeezed = len(parameters.squeeze[0])
        in_proj_weight, in_proj_bias = parameters.in_proj
        halves = zip(
            in_proj_weight.chunk(2), (None, None) if in_proj_bias is None else in_proj_bias.chunk(2), strict=True
        )
        linears = [pack_linear(*half, dtype) for half in halves]
        linears += [pack_linear(*linear, dtype) for linear in (parameters.output_proj, parameters.pointwise_conv)]
        linears += [pack_linear(weight, None, torch.bfloat16) for weight in parameters.x_proj_weight]
        A = -parameters.A_log.clamp(max=100 / float(LOG2_E)).exp() * float(LOG2_E)  # finite, see `pack_parameters`
        self.table = Table(
            [
                *(field for linear in linears for field in linear),
                *parameters.norm,
                *pack_convolution(*parameters.conv2d),
                by_blocks(parameters.dt_proj[0]),
                by_blocks(parameters.dt_proj[1][..., None]),
                by_blocks(A),
                by_blocks(parameters.D[..., None]),
                *parameters.mixer_norm,
                *pack_convolution(*parameters.local_conv),
                *parameters.gate_norm,
                pack_vector_product(parameters.squeeze[0], torch.float32),
                pack_bias(parameters.squeeze[1]),
                pack_vector_product(parameters.expand[0], torch.float32),
                pack_bias(parameters.expand[1]),
            ]
        )

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:  # (B, H, W, C), float32, both
        return apply(self, hidden_states.contiguous())


def by_blocks(parameter: torch.Tensor) -> torch.Tensor:  # (K, D, N) -> (K, blocks, N, 16)
    """Return a parameter of the scan in blocks of 16 channels. Zeros fill up the last one."""
    padded = F.pad(parameter, (0, 0, 0, -parameter.shape[1] % LANES))
    return aligned(padded.unflatten(1, (-1, LANES)).transpose(2, 3).contiguous())


def apply(layer: EVSSLayer, x: torch.Tensor) -> torch.Tensor:
    batch_size, height, width, channels = x.shape
    inner, rank, state_size = layer.inner, layer.rank, layer.state_size
    num_pixels, num_threads = height * width, torch.get_num_threads()
    projected = math.ceil((rank + 2 * state_size) / LANES) * LANES
    num_bands, pixels_per_band = split_evenly(num_pixels, PIXELS_PER_BAND, ROWS)
    num_row_bands, rows_per_band = split_evenly(height, max(1, round(PIXELS_PER_BAND / width)), 1)
    num_vectors, num_inner_vectors = math.ceil(channels / LANES), math.ceil(inner / LANES)
    num_conv_parts = min(num_inner_vectors, math.ceil(2 * num_threads / (batch_size * num_row_bands)))
    num_splits = min(num_inner_vectors, math.ceil(num_threads / (batch_size * NUM_GROUPS)))
    num_jobs = batch_size * (3 * num_bands + num_row_bands * (num_conv_parts + 1) + NUM_GROUPS * num_splits + 1)

    map_bytes = 2 * batch_size * num_pixels
    sizes = [map_bytes * size for size in (channels, inner, inner, inner, channels, channels)]
    sizes += [4 * batch_size * channels * parts for parts in (num_bands, num_row_bands)]
    maps = allocate([*sizes, 8 * batch_size * num_vectors * LANES])

    rows = rows_per_band * width
    largest_tile = max(
        tile_bytes(max(rows, pixels_per_band), channels),
        tile_bytes(max(pixels_per_band, CHUNK_LENGTH), inner),
    )
    offsets, thread_bytes = place(
        [
            largest_tile,
            4 * max(rows * channels, inner + LANES, channels + LANES),  # values
            4 * (max(inner, channels, layer.squeezed) + LANES),  # sums
            STATISTICS_BYTES,
            3 * 8 * CHUNK_LENGTH,  # steps
            4 * CHUNK_LENGTH * (projected + 3 * LANES),  # chunk
            4 * num_inner_vectors * state_size * LANES,  # h
        ]
    )
    (thread_memory,) = allocate([num_threads * thread_bytes])
    out = torch.empty_like(x)
    work = {
        "num_jobs": num_jobs,
        "table": layer.table.entries,
        "x": x,
        "out": out,
        "thread_memory": thread_memory,
        "thread_bytes": thread_bytes,
        "batch_size": batch_size,
        "height": height,
        "width": width,
        "channels": channels,
        "inner": inner,
        "rank": rank,
        "state_size": state_size,
        "projected": projected,
        "squeezed": layer.squeezed,
        "num_bands": num_bands,
        "pixels_per_band": pixels_per_band,
        "num_row_bands": num_row_bands,
        "rows_per_band": rows_per_band,
        "num_conv_parts": num_conv_parts,
        "num_splits": num_splits,
        **dict(zip(MAPS, maps, strict=True)),
        **dict(zip(MEMORY, offsets[1:], strict=True)),
        "eps": layer.eps[0],
        "mixer_eps": layer.eps[1],
        "gate_eps": layer.eps[2],
    }
    run_jobs(compiled_kernel(evss_layer_jobs, x.dtype), WORK, work)
    return out
