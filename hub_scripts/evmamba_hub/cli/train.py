"""`evmamba train`: an option for every value of a recipe."""

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import typer
import yaml
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn

from evmamba_hub.cli.console import error_console, leave_notices_to_main_process
from evmamba_hub.errors import UserError, literal, require
from evmamba_hub.wording import to_count
from evmamba_hub.yaml_core import YAML_ERRORS, CoreLoader
from training_evmamba.callback import TrainingCallback
from training_evmamba.recipe import NONE, Recipe, get_kinds, load_recipe


if TYPE_CHECKING:
    from training_evmamba.trainer import TrainingRun


DEFAULT_RECIPE = "finetune"


def parse_fields(text: str) -> dict[str, Any]:
    try:
        fields = yaml.load(text, CoreLoader)
    except YAML_ERRORS:
        fields = None
    if not isinstance(fields, dict):
        raise typer.BadParameter("give YAML, such as {depths: [1, 1, 1, 1]}")
    return fields


def number_or_none(kind: type) -> Callable[[str], Any]:
    """Returns a function that parses a number or the word `none`."""

    def parse(text: str) -> Any:
        try:
            return text if text == NONE else kind(text)
        except ValueError:
            raise typer.BadParameter(f"{text!r} is neither a valid {kind.__name__} nor `{NONE}`") from None

    return parse


def show_value(value: Any) -> str:
    """Returns a value, rounded, as the command line takes it. It is empty if the value sets nothing."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(show_value, value))
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value in (None, {}) else str(value)


def to_parameter(field: dataclasses.Field, default: str) -> inspect.Parameter:
    """Returns the option for a field of the recipe. An option that is not given is None.

    If the field may be None, the option takes the word `none`, which `coerce` converts.

    Args:
        field: The field of the recipe.
        default: Its value in the default recipe, for the help.
    """
    kinds = get_kinds(field.type)
    may_be_none = type(None) in kinds
    (kind,) = kinds - {type(None)}
    number = float if kind == list[float] else kind
    parser: Callable[[str], Any] | None = None
    metavar = None
    if kind == dict[str, Any]:
        kind, parser, metavar = dict, parse_fields, "YAML"
    elif may_be_none and number in (int, float):
        parser, metavar = number_or_none(number), f"<{number.__name__}|{NONE}>"
    elif may_be_none and get_origin(kind) is Literal:
        kind = Literal[(*get_args(kind), NONE)]
    option = typer.Option(
        help=field.metadata["help"] + (f" \\[{default}]" if default else ""),
        rich_help_panel=field.metadata["group"],
        show_default=False,
        parser=parser,
        metavar=metavar,
    )
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def with_recipe_options(command: Callable) -> Callable:
    """Replace the `**values` of a command by one option for every field of the recipe."""
    signature = inspect.signature(command)
    own = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    recipe = load_recipe(DEFAULT_RECIPE, {})
    options = [to_parameter(field, show_value(getattr(recipe, field.name))) for field in dataclasses.fields(Recipe)]
    setattr(command, "__signature__", signature.replace(parameters=own + options))  # noqa: B010, typer reads it
    return command


def find_overrides(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of the recipe that the command line overrides."""
    return {name: value for name, value in values.items() if value is not None and value != []}


class ProgressCallback(TrainingCallback):
    """Show the progress of a run as bars, and name the skipped images."""

    def __init__(self, progress: Progress):
        self.progress = progress

    def on_train_begin(self, step: int, num_steps: int) -> None:
        self.training = self.progress.add_task("Training", total=num_steps, completed=step, status="")

    def on_step_end(self, step: int) -> None:
        self.progress.update(self.training, completed=step)

    def on_log(self, record: dict[str, float]) -> None:
        if "loss" in record:  # other records are of evaluations
            status = f"loss {record['loss']:.3f}  {record['images_per_second']:.0f} images/s"
            self.progress.update(self.training, status=status)

    def on_unreadable(self, message: str) -> None:
        self.progress.console.print("[yellow]Skipped[/]", literal(message))

    def on_evaluate_begin(self, num_images: int | None) -> None:
        self.evaluation = self.progress.add_task("Evaluating", total=num_images, status="")

    def on_evaluate_step(self, num_images: int) -> None:
        self.progress.advance(self.evaluation, num_images)

    def on_evaluate_end(self) -> None:
        self.progress.remove_task(self.evaluation)


def train_with_progress(run: "TrainingRun", console: Console) -> dict[str, float | int] | None:
    """Train, with progress on the console of the main process. Return the results."""
    is_main_process = run.accelerator.is_main_process
    if is_main_process:
        for note in run.notes:
            console.print(literal(note))
    columns = [*Progress.get_default_columns(), MofNCompleteColumn(), TextColumn("{task.fields[status]}")]
    with Progress(*columns, console=console, disable=not is_main_process) as progress:
        return run.train(ProgressCallback(progress))


def describe_result(run: "TrainingRun", results: dict[str, float | int] | None) -> str:
    """Returns the directory of the model, its accuracy, and the number of skipped images."""
    parts = [str(run.folder.model_dir)]
    if results is not None:
        parts.append(f"top-1 {results['top1']:.2%} on {to_count(results['images'], 'held-out image')}")
    if num_unreadable := run.progress.num_unreadable:
        parts.append(f"skipped {to_count(num_unreadable, 'unreadable image')}")
    return ", ".join(parts)


@with_recipe_options
def train(
    output_dir: Annotated[Path, typer.Option(help="Directory of the run: log, checkpoints, curves and the model.")],
    recipe: Annotated[
        str,
        typer.Option(
            help="Preset (`tiny`, `small`, `base`, `finetune`, `digits`), or YAML file of the options below."
        ),
    ] = DEFAULT_RECIPE,
    resume: Annotated[
        Literal["no", "auto"], typer.Option(help="`auto` resumes from the last checkpoint, if there is one.")
    ] = "no",
    push_to: Annotated[
        str | None,
        typer.Option(help="Repository on the Hub to upload the model to, as `user/name`.", show_default=False),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    **values: Any,
) -> None:
    """Train a network from scratch, or fine-tune a checkpoint on your own images.

    A recipe holds every value, and each option overrides one value. Values in brackets are those of `finetune`, the
    default recipe. The output directory gets the complete recipe
    (`recipe.yaml`), the log (`log.jsonl`), checkpoints, the curves, and `model`. Load `model` with `from_pretrained`,
    or upload it with `evmamba push`.

    The command needs the extra `train`: run `pip install ".[train]"` in a clone of the repository. Start the command
    with `accelerate launch` to share each batch among processes. Checkpoints are whole at any moment, so a run can
    resume after a crash.

    Examples:

        evmamba train --model someone/efficientvmamba-tiny --dataset flowers --output-dir runs/flowers

        evmamba train --recipe tiny --dataset imagenet --output-dir runs/tiny --batch-size 512 --learning-rate 5e-4

        accelerate launch -m evmamba_hub.cli train --recipe base --output-dir runs/base --resume auto
    """
    require("accelerate", "datasets", "filelock", "matplotlib", extra="train")
    from huggingface_hub import get_token
    from transformers.utils import logging

    from evmamba_hub.client import LOGIN_HINT, check_repo_id
    from evmamba_hub.inference.evaluation import join_processes
    from evmamba_hub.publish.push import collect_model_files, push_model
    from training_evmamba.trainer import TrainingRun

    if push_to is not None:
        check_repo_id(push_to)
        if get_token() is None:
            raise UserError(f"there is no access token for --push-to: {LOGIN_HINT}")
        values["name"] = values.get("name") or push_to
    logging.disable_progress_bar()
    leave_notices_to_main_process(join_processes().is_main_process)
    run = TrainingRun(load_recipe(recipe, find_overrides(values)), output_dir, resume=resume == "auto")
    results = train_with_progress(run, error_console)
    if not run.accelerator.is_main_process:
        return
    error_console.print("[bold green]Trained[/]", literal(describe_result(run, results)))
    error_console.print("Try it:", literal(f"evmamba classify IMAGE --model {run.folder.model_dir}", "bold"))
    if push_to is not None:
        upload = push_model(
            push_to,
            collect_model_files(run.folder.model_dir, push_to),
            message="Upload the model with evmamba train",
            private=private,
        )
        error_console.print(f"[bold green]Uploaded[/] {upload.url}")
