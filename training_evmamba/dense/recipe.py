"""The values that programs for dense tasks share. Each program adds those of its head in a subclass."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from huggingface_hub.dataclasses import strict

from training_evmamba.recipe import BaseRecipe, option


RECIPES = Path(__file__).parent / "recipes"  # a directory of presets for each task


@strict
@dataclass
class DenseRecipe(BaseRecipe):
    """The values of a run on a dense task. A subclass sets `program` and `presets`."""

    # `epochs` or `steps`: published recipes count in either
    program: ClassVar[str]
    presets: ClassVar[Path]

    epochs: float = option("Optimization", "Passes over the training images, rounded up to whole steps.", 50.0)
    steps: int | None = option("Optimization", "Steps of the run. Default: those of the epochs.", None)
    batch_size: int = option("Optimization", "Images per step, over all processes.", 16)
    learning_rate: float = option("Optimization", "Peak learning rate, for this batch size.", 1e-4)
    weight_decay: float = option(
        "Optimization", "Weight decay of AdamW. Biases, norms, `A_log` and `D` have none.", 0.01
    )
    schedule: Literal["linear", "cosine", "polynomial", "constant_with_warmup"] = option(
        "Optimization", "Schedule of the learning rate after the warm-up, by its name in transformers.", "linear"
    )
    warmup_fraction: float = option("Optimization", "Fraction of the steps for the linear warm-up.", 0.05)
    adam_beta1: float = option("Optimization", "beta1 of AdamW.", 0.9)
    adam_beta2: float = option("Optimization", "beta2 of AdamW.", 0.999)
    evaluation_steps: int | None = option(
        "Checkpoints and logs", "Steps between evaluations. Default: an epoch.", None, resumable=True
    )

    def validate_values(self):
        """Reject values that no run can have. Part of `@strict`. Messages name the field."""
        super().validate_values()
        for name in ("steps", "evaluation_steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}")
        for name in ("warmup_fraction", "adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must lie in [0, 1), got {getattr(self, name)}")
