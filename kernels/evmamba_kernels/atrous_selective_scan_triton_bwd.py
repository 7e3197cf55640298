"""Triton kernels of the scan's backward pass.

`kernels/README.md` derives the adjoint. The names follow the conventions of the forward pass.
"""

from .atrous_selective_scan_triton_fwd import (
    NUM_GROUPS,
    find_steps,
    load_A,
    load_tile,
    load_time_steps,
    mask_if,
    run_states,
    sigmoid,
)
from .triton_device import tl, triton


LOG_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def run_kept(b_decay, b_added, b_state):
    """Return the decayed part of the state before each step, `(T, channels)`.

    Subtracting the added part from the output of `run_states` would lose it to cancellation.

    An associative scan cannot tell its steps apart, so this loops over them. If T is in the registers of one thread,
    the compiler removes the selection of a step. This needs integers: it must not drop the zeros in a sum of floats.
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
    """Run the recurrence of the adjoint, from the last step of a tile to the first. The method is that of `run_kept`.

    Args:
        b_decay: Decay of each step, `(T, channels)`.
        b_reached: Gradient of the state after each step through its own output, `(T, channels)`.
        b_adjoint: Adjoint of the state after the tile, `(channels)`.

    Returns:
        The adjoint of the state after each step `(T, channels)`, and of the state before the tile `(channels)`.
    """
    b_decay_bits, b_reached_bits = b_decay.to(tl.int32, bitcast=True), b_reached.to(tl.int32, bitcast=True)
    b_adjoints = b_reached
    for back in tl.static_range(b_decay.shape[0]):
        is_t = tl.arange(0, b_decay.shape[0])[:, None] == b_decay.shape[0] - 1 - back
        b_step = tl.sum(tl.where(is_t, b_reached_bits, 0), 0).to(tl.float32, bitcast=True) + b_adjoint
        b_adjoint = tl.sum(tl.where(is_t, b_decay_bits, 0), 0).to(tl.float32, bitcast=True) * b_step
        b_adjoints = tl.where(is_t, b_step[None, :], b_adjoints)
    return b_adjoints, b_adjoint


@triton.jit
def sum_products(b_1, b_2, LANE_CHANNELS: tl.constexpr):
    """Return the sum over channels of b_1 * b_2, `(T)`, with the same bits in all lanes.

    Lanes add their values in pairs. If a lane has one channel, the compiler would fuse its product into this sum,
    fma(b_1, b_2, other), and the two lanes would round differently. It fuses nothing into the result of `tl.fma`. If a
    lane has several channels, it adds their products first. Then `tl.fma` would cost an addition.

    Args:
        LANE_CHANNELS: Channels of a lane.
    """
    b_products = tl.fma(b_1, b_2, 0.0) if LANE_CHANNELS == 1 else b_1 * b_2
    return tl.sum(b_products, 1)


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
    ]
)
def chunk_state_bwd_kernel(
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
    """Compute the adjoint of the state before every chunk except the first, through the chunk's own outputs alone."""
    i_d, i_chunk, i_bk = tl.program_id(0), tl.program_id(1) + 1, tl.program_id(2)
    i_b, i_k = (i_bk // NUM_GROUPS).to(tl.int64), i_bk % NUM_GROUPS
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
        b_grad, b_delta, p_tile, _start, _o_map, _mask = load_tile(
            p_map=grad + i_b * stride_b,
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
        "height",
        "width",
        "channels",
        "num_tiles",
        "chunk_tiles",
        "segment_tiles",
        "num_chunks",
        "state_size",
        "rank",
        "stride_b",
        "stride_h",
        "stride_w",
    ]
)
def scan_bwd_kernel(
    grad,  # (B, H, W, D)
    u,  # (B, H, W, D)
    projected,  # (B, K, tiles, R + 2N, T)
    dt_proj_weight,  # (K, D, R)
    dt_proj_bias,  # (K, D)
    A_log,  # (K, D, N)
    D,  # (K, D)
    states,  # (B, K, chunks, segments, N, D), after each segment of a chunk that starts from zero
    time,  # (B, K, chunks, segments, D), sum of delta in the chunk so far
    carried,  # (B, K, chunks, N, D), states before each chunk except the first
    kept,  # (B, K, chunks, N + R + N * tiles of a segment, D), workspace of each program
    adjoints,  # (B, K, chunks, N, D), of the states after each chunk except the last; overwritten tile by tile
    grad_u,  # (B, H, W, D), without the projection
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
    LANE_CHANNELS: tl.constexpr,
    LONG_LINES: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Run the adjoint of `scan_fwd_kernel` along a chunk, from its last tile. See "Adjoint" in `kernels/README.md`.

    It loops over the states. Registers hold the steps of one state at a time. States, adjoints and sums pass from tile
    to tile through memory. `kept` holds A, the weights of dt, and the states before each tile of the
    segment, all with dense channels. In the parameters, channels are N or R elements apart.
    """
    i_d, i_chunk, i_bk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_b, i_k = (i_bk // NUM_GROUPS).to(tl.int64), i_bk % NUM_GROUPS
    o_d = i_d * CHANNELS + tl.arange(0, CHANNELS)
    m_d = o_d < channels
    i_kd = i_k * channels + o_d
    outputs = rank + 2 * state_size

    m_carried = mask_if(i_chunk > 0, o_d, channels)
    m_reached = mask_if(i_chunk < num_chunks - 1, o_d, channels)
    i_part = (i_b * num_chunks + i_chunk) * NUM_GROUPS + i_k  # in (B, chunks, K)
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
    tl.debug_barrier()  # before lanes read what others have written

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
            b_bias = tl.load(dt_proj_bias + i_kd, mask=m_d, other=0.0).to(tl.float32)
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
                p_weight=p_dt_weight,
                stride_r=channels,
                b_bias=b_bias,
                outputs=outputs,
                R=rank,
                T=T,
                LONG_LINES=LONG_LINES,
                WIDE=WIDE,
            )
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
            b_bias = tl.load(dt_proj_bias + i_kd, mask=m_d, other=0.0).to(tl.float32)
            b_grad, b_delta, p_tile, start, o_tile, mask = load_tile(
                p_map=grad + i_b * stride_b,
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
                p_weight=p_dt_weight,
                stride_r=channels,
                b_bias=b_bias,
                outputs=outputs,
                R=rank,
                T=T,
                LONG_LINES=LONG_LINES,
                WIDE=WIDE,
            )
            o_first = i_b * stride_b + start
            p_grad_tile = grad_projected + (
                (i_d * tl.num_programs(2).to(tl.int64) * num_tiles + i_tile) * outputs * T + tl.arange(0, T)
            )
            p_grad_both = (p_grad_tile + rank * T)[:, None] + (tl.arange(0, 2) * state_size * T)[None, :]
            b_delta_u = b_delta * tl.load(u + o_first + o_tile, mask=mask, other=0.0).to(tl.float32)
            m_later = mask_if(segments_done + tiles_done > 0, o_d, channels)  # later tiles are done
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
                b_grad_C = sum_products(b_grad, b_kept + b_added, LANE_CHANNELS)

                b_after = tl.load(p_adjoint + n * channels, mask=m_later | m_reached, other=0.0)
                b_here, b_before = run_adjoints(b_decay, b_grad * b_C, b_after)
                tl.store(p_adjoint + n * channels, b_before, mask=m_d)

                b_through_decay = b_here * b_kept
                b_sum = tl.load(p_grad_A_log + n * channels, mask=m_later, other=0.0)
                # A is in units of log 2, and is its own derivative by A_log
                b_sum += tl.sum(b_through_decay * b_delta, 0) * b_A * LOG_2
                tl.store(p_grad_A_log + n * channels, b_sum, mask=m_d)
                b_grad_delta_u = tl.fma(b_here, b_B, b_grad_delta_u)
                b_grad_delta = tl.fma(b_through_decay, b_A[None, :], b_grad_delta)
                b_grad_B = sum_products(b_here, b_delta_u, LANE_CHANNELS)
                # one store for both: the sum over a warp reaches its store through shared memory
                tl.store(p_grad_both + n * T, tl.join(b_grad_B, b_grad_C))

            # loaded and recomputed, since the loop over states needed their registers
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
                tl.store(p_grad_tile + r * T, sum_products(b_grad_raw, b_weight[None, :], LANE_CHANNELS))
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
def project_bwd_input_kernel(
    grad_projected,  # (B, K, tiles, R + 2N, T)
    weight,  # (K, R + 2N, D)
    partial,  # (B, H, W, D), float32: the gradient of u without the projection
    grad_u,  # (B, H, W, D), in the layout of `partial`
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
    """Compute grad_u = partial + grad_projected weight for `STEPS` steps of a group."""
    i_block, i_d, i_bk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_b, i_k = (i_bk // NUM_GROUPS).to(tl.int64), i_bk % NUM_GROUPS
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
def project_bwd_weight_kernel(
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
    """Compute grad_weight, the sum of grad_projected u^T, over a part of the blocks (B, blocks of steps)."""
    i_d, i_output, i_part = tl.program_id(0), tl.program_id(1), tl.program_id(2) // NUM_GROUPS
    i_k = tl.program_id(2) % NUM_GROUPS
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
        i_tile = (i_b * NUM_GROUPS + i_k) * num_tiles + o_step // T
        p_grad = grad_projected + (i_tile * outputs * T + o_step % T)[None, :] + o_output[:, None] * T
        p_u = u + i_b * stride_b + start + (o_in_map[:, None] + o_d[None, :])
        b_grad = tl.load(p_grad, mask=m_output[:, None] & m_step[None, :], other=0.0)
        b_u = tl.load(p_u, mask=m_step[:, None] & m_d[None, :], other=0.0).to(tl.float32)
        b_sum = tl.dot(b_grad, b_u, b_sum, input_precision=PRECISION)
    i_row = (i_part * NUM_GROUPS + i_k) * outputs + o_output
    p_grad_weight = grad_weight + (i_row * channels)[:, None] + o_d[None, :]
    tl.store(p_grad_weight, b_sum, mask=m_output[:, None] & m_d[None, :])
