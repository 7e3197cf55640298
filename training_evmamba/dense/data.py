"""The images of a dense task: their splits, and the readers of samples for training and evaluation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evmamba_hub.errors import UserError
from evmamba_hub.images.labeled_images import (
    Columns,
    IndexedImages,
    LabeledImage,
    LabeledImages,
    SelectedImages,
    open_tables,
)
from evmamba_hub.images.layouts import describe_file
from evmamba_hub.wording import to_count
from training_evmamba.data import (
    HOLD_OUT,
    Batch,
    LabelError,
    Sample,
    TrainingData,
    choose_held_out,
    choose_images_per_epoch,
    collate,
    create_rng,
    describe_machine,
    open_chosen_splits,
)
from training_evmamba.dense.recipe import DenseRecipe


Splits = dict[str | None, Callable[[], LabeledImages]]


class EvaluationReader:
    """Makes a sample of an image for evaluation. An unreadable image makes a sample without pixels.

    Args:
        prepare: Makes pixels (C, H, W) and the annotation of an image. It raises a `UserError` if the image cannot be
            read, and a `LabelError` if its annotation is wrong.
    """

    def __init__(self, prepare: Callable[[LabeledImage], tuple[torch.Tensor, Any]]):
        self.prepare = prepare

    def __call__(self, image: LabeledImage) -> Sample:
        try:
            return Sample(*self.prepare(image), [])
        except LabelError as error:
            return Sample(None, None, [], str(error))
        except UserError as error:
            return Sample(None, None, [str(error)])

    @staticmethod
    def collate(samples: list[Sample]) -> Batch:
        """Return a batch whose labels are the list of annotations."""
        return collate(samples, list)


def open_splits(
    recipe: DenseRecipe,
    open_folder: Callable[[Path], Splits | None],
    choose_columns: Callable[[dict], Columns],
) -> Splits:
    """Open a dataset.

    Args:
        recipe: The recipe, which names it.
        open_folder: Opens a directory in the layouts of the task, or returns None if it has none of them.
        choose_columns: Chooses columns of a dataset of `datasets`, by their features.

    Returns:
        A function per split that opens it. A dataset without splits has the split None.

    Raises:
        UserError: If there is no such dataset.
    """
    if recipe.dataset is None:
        raise UserError("give a --dataset: a directory, or the Hub id of a dataset")
    path = Path(recipe.dataset)
    if path.exists() and not path.is_dir():
        raise UserError(describe_file(path))
    if path.is_dir() and (splits := open_folder(path)) is not None:
        if (recipe.dataset_config, recipe.dataset_revision) != (None, None):
            raise UserError(f"{path} is a directory of images: it has neither configurations nor revisions")
        return splits
    return open_tables(
        recipe.dataset,
        choose_columns,
        config=recipe.dataset_config,
        revision=recipe.dataset_revision,
        streaming=recipe.streaming,
    )


def hold_out(images: IndexedImages, recipe: DenseRecipe) -> tuple[IndexedImages, SelectedImages | None]:
    """Divide images between training and validation. The seed determines the choice.

    Returns:
        The images for training and for validation. The latter is None if no image is held out.
    """
    one_class = np.zeros(len(images), dtype=np.int64)
    is_held_out = choose_held_out(one_class, recipe.validation_fraction, create_rng(recipe.seed, HOLD_OUT))
    if not is_held_out.any():
        return images, None
    training, validation = (
        SelectedImages(images, np.flatnonzero(mask).tolist()) for mask in (~is_held_out, is_held_out)
    )
    return training, validation


def open_data(recipe: DenseRecipe, splits: Splits, class_names: list[str]) -> TrainingData:
    """Open the images for training and evaluation.

    Args:
        recipe: The recipe.
        splits: The splits of its dataset.
        class_names: The classes of the network, by index.

    Raises:
        UserError: If a split is missing, empty, or a stream of unknown length.
    """
    training, validation, notes = open_chosen_splits(recipe, splits)
    for images in filter(None, (training, validation)):
        if images.num_images == 0:
            raise UserError(f"{images.name} holds no images")
    if validation is not None:
        notes += [note for note in validation.notes if note not in notes]
    elif recipe.validation_fraction > 0 and isinstance(training, IndexedImages):
        training, validation = hold_out(training, recipe)
        notes.append(
            "No image is held out for evaluation, because there are too few"
            if validation is None
            else f"Held out {to_count(len(validation), 'image')} for evaluation"
        )
    images_per_epoch = choose_images_per_epoch(recipe, training)
    notes += describe_machine(recipe, training, images_per_epoch)
    return TrainingData(training, validation, class_names, images_per_epoch, notes)
