"""The command line `evmamba`: arguments and help of every command. Jobs are imported when their command runs."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Literal

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import MofNCompleteColumn, Progress, track
from rich.table import Column, Table

from hub_scripts.errors import UserError
from training_evmamba.train import train


console = Console(highlight=False, soft_wrap=True)
error_console = Console(stderr=True, highlight=False, soft_wrap=True)

app = typer.Typer(
    help="EfficientVMamba on the Hugging Face Hub.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


UPLOAD_MESSAGE = "Upload EfficientVMamba with evmamba push"

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


@app.command()
def classify(
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders to search for images.")],
    model: Annotated[
        str | None,
        typer.Option(help="Folder or Hub id of the model.", show_default="the bundled model of handwritten digits"),
    ] = None,
    revision: RevisionOption = None,
    top_k: Annotated[int, typer.Option(min=1, help="How many labels to show per image.")] = 5,
    device: Annotated[
        str, typer.Option(help="Where to compute: `cpu`, `cuda`, `cuda:1`, `mps`, ..., or the first accelerator.")
    ] = "auto",
    dtype: Annotated[Dtype, typer.Option(help="Number format to compute in.")] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of tables.")] = False,
) -> None:
    """Classifies images.

    A file that is no image, or a damaged one, is reported and the others go on; the exit code is then 1.

    Examples:

        evmamba classify demo/examples

        evmamba classify cat.jpg dog.png --model efficientvmamba-tiny --top-k 3

        evmamba classify photos --model efficientvmamba-tiny --json > labels.json
    """
    from hub_scripts import classify as job

    paths = job.find_images(images)
    classifier = job.load_classifier(model or str(job.find_bundled_model()), device, dtype, revision)
    results = job.classify(classifier, paths, top_k)
    progress = track(results, "Classifying", len(paths), console=error_console, transient=True, disable=len(paths) < 2)
    if as_json:
        classifications = list(progress)
        print(json.dumps([classification.as_json() for classification in classifications], indent=2))
    else:
        classifications = []
        for classification in progress:
            classifications.append(classification)
            console.print(classification.as_table())
    num_broken = sum(classification.error is not None for classification in classifications)
    if num_broken:
        raise UserError(f"{num_broken} of {len(paths)} images could not be classified")


@app.command()
def info(
    model: Annotated[
        str | None,
        typer.Option(help="Folder or Hub id of a model.", show_default="the published networks"),
    ] = None,
    image_size: Annotated[
        int, typer.Option(min=1, help="Side of the image in pixels that operations count for.")
    ] = 224,
) -> None:
    """Shows the size of a network and what runs it on this machine.

    Examples:

        evmamba info

        evmamba info --model efficientvmamba-tiny --image-size 384
    """
    from hub_scripts import info as job

    table = Table("network", Column("parameters", justify="right"), Column("GMACs", justify="right"))
    for name, config in job.find_configs(model).items():
        size = job.measure_size(config, image_size, image_size)
        table.add_row(escape(name), f"{size.parameters:,}", f"{size.macs / 1e9:.3f}")
    console.print(table)
    console.print(f"{job.MACS_CONVENTION} For one image of {image_size} x {image_size} pixels.", soft_wrap=False)
    for name, value in job.describe_environment().items():
        console.print(f"  {name:<16}{value}")


@app.command()
def convert(
    source: Annotated[
        str, typer.Argument(help="A `.pth`, `.pth.tar` or `.safetensors` file, or a repository on the Hub.")
    ],
    output_dir: Annotated[
        Path | None,
        typer.Argument(help="Directory to write. It must not exist or be empty. Not needed with `--push-to`."),
    ] = None,
    weights: Annotated[
        Literal["raw", "ema"] | None,
        typer.Option(
            help="Which weights of a checkpoint with both.", show_default="ema where the checkpoint has them"
        ),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Number format of the copy.")] = "float32",
    file: Annotated[
        str | None, typer.Option(help="The file in a repository that holds several checkpoints.", show_default=False)
    ] = None,
    push_to: Annotated[
        str | None, typer.Option(help="Repository on the Hub to upload the result to.", show_default=False)
    ] = None,
    private: PrivateOption = False,
) -> None:
    """Converts a checkpoint of the authors for `from_pretrained`, and uploads it where `--push-to` says so.

    Sizes, variant and number of classes are read off the tensors. Files that want to run code are refused.

    Examples:

        evmamba convert TerryPei/EfficientVMamba-Tiny efficientvmamba-tiny

        evmamba convert checkpoint.pth.tar efficientvmamba-tiny-fp16 --weights raw --dtype float16

        evmamba convert TerryPei/EfficientVMamba-Tiny --push-to someone/efficientvmamba-tiny
    """
    from transformers.utils import logging

    from hub_scripts.convert import convert
    from hub_scripts.hub import check_repo_id

    if output_dir is None and push_to is None:
        raise UserError("give a directory to write, or --push-to a repository, or both")
    if push_to is not None:
        check_repo_id(push_to)
    logging.disable_progress_bar()
    with TemporaryDirectory() as temporary_dir:
        model_dir = output_dir or Path(temporary_dir) / "model"
        conversion = convert(source, model_dir, weights=weights, dtype=dtype, file_name=file)
        console.print(f"[bold green]Converted[/] {escape(source)}")
        console.print(f"  variant     {conversion.variant or 'of no published size'}")
        console.print(f"  parameters  {conversion.num_parameters:,}")
        console.print(f"  weights     {conversion.weights}, {dtype}")
        console.print(
            f"  classes     {'none, a backbone' if conversion.num_labels is None else conversion.num_labels}"
        )
        if output_dir is not None:
            console.print(f"  written to  {escape(str(output_dir))}")
            if conversion.num_labels is not None:
                console.print(f"Try it: [bold]evmamba classify IMAGE --model {escape(str(output_dir))}[/]")
        if push_to is not None:
            try:
                push_conversion(source, conversion, model_dir, push_to, private)
            except UserError as error:
                if output_dir is None:
                    raise
                raise UserError(
                    f"{error}. `evmamba push {output_dir} {push_to}` uploads what was converted"
                ) from error


@app.command()
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
    from hub_scripts import push as job
    from hub_scripts.card import CardDetails, read_results

    details = None
    if any([base_model, dataset, license, results]):
        details = CardDetails(
            license=license,
            base_model=base_model,
            datasets=dataset or [],
            results=[] if results is None else read_results(results),
        )
    files = job.collect_files(model_dir, repo_id, details)
    if dry_run:
        show_files(repo_id, files, job.WEIGHTS_PATTERNS)
    else:
        report_upload(
            job.push(repo_id, files, message=message, private=private, revision=revision, create_pr=create_pr)
        )


@app.command()
def republish(
    namespace: Annotated[str, typer.Argument(help="User or organization on the Hub to own the repositories.")],
    private: PrivateOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Converts all of the authors' checkpoints and uploads them, each with its card.

    The manifest `hub_scripts/data/checkpoints.yaml` names them.

    Examples:

        evmamba republish someone --dry-run
    """
    from hub_scripts.convert import convert
    from hub_scripts.hub import check_repo_id
    from hub_scripts.republish import load_manifest

    for checkpoint in load_manifest():
        repo_id = f"{namespace}/{checkpoint.name}"
        check_repo_id(repo_id)
        with TemporaryDirectory() as temporary_dir:
            model_dir = Path(temporary_dir) / "model"
            conversion = convert(checkpoint.source, model_dir)
            console.print(f"[bold green]Converted[/] {escape(checkpoint.source)}")
            push_conversion(checkpoint.source, conversion, model_dir, repo_id, private, dry_run)


@app.command()
def push_space(
    repo_id: Annotated[str, typer.Argument(help="Space on the Hub, as `user/name`. Created if it does not exist.")],
    model: Annotated[str, typer.Option(help="The model that the Space shows, by its id on the Hub.")],
    folder: Annotated[Path, typer.Option(help="Folder of the demonstration.")] = Path("demo"),
    private: PrivateOption = False,
    message: MessageOption = "Upload the demonstration with evmamba push-space",
    dry_run: DryRunOption = False,
) -> None:
    """Uploads the demonstration as a Gradio Space.

    The Space learns of its model by the variable `EVMAMBA_MODEL`, and its card names it.

    Examples:

        evmamba push-space someone/efficientvmamba --model someone/efficientvmamba-tiny
    """
    from hub_scripts import push_space as job

    files = job.collect_files(folder, repo_id, model)
    if dry_run:
        show_files(repo_id, files)
    else:
        report_upload(job.push_space(repo_id, files, model, message=message, private=private))


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of the model.")],
    output: Annotated[Path, typer.Argument(help="File to write, `.onnx` or `.pt2`. An older one is replaced.")],
    format: Annotated[
        Literal["onnx", "torch-export", "aoti"],
        typer.Option(
            help="ONNX; a graph that PyTorch loads without this package; or a compiled one that calls its kernels."
        ),
    ] = "onnx",
    image_size: Annotated[
        tuple[int, int] | None,
        typer.Option(min=1, help="Height and width of all images.", show_default="images of any size"),
    ] = None,
    dtype: Annotated[
        Literal["float32", "float16", "int8"],
        typer.Option(help="Number format; `int8` is for ONNX, and for the weights of linear and pointwise layers."),
    ] = "float32",
    revision: RevisionOption = None,
) -> None:
    """Writes a classifier as one file for another runtime, once its logits have been compared with PyTorch's.

    ONNX files need nothing but standard operators, of opset 18, and carry labels and preprocessing in their metadata.
    Needs the extra `export` of this package.

    Examples:

        evmamba export efficientvmamba-tiny efficientvmamba-tiny.onnx

        evmamba export efficientvmamba-tiny efficientvmamba-tiny.pt2 --format aoti --image-size 224 224
    """
    from transformers.utils import logging

    from hub_scripts import export as job

    logging.disable_progress_bar()
    with console.status("Exporting"):
        result = job.export(model, output, format, image_size=image_size, dtype=dtype, revision=revision)
    table = Table("images", Column("largest difference of a logit", justify="right"), box=box.SIMPLE_HEAD)
    for (batch_size, height, width), difference in result.differences.items():
        table.add_row(f"{batch_size} x {height} x {width}", f"{difference:.2g}")
    console.print(f"[bold green]Exported[/] {escape(str(output))}, {output.stat().st_size:,} bytes, {dtype}")
    console.print(f"  takes  {result.images}")
    console.print(table)


@app.command()
def check_runtimes(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of the model.")],
    only: Annotated[
        list[str] | None,
        typer.Option(help="A runtime to try, as the table names it. Can be given several times.", show_default="all"),
    ] = None,
    revision: RevisionOption = None,
) -> None:
    """Runs a classifier through every runtime that is here, and shows how exact and how fast each is.

    Differences are to PyTorch in float64, the largest of all logits of images of three sizes; times are medians of one
    image of the model's own size. Compilers take minutes. Needs the extra `export` of this package for ONNX Runtime.

    Examples:

        evmamba check-runtimes efficientvmamba-tiny

        evmamba check-runtimes efficientvmamba-tiny --only PyTorch --only "ONNX Runtime"
    """
    from transformers.utils import logging

    from hub_scripts import runtimes as job

    unknown = [name for name in only or [] if name not in job.RUNTIMES]
    if unknown:
        raise UserError(f"{unknown[0]!r} is no runtime, choose among {', '.join(map(repr, job.RUNTIMES))}")
    logging.disable_progress_bar()
    table = Table(
        "runtime",
        Column("largest difference", justify="right"),
        Column("ms for one image", justify="right"),
        title=escape(model),
        title_justify="left",
    )
    names = only or list(job.RUNTIMES)
    checks = job.check_runtimes(model, names, revision)
    missing = []
    for check in track(checks, "Checking", len(names), console=error_console, transient=True):
        if check.missing is None:
            table.add_row(check.runtime, f"{check.difference:.2g}", f"{check.milliseconds:.1f}")
        else:
            missing.append(check)
    console.print(table)
    for check in missing:
        console.print(f"Not tried: {escape(check.runtime)}: {escape(check.missing)}")


@app.command()
def demo(
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Folder or Hub id of a model. The first is shown, further ones are there to be compared.",
            show_default="the bundled model of handwritten digits",
        ),
    ] = None,
    allow_any_model: Annotated[
        bool,
        typer.Option(
            "--allow-any-model", help="Let visitors name models too, on the Hub and in folders of this disk."
        ),
    ] = False,
    host: Annotated[str, typer.Option(help="Address to listen on; `0.0.0.0` for the whole network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 7860,
) -> None:
    """Shows a model in the browser: classify, look inside, compare, measure.

    Needs the extra `demo` of this package.

    Examples:

        evmamba demo

        evmamba demo --model efficientvmamba-tiny --model someone/efficientvmamba-small --port 8000
    """
    try:
        from evmamba_demo.interface import launch
    except ImportError as error:
        if error.name != "gradio":
            raise
        raise UserError('the demonstration needs gradio: pip install "efficientvmamba[demo]"') from error
    from hub_scripts.classify import find_bundled_model, find_examples

    launch([*(model or []), str(find_bundled_model())], find_examples(), allow_any_model, host, port)


app.command()(train)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of the model.")],
    dataset: Annotated[
        str,
        typer.Option(
            help="Folder with a folder of images per class, folder of a dataset, or the Hub id of a dataset."
        ),
    ],
    revision: RevisionOption = None,
    config: Annotated[
        str | None, typer.Option(help="Configuration of the dataset.", show_default="its only one")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Split of the dataset.", show_default="validation, test, or its only one")
    ] = None,
    dataset_revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of the dataset on the Hub.", show_default="main")
    ] = None,
    image_column: Annotated[
        str | None, typer.Option(help="Column with the images.", show_default="the only one of this type")
    ] = None,
    label_column: Annotated[
        str | None, typer.Option(help="Column with the labels.", show_default="the only one of this type")
    ] = None,
    label_map: Annotated[
        Path | None,
        typer.Option(
            help="JSON file with the model's label for labels of the dataset that are spelled otherwise.",
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images that are computed together.")] = 32,
    workers: Annotated[int, typer.Option(min=1, help="Threads that read and scale images.")] = 4,
    dtype: Annotated[Dtype, typer.Option(help="Number format to compute in.")] = "float32",
    output: Annotated[
        Path | None,
        typer.Option(
            help="JSON file for the results. An interrupted evaluation with the same file goes on where it was.",
            show_default=False,
            resolve_path=True,  # the file is replaced: a link to it is to stay one
        ),
    ] = None,
    update_card: Annotated[
        bool, typer.Option("--update-card", help="Write the results into the metadata of the model's card.")
    ] = False,
) -> None:
    """Measures how often a classifier is right on a dataset.

    Labels are matched by name. Needs the extra `evaluate` of this package. Started by `accelerate launch`, several
    processes share the images.

    Examples:

        evmamba evaluate efficientvmamba-tiny --dataset imagenet/val --output results.json

        evmamba evaluate someone/efficientvmamba-tiny --dataset ILSVRC/imagenet-1k --split validation --update-card

        accelerate launch -m hub_scripts.cli evaluate efficientvmamba-tiny --dataset imagenet/val
    """
    from transformers.utils import logging

    from hub_scripts import card as cards
    from hub_scripts import evaluation as job
    from hub_scripts.files import write_whole
    from hub_scripts.hub import fetch_model
    from hub_scripts.labeled_images import open_dataset

    if output is not None and os.path.exists(output) and not os.path.isfile(output):  # of any name
        raise UserError(f"{output} is a folder or a device, --output is a file for the results")
    logging.disable_progress_bar()
    names = {} if label_map is None else job.read_label_map(label_map)
    processes = job.join_processes()
    with processes.main_process_first():
        folder = fetch_model(model, revision)
        card = cards.load_card(model) if update_card and processes.is_main_process else None
        images = open_dataset(
            dataset,
            config=config,
            split=split,
            revision=dataset_revision,
            image_column=image_column,
            label_column=label_column,
        )
    evaluation = job.Evaluation(
        processes,
        folder,
        images,
        batch_size=batch_size,
        dtype=dtype,
        workers=workers,
        label_map=names,
        progress_file=output,
    )
    with Progress(
        *Progress.get_default_columns(),
        MofNCompleteColumn(),
        console=error_console,
        disable=not processes.is_main_process,
    ) as progress:
        task = progress.add_task("Evaluating", total=evaluation.num_images, completed=evaluation.num_resumed)
        if evaluation.num_resumed and processes.is_main_process:
            progress.console.print(f"Going on after {evaluation.num_resumed:,} images")
        for num_images in evaluation.run():
            progress.advance(task, num_images)
    commit = None if Path(model).is_dir() else folder.name  # downloads lie in folders that are called after it
    results = {"model": model, "model_revision": commit, **evaluation.finish()}
    if processes.is_main_process:
        show_results(results)
        if output is not None:
            write_whole(output, (json.dumps(results, indent=2) + "\n").encode())
        if card is not None:
            cards.update_card(model, card, cards.to_eval_results(results))
    evaluation.discard_progress()


def push_conversion(
    source: str, conversion, model_dir: Path, repo_id: str, private: bool, dry_run: bool = False
) -> None:
    """Uploads a converted checkpoint, with the manifest's card where it is one of the manifest's."""
    from hub_scripts.push import WEIGHTS_PATTERNS, collect_files, push
    from hub_scripts.republish import find_checkpoint, write_card

    checkpoint = find_checkpoint(source)
    if checkpoint is not None:
        write_card(checkpoint, conversion, model_dir, repo_id)
    files = collect_files(model_dir, repo_id)
    if dry_run:
        show_files(repo_id, files, WEIGHTS_PATTERNS)
    else:
        report_upload(push(repo_id, files, message=UPLOAD_MESSAGE, private=private))


def show_files(repo_id: str, files: dict, replaced: Sequence[str] = ()) -> None:
    """What would be uploaded: paths, sizes in bytes, and the card; and patterns of the names that would be deleted."""
    table = Table("file", Column("bytes", justify="right"), title=escape(repo_id), title_justify="left")
    sizes = {
        path: len(source) if isinstance(source, bytes) else source.stat().st_size
        for path, source in sorted(files.items())
    }
    for path, size in sizes.items():
        table.add_row(escape(path), f"{size:,}")
    table.add_section()
    table.add_row(f"{len(sizes)} files", f"{sum(sizes.values()):,}")
    console.print(table)
    if replaced:
        console.print(f"Other files of these names would be deleted in the repository: {', '.join(replaced)}")
    card = files["README.md"]
    console.print((card if isinstance(card, bytes) else card.read_bytes()).decode(), markup=False)


def report_upload(result) -> None:
    if result.changed:
        console.print(f"[bold green]Uploaded[/] {escape(result.url)}")
    else:
        console.print("Nothing has changed since the last upload: no commit was made")


def show_results(results: dict) -> None:
    table = Table(show_header=False, title=escape(f"{results['model']} on {results['dataset']}"), title_justify="left")
    table.add_row("images", f"{results['images']:,}")
    table.add_row("top-1", f"{results['top1']:.2%}")
    table.add_row("top-5", f"{results['top5']:.2%}")
    table.add_row("loss", f"{results['loss']:.4f}")
    if results["images_per_second"] is not None:  # all images were counted before an interruption
        table.add_row("images per second", f"{results['images_per_second']:.1f}")
    console.print(table)
    if results["most_confused"]:
        confusions = Table("label", "taken for", Column("images", justify="right"), box=box.SIMPLE_HEAD)
        for confusion in results["most_confused"]:
            confusions.add_row(escape(confusion["label"]), escape(confusion["predicted"]), f"{confusion['images']:,}")
        console.print(confusions)


def main() -> None:
    """Runs the command line. A `UserError` becomes one message on stderr and exit code 1."""
    try:
        app()
    except UserError as error:
        error_console.print(f"[bold red]Error:[/] {escape(str(error))}")
        sys.exit(1)


if __name__ == "__main__":
    main()
