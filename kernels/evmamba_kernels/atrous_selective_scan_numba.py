"""The atrous selective scan on CPUs: Numba kernels on vectors of 16 channels.

A job is one group of one image, or a part of its channels. It walks along the sequence in chunks of `CHUNK_LENGTH`
steps: finds their pixels, projects u to dt, B and C, then runs the recurrence, 16 channels at a time. Pixels are found
by index arithmetic: neither u nor y is gathered or scattered, and of the projections, of delta and of the states
there is never more than one chunk, in the caches.

`scan_jobs` is the forward pass. `adjoint_jobs` is the backward pass: it stores the states between chunks first, then
goes through the chunks from the last, once more forward for the states of all steps and then backward for the
adjoints. Gradients through the projection are two matrix products per group, in PyTorch.

Symbols, shapes and the derivation of the adjoint: `kernels/README.md`.
"""

import math
from typing import NamedTuple

import numpy as np
import torch


try:
    from numba import njit
except ImportError as error:
    raise ImportError("the CPU kernels of the atrous selective scan need numba: pip install numba") from error

from .atrous_selective_scan_numba_simd import (
    LANES,
    add,
    exp2,
    float32,
    lane_sums,
    load,
    load_first,
    load_splat,
    multiply,
    multiply_add,
    sigmoid,
    smallest,
    softplus,
    splat,
    store,
    store_first,
)
from .atrous_selective_scan_numba_threads import run_jobs


NUM_GROUPS = 4
LOG2_E = float32(1.4426950408889634)
LOG_2 = float32(0.6931471805599453)

# Steps of a chunk: what is kept for each of them has to stay in the caches.
CHUNK_LENGTH = 32

# Pixels whose projections are made together, so that a vector of weights is loaded once for all of them.
TILE = 6

compiled = njit(nogil=True, cache=True, boundscheck=False, error_model="numpy")


class Sizes(NamedTuple):
    height: int
    width: int
    channels: int  # D
    rank: int  # R
    state_size: int  # N
    projected: int  # R + 2N, rounded up to whole vectors


class Parameters(NamedTuple):
    """Flat float32 arrays of the shapes that the operator has them in."""

    x_proj_weight: np.ndarray  # (K, R + 2N, D)
    dt_proj_weight: np.ndarray  # (K, D, R)
    dt_proj_bias: np.ndarray  # (K, D)
    A_log: np.ndarray  # (K, D, N)
    D: np.ndarray  # (K, D)


class Packed(NamedTuple):
    """The parameters of one group as the vectors that the loops read; `block` counts 16 channels."""

    x_proj_weight: np.ndarray  # (D, sizes.projected)
    dt_proj_weight: np.ndarray  # (blocks, R, 16)
    dt_proj_bias: np.ndarray  # (blocks, 16)
    A: np.ndarray  # (blocks, N, 16), in units of log 2: the decay is exp2(delta A)
    D: np.ndarray  # (blocks, 16)


class Chunk(NamedTuple):
    """The steps of a chunk."""

    source: np.ndarray  # (T), where u of the step begins, -1 beside the map
    pixel: np.ndarray  # (T), number of its pixel in the image, -1 beside the map
    cell: np.ndarray  # (T), number of its cell of 2 x 2 pixels in the image
    projected: np.ndarray  # (T, sizes.projected): dt, B, C
    raw: np.ndarray  # (T, 16), softplus^-1(delta) of one block
    delta: np.ndarray  # (T, 16)
    u: np.ndarray  # (T, 16)


@compiled
def new_packed(sizes):
    padded = (sizes.channels + LANES - 1) // LANES * LANES
    return Packed(
        np.zeros(sizes.channels * sizes.projected, np.float32),
        np.zeros(padded * sizes.rank, np.float32),
        np.zeros(padded, np.float32),
        np.zeros(padded * sizes.state_size, np.float32),
        np.zeros(padded, np.float32),
    )


@compiled
def pack(packed, parameters, k, sizes):
    """Fills `packed` with the parameters of group k. Channels that fill up the last block are zero."""
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
        exponent = smallest(splat(float32(126.0)), multiply(load(packed.A, i), splat(LOG2_E)))
        store(packed.A, i, multiply(exp2(exponent), splat(-LOG2_E)))


@compiled
def new_chunk(sizes):
    return Chunk(
        np.empty(CHUNK_LENGTH, np.int64),
        np.empty(CHUNK_LENGTH, np.int64),
        np.empty(CHUNK_LENGTH, np.int64),
        np.empty(CHUNK_LENGTH * sizes.projected, np.float32),
        np.empty(CHUNK_LENGTH * LANES, np.float32),
        np.empty(CHUNK_LENGTH * LANES, np.float32),
        np.empty(CHUNK_LENGTH * LANES, np.float32),
    )


@compiled
def read_chunk(chunk, first, count, k, u, u_start, u_strides, packed, sizes):
    """Finds the pixels of `count` steps of group k from number `first`, and projects them.

    Beside the map, where u is zero, the projections are, and delta, its bias being left, is not.
    """
    rows, columns = (sizes.height + 1) // 2, (sizes.width + 1) // 2
    for i in range(count):
        t = first + i
        row, column = (t // columns, t % columns) if k % 2 == 0 else (t % rows, t // rows)
        chunk.cell[i] = row * columns + column
        row, column = 2 * row + k % 2, 2 * column + k // 2
        is_inside = row < sizes.height and column < sizes.width
        chunk.pixel[i] = row * sizes.width + column if is_inside else -1
        chunk.source[i] = u_start + row * u_strides[1] + column * u_strides[2] if is_inside else -1

    size, projected, weight, source = sizes.projected, chunk.projected, packed.x_proj_weight, chunk.source
    for i in range(0, count, TILE):
        # the last tile may count its last step several times; steps beside the map take any pixel, cleared below
        i1, i2, i3 = min(i + 1, count - 1), min(i + 2, count - 1), min(i + 3, count - 1)
        i4, i5 = min(i + 4, count - 1), min(i + 5, count - 1)
        p0, p1, p2 = max(source[i], u_start), max(source[i1], u_start), max(source[i2], u_start)
        p3, p4, p5 = max(source[i3], u_start), max(source[i4], u_start), max(source[i5], u_start)
        for lane in range(0, size, LANES):
            s0 = s1 = s2 = s3 = s4 = s5 = splat(float32(0.0))
            w = lane
            for d in range(sizes.channels):
                weights = load(weight, w)
                w += size
                s0 = multiply_add(load_splat(u, p0 + d), weights, s0)
                s1 = multiply_add(load_splat(u, p1 + d), weights, s1)
                s2 = multiply_add(load_splat(u, p2 + d), weights, s2)
                s3 = multiply_add(load_splat(u, p3 + d), weights, s3)
                s4 = multiply_add(load_splat(u, p4 + d), weights, s4)
                s5 = multiply_add(load_splat(u, p5 + d), weights, s5)
            store(projected, i * size + lane, s0)
            store(projected, i1 * size + lane, s1)
            store(projected, i2 * size + lane, s2)
            store(projected, i3 * size + lane, s3)
            store(projected, i4 * size + lane, s4)
            store(projected, i5 * size + lane, s5)
    for i in range(count):
        if source[i] < 0:
            projected[i * size : (i + 1) * size] = float32(0.0)


@compiled
def read_block(chunk, count, block, u, packed, sizes):
    """u and delta of 16 channels. All steps at once, so that the latencies of the softplus overlap."""
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
def scan_jobs(first, last, u, u_strides, parameters, y, sizes, num_splits):
    """Jobs (B, K, splits of the blocks of channels): y (B, H, W, D) from u."""
    state_size = sizes.state_size
    length = (sizes.height + 1) // 2 * ((sizes.width + 1) // 2)
    num_blocks = (sizes.channels + LANES - 1) // LANES
    packed, chunk = new_packed(sizes), new_chunk(sizes)
    h = np.empty(num_blocks * state_size * LANES, np.float32)
    for job in range(first, last):
        split, k, b = job % num_splits, job // num_splits % NUM_GROUPS, job // num_splits // NUM_GROUPS
        pack(packed, parameters, k, sizes)
        h[:] = float32(0.0)
        y_start = b * sizes.height * sizes.width * sizes.channels
        for t in range(0, length, CHUNK_LENGTH):
            count = min(CHUNK_LENGTH, length - t)
            read_chunk(chunk, t, count, k, u, b * u_strides[0], u_strides, packed, sizes)
            for block in range(num_blocks * split // num_splits, num_blocks * (split + 1) // num_splits):
                read_block(chunk, count, block, u, packed, sizes)
                channel, state = block * LANES, block * state_size * LANES
                existing = min(LANES, sizes.channels - channel)
                skip = load(packed.D, channel)
                for i in range(count):
                    delta, u_t = load(chunk.delta, i * LANES), load(chunk.u, i * LANES)
                    delta_u, y_t = multiply(delta, u_t), multiply(skip, u_t)
                    B = i * sizes.projected + sizes.rank
                    C = B + state_size
                    for n in range(state_size):
                        at = state + n * LANES
                        decay = exp2(multiply(delta, load(packed.A, at)))
                        added = multiply(delta_u, load_splat(chunk.projected, B + n))
                        h_n = multiply_add(decay, load(h, at), added)
                        store(h, at, h_n)
                        y_t = multiply_add(h_n, load_splat(chunk.projected, C + n), y_t)
                    if chunk.pixel[i] >= 0:
                        store_first(y, y_start + chunk.pixel[i] * sizes.channels + channel, y_t, existing)


@compiled
def run_chunk(chunk, count, block, packed, h, decays, sizes):
    """Keeps the states and decays of `count` steps: h[i] (N, 16) before step i, h[0] given, `decays[i]` at step i."""
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
def copy_state(source, source_start, target, target_start, state_size):
    for n in range(0, state_size * LANES, LANES):
        store(target, target_start + n, load(source, source_start + n))


@compiled
def adjoint_jobs(
    first, last, u, u_strides, parameters, grad_y, grad_u, grad_projected, grad_parameters, sizes, num_splits
):
    """Jobs (B, K, splits of the blocks of channels): gradients of the recurrence from grad_y (B, H, W, D).

    `grad_parameters` are for each image, (B, K, ...), that of `x_proj_weight` is left alone. `grad_projected`
    (B, K, splits, rows, columns, sizes.projected) is to be summed over the splits. `grad_u` has what reaches u through
    the recurrence, not through the projection.
    """
    state_size, rank, size = sizes.state_size, sizes.rank, sizes.projected
    state = state_size * LANES
    length = (sizes.height + 1) // 2 * ((sizes.width + 1) // 2)
    num_chunks = (length + CHUNK_LENGTH - 1) // CHUNK_LENGTH
    num_blocks = (sizes.channels + LANES - 1) // LANES
    packed, chunk = new_packed(sizes), new_chunk(sizes)
    starts = np.empty((num_chunks + 1) * num_blocks * state, np.float32)  # states before each chunk
    h = np.empty((CHUNK_LENGTH + 1) * state, np.float32)
    decays = np.empty(CHUNK_LENGTH * state, np.float32)
    adjoint = np.empty(num_blocks * state, np.float32)  # of the state after the current step, through all later steps
    sum_A = np.empty(num_blocks * state, np.float32)
    sum_weight = np.empty(num_blocks * rank * LANES, np.float32)
    sum_bias, sum_skip = np.empty(num_blocks * LANES, np.float32), np.empty(num_blocks * LANES, np.float32)
    # gradients of dt, B and C, (T, sizes.projected, 16), channels that differ by a multiple of 16 added up
    by_lane = np.empty(CHUNK_LENGTH * size * LANES, np.float32)
    zero = splat(float32(0.0))
    for job in range(first, last):
        split, k, b = job % num_splits, job // num_splits % NUM_GROUPS, job // num_splits // NUM_GROUPS
        first_block, last_block = num_blocks * split // num_splits, num_blocks * (split + 1) // num_splits
        u_start, y_start = b * u_strides[0], b * sizes.height * sizes.width * sizes.channels
        pack(packed, parameters, k, sizes)

        starts[: num_blocks * state] = float32(0.0)
        for c in range(num_chunks - 1):
            read_chunk(chunk, c * CHUNK_LENGTH, CHUNK_LENGTH, k, u, u_start, u_strides, packed, sizes)
            for block in range(first_block, last_block):
                at = (c * num_blocks + block) * state
                read_block(chunk, CHUNK_LENGTH, block, u, packed, sizes)
                copy_state(starts, at, h, 0, state_size)
                run_chunk(chunk, CHUNK_LENGTH, block, packed, h, decays, sizes)
                copy_state(h, CHUNK_LENGTH * state, starts, at + num_blocks * state, state_size)

        adjoint[:] = float32(0.0)
        sum_A[:] = float32(0.0)
        sum_weight[:] = float32(0.0)
        sum_bias[:] = float32(0.0)
        sum_skip[:] = float32(0.0)
        for c in range(num_chunks - 1, -1, -1):
            count = min(CHUNK_LENGTH, length - c * CHUNK_LENGTH)
            read_chunk(chunk, c * CHUNK_LENGTH, count, k, u, u_start, u_strides, packed, sizes)
            by_lane[:] = float32(0.0)
            for block in range(first_block, last_block):
                channel = block * LANES
                existing = min(LANES, sizes.channels - channel)
                skip = load(packed.D, channel)
                read_block(chunk, count, block, u, packed, sizes)
                copy_state(starts, (c * num_blocks + block) * state, h, 0, state_size)
                run_chunk(chunk, count, block, packed, h, decays, sizes)
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
                # A_log reaches the decays through A, whose derivative is A itself
                at = (block * state_size + n) * LANES + lane
                grad_parameters.A_log[out * state_size + n] = sum_A[at] * packed.A[at] * LOG_2


def flat(tensor: torch.Tensor) -> np.ndarray:
    """The memory that a tensor spans, from its first element, as a 1-d array."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((span,), (1,)).numpy()


def with_dense_channels(hidden_states: torch.Tensor) -> torch.Tensor:
    """In float32, channels next to each other; any other strides are kept."""
    u = hidden_states.detach().float()
    return u if u.stride(-1) == 1 else u.contiguous()


def prepare(arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, list[torch.Tensor], Sizes, int]:
    """The map and the parameters as the kernels want them, their sizes, and in how many parts to share channels."""
    hidden_states, *parameters = arguments
    u = with_dense_channels(hidden_states)
    parameters = [parameter.detach().float().contiguous() for parameter in parameters]
    rank, state_size = parameters[1].shape[-1], parameters[3].shape[-1]
    sizes = Sizes(*u.shape[1:], rank, state_size, math.ceil((rank + 2 * state_size) / LANES) * LANES)
    # only where images and groups are too few for the threads: each part projects all channels for itself
    num_splits = math.ceil(torch.get_num_threads() / (u.shape[0] * NUM_GROUPS))
    return u, parameters, sizes, min(num_splits, math.ceil(sizes.channels / LANES))


def forward(
    hidden_states: torch.Tensor,  # (B, H, W, D)
    x_proj_weight: torch.Tensor,  # (K, R + 2N, D)
    dt_proj_weight: torch.Tensor,  # (K, D, R)
    dt_proj_bias: torch.Tensor,  # (K, D)
    A_log: torch.Tensor,  # (K, D, N)
    D: torch.Tensor,  # (K, D)
) -> torch.Tensor:  # (B, H, W, D)
    """The operator in float32, returned in the dtype of `hidden_states`."""
    arguments = (hidden_states, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D)
    u, parameters, sizes, num_splits = prepare(arguments)
    y = u.new_empty(u.shape)
    num_jobs = u.shape[0] * NUM_GROUPS * num_splits
    flat_parameters = Parameters(*map(flat, parameters))
    run_jobs(scan_jobs, num_jobs, flat(u), u.stride()[:3], flat_parameters, flat(y), sizes, num_splits)
    return y.to(hidden_states.dtype)


def backward(
    grad: torch.Tensor,  # (B, H, W, D)
    hidden_states: torch.Tensor,  # (B, H, W, D)
    x_proj_weight: torch.Tensor,  # (K, R + 2N, D)
    dt_proj_weight: torch.Tensor,  # (K, D, R)
    dt_proj_bias: torch.Tensor,  # (K, D)
    A_log: torch.Tensor,  # (K, D, N)
    D: torch.Tensor,  # (K, D)
) -> tuple[torch.Tensor, ...]:
    """The gradients of the six arguments of `forward`, each in the dtype of its argument."""
    arguments = (hidden_states, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D)
    u, parameters, sizes, num_splits = prepare(arguments)
    batch_size = u.shape[0]
    rows, columns = (sizes.height + 1) // 2, (sizes.width + 1) // 2
    grad_u = u.new_empty(u.shape)
    grad_projected = u.new_empty(batch_size, NUM_GROUPS, num_splits, rows, columns, sizes.projected)
    weight, *others = parameters
    grad_weight, *grad_others = torch.empty_like(weight), *(u.new_empty(batch_size, *other.shape) for other in others)
    run_jobs(
        adjoint_jobs,
        batch_size * NUM_GROUPS * num_splits,
        flat(u),
        u.stride()[:3],
        Parameters(*map(flat, parameters)),
        flat(grad.detach().float().contiguous()),
        flat(grad_u),
        flat(grad_projected),
        Parameters(*map(flat, (grad_weight, *grad_others))),
        sizes,
        num_splits,
    )

    grad_projected = grad_projected.sum(dim=2)[..., : weight.shape[1]]  # (B, K, rows, columns, R + 2N)
    for k in range(NUM_GROUPS):
        u_k = u[:, k % 2 :: 2, k // 2 :: 2]  # the pixels of the group
        grad_k = grad_projected[:, k, : u_k.shape[1], : u_k.shape[2]]
        grad_u[:, k % 2 :: 2, k // 2 :: 2] += grad_k @ weight[k]
        grad_weight[k] = grad_k.flatten(0, 2).T @ u_k.flatten(0, 2)

    gradients = (grad_u, grad_weight, *(gradient.sum(dim=0) for gradient in grad_others))
    return tuple(gradient.to(argument.dtype) for gradient, argument in zip(gradients, arguments, strict=True))
