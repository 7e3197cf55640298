"""One interface for datasets of labeled images: from directories, from the Hub, and from the package `datasets`."""

import os
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from glob import has_magic
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from huggingface_hub import HfApi
from PIL import Image

from evmamba_hub.client import translate_hub_errors
from evmamba_hub.errors import UserError, require
from evmamba_hub.images.image_files import describe_ignored, find_images, walk_files
from evmamba_hub.images.images import read_image
from evmamba_hub.images.layouts import (
    FILE_NAME,
    TABLE_SUFFIXES,
    Metadata,
    check_class_folders,
    choose_evaluation_split,
    choose_split,
    describe_file,
    find_split_folders,
    find_split_kind,
    is_image_folder,
    is_saved_dataset,
    list_class_folders,
    list_metadata_files,
    read_metadata,
)
from evmamba_hub.wording import shorten


if TYPE_CHECKING:
    import datasets


NO_TABLE = "is a directory of images: it has neither configurations, revisions nor columns"
SHUFFLE_BUFFER = 4096  # encoded images in the shuffle buffer of a stream, about 500 MB for ImageNet


def normalize(label: Any) -> Any:
    """Return a label in NFC if it is a name. Systems differ in the Unicode form of the same name."""
    return unicodedata.normalize("NFC", label) if isinstance(label, str) else label


class LabeledImage(NamedTuple):
    name: str  # for messages
    source: Path | bytes
    label: Any  # the class by its index or name, or the annotation of another task

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
        """Return the indices of this share. The shares of all processes together are the dataset."""
        return range(self.process_index, num_images, self.num_processes)

    def divide(self, worker_index: int, num_workers: int) -> "Share":
        """Return the share of one of the process's workers."""
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
    notes: tuple[str, ...] = ()  # sentences for the user about how the dataset was read

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
        check_class_folders(folder)
        self.folder = folder
        self.files, ignored = find_images([folder])
        if misplaced := next((file for file in self.files if file.parent == folder), None):
            raise UserError(
                f"{misplaced} is outside the class directories: {folder} must hold a directory of images per class, "
                "or a metadata.csv with the columns file_name and label"
            )
        names = [self.find_class(file) for file in self.files]
        class_names = sorted(set(names))
        super().__init__(
            name=str(folder),
            class_names=class_names,
            num_images=len(self.files),
            split=split,
            notes=describe_folder(class_names, ignored),
        )
        indices = {name: label for label, name in enumerate(class_names)}
        self.class_indices = [indices[name] for name in names]

    def find_class(self, file: Path) -> str:
        """Return the class of a file."""
        return normalize(file.relative_to(self.folder).parts[0])

    def __getitem__(self, index: int) -> LabeledImage:
        file = self.files[index]
        return LabeledImage(str(file), file, self.class_indices[index])

    @property
    def labels(self) -> list[int]:
        return self.class_indices


def describe_folder(class_names: list[str], ignored: list[Path]) -> tuple[str, ...]:
    """Return what the user should know about an image folder: names taken as classes, and ignored files."""
    notes = []
    if all(find_split_kind(name) for name in class_names):
        notes.append(f"Took {shorten(class_names)} as classes, not as splits, because images lie directly in them")
    if table := next((file for file in ignored if file.suffix.lower() in TABLE_SUFFIXES), None):
        notes.append(f"Read images in directories of classes instead of {table}")
    if ignored:
        notes.append(describe_ignored(ignored))
    return tuple(notes)


@dataclass
class Columns:
    """The columns of images and labels in a dataset of the package `datasets`."""

    image: str
    label: str
    class_names: list[str] | None

    def select(self, rows: Any) -> Any:
        """Return the columns of a table or stream, with the images as they are stored."""
        import datasets

        return rows.select_columns([self.image, self.label]).cast_column(self.image, datasets.Image(decode=False))

    def to_labeled_image(self, row: dict, name: str) -> LabeledImage:
        return LabeledImage(name, find_source(row[self.image]), normalize(row[self.label]))


def find_source(image: dict | None) -> Path | bytes:
    """Return the file or the content of an image, as `datasets.Image` stores it. A missing image becomes empty."""
    image = image or {"bytes": b"", "path": None}
    return Path(image["path"]) if image["bytes"] is None else image["bytes"]


@dataclass(kw_only=True)
class TableImages(IndexedImages):
    """A dataset of the package `datasets` on disk."""

    table: "datasets.Dataset"
    columns: Columns

    def __getitem__(self, index: int) -> LabeledImage:
        return self.columns.to_labeled_image(self.table[index], f"image {index} of {self.name}")

    @property
    def labels(self) -> list[int | str | None]:
        return [normalize(label) for label in self.table[self.columns.label][:]]


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
        """Return the images in an order that seed and epoch determine. A buffer limits its randomness."""
        rng = np.random.default_rng((seed, epoch))
        return replace(self, stream=self.stream.shuffle(rng.integers(2**32).item(), buffer_size=SHUFFLE_BUFFER))


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
    if label_column == image_column:
        raise UserError(f"the column {label_column} of {dataset} holds images: choose another --label-column")
    label_feature = features[label_column]
    class_names = None
    if isinstance(label_feature, datasets.ClassLabel):
        class_names = [normalize(name) for name in label_feature.names]
    return Columns(image_column, label_column, class_names)


def resolve_file_names(file: Path, names: list[str | None]) -> list[dict | None]:
    """Return the images that a metadata file names, as `datasets.Image` stores them.

    Raises:
        UserError: If an image lies outside of the directory.
    """
    images = []
    for name in names:
        path = Path(os.path.normpath((name or ".").replace("\\", "/")))
        if path.is_absolute() or ".." in path.parts:
            raise UserError(f"{file} names the image {name}, which lies outside of {file.parent}: move it there")
        images.append(None if name is None else {"path": str(file.parent / path), "bytes": None})
    return images


def open_metadata(
    metadata: Metadata, image_column: str | None, label_column: str | None, split: str | None
) -> TableImages:
    """Open the images that a metadata file lists.

    Raises:
        UserError: If a column is missing, or an image lies outside of the directory.
    """
    import datasets

    file, rows = metadata
    name = str(file.parent)
    splits = [path.name for path in list_class_folders(file.parent)]
    if len(splits) > 1 and all(map(find_split_kind, splits)):
        raise UserError(f"{file} lists images of several splits, {' and '.join(splits)}: put one file into each split")
    image_feature = datasets.Image(decode=False)
    columns = choose_columns(
        {**dict.fromkeys(rows.columns), FILE_NAME: image_feature}, image_column, label_column, name
    )
    try:
        cells = datasets.Dataset.from_pandas(rows[[FILE_NAME, columns.label]].astype({FILE_NAME: "string"}))
    except ValueError as error:
        raise UserError(f"the column {columns.label} of {file} cannot be read: {error}") from error
    table = datasets.Dataset.from_dict(
        {FILE_NAME: resolve_file_names(file, cells[FILE_NAME][:]), columns.label: cells[columns.label][:]},
        features=datasets.Features({**cells.features, FILE_NAME: image_feature}),
    )
    return TableImages(
        name=name,
        class_names=None,
        num_images=len(table),
        split=split,
        notes=(f"Read the labels in the column {columns.label} of {file}",),
        table=table,
        columns=columns,
    )


def open_folder(folder: Path, split: str | None, image_column: str | None, label_column: str | None) -> IndexedImages:
    """Open the images in a directory by its metadata file, or by its directories of classes.

    A metadata file holds if it has labels, or if there are no classes.

    Raises:
        UserError: If the directory holds neither, its metadata file names no images, or the user names columns of
            classes.
    """
    metadata = read_metadata(folder)
    reason = None  # why the directories are classes although there is a metadata file
    if metadata is not None:
        has_labels = (label_column or "label") in metadata.rows.columns
        if has_labels or label_column is not None or len(list_class_folders(folder)) < 2:
            return open_metadata(metadata, image_column, label_column, split)
        reason = f"{metadata.file} has no column label"
    elif files := list_metadata_files(folder):
        if len(list_class_folders(folder)) < 2:
            form = "in UTF-8, with commas and" if files[0].suffix == ".csv" else "with"
            raise UserError(
                f"{files[0]} names no images: save it {form} the columns {FILE_NAME} and label, or move it away"
            )
        reason = f"{files[0]} names no images"
    if (image_column, label_column) != (None, None):
        raise UserError(f"{folder} {NO_TABLE}")
    images = ImageFolder(folder, split)
    if reason is not None:
        images.notes += (f"Took the directories as classes, because {reason}",)
    return images


def link_for_datasets(directory: Path) -> Path:
    """Return a directory that `datasets` reads as the given one.

    `datasets` expands wildcards in the path of a directory, and enters no link to a directory. So such a directory
    gets a twin of links to its files, in the cache of `datasets`.
    """
    import datasets

    real = Path(os.path.realpath(directory))
    files = list(walk_files(real))
    has_links = any(str(parent) != os.path.realpath(parent) for parent in {file.parent for file in files})
    if not has_links and not has_magic(str(real)):
        return real
    twin = Path(datasets.config.HF_DATASETS_CACHE) / "links" / sha256(os.fsencode(real)).hexdigest()
    wanted = {twin / file.relative_to(real): file for file in files}
    for link in [path for path in twin.rglob("*") if path.is_symlink() and path not in wanted]:
        link.unlink(missing_ok=True)
    for link, file in wanted.items():
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(file)
    return twin


def load_with_datasets(
    dataset: str, path: Path, config: str | None, revision: str | None, streaming: bool
) -> "datasets.Dataset | datasets.DatasetDict | datasets.IterableDatasetDict":
    """Load a dataset of the package `datasets`, from a directory or from the Hub.

    Raises:
        UserError: If there is no such dataset, or it cannot be read.
    """
    import datasets

    try:
        with translate_hub_errors(dataset):
            if not path.is_dir():
                return datasets.load_dataset(dataset, config, revision=revision, streaming=streaming)
            if is_saved_dataset(path):
                return load_saved(dataset)
            return datasets.load_dataset(str(link_for_datasets(path)), config, streaming=streaming)
    except (OSError, ValueError) as error:
        raise UserError(f"the dataset {dataset} cannot be opened: {error}") from error


def load_saved(dataset: str) -> "datasets.Dataset | datasets.DatasetDict":
    """Load what `save_to_disk` of `datasets` wrote.

    Raises:
        UserError: If it holds no images.
    """
    import datasets

    try:
        return datasets.load_from_disk(dataset)
    except IndexError as error:  # there is no file with rows
        raise UserError(
            f"the dataset {dataset} holds no images: choose another --dataset or --dataset-split"
        ) from error


def open_splits(
    dataset: str,
    *,
    config: str | None = None,
    revision: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    streaming: bool = True,
    wanted_splits: Sequence[str] = (),
) -> dict[str | None, Callable[[], LabeledImages]]:
    """Open a dataset.

    Args:
        dataset: One of these sources:

            - an image folder, or a directory with an image folder for each split
            - a directory that `datasets` wrote or reads
            - the id of a dataset on the Hub
        config: The configuration of a dataset of `datasets`.
        revision: Branch, tag or commit on the Hub.
        image_column, label_column: The columns. The default is the only column of the type.
        streaming: Whether to read a dataset on the Hub during the download instead of after it.
        wanted_splits: The splits that the user names. They may be directories of any name.

    Returns:
        A function per split that opens it. A dataset without splits has the split None.

    Raises:
        UserError: If there is no such dataset, or its layout is unclear. Opening a split raises it if there is no such
            column, or the directories are no classes.
    """
    path = Path(dataset)
    is_local = os.path.lexists(path)
    if is_local and not os.path.isdir(path):
        raise UserError(describe_file(path))
    if is_local and is_image_folder(path, (config, image_column, label_column) != (None, None, None)):
        if (config, revision) != (None, None):
            raise UserError(f"{dataset} {NO_TABLE}")
        open_images = partial(open_folder, image_column=image_column, label_column=label_column)
        if split_folders := find_split_folders(path, wanted_splits):
            return {split: partial(open_images, folder, split) for split, folder in split_folders.items()}
        return {None: partial(open_images, path, None)}

    choose = partial(choose_columns, image_column=image_column, label_column=label_column, dataset=dataset)
    return open_tables(dataset, choose, config=config, revision=revision, streaming=streaming)


def open_tables(
    dataset: str,
    choose: Callable[[dict], Columns],
    *,
    config: str | None = None,
    revision: str | None = None,
    streaming: bool = True,
) -> dict[str | None, Callable[[], LabeledImages]]:
    """Open a dataset of the package `datasets`.

    Args:
        dataset: A directory that `datasets` wrote or reads, or the id of a dataset on the Hub.
        choose: Chooses the columns by their features.
        config, revision, streaming: See `open_splits`.

    Returns:
        A function per split that opens it. A dataset without splits has the split None.

    Raises:
        UserError: If there is no such dataset. Opening a split raises it if there is no such column.
    """
    require("datasets", extra="evaluate")
    import datasets

    path, is_local = Path(dataset), os.path.lexists(dataset)
    hub_id = None if is_local else dataset
    if hub_id is not None:
        with translate_hub_errors(dataset, may_be_path=True):
            revision = HfApi().dataset_info(hub_id, revision=revision).sha
    loaded = load_with_datasets(dataset, path, config, revision, streaming)

    def open_split(split: str | None) -> LabeledImages:
        rows = loaded if split is None else loaded[split]
        if rows.features is None:
            raise UserError(f"{dataset} does not declare its columns: save it as Parquet")
        columns = choose(rows.features)
        rows = columns.select(rows)
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
        split: The name of the split, in any case. The default is that for validation, that for tests, or the only one.

    Raises:
        UserError: If there is no such dataset, split or column.
    """
    splits = open_splits(dataset, wanted_splits=[] if split is None else [split], **options)
    if None in splits:
        if split is not None:
            raise UserError(f"{dataset} has no splits: leave --dataset-split out")
        return splits[None]()
    names = [name for name in splits if name is not None]
    if split is not None:
        return splits[choose_split(names, split, dataset, "--dataset-split")]()
    if len(names) == 1:
        return splits[names[0]]()
    chosen = choose_evaluation_split(names, dataset, "--dataset-split")
    if chosen is None:
        raise UserError(f"choose a split of {dataset} with --dataset-split: it has {', '.join(names)}")
    images = splits[chosen]()
    images.notes += (f"Took the split {chosen} of {', '.join(names)}",)
    return images
