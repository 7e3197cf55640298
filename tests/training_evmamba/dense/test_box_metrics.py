"""COCO's average precision, compared with values that a reader can compute."""

import numpy as np
import pytest

from training_evmamba.dense.box_metrics import Detections, measure_boxes
from training_evmamba.dense.boxes import create_objects, to_corners


NAMES = ["disc", "box"]


def detect(boxes: list, labels: list[int], scores: list[float]) -> Detections:
    corners = to_corners(np.array(boxes, dtype=float).reshape(-1, 4))
    return Detections(np.array(scores), np.array(labels), corners)


NOTHING = detect([], [], [])


def test_perfect_predictions():
    truths = [create_objects([[0, 0, 10, 10], [20, 20, 40, 40]], [0, 1]), create_objects([], [])]
    summary, by_class = measure_boxes(
        truths, [detect([[0, 0, 10, 10], [20, 20, 40, 40]], [0, 1], [0.9, 0.8]), NOTHING], NAMES
    )
    names = ["map", "map_50", "map_75", "map_small", "map_medium", "mar_100"]
    assert summary == pytest.approx(dict.fromkeys(names, 1.0))
    assert by_class == pytest.approx({"disc": 1.0, "box": 1.0})


def test_no_predictions(capsys):
    summary, by_class = measure_boxes([create_objects([[0, 0, 10, 10]], [1])], [NOTHING], NAMES)
    assert summary == dict.fromkeys(["map", "map_50", "map_75", "map_small", "mar_100"], 0.0)
    assert by_class == {"box": 0.0}
    assert capsys.readouterr().out == ""


def test_iou_decides():
    """A box that covers 0.6 of the union counts at IoU 0.5, 0.55 and 0.6."""
    summary, _ = measure_boxes([create_objects([[0, 0, 10, 10]], [0])], [detect([[0, 0, 10, 6]], [0], [0.9])], NAMES)
    assert (summary["map_50"], summary["map_75"]) == pytest.approx((1.0, 0.0))
    assert summary["map"] == pytest.approx(0.3)


def test_wrong_class_and_order_of_scores():
    """The false box of the higher score halves the precision of the class."""
    truths = [create_objects([[0, 0, 10, 10]], [0])]
    found = detect([[0, 0, 10, 10], [40, 40, 10, 10], [0, 0, 10, 10]], [0, 0, 1], [0.5, 0.9, 0.9])
    summary, by_class = measure_boxes(truths, [found], NAMES)
    assert summary["map_50"] == pytest.approx(0.5)
    assert by_class == {"disc": pytest.approx(0.5)}


def test_crowd_is_ignored():
    truths = [create_objects([[0, 0, 10, 10], [20, 20, 40, 40]], [0, 0], is_crowd=[False, True])]
    in_crowd = detect([[22, 22, 8, 8], [0, 0, 10, 10]], [0, 0], [0.9, 0.5])
    summary, _ = measure_boxes(truths, [in_crowd], NAMES)
    assert summary["map"] == pytest.approx(1.0)
    as_object = [create_objects([[0, 0, 10, 10], [20, 20, 40, 40]], [0, 0])]
    assert measure_boxes(as_object, [in_crowd], NAMES)[0]["map"] < 0.6


def test_sizes_go_by_the_area_of_the_object():
    """A thin object in a large box is small."""
    truths = [create_objects([[0, 0, 200, 200]], [0], areas=[500])]
    summary, _ = measure_boxes(truths, [detect([[0, 0, 200, 200]], [0], [0.9])], NAMES)
    assert summary["map_small"] == pytest.approx(1.0)
    assert "map_large" not in summary
