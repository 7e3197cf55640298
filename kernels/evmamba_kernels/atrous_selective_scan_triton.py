"""The atrous selective scan on GPUs: host code of the Triton kernels, for CUDA, ROCm and XPU.

The kernels cut the sequence of a group into tiles of a few steps. A program computes one block of channels of one
sequence, tile by tile. A thread holds the steps of the tile and the states of its channels in registers. Lanes hold
neighboring channels. Index arithmetic finds the pixels, so u and y are neither gathered nor scattered.

    forward    project_fwd_kernel         projects u to dt, B and C; the only pass over all channels at once
               scan_fwd_kernel            runs the recurrence
    backward   project_fwd_kernel         projects again
               chunk_state_fwd_kernel     runs the recurrence again, and keeps the states between segments
               scan_bwd_kernel            takes segments from the last to the first, and their tiles likewise; it
                                          recomputes the states between and inside the tiles, then adjoints, gradients
               project_bwd_input_kernel, project_bwd_weight_kernel     gradients through the projection

If images, groups and channels do not fill the device, sequences are cut into chunks of several tiles that run in
parallel. `chunk_state_fwd_kernel` finds the end state of every chunk that starts from zero. In the backward pass,
`chunk_state_bwd_kernel` does so for adjoints. From these, `state_passing_kernel` computes the state before each chunk.
Decays are exp2(A * sum of delta), never a quotient, so the carry is as accurate as the recurrence.

There are no atomics, so two runs give the same bits. `kernels/README.md` has symbols, shapes and derivations.
`benchmarks/NOTES.md` has lower bounds, instruction counts and the reasons for the layout.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from .atrous_selective_scan_torch import NUM_GROUPS
from .atrous_selective_scan_triton_bwd import (
    chunk_state_bwd_kernel,
    project_bwd_input_kernel,
    project_bwd_weight_kernel,
    scan_bwd_kernel,
)
from .atrous_selective_scan_triton_fwd import (
    chunk_state_fwd_kernel,
    project_fwd_kernel,
    scan_fwd_kernel,
    state_passing_kernel,
)
from .triton_device import Device, cdiv, current_device, describe_device, new_buffer


LARGEST_BATCH = 65535 // NUM_GROUPS  # CUDA limits the size of a grid


class Config(NamedTuple):
    """Sizes that the kernels are compiled for. A program is one warp, so no step waits for another warp.

    Tiles, channels and steps are powers of two, as `tl.arange` needs. Channels are also multiples of the warp size.
    """

    states: int  # in registers; more states take several launches
    forward_tile: int  # steps of a tile
    forward_channels: int  # of a program
    backward_tile: int
    backward_channels: int  # in scan_bwd_kernel, which sums over channels: more per thread need fewer shuffles
    projected_steps: int  # of a block of project_fwd_kernel
    precision: str  # of tl.dot in float32: "tf32x3" on the tensor cores of CUDA, else "ieee"
    forward_programs: int  # per multiprocessor, limited by the registers of scan_fwd_kernel
    backward_programs: int  # likewise, of scan_bwd_kernel


# Keys: backend of Triton, warp size, and oldest compute capability (0 except on CUDA). The first match applies.
#
# The rows follow the compiler's report. They have the longest tiles and most channels that keep every kernel in
# registers on sm_80, sm_90, sm_100 and gfx942. `benchmarks/triton_report.py` prints the report, tests check it, and
# `benchmarks/NOTES.md` has the table, and times with other values on sm_90. RDNA (hip, 32 lanes) and XPU have small
# tiles, since their code has not been examined. `make bench-gpu` measures on a device.
CONFIGS = {
    ("cuda", 32, 90): Config(16, 8, 32, 8, 64, 64, "tf32x3", 11, 8),
    # spills with 64 channels, and with 64 projected steps, since warps then repeat each other's products
    ("cuda", 32, 0): Config(16, 8, 32, 8, 32, 32, "tf32x3", 11, 8),
    ("hip", 64, 0): Config(16, 4, 64, 8, 64, 64, "ieee", 4, 12),  # a tile of 8 in scan_fwd_kernel takes 394 registers
    ("hip", 32, 0): Config(16, 4, 32, 4, 32, 64, "ieee", 8, 8),
    ("xpu", 32, 0): Config(16, 4, 32, 4, 32, 64, "ieee", 8, 8),
    # small, like most feature maps in tests
    ("interpreter", 1, 0): Config(16, 4, 8, 4, 16, 64, "ieee", 1, 1),
}

# Of the matrix products of the projection: steps (backward), channels and outputs of a block. All are powers of two.
MATRIX_STEPS = 64
MATRIX_CHANNELS = 64
MATRIX_DEPTH = 32
MATRIX_OUTPUTS = 64

# Options of Triton. Fused multiply-adds are the default in some versions only.
ONE_WARP = {"num_warps": 1, "enable_fp_fusion": True}
MATRIX_WARPS = {"num_warps": 8, "enable_fp_fusion": True}

# Cost of one more chunk in state_passing_kernel, relative to that of a tile in scan_fwd_kernel. A tile takes 8 x 16
# exponentials of a warp, at 8 cycles each: 1024 cycles. The carry reads 8 chunks at once, so a chunk takes an eighth
# of a load from memory, assumed to take 512 cycles: 64 cycles. On an H200, values up to 1/4 are equally fast.
CHUNK_COST = 1 / 16


def find_config(device: Device) -> Config:
    """Return the configuration of a device.

    Raises:
        ValueError: If `CONFIGS` has none for the device.
    """
    for (backend, warp_size, oldest), config in CONFIGS.items():
        if (backend, warp_size) == (device.backend, device.warp_size) and device.capability >= oldest:
            return config
    raise ValueError(
        f"the Triton kernels have no configuration for {device.backend} with {device.warp_size} lanes: choose the "
        "backend 'torch'"
    )


class Plan(NamedTuple):
    """Sizes that depend on the feature map."""

    config: Config
    multiprocessors: int
    tile: int  # T
    num_tiles: int
    chunk_tiles: int
    num_chunks: int
    lane_channels: int  # channels of a lane in scan_bwd_kernel
    shortest_line: int  # of a group, in steps
    is_wide: bool  # an image spans 2^31 elements or more

    def index_options(self, num_steps: int) -> dict[str, bool]:
        """Return the compile-time options of `find_steps`."""
        return {"LONG_LINES": self.shortest_line >= num_steps, "WIDE": self.is_wide}


def span(hidden_states: torch.Tensor) -> int:
    """Return the distance from the first element of an image to its last, in elements."""
    sizes, strides = hidden_states.shape[1:], hidden_states.stride()[1:]
    return sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))


def make_plan(hidden_states: torch.Tensor, is_backward: bool = False) -> Plan:
    """Plan the tiles of the sequences, and chunks if there are too few programs for the device.

    Raises:
        ValueError: If there are more images than a launch supports.
    """
    batch_size, height, width, channels = hidden_states.shape
    if batch_size > LARGEST_BATCH:
        raise ValueError(f"the Triton kernels take up to {LARGEST_BATCH} images at once, got {batch_size}: split them")
    device = describe_device(hidden_states.device)
    config = find_config(device)
    if is_backward:
        tile, block, programs = config.backward_tile, config.backward_channels, config.backward_programs
        fewest_chunks = 2  # one chunk computes states twice too, so only the adjoints cost more
    else:
        tile, block, programs = config.forward_tile, config.forward_channels, config.forward_programs
        fewest_chunks = 3  # every tile is computed twice, so two chunks gain nothing
    rows, columns = (height + 1) // 2, (width + 1) // 2
    num_tiles = cdiv(rows * columns, tile)

    num_chunks = min(
        device.multiprocessors * programs // (batch_size * NUM_GROUPS * cdiv(channels, block)),
        math.isqrt(math.ceil(2 * num_tiles / CHUNK_COST)),  # minimizes the time of the tiles plus the carry
    )
    chunk_tiles = cdiv(num_tiles, num_chunks) if num_chunks >= fewest_chunks else num_tiles
    num_chunks = cdiv(num_tiles, chunk_tiles)

    is_wide = max(height * width * channels, span(hidden_states)) >= 2**31
    return Plan(
        config=config,
        multiprocessors=device.multiprocessors,
        tile=tile,
        num_tiles=num_tiles,
        chunk_tiles=chunk_tiles,
        num_chunks=num_chunks,
        lane_channels=config.backward_channels // device.warp_size,
        shortest_line=min(rows, columns),
        is_wide=is_wide,
    )


def with_dense_channels(hidden_states: torch.Tensor) -> torch.Tensor:
    """Return the feature map with dense channels. All other strides are kept."""
    return hidden_states if hidden_states.stride(-1) == 1 else hidden_states.contiguous()


def project_fwd(plan: Plan, hidden_states: torch.Tensor, x_proj_weight: torch.Tensor) -> torch.Tensor:
    """Return dt, B and C of all steps, `(B, K, tiles, R + 2N, T)`."""
    batch_size, height, width, channels = hidden_states.shape
    outputs = x_proj_weight.shape[1]
    projected = new_buffer(hidden_states, batch_size, NUM_GROUPS, plan.num_tiles, outputs, plan.tile)
    steps = plan.num_tiles * plan.tile
    stride_b, stride_h, stride_w, _ = hidden_states.stride()
    block_steps = plan.config.projected_steps
    grid = (cdiv(steps, block_steps), cdiv(outputs, MATRIX_OUTPUTS), batch_size * NUM_GROUPS)
    project_fwd_kernel[grid](
        u=hidden_states,
        weight=x_proj_weight,
        projected=projected,
        height=height,
        width=width,
        channels=channels,
        outputs=outputs,
        num_tiles=plan.num_tiles,
        stride_b=stride_b,
        stride_h=stride_h,
        stride_w=stride_w,
        T=plan.tile,
        STEPS=block_steps,
        DEPTH=MATRIX_DEPTH,
        OUTPUTS=MATRIX_OUTPUTS,
        PRECISION=plan.config.precision,
        **plan.index_options(block_steps),
        **MATRIX_WARPS,
    )
    return projected


class Recurrence(NamedTuple):
    """Contiguous parameters of the recurrence."""

    dt_proj_weight: torch.Tensor  # (K, D, R)
    dt_proj_bias: torch.Tensor  # (K, D)
    A_log: torch.Tensor  # (K, D, N)

    @property
    def rank(self) -> int:
        return self.dt_proj_weight.shape[-1]

    @property
    def state_size(self) -> int:
        return self.A_log.shape[-1]


def launch_blocks_of_states(
    kernel: Callable,
    plan: Plan,
    hidden_states: torch.Tensor,  # (B, H, W, D): u, or its gradient
    parameters: Recurrence,
    computed_chunks: int,
    **arguments: torch.Tensor | int,
) -> None:
    """Launch a kernel that carries states in registers, once per block of states that fits.

    Args:
        computed_chunks: Number of chunks of each sequence to compute.
        arguments: Arguments of this kernel alone.
    """
    batch_size, height, width, channels = hidden_states.shape
    stride_b, stride_h, stride_w, _ = hidden_states.stride()
    grid = (cdiv(channels, plan.config.forward_channels), computed_chunks, batch_size * NUM_GROUPS)
    for first_state in range(0, parameters.state_size, plan.config.states):
        kernel[grid](
            dt_proj_weight=parameters.dt_proj_weight,
            dt_proj_bias=parameters.dt_proj_bias,
            A_log=parameters.A_log,
            height=height,
            width=width,
            channels=channels,
            num_tiles=plan.num_tiles,
            chunk_tiles=plan.chunk_tiles,
            stride_b=stride_b,
            stride_h=stride_h,
            stride_w=stride_w,
            N=parameters.state_size,
            FIRST_STATE=first_state,
            STATES=min(plan.config.states, parameters.state_size - first_state),
            R=parameters.rank,
            T=plan.tile,
            CHANNELS=plan.config.forward_channels,
            **arguments,
            **plan.index_options(plan.tile),
            **ONE_WARP,
        )


def run_chunk_states(
    plan: Plan,
    hidden_states: torch.Tensor,  # (B, H, W, D)
    projected: torch.Tensor,  # (B, K, tiles, R + 2N, T)
    parameters: Recurrence,
    segment_tiles: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # (B, K, chunks, segments, N, D), (B, K, chunks, segments, D)
    """Return states and times after each segment of chunks that start from zero."""
    batch_size, *_, channels = hidden_states.shape
    segments = (batch_size, NUM_GROUPS, plan.num_chunks, cdiv(plan.chunk_tiles, segment_tiles))
    states = new_buffer(projected, *segments, parameters.state_size, channels)
    time = new_buffer(projected, *segments, channels)
    launch_blocks_of_states(
        chunk_state_fwd_kernel,
        plan,
        hidden_states,
        parameters,
        plan.num_chunks,
        u=hidden_states,
        projected=projected,
        states=states,
        time=time,
        segment_tiles=segment_tiles,
    )
    return states, time


def pass_states(
    plan: Plan,
    ends: torch.Tensor,  # (B, K, chunks, ends, N, D)
    time: torch.Tensor,  # (B, K, chunks, times, D)
    A_log: torch.Tensor,
    carried: torch.Tensor,  # (B, K, chunks, N, D)
    first: int,
    direction: int,
) -> None:
    """Fill `carried` with the start state of each chunk except the `first`, in the `direction` 1 or -1."""
    batch_size, *_, ends_per_chunk, state_size, channels = ends.shape
    state_passing_kernel[(cdiv(channels, plan.config.forward_channels), state_size, batch_size * NUM_GROUPS)](
        ends=ends,
        time=time,
        A_log=A_log,
        carried=carried,
        channels=channels,
        state_size=state_size,
        num_chunks=plan.num_chunks,
        ends_per_chunk=ends_per_chunk,
        times_per_chunk=time.shape[3],
        first=first,
        direction=direction,
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
    """Compute the operator in float32. Returns the dtype of `hidden_states`."""
    parameters = Recurrence(dt_proj_weight.contiguous(), dt_proj_bias.contiguous(), A_log.contiguous())
    batch_size, *_, channels = hidden_states.shape
    with current_device(hidden_states):
        hidden_states = with_dense_channels(hidden_states)
        plan = make_plan(hidden_states)
        projected = project_fwd(plan, hidden_states, x_proj_weight.contiguous())
        carried = new_buffer(projected, batch_size, NUM_GROUPS, plan.num_chunks, parameters.state_size, channels)
        if plan.num_chunks > 1:
            ends, time = run_chunk_states(plan, hidden_states, projected, parameters, segment_tiles=plan.chunk_tiles)
            pass_states(plan, ends, time, parameters.A_log, carried, first=0, direction=1)
        # several blocks of states accumulate in y
        y_dtype = hidden_states.dtype if parameters.state_size <= plan.config.states else torch.float32
        y = hidden_states.new_empty(hidden_states.shape, dtype=y_dtype)
        y_stride_b, y_stride_h, y_stride_w, _ = y.stride()
        launch_blocks_of_states(
            scan_fwd_kernel,
            plan,
            hidden_states,
            parameters,
            plan.num_chunks,
            u=hidden_states,
            projected=projected,
            D=D.contiguous(),
            carried=carried,
            y=y,
            num_chunks=plan.num_chunks,
            y_stride_b=y_stride_b,
            y_stride_h=y_stride_h,
            y_stride_w=y_stride_w,
        )
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
    """Return the gradients of the six arguments of `forward`, each in the dtype of its argument."""
    arguments = (hidden_states, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D)
    x_proj_weight, D = x_proj_weight.contiguous(), D.contiguous()
    parameters = Recurrence(dt_proj_weight.contiguous(), dt_proj_bias.contiguous(), A_log.contiguous())
    with current_device(hidden_states):
        grad, hidden_states = grad.contiguous(), hidden_states.contiguous()  # one set of offsets for all
        plan = make_plan(hidden_states, is_backward=True)
        projected = project_fwd(plan, hidden_states, x_proj_weight)
        # states are kept after each segment of a chunk, and after each tile of one segment: this minimizes the sum
        segment_tiles = math.isqrt(plan.chunk_tiles)
        kept = KeptStates(segment_tiles, *run_chunk_states(plan, hidden_states, projected, parameters, segment_tiles))
        carried, adjoints = pass_states_both_ways(plan, grad, projected, parameters, kept)
        partial_u, grad_projected, *grad_parameters = run_scan_bwd(
            plan, grad, hidden_states, projected, parameters, D, kept, carried, adjoints
        )
        grad_u, grad_x_proj_weight = project_bwd(plan, grad_projected, hidden_states, x_proj_weight, partial_u)
        gradients = (grad_u, grad_x_proj_weight, *grad_parameters)
        return tuple(
            gradient.to(argument.dtype).contiguous() for gradient, argument in zip(gradients, arguments, strict=True)
        )


class KeptStates(NamedTuple):
    """States between the segments of chunks, which the backward pass keeps."""

    segment_tiles: int
    states: torch.Tensor  # (B, K, chunks, segments, N, D), after each segment of chunks that start from zero
    time: torch.Tensor  # (B, K, chunks, segments, D), sum of delta in the chunk so far


def pass_states_both_ways(
    plan: Plan,
    grad: torch.Tensor,  # (B, H, W, D)
    projected: torch.Tensor,  # (B, K, tiles, R + 2N, T)
    parameters: Recurrence,
    kept: KeptStates,
) -> tuple[torch.Tensor, torch.Tensor]:  # (B, K, chunks, N, D) each
    """Return the states before each chunk except the first, and the adjoints after each chunk except the last."""
    carried = kept.states.new_empty(*kept.states.shape[:3], *kept.states.shape[4:])
    adjoints = torch.empty_like(carried)
    if plan.num_chunks > 1:
        pass_states(plan, kept.states, kept.time, parameters.A_log, carried, first=0, direction=1)
        chunk_adjoints = torch.empty_like(carried)
        launch_blocks_of_states(
            chunk_state_bwd_kernel,
            plan,
            grad,
            parameters,
            plan.num_chunks - 1,  # nothing needs that of the first chunk
            grad=grad,
            projected=projected,
            adjoints=chunk_adjoints,
            num_chunks=plan.num_chunks,
        )
        last = plan.num_chunks - 1
        pass_states(plan, chunk_adjoints.unsqueeze(3), kept.time, parameters.A_log, adjoints, first=last, direction=-1)
    return carried, adjoints


def run_scan_bwd(
    plan: Plan,
    grad: torch.Tensor,  # (B, H, W, D)
    hidden_states: torch.Tensor,  # (B, H, W, D)
    projected: torch.Tensor,  # (B, K, tiles, R + 2N, T)
    parameters: Recurrence,
    D: torch.Tensor,  # (K, D)
    kept: KeptStates,
    carried: torch.Tensor,  # (B, K, chunks, N, D)
    adjoints: torch.Tensor,  # (B, K, chunks, N, D), overwritten
) -> tuple[torch.Tensor, ...]:
    """Return the gradients of u without the projection `(B, H, W, D)`, of the projections, and of four parameters."""
    batch_size, height, width, channels = hidden_states.shape
    rank, state_size = parameters.rank, parameters.state_size
    num_blocks = cdiv(channels, plan.config.backward_channels)
    workspace = new_buffer(projected, *carried.shape[:3], (kept.segment_tiles + 1) * state_size + rank, channels)
    partial_u = new_buffer(projected, *hidden_states.shape)
    grad_projected = new_buffer(projected, num_blocks, *projected.shape)
    parts = (batch_size, plan.num_chunks, NUM_GROUPS)
    grad_parameters = new_buffer(projected, *parts, state_size + rank + 2, channels)
    stride_b, stride_h, stride_w, _ = hidden_states.stride()
    scan_bwd_kernel[(num_blocks, plan.num_chunks, batch_size * NUM_GROUPS)](
        grad=grad,
        u=hidden_states,
        projected=projected,
        dt_proj_weight=parameters.dt_proj_weight,
        dt_proj_bias=parameters.dt_proj_bias,
        A_log=parameters.A_log,
        D=D,
        states=kept.states,
        time=kept.time,
        carried=carried,
        kept=workspace,
        adjoints=adjoints,
        grad_u=partial_u,
        grad_projected=grad_projected,
        grad_parameters=grad_parameters,
        height=height,
        width=width,
        channels=channels,
        num_tiles=plan.num_tiles,
        chunk_tiles=plan.chunk_tiles,
        segment_tiles=kept.segment_tiles,
        num_chunks=plan.num_chunks,
        state_size=state_size,
        rank=rank,
        stride_b=stride_b,
        stride_h=stride_h,
        stride_w=stride_w,
        T=plan.tile,
        CHANNELS=plan.config.backward_channels,
        LANE_CHANNELS=plan.lane_channels,
        **plan.index_options(plan.tile),
        **ONE_WARP,
    )
    grad_A_log, grad_weight, grad_bias, grad_D = grad_parameters.sum(dim=(0, 1)).mT.split(
        [state_size, rank, 1, 1], dim=-1
    )  # (K, D, ...)
    return partial_u, grad_projected.sum(dim=0), grad_weight, grad_bias.squeeze(-1), grad_A_log, grad_D.squeeze(-1)


def project_bwd(
    plan: Plan,
    grad_projected: torch.Tensor,  # (B, K, tiles, R + 2N, T)
    hidden_states: torch.Tensor,  # (B, H, W, D)
    x_proj_weight: torch.Tensor,  # (K, R + 2N, D)
    partial_u: torch.Tensor,  # (B, H, W, D)
) -> tuple[torch.Tensor, torch.Tensor]:  # (B, H, W, D), (K, R + 2N, D)
    """Return the gradients of u and of `x_proj_weight`."""
    batch_size, height, width, channels = hidden_states.shape
    outputs = x_proj_weight.shape[1]
    steps = plan.num_tiles * plan.tile
    channel_blocks, output_blocks = cdiv(channels, MATRIX_CHANNELS), cdiv(outputs, MATRIX_OUTPUTS)
    stride_b, stride_h, stride_w, _ = hidden_states.stride()  # contiguous, like `partial_u`
    # in place for float32
    grad_u = partial_u if hidden_states.dtype == torch.float32 else hidden_states.new_empty(hidden_states.shape)
    project_bwd_input_kernel[(cdiv(steps, MATRIX_STEPS), channel_blocks, batch_size * NUM_GROUPS)](
        grad_projected=grad_projected,
        weight=x_proj_weight,
        partial=partial_u,
        grad_u=grad_u,
        height=height,
        width=width,
        channels=channels,
        outputs=outputs,
        num_tiles=plan.num_tiles,
        stride_b=stride_b,
        stride_h=stride_h,
        stride_w=stride_w,
        T=plan.tile,
        STEPS=MATRIX_STEPS,
        CHANNELS=MATRIX_CHANNELS,
        DEPTH=MATRIX_DEPTH,
        PRECISION=plan.config.precision,
        **plan.index_options(MATRIX_STEPS),
        **MATRIX_WARPS,
    )
    # as many programs as multiprocessors; each sums a part of the blocks of `MATRIX_DEPTH` steps
    num_blocks = batch_size * cdiv(steps, MATRIX_DEPTH)
    num_parts = cdiv(plan.multiprocessors, NUM_GROUPS * channel_blocks * output_blocks)
    part_blocks = cdiv(num_blocks, num_parts)
    num_parts = cdiv(num_blocks, part_blocks)
    grad_weight = new_buffer(grad_projected, num_parts, *x_proj_weight.shape)
    project_bwd_weight_kernel[(channel_blocks, output_blocks, num_parts * NUM_GROUPS)](
        grad_projected=grad_projected,
        u=hidden_states,
        grad_weight=grad_weight,
        height=height,
        width=width,
        channels=channels,
        outputs=outputs,
        num_tiles=plan.num_tiles,
        num_blocks=num_blocks,
        part_blocks=part_blocks,
        stride_b=stride_b,
        stride_h=stride_h,
        stride_w=stride_w,
        T=plan.tile,
        DEPTH=MATRIX_DEPTH,
        CHANNELS=MATRIX_CHANNELS,
        OUTPUTS=MATRIX_OUTPUTS,
        PRECISION=plan.config.precision,
        **plan.index_options(MATRIX_DEPTH),
        **MATRIX_WARPS,
    )
    return grad_u, grad_weight.sum(dim=0)
