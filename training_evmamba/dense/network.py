"""The pretrained backbone of a dense model."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from evmamba_hub.errors import UserError
from evmamba_hub.model_folder import find_weights, hide_load_report, load_any_config
from evmamba_hub.wording import shorten, to_count
from modeling_evmamba import EfficientVMambaBackbone, EfficientVMambaConfig
from training_evmamba.dense.recipe import DenseRecipe
from training_evmamba.network import (
    check_network_fields,
    check_num_channels,
    check_weights_fit,
    create_config,
    translate_network_errors,
)


def create_backbone(recipe: DenseRecipe, checkpoint: Path | None, num_stages: int | None) -> EfficientVMambaBackbone:
    """Return a backbone with fresh weights, or those of a classification checkpoint.

    The norms of the feature maps are fresh in either case, unless the checkpoint is that of a backbone. All weights
    are fresh if it is that of a dense model: `load_whole` loads them.

    Args:
        recipe: The recipe.
        checkpoint: The directory of the checkpoint, or None.
        num_stages: The number of last stages whose feature maps the head takes. None for all stages.

    Raises:
        UserError: If the network cannot be built, or the checkpoint does not fit it.
    """
    check_network_fields(recipe, checkpoint, {"drop_path_rate", "out_features", "out_indices"})
    fields = {"drop_path_rate": recipe.drop_path_rate}
    saved = None if checkpoint is None else load_any_config(checkpoint)
    has_own_weights = isinstance(saved, EfficientVMambaConfig)
    with translate_network_errors():
        if saved is None:
            config = create_config(recipe, fields)
        elif has_own_weights:
            config = EfficientVMambaConfig.from_pretrained(checkpoint, **recipe.network, **fields)
        else:
            config = EfficientVMambaConfig(**saved.backbone_config.to_dict() | recipe.network | fields)
        check_num_channels(recipe, config)
        stages = config.stage_names[1:]  # without the stem
        config.out_features = stages if num_stages is None else stages[-num_stages:]
        if not has_own_weights:
            return EfficientVMambaBackbone(config)
        with hide_load_report():
            backbone, report = EfficientVMambaBackbone.from_pretrained(
                checkpoint,
                config=config,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                dtype=torch.float32,
            )
    check_weights_fit(checkpoint, report, "hidden_states_norms.")
    return backbone


def is_dense(checkpoint: Path) -> bool:
    """Return whether a checkpoint is that of a model with a head for a dense task."""
    return not isinstance(load_any_config(checkpoint), EfficientVMambaConfig)


def load_whole(model: PreTrainedModel, checkpoint: Path) -> list[str]:
    """Load the weights of a dense model, backbone and head, to train it further.

    Weights of another shape stay fresh, such as those for other classes.

    Returns:
        Sentences for the user about weights that stay fresh.

    Raises:
        UserError: If the checkpoint is that of another class, or its weights are missing or damaged.
    """
    (found,) = load_any_config(checkpoint).architectures
    if found != type(model).__name__:
        raise UserError(f"{checkpoint} is a {found}, and this trains a {type(model).__name__}: give --model another")
    find_weights(checkpoint)
    with translate_network_errors(), hide_load_report():
        loaded, report = type(model).from_pretrained(
            checkpoint,
            config=model.config,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            dtype=torch.float32,
        )
    model.load_state_dict(loaded.state_dict())
    fresh = sorted(report["missing_keys"] | {name for name, *_ in report["mismatched_keys"]})
    if not fresh:
        return []
    return [f"{to_count(len(fresh), 'weight')} of the checkpoint do not fit and start anew: {shorten(fresh)}"]
