"""Fetch transformers' common test suites from its source distribution. The installed package does not have them.

The tests call this module. To download ahead of time, run `python tests/transformers_suites/fetch.py`.
"""

import re
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path


CACHE = Path(__file__).resolve().parents[2] / ".cache"


def fetch_suites() -> Path:
    """Return the directory with the `tests/` of the installed transformers. Download it if it is missing."""
    release = f"transformers-{version('transformers')}"
    folder = CACHE / release
    if folder.is_dir():
        return folder

    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
        download(release.replace("-", "==", 1), temporary)
        partial = Path(temporary, release)
        extract(Path(temporary, f"{release}.tar.gz"), partial)
        try:
            partial.rename(folder)  # atomic, so a directory of this name is always complete
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster
                raise
    return folder


def download(requirement: str, destination: str):
    options = ["-qq", "--no-deps", "--no-binary", "transformers", "--dest", destination]
    pip = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, requirement], capture_output=True, text=True
    )
    if pip.returncode != 0:
        raise ConnectionError(f"pip could not download the source distribution of {requirement}:\n{pip.stderr}")


def extract(archive: Path, folder: Path):
    tests = folder / "tests"
    with tarfile.open(archive) as tar:
        for member in tar:
            if match := re.fullmatch(r"[^/]+/tests/(\w+\.py)", member.name):
                tests.mkdir(parents=True, exist_ok=True)
                (tests / match[1]).write_bytes(tar.extractfile(member).read())

    # the suites open these files at import. Empty packages point them to the installed transformers.
    (tests / "__init__.py").touch()
    (folder / "src/transformers").mkdir(parents=True)
    (folder / "src/transformers/__init__.py").touch()
    (tests / "utils").mkdir()
    (tests / "utils/tiny_model_summary.json").write_text("{}")


if __name__ == "__main__":
    print(fetch_suites())
