"""Model cards: render them from `data/model_card.md`, and write evaluation results into their metadata."""

import json
import os
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import (
    EvalResult,
    EvalResultEntry,
    HfApi,
    ModelCard,
    ModelCardData,
    constants,
    eval_result_entries_to_yaml,
)
from huggingface_hub.errors import RemoteEntryNotFoundError
from transformers import PreTrainedConfig, PreTrainedModel

from evmamba_hub.client import Files, check_downloads, translate_hub_errors, upload
from evmamba_hub.dense_tasks import DenseTask, find_dense_task
from evmamba_hub.errors import Notice, UserError, escape_unprintable
from evmamba_hub.files import write_atomic
from evmamba_hub.images.labeled_images import LabeledImages
from evmamba_hub.images.layouts import find_split_kind, match_splits
from evmamba_hub.info import MACS_CONVENTION, find_variant, measure_size
from evmamba_hub.model_folder import load_config
from evmamba_hub.publish.card_metadata import (
    MEASURED,
    add_entries,
    add_results,
    find_placeholder,
    read_metadata,
)
from evmamba_hub.yaml_core import YAML_ERRORS, CoreLoader, dump_yaml
from modeling_evmamba import EfficientVMambaConfig, EfficientVMambaForImageClassification


TEMPLATE = Path(__file__).parent / "data" / "model_card.md"

# The Hub's newer format of results has one file per benchmark. Other results stay in the metadata of the card.
EVAL_RESULTS_FOLDER = ".eval_results"
TASK = "image-classification"
TOP1 = "Top-1 accuracy"

UNKNOWN_TRAINING = "The owner of the model has not described its training."
UNKNOWN_LIMITS = (
    "The model assigns every image to one of the classes of its training data, also images of anything else. It "
    "inherits the gaps and biases of that data. The owner of the model has not described further limits."
)

UNKNOWN_HEAD_LIMITS = (
    "The model knows the classes of its training data alone, and mistakes other things for them. It inherits the gaps "
    "and biases of that data. The owner of the model has not described further limits."
)


@dataclass
class CardDetails:
    """The content of a card that does not follow from the configuration."""

    license: str | None = None
    base_model: str | None = None  # of a fine-tuned model
    datasets: list[str] = field(default_factory=list)
    training: str = UNKNOWN_TRAINING
    limits: str | None = None
    results: list[EvalResult] = field(default_factory=list)


def describe_network(config: EfficientVMambaConfig, is_classifier: bool) -> str:
    """Return a sentence on the purpose and the size of the network."""
    if variant := find_variant(config):
        size = f"of the published variant {variant}"
    else:
        size = f"with {len(config.depths)} stages of {', '.join(map(str, config.hidden_sizes))} channels"
    purpose = f"a classifier of {config.num_labels} classes" if is_classifier else "the network without a classifier"
    return f"This model is {purpose}, {size}."


def describe_head(config: PreTrainedConfig, model_class: type[PreTrainedModel], task: DenseTask) -> str:
    """Return a sentence on the classes and the size of a model around the backbone."""
    variant = find_variant(config.backbone_config)
    backbone = f"the published variant {variant}" if variant else "an EfficientVMamba of another size"
    return (
        f"This model is {task.noun} of {config.num_labels} classes, a {model_class.__name__} of transformers with "
        f"{backbone} as its backbone."
    )


def choose_image_size(config: PreTrainedConfig, task: DenseTask | None) -> tuple[int, int]:
    """Return the height and width for which a card counts GMACs: those of the network, or usual ones of the task."""
    sides: Any = getattr(config, "image_size", None) or (task and task.image_size)
    height, width = (sides, sides) if isinstance(sides, int) else sides
    return height, width


def list_out_features(config: EfficientVMambaConfig, is_classifier: bool) -> list[str]:
    """Return the stages of the feature maps in the example of a card: all, or those of a backbone."""
    return [stage for stage in config.stage_names if stage != "stem"] if is_classifier else config.out_features


def render_card(
    repo_id: str, config: PreTrainedConfig, model_class: type[PreTrainedModel], details: CardDetails
) -> ModelCard:
    """Render the card of a model. The same arguments give the same text.

    Args:
        repo_id: The id of the model on the Hub.
        config: The configuration of the network, from which parameters and GMACs are counted.
        model_class: The class of the checkpoint, of this package or a head of transformers.
        details: The content that does not follow from the configuration.
    """
    task = find_dense_task([model_class.__name__])
    is_classifier = model_class is EfficientVMambaForImageClassification
    height, width = choose_image_size(config, task)
    if isinstance(config, EfficientVMambaConfig):
        summary = describe_network(config, is_classifier)
        out_features = list_out_features(config, is_classifier)
    else:
        assert task is not None  # which `find_head_class` has checked
        summary, out_features = describe_head(config, model_class, task), None
    title = repo_id.rpartition("/")[2]
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag=task.pipeline if task else TASK if is_classifier else "image-feature-extraction",
        license=details.license,
        base_model=details.base_model,
        datasets=details.datasets or None,
        tags=["efficientvmamba", "vision", "mamba", "state-space-model"],
        metrics=sorted({result.metric_type for result in details.results} - {"loss"}) or None,
        model_name=title if details.results else None,
        eval_results=details.results or None,
    )
    return ModelCard.from_template(
        metadata,
        template_path=str(TEMPLATE),
        title=title,
        summary=summary,
        repo_id=repo_id,
        task=task,
        is_classifier=is_classifier,
        out_features=out_features,
        size=measure_size(config, height, width, model_class),
        height=height,
        width=width,
        macs_convention=MACS_CONVENTION,
        training=details.training,
        limits=details.limits or (UNKNOWN_HEAD_LIMITS if task else UNKNOWN_LIMITS),
        eval_results=details.results,
        measured=MEASURED,
    )


def load_card(model_dir: str) -> ModelCard:
    """Load the card in the directory of a model.

    Raises:
        UserError: If its metadata are damaged.
    """
    path = Path(model_dir) / constants.REPOCARD_NAME
    try:
        return ModelCard.load(path)
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"the metadata of {path} cannot be read: {error}") from error


def read_text(model: str, name: str) -> str | None:
    """Return a text file of a model with its line breaks, from its directory or the Hub. None if it does not exist.

    Raises:
        UserError: If the file is not UTF-8, or cannot be downloaded.
    """
    if Path(model).is_dir():
        path = Path(model) / name
        if not path.is_file():
            return None
    else:
        with translate_hub_errors(model):
            try:
                path = Path(HfApi().hf_hub_download(model, name))
            except RemoteEntryNotFoundError:
                return None
        check_downloads([path])
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{name} of {model} is not UTF-8: {error.reason} at byte {error.start + 1}") from error


def read_card(model: str) -> str:
    """Return the text of a model's card, from its directory or its repository on the Hub.

    Raises:
        UserError: If there is no card, or its metadata are damaged.
    """
    card = read_text(model, constants.REPOCARD_NAME)
    if card is None:
        raise UserError(
            f"{model} holds no {constants.REPOCARD_NAME}: run `evmamba push --results FILE` to render a card with "
            "results"
        )
    read_metadata(card)
    return card


def find_card(folder: Path) -> str:
    """Return the text of the card in the directory of a model. It is empty if there is none."""
    path = folder / constants.REPOCARD_NAME
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def read_recipe(card: str) -> dict[str, Any]:
    """Return the recipe in a card that `evmamba train` wrote. It is empty in other cards."""
    for block in re.findall(r"^```yaml\s*?\n(.*?)^```", card, re.DOTALL | re.MULTILINE):
        try:
            recipe = yaml.load(block, CoreLoader)
        except YAML_ERRORS:
            continue
        if isinstance(recipe, dict) and "train_split" in recipe:
            return recipe
    return {}


def is_training_data(card: str, images: LabeledImages, dataset: str) -> bool:
    """Return whether a model was trained on the images, by the recipe in its card.

    Args:
        card: The text of the card.
        images: The opened images.
        dataset: The directory or Hub id that they were opened from.
    """
    recipe = read_recipe(card)
    trained_on, trained_split = str(recipe.get("dataset")), str(recipe.get("train_split"))
    split = images.split
    if images.hub_id is None:
        (trained_root, inner), (root, split) = separate_split(trained_on, None), separate_split(dataset, split)
        trained_split = inner or trained_split
        is_same = os.path.realpath(trained_root) == os.path.realpath(root)
    else:
        is_same = trained_on == images.hub_id and recipe.get("dataset_config") in (None, images.config)
    return is_same and (split is None or bool(match_splits([split], trained_split)))


def separate_split(dataset: str, split: str | None) -> tuple[Path, str | None]:
    """Return the directory of a dataset and the split. The directory of a split, such as `imagenet/val`, has both.

    Args:
        dataset: The directory of the dataset, or of its split.
        split: The split that was opened. None if the dataset was opened without splits.
    """
    path = Path(os.path.abspath(dataset))
    is_split = path.name == split or (split is None and find_split_kind(path.name) is not None)
    return (path.parent, path.name) if is_split and path.parent.name else (path, split)


def to_eval_results(results: dict) -> list[EvalResult]:
    """Convert the results of `evmamba evaluate` to the entries of a card.

    Metrics in other dtypes than float32 have other names. So they stand beside those of the model in float32.
    """
    dtype = results.get("dtype", "float32")
    suffix = "" if dtype == "float32" else f", {dtype}"
    metrics = {"top1": ("accuracy", f"{TOP1}{suffix}")}
    if "top5" in results:  # up to five classes have none
        metrics["top5"] = ("accuracy", f"Top-5 accuracy{suffix}")
    metrics["loss"] = ("loss", f"Loss{suffix}")
    return create_eval_results(results, TASK, metrics)


def create_eval_results(results: dict, task: str, metrics: dict[str, tuple[str, str]]) -> list[EvalResult]:
    """Return the entries of a card.

    Args:
        results: The values by key, and the dataset as `dataset` and `dataset_id`, `_config`, `_split`, `_revision`.
        task: The task on the Hub.
        metrics: The type and the name of the metric for each key.
    """
    name, split = results["dataset_id"], results["dataset_split"]
    if name is None:
        directory, split = separate_split(results["dataset"], split)
        name = directory.name
    name = escape_unprintable(name)
    return [
        EvalResult(
            task_type=task,
            dataset_type=name,
            dataset_name=name,
            dataset_config=results["dataset_config"],
            dataset_split=split,
            dataset_revision=results["dataset_revision"],
            metric_type=metric_type,
            metric_name=metric_name,
            metric_value=round(results[key], 4),
        )
        for key, (metric_type, metric_name) in metrics.items()
    ]


def read_results(path: Path, model_dir: Path, repo_id: str) -> list[EvalResult]:
    """Read the results of a model from a file that `evmamba evaluate` wrote.

    A `Notice` says so if the evaluated model had another name.

    Args:
        path: The file.
        model_dir: The directory of the model.
        repo_id: Its id on the Hub.

    Raises:
        UserError: If the file holds no such results, or those of a model with another number of classes.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        model, num_classes, entries = results["model"], results["classes"], to_eval_results(results)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} holds no results, give a file that `evmamba evaluate` wrote: {error!r}") from error
    num_labels = load_config(model_dir).num_labels
    if num_classes != num_labels:
        raise UserError(
            f"{path} holds results of {model}, which has {num_classes} classes, and {model_dir} has {num_labels}: "
            "evaluate this model"
        )
    if model != repo_id and os.path.realpath(model) != os.path.realpath(model_dir):
        notice = f"{path} holds results of {model}: check that {model_dir} is the same model"
        warnings.warn(notice, Notice, stacklevel=2)
    return entries


def list_entries(results: Iterable[EvalResult]) -> dict[str, list[dict]]:
    """Return top-1 accuracies in float32 on datasets of the Hub in its newer format, by their file in the repository.

    Values are percentages, as on the leaderboards of the Hub. The metadata of the card hold fractions.
    """
    files: dict[str, list[dict]] = defaultdict(list)
    for result in results:
        if result.metric_name != TOP1 or "/" not in result.dataset_type:
            continue
        entry = EvalResultEntry(
            dataset_id=result.dataset_type,
            task_id=result.dataset_config or "default",
            value=round(100 * result.metric_value, 2),
            dataset_revision=result.dataset_revision,
            source_url=result.source_url,
            source_name=result.source_name,
            notes=", ".join(filter(None, [TOP1, result.dataset_split])),
        )
        path = f"{EVAL_RESULTS_FOLDER}/{result.dataset_type.rpartition('/')[2]}.yaml"
        files[path] += eval_result_entries_to_yaml([entry])
    return files


def result_entries(results: Iterable[EvalResult]) -> dict[str, bytes]:
    """Return the files of `list_entries`, as content by path in the repository."""
    return {path: dump_yaml(entries).encode() for path, entries in list_entries(results).items()}


def update_card(model: str, results: list[EvalResult]) -> None:
    """Write results into the card of a model: in its directory, or in its repository on the Hub by one commit.

    Raises:
        UserError: If the metadata cannot be kept, or the files cannot be read, written or uploaded.
    """
    folder, card = Path(model), read_card(model)
    names = [model.rpartition("/")[2], model]
    if folder.is_dir():
        names = [*filter(None, [find_placeholder(card)]), folder.resolve().name]
    texts = {constants.REPOCARD_NAME: add_results(card, names, results)}
    for name, entries in list_entries(results).items():
        texts[name] = add_entries(read_text(model, name) or "", name, entries)
    if not folder.is_dir():
        contents: Files = {name: text.encode() for name, text in texts.items()}
        upload(model, contents, "Add evaluation results")
        return
    for name, text in texts.items():
        write_atomic(folder / name, text.encode())
