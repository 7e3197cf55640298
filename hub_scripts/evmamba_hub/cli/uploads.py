"""The output of uploading commands: the files before the upload, and the result after it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Column, Table

from evmamba_hub.cli.console import console
from evmamba_hub.errors import literal
from evmamba_hub.files import read_content


if TYPE_CHECKING:
    from evmamba_hub.client import Files, Upload


UPLOAD_MESSAGE = "Upload EfficientVMamba with evmamba push"


def show_files(repo_id: str, files: "Files", replaced: Sequence[str] = ()) -> None:
    """Show the files to upload with their sizes in bytes, the patterns of the names to delete, and the card."""
    table = Table(
        "file", Column("bytes", justify="right"), title=literal(repo_id, "table.title"), title_justify="left"
    )
    sizes = {
        path: len(source) if isinstance(source, bytes) else source.stat().st_size
        for path, source in sorted(files.items())
    }
    for path, size in sizes.items():
        table.add_row(literal(path), f"{size:,}")
    table.add_section()
    table.add_row(f"{len(sizes)} files", f"{sum(sizes.values()):,}")
    console.print(table)
    if replaced:
        console.print(f"The upload deletes other files of these names: {', '.join(replaced)}")
    console.print(get_card(files), markup=False)


def get_card(files: "Files") -> str:
    """Return the text of the card among the files to upload."""
    return read_content(files["README.md"]).decode()


def report_upload(result: "Upload") -> None:
    """Show the URL of an upload, or that nothing has changed."""
    if result.changed:
        console.print("[bold green]Uploaded[/]", literal(result.url))
    else:
        console.print("Nothing has changed since the last upload: no commit was made")
