import os
import struct
import warnings
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps, TiffImagePlugin, TiffTags

from evmamba_hub.errors import Notice, UserError
from evmamba_hub.images import images
from evmamba_hub.images.images import read_image


ORIENTATION, X_RESOLUTION, EXIF_DIRECTORY = 0x0112, 0x011A, 0x8769
MIN_SAMPLE_VALUE, MAX_SAMPLE_VALUE, SIGNED_MIN_SAMPLE_VALUE, SIGNED_MAX_SAMPLE_VALUE = 280, 281, 340, 341


@pytest.fixture(autouse=True)
def forget_notices(monkeypatch):
    """Let every test see its first notice."""
    monkeypatch.setattr(images, "has_warned", bytearray(1))


def read_gray(file: Path | BytesIO) -> list[int]:
    """Return the first row of an image that must be gray, without notices."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        row = np.asarray(read_image(file))[0]
    assert (row == row[:, :1]).all()
    return row[:, 0].tolist()


def create_tiff(values: list[int], dtype: str, tags: dict[int, tuple[int, int]] | None = None) -> BytesIO:
    """Return a TIFF of one row, little-endian, with further tags as (type, value)."""
    pixels = np.array(values, dtype=dtype)
    entries = {
        256: (TiffTags.SHORT, len(values)),  # width
        257: (TiffTags.SHORT, 1),  # height
        258: (TiffTags.SHORT, 8 * pixels.itemsize),  # bits
        262: (TiffTags.SHORT, 1),  # black is zero
        273: (TiffTags.LONG, 8),  # offset of the pixels
        277: (TiffTags.SHORT, 1),  # samples per pixel
        279: (TiffTags.LONG, pixels.nbytes),
        339: (TiffTags.SHORT, {"u": 1, "i": 2}[pixels.dtype.kind]),
        **(tags or {}),
    }
    kinds = {TiffTags.SHORT: "Hxx", TiffTags.LONG: "L", TiffTags.SIGNED_SHORT: "hxx", TiffTags.SIGNED_LONG: "l"}
    directory = struct.pack("<H", len(entries))
    for tag, (kind, value) in sorted(entries.items()):
        directory += struct.pack(f"<HHL{kinds[kind]}", tag, kind, 1, value)
    data = pixels.tobytes() + bytes(-pixels.nbytes % 2)
    return BytesIO(struct.pack("<2sHL", b"II", 42, 8 + len(data)) + data + directory + bytes(4))


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    Image.fromarray(np.array([[0, 0x8080, 0xFFFF]], dtype=np.uint16)).save(tmp_path / "deep.png")
    assert np.asarray(read_image(tmp_path / "deep.png"))[0, :, 0].tolist() == [0, 0x80, 0xFF]


@pytest.mark.parametrize("format, extension", [("PNG", "png"), ("TIFF", "tiff"), ("PPM", "pgm"), ("JPEG2000", "jp2")])
def test_every_value_of_sixteen_bits_keeps_its_place(format, extension, tmp_path):
    """The bytes are those of Pillow's own scaling, `value * (1 / 257)`."""
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(values).save(tmp_path / f"deep.{extension}", format)
    assert (np.asarray(read_image(tmp_path / f"deep.{extension}"))[:, :, 1] == values // 257).all()


@pytest.mark.parametrize("byte_order", ["<", ">"])
def test_both_byte_orders_of_sixteen_bits_are_read(byte_order):
    values = np.array([[0, 0x8080, 0xFFFF]], dtype=f"{byte_order}u2")
    mode = {"<": "I;16", ">": "I;16B"}[byte_order]
    Image.frombytes(mode, (3, 1), values.tobytes()).save(file := BytesIO(), "TIFF")
    assert Image.open(file).mode == mode
    assert read_gray(file) == [0, 0x80, 0xFF]


@pytest.mark.parametrize("magic", ["P2", "P5"])
@pytest.mark.parametrize("largest", [255, 1000, 4095, 65535])
def test_portable_graymaps_are_scaled_by_their_largest_value(magic, largest):
    values = [0, largest // 2, largest]
    if magic == "P2":
        pixels = " ".join(map(str, values)).encode()
    else:
        pixels = np.array(values, dtype="u1" if largest < 256 else ">u2").tobytes()
    assert read_gray(BytesIO(f"{magic} 3 1 {largest}\n".encode() + pixels)) == [0, 127, 255]


@pytest.mark.parametrize(
    "values, dtype, tags",
    [
        ([0, 2000, 4000], "<u2", {MAX_SAMPLE_VALUE: (TiffTags.SHORT, 4000)}),
        ([0, 2000, 4000], "<i4", {MAX_SAMPLE_VALUE: (TiffTags.LONG, 4000)}),
        ([0, 2000, 4000], "<i4", {SIGNED_MAX_SAMPLE_VALUE: (TiffTags.SIGNED_LONG, 4000)}),
        ([100, 600, 1100], "<u4", {MIN_SAMPLE_VALUE: (3, 100), MAX_SAMPLE_VALUE: (3, 1100)}),
        ([0, 2**31, 2**32 - 1], "<u4", {MAX_SAMPLE_VALUE: (TiffTags.LONG, 2**32 - 1)}),
        ([-1000, 0, 1000], "<i2", {SIGNED_MIN_SAMPLE_VALUE: (8, -1000), SIGNED_MAX_SAMPLE_VALUE: (8, 1000)}),
        ([0, 50, 100], "i1", {SIGNED_MAX_SAMPLE_VALUE: (TiffTags.SIGNED_SHORT, 100)}),
    ],
)
def test_integers_are_scaled_by_the_range_that_their_file_gives(values, dtype, tags):
    assert read_gray(create_tiff(values, dtype, tags)) == [0, 127, 255]


def test_a_wrong_range_of_sixteen_bits_is_ignored():
    tags = {MAX_SAMPLE_VALUE: (TiffTags.SHORT, 255)}
    assert read_gray(create_tiff([0, 0x8080, 0xFFFF], "<u2", tags)) == [0, 0x80, 0xFF]


def test_twelve_bits_of_a_tiff_are_scaled_by_twelve_bits():
    packed = bytes([0x00, 0x07, 0xFF, 0xFF, 0xF0, 0x00])  # 0, 2047, 4095, 0
    tags = {256: (3, 4), 258: (3, 12), 279: (4, len(packed))}
    assert read_gray(create_tiff(list(packed), "u1", tags)) == [0, 127, 255, 0]


def test_zero_is_white_where_a_tiff_says_so():
    assert read_gray(create_tiff([0, 0x8080, 0xFFFF], "<u2", {262: (TiffTags.SHORT, 0)})) == [255, 127, 0]


@pytest.mark.parametrize(
    "values, dtype, tags",
    [
        ([0, 255], "<i4", {}),
        ([0, 255], "<u4", {}),
        ([0, 2**32 - 1], "<u4", {}),
        ([0, 70_000], "<i4", {}),
        ([-1, 70_000], "<i4", {MAX_SAMPLE_VALUE: (TiffTags.LONG, 70_000)}),  # whose smallest value is 0
        ([0, 70_000], "<i4", {MAX_SAMPLE_VALUE: (TiffTags.LONG, 0)}),
        ([0, 70_000], "<i4", {MAX_SAMPLE_VALUE: (TiffTags.LONG, 69_999)}),
        ([0, 1000], "<i2", {}),
        ([-1024, 3071], "<i2", {}),  # a computed tomography
        ([-128, 127], "i1", {}),
    ],
)
def test_integers_of_unknown_range_are_refused(values, dtype, tags):
    with pytest.raises(UserError, match=f"integers from {values[0]} to {values[1]} of unknown range: save it with 8"):
        read_image(create_tiff(values, dtype, tags))


@pytest.mark.parametrize("bits, dtype", [(16, ">i2"), (32, ">i4")])
def test_integers_of_fits_are_refused(bits, dtype):
    """Pillow takes their bytes in the wrong order."""
    cards = ["SIMPLE  = T", f"BITPIX  = {bits}", "NAXIS   = 2", "NAXIS1  = 2", "NAXIS2  = 1", "END"]
    header = "".join(f"{card:80}" for card in cards).ljust(2880).encode()
    with pytest.raises(UserError, match="of unknown range"):
        read_image(BytesIO(header + np.array([1, 2], dtype=dtype).tobytes().ljust(2880, b"\0")))


def test_a_transparent_value_of_sixteen_bits_is_white():
    values = np.array([[0x1234, 0x1200, 0]], dtype=np.uint16)
    Image.fromarray(values).save(file := BytesIO(), "PNG", transparency=0x1234)
    with pytest.warns(Notice):
        pixels = np.asarray(read_image(file))
    assert pixels[0, :, 0].tolist() == [255, 0x1200 // 257, 0]


def save_gray(values: np.ndarray, file: Path) -> None:
    Image.fromarray(values).save(file)


def save_colors(values: np.ndarray, file: Path) -> None:
    """Write a PNG with colors of 16 bits, which Pillow does not write."""
    height, width = values.shape
    rows = b"".join(b"\0" + row.repeat(3).astype(">u2").tobytes() for row in values)
    content = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">2L5B", width, height, 16, 2, 0, 0, 0)
    for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        content += struct.pack(">L", len(data)) + name + data + struct.pack(">L", zlib.crc32(name + data))
    file.write_bytes(content)


@pytest.mark.parametrize("largest, bits", [(255, 8), (1023, 10), (4095, 12), (16383, 14)])
@pytest.mark.parametrize("name, save", [("a.png", save_gray), ("a.tiff", save_gray), ("a.png", save_colors)])
def test_few_bits_in_sixteen_are_announced(tmp_path, name: str, save: Callable, largest: int, bits: int):
    save(np.array([[0, largest]], dtype=np.uint16), tmp_path / name)
    with pytest.warns(Notice, match=rf"{name}: it uses {bits} of its 16 bits and is read as dark: if all .* scale"):
        assert read_image(tmp_path / name).getpixel((1, 0)) == pytest.approx((largest / 257,) * 3, abs=1)


@pytest.mark.parametrize("save", [save_gray, save_colors])
def test_bright_images_of_sixteen_bits_are_not_announced(tmp_path, save):
    save(np.array([[0, 0x8080, 0xFFFF]], dtype=np.uint16), tmp_path / "a.png")
    assert read_gray(tmp_path / "a.png") == [0, 0x80, 0xFF]


def test_black_images_are_not_announced(tmp_path):
    save_gray(np.zeros((1, 1), dtype=np.uint16), tmp_path / "a.png")
    Image.new("RGB", (1, 1)).save(tmp_path / "b.png")
    assert read_gray(tmp_path / "a.png") == read_gray(tmp_path / "b.png") == [0]


def test_dark_images_are_announced_once(tmp_path):
    for name in ("a.png", "b.png"):
        save_gray(np.array([[4095]], dtype=np.uint16), tmp_path / name)
    with pytest.warns(Notice) as notices:
        for name in ("a.png", "b.png", "a.png"):
            read_image(tmp_path / name)
    assert len(notices) == 1


def test_transparent_pixels_are_white(tmp_path):
    Image.new("RGBA", (2, 1), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert read_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([10, 20, 30])
    palette.save(tmp_path / "clear.gif", transparency=0)
    assert read_image(tmp_path / "clear.gif").getpixel((0, 0)) == (255, 255, 255)


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees
    Image.new("RGB", (4, 2)).save(tmp_path / "turned.jpg", exif=exif)
    image = read_image(tmp_path / "turned.jpg")
    assert image.size == (2, 4)
    assert ImageOps.exif_transpose(image).size == (2, 4)  # as transformers' pipelines do


def create_exif(orientation: int = 6) -> bytes:
    """Return big-endian EXIF data with an entry before the orientation, and a directory after it."""
    exif = Image.Exif()
    exif[0x010F] = "Maker of cameras"
    exif[ORIENTATION] = orientation
    exif[X_RESOLUTION] = TiffImagePlugin.IFDRational(72, 1)
    exif[EXIF_DIRECTORY] = {0xA002: 4, 0xA003: 2}  # the size of the image
    return exif.tobytes()


ENTRY_OF_MAKER, ENTRY_OF_ORIENTATION, ENTRY_OF_RESOLUTION = 16, 28, 40  # in `create_exif`, 12 bytes each


def replace(data: bytes, start: int, new: bytes) -> bytes:
    return data[:start] + new + data[start + len(new) :]


DAMAGED_EXIF = {
    "denominator of zero": lambda exif: exif.replace(struct.pack(">2L", 72, 1), struct.pack(">2L", 72, 0)),
    "negative width": lambda exif: exif.replace(
        struct.pack(">HHLH", 0xA002, 3, 1, 4), struct.pack(">HHLh", 0xA002, 8, 1, -4)
    ),
    "unknown type": lambda exif: replace(exif, ENTRY_OF_MAKER + 2, b"\xff\xff"),
    "value beyond the end": lambda exif: replace(exif, ENTRY_OF_MAKER + 4, b"\0\xff\0\0\0\0\0\0"),
    "wrong type": lambda exif: replace(exif, ENTRY_OF_RESOLUTION + 2, struct.pack(">HL", 12, 1)),
    "too many entries": lambda exif: replace(exif, 14, b"\xff\xff"),
    "cut after the orientation": lambda exif: exif[:ENTRY_OF_RESOLUTION],
    "directory beyond the end": lambda exif: replace(exif, ENTRY_OF_RESOLUTION + 12 + 8, b"\xff\xff\xff\xff"),
}


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("damage", DAMAGED_EXIF)
def test_damaged_metadata_leave_the_image_and_its_orientation(format, damage):
    exif = DAMAGED_EXIF[damage](create_exif())
    assert exif != create_exif()
    Image.effect_noise((4, 2), 50).convert("RGB").save(file := BytesIO(), format, exif=exif)
    assert read_image(file).size == (2, 4)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0MM", b"Exif\0\0" + bytes(40), create_exif()[:20], create_exif(9)]
)
def test_an_unreadable_orientation_is_none(exif):
    Image.new("RGB", (4, 2)).save(file := BytesIO(), "JPEG", exif=exif)
    assert read_image(file).size == (4, 2)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP", "AVIF"])
def test_all_orientations_are_applied(format, orientation):
    """The corner that is drawn white comes to its place, whichever way the camera was held."""
    image = Image.new("RGB", (32, 16))
    image.paste("white", (0, 0, 16, 8))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    image.save(file := BytesIO(), format, exif=exif)
    upright = read_image(file)
    assert upright.size == ((16, 32) if orientation > 4 else (32, 16))
    column, row = {1: (0, 0), 2: (1, 0), 3: (1, 1), 4: (0, 1), 5: (0, 0), 6: (1, 0), 7: (1, 1), 8: (0, 1)}[orientation]
    width, height = upright.size
    corners = {
        (x, y): upright.getpixel((width // 4 + x * width // 2, height // 4 + y * height // 2))[0]
        for x in (0, 1)
        for y in (0, 1)
    }
    assert max(corners, key=corners.get) == (column, row)


def test_the_orientation_of_xmp_is_applied():
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    Image.new("RGB", (4, 2)).save(file := BytesIO(), "JPEG", xmp=xmp)
    assert read_image(file).size == (2, 4)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    compression = "tiff_deflate" if mode == "YCbCr" else None  # without it, Pillow 12 cannot read its own files
    Image.new(mode, (3, 5)).save(tmp_path / "image.tiff", compression=compression)
    image = read_image(tmp_path / "image.tiff")
    assert (image.mode, image.size) == ("RGB", (3, 5))


@pytest.mark.parametrize(
    "content, message", [(b"", "not an image"), (b"hello", "not an image"), (None, "cannot be decoded")]
)
def test_broken_files_are_refused(tmp_path, content, message):
    path = tmp_path / "broken.png"
    if content is None:
        Image.effect_noise((64, 64), 50).save(path)
        content = path.read_bytes()[:1000]  # the header and the first pixels
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_image(path)


def damage(format: str, place: int, value: bytes | None) -> bytes:
    """Return an image file that ends at a place, or has another value there."""
    Image.new("RGB", (24, 16), "red").save(file := BytesIO(), format)
    content = file.getvalue()
    return content[:place] if value is None else replace(content, place, value)


@pytest.mark.parametrize(
    "content, error",
    [
        (damage("QOI", 15, None), IndexError),
        (damage("QOI", 14, None) + b"\xfe\0", ValueError),
        (damage("DDS", 80, b"\0"), NotImplementedError),
        (damage("JPEG", 400, None), OSError),
    ],
)
def test_whatever_a_decoder_raises_is_a_refusal(content, error):
    with pytest.raises(UserError, match=r"^it cannot be decoded: .+") as refusal:
        read_image(BytesIO(content))
    assert type(refusal.value.__cause__) is error


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interruption_is_no_refusal(monkeypatch, error):
    Image.new("RGB", (2, 2)).save(file := BytesIO(), "PNG")

    def load(self):
        raise error

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(error):
        read_image(file)


def test_an_image_beyond_the_memory_is_refused(monkeypatch):
    Image.new("RGB", (2, 2)).save(file := BytesIO(), "PNG")

    def load(self):
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(UserError, match="not enough memory"):
        read_image(file)


@pytest.mark.parametrize("name, message", [("nothing.png", "No such file"), ("", "Is a directory")])
def test_what_cannot_be_opened_is_refused(tmp_path, name, message):
    with pytest.raises(UserError, match=f"^it cannot be opened: {message}"):
        read_image(tmp_path / name)


@pytest.mark.skipif(not Path("/dev/zero").is_char_device(), reason="this system has no /dev/zero")
@pytest.mark.timeout(30)
def test_devices_are_refused():
    with pytest.raises(UserError, match="it is a device"):
        read_image(Path("/dev/zero"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.timeout(30)
def test_pipes_are_read_and_not_awaited(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="not an image"):
        read_image(tmp_path / "pipe")
    Image.new("RGB", (4, 2)).save(file := BytesIO(), "PNG")
    reader, writer = os.pipe()
    try:
        os.write(writer, file.getvalue())
        os.close(writer)
        assert read_image(Path(f"/dev/fd/{reader}")).size == (4, 2)
    finally:
        os.close(reader)


def test_floating_point_pixels_are_refused(tmp_path):
    Image.new("F", (2, 2)).save(tmp_path / "float.tiff")
    with pytest.raises(UserError, match="floating-point numbers of unknown range"):
        read_image(tmp_path / "float.tiff")


def test_decompression_bombs_are_refused(tmp_path, monkeypatch):
    Image.new("1", (100, 100)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match="cannot be decoded"):
        read_image(tmp_path / "large.png")


def test_large_images_are_refused_before_they_are_decoded(tmp_path):
    Image.new("1", (100, 30)).save(tmp_path / "large.png")
    assert read_image(tmp_path / "large.png", max_pixels=3000).size == (100, 30)
    (tmp_path / "large.png").write_bytes((tmp_path / "large.png").read_bytes()[:60])  # no pixels to decode
    with pytest.raises(UserError, match="it has 100 x 30 pixels, at most 2,999 in all"):
        read_image(tmp_path / "large.png", max_pixels=2999)
