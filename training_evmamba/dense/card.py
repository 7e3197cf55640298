"""The card of a dense model."""

from huggingface_hub import ModelCard
from transformers import PreTrainedModel

from evmamba_hub.publish.card import create_eval_results, render_card
from evmamba_hub.publish.card_metadata import create_placeholder_id
from evmamba_hub.wording import to_count
from training_evmamba.checkpoints import RunProgress
from training_evmamba.data import TrainingData
from training_evmamba.dense.recipe import DenseRecipe
from training_evmamba.report import (
    create_details,
    describe_dataset,
    describe_start,
    describe_unreadable,
    join_training_section,
)


def create_card(
    recipe: DenseRecipe,
    progress: RunProgress,
    model: PreTrainedModel,
    data: TrainingData,
    results: dict[str, float | int] | None,
    task: str,
    measures: dict[str, str],
    name: str,
) -> ModelCard:
    """Return the card of a trained model.

    Args:
        recipe, progress, model, data: Recipe, progress, model and data of the run.
        results: Results of the evaluation. None without validation images.
        task: The task on the Hub.
        measures: The measures of the task: key of the results -> name.
        name: Name of the model if the recipe gives none. `evmamba push` replaces it by the id on the Hub.
    """
    sentences = [describe_start(recipe, progress, data), *describe_unreadable(progress, data)]
    eval_results = []
    if results is not None:
        values = ", ".join(f"{label} {results[key]:.2%}" for key, label in measures.items())
        sentences.append(f"On {to_count(results['images'], 'held-out image')}: {values}.")
        metrics = {key: (key, label) for key, label in measures.items()}
        eval_results = create_eval_results({**describe_dataset(recipe, data.validation), **results}, task, metrics)
    training = join_training_section(recipe, [" ".join(sentences)])
    details = create_details(recipe, data, training, eval_results)
    return render_card(recipe.name or create_placeholder_id(name), model.config, type(model), details)
