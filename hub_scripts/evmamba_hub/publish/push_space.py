"""`evmamba push-space`: upload the demo as a Gradio Space that shows a model of the Hub.

The Space holds the installed packages that its app imports. It needs only the packages in its requirements.txt, and
executes no code from the repositories of models.
"""

from pathlib import Path

from huggingface_hub import HfApi, SpaceCard, constants

import evmamba_hub
import evmamba_kernels
import modeling_evmamba
from evmamba_hub.client import Files, Upload, check_repo_id, retry, translate_hub_errors, upload
from evmamba_hub.errors import UserError
from evmamba_hub.publish.bundle import find_package_folder
from evmamba_hub.publish.card_metadata import add_model


MODEL_VARIABLE = "EVMAMBA_MODEL"  # environment variable with the model that the app shows
IGNORED_FOLDERS = {"__pycache__", ".gradio", ".cache"}
PACKAGES = (evmamba_kernels, evmamba_hub, modeling_evmamba)
COMMAND_LINE = "evmamba_hub/cli/"  # a Space has no command line, nor the packages that it imports


def find_files(folder: Path, prefix: str = "") -> dict[str, Path]:
    """Return all files of a directory by path in it."""
    return {
        prefix + path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and IGNORED_FOLDERS.isdisjoint(path.relative_to(folder).parts)
    }


def find_packages() -> Files:
    """Return the files of the packages that the app imports, by path in the Space."""
    files: Files = {}
    for package in PACKAGES:
        files |= find_files(find_package_folder(package), f"{package.__name__}/")
    return {name: path for name, path in files.items() if not name.startswith(COMMAND_LINE)}


def collect_space_files(own_files: dict[str, Path], repo_id: str, model: str) -> Files:
    """Collect the files of a Space by path in it. The metadata of its card name the model, so the Hub links both.

    Args:
        own_files: App, card, requirements and data, by path in the Space.
        repo_id: The id of the Space.
        model: The Hub id of the model.

    Raises:
        UserError: If an id is invalid, or the files are no Gradio Space.
    """
    check_repo_id(repo_id)
    if Path(model).is_file():
        raise UserError(f"{model} is a file: upload its model with `evmamba push`, and give the id of the repository")
    check_repo_id(model)
    for name, purpose in [("app.py", "its app"), (constants.REPOCARD_NAME, "its card")]:
        if name not in own_files:
            raise UserError(f"the Space holds no {name}, {purpose}: give a directory with one by --folder")
    card_path = own_files[constants.REPOCARD_NAME]
    try:
        card = SpaceCard.load(card_path)
    except ValueError as error:
        raise UserError(f"the metadata of {card_path} cannot be read: {error}") from error
    if card.data.get("sdk") != "gradio":
        raise UserError(f"the metadata of {card_path} must say `sdk: gradio`, got {card.data.get('sdk')!r}")
    text = add_model(card_path.read_bytes().decode(), model)
    return find_packages() | own_files | {constants.REPOCARD_NAME: text.encode()}


def upload_space(repo_id: str, files: Files, model: str, *, message: str, private: bool = False) -> Upload:
    """Upload the files of `collect_space_files` in one commit, and set the variable of the Space. Errors: `upload`."""
    result = upload(repo_id, files, message, repo_type="space", space_sdk="gradio", private=private)
    with translate_hub_errors(repo_id):
        retry(HfApi().add_space_variable, repo_id, MODEL_VARIABLE, model)
    return result
