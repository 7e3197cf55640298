"""Files that are whole at any moment."""

import os
from contextlib import suppress
from pathlib import Path

from hub_scripts.errors import UserError


def partial_name(path: Path) -> str:
    """The name of a file or folder while it is being written."""
    return f".{path.name}.partial"


def write_whole(path: Path, content: bytes) -> None:
    """Replaces a file, so that it is the old or the new one at any moment. Its folder is made where there is none.

    Raises:
        UserError: where the disk is full or cannot be written.
    """
    partial = path.with_name(partial_name(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}") from error
    finally:
        with suppress(OSError):  # it is gone where all went well
            partial.unlink()
