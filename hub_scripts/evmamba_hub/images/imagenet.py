"""The names and WordNet ids of the ImageNet-1k classes, in class order. README.md beside this file has the sources."""

from functools import cache
from pathlib import Path


@cache
def load_labels() -> list[str]:
    """Return the 1000 names, such as "tench, Tinca tinca"."""
    return read_lines("imagenet1k_labels.txt")


@cache
def load_synsets() -> list[str]:
    """Return the 1000 WordNet ids, such as "n01440764", which are also the names of ImageNet's directories."""
    return read_lines("imagenet1k_synsets.txt")


def read_lines(name: str) -> list[str]:
    return Path(__file__).with_name(name).read_text(encoding="utf-8").splitlines()
