"""The processes of a run, as accelerate starts them."""

from pathlib import Path

from accelerate import Accelerator, DistributedType
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration, parse_flag_from_env
from torch.distributed.fsdp import MixedPrecisionPolicy

from evmamba_hub.errors import UserError
from evmamba_hub.inference.evaluation import computes_on_cpu
from training_evmamba.recipe import Recipe


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
    if recipe.mixed_precision == "fp16" and accelerator.device.type == "cpu":  # accelerate would silently use float32
        raise UserError("mixed precision with float16 needs a GPU: use --mixed-precision bf16 or no")
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        set_up_fsdp(accelerator, recipe)
    if len(accelerator.log_with) < len(recipe.report_to):
        raise UserError(
            f"not all trackers of {', '.join(recipe.report_to)} are installed: install them, or use --report-to none"
        )
    num_micro_batches = accelerator.num_processes * recipe.gradient_accumulation_steps
    if recipe.batch_size % num_micro_batches:
        raise UserError(
            f"`batch_size` {recipe.batch_size} cannot be divided among {accelerator.num_processes} processes with "
            f"{recipe.gradient_accumulation_steps} micro-batches each: make it a multiple of {num_micro_batches}"
        )
    return accelerator


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
