"""Recipes: every value of a training run, in readable YAML files and as options on the command line.

The presets lie in `recipes/`. A run takes one of them, or a file of the user's, and what the command line changes.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError

from evmamba_hub.errors import UserError


# ruff: noqa: RUF009 (the defaults are what `dataclasses.field` returns)

PRESETS = Path(__file__).parent / "recipes"
NONE = "none"  # a value that takes back what a preset says


def option(group: str, help: str, default: Any, *, resumable: bool = False) -> Any:
    """A field of the recipe.

    Args:
        group: of options, in the help of the command.
        help: one line.
        default: the value where neither preset nor command line say anything.
        resumable: whether a run may go on with another value, because it does not change the weights.
    """
    metadata = {"group": group, "help": help, "resumable": resumable}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: default.copy(), metadata=metadata)
    return field(default=default, metadata=metadata)


@strict
@dataclass
class Recipe:
    """A training run. The defaults are the authors' recipe where the presets share it."""

    model: str | None = option("Network", "Folder or Hub id of a checkpoint to fine-tune, instead of a variant.", None)
    variant: Literal["tiny", "small", "base"] | None = option(
        "Network", "Published size to train from fresh weights.", None
    )
    network: dict[str, Any] = option(
        "Network", "Fields of EfficientVMambaConfig, as YAML: `{depths: [1, 1, 1, 1]}`.", {}
    )
    image_size: int | None = option(
        "Network", "Side of the images in pixels. Without it: as the checkpoint has it, or 224.", None
    )
    drop_path_rate: float = option("Network", "Stochastic depth of the last block; it rises from 0.", 0.1)
    frozen_stages: int = option("Network", "How many of the first stages keep their weights. Without stem: 0.", 0)
    freeze_batch_norm: bool = option("Network", "Keep the statistics of batch norms.", False)

    dataset: str | None = option(
        "Data",
        "Folder with a folder of images per class (or with one for each of `train` and `validation`), folder of a "
        "dataset, or the Hub id of a dataset.",
        None,
    )
    dataset_config: str | None = option("Data", "Configuration of the dataset.", None)
    dataset_revision: str | None = option("Data", "Branch, tag or commit of the dataset on the Hub.", None)
    streaming: bool = option("Data", "Read a dataset of the Hub while it is downloaded, not after.", False)
    train_split: str = option("Data", "Split to train on.", "train")
    validation_split: str | None = option(
        "Data", "Split to evaluate on. Without it: validation, val or test, where the dataset has one of them.", None
    )
    validation_fraction: float = option(
        "Data", "Part of the training images to hold out for evaluation where the dataset has no other split.", 0.1
    )
    image_column: str | None = option("Data", "Column with the images. Without it: the only one of this type.", None)
    label_column: str | None = option("Data", "Column with the labels. Without it: the only one of this type.", None)
    images_per_epoch: int | None = option(
        "Data", "Length of an epoch. Without it: all images; streams of unknown length need it.", None
    )
    on_unreadable: Literal["skip", "stop"] = option(
        "Data", "What to do about images that cannot be read.", "skip", resumable=True
    )
    num_workers: int = option("Data", "Processes that read and augment images, for each process that trains.", 4)

    augmentation_library: Literal["auto", "timm", "pillow"] = option(
        "Augmentation",
        "`timm`, or `pillow` for our operators on Pillow and PyTorch. `auto` is timm where it can be imported, and in "
        "a run that goes on what it began with.",
        "auto",
    )
    image_mean: list[float] | None = option(
        "Augmentation", "Of each channel, to normalize. Without it: the checkpoint's or ImageNet's.", None
    )
    image_std: list[float] | None = option(
        "Augmentation", "Of each channel, to normalize. Without it: the checkpoint's or ImageNet's.", None
    )
    crop_pct: float | None = option(
        "Augmentation",
        "In evaluation: part of the side that the crop keeps. Without it: the checkpoint's or 0.875.",
        None,
    )
    crop_scale: tuple[float, float] = option("Augmentation", "Bounds of a crop's part of the area.", (0.08, 1.0))
    crop_ratio: tuple[float, float] = option("Augmentation", "Bounds of a crop's aspect.", (3 / 4, 4 / 3))
    horizontal_flip: float = option("Augmentation", "Probability to mirror an image.", 0.5)
    random_invert: float = option("Augmentation", "Probability to train on the negative of an image.", 0.0)
    rand_augment: str | None = option(
        "Augmentation", "RandAugment in timm's notation, `none` for none.", "rand-m9-mstd0.5"
    )
    random_erasing: float = option("Augmentation", "Probability to overwrite a rectangle with noise.", 0.25)
    mixup_alpha: float = option("Augmentation", "MixUp: parameter of the beta distribution, 0 for none.", 0.2)
    cutmix_alpha: float = option("Augmentation", "CutMix: parameter of the beta distribution, 0 for none.", 1.0)
    mix_switch_prob: float = option("Augmentation", "Probability of CutMix where both are on.", 0.5)
    label_smoothing: float = option("Augmentation", "Part of the label that is spread over all classes.", 0.1)

    epochs: float = option("Optimization", "Passes over the training images.", 300.0)
    batch_size: int = option("Optimization", "Images per step, of all processes together.", 2048)
    gradient_accumulation_steps: int = option("Optimization", "Micro-batches to compute a step's images in.", 1)
    learning_rate: float = option("Optimization", "The highest, for this batch size.", 2e-3)
    min_learning_rate: float = option("Optimization", "At the end of the cosine.", 1e-6)
    warmup_learning_rate: float = option("Optimization", "At the first step.", 1e-7)
    warmup_epochs: float = option("Optimization", "In which the rate rises linearly.", 20.0)
    weight_decay: float = option("Optimization", "AdamW's; not for biases, norms, `A_log` and `D`.", 0.04)
    adam_beta1: float = option("Optimization", "AdamW's decay of the first moment.", 0.9)
    adam_beta2: float = option("Optimization", "AdamW's decay of the second moment.", 0.999)
    adam_epsilon: float = option("Optimization", "AdamW's epsilon.", 1e-8)
    max_grad_norm: float = option("Optimization", "Longer gradients are shortened.", 1.0)
    layer_decay: float = option("Optimization", "Factor of the learning rate from each block to the one before.", 1.0)
    ema_decay: float = option("Optimization", "Of the averaged weights, which are evaluated and exported.", 0.9999)
    seed: int = option("Optimization", "Of weights, order, augmentation and stochastic depth.", 0)

    mixed_precision: Literal["no", "bf16", "fp16"] = option("Machine", "Number format of the matrix products.", "no")
    compile: bool = option("Machine", "Compile the network with torch.compile.", False)
    gradient_checkpointing: bool = option("Machine", "Save memory by computing activations twice.", False)

    checkpoint_steps: int | None = option(
        "Checkpoints and logs", "Steps between checkpoints, besides those of every epoch.", None, resumable=True
    )
    keep_checkpoints: int = option(
        "Checkpoints and logs", "Latest checkpoints to keep, besides the best.", 2, resumable=True
    )
    logging_steps: int = option("Checkpoints and logs", "Steps between lines of the log.", 10, resumable=True)
    report_to: list[str] = option(
        "Checkpoints and logs",
        "Trackers of accelerate: tensorboard, trackio, wandb, ...",
        ["tensorboard"],
        resumable=True,
    )

    name: str | None = option(
        "Card",
        "What the card calls the model: where it will be found. Without it: the output folder.",
        None,
        resumable=True,
    )
    license: str | None = option("Card", "License of the weights, as the Hub calls it.", None, resumable=True)
    about_data: str | None = option("Card", "A text on the training images.", None, resumable=True)
    about_limits: str | None = option("Card", "A text on what the model is not good for.", None, resumable=True)

    def validate_values(self):
        """Part of `@strict`: refuses values that no run can have. Messages name the field."""
        counts = ("image_size", "images_per_epoch", "batch_size", "gradient_accumulation_steps", "checkpoint_steps")
        for name in (*counts, "keep_checkpoints", "logging_steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}")
        for name in ("num_workers", "frozen_stages", "warmup_epochs", "weight_decay", "mixup_alpha", "cutmix_alpha"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}")
        for name in ("epochs", "learning_rate", "max_grad_norm", "adam_epsilon"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}")
        for name in ("min_learning_rate", "warmup_learning_rate"):
            if not 0 <= getattr(self, name) <= self.learning_rate:
                raise ValueError(f"`{name}` must lie in [0, learning_rate], got {getattr(self, name)}")
        for name in ("horizontal_flip", "random_invert", "random_erasing", "mix_switch_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` is a probability in [0, 1], got {getattr(self, name)}")
        for name in (
            "drop_path_rate",
            "label_smoothing",
            "adam_beta1",
            "adam_beta2",
            "ema_decay",
            "validation_fraction",
        ):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must lie in [0, 1), got {getattr(self, name)}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"`seed` must lie in [0, 2 ** 32), got {self.seed}")
        for name in ("layer_decay", "crop_pct"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must lie in (0, 1], got {getattr(self, name)}")
        for name in ("crop_scale", "crop_ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"`{name}` must be two positive numbers, the smaller first, got {low} and {high}")
        if self.crop_scale[1] > 1:
            raise ValueError(f"`crop_scale` must not exceed the image, got {self.crop_scale[1]}")
        for name in ("image_mean", "image_std"):
            if getattr(self, name) is not None and len(getattr(self, name)) != 3:
                raise ValueError(f"`{name}` must be three numbers, for red, green and blue, got {getattr(self, name)}")
        if self.image_std is not None and not all(std > 0 for std in self.image_std):
            raise ValueError(f"`image_std` must be positive, got {self.image_std}")
        if self.warmup_epochs >= self.epochs and self.warmup_epochs > 0:
            raise ValueError(f"`warmup_epochs` ({self.warmup_epochs:g}) must be fewer than `epochs` ({self.epochs:g})")
        if self.model is not None and self.variant is not None:
            raise ValueError("give `model` (to fine-tune) or `variant` (fresh weights), not both")


def get_kinds(annotation: Any) -> set:
    """The types in an annotation."""
    return set(get_args(annotation)) if get_origin(annotation) in (Union, UnionType) else {annotation}


def coerce(name: str, value: Any) -> Any:
    """A value as the type of its field: YAML reads 1e-3 as a text, and 1 as an int."""
    kinds = get_kinds(next(each.type for each in dataclasses.fields(Recipe) if each.name == name))
    if value in (NONE, [NONE]):
        if type(None) in kinds:
            return None
        if list[str] in kinds:
            return []
    if float in kinds and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            value = float(value)
        except ValueError:
            raise UserError(f"`{name}` is a number, got {value!r}") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"`{name}` must be finite, got {value}")
    if isinstance(value, (list, tuple)):
        if kinds & {list[float], tuple[float, float]}:
            value = [float(each) if isinstance(each, int) else each for each in value]
        return tuple(value) if tuple[float, float] in kinds else value
    return value


def create_recipe(values: dict[str, Any]) -> Recipe:
    """A checked recipe.

    Raises:
        UserError: for unknown names and for values that are out of bounds.
    """
    known = {each.name for each in dataclasses.fields(Recipe)}
    if unknown := next((name for name in values if name not in known), None):
        near = get_close_matches(str(unknown), known, n=1)
        hint = f"do you mean {near[0]!r}?" if near else "`evmamba train --help` lists what it has"
        raise UserError(f"a recipe has no {unknown!r}: {hint}")
    try:
        return Recipe(**{name: coerce(name, value) for name, value in values.items()})
    except (StrictDataclassError, ValueError) as error:
        # of the chain, the innermost says it shortest
        reason = error.__cause__ or error
        raise UserError(str(reason).strip()) from error


def list_presets() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def read_values(source: str) -> dict[str, Any]:
    """The values in a preset, or in a YAML file.

    Raises:
        UserError: where there is no such preset or file, or it holds something else.
    """
    path = PRESETS / f"{source}.yaml" if source in list_presets() else Path(source)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"there is no recipe {source}: give a YAML file or one of {', '.join(list_presets())}"
        ) from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"the recipe {source} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"the recipe {source} must hold lines of the form `name: value`")
    return values


def load_recipe(source: str, overrides: dict[str, Any]) -> Recipe:
    """A preset or YAML file with some values replaced. Fields of `network` are replaced one by one.

    Raises:
        UserError: see `read_values` and `create_recipe`.
    """
    values = read_values(source)
    network = values.get("network", {}), overrides.get("network", {})
    if not all(isinstance(fields, dict) for fields in network):
        raise UserError("`network` holds fields of EfficientVMambaConfig, like {depths: [1, 1, 1, 1]}")
    # the command line's choice of one of the two kinds of network replaces the other
    for chosen, other in (("model", "variant"), ("variant", "model")):
        if overrides.get(chosen) not in (None, NONE) and other not in overrides:
            values.pop(other, None)
    return create_recipe({**values, **overrides, "network": network[0] | network[1]})


def dump_recipe(recipe: Recipe) -> str:
    """All values of a recipe as YAML, in the order of the fields."""
    values = {
        name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(recipe).items()
    }
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def find_changes(old: Recipe, new: Recipe) -> dict[str, tuple[Any, Any]]:
    """Values that differ and would change the weights: name -> (old, new)."""
    return {
        each.name: (getattr(old, each.name), getattr(new, each.name))
        for each in dataclasses.fields(Recipe)
        if not each.metadata["resumable"] and getattr(old, each.name) != getattr(new, each.name)
    }
