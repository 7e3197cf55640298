"""`evmamba classify`: classify image files."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import ImageClassificationPipeline, pipeline

import modeling_evmamba  # noqa: F401, registers the model with the Auto classes
from evmamba_hub.client import fetch_model
from evmamba_hub.errors import UserError
from evmamba_hub.images.images import read_image
from evmamba_hub.info import check_backend


@dataclass
class ClassifiedFile:
    """The predictions for an image file, most likely first, or the error of a file that cannot be read."""

    path: Path
    predictions: list[dict]  # {"label": str, "score": float}
    error: str | None = None

    def as_json(self) -> dict:
        found = {"predictions": self.predictions} if self.error is None else {"error": self.error}
        return {"image": str(self.path), **found}


def load_classifier(model: str, device: str, dtype: str, revision: str | None = None) -> ImageClassificationPipeline:
    """Load an image-classification pipeline.

    Args:
        model: Directory or Hub id.
        device: A device of PyTorch ("cpu", "cuda:1", "mps"), or "auto" for the first accelerator, else the CPU.
        dtype: "float32", "bfloat16" or "float16".
        revision: Branch, tag or commit on the Hub.

    Raises:
        UserError: If the model cannot be found or is no image classifier, or the device or backend cannot be used.
    """
    if device == "auto":
        device = str(torch.accelerator.current_accelerator() or "cpu") if torch.accelerator.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        message = str(error).strip().splitlines()[0]
        raise UserError(f"the device {device!r} cannot be used, choose another device: {message}") from error
    check_backend(torch.device(device), getattr(torch, dtype))
    folder = str(fetch_model(model, revision))
    try:
        return pipeline("image-classification", model=folder, device=device, dtype=getattr(torch, dtype))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"the model {model!r} cannot be loaded as an image classifier: {error}") from error


def classify_files(
    classifier: ImageClassificationPipeline, paths: Iterable[Path], top_k: int
) -> Iterator[ClassifiedFile]:
    """Classify one file after the other. A file that cannot be read yields its error, and the next file follows."""
    for path in paths:
        try:
            image = read_image(path)
        except UserError as error:
            yield ClassifiedFile(path, [], str(error))
        else:
            yield ClassifiedFile(path, classifier(image, top_k=top_k))
