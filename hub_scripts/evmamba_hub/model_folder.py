"""The directory of a model, as `save_pretrained` writes it: configuration, class and weights."""

import json
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.errors import StrictDataclassError
from transformers.utils import CONFIG_NAME

import modeling_evmamba
from evmamba_hub.errors import UserError
from modeling_evmamba import EfficientVMambaConfig, EfficientVMambaPreTrainedModel


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
    if not model_dir.is_dir():
        raise UserError(f"{model_dir} is not a directory: give one that `save_pretrained` or `evmamba convert` wrote")
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
