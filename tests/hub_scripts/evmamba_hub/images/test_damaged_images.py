"""Damaged files of all formats that Pillow writes and reads: each one is read, or refused with a reason."""

import resource
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from evmamba_hub.errors import UserError
from evmamba_hub.images.images import read_image


Image.init()  # registers all formats

WIDTH, HEIGHT = 24, 16
MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "I;16", "CMYK")
NUM_MUTATIONS = 300  # of each format
MAX_SECONDS = 10.0  # of the CPU for a file. Most take milliseconds, and those that claim to be huge take 2 s
MAX_BYTES = 1536 * 1024**2  # Pillow decodes up to 179 million pixels of 4 bytes, and a conversion needs as many

VARIANTS = {  # mode and options, beside all modes with the defaults
    "AVIF": [("RGB", {"lossless": True})],
    "BLP": [("P", {"blp_version": "BLP1"})],
    "DDS": [("RGB", {"pixel_format": "DXT1"}), ("RGBA", {"pixel_format": "DXT5"})],
    "GIF": [("L", {"save_all": True, "append_images": [Image.new("L", (WIDTH, HEIGHT), 200)]})],
    "ICO": [("RGBA", {"bitmap_format": "bmp"})],
    "JPEG": [("RGB", {"progressive": True})],
    "JPEG2000": [("RGB", {"no_jp2": True})],
    "PNG": [("RGB", {"save_all": True, "append_images": [Image.new("RGB", (WIDTH, HEIGHT), "red")]})],
    "SGI": [("L", {"bpc": 2})],
    "TGA": [("RGB", {"compression": "tga_rle"})],
    "TIFF": [  # Pillow crashes when it writes compressed files of other modes
        ("1", {"compression": "group4"}),
        ("RGB", {"compression": "jpeg"}),
        ("RGB", {"compression": "packbits"}),
        ("RGB", {"compression": "tiff_deflate"}),
        ("RGB", {"compression": "tiff_lzw"}),
    ],
    "WEBP": [("RGB", {"lossless": True})],
}


def create_exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees
    exif[0x010F] = "Maker of cameras"
    return exif


def write_all(format: str) -> list[bytes]:
    """Return files of a format in all modes and variants that Pillow writes and reads, with EXIF data."""
    gray = Image.effect_noise((WIDTH, HEIGHT), 90)
    files = []
    for mode, options in [*((mode, {}) for mode in MODES), *VARIANTS.get(format, [])]:
        image = Image.fromarray(np.asarray(gray) * np.uint16(257)) if mode == "I;16" else gray.convert(mode)
        with suppress(OSError, ValueError, KeyError, UserError):
            image.save(file := BytesIO(), format, exif=create_exif(), **options)
            read_image(file)
            files.append(file.getvalue())
    return files


def find_place(content: bytes, rng: np.random.Generator) -> int:
    """Return a random place in a file. Headers are damaged more often than pixels."""
    end = len(content) if rng.random() < 0.5 else min(len(content), 200)
    return int(rng.integers(end))


def cut(content: bytes, rng: np.random.Generator) -> bytes:
    return content[: rng.integers(len(content))]


def change_bytes(content: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.integers(1, 9)):
        changed[find_place(content, rng)] = rng.integers(256)
    return bytes(changed)


def flip_bits(content: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        changed[find_place(content, rng)] ^= 1 << rng.integers(8)
    return bytes(changed)


def insert_bytes(content: bytes, rng: np.random.Generator) -> bytes:
    place = find_place(content, rng)
    return content[:place] + rng.bytes(rng.integers(1, 9)) + content[place:]


def remove_bytes(content: bytes, rng: np.random.Generator) -> bytes:
    place = find_place(content, rng)
    return content[:place] + content[place + rng.integers(1, 9) :]


def fill(content: bytes, rng: np.random.Generator) -> bytes:
    """Fill a part with zeros or ones, as lost blocks of a disk are, and the largest numbers of a header."""
    place, length = find_place(content, rng), int(rng.integers(1, 33))
    return (content[:place] + bytes([rng.choice([0, 255])]) * length + content[place + length :])[: len(content)]


DAMAGES: list[Callable[[bytes, np.random.Generator], bytes]] = [
    cut,
    change_bytes,
    flip_bits,
    insert_bytes,
    remove_bytes,
    fill,
]


def damage_all(format: str) -> Iterator[bytes]:
    rng = np.random.default_rng(zlib.crc32(format.encode()))
    files = write_all(format)
    if not files:
        pytest.skip(f"Pillow writes no {format} here that it reads")
    for number in range(NUM_MUTATIONS):
        yield DAMAGES[number % len(DAMAGES)](files[rng.integers(len(files))], rng)


def find_size(content: bytes) -> tuple[int, int]:
    with Image.open(BytesIO(content)) as image:
        return image.size


def measure_peak_memory() -> int:
    """Return the largest memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format", sorted(Image.SAVE))
def test_damaged_files_are_read_or_refused(format):
    outcomes, memory = Counter(), measure_peak_memory()
    for number, content in enumerate(damage_all(format)):
        start = time.process_time()
        try:
            image = read_image(BytesIO(content))
        except UserError as error:
            assert str(error).strip(), number
            outcomes["refused"] += 1
        else:
            assert image.mode == "RGB", number
            assert sorted(image.size) == sorted(find_size(content)), number
            outcomes["read"] += 1
        assert time.process_time() - start < MAX_SECONDS, number
    assert measure_peak_memory() - memory < MAX_BYTES
    assert outcomes["read"] > 0 and outcomes["refused"] > 0 and outcomes.total() == NUM_MUTATIONS
