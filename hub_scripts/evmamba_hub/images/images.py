"""Read image files in the form that the networks take: upright, RGB, 8 bits a channel."""

from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageOps, UnidentifiedImageError

from evmamba_hub.errors import UserError


def read_image(file: Path | BinaryIO, max_pixels: int | None = None) -> Image.Image:
    """Read an image as a viewer shows it: the first frame, rotated by its EXIF orientation, on a white background.

    Args:
        file: A path, or an open file.
        max_pixels: The largest accepted number of pixels. Larger images are rejected before they are decoded. Pillow's
            own limit always holds.

    Returns:
        The image in RGB, with 8 bits a channel.

    Raises:
        UserError: If the file is no image, is damaged, or is too large to decode safely.
    """
    try:
        with Image.open(file) as opened:
            if max_pixels is not None and opened.width * opened.height > max_pixels:
                raise UserError(
                    f"it has {opened.width} x {opened.height} pixels, at most {max_pixels:,} in all are accepted: "
                    "resize it"
                )
            image: Image.Image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I"):  # 16 bits a channel, which Pillow's own conversion would clip at 255
                image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
            if image.mode == "F":
                raise UserError(
                    "its pixels are floating-point numbers of unknown range: save it with 8 or 16 bits a channel"
                )
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except UnidentifiedImageError as error:
        raise UserError("it is not an image in a format that Pillow reads") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"it cannot be decoded: {error}") from error
