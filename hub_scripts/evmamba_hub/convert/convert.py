"""`evmamba convert`: convert a checkpoint of the authors to a directory that `from_pretrained` loads."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import HfApi
from transformers import BitImageProcessorPil

from evmamba_hub.client import check_downloads, translate_hub_errors
from evmamba_hub.convert.original_checkpoint import load_original_checkpoint, original_name
from evmamba_hub.errors import UserError
from evmamba_hub.files import check_is_free, staged
from evmamba_hub.images import imagenet


CHECKPOINT_SUFFIXES = (".pth", ".pth.tar", ".pt", ".ckpt", ".bin", ".safetensors")
REPO_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


@dataclass
class Conversion:
    """The result of a conversion."""

    variant: str | None  # None for an unpublished one
    num_parameters: int
    weights: str  # "ema" or "raw"
    num_labels: int | None  # None for a backbone
    keys: str  # that were converted, such as "state_dict.backbone.*"
    not_taken: dict[str, str]  # the keys of other networks in the checkpoint -> "ema" or "raw"
    left_out: dict[str, int]  # other modules beside the network -> their number of tensors


def choose_checkpoint(repo_id: str, file_names: list[str], wanted: str | None) -> str:
    """Return the name of the checkpoint among the files of a repository: the wanted one, or the only one.

    Raises:
        UserError: If there is no such file, no checkpoint, or no unique one.
    """
    if wanted is not None and wanted not in file_names:
        raise UserError(f"{repo_id} holds no file {wanted}: choose one of {', '.join(file_names)}")
    if wanted is not None:
        return wanted
    checkpoints = [name for name in file_names if name.endswith(CHECKPOINT_SUFFIXES)]
    if not checkpoints:
        raise UserError(f"{repo_id} holds no checkpoint: its name must end in one of {', '.join(CHECKPOINT_SUFFIXES)}")
    if len(checkpoints) > 1:
        raise UserError(f"{repo_id} holds several checkpoints: choose one with --file: {', '.join(checkpoints)}")
    return checkpoints[0]


def download(repo_id: str, file_name: str | None) -> Path:
    """Return the path of the downloaded checkpoint. `file_name` chooses one of several in the repository."""
    with translate_hub_errors(repo_id, may_be_path=True):
        hub = HfApi()
        files = hub.model_info(repo_id).siblings  # unlike `list_repo_files`, fails at once without a connection
        file_name = choose_checkpoint(repo_id, [file.rfilename for file in files or []], file_name)
        path = Path(hub.hf_hub_download(repo_id, file_name))
    check_downloads([path])
    return path


def resolve_source(source: str, file_name: str | None) -> Path:
    """Return the local file of a source, which is a path or the id of a repository on the Hub.

    Raises:
        UserError: If the source is neither, or cannot be downloaded.
    """
    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        raise UserError(f"{source} is a directory: give the checkpoint file in it")
    if REPO_ID.fullmatch(source) and not source.endswith(CHECKPOINT_SUFFIXES):
        return download(source, file_name)
    raise UserError(
        f"{source} does not exist: give the path of a checkpoint, or a repository such as "
        "TerryPei/EfficientVMamba-Tiny"
    )


def convert_checkpoint(
    source: str,
    output_dir: Path,
    weights: str | None = None,
    dtype: str = "float32",
    file_name: str | None = None,
    prefix: str | None = None,
) -> Conversion:
    """Convert a checkpoint of the authors to `model.safetensors`, `config.json` and `preprocessor_config.json`.

    Args:
        source: A local file, or the id of a repository on the Hub.
        output_dir: The directory to write, new or empty. An error leaves it as it was.
        weights: "ema" or "raw". None takes the averaged (EMA) weights if the file has them.
        dtype: "float32", "float16" or "bfloat16".
        file_name: The file to convert, if the repository holds several checkpoints.
        prefix: The beginning of the keys to convert, if the checkpoint holds several networks.

    Raises:
        UserError: If the source cannot be found, read or trusted, or if its tensors do not fit the network.
    """
    output_dir = Path(output_dir).absolute()
    check_is_free(output_dir)
    checkpoint = load_original_checkpoint(resolve_source(source, file_name), weights, prefix)

    config, torch_dtype = checkpoint.config, getattr(torch, dtype)
    for name, tensor in checkpoint.state_dict.items():
        if not tensor.to(torch_dtype).isfinite().all():
            raise UserError(f"{original_name(name, config)} holds values that are not finite in {dtype}")

    labels = imagenet.load_labels()
    if config.num_labels == len(labels):
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: idx for idx, label in config.id2label.items()}
    model = checkpoint.model_class.from_pretrained(
        None, config=config, state_dict=checkpoint.state_dict, dtype=torch_dtype
    )
    image_processor = BitImageProcessorPil(
        size={"shortest_edge": 256},
        resample=3,  # bicubic
        crop_size={"height": 224, "width": 224},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )

    with staged(output_dir) as staging_dir:
        model.save_pretrained(staging_dir)
        image_processor.save_pretrained(staging_dir)
    return Conversion(
        checkpoint.variant,
        model.num_parameters(),
        checkpoint.source.weights,
        None if checkpoint.is_backbone else config.num_labels,
        checkpoint.source.name,
        checkpoint.not_taken,
        checkpoint.source.left_out,
    )
