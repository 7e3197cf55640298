"""The images and boxes of a run: its splits, their classes, and the readers of samples."""

from dataclasses import replace
from functools import partial
from itertools import count

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor

from evmamba_hub.errors import UserError
from evmamba_hub.images.labeled_images import LabeledImages, SelectedImages, TableImages
from evmamba_hub.wording import shorten
from training_evmamba.data import LabelError, TrainingData
from training_evmamba.dense.box_tables import choose_object_columns
from training_evmamba.dense.box_transforms import BoxTransform
from training_evmamba.dense.boxes import BoxForm, BoxImage, Objects, create_objects, survey
from training_evmamba.dense.coco_files import CocoImages, open_coco_splits
from training_evmamba.dense.data import open_data, open_splits
from training_evmamba.dense.recipe import DenseRecipe


NO_OBJECTS = create_objects([], [])
UNKNOWN = -1  # label of a class that training does not have


def find_used_labels(images: LabeledImages) -> np.ndarray | None:
    """Return the classes that have objects in a dataset. None for streams, which are not read ahead.

    Raises:
        UserError: If objects are damaged.
    """
    if isinstance(images, SelectedImages):
        return find_used_labels(images.images)
    if isinstance(images, CocoImages):
        return np.unique(images.objects.labels)
    if isinstance(images, TableImages):
        cells = images.table.select_columns([images.columns.label])[images.columns.label]
        names = (f"image {index} of {images.name}" for index in count())
        objects = map(images.columns.to_objects, cells, names)
        return np.array(sorted({label for each in objects for label in each.labels.tolist()}), dtype=np.int64)
    return None


def match_classes(images: LabeledImages, class_names: list[str]) -> np.ndarray:
    """Return the class index of training for each class of another split, by its name.

    Raises:
        UserError: If objects of the split have a class that training does not have.
    """
    indices = {name: index for index, name in enumerate(class_names)}
    lookup = np.array([indices.get(name, UNKNOWN) for name in images.class_names])
    used = find_used_labels(images)
    if used is not None and (unknown := [images.class_names[each] for each in used if lookup[each] == UNKNOWN]):
        raise UserError(f"{images.name} has objects of the class {unknown[0]}, which training does not have")
    return lookup


def open_box_data(
    recipe: DenseRecipe, objects_column: str | None, box_form: BoxForm
) -> tuple[TrainingData, np.ndarray | None]:
    """Open the images for training and evaluation.

    Returns:
        The images, and the class index of training for each class of the evaluation images, if there are such.

    Raises:
        UserError: If the dataset is missing or damaged, has no objects, or has boxes of another form.
    """
    choose_columns = partial(
        choose_object_columns,
        dataset=str(recipe.dataset),
        image_column=recipe.image_column,
        objects_column=objects_column,
        box_form=box_form,
    )
    splits = open_splits(recipe, partial(open_coco_splits, box_form=box_form), choose_columns)
    data = open_data(recipe, splits, [])
    class_names, notes = data.training.class_names, list(data.notes)
    used = find_used_labels(data.training)
    if used is not None:
        if len(used) == 0:
            raise UserError(f"{data.training.name} has no objects: there is nothing to learn from")
        if unused := [name for label, name in enumerate(class_names) if label not in used]:
            classes = "1 class has" if len(unused) == 1 else f"{len(unused):,} classes have"
            notes.append(f"{classes} no object in training: {shorten(unused)}")
    notes.append(f"The classes are {shorten(class_names)}")
    notes += survey(data.training, "training")
    lookup = None
    if data.validation is not None:
        lookup = match_classes(data.validation, class_names)
        notes += survey(data.validation, "evaluation")
    return replace(data, class_names=class_names, notes=notes), lookup


class BoxEncoder:
    """Makes what the network takes of images and objects, by the image processor of the network."""

    def __init__(self, image_processor: BaseImageProcessor):
        self.image_processor = image_processor

    def __call__(self, image: Image.Image, objects: Objects) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the pixels (3, H, W), and `class_labels` (N,) and `boxes` (N, 4): centers and sides, as fractions."""
        annotations = [
            {"bbox": box.tolist(), "category_id": int(label), "area": float(area)}
            for box, label, area in zip(objects.boxes, objects.labels, objects.areas, strict=True)
        ]
        encoded = self.image_processor(
            image, annotations={"image_id": 0, "annotations": annotations}, return_tensors="pt"
        )
        (labels,) = encoded["labels"]
        return encoded.pixel_values[0], {name: labels[name] for name in ("class_labels", "boxes")}


class TrainingReader:
    """Reads and augments a training image. Crowds are left out."""

    def __init__(self, transform: BoxTransform, encode: BoxEncoder):
        self.transform, self.encode = transform, encode

    def __call__(self, image: BoxImage, rng: np.random.Generator) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        pixels, objects = image.read()
        return self.encode(*self.transform(pixels, objects.select(~objects.is_crowd), rng))


class TruthReader:
    """Reads an image for evaluation: its pixels for the network, its objects, and its width and height.

    Args:
        lookup: The class index of training for each class of the images.
    """

    def __init__(self, lookup: np.ndarray, encode: BoxEncoder):
        self.lookup, self.encode = lookup, encode

    def __call__(self, image: BoxImage) -> tuple[torch.Tensor, tuple[Objects, tuple[int, int]]]:
        pixels, objects = image.read()
        labels = self.lookup[objects.labels]
        if (labels == UNKNOWN).any():
            raise LabelError(f"{image.name} has an object of a class that training does not have")
        pixel_values, _ = self.encode(pixels, NO_OBJECTS)
        return pixel_values, (objects._replace(labels=labels), pixels.size)
