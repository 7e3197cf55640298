"""Baselines of the atrous selective scan: the plain recurrence, mambapy's parallel scan, and mamba_ssm's CUDA kernel.

All take the arguments of `evmamba_kernels.atrous_selective_scan`, and compute in float32 like it. They differ in the
recurrence, and in how they turn feature maps into sequences. Symbols and shapes: `kernels/README.md`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from evmamba_kernels.atrous_selective_scan_torch import pixels_of_steps, steps_of_pixels


class Sequences(NamedTuple):
    """Inputs of the recurrence."""

    u: torch.Tensor  # (B, K, L, D)
    delta: torch.Tensor  # (B, K, L, D)
    A: torch.Tensor  # (K, D, N)
    B: torch.Tensor  # (B, K, L, N)
    C: torch.Tensor  # (B, K, L, N)


def gather_sequences(
    hidden_states: torch.Tensor,
    x_proj_weight: torch.Tensor,
    dt_proj_weight: torch.Tensor,
    dt_proj_bias: torch.Tensor,
    A_log: torch.Tensor,
) -> Sequences:
    _, height, width, _ = hidden_states.shape
    rank, state_size = dt_proj_weight.shape[-1], A_log.shape[-1]
    length = ((height + 1) // 2) * ((width + 1) // 2)
    pixels, inside = pixels_of_steps(height, width, length, hidden_states.device)
    u = torch.where(inside[..., None], hidden_states.flatten(1, 2)[:, pixels].float(), 0)  # (B, K, L, D)
    dt, B, C = (u @ x_proj_weight.mT).split([rank, state_size, state_size], dim=-1)
    delta = F.softplus(dt @ dt_proj_weight.mT + dt_proj_bias[:, None])
    return Sequences(u, delta, -torch.exp(A_log), B, C)


def scatter_sequences(y: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
    """Return the feature map `(B, H, W, D)` of the sequences `(B, K, L, D)`."""
    batch_size, height, width, channels = hidden_states.shape
    places = steps_of_pixels(height, width, y.shape[2], y.device)
    return y.reshape(batch_size, -1, channels)[:, places].to(hidden_states.dtype)


def plain_recurrence(
    hidden_states: torch.Tensor,
    x_proj_weight: torch.Tensor,
    dt_proj_weight: torch.Tensor,
    dt_proj_bias: torch.Tensor,
    A_log: torch.Tensor,
    D: torch.Tensor,
) -> torch.Tensor:
    """Run the recurrence step by step, for all images and groups at once."""
    u, delta, A, B, C = gather_sequences(hidden_states, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log)
    h = u.new_zeros(*u[:, :, 0].shape, A.shape[-1])  # (B, K, D, N)
    outputs = []
    # unbind, because its gradient is one stack; the gradient of an index would be a whole sequence per step
    for delta_t, input_t, B_t, C_t in zip(
        delta.unbind(2), (delta * u).unbind(2), B.unbind(2), C.unbind(2), strict=True
    ):
        h = torch.exp(delta_t[..., None] * A) * h + input_t[..., None] * B_t[..., None, :]
        outputs.append((h @ C_t[..., None]).squeeze(-1))  # (B, K, D)
    y = torch.stack(outputs, dim=2) + D[:, None] * u  # (B, K, L, D)
    return scatter_sequences(y, hidden_states)


def mambapy_pscan(
    hidden_states: torch.Tensor,
    x_proj_weight: torch.Tensor,
    dt_proj_weight: torch.Tensor,
    dt_proj_bias: torch.Tensor,
    A_log: torch.Tensor,
    D: torch.Tensor,
) -> torch.Tensor:
    """Run the parallel scan of https://github.com/alxndrTL/mamba.py, which keeps the states of all steps in memory."""
    from mambapy.pscan import pscan

    u, delta, A, B, C = gather_sequences(hidden_states, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log)
    decay = torch.exp(delta[..., None] * A[:, None])  # (B, K, L, D, N)
    added = (delta * u)[..., None] * B[..., None, :]  # (B, K, L, D, N)
    h = pscan(decay.flatten(0, 1), added.flatten(0, 1)).unflatten(0, u.shape[:2])  # (B, K, L, D, N)
    y = (h @ C[..., None]).squeeze(-1) + D[:, None] * u  # (B, K, L, D)
    return scatter_sequences(y, hidden_states)


def mamba_ssm_scan(
    hidden_states: torch.Tensor,
    x_proj_weight: torch.Tensor,
    dt_proj_weight: torch.Tensor,
    dt_proj_bias: torch.Tensor,
    A_log: torch.Tensor,
    D: torch.Tensor,
) -> torch.Tensor:
    """Run the CUDA kernel of https://github.com/state-spaces/mamba with the copies of EfficientVMamba's authors.

    The copies gather the four groups of pixels into one tensor of sequences, channels first, and scatter them back.
    """
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    _, height, width, channels = hidden_states.shape
    num_groups, _, rank = dt_proj_weight.shape
    state_size = A_log.shape[-1]
    padded = F.pad(hidden_states, (0, 0, 0, width % 2, 0, height % 2)).permute(0, 3, 1, 2).float()  # (B, D, H, W)
    groups = [padded[:, :, k % 2 :: 2, k // 2 :: 2] for k in range(num_groups)]
    u = torch.stack([(group.mT if k % 2 else group).flatten(2) for k, group in enumerate(groups)], 1)  # (B, K, D, L)

    projected = torch.einsum("bkdl,kcd->bkcl", u, x_proj_weight)
    dt, B, C = projected.split([rank, state_size, state_size], dim=2)
    delta = torch.einsum("bkrl,kdr->bkdl", dt, dt_proj_weight)
    y = selective_scan_fn(
        u.flatten(1, 2),
        delta.flatten(1, 2),
        -torch.exp(A_log).flatten(0, 1),
        B.contiguous(),
        C.contiguous(),
        D.flatten(),
        delta_bias=dt_proj_bias.flatten(),
        delta_softplus=True,
    ).unflatten(1, (num_groups, channels))

    output = torch.empty_like(padded)
    rows, columns = groups[0].shape[2:]
    for k in range(num_groups):
        sizes = (columns, rows) if k % 2 else (rows, columns)
        group = y[:, k].unflatten(2, sizes)
        output[:, :, k % 2 :: 2, k // 2 :: 2] = group.mT if k % 2 else group
    return output[:, :, :height, :width].permute(0, 2, 3, 1).to(hidden_states.dtype)
