"""The program for detection: short runs of every detector, the saved model, and its error messages."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from transformers import AutoModelForObjectDetection, pipeline

# the name in `transformers` itself is a placeholder that raises if torchvision is missing (5.17)
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import is_torchvision_available

from evmamba_demo.bundled import find_bundled_model
from evmamba_hub.errors import UserError
from examples.draw_shapes import draw_shapes
from examples.object_detection import DETECTORS, DetectionRecipe, DetectionRun
from modeling_evmamba import EfficientVMambaBackbone
from process_pairs import needs_fork, run_on_two_processes
from training_evmamba.recipe import load_recipe
from weights import assert_same_weights


CLASSES = ["disc", "box", "triangle"]
TINY = {
    "network": {"hidden_sizes": [8, 12, 16, 24], "depths": [1, 1, 1, 1], "state_size": 2},
    "image_size": 64,
    "hidden_size": 32,
    "decoder_layers": 2,
    "num_queries": 8,
    "detector_fields": {},
    "steps": 2,
    "batch_size": 4,
    "num_workers": 0,
    "report_to": [],
}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shapes"
    draw_shapes(folder, training_images=9, validation_images=3, size=(40, 32), seed=0)
    return folder


@pytest.fixture
def make_run(shapes, tmp_path):
    """Create a run of seconds: `make_run(field=value)`."""

    def make(folder: str = "run", resume: bool = False, **values) -> DetectionRun:
        recipe = load_recipe("small", {**TINY, "dataset": str(shapes), **values}, DetectionRecipe)
        AcceleratorState._reset_state(reset_partial_state=True)  # left by the last run in this process
        return DetectionRun(recipe, tmp_path / folder, resume=resume)

    return make


# Deformable DETR always freezes them
@pytest.mark.parametrize(
    ("detector", "freeze_batch_norm"),
    [("d_fine", False), ("d_fine", True), ("rt_detr", False), ("rt_detr", True), ("deformable_detr", False)],
)
def test_run_writes_a_model_that_a_pipeline_loads(detector, freeze_batch_norm, make_run, shapes):
    run = make_run(detector=detector, freeze_batch_norm=freeze_batch_norm)
    results = run.train()
    assert results["images"] == 3
    assert {"map", "map_50", "map_75"} <= results.keys()
    loaded, report = AutoModelForObjectDetection.from_pretrained(run.folder.model_dir, output_loading_info=True)
    assert not any(report.values()), report
    assert_same_weights(loaded.state_dict(), run.model.state_dict())
    detect = pipeline("object-detection", model=str(run.folder.model_dir))
    (file, *_) = sorted((shapes / "validation/images").glob("*.png"))
    found = detect(str(file), threshold=0.0)
    assert len(found) >= TINY["num_queries"]
    assert {each["label"] for each in found} <= set(CLASSES)
    assert detect(str(file), threshold=0.999) == []
    log = run.folder.read_log()
    assert log[-1]["map_50"] == results["map_50"]


def test_pipeline_finds_what_the_evaluation_measures(make_run, shapes):
    """The saved image processor prepares images as the evaluation does."""
    run = make_run()
    run.train()
    (file, *_) = sorted((shapes / "validation/images").glob("*.png"))
    detect = pipeline("object-detection", model=str(run.folder.model_dir))
    with torch.no_grad():
        pixel_values, _ = run.create_evaluation_reader().prepare(run.data.validation[0])
        outputs = run.model.eval()(pixel_values[None])
    (expected,) = run.image_processor.post_process_object_detection(outputs, 0.0, [(32, 40)])
    found = detect(str(file), threshold=0.0)
    assert len(found) == TINY["num_queries"]
    assert [each["score"] for each in found] == pytest.approx(expected["scores"].tolist(), abs=1e-6)
    boxes = [[each["box"][side] for side in ("xmin", "ymin", "xmax", "ymax")] for each in found]
    np.testing.assert_array_equal(boxes, expected["boxes"].int().numpy())


@pytest.mark.skipif(not is_torchvision_available(), reason="needs torchvision: pip install torchvision")
@pytest.mark.parametrize("detector", DETECTORS)
def test_image_processor_of_torchvision_prepares_the_same(detector, tmp_path):
    """Users with torchvision get its image processor. Rounding makes a difference of one in 255."""
    sides = {"size": {"height": 64, "width": 64}, "image_mean": [0.0] * 3, "image_std": [1.0] * 3, "do_pad": False}
    ours = DETECTORS[detector].image_processor(**sides)
    ours.save_pretrained(tmp_path)
    other = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(other) is not type(ours)
    rng = np.random.default_rng(0)
    for size in ((64, 64), (80, 96), (47, 33)):
        image = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        objects = {"image_id": 0, "annotations": [{"bbox": [3, 4, 10, 12], "category_id": 1, "area": 120}]}
        first, second = (each(image, annotations=objects, return_tensors="pt") for each in (ours, other))
        torch.testing.assert_close(first.pixel_values, second.pixel_values, atol=1.01 / 255, rtol=0)
        torch.testing.assert_close(first["labels"][0]["boxes"], second["labels"][0]["boxes"])


def test_backbone_starts_from_the_checkpoint(make_run):
    run = make_run(model=str(find_bundled_model()), network={})
    weights = run.model.state_dict()
    expected = EfficientVMambaBackbone.from_pretrained(find_bundled_model()).state_dict()
    for name, tensor in expected.items():
        if not name.startswith("hidden_states_norms."):
            torch.testing.assert_close(weights[f"model.backbone.model.{name}"], tensor)


def test_note_about_fresh_frozen_norms(make_run):
    note = "The batch norms of the backbone are frozen at fresh statistics: start from --model"
    assert note in make_run("fresh", freeze_batch_norm=True).notes
    assert note in make_run("deformable", detector="deformable_detr").notes
    assert note not in make_run("trained").notes
    assert (
        note not in make_run("checkpoint", model=str(find_bundled_model()), network={}, freeze_batch_norm=True).notes
    )


def test_frozen_batch_norms_keep_their_statistics(make_run):
    run = make_run(model=str(find_bundled_model()), network={}, freeze_batch_norm=True)
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items() if "backbone" in name}
    run.train()
    after = run.model.state_dict()
    statistics = [name for name in before if "running_" in name]
    assert statistics and all(torch.equal(before[name], after[name]) for name in statistics)
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_resumed_run_is_the_same(make_run, tmp_path):
    whole = make_run("whole", steps=4, checkpoint_steps=2)
    whole.train()
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "model")
    (tmp_path / "cut" / "checkpoints" / "checkpoint-4" / "state.json").unlink()  # killed before it was whole
    resumed = make_run("cut", resume=True, steps=4, checkpoint_steps=2)
    assert resumed.progress.step == 2
    resumed.train()
    assert_same_weights(resumed.model.state_dict(), whole.model.state_dict())


def test_batch_without_objects(make_run, shapes, tmp_path):
    """Images without objects teach the detector to find nothing."""
    content = json.loads((shapes / "train/annotations.json").read_text())
    content["annotations"] = content["annotations"][:1]
    folder = tmp_path / "few"
    for split in ("train", "validation"):
        (folder / split).mkdir(parents=True)
        (folder / split / "images").symlink_to(shapes / split / "images")
    (folder / "train/annotations.json").write_text(json.dumps(content))
    (folder / "validation/annotations.json").write_text((shapes / "validation/annotations.json").read_text())
    for detector in DETECTORS:
        run = make_run(detector, dataset=str(folder), detector=detector, batch_size=1, steps=2, logging_steps=1)
        run.train()
        assert all(np.isfinite(line["loss"]) for line in run.folder.read_log() if "loss" in line)


@pytest.mark.parametrize("detector", DETECTORS)
def test_one_class(detector, make_run, shapes, tmp_path):
    folder = tmp_path / "discs"
    shutil.copytree(shapes, folder)
    for file in folder.glob("*/annotations.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        content["categories"] = [{"id": 7, "name": "shape"}]
        content["annotations"] = [each | {"category_id": 7} for each in content["annotations"]]
        file.write_text(json.dumps(content), encoding="utf-8")
    run = make_run(detector=detector, dataset=str(folder))
    assert np.isfinite(run.train()["map"])
    detect = pipeline("object-detection", model=str(run.folder.model_dir), threshold=0)
    found = detect(str(next((shapes / "validation" / "images").iterdir())))
    assert {each["label"] for each in found} == {"shape"}


def test_unreadable_images(make_run, shapes, tmp_path):
    folder = tmp_path / "damaged"
    for split in ("train", "validation"):
        (folder / split / "images").mkdir(parents=True)
        (folder / split / "annotations.json").write_bytes((shapes / split / "annotations.json").read_bytes())
        for index, file in enumerate(sorted((shapes / split / "images").iterdir())):
            (folder / split / "images" / file.name).write_bytes(b"" if index == 1 else file.read_bytes())
    run = make_run(dataset=str(folder), steps=3)
    assert run.train()["images"] == 2
    assert run.progress.num_unreadable == 2
    with pytest.raises(UserError, match=r"0001.png: it is not an image.*: replace the image, or skip it with"):
        make_run("stopped", dataset=str(folder), steps=3, on_unreadable="stop").train()


def test_image_of_another_size_is_skipped(make_run, shapes, tmp_path):
    folder = tmp_path / "resized"
    for split in ("train", "validation"):
        (folder / split / "images").mkdir(parents=True)
        (folder / split / "annotations.json").write_bytes((shapes / split / "annotations.json").read_bytes())
        for file in (shapes / split / "images").iterdir():
            Image.open(file).resize((20, 16)).save(folder / split / "images" / file.name)
    with pytest.raises(UserError, match=r"20 x 16 pixels, and its annotations are for 40 x 32"):
        make_run(dataset=str(folder), on_unreadable="stop").train()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        pytest.param({"image_size": 40}, "`image_size` must be a multiple of 32, got 40", id="size"),
        pytest.param({"hidden_size": 48}, "`hidden_size` must be a multiple of 32, got 48", id="hidden size"),
        pytest.param({"num_queries": 85}, "`num_queries` is 85, and .* of 64 pixels have 84 places", id="queries"),
        pytest.param({"decoder_layers": 1}, "`decoder_layers` must be at least 2, got 1", id="one layer"),
        pytest.param({"num_queries": 0}, "`num_queries` must be at least 1, got 0", id="no queries"),
        pytest.param({"min_crop": 0.0}, r"`min_crop` must lie in \(0, 1\], got 0.0", id="crop"),
        pytest.param({"horizontal_flip": 2.0}, r"`horizontal_flip` must lie in \[0, 1\]", id="flip"),
        pytest.param({"box_form": "cxcywh"}, "box_form", id="form of boxes"),
        pytest.param({"detector": "yolo"}, "detector", id="detector"),
        pytest.param({"detector_fields": {"queries": 3}}, "fields of DFineConfig, got 'queries'", id="no field"),
        pytest.param({"detector_fields": {"id2label": {}}}, "fields of DFineConfig, got 'id2label'", id="classes"),
        pytest.param({"dataset": None}, "give a --dataset", id="no dataset"),
    ],
)
def test_refused(values, message, make_run, tmp_path):
    with pytest.raises(UserError, match=message):
        make_run(**values)
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


@needs_fork
@pytest.mark.slow
@pytest.mark.parametrize("detector", DETECTORS)
def test_two_processes(detector, make_run):
    """Both measure all images. One process has two of the three, and a batch without objects has all gradients."""

    def train(rank: int) -> dict[str, float]:
        run = make_run(detector=detector, batch_size=2, steps=3)
        return run.train()

    first, second = run_on_two_processes(train)
    assert first == second, first
    assert first["images"] == 3


@pytest.mark.slow
def test_detector_learns_shapes(tmp_path):
    """Start from the bundled classifier of digits, and find shapes in images that training has not seen."""
    draw_shapes(tmp_path / "shapes", training_images=400, validation_images=60, size=(64, 64), seed=0)
    recipe = load_recipe(
        "small",
        {
            "model": str(find_bundled_model()),
            "dataset": str(tmp_path / "shapes"),
            "image_size": 64,
            **dict.fromkeys(["steps", "evaluation_steps", "checkpoint_steps"], 800),
            "num_workers": 0,
            "report_to": [],
        },
        DetectionRecipe,
    )
    results = DetectionRun(recipe, tmp_path / "run", resume=False).train()
    assert results["map_50"] >= 0.6
