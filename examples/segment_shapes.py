"""Semantic segmentation with EfficientVMamba as the backbone of UperNet, from a classification checkpoint.

The images are generated: noisy discs, boxes and triangles on a gray gradient. The steps are the same for any dataset.
Load the backbone from a checkpoint, add a head, train, predict, and look at the masks.

    python examples/segment_shapes.py
    python examples/segment_shapes.py --checkpoint someone/efficientvmamba-tiny --steps 500
"""

from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import typer
from PIL import Image, ImageDraw
from rich.console import Console
from rich.progress import Progress, TextColumn
from transformers import UperNetConfig, UperNetForSemanticSegmentation

# the name in `transformers` itself is a placeholder that raises if torchvision is missing (5.17)
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from evmamba_demo.bundled import find_bundled_model
from evmamba_hub.errors import UserError, exit_on_user_error
from evmamba_hub.info import find_configs
from modeling_evmamba import EfficientVMambaBackbone


console = Console(highlight=False, soft_wrap=True)

CLASSES = ["background", "disc", "box", "triangle"]
COLORS = [(226, 232, 240), (194, 65, 12), (29, 78, 216), (21, 128, 61)]  # of the classes, in the picture
STAGES = ["stage1", "stage2", "stage3", "stage4"]
TRAINING_SIZE = (96, 96)  # (width, height)
TEST_SIZE = (150, 109)  # odd and different: neither the backbone nor the head depends on the size
NUM_TEST_IMAGES = 32
NUM_SHOWN = 4
GAP = 6  # pixels between the images of the picture
BATCH_SIZE = 16


class Scene(NamedTuple):
    image: Image.Image
    mask: np.ndarray  # (H, W), int64, indices of CLASSES


def draw_scene(generator: np.random.Generator, size: tuple[int, int]) -> Scene:
    """Draw three to five shapes of random kinds, colors, positions and sizes. Later shapes cover earlier ones."""
    width, height = size
    gradient = np.linspace(*generator.uniform(60, 200, size=2), num=width).round().astype(np.uint8)  # (W,)
    image = Image.fromarray(np.tile(gradient, (height, 1))).convert("RGB")
    mask = Image.new("L", size)
    for _ in range(generator.integers(3, 6)):
        kind = int(generator.integers(1, len(CLASSES)))
        radius = generator.uniform(0.12, 0.22) * min(size)
        x, y = generator.uniform((0, 0), size)
        color = tuple(generator.integers(0, 256, size=3).tolist())
        for canvas, fill in ((image, color), (mask, kind)):
            draw = ImageDraw.Draw(canvas)
            if CLASSES[kind] == "disc":
                draw.circle((x, y), radius, fill=fill)
            elif CLASSES[kind] == "box":
                draw.rectangle((x - radius, y - radius, x + radius, y + radius), fill=fill)
            else:
                draw.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=fill)
    noisy = np.asarray(image) + generator.normal(0, 12, size=(height, width, 3))
    return Scene(Image.fromarray(noisy.clip(0, 255).astype(np.uint8)), np.asarray(mask).astype(np.int64))


def draw_scenes(generator: np.random.Generator, number: int, size: tuple[int, int]) -> list[Scene]:
    return [draw_scene(generator, size) for _ in range(number)]


def create_segmenter(checkpoint: str) -> UperNetForSemanticSegmentation:
    """Create a UperNet with untrained heads, and a backbone with the weights of a classification checkpoint."""
    # The classifier of the checkpoint is not loaded. The norms of the feature maps are untrained.
    backbone = EfficientVMambaBackbone.from_pretrained(checkpoint, out_features=STAGES)
    config = UperNetConfig(
        backbone_config=backbone.config,
        hidden_size=64,
        auxiliary_in_channels=backbone.channels[2],
        auxiliary_channels=64,
        id2label=dict(enumerate(CLASSES)),
        label2id={name: idx for idx, name in enumerate(CLASSES)},
    )
    segmenter = UperNetForSemanticSegmentation(config)
    segmenter.backbone = backbone
    return segmenter


def to_batch(scenes: list[Scene], image_processor) -> dict[str, torch.Tensor]:
    """Returns `pixel_values` (B, 3, H, W), normalized for the checkpoint in full size, and `labels` (B, H, W)."""
    images = [scene.image for scene in scenes]
    inputs = image_processor(images, do_resize=False, do_center_crop=False, return_tensors="pt")
    labels = torch.from_numpy(np.stack([scene.mask for scene in scenes]))
    return {"pixel_values": inputs.pixel_values, "labels": labels}


def train(
    segmenter: UperNetForSemanticSegmentation, image_processor, generator: np.random.Generator, steps: int
) -> list[float]:  # the loss of every step
    """Train in place, on new images in every step. Return the loss of every step."""
    optimizer = torch.optim.AdamW(segmenter.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=steps)
    losses = []
    segmenter.train()
    with Progress(
        *Progress.get_default_columns(), TextColumn("loss {task.fields[loss]:.3f}"), console=console
    ) as progress:
        task = progress.add_task("Training", total=steps, loss=float("nan"))
        for _ in range(steps):
            loss = segmenter(**to_batch(draw_scenes(generator, BATCH_SIZE, TRAINING_SIZE), image_processor)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
            progress.update(task, advance=1, loss=loss.item())
    return losses


@torch.no_grad()
def predict(segmenter: UperNetForSemanticSegmentation, image_processor, scenes: list[Scene]) -> torch.Tensor:
    """Returns the predicted masks (B, H, W), in the size of the images."""
    pixel_values = to_batch(scenes, image_processor)["pixel_values"]
    return segmenter.eval()(pixel_values).logits.argmax(dim=1)  # UperNet upsamples its logits to the image's size


def measure(predictions: torch.Tensor, scenes: list[Scene]) -> tuple[float, float]:
    """Returns the pixel accuracy and the mean intersection over union of the classes (mIoU)."""
    truth = torch.from_numpy(np.stack([scene.mask for scene in scenes]))
    pairs = (truth * len(CLASSES) + predictions).flatten().bincount(minlength=len(CLASSES) ** 2)
    confusion = pairs.reshape(len(CLASSES), len(CLASSES))  # (true class, predicted class)
    intersection = confusion.diag()
    union = confusion.sum(dim=0) + confusion.sum(dim=1) - intersection
    return (intersection.sum() / confusion.sum()).item(), (intersection / union).mean().item()


def save_picture(path: Path, scenes: list[Scene], predictions: torch.Tensor) -> None:
    """Save one column per scene: the image, its mask, the predicted mask."""
    palette = np.array(COLORS, dtype=np.uint8)
    width, height = scenes[0].image.size
    picture = Image.new("RGB", (len(scenes) * (width + GAP) - GAP, 3 * (height + GAP) - GAP), "white")
    for column, (scene, prediction) in enumerate(zip(scenes, predictions, strict=True)):
        masks = [Image.fromarray(palette[mask]) for mask in (scene.mask, prediction.numpy())]
        for row, image in enumerate([scene.image, *masks]):
            picture.paste(image, (column * (width + GAP), row * (height + GAP)))
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.quantize(128).save(path, optimize=True)


def main(
    checkpoint: Annotated[
        str | None,
        typer.Option(
            help="Directory or Hub id of a classification model.",
            show_default="the bundled model of handwritten digits",
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Number of training steps, of 16 images each.")] = 200,
    output: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("segment_shapes.png"),
    seed: Annotated[int, typer.Option(help="Seed of images and weights.")] = 0,
) -> list[float]:  # the loss of every step
    """Train UperNet on generated shapes, and save a picture of its predictions.

    The picture has a column for each of four held-out images: image, true mask, predicted mask.
    """
    if output.is_dir() or output.suffix.lower() != ".png":
        raise UserError(f"{output} cannot be written: --output takes a file that ends in .png")
    checkpoint = checkpoint or str(find_bundled_model())
    find_configs(checkpoint)  # raises a UserError for other networks
    torch.manual_seed(seed)
    generator = np.random.default_rng(seed)
    try:
        image_processor = AutoImageProcessor.from_pretrained(checkpoint)
        segmenter = create_segmenter(checkpoint)
    except (OSError, ValueError) as error:
        raise UserError(f"the model {checkpoint!r} cannot be loaded: {error}") from error
    test_scenes = draw_scenes(generator, NUM_TEST_IMAGES, TEST_SIZE)

    before = measure(predict(segmenter, image_processor, test_scenes), test_scenes)
    losses = train(segmenter, image_processor, generator, steps)
    predictions = predict(segmenter, image_processor, test_scenes)
    after = measure(predictions, test_scenes)

    save_picture(output, test_scenes[:NUM_SHOWN], predictions[:NUM_SHOWN])
    for name, (accuracy, mean_iou) in {"before": before, "after": after}.items():
        console.print(f"{name:<8} pixel accuracy {accuracy:.1%}, mIoU {mean_iou:.1%}")
    console.print(f"written: {output}")
    return losses


if __name__ == "__main__":
    with exit_on_user_error():
        typer.run(main)
