"""`evmamba export`"""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich import box
from rich.table import Column, Table

from evmamba_hub.cli.console import console
from evmamba_hub.cli.options import RevisionOption
from evmamba_hub.errors import literal


def export(
    model: Annotated[str, typer.Argument(help="Directory or Hub id of the model.")],
    output: Annotated[Path, typer.Argument(help="File to write, `.onnx` or `.pt2`. An existing file is replaced.")],
    format: Annotated[
        Literal["onnx", "torch-export", "aoti"],
        typer.Option(
            help="`onnx`, `torch-export` for PyTorch alone, or `aoti` for compiled code with this package's kernel."
        ),
    ] = "onnx",
    image_size: Annotated[
        tuple[int, int] | None,
        typer.Option(min=1, help="Height and width to fix, in pixels.", show_default="any size"),
    ] = None,
    dtype: Annotated[
        Literal["float32", "float16", "int8"],
        typer.Option(help="Dtype of the file. With `int8`, for ONNX only, linear layers have 8-bit weights."),
    ] = "float32",
    half_inputs: Annotated[
        bool, typer.Option("--half-inputs", help="Take images and return logits in float16, for files in float16.")
    ] = False,
    revision: RevisionOption = None,
) -> None:
    """Export a classifier as one file for another runtime.

    The command compares the logits of the file with PyTorch's before it leaves the file on the disk. ONNX files use
    standard operators of opset 18. Their metadata hold the labels and the preprocessing.

    The format `onnx` needs the extra `export`: run `pip install ".[export]"` in a clone of the repository. The format
    `aoti` needs a C++ compiler.

    Examples:

        evmamba export efficientvmamba-tiny efficientvmamba-tiny.onnx

        evmamba export efficientvmamba-tiny efficientvmamba-tiny-compiled.pt2 --format aoti --image-size 224 224
    """
    from transformers.utils import logging

    from evmamba_hub.export.export import export_model

    logging.disable_progress_bar()
    with console.status("Exporting"):
        result = export_model(
            model, output, format, image_size=image_size, dtype=dtype, half_inputs=half_inputs, revision=revision
        )
    table = Table("images", Column("largest difference of a logit", justify="right"), box=box.SIMPLE_HEAD)
    for (batch_size, height, width), difference in result.differences.items():
        table.add_row(f"{batch_size} x {height} x {width}", f"{difference:.2g}")
    console.print("[bold green]Exported[/]", literal(f"{output}, {output.stat().st_size:,} bytes, {dtype}"))
    console.print(f"  takes  {result.images}")
    console.print(table)
