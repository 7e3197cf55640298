"""The two consoles of the command line: results go to stdout, progress and errors go to stderr.

Names of files and labels may hold markup, emoji codes and control characters: show them with `literal`.
"""

import io
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console

from evmamba_hub.errors import Notice, ProcessNotice, literal


console = Console(highlight=False, soft_wrap=True, emoji=False)
error_console = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)


def escape_what_stdout_cannot_encode() -> None:
    """Let stdout escape characters that its encoding lacks, as stderr does."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


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
            error_console.print("[yellow]Note:[/]", literal(message))
        else:
            show_others(message, category, filename, lineno, file, line)

    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        warnings.showwarning = show
        yield


def leave_notices_to_main_process(is_main_process: bool) -> None:
    """Hide the notices of other processes, apart from each `ProcessNotice`. Call it in commands that share work."""
    if not is_main_process:
        warnings.filterwarnings("ignore", category=Notice)
        warnings.filterwarnings("default", category=ProcessNotice)
