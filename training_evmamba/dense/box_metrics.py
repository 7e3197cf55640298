"""COCO's average precision of boxes, by pycocotools.

Reference: https://cocodataset.org/#detection-eval
"""

from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from typing import NamedTuple

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from training_evmamba.dense.boxes import Objects, from_corners


# the places of COCOeval's summary
SUMMARY = {"map": 0, "map_50": 1, "map_75": 2, "map_small": 3, "map_medium": 4, "map_large": 5, "mar_100": 8}
UNDEFINED = -1  # COCOeval's result for a size or a class without objects


class Detections(NamedTuple):
    """The predictions for an image."""

    scores: np.ndarray  # (N,)
    labels: np.ndarray  # (N,)
    corners: np.ndarray  # (N, 4): x and y of the upper left and of the lower right corner, in pixels


def list_truths(truths: Sequence[Objects]) -> list[dict]:
    """Return the objects of all images as annotations of COCO. Ids start at 1, as pycocotools needs them."""
    return [
        {
            "image_id": image,
            "category_id": int(label),
            "bbox": box.tolist(),
            "area": float(area),
            "iscrowd": int(is_crowd),
        }
        for image, objects in enumerate(truths)
        for box, label, area, is_crowd in zip(*objects, strict=True)
    ]


def list_detections(detections: Sequence[Detections]) -> np.ndarray:
    """Return the predictions for all images, (N, 7): image, x, y, width, height, score, label."""
    rows = [
        np.column_stack([np.full(len(each.scores), image), from_corners(each.corners), each.scores, each.labels])
        for image, each in enumerate(detections)
    ]
    return np.concatenate([np.empty((0, 7)), *rows])


def measure_boxes(
    truths: Sequence[Objects], detections: Sequence[Detections], class_names: Sequence[str]
) -> tuple[dict[str, float], dict[str, float]]:
    """Compare predictions with the objects of the images.

    Crowds are ignored, and so are predictions inside of them. At most 100 predictions of an image count.

    Returns:
        The mean average precision over IoU 0.5 to 0.95, at 0.5, at 0.75, and by size of objects, and the mean average
        recall. Sizes without objects are left out. Then, the average precision of each class that has objects.
    """
    with redirect_stdout(StringIO()):  # pycocotools prints
        truth = COCO()
        truth.dataset = {
            "images": [{"id": image} for image in range(len(truths))],
            "categories": [{"id": label} for label in range(len(class_names))],
            "annotations": [{"id": number, **each} for number, each in enumerate(list_truths(truths), start=1)],
        }
        truth.createIndex()
        found = list_detections(detections)
        evaluation = COCOeval(truth, truth.loadRes(found) if len(found) else COCO(), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # (IoU, recall, class) of objects of all sizes
    by_class = {
        name: float(precision[:, :, label].mean())
        for label, name in enumerate(class_names)
        if (precision[:, :, label] != UNDEFINED).any()
    }
    summary = {name: float(evaluation.stats[place]) for name, place in SUMMARY.items()}
    return {name: value for name, value in summary.items() if value != UNDEFINED}, by_class
