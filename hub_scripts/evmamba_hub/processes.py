"""Errors of the processes that accelerate starts for one command: if one process fails, none waits for it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from evmamba_hub.errors import UserError, to_line


Result = TypeVar("Result")


def gather_problem(problem: str | None) -> str | None:
    """Return the first problem of any process, on all processes. Call it on all processes."""
    from accelerate.utils import gather_object

    return next(filter(None, gather_object([problem])), None)


@contextmanager
def failing_together() -> Iterator[None]:
    """Raise the `UserError` of a process on all processes. Enter the block on all processes."""
    problem = None
    try:
        yield
    except UserError as error:
        problem = to_line(error)
    if problem := gather_problem(problem):
        raise UserError(problem)


def call_on_main_first(is_main_process: bool, function: Callable[[], Result]) -> Result:
    """Call a function on the main process, then on the others, which find its downloads. Call it on all processes.

    Args:
        is_main_process: Whether this is the main process, of all or of its machine.
        function: The function to call. It must not wait for other processes.

    Returns:
        The result of this process's call.

    Raises:
        UserError: On all processes, if a call raises it.
    """
    for is_turn in (is_main_process, not is_main_process):
        with failing_together():
            if is_turn:
                result = function()
    return result
