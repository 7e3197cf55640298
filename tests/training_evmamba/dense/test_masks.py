"""Images with masks: layouts, labels, values of pixels, and what is refused."""

import json
import re
from functools import partial
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from evmamba_hub.errors import UserError
from evmamba_hub.images.labeled_images import LabeledImage, Share, open_tables
from training_evmamba.data import LabelError
from training_evmamba.dense.masks import (
    IGNORED,
    MaskedImageReader,
    choose_mask_columns,
    find_label_file,
    open_mask_folders,
    parse_labels,
    read_labels,
)


NAMES = ["background", "disc", "box"]
LABELS = parse_labels(NAMES, "labels.txt")
VALUES = np.array([[0, 1, 2, 255], [2, 2, 1, 0], [1, 0, 0, 255]])  # (H, W)


def save(path: Path, pixels: Image.Image | np.ndarray, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return path


def save_pair(folder: Path, name: str = "a", size: tuple[int, int] = (4, 3)) -> None:
    save(folder / "images" / f"{name}.jpg", Image.new("RGB", size))
    save(folder / "masks" / f"{name}.png", np.zeros(size[::-1], dtype=np.uint8))


def make_image(tmp_path: Path, mask: Path | bytes, size: tuple[int, int] = (4, 3)) -> LabeledImage:
    image = save(tmp_path / "image.png", Image.new("RGB", size))
    return LabeledImage(str(image), image, mask)


def with_palette(values: np.ndarray) -> Image.Image:
    image = Image.fromarray(values.astype(np.uint8))
    image.putpalette([17 * band % 256 for band in range(768)])
    return image


MASKS = {
    "gray": lambda: Image.fromarray(VALUES.astype(np.uint8)),
    "palette": lambda: with_palette(VALUES),
    "16 bit": lambda: Image.fromarray(VALUES.astype(np.uint16)),
    "32 bit": lambda: Image.fromarray(VALUES.astype(np.int32)),
    "transparency": lambda: Image.merge("LA", (MASKS["gray"](), Image.new("L", (4, 3), 9))),
}


DEPRECATED = ("32 bit", ".png")  # by Pillow


@pytest.mark.parametrize(
    "kind, suffix", [(kind, suffix) for kind in MASKS for suffix in (".png", ".tif") if (kind, suffix) != DEPRECATED]
)
def test_values_are_those_of_the_file(tmp_path, kind, suffix):
    mask = save(tmp_path / f"mask{suffix}", MASKS[kind]())
    pixels, classes = MaskedImageReader(LABELS, False)(make_image(tmp_path, mask))
    assert pixels.size == (4, 3)
    assert np.array_equal(classes, VALUES)
    _, from_bytes = MaskedImageReader(LABELS, False)(make_image(tmp_path, mask.read_bytes()))
    assert np.array_equal(from_bytes, VALUES)


def test_one_bit(tmp_path):
    mask = save(tmp_path / "mask.png", Image.fromarray(VALUES == 1))
    assert np.array_equal(MaskedImageReader(LABELS, False)(make_image(tmp_path, mask))[1], VALUES == 1)


def test_reduced_labels_are_those_of_transformers(tmp_path):
    from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil

    values = np.array([[0, 1, 2, 255], [3, 3, 1, 0], [1, 0, 0, 255]], dtype=np.uint8)
    mask = save(tmp_path / "mask.png", values)
    _, classes = MaskedImageReader(LABELS, True)(make_image(tmp_path, mask))
    processor = SegformerImageProcessorPil(do_reduce_labels=True, do_resize=False)
    expected = processor(Image.new("RGB", (4, 3)), segmentation_maps=values, return_tensors="pt").labels[0]
    assert np.array_equal(classes, expected.numpy())
    assert set(np.unique(classes)) == {0, 1, 2, IGNORED}


def test_gaps_between_labels_close(tmp_path):
    labels = parse_labels({"0": "sky", "7": "road", "1000": "car"}, "id2label.json")
    assert labels.names == ["sky", "road", "car"]
    assert "The labels 0, 7, 1000 become the classes from 0" in labels.note
    mask = save(tmp_path / "mask.png", np.array([[0, 7, 1000, 255]], dtype=np.uint16))
    _, classes = MaskedImageReader(labels, False)(make_image(tmp_path, mask, (4, 1)))
    assert classes.tolist() == [[0, 1, 2, IGNORED]]


def test_more_classes_than_a_byte_has(tmp_path):
    labels = parse_labels([f"class {index}" for index in range(300)], "labels.txt")
    assert labels.ignored < 0
    mask = save(tmp_path / "mask.png", np.array([[0, 255, 299, 1]], dtype=np.uint16))
    _, classes = MaskedImageReader(labels, False)(make_image(tmp_path, mask, (4, 1)))
    assert classes.tolist() == [[0, 255, 299, 1]]


def test_colors(tmp_path):
    labels = parse_labels({"road": [128, 64, 128], "sky": [70, 130, 180]}, "colors.json")
    colors = np.array([[[128, 64, 128], [70, 130, 180]]], dtype=np.uint8)
    read = MaskedImageReader(labels, False)
    for pixels in (Image.fromarray(colors), Image.fromarray(colors).convert("RGBA")):
        _, classes = read(make_image(tmp_path, save(tmp_path / "mask.png", pixels), (2, 1)))
        assert classes.tolist() == [[0, 1]]
    save(tmp_path / "mask.png", colors + 1)
    with pytest.raises(LabelError, match=r"the color \[129, 65, 129\], which colors.json does not name"):
        read(make_image(tmp_path, tmp_path / "mask.png", (2, 1)))
    save(tmp_path / "mask.png", np.zeros((1, 2), dtype=np.uint8))
    with pytest.raises(LabelError, match=r"has one value a pixel, and colors\.json gives colors"):
        read(make_image(tmp_path, tmp_path / "mask.png", (2, 1)))


@pytest.mark.parametrize(
    "name, pixels, size, message",
    [
        ("mask.png", Image.new("RGB", (4, 3)), (4, 3), "is in color: give --labels as JSON of the form"),
        ("mask.png", np.full((3, 4), 3, dtype=np.uint8), (4, 3), "holds the label 3, which labels.txt does not name"),
        ("mask.tif", np.full((3, 4), 70000, dtype=np.int32), (4, 3), "holds values from 70000 to 70000"),
        ("mask.tif", np.full((3, 4), -1, dtype=np.int32), (4, 3), "holds values from -1 to -1"),
        ("mask.png", np.zeros((4, 3), dtype=np.uint8), (4, 3), "has 3 x 4 pixels, and .* has 4 x 3"),
    ],
)
def test_wrong_masks_stop_a_run(tmp_path, name, pixels, size, message):
    mask = save(tmp_path / name, pixels)
    with pytest.raises(LabelError, match=message) as raised:
        MaskedImageReader(LABELS, False)(make_image(tmp_path, mask, size))
    assert str(mask) in str(raised.value)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("mask.png", b"no image", "not an image in a format that Pillow reads"),
        ("mask.png", None, "it cannot be decoded"),
        ("mask.jpg", Image.new("L", (4, 3)), "as JPEG, it has other values than were saved: save masks as PNG"),
        ("mask.tif", Image.new("F", (4, 3)), "it has pixels of the kind F"),
    ],
)
def test_masks_that_cannot_be_read_are_skipped_as_images_are(tmp_path, name, content, message):
    path = tmp_path / name
    if isinstance(content, Image.Image):
        content.save(path)
    elif content is None:
        save(path, np.random.default_rng(0).integers(0, 3, (64, 64), dtype=np.uint8))
        path.write_bytes(path.read_bytes()[:300])
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        MaskedImageReader(LABELS, False)(make_image(tmp_path, path))
    assert str(path) in str(raised.value)


def test_image_and_mask_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.zeros((3, 4, 3), dtype=np.uint8)
    pixels[0, 0] = 255
    image = save(tmp_path / "image.png", pixels, exif=exif)
    upright = np.rot90(VALUES, -1)
    read = MaskedImageReader(LABELS, False)
    for mask in (
        save(tmp_path / "upright.png", upright.astype(np.uint8)),
        save(tmp_path / "stored.png", VALUES.astype(np.uint8), exif=exif),
    ):
        turned, classes = read(LabeledImage(str(image), image, mask))
        assert np.array_equal(classes, upright)
        assert np.asarray(turned)[0, -1].tolist() == [255, 255, 255]
    unturned = save(tmp_path / "unturned.png", VALUES.astype(np.uint8))
    with pytest.raises(LabelError, match="turned as its EXIF orientation says"):
        read(LabeledImage(str(image), image, unturned))


@pytest.mark.parametrize(
    "name, content, names, values",
    [
        ("labels.txt", "background\n\n disc \nbox\n", NAMES, [0, 1, 2]),
        ("labels.txt", "\ufeffbackground\r\ndisc\r\nbox", NAMES, [0, 1, 2]),
        ("objectInfo150.txt", "Idx\tRatio\tName\n1\t.1\twall\n2\t.2\tsky, cloud\n", ["wall", "sky, cloud"], [0, 1]),
        ("labels.json", '["background", "disc", "box"]', NAMES, [0, 1, 2]),
        ("id2label.json", '{"2": "box", "0": "background", "1": "disc", "255": "void"}', NAMES, [0, 1, 2]),
        ("colors.json", '{"road": [1, 0, 0], "sky": [0, 0, 2]}', ["road", "sky"], [65536, 2]),
    ],
)
def test_files_of_labels(tmp_path, name, content, names, values):
    (tmp_path / name).write_text(content, encoding="utf-8")
    labels = read_labels(tmp_path / name)
    assert (labels.names, labels.values) == (names, values)
    assert f"Read {len(names)} labels from {tmp_path / name}: {', '.join(names)}" in labels.note


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("labels.txt", "", "names 0 labels: name two or more, the background included"),
        ("labels.txt", "road\n", "names 1 label: name two or more, the background included"),
        ("labels.txt", "road\nsky\nroad\n", "names 'road' twice"),
        ("labels.json", '{"0": "road", "00": "sky"}', "names 0 twice"),
        ("labels.json", "{", "cannot be read: .* Give a text file of one name a line"),
        ("labels.json", "3", "cannot be read: it holds no names"),
        ("labels.json", '{"road": "sky"}', "cannot be read: invalid literal"),
        ("labels.json", '{"-1": "road", "0": "sky"}', "cannot be read: labels lie from 0 to 65535"),
        ("labels.json", '{"road": [1, 2], "sky": [1, 2, 3]}', "cannot be read"),
        ("labels.json", '{"road": [1, 2, 256], "sky": [1, 2, 3]}', "is no color"),
    ],
)
def test_files_without_labels(tmp_path, name, content, message):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read_labels(tmp_path / name)


def test_a_dataset_may_name_its_labels(tmp_path):
    with pytest.raises(UserError, match=r"does not name its labels, it holds none of labels.txt.*: give --labels"):
        find_label_file(str(tmp_path), None)
    (tmp_path / "id2label.json").write_text('{"0": "a", "1": "b"}', encoding="utf-8")
    assert find_label_file(str(tmp_path), None) == tmp_path / "id2label.json"


@pytest.mark.parametrize(
    "parts, splits",
    [
        (["images/a.png", "masks/a.png"], [None]),
        (["JPEGImages/a.jpg", "SegmentationClass/a.png"], [None]),
        (["images/sub/a.png", "masks/sub/a.png"], [None]),
        (
            [
                f"{part}/{name}"
                for part in ("images", "annotations")
                for name in ("training/a.png", "validation/b.png")
            ],
            ["training", "validation"],
        ),
        (["train/images/a.png", "train/masks/a.png", "val/images/b.png", "val/masks/b.png"], ["train", "val"]),
        (["train/a.png", "masks/a.png"], None),
    ],
)
def test_layouts(tmp_path, parts, splits):
    for part in parts:
        save(tmp_path / part, Image.new("L", (4, 3)))
    found = open_mask_folders(tmp_path)
    assert (None if found is None else sorted(found, key=str)) == splits
    for split, opened in (found or {}).items():
        images = opened()
        assert (images.num_images, images.split) == (1, split)
        (image,) = images.read(Share(0, 1))
        assert image.source.stem == image.label.stem and image.source != image.label


def test_images_without_mask_and_masks_without_image(tmp_path):
    for name in "abc":
        save_pair(tmp_path, name)
    (tmp_path / "images" / "b.jpg").unlink()
    (images,) = (opened() for opened in open_mask_folders(tmp_path).values())
    assert images.num_images == 2
    assert images.notes == (f"Ignored 1 mask without image, such as {tmp_path / 'masks' / 'b.png'}",)
    (tmp_path / "masks" / "c.png").unlink()
    message = f"{tmp_path / 'images' / 'c.jpg'} has no mask in {tmp_path / 'masks'}: name masks as their images"
    with pytest.raises(UserError, match=re.escape(message)):
        open_mask_folders(tmp_path)[None]()


def test_two_images_of_one_name(tmp_path):
    save_pair(tmp_path)
    save(tmp_path / "images" / "a.png", Image.new("RGB", (4, 3)))
    with pytest.raises(UserError, match="differ in the ending only: rename or remove one of them"):
        open_mask_folders(tmp_path)[None]()


def test_a_split_without_masks(tmp_path):
    for part in ("images/train/a.png", "images/val/b.png", "masks/train/a.png"):
        save(tmp_path / part, Image.new("L", (4, 3)))
    with pytest.raises(UserError, match=r"holds the split val, and .* does not: add its masks"):
        open_mask_folders(tmp_path)


def make_rows(image: str, mask: str, number: int = 3) -> datasets.Dataset:
    def encode(picture: Image.Image) -> dict:
        picture.save(content := BytesIO(), "PNG")
        return {"bytes": content.getvalue(), "path": None}

    rows = {
        image: [encode(Image.new("RGB", (4, 3), (index, 0, 0))) for index in range(number)],
        mask: [encode(Image.fromarray(VALUES.astype(np.uint8))) for _ in range(number)],
    }
    return datasets.Dataset.from_dict(rows, features=datasets.Features(dict.fromkeys(rows, datasets.Image())))


def open_rows(dataset: str, **options) -> dict:
    choose = partial(choose_mask_columns, image_column=None, mask_column=None, dataset=dataset)
    return open_tables(dataset, choose, **options)


@pytest.mark.parametrize("image, mask", [("image", "annotation"), ("pixel_values", "label"), ("photo", "mask")])
def test_columns_of_saved_datasets(tmp_path, image, mask):
    datasets.DatasetDict({"train": make_rows(image, mask)}).save_to_disk(tmp_path / "saved")
    images = open_rows(str(tmp_path / "saved"))["train"]()
    assert images.num_images == 3
    pixels, classes = MaskedImageReader(LABELS, False)(images[2])
    assert pixels.getpixel((0, 0)) == (2, 0, 0)
    assert np.array_equal(classes, VALUES)


@pytest.mark.parametrize("streaming", [True, False])
def test_datasets_of_the_hub(hub, tmp_path, streaming):
    make_rows("image", "annotation").to_parquet(table := BytesIO())
    repo, named = f"someone/{tmp_path.name}", f"someone/{tmp_path.name}-named"
    rows = {"data/train-00000-of-00001.parquet": table.getvalue()}
    hub.create(repo, rows, kind="dataset")
    hub.create(named, {**rows, "id2label.json": json.dumps(dict(enumerate(NAMES))).encode()}, kind="dataset")
    with pytest.raises(UserError, match=r"its repository holds no id2label\.json: give --labels"):
        find_label_file(repo, None)
    assert read_labels(find_label_file(named, None)).names == NAMES
    images = open_rows(named, streaming=streaming)["train"]()
    found = list(images.read(Share(0, 1)))
    assert len(found) == 3
    for image in found:
        assert np.array_equal(MaskedImageReader(LABELS, False)(image)[1], VALUES)


@pytest.mark.parametrize(
    "columns, options, message",
    [
        (("image", "depth"), {}, "choose the mask column of rows with --mask-column: it has image, depth"),
        (("image", "mask"), {"mask_column": "masks"}, "rows has no column masks: choose one of image, mask"),
        (("image", "mask"), {"image_column": "mask", "mask_column": "mask"}, "cannot hold both images and masks"),
    ],
)
def test_unclear_columns(columns, options, message):
    features = make_rows(*columns, number=1).features
    with pytest.raises(UserError, match=message):
        choose_mask_columns(features, **{"image_column": None, "mask_column": None, "dataset": "rows", **options})
