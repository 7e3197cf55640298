"""Write files and directories atomically: they appear whole, or not at all."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from evmamba_hub.errors import UserError


def partial_name(path: Path) -> str:
    """Return the name of a file or directory while it is being written."""
    return f".{path.name}.partial"


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file atomically: at any moment, the path holds the old content or the new one.

    Missing parent directories are created.

    Raises:
        UserError: If the file cannot be written.
    """
    partial = path.with_name(partial_name(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}") from error
    finally:
        with suppress(OSError):  # it is gone unless the write failed
            partial.unlink()


def check_is_free(directory: Path) -> None:
    """Check that a directory is new or empty.

    Raises:
        UserError: If the path exists and is not an empty directory.
    """
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise UserError(f"{directory} exists already: remove it or choose another directory")


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Yield a path for a new file or directory, which replaces `target` when the block ends.

    If the block fails, `target` stays as it was, and nothing else is left. Missing parent directories are created.

    No directory can replace another in one step. The old one waits as `.NAME.partial/replaced` until the new one is in
    its place. If the process is killed between these two steps, the next call puts the old one back.

    Raises:
        UserError: If the file or directory cannot be written.
    """
    staging = target.with_name(partial_name(target))
    written, replaced = staging / target.name, staging / "replaced"

    def clean_up() -> None:
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        shutil.rmtree(staging, ignore_errors=True)

    try:
        clean_up()  # after a process that was killed
        staging.mkdir(parents=True)
        yield written
        if written.is_dir() and target.is_dir():
            target.rename(replaced)
        written.replace(target)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{target} cannot be written: {error}") from error
    finally:
        with suppress(OSError):  # if the old one cannot be restored now, the next call restores it
            clean_up()


def read_content(source: Path | bytes) -> bytes:
    """Return the content of a file that is on the disk or in memory."""
    return source if isinstance(source, bytes) else source.read_bytes()


def write_files(files: Mapping[str, Path | bytes], directory: Path) -> None:
    """Write files, or copies of them, into a new directory, by path in it. It appears whole, or not at all.

    Raises:
        UserError: If the directory exists and is not empty, or cannot be written.
    """
    check_is_free(directory)
    with staged(directory.absolute()) as staging:
        for name, source in files.items():
            target = staging / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(read_content(source))
