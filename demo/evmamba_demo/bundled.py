"""Bundled files: a model of handwritten digits, example images, photographs, and the Space's files.

The repository holds them beside this package, in `demo/`. setup.cfg installs them inside the package.
"""

from pathlib import Path


PACKAGE = Path(__file__).parent


def find_data(installed: str, in_repository: str) -> Path:
    """Return the directory inside the installed package if it exists, else the one in the repository."""
    folder = PACKAGE / installed
    return folder if folder.is_dir() else PACKAGE.parent / in_repository


def find_bundled_model() -> Path:
    """Return the directory of the model of handwritten digits, as `save_pretrained` wrote it."""
    return find_data("digits", "digits")


def find_examples() -> list[Path]:
    """Return images of held-out handwritten digits."""
    return sorted(find_data("examples", "examples").glob("*.png"))


def find_photographs() -> list[Path]:
    """Return photographs for models of other classes. `demo/photographs/README.md` names authors and licenses."""
    return sorted(find_data("photographs", "photographs").glob("*.jpg"))


def find_space_files() -> dict[str, Path]:
    """Return the files of the Space, by path in the Space."""
    space = find_data("space", ".")
    files = {name: space / name for name in ("app.py", "README.md", "requirements.txt")}
    files |= {f"evmamba_demo/{path.name}": path for path in sorted(PACKAGE.glob("*.py"))}
    files |= {f"digits/{path.name}": path for path in sorted(find_bundled_model().iterdir())}
    files |= {f"examples/{path.name}": path for path in find_examples()}
    return files | {f"photographs/{path.name}": path for path in find_data("photographs", "photographs").iterdir()}
