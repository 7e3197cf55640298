"""Boxes in datasets of the package `datasets`."""

from functools import partial
from io import BytesIO
from pathlib import Path

import datasets
import pytest
from PIL import Image

from evmamba_hub.errors import UserError
from evmamba_hub.images.labeled_images import open_tables
from training_evmamba.dense.box_tables import choose_object_columns
from training_evmamba.dense.boxes import ALL_IMAGES


NAMES = ["disc", "box"]
BOX = [2, 3, 10, 12]
CLASS = datasets.ClassLabel(names=NAMES)
NUMBER = datasets.Value("float32")


def encode() -> dict:
    file = BytesIO()
    Image.new("RGB", (32, 24), "gray").save(file, "png")
    return {"bytes": file.getvalue(), "path": None}


def make_rows(objects: list, category: object = CLASS, **columns: list) -> datasets.Dataset:
    """Make rows of a column `objects`, a dictionary of lists."""
    fields = {"bbox": datasets.List(datasets.List(NUMBER)), "category": datasets.List(category)}
    if objects and objects[0] and "area" in objects[0]:
        fields |= {"area": datasets.List(NUMBER), "iscrowd": datasets.List(datasets.Value("bool"))}
    features = {"image": datasets.Image(), "objects": fields, **{name: datasets.Value("int64") for name in columns}}
    rows = {"image": [encode() for _ in objects], "objects": objects, **columns}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def open_saved(path: Path, rows: datasets.Dataset | datasets.DatasetDict, **options):
    rows.save_to_disk(path)
    return open_path(path, **options)


def open_path(path: Path, streaming: bool = False, **options):
    chosen = {"image_column": None, "objects_column": None, "box_form": "xywh", **options}
    return open_tables(str(path), partial(choose_object_columns, dataset=str(path), **chosen), streaming=streaming)


def test_dictionary_of_lists(tmp_path):
    objects = [
        {"bbox": [BOX, [1, 1, 4, 4]], "category": [1, 0], "area": [7, None], "iscrowd": [False, True]},
        {"bbox": [], "category": [], "area": [], "iscrowd": []},
        None,
    ]
    images = open_saved(tmp_path / "saved", make_rows(objects))[None]()
    assert (images.class_names, images.num_images) == (NAMES, 3)
    assert images[0].read()[0].size == (32, 24)
    read = images[0].objects
    assert read.boxes.tolist() == [BOX, [1, 1, 4, 4]]
    assert (read.labels.tolist(), read.areas.tolist()) == ([1, 0], [7, 16])
    assert read.is_crowd.tolist() == [False, True]
    assert [images[index].objects.boxes.shape for index in (1, 2)] == [(0, 4), (0, 4)]


def test_list_of_dictionaries(tmp_path):
    objects = [{"bbox": datasets.List(NUMBER), "category_id": datasets.Value("int64")}]
    rows = datasets.Dataset.from_dict(
        {"image": [encode()], "objects": [[{"bbox": BOX, "category_id": 7}, {"bbox": BOX, "category_id": 3}]]},
        features=datasets.Features({"image": datasets.Image(), "objects": objects}),
    )
    images = open_saved(tmp_path / "saved", rows)[None]()
    assert (images.class_names, images[0].objects.labels.tolist()) == (["3", "7"], [1, 0])


def test_names_as_categories(tmp_path):
    objects = [{"bbox": [BOX, BOX], "category": ["disc", "apple"]}]
    images = open_saved(tmp_path / "saved", make_rows(objects, datasets.Value("string")))[None]()
    assert (images.class_names, images[0].objects.labels.tolist()) == (["apple", "disc"], [1, 0])


def test_image_folder_with_metadata(tmp_path):
    """The layout that the documentation of `datasets` shows for detection."""
    Image.new("RGB", (32, 24)).save(tmp_path / "a.png")
    line = '{"file_name": "a.png", "objects": {"bbox": [[2, 3, 10, 12]], "categories": [4]}}'
    (tmp_path / "metadata.jsonl").write_text(line)
    images = open_path(tmp_path)["train"]()
    assert images[0].objects.boxes.tolist() == [BOX]
    assert images.class_names == ["4"]


def test_parquet(tmp_path):
    make_rows([{"bbox": [BOX], "category": [1]}]).to_parquet(tmp_path / "train.parquet")
    images = open_path(tmp_path)["train"]()
    assert images[0].objects.labels.tolist() == [1]


def test_streamed(tmp_path):
    make_rows([{"bbox": [BOX], "category": [1]}, None]).to_parquet(tmp_path / "train.parquet")
    images = open_path(tmp_path, streaming=True)["train"]()
    assert images.class_names == NAMES
    assert [image.objects.labels.tolist() for image in images.read(ALL_IMAGES)] == [[1], []]


def test_stream_without_class_names(tmp_path):
    make_rows([{"bbox": [BOX], "category": [1]}], datasets.Value("int64")).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(UserError, match=r"^the stream .* does not name its classes: download it"):
        open_path(tmp_path, streaming=True)["train"]()


def test_sizes(tmp_path):
    rows = make_rows([None], width=[32], height=[24])
    assert open_saved(tmp_path / "with", rows)[None]()[0].size == (32, 24)
    assert open_saved(tmp_path / "without", rows.remove_columns("width"))[None]()[0].size is None


def test_corners(tmp_path):
    rows = make_rows([{"bbox": [[2, 3, 12, 15]], "category": [0]}])
    images = open_saved(tmp_path / "saved", rows, box_form="xyxy")[None]()
    assert images[0].objects.boxes.tolist() == [BOX]


def test_missing_image(tmp_path):
    rows = datasets.Dataset.from_dict(
        {"image": [None], "objects": [{"bbox": [BOX], "category": [0]}]}, features=make_rows([None]).features
    )
    with pytest.raises(UserError, match=r"image 0 of .* is not an image"):
        open_saved(tmp_path / "saved", rows)[None]()[0].read()


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        pytest.param({"bbox": [BOX, BOX], "category": [0]}, "has 2 boxes and 1 categories", id="numbers differ"),
        pytest.param({"bbox": [[1, 2]], "category": [0]}, "has damaged boxes, four numbers are a box", id="short box"),
        pytest.param({"bbox": [None], "category": [0]}, "has damaged boxes, four numbers are a box", id="no box"),
        pytest.param({"bbox": [BOX], "category": [None]}, "of the category None, which is none", id="no category"),
    ],
)
def test_damaged_rows(objects, message, tmp_path):
    with pytest.raises(UserError, match=message):
        open_saved(tmp_path / "saved", make_rows([objects]))[None]()[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({}, "choose the objects column of .* with --objects-column: it has image, label", id="no boxes"),
        pytest.param({"objects_column": "label"}, "the column label of .* has no boxes with categories", id="wrong"),
        pytest.param({"objects_column": "x"}, "has no column x: choose one of image, label", id="unknown"),
    ],
)
def test_datasets_without_boxes(options, message, tmp_path):
    rows = datasets.Dataset.from_dict(
        {"image": [encode()], "label": [0]}, features=datasets.Features({"image": datasets.Image(), "label": CLASS})
    )
    with pytest.raises(UserError, match=message):
        open_saved(tmp_path / "saved", rows, **options)[None]()
