"""ONNX files as transformers.js and ONNX Runtime load them from the Hub: in a directory, or with an uploaded model."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import ModelCard, ModelCardData, constants
from jinja2 import Template
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME

from evmamba_hub.client import Files
from evmamba_hub.export.export import Exportable, ExportReport, load_exportable
from evmamba_hub.export.onnx_files import ONNX_FILES, check_for_javascript, export_onnx_files
from evmamba_hub.files import check_is_free, read_content, staged
from evmamba_hub.publish.card import TASK, describe_network, find_card
from evmamba_hub.publish.card_metadata import add_usage, create_placeholder_id, read_metadata
from modeling_evmamba import EfficientVMambaConfig


TEMPLATES = Path(__file__).parent / "data"


def render_usage(repo_id: str) -> str:
    """Return the section of a card that shows how to use the ONNX files of a repository."""
    template = (TEMPLATES / "onnx_usage.md").read_text(encoding="utf-8")
    return Template(template, keep_trailing_newline=True).render(repo_id=repo_id)


def render_onnx_card(
    name: str, base_model: str | None, license: dict, config: EfficientVMambaConfig, reports: dict[str, ExportReport]
) -> ModelCard:
    """Render the card of a directory of ONNX files.

    Args:
        name: The name of the directory.
        base_model: The Hub id of the model, if it is on the Hub.
        license: The metadata of its license.
        config: Its configuration.
        reports: The reports of the files by their names.
    """
    return ModelCard.from_template(
        ModelCardData(
            library_name="onnx",
            pipeline_tag=TASK,
            base_model=base_model,
            tags=["efficientvmamba", "vision", "mamba", "state-space-model"],
            **license,
        ),
        template_path=str(TEMPLATES / "onnx_card.md"),
        title=name,
        base_model=base_model,
        summary=describe_network(config, is_classifier=True),
        usage=render_usage(create_placeholder_id(name)),
        reports=reports,
        images=next(iter(reports.values())).images,
    )


def read_license(model_dir: Path) -> dict:
    """Return the metadata of the license in the card of a model. It is empty without a card.

    Raises:
        UserError: If the metadata of the card are damaged.
    """
    metadata = read_metadata(find_card(model_dir)).data or {}
    return {name: metadata[name] for name in ("license", "license_name", "license_link") if name in metadata}


def describe_image_processor(classifier: Exportable) -> bytes:
    """Return a `preprocessor_config.json` with all settings, because transformers.js has other defaults."""
    return classifier.image_processor.to_json_string().encode()


def export_onnx_folder(
    model: str,
    folder: Path,
    *,
    image_size: tuple[int, int] | None = None,
    revision: str | None = None,
    before_file: Callable[[str], None] = lambda name: None,
) -> dict[str, ExportReport]:
    """Write a directory with ONNX files in three dtypes, configuration, image processor and card.

    A `Notice` says so if transformers.js may prepare images in another way.

    Args:
        model: Directory or Hub id of a classifier.
        folder: The directory to write, new or empty. An error leaves it as it was.
        image_size: The height and width to fix, or None for images of any size.
        revision: Branch, tag or commit on the Hub.
        before_file: Is called with the name of each ONNX file before the work on it.

    Returns:
        The reports of the ONNX files by their names in the directory.

    Raises:
        UserError: If the directory is not empty, the model cannot be exported, or logits differ from PyTorch's.
    """
    folder = folder.absolute()
    check_is_free(folder)
    classifier = load_exportable(model, "float32", revision)
    check_for_javascript(classifier)
    base_model, license = (None, read_license(Path(model))) if Path(model).exists() else (model, {})
    config = json.loads(classifier.model.config.to_json_string())
    config.pop("auto_map", None)  # names code that is not in the directory
    with staged(folder) as staging:
        staging.mkdir()
        reports = export_onnx_files(model, staging, image_size=image_size, revision=revision, before_file=before_file)
        (staging / CONFIG_NAME).write_bytes(f"{json.dumps(config, indent=2, sort_keys=True)}\n".encode())
        (staging / IMAGE_PROCESSOR_NAME).write_bytes(describe_image_processor(classifier))
        card = render_onnx_card(folder.name, base_model, license, classifier.model.config, reports)
        card.save(staging / constants.REPOCARD_NAME)
    return reports


@contextmanager
def added_onnx_files(
    files: Files, model_dir: Path, repo_id: str, before_file: Callable[[str], None] = lambda name: None
) -> Iterator[Files]:
    """Export the ONNX files of a model. Yield the files of its repository with them, which exist inside the block.

    The card shows how to use the ONNX files, unless it does already.

    Args:
        files: The files of `collect_model_files`.
        model_dir: The directory of the model.
        repo_id: The id of the repository, for the card.
        before_file: Is called with the name of each ONNX file before the work on it.

    Raises:
        UserError: If the model is no classifier, cannot be exported, or logits differ from PyTorch's.
    """
    classifier = load_exportable(str(model_dir), "float32")
    check_for_javascript(classifier)
    text = read_content(files[constants.REPOCARD_NAME]).decode()
    if "@huggingface/transformers" not in text:
        text = add_usage(text, render_usage(repo_id))
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        export_onnx_files(str(model_dir), folder, before_file=before_file)
        yield {
            **files,
            constants.REPOCARD_NAME: text.encode(),
            IMAGE_PROCESSOR_NAME: describe_image_processor(classifier),
            **{name: folder / name for name in ONNX_FILES.values()},
        }
