"""Boxes in images: clipped, turned with the image, and refused in another form."""

from io import BytesIO

import numpy as np
import pytest
from PIL import ExifTags, Image

from evmamba_hub.errors import UserError
from evmamba_hub.images.images import UPRIGHT
from evmamba_hub.images.labeled_images import IndexedImages
from training_evmamba.dense.boxes import (
    TURNS,
    BoxImage,
    clean,
    create_objects,
    from_corners,
    survey,
    to_corners,
    turn_objects,
)


SIZE = (40, 30)
BOX = [6, 4, 12, 20]  # x, y, width, height


def draw(box: list[float], size: tuple[int, int] = SIZE) -> Image.Image:
    """Draw a white box on black."""
    pixels = np.zeros((size[1], size[0]), dtype=np.uint8)
    x, y, width, height = box
    pixels[y : y + height, x : x + width] = 255
    return Image.fromarray(pixels)


def encode(image: Image.Image, orientation: int | None = None) -> bytes:
    exif, file = Image.Exif(), BytesIO()
    if orientation is not None:
        exif[ExifTags.Base.Orientation] = orientation
    image.save(file, "png", exif=exif)
    return file.getvalue()


def make_image(
    boxes: list = (BOX,), size: tuple[int, int] | None = SIZE, source: bytes | None = None, name: str = "a.png"
) -> BoxImage:
    source = encode(draw(BOX)) if source is None else source
    return BoxImage(name, source, create_objects(boxes, [0] * len(boxes)), size)


class Images(IndexedImages):
    def __init__(self, images: list[BoxImage]):
        super().__init__(name="the dataset", class_names=["box"], num_images=len(images))
        self.images = images

    def __getitem__(self, index: int) -> BoxImage:
        return self.images[index]


def test_corners_and_back():
    boxes = np.array([BOX], dtype=float)
    assert to_corners(boxes).tolist() == [[6, 4, 18, 24]]
    assert from_corners(to_corners(boxes)).tolist() == [BOX]


@pytest.mark.parametrize("turn", list(Image.Transpose), ids=lambda turn: turn.name)
def test_boxes_turn_as_pillow_turns_the_image(turn):
    turned = turn_objects(create_objects([BOX], [0]), turn, SIZE)
    image = draw(BOX).transpose(turn)
    x, y, right, bottom = image.getbbox()
    assert turned.boxes.tolist() == [[x, y, right - x, bottom - y]]
    assert set(TURNS) == set(Image.Transpose)


@pytest.mark.parametrize(
    ("box", "expected", "num_clipped"),
    [
        pytest.param([6, 4, 12, 20], [6, 4, 12, 20], 0, id="inside"),
        pytest.param([-5, 4, 12, 20], [0, 4, 7, 20], 1, id="left"),
        pytest.param([6, -3, 12, 20], [6, 0, 12, 17], 1, id="above"),
        pytest.param([35, 25, 12, 20], [35, 25, 5, 5], 1, id="right and below"),
        pytest.param([30, 4, 10.6, 20], [30, 4, 10, 20], 0, id="rounded"),
        pytest.param([-9, -9, 90, 90], [0, 0, 40, 30], 1, id="around the image"),
        pytest.param([6, 4, 0, 20], None, 0, id="no width"),
        pytest.param([6, 4, 12, 0], None, 0, id="no height"),
        pytest.param([6, 4, -3, 20], None, 0, id="negative width"),
        pytest.param([50, 4, 12, 20], None, 0, id="outside"),
    ],
)
def test_boxes_are_clipped_or_dropped(box, expected, num_clipped):
    cleaned = clean(create_objects([box, BOX], [1, 2]), SIZE)
    expected = [[*expected], BOX] if expected else [BOX]
    np.testing.assert_allclose(cleaned.objects.boxes, expected)
    assert cleaned.objects.labels.tolist() == ([1, 2] if len(expected) == 2 else [2])
    assert (cleaned.num_clipped, cleaned.num_dropped) == (num_clipped, 2 - len(expected))


def test_area_is_that_of_the_object_or_of_its_box():
    objects = create_objects([BOX, BOX, [30, 0, 20, 10]], [0, 0, 0], [50, float("nan"), 200])
    assert objects.areas.tolist() == [50, 240, 200]
    assert clean(objects, SIZE).objects.areas.tolist() == [50, 240, 100]


def test_image_without_objects():
    image, objects = make_image(boxes=[]).read()
    assert image.size == SIZE
    assert [field.shape for field in objects] == [(0, 4), (0,), (0,), (0,)]


@pytest.mark.parametrize("orientation", list(UPRIGHT))
@pytest.mark.parametrize("frame", ["upright", "stored", "unknown"])
def test_boxes_are_in_the_frame_of_their_size(orientation, frame):
    """The size of the annotations tells a turn by 90 degrees. Otherwise, boxes are in the image as viewers show it."""
    stored = draw(BOX)
    upright = stored.transpose(UPRIGHT[orientation])
    swaps = upright.size != stored.size
    x, y, right, bottom = upright.getbbox()
    shown = [x, y, right - x, bottom - y]
    box = BOX if frame == "stored" and swaps else shown
    size = {"upright": upright.size, "stored": stored.size, "unknown": None}[frame]
    image, objects = make_image([box], size, encode(stored, orientation)).read()
    assert image.size == upright.size
    assert objects.boxes.tolist() == [shown]
    assert image.convert("L").getbbox() == (x, y, right, bottom)


def test_image_of_another_size_than_its_annotations():
    with pytest.raises(UserError, match=r"^a.png: it has 40 x 30 pixels, and its annotations are for 80 x 60: scale"):
        make_image(size=(80, 60)).read()


def test_damaged_image():
    with pytest.raises(UserError, match=r"^a.png: it is not an image"):
        make_image(source=b"damaged").read()


@pytest.mark.parametrize("size", [SIZE, None], ids=["size known", "size read"])
def test_survey_counts_what_it_changes(size):
    images = [
        make_image([[-5, 4, 12, 20], BOX], size),
        make_image([[30, 4, 20, 20], [1, 1, 0, 5]], size),
        make_image([], size),
        make_image([BOX], size),
    ]
    assert survey(Images(images), "training") == [
        "Clipped the boxes of 2 objects to the image, of the training images",
        "Dropped 1 object with a box of no width or height, of the training images",
        "Kept 1 image without objects, of the training images",
    ]


def test_survey_of_good_boxes_says_nothing():
    assert survey(Images([make_image()]), "training") == []


def test_survey_of_many_images_reads_the_first(monkeypatch):
    monkeypatch.setattr("training_evmamba.dense.boxes.MAX_SURVEYED", 2)
    outside = [[-5, 4, 12, 20]]
    images = [make_image(outside, None), make_image([BOX], None), make_image(outside, None)]
    assert survey(Images(images), "training") == [
        "Clipped the boxes of 1 object to the image, of the first 2 training images"
    ]
    with_sizes = [image._replace(size=SIZE) for image in images]
    assert survey(Images(with_sizes), "training") == [
        "Clipped the boxes of 2 objects to the image, of the training images"
    ]


def test_survey_passes_over_unreadable_images():
    assert survey(Images([make_image(size=None, source=b"damaged"), make_image([], None)]), "training") == [
        "Kept 1 image without objects, of the training images"
    ]


def test_survey_tells_of_turned_boxes():
    stored = encode(draw(BOX), orientation=6)
    images = [make_image([BOX], SIZE, stored), make_image([[6, 6, 12, 12]], SIZE[::-1], stored), make_image()]
    assert survey(Images(images), "training") == [
        "Turned the boxes of 1 image by the EXIF orientation, of the first 3 training images: their annotations have "
        "the width and height before the turn"
    ]


def test_fractions_are_refused():
    images = Images([make_image([[0.1, 0.2, 0.5, 0.5]]), make_image([[0, 0, 1, 1]])])
    with pytest.raises(UserError, match=r"^the boxes of the dataset are fractions .*, such as \[0.1, 0.2, 0.5, 0.5\]"):
        survey(images, "training")


def test_a_box_of_one_pixel_is_no_fraction():
    assert survey(Images([make_image([[0, 0, 1, 1], BOX])]), "training") == []


def test_corners_are_refused():
    corners = [[2, 2, 20, 10], [15, 10, 38, 28], [20, 5, 39, 20], [22, 20, 40, 30]]
    with pytest.raises(UserError, match=r"look like two corners, such as \[15, 10, 38, 28\]: give --box-form xyxy"):
        survey(Images([make_image([box]) for box in corners]), "training")


def test_corners_by_their_name():
    corners = create_objects([[2, 2, 20, 10], [15, 10, 38, 28]], [0, 0], form="xyxy")
    assert corners.boxes.tolist() == [[2, 2, 18, 8], [15, 10, 23, 18]]
    assert corners.areas.tolist() == [144, 414]


def test_boxes_that_are_no_corners_are_refused():
    boxes = create_objects([[20, 20, 10, 10], [15, 2, 5, 28]], [0, 0], form="xyxy")
    with pytest.raises(UserError, match=r"^most boxes of the dataset have no width and height .*: --box-form says"):
        survey(Images([make_image()._replace(objects=boxes)]), "training")


@pytest.mark.parametrize("boxes", [[[1, 2, 3]], [[1, 2, 3, float("nan")]], [[1, 2, 3, "x"]], [[]], [None]], ids=str)
def test_damaged_boxes(boxes):
    with pytest.raises((ValueError, TypeError)):
        create_objects(boxes, [0])


def test_a_few_boxes_outside_are_no_corners():
    """Boxes wider than their x are common near the left edge, and some reach outside."""
    assert survey(Images([make_image([[2, 2, 41, 10], [1, 1, 5, 5], [3, 2, 9, 9]])]), "training") == [
        "Clipped the boxes of 1 object to the image, of the training images"
    ]
