"""Load segmentation models and detectors around the backbone, and run them on images."""

import inspect
import time
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers import ImageSegmentationPipeline, ObjectDetectionPipeline, Pipeline, PreTrainedModel

# the name in `transformers` itself is a placeholder that raises if torchvision is missing (5.17)
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from evmamba_hub.client import fetch_model
from evmamba_hub.dense_tasks import DETECTION, SEGMENTATION, DenseTask, find_dense_task, find_head_class
from evmamba_hub.errors import UserError
from evmamba_hub.inference.channels import find_color_mode
from evmamba_hub.inference.loading import (
    Execution,
    check_execution,
    optimize_if_possible,
    translate_loading_errors,
)
from evmamba_hub.info import choose_device
from evmamba_hub.model_folder import find_image_processor, load_any_config, load_head, read_fields


PIPELINES: dict[DenseTask, type[Pipeline]] = {
    SEGMENTATION: ImageSegmentationPipeline,
    DETECTION: ObjectDetectionPipeline,
}

# Methods of image processors, one of which the pipeline calls with the outputs of the network.
POSTPROCESSING = {
    SEGMENTATION: [f"post_process_{kind}_segmentation" for kind in ("panoptic", "instance", "semantic")],
    DETECTION: ["post_process_object_detection"],
}


@dataclass
class DenseModel:
    """A segmentation model or detector in a pipeline of transformers, and how its network computes."""

    task: DenseTask
    pipeline: Pipeline
    execution: Execution

    @property
    def network(self) -> PreTrainedModel:
        return self.pipeline.model

    @torch.inference_mode()
    def forward(self, pixel_values: torch.Tensor) -> Any:  # (B, 3, H, W)
        """Return the outputs of the network."""
        return self.network(pixel_values.to(self.pipeline.device))

    def run(self, image: Image.Image, **settings: Any) -> tuple[list[dict], float]:
        """Return what the pipeline finds in an RGB image, and the seconds of the forward pass.

        Args:
            image: The image.
            settings: Settings of the pipeline's postprocessing, such as the threshold of a detector.
        """
        inputs = self.pipeline.preprocess(image)
        start = time.perf_counter()
        outputs = self.pipeline.forward(inputs)  # the copy to the CPU waits for the device
        seconds = time.perf_counter() - start
        return self.pipeline.postprocess(outputs, **settings), seconds


def load_dense_model(model: str, device: str = "auto", optimize: bool = True) -> DenseModel:
    """Load a segmentation model or detector for inference in float32. On CPUs, its backbone is optimized if it can be.

    Args:
        model: Directory or Hub id.
        device: A device of PyTorch ("cpu", "cuda:1", "mps"), or "auto" for the first accelerator, else the CPU.
        optimize: Whether to optimize on CPUs.

    Raises:
        UserError: If the model cannot be found or loaded, is another network, or no pipeline can run it.
    """
    place = choose_device(device)
    check_execution(place, "float32", optimize)
    folder = fetch_model(model)
    names = read_fields(folder).get("architectures") or []
    task = find_dense_task(names)
    if task is None:
        raise UserError(f"{model} is neither a segmentation model nor a detector but {', '.join(names) or 'unknown'}")
    config = load_any_config(folder)
    model_class = find_head_class(config, model)
    check_inputs(model_class, config.backbone_config, model)
    find_image_processor(folder)
    network = load_head(folder, model_class)
    with translate_loading_errors(model, task.noun):
        image_processor = AutoImageProcessor.from_pretrained(folder)
    if not any(hasattr(image_processor, name) for name in POSTPROCESSING[task]):
        raise UserError(
            f"the image processor of {model}, {type(image_processor).__name__}, does not read the outputs of "
            f"{task.noun}: save the one that belongs to {model_class.__name__}"
        )
    optimized = optimize_if_possible(network, "float32") if optimize and place.type == "cpu" else None
    pipeline = PIPELINES[task](
        model=optimized or network, image_processor=image_processor, task=task.pipeline, device=place
    )
    return DenseModel(task, pipeline, Execution(str(place), "float32", optimized is not None))


def check_inputs(model_class: type[PreTrainedModel], backbone_config: Any, model: str) -> None:
    """Check that a network computes from color images alone.

    Raises:
        UserError: If it takes gray images, or also other inputs, such as a text.
    """
    if find_color_mode(backbone_config) != "RGB":
        raise UserError(f"{model} takes gray images, and pipelines of transformers give it color images")
    parameters = list(inspect.signature(model_class.forward).parameters.values())[2:]  # without self and the images
    required = [each.name for each in parameters if each.default is each.empty and each.kind is not each.VAR_KEYWORD]
    if required:
        raise UserError(
            f"{model} takes more than images, {', '.join(required)}: call its {model_class.__name__} in Python"
        )
