"""Train a detector with an EfficientVMamba backbone on images with boxes.

    python examples/object_detection.py --model CHECKPOINT --dataset DIRECTORY --output-dir runs/detection
    accelerate launch examples/object_detection.py --recipe coco --model CHECKPOINT --output-dir runs/coco

The program states what belongs to its task: the recipe, the images with boxes, the network and the measures.
`training_evmamba.dense` has the loop, which is transformers' Trainer, and `evmamba_hub.cli` the command line.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from evmamba_hub.errors import UserError, exit_on_user_error, require


with exit_on_user_error():  # before the imports that need these packages
    require("accelerate", "datasets", "filelock", "matplotlib", "pycocotools", "scipy", extra="dense")

from accelerate.utils import gather_object
from huggingface_hub.dataclasses import strict
from transformers import (
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    DFineConfig,
    DFineForObjectDetection,
    PreTrainedModel,
    RTDetrConfig,
    RTDetrForObjectDetection,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.deformable_detr.image_processing_pil_deformable_detr import DeformableDetrImageProcessorPil
from transformers.models.rt_detr.image_processing_pil_rt_detr import RTDetrImageProcessorPil

from evmamba_hub.cli.console import create_app, run_app
from evmamba_hub.cli.options import OutputDirOption, PrivateOption, PushToOption, ResumeOption
from evmamba_hub.cli.recipe_options import create_preset_option, find_overrides, with_recipe_options
from evmamba_hub.cli.training import prepare_upload, train_dense_model
from modeling_evmamba import EfficientVMambaBackbone
from training_evmamba.data import Batch, SampleReader, TrainingData
from training_evmamba.dense.box_data import BoxEncoder, TrainingReader, TruthReader, open_box_data
from training_evmamba.dense.box_transforms import BoxTransform
from training_evmamba.dense.boxes import BoxForm
from training_evmamba.dense.data import EvaluationReader
from training_evmamba.dense.recipe import RECIPES, DenseRecipe
from training_evmamba.dense.run import DenseRun
from training_evmamba.recipe import load_recipe, option


# ruff: noqa: RUF009 (the defaults are what `dataclasses.field` returns)

DEFAULT_RECIPE = "small"
NUM_GROUPS = 32  # of Deformable DETR's norms; the attention of all detectors has 8 heads
DETERMINED_FIELDS = {"backbone_config", "id2label", "label2id"}  # by data and backbone


class Detector(NamedTuple):
    """A detector of transformers."""

    config: type
    model: type[PreTrainedModel]
    image_processor: type[BaseImageProcessor]


DETECTORS = {
    "d_fine": Detector(DFineConfig, DFineForObjectDetection, RTDetrImageProcessorPil),
    "rt_detr": Detector(RTDetrConfig, RTDetrForObjectDetection, RTDetrImageProcessorPil),
    "deformable_detr": Detector(
        DeformableDetrConfig, DeformableDetrForObjectDetection, DeformableDetrImageProcessorPil
    ),
}


@strict
@dataclass
class DetectionRecipe(DenseRecipe):
    """The values of a run."""

    program: ClassVar[str] = "object_detection.py"
    presets: ClassVar[Path] = RECIPES / "detection"

    detector: Literal["d_fine", "rt_detr", "deformable_detr"] = option(
        "Network", "Detector of transformers.", "d_fine"
    )
    hidden_size: int = option("Network", "Channels of the detector, a multiple of 32.", 256)
    decoder_layers: int = option("Network", "Layers of the decoder, 2 or more.", 6)
    num_queries: int = option("Network", "Objects that the detector finds in an image at most.", 300)
    detector_fields: dict[str, Any] = option(
        "Network", "Other fields of the detector's configuration as YAML, such as `{num_denoising: 0}`.", {}
    )
    freeze_batch_norm: bool = option(
        "Network", "Freeze the batch norms of the backbone. Deformable DETR always does.", True
    )

    dataset: str | None = option(
        "Data",
        "Directory with images and annotation files of COCO; directory that `datasets` reads; or Hub id of a dataset.",
        None,
    )
    objects_column: str | None = option(
        "Data", "Column of the objects, as `{bbox, category}`. Default: the only one of this kind.", None
    )
    box_form: BoxForm = option(
        "Data", "`xywh` for x, y, width and height as in COCO, or `xyxy` for two corners.", "xywh"
    )

    image_size: int = option("Augmentation", "Side to which images are resized. Their aspect ratio changes.", 640)
    crop_probability: float = option("Augmentation", "Probability of a random crop.", 0.5)
    min_crop: float = option(
        "Augmentation", "Lower bound of the sides of a random crop, as a part of the image's.", 0.5
    )
    horizontal_flip: float = option("Augmentation", "Probability of a horizontal flip.", 0.5)
    color_distortion: float = option(
        "Augmentation", "Probability of each change: brightness, contrast, saturation, hue.", 0.5
    )

    def validate_values(self):
        """Reject values that no run can have. Part of `@strict`. Messages name the field."""
        super().validate_values()
        for name, least in (("decoder_layers", 2), ("num_queries", 1), ("image_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}, got {getattr(self, name)}")
        if self.hidden_size < 1 or self.hidden_size % NUM_GROUPS:
            raise ValueError(f"`hidden_size` must be a multiple of {NUM_GROUPS}, got {self.hidden_size}")
        for name in ("crop_probability", "horizontal_flip", "color_distortion"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must lie in [0, 1], got {getattr(self, name)}")
        if not 0 < self.min_crop <= 1:
            raise ValueError(f"`min_crop` must lie in (0, 1], got {self.min_crop}")


class DetectionRun(DenseRun):
    """A run of a detector."""

    task = "object-detection"
    measures = {"map": "mAP", "map_50": "mAP at IoU 0.5", "map_75": "mAP at IoU 0.75"}
    num_stages = 3

    def open_data(self, recipe: DetectionRecipe) -> TrainingData:
        data, self.lookup = open_box_data(recipe, recipe.objects_column, recipe.box_form)
        self.class_names = data.class_names
        return data

    def create_image_processor(self) -> BaseImageProcessor:
        side = self.recipe.image_size
        return DETECTORS[self.recipe.detector].image_processor(
            size={"height": side, "width": side},
            image_mean=self.recipe.image_mean,
            image_std=self.recipe.image_std,
            do_normalize=True,
            do_pad=False,
        )

    def create_model(self, backbone: EfficientVMambaBackbone) -> PreTrainedModel:
        detector, others = DETECTORS[self.recipe.detector], self.recipe.detector_fields
        known = {field.name for field in dataclasses.fields(detector.config)} - DETERMINED_FIELDS
        if unfit := sorted(others.keys() - known):
            raise UserError(f"`detector_fields` takes fields of {detector.config.__name__}, got {unfit[0]!r}")
        is_frozen = self.recipe.freeze_batch_norm or self.recipe.detector == "deformable_detr"
        if is_frozen and self.recipe.model is None:
            self.notes.append("The batch norms of the backbone are frozen at fresh statistics: start from --model")
        fields = {**self.choose_fields(backbone), **others}
        return detector.model(detector.config(backbone_config=backbone.config, **fields))

    def choose_fields(self, backbone: EfficientVMambaBackbone) -> dict[str, Any]:
        """Return the fields of the detector's configuration.

        Raises:
            UserError: If the images do not fit the backbone.
        """
        recipe, names = self.recipe, self.class_names
        num_levels, num_stages = len(backbone.channels), backbone.config.num_stages
        strides = [backbone.config.patch_size * 2**stage for stage in range(num_stages - num_levels, num_stages)]
        if recipe.image_size % strides[-1]:
            raise UserError(f"`image_size` must be a multiple of {strides[-1]}, got {recipe.image_size}")
        num_places = sum((recipe.image_size // stride) ** 2 for stride in strides)
        if recipe.num_queries > num_places:
            raise UserError(
                f"`num_queries` is {recipe.num_queries}, and the feature maps of images of {recipe.image_size} pixels "
                f"have {num_places} places: lower it, or raise `image_size`"
            )
        fields = {
            "d_model": recipe.hidden_size,
            "encoder_ffn_dim": 4 * recipe.hidden_size,
            "decoder_ffn_dim": 4 * recipe.hidden_size,
            "decoder_layers": recipe.decoder_layers,
            "num_queries": recipe.num_queries,
            "num_feature_levels": num_levels,
            "id2label": dict(enumerate(names)),
            "label2id": {name: index for index, name in enumerate(names)},
        }
        if recipe.detector == "deformable_detr":
            fields |= {"two_stage": True, "with_box_refine": True, "two_stage_num_proposals": recipe.num_queries}
        else:
            fields |= {
                "encoder_hidden_dim": recipe.hidden_size,
                "encoder_in_channels": backbone.channels,
                "decoder_in_channels": [recipe.hidden_size] * num_levels,
                "encode_proj_layers": [num_levels - 1],
                "feat_strides": strides,
                "freeze_backbone_batch_norms": recipe.freeze_batch_norm,
            }
        return fields

    @property
    def has_unused_parameters(self) -> bool:
        return self.recipe.detector == "deformable_detr"  # of its first stage

    def create_sample_reader(self) -> SampleReader:
        recipe = self.recipe
        transform = BoxTransform(
            recipe.crop_probability, recipe.min_crop, recipe.horizontal_flip, recipe.color_distortion
        )
        return SampleReader(TrainingReader(transform, BoxEncoder(self.image_processor)), recipe.seed, list)

    def create_evaluation_reader(self) -> EvaluationReader:
        return EvaluationReader(TruthReader(self.lookup, BoxEncoder(self.image_processor)))

    def evaluate_batches(self, batches: Iterator[Batch]) -> dict[str, float]:
        """Measure predictions in the sizes of the images."""
        from training_evmamba.dense.box_metrics import Detections, measure_boxes

        truths, detections = [], []
        for batch in batches:
            ((objects, (width, height)),) = batch.labels
            outputs = self.model(batch.pixel_values.to(self.model.device))
            (found,) = self.image_processor.post_process_object_detection(outputs, 0.0, [(height, width)])
            truths.append(objects)
            detections.append(Detections(*(found[name].cpu().numpy() for name in ("scores", "labels", "boxes"))))
        truths, detections = gather_object(truths), gather_object(detections)
        if all(objects.is_crowd.all() for objects in truths):  # or there are none
            raise UserError("the images for evaluation have no objects: choose others with --validation-split")
        summary, by_class = measure_boxes(truths, detections, self.class_names)
        return summary | {f"ap/{name}": value for name, value in by_class.items()}


@with_recipe_options(DetectionRecipe, DEFAULT_RECIPE)
def main(
    output_dir: OutputDirOption,
    recipe: Annotated[str, create_preset_option(DetectionRecipe)] = DEFAULT_RECIPE,
    resume: ResumeOption = "no",
    push_to: PushToOption = None,
    private: PrivateOption = False,
    **values: Any,
) -> None:
    """Train a detector on images with boxes, from a classification checkpoint or from scratch.

    `--dataset` takes a directory with annotation files in COCO's format, as COCO and Roboflow lay them out, or a
    dataset on the Hub with a column `objects: {bbox, category}`. Without a split for evaluation, some images are held
    out.

    A recipe holds every value, and each option overrides one value. Values in brackets are those of `small`, the
    default recipe. The output directory gets the complete recipe (`recipe.yaml`), the log (`log.jsonl`), checkpoints,
    the curves, and `model`, which a pipeline loads. The program needs the extra `dense`.

    Examples:

        python examples/draw_shapes.py shapes

        python examples/object_detection.py --model demo/digits --dataset shapes --image-size 96 --output-dir run

        accelerate launch examples/object_detection.py --recipe coco --model CHECKPOINT --output-dir runs/coco
    """
    values |= prepare_upload(push_to, values)

    def create_run() -> DetectionRun:
        loaded = load_recipe(recipe, find_overrides(values), DetectionRecipe)
        return DetectionRun(loaded, output_dir, resume=resume == "auto")

    train_dense_model(create_run, push_to, private)


if __name__ == "__main__":
    app = create_app()
    app.command()(main)
    run_app(app)
