"""Datasets of labeled images, from folders, from the Hub and from the library `datasets`, as one stream."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi
from PIL import Image

from hub_scripts.errors import UserError
from hub_scripts.hub import explained
from hub_scripts.images import find_images, read_image


SAVED_DATASET_FILES = ("state.json", "dataset_dict.json")  # what `save_to_disk` of `datasets` writes
DATA_FILE_SUFFIXES = (".parquet", ".arrow", ".csv", ".jsonl")
PREFERRED_SPLITS = ("validation", "val", "test")


class LabeledImage(NamedTuple):
    name: str  # for messages
    source: Path | bytes
    label: int | str

    def read(self) -> Image.Image:
        """The image in RGB. Errors name it."""
        try:
            return read_image(self.source if isinstance(self.source, Path) else BytesIO(self.source))
        except UserError as error:
            raise UserError(f"{self.name}: {error}") from error


@dataclass
class LabeledImages:
    """A dataset in a fixed order."""

    name: str
    class_names: list[str] | None  # by label; None where labels are names themselves or numbers without names
    num_images: int | None  # None for a stream of unknown length
    read: Callable[[int, int], Iterator[LabeledImage]]  # every n-th image from the k-th: read(k, n)
    hub_id: str | None = None
    revision: str | None = None
    config: str | None = None
    split: str | None = None

    def share(self, process_index: int, num_processes: int, skipped: int) -> Iterator[LabeledImage]:
        """The images of one process, without the first `skipped` of them. The shares of all make up the dataset."""
        return islice(self.read(process_index, num_processes), skipped, None)


def open_folder(folder: Path) -> LabeledImages:
    """A folder with a folder of images for every class."""
    files = find_images([folder])
    if misplaced := next((file for file in files if file.parent == folder), None):
        raise UserError(f"{misplaced} lies in no class: {folder} must hold a folder for every class")
    class_names = sorted({file.relative_to(folder).parts[0] for file in files})
    labels = {name: label for label, name in enumerate(class_names)}

    def read(process_index: int, num_processes: int) -> Iterator[LabeledImage]:
        for file in files[process_index::num_processes]:
            yield LabeledImage(str(file), file, labels[file.relative_to(folder).parts[0]])

    return LabeledImages(str(folder), class_names, len(files), read)


def choose_split(names: list[str], wanted: str | None, dataset: str) -> str:
    candidates = [wanted] if wanted is not None else PREFERRED_SPLITS
    for name in candidates:
        if name in names:
            return name
    if wanted is None and len(names) == 1:
        return names[0]
    raise UserError(f"choose a split of {dataset} with --split: it has {', '.join(names)}")


def choose_column(candidates: list[str], wanted: str | None, columns: list[str], kind: str, dataset: str) -> str:
    if wanted is not None and wanted not in columns:
        raise UserError(f"{dataset} has no column {wanted}, it has {', '.join(columns)}")
    if wanted is None and len(candidates) != 1:
        raise UserError(f"choose the {kind} column of {dataset} with --{kind}-column: it has {', '.join(columns)}")
    return wanted or candidates[0]


def open_dataset(
    dataset: str,
    *,
    config: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> LabeledImages:
    """A dataset of any of the kinds.

    Args:
        dataset: a folder with a folder per class, a folder that `datasets` wrote or reads, or the id of a dataset on
            the Hub, which is streamed.
        config, split, revision: of a dataset of `datasets`; the split may be left out where there is only one, or one
            that is called validation or test.
        image_column, label_column: may be left out where there is one of the type.

    Raises:
        UserError: where there is no such dataset, split or column.
    """
    path = Path(dataset)
    is_saved = any((path / name).is_file() for name in SAVED_DATASET_FILES)
    if path.is_dir() and not is_saved and not any(file.suffix in DATA_FILE_SUFFIXES for file in path.rglob("*")):
        if (config, split, revision, image_column, label_column) != (None,) * 5:
            raise UserError(f"{dataset} is a folder of images: it has neither splits, revisions nor columns")
        return open_folder(path)

    try:
        import datasets
        from datasets.distributed import split_dataset_by_node
    except ImportError as error:
        raise UserError(f'{dataset} needs the package datasets: pip install "efficientvmamba[evaluate]"') from error

    hub_id = None if path.is_dir() else dataset
    if hub_id is not None:
        with explained(dataset):
            revision = HfApi().dataset_info(hub_id, revision=revision).sha
    try:
        with explained(dataset):
            if is_saved:
                loaded = datasets.load_from_disk(dataset)
            else:
                loaded = datasets.load_dataset(dataset, config, revision=revision, streaming=True)
    except (OSError, ValueError) as error:
        raise UserError(f"the dataset {dataset} cannot be opened: {error}") from error
    if isinstance(loaded, (dict, datasets.IterableDatasetDict)):
        split = choose_split(list(loaded), split, dataset)
        loaded = loaded[split]
    elif split is not None:
        raise UserError(f"{dataset} has no splits, leave --split out")
    if loaded.features is None:
        raise UserError(f"{dataset} does not say which columns it has: save it as Parquet")

    columns = list(loaded.features)
    images = [name for name, feature in loaded.features.items() if isinstance(feature, datasets.Image)]
    labels = [name for name, feature in loaded.features.items() if isinstance(feature, datasets.ClassLabel)]
    image_column = choose_column(images, image_column, columns, "image", dataset)
    label_column = choose_column(
        labels or [name for name in columns if name == "label"], label_column, columns, "label", dataset
    )
    if not isinstance(loaded.features[image_column], datasets.Image):
        raise UserError(f"the column {image_column} of {dataset} holds no images")
    label_feature = loaded.features[label_column]
    if isinstance(loaded, datasets.Dataset):
        num_images, stream = len(loaded), loaded.to_iterable_dataset()
    else:
        known_splits = loaded.info.splits or {}
        num_images, stream = known_splits[split].num_examples if split in known_splits else None, loaded
    stream = stream.select_columns([image_column, label_column]).cast_column(
        image_column, datasets.Image(decode=False)
    )

    def read(process_index: int, num_processes: int) -> Iterator[LabeledImage]:
        with explained(dataset):
            for index, row in enumerate(split_dataset_by_node(stream, process_index, num_processes)):
                image = row[image_column]
                name = f"image {index} of process {process_index} in {dataset}"
                yield LabeledImage(name, image["bytes"] or Path(image["path"]), row[label_column])

    class_names = label_feature.names if isinstance(label_feature, datasets.ClassLabel) else None
    return LabeledImages(dataset, class_names, num_images, read, hub_id, revision if hub_id else None, config, split)
