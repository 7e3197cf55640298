"""`evmamba classify`: images in, labels with scores out."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import ImageClassificationPipeline, pipeline

import modeling_evmamba  # noqa: F401, registers the model with the pipeline
from evmamba_hub.client import fetch_model
from evmamba_hub.errors import UserError
from evmamba_hub.images.images import read_image


@dataclass
class ClassifiedFile:
    """The predictions for one image file, the most likely first, or what is wrong with the file."""

    path: Path
    predictions: list[dict]  # {"label": str, "score": float}
    error: str | None = None

    def as_json(self) -> dict:
        found = {"predictions": self.predictions} if self.error is None else {"error": self.error}
        return {"image": str(self.path), **found}


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
        device = str(torch.accelerator.current_accelerator() or "cpu") if torch.accelerator.is_available() else "cpu"
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


def classify_files(
    classifier: ImageClassificationPipeline, paths: Iterable[Path], top_k: int
) -> Iterator[ClassifiedFile]:
    """Classifies one file after the other. A file that cannot be read yields its error and the rest goes on."""
    for path in paths:
        try:
            image = read_image(path)
        except UserError as error:
            yield ClassifiedFile(path, [], str(error))
        else:
            yield ClassifiedFile(path, classifier(image, top_k=top_k))
