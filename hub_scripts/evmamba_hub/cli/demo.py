"""`evmamba demo`"""

import os
from typing import Annotated

import typer

from evmamba_hub.cli.options import OptimizeOption
from evmamba_hub.errors import require


def demo(
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Directory or Hub id of a model. The first is shown. Repeat the option to compare models.",
            show_default="the bundled model of handwritten digits",
        ),
    ] = None,
    allow_any_model: Annotated[
        bool,
        typer.Option(
            "--allow-any-model",
            help="Let visitors load any model from the Hub or this disk. Avoid it on public addresses.",
        ),
    ] = False,
    optimize: OptimizeOption = True,
    host: Annotated[
        str,
        typer.Option(help="Address to listen on. Use `0.0.0.0` for the whole network.", envvar="GRADIO_SERVER_NAME"),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=1, max=65535, help="Port to listen on.", envvar="GRADIO_SERVER_PORT")
    ] = 7860,
) -> None:
    """Show a model in the browser: classify, look inside, compare, measure.

    A segmentation model or a detector is shown alone, with the regions or the boxes that it finds.

    The bundled model of handwritten digits is always offered. On CPUs, classifications and latencies come from
    optimized copies of the models. Explanations come from the shown model as it is.

    Other variables of Gradio hold too, such as `GRADIO_ROOT_PATH` behind a proxy. The command needs the extra `demo`:
    run `pip install ".[demo]"` in a clone of the repository.

    Examples:

        evmamba demo

        evmamba demo --model efficientvmamba-tiny --model someone/efficientvmamba-small --port 8000

        evmamba demo --model detector
    """
    for name in ("GRADIO_SERVER_NAME", "GRADIO_SERVER_PORT"):
        os.environ.pop(name, None)  # the options hold them; Gradio's import would fail at wrong ones
    require("gradio", extra="demo")
    from transformers.utils import logging

    from evmamba_demo.bundled import find_bundled_model
    from evmamba_demo.interface import launch

    logging.disable_progress_bar()
    launch([*(model or []), str(find_bundled_model())], allow_any_model, host, port, optimize)
