"""The atrous selective scan on GPUs: Triton kernels, which run wherever PyTorch brings Triton (CUDA, ROCm, XPU).

The sequence of a group is cut into tiles of a few steps. A program computes one block of channels of one sequence,
tile by tile: a thread holds its channels' steps of the tile and its states in registers, lanes hold neighbouring
channels. Pixels are found by index arithmetic, u and y are neither gathered nor scattered.

    forward    project_kernel   u to dt, B and C, the only pass that sees all channels at once
               scan_kernel      the recurrence
    backward   project_kernel   again
               states_kernel    the recurrence once more, which leaves a state now and then: between segments
               adjoint_kernel   segments from the last to the first: the states between its tiles, then from its last
                                tile to its first the states inside the tile, adjoints, gradients
               unproject_kernel, weight_kernel   gradients through the projection

Where images, groups and channels are too few for the device, sequences are cut into chunks of several tiles that run
side by side: states_kernel (backward also `chunk_adjoints_kernel`) finds what every chunk adds to its end when it
starts from zero, `carry_kernel` makes of that what every chunk starts from. Decays are exp2(A * sum of delta), never a
quotient, so the carry is as exact as the recurrence.

No atomics: two runs give the same bits. Symbols, shapes and derivations: `kernels/README.md`. Floors, instruction
counts and the reasons for the layout: `benchmarks/NOTES.md`.

Naming: `i_` an index, `o_` offsets, `m_` a mask, `p_` pointers, `b_` a block of values, T the steps of a tile.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import NamedTuple

import torch


try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the GPU kernels of the atrous selective scan need triton: pip install triton") from error

OLDEST_TRITON = (3, 4)  # with tuples that loops carry

if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST_TRITON:
    raise ImportError(
        f"the GPU kernels of the atrous selective scan need triton {'.'.join(map(str, OLDEST_TRITON))} or newer, "
        f"found {triton.__version__}: install a newer PyTorch"
    )


NUM_GROUPS = 4
LARGEST_BATCH = 65535 // NUM_GROUPS  # by the size of a grid in CUDA
LOG2_E = tl.constexpr(1.4426950408889634)
LOG_2 = tl.constexpr(0.6931471805599453)

INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: kernels run as NumPy, on CPU tensors


class Config(NamedTuple):
    """Sizes that the kernels are compiled for. A program is one warp, so no step waits for another warp."""

    states: int  # carried in registers; more states take several launches
    forward_tile: int  # steps of a tile
    forward_channels: int  # channels of a program, whole warps of them
    backward_tile: int
    backward_channels: int  # in adjoint_kernel, which sums over channels: the more a thread has, the fewer shuffles
    precision: str  # of tl.dot in float32: "tf32x3" on the tensor cores of CUDA, else "ieee"
    forward_programs: int  # that find room on a multiprocessor, by the registers of scan_kernel
    backward_programs: int  # by those of adjoint_kernel


# By backend of Triton, lanes of a warp and oldest compute capability (0 but for CUDA): the first that fits.
#
# What put the rows there is the compiler's report, not a clock: the longest tiles and most channels with which every
# kernel keeps everything in registers, on sm_80, sm_90, sm_100 and gfx942. `benchmarks/triton_report.py` prints that
# report, tests check it, `benchmarks/NOTES.md` has the table. RDNA (hip, 32 lanes) and XPU were not looked at: their
# tiles are small. What measures on a device: `make bench-gpu`.
CONFIGS = {
    ("cuda", 32, 90): Config(16, 8, 32, 8, 64, "tf32x3", 11, 8),
    ("cuda", 32, 0): Config(16, 8, 32, 8, 32, "tf32x3", 11, 8),  # spills with 64 channels
    ("hip", 64, 0): Config(16, 4, 64, 8, 64, "ieee", 4, 12),  # a tile of 8 in scan_kernel takes 394 registers
    ("hip", 32, 0): Config(16, 4, 32, 4, 32, "ieee", 8, 8),
    ("xpu", 32, 0): Config(16, 4, 32, 4, 32, "ieee", 8, 8),
    # small, as most maps in tests are
    ("interpreter", 1, 0): Config(16, 4, 8, 4, 16, "ieee", 1, 1),
}

MATRIX_STEPS = 64  # of the matrix products of the projection: steps, channels and outputs of a block
MATRIX_CHANNELS = 64
MATRIX_DEPTH = 32
MATRIX_OUTPUTS = 64

# Options of Triton. Fused multiply-adds are its default in some versions only.
ONE_WARP = {"num_warps": 1, "enable_fp_fusion": True}
MATRIX_WARPS = {"num_warps": 8, "enable_fp_fusion": True}

# A chunk more costs carry_kernel about as long as this part of a tile costs scan_kernel (an eighth of the latency of a
# load from memory against 128 exponentials of a warp). An estimate, see benchmarks/NOTES.md.
CHUNK_COST = 1 / 16


class Device(NamedTuple):
    """What a configuration depends on."""

    backend: str  # of Triton
    warp_size: int
    capability: int  # 90 for 9.0, 0 but for CUDA
    multiprocessors: int


@cache
def describe_device(device: torch.device) -> Device:
    """The device, which has to be the current one."""
    if INTERPRETED:
        return Device("interpreter", 1, 0, 1)
    driver = triton.runtime.driver.active
    target = driver.get_current_target()
    properties = driver.utils.get_device_properties(driver.get_current_device())
    capability = target.arch if target.backend == "cuda" else 0
    return Device(target.backend, target.warp_size, capability, properties["multiprocessor_count"])


def find_config(device: Device) -> Config:
    """The row of `CONFIGS` for a device.

    Raises:
        ValueError: for a device that has none.
    """
    for (backend, warp_size, oldest), config in CONFIGS.items():
        if (backend, warp_size) == (device.backend, device.warp_size) and device.capability >= oldest:
            return config
    raise ValueError(
        f"the Triton kernels have no configuration for {device.backend} with {device.warp_size} lanes: choose the "
        "backend 'torch'"
    )


# -- what the kernels share ------------------------------------------------------------------------------------------


@triton.jit
def softplus(x):
    """log(1 + exp(x)) = max(x, 0) + log(1 + e), e = exp(-|x|), without loss for small e:
    log(1 + e) = 2 atanh(s), s = e / (2 + e), with a minimax polynomial in s^2."""
    e = tl.exp2(tl.abs(x) * -LOG2_E)
    s = e / (2.0 + e)
    q = s * s
    p = tl.fma(q, 1.400599368e-01, 1.400090257e-01)
    p = tl.fma(p, q, 2.001076362e-01)
    p = tl.fma(p, q, 3.333320814e-01)
    p = tl.fma(p, q, 1.0)
    return tl.maximum(x, 0.0) + 2.0 * s * p


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), the derivative of softplus."""
    e = tl.exp2(tl.abs(x) * -LOG2_E)
    return tl.where(x < 0.0, e, 1.0) / (1.0 + e)


@triton.jit
def load_A(p_A_log, m_d):
    """A in units of log 2, so that a decay is exp2(delta A)."""
    return -tl.exp2(tl.load(p_A_log, mask=m_d, other=0.0).to(tl.float32) * LOG2_E) * LOG2_E


@triton.jit
def mask_if(condition, o_d, channels):
    """The channels that exist where a scalar condition holds, else none.

    In the interpreter of Triton 3.9, a mask and a scalar do not give a mask.
    """
    return o_d < tl.where(condition, channels, 0)


@triton.jit
def find_steps(
    i_step, i_k, height, width, stride_h, stride_w, T: tl.constexpr, LONG_LINES: tl.constexpr, WIDE: tl.constexpr
):
    """Where T steps of group `i_k` from number `i_step` on lie in an image.

    A line is a row of the group's pixels in the even groups, a column in the odd ones. `LONG_LINES` tells that no line
    is shorter than T, so that T steps lie on two lines at most, and `WIDE` that an image spans 2^31 elements or more.

    Returns:
        The offset of the first step from the image's first element, int64; the offsets of all from that one (T), int64
        if `WIDE` else int32; and which steps are on the map (T).
    """
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    parity_h, parity_w = i_k % 2, i_k // 2
    by_row = parity_h == 0
    line_length = tl.where(by_row, width + 1, height + 1) // 2
    lines_inside = tl.where(by_row, height - parity_h + 1, width - parity_w + 1) // 2
    places_inside = tl.where(by_row, width - parity_w + 1, height - parity_h + 1) // 2
    stride_h, stride_w = tl.cast(stride_h, tl.int64), tl.cast(stride_w, tl.int64)
    to_next_line = 2 * tl.where(by_row, stride_h, stride_w)
    to_next_place = 2 * tl.where(by_row, stride_w, stride_h)

    i_line, i_place = i_step // line_length, i_step % line_length
    o_t = tl.arange(0, T)
    place = i_place + o_t
    lines_on = (place >= line_length).to(tl.int32) if LONG_LINES else place // line_length
    inside = (i_line + lines_on < lines_inside) & (place - lines_on * line_length < places_inside)
    start = parity_h * stride_h + parity_w * stride_w + i_line * to_next_line + i_place * to_next_place
    to_line_start = (to_next_line - line_length * to_next_place).to(INDEX)
    return start, o_t * to_next_place.to(INDEX) + lines_on * to_line_start, inside


@triton.jit
def load_time_steps(p_projected, p_weight, stride_r, b_bias, m_d, R, T: tl.constexpr):
    """softplus^-1(delta) of a tile, (T, channels). `p_projected` (T) points to the tile's first row, which is dt,
    `p_weight` (channels) to the weights of its first element; those of the next are `stride_r` further."""
    b_raw = tl.zeros([T, b_bias.shape[0]], tl.float32) + b_bias[None, :]
    for r in range(R):
        b_weight = tl.load(p_weight + r * stride_r, mask=m_d, other=0.0).to(tl.float32)
        b_raw = tl.fma(tl.load(p_projected + r * T)[:, None], b_weight[None, :], b_raw)
    return b_raw


@triton.jit
def then(decay_1, state_1, decay_2, state_2):
    """One stretch of the recurrence after another: what it multiplies the state before it by, and what it adds."""
    return decay_1 * decay_2, tl.fma(decay_2, state_1, state_2)


@triton.jit
def run_states(b_decay, b_added, b_state):
    """The recurrence along a tile: the state after each of its steps (T, channels), and after the last (channels).

    Where T lies in the registers of one thread, this is one multiply-add a step: products of decays that nobody asks
    for, the compiler leaves out.
    """
    is_first = tl.arange(0, b_decay.shape[0])[:, None] == 0
    b_added = tl.where(is_first, tl.fma(b_decay, b_state[None, :], b_added), b_added)
    _, b_states = tl.associative_scan((b_decay, b_added), 0, then)
    # a sum of integers: of floats, compilers must not drop the zeros
    is_last = tl.arange(0, b_decay.shape[0])[:, None] == b_decay.shape[0] - 1
    b_last = tl.sum(tl.where(is_last, b_states.to(tl.int32, bitcast=True), 0), 0).to(tl.float32, bitcast=True)
    return b_states, b_last


# -- forward kernels -------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["height", "width", "num_tiles"])
def project_kernel(
    u,  # (B, H, W, D)
    weight,  # (K, R + 2N, D)
    projected,  # (B, K, tiles, R + 2N, T), zeros beside the map
    height,
    width,
    channels,
    outputs,
    num_tiles,
    stride_b,
    stride_h,
    stride_w,
    T: tl.constexpr,
    STEPS: tl.constexpr,
    DEPTH: tl.constexpr,
    OUTPUTS: tl.constexpr,
    LONG_LINES: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dt, B and C of `STEPS` steps: one matrix product per group.

    The result lies tile by tile, so that a thread of the other kernels reads the T values of an output at once, and
    finds all of a tile from one address.
    """
    i_block, i_output, i_bk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_b, i_k = (i_bk // 4).to(tl.int64), i_bk % 4
    o_step = i_block * STEPS + tl.arange(0, STEPS)
    o_output = i_output * OUTPUTS + tl.arange(0, OUTPUTS)
    start, o_in_map, m_step = find_steps(
        i_block * STEPS, i_k, height, width, stride_h, stride_w, STEPS, LONG_LINES, WIDE
    )
    p_u = u + i_b * stride_b + start + o_in_map[:, None]
    p_weight = weight + (i_k * outputs + o_output)[None, :] * channels

    b_sum = tl.zeros([STEPS, OUTPUTS], tl.float32)
    for i_d in range(0, channels, DEPTH):
        o_d = i_d + tl.arange(0, DEPTH)
        m_d = o_d < channels
        b_u = tl.load(p_u + o_d[None, :], mask=m_step[:, None] & m_d[None, :], other=0.0)
        b_weight = tl.load(p_weight + o_d[:, None], mask=m_d[:, None] & (o_output < outputs)[None, :], other=0.0)
        b_sum = tl.dot(b_u.to(tl.float32), b_weight.to(tl.float32), b_sum, input_precision=PRECISION)

    i_tile = (i_bk.to(tl.int64) * num_tiles + o_step // T)[:, None]
    p_projected = projected + (i_tile * outputs + o_output[None, :]) * T + (o_step % T)[:, None]
    tl.store(p_projected, b_sum, mask=(o_step < num_tiles * T)[:, None] & (o_output < outputs)[None, :])


@triton.jit(
    do_not_specialize=[
        *("height", "width", "channels", "num_tiles", "chunk_tiles", "segment_tiles"),
        *("stride_b", "stride_h", "stride_w"),
    ]
)
def states_kernel(
    u,  # (B, H, W, D)
    projected,  # (B, K, tiles, R + 2N, T)
    dt_proj_weight,  # (K, D, R)
    dt_proj_bias,  # (K, D)
    A_log,  # (K, D, N)
    states,  # (B, K, chunks, segments, N, D)
    time,  # (B, K, chunks, segments, D)
    height,
    width,
    channels,
    num_tiles,
    chunk_tiles,
    segment_tiles,
    stride_b,
    stride_h,
    stride_w,
    N: tl.constexpr,
    FIRST_STATE: tl.constexpr,
    STATES: tl.constexpr,
    R: tl.constexpr,
    T: tl.constexpr,
    CHANNELS: tl.constexpr,
    LONG_LINES: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The recurrence of a chunk from zero: the state and the sum of delta so far, after each of its segments."""
    i_d, i_chunk, i_bk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_b, i_k = (i_bk // 4).to(tl.int64), i_bk % 4
    o_d = i_d * CHANNELS + tl.arange(0, CHANNELS)
    m_d = o_d < channels
    i_kd = i_k * channels + o_d
    b_bias = tl.load(dt_proj_bias + i_kd, mask=m_d, other=0.0).to(tl.float32)
    b_A, b_state = (), ()
    for n in tl.static_range(STATES):
        b_A = b_A + (load_A(A_log + i_kd * N + FIRST_STATE + n, m_d),)  # noqa: RUF005, Triton has no star in tuples
        b_state = b_state + (tl.zeros([CHANNELS], tl.float32),)  # noqa: RUF005
    b_time = tl.zeros([CHANNELS], tl.float32)

    first_tile = i_chunk * chunk_tiles
    end_tile = tl.minimum(first_tile + chunk_tiles, num_tiles)
    i_first_segment = (i_bk.to(tl.int64) * tl.num_programs(1) + i_chunk) * tl.cdiv(chunk_tiles, segment_tiles)
    for i in range(first_tile, end_tile):
        start, o_steps, m_steps = find_steps(i * T, i_k, height, width, stride_h, stride_w, T, LONG_LINES, WIDE)
        p_u = u + i_b * stride_b + start + (o_steps[:, None] + o_d[None, :])
        b_u = tl.load(p_u, mask=m_steps[:, None] & m_d[None, :], other=0.0).to(tl.float32)
        i_tile = i_bk.to(tl.int64) * num_tiles + i
        p_tile = projected + i_tile * ((R + 2 * N) * T) + tl.arange(0, T)
        b_delta = softplus(load_time_steps(p_tile, dt_proj_weight + i_kd * R, 1, b_bias, m_d, R, T))
        b_delta_u = b_delta * b_u
        b_time += tl.sum(b_delta, 0)
        p_B = p_tile + (R + FIRST_STATE) * T
        b_next = ()
        for n in tl.static_range(STATES):
            b_B = tl.load(p_B + n * T)
            _, b_end = run_states(tl.exp2(b_delta * b_A[n][None, :]), b_delta_u * b_B[:, None], b_state[n])
            b_next = b_next + (b_end,)  # noqa: RUF005
        b_state = b_next

        is_end = ((i + 1 - first_tile) % segment_tiles == 0) | (i + 1 == end_tile)
        m_end = mask_if(is_end, o_d, channels)
        i_segment = i_first_segment + (i - first_tile) // segment_tiles
        tl.store(time + i_segment * channels + o_d, b_time, mask=m_end)
        for n in tl.static_range(STATES):
            tl.store(states + (i_segment * N + FIRST_STATE + n) * channels + o_d, b_state[n], mask=m_end)


@triton.jit(
    do_not_specialize=[
        *("channels", "state_size", "num_chunks", "first", "direction", "ends_per_chunk", "times_per_chunk"),
    ]
)
def carry_kernel(
    ends,  # (B, K, chunks, ends, N, D), of which a chunk's last counts
    time,  # (B, K, chunks, times, D), likewise
    A_log,  # (K, D, N)
    carried,  # (B, K, chunks, N, D)
    channels,
    state_size,
    num_chunks,
    ends_per_chunk,
    times_per_chunk,
    first,
    direction,
    CHUNKS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """What every chunk starts from, by the recurrence over chunks: from the `first` in the `direction` 1 or -1.

    The first chunk starts from nothing; its place in `carried` stays as it is.
    """
    i_d, n, i_bk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_d = i_d * CHANNELS + tl.arange(0, CHANNELS)
    m_d = o_d < channels
    b_A = load_A(A_log + (i_bk % 4 * channels + o_d) * state_size + n, m_d)
    b_state = tl.zeros([CHANNELS], tl.float32)
    for i in range(0, num_chunks, CHUNKS):
        o_count = i + tl.arange(0, CHUNKS)
        o_chunk = first + direction * o_count
        i_chunk = i_bk.to(tl.int64) * num_chunks + o_chunk
        i_end = i_chunk * ends_per_chunk + ends_per_chunk - 1
        i_time = i_chunk * times_per_chunk + times_per_chunk - 1
        mask = (o_count < num_chunks - 1)[:, None] & m_d[None, :]  # the last chunk's end is nobody's start
        b_end = tl.load(ends + ((i_end * state_size + n) * channels)[:, None] + o_d[None, :], mask=mask, other=0.0)
        # nothing decays before the first, which may be the last chunk, and short of segments
        m_time = mask & (o_count > 0)[:, None]
        b_time = tl.load(time + (i_time * channels)[:, None] + o_d[None, :], mask=m_time, other=0.0)
        b_states, b_state = run_states(tl.exp2(b_time * b_A[None, :]), b_end, b_state)
        i_carried = (i_chunk + direction) * state_size + n
        tl.store(carried + (i_carried * channels)[:, None] + o_d[None, :], b_states, mask=mask)


@triton.jit(
    do_not_specialize=[
        *("height", "width", "channels", "num_tiles", "chunk_tiles", "num_chunks"),
        *("stride_b", "stride_h", "stride_w", "y_stride_b", "y_stride_h", "y_stride_w"),
    ]
)
def scan_kernel(
    u,  # (B, H, W, D)
    projected,  # (B, K, tiles, R + 2N, T)
    dt_proj_weight,  # (K, D, R)
    dt_proj_bias,  # (K, D)
    A_log,  # (K, D, N)
    D,  # (K, D)
    carried,  # (B, K, chunks, N, D), states before each chunk but the first
    y,  # (B, H, W, D)
    height,
    width,
    channels,
    num_tiles,
    chunk_tiles,
    num_chunks,
    stride_b,
    stride_h,
    stride_w,
    y_stride_b,
    y_stride_h,
    y_stride_w,
    N: tl.constexpr,
    FIRST_STATE: tl.constexpr,
    STATES: tl.constexpr,
    R: tl.constexpr,
    T: tl.constexpr,
    CHANNELS: tl.constexpr,
    LONG_LINES: tl.constexpr,
    WIDE: tl.constexpr,
):
    """h = exp(delta A) h + (delta u) B and y = h C + D u along a chunk, with delta = softplus(weight dt + bias).

    For `STATES` of the states, from `FIRST_STATE` on; those after the first ones are added to y, then float32.
    """
    i_d, i_chunk, i_bk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_b, i_k = (i_bk // 4).to(tl.int64), i_bk % 4
    o_d = i_d * CHANNELS + tl.arange(0, CHANNELS)
    m_d = o_d < channels
    i_kd = i_k * channels + o_d
    b_bias = tl.load(dt_proj_bias + i_kd, mask=m_d, other=0.0).to(tl.float32)
    b_skip = tl.load(D + i_kd, mask=m_d, other=0.0).to(tl.float32)
    b_A, b_state = (), ()
    i_state = (i_bk.to(tl.int64) * num_chunks + i_chunk) * N + FIRST_STATE
    p_carried = carried + i_state * channels + o_d
    for n in tl.static_range(STATES):
        b_A = b_A + (load_A(A_log + i_kd * N + FIRST_STATE + n, m_d),)  # noqa: RUF005
        b_start = tl.load(p_carried + n * channels, mask=mask_if(i_chunk > 0, o_d, channels), other=0.0)
        b_state = b_state + (b_start,)  # noqa: RUF005

    first_tile = i_chunk * chunk_tiles
    for i in range(first_tile, tl.minimum(first_tile + chunk_tiles, num_tiles)):
        start, o_steps, m_steps = find_steps(i * T, i_k, height, width, stride_h, stride_w, T, LONG_LINES, WIDE)
        mask = m_steps[:, None] & m_d[None, :]
        p_u = u + i_b * stride_b + start + (o_steps[:, None] + o_d[None, :])
        b_u = tl.load(p_u, mask=mask, other=0.0).to(tl.float32)
        i_tile = i_bk.to(tl.int64) * num_tiles + i
        p_tile = projected + i_tile * ((R + 2 * N) * T) + tl.arange(0, T)
        b_delta = softplus(load_time_steps(p_tile, dt_proj_weight + i_kd * R, 1, b_bias, m_d, R, T))
        b_delta_u = b_delta * b_u
        b_y = b_skip[None, :] * b_u if FIRST_STATE == 0 else tl.zeros([T, CHANNELS], tl.float32)
        p_B = p_tile + (R + FIRST_STATE) * T
        p_C = p_B + N * T
        b_next = ()
        for n in tl.static_range(STATES):
            b_B = tl.load(p_B + n * T)
            b_C = tl.load(p_C + n * T)
            b_states, b_end = run_states(tl.exp2(b_delta * b_A[n][None, :]), b_delta_u * b_B[:, None], b_state[n])
            b_y = tl.fma(b_states, b_C[:, None], b_y)
            b_next = b_next + (b_end,)  # noqa: RUF005
        b_state = b_next
        start, o_steps, _ = find_steps(i * T, i_k, height, width, y_stride_h, y_stride_w, T, LONG_LINES, WIDE)
        p_y = y + i_b * y_stride_b + start + (o_steps[:, None] + o_d[None, :])
        if FIRST_STATE > 0:
            b_y += tl.load(p_y, mask=mask, other=0.0)
        tl.store(p_y, b_y.to(y.dtype.element_ty), mask=mask)


# -- backward kernels ------------------------------------------------------------------------------------------------


@triton.jit
def run_kept(b_decay, b_added, b_state):
    """As `run_states`, but what a step keeps of the state before it (T, channels), without the cancellation that the
    state after it less what it adds would have.

    A scan cannot tell its steps apart, so this goes from step to step. Where T lies in the registers of one thread,
    nothing is left of picking a step and putting it back, if it is a sum of integers: of floats, compilers must not
    drop the zeros.
    """
    b_decay_bits, b_added_bits = b_decay.to(tl.int32, bitcast=True), b_added.to(tl.int32, bitcast=True)
    b_kept = b_added
    for t in tl.static_range(b_decay.shape[0]):
        is_t = tl.arange(0, b_decay.shape[0])[:, None] == t
        b_step = tl.sum(tl.where(is_t, b_decay_bits, 0), 0).to(tl.float32, bitcast=True) * b_state
        b_state = b_step + tl.sum(tl.where(is_t, b_added_bits, 0), 0).to(tl.float32, bitcast=True)
        b_kept = tl.where(is_t, b_step[None, :], b_kept)
    return b_kept


@triton.jit
def run_adjoints(b_decay, b_reached, b_adjoint):
    """The recurrence of the adjoint, from the last step of a tile to the first, made like `run_kept`.

    The state after a step is reached by its output, which gives `b_reached`, and by the next step.

    Returns:
        The adjoint of the state after each step (T, channels), and of that before the tile (channels).
    """
    b_decay_bits, b_reached_bits = b_decay.to(tl.int32, bitcast=True), b_reached.to(tl.int32, bitcast=True)
    b_adjoints = b_reached
    for back in tl.static_range(b_decay.shape[0]):
        is_t = tl.arange(0, b_decay.shape[0])[:, None] == b_decay.shape[0] - 1 - back
        b_step = tl.sum(tl.where(is_t, b_reached_bits, 0), 0).to(tl.float32, bitcast=True) + b_adjoint
        b_adjoint = tl.sum(tl.where(is_t, b_decay_bits, 0), 0).to(tl.float32, bitcast=True) * b_step
        b_adjoints = tl.where(is_t, b_step[None, :], b_adjoints)
    return b_adjoints, b_adjoint


@triton.jit(
    do_not_specialize=[
        *("height", "width", "channels", "num_tiles", "chunk_tiles", "num_chunks"),
        *("stride_b", "stride_h", "stride_w"),
    ]
)
def chunk_adjoints_kernel(
    grad,  # (B, H, W, D)
    projected,  # (B, K, tiles, R + 2N, T)
    dt_proj_weight,  # (K, D, R)
    dt_proj_bias,  # (K, D)
    A_log,  # (K, D, N)
    adjoints,  # (B, K, chunks, N, D)
    height,
    width,
    channels,
    num_tiles,
    chunk_tiles,
    num_chunks,
    stride_b,
    stride_h,
    stride_w,
    N: tl.constexpr,
    FIRST_STATE: tl.constexpr,
    STATES: tl.constexpr,
    R: tl.constexpr,
    T: tl.constexpr,
    CHANNELS: tl.constexpr,
    LONG_LINES: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The adjoint of the state before every chunk but the first, as far as the chunk's own outputs reach it."""
    i_d, i_chunk, i_bk = tl.program_id(0), tl.program_id(1) + 1, tl.program_id(2)
    i_b, i_k = (i_bk // 4).to(tl.int64), i_bk % 4
    o_d = i_d * CHANNELS + tl.arange(0, CHANNELS)
    m_d = o_d < channels
    i_kd = i_k * channels + o_d
    b_bias = tl.load(dt_proj_bias + i_kd, mask=m_d, other=0.0).to(tl.float32)
    b_A, b_adjoint = (), ()
    for n in tl.static_range(STATES):
        b_A = b_A + (load_A(A_log + i_kd * N + FIRST_STATE + n, m_d),)  # noqa: RUF005
        b_adjoint = b_adjoint + (tl.zeros([CHANNELS], tl.float32),)  # noqa: RUF005

    first_tile = i_chunk * chunk_tiles
    last_tile = tl.minimum(first_tile + chunk_tiles, num_tiles) - 1
    for count in range(last_tile + 1 - first_tile):
        i = last_tile - count
        start, o_steps, m_steps = find_steps(i * T, i_k, height, width, stride_h, stride_w, T, LONG_LINES, WIDE)
        p_grad = grad + i_b * stride_b + start + (o_steps[:, None] + o_d[None, :])
        b_grad = tl.load(p_grad, mask=m_steps[:, None] & m_d[None, :], other=0.0).to(tl.float32)
        i_tile = i_bk.to(tl.int64) * num_tiles + i
        p_tile = projected + i_tile * ((R + 2 * N) * T) + tl.arange(0, T)
        b_delta = softplus(load_time_steps(p_tile, dt_proj_weight + i_kd * R, 1, b_bias, m_d, R, T))
        p_C = p_tile + (R + N + FIRST_STATE) * T
        b_earlier = ()
        for n in tl.static_range(STATES):
            b_C = tl.load(p_C + n * T)
            _, b_before = run_adjoints(tl.exp2(b_delta * b_A[n][None, :]), b_grad * b_C[:, None], b_adjoint[n])
            b_earlier = b_earlier + (b_before,)  # noqa: RUF005
        b_adjoint = b_earlier
    for n in tl.static_range(STATES):
        i_state = (i_bk.to(tl.int64) * num_chunks + i_chunk) * N + FIRST_STATE + n
        tl.store(adjoints + i_state * channels + o_d, b_adjoint[n], mask=m_d)


@triton.jit(
    do_not_specialize=[
        *("height", "width", "channels", "num_tiles", "chunk_tiles", "segment_tiles", "num_chunks"),
        *("state_size", "rank", "stride_b", "stride_h", "stride_w"),
    ]
)
def adjoint_kernel(
    grad,  # (B, H, W, D)
    u,  # (B, H, W, D)
    projected,  # (B, K, tiles, R + 2N, T)
    dt_proj_weight,  # (K, D, R)
    dt_proj_bias,  # (K, D)
    A_log,  # (K, D, N)
    D,  # (K, D)
    states,  # (B, K, chunks, segments, N, D), after each segment, from zero before its chunk
    time,  # (B, K, chunks, segments, D), sum of delta in the chunk up to there
    carried,  # (B, K, chunks, N, D), states before each chunk but the first
    kept,  # (B, K, chunks, N + R + N * tiles of a segment, D), of each program alone
    adjoints,  # (B, K, chunks, N, D), of the states after each chunk but the last; overwritten tile by tile
    grad_u,  # (B, H, W, D), what reaches u not through the projection
    grad_projected,  # (blocks of channels, B, K, tiles, R + 2N, T)
    grad_parameters,  # (B, chunks, K, N + R + 2, D): of A_log, dt_proj_weight, dt_proj_bias and D
    height,
    width,
    channels,
    num_tiles,
    chunk_tiles,
    segment_tiles,
    num_chunks,
    state_size,
    rank,
    stride_b,
    stride_h,
    stride_w,
    T: tl.constexpr,
    CHANNELS: tl.constexpr,
    LONG_LINES: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The adjoint of `scan_kernel` along a chunk, from its last tile: see "Adjoint" in `kernels/README.md`.

    One state after another, so that only one state's steps are in registers at a time. What goes from tile to tile,
    states, adjoints and sums, this program writes and reads again. In `kept` it has A, the weights of dt, and the
    states before each tile of its segment, channels next to each other: in the parameters they are N or R apart.
    """
    i_d, i_chunk, i_bk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_b, i_k = (i_bk // 4).to(tl.int64), i_bk % 4
    o_d = i_d * CHANNELS + tl.arange(0, CHANNELS)
    m_d = o_d < channels
    i_kd = i_k * channels + o_d
    outputs = rank + 2 * state_size

    m_carried = mask_if(i_chunk > 0, o_d, channels)
    m_reached = mask_if(i_chunk < num_chunks - 1, o_d, channels)
    i_part = (i_b * num_chunks + i_chunk) * 4 + i_k  # in (B, chunks, K)
    p_grad_A_log = grad_parameters + i_part * (state_size + rank + 2) * channels + o_d
    p_grad_weight = p_grad_A_log + state_size * channels
    p_grad_bias = p_grad_weight + rank * channels
    p_grad_D = p_grad_bias + channels
    i_bkc = i_bk.to(tl.int64) * num_chunks + i_chunk  # in (B, K, chunks)
    p_carried = carried + i_bkc * state_size * channels + o_d
    p_adjoint = adjoints + i_bkc * state_size * channels + o_d
    p_A = kept + i_bkc * ((segment_tiles + 1) * state_size + rank) * channels + o_d
    p_dt_weight = p_A + state_size * channels
    for n in range(state_size):
        tl.store(p_A + n * channels, load_A(A_log + i_kd * state_size + n, m_d), mask=m_d)
    for r in range(rank):
        b_weight = tl.load(dt_proj_weight + i_kd * rank + r, mask=m_d, other=0.0).to(tl.float32)
        tl.store(p_dt_weight + r * channels, b_weight, mask=m_d)
    tl.debug_barrier()  # before anybody reads what others have written

    first_tile = i_chunk * chunk_tiles
    end_tile = tl.minimum(first_tile + chunk_tiles, num_tiles)
    num_segments = tl.cdiv(end_tile - first_tile, segment_tiles)
    for segments_done in range(num_segments):
        i_segment = num_segments - 1 - segments_done
        first_of_segment = first_tile + i_segment * segment_tiles
        tiles_here = tl.minimum(segment_tiles, end_tile - first_of_segment)

        # the state before the segment, then those before its other tiles
        i_before = i_bkc * tl.cdiv(chunk_tiles, segment_tiles) + i_segment - 1
        p_start = p_dt_weight + rank * channels
        m_started = mask_if(i_segment > 0, o_d, channels)
        b_time = tl.load(time + i_before * channels + o_d, mask=m_started, other=0.0)
        for n in range(state_size):
            b_A = tl.load(p_A + n * channels, mask=m_d, other=0.0)
            b_start = tl.load(states + (i_before * state_size + n) * channels + o_d, mask=m_started, other=0.0)
            b_carried = tl.load(p_carried + n * channels, mask=m_carried, other=0.0)
            tl.store(p_start + n * channels, tl.fma(tl.exp2(b_time * b_A), b_carried, b_start), mask=m_d)
        tl.debug_barrier()
        for i in range(first_of_segment, first_of_segment + tiles_here - 1):
            start, o_steps, m_steps = find_steps(i * T, i_k, height, width, stride_h, stride_w, T, LONG_LINES, WIDE)
            p_u = u + i_b * stride_b + start + (o_steps[:, None] + o_d[None, :])
            b_u = tl.load(p_u, mask=m_steps[:, None] & m_d[None, :], other=0.0).to(tl.float32)
            p_tile = projected + (i_bk.to(tl.int64) * num_tiles + i) * outputs * T + tl.arange(0, T)
            b_bias = tl.load(dt_proj_bias + i_kd, mask=m_d, other=0.0).to(tl.float32)
            b_delta = softplus(load_time_steps(p_tile, p_dt_weight, channels, b_bias, m_d, rank, T))
            b_delta_u = b_delta * b_u
            for n in range(state_size):
                b_A = tl.load(p_A + n * channels, mask=m_d, other=0.0)
                b_B = tl.load(p_tile + (rank + n) * T)
                b_start = tl.load(p_start + n * channels, mask=m_d, other=0.0)
                _, b_end = run_states(tl.exp2(b_delta * b_A[None, :]), b_delta_u * b_B[:, None], b_start)
                tl.store(p_start + (state_size + n) * channels, b_end, mask=m_d)
            p_start += state_size * channels
            tl.debug_barrier()

        for tiles_done in range(tiles_here):
            i = first_of_segment + tiles_here - 1 - tiles_done
            i_tile = i_bk.to(tl.int64) * num_tiles + i
            start, o_steps, m_steps = find_steps(i * T, i_k, height, width, stride_h, stride_w, T, LONG_LINES, WIDE)
            mask = m_steps[:, None] & m_d[None, :]
            o_first = i_b * stride_b + start
            o_tile = o_steps[:, None] + o_d[None, :]
            b_grad = tl.load(grad + o_first + o_tile, mask=mask, other=0.0).to(tl.float32)

            p_tile = projected + i_tile * outputs * T + tl.arange(0, T)
            p_grad_tile = grad_projected + (
                (i_d * tl.num_programs(2).to(tl.int64) * num_tiles + i_tile) * outputs * T + tl.arange(0, T)
            )
            p_grad_both = (p_grad_tile + rank * T)[:, None] + (tl.arange(0, 2) * state_size * T)[None, :]
            b_bias = tl.load(dt_proj_bias + i_kd, mask=m_d, other=0.0).to(tl.float32)
            b_delta = softplus(load_time_steps(p_tile, p_dt_weight, channels, b_bias, m_d, rank, T))
            b_delta_u = b_delta * tl.load(u + o_first + o_tile, mask=mask, other=0.0).to(tl.float32)
            m_later = mask_if(segments_done + tiles_done > 0, o_d, channels)  # tiles of the chunk are done
            b_grad_delta_u = tl.zeros([T, CHANNELS], tl.float32)
            b_grad_delta = tl.zeros([T, CHANNELS], tl.float32)
            for n in range(state_size):
                b_A = tl.load(p_A + n * channels, mask=m_d, other=0.0)
                b_B = tl.load(p_tile + (rank + n) * T)[:, None]
                b_C = tl.load(p_tile + (rank + state_size + n) * T)[:, None]
                b_decay = tl.exp2(b_delta * b_A[None, :])
                b_start = tl.load(p_start + n * channels, mask=m_d, other=0.0)

                b_added = b_delta_u * b_B
                b_kept = run_kept(b_decay, b_added, b_start)
                b_grad_C = tl.sum(b_grad * (b_kept + b_added), 1)

                b_after = tl.load(p_adjoint + n * channels, mask=m_later | m_reached, other=0.0)
                b_here, b_before = run_adjoints(b_decay, b_grad * b_C, b_after)
                tl.store(p_adjoint + n * channels, b_before, mask=m_d)

                b_through_decay = b_here * b_kept
                b_sum = tl.load(p_grad_A_log + n * channels, mask=m_later, other=0.0)
                # A is in units of log 2, and its own derivative by A_log
                b_sum += tl.sum(b_through_decay * b_delta, 0) * b_A * LOG_2
                tl.store(p_grad_A_log + n * channels, b_sum, mask=m_d)
                b_grad_delta_u = tl.fma(b_here, b_B, b_grad_delta_u)
                b_grad_delta = tl.fma(b_through_decay, b_A[None, :], b_grad_delta)
                b_grad_B = tl.sum(b_here * b_delta_u, 1)
                # together: what a warp has summed goes through shared memory to its store
                tl.store(p_grad_both + n * T, tl.join(b_grad_B, b_grad_C))

            # read and made again: while the states went by, their registers were needed
            b_u = tl.load(u + o_first + o_tile, mask=mask, other=0.0).to(tl.float32)
            b_raw = load_time_steps(p_tile, p_dt_weight, channels, b_bias, m_d, rank, T)
            b_grad_delta = tl.fma(b_u, b_grad_delta_u, b_grad_delta * LOG_2)
            b_grad_raw = b_grad_delta * sigmoid(b_raw)
            for r in range(rank):
                b_weight = tl.load(p_dt_weight + r * channels, mask=m_d, other=0.0)
                b_dt = tl.load(p_tile + r * T)
                b_sum = tl.load(p_grad_weight + r * channels, mask=m_later, other=0.0)
                b_sum += tl.sum(b_grad_raw * b_dt[:, None], 0)
                tl.store(p_grad_weight + r * channels, b_sum, mask=m_d)
                tl.store(p_grad_tile + r * T, tl.sum(b_grad_raw * b_weight[None, :], 1))
            b_sum = tl.load(p_grad_bias, mask=m_later, other=0.0)
            tl.store(p_grad_bias, b_sum + tl.sum(b_grad_raw, 0), mask=m_d)
            b_sum = tl.load(p_grad_D, mask=m_later, other=0.0)
            tl.store(p_grad_D, b_sum + tl.sum(b_grad * b_u, 0), mask=m_d)
            b_skip = tl.load(D + i_kd, mask=m_d, other=0.0).to(tl.float32)
            b_grad_u = tl.fma(b_delta, b_grad_delta_u, b_skip[None, :] * b_grad)
            tl.store(grad_u + o_first + o_tile, b_grad_u, mask=mask)
            p_start -= state_size * channels
            tl.debug_barrier()


@triton.jit(do_not_specialize=["height", "width", "num_tiles"])
def unproject_kernel(
    grad_projected,  # (B, K, tiles, R + 2N, T)
    weight,  # (K, R + 2N, D)
    partial,  # (B, H, W, D), float32: what reaches u not through the projection
    grad_u,  # (B, H, W, D), laid out as `partial`
    height,
    width,
    channels,
    outputs,
    num_tiles,
    stride_b,
    stride_h,
    stride_w,
    T: tl.constexpr,
    STEPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    DEPTH: tl.constexpr,
    LONG_LINES: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """grad_u = partial + grad_projected weight, of `STEPS` steps of a group."""
    i_block, i_d, i_bk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_b, i_k = (i_bk // 4).to(tl.int64), i_bk % 4
    o_step = i_block * STEPS + tl.arange(0, STEPS)
    o_d = i_d * CHANNELS + tl.arange(0, CHANNELS)
    m_d = o_d < channels
    start, o_in_map, m_step = find_steps(
        i_block * STEPS, i_k, height, width, stride_h, stride_w, STEPS, LONG_LINES, WIDE
    )
    i_tile = i_bk.to(tl.int64) * num_tiles + o_step // T
    p_grad = grad_projected + (i_tile * outputs * T + o_step % T)[:, None]
    p_weight = weight + i_k * outputs * channels + o_d[None, :]

    b_sum = tl.zeros([STEPS, CHANNELS], tl.float32)
    for i in range(0, outputs, DEPTH):
        o_output = i + tl.arange(0, DEPTH)
        m_output = o_output < outputs
        b_grad = tl.load(p_grad + o_output[None, :] * T, mask=m_step[:, None] & m_output[None, :], other=0.0)
        b_weight = tl.load(p_weight + o_output[:, None] * channels, mask=m_output[:, None] & m_d[None, :], other=0.0)
        b_sum = tl.dot(b_grad, b_weight.to(tl.float32), b_sum, input_precision=PRECISION)

    o_in_map = i_b * stride_b + start + (o_in_map[:, None] + o_d[None, :])
    mask = m_step[:, None] & m_d[None, :]
    b_sum += tl.load(partial + o_in_map, mask=mask, other=0.0)
    tl.store(grad_u + o_in_map, b_sum.to(grad_u.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["height", "width", "num_tiles", "num_blocks", "part_blocks"])
def weight_kernel(
    grad_projected,  # (B, K, tiles, R + 2N, T)
    u,  # (B, H, W, D)
    grad_weight,  # (parts, K, R + 2N, D)
    height,
    width,
    channels,
    outputs,
    num_tiles,
    num_blocks,
    part_blocks,
    stride_b,
    stride_h,
    stride_w,
    T: tl.constexpr,
    DEPTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    LONG_LINES: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """grad_weight = sum over steps and images of grad_projected u^T, a part of the blocks (B, blocks of steps)."""
    i_d, i_output, i_part = tl.program_id(0), tl.program_id(1), tl.program_id(2) // 4
    i_k = tl.program_id(2) % 4
    o_d = i_d * CHANNELS + tl.arange(0, CHANNELS)
    o_output = i_output * OUTPUTS + tl.arange(0, OUTPUTS)
    m_d = o_d < channels
    m_output = o_output < outputs
    blocks_of_image = (num_tiles * T + DEPTH - 1) // DEPTH
    b_sum = tl.zeros([OUTPUTS, CHANNELS], tl.float32)
    for i in range(i_part * part_blocks, tl.minimum((i_part + 1) * part_blocks, num_blocks)):
        i_b, i_step = (i // blocks_of_image).to(tl.int64), i % blocks_of_image * DEPTH
        o_step = i_step + tl.arange(0, DEPTH)
        start, o_in_map, m_step = find_steps(i_step, i_k, height, width, stride_h, stride_w, DEPTH, LONG_LINES, WIDE)
        i_tile = (i_b * 4 + i_k) * num_tiles + o_step // T
        p_grad = grad_projected + (i_tile * outputs * T + o_step % T)[None, :] + o_output[:, None] * T
        p_u = u + i_b * stride_b + start + (o_in_map[:, None] + o_d[None, :])
        b_grad = tl.load(p_grad, mask=m_output[:, None] & m_step[None, :], other=0.0)
        b_u = tl.load(p_u, mask=m_step[:, None] & m_d[None, :], other=0.0).to(tl.float32)
        b_sum = tl.dot(b_grad, b_u, b_sum, input_precision=PRECISION)
    i_row = (i_part * 4 + i_k) * outputs + o_output
    p_grad_weight = grad_weight + (i_row * channels)[:, None] + o_d[None, :]
    tl.store(p_grad_weight, b_sum, mask=m_output[:, None] & m_d[None, :])


# -- host ------------------------------------------------------------------------------------------------------------


def cdiv(dividend: int, divisor: int) -> int:
    """Rounded up. As `triton.cdiv`, which takes 2 us to find out that its arguments are numbers."""
    return -(-dividend // divisor)


class Plan(NamedTuple):
    """What follows from the map before anything is launched."""

    config: Config
    multiprocessors: int
    tile: int  # T
    num_tiles: int
    chunk_tiles: int
    num_chunks: int
    shortest_line: int  # of a group, in steps
    is_wide: bool  # an image spans 2^31 elements or more

    def index_options(self, num_steps: int) -> dict[str, bool]:
        """What `find_steps` is compiled for."""
        return {"LONG_LINES": self.shortest_line >= num_steps, "WIDE": self.is_wide}


def span(hidden_states: torch.Tensor) -> int:
    """From the first element of an image to its last, in elements."""
    sizes, strides = hidden_states.shape[1:], hidden_states.stride()[1:]
    return sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))


def make_plan(hidden_states: torch.Tensor, is_backward: bool = False) -> Plan:
    """Tiles of the sequences, and chunks where there are not programs enough for the device.

    Raises:
        ValueError: for more images than a launch takes.
    """
    batch_size, height, width, channels = hidden_states.shape
    if batch_size > LARGEST_BATCH:
        raise ValueError(f"the Triton kernels take up to {LARGEST_BATCH} images at once, got {batch_size}: split them")
    device = describe_device(hidden_states.device)
    config = find_config(device)
    if is_backward:
        tile, block, programs = config.backward_tile, config.backward_channels, config.backward_programs
        fewest_chunks = 2  # states are made twice with one chunk too; only the adjoints are more
    else:
        tile, block, programs = config.forward_tile, config.forward_channels, config.forward_programs
        fewest_chunks = 3  # every tile is computed twice: two chunks would gain nothing
    rows, columns = (height + 1) // 2, (width + 1) // 2
    num_tiles = cdiv(rows * columns, tile)

    num_chunks = min(
        device.multiprocessors * programs // (batch_size * NUM_GROUPS * cdiv(channels, block)),
        math.isqrt(math.ceil(2 * num_tiles / CHUNK_COST)),  # where tiles in turn and the carry together take least
    )
    chunk_tiles = cdiv(num_tiles, num_chunks) if num_chunks >= fewest_chunks else num_tiles
    num_chunks = cdiv(num_tiles, chunk_tiles)

    is_wide = max(height * width * channels, span(hidden_states)) >= 2**31
    return Plan(config, device.multiprocessors, tile, num_tiles, chunk_tiles, num_chunks, min(rows, columns), is_wide)


def current_device(tensor: torch.Tensor) -> AbstractContextManager:
    """Triton launches on the current stream of the current device."""
    if tensor.device.type == "cpu":  # interpreted
        return nullcontext()
    return torch.get_device_module(tensor.device).device(tensor.device)


def with_dense_channels(hidden_states: torch.Tensor) -> torch.Tensor:
    """Channels next to each other; any other strides are kept."""
    return hidden_states if hidden_states.stride(-1) == 1 else hidden_states.contiguous()


def new_buffer(like: torch.Tensor, *shape: int) -> torch.Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def project(plan: Plan, hidden_states: torch.Tensor, x_proj_weight: torch.Tensor) -> torch.Tensor:
    """dt, B and C of all steps, (B, K, tiles, R + 2N, T)."""
    batch_size, height, width, channels = hidden_states.shape
    outputs = x_proj_weight.shape[1]
    projected = new_buffer(hidden_states, batch_size, NUM_GROUPS, plan.num_tiles, outputs, plan.tile)
    steps = plan.num_tiles * plan.tile
    grid = (cdiv(steps, MATRIX_STEPS), cdiv(outputs, MATRIX_OUTPUTS), batch_size * NUM_GROUPS)
    project_kernel[grid](
        *(hidden_states, x_proj_weight, projected),
        *(height, width, channels, outputs, plan.num_tiles),
        *hidden_states.stride()[:3],
        T=plan.tile,
        STEPS=MATRIX_STEPS,
        DEPTH=MATRIX_DEPTH,
        OUTPUTS=MATRIX_OUTPUTS,
        PRECISION=plan.config.precision,
        **plan.index_options(MATRIX_STEPS),
        **MATRIX_WARPS,
    )
    return projected


def launch_blocks_of_states(kernel, plan: Plan, num_chunks: int, tensors: tuple, sizes: tuple, strides: tuple) -> None:
    """Launches a kernel that carries states in registers, once for as many of them as fit.

    `tensors` begins with a map, `projected` and the parameters of the recurrence; `sizes` come last of the sizes.
    """
    hidden_states, _, dt_proj_weight, _, A_log, *_ = tensors
    batch_size, height, width, channels = hidden_states.shape
    state_size = A_log.shape[-1]
    grid = (cdiv(channels, plan.config.forward_channels), num_chunks, batch_size * NUM_GROUPS)
    for first_state in range(0, state_size, plan.config.states):
        kernel[grid](
            *tensors,
            *(height, width, channels, plan.num_tiles, plan.chunk_tiles, *sizes),
            *strides,
            N=state_size,
            FIRST_STATE=first_state,
            STATES=min(plan.config.states, state_size - first_state),
            R=dt_proj_weight.shape[-1],
            T=plan.tile,
            CHANNELS=plan.config.forward_channels,
            **plan.index_options(plan.tile),
            **ONE_WARP,
        )


def run_chunks(
    plan: Plan,
    hidden_states: torch.Tensor,  # (B, H, W, D)
    projected: torch.Tensor,  # (B, K, tiles, R + 2N, T)
    parameters: tuple[torch.Tensor, torch.Tensor, torch.Tensor],  # dt_proj_weight, dt_proj_bias, A_log
    segment_tiles: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # (B, K, chunks, segments, N, D), (B, K, chunks, segments, D)
    """States and times after each segment of chunks that start from zero."""
    batch_size, *_, channels = hidden_states.shape
    segments = (batch_size, NUM_GROUPS, plan.num_chunks, cdiv(plan.chunk_tiles, segment_tiles))
    states = new_buffer(projected, *segments, parameters[-1].shape[-1], channels)
    time = new_buffer(projected, *segments, channels)
    tensors = (hidden_states, projected, *parameters, states, time)
    launch_blocks_of_states(
        states_kernel, plan, plan.num_chunks, tensors, (segment_tiles,), hidden_states.stride()[:3]
    )
    return states, time


def carry(
    plan: Plan,
    ends: torch.Tensor,  # (B, K, chunks, ends, N, D)
    time: torch.Tensor,  # (B, K, chunks, times, D)
    A_log: torch.Tensor,
    carried: torch.Tensor,  # (B, K, chunks, N, D)
    first: int,
    direction: int,
) -> None:
    """Fills `carried`: what each chunk but the `first` starts from, going in the `direction` 1 or -1."""
    batch_size, *_, ends_per_chunk, state_size, channels = ends.shape
    carry_kernel[(cdiv(channels, plan.config.forward_channels), state_size, batch_size * NUM_GROUPS)](
        *(ends, time, A_log, carried, channels, state_size, plan.num_chunks),
        *(ends_per_chunk, time.shape[3], first, direction),
        CHUNKS=plan.tile,
        CHANNELS=plan.config.forward_channels,
        **ONE_WARP,
    )


def forward(
    hidden_states: torch.Tensor,  # (B, H, W, D)
    x_proj_weight: torch.Tensor,  # (K, R + 2N, D)
    dt_proj_weight: torch.Tensor,  # (K, D, R)
    dt_proj_bias: torch.Tensor,  # (K, D)
    A_log: torch.Tensor,  # (K, D, N)
    D: torch.Tensor,  # (K, D)
) -> torch.Tensor:  # (B, H, W, D)
    """The operator in float32, returned in the dtype of `hidden_states`."""
    x_proj_weight, *parameters, D = (
        parameter.contiguous() for parameter in (x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D)
    )
    batch_size, *_, channels = hidden_states.shape
    state_size = A_log.shape[-1]
    with current_device(hidden_states):
        hidden_states = with_dense_channels(hidden_states)
        plan = make_plan(hidden_states)
        projected = project(plan, hidden_states, x_proj_weight)
        carried = new_buffer(projected, batch_size, NUM_GROUPS, plan.num_chunks, state_size, channels)
        if plan.num_chunks > 1:
            ends, time = run_chunks(plan, hidden_states, projected, parameters, segment_tiles=plan.chunk_tiles)
            carry(plan, ends, time, A_log, carried, first=0, direction=1)
        # several blocks of states add to y
        y_dtype = hidden_states.dtype if state_size <= plan.config.states else torch.float32
        y = hidden_states.new_empty(hidden_states.shape, dtype=y_dtype)
        tensors = (hidden_states, projected, *parameters, D, carried, y)
        strides = (*hidden_states.stride()[:3], *y.stride()[:3])
        launch_blocks_of_states(scan_kernel, plan, plan.num_chunks, tensors, (plan.num_chunks,), strides)
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
    x_proj_weight, *parameters, D = (parameter.contiguous() for parameter in arguments[1:])
    with current_device(hidden_states):
        grad, hidden_states = grad.contiguous(), hidden_states.contiguous()  # one set of offsets for all three maps
        plan = make_plan(hidden_states, is_backward=True)
        projected = project(plan, hidden_states, x_proj_weight)
        # states are kept after each segment of a chunk, and in one segment after each tile: so both are least
        segment_tiles = math.isqrt(plan.chunk_tiles)
        states, time = run_chunks(plan, hidden_states, projected, parameters, segment_tiles)
        carried, adjoints = carry_both_ways(plan, grad, projected, parameters, states, time)
        partial_u, grad_projected, *grad_parameters = run_adjoint(
            plan, grad, hidden_states, projected, (*parameters, D), segment_tiles, states, time, carried, adjoints
        )
        grad_u, grad_x_proj_weight = unproject(plan, grad_projected, hidden_states, x_proj_weight, partial_u)
        gradients = (grad_u, grad_x_proj_weight, *grad_parameters)
        return tuple(
            gradient.to(argument.dtype).contiguous() for gradient, argument in zip(gradients, arguments, strict=True)
        )


def carry_both_ways(
    plan: Plan,
    grad: torch.Tensor,  # (B, H, W, D)
    projected: torch.Tensor,  # (B, K, tiles, R + 2N, T)
    parameters: tuple[torch.Tensor, torch.Tensor, torch.Tensor],  # dt_proj_weight, dt_proj_bias, A_log
    states: torch.Tensor,  # (B, K, chunks, segments, N, D)
    time: torch.Tensor,  # (B, K, chunks, segments, D)
) -> tuple[torch.Tensor, torch.Tensor]:  # (B, K, chunks, N, D) each
    """States before each chunk but the first, adjoints of the states after each chunk but the last."""
    carried = states.new_empty(*states.shape[:3], *states.shape[4:])
    adjoints = torch.empty_like(carried)
    if plan.num_chunks > 1:
        A_log = parameters[-1]
        carry(plan, states, time, A_log, carried, first=0, direction=1)
        chunk_adjoints = torch.empty_like(carried)
        # of the first chunk nobody asks
        tensors = (grad, projected, *parameters, chunk_adjoints)
        launch_blocks_of_states(
            chunk_adjoints_kernel, plan, plan.num_chunks - 1, tensors, (plan.num_chunks,), grad.stride()[:3]
        )
        last = plan.num_chunks - 1
        carry(plan, chunk_adjoints.unsqueeze(3), time, A_log, adjoints, first=last, direction=-1)
    return carried, adjoints


def run_adjoint(
    plan: Plan,
    grad: torch.Tensor,  # (B, H, W, D)
    hidden_states: torch.Tensor,  # (B, H, W, D)
    projected: torch.Tensor,  # (B, K, tiles, R + 2N, T)
    parameters: tuple[torch.Tensor, ...],  # dt_proj_weight, dt_proj_bias, A_log, D
    segment_tiles: int,
    states: torch.Tensor,  # (B, K, chunks, segments, N, D)
    time: torch.Tensor,  # (B, K, chunks, segments, D)
    carried: torch.Tensor,  # (B, K, chunks, N, D)
    adjoints: torch.Tensor,  # (B, K, chunks, N, D), overwritten
) -> tuple[torch.Tensor, ...]:
    """Gradients of u as far as it is not projected (B, H, W, D), of what is projected, and of the four parameters."""
    batch_size, height, width, channels = hidden_states.shape
    rank, state_size = parameters[0].shape[-1], parameters[2].shape[-1]
    num_blocks = cdiv(channels, plan.config.backward_channels)
    kept = new_buffer(projected, *carried.shape[:3], (segment_tiles + 1) * state_size + rank, channels)
    partial_u = new_buffer(projected, *hidden_states.shape)
    grad_projected = new_buffer(projected, num_blocks, *projected.shape)
    parts = (batch_size, plan.num_chunks, NUM_GROUPS)
    grad_parameters = new_buffer(projected, *parts, state_size + rank + 2, channels)
    adjoint_kernel[(num_blocks, plan.num_chunks, batch_size * NUM_GROUPS)](
        *(grad, hidden_states, projected, *parameters, states, time, carried, kept, adjoints),
        *(partial_u, grad_projected, grad_parameters),
        *(height, width, channels, plan.num_tiles, plan.chunk_tiles, segment_tiles, plan.num_chunks),
        *(state_size, rank),
        *hidden_states.stride()[:3],
        T=plan.tile,
        CHANNELS=plan.config.backward_channels,
        **plan.index_options(plan.tile),
        **ONE_WARP,
    )
    grad_A_log, grad_weight, grad_bias, grad_D = grad_parameters.sum(dim=(0, 1)).mT.split(
        [state_size, rank, 1, 1], dim=-1
    )  # (K, D, ...)
    return partial_u, grad_projected.sum(dim=0), grad_weight, grad_bias.squeeze(-1), grad_A_log, grad_D.squeeze(-1)


def unproject(
    plan: Plan,
    grad_projected: torch.Tensor,  # (B, K, tiles, R + 2N, T)
    hidden_states: torch.Tensor,  # (B, H, W, D)
    x_proj_weight: torch.Tensor,  # (K, R + 2N, D)
    partial_u: torch.Tensor,  # (B, H, W, D)
) -> tuple[torch.Tensor, torch.Tensor]:  # (B, H, W, D), (K, R + 2N, D)
    """The gradients of u and of `x_proj_weight`."""
    batch_size, height, width, channels = hidden_states.shape
    outputs = x_proj_weight.shape[1]
    steps = plan.num_tiles * plan.tile
    channel_blocks, output_blocks = cdiv(channels, MATRIX_CHANNELS), cdiv(outputs, MATRIX_OUTPUTS)
    sizes = (height, width, channels, outputs, plan.num_tiles)
    options = {"T": plan.tile, "CHANNELS": MATRIX_CHANNELS, "PRECISION": plan.config.precision, **MATRIX_WARPS}
    # float32 in place
    grad_u = partial_u if hidden_states.dtype == torch.float32 else hidden_states.new_empty(hidden_states.shape)
    unproject_kernel[(cdiv(steps, MATRIX_STEPS), channel_blocks, batch_size * NUM_GROUPS)](
        *(grad_projected, x_proj_weight, partial_u, grad_u),
        *sizes,
        *partial_u.stride()[:3],
        STEPS=MATRIX_STEPS,
        DEPTH=MATRIX_DEPTH,
        **plan.index_options(MATRIX_STEPS),
        **options,
    )
    # each program sums a part of the blocks of `MATRIX_DEPTH` steps, as many programs as multiprocessors
    num_blocks = batch_size * cdiv(steps, MATRIX_DEPTH)
    num_parts = cdiv(plan.multiprocessors, NUM_GROUPS * channel_blocks * output_blocks)
    part_blocks = cdiv(num_blocks, num_parts)
    num_parts = cdiv(num_blocks, part_blocks)
    grad_weight = new_buffer(grad_projected, num_parts, *x_proj_weight.shape)
    weight_kernel[(channel_blocks, output_blocks, num_parts * NUM_GROUPS)](
        *(grad_projected, hidden_states, grad_weight),
        *sizes,
        *(num_blocks, part_blocks),
        *hidden_states.stride()[:3],
        DEPTH=MATRIX_DEPTH,
        OUTPUTS=MATRIX_OUTPUTS,
        **plan.index_options(MATRIX_DEPTH),
        **options,
    )
    return grad_u, grad_weight.sum(dim=0)
