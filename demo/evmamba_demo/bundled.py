"""What comes with the package: a model of handwritten digits, example images, photographs, and the Space's files.

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


def find_photographs() -> list[Path]:
    """Photographs for models of other classes. `demo/photographs/README.md` names authors and licenses."""
    return sorted(find_data("photographs", "photographs").glob("*.jpg"))


def find_space_files() -> dict[str, Path]:
    """The Space of this demonstration: the paths of its files, by path in the Space."""
    space = find_data("space", ".")
    files = {name: space / name for name in ("app.py", "README.md", "requirements.txt")}
    files |= {f"evmamba_demo/{path.name}": path for path in sorted(PACKAGE.glob("*.py"))}
    files |= {f"digits/{path.name}": path for path in sorted(find_bundled_model().iterdir())}
    files |= {f"examples/{path.name}": path for path in find_examples()}
    return files | {f"photographs/{path.name}": path for path in find_data("photographs", "photographs").iterdir()}
