"""Augmentation moves boxes with the pixels that they are around."""

import numpy as np
import pytest
from PIL import Image

from training_evmamba.dense.box_transforms import BoxTransform, choose_crop, crop
from training_evmamba.dense.boxes import Objects, create_objects


SIZE = (40, 30)
BOXES = [[3, 4, 8, 6], [20, 12, 14, 16]]


def draw() -> tuple[Image.Image, Objects]:
    """Draw the boxes in the values of their numbers, from 1."""
    pixels = np.zeros((SIZE[1], SIZE[0]), dtype=np.uint8)
    for label, (x, y, width, height) in enumerate(BOXES):
        pixels[y : y + height, x : x + width] = label + 1
    return Image.fromarray(pixels), create_objects(BOXES, range(len(BOXES)))


def find_box(image: Image.Image, label: int) -> list[int]:
    x, y, right, bottom = Image.fromarray((np.asarray(image) == label + 1).astype(np.uint8)).getbbox()
    return [x, y, right - x, bottom - y]


@pytest.mark.parametrize("transform", [(0, 0.5, 0, 0), (0, 0.5, 1, 0), (1, 0.5, 0, 0), (1, 0.3, 0.5, 0)], ids=str)
def test_boxes_stay_around_their_pixels(transform):
    transform = BoxTransform(*transform)
    for seed in range(40):
        image, objects = transform(*draw(), np.random.default_rng(seed))
        assert len(objects.labels)
        for box, label in zip(objects.boxes, objects.labels, strict=True):
            assert box.tolist() == find_box(image, label)


def test_flip():
    image, objects = BoxTransform(0, 1, 1, 0)(*draw(), np.random.default_rng(0))
    assert image.size == SIZE
    assert objects.boxes.tolist() == [[29, 4, 8, 6], [6, 12, 14, 16]]


def test_objects_with_the_center_outside_of_a_crop_are_left_out():
    _, objects = crop(*draw(), (8, 0, 30, 30))
    assert objects.labels.tolist() == [1]
    assert objects.boxes.tolist() == [[12, 12, 10, 16]]
    assert objects.areas.tolist() == [160]


def test_crops_have_the_size_that_was_asked_for():
    rng = np.random.default_rng(0)
    crops = np.array([choose_crop(SIZE, 0.5, rng) for _ in range(500)])
    sides = crops[:, 2:] - crops[:, :2]
    assert (crops[:, :2] >= 0).all() and (crops[:, 2:] <= SIZE).all()
    assert sides.min(axis=0).tolist() == [20, 15] and sides.max(axis=0).tolist() == list(SIZE)


def test_images_without_objects_are_cropped_too():
    empty = create_objects([], [])
    sizes = {BoxTransform(1, 0.5, 0, 0)(draw()[0], empty, np.random.default_rng(seed))[0].size for seed in range(9)}
    assert len(sizes) > 5


def test_a_crop_that_finds_no_object_is_not_taken():
    """The object is smaller than a pixel at the border, where no crop of half a pixel can be."""
    image, objects = draw()[0], create_objects([[39.9, 29.9, 0.1, 0.1]], [0])
    images = [BoxTransform(1, 0.01, 0, 0)(image, objects, np.random.default_rng(seed)) for seed in range(20)]
    assert all(len(found.labels) == 1 for _, found in images)


def test_the_same_numbers_give_the_same_image():
    image, objects = draw()
    first, second = (
        BoxTransform(1, 0.3, 0.5, 1)(image.convert("RGB"), objects, np.random.default_rng(3)) for _ in range(2)
    )
    assert first[0].tobytes() == second[0].tobytes()
    assert np.array_equal(first[1].boxes, second[1].boxes)
