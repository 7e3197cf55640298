"""`evmamba evaluate`"""

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich import box
from rich.progress import MofNCompleteColumn, Progress
from rich.table import Column, Table

from evmamba_hub.cli.console import console, error_console, leave_notices_to_main_process
from evmamba_hub.cli.options import BatchSizeOption, DeviceOption, DtypeOption, OptimizeOption, RevisionOption
from evmamba_hub.errors import Notice, UserError, literal


if TYPE_CHECKING:
    from evmamba_hub.inference.loading import Execution


def evaluate(
    model: Annotated[str, typer.Argument(help="Directory or Hub id of the model.")],
    dataset: Annotated[
        str,
        typer.Option(
            help="Directory with a directory of images per class, or with such a directory per split; directory that "
            "`datasets` wrote; or Hub id of a dataset."
        ),
    ],
    revision: RevisionOption = None,
    dataset_config: Annotated[
        str | None, typer.Option(help="Configuration of the dataset.", show_default="the only one")
    ] = None,
    dataset_split: Annotated[
        str | None, typer.Option(help="Split of the dataset.", show_default="validation, test, or the only one")
    ] = None,
    dataset_revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of the dataset on the Hub.", show_default="main")
    ] = None,
    image_column: Annotated[
        str | None, typer.Option(help="Column with the images.", show_default="the only one of its type")
    ] = None,
    label_column: Annotated[
        str | None, typer.Option(help="Column with the labels.", show_default="the only one of its type")
    ] = None,
    label_map: Annotated[
        Path | None,
        typer.Option(
            help="JSON file that maps names in the dataset to labels of the model.",
            show_default=False,
        ),
    ] = None,
    on_unreadable: Annotated[
        Literal["skip", "stop"], typer.Option(help="Whether to skip unreadable images or to stop.")
    ] = "stop",
    batch_size: BatchSizeOption = 32,
    device: DeviceOption = "auto",
    num_workers: Annotated[int, typer.Option(min=1, help="Number of threads that read and resize images.")] = 4,
    dtype: DtypeOption = "float32",
    optimize: OptimizeOption = True,
    output: Annotated[
        Path | None,
        typer.Option(
            help="JSON file for the results. An interrupted evaluation with the same file resumes.",
            show_default=False,
            resolve_path=True,  # so that replacing the file keeps a link to it
        ),
    ] = None,
    updates_card: Annotated[
        bool, typer.Option("--update-card", help="Write the results into the metadata of the model's card.")
    ] = False,
) -> None:
    """Measure the accuracy of a classifier on a dataset.

    Show top-1 and top-5 accuracy, the loss, and the most frequent confusions. Labels match by name, WordNet id, number
    or order. The command shows how the labels matched. On CPUs, it computes in an optimized copy of the model.

    The command needs the extra `evaluate`: run `pip install ".[evaluate]"` in a clone of the repository. Start the
    command with `accelerate launch` to share the images among processes.

    Examples:

        evmamba evaluate efficientvmamba-tiny --dataset imagenet/val --output results.json --update-card

        evmamba evaluate someone/efficientvmamba-tiny --dataset ILSVRC/imagenet-1k --dataset-split validation

        accelerate launch -m evmamba_hub.cli evaluate efficientvmamba-tiny --dataset imagenet/val
    """
    from transformers.utils import logging

    from evmamba_hub.client import fetch_model
    from evmamba_hub.images.labeled_images import LabeledImages, open_dataset
    from evmamba_hub.inference.evaluation import Evaluation, join_processes, save_results
    from evmamba_hub.inference.labels import read_label_map
    from evmamba_hub.processes import call_on_main_first, failing_together
    from evmamba_hub.publish.card import find_card, is_training_data, read_card, to_eval_results, update_card

    if output is not None and os.path.exists(output) and not os.path.isfile(output):  # takes names of any length
        raise UserError(f"{output} is not a regular file: --output takes a file for the results")
    logging.disable_progress_bar()
    names = {} if label_map is None else read_label_map(label_map)
    processes = join_processes(device)
    leave_notices_to_main_process(processes.is_main_process)

    def fetch_and_open() -> tuple[Path, LabeledImages]:
        return fetch_model(model, revision), open_dataset(
            dataset,
            config=dataset_config,
            split=dataset_split,
            revision=dataset_revision,
            image_column=image_column,
            label_column=label_column,
        )

    folder, images = call_on_main_first(processes.is_main_process, fetch_and_open)
    with failing_together():  # finds a card that cannot be updated before the evaluation
        card = read_card(model) if updates_card and processes.is_main_process else find_card(folder)
    if processes.is_main_process:
        for note in images.notes:
            error_console.print(literal(note))
    if is_training_data(card, images, dataset):
        warnings.warn(
            f"the recipe in the card names {dataset} as its training data, so this is no held-out accuracy: choose "
            "other images with --dataset or --dataset-split",
            Notice,
            stacklevel=1,
        )
    evaluation = Evaluation(
        processes,
        model,
        folder,
        images,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        optimize=optimize,
        workers=num_workers,
        label_map=names,
        on_unreadable=on_unreadable,
        progress_file=output,
    )
    with Progress(
        *Progress.get_default_columns(),
        MofNCompleteColumn(),
        console=error_console,
        disable=not processes.is_main_process,
    ) as progress:
        task = progress.add_task("Evaluating", total=evaluation.num_images, completed=evaluation.num_resumed)
        if evaluation.num_resumed and processes.is_main_process:
            progress.console.print(f"Resuming after {evaluation.num_resumed:,} images")
        for num_images in evaluation.run():
            progress.advance(task, num_images)
    results = evaluation.finish()
    if processes.is_main_process:
        show_results(results, evaluation.execution)
        if output is not None:
            save_results(output, results)
        if updates_card:
            update_card(model, to_eval_results(results))
    evaluation.discard_progress()


def show_results(results: dict, execution: "Execution") -> None:
    from evmamba_hub.inference.labels import describe_ways

    title = literal(f"{results['model']} on {results['dataset']}", "table.title")
    table = Table(show_header=False, title=title, title_justify="left")
    table.add_row("computed", str(execution))
    table.add_row("images", f"{results['images']:,}")
    if results["unreadable"]:
        table.add_row("unreadable, skipped", f"{results['unreadable']:,}")
    if results["labels_matched"]:  # those of a stream are unknown if all images were counted before an interruption
        table.add_row("labels matched", describe_ways(results["labels_matched"]))
    table.add_row("top-1", f"{results['top1']:.2%}")
    if "top5" in results:
        table.add_row("top-5", f"{results['top5']:.2%}")
    table.add_row("loss", f"{results['loss']:.4f}")
    if results["images_per_second"] is not None:  # all images were counted before an interruption
        table.add_row("images per second", f"{results['images_per_second']:.1f}")
    console.print(table)
    if results["most_confused"]:
        confusions = Table(
            Column("label", overflow="fold"),
            Column("taken for", overflow="fold"),
            Column("images", justify="right"),
            box=box.SIMPLE_HEAD,
        )
        for confusion in results["most_confused"]:
            label, predicted = literal(confusion["label"]), literal(confusion["predicted"])
            confusions.add_row(label, predicted, f"{confusion['images']:,}")
        console.print(confusions)
