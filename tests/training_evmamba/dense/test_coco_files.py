"""Annotation files of COCO: their layouts, and what is wrong in them."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evmamba_hub.errors import UserError
from training_evmamba.dense.boxes import ALL_IMAGES
from training_evmamba.dense.coco_files import CocoImages, open_coco_splits


BOX = [2, 3, 10, 12]


def save_image(path: Path, size: tuple[int, int] = (32, 24)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "gray").save(path)


def annotate(image_id: int = 1, **fields) -> dict:
    return {"id": 1, "image_id": image_id, "category_id": 1, "bbox": BOX, "area": 100, "iscrowd": 0, **fields}


def describe(name: str = "a.png", **fields) -> dict:
    return {"id": 1, "file_name": name, "width": 32, "height": 24, **fields}


def make_content(**lists) -> dict:
    return {
        "images": [describe()],
        "annotations": [annotate()],
        "categories": [{"id": 1, "name": "disc"}],
        **lists,
    }


def save_content(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


@pytest.fixture
def open_content(tmp_path):
    """Open one annotation file with the images a.png and b.png beside it: `open_content(content)`."""

    def open_one(content: object) -> CocoImages:
        save_content(tmp_path / "annotations.json", content)
        for name in ("a.png", "b.png"):
            save_image(tmp_path / name)
        return open_coco_splits(tmp_path, "xywh")[None]()

    return open_one


LAYOUTS = {
    "coco": {
        "train": ("annotations/instances_train2017.json", "train2017/a.png"),
        "val": ("annotations/instances_val2017.json", "val2017/a.png"),
    },
    "coco below images": {
        "train": ("annotations/instances_train2017.json", "images/train2017/a.png"),
        "val": ("annotations/instances_val2017.json", "images/val2017/a.png"),
    },
    "roboflow": {
        "train": ("train/_annotations.coco.json", "train/a.png"),
        "valid": ("valid/_annotations.coco.json", "valid/a.png"),
        "test": ("test/_annotations.coco.json", "test/a.png"),
    },
    "images of all splits together": {
        "train": ("train.json", "images/a.png"),
        "validation": ("validation.json", "images/a.png"),
    },
    "a directory per split with images": {
        "train": ("train/annotations.json", "train/images/a.png"),
        "val": ("val/annotations.json", "val/images/a.png"),
    },
    "fiftyone": {None: ("labels.json", "data/a.png")},
    "one file beside images": {None: ("annotations/instances.json", "images/a.png")},
    "several years": {
        "train2014": ("annotations/instances_train2014.json", "train2014/a.png"),
        "train2017": ("annotations/instances_train2017.json", "train2017/a.png"),
    },
    "a file of all beside those of splits": {
        "annotations": ("annotations.json", "images/a.png"),
        "train": ("train.json", "images/a.png"),
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, tmp_path):
    for file, image in LAYOUTS[layout].values():
        save_content(tmp_path / file, make_content())
        save_image(tmp_path / image)
    for other in ("captions_train2017", "person_keypoints_val2017", "image_info_test2017", "panoptic_val2017"):
        save_content(tmp_path / f"annotations/{other}.json", "not read")
    splits = open_coco_splits(tmp_path, "xywh")
    assert set(splits) == set(LAYOUTS[layout])
    for split, (file, image) in LAYOUTS[layout].items():
        images = splits[split]()
        assert (images.name, images.split, images.notes) == (str(tmp_path / file), split, ())
        assert [each.source for each in images.read(ALL_IMAGES)] == [tmp_path / image]
        assert images[0].read()[1].boxes.tolist() == [BOX]


def test_directories_for_datasets(tmp_path):
    save_image(tmp_path / "cat/a.png")
    assert open_coco_splits(tmp_path, "xywh") is None
    save_content(tmp_path / "config.json", {})
    (tmp_path / "metadata.jsonl").touch()
    assert open_coco_splits(tmp_path, "xywh") is None


def test_annotation_file_of_another_name(tmp_path):
    save_content(tmp_path / "annotations/shapes.json", make_content())
    with pytest.raises(UserError, match=r"shapes.json tells no split by its name: name annotation files train.json"):
        open_coco_splits(tmp_path, "xywh")


def test_two_files_of_one_split(tmp_path):
    for file in ("train.json", "annotations/instances_train.json"):
        save_content(tmp_path / file, make_content())
    with pytest.raises(
        UserError, match=r"the split train has several annotation files, .*train.json and .*: keep one"
    ):
        open_coco_splits(tmp_path, "xywh")


def test_objects_by_image(open_content):
    images = open_content(
        make_content(
            images=[describe(id=7), describe("b.png", id=3), describe("c.png", id=5)],
            annotations=[
                annotate(3),
                annotate(7, bbox=[0, 0, 4, 4]),
                annotate(3, bbox=[1, 1, 2, 2], iscrowd=1, segmentation={"counts": [1, 2], "size": [24, 32]}),
            ],
        )
    )
    assert [image.objects.boxes.tolist() for image in images.read(ALL_IMAGES)] == [
        [[0, 0, 4, 4]],
        [BOX, [1, 1, 2, 2]],
        [],
    ]
    assert images[1].objects.is_crowd.tolist() == [False, True]
    assert images[1].objects.areas.tolist() == [100, 100]


def test_gaps_and_order_of_categories(open_content):
    categories = [{"id": 90, "name": "toothbrush"}, {"id": 0, "name": "person"}, {"id": 7, "name": "train"}]
    images = open_content(
        make_content(categories=categories, annotations=[annotate(category_id=each) for each in (90, 0, 7)])
    )
    assert images.class_names == ["person", "train", "toothbrush"]
    assert images[0].objects.labels.tolist() == [2, 0, 1]


def test_one_class(open_content):
    images = open_content(make_content())
    assert (images.class_names, images[0].objects.labels.tolist()) == (["disc"], [0])


def test_names_that_repeat_are_one_class(open_content):
    """Roboflow lists a category 0 for the whole dataset, often with the name of the only class."""
    categories = [{"id": 0, "name": "cell"}, {"id": 1, "name": "cell"}]
    images = open_content(make_content(categories=categories))
    assert (images.class_names, images[0].objects.labels.tolist()) == (["cell"], [0])
    assert images.notes[0] == "Took the categories 0 and 1 as one class, because their name is cell"


def test_category_without_name(open_content):
    assert open_content(make_content(categories=[{"id": 1}])).class_names == ["1"]


@pytest.mark.parametrize(
    ("change", "note"),
    [
        pytest.param(
            {"annotations": [annotate(), annotate(9), annotate(8)]},
            "Ignored 2 annotations of images that ",
            id="annotations of no image",
        ),
        pytest.param(
            {"annotations": [annotate(), annotate(id=2)]}, "Ignored 1 annotation of ", id="annotations that repeat"
        ),
        pytest.param({"images": [describe(), describe("c.png", id=2)]}, "lacks 1 image of ", id="missing files"),
        pytest.param({}, "Ignored 1 image that ", id="files without an entry"),
    ],
)
def test_left_out_and_announced(change, note, open_content):
    images = open_content(make_content(**change))
    assert note in " ".join(images.notes)
    assert images[0].objects.boxes.tolist() == [BOX]


@pytest.mark.parametrize(
    ("size", "expected"),
    [({}, (32, 24)), ({"width": None}, None), ({"width": 0, "height": 0}, None), ({"height": "24"}, None)],
)
def test_sizes_that_are_unknown(size, expected, open_content):
    assert open_content(make_content(images=[describe(**size)]))[0].size == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param('{"images": [', "is no JSON file, or is damaged: ", id="damaged JSON"),
        pytest.param("\xff", "is no JSON file, or is damaged: ", id="no JSON"),
        pytest.param([annotate()], "must hold the lists images, .*, and images is none", id="a list of results"),
        pytest.param({"images": [], "categories": []}, "and annotations is none", id="no annotations"),
        pytest.param(make_content(categories=[]), "names no categories", id="no categories"),
        pytest.param(make_content(images=[1]), "and images is none", id="entries that are no objects"),
        pytest.param(make_content(images=[{"id": 1}]), "image 1 has the file_name None", id="no file name"),
        pytest.param(make_content(images=[describe(), describe("b.png")]), "two images with the id 1", id="same ids"),
        pytest.param(
            make_content(images=[describe(), describe(id=2)]), "two images with the file_name a.png", id="same files"
        ),
        pytest.param(
            make_content(categories=[{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]),
            "two categories of the id 1",
            id="same categories",
        ),
        pytest.param(
            make_content(annotations=[annotate(category_id=2)]),
            "the category 2, which it does not list",
            id="unlisted",
        ),
        pytest.param(
            make_content(annotations=[annotate(category_id="disc")]), "has the category_id 'disc'", id="named category"
        ),
        pytest.param(
            make_content(annotations=[{"id": 4, "image_id": 1}]), "annotation 4 has the bbox None", id="no box"
        ),
        pytest.param(make_content(annotations=[annotate(bbox=[1, 2])]), r"has the bbox \[1, 2\]", id="short box"),
        pytest.param(
            make_content(annotations=[annotate(bbox=[1, 2, float("nan"), 4])]), "has the bbox .*nan", id="NaN in a box"
        ),
        pytest.param(
            make_content(annotations=[annotate(bbox=["1", "2", "3", "4"])]), "has the bbox .*'1'", id="text in a box"
        ),
        pytest.param(make_content(images=[describe("../a.png")]), "lies outside of the dataset", id="outside"),
        pytest.param(make_content(images=[describe("/a.png")]), "lies outside of the dataset", id="absolute path"),
        pytest.param(make_content(images=[describe("z.png")]), "such as z.png, are in none of ", id="no image there"),
    ],
)
def test_refused(content, message, open_content):
    with pytest.raises(UserError, match=message):
        open_content(content)


def test_no_annotations_at_all(open_content):
    images = open_content(make_content(annotations=[]))
    assert images[0].objects.boxes.shape == (0, 4)


def test_paths_with_directories_and_backslashes(tmp_path):
    save_content(tmp_path / "annotations.json", make_content(images=[describe("deep\\a.png")]))
    save_image(tmp_path / "images/deep/a.png")
    assert open_coco_splits(tmp_path, "xywh")[None]()[0].source == tmp_path / "images/deep/a.png"


def test_reading_does_not_depend_on_the_order_of_annotations(open_content):
    rng = np.random.default_rng(0)
    images = [describe("a.png"), describe("b.png", id=2)]
    annotations = [annotate(1 + index % 2, bbox=[index, 0, 3, 3]) for index in range(8)]
    shuffled = [annotations[index] for index in rng.permutation(8)]
    for order in (annotations, shuffled):
        opened = open_content(make_content(images=images, annotations=order))
        assert sorted(opened[0].objects.boxes[:, 0]) == [0, 2, 4, 6]
        assert sorted(opened[1].objects.boxes[:, 0]) == [1, 3, 5, 7]
