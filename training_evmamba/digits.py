"""scikit-learn's handwritten digits as an image folder, for the bundled model.

The 1,797 digits of 8 x 8 pixels are a part of "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, 1998,
https://doi.org/10.24432/C50P49, CC BY 4.0). One third is held out as `validation`, and `SEED` fixes the choice.
Accuracies and example images come from this third.

    python -m training_evmamba.digits DIRECTORY
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image, ImageOps

from evmamba_hub.errors import UserError, exit_on_user_error, require
from evmamba_hub.files import check_is_free, staged


SEED = 0
HELD_OUT = 1 / 3
PICTURE_SIZE = 160  # side in pixels, large enough to look at


@dataclass
class Digits:
    images: list[Image.Image]
    labels: torch.Tensor  # (N,)


def to_image(pixels: np.ndarray) -> Image.Image:
    """Return a digit of 8 x 8 values, 0 for paper to 16 for full ink, as a picture."""
    image = Image.fromarray((255 - pixels * 255 / 16).round().astype("uint8"))
    image = ImageOps.expand(image, border=1, fill=255)  # the digits touch the upper and lower border
    return image.resize((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.BICUBIC)


def load_splits() -> tuple[Digits, Digits]:
    """Return the digits for training and the held-out ones, stratified by class."""
    require("sklearn.datasets", extra="digits")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    splits = train_test_split(data.images, data.target, test_size=HELD_OUT, random_state=SEED, stratify=data.target)
    train_pixels, held_out_pixels, train_labels, held_out_labels = splits
    return (
        Digits([to_image(pixels) for pixels in train_pixels], torch.from_numpy(train_labels)),
        Digits([to_image(pixels) for pixels in held_out_pixels], torch.from_numpy(held_out_labels)),
    )


def save_folder(folder: Path, training: Digits, held_out: Digits) -> None:
    """Write the image folder (`train/0/0000.png` and so on), all of it or nothing.

    Raises:
        UserError: If the directory exists and is not empty, or cannot be written.
    """
    folder = folder.absolute()
    check_is_free(folder)
    with staged(folder) as staging:
        for split, digits in (("train", training), ("validation", held_out)):
            for index, (image, label) in enumerate(zip(digits.images, digits.labels.tolist(), strict=True)):
                path = staging / split / str(label) / f"{index:04}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(path)


def save_examples(folder: Path, digits: Digits) -> None:
    """Write the digit closest to the mean of each class, as `digit_0.png` and so on.

    Raises:
        UserError: If the directory cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for digit in range(10):
            images = [image for image, label in zip(digits.images, digits.labels, strict=True) if label == digit]
            pixels = np.stack(images).astype(float)  # (N, H, W)
            distances = ((pixels - pixels.mean(axis=0)) ** 2).sum(axis=(1, 2))
            images[distances.argmin()].save(folder / f"digit_{digit}.png")
    except OSError as error:
        raise UserError(f"cannot write examples to {folder}: {error}") from error


def main(
    folder: Annotated[Path, typer.Argument(help="Directory to write. It must be new or empty.")],
    examples: Annotated[
        Path | None,
        typer.Option(help="Directory for the most typical held-out digit of each class.", show_default=False),
    ] = None,
) -> None:
    """Write handwritten digits as an image folder: 1,198 in `train`, 599 in `validation`."""
    training, held_out = load_splits()
    save_folder(folder, training, held_out)
    if examples is not None:
        save_examples(examples, held_out)


if __name__ == "__main__":
    with exit_on_user_error():
        typer.run(main)
