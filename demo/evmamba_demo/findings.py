"""What a segmentation model or a detector finds in a picture, and drawings of it."""

import colorsys
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from evmamba_hub.dense_tasks import DETECTION
from evmamba_hub.inference.dense import DenseModel


# Results have as many pixels as the picture, with a number for each class in between. Small pictures are drawn larger.
MAX_SIDE = 768

# Detectors return as many boxes as they have queries, most of them without an object.
MAX_BOXES = 100

# distinct for color-blind readers (Okabe and Ito)
PALETTE = [(230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167)]
GOLDEN_RATIO = 0.618  # of the hues: successive classes differ
BACKGROUND = "background"  # stays as it is


class Color(NamedTuple):
    red: int
    green: int
    blue: int

    @property
    def is_light(self) -> bool:
        return 0.299 * self.red + 0.587 * self.green + 0.114 * self.blue > 140

    @property
    def css(self) -> str:
        return f"rgb({self.red}, {self.green}, {self.blue})"


@dataclass
class Finding:
    """A class with its pixels, or an object with its box."""

    label: str
    color: Color | None  # None for the background
    score: float | None = None  # semantic segmentation has none
    share: float | None = None  # of the pixels
    box: tuple[int, int, int, int] | None = None  # left, top, right, bottom, in pixels of the picture

    def as_json(self) -> dict:
        """Return the label and what else is known."""
        known = {"score": self.score, "share": self.share, "box": self.box}
        return {"label": self.label, **{name: value for name, value in known.items() if value is not None}}


@dataclass
class Findings:
    """All that a model finds in a picture."""

    picture: Image.Image
    items: list[Finding]
    places: np.ndarray | None = None  # (H, W): index of the item at each pixel, -1 for none
    milliseconds: float = 0.0  # of the forward pass

    @property
    def scale(self) -> int:
        """The factor by which drawings enlarge the picture."""
        return max(1, MAX_SIDE // max(self.picture.size))

    def enlarge(self) -> Image.Image:
        return self.picture.resize((self.picture.width * self.scale, self.picture.height * self.scale))

    def select(self, threshold: float) -> list[Finding]:
        """Return the items with at least this score, and those without a score."""
        return [each for each in self.items if each.score is None or each.score >= threshold]


def choose_color(index: int) -> Color:
    """Return the color of a class."""
    if index < len(PALETTE):
        return Color(*PALETTE[index])
    lightness = 0.4 if index % 2 else 0.65
    return Color(*(round(255 * part) for part in colorsys.hls_to_rgb(index * GOLDEN_RATIO % 1, lightness, 0.7)))


def find(model: DenseModel, image: Image.Image) -> Findings:
    """Run a model on a picture in RGB. Returns what it finds in the picture, scaled down if it is large."""
    picture = image.copy()
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    if model.task is DETECTION:
        return find_objects(model, picture)
    return find_regions(model, picture)


def find_objects(model: DenseModel, picture: Image.Image) -> Findings:
    """Return the boxes, the best first."""
    results, seconds = model.run(picture, threshold=0.0)
    label2id = model.network.config.label2id
    boxes = []
    for each in sorted(results, key=lambda each: -each["score"])[:MAX_BOXES]:
        left, top, right, bottom = (each["box"][side] for side in ("xmin", "ymin", "xmax", "ymax"))
        box = max(left, 0), max(top, 0), min(right, picture.width), min(bottom, picture.height)
        boxes.append(Finding(each["label"], choose_color(label2id[each["label"]]), each["score"], box=box))
    return Findings(picture, boxes, milliseconds=1000 * seconds)


def find_regions(model: DenseModel, picture: Image.Image) -> Findings:
    """Return the classes or segments, the largest first."""
    results, seconds = model.run(picture)
    label2id = model.network.config.label2id
    masks = [np.asarray(each["mask"]) > 0 for each in results]
    order = sorted(range(len(results)), key=lambda index: -masks[index].sum())
    places = np.full((picture.height, picture.width), -1, dtype=np.int16)
    items = []
    for index in order:
        each, mask = results[index], masks[index]
        places[mask] = len(items)
        color = None if each["label"].lower() == BACKGROUND else choose_color(label2id[each["label"]])
        items.append(Finding(each["label"], color, each["score"], share=float(mask.mean())))
    return Findings(picture, items, places, 1000 * seconds)


def draw_regions(findings: Findings, opacity: float) -> Image.Image:
    """Tints the pixels of each class in its color."""
    pixels = np.array(findings.enlarge(), dtype=np.float32)
    places = findings.places.repeat(findings.scale, axis=0).repeat(findings.scale, axis=1)
    for index, item in enumerate(findings.items):
        if item.color is not None:
            inside = places == index
            pixels[inside] = (1 - opacity) * pixels[inside] + opacity * np.array(item.color, dtype=np.float32)
    return Image.fromarray(pixels.round().astype(np.uint8))


def draw_tag(picture: Image.Image, text: str, left: int, top: int, color: Color) -> None:
    """Writes a text on a color above a place, or as close to it as the picture allows."""
    draw, size = ImageDraw.Draw(picture), max(10, max(picture.size) // 40)
    font, margin = ImageFont.load_default(size), size // 5
    _, _, width, height = draw.textbbox((margin, 0), text, font=font)
    left, top = max(0, min(left, picture.width - width - margin)), max(0, top - height - margin)
    draw.rectangle((left, top, left + width + margin, top + height + margin), fill=color)
    draw.text((left + margin, top), text, font=font, fill="black" if color.is_light else "white")


def draw_boxes(findings: Findings, boxes: list[Finding]) -> Image.Image:
    """Draws boxes with their place in the list and their labels, the best on top."""
    picture, scale = findings.enlarge(), findings.scale
    for number, each in reversed(list(enumerate(boxes, start=1))):
        left, top, right, bottom = (scale * side for side in each.box)
        if left < right and top < bottom:
            outline = {"outline": each.color, "width": max(2, max(picture.size) // 200)}
            ImageDraw.Draw(picture).rectangle((left, top, right, bottom), **outline)
            # the font has Latin letters alone, and the list beside the picture has every label
            label = each.label.partition(",")[0] if each.label.isascii() else ""
            draw_tag(picture, f"{number} {label}".rstrip(), left, top, each.color)
    return picture
