"""The command line `evmamba`: arguments and help of every command. Jobs are imported when their command runs."""

import sys

import typer
from rich.console import Console

from hub_scripts.errors import UserError


app = typer.Typer(
    help="EfficientVMamba on the Hugging Face Hub.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


@app.callback()
def root() -> None:
    """Keeps `evmamba` a group of commands while there is only one."""


def main() -> None:
    """Runs the command line. A `UserError` becomes one message on stderr and exit code 1."""
    try:
        app()
    except UserError as error:
        Console(stderr=True).print(f"[bold red]Error:[/] {error}", markup=True, highlight=False, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
