"""Drawings of maps and paths over the input image of the network."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw


VIEW_SIDE = 448  # small images are enlarged to about this many pixels, by a whole factor

FOR, AGAINST, REACH = (213, 94, 0), (0, 114, 178), (230, 159, 0)  # distinct for color-blind readers (Okabe and Ito)
GROUP_COLORS = {"orange": (230, 159, 0), "blue": (86, 180, 233), "green": (0, 158, 115), "pink": (204, 121, 167)}

DECADES = 4  # of influence, from the strongest pixel down, that a receptive field shows


def to_picture(pixel_values: torch.Tensor, mean: list[float], std: list[float]) -> Image.Image:
    """Undoes the normalization of (1, C, H, W), and enlarges the image without smoothing."""
    colors = pixel_values[0].permute(1, 2, 0).cpu() * torch.tensor(std) + torch.tensor(mean)  # (H, W, C)
    colors = colors.expand(-1, -1, 3)  # gray or RGB to RGB
    image = Image.fromarray((colors * 255).round().clamp(0, 255).to(torch.uint8).numpy())
    scale = max(1, round(VIEW_SIDE / max(image.size)))
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def tint(picture: Image.Image, color: tuple[int, int, int], strength: torch.Tensor, smooth: bool) -> Image.Image:
    """Blends a color into a picture by a map (H, W) from 0 to 1."""
    size = {"size": (picture.height, picture.width), "mode": "bilinear" if smooth else "nearest"}
    alpha = F.interpolate(strength[None, None].float().cpu(), **size)[0, 0]
    mask = Image.fromarray((alpha * 255).round().clamp(0, 255).to(torch.uint8).numpy())
    return Image.composite(Image.new("RGB", picture.size, color), picture, mask)


def draw_activation(picture: Image.Image, activation: torch.Tensor, opacity: float) -> Image.Image:
    """Draws a map (H, W) over the picture: positive values in `FOR`, negative ones in `AGAINST`."""
    strength = opacity * activation / activation.abs().max().clamp_min(1e-12)
    picture = tint(picture.convert("L").convert("RGB"), FOR, strength.clamp_min(0), smooth=True)
    return tint(picture, AGAINST, (-strength).clamp_min(0), smooth=True)


def draw_receptive_field(picture: Image.Image, influence: torch.Tensor, row: float, column: float) -> Image.Image:
    """Draws influences (H, W) on a logarithmic scale, and a ring at a place in fractions of the sides."""
    decades = (influence / influence.max().clamp_min(1e-30)).clamp_min(10.0**-DECADES).log10()
    picture = tint(picture.convert("L").convert("RGB"), REACH, 1 + decades / DECADES, smooth=False)
    x, y, radius = column * picture.width, row * picture.height, max(picture.size) / 60
    draw = ImageDraw.Draw(picture)
    for width, color in [(5, "black"), (2, "white")]:
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=color, width=width)
    return picture


def draw_scan(
    picture: Image.Image, paths: list[torch.Tensor], height: int, width: int, progress: float
) -> Image.Image:
    """Draws the paths of the groups over the picture, up to a fraction of their steps.

    Args:
        picture: Input image of the network.
        paths: (row, column) pairs (N, 2) on a map of height x width cells, per group.
        height, width: Sides of the map.
        progress: Fraction of the steps to draw, from 0 to 1.
    """
    picture = Image.blend(picture.convert("L").convert("RGB"), Image.new("RGB", picture.size, "black"), 0.5)
    draw = ImageDraw.Draw(picture)
    cell = np.array([picture.width / width, picture.height / height])
    for path, color in zip(paths, GROUP_COLORS.values(), strict=True):
        if len(path) == 0:
            continue  # maps of one row or one column have fewer groups
        steps = path[: max(1, round(progress * len(path)))].numpy()
        centers = [tuple(center) for center in (steps[:, ::-1] + 0.5) * cell]  # (x, y)
        draw.line(centers, fill=color, width=max(1, round(cell.min() / 6)))
        for (x, y), size in [(centers[0], cell.min() / 4), (centers[-1], cell.min() / 2.5)]:
            draw.ellipse((x - size, y - size, x + size, y + size), fill=color, outline="white")
    return picture
