"""Options that several commands share."""

from pathlib import Path
from typing import Annotated, Literal

import typer


Dtype = Literal["float32", "float16", "bfloat16"]
DtypeOption = Annotated[
    Literal["float32", "bfloat16", "float16", "int8"],
    typer.Option(help="Dtype to compute in. `int8` is for optimized copies on CPUs."),
]
OptimizeOption = Annotated[
    bool,
    typer.Option(
        "--optimize/--no-optimize", help="Whether to compute in an optimized copy of the model on CPUs, or as it is."
    ),
]
DeviceOption = Annotated[
    str, typer.Option(help="Device: `cpu`, `cuda`, `cuda:1`, `mps`, or `auto` for the first accelerator.")
]
BatchSizeOption = Annotated[int, typer.Option(min=1, help="Number of images in a batch.")]
PrivateOption = Annotated[bool, typer.Option("--private", help="Make a new repository private.")]
MessageOption = Annotated[str, typer.Option(help="Commit message.")]
CreatePrOption = Annotated[
    bool, typer.Option("--create-pr", help="Open a pull request instead of committing to the branch.")
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Show the files and the card, and upload nothing.")]
RevisionOption = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of the model on the Hub.", show_default="main")
]
OutputDirOption = Annotated[Path, typer.Option(help="Directory of the run: log, checkpoints, curves and the model.")]
ResumeOption = Annotated[
    Literal["no", "auto"], typer.Option(help="`auto` resumes from the last checkpoint, if there is one.")
]
PushToOption = Annotated[
    str | None, typer.Option(help="Repository on the Hub to upload the model to, as `user/name`.", show_default=False)
]
