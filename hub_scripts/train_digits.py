"""Trains the demonstration checkpoint `demo/digits` on scikit-learn's handwritten digits, on a CPU in minutes.

The data are those of `training_evmamba.digits`: the accuracy in the model card is measured on the held-out third.

    python -m hub_scripts.train_digits
"""

import math
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from PIL import ImageOps
from rich.console import Console
from rich.progress import Progress, TextColumn
from transformers import BitImageProcessorPil, get_cosine_schedule_with_warmup

# the name in `transformers` itself is a placeholder that raises where torchvision is missing (5.17)
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from hub_scripts.errors import UserError
from modeling_evmamba import EfficientVMambaConfig, EfficientVMambaForImageClassification
from training_evmamba.digits import PICTURE_SIZE, SEED, Digits, load_splits, save_examples


IMAGE_SIZE = 32

EPOCHS = 45
BATCH_SIZE = 64
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.05
WARMUP = 0.1  # of all steps
LABEL_SMOOTHING = 0.1

# Augmentation, either way
ROTATION = 15  # degrees
SHIFT = 0.1  # of the side: one pixel of the original digits
SHEAR = 0.2
SCALES = (0.8, 1.25)  # the largest fills the image

CARD = """\
---
{metadata}
---

# EfficientVMamba digits

A small EfficientVMamba ([paper](https://arxiv.org/abs/2403.09977)) that reads handwritten digits, so that
demonstrations and tests have a trained checkpoint at hand without a network connection. It is not one of the published
networks and shares no weights with them.

{num_parameters:,} parameters; two stages of EVSS blocks and two of inverted-residual blocks, one block each, with
{hidden_sizes} channels; images of {image_size} x {image_size} pixels.

## How to use

```python
import modeling_evmamba  # makes transformers know the architecture
from transformers import pipeline

classifier = pipeline("image-classification", model="demo/digits")
classifier("demo/examples/digit_3.png")
```

The image processor takes images of any size, in color or grey. What is not square is cropped to its middle. The digit
should fill most of the square; dark ink on light paper and the reverse both work.

## Data

The 1,797 digits that come with scikit-learn (`sklearn.datasets.load_digits`), grey images of 8 x 8 pixels. They are
the test part of [Optical Recognition of Handwritten Digits](https://doi.org/10.24432/C50P49) by E. Alpaydin and C.
Kaynak (1998), UCI Machine Learning Repository, licensed CC BY 4.0. Here they are dark ink on white paper, with a
margin of one pixel, enlarged to {picture_size} x {picture_size}.

One third is held out: {num_held_out} digits, drawn with seed {seed}, every class in the same proportion; the model was
trained on the other {num_train:,}. Digits of one writer can lie on both sides of the split.

## Results

| held-out third | right | accuracy |
| --- | --- | --- |
| dark on light | {correct} of {num_held_out} | {accuracy:.2%} |
| light on dark | {correct_negatives} of {num_held_out} | {accuracy_negatives:.2%} |

Measured after training, through this folder's weights and image processor.

## Training

`python -m hub_scripts.train_digits` makes this folder on a CPU in a few minutes: AdamW, learning rate {learning_rate}
with linear warm-up and cosine decay, weight decay {weight_decay}, label smoothing {label_smoothing}, batches of
{batch_size}, epochs: {epochs}. Images are turned, shifted, scaled and sheared a little, and every second one becomes a
negative. The seed is {seed}; another processor or version of PyTorch rounds differently and ends at slightly different
weights.

## Limits

It is a demonstration, not for real use. It has seen nothing but single, centered digits of very low resolution from a
few writers. Any other picture is given a digit too, often with confidence.
"""


def to_pixel_values(digits: Digits, image_processor: BitImageProcessorPil) -> torch.Tensor:  # (N, C, H, W)
    return image_processor(digits.images, return_tensors="pt").pixel_values


def create_image_processor() -> BitImageProcessorPil:
    """Scales pixels to [-1, 1], so that a negative of an image is its negative in numbers."""
    return BitImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


def create_model() -> EfficientVMambaForImageClassification:
    labels = [str(digit) for digit in range(10)]
    config = EfficientVMambaConfig(
        image_size=IMAGE_SIZE,
        patch_size=2,
        hidden_sizes=[16, 32, 48, 64],
        depths=[1, 1, 1, 1],
        state_size=8,
        id2label=dict(enumerate(labels)),
        label2id={label: idx for idx, label in enumerate(labels)},
    )
    return EfficientVMambaForImageClassification(config)


def augment(pixel_values: torch.Tensor) -> torch.Tensor:  # (B, C, H, W) -> (B, C, H, W)
    """Turns, shifts, scales and shears each image a little; every second one becomes a negative."""
    batch_size = len(pixel_values)

    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.empty(batch_size).uniform_(low, high)

    angle = uniform(-ROTATION, ROTATION).deg2rad()
    zoom_x, zoom_y = 1 / uniform(*SCALES), 1 / uniform(*SCALES)
    shear = uniform(-SHEAR, SHEAR)
    # the grid spans [-1, 1], two units a side
    shift_x, shift_y = uniform(-2 * SHIFT, 2 * SHIFT), uniform(-2 * SHIFT, 2 * SHIFT)
    rows = [
        torch.stack([zoom_x * angle.cos(), zoom_x * (shear - angle.sin()), shift_x], dim=1),
        torch.stack([zoom_y * angle.sin(), zoom_y * angle.cos(), shift_y], dim=1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(pixel_values.shape), align_corners=False)
    # paper is 1: moved to 0, it continues the image beyond its border
    moved = F.grid_sample(pixel_values - 1, grid, align_corners=False) + 1
    sign = 2 * torch.randint(0, 2, (batch_size, 1, 1, 1)) - 1
    return moved * sign


def parameter_groups(model: EfficientVMambaForImageClassification) -> list[dict]:
    """Weight decay for matrices and filters only."""
    exempt = model.no_weight_decay()
    groups = [{"params": [], "weight_decay": WEIGHT_DECAY}, {"params": [], "weight_decay": 0.0}]
    for name, parameter in model.named_parameters():
        groups[parameter.ndim == 1 or name.endswith("bias") or name in exempt]["params"].append(parameter)
    return groups


def train(
    model: EfficientVMambaForImageClassification, pixel_values: torch.Tensor, labels: torch.Tensor, epochs: int
) -> list[float]:
    """Trains the model in place. Returns the mean loss of every epoch."""
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=LEARNING_RATE)
    num_steps = epochs * math.ceil(len(labels) / BATCH_SIZE)
    scheduler = get_cosine_schedule_with_warmup(optimizer, round(WARMUP * num_steps), num_steps)
    losses = []
    model.train()
    with Progress(*Progress.get_default_columns(), TextColumn("loss {task.fields[loss]:.3f}")) as progress:
        task = progress.add_task("Training", total=num_steps, loss=math.nan)
        for _ in range(epochs):
            epoch_loss = 0.0
            for batch in torch.randperm(len(labels)).split(BATCH_SIZE):
                logits = model(augment(pixel_values[batch])).logits
                loss = F.cross_entropy(logits, labels[batch], label_smoothing=LABEL_SMOOTHING)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                scheduler.step()
                epoch_loss += loss.item() * len(batch) / len(labels)
                progress.update(task, advance=1, loss=loss.item())
            losses.append(epoch_loss)
    return losses


@torch.no_grad()
def evaluate(folder: Path, digits: Digits) -> int:
    """How many digits the saved checkpoint reads right, loaded and fed as users do it."""
    model = EfficientVMambaForImageClassification.from_pretrained(folder)
    logits = model(to_pixel_values(digits, AutoImageProcessor.from_pretrained(folder))).logits
    return (logits.argmax(dim=-1) == digits.labels).sum().item()


def create_card(
    model: EfficientVMambaForImageClassification,
    epochs: int,
    num_train: int,
    num_held_out: int,
    correct: int,
    correct_negatives: int,
) -> ModelCard:
    accuracy = correct / num_held_out
    metadata = ModelCardData(
        model_name="EfficientVMamba digits",
        library_name="transformers",
        pipeline_tag="image-classification",
        license="apache-2.0",
        tags=["efficientvmamba", "vision", "mamba", "digits"],
        metrics=["accuracy"],
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type="digits",
                dataset_name="scikit-learn digits, held-out third",
                metric_type="accuracy",
                metric_value=round(accuracy, 4),
            )
        ],
    )
    return ModelCard(
        CARD.format(
            metadata=metadata.to_yaml(),
            num_parameters=model.num_parameters(),
            hidden_sizes=", ".join(map(str, model.config.hidden_sizes)),
            image_size=IMAGE_SIZE,
            picture_size=PICTURE_SIZE,
            seed=SEED,
            num_train=num_train,
            num_held_out=num_held_out,
            correct=correct,
            accuracy=accuracy,
            correct_negatives=correct_negatives,
            accuracy_negatives=correct_negatives / num_held_out,
            epochs=epochs,
            batch_size=BATCH_SIZE,
            learning_rate=LEARNING_RATE,
            weight_decay=WEIGHT_DECAY,
            label_smoothing=LABEL_SMOOTHING,
        )
    )


def main(
    output: Annotated[
        Path, typer.Option(help="Folder of the checkpoint. Examples go to `examples` beside it.")
    ] = Path("demo/digits"),
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = EPOCHS,
) -> list[float]:
    """Trains the demonstration checkpoint on handwritten digits. Returns the mean loss of every epoch."""
    if output.exists() and not (output / "config.json").exists():
        raise UserError(
            f"{output} exists and holds no checkpoint: choose another --output, this one would be replaced"
        )
    console = Console()
    start = time.monotonic()
    training, held_out = load_splits()
    negatives = Digits([ImageOps.invert(image) for image in held_out.images], held_out.labels)

    torch.manual_seed(SEED)
    model, image_processor = create_model(), create_image_processor()
    losses = train(model, to_pixel_values(training, image_processor), training.labels, epochs)

    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=output.parent, prefix=".digits-") as workspace:
        folder = Path(workspace) / "new"
        model.save_pretrained(folder)
        image_processor.save_pretrained(folder)
        correct, correct_negatives = evaluate(folder, held_out), evaluate(folder, negatives)
        num_train, num_held_out = len(training.labels), len(held_out.labels)
        create_card(model, epochs, num_train, num_held_out, correct, correct_negatives).save(folder / "README.md")
        if output.exists():
            output.rename(Path(workspace) / "old")
        folder.rename(output)
    save_examples(output.parent / "examples", held_out)

    console.print(
        f"{output}: {correct} of {num_held_out} held-out digits right ({correct / num_held_out:.2%}), "
        f"{correct_negatives} as negatives, {time.monotonic() - start:.0f} s"
    )
    return losses


if __name__ == "__main__":
    try:
        typer.run(main)
    except UserError as error:
        sys.exit(f"Error: {error}")
