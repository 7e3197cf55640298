"""Recipes: every value of a training run, in YAML files and as options on the command line.

`recipes/` holds the presets. A run takes a preset or a YAML file. Options on the command line override its values.
"""

import dataclasses
import math
import re
import warnings
from collections.abc import Collection
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Literal, Self, TypeVar, Union, get_args, get_origin

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from huggingface_hub.utils import validate_repo_id

from evmamba_hub.errors import Notice, UserError
from evmamba_hub.yaml_core import YAML_ERRORS, CoreLoader, describe_yaml_error, dump_yaml


# ruff: noqa: RUF009 (the defaults are what `dataclasses.field` returns)

PRESETS = Path(__file__).parent / "recipes"
TRAIN_SPLIT = "train"
SHORT_WARMUP = 0.1  # part of the epochs, if the warm-up of a preset is too long for them
NONE = "none"  # resets a value that a preset sets


def option(group: str, help: str, default: Any, *, resumable: bool = False) -> Any:
    """Return a field of the recipe.

    Args:
        group: Group of options in the help of the command.
        help: One line.
        default: Value if neither the preset nor the command line sets it.
        resumable: Whether a run may resume with another value, because it does not change the weights.
    """
    metadata = {"group": group, "help": help, "resumable": resumable}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: default.copy(), metadata=metadata)
    return field(default=default, metadata=metadata)


GROUPS = ["Network", "Data", "Augmentation", "Optimization", "Machine", "Checkpoints and logs", "Card"]


@strict
@dataclass
class BaseRecipe:
    """The values that all training programs share."""

    program: ClassVar[str]  # the command whose options these are
    presets: ClassVar[Path]  # the directory of YAML files
    saved_without: ClassVar[dict[str, Any]] = {}  # values of saved recipes that are older than the field

    model: str | None = option(
        "Network", "Directory or Hub id of a checkpoint to fine-tune. Excludes --variant.", None
    )
    variant: Literal["tiny", "small", "base"] | None = option(
        "Network", "Published variant to train from scratch. Excludes --model.", None
    )
    network: dict[str, Any] = option(
        "Network", "Fields of EfficientVMambaConfig as YAML, such as `{depths: [1, 1, 1, 1]}`.", {}
    )
    drop_path_rate: float = option(
        "Network", "Stochastic depth rate of the last block. It rises linearly from 0.", 0.1
    )
    dataset: str | None = option(
        "Data",
        "Directory with a directory of images per class, or with such a directory per split; directory that "
        "`datasets` wrote; or Hub id of a dataset.",
        None,
    )
    dataset_config: str | None = option("Data", "Configuration of the dataset.", None)
    dataset_revision: str | None = option("Data", "Branch, tag or commit of the dataset on the Hub.", None)
    streaming: bool = option("Data", "Stream a dataset of the Hub instead of downloading it first.", False)
    train_split: str = option("Data", "Split to train on. Other usual names of it are found too.", TRAIN_SPLIT)
    validation_split: str | None = option(
        "Data",
        "Split to evaluate on. Default: validation or test, or another usual name for it, if the dataset has one.",
        None,
    )
    validation_fraction: float = option(
        "Data",
        "Fraction of the training images of each class to hold out if the dataset has no evaluation split.",
        0.1,
    )
    image_column: str | None = option("Data", "Column of the images. Default: the only one of this type.", None)
    images_per_epoch: int | None = option(
        "Data", "Length of an epoch. Default: all images. Streams of unknown length need it.", None
    )
    on_unreadable: Literal["skip", "stop"] = option(
        "Data", "Whether to skip unreadable images or to stop.", "skip", resumable=True
    )
    num_workers: int = option(
        "Data",
        "Workers that read and augment images, for each training process. Only a stream takes more than one per CPU.",
        4,
    )
    image_mean: list[float] | None = option(
        "Augmentation",
        "One value per channel for normalization. Default: those of the checkpoint, or ImageNet's.",
        None,
    )
    image_std: list[float] | None = option(
        "Augmentation",
        "One value per channel for normalization. Default: those of the checkpoint, or ImageNet's.",
        None,
    )
    epochs: float = option("Optimization", "Passes over the training images, rounded up to whole steps.", 300.0)
    batch_size: int = option("Optimization", "Images per step, over all processes.", 2048)
    gradient_accumulation_steps: int = option("Optimization", "Micro-batches per step and process.", 1)
    learning_rate: float = option("Optimization", "Peak learning rate, for this batch size.", 2e-3)
    weight_decay: float = option(
        "Optimization", "Weight decay of AdamW. Biases, norms, `A_log` and `D` have none.", 0.04
    )
    max_grad_norm: float = option("Optimization", "Maximum norm for gradient clipping.", 1.0)
    seed: int = option("Optimization", "Seed of weights, order, augmentation and stochastic depth.", 0)
    mixed_precision: Literal["no", "bf16", "fp16"] = option("Machine", "Dtype of mixed precision.", "no")
    gradient_checkpointing: bool = option(
        "Machine", "Recompute activations in the backward pass, to save memory.", False
    )
    checkpoint_steps: int | None = option(
        "Checkpoints and logs", "Steps between checkpoints, in addition to one per epoch.", None, resumable=True
    )
    keep_checkpoints: int = option(
        "Checkpoints and logs", "Latest checkpoints to keep, in addition to the best one.", 2, resumable=True
    )
    logging_steps: int = option("Checkpoints and logs", "Steps between log lines.", 10, resumable=True)
    report_to: list[str] = option(
        "Checkpoints and logs",
        "Trackers of accelerate, such as tensorboard, trackio and wandb.",
        ["tensorboard"],
        resumable=True,
    )
    name: str | None = option(
        "Card",
        "Future Hub id of the model, for the card. Default: your-name/ and the name of the output directory, which "
        "`evmamba push` replaces by the id.",
        None,
        resumable=True,
    )
    base_model: str | None = option(
        "Card",
        "Hub id of the model that was fine-tuned, if --model is a directory. Default: --model, if it is an id.",
        None,
        resumable=True,
    )
    license: str | None = option("Card", "License of the weights, by its identifier on the Hub.", None, resumable=True)
    about_data: str | None = option("Card", "Text of the card about the training images.", None, resumable=True)
    about_limits: str | None = option("Card", "Text of the card about limits of the model.", None, resumable=True)

    @classmethod
    def create(cls, values: dict[str, Any], chosen: Collection[str]) -> Self:
        """Return a checked recipe. `chosen` names the values that the user has set.

        Raises:
            UserError: See `create_recipe`.
        """
        return create_recipe(values, cls)

    def validate_values(self):
        """Reject values that no run can have. Part of `@strict`. Messages name the field."""
        counts = ("images_per_epoch", "batch_size", "gradient_accumulation_steps", "checkpoint_steps")
        for name in (*counts, "keep_checkpoints", "logging_steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}")
        for name in ("num_workers", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}")
        for name in ("epochs", "learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}")
        for name in ("drop_path_rate", "validation_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must lie in [0, 1), got {getattr(self, name)}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"`seed` must lie in [0, 2 ** 32), got {self.seed}")
        for name in ("image_mean", "image_std"):
            if getattr(self, name) is not None and len(getattr(self, name)) != 3:
                raise ValueError(f"`{name}` must be three numbers, for red, green and blue, got {getattr(self, name)}")
        if self.image_std is not None and not all(std > 0 for std in self.image_std):
            raise ValueError(f"`image_std` must be positive, got {self.image_std}")
        if self.model is not None and self.variant is not None:
            raise ValueError("give `model` (to fine-tune) or `variant` (fresh weights), not both")
        if self.base_model is not None and self.model is None:
            raise ValueError("`base_model` names what `model` was made from: give `model` too, or leave it out")
        for name in ("name", "base_model"):
            if getattr(self, name) is not None and not is_hub_id(getattr(self, name)):
                raise ValueError(f"`{name}` is an id on the Hub, as user/name, got {getattr(self, name)!r}")


@strict
@dataclass
class Recipe(BaseRecipe):
    """The values of a run of `evmamba train`. The defaults are those of the authors' recipe that all presets share."""

    program: ClassVar[str] = "evmamba train"
    presets: ClassVar[Path] = PRESETS
    saved_without: ClassVar[dict[str, Any]] = {"augmentation_library": "pillow"}  # they are older than the choice

    image_size: int | None = option(
        "Network", "Side of the input images in pixels. Default: that of the checkpoint, or 224.", None
    )
    frozen_stages: int = option(
        "Network", "Number of first stages to freeze, together with the stem. 0 freezes nothing.", 0
    )
    freeze_batch_norm: bool = option("Network", "Freeze the statistics of batch norms.", False)
    label_column: str | None = option("Data", "Column of the labels. Default: the only one of this type.", None)
    augmentation_library: Literal["auto", "timm", "pillow"] = option(
        "Augmentation",
        "`timm`, or `pillow` for operators on Pillow and PyTorch. `auto` takes timm if it is importable. A resumed "
        "run keeps its library.",
        "auto",
    )
    crop_pct: float | None = option(
        "Augmentation",
        "Fraction of the side that the center crop keeps in evaluation. Default: that of the checkpoint, or 0.875.",
        None,
    )
    crop_scale: tuple[float, float] = option(
        "Augmentation", "Bounds of the area of random crops, as fractions.", (0.08, 1.0)
    )
    crop_ratio: tuple[float, float] = option(
        "Augmentation", "Bounds of the aspect ratio of random crops.", (3 / 4, 4 / 3)
    )
    horizontal_flip: float = option("Augmentation", "Probability of a horizontal flip.", 0.5)
    random_invert: float = option("Augmentation", "Probability of inverting an image.", 0.0)
    rand_augment: str | None = option(
        "Augmentation", "RandAugment in timm's notation. `none` disables it.", "rand-m9-mstd0.5"
    )
    random_erasing: float = option("Augmentation", "Probability of random erasing, with noise.", 0.25)
    mixup_alpha: float = option("Augmentation", "MixUp: parameter of the beta distribution. 0 disables it.", 0.2)
    cutmix_alpha: float = option("Augmentation", "CutMix: parameter of the beta distribution. 0 disables it.", 1.0)
    mix_switch_prob: float = option("Augmentation", "Probability of CutMix instead of MixUp if both are enabled.", 0.5)
    label_smoothing: float = option("Augmentation", "Label smoothing.", 0.1)
    min_learning_rate: float = option("Optimization", "Learning rate at the end of the cosine schedule.", 1e-6)
    warmup_learning_rate: float = option("Optimization", "Learning rate at the first step.", 1e-7)
    warmup_epochs: float = option("Optimization", "Epochs of linear warm-up.", 20.0)
    adam_beta1: float = option("Optimization", "beta1 of AdamW.", 0.9)
    adam_beta2: float = option("Optimization", "beta2 of AdamW.", 0.999)
    adam_epsilon: float = option("Optimization", "Epsilon of AdamW.", 1e-8)
    layer_decay: float = option(
        "Optimization", "Layer-wise decay: factor of the learning rate from a block to the one before.", 1.0
    )
    ema_decay: float = option(
        "Optimization", "Decay of the averaged weights (EMA), which are evaluated and saved.", 0.9999
    )
    compile: bool = option("Machine", "Compile the network with torch.compile.", False)

    @classmethod
    def create(cls, values: dict[str, Any], chosen: Collection[str]) -> Self:
        """Return a checked recipe.

        If the user has not chosen the warm-up and it is too long for the epochs, shorten it, and issue a `Notice`.
        """
        if "warmup_epochs" in chosen:
            return create_recipe(values, cls)
        recipe = create_recipe({**values, "warmup_epochs": 0}, cls)
        warmup_epochs = coerce("warmup_epochs", values.get("warmup_epochs", cls.warmup_epochs), cls)
        if warmup_epochs >= recipe.epochs:
            shortened = SHORT_WARMUP * recipe.epochs
            warnings.warn(
                f"Shortened the warm-up from {warmup_epochs:g} to {shortened:g} epochs, because the run has "
                f"{recipe.epochs:g}. --warmup-epochs sets it",
                Notice,
                stacklevel=4,
            )
            warmup_epochs = shortened
        return dataclasses.replace(recipe, warmup_epochs=warmup_epochs)

    def validate_values(self):
        """Reject values that no run can have. Part of `@strict`. Messages name the field."""
        super().validate_values()
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"`image_size` must be at least 1, got {self.image_size}")
        for name in ("frozen_stages", "warmup_epochs", "mixup_alpha", "cutmix_alpha"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}")
        if not self.adam_epsilon > 0:
            raise ValueError(f"`adam_epsilon` must be positive, got {self.adam_epsilon}")
        for name in ("min_learning_rate", "warmup_learning_rate"):
            if not 0 <= getattr(self, name) <= self.learning_rate:
                raise ValueError(f"`{name}` must lie in [0, learning_rate], got {getattr(self, name)}")
        for name in ("horizontal_flip", "random_invert", "random_erasing", "mix_switch_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` is a probability in [0, 1], got {getattr(self, name)}")
        for name in ("label_smoothing", "adam_beta1", "adam_beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must lie in [0, 1), got {getattr(self, name)}")
        for name in ("layer_decay", "crop_pct"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must lie in (0, 1], got {getattr(self, name)}")
        for name in ("crop_scale", "crop_ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"`{name}` must be two positive numbers, the smaller first, got {low} and {high}")
        if self.crop_scale[1] > 1:
            raise ValueError(f"`crop_scale` must not exceed the image, got {self.crop_scale[1]}")
        if self.warmup_epochs >= self.epochs and self.warmup_epochs > 0:
            raise ValueError(
                f"`warmup_epochs` ({self.warmup_epochs:g}) must be fewer than `epochs` ({self.epochs:g}): give "
                "--warmup-epochs 0, or more --epochs"
            )


AnyRecipe = TypeVar("AnyRecipe", bound=BaseRecipe)


def is_hub_id(text: str) -> bool:
    """Return whether a text is the id of a repository on the Hub, with its owner."""
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return "/" in text and text.isascii()  # huggingface_hub 1 takes the letters of any alphabet


def get_kinds(annotation: Any) -> set:
    """Return the types in an annotation."""
    return set(get_args(annotation)) if get_origin(annotation) in (Union, UnionType) else {annotation}


def list_options(recipe_class: type[BaseRecipe]) -> list[dataclasses.Field]:
    """Return the fields of a recipe, group by group."""
    return sorted(dataclasses.fields(recipe_class), key=lambda each: GROUPS.index(each.metadata["group"]))


def coerce(name: str, value: Any, recipe_class: type[BaseRecipe]) -> Any:
    """Convert a value to the type of its field. The command line gives text, and YAML may give an int for a float."""
    kinds = get_kinds(next(each.type for each in dataclasses.fields(recipe_class) if each.name == name))
    if value in (NONE, [NONE]):
        if type(None) in kinds:
            return None
        if list[str] in kinds:
            return []
    if kinds & {int, float} and isinstance(value, str):
        number, words = (float, "a number") if float in kinds else (int, "a whole number")
        try:
            value = number(value)
        except ValueError:
            raise UserError(f"`{name}` is {words}, got {value!r}") from None
    if bool in kinds and isinstance(value, str):
        raise UserError(f"`{name}` is true or false, got {value!r}")
    if str in kinds and isinstance(value, (bool, int, float)):
        raise UserError(f"`{name}` is text, got {value!r}: write it in quotes")
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"`{name}` must be finite, got {value}")
    if isinstance(value, (list, tuple)):
        if kinds & {list[float], tuple[float, float]}:
            value = [float(each) if isinstance(each, int) else each for each in value]
        return tuple(value) if tuple[float, float] in kinds else value
    return value


def create_recipe(values: dict[str, Any], recipe_class: type[AnyRecipe] = Recipe) -> AnyRecipe:
    """Return a checked recipe.

    Raises:
        UserError: If a name is unknown or a value is out of bounds.
    """
    known = {each.name for each in dataclasses.fields(recipe_class)}
    if unknown := next((name for name in values if name not in known), None):
        near = get_close_matches(str(unknown), known, n=1)
        hint = f"do you mean {near[0]!r}?" if near else f"`{recipe_class.program} --help` lists what it has"
        raise UserError(f"a recipe has no {unknown!r}: {hint}")
    try:
        return recipe_class(**{name: coerce(name, value, recipe_class) for name, value in values.items()})
    except (StrictDataclassError, ValueError) as error:
        # the innermost error of the chain has the shortest message
        reason = error.__cause__ or error
        raise UserError(str(reason).strip()) from error


def list_presets(recipe_class: type[BaseRecipe] = Recipe) -> list[str]:
    return sorted(path.stem for path in recipe_class.presets.glob("*.yaml"))


def read_recipe_file(source: str, recipe_class: type[BaseRecipe] = Recipe) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the values of a preset or of a YAML file, and the line of each.

    Raises:
        UserError: If there is no such preset or file, or it holds no mapping.
    """
    presets = list_presets(recipe_class)
    path = recipe_class.presets / f"{source}.yaml" if source in presets else Path(source)
    try:
        loader = CoreLoader(path.read_bytes())
        root = loader.get_single_node()
        values = None if root is None else loader.construct_document(root)
    except FileNotFoundError:
        raise UserError(f"there is no recipe {source}: give a YAML file or one of {', '.join(presets)}") from None
    except OSError as error:
        raise UserError(f"the recipe {source} cannot be read: {error}") from error
    except YAML_ERRORS as error:
        raise UserError(f"the recipe {source} cannot be read: {describe_yaml_error(error)}") from error
    if not isinstance(values, dict):
        raise UserError(f"the recipe {source} must hold lines of the form `name: value`")
    return values, {key.value: key.start_mark.line + 1 for key, _ in root.value}


def read_values(source: str) -> dict[str, Any]:
    """Return the values of a preset or of a YAML file. See `read_recipe_file`."""
    return read_recipe_file(source)[0]


def load_recipe(source: str, overrides: dict[str, Any], recipe_class: type[AnyRecipe] = Recipe) -> AnyRecipe:
    """Return a preset or YAML file with overrides. Overrides replace the fields of `network` one by one.

    The class of the recipe may adapt values that the user has not chosen.

    Raises:
        UserError: See `read_recipe_file` and `create_recipe`. The message names the line of a wrong value.
    """
    values, lines = read_recipe_file(source, recipe_class)
    network = values.get("network", {}), overrides.get("network", {})
    if not all(isinstance(fields, dict) for fields in network):
        raise UserError("`network` holds fields of EfficientVMambaConfig, like {depths: [1, 1, 1, 1]}")
    # a network on the command line replaces that of the recipe
    for chosen, other in (("model", "variant"), ("variant", "model")):
        if overrides.get(chosen) not in (None, NONE):
            values = {name: value for name, value in values.items() if name not in (other, "base_model")}
    values = {**values, **overrides, "network": network[0] | network[1]}
    chosen = overrides.keys() | (set() if source in list_presets(recipe_class) else lines.keys())
    try:
        return recipe_class.create(values, chosen)
    except UserError as error:
        named = re.findall(r"[`'](\w+)[`']", str(error))
        line = next((lines[name] for name in named if name in lines and name not in overrides), None)
        raise UserError(f"{error} ({source}, line {line})" if line else str(error)) from error


def dump_recipe(recipe: BaseRecipe) -> str:
    """Return all values of a recipe as YAML, group by group."""
    values = {each.name: getattr(recipe, each.name) for each in list_options(type(recipe))}
    return dump_yaml({name: list(value) if isinstance(value, tuple) else value for name, value in values.items()})


def find_changes(old: BaseRecipe, new: BaseRecipe) -> dict[str, tuple[Any, Any]]:
    """Return the values that differ and would change the weights: name -> (old, new)."""
    return {
        each.name: (getattr(old, each.name), getattr(new, each.name))
        for each in dataclasses.fields(new)
        if not each.metadata["resumable"] and getattr(old, each.name) != getattr(new, each.name)
    }
