"""The card of a dense model."""

from huggingface_hub import ModelCard, ModelCardData


def create_card(task: str, results: dict[str, float | int] | None) -> ModelCard:
    """Return the card of a trained model."""
    metadata = ModelCardData(library_name="transformers", pipeline_tag=task)
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n")
