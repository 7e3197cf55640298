"""The atrous selective scan as a plain loop over the sequence. It is slow, short, and close to the paper.

Paper: "EfficientVMamba: Atrous Selective Scan for Light Weight Visual Mamba", arXiv 2403.09977, section 3.2 (skip
sampling). It builds on "Mamba", arXiv 2312.00752, equations 2 to 4 (discretization, recurrence). `kernels/README.md`
explains the symbols.
"""

import torch
import torch.nn.functional as F


def group_pixels(height: int, width: int, group: int) -> list[tuple[int, int]]:
    """Return the pixels (row, column) of one scan group, in the order of its sequence."""
    rows = range(group % 2, height, 2)
    columns = range(group // 2, width, 2)
    if group % 2 == 0:
        return [(row, column) for row in rows for column in columns]
    return [(row, column) for column in columns for row in rows]


def atrous_selective_scan_reference(
    hidden_states: torch.Tensor,  # (B, H, W, D)
    x_proj_weight: torch.Tensor,  # (K, R + 2N, D)
    dt_proj_weight: torch.Tensor,  # (K, D, R)
    dt_proj_bias: torch.Tensor,  # (K, D)
    A_log: torch.Tensor,  # (K, D, N)
    D: torch.Tensor,  # (K, D)
) -> torch.Tensor:  # (B, H, W, D)
    """Run the recurrence step by step, group by group, in the dtype of the inputs."""
    batch_size, height, width, channels = hidden_states.shape
    num_groups, _, rank = dt_proj_weight.shape
    state_size = A_log.shape[-1]

    padded = F.pad(hidden_states, (0, 0, 0, width % 2, 0, height % 2))  # even sides: zeros at the bottom and right
    output = torch.empty_like(padded)
    for k in range(num_groups):
        A = -torch.exp(A_log[k])  # (D, N)
        h = padded.new_zeros(batch_size, channels, state_size)  # the state before the first step
        for row, column in group_pixels(padded.shape[1], padded.shape[2], k):
            u = padded[:, row, column]  # (B, D)
            dt, B, C = (u @ x_proj_weight[k].T).split([rank, state_size, state_size], dim=-1)
            delta = F.softplus(dt @ dt_proj_weight[k].T + dt_proj_bias[k])  # (B, D)
            h = torch.exp(delta[..., None] * A) * h + (delta * u)[..., None] * B[:, None, :]  # (B, D, N)
            output[:, row, column] = (h * C[:, None, :]).sum(-1) + D[k] * u
    return output[:, :height, :width]


def random_arguments(
    batch_size: int,
    height: int,
    width: int,
    channels: int,
    state_size: int = 16,
    rank: int = 3,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> list[torch.Tensor]:
    """Return random arguments of the operator for tests and benchmarks, with magnitudes as in a network.

    Args:
        dtype: Dtype of the feature map. The parameters are float64 if it is float64, else float32.
    """
    generator = torch.Generator(device).manual_seed(seed)
    parameter_dtype = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=parameter_dtype, device=device)

    hidden_states, *parameters = [
        normal(batch_size, height, width, channels),
        normal(4, rank + 2 * state_size, channels) / channels**0.5,
        normal(4, channels, rank) / rank**0.5,
        normal(4, channels) - 2,  # time steps around 0.1
        normal(4, channels, state_size).abs(),
        normal(4, channels),
    ]
    return [hidden_states.to(dtype), *parameters]
