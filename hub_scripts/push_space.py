"""`evmamba push-space`: the demonstration becomes a Gradio Space that shows a model of the Hub.

The Space holds the packages of this project beside its program, as they are installed here: it needs nothing but what
its requirements.txt lists, and runs no code out of the repositories of models.
"""

from pathlib import Path

from huggingface_hub import HfApi, SpaceCard, constants

import evmamba_kernels
import hub_scripts
import modeling_evmamba
from hub_scripts.errors import UserError
from hub_scripts.hub import Files, Upload, check_repo_id, explained, patiently, upload


MODEL_VARIABLE = "EVMAMBA_MODEL"  # the environment variable by which the Space's app learns of the model
IGNORED_FOLDERS = {"__pycache__", ".gradio", ".cache"}
PACKAGES = (evmamba_kernels, hub_scripts, modeling_evmamba)


def find_files(folder: Path, prefix: str = "") -> Files:
    return {
        prefix + path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and IGNORED_FOLDERS.isdisjoint(path.relative_to(folder).parts)
    }


def find_packages() -> Files:
    """The packages that the program imports, by path in the Space."""
    files = {}
    for package in PACKAGES:
        files |= find_files(Path(package.__file__).parent, f"{package.__name__}/")
    return files


def collect_files(folder: Path, repo_id: str, model: str) -> Files:
    """The files of the Space by path in it. The card's metadata name the model, so that the Hub links both.

    Raises:
        UserError: for a folder that holds no Gradio Space.
    """
    check_repo_id(repo_id)
    check_repo_id(model)
    card_path = folder / constants.REPOCARD_NAME
    for path, purpose in [(folder / "app.py", "the program of the Space"), (card_path, "the card of the Space")]:
        if not path.is_file():
            raise UserError(
                f"{folder} holds no {path.name}, {purpose}: give the folder of the demonstration (--folder)"
            )
    try:
        card = SpaceCard.load(card_path)
    except ValueError as error:
        raise UserError(f"the metadata of {card_path} cannot be read: {error}") from error
    if card.data.get("sdk") != "gradio":
        raise UserError(f"the metadata of {card_path} must say `sdk: gradio`, they say {card.data.get('sdk')!r}")
    card.data["models"] = [model]
    return find_packages() | find_files(folder) | {constants.REPOCARD_NAME: str(card).encode()}


def push_space(repo_id: str, files: Files, model: str, *, message: str, private: bool = False) -> Upload:
    """Uploads what `collect_files` found in one commit and tells the Space of its model. Errors: `hub.upload`."""
    result = upload(repo_id, files, message, repo_type="space", space_sdk="gradio", private=private)
    with explained(repo_id):
        patiently(HfApi().add_space_variable, repo_id, MODEL_VARIABLE, model)
    return result
