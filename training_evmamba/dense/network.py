"""The pretrained backbone of a dense model."""

from pathlib import Path

import torch

from evmamba_hub.model_folder import hide_load_report, load_config
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

    The norms of the feature maps are fresh in either case, unless the checkpoint is that of a backbone.

    Args:
        recipe: The recipe.
        checkpoint: The directory of the checkpoint, or None.
        num_stages: The number of last stages whose feature maps the head takes. None for all stages.

    Raises:
        UserError: If the network cannot be built, or the checkpoint does not fit it.
    """
    check_network_fields(recipe, checkpoint, {"drop_path_rate", "out_features", "out_indices"})
    fields = {"drop_path_rate": recipe.drop_path_rate}
    if checkpoint is not None:
        load_config(checkpoint)  # finds a damaged configuration, or one of another network
    with translate_network_errors():
        if checkpoint is None:
            config = create_config(recipe, fields)
        else:
            config = EfficientVMambaConfig.from_pretrained(checkpoint, **recipe.network, **fields)
        check_num_channels(recipe, config)
        stages = config.stage_names[1:]  # without the stem
        config.out_features = stages if num_stages is None else stages[-num_stages:]
        if checkpoint is None:
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
