"""The directory of a model, as `save_pretrained` writes it: configuration, class and weights."""

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME

import modeling_evmamba
from evmamba_hub.dense_tasks import find_dense_task, find_head_class
from evmamba_hub.errors import UserError
from modeling_evmamba import VARIANTS, EfficientVMambaConfig


WRITERS = "`save_pretrained`, `evmamba convert` or `evmamba train`"

# What to do with a file that was given instead of a model, by its suffix.
ADVICE = {
    (".pth", ".pt", ".ckpt", ".bin", ".tar", ".safetensors"): "convert a checkpoint with `evmamba convert` first",
    (".onnx", ".pt2"): "give the directory of the model that it was exported from",
    (".zip", ".gz", ".tgz", ".7z", ".rar"): "unpack it first",
}

# Names of directories that documentation gives to the authors' converted weights, or their variant alone.
CONVERTED_NAME = re.compile(rf"(?:efficientvmamba-)?({'|'.join(VARIANTS)})", re.IGNORECASE)


def check_model_dir(path: Path) -> None:
    """Check that a path is the directory of a model.

    Raises:
        UserError: If the path is a file, does not exist, or is a directory without a configuration.
    """
    if path.is_dir():
        if not (path / CONFIG_NAME).is_file():
            raise UserError(f"{path} {describe_lack(path)}")
    elif path.exists():
        raise UserError(f"{path} is a file, and a model is a directory: {describe_way_out(path)}")
    else:
        raise UserError(f"{path} is not a directory: give one that {WRITERS} wrote")


def check_is_converted(model: str) -> None:
    """Check that a missing path has no usual name of the authors' converted weights. Call it if there is no such path.

    Raises:
        UserError: If it has, and is not the id of a repository. The message says how to convert the weights.
    """
    variant = CONVERTED_NAME.fullmatch(Path(model).name)
    if variant and len(Path(model).parts) != 2:
        raise UserError(
            f"there is no directory {model}: convert the authors' weights first with `evmamba convert "
            f"TerryPei/EfficientVMamba-{variant[1].capitalize()} {model}`"
        )


def describe_lack(model_dir: Path) -> str:
    """Return what is wrong with a directory without a configuration, and which one may be meant."""
    inside = sorted(file.parent for file in model_dir.glob(f"*/{CONFIG_NAME}"))
    if inside:
        return f"holds no {CONFIG_NAME}: give a directory in it, {' or '.join(map(str, inside))}"
    state = f"holds no {CONFIG_NAME}" if any(model_dir.iterdir()) else "is empty"
    return f"{state}: give a directory that {WRITERS} wrote"


def describe_way_out(file: Path) -> str:
    """Return what to do with a file that was given as a model."""
    if (file.parent / CONFIG_NAME).is_file():
        return f"give the directory of the file, {file.parent}"
    for suffixes, advice in ADVICE.items():
        if file.suffix.lower() in suffixes:
            return advice
    return f"give one that {WRITERS} wrote"


def read_fields(model_dir: Path) -> dict[str, Any]:
    """Return the fields of the configuration of a model of any architecture, as they are in the file.

    Raises:
        UserError: If the configuration is missing or damaged.
    """
    path = model_dir / CONFIG_NAME
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is missing or damaged: {error}") from error
    if not isinstance(fields, dict):
        raise UserError(f"{path} is missing or damaged: it holds no fields")
    return fields


def refuse_dense_model(names: list[str], model: str) -> None:
    """Refuse a model that predicts more than one label for an image. Call it where only a classifier will do.

    Args:
        names: The architectures in its configuration.
        model: What messages call it.

    Raises:
        UserError: If it is a segmentation model or a detector. The message says what runs and evaluates it.
    """
    task = find_dense_task(names)
    if task is not None:
        raise UserError(
            f"{model} is {task.noun} ({', '.join(names)}) and no classifier: run it with "
            f'pipeline("{task.pipeline}") or `evmamba demo`, and measure it with {task.program}'
        )


def check_is_classifier(model_dir: Path, model: str) -> None:
    """Check that a model of any architecture is an image classifier. transformers would give others a random head.

    Args:
        model_dir: The directory of the model.
        model: What messages call it.

    Raises:
        UserError: If the configuration is damaged, or names another kind of model.
    """
    names = read_fields(model_dir).get("architectures") or []
    refuse_dense_model(names, model)
    if names and not any("ForImageClassification" in name for name in names):
        raise UserError(f"{model} holds no image classifier but {', '.join(names)}: give the model of a classifier")


def find_model_class(model_dir: Path, config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the class that `architectures` in the configuration names.

    Raises:
        UserError: If neither this package nor transformers has such a class for this configuration.
    """
    if not isinstance(config, EfficientVMambaConfig):
        return find_head_class(config, str(model_dir))
    name = ", ".join(config.architectures or [])
    if name not in modeling_evmamba.__all__:
        raise UserError(
            f"{model_dir / CONFIG_NAME} names the architecture {name or None}, which this package does not have: "
            "save the model again with `save_pretrained`"
        )
    return getattr(modeling_evmamba, name)


def load_config(model_dir: Path) -> EfficientVMambaConfig:
    """Return the configuration of a model.

    Raises:
        UserError: If the configuration is missing, damaged, or that of another network.
    """
    check_model_dir(model_dir)
    fields = read_fields(model_dir)
    refuse_dense_model(fields.get("architectures") or [], str(model_dir))
    try:
        if fields["model_type"] != EfficientVMambaConfig.model_type:
            raise UserError(
                f"{model_dir} holds a model of the type {fields['model_type']!r}, not "
                f"{EfficientVMambaConfig.model_type!r}: give the directory of an EfficientVMamba"
            )
        return EfficientVMambaConfig.from_pretrained(model_dir)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise UserError(f"{model_dir / CONFIG_NAME} is missing or damaged: {error}") from error


def load_any_config(model_dir: Path) -> PreTrainedConfig:
    """Return the configuration of a model of this package, or of a head of transformers around its backbone.

    Raises:
        UserError: If the configuration is missing, damaged, or that of another network.
    """
    check_model_dir(model_dir)
    names = read_fields(model_dir).get("architectures") or []
    if find_dense_task(names) is None:
        return load_config(model_dir)
    try:
        return AutoConfig.from_pretrained(model_dir)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise UserError(f"{model_dir / CONFIG_NAME} is damaged: {error}") from error


def find_weights(model_dir: Path) -> list[Path]:
    """Return the safetensors files of a model: one file, or the index and its shards.

    Raises:
        UserError: If a file is missing, or the index is damaged.
    """
    single, index = model_dir / constants.SAFETENSORS_SINGLE_FILE, model_dir / constants.SAFETENSORS_INDEX_FILE
    if single.is_file():
        return [single]
    if not index.is_file():
        raise UserError(
            f"{model_dir} holds no {single.name}: save the model with `save_pretrained`; pickles are not read"
        )
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{index} is damaged, save the model again: {error}") from error
    for name in shards:
        if not (model_dir / name).is_file():
            raise UserError(f"{model_dir} lacks {name}, which {index.name} names: save the model again")
    return [index, *(model_dir / name for name in shards)]


def find_image_processor(model_dir: Path) -> Path:
    """Return the file of a model's image processor.

    Raises:
        UserError: If there is none.
    """
    image_processor = model_dir / IMAGE_PROCESSOR_NAME
    if not image_processor.is_file():
        raise UserError(
            f"{model_dir} holds no {image_processor.name}: save the image processor there with `save_pretrained`"
        )
    return image_processor


@contextmanager
def hide_load_report() -> Iterator[None]:
    """Hide the table of transformers about weights that a checkpoint lacks or has in another shape."""

    def is_other(record: logging.LogRecord) -> bool:
        return " LOAD REPORT" not in record.getMessage()

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def load_head(model_dir: Path, model_class: type[PreTrainedModel]) -> PreTrainedModel:
    """Return a head of transformers around the backbone in float32, with all its weights from the directory.

    Raises:
        UserError: If a file is missing or damaged, or does not fit the network.
    """
    find_weights(model_dir)  # no pickles
    try:
        with hide_load_report():
            loaded: Any = model_class.from_pretrained(
                model_dir, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True
            )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise UserError(f"the weights in {model_dir} are damaged, save the model again: {error}") from error
    model, report = loaded
    mismatched = {name for name, *_ in report["mismatched_keys"]}
    refuse_unfit_weights(report["missing_keys"] | report["unexpected_keys"] | mismatched, model_class)
    return model.eval()


def refuse_unfit_weights(names: set[str], model_class: type[PreTrainedModel]) -> None:
    """Refuse weights that do not fit the network.

    Args:
        names: Tensors that are missing, unknown or of another shape.
        model_class: The class of the network.

    Raises:
        UserError: If there are any.
    """
    if names:
        raise UserError(
            f"the weights do not fit {model_class.__name__} with this {CONFIG_NAME}: {len(names)} tensors are "
            f"missing, unknown or of another shape, first {min(names)}. Save weights and configuration together"
        )
