"""`evmamba classify`: images in, labels with scores out."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from rich import box
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from transformers import ImageClassificationPipeline, pipeline

import modeling_evmamba  # noqa: F401, tells the pipeline of the model
from hub_scripts.errors import UserError
from hub_scripts.hub import fetch_model
from hub_scripts.images import find_images, read_image


__all__ = ["Classification", "classify", "find_bundled_model", "find_images", "load_classifier"]


def find_bundled_model() -> Path:
    """`demo/digits` of the repository, which setup.cfg installs as the data package `evmamba_digits`."""
    folders = find_spec("evmamba_digits").submodule_search_locations
    return next(Path(folder) for folder in folders if Path(folder, "config.json").is_file())


def find_examples() -> list[Path]:
    """The images in `demo/examples`, which setup.cfg installs as the data package `evmamba_examples`."""
    folders = find_spec("evmamba_examples").submodule_search_locations
    return sorted(path for folder in folders for path in Path(folder).glob("*.png"))


@dataclass
class Classification:
    """Predictions for one image, the most likely first, or what is wrong with the image."""

    path: Path
    predictions: list[dict]  # {"label": str, "score": float}
    error: str | None = None

    def as_json(self) -> dict:
        found = {"predictions": self.predictions} if self.error is None else {"error": self.error}
        return {"image": str(self.path), **found}

    def as_table(self) -> Table:
        table = Table(title=escape(str(self.path)), title_justify="left", show_header=False, box=box.SIMPLE_HEAD)
        if self.error is not None:
            table.add_row(f"[bold red]{escape(self.error)}[/]")
        for prediction in self.predictions:
            bar = ProgressBar(total=1.0, completed=prediction["score"], width=20)
            table.add_row(escape(prediction["label"]), f"{prediction['score']:.1%}", bar)
        return table


def load_classifier(model: str, device: str, dtype: str, revision: str | None = None) -> ImageClassificationPipeline:
    """An image-classification pipeline from a local folder or a Hub id.

    Args:
        model: folder or Hub id.
        device: as PyTorch writes it ("cpu", "cuda:1", "mps"), or "auto" for the first accelerator there is.
        dtype: "float32", "bfloat16" or "float16".
        revision: branch, tag or commit on the Hub.

    Raises:
        UserError: for a model that cannot be found or is no image classifier, and for a device that is not there.
    """
    if device == "auto":
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        message = str(error).strip().splitlines()[0]
        raise UserError(f"the device {device!r} cannot be used: {message}") from error
    folder = str(fetch_model(model, revision))
    try:
        return pipeline("image-classification", model=folder, device=device, dtype=getattr(torch, dtype))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"the model {model!r} cannot be loaded as an image classifier: {error}") from error


def classify(classifier: ImageClassificationPipeline, paths: Iterable[Path], top_k: int) -> Iterator[Classification]:
    """Classifies one file after the other. A file that cannot be read yields its error and the rest goes on."""
    for path in paths:
        try:
            image = read_image(path)
        except UserError as error:
            yield Classification(path, [], str(error))
        else:
            yield Classification(path, classifier(image, top_k=top_k))
