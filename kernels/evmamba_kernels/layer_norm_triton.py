"""Triton kernels of LayerNorm times SiLU of a gate, forward and backward.

A program processes a block of rows, and keeps each row in registers from its mean to its output. So there is one pass
over the inputs. The backward pass saves nothing but the inputs, and recomputes the rest. For the normalized row x',
n = weight x' + bias and y = n silu(z), the gradients are:

    dL/dz  = dL/dy n silu'(z),    silu'(z) = sigmoid(z) (1 + z (1 - sigmoid(z)))
    dL/dn  = dL/dy silu(z),       dL/dweight = sum dL/dn x',    dL/dbias = sum dL/dn
    dL/dx  = (g - mean(g) - x' mean(g x')) / sqrt(var + eps),   g = dL/dn weight

Sums over rows have a fixed order, so two runs give the same bits. The kernels compute in float32 for every dtype.
"""

import torch

from .backends import as_rows
from .triton_device import cdiv, current_device, describe_device, new_buffer, tl, triton


FORWARD_BLOCK_ELEMENTS = 2048  # per program, 16 per thread
BACKWARD_BLOCK_ELEMENTS = 1024  # each with up to eight values at a time; with 2048, bfloat16 spills in Triton 3.8
PROGRAMS_PER_MULTIPROCESSOR = 5  # that fit in the backward pass; each sums the gradients of parameters over its rows

FOUR_WARPS = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def normalize(b_x, m_d, channels, eps):
    """Return the normalized rows and the inverse standard deviation. Values beyond the channels are meaningless.

    Lanes add their values in pairs. The compiler would fuse a product into this sum, fma(a, b, other), and the two
    lanes would round differently. It fuses nothing into the results of `tl.where` and `tl.fma`, so each sum takes one.
    """
    b_centered = b_x - tl.sum(b_x, 1)[:, None] / channels
    b_squares = tl.where(m_d[None, :], b_centered * b_centered, 0.0)
    b_inverse = 1.0 / tl.sqrt(tl.sum(b_squares, 1) / channels + eps)
    return b_centered * b_inverse[:, None], b_inverse


@triton.jit(do_not_specialize=["num_rows"])
def layer_norm_gated_fwd_kernel(
    x,  # (rows, D)
    gate,  # (rows, D)
    weight,  # (D)
    bias,  # (D)
    y,  # (rows, D)
    num_rows,
    channels,
    x_stride,
    gate_stride,
    eps,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, CHANNELS)
    m_d = o_d < channels
    mask = (o_row < num_rows)[:, None] & m_d[None, :]
    b_weight = tl.load(weight + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_bias = tl.load(bias + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_x = tl.load(x + (o_row * x_stride)[:, None] + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
    b_z = tl.load(gate + (o_row * gate_stride)[:, None] + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
    b_normalized, _ = normalize(b_x, m_d, channels, eps)
    b_y = (b_normalized * b_weight[None, :] + b_bias[None, :]) * (b_z * tl.sigmoid(b_z))
    tl.store(y + (o_row * channels)[:, None] + o_d[None, :], b_y.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def layer_norm_gated_bwd_kernel(
    grad,  # (rows, D)
    x,  # (rows, D)
    gate,  # (rows, D)
    weight,  # (D)
    bias,  # (D)
    grad_x,  # (rows, D)
    grad_gate,  # (rows, D)
    grad_parameters,  # (2, programs, D): of weight and bias
    num_rows,
    channels,
    grad_stride,
    x_stride,
    gate_stride,
    eps,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    o_d = tl.arange(0, CHANNELS)
    m_d = o_d < channels
    b_weight = tl.load(weight + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_bias = tl.load(bias + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_grad_weight = tl.zeros([ROWS, CHANNELS], tl.float32)
    b_grad_bias = tl.zeros([ROWS, CHANNELS], tl.float32)
    for i in range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        o_row = tl.cast(i, tl.int64) * ROWS + tl.arange(0, ROWS)
        mask = (o_row < num_rows)[:, None] & m_d[None, :]
        b_grad = tl.load(grad + (o_row * grad_stride)[:, None] + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
        b_x = tl.load(x + (o_row * x_stride)[:, None] + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
        b_z = tl.load(gate + (o_row * gate_stride)[:, None] + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
        b_normalized, b_inverse = normalize(b_x, m_d, channels, eps)
        b_sigmoid = tl.sigmoid(b_z)
        p_out = (o_row * channels)[:, None] + o_d[None, :]
        b_grad_z = b_grad * (b_normalized * b_weight[None, :] + b_bias[None, :])
        b_grad_z *= b_sigmoid * (1.0 + b_z * (1.0 - b_sigmoid))
        tl.store(grad_gate + p_out, b_grad_z.to(grad_gate.dtype.element_ty), mask=mask)

        b_grad *= b_z * b_sigmoid
        b_grad_weight += tl.where(mask, b_grad * b_normalized, 0.0)  # the deviation of rows of zeros may be 0
        b_grad_bias += b_grad
        b_grad = tl.fma(b_grad, b_weight[None, :], 0.0)
        b_mean = tl.sum(b_grad, 1) / channels
        b_projection = tl.sum(tl.where(m_d[None, :], b_grad * b_normalized, 0.0), 1) / channels
        b_grad_x = (b_grad - b_mean[:, None] - b_normalized * b_projection[:, None]) * b_inverse[:, None]
        tl.store(grad_x + p_out, b_grad_x.to(grad_x.dtype.element_ty), mask=mask)
    p_parameters = grad_parameters + tl.program_id(0) * channels + o_d
    tl.store(p_parameters, tl.sum(b_grad_weight, 0), mask=m_d)
    tl.store(p_parameters + tl.num_programs(0) * channels, tl.sum(b_grad_bias, 0), mask=m_d)


def block_sizes(channels: int, block_elements: int) -> dict[str, int]:
    block_channels = triton.next_power_of_2(channels)
    return {"ROWS": max(1, block_elements // block_channels), "CHANNELS": block_channels}


def layer_norm_gated_fwd(
    hidden_states: torch.Tensor,  # (..., D)
    gate: torch.Tensor,  # (..., D)
    weight: torch.Tensor,  # (D)
    bias: torch.Tensor,  # (D)
    eps: float,
) -> torch.Tensor:  # (..., D)
    with current_device(hidden_states):
        x, z = as_rows(hidden_states), as_rows(gate)
        num_rows, channels = x.shape
        y = hidden_states.new_empty(hidden_states.shape)
        sizes = block_sizes(channels, FORWARD_BLOCK_ELEMENTS)
        layer_norm_gated_fwd_kernel[(cdiv(num_rows, sizes["ROWS"]),)](
            x=x,
            gate=z,
            weight=weight.contiguous(),
            bias=bias.contiguous(),
            y=y,
            num_rows=num_rows,
            channels=channels,
            x_stride=x.stride(0),
            gate_stride=z.stride(0),
            eps=eps,
            **sizes,
            **FOUR_WARPS,
        )
        return y


def layer_norm_gated_bwd(
    grad: torch.Tensor,  # (..., D)
    hidden_states: torch.Tensor,  # (..., D)
    gate: torch.Tensor,  # (..., D)
    weight: torch.Tensor,  # (D)
    bias: torch.Tensor,  # (D)
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of the four tensors of `layer_norm_gated_fwd`, each in the dtype of its tensor."""
    with current_device(hidden_states):
        grad_y, x, z = as_rows(grad), as_rows(hidden_states), as_rows(gate)
        num_rows, channels = x.shape
        grad_x, grad_gate = hidden_states.new_empty(hidden_states.shape), gate.new_empty(gate.shape)
        sizes = block_sizes(channels, BACKWARD_BLOCK_ELEMENTS)
        multiprocessors = describe_device(hidden_states.device).multiprocessors
        num_programs = min(cdiv(num_rows, sizes["ROWS"]), PROGRAMS_PER_MULTIPROCESSOR * multiprocessors)
        grad_parameters = new_buffer(x, 2, num_programs, channels)
        layer_norm_gated_bwd_kernel[(num_programs,)](
            grad=grad_y,
            x=x,
            gate=z,
            weight=weight.contiguous(),
            bias=bias.contiguous(),
            grad_x=grad_x,
            grad_gate=grad_gate,
            grad_parameters=grad_parameters,
            num_rows=num_rows,
            channels=channels,
            grad_stride=grad_y.stride(0),
            x_stride=x.stride(0),
            gate_stride=z.stride(0),
            eps=eps,
            **sizes,
            **FOUR_WARPS,
        )
        grad_weight, grad_bias = (parts.sum(dim=0) for parts in grad_parameters)
        return grad_x, grad_gate, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)
