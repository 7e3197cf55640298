"""The ONNX files of a classifier in three dtypes, with the names that transformers.js loads."""

import warnings
from collections.abc import Callable
from pathlib import Path

from evmamba_hub.errors import Notice, UserError
from evmamba_hub.export.export import Exportable, ExportReport, export_model


ONNX_FILES = {
    "float32": "onnx/model.onnx",
    "float16": "onnx/model_fp16.onnx",
    "int8": "onnx/model_quantized.onnx",
}

# The image processor of `evmamba convert` and `evmamba train`, with which transformers.js is tested
TESTED_IMAGE_PROCESSOR = "BitImageProcessor"


def export_onnx_files(
    model: str,
    folder: Path,
    *,
    image_size: tuple[int, int] | None = None,
    revision: str | None = None,
    before_file: Callable[[str], None] = lambda name: None,
) -> dict[str, ExportReport]:
    """Write the files of `ONNX_FILES` into a directory, each compared with PyTorch.

    Args:
        model: Directory or Hub id.
        folder: An existing directory without ONNX files.
        image_size: The height and width to fix, or None for images of any size.
        revision: Branch, tag or commit on the Hub.
        before_file: Is called with the name of each file before the work on it.

    Returns:
        The reports by the names of the files.

    Raises:
        UserError: As `export_model`.
    """
    (folder / "onnx").mkdir()
    reports = {}
    for dtype, name in ONNX_FILES.items():
        before_file(name)
        try:
            reports[name] = export_model(
                model,
                folder / name,
                "onnx",
                image_size=image_size,
                dtype=dtype,
                revision=revision,
                float32_file=folder / ONNX_FILES["float32"] if dtype == "int8" else None,
            )
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
    return reports


def check_for_javascript(classifier: Exportable) -> None:
    """Let a `Notice` say what transformers.js may prepare in another way than the image processor of a classifier."""
    num_channels = classifier.model.config.num_channels
    image_processor = type(classifier.image_processor).__name__.removesuffix("Pil")
    if num_channels != 3:
        notice = (
            f"transformers.js gives 3 channels to the network, which takes {num_channels}: prepare images yourself"
        )
        warnings.warn(notice, Notice, stacklevel=2)
    elif image_processor != TESTED_IMAGE_PROCESSOR:
        notice = f"transformers.js may know no {image_processor}, or differ from it: compare the pixel values of both"
        warnings.warn(notice, Notice, stacklevel=2)
