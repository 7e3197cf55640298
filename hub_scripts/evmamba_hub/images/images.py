"""Read image files in the form that the networks take: upright, RGB, 8 bits a channel."""

import mmap
import os
import re
import stat
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageFile, TiffImagePlugin, UnidentifiedImageError

from evmamba_hub.errors import ProcessNotice, UserError


UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# TIFF tags of the values of black and white, for unsigned and for other samples
SMALLEST_VALUE_TAGS = (280, 340)  # MinSampleValue, SMinSampleValue
LARGEST_VALUE_TAGS = (281, 341)  # MaxSampleValue, SMaxSampleValue
WHITE_IS_ZERO, SIGNED = 0, 2  # values of the tags PhotometricInterpretation and SampleFormat

RAW_MODE_OF_16_BITS = re.compile(r"(L|LA|RGB[AaX]?);16[BLN]")  # Pillow's names of pixels in a file
LARGEST_16_BIT_VALUE = 0xFFFF
MISREAD_FORMATS = {"FITS"}  # Pillow takes the bytes of 16-bit values in the wrong order

# Modes of masks, and what holds the same values without transparency
MASK_MODES = {"1": "1", "L": "L", "LA": "L", "P": "P", "PA": "P", "RGB": "RGB", "RGBA": "RGB"}
LOSSY_FORMATS = {"JPEG", "MPO"}

MAX_BITS_OF_DARK_IMAGES = 14  # of 16. Cameras and scanners store 10 to 14 bits

# Whether `warn_once` has warned. Forked workers of a DataLoader share this byte.
has_warned = mmap.mmap(-1, 1)


def warn_once(notice: str) -> None:
    """Issue a notice about an image, unless there was one before. A dataset may hold thousands of such images."""
    if not has_warned[0]:
        has_warned[0] = 1
        warnings.warn(f"{notice}. Further such images are not reported", ProcessNotice, stacklevel=2)


def read_image(
    file: Path | BinaryIO, max_pixels: int | None = None, announce: Callable[[str], None] | None = None
) -> Image.Image:
    """Read an image as a viewer shows it: the first frame, rotated by its EXIF orientation, on a white background.

    Args:
        file: A path, or an open file.
        max_pixels: The largest accepted number of pixels. Larger images are rejected before they are decoded. Pillow's
            own limit always holds.
        announce: Takes a sentence about an image that is probably read too dark. The default is `warn_once`.

    Returns:
        The image in RGB, with 8 bits a channel.

    Raises:
        UserError: If the file cannot be opened, is no image, is damaged, is too large to decode safely, or holds
            numbers of unknown range.
    """
    if announce is None:
        name = file if isinstance(file, Path) else "an image"
        announce = lambda notice: warn_once(f"{name}: {notice}")  # noqa: E731, shorter than a function
    if isinstance(file, Path):
        with open_file(file) as opened:
            return decode(opened, max_pixels, announce)
    return decode(file, max_pixels, announce)


@contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file or a pipe.

    Raises:
        UserError: If the path is a device or a directory, or cannot be opened.
    """
    try:
        file = open(path, "rb", opener=open_at_once)  # noqa: SIM115, the next block closes it
    except OSError as error:
        raise UserError(f"it cannot be opened: {error.strerror}") from error
    with file:
        if stat.S_ISCHR(os.fstat(file.fileno()).st_mode):
            raise UserError("it is a device, which may have no end: give a file")
        yield file


def open_at_once(path: str, flags: int) -> int:
    """Open a path for reading. A named pipe that no program writes to is empty, instead of waiting for one."""
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    os.set_blocking(descriptor, True)
    return descriptor


def read_header(file: Path | BinaryIO) -> tuple[tuple[int, int], Image.Transpose | None]:
    """Read the width and height of an image as it is stored, and what turns it upright, without its pixels.

    Raises:
        UserError: If the file cannot be opened, or is no image.
    """
    opening = open_file(file) if isinstance(file, Path) else nullcontext(file)
    with opening as opened, translate_decoder_errors(), Image.open(opened) as image:
        return image.size, find_turn(image)


def decode(file: BinaryIO, max_pixels: int | None, announce: Callable[[str], None]) -> Image.Image:
    """Decode an image. `read_image` describes the arguments and errors."""
    with translate_decoder_errors(), Image.open(file) as opened:
        if max_pixels is not None and opened.width * opened.height > max_pixels:
            raise UserError(
                f"it has {opened.width} x {opened.height} pixels, at most {max_pixels:,} in all are accepted: "
                "resize it"
            )
        has_wide_colors = has_16_bit_colors(opened)
        opened.load()
        turn, image = find_turn(opened), to_8_bits(opened, announce)
        if has_wide_colors:
            largest = int(np.asarray(image.convert("RGB")).max())
            announce_darkness(largest << 8 | 0xFF, announce)
        if turn is not None:
            image = image.transpose(turn)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
        image.info.clear()  # with the orientation, transformers' pipelines would turn the image once more
        return image


@contextmanager
def translate_decoder_errors() -> Iterator[None]:
    """Translate what Pillow raises about a file into a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except UnidentifiedImageError as error:
        raise UserError("it is not an image in a format that Pillow reads") from error
    except MemoryError as error:
        raise UserError("there is not enough memory to decode it") from error
    except Exception as error:  # decoders of damaged files raise errors of any type
        is_unclear = isinstance(error, KeyError) or not str(error)
        reason = repr(error) if is_unclear else " ".join(str(error).split())
        raise UserError(f"it cannot be decoded: {reason}") from error


def read_mask(file: Path | BinaryIO) -> np.ndarray:
    """Read the values of a mask as they are stored, rotated by its EXIF orientation.

    Args:
        file: A path, or an open file.

    Returns:
        The values (H, W), of a palette the indices; or the colors (H, W, 3).

    Raises:
        UserError: If the file cannot be opened, is no image, is damaged, or cannot hold labels.
    """
    if isinstance(file, Path):
        with open_file(file) as opened:
            return decode_mask(opened)
    return decode_mask(file)


def decode_mask(file: BinaryIO) -> np.ndarray:
    """Decode a mask. `read_mask` describes the result and the errors."""
    with translate_decoder_errors(), Image.open(file) as image:
        if image.format in LOSSY_FORMATS:
            raise UserError(f"as {image.format}, it has other values than were saved: save masks as PNG")
        image.load()
        values = find_wide_values(image)
        if values is None:
            if image.mode not in MASK_MODES:
                raise UserError(f"it has pixels of the kind {image.mode}: save masks with one integer a pixel")
            values = np.asarray(image.convert(MASK_MODES[image.mode]))
        turn = find_turn(image)
        if turn is None:
            return values
        stored = Image.fromarray(values if values.ndim == 3 else values.astype(np.int32))
        return np.asarray(stored.transpose(turn))


def find_turn(image: Image.Image) -> Image.Transpose | None:
    """Return what turns an image upright by its EXIF or XMP orientation, or None if nothing does.

    Pillow's `exif_transpose` also writes the EXIF data anew, which fails if an entry is damaged.
    """
    orientation: Any = None
    with suppress(Exception):  # parsers of damaged data raise errors of any type
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    if orientation is None:
        with suppress(Exception):
            orientation = search_orientation(image.info["exif"].removeprefix(b"Exif\0\0"))
    return UPRIGHT.get(orientation)


def search_orientation(exif: bytes) -> int | None:
    """Return the orientation in the first directory of EXIF data. Pillow gives up at the first damaged entry."""
    order = {b"II": "<", b"MM": ">"}[exif[:2]]
    (start,) = struct.unpack_from(f"{order}L", exif, 4)
    (num_entries,) = struct.unpack_from(f"{order}H", exif, start)
    for entry in range(num_entries):
        tag, value = struct.unpack_from(f"{order}H6xH", exif, start + 2 + 12 * entry)
        if tag == ExifTags.Base.Orientation:
            return value
    return None


def has_16_bit_colors(image: ImageFile.ImageFile) -> bool:
    """Return whether an image that is not decoded yet has colors of 16 bits, of which Pillow keeps the upper 8."""
    return any(
        isinstance(each, str) and RAW_MODE_OF_16_BITS.fullmatch(each)
        for _, _, _, arguments in image.tile
        for each in (arguments if isinstance(arguments, tuple) else (arguments,))
    )


def find_wide_values(image: Image.Image) -> np.ndarray | None:
    """Return the values (H, W) of a gray image of more than 8 bits or with a sign, or None for other images."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        is_signed = find_tag(image, TiffImagePlugin.SAMPLEFORMAT) == SIGNED
        if image.mode == "L" and is_signed:  # Pillow takes the sign for a bit of the value
            return np.asarray(image).view(np.int8)
        if image.mode == "I" and not is_signed:  # and a bit of the value for the sign
            return np.asarray(image).view(np.uint32)
    return np.asarray(image) if image.mode.startswith("I") else None


def to_8_bits(image: Image.Image, announce: Callable[[str], None]) -> Image.Image:
    """Scale the integers of a gray image to 8 bits by the range that its file or its type gives.

    A transparent value gets an alpha channel. Other images stay as they are.

    Raises:
        UserError: If the range is unknown, or the image holds floating-point numbers.
    """
    if image.mode == "F":
        raise UserError("its pixels are floating-point numbers of unknown range: save it with 8 or 16 bits a channel")
    values = find_wide_values(image)
    if values is None:
        return image
    smallest, largest = int(values.min()), int(values.max())
    ranges = [each for each in find_ranges(image) if min(each) <= smallest and largest <= max(each)]
    if not ranges:
        raise UserError(
            f"its pixels are integers from {smallest} to {largest} of unknown range: save it with 8 or 16 bits a "
            "channel, without a sign"
        )
    black, white = ranges[0]
    if white == LARGEST_16_BIT_VALUE:
        announce_darkness(largest, announce)
    scaled = values.astype(np.float32)
    scaled -= black
    scaled *= 255  # exact for 16 bits
    scaled /= white - black
    gray = Image.fromarray(scaled.astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        gray.putalpha(Image.fromarray((values != transparent) * np.uint8(255)))
    return gray


def find_ranges(image: Image.Image) -> list[tuple[int, int]]:
    """Return the values of black and white in a gray image of integers: those in its file, and those of its type."""
    ranges = []
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        smallest, largest = find_tag(image, *SMALLEST_VALUE_TAGS) or 0, find_tag(image, *LARGEST_VALUE_TAGS)
        if largest is not None and largest > smallest:
            ranges.append((smallest, largest))
        if image.mode.startswith("I;16"):
            ranges.append((0, 2 ** (find_tag(image, TiffImagePlugin.BITSPERSAMPLE) or 16) - 1))
        if find_tag(image, TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == WHITE_IS_ZERO:
            ranges = [(white, black) for black, white in ranges]
    elif image.format in ("PNG", "PPM") or (image.mode.startswith("I;16") and image.format not in MISREAD_FORMATS):
        ranges.append((0, LARGEST_16_BIT_VALUE))
    return ranges


def find_tag(image: TiffImagePlugin.TiffImageFile, *tags: int) -> int | None:
    """Return the first integer of the first of the tags that an image has."""
    for tag in tags:
        with suppress(Exception):  # parsers of damaged data raise errors of any type
            value = image.tag_v2[tag]
            return int(value[0] if isinstance(value, tuple) else value)
    return None


def announce_darkness(largest: int, announce: Callable[[str], None]) -> None:
    """Announce that an image of 16 bits has no value above `largest`, if it probably holds fewer bits."""
    bits = largest.bit_length()
    if 0 < bits <= MAX_BITS_OF_DARK_IMAGES:
        announce(f"it uses {bits} of its 16 bits and is read as dark: if all images do, scale them to 16 bits")
