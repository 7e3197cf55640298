"""The command line `evmamba`: arguments and help of every command. Jobs are imported when their command runs."""

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Column, Table

from hub_scripts.errors import UserError


console = Console(highlight=False, soft_wrap=True)
error_console = Console(stderr=True, highlight=False, soft_wrap=True)

app = typer.Typer(
    help="EfficientVMamba on the Hugging Face Hub.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


Dtype = Literal["float32", "float16", "bfloat16"]


@app.command()
def classify(
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders to search for images.")],
    model: Annotated[
        str | None,
        typer.Option(help="Folder or Hub id of the model.", show_default="the bundled model of handwritten digits"),
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, help="How many labels to show per image.")] = 5,
    device: Annotated[
        str, typer.Option(help="Where to compute: `cpu`, `cuda`, `cuda:1`, `mps`, ..., or the first accelerator.")
    ] = "auto",
    dtype: Annotated[Dtype, typer.Option(help="Number format to compute in.")] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of tables.")] = False,
) -> None:
    """Classifies images.

    A file that is no image, or a damaged one, is reported and the others go on; the exit code is then 1.

    Examples:

        evmamba classify demo/examples

        evmamba classify cat.jpg dog.png --model efficientvmamba-tiny --top-k 3

        evmamba classify photos --model efficientvmamba-tiny --json > labels.json
    """
    from hub_scripts import classify as job

    paths = job.find_images(images)
    classifier = job.load_classifier(model or str(job.find_bundled_model()), device, dtype)
    results = job.classify(classifier, paths, top_k)
    progress = track(results, "Classifying", len(paths), console=error_console, transient=True, disable=len(paths) < 2)
    if as_json:
        classifications = list(progress)
        print(json.dumps([classification.as_json() for classification in classifications], indent=2))
    else:
        classifications = []
        for classification in progress:
            classifications.append(classification)
            console.print(classification.as_table())
    num_broken = sum(classification.error is not None for classification in classifications)
    if num_broken:
        raise UserError(f"{num_broken} of {len(paths)} images could not be classified")


@app.command()
def info(
    model: Annotated[
        str | None,
        typer.Option(help="Folder or Hub id of a model.", show_default="the published networks"),
    ] = None,
    image_size: Annotated[
        int, typer.Option(min=1, help="Side of the image in pixels that operations count for.")
    ] = 224,
) -> None:
    """Shows the size of a network and what runs it on this machine.

    Examples:

        evmamba info

        evmamba info --model efficientvmamba-tiny --image-size 384
    """
    from hub_scripts import info as job

    table = Table("network", Column("parameters", justify="right"), Column("GMACs", justify="right"))
    for name, config in job.find_configs(model).items():
        size = job.measure_size(config, image_size, image_size)
        table.add_row(escape(name), f"{size.parameters:,}", f"{size.macs / 1e9:.3f}")
    console.print(table)
    console.print(f"{job.MACS_CONVENTION} For one image of {image_size} x {image_size} pixels.", soft_wrap=False)
    for name, value in job.describe_environment().items():
        console.print(f"  {name:<16}{value}")


@app.command()
def convert(
    source: Annotated[
        str, typer.Argument(help="A `.pth`, `.pth.tar` or `.safetensors` file, or a repository on the Hub.")
    ],
    output_dir: Annotated[Path, typer.Argument(help="Directory to write. It must not exist or be empty.")],
    weights: Annotated[
        Literal["raw", "ema"] | None,
        typer.Option(
            help="Which weights of a checkpoint with both.", show_default="ema where the checkpoint has them"
        ),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Number format of the copy.")] = "float32",
    file: Annotated[
        str | None, typer.Option(help="The file in a repository that holds several checkpoints.", show_default=False)
    ] = None,
) -> None:
    """Converts a checkpoint of the authors for `from_pretrained`.

    Sizes, variant and number of classes are read off the tensors. Files that want to run code are refused.

    Examples:

        evmamba convert TerryPei/EfficientVMamba-Tiny efficientvmamba-tiny

        evmamba convert checkpoint.pth.tar efficientvmamba-tiny-fp16 --weights raw --dtype float16
    """
    from transformers.utils import logging

    from hub_scripts.convert import convert

    logging.disable_progress_bar()
    conversion = convert(source, output_dir, weights=weights, dtype=dtype, file_name=file)
    console.print(f"[bold green]Converted[/] {escape(source)}")
    console.print(f"  variant     {conversion.variant or 'of no published size'}")
    console.print(f"  parameters  {conversion.num_parameters:,}")
    console.print(f"  weights     {conversion.weights}, {dtype}")
    console.print(f"  classes     {'none, a backbone' if conversion.num_labels is None else conversion.num_labels}")
    console.print(f"  written to  {escape(str(output_dir))}")
    if conversion.num_labels is not None:
        console.print(f"Try it: [bold]evmamba classify IMAGE --model {escape(str(output_dir))}[/]")


def main() -> None:
    """Runs the command line. A `UserError` becomes one message on stderr and exit code 1."""
    try:
        app()
    except UserError as error:
        error_console.print(f"[bold red]Error:[/] {escape(str(error))}")
        sys.exit(1)


if __name__ == "__main__":
    main()
