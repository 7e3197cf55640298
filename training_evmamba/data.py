"""Images for training: their choice, their order, and the process that reads them.

Training repeats the dataset in a new random order for each epoch. Step s takes the s-th batch of this sequence.
Batches cross the borders of epochs, so each epoch uses every image once, and all batches have the same size.

The augmentation of an image depends only on the seed and its place in the sequence. A run can thus resume at any step.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, count, islice
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from evmamba_hub.errors import UserError
from evmamba_hub.images.labeled_images import (
    EVALUATION_SPLITS,
    ImageFolder,
    IndexedImages,
    LabeledImage,
    LabeledImages,
    SelectedImages,
    Share,
    StreamedImages,
    open_splits,
)
from evmamba_hub.inference.evaluation import Preprocessor
from training_evmamba.recipe import Recipe


MAX_UNREADABLE_IN_A_ROW = 100
UNREADABLE_LABEL = -1  # of a validation image that could not be read

# What a random number is for: numbers of one purpose tell nothing about those of another
ORDER, TRANSFORM, MIXING, STOCHASTIC_DEPTH, HOLD_OUT = range(5)


# makes pixels (C, H, W) of an image, at random
Transform = Callable[[Image.Image, np.random.Generator], torch.Tensor]


def create_rng(seed: int, purpose: int, *place: int) -> np.random.Generator:
    """Return a random generator that depends only on the place in the run."""
    return np.random.default_rng((seed, purpose, *place))


@dataclass
class TrainingData:
    """The images for training and evaluation."""

    training: LabeledImages
    validation: LabeledImages | None
    class_names: list[str]
    images_per_epoch: int


def find_class_names(images: LabeledImages) -> list[str]:
    """Return the class names of a training set.

    Raises:
        UserError: If the classes are unknown, or there are fewer than two.
    """
    if isinstance(images, ImageFolder):
        folders = {path.name for path in images.folder.iterdir() if path.is_dir() and not path.name.startswith(".")}
        if empty := sorted(folders - set(images.class_names)):
            raise UserError(f"the class folder {images.folder / empty[0]} holds no image: fill it, or remove it")
    if images.num_images == 0:
        raise UserError(f"{images.name} holds no images")
    if isinstance(images, IndexedImages):
        try:
            labels = set(images.labels)
        except TypeError:
            raise UserError(f"the labels of {images.name} are no single names or numbers") from None
        names = images.class_names
        if names is None and all(isinstance(label, str) for label in labels):
            names = sorted(labels)
        elif names is None and all(isinstance(label, int) and label >= 0 for label in labels):
            names = [str(label) for label in range(max(labels) + 1)]
        elif names is None:
            raise UserError(f"the labels of {images.name} must be names or numbers from 0, and none may be missing")
        check_known_labels(images, names)
    elif images.class_names is None:
        raise UserError(f"the stream {images.name} does not name its classes: download it, without --streaming")
    else:
        names = images.class_names
    if len(names) < 2:
        raise UserError(f"{images.name} has one class only, {names[0]!r}: there is nothing to tell apart")
    return names


def check_known_labels(images: IndexedImages, class_names: list[str]) -> None:
    known = {*class_names, *range(len(class_names))}
    for index, label in enumerate(images.labels):
        if label not in known:
            raise UserError(
                f"{images.name} has the label {label} at image {index}: there are the labels 0 to "
                f"{len(class_names) - 1}. Splits without labels are no use here"
            )


def open_data(recipe: Recipe) -> TrainingData:
    """Open the training images and the validation images.

    Raises:
        UserError: If the dataset is missing or unfit for training.
    """
    if recipe.dataset is None:
        raise UserError("give a --dataset: a folder with a folder of images per class, or the id of one on the Hub")
    splits = open_splits(
        recipe.dataset,
        config=recipe.dataset_config,
        revision=recipe.dataset_revision,
        image_column=recipe.image_column,
        label_column=recipe.label_column,
        streaming=recipe.streaming,
    )
    if None in splits:
        if recipe.validation_split is not None:
            raise UserError(f"{recipe.dataset} has no splits, leave --validation-split out")
        train_split, held_out = None, []
    else:
        if recipe.train_split not in splits:
            raise UserError(
                f"{recipe.dataset} has no split {recipe.train_split!r}: --train-split takes {', '.join(splits)}"
            )
        train_split = recipe.train_split
        held_out = [name for name in EVALUATION_SPLITS if name in splits and name != train_split]
    training, validation = splits[train_split](), None
    if recipe.validation_split is not None:
        if recipe.validation_split not in splits:
            known = ", ".join(splits)
            raise UserError(
                f"{recipe.dataset} has no split {recipe.validation_split!r}: --validation-split takes {known}"
            )
        validation = splits[recipe.validation_split]()
    elif held_out:
        validation = splits[held_out[0]]()

    class_names = find_class_names(training)
    if validation is not None and validation.class_names not in (None, training.class_names):
        odd = sorted(set(class_names) ^ set(validation.class_names)) or ["their order"]
        raise UserError(
            f"training and evaluation know different classes, {len(class_names)} and {len(validation.class_names)}: "
            f"{', '.join(odd[:5])}. Each needs images of all"
        )
    if isinstance(validation, IndexedImages):
        check_known_labels(validation, class_names)
    if validation is None and recipe.validation_fraction > 0 and isinstance(training, IndexedImages):
        num_held_out = round(recipe.validation_fraction * training.num_images)
        shuffled = create_rng(recipe.seed, HOLD_OUT).permutation(training.num_images).tolist()
        validation = SelectedImages(training, sorted(shuffled[:num_held_out])) if num_held_out else None
        training = SelectedImages(training, sorted(shuffled[num_held_out:]))
    images_per_epoch = recipe.images_per_epoch or training.num_images
    if images_per_epoch is None:
        raise UserError(f"the stream {training.name} does not tell its length: give --images-per-epoch")
    return TrainingData(training, validation, class_names, images_per_epoch)


class LabelError(Exception):
    """A label that belongs to no class."""


class Sample(NamedTuple):
    """A preprocessed image, or the error that stops the run."""

    pixel_values: torch.Tensor | None  # (C, H, W)
    label: int | None
    unreadable: list[str]  # the images that were skipped before it
    error: str | None = None  # stops the run; exceptions would lose their message between processes


class Batch(NamedTuple):
    pixel_values: torch.Tensor  # (B, C, H, W)
    labels: torch.Tensor  # (B,)
    unreadable: list[str]
    error: str | None


EMPTY_BATCH = Batch(torch.empty(0), torch.empty(0, dtype=torch.int64), [], None)


def collate(samples: list[Sample]) -> Batch:
    """Return a batch. It holds no image if a sample has an error."""
    unreadable = list(chain.from_iterable(sample.unreadable for sample in samples))
    if error := next((sample.error for sample in samples if sample.error), None):
        return EMPTY_BATCH._replace(unreadable=unreadable, error=error)
    pixel_values = torch.stack([sample.pixel_values for sample in samples])
    return Batch(pixel_values, torch.tensor([sample.label for sample in samples]), unreadable, None)


class LabelReader:
    """Returns the class index of an image's label, or raises `LabelError`."""

    def __init__(self, class_names: list[str]):
        self.num_classes = len(class_names)
        self.labels_of_names = {name: label for label, name in enumerate(class_names)}

    def __call__(self, image: LabeledImage) -> int:
        label = self.labels_of_names.get(image.label, image.label)
        if not isinstance(label, int) or not 0 <= label < self.num_classes:
            raise LabelError(
                f"{image.name} has the label {image.label!r}, which is none of the {self.num_classes} classes"
            )
        return label


class SampleReader:
    """Reads and augments one image, or the next readable one."""

    def __init__(self, class_names: list[str], transform: Transform, seed: int):
        self.read_label, self.transform, self.seed = LabelReader(class_names), transform, seed

    def __call__(self, candidates: Iterator[LabeledImage], place: tuple[int, ...]) -> Sample:
        """Return the first readable image of the candidates.

        Args:
            candidates: Images. Later ones replace unreadable ones.
            place: Place in the run. It determines the random numbers.
        """
        unreadable: list[str] = []
        try:
            for image in islice(candidates, MAX_UNREADABLE_IN_A_ROW):
                label = self.read_label(image)
                try:
                    pixels = image.read()
                except UserError as error:
                    unreadable.append(str(error))
                    continue
                rng = create_rng(self.seed, TRANSFORM, *place)
                return Sample(self.transform(pixels, rng), label, unreadable)
        except (UserError, LabelError) as error:  # of the Hub, or of a label
            return Sample(None, None, unreadable, str(error))
        return Sample(None, None, unreadable, f"{len(unreadable)} images in a row cannot be read")


class TrainingImages(Dataset):
    """Images by their place in the sequence: (place, index)."""

    def __init__(self, images: IndexedImages, read_sample: SampleReader):
        self.images, self.read_sample = images, read_sample

    def __getitem__(self, item: tuple[int, int]) -> Sample:
        place, index = item
        following = chain(range(index, self.images.num_images), range(index))
        return self.read_sample((self.images[each] for each in following), (place,))


class ShuffledBatchSampler(Sampler):
    """Endless batches of one process from the sequence of shuffled datasets.

    Args:
        num_images: Images of the dataset.
        batch_size: Batch size over all processes.
        start: Number of the first batch.
    """

    def __init__(self, num_images: int, batch_size: int, seed: int, start: int, share: Share):
        self.num_images, self.batch_size, self.seed, self.start = num_images, batch_size, seed, start
        self.share = share

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, np.empty(0, dtype=np.int64)
        share_size = self.batch_size // self.share.num_processes
        for batch in count(self.start):
            first = batch * self.batch_size + self.share.process_index * share_size
            items = []
            for place in range(first, first + share_size):
                if place // self.num_images != epoch:
                    epoch = place // self.num_images
                    order = create_rng(self.seed, ORDER, epoch).permutation(self.num_images)
                items.append((place, int(order[place % self.num_images])))
            yield items


def find_worker() -> tuple[int, int]:
    """Return the index of this DataLoader worker, and the number of workers."""
    worker = get_worker_info()
    return (0, 1) if worker is None else (worker.id, worker.num_workers)


class StreamedTrainingImages(IterableDataset):
    """Endless batches of one process from a stream that is shuffled in each epoch.

    Each worker of each process reads another part of the stream, and builds whole batches from it. Workers take turns.

    Args:
        batch_size: Batch size of this process.
        start: Number of the first batch.
    """

    def __init__(
        self,
        images: StreamedImages,
        read_sample: SampleReader,
        batch_size: int,
        seed: int,
        start: int,
        share: Share,
    ):
        self.images, self.read_sample = images, read_sample
        self.batch_size, self.seed, self.start = batch_size, seed, start
        self.share = share

    def __iter__(self) -> Iterator[Batch]:
        worker_id, num_workers = find_worker()
        turn = (self.start + worker_id) % num_workers  # the first worker gives the first batch, whichever that is
        part = self.share.divide(turn, num_workers)
        num_done = len(range(turn, self.start, num_workers)) * self.batch_size
        images = self.repeat(part)
        try:
            images = islice(images, num_done, None)
            peeked: deque[LabeledImage] = deque()
            samples = []
            for place in count(num_done):
                samples.append(self.read_sample(peek(images, peeked), (place, part.process_index)))
                if samples[-1].error is not None:
                    yield collate(samples)
                    return
                peeked.popleft()
                if len(samples) == self.batch_size:
                    yield collate(samples)
                    samples = []
        except UserError as error:  # of the Hub, while skipping
            yield EMPTY_BATCH._replace(error=str(error))

    def repeat(self, part: Share) -> Iterator[LabeledImage]:
        for epoch in count():
            images = self.images.shuffle(self.seed, epoch).read(part)
            first = next(images, None)
            if first is None:
                raise UserError(
                    f"{self.images.name} has too few images for {part.num_processes} parts: use fewer --num-workers"
                )
            yield from chain([first], images)


def peek(images: Iterator[LabeledImage], peeked: deque[LabeledImage]) -> Iterator[LabeledImage]:
    """Yield the next images without taking them. `peeked` keeps what the iterator gave.

    So each place in the sequence takes one image, whether it can be read or not.
    """
    yield from peeked
    for image in images:
        peeked.append(image)
        yield image


class ValidationReader:
    """Preprocesses an image with the model's image processor. An unreadable image gets no label."""

    def __init__(self, class_names: list[str], preprocess: Preprocessor):
        self.read_label, self.preprocess = LabelReader(class_names), preprocess

    def __call__(self, image: LabeledImage) -> Sample:
        try:
            return Sample(self.preprocess(image), self.read_label(image), [])
        except LabelError as error:
            return Sample(None, None, [], str(error))
        except UserError as error:
            size = self.preprocess.image_processor.crop_size
            return Sample(torch.zeros(3, size["height"], size["width"]), UNREADABLE_LABEL, [str(error)])


class ValidationImages(IterableDataset):
    """The images of one process. Each image comes once."""

    def __init__(self, images: LabeledImages, read_sample: ValidationReader, share: Share):
        self.images, self.read_sample, self.share = images, read_sample, share

    def __iter__(self) -> Iterator[Sample]:
        try:
            yield from map(self.read_sample, self.images.read(self.share.divide(*find_worker())))
        except UserError as error:  # of the Hub
            yield Sample(None, None, [], str(error))


def create_training_loader(
    data: TrainingData,
    recipe: Recipe,
    transform: Transform,
    batch_size: int,
    start: int,
    share: Share,
) -> DataLoader:
    """Return a loader of endless batches of one process.

    Args:
        batch_size: Batch size over all processes, a multiple of their number.
        start: Number of the first batch.
    """
    read_sample = SampleReader(data.class_names, transform, recipe.seed)
    options = {"num_workers": recipe.num_workers, "pin_memory": torch.cuda.is_available()}
    if isinstance(data.training, IndexedImages):
        sampler = ShuffledBatchSampler(data.training.num_images, batch_size, recipe.seed, start, share)
        return DataLoader(
            TrainingImages(data.training, read_sample), batch_sampler=sampler, collate_fn=collate, **options
        )
    process_batch_size = batch_size // share.num_processes
    stream = StreamedTrainingImages(data.training, read_sample, process_batch_size, recipe.seed, start, share)
    return DataLoader(stream, batch_size=None, **options)


def create_validation_loader(
    data: TrainingData,
    recipe: Recipe,
    preprocess: Preprocessor,
    batch_size: int,
    share: Share,
) -> DataLoader:
    """Return a loader of one process's validation images. The shares of all processes make up the dataset."""
    read_sample = ValidationReader(data.class_names, preprocess)
    images = ValidationImages(data.validation, read_sample, share)
    return DataLoader(
        images,
        batch_size=batch_size,
        collate_fn=collate,
        num_workers=recipe.num_workers,
        pin_memory=torch.cuda.is_available(),
    )
