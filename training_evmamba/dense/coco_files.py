"""Datasets of images and annotation files in COCO's format.

These layouts are found, with one annotation file for each split:

- `annotations/instances_train2017.json` and `train2017/`, as COCO has them
- `train/_annotations.coco.json` beside the images, as Roboflow exports them
- `train.json` and `images/`

Specification: https://cocodataset.org/#format-data
"""

import json
import os
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from evmamba_hub.errors import UserError
from evmamba_hub.images.image_files import list_directories, list_entries, search_images, walk_files
from evmamba_hub.images.labeled_images import IndexedImages, normalize
from evmamba_hub.images.layouts import TABLE_SUFFIXES, TEXT_SUFFIXES, find_split_kind, is_saved_dataset
from evmamba_hub.wording import shorten, to_count
from training_evmamba.dense.boxes import BoxForm, BoxImage, Objects, create_objects


LISTS = ("images", "annotations", "categories")
WORDS = {"", "annotations", "annotation", "instances", "coco", "labels", "boxes", "bbox", "detection"}
YEAR = re.compile(r"(19|20)\d\d$")
NUM_TRIED = 20  # files that tell in which directory the images lie


class AnnotationFile(NamedTuple):
    file: Path
    split: str | None
    folders: list[Path]  # where its images may lie


def find_split_name(stem: str) -> str | None:
    """Return the split in the name of an annotation file, with its year: "train2017" of "instances_train2017".

    Returns:
        The split. It is "" if the name tells of annotations only, and None for other files.
    """
    words = [word for word in re.split(r"[\W_]+", stem) if word.lower() not in WORDS]
    if not words:
        return ""
    return words[0] if len(words) == 1 and find_split_kind(YEAR.sub("", words[0])) else None


def find_annotation_files(root: Path) -> list[AnnotationFile]:
    """Find the annotation files of a directory by their names, in it and in its directories.

    Raises:
        UserError: If a directory cannot be read.
    """
    found = []
    for folder in [root, *list_directories(root)]:
        for entry in list_entries(folder):
            file = Path(entry.path)
            split = find_split_name(file.stem) if file.suffix.lower() == ".json" else None
            if split == "" and find_split_kind(folder.name) and folder != root:
                split = folder.name
            if split is not None:
                found.append(create_annotation_file(root, file, split or None))
    return shorten_splits(found)


def create_annotation_file(root: Path, file: Path, split: str | None) -> AnnotationFile:
    """Return an annotation file, with the directories in which its images may lie."""
    names = [] if split is None else [split, YEAR.sub("", split)]
    bases = [file.parent, root]
    folders = [base / part / name for base in bases for name in names for part in ("", "images")]
    folders += [base / part for base in bases for part in ("", "images", "data")]
    return AnnotationFile(file, split, list(dict.fromkeys(folder for folder in folders if folder.is_dir())))


def shorten_splits(files: list[AnnotationFile]) -> list[AnnotationFile]:
    """Drop the years of splits, unless there are several of a split. A file without a split gets its own name."""
    counts = Counter(file.split and YEAR.sub("", file.split) for file in files)

    def shorten_split(file: AnnotationFile) -> AnnotationFile:
        if file.split is None:
            return file._replace(split=file.file.stem if len(files) > 1 else None)
        short = YEAR.sub("", file.split)
        return file._replace(split=short if counts[short] == 1 else file.split)

    return [shorten_split(file) for file in files]


def open_coco_splits(folder: Path, box_form: BoxForm) -> dict[str | None, Callable[[], "CocoImages"]] | None:
    """Open a directory with annotation files.

    Returns:
        A function per split that opens it. A dataset without splits has the split None. The result is None if there is
        no annotation file.

    Raises:
        UserError: If a directory cannot be read, two files have the name of one split, or all have other names.
    """
    if is_saved_dataset(folder):
        return None
    files = find_annotation_files(folder)
    if not files:
        check_other_names(folder)
        return None
    counts = Counter(file.split for file in files)
    if same := next((split for split, number in counts.items() if number > 1), None):
        paths = [str(file.file) for file in files if file.split == same]
        raise UserError(f"the split {same} has several annotation files, {' and '.join(paths)}: keep one")
    return {file.split: partial(CocoImages, file, box_form) for file in files}


def check_other_names(folder: Path) -> None:
    """Check that a directory has no JSON file, unless it has tables that `datasets` reads.

    Raises:
        UserError: If it has one, which is probably an annotation file.
    """
    others = {file.suffix.lower(): file for file in walk_files(folder)}
    if ".json" in others and not others.keys() & (TABLE_SUFFIXES | TEXT_SUFFIXES):
        raise UserError(
            f"{others['.json']} tells no split by its name: name annotation files train.json and val.json, or "
            "annotations.json"
        )


def read_coco_file(file: Path) -> dict[str, list[dict]]:
    """Read an annotation file.

    Raises:
        UserError: If it cannot be read, or has no boxes.
    """
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is no JSON file, or is damaged: {error}") from error
    for name in LISTS:
        entries = content.get(name) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise UserError(
                f"{file} is no annotation file of COCO for detection: it must hold the lists {', '.join(LISTS)}, and "
                f"{name} is none"
            )
    return content


def read_field(file: Path, kind: str, entry: dict, name: str, *types: type) -> Any:
    """Return a field of an entry.

    Raises:
        UserError: If the field is missing, or has another type.
    """
    value = entry.get(name)
    if not isinstance(value, types) or isinstance(value, bool):
        about = f"{kind} {entry['id']}" if "id" in entry else f"an entry of its list of {kind}s"
        raise UserError(f"{file} is damaged: {about} has the {name} {value!r}")
    return value


class Categories(NamedTuple):
    class_names: list[str]
    labels: dict[int, int]  # class index of each id
    notes: list[str]


def read_categories(file: Path, entries: list[dict]) -> Categories:
    """Return the classes of an annotation file, in the order of their ids, which may have gaps.

    Raises:
        UserError: If there is no category, or two have one id.
    """
    names: dict[int, str] = {}
    for entry in entries:
        category = read_field(file, "category", entry, "id", int)
        if category in names:
            raise UserError(f"{file} has two categories of the id {category}: give each category an id of its own")
        names[category] = normalize(str(entry.get("name") or category))
    if not names:
        raise UserError(f"{file} names no categories: list them with `id` and `name`")
    names = {category: names[category] for category in sorted(names)}
    notes = []
    for name in [name for name, number in Counter(names.values()).items() if number > 1]:
        same = " and ".join(str(category) for category in names if names[category] == name)
        notes.append(f"Took the categories {same} as one class, because their name is {name}")
    class_names = list(dict.fromkeys(names.values()))
    indices = {name: index for index, name in enumerate(class_names)}
    return Categories(class_names, {category: indices[name] for category, name in names.items()}, notes)


def choose_folder(file: Path, folders: list[Path], names: list[str]) -> Path:
    """Return the directory in which the images lie.

    Raises:
        UserError: If none of the directories holds any of the files.
    """
    tried = names[:NUM_TRIED]
    hits = [sum(os.path.isfile(folder / name) for name in tried) for folder in folders]
    if tried and not any(hits):
        places = shorten([str(folder) for folder in folders])
        raise UserError(
            f"the images of {file}, such as {tried[0]}, are in none of {places}: move them beside the file, or to a "
            "directory images"
        )
    return folders[hits.index(max(hits))]


def find_file(file: Path, name: str) -> str:
    """Return the relative path of an image that an annotation file names.

    Raises:
        UserError: If it leads outside of the dataset.
    """
    path = Path(os.path.normpath(name.replace("\\", "/")))
    if path.is_absolute() or ".." in path.parts:
        raise UserError(f"{file} names the image {name}, which lies outside of the dataset: give relative paths in it")
    return str(path)


def read_objects(
    file: Path, annotations: list[dict], image_indices: dict[int, int], categories: Categories, box_form: BoxForm
) -> tuple[Objects, np.ndarray, list[str]]:
    """Return the objects of all images, the index of the image of each, and sentences for the user.

    Raises:
        UserError: If an annotation is damaged, or has a category that is not listed.
    """
    boxes, labels, areas, is_crowd, places = [], [], [], [], []
    seen, num_lost = set(), 0
    for entry in annotations:
        place = image_indices.get(read_field(file, "annotation", entry, "image_id", int, str))
        if place is None:
            num_lost += 1
            continue
        box = read_field(file, "annotation", entry, "bbox", list)
        if len(box) != 4 or not all(isinstance(value, (int, float)) and np.isfinite(value) for value in box):
            raise UserError(f"{file} is damaged: annotation {entry.get('id')} has the bbox {box}")
        category = read_field(file, "annotation", entry, "category_id", int)
        if category not in categories.labels:
            raise UserError(f"{file} has an annotation of the category {category}, which it does not list")
        key = (place, category, *box)
        if key not in seen:
            seen.add(key)
            boxes.append(box)
            labels.append(categories.labels[category])
            areas.append(entry["area"] if isinstance(entry.get("area"), (int, float)) else np.nan)
            is_crowd.append(entry.get("iscrowd") == 1)
            places.append(place)
    notes = []
    if num_lost:
        notes.append(f"Ignored {to_count(num_lost, 'annotation')} of images that {file} does not list")
    if num_same := len(annotations) - num_lost - len(places):
        notes.append(f"Ignored {to_count(num_same, 'annotation')} of {file} that repeat others")
    return create_objects(boxes, labels, areas, is_crowd, form=box_form), np.array(places, dtype=np.int64), notes


class CocoImages(IndexedImages):
    """The images of an annotation file."""

    def __init__(self, annotation_file: AnnotationFile, box_form: BoxForm):
        file, split, folders = annotation_file.file, annotation_file.split, annotation_file.folders
        content = read_coco_file(file)
        entries = content["images"]
        ids = [read_field(file, "image", entry, "id", int, str) for entry in entries]
        names = [find_file(file, read_field(file, "image", entry, "file_name", str)) for entry in entries]
        for what, values in (("the id", ids), ("the file_name", names)):
            if same := next((value for value, number in Counter(values).items() if number > 1), None):
                raise UserError(f"{file} has two images with {what} {same}: give each image one entry")
        categories = read_categories(file, content["categories"])
        objects, places, notes = read_objects(
            file, content["annotations"], {each: place for place, each in enumerate(ids)}, categories, box_form
        )
        self.folder = choose_folder(file, folders, names)
        super().__init__(
            name=str(file), class_names=categories.class_names, num_images=len(entries), split=split, notes=()
        )
        order = np.argsort(places, kind="stable")
        self.files = names
        self.sizes = [(entry.get("width"), entry.get("height")) for entry in entries]
        self.objects = objects.select(order)
        self.starts = np.searchsorted(places[order], np.arange(len(entries) + 1))  # of the objects of each image
        self.notes = (*categories.notes, *notes, *self.compare_files())

    def compare_files(self) -> list[str]:
        """Return sentences for the user about files that are missing, or that the annotation file does not list."""
        present = {str(file.relative_to(self.folder)) for file in search_images(self.folder).files}
        missing = [name for name in self.files if name not in present and not (self.folder / name).exists()]
        unlisted = sorted(present.difference(self.files))
        notes = []
        if missing:
            notes.append(f"{self.folder} lacks {to_count(len(missing), 'image')} of {self.name}: {shorten(missing)}")
        holds_other_splits = self.split is not None and find_split_name(self.folder.name) in ("", None)
        if unlisted and not holds_other_splits:
            count = to_count(len(unlisted), "image")
            notes.append(f"Ignored {count} that {self.name} does not list: {shorten(unlisted)}")
        return notes

    def __getitem__(self, index: int) -> BoxImage:
        path = self.folder / self.files[index]
        objects = self.objects.select(slice(self.starts[index], self.starts[index + 1]))
        size = self.sizes[index]
        is_known = all(isinstance(side, int) and side > 0 for side in size)
        return BoxImage(str(path), path, objects, size if is_known else None)
