"""The processes of a run, as accelerate starts them."""

from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration, gather_object, parse_flag_from_env
from torch.distributed.fsdp import MixedPrecisionPolicy

from evmamba_hub.errors import UserError
from evmamba_hub.inference.evaluation import computes_on_cpu
from training_evmamba.callback import TrainingCallback
from training_evmamba.recipe import BaseRecipe, Recipe


TRACKERS_NAME = "trackers"


def create_accelerator(recipe: Recipe, output_dir: Path) -> Accelerator:
    """Return this process's accelerator.

    Raises:
        UserError: If the machine or accelerate does not support the recipe.
    """
    try:
        accelerator = Accelerator(
            cpu=computes_on_cpu(),
            mixed_precision=recipe.mixed_precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=recipe.gradient_accumulation_steps),
            dynamo_backend="inductor" if recipe.compile else "no",
            log_with=recipe.report_to or None,
            project_config=ProjectConfiguration(str(output_dir), logging_dir=str(output_dir / TRACKERS_NAME)),
        )
    except (ValueError, ImportError) as error:
        raise UserError(f"accelerate does not support the recipe: {error}") from error
    check_mixed_precision(recipe, accelerator.device)
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        set_up_fsdp(accelerator, recipe)
    if len(accelerator.log_with) < len(recipe.report_to):
        raise UserError(
            f"not all trackers of {', '.join(recipe.report_to)} are installed: install them, or use --report-to none"
        )
    divide_batch(recipe, accelerator.num_processes)
    return accelerator


def check_mixed_precision(recipe: BaseRecipe, device: torch.device) -> None:
    """Check that a device computes in the recipe's dtype. accelerate would silently use float32.

    Raises:
        UserError: If it does not.
    """
    if recipe.mixed_precision == "fp16" and device.type == "cpu":
        raise UserError("mixed precision with float16 needs a GPU: use --mixed-precision bf16 or no")


def divide_batch(recipe: BaseRecipe, num_processes: int) -> int:
    """Return the images of a micro-batch on one process.

    Raises:
        UserError: If the batch cannot be divided.
    """
    num_micro_batches = num_processes * recipe.gradient_accumulation_steps
    if recipe.batch_size % num_micro_batches:
        raise UserError(
            f"`batch_size` {recipe.batch_size} cannot be divided among {num_processes} processes with "
            f"{recipe.gradient_accumulation_steps} micro-batches each: make it a multiple of {num_micro_batches}"
        )
    return recipe.batch_size // num_micro_batches


def set_up_fsdp(accelerator: Accelerator, recipe: Recipe) -> None:
    """Let FSDP compute in the same dtypes as training without FSDP.

    Raises:
        UserError: If accelerate would ignore a setting, or fail later.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        raise UserError("accelerate supports FSDP on GPUs only, and would ignore it here: start it without --use_fsdp")
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise UserError("training needs version 2 of FSDP: give accelerate --fsdp_version 2")
    if plugin.cpu_ram_efficient_loading:  # https://github.com/huggingface/accelerate/issues/3898
        raise UserError(
            "accelerate cannot load the statistics of batch norms on one process only: give it "
            "--fsdp_cpu_ram_efficient_loading false"
        )
    if recipe.compile:  # evaluation would miss the hooks that gather the outermost weights
        raise UserError("FSDP cannot shard a compiled network: use either --compile or --use_fsdp")
    # accelerate's policy would also cast the weights of batch norms and scans. Autocast chooses per operator.
    plugin.mixed_precision_policy = MixedPrecisionPolicy()


def report_unreadable(names: list[str], known: list[str], callback: TrainingCallback) -> None:
    """Add the unreadable images of all processes to the known ones, and report new ones."""
    new = sorted(set(gather_object(names)) - set(known))
    for name in new:
        callback.on_unreadable(name)
    known += new
