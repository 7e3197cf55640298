"""`evmamba push-kernel`"""

from typing import Annotated

import typer

from evmamba_hub.cli.options import CreatePrOption, DryRunOption, MessageOption, PrivateOption
from evmamba_hub.cli.uploads import report_upload, show_files


def push_kernel(
    repo_id: Annotated[str, typer.Argument(help="Kernel on the Hub, as `user/name`. Created if it does not exist.")],
    private: PrivateOption = False,
    message: MessageOption = "Upload the operators with evmamba push-kernel",
    create_pr: CreatePrOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Upload the operators to the Kernel Hub.

    The package `kernels` loads them from there, without this package:

        get_kernel("someone/evmamba-kernels", version=0, trust_remote_code=True)

    Each backend of PyTorch that has kernels gets a build. One commit uploads builds and card to the branch of the
    version, and deletes files of earlier builds there. A second commit uploads the card to the main branch.
    `--create-pr` opens a pull request for each branch. An interrupted upload leaves a branch as it was. Run the same
    command again to complete it.

    The Hub must have granted you access to kernels. Log in with `hf auth login`, or set `HF_TOKEN`.

    Examples:

        evmamba push-kernel someone/evmamba-kernels --dry-run

        evmamba push-kernel someone/evmamba-kernels
    """
    from evmamba_hub.publish import push_kernel as job

    files = job.collect_kernel_files(repo_id)
    if dry_run:
        show_files(repo_id, files, job.STALE_PATTERNS)
        return
    uploads = job.push_kernel(repo_id, files, message=message, private=private, create_pr=create_pr)
    for result in [each for each in uploads if each.changed] or uploads[:1]:
        report_upload(result)
