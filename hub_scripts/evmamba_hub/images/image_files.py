"""Find image files in directories."""

from pathlib import Path

from PIL import Image

from evmamba_hub.errors import UserError


def find_images(paths: list[Path]) -> list[Path]:
    """Returns the files among the paths, and the images in its directories by their suffixes, in order.

    Raises:
        UserError: If a path does not exist, or a directory holds no image.
    """
    endings = Image.registered_extensions()
    found = []
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in endings and file.is_file())
            if not inside:
                raise UserError(
                    f"the directory {path} holds no image: give one with files of a format that Pillow reads"
                )
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise UserError(f"{path} does not exist: give image files, or directories of images")
    return found
