"""The models that the demo shows: loading, prediction and latency."""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import torch
from PIL import Image

from evmamba_hub.errors import UserError
from evmamba_hub.images.images import read_image
from evmamba_hub.inference.classify import Classifier, load_classifier
from evmamba_hub.info import measure_latency
from evmamba_kernels import choose_backend
from modeling_evmamba import EfficientVMambaForImageClassification


TOP_K = 5

MAX_PIXELS = 64_000_000  # of an uploaded image: what cameras take; decoded, 256 MB at most

# Image processors scale the short side and crop the center. They would scale a longer image than this many squares to
# a huge one first.
MAX_SQUARES = 4

# Models that visitors named and that stay loaded.
MAX_TYPED_MODELS = 2

LATENCY_SIDES = (64, 128, 192, 256, 320, 384, 448)
DENSE_LATENCY_SIDES = (256, 320, 384, 448, 512, 576, 640)  # which have as many places as detectors have queries
LATENCY_ROUNDS = 3


class Prediction(NamedTuple):
    scores: dict[str, float]  # by label, the most likely first
    pixel_values: torch.Tensor  # (1, C, H, W), what the network saw
    milliseconds: float  # of the forward pass
    computed: str  # how: device, dtype, whether optimized, the backend of the scan


def name_models(models: list[str]) -> dict[str, str]:
    """Return models by the names that visitors see. A directory that is given twice is one model.

    The name is the Hub id, or the last part of a directory's path: visitors need not know the layout of the disk. If
    several models have this name, it is as many last parts as tell them apart.
    """
    places: dict[str | Path, str] = {}
    for model in models:
        places.setdefault(Path(model).resolve() if Path(model).is_dir() else model, model)
    names = {}
    for place, model in places.items():
        num_parts = 1
        while [shorten_place(other, num_parts) for other in places].count(shorten_place(place, num_parts)) > 1:
            num_parts += 1
        names[shorten_place(place, num_parts)] = model
    return names


def shorten_place(place: str | Path, num_parts: int) -> str:
    """Return the last parts of a directory's path. Hub ids stay whole."""
    return place if isinstance(place, str) else Path(*place.parts[-num_parts:]).as_posix()


class Models:
    """Classifiers by name, loaded on first use.

    The shown model also has its network as it was loaded, since explanations need gradients.

    Args:
        models: Directories and Hub ids. The demo shows the first.
        allow_any: Whether visitors may name other directories and Hub ids.
        optimize: Whether classifications and latencies come from optimized copies on CPUs.
        device: Device, as in `load_classifier`.
    """

    def __init__(self, models: list[str], allow_any: bool, optimize: bool = True, device: str = "auto"):
        self.places = name_models(models)
        self.names = list(self.places)
        self.allow_any = allow_any
        self.lock = Lock()
        self.load_place = lru_cache(len(self.names) + MAX_TYPED_MODELS)(
            lambda place: load_classifier(place, device, "float32", optimize=optimize)
        )
        shown = load_classifier(models[0], device, "float32", optimize=False)
        self.network = shown.model
        if not isinstance(self.network, EfficientVMambaForImageClassification):
            raise UserError(f"the demonstration explains EfficientVMamba, {models[0]!r} is another kind of network")
        self.shown = shown.optimize() if optimize else shown

    def load(self, name: str) -> Classifier:
        """Return the classifier of a name.

        Raises:
            UserError: If the name is not allowed or the model cannot be loaded.
        """
        if name not in self.places and not self.allow_any:
            raise UserError(f"{name!r} is not among the models of this demonstration: {', '.join(self.names)}")
        place = self.places.get(name, name)
        if place == self.places[self.names[0]]:
            return self.shown
        with self.lock:  # concurrent requests share one download and one copy
            return self.load_place(place)


def ignore_notice(notice: str) -> None:
    """Takes a notice about a picture of which the visitor was told before."""


def read_picture(path: str, announce: Callable[[str], None] = ignore_notice) -> Image.Image:
    """Reads an uploaded file as an image for `predict`.

    Args:
        path: the file.
        announce: takes a sentence about a picture that is probably read too dark.

    Raises:
        UserError: If the file is not an image or too large.
    """
    try:
        image = read_image(Path(path), MAX_PIXELS, announce)
    except UserError as error:
        raise UserError(f"This file cannot be shown to the network: {error}.") from error
    longest = MAX_SQUARES * min(image.size)
    left, top = max(0, image.width - longest) // 2, max(0, image.height - longest) // 2
    return image.crop((left, top, image.width - left, image.height - top))


def predict(classifier: Classifier, image: Image.Image) -> Prediction:
    """Return the most likely labels of an image and the time of the forward pass, without reading and scaling."""
    inputs = classifier.preprocess(image)
    start = time.perf_counter()
    outputs = classifier.forward(inputs)  # the copy to the CPU waits for the device
    milliseconds = 1000 * (time.perf_counter() - start)
    predictions = classifier.postprocess(outputs, top_k=TOP_K)
    return Prediction(
        {prediction["label"]: prediction["score"] for prediction in predictions},
        inputs["pixel_values"],
        milliseconds,
        f"{classifier.execution} ({describe_backend(classifier)})",
    )


def describe_backend(classifier: Classifier) -> str:
    """Names the backend of a model's scan. Other networks have no scan."""
    if not isinstance(classifier.model, EfficientVMambaForImageClassification):
        return "no scan"
    return f"backend: {choose_backend(classifier.device.type, classifier.model.dtype).backend}"


def measure_sides(
    forward: Callable[[torch.Tensor], object], num_channels: int, sides: Sequence[int]
) -> Iterator[tuple[int, float]]:
    """Yield sides of square images in pixels with the latency in milliseconds, the best of a few runs."""
    for side in sides:
        call = partial(forward, torch.zeros(1, num_channels, side, side))
        yield side, 1000 * min(measure_latency(call, LATENCY_ROUNDS))
