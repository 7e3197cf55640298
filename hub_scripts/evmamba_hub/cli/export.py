"""`evmamba export`"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich import box
from rich.table import Column, Table

from evmamba_hub.cli.console import console
from evmamba_hub.cli.options import RevisionOption
from evmamba_hub.errors import UserError, literal


if TYPE_CHECKING:
    from evmamba_hub.export.export import ExportReport


def export(
    model: Annotated[str, typer.Argument(help="Directory or Hub id of the model.")],
    output: Annotated[
        Path,
        typer.Argument(
            help="File to write, `.onnx` or `.pt2`. An existing file is replaced. For `onnx-hub`, a new or empty "
            "directory."
        ),
    ],
    format: Annotated[
        Literal["onnx", "onnx-hub", "torch-export", "aoti"],
        typer.Option(
            help="`onnx`, `onnx-hub` for a directory that transformers.js loads, `torch-export` for PyTorch alone, or "
            "`aoti` for compiled code with this package's kernel."
        ),
    ] = "onnx",
    image_size: Annotated[
        tuple[int, int] | None,
        typer.Option(min=1, help="Height and width to fix, in pixels.", show_default="any size"),
    ] = None,
    dtype: Annotated[
        Literal["float32", "float16", "int8"] | None,
        typer.Option(
            help="Dtype of the file. With `int8`, for ONNX only, linear layers have 8-bit weights.",
            show_default="float32, all three for onnx-hub",
        ),
    ] = None,
    half_inputs: Annotated[
        bool, typer.Option("--half-inputs", help="Take images and return logits in float16, for files in float16.")
    ] = False,
    revision: RevisionOption = None,
) -> None:
    """Export a classifier for another runtime.

    The command compares the logits of a file with PyTorch's before it leaves the file on the disk. ONNX files use
    standard operators of opset 18. Their metadata hold the labels and the preprocessing.

    The format `onnx-hub` writes a directory for the Hub: ONNX files in float32, float16 and int8, configuration, image
    processor and card. transformers.js loads it in browsers and Node.js.

    The ONNX formats need the extra `export`: run `pip install ".[export]"` in a clone of the repository. The format
    `aoti` needs a C++ compiler.

    Examples:

        evmamba export efficientvmamba-tiny efficientvmamba-tiny.onnx

        evmamba export efficientvmamba-tiny efficientvmamba-tiny-onnx --format onnx-hub

        evmamba export efficientvmamba-tiny efficientvmamba-tiny-compiled.pt2 --format aoti --image-size 224 224
    """
    from transformers.utils import logging

    from evmamba_hub.export.export import export_model
    from evmamba_hub.publish.onnx_folder import export_onnx_folder

    logging.disable_progress_bar()
    with console.status("Exporting") as status:
        if format == "onnx-hub":
            if dtype is not None or half_inputs:
                raise UserError(
                    "the format onnx-hub writes a file of every dtype, which take float32: leave --dtype and "
                    "--half-inputs out"
                )
            reports = export_onnx_folder(
                model,
                output,
                image_size=image_size,
                revision=revision,
                before_file=lambda name: status.update(f"Exporting {name}"),
            )
            written = f"{output}, {len(reports)} ONNX files with configuration, image processor and card"
        else:
            dtype = dtype or "float32"
            report = export_model(
                model, output, format, image_size=image_size, dtype=dtype, half_inputs=half_inputs, revision=revision
            )
            reports = {output.name: report}
            written = f"{output}, {output.stat().st_size:,} bytes, {dtype}"
    console.print("[bold green]Exported[/]", literal(written))
    show_differences(reports)


def show_differences(reports: "dict[str, ExportReport]") -> None:
    """Show what images exported files take, and the largest difference of a logit by image size and file."""
    first = next(iter(reports.values()))
    console.print(f"  takes  {first.images}")
    table = Table(
        "file",
        *(Column(" x ".join(map(str, size)), justify="right") for size in first.differences),
        title="largest difference of a logit, by batch size, height and width",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for name, report in reports.items():
        table.add_row(literal(name), *(f"{difference:.2g}" for difference in report.differences.values()))
    console.print(table)
