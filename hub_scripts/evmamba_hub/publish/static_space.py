"""`evmamba push-space --static`: a page that classifies in the browser, with the ONNX files of a model beside it."""

import base64
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME

from evmamba_hub.client import Files, Upload, check_downloads, check_repo_id, translate_hub_errors, upload
from evmamba_hub.errors import UserError
from evmamba_hub.export.activation_maps import add_activation_maps
from evmamba_hub.export.onnx_files import ONNX_FILES
from evmamba_hub.model_folder import read_fields, refuse_dense_model
from evmamba_hub.publish.card_metadata import add_model


PAGE_SETTINGS = "page.json"  # what the page shows
RUNTIME_SETTINGS = "runtime.json"  # the version of onnxruntime-web, its address, and the hashes of its files
RUNTIME_FOLDER, EXAMPLES_FOLDER, ONNX_FOLDER = "vendor/", "examples/", "onnx/"
STALE_PATTERNS = [f"{folder}*" for folder in (RUNTIME_FOLDER, EXAMPLES_FOLDER, ONNX_FOLDER)]  # of an earlier model
CREDITS = f"{EXAMPLES_FOLDER}README.txt"  # browsers show plain text


@dataclass
class OnnxModel:
    """A directory with ONNX files, configuration and image processor, in the format `onnx-hub`."""

    folder: Path
    name: str  # for visitors
    repo_id: str | None  # on the Hub; None for a local directory

    @property
    def labels(self) -> list[str]:
        return list(
            (json.loads((self.folder / CONFIG_NAME).read_text(encoding="utf-8")).get("id2label") or {}).values()
        )

    @property
    def weights(self) -> dict[str, str]:
        """The paths of the ONNX files by dtype."""
        return {dtype: name for dtype, name in ONNX_FILES.items() if (self.folder / name).is_file()}


def find_onnx_model(model: str) -> OnnxModel:
    """Return a directory of ONNX files: `model` itself, or the download of the repository with this id.

    Raises:
        UserError: If neither exists, the Hub cannot be reached, or files are missing or were damaged on their way.
    """
    if Path(model).exists():
        found = OnnxModel(Path(model), Path(model).resolve().name, None)
    else:
        patterns = [CONFIG_NAME, IMAGE_PROCESSOR_NAME, *ONNX_FILES.values()]
        with translate_hub_errors(model, may_be_path=True):
            found = OnnxModel(Path(snapshot_download(model, allow_patterns=patterns)), model, model)
        check_downloads(path for path in found.folder.rglob("*") if path.is_file())
    wanted = [CONFIG_NAME, IMAGE_PROCESSOR_NAME, ONNX_FILES["float32"]]
    missing = [name for name in wanted if not (found.folder / name).is_file()]
    if missing:
        if (found.folder / CONFIG_NAME).is_file():
            refuse_dense_model(read_fields(found.folder).get("architectures") or [], model)
        raise UserError(
            f"{model} holds no {missing[0]}: write a directory of ONNX files with `evmamba export --format onnx-hub`, "
            "or push the model with `--with-onnx`"
        )
    return found


def collect_static_files(
    model: OnnxModel,
    page: dict[str, Path],
    examples: Iterable[Path],
    credits: Path | None,
    repo_id: str,
    runtime: Path | None = None,
) -> Files:
    """Collect the files of a static Space by path in it.

    Args:
        model: The model that the page runs.
        page: The files of the page and its card, by path in the Space.
        examples: Pictures that visitors may choose.
        credits: A text on the authors of the examples, or None.
        repo_id: The id of the Space.
        runtime: A directory with the files of onnxruntime-web, which the Space then holds. By default, visitors load
            them from the address in the page's settings.

    Raises:
        UserError: If the id is invalid, an ONNX file is damaged, or the package onnx is missing. Also if a file of the
            runtime is missing or of another version.
    """
    check_repo_id(repo_id)
    pictures = {EXAMPLES_FOLDER + path.name: path for path in examples}
    weights = {name: add_activation_maps(model.folder / name) for name in model.weights.values()}
    settings = {
        "name": model.name,
        "model": model.repo_id,
        "onnx": {dtype: {"path": name, "size": len(weights[name])} for dtype, name in model.weights.items()},
        "examples": list(pictures),
        "credits": credits and CREDITS,
        "runtime": runtime and RUNTIME_FOLDER,
    }
    card = page[constants.REPOCARD_NAME].read_text(encoding="utf-8")
    files: Files = {**page, **pictures, **weights}
    files |= {name: model.folder / name for name in (CONFIG_NAME, IMAGE_PROCESSOR_NAME)}
    if credits is not None:
        files[CREDITS] = credits
    if runtime is not None:
        files |= find_runtime(runtime, page[RUNTIME_SETTINGS])
    files[constants.REPOCARD_NAME] = (card if model.repo_id is None else add_model(card, model.repo_id)).encode()
    files[PAGE_SETTINGS] = (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()
    return files


def find_runtime(folder: Path, settings: Path) -> Files:
    """Return the files of onnxruntime-web by path in the Space.

    Raises:
        UserError: If a file is missing, or is that of another version.
    """
    known = json.loads(settings.read_text(encoding="utf-8"))
    for name, integrity in known["files"].items():
        package = f"onnxruntime-web {known['version']}"
        if not (folder / name).is_file():
            raise UserError(f"{folder} holds no {name}: give the directory `dist` of the npm package {package}")
        digest = base64.b64encode(hashlib.sha384((folder / name).read_bytes()).digest()).decode()
        if f"sha384-{digest}" != integrity:
            raise UserError(f"{folder / name} is not that of {package}: install this version with npm")
    return {RUNTIME_FOLDER + name: folder / name for name in known["files"]}


def upload_static_space(repo_id: str, files: Files, *, message: str, private: bool = False) -> Upload:
    """Upload the files of `collect_static_files` in one commit, and delete those of an earlier model.

    Errors: `upload`.
    """
    return upload(
        repo_id,
        files,
        message,
        repo_type="space",
        space_sdk="static",
        private=private,
        stale=STALE_PATTERNS,
    )
