"""Parameter groups, learning rates, and the moving average of the weights."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction

import torch
from accelerate.utils import broadcast
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import get_cosine_with_min_lr_schedule_with_warmup_lr_rate

from modeling_evmamba import EfficientVMambaForImageClassification
from training_evmamba.recipe import BaseRecipe, Recipe


def find_depth(name: str, first_blocks: list[int], num_blocks: int) -> int:
    """Return the depth of a parameter: 0 in the stem, then the number of its block, then one more in the head.

    Patch merging belongs to the first block of its stage.

    Args:
        name: Name of the parameter.
        first_blocks: Number of the first block of each stage, counted from 1.
        num_blocks: Blocks of the network.
    """
    parts = name.split(".")
    if "embeddings" in parts:
        return 0
    if "stages" not in parts:
        return num_blocks + 1
    stage = parts.index("stages") + 1
    block = int(parts[stage + 2]) if parts[stage + 1] == "layers" else 0
    return first_blocks[int(parts[stage])] + block


def freeze(model: EfficientVMambaForImageClassification, recipe: Recipe) -> None:
    """Freeze the first stages and the stem."""
    backbone = model.efficientvmamba
    frozen = [backbone.embeddings, *backbone.encoder.stages[: recipe.frozen_stages]] if recipe.frozen_stages else []
    for module in frozen:
        module.requires_grad_(False)


def set_training_mode(model: nn.Module, recipe: Recipe) -> None:
    """Set training mode, except in frozen stages and in batch norms with frozen statistics."""
    model.train()
    for module in model.modules():
        weights = list(module.parameters())
        is_frozen = bool(weights) and not any(weight.requires_grad for weight in weights)
        if is_frozen or (recipe.freeze_batch_norm and isinstance(module, nn.BatchNorm2d)):
            module.eval()


def create_optimizer(model: EfficientVMambaForImageClassification, recipe: Recipe) -> torch.optim.AdamW:
    """Return AdamW without weight decay on biases, norms, `A_log` and `D`, and with layer-wise learning rates."""
    depths = model.config.depths
    num_blocks = sum(depths)
    first_blocks = [1 + sum(depths[:stage]) for stage in range(len(depths))]
    exempt = model.no_weight_decay()
    groups: dict[tuple[int, bool], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        depth = find_depth(name, first_blocks, num_blocks)
        decays = parameter.ndim > 1 and not name.endswith("bias") and name not in exempt
        group = groups.setdefault(
            (depth, decays),
            {
                "params": [],
                "lr": recipe.learning_rate * recipe.layer_decay ** (num_blocks + 1 - depth),
                "weight_decay": recipe.weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
    # one pass over each parameter instead of one per operation: benchmarks/NOTES.md
    return torch.optim.AdamW(
        list(groups.values()), betas=(recipe.adam_beta1, recipe.adam_beta2), eps=recipe.adam_epsilon, fused=True
    )


def count_images(recipe: BaseRecipe, images_per_epoch: int) -> Fraction:
    """Return the images of the recipe's epochs. In floats, 1.1 epochs of 100 images are a little more than 110."""
    return Fraction(str(recipe.epochs)) * images_per_epoch


def count_steps(recipe: BaseRecipe, images_per_epoch: int) -> int:
    """Return the steps of a run. Each takes a whole batch, so the last one may pass the end of the last epoch."""
    return math.ceil(count_images(recipe, images_per_epoch) / recipe.batch_size)


def create_schedule(
    optimizer: torch.optim.Optimizer, recipe: Recipe, num_steps: int, steps_per_epoch: float
) -> torch.optim.lr_scheduler.LambdaLR:
    """Return a schedule with linear warm-up and cosine decay to the minimum learning rate."""
    return get_cosine_with_min_lr_schedule_with_warmup_lr_rate(
        optimizer,
        num_warmup_steps=round(recipe.warmup_epochs * steps_per_epoch),
        num_training_steps=num_steps,
        min_lr_rate=recipe.min_learning_rate / recipe.learning_rate,
        warmup_lr_rate=recipe.warmup_learning_rate / recipe.learning_rate,
    )


class ExponentialMovingAverage:
    """The moving average of a model's weights and statistics, sharded like the model.

    The decay is (1 + n) / (10 + n) at step n until it reaches `decay`. Short runs thus forget their first weights.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.averages = [tensor.clone() for tensor in self.tensors_of(model)]

    @staticmethod
    def tensors_of(model: nn.Module) -> list[torch.Tensor]:
        """Return weights and statistics. For sharded tensors, return the shard of this process."""
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # a forward pass leaves the outermost weights gathered for the backward pass
        tensors = [tensor.detach() for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]
        return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Update the averages after an optimizer step. `step` is its number."""
        update_averages = get_ema_multi_avg_fn(min(self.decay, (1 + step) / (10 + step)))
        update_averages(self.averages, self.tensors_of(model), None)

    def broadcast_statistics(self, model: nn.Module) -> None:
        """Broadcast the main process's statistics and their averages. Each process computed them from other images."""
        statistics = [tensor for tensor in model.buffers() if tensor.is_floating_point()]
        if statistics:
            broadcast([statistics, self.averages[-len(statistics) :]])

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """Swap the averages into the model for the duration of the block."""
        self.swap(model)
        try:
            yield
        finally:
            self.swap(model)

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        for tensor, average in zip(self.tensors_of(model), self.averages, strict=True):
            weights = tensor.clone()
            tensor.copy_(average)
            average.copy_(weights)
