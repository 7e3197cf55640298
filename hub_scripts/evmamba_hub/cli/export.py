"""`evmamba export`"""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich import box
from rich.markup import escape
from rich.table import Column, Table

from evmamba_hub.cli.console import console
from evmamba_hub.cli.options import RevisionOption


def export(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of the model.")],
    output: Annotated[Path, typer.Argument(help="File to write, `.onnx` or `.pt2`. An older one is replaced.")],
    format: Annotated[
        Literal["onnx", "torch-export", "aoti"],
        typer.Option(
            help="ONNX; a graph that PyTorch loads without this package; or a compiled one that calls its kernels."
        ),
    ] = "onnx",
    image_size: Annotated[
        tuple[int, int] | None,
        typer.Option(min=1, help="Height and width of all images.", show_default="images of any size"),
    ] = None,
    dtype: Annotated[
        Literal["float32", "float16", "int8"],
        typer.Option(help="Number format; `int8` is for ONNX, and for the weights of linear and pointwise layers."),
    ] = "float32",
    revision: RevisionOption = None,
) -> None:
    """Writes a classifier as one file for another runtime, once its logits have been compared with PyTorch's.

    ONNX files need nothing but standard operators, of opset 18, and carry labels and preprocessing in their metadata.
    Needs the extra `export` of this package.

    Examples:

        evmamba export efficientvmamba-tiny efficientvmamba-tiny.onnx

        evmamba export efficientvmamba-tiny efficientvmamba-tiny.pt2 --format aoti --image-size 224 224
    """
    from transformers.utils import logging

    from evmamba_hub.export.export import export_model

    logging.disable_progress_bar()
    with console.status("Exporting"):
        result = export_model(model, output, format, image_size=image_size, dtype=dtype, revision=revision)
    table = Table("images", Column("largest difference of a logit", justify="right"), box=box.SIMPLE_HEAD)
    for (batch_size, height, width), difference in result.differences.items():
        table.add_row(f"{batch_size} x {height} x {width}", f"{difference:.2g}")
    console.print(f"[bold green]Exported[/] {escape(str(output))}, {output.stat().st_size:,} bytes, {dtype}")
    console.print(f"  takes  {result.images}")
    console.print(table)
