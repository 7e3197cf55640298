"""`evmamba push`"""

import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from evmamba_hub.cli.console import console
from evmamba_hub.cli.options import CreatePrOption, DryRunOption, MessageOption, PrivateOption
from evmamba_hub.cli.uploads import UPLOAD_MESSAGE, get_card, report_upload, show_files
from evmamba_hub.errors import Notice


def push(
    model_dir: Annotated[
        Path, typer.Argument(help="Directory that `save_pretrained`, `evmamba convert` or `evmamba train` wrote.")
    ],
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
    with_onnx: Annotated[
        bool, typer.Option("--with-onnx", help="Export the classifier to ONNX, and upload these files too.")
    ] = False,
    base_model: Annotated[
        str | None, typer.Option(help="For the card: Hub id of the model that was fine-tuned.", show_default=False)
    ] = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option(help="For the card: Hub id of a training dataset. Repeat for several.", show_default=False),
    ] = None,
    license: Annotated[
        str | None, typer.Option(help="For the card: the license, by its identifier on the Hub.", show_default=False)
    ] = None,
    results: Annotated[
        Path | None, typer.Option(help="For the card: file that `evmamba evaluate` wrote.", show_default=False)
    ] = None,
) -> None:
    """Upload a model to the Hub in one commit.

    The commit holds weights, configuration, image processor, card and the network's code. A README.md in the directory
    is the card. The repository's id replaces the placeholder in a card of `evmamba train`. Without a README.md, a card
    is rendered. The card replaces that on the Hub, with all changes made there. Log in with `hf auth login`, or set
    `HF_TOKEN`.

    Earlier weights that `from_pretrained` would load in place of the new ones are deleted. Variants such as
    `model.fp16.safetensors` and all other files stay. An interrupted upload leaves the repository as it was. Run the
    same command again to complete it.

    `--with-onnx` adds ONNX files in float32, float16 and int8, which transformers.js loads in browsers and Node.js.
    The uploaded card then shows how to use them. They replace those of an earlier upload. The option needs the extra
    `export`.

    Examples:

        evmamba push efficientvmamba-tiny someone/efficientvmamba-tiny --dry-run

        evmamba push efficientvmamba-tiny someone/efficientvmamba-tiny --with-onnx

        evmamba push flowers-model someone/flowers --base-model someone/efficientvmamba-tiny --license apache-2.0
    """
    from transformers.utils import logging

    from evmamba_hub.publish.card import CardDetails, read_results
    from evmamba_hub.publish.card_metadata import find_other_id
    from evmamba_hub.publish.onnx_folder import added_onnx_files
    from evmamba_hub.publish.push import choose_stale_patterns, collect_model_files, push_model

    logging.disable_progress_bar()
    details = None
    if any([base_model, dataset, license, results]):
        details = CardDetails(
            license=license,
            base_model=base_model,
            datasets=dataset or [],
            results=[] if results is None else read_results(results, model_dir, repo_id),
        )
    files = collect_model_files(model_dir, repo_id, details)
    other = find_other_id(get_card(files), repo_id)  # before the examples of the ONNX files, which load repo_id
    with ExitStack() as temporary_files:
        if with_onnx:
            with console.status("Exporting") as status:
                files = temporary_files.enter_context(
                    added_onnx_files(
                        files, model_dir, repo_id, before_file=lambda name: status.update(f"Exporting {name}")
                    )
                )
        if dry_run:
            show_files(repo_id, files, choose_stale_patterns(files))
        else:
            report_upload(
                push_model(repo_id, files, message=message, private=private, revision=revision, create_pr=create_pr)
            )
    if other is not None:
        notice = f"the examples in the card load {other}: put {repo_id} there if they are for this model"
        warnings.warn(notice, Notice, stacklevel=1)
