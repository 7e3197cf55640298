"""A hook of mkdocs: the site gets copies of the repository's files that pages link to.

Pages link to files outside of `docs/` by relative paths, such as `../benchmarks/RESULTS.md`, which work where the
repository is shown. In the site, these files stand at their path in the repository, and so do files that they link to.
"""

import re
from pathlib import Path, PurePosixPath
from posixpath import normpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page


LINK = re.compile(r"(?<=\]\()[^)#\s]+(?=[)#])|(?<=src=\")[^\"]+|(?<=srcset=\")[^\"]+")


def find_targets(markdown: str, folder: PurePosixPath) -> set[str]:
    """Finds relative links of a file, as paths from the root of the site or the repository."""
    links = {link for link in LINK.findall(markdown) if ":" not in link and not link.startswith("/")}
    return {normpath(folder / link) for link in links}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the files that pages link to, and those that these link to."""
    root = Path(config.docs_dir).parent
    waiting = set()
    for file in files.documentation_pages():
        waiting |= find_targets(file.content_string, PurePosixPath("docs", file.src_uri).parent)
    while waiting:
        target = waiting.pop()
        if target.startswith("docs/") or target in files.src_uris or not (root / target).is_file():
            continue
        files.append(File(target, str(root), config.site_dir, config.use_directory_urls))
        if target.endswith(".md"):
            waiting |= find_targets((root / target).read_text(encoding="utf-8"), PurePosixPath(target).parent)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links out of `docs/`, and links into it, into links inside of the site."""
    if (Path(config.docs_dir) / page.file.src_uri).is_file():
        return re.sub(r"(?<=\]\()\.\./", "", markdown)
    return re.sub(r"(\]\(|src=\"|srcset=\")((?:\.\./)*)docs/", r"\1\2", markdown)
