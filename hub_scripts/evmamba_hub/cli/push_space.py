"""`evmamba push-space`"""

from pathlib import Path
from typing import Annotated

import typer

from evmamba_hub.cli.options import DryRunOption, MessageOption, PrivateOption
from evmamba_hub.cli.uploads import report_upload, show_files


def push_space(
    repo_id: Annotated[str, typer.Argument(help="Space on the Hub, as `user/name`. Created if it does not exist.")],
    model: Annotated[str, typer.Option(help="Hub id of the model that the Space shows.")],
    folder: Annotated[
        Path | None,
        typer.Option(help="Directory of the Gradio Space to upload.", show_default="the demo of this package"),
    ] = None,
    private: PrivateOption = False,
    message: MessageOption = "Upload the demo with evmamba push-space",
    dry_run: DryRunOption = False,
) -> None:
    """Upload the demo as a Gradio Space.

    The Space's variable `EVMAMBA_MODEL` holds the id of its model, and its card links to the model. Log in with
    `hf auth login`, or set `HF_TOKEN`.

    Examples:

        evmamba push-space someone/efficientvmamba --model someone/efficientvmamba-tiny --dry-run

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
