"""The atrous selective scan on CPUs: Numba kernels on vectors of 16 channels.

A job is one group of one image, or a part of its channels. It processes the sequence in chunks of `CHUNK_LENGTH`
steps. For each chunk, it finds the pixels, projects u to dt, B and C, and runs the recurrence on 16 channels at a
time. Index arithmetic finds the pixels, so u and y are neither gathered nor scattered. Only the projections, delta and
states of one chunk exist at a time, and stay in the caches.

`scan_fwd_job` is a job of the forward pass. It can keep the states before each chunk. `scan_bwd_job`, a job of the
backward pass, computes them unless they were kept. It then processes the chunks from the last to the first: forward
for the states of all steps, and backward for the adjoints. PyTorch computes the gradients through the projection as
two matrix products per group.

Symbols, shapes and the derivation of the adjoint: `kernels/README.md`.
"""

import math
from functools import reduce
from typing import NamedTuple

import torch


try:
    import numpy as np
    from numba import carray
except ImportError as error:
    raise ImportError("the CPU kernels of the atrous selective scan need numba: pip install numba") from error

from .atrous_selective_scan_torch import NUM_GROUPS, without_autocast
from .numba_simd import (
    LANES,
    add,
    compiled,
    exp2,
    float32,
    float_pointer,
    lane_sums,
    load,
    load_first,
    load_splat,
    map_pointer,
    minimum,
    multiply,
    multiply_add,
    products_of_2_columns,
    products_of_16_columns,
    products_of_32_columns,
    products_of_48_columns,
    sigmoid,
    softplus,
    splat,
    store,
    store_first,
    untyped,
)
from .numba_threads import COUNTERS, claim_job, compiled_kernel, finish_job, readable, run_jobs


LOG2_E = float32(1.4426950408889634)
LOG_2 = float32(0.6931471805599453)

# Steps of a chunk. Their intermediates must fit into the caches.
CHUNK_LENGTH = 32

# Pixels that are projected together, with one load of a vector of weights for all of them. With 3 vectors of sums per
# pixel, they fill the 32 registers. Must divide the chunk.
TILE = 8


class Sizes(NamedTuple):
    height: int
    width: int
    channels: int  # D
    rank: int  # R
    state_size: int  # N
    projected: int  # R + 2N, rounded up to whole vectors


class Strides(NamedTuple):
    """Strides of a feature map with dense channels, in elements."""

    image: int
    row: int
    column: int


class Parameters(NamedTuple):
    """Pointers to the float32 parameters, in the shapes of the operator."""

    x_proj_weight: int  # (K, R + 2N, D)
    dt_proj_weight: int  # (K, D, R)
    dt_proj_bias: int  # (K, D)
    A_log: int  # (K, D, N)
    D: int  # (K, D)


class Inputs(NamedTuple):
    """Inputs of the jobs of a call."""

    u: int  # pointer to (B, H, W, D), in float32 or as 16-bit numbers
    strides: Strides  # of u
    parameters: Parameters
    sizes: Sizes
    num_splits: int  # parts of the blocks of channels


class Gradients(NamedTuple):
    """Pointers to the gradients of the backward pass, in float32 except for `y`."""

    y: int  # (B, H, W, D), read, in the dtype of u
    u: int  # (B, H, W, D), written: the gradient of u without the projection
    projected: int  # (B, K, splits, rows, columns, sizes.projected), written: parts, summed over the splits later
    parameters: Parameters  # (B, K, ...) each, written, except for `x_proj_weight`


def work_dtype(*fields: str) -> np.dtype:
    """Return the record type that a kernel takes. Its fields are integers, some of them addresses."""
    sizes = (*Strides._fields, *Sizes._fields, "num_splits")
    return np.dtype([(field, np.int64) for field in (*COUNTERS, "u", *sizes, *Parameters._fields, *fields)])


# `starts` is the address of the states before each chunk, (B, K, chunks, blocks, N, 16). It is 0 in a forward pass
# that keeps none. A backward pass writes them unless `has_starts` is 1.
SCAN_FWD_WORK = work_dtype("starts", "y")
SCAN_BWD_WORK = work_dtype(
    "has_starts", "starts", "grad_y", "grad_u", "grad_projected", *(f"grad_{name}" for name in Parameters._fields)
)


class PackedParameters(NamedTuple):
    """The parameters of one group, as the vectors that the loops read. A block holds 16 channels."""

    x_proj_weight: np.ndarray  # (D, sizes.projected)
    dt_proj_weight: np.ndarray  # (blocks, R, 16)
    dt_proj_bias: np.ndarray  # (blocks, 16)
    A: np.ndarray  # (blocks, N, 16), in units of log 2: the decay is exp2(delta A)
    D: np.ndarray  # (blocks, 16)


class Chunk(NamedTuple):
    """The steps of a chunk."""

    source: np.ndarray  # (T), index of the step's first element in u, -1 in the padding
    pixel: np.ndarray  # (T), index of its pixel in the image, -1 in the padding
    cell: np.ndarray  # (T), index of its cell of 2 x 2 pixels in the image
    projected: np.ndarray  # (T, sizes.projected): dt, B, C
    raw: np.ndarray  # (T, 16), softplus^-1(delta) of one block
    delta: np.ndarray  # (T, 16)
    u: np.ndarray  # (T, 16)


@compiled
def new_floats(count):
    """Return zeros, aligned to 64 bytes to keep vectors from spanning two cache lines."""
    memory = np.zeros(count + LANES, np.float32)
    skipped = -(memory.ctypes.data // 4) % LANES
    return memory[skipped : skipped + count]


@compiled
def inputs_in(work, u):
    parameters = Parameters(
        float_pointer(work.x_proj_weight),
        float_pointer(work.dt_proj_weight),
        float_pointer(work.dt_proj_bias),
        float_pointer(work.A_log),
        float_pointer(work.D),
    )
    return Inputs(
        u,
        Strides(work.image, work.row, work.column),
        parameters,
        Sizes(work.height, work.width, work.channels, work.rank, work.state_size, work.projected),
        work.num_splits,
    )


@compiled
def gradients_in(work, grad_y):
    parameters = Parameters(
        float_pointer(work.grad_x_proj_weight),
        float_pointer(work.grad_dt_proj_weight),
        float_pointer(work.grad_dt_proj_bias),
        float_pointer(work.grad_A_log),
        float_pointer(work.grad_D),
    )
    return Gradients(grad_y, float_pointer(work.grad_u), float_pointer(work.grad_projected), parameters)


@compiled
def new_packed_parameters(sizes):
    padded = (sizes.channels + LANES - 1) // LANES * LANES
    return PackedParameters(
        new_floats(sizes.channels * sizes.projected),
        new_floats(padded * sizes.rank),
        new_floats(padded),
        new_floats(padded * sizes.state_size),
        new_floats(padded),
    )


@compiled
def pack_parameters(packed, parameters, k, sizes):
    """Fill `packed` with the parameters of group k. Zeros fill up the last block of channels.

    |A| is limited to 2^100 to keep delta A finite. Such a state decays to zero within a step anyway.
    """
    channels, rank, state_size = sizes.channels, sizes.rank, sizes.state_size
    num_projected = rank + 2 * state_size
    for i in range(num_projected):
        for d in range(channels):
            weight = parameters.x_proj_weight[(k * num_projected + i) * channels + d]
            packed.x_proj_weight[d * sizes.projected + i] = weight
    for d in range(channels):
        block, lane = d // LANES, d % LANES
        packed.dt_proj_bias[d] = parameters.dt_proj_bias[k * channels + d]
        packed.D[d] = parameters.D[k * channels + d]
        for r in range(rank):
            weight = parameters.dt_proj_weight[(k * channels + d) * rank + r]
            packed.dt_proj_weight[(block * rank + r) * LANES + lane] = weight
        for n in range(state_size):
            A_log = parameters.A_log[(k * channels + d) * state_size + n]
            packed.A[(block * state_size + n) * LANES + lane] = A_log
    for i in range(0, len(packed.A), LANES):
        exponent = minimum(splat(float32(100.0)), multiply(load(packed.A, i), splat(LOG2_E)))
        store(packed.A, i, multiply(exp2(exponent), splat(-LOG2_E)))


@compiled
def new_chunk(sizes):
    return Chunk(
        np.empty(CHUNK_LENGTH, np.int64),
        np.empty(CHUNK_LENGTH, np.int64),
        np.empty(CHUNK_LENGTH, np.int64),
        new_floats(CHUNK_LENGTH * sizes.projected),
        new_floats(CHUNK_LENGTH * LANES),
        new_floats(CHUNK_LENGTH * LANES),
        new_floats(CHUNK_LENGTH * LANES),
    )


@compiled
def find_pixels(chunk, first, count, b, k, strides, sizes):
    """Find the pixels of `count` steps from step `first`, in group k of image b."""
    u_start = b * strides.image
    rows, columns = (sizes.height + 1) // 2, (sizes.width + 1) // 2
    for i in range(count):
        t = first + i
        row, column = (t // columns, t % columns) if k % 2 == 0 else (t % rows, t // rows)
        chunk.cell[i] = row * columns + column
        row, column = 2 * row + k % 2, 2 * column + k // 2
        is_inside = row < sizes.height and column < sizes.width
        chunk.pixel[i] = row * sizes.width + column if is_inside else -1
        chunk.source[i] = u_start + row * strides.row + column * strides.column if is_inside else -1


@compiled
def project_chunk(chunk, first, count, b, k, inputs, packed):
    """Find the pixels of `count` steps from step `first`, in group k of image b, and project them.

    In the padding, u and the projections are zero. delta is not, because of its bias.
    """
    u, strides, parameters, sizes, _ = inputs
    u_start = b * strides.image
    find_pixels(chunk, first, count, b, k, strides, sizes)
    size, projected, source = sizes.projected, chunk.projected, chunk.source
    # fewer columns than half a vector are faster one by one
    num_projected = sizes.rank + 2 * sizes.state_size
    in_vectors = (num_projected + LANES // 2 - 1) // LANES * LANES
    weight_start = k * num_projected * sizes.channels
    for i in range(0, count, TILE):
        # the last tile may repeat its last step
        i1, i2, i3 = min(i + 1, count - 1), min(i + 2, count - 1), min(i + 3, count - 1)
        i4, i5, i6, i7 = min(i + 4, count - 1), min(i + 5, count - 1), min(i + 6, count - 1), min(i + 7, count - 1)
        # steps in the padding read any pixel, and are cleared below
        p0, p1 = max(source[i], u_start), max(source[i1], u_start)
        p2, p3 = max(source[i2], u_start), max(source[i3], u_start)
        p4, p5 = max(source[i4], u_start), max(source[i5], u_start)
        p6, p7 = max(source[i6], u_start), max(source[i7], u_start)
        pixels = (p0, p1, p2, p3, p4, p5, p6, p7)
        r0, r1, r2, r3 = i * size, i1 * size, i2 * size, i3 * size
        r4, r5, r6, r7 = i4 * size, i5 * size, i6 * size, i7 * size
        starts = (r0, r1, r2, r3, r4, r5, r6, r7)
        j = 0
        while j < in_vectors - 2 * LANES:
            products_of_48_columns(u, pixels, sizes.channels, packed.x_proj_weight, j, size, projected, starts)
            j += 3 * LANES
        if j == in_vectors - 2 * LANES:
            products_of_32_columns(u, pixels, sizes.channels, packed.x_proj_weight, j, size, projected, starts)
        elif j == in_vectors - LANES:
            products_of_16_columns(u, pixels, sizes.channels, packed.x_proj_weight, j, size, projected, starts)
        for j in range(in_vectors, num_projected, 2):
            j1 = min(j + 1, num_projected - 1)
            weights = (weight_start + j * sizes.channels, weight_start + j1 * sizes.channels)
            places = (r0 + j, r1 + j, r2 + j, r3 + j, r4 + j, r5 + j, r6 + j, r7 + j)
            places_1 = (r0 + j1, r1 + j1, r2 + j1, r3 + j1, r4 + j1, r5 + j1, r6 + j1, r7 + j1)
            all_places = (*places, *places_1)
            products_of_2_columns(u, pixels, sizes.channels, parameters.x_proj_weight, weights, projected, all_places)
    for i in range(count):
        if source[i] < 0:
            projected[i * size : (i + 1) * size] = float32(0.0)


@compiled
def load_u_and_delta(chunk, count, block, u, packed, sizes):
    """Load u and compute delta for 16 channels and all steps, to overlap the latencies of the softplus."""
    channel, rank = block * LANES, sizes.rank
    existing = min(LANES, sizes.channels - channel)
    bias = load(packed.dt_proj_bias, channel)
    for i in range(count):
        raw = bias
        for r in range(rank):
            weight = load(packed.dt_proj_weight, (block * rank + r) * LANES)
            raw = multiply_add(weight, load_splat(chunk.projected, i * sizes.projected + r), raw)
        store(chunk.raw, i * LANES, raw)
        store(chunk.delta, i * LANES, softplus(raw))
        store(chunk.u, i * LANES, load_first(u, chunk.source[i] + channel, existing if chunk.source[i] >= 0 else 0))


@compiled
def scan_block(chunk, count, block, packed, sizes, h, y, y_start):
    """Advance the states of 16 channels by the steps of a chunk, and write y."""
    channel, state_size = block * LANES, sizes.state_size
    state, existing = block * state_size * LANES, min(LANES, sizes.channels - channel)
    skip = load(packed.D, channel)
    for i in range(count):
        delta, u_t = load(chunk.delta, i * LANES), load(chunk.u, i * LANES)
        delta_u, y_t = multiply(delta, u_t), multiply(skip, u_t)
        B = i * sizes.projected + sizes.rank
        C = B + state_size
        for n in range(state_size):
            at = state + n * LANES
            added = multiply(delta_u, load_splat(chunk.projected, B + n))
            decay = exp2(multiply(delta, load(packed.A, at)))
            h_n = multiply_add(decay, load(h, at), added)
            store(h, at, h_n)
            y_t = multiply_add(h_n, load_splat(chunk.projected, C + n), y_t)
        if chunk.pixel[i] >= 0:
            store_first(y, y_start + chunk.pixel[i] * sizes.channels + channel, y_t, existing)


@compiled
def copy_state(source, source_start, target, target_start, state_size):
    for n in range(0, state_size * LANES, LANES):
        store(target, target_start + n, load(source, source_start + n))


@compiled
def scan_fwd_job(job, inputs, y, packed, chunk, h, starts, keeps_states):
    """Compute y `(B, H, W, D)` for one job of (B, K, splits of the blocks of channels)."""
    u, _, parameters, sizes, num_splits = inputs
    split, k, b = job % num_splits, job // num_splits % NUM_GROUPS, job // num_splits // NUM_GROUPS
    length = (sizes.height + 1) // 2 * ((sizes.width + 1) // 2)
    num_chunks = (length + CHUNK_LENGTH - 1) // CHUNK_LENGTH
    num_blocks = (sizes.channels + LANES - 1) // LANES
    state = sizes.state_size * LANES
    y_start = b * sizes.height * sizes.width * sizes.channels
    pack_parameters(packed, parameters, k, sizes)
    h[:] = float32(0.0)
    for c in range(num_chunks):
        count = min(CHUNK_LENGTH, length - c * CHUNK_LENGTH)
        project_chunk(chunk, c * CHUNK_LENGTH, count, b, k, inputs, packed)
        for block in range(num_blocks * split // num_splits, num_blocks * (split + 1) // num_splits):
            if keeps_states:
                start = (((b * NUM_GROUPS + k) * num_chunks + c) * num_blocks + block) * state
                copy_state(h, block * state, starts, start, sizes.state_size)
            load_u_and_delta(chunk, count, block, u, packed, sizes)
            scan_block(chunk, count, block, packed, sizes, h, y, y_start)


def scan_fwd_jobs(pointer):
    """Process jobs until none is left. `pointer` points to a record `SCAN_FWD_WORK`. Its type names a map's dtype."""
    work = carray(untyped(pointer), 1, SCAN_FWD_WORK)[0]
    inputs, y = inputs_in(work, map_pointer(pointer, work.u)), map_pointer(pointer, work.y)
    sizes = inputs.sizes
    num_blocks = (sizes.channels + LANES - 1) // LANES
    packed, chunk = new_packed_parameters(sizes), new_chunk(sizes)
    h = new_floats(num_blocks * sizes.state_size * LANES)
    starts = float_pointer(work.starts)
    job = claim_job(pointer)
    while job < work.num_jobs:
        scan_fwd_job(job, inputs, y, packed, chunk, h, starts, work.starts != 0)
        finish_job(pointer)
        job = claim_job(pointer)


@compiled
def keep_states(chunk, count, block, packed, h, decays, sizes):
    """Keep the states and decays of `count` steps from the state h[0].

    h[i] `(N, 16)` is the state before step i, and `decays[i]` its decay.
    """
    state = sizes.state_size * LANES
    for i in range(count):
        delta = load(chunk.delta, i * LANES)
        delta_u = multiply(delta, load(chunk.u, i * LANES))
        B = i * sizes.projected + sizes.rank
        for n in range(sizes.state_size):
            at = i * state + n * LANES
            decay = exp2(multiply(delta, load(packed.A, block * state + n * LANES)))
            added = multiply(delta_u, load_splat(chunk.projected, B + n))
            store(decays, at, decay)
            store(h, at + state, multiply_add(decay, load(h, at), added))


@compiled
def keep_starts(starts, b, k, blocks, inputs, packed, chunk, h, decays):
    """Compute the states before each chunk of group k of image b, for a range of blocks of channels."""
    sizes = inputs.sizes
    length = (sizes.height + 1) // 2 * ((sizes.width + 1) // 2)
    num_chunks = (length + CHUNK_LENGTH - 1) // CHUNK_LENGTH
    num_blocks = (sizes.channels + LANES - 1) // LANES
    state = sizes.state_size * LANES
    first = (b * NUM_GROUPS + k) * num_chunks * num_blocks
    for block in blocks:
        for n in range(0, state, LANES):
            store(starts, (first + block) * state + n, splat(float32(0.0)))
    for c in range(num_chunks - 1):
        project_chunk(chunk, c * CHUNK_LENGTH, CHUNK_LENGTH, b, k, inputs, packed)
        for block in blocks:
            start = (first + c * num_blocks + block) * state
            load_u_and_delta(chunk, CHUNK_LENGTH, block, inputs.u, packed, sizes)
            copy_state(starts, start, h, 0, sizes.state_size)
            keep_states(chunk, CHUNK_LENGTH, block, packed, h, decays, sizes)
            copy_state(h, CHUNK_LENGTH * state, starts, start + num_blocks * state, sizes.state_size)


class BwdWorkspace(NamedTuple):
    """Workspace of a thread for the backward pass."""

    h: np.ndarray  # (T + 1, N, 16), states before each step of a chunk, and after the last
    decays: np.ndarray  # (T, N, 16)
    adjoint: np.ndarray  # (blocks, N, 16), of the state after the current step, through all later steps
    sum_A: np.ndarray  # (blocks, N, 16)
    sum_weight: np.ndarray  # (blocks, R, 16)
    sum_bias: np.ndarray  # (blocks, 16)
    sum_skip: np.ndarray  # (blocks, 16)
    by_lane: np.ndarray  # (T, sizes.projected, 16): gradients of dt, B and C, summed over channels 16 apart


@compiled
def new_bwd_workspace(sizes):
    num_blocks = (sizes.channels + LANES - 1) // LANES
    state = sizes.state_size * LANES
    return BwdWorkspace(
        new_floats((CHUNK_LENGTH + 1) * state),
        new_floats(CHUNK_LENGTH * state),
        new_floats(num_blocks * state),
        new_floats(num_blocks * state),
        new_floats(num_blocks * sizes.rank * LANES),
        new_floats(num_blocks * LANES),
        new_floats(num_blocks * LANES),
        new_floats(CHUNK_LENGTH * sizes.projected * LANES),
    )


@compiled
def scan_bwd_job(job, inputs, starts, has_starts, gradients, packed, chunk, workspace):
    """Compute the gradients of the recurrence for one job of (B, K, splits of the blocks of channels)."""
    u, _, parameters, sizes, num_splits = inputs
    grad_y, grad_u, grad_projected, grad_parameters = gradients
    state_size, rank, size = sizes.state_size, sizes.rank, sizes.projected
    state = state_size * LANES
    length = (sizes.height + 1) // 2 * ((sizes.width + 1) // 2)
    num_chunks = (length + CHUNK_LENGTH - 1) // CHUNK_LENGTH
    num_blocks = (sizes.channels + LANES - 1) // LANES
    h, decays, adjoint, sum_A, sum_weight, sum_bias, sum_skip, by_lane = workspace
    zero = splat(float32(0.0))
    split, k, b = job % num_splits, job // num_splits % NUM_GROUPS, job // num_splits // NUM_GROUPS
    first_block, last_block = num_blocks * split // num_splits, num_blocks * (split + 1) // num_splits
    y_start = b * sizes.height * sizes.width * sizes.channels
    pack_parameters(packed, parameters, k, sizes)
    if not has_starts:
        keep_starts(starts, b, k, range(first_block, last_block), inputs, packed, chunk, h, decays)

    adjoint[:] = float32(0.0)
    sum_A[:] = float32(0.0)
    sum_weight[:] = float32(0.0)
    sum_bias[:] = float32(0.0)
    sum_skip[:] = float32(0.0)
    for c in range(num_chunks - 1, -1, -1):
        count = min(CHUNK_LENGTH, length - c * CHUNK_LENGTH)
        project_chunk(chunk, c * CHUNK_LENGTH, count, b, k, inputs, packed)
        by_lane[:] = float32(0.0)
        for block in range(first_block, last_block):
            channel = block * LANES
            existing = min(LANES, sizes.channels - channel)
            skip = load(packed.D, channel)
            load_u_and_delta(chunk, count, block, u, packed, sizes)
            start = (((b * NUM_GROUPS + k) * num_chunks + c) * num_blocks + block) * state
            copy_state(starts, start, h, 0, state_size)
            keep_states(chunk, count, block, packed, h, decays, sizes)
            for i in range(count - 1, -1, -1):
                is_inside = chunk.pixel[i] >= 0
                pixel = y_start + chunk.pixel[i] * sizes.channels + channel
                grad_y_t = load_first(grad_y, pixel, existing if is_inside else 0)
                delta, u_t = load(chunk.delta, i * LANES), load(chunk.u, i * LANES)
                delta_u = multiply(delta, u_t)
                grad_delta_u = grad_delta = zero
                dt = i * size
                B, C = dt + rank, dt + rank + state_size
                for n in range(state_size):
                    at, here = i * state + n * LANES, block * state + n * LANES
                    to_B, to_C = (B + n) * LANES, (C + n) * LANES
                    adjoint_n = multiply_add(grad_y_t, load_splat(chunk.projected, C + n), load(adjoint, here))
                    before = multiply(adjoint_n, load(decays, at))  # the adjoint of the state before this step
                    through_decay = multiply(before, load(h, at))
                    store(adjoint, here, before)
                    store(sum_A, here, multiply_add(through_decay, delta, load(sum_A, here)))
                    store(by_lane, to_B, multiply_add(adjoint_n, delta_u, load(by_lane, to_B)))
                    store(by_lane, to_C, multiply_add(grad_y_t, load(h, at + state), load(by_lane, to_C)))
                    grad_delta_u = multiply_add(adjoint_n, load_splat(chunk.projected, B + n), grad_delta_u)
                    grad_delta = multiply_add(through_decay, load(packed.A, here), grad_delta)
                # A is in units of log 2
                grad_delta = multiply_add(u_t, grad_delta_u, multiply(grad_delta, splat(LOG_2)))
                grad_raw = multiply(grad_delta, sigmoid(load(chunk.raw, i * LANES)))
                for r in range(rank):
                    at, to_dt = (block * rank + r) * LANES, (dt + r) * LANES
                    dt_r = load_splat(chunk.projected, dt + r)
                    store(sum_weight, at, multiply_add(grad_raw, dt_r, load(sum_weight, at)))
                    weight = load(packed.dt_proj_weight, at)
                    store(by_lane, to_dt, multiply_add(grad_raw, weight, load(by_lane, to_dt)))
                store(sum_bias, channel, add(load(sum_bias, channel), grad_raw))
                store(sum_skip, channel, multiply_add(grad_y_t, u_t, load(sum_skip, channel)))
                if is_inside:
                    grad_u_t = multiply_add(delta, grad_delta_u, multiply(skip, grad_y_t))
                    store_first(grad_u, pixel, grad_u_t, existing)
        for i in range(count):
            out = (job * length + chunk.cell[i]) * size
            for j in range(0, size, LANES):
                store(grad_projected, out + j, lane_sums(by_lane, (i * size + j) * LANES))

    for d in range(first_block * LANES, min(last_block * LANES, sizes.channels)):
        block, lane = d // LANES, d % LANES
        out = (b * NUM_GROUPS + k) * sizes.channels + d
        grad_parameters.dt_proj_bias[out] = sum_bias[d]
        grad_parameters.D[out] = sum_skip[d]
        for r in range(rank):
            weight = sum_weight[(block * rank + r) * LANES + lane]
            grad_parameters.dt_proj_weight[out * rank + r] = weight
        for n in range(state_size):
            # the derivative of A by A_log is A itself
            at = (block * state_size + n) * LANES + lane
            grad_parameters.A_log[out * state_size + n] = sum_A[at] * packed.A[at] * LOG_2


def scan_bwd_jobs(pointer):
    """Process jobs until none is left. `pointer` points to a record `SCAN_BWD_WORK`. Its type names a map's dtype."""
    work = carray(untyped(pointer), 1, SCAN_BWD_WORK)[0]
    inputs = inputs_in(work, map_pointer(pointer, work.u))
    gradients = gradients_in(work, map_pointer(pointer, work.grad_y))
    packed, chunk = new_packed_parameters(inputs.sizes), new_chunk(inputs.sizes)
    workspace, starts = new_bwd_workspace(inputs.sizes), float_pointer(work.starts)
    job = claim_job(pointer)
    while job < work.num_jobs:
        scan_bwd_job(job, inputs, starts, work.has_starts == 1, gradients, packed, chunk, workspace)
        finish_job(pointer)
        job = claim_job(pointer)


def with_dense_channels(hidden_states: torch.Tensor) -> torch.Tensor:
    """Return the feature map with dense channels, in a dtype that kernels read. All other strides are kept."""
    u = readable(hidden_states.detach())
    return u if u.stride(-1) == 1 else u.contiguous()


class PreparedCall(NamedTuple):
    """The arguments in the layout of the kernels, and the common fields of the work records."""

    u: torch.Tensor  # (B, H, W, D), channels dense
    parameters: list[torch.Tensor]  # float32, dense
    work: dict[str, int | torch.Tensor]


def prepare_call(arguments: tuple[torch.Tensor, ...]) -> PreparedCall:
    hidden_states, *parameters = arguments
    u = with_dense_channels(hidden_states)
    parameters = [parameter.detach().float().contiguous() for parameter in parameters]
    batch_size, height, width, channels = u.shape
    rank, state_size = parameters[1].shape[-1], parameters[3].shape[-1]
    projected = math.ceil((rank + 2 * state_size) / LANES) * LANES
    # split only if there are fewer images and groups than threads, since each part projects all channels again
    num_splits = math.ceil(torch.get_num_threads() / (batch_size * NUM_GROUPS))
    num_splits = min(num_splits, math.ceil(channels / LANES))
    work = {
        "num_jobs": batch_size * NUM_GROUPS * num_splits,
        "u": u,
        **Strides(*u.stride()[:3])._asdict(),
        **Sizes(height, width, channels, rank, state_size, projected)._asdict(),
        "num_splits": num_splits,
        **dict(zip(Parameters._fields, parameters, strict=True)),
    }
    return PreparedCall(u, parameters, work)


def forward(
    hidden_states: torch.Tensor,  # (B, H, W, D)
    x_proj_weight: torch.Tensor,  # (K, R + 2N, D)
    dt_proj_weight: torch.Tensor,  # (K, D, R)
    dt_proj_bias: torch.Tensor,  # (K, D)
    A_log: torch.Tensor,  # (K, D, N)
    D: torch.Tensor,  # (K, D)
) -> torch.Tensor:  # (B, H, W, D)
    """Compute the operator in float32. Returns the dtype of `hidden_states`."""
    call = prepare_call((hidden_states, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D))
    y = call.u.new_empty(call.u.shape)
    run_jobs(compiled_kernel(scan_fwd_jobs, y.dtype), SCAN_FWD_WORK, call.work | {"starts": 0, "y": y})
    return y.to(hidden_states.dtype)


def shape_of_states(hidden_states: torch.Tensor, A_log: torch.Tensor) -> tuple[int, ...]:
    """Return the shape of the states before each chunk: (B, K, chunks, blocks, N, 16)."""
    batch_size, height, width, channels = hidden_states.shape
    length = (height + 1) // 2 * ((width + 1) // 2)
    num_chunks, num_blocks = -(-length // CHUNK_LENGTH), -(-channels // LANES)  # without floats, for traced sizes
    return batch_size, NUM_GROUPS, num_chunks, num_blocks, A_log.shape[-1], LANES


def forward_keeping_states(
    hidden_states: torch.Tensor,
    x_proj_weight: torch.Tensor,
    dt_proj_weight: torch.Tensor,
    dt_proj_bias: torch.Tensor,
    A_log: torch.Tensor,
    D: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output of `forward`, and the states before each chunk in float32 for `backward_from_states`."""
    call = prepare_call((hidden_states, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D))
    y = call.u.new_empty(call.u.shape)
    starts = y.new_empty(shape_of_states(hidden_states, A_log), dtype=torch.float32)
    run_jobs(compiled_kernel(scan_fwd_jobs, y.dtype), SCAN_FWD_WORK, call.work | {"starts": starts, "y": y})
    return y.to(hidden_states.dtype), starts


def backward(grad: torch.Tensor, *arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the gradients of the six arguments of `forward`, each in the dtype of its argument."""
    return backward_from_states(grad, None, *arguments)


def backward_from_states(
    grad: torch.Tensor,  # (B, H, W, D)
    starts: torch.Tensor | None,  # (B, K, chunks, blocks, N, 16)
    hidden_states: torch.Tensor,  # (B, H, W, D)
    x_proj_weight: torch.Tensor,  # (K, R + 2N, D)
    dt_proj_weight: torch.Tensor,  # (K, D, R)
    dt_proj_bias: torch.Tensor,  # (K, D)
    A_log: torch.Tensor,  # (K, D, N)
    D: torch.Tensor,  # (K, D)
) -> tuple[torch.Tensor, ...]:
    """Return the same as `backward`. Computes the states of `forward_keeping_states` if they are not given."""
    arguments = (hidden_states, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D)
    u, parameters, work = prepare_call(arguments)
    batch_size, height, width, _ = u.shape
    grad = readable(grad.detach().to(hidden_states.dtype)).contiguous()
    work["has_starts"] = int(starts is not None)
    if starts is None:
        starts = u.new_empty(shape_of_states(hidden_states, A_log), dtype=torch.float32)
    grad_u = u.new_empty(u.shape, dtype=torch.float32)
    grad_projected = grad_u.new_empty(
        batch_size, NUM_GROUPS, work["num_splits"], (height + 1) // 2, (width + 1) // 2, work["projected"]
    )
    weight, *others = parameters
    grad_weight, *grad_others = (
        torch.empty_like(weight),
        *(grad_u.new_empty(batch_size, *other.shape) for other in others),
    )
    outputs = (starts.contiguous(), grad, grad_u, grad_projected, grad_weight, *grad_others)
    names = SCAN_BWD_WORK.names[-len(outputs) :]
    run_jobs(compiled_kernel(scan_bwd_jobs, u.dtype), SCAN_BWD_WORK, work | dict(zip(names, outputs, strict=True)))

    # (B, K, rows, columns, R + 2N); one split is neither added nor copied
    grad_projected = reduce(torch.add, grad_projected.unbind(dim=2))[..., : weight.shape[1]]
    with without_autocast(u.device):
        for k in range(NUM_GROUPS):
            u_k = u[:, k % 2 :: 2, k // 2 :: 2]  # the pixels of the group
            grad_k = grad_projected[:, k, : u_k.shape[1], : u_k.shape[2]].flatten(0, 2)  # (pixels, R + 2N)
            grad_u[:, k % 2 :: 2, k // 2 :: 2] += (grad_k @ weight[k]).view(u_k.shape)
            grad_weight[k] = grad_k.T @ u_k.float().flatten(0, 2)

    gradients = (grad_u, grad_weight, *(gradient.sum(dim=0) for gradient in grad_others))
    return tuple(gradient.to(argument.dtype) for gradient, argument in zip(gradients, arguments, strict=True))
