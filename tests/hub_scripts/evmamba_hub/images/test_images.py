import numpy as np
import pytest
from PIL import Image

from evmamba_hub.errors import UserError
from evmamba_hub.images.images import read_image


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    Image.fromarray(np.array([[0, 0x8080, 0xFFFF]], dtype=np.uint16)).save(tmp_path / "deep.png")
    assert np.asarray(read_image(tmp_path / "deep.png"))[0, :, 0].tolist() == [0, 0x80, 0xFF]


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
    assert read_image(tmp_path / "turned.jpg").size == (2, 4)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "I;16"])
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
