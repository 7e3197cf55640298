"""Find image files in directories."""

import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import EpsImagePlugin, Image
from PIL.ImageFile import StubImageFile

from evmamba_hub.errors import UserError


# Directories that systems and tools leave beside files, in lower case. Names with a leading dot are ignored as well.
SYSTEM_DIRECTORIES = {
    "#recycle",
    "#snapshot",
    "$recycle.bin",
    "@eadir",
    "@recently-snapshot",
    "@recycle",
    "@tmp",
    "__macosx",
    "__pycache__",
    "lost+found",
    "system volume information",
}

MPO = "MPO"  # JPEG's reader opens it, so Pillow registers none
MPEG = "MPEG"  # Pillow identifies it without decoding


class FoundImages(NamedTuple):
    files: list[Path]  # in order
    ignored: list[Path]  # files that are hidden, or without an image extension


def is_ignored(name: str) -> bool:
    """Return whether a name in a directory is hidden, or that of a system's directory."""
    return name.startswith(".") or name.lower() in SYSTEM_DIRECTORIES


def list_decodable_suffixes() -> set[str]:
    """Return the extensions of the formats that Pillow decodes here, such as ".jpg"."""
    return {suffix for suffix, name in Image.registered_extensions().items() if is_decodable(name)}


def is_decodable(format_name: str) -> bool:
    if format_name == "EPS":
        return bool(EpsImagePlugin.has_ghostscript())
    opener = Image.OPEN.get(format_name, (None,))[0]
    is_stub = isinstance(opener, type) and issubclass(opener, StubImageFile)  # it identifies a format, no more
    return format_name == MPO or (opener is not None and format_name != MPEG and not is_stub)


def list_entries(directory: str | Path) -> list[os.DirEntry[str]]:
    """Return the entries of a directory, sorted by name.

    Raises:
        UserError: If the directory cannot be read.
    """
    try:
        with os.scandir(directory) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"the directory {directory} cannot be read: {error.strerror}") from error


def is_directory(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a directory, or a link to one."""
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def is_special(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a pipe, a socket or a device. A broken link is a file that cannot be read."""
    if entry.is_symlink():
        return os.path.exists(entry.path) and not os.path.isfile(entry.path) and not os.path.isdir(entry.path)
    return not entry.is_file() and not entry.is_dir()


def list_directories(directory: Path) -> list[Path]:
    """Return the directories in a directory, and the links to directories, without ignored ones.

    Raises:
        UserError: If the directory cannot be read, or a link leads nowhere that may be one to a directory.
    """
    directories = []
    for entry in list_entries(directory):
        path = Path(entry.path)
        if is_ignored(entry.name):
            continue
        if is_directory(entry):
            directories.append(path)
        elif not path.suffix and entry.is_symlink() and not os.path.exists(path):
            raise UserError(f"the link {path} leads nowhere: restore what it leads to, or remove it")
    return directories


def walk_entries(directory: Path) -> Iterator[os.DirEntry[str]]:
    """Yield the files below a directory, and the ignored entries without what they hold.

    Links are followed. Below each entry of the directory, every other directory is entered once: by its own path, or
    by a link if it has no other. A link to what contains the directory is not entered. So loops end.
    """
    root = Path(os.path.realpath(directory))
    for top in list_entries(directory):
        entered = {str(root), *map(str, root.parents)}
        links = deque([top])
        while links:
            pending = [links.popleft()]
            while pending:
                entry = pending.pop()
                if is_ignored(entry.name) or not is_directory(entry):
                    yield entry
                elif (real := os.path.realpath(entry.path)) not in entered:
                    entered.add(real)
                    for inner in list_entries(entry.path):
                        (links if inner.is_symlink() else pending).append(inner)


def walk_files(directory: Path) -> Iterator[Path]:
    """Yield the files below a directory, without ignored ones. `walk_entries` tells how links are followed."""
    for entry in walk_entries(directory):
        if not is_ignored(entry.name) and not is_special(entry):
            yield Path(entry.path)


def list_files(entry: os.DirEntry[str]) -> list[Path]:
    """Return the entry itself, or the files below it if it is a directory. Skip what cannot be read."""
    if not entry.is_dir(follow_symlinks=False):
        return [Path(entry.path)]
    return [Path(folder, name) for folder, _, names in os.walk(entry.path) for name in names]


def search_images(directory: Path) -> FoundImages:
    """Find the images below a directory by their extensions. Hidden files and those of systems are ignored.

    Raises:
        UserError: If a directory cannot be read.
    """
    suffixes = list_decodable_suffixes()
    files, ignored = [], []
    for entry in walk_entries(directory):
        path = Path(entry.path)
        if is_ignored(entry.name):
            ignored += list_files(entry)
        elif path.suffix.lower() in suffixes and not is_special(entry):
            files.append(path)
        else:
            ignored.append(path)
    return FoundImages(sorted(files), ignored)


def holds_image(directory: Path) -> bool:
    """Return whether there is an image below a directory."""
    suffixes = list_decodable_suffixes()
    return any(file.suffix.lower() in suffixes for file in walk_files(directory))


def find_images(paths: list[Path]) -> FoundImages:
    """Find images: the files among the paths, whatever their names, and the images below its directories, in order.

    Raises:
        UserError: If a path does not exist, or a directory holds no image or cannot be read.
    """
    found = FoundImages([], [])
    for path in paths:
        if os.path.isdir(path):
            files, ignored = search_images(path)
            if not files:
                message = f"the directory {path} holds no image: give one with files of a format that Pillow reads"
                raise UserError(add_ignored(message, ignored))
            found.files.extend(files)
            found.ignored.extend(ignored)
        elif os.path.exists(path):
            found.files.append(path)
        else:
            raise UserError(f"{path} does not exist: give image files, or directories of images")
    return found


def describe_ignored(ignored: list[Path]) -> str:
    """Return a sentence about the ignored files for the user."""
    files = "1 file" if len(ignored) == 1 else f"{len(ignored):,} files"
    return f"Ignored {files}, hidden or without an image extension, such as {ignored[0]}"


def add_ignored(message: str, ignored: list[Path]) -> str:
    """Return a message about missing images, with a sentence about the ignored files if there are any."""
    return f"{message}. {describe_ignored(ignored)}" if ignored else message
