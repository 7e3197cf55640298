"""Errors that a user can mend, and the one line that a command prints for them."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from rich.console import Console
from rich.markup import escape


class UserError(Exception):
    """An error that the user can mend. The message says what is wrong and what to do; a command prints only it."""


def require(*modules: str, extra: str) -> None:
    """Imports optional modules, so that a missing package is known before the work begins.

    Args:
        modules: import names.
        extra: the extra of this package that brings them.

    Raises:
        UserError: for the first package that is missing. The message gives the command that installs it.
    """
    for module in modules:
        try:
            import_module(module)
        except ModuleNotFoundError as error:
            package = (error.name or module).partition(".")[0]
            raise UserError(f'this needs the package {package}: pip install "efficientvmamba[{extra}]"') from error


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Wraps the top level of a command: a `UserError` becomes one line on stderr and exit code 1."""
    try:
        yield
    except UserError as error:
        console = Console(stderr=True, highlight=False, soft_wrap=True)
        console.print(f"[bold red]Error:[/] {escape(str(error))}")
        sys.exit(1)
