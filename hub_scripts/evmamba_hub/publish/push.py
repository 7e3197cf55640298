"""`evmamba push`: a folder that `save_pretrained` wrote becomes a repository on the Hub, with card and code."""

import json
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import constants
from safetensors import SafetensorError, safe_open
from torch import device as torch_device
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME

from evmamba_hub.client import Files, Upload, check_repo_id, upload
from evmamba_hub.errors import UserError
from evmamba_hub.model_folder import find_model_class, find_weights, load_config
from evmamba_hub.publish.bundle import AUTO_MAP, find_remote_code
from evmamba_hub.publish.card import EVAL_RESULTS_FOLDER, CardDetails, load_card, render_card, result_entries
from modeling_evmamba import EfficientVMambaConfig, EfficientVMambaPreTrainedModel


# What `from_pretrained` loads unless it is asked for a variant: those, like model.fp16.safetensors, have other names.
WEIGHTS_PATTERNS = [
    "model.safetensors",
    "model-?????-of-?????.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model-?????-of-?????.bin",
    "pytorch_model.bin.index.json",
]


def check_weights(
    paths: list[Path], model_class: type[EfficientVMambaPreTrainedModel], config: EfficientVMambaConfig
) -> None:
    """Compares names and shapes in the files with those of the network, without reading the tensors."""
    with torch_device("meta"):
        expected = {name: list(tensor.shape) for name, tensor in model_class(config).state_dict().items()}
    found: dict[str, list[int]] = {}
    for path in paths:
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, framework="pt") as file:
                    found |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
            except SafetensorError as error:
                raise UserError(f"{path} is damaged: {error}") from error
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise UserError(
            f"the weights do not fit {model_class.__name__} of this {CONFIG_NAME}: {len(wrong)} tensors are missing, "
            f"unknown or of another shape, the first of them {wrong[0]}"
        )


def collect_model_files(model_dir: Path, repo_id: str, details: CardDetails | None = None) -> Files:
    """All that the repository will hold, by path in it. Needs no network.

    Args:
        model_dir: configuration, safetensors weights and image processor; a README.md in it is the card.
        repo_id: where the files will go, for the card.
        details: for the card that is rendered where there is none.

    Raises:
        UserError: for a folder that holds no complete EfficientVMamba, and for details where there is a card.
    """
    check_repo_id(repo_id)
    config = load_config(model_dir)
    model_class = find_model_class(model_dir, config)
    weights = find_weights(model_dir)
    check_weights(weights, model_class, config)
    image_processor = model_dir / IMAGE_PROCESSOR_NAME
    if not image_processor.is_file():
        raise UserError(f"{model_dir} holds no {image_processor.name}: save the image processor there too")

    fields = json.loads((model_dir / CONFIG_NAME).read_text(encoding="utf-8")) | {"auto_map": AUTO_MAP}
    card = model_dir / constants.REPOCARD_NAME
    if card.is_file():
        if details is not None:
            raise UserError(f"{card} is the card already: change it there, or remove it to have one rendered")
        load_card(str(model_dir))  # so that metadata the Hub would refuse are found before anything is uploaded
    files = {
        constants.REPOCARD_NAME: card
        if card.is_file()
        else str(render_card(repo_id, config, model_class, details or CardDetails())).encode(),
        CONFIG_NAME: (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode(),
        image_processor.name: image_processor,
    }
    files |= {path.name: path for path in weights}
    files |= result_entries(details.results if details else [])
    files |= {
        f"{EVAL_RESULTS_FOLDER}/{path.name}": path for path in sorted((model_dir / EVAL_RESULTS_FOLDER).glob("*.yaml"))
    }
    return files | find_remote_code()


def is_stale(name: str) -> bool:
    """Weights of an earlier upload, of another sharding or format: `from_pretrained` might prefer them."""
    return any(fnmatchcase(name, pattern) for pattern in WEIGHTS_PATTERNS)


def push_model(
    repo_id: str,
    files: Files,
    *,
    message: str,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
) -> Upload:
    """Uploads what `collect_model_files` found in one commit. Arguments and errors: `client.upload`."""
    return upload(repo_id, files, message, private=private, revision=revision, create_pr=create_pr, is_stale=is_stale)
