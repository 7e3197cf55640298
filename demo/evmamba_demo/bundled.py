"""What comes with the package: a model of handwritten digits, example images, and the files of the Space.

In the repository they lie beside this package, in `demo/`. setup.cfg installs them inside of it.
"""

from pathlib import Path


PACKAGE = Path(__file__).parent


def find_data(installed: str, in_repository: str) -> Path:
    """The first of two folders that exists: inside the installed package, or in the repository."""
    folder = PACKAGE / installed
    return folder if folder.is_dir() else PACKAGE.parent / in_repository


def find_bundled_model() -> Path:
    """The folder of the model of handwritten digits, as `save_pretrained` wrote it."""
    return find_data("digits", "digits")


def find_examples() -> list[Path]:
    """Images of handwritten digits that the bundled model has not seen in training."""
    return sorted(find_data("examples", "examples").glob("*.png"))


def find_space_files() -> dict[str, Path]:
    """The Space of this demonstration: the paths of its files, by path in the Space."""
    space = find_data("space", ".")
    files = {name: space / name for name in ("app.py", "README.md", "requirements.txt")}
    files |= {f"evmamba_demo/{path.name}": path for path in sorted(PACKAGE.glob("*.py"))}
    files |= {f"digits/{path.name}": path for path in sorted(find_bundled_model().iterdir())}
    return files | {f"examples/{path.name}": path for path in find_examples()}
