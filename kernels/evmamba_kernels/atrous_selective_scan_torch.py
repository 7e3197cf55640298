"""The atrous selective scan in PyTorch operators: any device, differentiable, exportable with dynamic sizes.

A Python loop over all pixels would be slow and would fix the graph to one image size. Here each sequence is cut into
chunks of `CHUNK_LENGTH` steps. The recurrence runs inside all chunks at once, a logarithmic scan carries the state
from chunk to chunk, and a second run inside the chunks starts from the carried states:

    1. `run_chunks` from zero        -> what each chunk adds to the state
    2. `carry_between_chunks`        -> the state at the start of each chunk
    3. `run_chunks` from those       -> the outputs

Decays are always exp(A * sum of delta), never a quotient, so nothing overflows and nothing loses precision where a
state has decayed to zero. Symbols and shapes: `kernels/README.md`.
"""

import torch
import torch.nn.functional as F


# Steps inside a chunk. The loops below are CHUNK_LENGTH operators long whatever the image; states are kept for one
# step of every chunk at a time, so memory falls with the length and the overhead of small maps grows with it.
CHUNK_LENGTH = 32

# Rounds of the scan over chunks when the number of chunks is symbolic: enough for 2**20 chunks.
MAX_CARRY_ROUNDS = 20


def split_groups(hidden_states: torch.Tensor) -> torch.Tensor:
    """Skip-samples a map with even sides, (B, H, W, D), into its four sequences, (B, 4, L, D) with L = H * W / 4."""
    batch_size, height, width, channels = hidden_states.shape
    cells = hidden_states.reshape(batch_size, height // 2, 2, width // 2, 2, channels)
    by_row = cells[:, :, 0].permute(0, 3, 1, 2, 4)  # groups 0 and 2: (B, 2, H/2, W/2, D)
    by_column = cells[:, :, 1].permute(0, 3, 2, 1, 4)  # groups 1 and 3: (B, 2, W/2, H/2, D)
    length = (height // 2) * (width // 2)
    pairs = [by_row.reshape(batch_size, 2, length, channels), by_column.reshape(batch_size, 2, length, channels)]
    return torch.stack(pairs, dim=2).flatten(1, 2)


def merge_groups(sequences: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Puts four sequences, (B, 4, L, D), back to the pixels of a map with even sides, (B, H, W, D)."""
    batch_size, _, _, channels = sequences.shape
    by_row = sequences[:, 0::2].reshape(batch_size, 2, height // 2, width // 2, channels).permute(0, 2, 3, 1, 4)
    by_column = sequences[:, 1::2].reshape(batch_size, 2, width // 2, height // 2, channels).permute(0, 3, 2, 1, 4)
    return torch.stack([by_row, by_column], dim=2).reshape(batch_size, height, width, channels)


def run_chunks(
    h: torch.Tensor,  # (B, K, G, D, N), the state before the first step of each chunk
    delta: torch.Tensor,  # (B, K, G, T, D)
    u: torch.Tensor,  # (B, K, G, T, D)
    A: torch.Tensor,  # (K, 1, D, N)
    B: torch.Tensor,  # (B, K, G, T, N)
    C: torch.Tensor | None,  # (B, K, G, T, N)
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Runs the recurrence inside every chunk.

    Returns the last states and, where C is given, the products h C of every step, (B, K, G, D) each.
    """
    delta_u = delta * u
    outputs = []
    for t in range(CHUNK_LENGTH):
        decay = torch.exp(delta[..., t, :, None] * A)  # (B, K, G, D, N)
        h = decay * h + delta_u[..., t, :, None] * B[..., t, None, :]
        if C is not None:
            outputs.append((h @ C[..., t, :, None]).squeeze(-1))
    return h, outputs


def carry_between_chunks(added: torch.Tensor, time: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    """The state at the start of each chunk, (B, K, G, D, N), by a Hillis-Steele scan over the chunks.

    `added` (B, K, G, D, N) is the state that a chunk leaves behind when it starts from zero, `time` (B, K, G, D) the
    sum of its deltas. After the round with shift s, chunk g accounts for the 2s chunks that end with g.
    """
    num_chunks = added.shape[2]
    rounds = (num_chunks - 1).bit_length() if isinstance(num_chunks, int) else MAX_CARRY_ROUNDS
    for shift in (2**i for i in range(rounds)):
        # the chunk `shift` places earlier; before the first chunk there is no state and no time
        earlier = F.pad(added, (0, 0, 0, 0, shift, 0))[:, :, :num_chunks]
        added = added + torch.exp(time[..., None] * A) * earlier
        time = time + F.pad(time, (0, 0, shift, 0))[:, :, :num_chunks]
    return F.pad(added, (0, 0, 0, 0, 1, 0))[:, :, :num_chunks]


def atrous_selective_scan_torch(
    hidden_states: torch.Tensor,  # (B, H, W, D)
    x_proj_weight: torch.Tensor,  # (K, R + 2N, D)
    dt_proj_weight: torch.Tensor,  # (K, D, R)
    dt_proj_bias: torch.Tensor,  # (K, D)
    A_log: torch.Tensor,  # (K, D, N)
    D: torch.Tensor,  # (K, D)
) -> torch.Tensor:  # (B, H, W, D)
    """The operator in float32 (float64 stays float64), returned in the dtype of `hidden_states`."""
    _, height, width, _ = hidden_states.shape
    rank, state_size = dt_proj_weight.shape[-1], A_log.shape[-1]
    dtype = torch.float64 if hidden_states.dtype == torch.float64 else torch.float32

    # autocast would take the matrix products below to half precision
    with torch.autocast(device_type=hidden_states.device.type, enabled=False):
        even_height, even_width = height + height % 2, width + width % 2
        padded = F.pad(hidden_states.to(dtype), (0, 0, 0, width % 2, 0, height % 2))
        sequences = split_groups(padded)  # (B, K, L, D)
        length = sequences.shape[2]
        # steps after the end of a sequence change nothing before it
        chunks = F.pad(sequences, (0, 0, 0, -length % CHUNK_LENGTH)).unflatten(2, (-1, CHUNK_LENGTH))

        u = chunks  # (B, K, G, T, D)
        projected = u @ x_proj_weight.to(dtype).mT[:, None]  # (B, K, G, T, R + 2N)
        dt, B, C = projected.split([rank, state_size, state_size], dim=-1)
        delta = F.softplus(dt @ dt_proj_weight.to(dtype).mT[:, None] + dt_proj_bias.to(dtype)[:, None, None])
        A = -torch.exp(A_log.to(dtype))[:, None]  # (K, 1, D, N)

        at_rest = u.new_zeros(u.shape[:3] + A.shape[-2:])
        added, _ = run_chunks(at_rest, delta, u, A, B, None)
        start = carry_between_chunks(added, delta.sum(dim=3), A)
        _, outputs = run_chunks(start, delta, u, A, B, C)

        y = torch.stack(outputs, dim=3) + D.to(dtype)[:, None, None] * u  # (B, K, G, T, D)
        merged = merge_groups(y.flatten(2, 3)[:, :, :length], even_height, even_width)
        return merged[:, :height, :width].to(hidden_states.dtype)
