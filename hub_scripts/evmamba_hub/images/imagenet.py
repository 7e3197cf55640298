"""The classes of ImageNet-1k: names and WordNet ids, in class order. README.md beside this file gives the sources."""

from functools import cache
from pathlib import Path


@cache
def load_labels() -> list[str]:
    """Returns the 1000 names, for example "tench, Tinca tinca"."""
    return read_lines("imagenet1k_labels.txt")


@cache
def load_synsets() -> list[str]:
    """Returns the 1000 WordNet ids, for example "n01440764", after which the folders of ImageNet are named."""
    return read_lines("imagenet1k_synsets.txt")


def read_lines(name: str) -> list[str]:
    return Path(__file__).with_name(name).read_text(encoding="utf-8").splitlines()
