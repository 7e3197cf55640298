"""Draw images of shapes, with masks and with boxes, to try the programs for segmentation and detection.

    python examples/draw_shapes.py shapes
    python examples/semantic_segmentation.py --dataset shapes --output-dir runs/shapes

Each image shows noisy discs, boxes and triangles on a gray gradient. The directory gets the splits `train` and
`validation`. Each has `images/`, `masks/` with the classes as palette indices, and `annotations.json` with the boxes
of the visible parts in COCO's format.
"""

import json
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import typer
from PIL import Image, ImageDraw

from evmamba_hub.cli.console import create_app, run_app
from evmamba_hub.errors import UserError
from evmamba_hub.files import check_is_free, staged


CLASSES = ["background", "disc", "box", "triangle"]
COLORS = [(226, 232, 240), (194, 65, 12), (29, 78, 216), (21, 128, 61)]  # of the classes, in masks
SHORTEST_BOX_SIDE = 3  # smaller visible parts are not annotated


class Scene(NamedTuple):
    image: Image.Image
    mask: Image.Image  # class indices, with a palette
    boxes: list[tuple[int, list[int]]]  # class, and [x, y, width, height] of the visible part


def draw_scene(rng: np.random.Generator, size: tuple[int, int]) -> Scene:
    """Draw three to five shapes of random kinds, colors, positions and sizes. Later shapes cover earlier ones."""
    width, height = size
    gradient = np.linspace(*rng.uniform(60, 200, size=2), num=width).round().astype(np.uint8)  # [W]
    image = Image.fromarray(np.tile(gradient, (height, 1))).convert("RGB")
    objects = Image.new("L", size)  # number of the visible object, from 1
    kinds = rng.integers(1, len(CLASSES), size=rng.integers(3, 6)).tolist()
    for number, kind in enumerate(kinds, start=1):
        radius = rng.uniform(0.12, 0.22) * min(size)
        x, y = rng.uniform((0, 0), size)
        color = tuple(rng.integers(0, 256, size=3).tolist())
        for canvas, fill in ((image, color), (objects, number)):
            draw = ImageDraw.Draw(canvas)
            if CLASSES[kind] == "disc":
                draw.circle((x, y), radius, fill=fill)
            elif CLASSES[kind] == "box":
                draw.rectangle((x - radius, y - radius, x + radius, y + radius), fill=fill)
            else:
                draw.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=fill)
    noisy = np.asarray(image) + rng.normal(0, 12, size=(height, width, 3))
    numbers = np.asarray(objects)  # [H, W]
    mask = Image.fromarray(np.array([0, *kinds], dtype=np.uint8)[numbers])
    mask.putpalette([band for color in COLORS for band in color])
    return Scene(Image.fromarray(noisy.clip(0, 255).astype(np.uint8)), mask, find_boxes(numbers, kinds))


def find_boxes(numbers: np.ndarray, kinds: list[int]) -> list[tuple[int, list[int]]]:
    """Return the class and the box of each object's visible part.

    Args:
        numbers: The number of the visible object, (H, W).
        kinds: The class of each object, from number 1 on.
    """
    boxes = []
    for number, kind in enumerate(kinds, start=1):
        rows, columns = np.nonzero(numbers == number)
        if len(rows) == 0:
            continue
        left, top = int(columns.min()), int(rows.min())
        box = [left, top, int(columns.max()) + 1 - left, int(rows.max()) + 1 - top]
        if min(box[2:]) >= SHORTEST_BOX_SIDE:
            boxes.append((kind, box))
    return boxes


def draw_split(folder: Path, number: int, size: tuple[int, int], rng: np.random.Generator) -> None:
    """Draw the images of a split, with masks and boxes."""
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    images, annotations = [], []
    for idx in range(number):
        scene, name = draw_scene(rng, size), f"{idx:04}.png"
        scene.image.save(folder / "images" / name)
        scene.mask.save(folder / "masks" / name)
        images.append({"id": idx, "file_name": name, "width": size[0], "height": size[1]})
        for kind, box in scene.boxes:
            about = {"id": len(annotations) + 1, "image_id": idx, "category_id": kind}
            annotations.append({**about, "bbox": box, "area": box[2] * box[3], "iscrowd": 0})
    categories = [{"id": kind, "name": name} for kind, name in enumerate(CLASSES) if kind > 0]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(content), encoding="utf-8")


def draw_shapes(
    folder: Annotated[Path, typer.Argument(help="New directory to write.")],
    training_images: Annotated[int, typer.Option(min=1, help="Number of images in the split `train`.")] = 400,
    validation_images: Annotated[int, typer.Option(min=1, help="Number of images in the split `validation`.")] = 60,
    size: Annotated[tuple[int, int], typer.Option(help="Width and height of the images.")] = (96, 96),
    seed: Annotated[int, typer.Option(min=0, help="Seed of the images.")] = 0,
) -> None:
    """Draw images of shapes with masks and boxes, for the programs of segmentation and detection."""
    if min(size) < 16:
        raise UserError(f"--size {size[0]} {size[1]} is too small for shapes: give sides of 16 pixels or more")
    check_is_free(folder)
    with staged(folder.absolute()) as staging:
        for number, (split, num_images) in enumerate([("train", training_images), ("validation", validation_images)]):
            draw_split(staging / split, num_images, size, np.random.default_rng((seed, number)))
        (staging / "labels.txt").write_text("".join(f"{name}\n" for name in CLASSES), encoding="utf-8")


if __name__ == "__main__":
    app = create_app()
    app.command()(draw_shapes)
    run_app(app)
