"""Options that several commands share."""

from typing import Annotated, Literal

import typer


Dtype = Literal["float32", "float16", "bfloat16"]
PrivateOption = Annotated[bool, typer.Option("--private", help="Make a new repository private.")]
MessageOption = Annotated[str, typer.Option(help="Commit message.")]
CreatePrOption = Annotated[
    bool, typer.Option("--create-pr", help="Open a pull request instead of committing to the branch.")
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Show the files and the card, and upload nothing.")]
RevisionOption = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of the model on the Hub.", show_default="main")
]
