"""Create virtual environments with a subset of the installed distributions, without a download."""

import sysconfig
from collections.abc import Iterable
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement


def find_requirements(name: str, found: set[str]) -> set[str]:
    """Return a distribution and its requirements, recursively."""
    if name not in found:
        found.add(name)
        for line in distribution(name).requires or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                find_requirements(requirement.name, found)
    return found


def link_distributions(environment: Path, names: Iterable[str]) -> None:
    """Link installed distributions and their requirements into a virtual environment."""
    paths = sysconfig.get_paths("venv", vars={"base": str(environment)})
    for name in set().union(*(find_requirements(name, set()) for name in names)):
        found = distribution(name)
        for top in {Path(file).parts[0] for file in found.files} - {"..", "__pycache__"}:
            link = Path(paths["purelib"], top)
            if not link.exists():
                link.symlink_to(found.locate_file(top))
