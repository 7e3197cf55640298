"""Parts of sentences for users."""

from collections.abc import Sequence


def shorten(names: Sequence[str], limit: int = 5) -> str:
    """Return the first names of a list as text, and the number of the others."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit:,} more" if len(names) > limit else "")


def to_count(number: float, noun: str) -> str:
    """Return a number with its noun, such as "1 epoch" or "0.5 epochs"."""
    return f"1 {noun}" if number == 1 else f"{number:,} {noun}s".replace(".0 ", " ")
