"""The generated shapes: their masks and boxes."""

import json

import numpy as np
import pytest
from PIL import Image

from evmamba_hub.errors import UserError
from examples.draw_shapes import CLASSES, SHORTEST_BOX_SIDE, draw_scene, draw_shapes


def test_scenes_come_from_the_seed_and_hold_every_class():
    first, second = (
        [draw_scene(rng, (50, 41)) for _ in range(12)] for rng in (np.random.default_rng(3), np.random.default_rng(3))
    )
    for scene, other in zip(first, second, strict=True):
        assert scene.image.tobytes() == other.image.tobytes()
        assert scene.mask.tobytes() == other.mask.tobytes() and scene.boxes == other.boxes
        assert scene.image.size == scene.mask.size == (50, 41)
    assert np.unique([np.asarray(scene.mask) for scene in first]).tolist() == list(range(len(CLASSES)))


def test_masks_lie_where_the_shapes_are():
    """Pixels outside the shapes show only the gray gradient and its noise."""
    for rng in map(np.random.default_rng, range(8)):
        scene = draw_scene(rng, (96, 96))
        gradient = np.asarray(scene.image).astype(float)[np.asarray(scene.mask) == 0].reshape(-1, 3)
        assert np.abs(gradient - gradient.mean(axis=1, keepdims=True)).mean() < 12


def test_boxes_hold_the_visible_pixels_of_their_class():
    for rng in map(np.random.default_rng, range(8)):
        scene = draw_scene(rng, (96, 80))
        classes, inside = np.asarray(scene.mask), np.zeros((80, 96), dtype=bool)
        for kind, (left, top, width, height) in scene.boxes:
            box = slice(top, top + height), slice(left, left + width)
            inside[box] = True
            assert classes[box].shape == (height, width) and min(width, height) >= SHORTEST_BOX_SIDE
            found = classes[box] == kind
            assert found[0].any() and found[-1].any() and found[:, 0].any() and found[:, -1].any()
        assert (classes[~inside] > 0).sum() < 10  # slivers have no box


def test_both_formats(tmp_path):
    draw_shapes(tmp_path / "shapes", training_images=3, validation_images=2, size=(40, 32))
    assert (tmp_path / "shapes" / "labels.txt").read_text(encoding="utf-8").split() == CLASSES
    for split, number in (("train", 3), ("validation", 2)):
        folder = tmp_path / "shapes" / split
        content = json.loads((folder / "annotations.json").read_text(encoding="utf-8"))
        names = sorted(path.name for path in (folder / "images").iterdir())
        assert len(names) == number and names == sorted(path.name for path in (folder / "masks").iterdir())
        assert [image["file_name"] for image in content["images"]] == names
        assert {category["name"] for category in content["categories"]} == set(CLASSES[1:])
        assert all(annotation["area"] > 0 for annotation in content["annotations"])
        with Image.open(folder / "masks" / names[0]) as mask:
            assert mask.mode == "P" and mask.size == (40, 32)
    with pytest.raises(UserError, match="exists already"):
        draw_shapes(tmp_path / "shapes")
    with pytest.raises(UserError, match="too small for shapes"):
        draw_shapes(tmp_path / "tiny", size=(8, 8))
    assert not (tmp_path / "tiny").exists()
