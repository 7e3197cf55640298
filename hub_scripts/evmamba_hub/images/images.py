"""Image files as the networks want them: upright, RGB, 8 bits a channel."""

from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageOps, UnidentifiedImageError

from evmamba_hub.errors import UserError


def find_images(paths: list[Path]) -> list[Path]:
    """The files among `paths`, and those inside its folders that have the ending of an image format, in order.

    Raises:
        UserError: for a path that does not exist and for folders without images.
    """
    endings = Image.registered_extensions()
    found = []
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in endings and file.is_file())
            if not inside:
                raise UserError(f"the folder {path} holds no image")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise UserError(f"{path} does not exist")
    return found


def read_image(file: Path | BinaryIO, max_pixels: int | None = None) -> Image.Image:
    """An image as a person sees it: turned as its EXIF data say, on white where it is transparent, the first frame.

    Args:
        file: a path, or an open file.
        max_pixels: larger images are refused before they are decoded. Pillow's own limit holds in any case.

    Raises:
        UserError: for files that are no image, are damaged, or too large to be decoded safely.
    """
    try:
        with Image.open(file) as opened:
            if max_pixels is not None and opened.width * opened.height > max_pixels:
                raise UserError(
                    f"it has {opened.width} x {opened.height} pixels, at most {max_pixels:,} in all are accepted"
                )
            image: Image.Image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I"):  # 16 bits a channel; Pillow's own conversion would clip at 255
                image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
            if image.mode == "F":
                raise UserError("its pixels are floating point numbers of unknown range, save it with 8 or 16 bits")
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except UnidentifiedImageError as error:
        raise UserError("it is not an image in a format that Pillow reads") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"it cannot be decoded: {error}") from error
