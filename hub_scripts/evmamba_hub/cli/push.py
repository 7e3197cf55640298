"""`evmamba push`"""

from pathlib import Path
from typing import Annotated

import typer

from evmamba_hub.cli.options import CreatePrOption, DryRunOption, MessageOption, PrivateOption
from evmamba_hub.cli.uploads import UPLOAD_MESSAGE, report_upload, show_files


def push(
    model_dir: Annotated[Path, typer.Argument(help="Folder that `save_pretrained` or `evmamba convert` wrote.")],
    repo_id: Annotated[
        str, typer.Argument(help="Repository on the Hub, as `user/name`. Created if it does not exist.")
    ],
    private: PrivateOption = False,
    message: MessageOption = UPLOAD_MESSAGE,
    revision: Annotated[
        str | None, typer.Option(help="Branch to commit to. Created if it does not exist.", show_default="main")
    ] = None,
    create_pr: CreatePrOption = False,
    dry_run: DryRunOption = False,
    base_model: Annotated[
        str | None, typer.Option(help="For the card: the model that was fine-tuned.", show_default=False)
    ] = None,
    dataset: Annotated[
        list[str] | None, typer.Option(help="For the card: a dataset of the training, by its id.", show_default=False)
    ] = None,
    license: Annotated[
        str | None, typer.Option(help="For the card: the licence, as the Hub calls it.", show_default=False)
    ] = None,
    results: Annotated[
        Path | None, typer.Option(help="For the card: a file that `evmamba evaluate` wrote.", show_default=False)
    ] = None,
) -> None:
    """Uploads a model to the Hub: weights, configuration, image processor, card and the network's code, in one commit.

    A README.md in the folder is the card; without one, a card is rendered. Earlier weights that would be loaded in
    place of these are deleted in the repository, variants like `model.fp16.safetensors` and all other files stay. When
    an upload breaks off, the repository is as it was, and the same command completes it. Log in with `hf auth login`
    or set `HF_TOKEN`.

    Examples:

        evmamba push efficientvmamba-tiny someone/efficientvmamba-tiny --dry-run

        evmamba push flowers someone/flowers --base-model someone/efficientvmamba-tiny --license apache-2.0
    """
    from evmamba_hub.publish.card import CardDetails, read_results
    from evmamba_hub.publish.push import WEIGHTS_PATTERNS, collect_model_files, push_model

    details = None
    if any([base_model, dataset, license, results]):
        details = CardDetails(
            license=license,
            base_model=base_model,
            datasets=dataset or [],
            results=[] if results is None else read_results(results),
        )
    files = collect_model_files(model_dir, repo_id, details)
    if dry_run:
        show_files(repo_id, files, WEIGHTS_PATTERNS)
    else:
        report_upload(
            push_model(repo_id, files, message=message, private=private, revision=revision, create_pr=create_pr)
        )
