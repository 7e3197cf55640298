"""The two consoles of the command line: results go to stdout, progress and errors go to stderr."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.markup import escape

from evmamba_hub.errors import Notice


console = Console(highlight=False, soft_wrap=True)
error_console = Console(stderr=True, highlight=False, soft_wrap=True)


@contextmanager
def show_notices() -> Iterator[None]:
    """Show each `Notice` as a line on stderr. Hide what Pillow says about files, of which it reads the images."""
    show_others = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, Notice):
            error_console.print(f"[yellow]Note:[/] {escape(str(message))}")
        else:
            show_others(message, category, filename, lineno, file, line)

    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        warnings.showwarning = show
        yield
