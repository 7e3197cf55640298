"""The curves of a run and the card of its model."""

from pathlib import Path

import matplotlib
import torch
import transformers
from huggingface_hub import EvalResult, ModelCard
from matplotlib.figure import Figure

from evmamba_hub.images.labeled_images import IndexedImages, LabeledImages
from evmamba_hub.publish.card import CardDetails, render_card, to_eval_results
from evmamba_hub.publish.card_metadata import create_placeholder_id
from evmamba_hub.wording import to_count
from modeling_evmamba import EfficientVMambaForImageClassification
from training_evmamba.augmentation_library import describe_augmentation
from training_evmamba.checkpoints import RunProgress
from training_evmamba.data import TrainingData
from training_evmamba.optimization import count_images
from training_evmamba.recipe import BaseRecipe, Recipe, dump_recipe


def draw_curves(records: list[dict], path: Path, title: str, measures: dict[str, str]) -> None:
    """Draw loss, measures and learning rate by epoch, as a PNG.

    Args:
        records: Log lines.
        path: Path of the picture.
        title: Title of the measures.
        measures: Measures on validation images: name in the log -> label.
    """
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(10, 3), layout="constrained")
        axes = figure.subplots(1, 3)
        for axis, heading, names in zip(
            axes,
            ("Loss", f"{title} on validation images", "Learning rate"),
            ({"loss": "training", "validation_loss": "validation"}, measures, {"learning_rate": ""}),
            strict=True,
        ):
            for name, label in names.items():
                points = [(record["epoch"], record[name]) for record in records if name in record]
                if points:
                    axis.plot(*zip(*points, strict=True), label=label)
            axis.set(title=heading, xlabel="epoch")
            if len(axis.lines) > 1:
                axis.legend(frameon=False)
        figure.savefig(path, dpi=120)


def describe_length(recipe: BaseRecipe, progress: RunProgress, data: TrainingData) -> str:
    """Return the length of the training in steps and epochs. A recipe that counts in steps has no epochs."""
    steps = f"{to_count(progress.step, 'step')} of {to_count(recipe.batch_size, 'image')}"
    if getattr(recipe, "steps", None) is not None:
        return steps
    epochs = to_count(recipe.epochs, "epoch")
    if data.images_per_epoch != data.training.num_images:
        epochs += f" of {to_count(data.images_per_epoch, 'image')}"
    if count_images(recipe, data.images_per_epoch) != progress.step * recipe.batch_size:
        epochs += ", rounded up to whole steps"
    return f"{steps} ({epochs})"


def find_base_model(recipe: BaseRecipe) -> str | None:
    """Return the Hub id of the model that was fine-tuned. A directory has none, if the recipe does not give it."""
    if recipe.base_model is None and recipe.model is not None and not Path(recipe.model).is_dir():
        return recipe.model
    return recipe.base_model


def describe_start(recipe: BaseRecipe, progress: RunProgress, data: TrainingData) -> str:
    """Return a sentence about the start, the images and the length of the training."""
    origin = find_base_model(recipe) or recipe.model
    start = f"It was fine-tuned from `{origin}`" if origin else "It was trained from fresh weights"
    num_images = data.training.num_images
    if isinstance(data.training, IndexedImages):
        num_images = len(data.training) - len(progress.unreadable)
    images = "a stream of images" if num_images is None else to_count(num_images, "image")
    length = describe_length(recipe, progress, data)
    return f"{start} on {images} of {len(data.class_names):,} classes, in {length}, with `{recipe.program}`."


def describe_unreadable(progress: RunProgress, data: TrainingData) -> list[str]:
    """Return sentences about unreadable images. A stream has no number of them: its names change every epoch."""
    if not progress.num_unreadable:
        return []
    if isinstance(data.training, IndexedImages):
        return [f"{to_count(progress.num_unreadable, 'more image')} could not be read."]
    return ["Unreadable images were skipped."]


def join_training_section(recipe: BaseRecipe, paragraphs: list[str]) -> str:
    """Return the training section of a card: the text about the data, the paragraphs, and the recipe."""
    parts = [
        *([recipe.about_data.strip()] if recipe.about_data else []),
        *paragraphs,
        f"The recipe, with PyTorch {torch.__version__} and transformers {transformers.__version__}:",
        f"```yaml\n{dump_recipe(recipe)}```",
    ]
    return "\n\n".join(parts)


def describe_dataset(recipe: BaseRecipe, validation: LabeledImages) -> dict[str, str | None]:
    """Return what the entries of a card say about the dataset of an evaluation."""
    details = {f"dataset_{name}": getattr(validation, name) for name in ("config", "split", "revision")}
    return {"dataset": recipe.dataset, "dataset_id": validation.hub_id, **details}


def create_details(recipe: BaseRecipe, data: TrainingData, training: str, results: list[EvalResult]) -> CardDetails:
    """Return the content of a card that does not follow from the network.

    Args:
        recipe, data: Recipe and data of the run.
        training: The training section.
        results: The results of the evaluation.
    """
    return CardDetails(
        license=recipe.license,
        base_model=find_base_model(recipe),
        datasets=[data.training.hub_id] if data.training.hub_id else [],
        training=training,
        limits=recipe.about_limits and recipe.about_limits.strip(),
        results=results,
    )


def describe_training(
    recipe: Recipe, progress: RunProgress, data: TrainingData, results: dict[str, float | int] | None
) -> str:
    """Return the training section of the card: data, recipe and results."""
    sentences = [describe_start(recipe, progress, data), "The weights are a moving average over the steps."]
    sentences += describe_unreadable(progress, data)
    if results is not None:
        top5 = f", the top-5 accuracy is {results['top5']:.2%}," if "top5" in results else ""
        sentences.append(
            f"On {to_count(results['images'], 'held-out image')}, the top-1 accuracy is {results['top1']:.2%}{top5} "
            f"and the loss is {results['loss']:.4f}."
        )
    return join_training_section(
        recipe, [" ".join(sentences), f"Images are augmented by {describe_augmentation(recipe)}."]
    )


def create_card(
    recipe: Recipe,
    progress: RunProgress,
    model: EfficientVMambaForImageClassification,
    data: TrainingData,
    results: dict[str, float | int] | None,
    name: str,
) -> ModelCard:
    """Return the card of a trained model.

    Args:
        recipe, progress, model, data: Recipe, progress, model and data of the run.
        results: Results of the evaluation. None without validation images.
        name: Name of the model if the recipe gives none. `evmamba push` replaces it by the id on the Hub.
    """
    eval_results = []
    if results is not None:
        eval_results = to_eval_results({**describe_dataset(recipe, data.validation), **results})
    training = describe_training(recipe, progress, data, results)
    details = create_details(recipe, data, training, eval_results)
    repo_id = recipe.name or create_placeholder_id(name)
    return render_card(repo_id, model.config, EfficientVMambaForImageClassification, details)
