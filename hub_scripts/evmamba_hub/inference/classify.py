"""`evmamba classify`: classify image files."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import ImageClassificationPipeline, pipeline
from transformers.image_utils import load_image

import modeling_evmamba  # noqa: F401, registers the model with the Auto classes
from evmamba_hub.client import fetch_model
from evmamba_hub.errors import UserError
from evmamba_hub.images.images import read_image
from evmamba_hub.inference.channels import find_color_mode, fit_image_processor
from evmamba_hub.info import check_backend, choose_device
from evmamba_hub.model_folder import check_is_classifier


@dataclass
class ClassifiedFile:
    """The predictions for an image file, most likely first, or the error of a file that cannot be read."""

    path: Path
    predictions: list[dict]  # {"label": str, "score": float}
    error: str | None = None

    def as_json(self) -> dict:
        found = {"predictions": self.predictions} if self.error is None else {"error": self.error}
        return {"image": str(self.path), **found}


class GrayImageClassificationPipeline(ImageClassificationPipeline):
    """A pipeline for a network of one channel. That of transformers converts all images to RGB."""

    def preprocess(self, image: Any, timeout: float | None = None) -> Any:  # type: ignore[override]  # as in its base
        assert self.image_processor is not None  # the pipeline requires one
        gray = load_image(image, timeout=timeout).convert("L")
        return self.image_processor(gray, return_tensors="pt").to(self.dtype)


def load_classifier(model: str, device: str, dtype: str, revision: str | None = None) -> ImageClassificationPipeline:
    """Load an image-classification pipeline that takes images in RGB. A network of one channel sees them in gray.

    `load_pipeline` describes the arguments.

    Raises:
        UserError: As `load_pipeline`, and if the network takes another number of channels.
    """
    classifier = load_pipeline(model, device, dtype, revision)
    mode = find_color_mode(classifier.model.config)
    if mode == "L":
        classifier = GrayImageClassificationPipeline(
            classifier.model, image_processor=classifier.image_processor, device=classifier.device
        )
    fit_image_processor(classifier.image_processor, mode)
    return classifier


def load_pipeline(model: str, device: str, dtype: str, revision: str | None = None) -> ImageClassificationPipeline:
    """Load an image-classification pipeline of transformers, whatever number of channels its network takes.

    Args:
        model: Directory or Hub id.
        device: A device of PyTorch ("cpu", "cuda:1", "mps"), or "auto" for the first accelerator, else the CPU.
        dtype: "float32", "bfloat16" or "float16".
        revision: Branch, tag or commit on the Hub.

    Raises:
        UserError: If the model cannot be found or is not an image classifier, or the device or backend cannot be used.
    """
    place = choose_device(device)
    check_backend(place, getattr(torch, dtype))
    folder = fetch_model(model, revision)
    check_is_classifier(folder, model)
    try:
        return pipeline("image-classification", model=str(folder), device=place, dtype=getattr(torch, dtype))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"the model {model!r} cannot be loaded as an image classifier: {error}") from error


def classify_files(
    classifier: ImageClassificationPipeline, paths: Iterable[Path], top_k: int, batch_size: int = 1
) -> Iterator[ClassifiedFile]:
    """Classify files batch by batch. A file that cannot be read yields its error, and the other files follow.

    Raises:
        UserError: If the model's image processor gives the images of a batch different sizes.
    """
    remaining = iter(paths)
    while batch := [ClassifiedFile(path, []) for path in islice(remaining, batch_size)]:
        images = []
        for file in batch:
            try:
                images.append(read_image(file.path))
            except UserError as error:
                file.error = str(error)
        readable = [file for file in batch if file.error is None]
        for file, predictions in zip(readable, classify_batch(classifier, images, top_k), strict=True):
            file.predictions = predictions
        yield from batch


def classify_batch(classifier: ImageClassificationPipeline, images: list[Image.Image], top_k: int) -> list[list[dict]]:
    """Returns the predictions for each image, which the network computes as one batch."""
    if not images:
        return []
    try:
        return classifier(images, top_k=top_k, batch_size=len(images))
    except RuntimeError as error:
        if "Sizes of tensors must match" not in str(error):
            raise
        raise UserError("the model's image processor keeps images of different sizes: use --batch-size 1") from error
