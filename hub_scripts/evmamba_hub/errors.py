"""Errors that the user can fix, and the line that a command prints for them."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from packaging.version import Version
from rich.console import Console
from rich.text import Text


# control characters, line separators, characters that reorder a line, and bytes of file names that are not UTF-8
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

# in the messages of PyTorch's errors after another process of a run has ended
LOST_PROCESS = re.compile("closed by peer|reset by peer|broken pipe|remote process exited", re.IGNORECASE)


class Notice(UserWarning):
    """A guess or a doubt that the user should know of. A command prints its message as one line, and continues."""


class ProcessNotice(Notice):
    """A `Notice` that may come from one process alone, such as one about an image in its share."""


class UserError(Exception):
    """An error that the user can fix. Its message says what is wrong and what to do. A command prints nothing else."""


def require(*modules: str, extra: str) -> None:
    """Import optional modules, to find a missing package before the work begins.

    Args:
        modules: Import names.
        extra: The extra of this package that installs them.

    Raises:
        UserError: If a module is missing, or a package of the extra is too old. The message names the package and the
            command that installs it.
    """
    for module in modules:
        try:
            import_module(module)
        except ModuleNotFoundError as error:
            package = (error.name or module).partition(".")[0]
            raise UserError(
                f'this needs the package {package}: run pip install ".[{extra}]" in a clone of the repository'
            ) from error
    check_versions(extra)


def check_versions(extra: str = "") -> None:
    """Check that installed packages of the core, and of an extra, are as new as this package declares.

    Raises:
        UserError: If a package is older. The message names the oldest version that works.
    """
    try:
        requirements = [Requirement(line) for line in requires("efficientvmamba") or []]
    except PackageNotFoundError:  # a Space has copies of the code
        return
    for requirement in requirements:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            continue
        for bound in requirement.specifier:
            if bound.operator == ">=" and Version(found) < Version(bound.version):
                raise UserError(
                    f"this needs {requirement.name} {bound.version} or newer, found {found}: run "
                    f'pip install "{requirement.name}>={bound.version}"'
                )


def escape_unprintable(text: str) -> str:
    r"""Return a text without characters that a terminal would act on or cannot show, which become `\n` or `\xff`."""

    def escape_one(match: re.Match[str]) -> str:
        character = match[0]
        if "\udc80" <= character <= "\udcff":  # Python's stand-in for a byte
            return f"\\x{ord(character) - 0xDC00:x}"
        return character.encode("unicode_escape").decode()

    return UNPRINTABLE.sub(escape_one, text)


def literal(text: object, style: str = "") -> Text:
    """Return a text that Rich shows as it is, apart from what `escape_unprintable` escapes."""
    return Text(escape_unprintable(str(text)), style)


def to_line(error: UserError) -> str:
    """Return the message of an error without line breaks that messages of other libraries bring.

    Line breaks in names stay: they are escaped when the message is shown.
    """
    cause, text = error.__cause__, str(error.__cause__ or "")
    line = to_line(cause) if isinstance(cause, UserError) else " ".join(text.split())
    return str(error).replace(text, line) if text else str(error)


@contextmanager
def translate_lost_process() -> Iterator[None]:
    """Translate the error of PyTorch about another process that has ended into a `UserError`."""
    try:
        yield
    except RuntimeError as error:
        if not LOST_PROCESS.search(str(error)):
            raise
        raise UserError("another process of this run has ended: read its message") from error


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turn a `UserError` into one line on stderr and exit code 1. Wrap the top level of a command in it."""
    try:
        yield
    except UserError as error:
        console = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
        console.print("[bold red]Error:[/]", literal(to_line(error)))
        sys.exit(1)
