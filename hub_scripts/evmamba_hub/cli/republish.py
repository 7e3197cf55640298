"""`evmamba republish`"""

from typing import Annotated

import typer

from evmamba_hub.cli.console import console
from evmamba_hub.cli.options import DryRunOption, PrivateOption
from evmamba_hub.cli.uploads import UPLOAD_MESSAGE, report_upload, show_files
from evmamba_hub.errors import literal


def republish(
    namespace: Annotated[str, typer.Argument(help="User or organization on the Hub that will own the repositories.")],
    private: PrivateOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Convert all of the authors' checkpoints, and upload them with their cards.

    The manifest `evmamba_hub/publish/data/checkpoints.yaml` lists them. Log in with `hf auth login`, or set
    `HF_TOKEN`.

    Examples:

        evmamba republish someone --dry-run

        evmamba republish someone --private
    """
    from evmamba_hub.publish.push import WEIGHTS_PATTERNS, push_model
    from evmamba_hub.publish.republish import convert_all

    for source, repo_id, files in convert_all(namespace):
        console.print("[bold green]Converted[/]", literal(source))
        if dry_run:
            show_files(repo_id, files, WEIGHTS_PATTERNS)
        else:
            report_upload(push_model(repo_id, files, message=UPLOAD_MESSAGE, private=private))
