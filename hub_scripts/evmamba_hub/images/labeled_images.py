"""One interface for datasets of labeled images: from directories, from the Hub, and from the package `datasets`."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from huggingface_hub import HfApi
from PIL import Image

from evmamba_hub.client import translate_hub_errors
from evmamba_hub.errors import UserError, require
from evmamba_hub.images.image_files import find_images
from evmamba_hub.images.images import read_image


if TYPE_CHECKING:
    import datasets


SAVED_DATASET_FILES = ("state.json", "dataset_dict.json")  # what `save_to_disk` of `datasets` writes
DATA_FILE_SUFFIXES = (".parquet", ".arrow", ".csv", ".jsonl")
TRAIN_SPLIT = "train"
EVALUATION_SPLITS = ("validation", "val", "test")
SHUFFLE_BUFFER = 4096  # encoded images in the shuffle buffer of a stream, about 500 MB for ImageNet


class LabeledImage(NamedTuple):
    name: str  # for messages
    source: Path | bytes
    label: int | str

    def read(self) -> Image.Image:
        """Read the image in RGB. Errors name the image."""
        try:
            return read_image(self.source if isinstance(self.source, Path) else BytesIO(self.source))
        except UserError as error:
            raise UserError(f"{self.name}: {error}") from error


class Share(NamedTuple):
    """The images of one process: every `num_processes`-th image of a dataset."""

    process_index: int
    num_processes: int

    def indices(self, num_images: int) -> range:
        """Returns the indices of this share. The shares of all processes together are the dataset."""
        return range(self.process_index, num_images, self.num_processes)

    def divide(self, worker_index: int, num_workers: int) -> "Share":
        """Returns the share of one of the process's workers."""
        return Share(self.process_index * num_workers + worker_index, self.num_processes * num_workers)


@dataclass(kw_only=True)
class LabeledImages:
    """A dataset in a fixed order."""

    name: str
    class_names: list[str] | None  # by label; None if labels are names, or numbers without names
    num_images: int | None  # None for a stream of unknown length
    hub_id: str | None = None
    revision: str | None = None
    config: str | None = None
    split: str | None = None

    def read(self, share: Share) -> Iterator[LabeledImage]:
        """Yield the images of one process. Sizes of shares differ by at most one image."""
        raise NotImplementedError


class IndexedImages(LabeledImages):
    """A dataset whose images can be read in any order."""

    def __len__(self) -> int:
        assert self.num_images is not None  # only streams have an unknown length
        return self.num_images

    def __getitem__(self, index: int) -> LabeledImage:
        raise NotImplementedError

    @property
    def labels(self) -> Sequence[int | str | None]:
        """The labels of all images."""
        raise NotImplementedError

    def read(self, share: Share) -> Iterator[LabeledImage]:
        return (self[index] for index in share.indices(len(self)))


class SelectedImages(IndexedImages):
    """A subset of a dataset."""

    def __init__(self, images: IndexedImages, indices: list[int]):
        about = {field.name: getattr(images, field.name) for field in fields(LabeledImages)}
        super().__init__(**{**about, "num_images": len(indices)})
        self.images, self.indices = images, indices

    def __getitem__(self, index: int) -> LabeledImage:
        return self.images[self.indices[index]]

    @property
    def labels(self) -> Sequence[int | str | None]:
        labels = self.images.labels
        return [labels[index] for index in self.indices]


class ImageFolder(IndexedImages):
    """An image folder: a directory with a directory of images per class."""

    def __init__(self, folder: Path, split: str | None = None):
        self.folder, self.files = folder, find_images([folder])
        if misplaced := next((file for file in self.files if file.parent == folder), None):
            raise UserError(f"{misplaced} lies in no class: {folder} must hold a directory of images per class")
        class_names = sorted({self.find_class(file) for file in self.files})
        super().__init__(name=str(folder), class_names=class_names, num_images=len(self.files), split=split)
        self.indices = {name: label for label, name in enumerate(class_names)}

    def find_class(self, file: Path) -> str:
        return file.relative_to(self.folder).parts[0]

    def __getitem__(self, index: int) -> LabeledImage:
        file = self.files[index]
        return LabeledImage(str(file), file, self.indices[self.find_class(file)])

    @property
    def labels(self) -> list[int]:
        return [self.indices[self.find_class(file)] for file in self.files]


@dataclass
class Columns:
    """The columns of images and labels in a dataset of the package `datasets`."""

    image: str
    label: str
    class_names: list[str] | None

    def to_labeled_image(self, row: dict, name: str) -> LabeledImage:
        image = row[self.image] or {"bytes": b"", "path": None}  # treat a missing image as an unreadable one
        source = Path(image["path"]) if image["bytes"] is None else image["bytes"]
        return LabeledImage(name, source, row[self.label])


@dataclass(kw_only=True)
class TableImages(IndexedImages):
    """A dataset of the package `datasets` on disk."""

    table: "datasets.Dataset"
    columns: Columns

    def __getitem__(self, index: int) -> LabeledImage:
        return self.columns.to_labeled_image(self.table[index], f"image {index} of {self.name}")

    @property
    def labels(self) -> list[int | str | None]:
        return self.table[self.columns.label][:]


@dataclass(kw_only=True)
class StreamedImages(LabeledImages):
    """A dataset that is streamed from the Hub."""

    stream: "datasets.IterableDataset"
    columns: Columns

    def read(self, share: Share) -> Iterator[LabeledImage]:
        from datasets.distributed import split_dataset_by_node

        part = split_dataset_by_node(self.stream, *share)
        try:
            yield from self.read_part(part, f"part {share.process_index} of {share.num_processes} of {self.name}")
        except OSError as error:
            raise UserError(f"the stream {self.name} cannot be read: {error}") from error

    def read_part(self, part: "datasets.IterableDataset", name: str) -> Iterator[LabeledImage]:
        with translate_hub_errors(self.name):
            # `iter`, because `__iter__` in a worker of a DataLoader divides the part again
            for number, rows in enumerate(part.iter(batch_size=1)):
                row = {name: values[0] for name, values in rows.items()}
                yield self.columns.to_labeled_image(row, f"image {number} of {name}")

    def shuffle(self, seed: int, epoch: int) -> "StreamedImages":
        """Returns the images in an order that seed and epoch determine. A buffer limits its randomness."""
        rng = np.random.default_rng((seed, epoch))
        return replace(self, stream=self.stream.shuffle(rng.integers(2**32).item(), buffer_size=SHUFFLE_BUFFER))


def find_split_folders(folder: Path) -> dict[str, Path]:
    """Returns the directories of the splits by name, or nothing if the directory holds other directories too."""
    inside = {path.name: path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")}
    return inside if TRAIN_SPLIT in inside and inside.keys() <= {TRAIN_SPLIT, *EVALUATION_SPLITS} else {}


def choose_split(names: list[str], wanted: str | None, dataset: str) -> str:
    candidates = [wanted] if wanted is not None else EVALUATION_SPLITS
    for name in candidates:
        if name in names:
            return name
    if wanted is None and len(names) == 1:
        return names[0]
    raise UserError(f"choose a split of {dataset} with --split: it has {', '.join(names)}")


def choose_column(candidates: list[str], wanted: str | None, columns: list[str], kind: str, dataset: str) -> str:
    if wanted is not None and wanted not in columns:
        raise UserError(f"{dataset} has no column {wanted}: choose one of {', '.join(columns)}")
    if wanted is None and len(candidates) != 1:
        raise UserError(f"choose the {kind} column of {dataset} with --{kind}-column: it has {', '.join(columns)}")
    return wanted or candidates[0]


def choose_columns(features: dict, image_column: str | None, label_column: str | None, dataset: str) -> Columns:
    import datasets

    names = list(features)
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    image_column = choose_column(images, image_column, names, "image", dataset)
    labels = labels or [name for name in names if name == "label"]
    label_column = choose_column(labels, label_column, names, "label", dataset)
    if not isinstance(features[image_column], datasets.Image):
        raise UserError(
            f"the column {image_column} of {dataset} holds no images: choose the column with --image-column"
        )
    label_feature = features[label_column]
    class_names = label_feature.names if isinstance(label_feature, datasets.ClassLabel) else None
    return Columns(image_column, label_column, class_names)


def open_splits(
    dataset: str,
    *,
    config: str | None = None,
    revision: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    streaming: bool = True,
) -> dict[str | None, Callable[[], LabeledImages]]:
    """Open a dataset.

    Args:
        dataset: One of these sources:

            - an image folder, or a directory with an image folder for `train` and for other splits
            - a directory that `datasets` wrote or reads
            - the id of a dataset on the Hub
        config: The configuration of a dataset of `datasets`.
        revision: Branch, tag or commit on the Hub.
        image_column, label_column: The columns. The default is the only column of the type.
        streaming: Whether to read a dataset on the Hub during the download instead of after it.

    Returns:
        A function per split that opens it. A dataset without splits has the split None.

    Raises:
        UserError: If there is no such dataset. Opening a split raises it if there is no such column.
    """
    path = Path(dataset)
    is_saved = any((path / name).is_file() for name in SAVED_DATASET_FILES)
    if path.is_dir() and not is_saved and not any(file.suffix in DATA_FILE_SUFFIXES for file in path.rglob("*")):
        if (config, revision, image_column, label_column) != (None,) * 4:
            raise UserError(
                f"{dataset} is a directory of images: it has neither configurations, revisions nor columns"
            )
        if split_folders := find_split_folders(path):
            return {split: partial(ImageFolder, folder, split) for split, folder in split_folders.items()}
        return {None: partial(ImageFolder, path, None)}

    require("datasets", extra="evaluate")
    import datasets

    hub_id = None if path.is_dir() else dataset
    if hub_id is not None:
        with translate_hub_errors(dataset):
            revision = HfApi().dataset_info(hub_id, revision=revision).sha
    try:
        with translate_hub_errors(dataset):
            if is_saved:
                loaded = datasets.load_from_disk(dataset)
            else:
                loaded = datasets.load_dataset(dataset, config, revision=revision, streaming=streaming)
    except (OSError, ValueError) as error:
        raise UserError(f"the dataset {dataset} cannot be opened: {error}") from error

    def open_split(split: str | None) -> LabeledImages:
        rows = loaded if split is None else loaded[split]
        if rows.features is None:
            raise UserError(f"{dataset} does not declare its columns: save it as Parquet")
        columns = choose_columns(rows.features, image_column, label_column, dataset)
        rows = rows.select_columns([columns.image, columns.label]).cast_column(
            columns.image, datasets.Image(decode=False)
        )
        about: dict[str, Any] = {
            "name": dataset,
            "class_names": columns.class_names,
            "hub_id": hub_id,
            "revision": revision if hub_id else None,
            "config": config,
            "split": split,
        }
        if isinstance(rows, datasets.Dataset):
            return TableImages(num_images=len(rows), table=rows, columns=columns, **about)
        known_splits = rows.info.splits or {}
        num_images = known_splits[split].num_examples if split in known_splits else None
        return StreamedImages(num_images=num_images, stream=rows, columns=columns, **about)

    splits = list(loaded) if isinstance(loaded, (dict, datasets.IterableDatasetDict)) else [None]
    return {split: partial(open_split, split) for split in splits}


def open_dataset(dataset: str, *, split: str | None = None, **options: Any) -> LabeledImages:
    """Open the split of a dataset for evaluation.

    Args:
        dataset: The source of the dataset. `open_splits` describes it, and the other options.
        split: The name of the split. The default is validation, val, test, or the only split.

    Raises:
        UserError: If there is no such dataset, split or column.
    """
    splits = open_splits(dataset, **options)
    if None not in splits:
        split = choose_split([name for name in splits if name is not None], split, dataset)
    elif split is not None:
        raise UserError(f"{dataset} has no splits: leave --split out")
    return splits[split]()
