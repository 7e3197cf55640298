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

import typer
from rich.console import Console

from evmamba_hub.errors import Notice, ProcessNotice, exit_on_user_error, literal, translate_lost_process


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


def create_app(help: str | None = None) -> typer.Typer:
    """Return a command line without commands."""
    return typer.Typer(
        help=help,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode="markdown",
        pretty_exceptions_enable=False,
    )


def run_app(app: typer.Typer) -> None:
    """Run a command line. A `UserError` becomes one line on stderr and exit code 1, a `Notice` one line."""
    escape_what_stdout_cannot_encode()
    with exit_on_user_error(), translate_lost_process(), show_notices():
        app()
