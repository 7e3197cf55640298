"""What all commands that train share: the progress of a run, and the upload of its model."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn

from evmamba_hub.cli.console import error_console, leave_notices_to_main_process
from evmamba_hub.errors import UserError, literal
from evmamba_hub.wording import to_count
from training_evmamba.callback import TrainingCallback


if TYPE_CHECKING:
    from training_evmamba.dense.run import DenseRun
    from training_evmamba.trainer import TrainingRun

Run = TypeVar("Run", bound="TrainingRun | DenseRun")
Results = dict[str, float | int] | None


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


def train_with_progress(run: Run, console: Console) -> Results:
    """Train, with progress on the console of the main process. Return the results."""
    is_main_process = run.accelerator.is_main_process
    if is_main_process:
        for note in run.notes:
            console.print(literal(note))
    columns = [*Progress.get_default_columns(), MofNCompleteColumn(), TextColumn("{task.fields[status]}")]
    with Progress(*columns, console=console, disable=not is_main_process) as progress:
        return run.train(ProgressCallback(progress))


def describe_skipped(run: "TrainingRun | DenseRun") -> list[str]:
    """Return what to show of the skipped images of a run, if there are any."""
    num_unreadable = run.progress.num_unreadable
    return [f"skipped {to_count(num_unreadable, 'unreadable image')}"] if num_unreadable else []


def describe_measures(run: "DenseRun", results: Results) -> str:
    """Return the directory of a model for a dense task, its measures, and the number of skipped images."""
    parts = [str(run.folder.model_dir)]
    if results is not None:
        measured = [f"{label} {results[name]:.2%}" for name, label in run.measures.items()]
        parts.append(f"{', '.join(measured)} on {to_count(results['images'], 'held-out image')}")
    return ", ".join([*parts, *describe_skipped(run)])


def train_dense_model(create_run: Callable[[], "DenseRun"], push_to: str | None, private: bool) -> None:
    """Train a model for a dense task with progress on stderr, upload it, and show how to load it.

    `train_and_upload` describes the arguments.
    """
    run = train_and_upload(create_run, describe_measures, push_to, private)
    if run.accelerator.is_main_process:
        error_console.print("Try it:", literal(f'pipeline("{run.task}", model="{run.folder.model_dir}")', "bold"))


def prepare_upload(push_to: str | None, values: dict[str, Any]) -> dict[str, Any]:
    """Check that the model can be uploaded after the training.

    Args:
        push_to: The repository, or None for no upload.
        values: Options of the recipe.

    Returns:
        The options that the upload adds.

    Raises:
        UserError: If the id is invalid, or there is no access token.
    """
    if push_to is None:
        return {}
    from huggingface_hub import get_token

    from evmamba_hub.client import LOGIN_HINT, check_repo_id

    check_repo_id(push_to)
    if get_token() is None:
        raise UserError(f"there is no access token for --push-to: {LOGIN_HINT}")
    return {"name": values.get("name") or push_to}


def train_and_upload(
    create_run: Callable[[], Run], describe_result: Callable[[Run, Results], str], push_to: str | None, private: bool
) -> Run:
    """Train with progress on stderr, and upload the model.

    Args:
        create_run: Creates the run. Notices that it gives come from the main process only.
        describe_result: Returns what to show of the run at its end.
        push_to: The repository, or None for no upload.
        private: Whether a new repository is private.

    Raises:
        UserError: If the run or the upload fails.
    """
    from transformers.utils import logging

    from evmamba_hub.inference.evaluation import join_processes
    from evmamba_hub.publish.push import collect_model_files, push_model

    logging.disable_progress_bar()
    leave_notices_to_main_process(join_processes().is_main_process)
    run = create_run()
    results = train_with_progress(run, error_console)
    if not run.accelerator.is_main_process:
        return run
    error_console.print("[bold green]Trained[/]", literal(describe_result(run, results)))
    if push_to is not None:
        try:
            upload = push_model(
                push_to,
                collect_model_files(run.folder.model_dir, push_to),
                message=f"Upload the model with {run.recipe.program}",
                private=private,
            )
        except UserError as error:
            command = f"evmamba push {run.folder.model_dir} {push_to}"
            raise UserError(f"the model is saved, but not uploaded, which `{command}` does later: {error}") from error
        error_console.print(f"[bold green]Uploaded[/] {upload.url}")
    return run
