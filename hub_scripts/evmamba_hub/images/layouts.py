"""The layouts of image folders: splits, classes and metadata files in a directory."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from evmamba_hub.errors import UserError, require
from evmamba_hub.images.image_files import (
    holds_image,
    is_ignored,
    list_decodable_suffixes,
    list_directories,
    list_entries,
    walk_files,
)
from evmamba_hub.wording import shorten


if TYPE_CHECKING:
    import pandas


# The usual names of splits by what they are for. Their case does not matter.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval", "evaluation"),
    "test": ("test", "testing"),
}
EVALUATION_KINDS = ("validation", "test")  # which split to evaluate on, best first

SAVED_DATASET_FILES = (("dataset_dict.json",), ("dataset_info.json", "state.json"))  # of `save_to_disk` of `datasets`
TABLE_SUFFIXES = {".parquet", ".arrow"}
TEXT_SUFFIXES = {".csv", ".jsonl"}
MODEL_SUFFIXES = {".safetensors", ".pth", ".pt", ".ckpt", ".bin", ".onnx", ".pt2", ".h5"}
ARCHIVE_SUFFIXES = {".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar"}

FILE_NAME = "file_name"  # the column of a metadata file
METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")

# What datasets for detection and segmentation have in the place of classes, in lower case
IMAGE_PARTS = {"images", "jpegimages"}
ANNOTATION_PARTS = {"annotations", "imagesets", "labels", "masks", "segmentationclass", "segmentationobject"}


def find_split_kind(name: str) -> str | None:
    """Return what the split of a usual name is for: "train", "validation" or "test"."""
    return next((kind for kind, names in SPLIT_NAMES.items() if name.lower() in names), None)


def match_splits(names: Collection[str], wanted: str) -> list[str]:
    """Return the splits of a name: the same name, else that in another case, else usual names for the same."""
    if wanted in names:
        return [wanted]
    kind = find_split_kind(wanted)
    same_name = [name for name in names if name.lower() == wanted.lower()]
    return same_name or [name for name in names if kind is not None and find_split_kind(name) == kind]


def choose_split(names: Collection[str], wanted: str, dataset: str, option: str) -> str:
    """Return the split of a name.

    Raises:
        UserError: If there is none, or several. The message names the option.
    """
    matches = match_splits(names, wanted)
    if not matches:
        raise UserError(f"{dataset} has no split {wanted!r}: {option} takes {', '.join(names)}")
    return choose_only(matches, dataset, option)


def choose_evaluation_split(names: Collection[str], dataset: str, option: str) -> str | None:
    """Return the split to evaluate on by its usual name: that for validation, else that for tests, else None.

    Raises:
        UserError: If there are several. The message names the option.
    """
    for kind in EVALUATION_KINDS:
        if matches := [name for name in names if find_split_kind(name) == kind]:
            return choose_only(matches, dataset, option)
    return None


def choose_only(matches: list[str], dataset: str, option: str) -> str:
    if len(matches) > 1:
        raise UserError(f"{dataset} has several splits of this kind: choose {' or '.join(matches)} with {option}")
    return matches[0]


class Metadata(NamedTuple):
    """A metadata file: a table of the images of a directory."""

    file: Path
    rows: "pandas.DataFrame"


def list_metadata_files(folder: Path) -> list[Path]:
    """Return the files in a directory that have the name of a metadata file."""
    names = {entry.name for entry in list_entries(folder)}
    return [folder / name for name in METADATA_FILES if name in names]


def read_metadata(folder: Path) -> Metadata | None:
    """Read the metadata file of a directory as the format `imagefolder` of `datasets` has it, with `file_name`.

    Raises:
        UserError: If there is a metadata file, and no package that reads it.
    """
    for file in list_metadata_files(folder):
        require("datasets", extra="evaluate")  # brings pandas
        import pandas

        try:
            if file.suffix == ".csv":
                rows = pandas.read_csv(file, keep_default_na=False, na_values=[""], low_memory=False)
            elif file.suffix == ".jsonl":
                lines = [json.loads(line) for line in file.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
                rows = pandas.DataFrame([line for line in lines if isinstance(line, dict)])
            else:
                rows = pandas.read_parquet(file)
        except (OSError, ValueError):  # another file of this name
            continue
        if FILE_NAME in rows.columns and len(rows) > 0:
            return Metadata(file, rows.convert_dtypes())  # a gap among integers makes no fractions of them
    return None


def list_class_folders(folder: Path) -> list[Path]:
    """Return the directories in a directory that hold images."""
    return [path for path in list_directories(folder) if holds_image(path)]


def is_split_folder(path: Path) -> bool:
    """Return whether a directory with the name of a split is one: images in classes, or with a metadata file."""
    if find_split_kind(path.name) is None:
        return False
    return any(map(holds_image, list_directories(path))) or (bool(list_metadata_files(path)) and holds_image(path))


def find_split_folders(folder: Path, wanted: Sequence[str] = ()) -> dict[str, Path]:
    """Return the directories of the splits by name, or nothing if the directories are classes.

    A directory with a usual name of splits is a split if it holds classes. If it holds images only, it is a class.

    Args:
        folder: The root of an image folder.
        wanted: Splits that the user names. If a directory has the name, the directories are splits.

    Raises:
        UserError: If there are splits beside other directories or images.
    """
    folders = {path.name: path for path in list_directories(folder)}
    if any(match_splits(folders, name) for name in wanted):
        return folders
    if not any(map(is_split_folder, folders.values())):
        return {}
    splits = [name for name in folders if find_split_kind(name) is not None]
    suffixes = list_decodable_suffixes()
    files = [entry.name for entry in list_entries(folder) if entry.name not in folders and not is_ignored(entry.name)]
    images = [name for name in files if Path(name).suffix.lower() in suffixes]
    if others := [name for name in [*folders, *images] if name not in splits]:
        raise UserError(
            f"{folder} holds splits ({', '.join(splits)}) beside {shorten(others)}: move one or the other away, or "
            "name the splits to read with --dataset-split or --validation-split"
        )
    return folders


def check_class_folders(folder: Path) -> None:
    """Check that the directories in a directory can be classes.

    Raises:
        UserError: If they hold splits, or the images and annotations of another task.
    """
    folders = list_directories(folder)
    names = {path.name.lower() for path in folders}
    if names & IMAGE_PARTS and names <= IMAGE_PARTS | ANNOTATION_PARTS:
        raise UserError(
            f"{folder} holds {', '.join(path.name for path in folders)} instead of classes, as datasets for detection "
            "or segmentation do: give a directory with a directory of images per class"
        )
    for path in folders:
        inner = list_directories(path)
        if inner and all(find_split_kind(each.name) for each in inner) and any(map(holds_image, inner)):
            raise UserError(
                f"{path} holds splits ({', '.join(each.name for each in inner)}), so it is no class: give {path} "
                "itself if its splits hold a directory of images per class, or put the classes into the splits"
            )


def is_image_folder(directory: Path, has_columns: bool) -> bool:
    """Return whether a directory holds image files, rather than a dataset that `datasets` reads.

    Classes and metadata files decide. Other tables beside or inside the classes change nothing.

    Args:
        directory: The root of a dataset.
        has_columns: Whether the user names columns or a configuration. Classes have none, but tables do.
    """
    if is_saved_dataset(directory):
        return False
    if read_metadata(directory) is not None:
        return True
    folders = list_class_folders(directory)
    if not has_columns and (len(folders) > 1 or any(map(is_split_folder, folders))):
        return True
    suffixes = {file.suffix.lower() for file in walk_files(directory)}
    if suffixes & TABLE_SUFFIXES:
        return False
    return bool(suffixes & list_decodable_suffixes()) or not suffixes & TEXT_SUFFIXES


def is_saved_dataset(directory: Path) -> bool:
    """Return whether `save_to_disk` of `datasets` wrote a directory."""
    return any(all((directory / name).is_file() for name in names) for names in SAVED_DATASET_FILES)


def describe_file(path: Path) -> str:
    """Return what a file is that was given as a dataset, and what to do."""
    suffix = path.suffix.lower()
    classes = "a directory with a directory of images per class"
    if suffix in ARCHIVE_SUFFIXES:
        return f"{path} is an archive: unpack it, and give {classes}"
    if suffix in TABLE_SUFFIXES:
        return f"{path} is a single data file: give the directory that holds it"
    if suffix in {*TEXT_SUFFIXES, ".json", ".tsv", ".txt"}:
        return f"{path} is a file: give {classes}, or one of images with a metadata.csv"
    if suffix in MODEL_SUFFIXES:
        return f"{path} is a file of a model: give {classes}"
    if suffix in list_decodable_suffixes():
        return f"{path} is a single image: give {classes}"
    return f"{path} is no directory: give {classes}, or the id of a dataset on the Hub"
