"""Maps (B, H, W, D) that are not contiguous in memory. They need sides of at least 5."""

import torch


STRIDED_MAPS = {
    "channels first in memory": lambda x: x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
    "expanded": lambda x: x[:1].expand(3, -1, -1, -1),
    "half of the channels of another map": lambda x: torch.cat([x, x + 1], dim=-1)[..., : x.shape[-1]],
    "transposed": lambda x: x.transpose(1, 2),
    "a window": lambda x: x[:, 1:, 2:5],
}
