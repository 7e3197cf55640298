"""`evmamba info`"""

from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Column, Table

from evmamba_hub.cli.console import console


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
    from evmamba_hub.info import MACS_CONVENTION, describe_environment, find_configs, measure_size

    table = Table("network", Column("parameters", justify="right"), Column("GMACs", justify="right"))
    for name, config in find_configs(model).items():
        size = measure_size(config, image_size, image_size)
        table.add_row(escape(name), f"{size.parameters:,}", f"{size.macs / 1e9:.3f}")
    console.print(table)
    console.print(f"{MACS_CONVENTION} For one image of {image_size} x {image_size} pixels.", soft_wrap=False)
    for name, value in describe_environment().items():
        console.print(f"  {name:<16}{value}")
