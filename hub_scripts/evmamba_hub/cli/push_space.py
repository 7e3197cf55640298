"""`evmamba push-space`"""

from pathlib import Path
from typing import Annotated

import typer

from evmamba_hub.cli.options import DryRunOption, MessageOption, PrivateOption
from evmamba_hub.cli.uploads import report_upload, show_files


def push_space(
    repo_id: Annotated[str, typer.Argument(help="Space on the Hub, as `user/name`. Created if it does not exist.")],
    model: Annotated[str, typer.Option(help="The model that the Space shows, by its id on the Hub.")],
    folder: Annotated[
        Path | None,
        typer.Option(help="Folder of a Gradio Space to upload instead.", show_default="the demo of this package"),
    ] = None,
    private: PrivateOption = False,
    message: MessageOption = "Upload the demonstration with evmamba push-space",
    dry_run: DryRunOption = False,
) -> None:
    """Uploads the demonstration as a Gradio Space.

    The Space learns of its model by the variable `EVMAMBA_MODEL`, and its card names it.

    Examples:

        evmamba push-space someone/efficientvmamba --model someone/efficientvmamba-tiny
    """
    from evmamba_demo.bundled import find_space_files
    from evmamba_hub.publish.push_space import collect_space_files, find_files, upload_space

    own_files = find_space_files() if folder is None else find_files(folder)
    files = collect_space_files(own_files, repo_id, model)
    if dry_run:
        show_files(repo_id, files)
    else:
        report_upload(upload_space(repo_id, files, model, message=message, private=private))
