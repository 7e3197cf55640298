"""The images and boxes of a run: their classes, and what the network takes of them."""

import json
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.rt_detr.image_processing_pil_rt_detr import RTDetrImageProcessorPil

from evmamba_hub.errors import UserError
from training_evmamba.data import LabelError
from training_evmamba.dense.box_data import BoxEncoder, TrainingReader, TruthReader, open_box_data
from training_evmamba.dense.box_transforms import BoxTransform
from training_evmamba.dense.boxes import BoxImage, create_objects


SIZE = (32, 24)
UNCHANGED = BoxTransform(0, 1, 0, 0)


def make_recipe(folder: Path, **values) -> SimpleNamespace:
    """The fields of a recipe that say what to read."""
    return SimpleNamespace(
        **{
            "dataset": str(folder),
            "dataset_config": None,
            "dataset_revision": None,
            "streaming": False,
            "train_split": "train",
            "validation_split": None,
            "validation_fraction": 0.25,
            "image_column": None,
            "images_per_epoch": None,
            "num_workers": 0,
            "batch_size": 1,
            "seed": 0,
            **values,
        }
    )


def save_split(folder: Path, split: str, categories: dict[int, str], objects: list[list[tuple[int, list]]]) -> None:
    """Save images with the categories and boxes of their objects, in Roboflow's layout."""
    (folder / split).mkdir(parents=True)
    images, annotations = [], []
    for index, image_objects in enumerate(objects):
        Image.new("RGB", SIZE, "gray").save(folder / split / f"{index}.png")
        images.append({"id": index, "file_name": f"{index}.png", "width": SIZE[0], "height": SIZE[1]})
        for category, box in image_objects:
            annotations.append(
                {"id": len(annotations), "image_id": index, "category_id": category, "bbox": box, "iscrowd": 0}
            )
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": category, "name": name} for category, name in categories.items()],
    }
    (folder / split / "_annotations.coco.json").write_text(json.dumps(content))


BOX = [2, 3, 10, 12]


def test_splits_with_other_numbers_for_the_classes(tmp_path):
    save_split(tmp_path, "train", {1: "disc", 5: "box", 9: "star"}, [[(1, BOX), (5, BOX)], [], [(5, BOX)]])
    save_split(tmp_path, "valid", {0: "other", 2: "box", 3: "disc"}, [[(2, BOX)], [(3, [-9, 0, 12, 12])]])
    data, lookup = open_box_data(make_recipe(tmp_path), None, "xywh")
    assert data.class_names == ["disc", "box", "star"]
    assert (data.training.num_images, data.validation.num_images) == (3, 2)
    assert [lookup[image.objects.labels].tolist() for image in (data.validation[0], data.validation[1])] == [[1], [0]]
    assert data.notes[-5:] == [
        "Training on the split train, evaluating on valid",
        "1 class has no object in training: star",
        "The classes are disc, box, star",
        "Kept 1 image without objects, of the training images",
        "Clipped the boxes of 1 object to the image, of the evaluation images",
    ]


def test_class_that_training_does_not_have(tmp_path):
    save_split(tmp_path, "train", {1: "disc"}, [[(1, BOX)]])
    save_split(tmp_path, "valid", {1: "box"}, [[(1, BOX)]])
    with pytest.raises(UserError, match=r"valid.* has objects of the class box, which training does not have"):
        open_box_data(make_recipe(tmp_path), None, "xywh")


def test_no_objects(tmp_path):
    save_split(tmp_path, "train", {1: "disc"}, [[], []])
    with pytest.raises(UserError, match="has no objects: there is nothing to learn from"):
        open_box_data(make_recipe(tmp_path), None, "xywh")


def test_held_out_images(tmp_path):
    save_split(tmp_path, "train", {1: "disc"}, [[(1, BOX)]] * 8)
    data, lookup = open_box_data(make_recipe(tmp_path), None, "xywh")
    assert (data.training.num_images, data.validation.num_images) == (6, 2)
    assert lookup.tolist() == [0]
    assert open_box_data(make_recipe(tmp_path, validation_fraction=0.0), None, "xywh")[1] is None


def test_tables(tmp_path):
    """Damage in any row is found before the training begins."""

    def make_rows(*cells: dict) -> datasets.Dataset:
        Image.new("RGB", SIZE).save(tmp_path / "a.png")
        numbers = datasets.List(datasets.List(datasets.Value("float32")))
        fields = {"bbox": numbers, "category": datasets.List(datasets.Value("string"))}
        return datasets.Dataset.from_dict(
            {"image": [str(tmp_path / "a.png")] * len(cells), "objects": list(cells)},
            features=datasets.Features({"image": datasets.Image(), "objects": fields}),
        )

    training = make_rows({"bbox": [BOX], "category": ["disc"]}, {"bbox": [BOX], "category": ["box"]})
    good = datasets.DatasetDict(train=training, test=make_rows({"bbox": [BOX], "category": ["disc"]}))
    good.save_to_disk(tmp_path / "good")
    data, lookup = open_box_data(make_recipe(tmp_path / "good"), None, "xywh")
    assert (data.class_names, lookup.tolist()) == (["box", "disc"], [1])
    damaged = make_rows({"bbox": [BOX], "category": ["disc"]}, {"bbox": [[1, 2]], "category": ["disc"]})
    datasets.DatasetDict(train=training, test=damaged).save_to_disk(tmp_path / "damaged")
    with pytest.raises(UserError, match=r"^image 1 of .* has damaged boxes"):
        open_box_data(make_recipe(tmp_path / "damaged"), None, "xywh")


@pytest.fixture
def image(tmp_path) -> BoxImage:
    """An image with an object, a crowd, and an object outside."""
    Image.new("RGB", SIZE, "gray").save(tmp_path / "a.png")
    objects = create_objects([BOX, [0, 0, 9, 9], [90, 0, 9, 9]], [1, 0, 0], is_crowd=[False, True, False])
    return BoxImage("a.png", tmp_path / "a.png", objects, SIZE)


@pytest.fixture
def encode() -> BoxEncoder:
    processor = RTDetrImageProcessorPil(
        size={"height": 64, "width": 64}, do_normalize=True, image_mean=[0.5] * 3, image_std=[0.25] * 3
    )
    return BoxEncoder(processor)


def test_training_sample(image, encode):
    pixel_values, labels = TrainingReader(UNCHANGED, encode)(image, np.random.default_rng(0))
    assert pixel_values.shape == (3, 64, 64)
    torch.testing.assert_close(pixel_values, torch.full_like(pixel_values, (128 / 255 - 0.5) / 0.25))
    assert labels["class_labels"].tolist() == [1]
    torch.testing.assert_close(labels["boxes"], torch.tensor([[7 / 32, 9 / 24, 10 / 32, 12 / 24]]))


def test_training_sample_without_objects(image, encode):
    image = image._replace(objects=create_objects([], []))
    _, labels = TrainingReader(UNCHANGED, encode)(image, np.random.default_rng(0))
    assert (labels["class_labels"].shape, labels["boxes"].shape) == ((0,), (0, 4))
    assert (labels["class_labels"].dtype, labels["boxes"].dtype) == (torch.int64, torch.float32)


def test_truth_keeps_crowds_and_pixels_of_the_image(image, encode):
    pixel_values, (objects, size) = TruthReader(np.array([3, 2]), encode)(image)
    assert (pixel_values.shape, size) == ((3, 64, 64), SIZE)
    assert (objects.labels.tolist(), objects.is_crowd.tolist()) == ([2, 3], [False, True])
    assert objects.boxes.tolist() == [BOX, [0, 0, 9, 9]]


def test_truth_of_an_unknown_class(image, encode):
    with pytest.raises(LabelError, match=r"^a.png has an object of a class that training does not have"):
        TruthReader(np.array([-1, 0]), encode)(image)
