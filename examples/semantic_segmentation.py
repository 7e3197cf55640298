"""Train UperNet with an EfficientVMamba backbone on images with masks.

    python examples/semantic_segmentation.py --model CHECKPOINT --dataset DIRECTORY --output-dir runs/segmentation
    accelerate launch examples/semantic_segmentation.py --recipe ade20k --model CHECKPOINT --output-dir runs/ade20k

The program states what belongs to its task: the recipe, the images with masks, the network and the measures.
`training_evmamba.dense` has the loop, which is transformers' Trainer, and `evmamba_hub.cli` the command line.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

from evmamba_hub.errors import UserError, exit_on_user_error, require


with exit_on_user_error():  # before the imports that need these packages
    require("accelerate", "datasets", "filelock", "matplotlib", "torchmetrics", extra="dense")

import numpy as np
import torch
from huggingface_hub.dataclasses import strict
from PIL import Image
from transformers import UperNetConfig, UperNetForSemanticSegmentation
from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil

from evmamba_hub.cli.console import create_app, run_app
from evmamba_hub.cli.options import OutputDirOption, PrivateOption, PushToOption, ResumeOption
from evmamba_hub.cli.recipe_options import create_preset_option, find_overrides, with_recipe_options
from evmamba_hub.cli.training import prepare_upload, train_dense_model
from evmamba_hub.images.labeled_images import LabeledImage
from modeling_evmamba import EfficientVMambaBackbone
from training_evmamba.data import Batch, SampleReader, TrainingData
from training_evmamba.dense.data import EvaluationReader, open_data, open_splits
from training_evmamba.dense.mask_augmentation import LONGEST_TO_SHORTEST, MaskTransform
from training_evmamba.dense.masks import (
    MaskedImageReader,
    check_some_masks,
    choose_mask_columns,
    find_label_file,
    open_mask_folders,
    read_labels,
)
from training_evmamba.dense.recipe import RECIPES, DenseRecipe
from training_evmamba.dense.run import DenseRun
from training_evmamba.recipe import load_recipe, option


DEFAULT_RECIPE = "small"


@strict
@dataclass
class SegmentationRecipe(DenseRecipe):
    """The values of a run."""

    program: ClassVar[str] = "semantic_segmentation.py"
    presets: ClassVar[Path] = RECIPES / "segmentation"

    hidden_size: int = option("Network", "Channels of the head.", 512)
    auxiliary_channels: int = option("Network", "Channels of the auxiliary head.", 256)
    auxiliary_loss_weight: float = option("Network", "Weight of the auxiliary head's loss.", 0.4)

    dataset: str | None = option(
        "Data",
        "Directory with `images/` and `masks/`, or with these per split; directory that `datasets` reads; or Hub id "
        "of a dataset.",
        None,
    )
    mask_column: str | None = option("Data", "Column of the masks. Default: the only one with a usual name.", None)
    labels: str | None = option(
        "Data",
        'File of the labels: text of one name a line, from label 0 on; or JSON, `{"0": name}`, or `{name: [red, '
        "green, blue]}` for masks in RGB. Default: labels.txt or id2label.json of the dataset.",
        None,
    )
    reduce_labels: bool = option(
        "Data", "Take label 0 for pixels without label, and label 1 for the first class, as for ADE20K.", False
    )

    image_size: int = option(
        "Augmentation", "Side of random crops, and length of an image's shorter side in evaluation.", 512
    )
    random_scale: tuple[float, float] = option(
        "Augmentation", "Bounds of the factor of the shorter side before the crop.", (0.5, 2.0)
    )
    max_class_fraction: float = option("Augmentation", "Largest part of a crop that one class may fill.", 0.75)
    horizontal_flip: float = option("Augmentation", "Probability of a horizontal flip.", 0.5)
    color_distortion: float = option(
        "Augmentation", "Probability of each change: brightness, contrast, saturation, hue.", 0.5
    )

    def validate_values(self):
        """Reject values that no run can have. Part of `@strict`. Messages name the field."""
        super().validate_values()
        for name in ("hidden_size", "auxiliary_channels", "image_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}")
        for name in ("max_class_fraction", "horizontal_flip", "color_distortion"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must lie in [0, 1], got {getattr(self, name)}")
        if not self.auxiliary_loss_weight >= 0:
            raise ValueError(f"`auxiliary_loss_weight` must not be negative, got {self.auxiliary_loss_weight}")
        low, high = self.random_scale
        if not 0 < low <= high:
            raise ValueError(f"`random_scale` must be two positive numbers, the smaller first, got {low} and {high}")


class SegmentationRun(DenseRun):
    """A run of UperNet."""

    task = "image-segmentation"
    measures = {"mean_iou": "mean IoU", "mean_accuracy": "mean accuracy", "pixel_accuracy": "pixel accuracy"}

    def open_data(self, recipe: SegmentationRecipe) -> TrainingData:
        choose_columns = partial(
            choose_mask_columns,
            image_column=recipe.image_column,
            mask_column=recipe.mask_column,
            dataset=str(recipe.dataset),
        )
        splits = open_splits(recipe, open_mask_folders, choose_columns)
        file = Path(recipe.labels) if recipe.labels else find_label_file(recipe.dataset, recipe.dataset_revision)
        self.labels = read_labels(file)
        self.read_pair = MaskedImageReader(self.labels, recipe.reduce_labels)
        data = open_data(recipe, splits, self.labels.names)
        data.notes += [self.labels.note, *check_some_masks(data.training, self.read_pair)]
        return data

    def create_image_processor(self) -> SegformerImageProcessorPil:
        shortest = self.recipe.image_size
        return SegformerImageProcessorPil(
            size={"shortest_edge": shortest, "longest_edge": LONGEST_TO_SHORTEST * shortest},
            image_mean=self.recipe.image_mean,
            image_std=self.recipe.image_std,
            do_reduce_labels=False,
        )

    def create_model(self, backbone: EfficientVMambaBackbone) -> UperNetForSemanticSegmentation:
        if self.micro_batch_size < 2:
            raise UserError(
                "UperNet's batch norms need micro-batches of two images or more: raise --batch-size, or lower "
                "--gradient-accumulation-steps or the number of processes"
            )
        recipe, names = self.recipe, self.labels.names
        config = UperNetConfig(
            backbone_config=backbone.config,
            hidden_size=recipe.hidden_size,
            use_auxiliary_head=recipe.auxiliary_loss_weight > 0 and len(backbone.channels) > 2,
            auxiliary_loss_weight=recipe.auxiliary_loss_weight,
            auxiliary_in_channels=backbone.channels[min(2, len(backbone.channels) - 1)],
            auxiliary_channels=recipe.auxiliary_channels,
            loss_ignore_index=self.labels.ignored,
            id2label=dict(enumerate(names)),
            label2id={name: index for index, name in enumerate(names)},
        )
        return UperNetForSemanticSegmentation(config)

    def create_sample_reader(self) -> SampleReader:
        recipe = self.recipe
        transform = MaskTransform(
            self.image_processor,
            recipe.image_size,
            recipe.random_scale,
            recipe.max_class_fraction,
            recipe.horizontal_flip,
            recipe.color_distortion,
            self.labels.ignored,
        )
        return SampleReader(partial(prepare_training, self.read_pair, transform), recipe.seed, torch.stack)

    def create_evaluation_reader(self) -> EvaluationReader:
        return EvaluationReader(partial(prepare_evaluation, self.read_pair, self.image_processor))

    def compute_loss(self, outputs: Any, labels: torch.Tensor) -> torch.Tensor:
        """Return the loss of a batch. It is 0 without labeled pixels, of which the mean would be NaN."""
        is_labeled = (labels != self.labels.ignored).any()
        return torch.where(is_labeled, outputs.loss, torch.zeros_like(outputs.loss))

    def evaluate_batches(self, batches: Iterator[Batch]) -> dict[str, float]:
        """Measure predictions in the sizes of the masks."""
        from torchmetrics import MetricCollection
        from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

        options = {"num_classes": len(self.labels.names), "ignore_index": self.labels.ignored, "validate_args": False}
        metrics = MetricCollection(
            {
                "mean_iou": MulticlassJaccardIndex(average="macro", **options),
                "mean_accuracy": MulticlassAccuracy(average="macro", **options),
                "pixel_accuracy": MulticlassAccuracy(average="micro", **options),
                "iou": MulticlassJaccardIndex(average="none", **options),
            }
        ).to(self.model.device)
        for batch in batches:
            (labels,) = batch.labels  # [H, W]
            outputs = self.model(batch.pixel_values.to(self.model.device))
            (predicted,) = self.image_processor.post_process_semantic_segmentation(outputs, [tuple(labels.shape)])
            metrics.update(predicted, labels.to(self.model.device))
        values = metrics.compute()
        by_class = {f"iou/{name}": iou.item() for name, iou in zip(self.labels.names, values.pop("iou"), strict=True)}
        return {name: value.item() for name, value in values.items()} | by_class


def prepare_training(
    read_pair: MaskedImageReader, transform: MaskTransform, image: LabeledImage, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the pixels (3, S, S) and the class indices (S, S) of an augmented image."""
    return transform(*read_pair(image), rng)


def prepare_evaluation(
    read_pair: MaskedImageReader, image_processor: SegformerImageProcessorPil, image: LabeledImage
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the pixels (3, h, w) of a scaled image, and the class indices (H, W) in its own size."""
    pixels: Image.Image
    pixels, classes = read_pair(image)
    pixel_values = image_processor(pixels, return_tensors="pt").pixel_values[0]
    return pixel_values, torch.from_numpy(classes.astype(np.int64))


@with_recipe_options(SegmentationRecipe, DEFAULT_RECIPE)
def main(
    output_dir: OutputDirOption,
    recipe: Annotated[str, create_preset_option(SegmentationRecipe)] = DEFAULT_RECIPE,
    resume: ResumeOption = "no",
    push_to: PushToOption = None,
    private: PrivateOption = False,
    **values: Any,
) -> None:
    """Train UperNet on images with masks, from a classification checkpoint or from scratch.

    `--dataset` takes a directory with `images/` and `masks/`, or with these per split. It also takes a directory that
    the package `datasets` reads, or a dataset on the Hub. Masks have one label a pixel, and `labels.txt` names the
    labels, one a line.

    A recipe holds every value, and each option overrides one value. Values in brackets are those of `small`, the
    default recipe. The output directory gets the complete recipe (`recipe.yaml`), the log (`log.jsonl`), checkpoints,
    the curves, and `model`, which a pipeline loads. The program needs the extra `dense`.

    Examples:

        python examples/draw_shapes.py shapes

        python examples/semantic_segmentation.py --model demo/digits --dataset shapes --image-size 96 --output-dir run

        accelerate launch examples/semantic_segmentation.py --recipe ade20k --model CHECKPOINT --output-dir runs/ade20k
    """
    values |= prepare_upload(push_to, values)

    def create_run() -> SegmentationRun:
        loaded = load_recipe(recipe, find_overrides(values), SegmentationRecipe)
        return SegmentationRun(loaded, output_dir, resume=resume == "auto")

    train_dense_model(create_run, push_to, private)


if __name__ == "__main__":
    app = create_app()
    app.command()(main)
    run_app(app)
