"""The network that a recipe trains, with its head and its image processor."""

import dataclasses
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import BitImageProcessorPil, PreTrainedModel
from transformers.utils import IMAGE_PROCESSOR_NAME

from evmamba_hub.errors import UserError
from evmamba_hub.inference.labels import GUESSES, LabelMatcher
from evmamba_hub.model_folder import find_weights, hide_load_report, load_config
from evmamba_hub.wording import shorten, to_count
from modeling_evmamba import VARIANTS, EfficientVMambaConfig, EfficientVMambaForImageClassification
from training_evmamba.recipe import AnyRecipe, BaseRecipe, Recipe, create_recipe


# defaults if neither the recipe nor a checkpoint sets a value
IMAGENET_PREPROCESSING = {
    "image_size": 224,
    "crop_pct": 0.875,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def read_preprocessing(checkpoint: Path) -> dict:
    """Return the fields of the recipe that a checkpoint's image processor determines.

    Raises:
        UserError: If the image processor is missing or damaged.
    """
    path = checkpoint / IMAGE_PROCESSOR_NAME
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is missing or damaged, save the image processor there: {error}") from error
    crop_size, size = saved.get("crop_size") or {}, saved.get("size") or {}
    known = {"image_mean": saved.get("image_mean"), "image_std": saved.get("image_std")}
    known["image_size"] = crop_size.get("height") or size.get("height")
    if "height" in crop_size and "shortest_edge" in size:
        known["crop_pct"] = min(1.0, crop_size["height"] / size["shortest_edge"])
    return {name: value for name, value in known.items() if value is not None}


def complete_recipe(recipe: AnyRecipe, checkpoint: Path | None) -> AnyRecipe:
    """Return the recipe with all values of the preprocessing filled in."""
    known = IMAGENET_PREPROCESSING if checkpoint is None else IMAGENET_PREPROCESSING | read_preprocessing(checkpoint)
    values = vars(recipe)
    open_fields = {name: known[name] for name, value in values.items() if value is None and name in known}
    return create_recipe({**values, **open_fields}, type(recipe))


def create_image_processor(recipe: Recipe) -> BitImageProcessorPil:
    return BitImageProcessorPil(
        size={"shortest_edge": math.floor(recipe.image_size / recipe.crop_pct + 1e-6)},
        crop_size={"height": recipe.image_size, "width": recipe.image_size},
        image_mean=recipe.image_mean,
        image_std=recipe.image_std,
    )


def has_same_classes(id2label: dict[int, str], class_names: list[str]) -> bool:
    """Return whether classes are those of a checkpoint in the same order. Guesses do not count."""
    matcher = LabelMatcher(id2label, {})
    try:
        return matcher.match(class_names) == list(range(len(id2label))) and GUESSES.isdisjoint(matcher.ways)
    except UserError:
        return False


def describe_new_head(num_classes: int, num_old: int | None) -> str:
    """Return a sentence for the user about the new head for a checkpoint, which has a head of `num_old` classes."""
    if num_old is None:
        return f"The checkpoint has no head: a new one for {num_classes:,} classes is added"
    reason = ", because their names or their order differ" if num_old == num_classes else ""
    return f"A new head for {num_classes:,} classes replaces the checkpoint's of {num_old:,} classes{reason}"


def describe_frozen_fresh_weights(recipe: Recipe) -> list[str]:
    """Return sentences for the user about options that keep fresh values as they are."""
    frozen = []
    if recipe.frozen_stages:
        frozen.append("--frozen-stages freezes stages with fresh weights, which thus stay random")
    if recipe.freeze_batch_norm:
        frozen.append("--freeze-batch-norm freezes fresh statistics of batch norms")
    return [f"{each}: leave it out, or start from a checkpoint with --model" for each in frozen]


def check_weights_fit(checkpoint: Path, report: dict, *new: str) -> None:
    """Check what `from_pretrained` reports about a checkpoint.

    Args:
        checkpoint: The directory of the checkpoint.
        report: The loading info.
        new: Starts of the names of weights that need not fit, because the run trains new ones.

    Raises:
        UserError: If other weights are missing or have another shape.
    """
    unfit = report["missing_keys"] | {name for name, *_ in report["mismatched_keys"]}
    if unfit := sorted(name for name in unfit if not name.startswith(new)):
        raise UserError(
            f"{checkpoint} lacks {len(unfit)} weights of the network or has them in another shape, among them "
            f"{unfit[0]}: `network` must not change the shapes of the checkpoint"
        )


def load_checkpoint(
    recipe: Recipe, checkpoint: Path, fields: dict, class_names: list[str]
) -> tuple[EfficientVMambaForImageClassification, list[str]]:
    """Return the network with the weights of a checkpoint, and sentences for the user about those that do not fit.

    Raises:
        UserError: If weights other than those of the head do not fit.
    """
    id2label = load_config(checkpoint).id2label
    with hide_load_report():
        model, report = EfficientVMambaForImageClassification.from_pretrained(
            checkpoint,
            **recipe.network,
            **fields,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            dtype=torch.float32,
        )
    check_weights_fit(checkpoint, report, "classifier.")
    missing, unused = report["missing_keys"], sorted(report["unexpected_keys"])
    notes = []
    has_head = not any(name.startswith("classifier.") for name in missing)
    if not has_head or not has_same_classes(id2label, class_names):
        nn.init.trunc_normal_(model.classifier.weight, std=model.config.initializer_range)
        nn.init.zeros_(model.classifier.bias)
        notes.append(describe_new_head(len(class_names), len(id2label) if has_head else None))
    if unused:
        ignored = to_count(len(unused), "weight")
        notes.append(f"Ignored {ignored} of the checkpoint that the network lacks: {shorten(unused)}")
    return model, notes


def check_network_fields(recipe: BaseRecipe, checkpoint: Path | None, taken: set[str]) -> None:
    """Check that a recipe names a network, and that its `network` holds no wrong fields.

    Args:
        recipe: The recipe.
        checkpoint: The directory of its checkpoint, or None.
        taken: Fields that data or other values of the recipe determine.

    Raises:
        UserError: If it does not, or the checkpoint has no weights.
    """
    if checkpoint is not None:
        find_weights(checkpoint)
    elif recipe.variant is None and not recipe.network:
        raise UserError("say what to train: a checkpoint with --model, or fresh weights with --variant or --network")
    known_fields = {field.name for field in dataclasses.fields(EfficientVMambaConfig)}
    if wrong := sorted(recipe.network.keys() & taken):
        raise UserError(f"`network` must not hold {wrong[0]!r}: the data or another value of the recipe determines it")
    if unknown := sorted(recipe.network.keys() - known_fields):
        raise UserError(f"`network` takes fields of EfficientVMambaConfig, which has no field {unknown[0]!r}")


@contextmanager
def translate_network_errors() -> Iterator[None]:
    """Translate the errors of transformers about a network that cannot be built into a `UserError`."""
    try:
        yield
    except (OSError, ValueError, TypeError, RuntimeError, StrictDataclassError) as error:
        raise UserError(f"the network cannot be built: {error.__cause__ or error}") from error


def create_config(recipe: BaseRecipe, fields: dict) -> EfficientVMambaConfig:
    """Return the configuration of a network with fresh weights."""
    return EfficientVMambaConfig(**{**VARIANTS.get(recipe.variant, {}), **recipe.network, **fields})


def check_num_channels(recipe: BaseRecipe, config: EfficientVMambaConfig) -> None:
    if config.num_channels != 3:
        raise UserError(
            f"images have 3 channels, the network takes {config.num_channels}: `{recipe.program}` trains networks "
            "of 3 channels, transformers' Trainer trains others"
        )


def enable_gradient_checkpointing(model: PreTrainedModel) -> None:
    """Let a network recompute activations in the backward pass."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:  # before transformers 5.23
        model.gradient_checkpointing_enable({"use_reentrant": False})


def create_model(
    recipe: Recipe, checkpoint: Path | None, class_names: list[str]
) -> tuple[EfficientVMambaForImageClassification, list[str]]:
    """Return the network with fresh weights or those of a checkpoint, and a head for the classes.

    A checkpoint with the same classes keeps its head.

    Returns:
        The network, and sentences for the user about weights that do not fit, or stay fresh.

    Raises:
        UserError: If the network cannot be built, or the checkpoint does not fit it.
    """
    fields = {
        "image_size": recipe.image_size,
        "drop_path_rate": recipe.drop_path_rate,
        "id2label": dict(enumerate(class_names)),
        "label2id": {name: label for label, name in enumerate(class_names)},
    }
    check_network_fields(recipe, checkpoint, {*fields, "num_labels"})
    with translate_network_errors():
        if checkpoint is None:
            config = create_config(recipe, fields)
            model, notes = EfficientVMambaForImageClassification(config), describe_frozen_fresh_weights(recipe)
        else:
            model, notes = load_checkpoint(recipe, checkpoint, fields, class_names)
    check_num_channels(recipe, model.config)
    if recipe.frozen_stages > model.config.num_stages:
        raise UserError(f"`frozen_stages` is {recipe.frozen_stages}, the network has {model.config.num_stages} stages")
    return model, notes
