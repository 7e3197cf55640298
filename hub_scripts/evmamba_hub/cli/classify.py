"""`evmamba classify`"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.progress import track
from rich.progress_bar import ProgressBar
from rich.table import Column, Table

from evmamba_hub.cli.console import console, error_console
from evmamba_hub.cli.options import BatchSizeOption, DeviceOption, DtypeOption, OptimizeOption, RevisionOption
from evmamba_hub.errors import UserError, literal


if TYPE_CHECKING:
    from evmamba_hub.inference.classify import ClassifiedFile


def classify(
    images: Annotated[list[Path], typer.Argument(help="Image files, and directories to search for images.")],
    model: Annotated[
        str | None,
        typer.Option(help="Directory or Hub id of the model.", show_default="the bundled model of handwritten digits"),
    ] = None,
    revision: RevisionOption = None,
    top_k: Annotated[int, typer.Option(min=1, help="Number of labels to show for each image.")] = 5,
    batch_size: BatchSizeOption = 1,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    optimize: OptimizeOption = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Classify images.

    Show the most likely labels of each image. If a file is damaged or no image, the command reports it, classifies the
    other files, and exits with code 1. On CPUs, it computes in an optimized copy of the model.

    Examples:

        evmamba classify demo/examples

        evmamba classify cat.jpg dog.png --model efficientvmamba-tiny --top-k 3

        evmamba classify photos --model efficientvmamba-tiny --json > labels.json
    """
    from transformers.utils import logging

    from evmamba_demo.bundled import find_bundled_model
    from evmamba_hub.images.image_files import describe_ignored, find_images
    from evmamba_hub.inference.classify import classify_files, load_classifier

    logging.disable_progress_bar()
    paths, ignored = find_images(images)
    if ignored:
        error_console.print(literal(describe_ignored(ignored)))
    classifier = load_classifier(model or str(find_bundled_model()), device, dtype, revision, optimize)
    error_console.print(f"Computing {classifier.execution}")
    results = classify_files(classifier, paths, top_k, batch_size)
    shows_results = not as_json and console.is_terminal  # which a bar on the same terminal would tear apart
    hide_bar = len(paths) < 2 or shows_results
    progress = track(results, "Classifying", len(paths), console=error_console, transient=True, disable=hide_bar)
    if as_json:
        classifications = list(progress)
        print(json.dumps([each.as_json(classifier.execution) for each in classifications], indent=2))
    else:
        classifications = []
        for classification in progress:
            classifications.append(classification)
            console.print(to_table(classification))
    num_broken = sum(classification.error is not None for classification in classifications)
    if num_broken:
        raise UserError(f"{num_broken} of {len(paths)} images could not be classified")


def to_table(classified: "ClassifiedFile") -> Table:
    table = Table(
        Column(overflow="fold"),
        title=literal(classified.path, "table.title"),
        title_justify="left",
        show_header=False,
        box=box.SIMPLE_HEAD,
    )
    if classified.error is not None:
        table.add_row(literal(classified.error, "bold red"))
    for prediction in classified.predictions:
        bar = ProgressBar(total=1.0, completed=prediction["score"], width=20)
        table.add_row(literal(prediction["label"]), f"{prediction['score']:.1%}", bar)
    return table
