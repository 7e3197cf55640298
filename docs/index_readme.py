"""Print README.md with absolute links, for the page of a package index. An index has no files beside the page.

Example:
    python docs/index_readme.py https://github.com/OWNER/NAME v0.1.0
"""

import re
import sys
from pathlib import Path


README = Path(__file__).parents[1] / "README.md"
LINK = re.compile(r"(\]\(|src=\"|srcset=\")(?!#|[a-z]+:)([^)\"]+)")
PICTURE_SUFFIXES = {".png", ".svg"}


def make_links_absolute(readme: str, repository: str, revision: str) -> str:
    """Return the text with the addresses of files and raw pictures in a repository on GitHub or the Hub."""

    def replace(match: re.Match) -> str:
        kind = "raw" if Path(match[2]).suffix in PICTURE_SUFFIXES else "blob"
        return f"{match[1]}{repository.rstrip('/')}/{kind}/{revision}/{match[2]}"

    return LINK.sub(replace, readme)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    print(make_links_absolute(README.read_text(encoding="utf-8"), *sys.argv[1:]), end="")
