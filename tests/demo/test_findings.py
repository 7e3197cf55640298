"""What the demo shows of segmentation models and detectors."""

import itertools
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from dense_models import DETECTOR, IMAGE_PROCESSORS, LABELS, SEGMENTER, create_dense_model, save_dense_model
from evmamba_demo.bundled import find_bundled_model, find_photographs
from evmamba_demo.dense_page import DenseDemonstration, describe_boxes, list_findings
from evmamba_demo.findings import BACKGROUND, Color, Finding, Findings, choose_color, draw_boxes
from evmamba_demo.interface import prepare_app
from evmamba_demo.models import Models
from evmamba_hub.dense_tasks import DETECTION, SEGMENTATION
from evmamba_hub.errors import Notice, UserError
from evmamba_hub.inference import dense
from evmamba_hub.inference.dense import load_dense_model


PHOTOGRAPH = str(find_photographs()[0])
RED = Color(255, 0, 0)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        name: load_dense_model(str(save_dense_model(folder / name, name)), device="cpu") for name in IMAGE_PROCESSORS
    }


@pytest.mark.parametrize("name", IMAGE_PROCESSORS)
def test_every_head_is_shown(models, name):
    model = models[name]
    demonstration = DenseDemonstration(model)
    assert model.task is (DETECTION if "Detection" in name else SEGMENTATION)
    assert model.execution.optimized
    endpoint = demonstration.detect if demonstration.is_detector else demonstration.segment
    view, found, described = endpoint(PHOTOGRAPH, 0)
    with Image.open(PHOTOGRAPH) as photograph:
        assert view.size == tuple(2 * side for side in photograph.size)  # which has 320 x 213 pixels
    assert "ms on cpu in float32, optimized (backend: " in described
    for each in found:
        assert each["label"] in LABELS
        if "box" in each:
            left, top, right, bottom = each["box"]
            assert 0 <= left <= right <= 320 and 0 <= top <= bottom <= 213
    if demonstration.is_detector:
        scores = [each["score"] for each in found]
        assert scores == sorted(scores, reverse=True) and scores
    else:
        assert sum(each["share"] for each in found) <= 1 + 1e-6


def test_the_pipeline_gives_the_same(models):
    """The optimized copy and the drawing leave what the pipeline finds."""
    model = models[SEGMENTER]
    findings, _ = DenseDemonstration(model).find(PHOTOGRAPH)
    expected = model.pipeline(findings.picture)
    assert {each["label"] for each in expected} == {each.label for each in findings.items}
    for each in expected:
        (index,) = [index for index, item in enumerate(findings.items) if item.label == each["label"]]
        np.testing.assert_array_equal(findings.places == index, np.asarray(each["mask"]) > 0)


def test_opacity_tints_all_but_the_background(models):
    demonstration = DenseDemonstration(models[SEGMENTER])
    findings, _ = demonstration.find(PHOTOGRAPH)
    middle = findings.places.shape[1] // 2
    findings.places[:, :middle], findings.places[:, middle:] = 0, 1
    findings.items = [Finding(BACKGROUND, None, share=0.5), Finding("sky", RED, share=0.5)]
    original, middle = np.asarray(findings.enlarge()), findings.scale * middle
    for percent in (0, 100):
        view = np.asarray(demonstration.draw(findings, percent)[0])
        np.testing.assert_array_equal(view[:, :middle], original[:, :middle])
        assert (view[:, middle:] == (RED if percent else original[:, middle:])).all()


def test_the_threshold_selects_boxes(models):
    demonstration = DenseDemonstration(models[DETECTOR])
    findings, _ = demonstration.find(PHOTOGRAPH)
    findings.items = [Finding("cat", RED, score, box=(10, 10, 100, 100)) for score in (0.9, 0.5, 0.2)]
    for threshold, count in [(0, 3), (50, 2), (51, 1)]:
        _, listed, how = demonstration.draw(findings, threshold)
        assert listed.count("<li") == count and how == f"Boxes that reach the threshold: {count}."
    view, listed, how = demonstration.draw(findings, 95)
    assert "No box reaches the threshold. The best has 90%: lower the threshold" in how
    np.testing.assert_array_equal(np.asarray(view), np.asarray(findings.enlarge()))


@pytest.mark.parametrize("box", [(0, 0, 49, 39), (48, 38, 50, 40), (5, 5, 5, 9), (-3, -3, 60, 60), (0, 0, 0, 0)])
@pytest.mark.parametrize("label", ["cat, house cat", "狗", "x" * 200, ""])
def test_boxes_of_any_place_and_label_are_drawn(box, label):
    view = draw_boxes(Findings(Image.new("RGB", (50, 40), "white"), []), [Finding(label, RED, 0.5, box=box)])
    assert view.size == (750, 600)
    assert (np.asarray(view) != 255).any() == (box[0] < box[2] and box[1] < box[3])


def test_labels_are_no_html():
    listed = list_findings([Finding("<script>alert(1)</script>", RED, 0.5, box=(0, 0, 1, 1))])
    assert "<script>" not in listed and "&lt;script&gt;" in listed


def test_a_long_list_says_how_much_it_shows():
    boxes = [Finding("cat", RED, 0.9, box=(0, 0, 1, 1))] * 40
    assert list_findings(boxes).count("<li") == 30
    assert describe_boxes(boxes, boxes) == "Boxes that reach the threshold: 40. The list shows the 30 best."


def test_classes_have_different_colors():
    colors = [choose_color(index) for index in range(150)]
    assert len(set(colors)) == 150
    for one, other in itertools.combinations(colors[:20], 2):
        assert np.abs(np.subtract(one, other)).max() > 20


def test_gray_and_transparent_pictures(models, tmp_path):
    for mode, size in [("L", (40, 30)), ("RGBA", (2000, 20)), ("I;16", (9, 9)), ("P", (1, 1))]:
        Image.new(mode, size).save(tmp_path / "picture.png")
        view, _, _ = DenseDemonstration(models[SEGMENTER]).segment(str(tmp_path / "picture.png"), 60)
        assert view.mode == "RGB"


def test_a_missing_or_damaged_picture_is_explained(models, tmp_path):
    demonstration = DenseDemonstration(models[DETECTOR])
    with pytest.raises(UserError, match="Give a picture first"):
        demonstration.detect(None, 50)
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="This file cannot be shown to the network: it is not an image"):
        demonstration.find(str(tmp_path / "broken.png"))
    assert demonstration.draw(None, 50) == (None, None, "")


def test_as_it_is(tmp_path):
    folder = save_dense_model(tmp_path / "model", DETECTOR)
    assert not load_dense_model(str(folder), optimize=False).execution.optimized


def test_a_model_that_cannot_be_optimized_is_announced_once(tmp_path, monkeypatch):
    def add_hook(folder, model_class, load=dense.load_head):
        model = load(folder, model_class)
        for module in model.modules():
            if type(module).__name__ == "EfficientVMambaES2D":
                module.register_forward_hook(lambda *_: None)
        return model

    monkeypatch.setattr(dense, "load_head", add_hook)
    folder = save_dense_model(tmp_path / "model", SEGMENTER)
    with pytest.warns(Notice, match=r"the model runs as it is: .* has hooks") as notices:
        model = load_dense_model(str(folder), device="cpu")
    assert len(notices) == 1 and not model.execution.optimized
    assert DenseDemonstration(model).segment(PHOTOGRAPH, 60)[0] is not None


@pytest.mark.parametrize("num_channels, message", [(1, "takes gray images, and pipelines"), (4, "takes 4 channels")])
def test_other_channels_are_refused(tmp_path, num_channels, message):
    create_dense_model(SEGMENTER, num_channels=num_channels).save_pretrained(save_dense_model(tmp_path, SEGMENTER))
    with pytest.raises(UserError, match=message):
        load_dense_model(str(tmp_path))


@pytest.mark.parametrize(
    "name, message",
    [
        ("OneFormerForUniversalSegmentation", "takes more than images, task_inputs: call its OneFormerFor"),
        (
            DETECTOR,
            r"the image processor of .*, BitImageProcessor(Pil)?, does not read the outputs of a detector: save the ",
        ),
    ],
)
def test_models_that_a_pipeline_cannot_run_are_refused(tmp_path, name, message):
    create_dense_model(name).save_pretrained(tmp_path)
    shutil.copyfile(find_bundled_model() / "preprocessor_config.json", tmp_path / "preprocessor_config.json")
    with pytest.raises(UserError, match=message):
        load_dense_model(str(tmp_path))


def test_a_classifier_is_no_dense_model():
    with pytest.raises(UserError, match="neither a segmentation model nor a detector but EfficientVMambaForImageCl"):
        load_dense_model(str(find_bundled_model()))


@pytest.mark.parametrize("others, allow_any", [(["someone/other"], False), ([], True)])
def test_nothing_is_compared_with_a_detector(tmp_path, others, allow_any):
    folder = str(save_dense_model(tmp_path / "detector", DETECTOR))
    bundled = str(find_bundled_model())
    with pytest.raises(UserError, match="detector is no classifier, and the demonstration compares classifiers only"):
        prepare_app([folder, *others, bundled], allow_any, optimize=True)
    prepare_app([folder, f"{bundled}/"], allow_any=False, optimize=True)


def test_a_classifier_is_not_compared_with_a_detector(tmp_path):
    folder = save_dense_model(tmp_path / "detector", DETECTOR)
    models = Models([str(find_bundled_model()), str(folder)], allow_any=False)
    with pytest.raises(UserError, match=r"detector is a detector \(RTDetrForObjectDetection\) and no classifier: "):
        models.load("detector")


def test_the_forward_pass_of_the_measurement(models):
    outputs = models[DETECTOR].forward(torch.zeros(1, 3, 64, 64))
    assert outputs.logits.shape[0] == 1 and not outputs.logits.requires_grad
