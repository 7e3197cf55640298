"""Files and directories that appear whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from evmamba_hub.errors import UserError


def partial_name(path: Path) -> str:
    """Returns the name of a file or directory while it is being written."""
    return f".{path.name}.partial"


def write_atomic(path: Path, content: bytes) -> None:
    """Replaces a file: at any moment it is the old one or the new one. Creates missing parent directories.

    Raises:
        UserError: if the file cannot be written.
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
    """Checks that a directory can be written without loss.

    Raises:
        UserError: if the path exists and is not an empty directory.
    """
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise UserError(f"{directory} exists already: remove it or choose another directory")


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Yields a path at which to write a file or a directory that replaces `target` when the block ends.

    If the block fails, `target` stays as it was and nothing else is left. Creates missing parent directories.

    No directory can replace another in one step. The old one waits as `.NAME.partial/replaced` until the new one is in
    its place. If the process is killed between these two steps, the next call puts the old one back.

    Raises:
        UserError: if the file or directory cannot be written.
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
        with suppress(OSError):  # where the old one cannot be put back now, the next call does it
            clean_up()
