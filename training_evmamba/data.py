"""Images for training: their choice, their order, and the process that reads them.

Training repeats the dataset in a new random order for each epoch. Step s takes the s-th batch of this sequence.
Batches cross the borders of epochs, so each epoch uses every image once, and all batches have the same size.

The augmentation of an image depends only on the seed and its place in the sequence. A run can thus resume at any step.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, count, islice
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from evmamba_hub.errors import UserError
from evmamba_hub.images.image_files import add_ignored, list_directories, search_images
from evmamba_hub.images.labeled_images import (
    ImageFolder,
    IndexedImages,
    LabeledImage,
    LabeledImages,
    SelectedImages,
    Share,
    StreamedImages,
    open_splits,
)
from evmamba_hub.images.layouts import choose_evaluation_split, choose_split
from evmamba_hub.inference.evaluation import Preprocessor
from evmamba_hub.wording import shorten, to_count
from training_evmamba.recipe import TRAIN_SPLIT, BaseRecipe, Recipe


MAX_UNREADABLE_IN_A_ROW = 100
WORKER_DIED = "DataLoader worker"  # the start of PyTorch's messages
UNREADABLE_LABEL = -1  # of a validation image that could not be read

# What a random number is for. The numbers of two purposes are independent.
ORDER, TRANSFORM, MIXING, STOCHASTIC_DEPTH, HOLD_OUT = range(5)


# makes pixels (C, H, W) of an image, at random
Transform = Callable[[Image.Image, np.random.Generator], torch.Tensor]

# makes pixels (C, H, W) of a labeled image, and the target
Prepare = Callable[[LabeledImage, np.random.Generator], tuple[torch.Tensor, Any]]


def create_rng(seed: int, purpose: int, *place: int) -> np.random.Generator:
    """Return a random generator that depends only on the place in the run."""
    return np.random.default_rng((seed, purpose, *place))


def seed_network(seed: int, *place: int) -> None:
    """Let a place in the run determine PyTorch's random numbers, which stochastic depth takes."""
    torch.manual_seed(create_rng(seed, STOCHASTIC_DEPTH, *place).integers(2**63).item())


def count_cpus() -> int:
    """Return the number of CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def choose_num_workers(images: LabeledImages, recipe: BaseRecipe) -> int:
    """Return the number of workers of a DataLoader, at most one per CPU.

    A stream keeps the recipe's number, because it determines the order of the images.
    """
    return min(recipe.num_workers, count_cpus()) if isinstance(images, IndexedImages) else recipe.num_workers


@dataclass
class TrainingData:
    """The images for training and evaluation."""

    training: LabeledImages
    validation: LabeledImages | None
    class_names: list[str]
    images_per_epoch: int
    notes: list[str]  # sentences for the user about how the dataset was read


def find_class_names(images: LabeledImages) -> list[str]:
    """Return the class names of a training set.

    Raises:
        UserError: If the classes are unknown, or there are fewer than two.
    """
    if isinstance(images, ImageFolder):
        used = {images.find_class(file) for file in images.files}
        if empty := [path for path in list_directories(images.folder) if images.find_class(path) not in used]:
            message = f"the class directory {empty[0]} holds no image: fill it, or remove it"
            raise UserError(add_ignored(message, search_images(empty[0]).ignored))
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
        raise UserError(
            "give a --dataset: a directory with a directory of images per class, or the Hub id of a dataset"
        )
    splits = open_splits(
        recipe.dataset,
        config=recipe.dataset_config,
        revision=recipe.dataset_revision,
        image_column=recipe.image_column,
        label_column=recipe.label_column,
        streaming=recipe.streaming,
        wanted_splits=[
            name for name in (recipe.train_split, recipe.validation_split) if name not in (TRAIN_SPLIT, None)
        ],
    )
    training, validation, notes = open_chosen_splits(recipe, splits)
    class_names = find_class_names(training)
    if validation is not None and validation.class_names not in (None, training.class_names):
        odd = sorted(set(class_names) ^ set(validation.class_names)) or ["their order"]
        raise UserError(
            f"training and evaluation know different classes, {len(class_names)} and {len(validation.class_names)}: "
            f"{', '.join(odd[:5])}. Each needs images of all"
        )
    if validation is not None:
        notes += validation.notes
    if isinstance(validation, IndexedImages):
        check_known_labels(validation, class_names)
    if validation is None and recipe.validation_fraction > 0 and isinstance(training, IndexedImages):
        training, validation = hold_out(training, class_names, recipe)
        notes += describe_hold_out(validation, class_names)
    images_per_epoch = choose_images_per_epoch(recipe, training)
    notes += describe_machine(recipe, training, images_per_epoch)
    return TrainingData(training, validation, class_names, images_per_epoch, notes)


def open_chosen_splits(
    recipe: BaseRecipe, splits: dict[str | None, Callable[[], LabeledImages]]
) -> tuple[LabeledImages, LabeledImages | None, list[str]]:
    """Open the splits for training and for evaluation.

    Returns:
        Their images, and sentences for the user. The images for evaluation are None if there is no such split.

    Raises:
        UserError: If a split is missing, several may be meant, or one cannot be opened.
    """
    train_split, validation_split = choose_splits(recipe, splits)
    training = splits[train_split]()
    validation = None if validation_split is None else splits[validation_split]()
    notes = list(training.notes)
    if train_split is not None:
        evaluation = "" if validation_split is None else f", evaluating on {validation_split}"
        notes.append(f"Training on the split {train_split}{evaluation}")
    return training, validation, notes


def choose_images_per_epoch(recipe: BaseRecipe, training: LabeledImages) -> int:
    """Return the length of an epoch in images.

    Raises:
        UserError: If neither the recipe nor a stream tells it.
    """
    images_per_epoch = recipe.images_per_epoch or training.num_images
    if images_per_epoch is None:
        raise UserError(f"the stream {training.name} does not tell its length: give --images-per-epoch")
    return images_per_epoch


def describe_machine(recipe: BaseRecipe, training: LabeledImages, images_per_epoch: int) -> list[str]:
    """Return sentences for the user about values of the recipe that fit neither machine nor data."""
    notes = []
    num_workers = choose_num_workers(training, recipe)
    if num_workers < recipe.num_workers:
        notes.append(f"Reduced --num-workers from {recipe.num_workers} to {num_workers}, the number of available CPUs")
    if images_per_epoch < recipe.batch_size:
        notes.append(
            f"An epoch of {to_count(images_per_epoch, 'image')} is less than one step of {recipe.batch_size}: lower "
            "--batch-size for more steps"
        )
    return notes


def choose_splits(recipe: BaseRecipe, splits: dict[str | None, Callable]) -> tuple[str | None, str | None]:
    """Return the splits for training and for evaluation. A dataset without splits has None for both.

    Raises:
        UserError: If a split is missing, or several may be meant.
    """
    dataset = recipe.dataset
    if None in splits:
        if recipe.train_split != TRAIN_SPLIT:
            raise UserError(f"{dataset} has no splits, leave --train-split out")
        if recipe.validation_split is not None:
            raise UserError(f"{dataset} has no splits, leave --validation-split out")
        return None, None
    train_split = choose_split(splits, recipe.train_split, dataset, "--train-split")
    if recipe.validation_split is not None:
        return train_split, choose_split(splits, recipe.validation_split, dataset, "--validation-split")
    others = [name for name in splits if name != train_split]
    return train_split, choose_evaluation_split(others, dataset, "--validation-split")


def find_labels(images: IndexedImages, class_names: list[str]) -> np.ndarray:
    """Return the class indices of all images, (images,). All labels must be known."""
    labels_of_names = {name: label for label, name in enumerate(class_names)}
    return np.array([labels_of_names.get(label, label) for label in images.labels], dtype=np.int64)


def choose_held_out(labels: np.ndarray, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """Choose images of each class at random.

    Each class gives the fraction of its images, rounded down or up so that the whole gives the fraction too. One image
    of each class is left in any case.

    Args:
        labels: The class index of each image, (images,).
        fraction: The fraction to choose.

    Returns:
        Whether each image is chosen, (images,).
    """
    counts = np.bincount(labels)
    quotas = fraction * counts
    num_chosen = np.floor(quotas).astype(np.int64)
    num_missing = round(fraction * len(labels)) - num_chosen.sum()
    # round up the largest remainders, and break ties at random
    by_lot = rng.permutation(len(counts))
    by_remainder = by_lot[np.argsort((num_chosen - quotas)[by_lot], kind="stable")]
    can_give = by_remainder[num_chosen[by_remainder] + 1 < counts[by_remainder]]
    num_chosen[can_give[:num_missing]] += 1

    shuffled = rng.permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    places = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)  # of the images in their class
    is_chosen = np.zeros(len(labels), dtype=bool)
    is_chosen[by_class] = places < np.repeat(num_chosen, counts)
    return is_chosen


def hold_out(
    images: IndexedImages, class_names: list[str], recipe: Recipe
) -> tuple[IndexedImages, SelectedImages | None]:
    """Divide the images of each class between training and validation. The seed determines the choice.

    Returns:
        The images for training and for validation. The latter is None if no image is held out.
    """
    labels = find_labels(images, class_names)
    is_held_out = choose_held_out(labels, recipe.validation_fraction, create_rng(recipe.seed, HOLD_OUT))
    training, validation = (
        SelectedImages(images, np.flatnonzero(mask).tolist()) for mask in (~is_held_out, is_held_out)
    )
    return training, validation if validation.num_images else None


def describe_hold_out(validation: SelectedImages | None, class_names: list[str]) -> list[str]:
    """Return sentences for the user about the images that are held out."""
    if validation is None:
        return ["No image is held out for evaluation, because the classes have too few"]
    held_out = set(find_labels(validation, class_names).tolist())
    missing = [name for label, name in enumerate(class_names) if label not in held_out]
    notes = [f"Held out {to_count(validation.num_images, 'image')} for evaluation"]
    if missing:
        classes = "1 class has" if len(missing) == 1 else f"{len(missing):,} classes have"
        notes.append(f"{classes} no held-out image: {shorten(missing)}")
    return notes


class LabelError(Exception):
    """A label that fits neither its image nor the classes. It stops the run."""


class Sample(NamedTuple):
    """A preprocessed image, or the error that stops the run."""

    pixel_values: torch.Tensor | None  # (C, H, W)
    label: Any  # a class index, or what other tasks learn
    unreadable: list[str]  # the images that were skipped before it
    error: str | None = None  # stops the run; exceptions would lose their message between processes


class Batch(NamedTuple):
    pixel_values: torch.Tensor  # (B, C, H, W)
    labels: Any  # (B,) if they are class indices
    unreadable: list[str]
    error: str | None


EMPTY_BATCH = Batch(torch.empty(0), torch.empty(0, dtype=torch.int64), [], None)


def collate(samples: list[Sample], collate_labels: Callable[[list], Any] = torch.tensor) -> Batch:
    """Return a batch. It holds no image if a sample has an error, or if no sample has an image."""
    unreadable = list(chain.from_iterable(sample.unreadable for sample in samples))
    if error := next((sample.error for sample in samples if sample.error), None):
        return EMPTY_BATCH._replace(unreadable=unreadable, error=error)
    readable = [sample for sample in samples if sample.pixel_values is not None]
    if not readable:
        return EMPTY_BATCH._replace(unreadable=unreadable)
    pixel_values = torch.stack([sample.pixel_values for sample in readable])
    return Batch(pixel_values, collate_labels([sample.label for sample in readable]), unreadable, None)


class LabelReader:
    """Return the class index of an image's label, or raises `LabelError`."""

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


class ClassifiedImageReader:
    """Reads and augments an image, and reads its class index."""

    def __init__(self, class_names: list[str], transform: Transform):
        self.read_label, self.transform = LabelReader(class_names), transform

    def __call__(self, image: LabeledImage, rng: np.random.Generator) -> tuple[torch.Tensor, int]:
        label = self.read_label(image)
        return self.transform(image.read(), rng), label


class SampleReader:
    """Reads and augments one image, or the next readable one.

    Args:
        prepare: Makes a sample of an image. It raises a `UserError` if the image cannot be read, and a `LabelError` if
            its label is wrong.
        seed: Seed of the random numbers.
        collate_labels: Makes the labels of a batch from those of its samples.
    """

    def __init__(self, prepare: Prepare, seed: int, collate_labels: Callable[[list], Any] = torch.tensor):
        self.prepare, self.seed, self.collate_labels = prepare, seed, collate_labels

    def collate(self, samples: list[Sample]) -> Batch:
        return collate(samples, self.collate_labels)

    def __call__(self, candidates: Iterator[LabeledImage], place: tuple[int, ...]) -> Sample:
        """Return the first readable image of the candidates.

        Args:
            candidates: Images. Later ones replace unreadable ones.
            place: Place in the run. It determines the random numbers.
        """
        unreadable: list[str] = []
        try:
            for image in islice(candidates, MAX_UNREADABLE_IN_A_ROW):
                try:
                    return Sample(*self.prepare(image, create_rng(self.seed, TRANSFORM, *place)), unreadable)
                except UserError as error:
                    unreadable.append(str(error))
        except (UserError, LabelError) as error:  # of the Hub, or of a label
            return Sample(None, None, unreadable, str(error))
        error = f"{len(unreadable)} images in a row cannot be read, such as: {unreadable[0]}"
        return Sample(None, None, unreadable, error)


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
                    yield self.read_sample.collate(samples)
                    return
                peeked.popleft()
                if len(samples) == self.batch_size:
                    yield self.read_sample.collate(samples)
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

    collate = staticmethod(collate)

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


class ValidationImages(Dataset):
    """The images of one process, by their place in its share."""

    def __init__(self, images: IndexedImages, read_sample: Callable[[LabeledImage], Sample], share: Share):
        self.images, self.read_sample = images, read_sample
        self.indices = share.indices(len(images))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> Sample:
        return self.read_sample(self.images[self.indices[place]])


class StreamedValidationImages(IterableDataset):
    """The images of one process from a stream. Each image comes once."""

    def __init__(self, images: StreamedImages, read_sample: Callable[[LabeledImage], Sample], share: Share):
        self.images, self.read_sample, self.share = images, read_sample, share

    def __iter__(self) -> Iterator[Sample]:
        try:
            yield from map(self.read_sample, self.images.read(self.share.divide(*find_worker())))
        except UserError as error:  # of the Hub
            yield Sample(None, None, [], str(error))


def create_training_loader(
    data: TrainingData,
    recipe: BaseRecipe,
    read_sample: SampleReader,
    batch_size: int,
    start: int,
    share: Share,
) -> DataLoader:
    """Return a loader of endless batches of one process.

    Args:
        batch_size: Batch size over all processes, a multiple of their number.
        start: Number of the first batch.
    """
    options = {
        "num_workers": choose_num_workers(data.training, recipe),
        "pin_memory": torch.cuda.is_available(),
    }
    if isinstance(data.training, IndexedImages):
        sampler = ShuffledBatchSampler(data.training.num_images, batch_size, recipe.seed, start, share)
        return DataLoader(
            TrainingImages(data.training, read_sample),
            batch_sampler=sampler,
            collate_fn=read_sample.collate,
            **options,
        )
    process_batch_size = batch_size // share.num_processes
    stream = StreamedTrainingImages(data.training, read_sample, process_batch_size, recipe.seed, start, share)
    return DataLoader(stream, batch_size=None, **options)


def create_validation_loader(
    data: TrainingData,
    recipe: BaseRecipe,
    read_sample: ValidationReader,
    batch_size: int,
    share: Share,
) -> DataLoader:
    """Return a loader of one process's validation images. The shares of all processes make up the dataset."""
    dataset_class = ValidationImages if isinstance(data.validation, IndexedImages) else StreamedValidationImages
    return DataLoader(
        dataset_class(data.validation, read_sample, share),
        batch_size=batch_size,
        collate_fn=read_sample.collate,
        num_workers=choose_num_workers(data.validation, recipe),
        pin_memory=torch.cuda.is_available(),
    )


def next_batch(batches: Iterator[Batch]) -> Batch | None:
    """Return the next batch of a loader, or None after the last one.

    Raises:
        RuntimeError: If a worker of the loader dies, also while it hands over a batch.
    """
    try:
        return next(batches, None)
    except (EOFError, ConnectionError, FileNotFoundError) as error:
        raise RuntimeError(f"{WORKER_DIED} hung up: {error}") from error


@contextmanager
def translate_dead_worker(describe_last_checkpoint: Callable[[], str]) -> Iterator[None]:
    """Translate the error of PyTorch about a dead worker of a loader into a `UserError`. It comes anywhere in a run.

    Args:
        describe_last_checkpoint: Returns what to do next, for the message.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith(WORKER_DIED):
            raise
        raise UserError(
            "a process that reads images was killed, probably because memory ran out, use fewer --num-workers: "
            f"{str(error).rstrip(' .')}. {describe_last_checkpoint()}"
        ) from error


def check_batch(batch: Batch, recipe: BaseRecipe, describe_last_checkpoint: Callable[[], str]) -> Batch:
    """Return a batch that holds no error, and no unreadable image that must stop the run.

    Raises:
        UserError: If it holds one.
    """
    if batch.error is not None:
        raise UserError(f"{batch.error}. {describe_last_checkpoint()}")
    if batch.unreadable and recipe.on_unreadable == "stop":
        raise UserError(
            f"{batch.unreadable[0]}: replace the image, or skip it with --on-unreadable skip. "
            f"{describe_last_checkpoint()}"
        )
    return batch
