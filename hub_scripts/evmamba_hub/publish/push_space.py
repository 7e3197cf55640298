"""`evmamba push-space`: the demo becomes a Gradio Space that shows a model of the Hub.

The Space holds the packages that its program imports, as they are installed here. It needs only what its
requirements.txt lists, and runs no code out of the repositories of models.
"""

from pathlib import Path

from huggingface_hub import HfApi, SpaceCard, constants

import evmamba_hub
import evmamba_kernels
import modeling_evmamba
from evmamba_hub.client import Files, Upload, check_repo_id, retry, translate_hub_errors, upload
from evmamba_hub.errors import UserError
from evmamba_hub.publish.bundle import find_package_folder


MODEL_VARIABLE = "EVMAMBA_MODEL"  # the environment variable that tells the Space's app which model to show
IGNORED_FOLDERS = {"__pycache__", ".gradio", ".cache"}
PACKAGES = (evmamba_kernels, evmamba_hub, modeling_evmamba)
COMMAND_LINE = "evmamba_hub/cli/"  # the Space has none, nor the packages that it imports


def find_files(folder: Path, prefix: str = "") -> dict[str, Path]:
    """Finds all files of a folder, by path in it."""
    return {
        prefix + path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and IGNORED_FOLDERS.isdisjoint(path.relative_to(folder).parts)
    }


def find_packages() -> Files:
    """Finds the packages that the program imports, by path in the Space."""
    files: Files = {}
    for package in PACKAGES:
        files |= find_files(find_package_folder(package), f"{package.__name__}/")
    return {name: path for name, path in files.items() if not name.startswith(COMMAND_LINE)}


def collect_space_files(own_files: dict[str, Path], repo_id: str, model: str) -> Files:
    """Collects the files of the Space by path in it. The card's metadata name the model, so that the Hub links both.

    Args:
        own_files: program, card, requirements and data, by path in the Space.
        repo_id: of the Space.
        model: its id on the Hub.

    Raises:
        UserError: if the files make no Gradio Space.
    """
    check_repo_id(repo_id)
    check_repo_id(model)
    for name, purpose in [("app.py", "its program"), (constants.REPOCARD_NAME, "its card")]:
        if name not in own_files:
            raise UserError(f"the Space holds no {name}, {purpose}: give a folder with one (--folder)")
    card_path = own_files[constants.REPOCARD_NAME]
    try:
        card = SpaceCard.load(card_path)
    except ValueError as error:
        raise UserError(f"the metadata of {card_path} cannot be read: {error}") from error
    if card.data.get("sdk") != "gradio":
        raise UserError(f"the metadata of {card_path} must say `sdk: gradio`, they say {card.data.get('sdk')!r}")
    card.data["models"] = [model]
    return find_packages() | own_files | {constants.REPOCARD_NAME: str(card).encode()}


def upload_space(repo_id: str, files: Files, model: str, *, message: str, private: bool = False) -> Upload:
    """Uploads what `collect_space_files` found in one commit and names the model to the Space. Errors: `upload`."""
    result = upload(repo_id, files, message, repo_type="space", space_sdk="gradio", private=private)
    with translate_hub_errors(repo_id):
        retry(HfApi().add_space_variable, repo_id, MODEL_VARIABLE, model)
    return result
