"""`evmamba push`: upload a directory that `save_pretrained` wrote to the Hub, with card and code."""

import json
import warnings
from pathlib import Path

from huggingface_hub import constants
from safetensors import SafetensorError, safe_open
from torch import device as torch_device
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME

from evmamba_hub.client import Files, Upload, check_repo_id, matches, upload
from evmamba_hub.errors import Notice, UserError
from evmamba_hub.model_folder import (
    find_image_processor,
    find_model_class,
    find_weights,
    load_any_config,
    load_head,
    read_fields,
    refuse_unfit_weights,
)
from evmamba_hub.publish.bundle import find_auto_map, find_remote_code
from evmamba_hub.publish.card import EVAL_RESULTS_FOLDER, CardDetails, load_card, render_card, result_entries
from evmamba_hub.publish.card_metadata import replace_placeholder
from modeling_evmamba import EfficientVMambaConfig


# Files that `from_pretrained` loads by default. Variants such as model.fp16.safetensors have other names.
WEIGHTS_PATTERNS = [
    "model.safetensors",
    "model-?????-of-?????.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model-?????-of-?????.bin",
    "pytorch_model.bin.index.json",
]


# Files that transformers.js loads by default
ONNX_PATTERNS = ["onnx/model*.onnx", "onnx/model*.onnx_data*"]


def check_weights(paths: list[Path], model_class: type[PreTrainedModel], config: EfficientVMambaConfig) -> None:
    """Compare names and shapes in the files with those of the network, without reading the tensors.

    Raises:
        UserError: If a file is damaged, or does not fit the network.
    """
    with torch_device("meta"):
        expected = {name: list(tensor.shape) for name, tensor in model_class(config).state_dict().items()}
    found: dict[str, list[int]] = {}
    for path in paths:
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, framework="pt") as file:
                    found |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
            except SafetensorError as error:
                raise UserError(f"{path} is damaged, save the model again: {error}") from error
    wrong = {name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)}
    refuse_unfit_weights(wrong, model_class)


def collect_model_files(model_dir: Path, repo_id: str, details: CardDetails | None = None) -> Files:
    """Collect the files of a repository by path in it. No connection is needed.

    Args:
        model_dir: The directory with configuration, safetensors weights and image processor. A README.md in it is the
            card. `repo_id` replaces its placeholder, if it has one.
        repo_id: The id of the repository, for the card.
        details: The content of the card, if the directory has none.

    Raises:
        UserError: If the directory holds no complete EfficientVMamba, or holds a card although there are details.
    """
    check_repo_id(repo_id)
    config = load_any_config(model_dir)
    model_class = find_model_class(model_dir, config)
    weights = find_weights(model_dir)
    if isinstance(config, EfficientVMambaConfig):
        check_weights(weights, model_class, config)
    else:
        load_head(model_dir, model_class)  # its files may share tensors, or have other names than these
    image_processor = find_image_processor(model_dir)
    auto_map = find_auto_map(config)
    fields = read_fields(model_dir) | {"auto_map": auto_map}
    card = model_dir / constants.REPOCARD_NAME
    if card.is_file():
        if details is not None:
            raise UserError(f"{card} is the card already: edit it, or remove it to have one rendered")
        load_card(str(model_dir))  # finds damaged metadata before the upload
        text = replace_placeholder(card.read_bytes().decode(), repo_id)
    else:
        text = str(render_card(repo_id, config, model_class, details or CardDetails()))
    files: Files = {
        constants.REPOCARD_NAME: text.encode(),
        CONFIG_NAME: (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode(),
        image_processor.name: image_processor,
    }
    files |= {path.name: path for path in weights}
    files |= result_entries(details.results if details else [])
    files |= {
        f"{EVAL_RESULTS_FOLDER}/{path.name}": path for path in sorted((model_dir / EVAL_RESULTS_FOLDER).glob("*.yaml"))
    }
    return files | find_remote_code(auto_map)


def choose_stale_patterns(files: Files) -> list[str]:
    """Return the names of files of an earlier upload that programs might load in place of the files to upload."""
    has_onnx = any(matches(name, ONNX_PATTERNS) for name in files)
    return WEIGHTS_PATTERNS + (ONNX_PATTERNS if has_onnx else [])


def push_model(
    repo_id: str,
    files: Files,
    *,
    message: str,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
) -> Upload:
    """Upload the files of `collect_model_files` in one commit. `client.upload` describes arguments and errors.

    A `Notice` says so if new weights are now beside ONNX files of an earlier upload.
    """
    result = upload(
        repo_id,
        files,
        message,
        private=private,
        revision=revision,
        create_pr=create_pr,
        stale=choose_stale_patterns(files),
    )
    old = [name for name in result.kept if matches(name, ONNX_PATTERNS)]
    if old and any(matches(name, WEIGHTS_PATTERNS) for name in result.new):
        notice = (
            f"{repo_id} still holds {', '.join(old)} beside new weights: add --with-onnx to replace ONNX files of "
            "earlier weights, or delete them on the Hub"
        )
        warnings.warn(notice, Notice, stacklevel=2)
    return result
