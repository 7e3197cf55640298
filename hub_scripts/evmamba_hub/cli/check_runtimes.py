"""`evmamba check-runtimes`"""

from collections.abc import Iterator, Sequence
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
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
    the median latency of one image of the model's own size. The runtimes take turns, after all of them are built and
    checked. So a slow moment of the machine affects all of them. Compilers take minutes.

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
    reports = compare_runtimes(model, only or list(RUNTIMES), revision, track=track)
    table = Table(
        "runtime",
        Column("max difference", justify="right"),
        Column("ms for one image", justify="right"),
        title=literal(model, "table.title"),
        title_justify="left",
    )
    for report in reports:
        if report.missing is None:
            table.add_row(report.runtime, f"{report.difference:.2g}", f"{report.milliseconds:.1f}")
    console.print(table)
    for report in reports:
        if report.missing is not None:
            console.print(literal(f"Skipped: {report.runtime}: {report.missing}"))


def track(items: Sequence, activity: str) -> Iterator:
    """Yield items, and show a bar that names the current one."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=error_console, transient=True) as progress:
        task = progress.add_task(activity, total=len(items))
        for item in items:
            progress.update(task, description=f"{activity} {item}")
            yield item
            progress.advance(task)
