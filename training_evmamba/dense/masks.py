"""Images with masks: labels of masks, layouts of directories, and columns of datasets."""

import json
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError
from PIL import Image

from evmamba_hub.client import translate_hub_errors
from evmamba_hub.errors import UserError
from evmamba_hub.images.image_files import describe_ignored, find_images, holds_image, list_directories
from evmamba_hub.images.images import read_mask
from evmamba_hub.images.labeled_images import (
    Columns,
    IndexedImages,
    LabeledImage,
    LabeledImages,
    choose_column,
    find_source,
)
from evmamba_hub.images.layouts import find_split_kind
from evmamba_hub.wording import shorten, to_count
from training_evmamba.data import LabelError
from training_evmamba.dense.data import Splits


IGNORED = 255  # the value of pixels without label in masks, and their class index
IGNORED_OF_MANY_CLASSES = -100  # their class index if 255 is that of a class
NUM_VALUES, NUM_COLORS = 2**16, 2**24
NUM_CHECKED = 8  # masks that are checked before a run begins
UNKNOWN = -1  # in the table of a mask reader

# names of directories, in lower case
IMAGE_FOLDERS = ("images", "image", "imgs", "jpegimages")
MASK_FOLDERS = ("masks", "mask", "annotations", "labels", "segmentationclass")

# names of files beside the images that name the labels
LABEL_FILES = ("labels.txt", "labels.json", "classes.txt", "classes.json", "id2label.json", "objectInfo150.txt")
HUB_LABEL_FILE = "id2label.json"

# names of columns with masks, in lower case
MASK_COLUMNS = ("mask", "masks", "annotation", "label", "labels", "segmentation", "segmentation_mask", "semantic_mask")


@dataclass
class MaskLabels:
    """The labels of masks.

    Args:
        source: The file that names them, for messages.
        names: Names by class index.
        values: The value, or the color as a number, of each class in the masks.
        is_colored: Whether masks are in RGB.
    """

    source: str
    names: list[str]
    values: list[int]
    is_colored: bool = False

    @property
    def ignored(self) -> int:
        """The class index of pixels without label."""
        return IGNORED if len(self.names) <= IGNORED else IGNORED_OF_MANY_CLASSES

    @property
    def note(self) -> str:
        """A sentence for the user about the classes."""
        note = f"Read {to_count(len(self.names), 'label')} from {self.source}: {shorten(self.names)}"
        if not self.is_colored and self.values != list(range(len(self.values))):
            note += f". The labels {shorten(list(map(str, self.values)))} become the classes from 0"
        return note


def to_code(color: Any) -> int:
    """Return the number of a color [red, green, blue]."""
    red, green, blue = (int(band) for band in color)
    if not all(0 <= band < 256 for band in (red, green, blue)):
        raise ValueError(f"{color} is no color")
    return red << 16 | green << 8 | blue


def parse_label_text(text: str) -> dict[int, str]:
    """Return names by value from a file of one name a line, or from a table with a column `Name`, as ADE20K has."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    heading = lines[0].split("\t") if lines else []
    if "Name" in heading:
        column = heading.index("Name")
        lines = [line.split("\t")[column].strip() for line in lines[1:]]
    return dict(enumerate(lines))


def read_labels(file: Path) -> MaskLabels:
    """Read the labels of masks.

    Args:
        file: A text file of one name a line, from label 0 on; or JSON: a list of names, `{"0": name}`, or
            `{name: [red, green, blue]}` for masks in RGB.

    Raises:
        UserError: If the file cannot be read or names fewer than two classes.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
        content = json.loads(text) if file.suffix.lower() == ".json" else parse_label_text(text)
        return parse_labels(content, str(file))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"the labels {file} cannot be read: {error}. Give a text file of one name a line, or JSON of the form "
            '{"0": name} or {name: [red, green, blue]}'
        ) from error


def parse_labels(content: Any, source: str) -> MaskLabels:
    """Return the labels in the content of a file. `read_labels` describes it.

    Raises:
        UserError: If there are fewer than two classes, or two with the same name.
        ValueError, TypeError: If the content has another form.
    """
    if isinstance(content, list):
        content = dict(enumerate(content))
    if not isinstance(content, dict):
        raise ValueError("it holds no names")
    is_colored = any(isinstance(value, list) for value in content.values())
    if is_colored:
        pairs = [(to_code(color), str(name)) for name, color in content.items()]
    else:
        pairs = sorted((int(value), str(name)) for value, name in content.items())
        if len(pairs) <= IGNORED + 1:
            pairs = [pair for pair in pairs if pair[0] != IGNORED]
        if pairs and not 0 <= pairs[0][0] <= pairs[-1][0] < NUM_VALUES:
            raise ValueError(f"labels lie from 0 to {NUM_VALUES - 1}")
    values, names = [value for value, _ in pairs], [name for _, name in pairs]
    if len(names) < 2:
        raise UserError(f"{source} names {to_count(len(names), 'label')}: name two or more, the background included")
    for found in (names, values):
        if repeated := [each for each in found if found.count(each) > 1]:
            raise UserError(f"{source} names {repeated[0]!r} twice: give each class its own name and label")
    return MaskLabels(source, names, values, is_colored)


def find_label_file(dataset: str, revision: str | None) -> Path:
    """Return the file that names the labels of a dataset: in its directory, or in its repository on the Hub.

    Raises:
        UserError: If there is none.
    """
    folder = Path(dataset)
    if folder.is_dir():
        found = [folder / name for name in LABEL_FILES if (folder / name).is_file()]
        if found:
            return found[0]
        places = f"it holds none of {', '.join(LABEL_FILES)}"
    else:
        with translate_hub_errors(dataset, may_be_path=True), suppress(EntryNotFoundError):
            return Path(HfApi().hf_hub_download(dataset, HUB_LABEL_FILE, repo_type="dataset", revision=revision))
        places = f"its repository holds no {HUB_LABEL_FILE}"
    raise UserError(f"{dataset} does not name its labels, {places}: give --labels, a text file of one name a line")


class MaskReader:
    """Reads masks as class indices.

    Args:
        labels: The labels.
        reduce_labels: Whether label 0 marks pixels without label, and the classes begin with label 1.
    """

    def __init__(self, labels: MaskLabels, reduce_labels: bool):
        self.labels = labels
        self.table = np.full(NUM_COLORS if labels.is_colored else NUM_VALUES, UNKNOWN, dtype=np.int16)
        if not labels.is_colored:
            self.table[IGNORED] = labels.ignored
            if reduce_labels:
                self.table[0] = labels.ignored
        shift = int(reduce_labels and not labels.is_colored)
        for index, value in enumerate(labels.values):
            self.table[value + shift] = index

    def __call__(self, image: LabeledImage) -> np.ndarray:
        """Return the class indices (H, W) of an image's mask, int16. Pixels without label are `ignored`.

        Raises:
            UserError: If the mask cannot be read.
            LabelError: If it holds other values than the labels.
        """
        source, name = image.label, describe_mask(image)
        try:
            values = read_mask(source if isinstance(source, Path) else BytesIO(source))
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
        if (values.ndim == 3) != self.labels.is_colored:
            raise LabelError(
                f"{name} has one value a pixel, and {self.labels.source} gives colors: give --labels with the names "
                "of values"
                if self.labels.is_colored
                else f"{name} is in color: give --labels as JSON of the form {{name: [red, green, blue]}}, or save it "
                "with one label a pixel"
            )
        codes = values @ np.array([1 << 16, 1 << 8, 1]) if values.ndim == 3 else values.astype(np.int64)
        smallest, largest = int(codes.min()), int(codes.max())
        if smallest < 0 or largest >= len(self.table):
            raise LabelError(
                f"{name} holds values from {smallest} to {largest}: labels lie from 0 to {NUM_VALUES - 1}"
            )
        classes = self.table[codes]  # [H, W]
        if (classes == UNKNOWN).any():
            unknown = int(codes[classes == UNKNOWN][0])
            raise LabelError(f"{name} holds {self.describe(unknown)}, which {self.labels.source} does not name")
        return classes

    def describe(self, code: int) -> str:
        if self.labels.is_colored:
            return f"the color {[code >> 16, code >> 8 & 255, code & 255]}"
        return f"the label {code}"


class MaskedImageReader:
    """Reads images with their masks."""

    def __init__(self, labels: MaskLabels, reduce_labels: bool):
        self.labels, self.read_classes = labels, MaskReader(labels, reduce_labels)

    def __call__(self, image: LabeledImage) -> tuple[Image.Image, np.ndarray]:
        """Return an image in RGB, and its class indices (H, W).

        Raises:
            UserError: If image or mask cannot be read.
            LabelError: If the mask has another size than the image, or other values than the labels.
        """
        pixels, classes = image.read(), self.read_classes(image)
        height, width = classes.shape
        if (width, height) != pixels.size:
            raise LabelError(
                f"{describe_mask(image)} has {width} x {height} pixels, and {image.name} has {pixels.width} x "
                f"{pixels.height}: save the mask in the size of its image, turned as its EXIF orientation says"
            )
        return pixels, classes


def check_some_masks(images: LabeledImages, read_pair: MaskedImageReader) -> list[str]:
    """Check some masks before a run begins. A stream would be read twice, so its masks are not checked.

    Returns:
        Sentences for the user about a doubt.

    Raises:
        UserError: If a mask is wrong. Unreadable ones are left to the run.
    """
    if not isinstance(images, IndexedImages):
        return []
    labels, found = read_pair.labels, set()
    for index in np.linspace(0, len(images) - 1, min(NUM_CHECKED, len(images))).astype(int).tolist():
        try:
            found |= set(np.unique(read_pair(images[index])[1]).tolist())
        except LabelError as error:
            raise UserError(str(error)) from error
        except UserError:
            continue
    if not found <= {0, labels.ignored} or labels.ignored not in found:
        return []
    return [
        f"Some masks hold {labels.names[0]} and {IGNORED} alone, and {IGNORED} marks pixels without label: save "
        "objects as 1"
    ]


def describe_mask(image: LabeledImage) -> str:
    """Return what messages call the mask of an image."""
    return str(image.label) if isinstance(image.label, Path) else f"the mask of {image.name}"


class MaskFolder(IndexedImages):
    """A directory of images and a directory of masks, whose paths differ in the ending only."""

    def __init__(self, image_folder: Path, mask_folder: Path, split: str | None):
        found, masks = find_images([image_folder]), find_images([mask_folder])
        masks_by_stem = index_by_stem(masks.files, mask_folder)
        images_by_stem = index_by_stem(found.files, image_folder)
        missing = [file for stem, file in images_by_stem.items() if stem not in masks_by_stem]
        if missing:
            raise UserError(
                f"{missing[0]} has no mask in {mask_folder}: name masks as their images, or remove images without "
                f"mask, of which there are {len(missing):,}"
            )
        notes = [describe_ignored(ignored) for ignored in (found.ignored, masks.ignored) if ignored]
        if others := [file for stem, file in masks_by_stem.items() if stem not in images_by_stem]:
            notes.append(f"Ignored {to_count(len(others), 'mask')} without image, such as {others[0]}")
        super().__init__(
            name=str(image_folder), class_names=None, num_images=len(found.files), split=split, notes=tuple(notes)
        )
        self.pairs = [(file, masks_by_stem[stem]) for stem, file in images_by_stem.items()]

    def __getitem__(self, index: int) -> LabeledImage:
        image, mask = self.pairs[index]
        return LabeledImage(str(image), image, mask)


def index_by_stem(files: list[Path], folder: Path) -> dict[Path, Path]:
    """Return files by their path in a directory without ending.

    Raises:
        UserError: If two differ in the ending only.
    """
    by_stem: dict[Path, Path] = {}
    for file in files:
        other = by_stem.setdefault(file.relative_to(folder).with_suffix(""), file)
        if other is not file:
            raise UserError(f"{other} and {file} differ in the ending only: rename or remove one of them")
    return by_stem


def find_part(folder: Path, names: tuple[str, ...]) -> Path | None:
    """Return the directory in a directory that has the first of the names and holds images."""
    folders = {path.name.lower(): path for path in list_directories(folder)}
    return next((folders[name] for name in names if name in folders and holds_image(folders[name])), None)


def find_parts(folder: Path) -> tuple[Path, Path] | None:
    """Return the directories of images and of masks in a directory, or None if there are no two of them."""
    images, masks = find_part(folder, IMAGE_FOLDERS), find_part(folder, MASK_FOLDERS)
    return None if images is None or masks is None else (images, masks)


def open_mask_folders(folder: Path) -> Splits | None:
    """Open a directory with `images/` and `masks/`, which may hold splits, or with such directories per split.

    Raises:
        UserError: If a split has images and no masks. Opening a split raises it if an image has no mask.
    """
    if parts := find_parts(folder):
        images, masks = parts
        splits = list_directories(images)
        if splits and all(find_split_kind(path.name) for path in splits):
            for path in splits:
                if not (masks / path.name).is_dir():
                    raise UserError(f"{images} holds the split {path.name}, and {masks} does not: add its masks")
            return {path.name: partial(MaskFolder, path, masks / path.name, path.name) for path in splits}
        return {None: partial(MaskFolder, images, masks, None)}
    parts_of_splits = {path.name: find_parts(path) for path in list_directories(folder)}
    return {
        split: partial(MaskFolder, *parts, split) for split, parts in parts_of_splits.items() if parts is not None
    } or None


@dataclass
class MaskColumns(Columns):
    """The columns of images and masks in a dataset of the package `datasets`."""

    def select(self, rows: Any) -> Any:
        import datasets

        return super().select(rows).cast_column(self.label, datasets.Image(decode=False))

    def to_labeled_image(self, row: dict, name: str) -> LabeledImage:
        return LabeledImage(name, find_source(row[self.image]), find_source(row[self.label]))


def choose_mask_columns(
    features: dict, image_column: str | None, mask_column: str | None, dataset: str
) -> MaskColumns:
    """Choose the columns of images and masks.

    Raises:
        UserError: If they are not clear.
    """
    import datasets

    names = list(features)
    pictures = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    masks = [name for name in pictures if name.lower() in MASK_COLUMNS and name != image_column]
    mask_column = choose_column(masks, mask_column, names, "mask", dataset)
    images = [name for name in pictures if name != mask_column]
    image_column = choose_column(images, image_column, names, "image", dataset)
    for column, option in ((image_column, "--image-column"), (mask_column, "--mask-column")):
        if column not in pictures:
            raise UserError(f"the column {column} of {dataset} holds no images: choose the column with {option}")
    if image_column == mask_column:
        raise UserError(f"{image_column} of {dataset} cannot hold both images and masks: choose another --mask-column")
    return MaskColumns(image_column, mask_column, None)
