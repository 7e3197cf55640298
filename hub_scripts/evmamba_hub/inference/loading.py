"""Load classifiers for inference. On CPUs, they become optimized copies by themselves."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForImageClassification

from evmamba_hub.errors import Notice, UserError
from evmamba_hub.info import check_backend
from modeling_evmamba import optimize_for_inference


@dataclass(frozen=True)
class Execution:
    """How a network computes. Commands show it, and results state it."""

    device: str
    dtype: str
    optimized: bool

    def __str__(self) -> str:
        return f"on {self.device} in {self.dtype}, {'optimized' if self.optimized else 'as it is'}"

    def as_json(self) -> dict[str, str | bool]:
        return asdict(self)


@contextmanager
def translate_loading_errors(model: str, noun: str = "an image classifier") -> Iterator[None]:
    """Translate what transformers raises for the files of a model into a `UserError`.

    Args:
        model: What messages call the model.
        noun: What it should be.
    """
    try:
        yield
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"the model {model!r} cannot be loaded as {noun}: {error}") from error


def check_execution(device: torch.device, dtype: str, optimize: bool) -> None:
    """Check that networks can compute in a dtype. Call it before a download.

    Args:
        device: The device of the network.
        dtype: "float32", "bfloat16", "float16" or "int8".
        optimize: Whether the network may be optimized.

    Raises:
        UserError: If int8 has no CPU or no optimized copy, or the backend of the environment variable cannot compute.
    """
    if dtype == "int8" and device.type != "cpu":
        raise UserError(f"int8 computes on CPUs only, not on {device}: choose another --dtype, or add --device cpu")
    if dtype == "int8" and not optimize:
        raise UserError("int8 needs an optimized copy: choose another --dtype, or leave --no-optimize out")
    check_backend(device, torch.float32 if dtype == "int8" else getattr(torch, dtype))


def load_network(
    folder: Path, model: str, device: torch.device, dtype: str, optimize: bool
) -> tuple[Any, Execution]:  # a PreTrainedModel of any architecture
    """Load the network of a classifier for inference. On CPUs, it is optimized if it can be.

    Args:
        folder: The directory of the classifier.
        model: What messages call it.
        device: The device to compute on.
        dtype: The dtype to compute in, which `check_execution` has checked.
        optimize: Whether to optimize the network on CPUs.

    Raises:
        UserError: If the files cannot be loaded, or the network cannot compute in int8.
    """

    def load(dtype: str) -> Any:
        with translate_loading_errors(model):
            return AutoModelForImageClassification.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    if optimize and device.type == "cpu":
        network = load("float32")  # the copy rounds after it has folded batch norms
        copy = optimize_if_possible(network, dtype)
        if copy is not None:
            return copy, Execution(str(device), dtype, optimized=True)
        if dtype == "float32":
            return network, Execution(str(device), dtype, optimized=False)
    return load(dtype).to(device), Execution(str(device), dtype, optimized=False)


def optimize_if_possible(network: Any, dtype: str) -> Any:
    """Return an optimized copy of a network on a CPU. If there is none, returns None, and a `Notice` says why.

    Args:
        network: The network in float32, which stays as it is.
        dtype: The dtype of the copy.

    Raises:
        UserError: If there is no copy in int8, in which no other network computes.
    """
    try:
        return optimize_for_inference(network, getattr(torch, dtype))
    except (ImportError, TypeError, ValueError) as error:
        if dtype == "int8":
            raise UserError(f"the model cannot compute in int8: {error}") from error
        warnings.warn(f"the model runs as it is: {error}", Notice, stacklevel=2)
        return None
