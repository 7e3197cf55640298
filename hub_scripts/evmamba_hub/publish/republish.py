"""`evmamba republish`: convert the authors' checkpoints, with cards from the manifest."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import yaml
from huggingface_hub import EvalResult, constants

from evmamba_hub.client import Files, check_repo_id
from evmamba_hub.convert.convert import Conversion, convert_checkpoint
from evmamba_hub.errors import UserError
from evmamba_hub.files import write_atomic
from evmamba_hub.model_folder import find_model_class, load_config
from evmamba_hub.publish.card import TASK, TOP1, CardDetails, render_card, result_entries
from evmamba_hub.publish.push import collect_model_files


MANIFEST = Path(__file__).parent / "data" / "checkpoints.yaml"


@dataclass
class PublishedCheckpoint:
    """One of the authors' checkpoints, as the manifest describes it."""

    variant: str
    source: str  # its repository on the Hub
    name: str  # of the converted repository
    top1: float  # percent, on ImageNet-1k, from the authors' log
    log: str
    details: CardDetails


@cache
def load_manifest() -> list[PublishedCheckpoint]:
    manifest = yaml.safe_load(MANIFEST.read_text(encoding="utf-8"))
    (dataset,) = manifest["datasets"]
    checkpoints = []
    for entry in manifest["checkpoints"]:
        batch_size = entry.pop("batch_size")
        accuracy = EvalResult(
            task_type=TASK,
            dataset_type=dataset,
            dataset_name="ImageNet-1k",
            dataset_split="validation",
            metric_type="accuracy",
            metric_name=TOP1,
            metric_value=round(entry["top1"] / 100, 4),
            source_name="training log of the authors, not measured again",
            source_url=entry["log"],
        )
        details = CardDetails(
            license=manifest["license"],
            datasets=[dataset],
            training=f"Converted from [{entry['source']}](https://huggingface.co/{entry['source']}). "
            + manifest["training"].format(batch_size=batch_size),
            limits=manifest["limits"],
            results=[accuracy],
        )
        checkpoints.append(PublishedCheckpoint(**entry, details=details))
    return checkpoints


def find_published(source: str) -> PublishedCheckpoint | None:
    """Return the manifest's entry for a repository, or None."""
    return next((checkpoint for checkpoint in load_manifest() if checkpoint.source == source), None)


def write_card(checkpoint: PublishedCheckpoint, conversion: Conversion, model_dir: Path, repo_id: str) -> None:
    """Write the card and the accuracy from the manifest into the directory of a converted checkpoint.

    Raises:
        UserError: If the checkpoint is not the network that the manifest names.
    """
    if conversion.variant != checkpoint.variant:
        raise UserError(
            f"{checkpoint.source} holds {conversion.variant or 'a network of no published variant'}, but "
            f"the manifest names {checkpoint.variant}: convert it to a directory, and upload that with `evmamba push`"
        )
    config = load_config(model_dir)
    averaged = "averaged" if conversion.weights == "ema" else "last, not averaged"
    training = f"{checkpoint.details.training} These are the {averaged} weights."
    details = replace(checkpoint.details, training=training)
    card = render_card(repo_id, config, find_model_class(model_dir, config), details)
    card.save(model_dir / constants.REPOCARD_NAME)
    for path, content in result_entries(checkpoint.details.results).items():
        write_atomic(model_dir / path, content)


def collect_converted_files(source: str, conversion: Conversion, model_dir: Path, repo_id: str) -> Files:
    """Collect the files of a converted checkpoint's repository. A checkpoint of the manifest gets its card from there.

    Args:
        source: The source of the conversion, a file or a repository.
        conversion: The result of `convert_checkpoint`.
        model_dir: The directory that it wrote.
        repo_id: The id of the repository to upload to.

    Raises:
        UserError: If the checkpoint is not the network that the manifest names.
    """
    checkpoint = find_published(source)
    if checkpoint is not None:
        write_card(checkpoint, conversion, model_dir, repo_id)
    return collect_model_files(model_dir, repo_id)


class ConvertedCheckpoint(NamedTuple):
    source: str
    repo_id: str
    files: Files  # in a temporary directory


def convert_all(namespace: str) -> Iterator[ConvertedCheckpoint]:
    """Convert the manifest's checkpoints one after the other. The next iteration deletes the files of the last one.

    Args:
        namespace: The user or organization on the Hub that will own the repositories.

    Raises:
        UserError: If a checkpoint cannot be downloaded or converted.
    """
    for checkpoint in load_manifest():
        repo_id = f"{namespace}/{checkpoint.name}"
        check_repo_id(repo_id)
        with TemporaryDirectory() as temporary_dir:
            model_dir = Path(temporary_dir) / "model"
            conversion = convert_checkpoint(checkpoint.source, model_dir)
            files = collect_converted_files(checkpoint.source, conversion, model_dir, repo_id)
            yield ConvertedCheckpoint(checkpoint.source, repo_id, files)
