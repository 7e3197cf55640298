"""`evmamba info`"""

from typing import Annotated

import typer
from rich.table import Column, Table

from evmamba_hub.cli.console import console
from evmamba_hub.errors import literal


def info(
    model: Annotated[
        str | None,
        typer.Argument(help="Directory or Hub id of the model.", show_default="the published networks"),
    ] = None,
    image_size: Annotated[
        int, typer.Option(min=1, help="Side of the image in pixels, for which GMACs are counted.")
    ] = 224,
) -> None:
    """Show the size of a network, and the active backend on this machine.

    Examples:

        evmamba info

        evmamba info efficientvmamba-tiny --image-size 384

        evmamba info segmenter --image-size 512
    """
    from evmamba_hub.info import MACS_CONVENTION, describe_environment, find_networks, measure_size

    table = Table("network", Column("parameters", justify="right"), Column("GMACs", justify="right"))
    for name, (config, model_class) in find_networks(model).items():
        size = measure_size(config, image_size, image_size, model_class)
        table.add_row(literal(name), f"{size.parameters:,}", f"{size.macs / 1e9:.3f}")
    console.print(table)
    console.print(f"{MACS_CONVENTION} The image has {image_size} x {image_size} pixels.", soft_wrap=False)
    for name, value in describe_environment().items():
        console.print(f"  {name:<16}{value}")
