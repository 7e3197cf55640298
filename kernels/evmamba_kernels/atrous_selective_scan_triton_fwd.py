"""Triton kernels of the scan's forward pass, and functions that the backward pass shares.

Naming: `i_` an index, `o_` offsets, `m_` a mask, `p_` pointers, `b_` a block of values, T the steps of a tile.
"""

from .atrous_selective_scan_torch import NUM_GROUPS as NUM_GROUPS_OF_SCAN
from .triton_device import tl, triton


NUM_GROUPS = tl.constexpr(NUM_GROUPS_OF_SCAN)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def softplus(x):
    """Return log(1 + exp(x)) = max(x, 0) + log(1 + e) with e = exp(-|x|).

    It uses log(1 + e) = 2 atanh(s), s = e / (2 + e), with a minimax polynomial in s^2, which is accurate for small e.
    """
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
    """Return 1 / (1 + exp(-x)), the derivative of softplus."""
    e = tl.exp2(tl.abs(x) * -LOG2_E)
    return tl.where(x < 0.0, e, 1.0) / (1.0 + e)


@triton.jit
def load_A(p_A_log, m_d):
    """Return A in units of log 2, in which a decay is exp2(delta A)."""
    return -tl.exp2(tl.load(p_A_log, mask=m_d, other=0.0).to(tl.float32) * LOG2_E) * LOG2_E


@triton.jit
def mask_if(condition, o_d, channels):
    """Return the mask of the existing channels if a scalar condition holds, else of none.

    In the interpreter of Triton 3.9, `mask & scalar` is not a mask.
    """
    return o_d < tl.where(condition, channels, 0)


@triton.jit
def find_steps(
    i_step, i_k, height, width, stride_h, stride_w, T: tl.constexpr, LONG_LINES: tl.constexpr, WIDE: tl.constexpr
):
    """Find the positions of T steps of group `i_k` in an image, from step `i_step`.

    A line is a row of the group's pixels in even groups, and a column in odd ones.

    Args:
        LONG_LINES: Whether no line is shorter than T. Then T steps span at most two lines.
        WIDE: Whether an image spans 2^31 elements or more.

    Returns:
        The offset of the first step from the image's first element, int64. The offsets of all steps from the first one
        `(T)`, int64 if `WIDE`, else int32. The mask of the steps inside the feature map `(T)`.
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
    """Return softplus^-1(delta) of a tile, `(T, channels)`.

    Args:
        p_projected: Pointers to the tile's first row, which is dt, `(T)`.
        p_weight: Pointers to the weights of the first element of dt, `(channels)`.
        stride_r: Distance to the weights of the next element of dt.
    """
    b_raw = tl.zeros([T, b_bias.shape[0]], tl.float32) + b_bias[None, :]
    for r in range(R):
        b_weight = tl.load(p_weight + r * stride_r, mask=m_d, other=0.0).to(tl.float32)
        b_raw = tl.fma(tl.load(p_projected + r * T)[:, None], b_weight[None, :], b_raw)
    return b_raw


@triton.jit
def load_tile(
    p_map,
    projected,
    i_tile,
    i_step,
    i_k,
    height,
    width,
    stride_h,
    stride_w,
    o_d,
    m_d,
    p_weight,
    stride_r,
    b_bias,
    outputs,
    R,
    T: tl.constexpr,
    LONG_LINES: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Load the steps of a tile from a feature map, and compute their delta.

    Args:
        p_map: Pointer to the first element of the image.
        projected: Pointer to all tiles of dt, B and C.
        i_tile: Index of the tile in `projected`.
        i_step: Index of the tile's first step in the sequence.

    Returns:
        The values of the feature map `(T, channels)`, delta `(T, channels)`, pointers to the first row of the
        projected tile `(T)`, the offset of the first step in the image, the offsets of all steps from there
        `(T, channels)`, and the mask of those inside the feature map `(T, channels)`.
    """
    start, o_steps, m_steps = find_steps(i_step, i_k, height, width, stride_h, stride_w, T, LONG_LINES, WIDE)
    o_map = o_steps[:, None] + o_d[None, :]
    mask = m_steps[:, None] & m_d[None, :]
    b_map = tl.load(p_map + start + o_map, mask=mask, other=0.0).to(tl.float32)
    p_tile = projected + i_tile * outputs * T + tl.arange(0, T)
    b_delta = softplus(load_time_steps(p_tile, p_weight, stride_r, b_bias, m_d, R, T))
    return b_map, b_delta, p_tile, start, o_map, mask


@triton.jit
def combine(decay_1, state_1, decay_2, state_2):
    """Combine two consecutive parts of the recurrence, each given by its decay and the state that it adds."""
    return decay_1 * decay_2, tl.fma(decay_2, state_1, state_2)


@triton.jit
def run_states(b_decay, b_added, b_state):
    """Run the recurrence along a tile.

    If T is in the registers of one thread, this is one multiply-add per step: the compiler removes the unused products
    of decays.

    Returns:
        The state after each step `(T, channels)`, and after the last step `(channels)`.
    """
    is_first = tl.arange(0, b_decay.shape[0])[:, None] == 0
    b_added = tl.where(is_first, tl.fma(b_decay, b_state[None, :], b_added), b_added)
    _, b_states = tl.associative_scan((b_decay, b_added), 0, combine)
    # integers, since compilers must not drop the zeros in a sum of floats
    is_last = tl.arange(0, b_decay.shape[0])[:, None] == b_decay.shape[0] - 1
    b_last = tl.sum(tl.where(is_last, b_states.to(tl.int32, bitcast=True), 0), 0).to(tl.float32, bitcast=True)
    return b_states, b_last


@triton.jit(do_not_specialize=["height", "width", "num_tiles"])
def project_fwd_kernel(
    u,  # (B, H, W, D)
    weight,  # (K, R + 2N, D)
    projected,  # (B, K, tiles, R + 2N, T), zeros in the padding
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
    """Project u to dt, B and C of `STEPS` steps, with one matrix product per group.

    The output is tile by tile. A thread of the other kernels reads the T values of an output at once, and finds all
    values of a tile from one address.
    """
    i_block, i_output, i_bk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_b, i_k = (i_bk // NUM_GROUPS).to(tl.int64), i_bk % NUM_GROUPS
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
        "height",
        "width",
        "channels",
        "num_tiles",
        "chunk_tiles",
        "segment_tiles",
        "stride_b",
        "stride_h",
        "stride_w",
    ]
)
def chunk_state_fwd_kernel(
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
    """Run the recurrence of a chunk from zero. Store the state and the sum of delta after each of its segments."""
    i_d, i_chunk, i_bk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_b, i_k = (i_bk // NUM_GROUPS).to(tl.int64), i_bk % NUM_GROUPS
    o_d = i_d * CHANNELS + tl.arange(0, CHANNELS)
    m_d = o_d < channels
    i_kd = i_k * channels + o_d
    b_bias = tl.load(dt_proj_bias + i_kd, mask=m_d, other=0.0).to(tl.float32)
    b_A, b_state = (), ()
    for n in tl.static_range(STATES):
        b_A = b_A + (load_A(A_log + i_kd * N + FIRST_STATE + n, m_d),)  # noqa: RUF005, Triton does not unpack tuples
        b_state = b_state + (tl.zeros([CHANNELS], tl.float32),)  # noqa: RUF005
    b_time = tl.zeros([CHANNELS], tl.float32)

    first_tile = i_chunk * chunk_tiles
    end_tile = tl.minimum(first_tile + chunk_tiles, num_tiles)
    i_first_segment = (i_bk.to(tl.int64) * tl.num_programs(1) + i_chunk) * tl.cdiv(chunk_tiles, segment_tiles)
    for i in range(first_tile, end_tile):
        b_u, b_delta, p_tile, _start, _o_map, _mask = load_tile(
            p_map=u + i_b * stride_b,
            projected=projected,
            i_tile=i_bk.to(tl.int64) * num_tiles + i,
            i_step=i * T,
            i_k=i_k,
            height=height,
            width=width,
            stride_h=stride_h,
            stride_w=stride_w,
            o_d=o_d,
            m_d=m_d,
            p_weight=dt_proj_weight + i_kd * R,
            stride_r=1,
            b_bias=b_bias,
            outputs=R + 2 * N,
            R=R,
            T=T,
            LONG_LINES=LONG_LINES,
            WIDE=WIDE,
        )
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
        "channels",
        "state_size",
        "num_chunks",
        "first",
        "direction",
        "ends_per_chunk",
        "times_per_chunk",
    ]
)
def state_passing_kernel(
    ends,  # (B, K, chunks, ends, N, D), the last one of a chunk is read
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
    """Compute the start state of every chunk with the recurrence over chunks.

    It runs from the chunk `first` in the `direction` 1 or -1. The first chunk starts from zero, and its place in
    `carried` is not written.
    """
    i_d, n, i_bk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_d = i_d * CHANNELS + tl.arange(0, CHANNELS)
    m_d = o_d < channels
    b_A = load_A(A_log + (i_bk % NUM_GROUPS * channels + o_d) * state_size + n, m_d)
    b_state = tl.zeros([CHANNELS], tl.float32)
    for i in range(0, num_chunks, CHUNKS):
        o_count = i + tl.arange(0, CHUNKS)
        o_chunk = first + direction * o_count
        i_chunk = i_bk.to(tl.int64) * num_chunks + o_chunk
        i_end = i_chunk * ends_per_chunk + ends_per_chunk - 1
        i_time = i_chunk * times_per_chunk + times_per_chunk - 1
        mask = (o_count < num_chunks - 1)[:, None] & m_d[None, :]  # no chunk starts from the end of the last one
        b_end = tl.load(ends + ((i_end * state_size + n) * channels)[:, None] + o_d[None, :], mask=mask, other=0.0)
        # no decay at the first chunk, which may be the last of the sequence, and lack segments
        m_time = mask & (o_count > 0)[:, None]
        b_time = tl.load(time + (i_time * channels)[:, None] + o_d[None, :], mask=m_time, other=0.0)
        b_states, b_state = run_states(tl.exp2(b_time * b_A[None, :]), b_end, b_state)
        i_carried = (i_chunk + direction) * state_size + n
        tl.store(carried + (i_carried * channels)[:, None] + o_d[None, :], b_states, mask=mask)


@triton.jit(
    do_not_specialize=[
        "height",
        "width",
        "channels",
        "num_tiles",
        "chunk_tiles",
        "num_chunks",
        "stride_b",
        "stride_h",
        "stride_w",
        "y_stride_b",
        "y_stride_h",
        "y_stride_w",
    ]
)
def scan_fwd_kernel(
    u,  # (B, H, W, D)
    projected,  # (B, K, tiles, R + 2N, T)
    dt_proj_weight,  # (K, D, R)
    dt_proj_bias,  # (K, D)
    A_log,  # (K, D, N)
    D,  # (K, D)
    carried,  # (B, K, chunks, N, D), states before each chunk except the first
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
    """Run h = exp(delta A) h + (delta u) B and y = h C + D u along a chunk, with delta = softplus(weight dt + bias).

    A launch computes `STATES` states from `FIRST_STATE`. Later launches add to y, which is float32 then.
    """
    i_d, i_chunk, i_bk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_b, i_k = (i_bk // NUM_GROUPS).to(tl.int64), i_bk % NUM_GROUPS
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
        b_u, b_delta, p_tile, _start, _o_map, mask = load_tile(
            p_map=u + i_b * stride_b,
            projected=projected,
            i_tile=i_bk.to(tl.int64) * num_tiles + i,
            i_step=i * T,
            i_k=i_k,
            height=height,
            width=width,
            stride_h=stride_h,
            stride_w=stride_w,
            o_d=o_d,
            m_d=m_d,
            p_weight=dt_proj_weight + i_kd * R,
            stride_r=1,
            b_bias=b_bias,
            outputs=R + 2 * N,
            R=R,
            T=T,
            LONG_LINES=LONG_LINES,
            WIDE=WIDE,
        )
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
