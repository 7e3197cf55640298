"""The atrous selective scan in PyTorch operators: any device, differentiable, exportable with dynamic sizes.

A Python loop over all pixels would be slow, and would fix the graph to one image size. Instead, this module cuts each
sequence into chunks of `CHUNK_LENGTH` steps, and runs all chunks in parallel:

    1. Run every chunk from zero, which gives what it adds to the state.
    2. Carry the state from chunk to chunk with a logarithmic scan, `carry_between_chunks`.
    3. Run every chunk again from its carried state, which gives the outputs.

Decays are always exp(A * sum of delta), never a quotient. So nothing overflows, and a state that has decayed to zero
loses no precision. Symbols and shapes: `kernels/README.md`.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F


NUM_GROUPS = 4  # skip sampling with step 2 in both directions

# Steps of a chunk. The loops below have CHUNK_LENGTH iterations for any image, and hold the states of one step of
# each chunk. Longer chunks take less memory, but more overhead for small feature maps.
CHUNK_LENGTH = 16

# Rounds of the scan over chunks if their number is symbolic. Enough for 2**20 chunks, or feature maps of 8192 x 8192.
MAX_CARRY_ROUNDS = 20


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Disable autocast if the device supports it, to keep the precision of matrix products."""
    is_available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if is_available else nullcontext()


def pixels_of_steps(
    height: int, width: int, num_steps: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the pixel of the flattened feature map that each step visits, and whether the step is inside: `(4, L)`.

    Steps of the padding, and steps after the end of the sequence, are outside. Their pixel is 0.
    """
    rows, columns = (height + 1) // 2, (width + 1) // 2
    step = torch.arange(num_steps, device=device)
    by_row = torch.stack([step // columns, step % columns])  # the cell of 2 x 2 pixels, (row, column), (2, L)
    by_column = torch.stack([step % rows, step // rows])
    cell = torch.stack([by_row, by_column, by_row, by_column])  # (4, 2, L)
    parity = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1]], device=device)[..., None]  # (4, 2, 1)
    row, column = (2 * cell + parity).unbind(1)
    inside = (row < height) & (column < width)
    return torch.where(inside, row * width + column, 0), inside


def steps_of_pixels(height: int, width: int, num_steps: int, device: torch.device) -> torch.Tensor:
    """Return the step of each pixel in the four concatenated sequences of `num_steps` steps, `(H, W)`."""
    rows, columns = (height + 1) // 2, (width + 1) // 2
    row = torch.arange(height, device=device)[:, None]
    column = torch.arange(width, device=device)
    by_row, by_column = (row // 2) * columns + column // 2, (column // 2) * rows + row // 2
    group = row % 2 + 2 * (column % 2)
    return group * num_steps + torch.where(row % 2 == 0, by_row, by_column)


def advance(
    h: torch.Tensor,  # (B, K, G, D, N)
    delta: torch.Tensor,  # (B, K, G, D)
    u: torch.Tensor,  # (B, K, G, D)
    A: torch.Tensor,  # (K, 1, D, N)
    B: torch.Tensor,  # (B, K, G, N)
) -> torch.Tensor:  # (B, K, G, D, N)
    """Advance every chunk by one step of the recurrence."""
    return torch.exp(delta[..., None] * A) * h + (delta * u)[..., None] * B[..., None, :]


def carry_between_chunks(added: torch.Tensor, time: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    """Return the state at the start of each chunk, `(B, K, G, D, N)`, with a Hillis-Steele scan over the chunks.

    After the round with shift s, each place accounts for the 2s chunks before it.

    Args:
        added: State after each chunk that starts from zero, `(B, K, G, D, N)`.
        time: Sum of the deltas of each chunk, `(B, K, G, D)`.
        A: `(K, 1, D, N)`.
    """
    # Place g holds the chunk before chunk g. Place 0 holds no state and no time: lookups before the start clamp to it.
    added = torch.cat([torch.zeros_like(added[:, :, :1]), added], dim=2)  # (B, K, G + 1, D, N)
    time = torch.cat([torch.zeros_like(time[:, :, :1]), time], dim=2)  # (B, K, G + 1, D)
    num_places = added.shape[2]
    rounds = (num_places - 1).bit_length() if isinstance(num_places, int) else MAX_CARRY_ROUNDS
    places = torch.arange(num_places, device=added.device)
    for shift in (2**i for i in range(rounds)):
        earlier = (places - shift).clamp(min=0)
        added = added + torch.exp(time[..., None] * A) * added.index_select(2, earlier)
        time = time + time.index_select(2, earlier)
    return added[:, :, :-1]


def atrous_selective_scan_torch(
    hidden_states: torch.Tensor,  # (B, H, W, D)
    x_proj_weight: torch.Tensor,  # (K, R + 2N, D)
    dt_proj_weight: torch.Tensor,  # (K, D, R)
    dt_proj_bias: torch.Tensor,  # (K, D)
    A_log: torch.Tensor,  # (K, D, N)
    D: torch.Tensor,  # (K, D)
) -> torch.Tensor:  # (B, H, W, D)
    """Compute the operator in float32 (float64 stays float64). Returns the dtype of `hidden_states`."""
    batch_size, height, width, channels = hidden_states.shape
    rank, state_size = dt_proj_weight.shape[-1], A_log.shape[-1]
    device = hidden_states.device
    dtype = torch.float64 if hidden_states.dtype == torch.float64 else torch.float32
    length = ((height + 1) // 2) * ((width + 1) // 2)
    # Steps after the end of a sequence change nothing before it. At least two chunks are needed. PyTorch treats a size
    # of 1 as a constant, so an exported graph could not cover both one chunk and many.
    num_chunks = length // CHUNK_LENGTH + 2
    num_steps = num_chunks * CHUNK_LENGTH

    with without_autocast(device):
        pixels, inside = pixels_of_steps(height, width, num_steps, device)
        visited = hidden_states.to(dtype).flatten(1, 2)[:, pixels]  # (B, K, G * T, D)
        sequences = torch.where(inside[..., None], visited, 0)
        u = sequences.unflatten(2, (num_chunks, CHUNK_LENGTH))  # (B, K, G, T, D)

        projected = u @ x_proj_weight.to(dtype).mT[:, None]  # (B, K, G, T, R + 2N)
        dt, B, C = projected.split([rank, state_size, state_size], dim=-1)
        delta = F.softplus(dt @ dt_proj_weight.to(dtype).mT[:, None] + dt_proj_bias.to(dtype)[:, None, None])
        A = -torch.exp(A_log.to(dtype))[:, None]  # (K, 1, D, N)

        steps = list(zip(delta.unbind(3), u.unbind(3), B.unbind(3), C.unbind(3), strict=True))
        h = u.new_zeros(batch_size, NUM_GROUPS, num_chunks, channels, state_size)
        for delta_t, u_t, B_t, _ in steps:
            h = advance(h, delta_t, u_t, A, B_t)
        h = carry_between_chunks(h, delta.sum(dim=3), A)
        outputs = []
        for delta_t, u_t, B_t, C_t in steps:
            h = advance(h, delta_t, u_t, A, B_t)
            outputs.append((h @ C_t[..., None]).squeeze(-1))

        y = torch.stack(outputs, dim=3) + D.to(dtype)[:, None, None] * u  # (B, K, G, T, D)
        places = steps_of_pixels(height, width, num_steps, device)
        return y.flatten(1, 3)[:, places].to(hidden_states.dtype)
