"""`evmamba convert`"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Literal

import typer

from evmamba_hub.cli.console import console
from evmamba_hub.cli.options import Dtype, PrivateOption
from evmamba_hub.cli.uploads import UPLOAD_MESSAGE, report_upload
from evmamba_hub.errors import UserError, literal


def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="A `.pth`, `.pth.tar`, `.ckpt` or `.safetensors` file, or the id of a repository on the Hub."
        ),
    ],
    output_dir: Annotated[
        Path | None,
        typer.Argument(help="Directory to write, new or empty. Optional with `--push-to`."),
    ] = None,
    weights: Annotated[
        Literal["raw", "ema"] | None,
        typer.Option(
            help="Weights to convert, if the checkpoint has both.", show_default="ema, if the checkpoint has them"
        ),
    ] = None,
    prefix: Annotated[
        str | None,
        typer.Option(
            help="Beginning of the keys to convert, such as `student.`, if the checkpoint has several networks.",
            show_default="the first network that fits",
        ),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of the converted weights.")] = "float32",
    file: Annotated[
        str | None,
        typer.Option(help="File to convert, if the repository holds several checkpoints.", show_default=False),
    ] = None,
    push_to: Annotated[
        str | None,
        typer.Option(help="Repository on the Hub to upload the result to, as `user/name`.", show_default=False),
    ] = None,
    private: PrivateOption = False,
) -> None:
    """Convert a checkpoint of the authors for `from_pretrained`.

    The tensors determine the variant and the number of classes. The network may be a part of the checkpoint, as in
    files of Lightning, MMDetection and MMSegmentation. A backbone with output norms becomes an
    `EfficientVMambaBackbone`. Pickles that would execute code are rejected. With `--push-to`, upload the result to the
    Hub.

    Examples:

        evmamba convert TerryPei/EfficientVMamba-Tiny efficientvmamba-tiny

        evmamba convert checkpoint.pth.tar efficientvmamba-tiny-fp16 --weights raw --dtype float16

        evmamba convert epoch_12.pth backbone

        evmamba convert TerryPei/EfficientVMamba-Tiny --push-to someone/efficientvmamba-tiny
    """
    from transformers.utils import logging

    from evmamba_hub.client import check_repo_id
    from evmamba_hub.convert.convert import convert_checkpoint
    from evmamba_hub.publish.push import push_model
    from evmamba_hub.publish.republish import collect_converted_files
    from evmamba_hub.wording import shorten

    if output_dir is None and push_to is None:
        raise UserError("there is no output: give a directory to write, --push-to with a repository, or both")
    if push_to is not None:
        check_repo_id(push_to)
    logging.disable_progress_bar()
    with TemporaryDirectory() as temporary_dir:
        model_dir = output_dir or Path(temporary_dir) / "model"
        conversion = convert_checkpoint(source, model_dir, weights=weights, dtype=dtype, file_name=file, prefix=prefix)
        console.print("[bold green]Converted[/]", literal(source))
        console.print(f"  variant     {conversion.variant or 'none of the published ones'}")
        console.print(f"  parameters  {conversion.num_parameters:,}")
        console.print(f"  weights     {conversion.weights}, {dtype}")
        console.print(
            f"  classes     {'none, a backbone' if conversion.num_labels is None else conversion.num_labels}"
        )
        console.print(literal(f"  keys        {conversion.keys}"))
        if conversion.not_taken:
            kinds = list(conversion.not_taken.values())
            option = f"--weights {kinds[0]}" if len(kinds) == 1 and kinds[0] != conversion.weights else "--prefix"
            console.print(literal(f"  not taken   {', '.join(conversion.not_taken)}: choose with {option}"))
        if conversion.left_out:
            left_out = [f"{module} (tensors: {number})" for module, number in conversion.left_out.items()]
            console.print(literal(f"  left out    {shorten(left_out)}"))
        if output_dir is not None:
            console.print(literal(f"  written to  {output_dir}"))
            if conversion.num_labels is not None:
                console.print("Try it:", literal(f"evmamba classify IMAGE --model {output_dir}", "bold"))
        if push_to is not None:
            try:
                files = collect_converted_files(source, conversion, model_dir, push_to)
                report_upload(push_model(push_to, files, message=UPLOAD_MESSAGE, private=private))
            except UserError as error:
                if output_dir is None:
                    raise
                raise UserError(
                    f"{error}. Run `evmamba push {output_dir} {push_to}` to upload the converted model"
                ) from error
