"""Bundled files: a model of handwritten digits, example images, photographs, and the Space's files.

The repository holds them beside this package, in `demo/`. setup.cfg installs them inside the package.
"""

from collections.abc import Iterable
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


def choose_examples(labels: Iterable[str]) -> list[Path]:
    """Return example images for a model with these labels: digits, and photographs unless it knows digits alone."""
    return find_examples() if set(labels) <= set("0123456789") else find_photographs() + find_examples()


def find_credits(examples: list[Path]) -> Path | None:
    """Return the text that names the authors of the photographs among examples, or None if there are none."""
    photographs = find_photographs()
    return photographs[0].with_name("README.md") if set(photographs) & set(examples) else None


def find_page_files() -> dict[str, Path]:
    """Return the files of the page that classifies in the browser, and its card, by path in the Space."""
    return {path.name: path for path in sorted(find_data("web", "web").iterdir()) if path.is_file()}


def find_space_files() -> dict[str, Path]:
    """Return the files of the Space, by path in the Space."""
    space = find_data("space", ".")
    files = {name: space / name for name in ("app.py", "README.md", "requirements.txt")}
    files |= {f"evmamba_demo/{path.name}": path for path in sorted(PACKAGE.glob("*.py"))}
    files |= {f"digits/{path.name}": path for path in sorted(find_bundled_model().iterdir())}
    files |= {f"examples/{path.name}": path for path in find_examples()}
    return files | {f"photographs/{path.name}": path for path in find_data("photographs", "photographs").iterdir()}
