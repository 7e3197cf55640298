"""A model's folder on this disk, as `save_pretrained` writes it: configuration, class and weights."""

import json
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.errors import StrictDataclassError
from transformers.utils import CONFIG_NAME

import modeling_evmamba
from evmamba_hub.errors import UserError
from modeling_evmamba import EfficientVMambaConfig, EfficientVMambaPreTrainedModel


def find_model_class(model_dir: Path, config: EfficientVMambaConfig) -> type[EfficientVMambaPreTrainedModel]:
    name = ", ".join(config.architectures or [])
    if name not in modeling_evmamba.__all__:
        raise UserError(
            f"{model_dir / CONFIG_NAME} names the architecture {name or None}, which is none of this package"
        )
    return getattr(modeling_evmamba, name)


def load_config(model_dir: Path) -> EfficientVMambaConfig:
    if not model_dir.is_dir():
        raise UserError(f"{model_dir} is no folder: give the one that `save_pretrained` or `evmamba convert` wrote")
    try:
        fields = json.loads((model_dir / CONFIG_NAME).read_text(encoding="utf-8"))
        if fields["model_type"] != EfficientVMambaConfig.model_type:
            raise UserError(f"{model_dir} holds a model of the type {fields['model_type']!r}, no EfficientVMamba")
        return EfficientVMambaConfig.from_pretrained(model_dir)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise UserError(f"{model_dir / CONFIG_NAME} is missing or damaged: {error}") from error


def find_weights(model_dir: Path) -> list[Path]:
    """The safetensors files of a model: one, or the shards and their index."""
    single, index = model_dir / constants.SAFETENSORS_SINGLE_FILE, model_dir / constants.SAFETENSORS_INDEX_FILE
    if single.is_file():
        return [single]
    if not index.is_file():
        raise UserError(
            f"{model_dir} holds no {single.name}: save the model with `save_pretrained`, pickles are not uploaded"
        )
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{index} is damaged: {error}") from error
    for name in shards:
        if not (model_dir / name).is_file():
            raise UserError(f"{model_dir} lacks {name}, which {index.name} names: save the model again")
    return [index, *(model_dir / name for name in shards)]
