"""The command line `evmamba`. This module only registers the commands."""

from importlib.metadata import version
from typing import Annotated

import typer

from evmamba_hub.cli.check_runtimes import check_runtimes
from evmamba_hub.cli.classify import classify
from evmamba_hub.cli.console import console, create_app, run_app
from evmamba_hub.cli.convert import convert
from evmamba_hub.cli.demo import demo
from evmamba_hub.cli.evaluate import evaluate
from evmamba_hub.cli.export import export
from evmamba_hub.cli.info import info
from evmamba_hub.cli.push import push
from evmamba_hub.cli.push_kernel import push_kernel
from evmamba_hub.cli.push_space import push_space
from evmamba_hub.cli.republish import republish
from evmamba_hub.cli.train import train


app = create_app(help="Classify, train, evaluate, convert, export and publish EfficientVMamba models.")

for command in (
    classify,
    train,
    evaluate,
    export,
    check_runtimes,
    convert,
    push,
    push_space,
    push_kernel,
    republish,
    demo,
    info,
):
    app.command()(command)


def show_version(is_requested: bool) -> None:
    if is_requested:
        console.print(f"evmamba {version('efficientvmamba')}")
        raise typer.Exit


VersionOption = Annotated[
    bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit.")
]


@app.callback()
def define_version_option(version: VersionOption = False) -> None:
    pass


def main() -> None:
    """Run the command line."""
    run_app(app)
