"""`evmamba check-runtimes`"""

from typing import Annotated

import typer
from rich.progress import track
from rich.table import Column, Table

from evmamba_hub.cli.console import console, error_console
from evmamba_hub.cli.options import RevisionOption
from evmamba_hub.errors import UserError, literal


def check_runtimes(
    model: Annotated[str, typer.Argument(help="Directory or Hub id of the model.")],
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="Runtime to run, by its name in the table. Repeat the option for several.", show_default="all"
        ),
    ] = None,
    revision: RevisionOption = None,
) -> None:
    """Run a classifier in every installed runtime, and compare logits and latency.

    The table shows the maximum difference of a logit to PyTorch in float64, over images of three sizes. It also shows
    the median latency of one image of the model's own size. Compilers take minutes.

    ONNX Runtime needs the extra `export`. OpenVINO needs the extra `openvino`, which contains the former: run
    `pip install ".[openvino]"` in a clone of the repository.

    Examples:

        evmamba check-runtimes efficientvmamba-tiny

        evmamba check-runtimes efficientvmamba-tiny --only PyTorch --only "ONNX Runtime"
    """
    from transformers.utils import logging

    from evmamba_hub.export.runtimes import RUNTIMES, compare_runtimes

    unknown = [name for name in only or [] if name not in RUNTIMES]
    if unknown:
        raise UserError(f"unknown runtime {unknown[0]!r}: choose one of {', '.join(map(repr, RUNTIMES))}")
    logging.disable_progress_bar()
    table = Table(
        "runtime",
        Column("max difference", justify="right"),
        Column("ms for one image", justify="right"),
        title=literal(model, "table.title"),
        title_justify="left",
    )
    names = only or list(RUNTIMES)
    checks = compare_runtimes(model, names, revision)
    missing = []
    for check in track(checks, "Checking", len(names), console=error_console, transient=True):
        if check.missing is None:
            table.add_row(check.runtime, f"{check.difference:.2g}", f"{check.milliseconds:.1f}")
        else:
            missing.append(check)
    console.print(table)
    for check in missing:
        console.print(literal(f"Skipped: {check.runtime}: {check.missing}"))
