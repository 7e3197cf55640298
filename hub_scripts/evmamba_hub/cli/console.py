"""The two consoles of the command line: results go to stdout, progress and errors go to stderr."""

from rich.console import Console


console = Console(highlight=False, soft_wrap=True)
error_console = Console(stderr=True, highlight=False, soft_wrap=True)
