"""Errors that the user can fix, and the line that a command prints for them."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from rich.console import Console
from rich.markup import escape


class Notice(UserWarning):
    """A guess or a doubt that the user should know of. A command prints its message as one line, and continues."""


class UserError(Exception):
    """An error that the user can fix. Its message says what is wrong and what to do. A command prints nothing else."""


def require(*modules: str, extra: str) -> None:
    """Import optional modules, to find a missing package before the work begins.

    Args:
        modules: Import names.
        extra: The extra of this package that installs them.

    Raises:
        UserError: If a module is missing. The message names the package and the command that installs it.
    """
    for module in modules:
        try:
            import_module(module)
        except ModuleNotFoundError as error:
            package = (error.name or module).partition(".")[0]
            raise UserError(
                f'this needs the package {package}: run pip install ".[{extra}]" in a clone of the repository'
            ) from error


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turn a `UserError` into one line on stderr and exit code 1. Wrap the top level of a command in it."""
    try:
        yield
    except UserError as error:
        console = Console(stderr=True, highlight=False, soft_wrap=True)
        console.print(f"[bold red]Error:[/] {escape(str(error))}")
        sys.exit(1)
