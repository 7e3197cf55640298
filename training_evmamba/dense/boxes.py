"""Images with boxes around their objects, in one form for all layouts of datasets."""

from collections.abc import Iterable, Iterator
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from evmamba_hub.errors import UserError
from evmamba_hub.images.images import read_header, read_image
from evmamba_hub.images.labeled_images import LabeledImages, Share
from evmamba_hub.wording import to_count


ALL_IMAGES = Share(0, 1)
MAX_SURVEYED = 200  # images whose files are looked at before a run. Datasets have one layout
ROUNDING = 1.0  # pixels by which rounded boxes reach outside of an image
MIN_CORNER_BOXES = 3  # boxes that would reach outside, if they are to tell that all are corners
MIN_CORNER_SHARE = 0.2
MAX_DROPPED_SHARE = 0.5  # more tell that the boxes are in another form

# What Pillow's transpositions do to x and y: whether they swap them, then mirror x, then mirror y
TURNS = {
    Image.Transpose.FLIP_LEFT_RIGHT: (False, True, False),
    Image.Transpose.FLIP_TOP_BOTTOM: (False, False, True),
    Image.Transpose.ROTATE_180: (False, True, True),
    Image.Transpose.TRANSPOSE: (True, False, False),
    Image.Transpose.ROTATE_90: (True, False, True),  # counterclockwise
    Image.Transpose.ROTATE_270: (True, True, False),
    Image.Transpose.TRANSVERSE: (True, True, True),
}


BoxForm = Literal["xywh", "xyxy"]  # x, y, width, height as COCO has them, or two corners as Pascal VOC has them


class Objects(NamedTuple):
    """The objects of an image."""

    boxes: np.ndarray  # (N, 4), float64: x and y of the upper left corner, width, height, in pixels
    labels: np.ndarray  # (N,), int64, class indices
    areas: np.ndarray  # (N,), float64, of the objects, which may be smaller than their boxes
    is_crowd: np.ndarray  # (N,), bool: a box around many objects

    def select(self, choice: np.ndarray) -> "Objects":
        """Return some of the objects, by a mask or by indices."""
        return Objects(*(field[choice] for field in self))


def create_objects(
    boxes: Any, labels: Any, areas: Any = None, is_crowd: Any = None, *, form: BoxForm = "xywh"
) -> Objects:
    """Return objects from lists. By default, areas are those of the boxes, and no object is a crowd.

    Raises:
        ValueError: If the boxes are not four numbers each.
    """
    boxes = np.asarray(boxes, dtype=np.float64).reshape(len(boxes), 4)
    if not np.isfinite(boxes).all():
        raise ValueError("a number is not finite")
    if form == "xyxy":
        boxes = from_corners(boxes)
    box_areas = boxes[:, 2] * boxes[:, 3]
    areas = box_areas if areas is None else np.asarray(areas, dtype=np.float64)
    return Objects(
        boxes,
        np.asarray(labels, dtype=np.int64),
        np.where(np.isfinite(areas), areas, box_areas),
        np.zeros(len(boxes), dtype=bool) if is_crowd is None else np.asarray(is_crowd, dtype=bool),
    )


def to_corners(boxes: np.ndarray) -> np.ndarray:
    """Convert x, y, width, height to x and y of the upper left and of the lower right corner, (N, 4)."""
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def from_corners(corners: np.ndarray) -> np.ndarray:
    """Convert the corners of boxes to x, y, width, height, (N, 4)."""
    return np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)


def turn_objects(objects: Objects, turn: Image.Transpose, size: tuple[int, int]) -> Objects:
    """Turn boxes as Pillow turns an image.

    Args:
        size: Width and height before the turn.
    """
    swaps, mirrors_x, mirrors_y = TURNS[turn]
    x, y, width, height = objects.boxes.T
    if swaps:
        x, y, width, height, size = y, x, height, width, size[::-1]
    if mirrors_x:
        x = size[0] - x - width
    if mirrors_y:
        y = size[1] - y - height
    return objects._replace(boxes=np.stack([x, y, width, height], axis=1))


class Cleaned(NamedTuple):
    objects: Objects
    num_clipped: int  # boxes that reached outside of the image
    num_dropped: int  # boxes without a part inside of the image that has a width and a height


def clean(objects: Objects, size: tuple[int, int]) -> Cleaned:
    """Clip boxes to the image, and drop those of which nothing is left.

    Args:
        size: Width and height of the image.
    """
    corners = to_corners(objects.boxes)
    inside = corners.clip(0, (*size, *size))
    is_left = (inside[:, 2:] > inside[:, :2]).all(axis=1)
    is_clipped = is_left & (np.abs(inside - corners) > ROUNDING).any(axis=1)
    boxes = from_corners(inside)
    areas = np.minimum(objects.areas, boxes[:, 2] * boxes[:, 3])
    cleaned = objects._replace(boxes=boxes, areas=areas).select(is_left)
    return Cleaned(cleaned, int(is_clipped.sum()), int((~is_left).sum()))


class BoxImage(NamedTuple):
    name: str  # for messages
    source: Path | bytes
    objects: Objects
    size: tuple[int, int] | None  # width and height that the annotations are for, if the dataset names them

    def open(self) -> Any:
        return self.source if isinstance(self.source, Path) else BytesIO(self.source)

    def read(self) -> tuple[Image.Image, Objects]:
        """Read the image, upright and in RGB, and its objects, with boxes inside of it. Errors name the image."""
        try:
            image = read_image(self.open())
            return image, clean(self.place_objects(image.size), image.size).objects
        except UserError as error:
            raise UserError(f"{self.name}: {error}") from error

    def place_objects(self, upright_size: tuple[int, int]) -> Objects:
        """Return the objects with boxes in the upright image.

        Boxes are in the frame that has the size of the annotations. If both frames have it, they are in the upright
        one, which annotation tools show.

        Raises:
            UserError: If the annotations are for an image of another size.
        """
        if self.size in (None, upright_size):
            return self.objects
        stored_size, turn = read_header(self.open())
        if self.size != stored_size:
            raise UserError(
                f"it has {describe_size(upright_size)} pixels, and its annotations are for "
                f"{describe_size(self.size)}: scale the boxes, or restore the image that they are for"
            )
        return self.objects if turn is None else turn_objects(self.objects, turn, stored_size)


def describe_size(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def survey(images: LabeledImages, purpose: str) -> list[str]:
    """Look for faults in the boxes of a dataset before a run, and return sentences for the user about them.

    All boxes are checked if the dataset names the sizes of its images. Otherwise, the first images are read.

    Args:
        images: The images.
        purpose: What they are for, in the sentences.

    Raises:
        UserError: If the boxes are in another form than x, y, width and height in pixels.
    """
    first = list(islice(images.read(ALL_IMAGES), MAX_SURVEYED))
    has_sizes = images.num_images is not None and all(image.size is not None for image in first)
    checked = images.read(ALL_IMAGES) if has_sizes else first
    objects_by_size = [(each.objects, size) for each, size in find_sizes(checked)]
    check_form(images.name, objects_by_size)
    is_whole = has_sizes or len(first) == images.num_images
    scope = f"{'' if is_whole else f'first {len(first):,} '}{purpose} images"
    cleaned = [clean(objects, size) for objects, size in objects_by_size]
    num_boxes = sum(len(objects.labels) for objects, _ in objects_by_size)
    if sum(each.num_dropped for each in cleaned) > MAX_DROPPED_SHARE * num_boxes:
        raise UserError(
            f"most boxes of {images.name} have no width and height inside of their images: --box-form says whether "
            "they are x, y, width and height or two corners"
        )
    return [*describe_boxes(cleaned, scope), *describe_turned(first, purpose)]


def find_sizes(images: Iterable[BoxImage]) -> Iterator[tuple[BoxImage, tuple[int, int]]]:
    """Yield images with the width and height that their boxes are for. Skip images that cannot be read."""
    for image in images:
        size = image.size
        if size is None:
            try:
                stored_size, turn = read_header(image.open())
            except UserError:
                continue
            size = stored_size[::-1] if turn is not None and TURNS[turn][0] else stored_size
        yield image, size


def check_form(name: str, objects_by_size: list[tuple[Objects, tuple[int, int]]]) -> None:
    """Check that boxes are x, y, width and height in pixels.

    Raises:
        UserError: If they are fractions of the image, or corners.
    """
    boxes = np.concatenate([np.empty((0, 4)), *(objects.boxes for objects, _ in objects_by_size)])
    sizes = np.concatenate(
        [np.empty((0, 2)), *(np.tile(size, (len(objects.labels), 1)) for objects, size in objects_by_size)]
    )
    if len(boxes) == 0:
        return
    if (boxes >= 0).all() and (boxes <= 1).all():
        raise UserError(
            f"the boxes of {name} are fractions of the image, such as {describe_box(boxes[0])}: multiply them by its "
            "width and height"
        )
    is_ordered = (boxes[:, 2:] > boxes[:, :2]).all()
    fits_as_corners = (boxes[:, 2:] <= sizes + ROUNDING).all()
    is_outside = (boxes[:, :2] + boxes[:, 2:] > sizes + ROUNDING).any(axis=1)
    if is_ordered and fits_as_corners and is_outside.sum() >= max(MIN_CORNER_BOXES, MIN_CORNER_SHARE * len(boxes)):
        raise UserError(
            f"the boxes of {name} look like two corners, such as {describe_box(boxes[is_outside][0])}: give "
            "--box-form xyxy, or write them as x, y, width and height"
        )


def describe_box(box: np.ndarray) -> str:
    return "[" + ", ".join(f"{value:g}" for value in box) + "]"


def describe_boxes(cleaned: list[Cleaned], scope: str) -> list[str]:
    """Return sentences for the user about boxes that are changed or dropped, and about images without objects."""
    notes = []
    if num_clipped := sum(each.num_clipped for each in cleaned):
        notes.append(f"Clipped the boxes of {to_count(num_clipped, 'object')} to the image, of the {scope}")
    if num_dropped := sum(each.num_dropped for each in cleaned):
        notes.append(f"Dropped {to_count(num_dropped, 'object')} with a box of no width or height, of the {scope}")
    if num_empty := sum(len(each.objects.labels) == 0 for each in cleaned):
        notes.append(f"Kept {to_count(num_empty, 'image')} without objects, of the {scope}")
    return notes


def describe_turned(images: list[BoxImage], purpose: str) -> list[str]:
    """Return a sentence for the user about boxes that are turned with their images."""
    num_turned = 0
    for image, size in find_sizes(images):
        try:
            stored_size, turn = read_header(image.open())
        except UserError:
            continue
        num_turned += turn is not None and TURNS[turn][0] and size == stored_size != stored_size[::-1]
    if not num_turned:
        return []
    return [
        f"Turned the boxes of {to_count(num_turned, 'image')} by the EXIF orientation, of the first {len(images):,} "
        f"{purpose} images: their annotations have the width and height before the turn"
    ]
