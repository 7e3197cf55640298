"""The directory of a model, as `save_pretrained` writes it: configuration, class and weights."""

import json
import re
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.errors import StrictDataclassError
from transformers.utils import CONFIG_NAME

import modeling_evmamba
from evmamba_hub.errors import UserError
from modeling_evmamba import VARIANTS, EfficientVMambaConfig, EfficientVMambaPreTrainedModel


WRITERS = "`save_pretrained`, `evmamba convert` or `evmamba train`"

# What to do with a file in the place of a model, by its suffix.
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
    """Returns what is wrong with a directory without a configuration, and which one may be meant."""
    inside = sorted(file.parent for file in model_dir.glob(f"*/{CONFIG_NAME}"))
    if inside:
        return f"holds no {CONFIG_NAME}: give a directory in it, {' or '.join(map(str, inside))}"
    state = f"holds no {CONFIG_NAME}" if any(model_dir.iterdir()) else "is empty"
    return f"{state}: give a directory that {WRITERS} wrote"


def describe_way_out(file: Path) -> str:
    """Returns what to do with a file that was given as a model."""
    if (file.parent / CONFIG_NAME).is_file():
        return f"give the directory of the file, {file.parent}"
    for suffixes, advice in ADVICE.items():
        if file.suffix.lower() in suffixes:
            return advice
    return f"give one that {WRITERS} wrote"


def check_is_classifier(model_dir: Path, model: str) -> None:
    """Check that a model of any architecture is an image classifier. transformers would give others a random head.

    Args:
        model_dir: The directory of the model.
        model: What messages call it.

    Raises:
        UserError: If the configuration is damaged, or names another kind of model.
    """
    try:
        names = json.loads((model_dir / CONFIG_NAME).read_text(encoding="utf-8")).get("architectures") or []
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{model_dir / CONFIG_NAME} is missing or damaged: {error}") from error
    if names and not any("ForImageClassification" in name for name in names):
        raise UserError(f"{model} holds no image classifier but {', '.join(names)}: give the model of a classifier")


def find_model_class(model_dir: Path, config: EfficientVMambaConfig) -> type[EfficientVMambaPreTrainedModel]:
    """Returns the class that `architectures` in the configuration names.

    Raises:
        UserError: If this package has no such class.
    """
    name = ", ".join(config.architectures or [])
    if name not in modeling_evmamba.__all__:
        raise UserError(
            f"{model_dir / CONFIG_NAME} names the architecture {name or None}, which this package does not have: "
            "save the model again with `save_pretrained`"
        )
    return getattr(modeling_evmamba, name)


def load_config(model_dir: Path) -> EfficientVMambaConfig:
    """Returns the configuration of a model.

    Raises:
        UserError: If the configuration is missing, damaged, or that of another network.
    """
    check_model_dir(model_dir)
    try:
        fields = json.loads((model_dir / CONFIG_NAME).read_text(encoding="utf-8"))
        if fields["model_type"] != EfficientVMambaConfig.model_type:
            raise UserError(
                f"{model_dir} holds a model of the type {fields['model_type']!r}, not "
                f"{EfficientVMambaConfig.model_type!r}: give the directory of an EfficientVMamba"
            )
        return EfficientVMambaConfig.from_pretrained(model_dir)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise UserError(f"{model_dir / CONFIG_NAME} is missing or damaged: {error}") from error


def find_weights(model_dir: Path) -> list[Path]:
    """Returns the safetensors files of a model: one file, or the index and its shards.

    Raises:
        UserError: If a file is missing, or the index is damaged.
    """
    single, index = model_dir / constants.SAFETENSORS_SINGLE_FILE, model_dir / constants.SAFETENSORS_INDEX_FILE
    if single.is_file():
        return [single]
    if not index.is_file():
        raise UserError(
            f"{model_dir} holds no {single.name}: save the model with `save_pretrained`; pickles are not uploaded"
        )
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{index} is damaged, save the model again: {error}") from error
    for name in shards:
        if not (model_dir / name).is_file():
            raise UserError(f"{model_dir} lacks {name}, which {index.name} names: save the model again")
    return [index, *(model_dir / name for name in shards)]
