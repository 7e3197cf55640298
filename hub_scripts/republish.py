"""The authors' checkpoints: what the manifest knows of them, and their publication."""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, constants

from hub_scripts.card import TASK, TOP1, CardDetails, render_card, result_entries
from hub_scripts.convert import Conversion
from hub_scripts.errors import UserError
from hub_scripts.files import write_whole
from hub_scripts.push import find_model_class, load_config


MANIFEST = Path(__file__).parent / "data" / "checkpoints.yaml"


@dataclass
class Checkpoint:
    """One of the authors' checkpoints."""

    variant: str
    source: str  # its repository on the Hub
    name: str  # of the repository that is made of it
    top1: float  # percent, ImageNet-1k, by the authors' log
    log: str
    details: CardDetails


@cache
def load_manifest() -> list[Checkpoint]:
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
        checkpoints.append(Checkpoint(**entry, details=details))
    return checkpoints


def find_checkpoint(source: str) -> Checkpoint | None:
    """The manifest's entry for a repository, None for anything else."""
    return next((checkpoint for checkpoint in load_manifest() if checkpoint.source == source), None)


def write_card(checkpoint: Checkpoint, conversion: Conversion, model_dir: Path, repo_id: str) -> None:
    """Puts the card and the accuracy of the manifest into a converted checkpoint's folder.

    Raises:
        UserError: where the checkpoint is not the network that the manifest says.
    """
    if conversion.variant != checkpoint.variant:
        raise UserError(
            f"{checkpoint.source} holds {conversion.variant or 'a network of no published size'}, "
            f"the manifest says {checkpoint.variant}"
        )
    config = load_config(model_dir)
    averaged = "averaged" if conversion.weights == "ema" else "last, not averaged"
    training = f"{checkpoint.details.training} These are the {averaged} weights."
    details = replace(checkpoint.details, training=training)
    card = render_card(repo_id, config, find_model_class(model_dir, config), details)
    card.save(model_dir / constants.REPOCARD_NAME)
    for path, content in result_entries(checkpoint.details.results).items():
        write_whole(model_dir / path, content)
