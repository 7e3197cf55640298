"""Segmentation and detection: the classes of transformers for these tasks, and what runs their models."""

from collections.abc import Iterable
from dataclasses import dataclass

import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_SEGMENTATION_MAPPING_NAMES,
    MODEL_FOR_INSTANCE_SEGMENTATION_MAPPING_NAMES,
    MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES,
    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES,
    MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES,
)

from evmamba_hub.errors import UserError
from modeling_evmamba import EfficientVMambaConfig


@dataclass(frozen=True)
class DenseTask:
    """A task with more results for an image than one label."""

    pipeline: str  # of transformers, which also names the task on the Hub
    noun: str  # for messages: what a model of the task is
    program: str  # of the repository, which trains and evaluates models of the task
    image_size: int  # side in pixels for which cards count GMACs
    architectures: frozenset[str]  # classes of transformers that the pipeline takes


SEGMENTATION = DenseTask(
    "image-segmentation",
    "a segmentation model",
    "examples/semantic_segmentation.py",
    512,
    frozenset(
        {
            *MODEL_FOR_IMAGE_SEGMENTATION_MAPPING_NAMES.values(),
            *MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES.values(),
            *MODEL_FOR_INSTANCE_SEGMENTATION_MAPPING_NAMES.values(),
            *MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES.values(),
        }
    ),
)
DETECTION = DenseTask(
    "object-detection",
    "a detector",
    "examples/object_detection.py",
    640,
    frozenset(MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES.values()),
)


def find_dense_task(names: Iterable[str]) -> DenseTask | None:
    """Return the dense task of the architectures in a configuration, or None."""
    return next((task for task in (SEGMENTATION, DETECTION) if not task.architectures.isdisjoint(names)), None)


def describe_other_network(config: PreTrainedConfig, model: str) -> str:
    """Return the message for a network of another type. `model` is what messages call it."""
    return (
        f"the model {model!r} is of the type {config.model_type!r}, not {EfficientVMambaConfig.model_type!r}: "
        "give an EfficientVMamba"
    )


def find_head_class(config: PreTrainedConfig, model: str) -> type[PreTrainedModel]:
    """Return the class of a segmentation model or detector around an EfficientVMamba backbone.

    Args:
        config: Its configuration.
        model: What messages call it.

    Raises:
        UserError: If it is another model, or has another backbone.
    """
    names = config.architectures or []
    task = find_dense_task(names)
    if task is None:
        raise UserError(describe_other_network(config, model))
    backbone_config = getattr(config, "backbone_config", None)
    if not isinstance(backbone_config, EfficientVMambaConfig):
        raise UserError(f"{model} is {task.noun} ({names[0]}) with another backbone: give one with an EfficientVMamba")
    return getattr(transformers, names[0])
