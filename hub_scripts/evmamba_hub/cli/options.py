"""Options that several commands take."""

from typing import Annotated, Literal

import typer


Dtype = Literal["float32", "float16", "bfloat16"]
PrivateOption = Annotated[bool, typer.Option("--private", help="Make a new repository private.")]
MessageOption = Annotated[str, typer.Option(help="Message of the commit.")]
CreatePrOption = Annotated[bool, typer.Option("--create-pr", help="Propose the commit as a pull request.")]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Show all that would be uploaded, and the card, and upload nothing.")
]
RevisionOption = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of the model on the Hub.", show_default="main")
]
