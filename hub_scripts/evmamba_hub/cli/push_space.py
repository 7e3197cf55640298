"""`evmamba push-space`"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from evmamba_hub.cli.console import console
from evmamba_hub.cli.options import DryRunOption, MessageOption, PrivateOption
from evmamba_hub.cli.uploads import report_upload, show_files
from evmamba_hub.errors import UserError, literal


if TYPE_CHECKING:
    from evmamba_hub.client import Files


def push_space(
    repo_id: Annotated[str, typer.Argument(help="Space on the Hub, as `user/name`. Created if it does not exist.")],
    model: Annotated[
        str,
        typer.Option(
            help="Hub id of the model that the Space shows. With `--static`, also a directory of ONNX files."
        ),
    ],
    folder: Annotated[
        Path | None,
        typer.Option(help="Directory of the Gradio Space to upload.", show_default="the demo of this package"),
    ] = None,
    static: Annotated[
        bool, typer.Option("--static", help="Upload a page that classifies in the browser, with the model beside it.")
    ] = False,
    runtime: Annotated[
        Path | None,
        typer.Option(
            help="With `--static`: directory with the files of onnxruntime-web to upload beside the page.",
            show_default="visitors load them from jsDelivr",
        ),
    ] = None,
    save_to: Annotated[
        Path | None,
        typer.Option(help="New directory to write the Space to, instead of the upload.", show_default=False),
    ] = None,
    private: PrivateOption = False,
    message: MessageOption = "Upload the demo with evmamba push-space",
    dry_run: DryRunOption = False,
) -> None:
    """Upload the demo as a Gradio Space, or a page that classifies in the browser as a static Space.

    The Gradio Space's variable `EVMAMBA_MODEL` holds the id of its model. The card links to a model on the Hub. Log in
    with `hf auth login`, or set `HF_TOKEN`.

    With `--static`, no server computes. The Space holds the ONNX files of the model, and visitors' browsers run them.

    Examples:

        evmamba push-space someone/efficientvmamba --model someone/efficientvmamba-tiny --dry-run

        evmamba push-space someone/efficientvmamba --model someone/efficientvmamba-tiny

        evmamba push-space someone/in-your-browser --model efficientvmamba-tiny-onnx --static
    """
    from evmamba_hub.files import write_files
    from evmamba_hub.publish.push_space import upload_space
    from evmamba_hub.publish.static_space import STALE_PATTERNS, upload_static_space

    if static and folder is not None:
        raise UserError("--folder is a Gradio Space, and --static uploads another one: leave one of them out")
    if runtime is not None and not static:
        raise UserError("--runtime is for pages that classify in the browser: add --static")
    files = collect_static_page(repo_id, model, runtime) if static else collect_gradio_demo(repo_id, model, folder)
    if dry_run:
        show_files(repo_id, files, STALE_PATTERNS if static else [])
    elif save_to is not None:
        write_files(files, save_to)
        console.print("[bold green]Wrote[/]", literal(f"{len(files)} files to {save_to}"))
    elif static:
        report_upload(upload_static_space(repo_id, files, message=message, private=private))
    else:
        report_upload(upload_space(repo_id, files, model, message=message, private=private))


def collect_gradio_demo(repo_id: str, model: str, folder: Path | None) -> "Files":
    from evmamba_demo.bundled import find_space_files
    from evmamba_hub.publish.push_space import collect_space_files, find_files

    own_files = find_space_files() if folder is None else find_files(folder)
    return collect_space_files(own_files, repo_id, model)


def collect_static_page(repo_id: str, model: str, runtime: Path | None) -> "Files":
    from evmamba_demo.bundled import choose_examples, find_credits, find_page_files
    from evmamba_hub.publish.static_space import collect_static_files, find_onnx_model

    onnx_model = find_onnx_model(model)
    examples = choose_examples(onnx_model.labels)
    return collect_static_files(onnx_model, find_page_files(), examples, find_credits(examples), repo_id, runtime)
