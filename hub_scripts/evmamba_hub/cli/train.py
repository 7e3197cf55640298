"""`evmamba train`: an option for every value of a recipe."""

from typing import TYPE_CHECKING, Annotated, Any

from evmamba_hub.cli.console import error_console
from evmamba_hub.cli.options import OutputDirOption, PrivateOption, PushToOption, ResumeOption
from evmamba_hub.cli.recipe_options import create_preset_option, find_overrides, with_recipe_options
from evmamba_hub.cli.training import describe_skipped, prepare_upload, train_and_upload
from evmamba_hub.errors import literal, require
from evmamba_hub.wording import to_count
from training_evmamba.recipe import Recipe, load_recipe


if TYPE_CHECKING:
    from training_evmamba.trainer import TrainingRun


DEFAULT_RECIPE = "finetune"


def describe_result(run: "TrainingRun", results: dict[str, float | int] | None) -> str:
    """Return the directory of the model, its accuracy, and the number of skipped images."""
    parts = [str(run.folder.model_dir)]
    if results is not None:
        parts.append(f"top-1 {results['top1']:.2%} on {to_count(results['images'], 'held-out image')}")
    return ", ".join([*parts, *describe_skipped(run)])


@with_recipe_options(Recipe, DEFAULT_RECIPE)
def train(
    output_dir: OutputDirOption,
    recipe: Annotated[str, create_preset_option(Recipe)] = DEFAULT_RECIPE,
    resume: ResumeOption = "no",
    push_to: PushToOption = None,
    private: PrivateOption = False,
    **values: Any,
) -> None:
    """Train a network from scratch, or fine-tune a checkpoint on your own images.

    A recipe holds every value, and each option overrides one value. Values in brackets are those of `finetune`, the
    default recipe. The output directory gets the complete recipe (`recipe.yaml`), the log (`log.jsonl`), checkpoints,
    the curves, and `model`. Load `model` with `from_pretrained`, or upload it with `evmamba push`.

    The command needs the extra `train`: run `pip install ".[train]"` in a clone of the repository. Start the command
    with `accelerate launch` to share each batch among processes. Checkpoints are whole at any moment, so a run can
    resume after a crash.

    Examples:

        evmamba train --model someone/efficientvmamba-tiny --dataset flowers --output-dir runs/flowers

        evmamba train --recipe tiny --dataset imagenet --output-dir runs/tiny --batch-size 512 --learning-rate 5e-4

        accelerate launch -m evmamba_hub.cli train --recipe base --output-dir runs/base --resume auto
    """
    require("accelerate", "datasets", "filelock", "matplotlib", extra="train")
    from training_evmamba.trainer import TrainingRun

    values |= prepare_upload(push_to, values)

    def create_run() -> TrainingRun:
        return TrainingRun(load_recipe(recipe, find_overrides(values)), output_dir, resume=resume == "auto")

    run = train_and_upload(create_run, describe_result, push_to, private)
    if run.accelerator.is_main_process:
        error_console.print("Try it:", literal(f"evmamba classify IMAGE --model {run.folder.model_dir}", "bold"))
