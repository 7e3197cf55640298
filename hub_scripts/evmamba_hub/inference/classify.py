"""`evmamba classify`: classify image files."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import ImageClassificationPipeline, PreTrainedModel
from transformers.image_utils import load_image

# the name in `transformers` itself is a placeholder that raises if torchvision is missing (5.17)
from transformers.models.auto.image_processing_auto import AutoImageProcessor

import modeling_evmamba  # noqa: F401, registers the model with the Auto classes
from evmamba_hub.client import fetch_model
from evmamba_hub.errors import UserError
from evmamba_hub.images.images import read_image
from evmamba_hub.inference.channels import find_color_mode, fit_image_processor
from evmamba_hub.inference.loading import (
    Execution,
    check_execution,
    load_network,
    optimize_if_possible,
    translate_loading_errors,
)
from evmamba_hub.info import choose_device
from evmamba_hub.model_folder import check_is_classifier


@dataclass
class ClassifiedFile:
    """The predictions for an image file, most likely first, or the error of a file that cannot be read."""

    path: Path
    predictions: list[dict]  # {"label": str, "score": float}
    error: str | None = None

    def as_json(self, execution: Execution) -> dict:
        """Return the predictions and how the network computed them, or the error."""
        if self.error is not None:
            return {"image": str(self.path), "error": self.error}
        return {"image": str(self.path), "predictions": self.predictions, **execution.as_json()}


class Classifier(ImageClassificationPipeline):
    """A pipeline that knows how its network computes."""

    def __init__(self, model: PreTrainedModel, image_processor: Any, execution: Execution):
        device = torch.device(execution.device)
        super().__init__(model=model, image_processor=image_processor, task="image-classification", device=device)
        self.execution = execution

    def optimize(self) -> "Classifier":
        """Return a classifier with an optimized copy of the network, or itself if there is none."""
        copy = None if self.device.type != "cpu" else optimize_if_possible(self.model, self.execution.dtype)
        if copy is None:
            return self
        return type(self)(copy, self.image_processor, replace(self.execution, optimized=True))


class GrayClassifier(Classifier):
    """A classifier for a network of one channel. The pipeline of transformers converts all images to RGB."""

    def preprocess(self, image: Any, timeout: float | None = None) -> Any:  # type: ignore[override]  # as in its base
        assert self.image_processor is not None  # the pipeline requires one
        gray = load_image(image, timeout=timeout).convert("L")
        return self.image_processor(gray, return_tensors="pt").to(self.dtype)


def load_classifier(
    model: str, device: str, dtype: str, revision: str | None = None, optimize: bool = True
) -> Classifier:
    """Load an image-classification pipeline that takes images in RGB. A network of one channel sees them in gray.

    On CPUs, the network becomes an optimized copy. If there is none, it stays as it is, and a `Notice` says why.

    Args:
        model: Directory or Hub id.
        device: A device of PyTorch ("cpu", "cuda:1", "mps"), or "auto" for the first accelerator, else the CPU.
        dtype: "float32", "bfloat16", "float16" or, in optimized copies only, "int8".
        revision: Branch, tag or commit on the Hub.
        optimize: Whether to optimize on CPUs. Optimized copies compute no gradients.

    Raises:
        UserError: As `load_pipeline`, and if the network takes another number of channels.
    """
    classifier = load_pipeline(model, device, dtype, revision, optimize)
    mode = find_color_mode(classifier.model.config)
    if mode == "L":
        classifier = GrayClassifier(classifier.model, classifier.image_processor, classifier.execution)
    fit_image_processor(classifier.image_processor, mode)
    return classifier


def load_pipeline(
    model: str, device: str, dtype: str, revision: str | None = None, optimize: bool = True
) -> Classifier:
    """Load an image-classification pipeline as `load_classifier`, whatever number of channels its network takes.

    Raises:
        UserError: If the model cannot be found or is no image classifier, or device, backend or dtype cannot be used.
    """
    place = choose_device(device)
    check_execution(place, dtype, optimize)
    folder = fetch_model(model, revision)
    check_is_classifier(folder, model)
    network, execution = load_network(folder, model, place, dtype, optimize)
    with translate_loading_errors(model):
        image_processor = AutoImageProcessor.from_pretrained(folder)
    return Classifier(network, image_processor, execution)


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
    """Return the predictions for each image, which the network computes as one batch."""
    if not images:
        return []
    try:
        return classifier(images, top_k=top_k, batch_size=len(images))
    except RuntimeError as error:
        if "Sizes of tensors must match" not in str(error):
            raise
        raise UserError("the model's image processor keeps images of different sizes: use --batch-size 1") from error
