"""The library that augments images: timm, which the authors used, or Pillow and PyTorch.

A new run chooses the library and saves it in its recipe, because both draw different random numbers.
"""

import dataclasses
from importlib.util import find_spec

import torch

from evmamba_hub.errors import UserError
from evmamba_hub.processes import gather_problem
from training_evmamba.augmentation import Mixing, MixingSettings, TrainingTransform, TransformSettings
from training_evmamba.recipe import Recipe


def find_timm_problem() -> str | None:
    """Return the problem with timm as the predicate of a sentence, or None if it can be imported."""
    if find_spec("timm") is None:
        return "is not installed"
    try:
        import training_evmamba.augmentation_timm  # noqa: F401
    except Exception as error:  # a torchvision built for another PyTorch raises several types
        return f"cannot be imported ({type(error).__name__}: {error})"
    return None


def choose_augmentation_library(recipe: Recipe, saved: Recipe | None) -> tuple[Recipe, str | None]:
    """Replace "auto" in a recipe.

    A resumed run keeps its library. A new run takes timm if all processes can import it.

    Args:
        recipe: Recipe of the run.
        saved: Recipe of the resumed run. None for a new run.

    Returns:
        The recipe, and the problem with timm if that decided the choice, or None.

    Raises:
        UserError: If the recipe names timm and a process cannot import it.
    """
    library = recipe.augmentation_library
    if library == "auto" and saved is not None:
        library = saved.augmentation_library
    if library == "pillow":
        return dataclasses.replace(recipe, augmentation_library=library), None
    problem = gather_problem(find_timm_problem())
    if library == "timm" and problem is not None:
        way_out = (
            "use --augmentation-library pillow"
            if saved is None
            else "choose another --output-dir: a resumed run keeps its library"
        )
        raise UserError(
            f"the recipe augments images with timm, which {problem}: install timm and the torchvision built for "
            f"PyTorch {torch.__version__}, or {way_out}"
        )
    return dataclasses.replace(recipe, augmentation_library="pillow" if problem else "timm"), problem


def create_augmentation(recipe: Recipe, num_labels: int, batch_size: int) -> tuple[TransformSettings, MixingSettings]:
    """Return the augmentation of one image, and that of a batch.

    Args:
        recipe: A recipe that names its library.
        num_labels: Labels of the head.
        batch_size: Images of one process in a micro-batch.

    Raises:
        UserError: If `rand_augment` is invalid, or if timm does not support the batch size.
    """
    transform_class, mixing_class = TrainingTransform, Mixing
    if recipe.augmentation_library == "timm":
        from training_evmamba.augmentation_timm import TimmMixing, TimmTransform

        transform_class, mixing_class = TimmTransform, TimmMixing
    try:
        transform = transform_class(
            image_size=(recipe.image_size, recipe.image_size),
            crop_scale=recipe.crop_scale,
            crop_ratio=recipe.crop_ratio,
            horizontal_flip=recipe.horizontal_flip,
            random_invert=recipe.random_invert,
            rand_augment=recipe.rand_augment,
            random_erasing=recipe.random_erasing,
            image_mean=recipe.image_mean,
            image_std=recipe.image_std,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    mix = mixing_class(
        mixup_alpha=recipe.mixup_alpha,
        cutmix_alpha=recipe.cutmix_alpha,
        switch_prob=recipe.mix_switch_prob,
        label_smoothing=recipe.label_smoothing,
        num_labels=num_labels,
    )
    if recipe.augmentation_library == "timm" and mix.mixes and batch_size % 2:
        raise UserError(
            f"timm mixes an even number of images, but a process has {batch_size} in each micro-batch: change "
            "--batch-size or --gradient-accumulation-steps, or use --augmentation-library pillow"
        )
    return transform, mix


def describe_augmentation(recipe: Recipe) -> str:
    """Return the operators that a recipe enables, with their library."""
    enabled = {
        "random crops": True,
        "horizontal flips": recipe.horizontal_flip,
        "random inversion": recipe.random_invert,
        "RandAugment": recipe.rand_augment,
        "random erasing": recipe.random_erasing,
        "MixUp": recipe.mixup_alpha,
        "CutMix": recipe.cutmix_alpha,
    }
    *others, last = (name for name, value in enabled.items() if value)
    library = "on Pillow and PyTorch"
    if recipe.augmentation_library == "timm":
        import timm

        library = f"of timm {timm.__version__}"
    return f"{', '.join(others)} and {last} {library}" if others else f"{last} {library}"


def describe_choice(recipe: Recipe, timm_problem: str | None) -> str:
    """Return a sentence for the user about the augmentation and the problem with timm that decided it, if any."""
    described = describe_augmentation(recipe)
    if timm_problem is None:
        return f"Images are augmented by {described}"
    return f"timm {timm_problem}, so this package augments the images by {described}"
