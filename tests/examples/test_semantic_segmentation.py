"""The program for segmentation: its samples, short runs, and its error messages."""

import json
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from huggingface_hub import ModelCard
from PIL import Image
from transformers import UperNetForSemanticSegmentation, pipeline
from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil

from evmamba_demo.bundled import find_bundled_model
from evmamba_hub.errors import UserError
from examples import semantic_segmentation
from examples.draw_shapes import CLASSES, draw_shapes
from examples.semantic_segmentation import SegmentationRecipe, SegmentationRun
from modeling_evmamba import EfficientVMambaForImageClassification
from process_pairs import needs_fork
from training_evmamba.dense.mask_augmentation import MaskTransform
from training_evmamba.dense.masks import IGNORED
from training_evmamba.recipe import dump_recipe, load_recipe
from training_runs import read_log
from weights import assert_same_weights


SCRIPT = Path(semantic_segmentation.__file__)
TINY = {
    "patch_size": 2,
    "hidden_sizes": [8, 8, 8],
    "depths": [1, 1, 1],
    "block_types": ["evss", "evss", "inverted_residual"],
    "state_size": 2,
}


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shapes"
    draw_shapes(folder, training_images=10, validation_images=3, size=(36, 32))
    return folder


@pytest.fixture
def make_recipe(shapes):
    """Create a recipe that trains for seconds: `make_recipe(field=value)`."""

    def make(**values) -> SegmentationRecipe:
        small = {
            "network": {} if "model" in values else TINY,
            "dataset": str(shapes),
            "image_size": 32,
            "hidden_size": 8,
            "auxiliary_channels": 8,
            "steps": 4,
            "batch_size": 4,
            "num_workers": 0,
            "logging_steps": 1,
            "checkpoint_steps": 2,
            "evaluation_steps": 2,
            "report_to": [],
        }
        return load_recipe("small", {**small, **values}, SegmentationRecipe)

    return make


def start(recipe, output_dir, resume=False) -> SegmentationRun:
    AcceleratorState._reset_state(reset_partial_state=True)  # left by the last run in this process
    return SegmentationRun(recipe, output_dir, resume=resume)


def read_losses(output_dir) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in read_log(output_dir) if "loss" in record}


def create_transform(**values) -> MaskTransform:
    processor = SegformerImageProcessorPil(image_mean=[0, 0, 0], image_std=[1, 1, 1])
    options = {"size": 24, "scale": (0.5, 2.0), "max_class_fraction": 0.75, "flip": 0.5, "distortion": 0.0}
    return MaskTransform(processor, **{**options, **values}, ignored=IGNORED)


@pytest.mark.parametrize("size", [(40, 30), (24, 24), (7, 90), (1, 5)])
def test_image_and_mask_are_augmented_together(size):
    """Where the image shows the color of a class, the mask has it."""
    blocks = np.random.default_rng(0).integers(0, 3, (3, 3)).astype(np.uint8)
    mask = np.asarray(Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST))
    image = Image.fromarray(np.repeat(80 * mask[:, :, None], 3, axis=2))
    for seed in range(20):
        pixels, labels = create_transform()(image, mask, np.random.default_rng(seed))
        assert pixels.shape == (3, 24, 24) and labels.shape == (24, 24)
        assert labels.dtype == torch.int64 and set(labels.unique().tolist()) <= {0, 1, 2, IGNORED}
        inside = labels != IGNORED
        assert inside.any() and pixels[:, ~inside].abs().sum() == 0
        near = (pixels[0] * 255 - 80 * labels).abs() <= 80  # interpolation blends neighbors
        assert near[inside].float().mean() > 0.9


def test_augmentation_comes_from_the_random_numbers_alone():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8))
    mask = rng.integers(0, 3, (40, 50), dtype=np.uint8)
    transform = create_transform(distortion=1.0)
    first, again, other = (transform(image, mask, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_crops_avoid_a_class_that_fills_them():
    mask = np.zeros((48, 240), dtype=np.uint8)
    mask[:, :24] = 1
    image = Image.new("RGB", (240, 48))
    fractions = []
    for limit in (0.75, 1.0):
        transform = create_transform(size=48, scale=(1.0, 1.0), max_class_fraction=limit)
        crops = [transform(image, mask, np.random.default_rng(seed))[1] for seed in range(40)]
        fractions.append(np.mean([(crop == 1).any().item() for crop in crops]))
    assert fractions[0] > 2 * fractions[1]


@pytest.fixture(scope="module")
def finished(shapes, tmp_path_factory) -> Path:
    """A run of 4 steps from the bundled classifier."""
    output = tmp_path_factory.mktemp("runs") / "from digits"
    values = {"dataset": str(shapes), "image_size": 32, "hidden_size": 8, "auxiliary_channels": 8, "steps": 4}
    few = {"batch_size": 4, "num_workers": 0, "logging_steps": 1, "report_to": [], "checkpoint_steps": 2}
    recipe = load_recipe("small", {"model": str(find_bundled_model()), **values, **few}, SegmentationRecipe)
    run = start(recipe, output)
    classifier = EfficientVMambaForImageClassification.from_pretrained(find_bundled_model())
    weights = dict(run.model.named_parameters())
    for name, weight in classifier.efficientvmamba.named_parameters():
        if not name.startswith("layernorm."):  # that of the pooled features
            assert torch.equal(weights[f"backbone.{name}"], weight), name
    run.train()
    return output


def test_a_run_writes_log_checkpoints_curves_and_card(finished):
    assert {"recipe.yaml", "log.jsonl", "checkpoints", "training_curves.png", "model"} == set(os.listdir(finished))
    records = read_log(finished)
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4]
    assert steps[-1].keys() == {
        *("step", "images", "epoch", "loss", "learning_rate", "gradient_norm", "images_per_second")
    }
    (last,) = [record for record in records if record.get("validation_images") and record["step"] == 4]
    assert last["validation_images"] == 3
    assert {"mean_iou", "mean_accuracy", "pixel_accuracy", "iou/disc"} <= last.keys()
    assert sorted(os.listdir(finished / "checkpoints")) == ["checkpoint-2", "checkpoint-4"]

    card = ModelCard.load(finished / "model" / "README.md")
    assert card.data.pipeline_tag == "image-segmentation"
    values = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert values == {name: round(last[name], 4) for name in SegmentationRun.measures}
    assert "It was fine-tuned from" in card.text and "on 10 images of 4 classes, in 4 steps of 4 images" in card.text
    assert 'pipeline("image-segmentation", model="your-name/from-digits")' in card.text


def test_a_pipeline_loads_the_model(finished, shapes):
    segment = pipeline("image-segmentation", model=str(finished / "model"))
    file = shapes / "validation" / "images" / "0000.png"
    found = segment(Image.open(file).resize((45, 37)))
    assert {each["label"] for each in found} <= set(CLASSES)
    covered = sum(np.asarray(each["mask"]).astype(bool).astype(int) for each in found)
    assert covered.shape == (37, 45) and (covered == 1).all()


def test_a_resumed_run_is_the_same_run(make_recipe, tmp_path):
    start(make_recipe(), tmp_path / "whole").train()
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "model")
    (tmp_path / "cut" / "checkpoints" / "checkpoint-4" / "state.json").unlink()  # killed before it was whole
    run = start(make_recipe(), tmp_path / "cut", resume=True)
    assert os.listdir(tmp_path / "cut" / "checkpoints") == ["checkpoint-2"]
    run.train()
    assert read_losses(tmp_path / "cut") == read_losses(tmp_path / "whole")
    models = [
        semantic_segmentation.UperNetForSemanticSegmentation.from_pretrained(tmp_path / name / "model")
        for name in ("whole", "cut")
    ]
    assert_same_weights(*(model.state_dict() for model in models))
    records = read_log(tmp_path / "cut")
    assert start(make_recipe(), tmp_path / "cut", resume=True).train()["images"] == 3  # complete already
    assert read_log(tmp_path / "cut") == records
    assert_same_weights(
        semantic_segmentation.UperNetForSemanticSegmentation.from_pretrained(tmp_path / "cut" / "model").state_dict(),
        models[0].state_dict(),
    )
    with pytest.raises(UserError, match=r"holds a run with another recipe \(seed was 0, is 1\)"):
        start(make_recipe(seed=1), tmp_path / "cut", resume=True)
    with pytest.raises(UserError, match="already contains a run: pass `--resume auto` to continue it"):
        start(make_recipe(), tmp_path / "cut")


def test_a_finished_model_trains_further(finished, make_recipe, shapes, tmp_path):
    model = semantic_segmentation.UperNetForSemanticSegmentation.from_pretrained(finished / "model")
    run = start(make_recipe(model=str(finished / "model")), tmp_path / "further")
    assert_same_weights(run.model.state_dict(), model.state_dict())
    run.lock.close()
    folder = tmp_path / "more"
    shutil.copytree(shapes, folder)
    (folder / "labels.txt").write_text("".join(f"{name}\n" for name in [*CLASSES, "star"]), encoding="utf-8")
    run = start(make_recipe(model=str(finished / "model"), dataset=str(folder)), tmp_path / "more classes")
    (note,) = [note for note in run.notes if "start anew" in note]
    assert note.startswith("4 weights of the checkpoint do not fit and start anew: auxiliary_head.classifier.bias")
    assert_same_weights(run.model.backbone.state_dict(), model.backbone.state_dict())
    run.lock.close()


def test_micro_batches_average_the_loss(make_recipe, tmp_path):
    """The loss of a step is that of its images, however they are divided."""
    losses = []
    for accumulated in (1, 2):
        start(make_recipe(gradient_accumulation_steps=accumulated, steps=1), tmp_path / str(accumulated)).train()
        losses.append(read_losses(tmp_path / str(accumulated))[1])
    assert losses[1] == pytest.approx(losses[0], rel=0.2)  # batch norms see other batches


def test_images_without_labeled_pixels_do_not_spoil_the_loss(make_recipe, shapes, tmp_path):
    folder = tmp_path / "unlabeled"
    shutil.copytree(shapes, folder)
    for mask in (folder / "train" / "masks").iterdir():
        Image.new("L", (36, 32), IGNORED).save(mask)
    start(make_recipe(dataset=str(folder), steps=2), tmp_path / "run").train()
    assert read_losses(tmp_path / "run") == {1: 0, 2: 0}
    records = [record for record in read_log(tmp_path / "run") if "loss" in record]
    assert all(np.isfinite(record["gradient_norm"]) for record in records)


def test_pixels_without_label_do_not_count(make_recipe, shapes, tmp_path):
    folder = tmp_path / "half"
    shutil.copytree(shapes, folder)
    masks = sorted((folder / "validation" / "masks").iterdir())
    for mask in masks:
        labels = np.array(Image.open(mask))
        labels[:, :20] = IGNORED
        Image.fromarray(labels).save(mask)
    results = start(make_recipe(dataset=str(folder)), tmp_path / "run").train()
    model = UperNetForSemanticSegmentation.from_pretrained(tmp_path / "run" / "model")
    processor = SegformerImageProcessorPil.from_pretrained(tmp_path / "run" / "model")
    hits = []
    for mask in masks:
        labels = np.array(Image.open(mask))
        image = Image.open(folder / "validation" / "images" / mask.name)
        with torch.no_grad():
            outputs = model(**processor(image, return_tensors="pt"))
        (predicted,) = processor.post_process_semantic_segmentation(outputs, [labels.shape])
        hits.append((predicted.numpy() == labels)[:, 20:])
    assert results["pixel_accuracy"] == pytest.approx(np.mean(hits))


def test_unreadable_images_are_skipped_or_stop_the_run(make_recipe, shapes, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(shapes, folder)
    (folder / "train" / "images" / "0001.png").write_bytes(b"no image")
    (folder / "validation" / "masks" / "0002.png").write_bytes(b"no image")
    run = start(make_recipe(dataset=str(folder)), tmp_path / "run")
    assert run.train()["images"] == 2
    assert [Path(name.partition(":")[0]).name for name in run.progress.unreadable] == ["0001.png"]
    assert [Path(name.partition(":")[0]).name for name in run.progress.unreadable_held_out] == ["0002.png"]
    with pytest.raises(UserError, match="replace the image, or skip it with --on-unreadable skip"):
        start(make_recipe(dataset=str(folder), on_unreadable="stop"), tmp_path / "stopped").train()


def test_a_dataset_without_splits_holds_images_out(make_recipe, shapes, tmp_path):
    folder = tmp_path / "flat"
    shutil.copytree(shapes / "train", folder)
    shutil.copyfile(shapes / "labels.txt", folder / "labels.txt")
    run = start(make_recipe(dataset=str(folder), validation_fraction=0.3), tmp_path / "run")
    assert "Held out 3 images for evaluation" in run.notes
    assert run.data.training.num_images == 7


def test_masks_whose_objects_are_255_are_doubted(make_recipe, shapes, tmp_path):
    folder = tmp_path / "binary"
    shutil.copytree(shapes, folder)
    for mask in (folder / "train" / "masks").iterdir():
        Image.fromarray((np.asarray(Image.open(mask)) > 0) * np.uint8(255)).save(mask)
    run = start(make_recipe(dataset=str(folder)), tmp_path / "run")
    run.lock.close()
    (note,) = [note for note in run.notes if "255" in note]
    assert note == ("Some masks hold background and 255 alone, and 255 marks pixels without label: save objects as 1")
    assert not any("255" in note for note in start(make_recipe(), tmp_path / "other").notes)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"dataset": None}, "give a --dataset"),
        ({"dataset": "{folder}/labels.txt"}, "is a file"),
        ({"dataset": "{folder}", "labels": "nowhere.txt"}, r"the labels nowhere.txt cannot be read"),
        ({"dataset": "{folder}", "dataset_revision": "main"}, "neither configurations nor revisions"),
        ({"train_split": "first"}, "has no split 'first'"),
        ({"network": {}}, "say what to train"),
        ({"network": {"out_features": ["stage1"]}}, "`network` must not hold 'out_features'"),
        ({"batch_size": 3, "gradient_accumulation_steps": 2}, "cannot be divided"),
        ({"batch_size": 1}, "micro-batches of two images or more"),
        ({"mixed_precision": "fp16"}, "float16 needs a GPU"),
        ({"learning_rate": 1e30}, "the loss of step . is (nan|inf): lower --learning-rate"),
    ],
)
def test_names_what_is_wrong(make_recipe, shapes, tmp_path, values, message):
    filled = {key: value.format(folder=shapes) if isinstance(value, str) else value for key, value in values.items()}
    with pytest.raises(UserError, match=message):
        start(make_recipe(**filled), tmp_path / "run").train()
    assert not (tmp_path / "run" / "model").exists()


def test_wrong_masks_stop_the_run(make_recipe, shapes, tmp_path):
    folder = tmp_path / "wrong"
    shutil.copytree(shapes, folder)
    for mask in (folder / "train" / "masks").iterdir():
        Image.new("L", (32, 36)).save(mask)
    with pytest.raises(UserError, match=r"masks/\d+\.png has 32 x 36 pixels, and .* has 36 x 32"):
        start(make_recipe(dataset=str(folder)), tmp_path / "run").train()


def launch(recipe_file: Path, output_dir: Path, *words: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen:
    command = [sys.executable, *launcher, str(SCRIPT), "--recipe", str(recipe_file), "--output-dir", str(output_dir)]
    variables = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, *words], env={**os.environ, **variables}, stderr=subprocess.PIPE, text=True)


def test_a_user_error_is_one_line(tmp_path, monkeypatch, capsys):
    options = ["--recipe", str(tmp_path / "nowhere.yaml"), "--output-dir", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, *options])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert end.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("Error: there is no recipe") and said.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_train_one_model(make_recipe, tmp_path):
    (tmp_path / "recipe.yaml").write_text(dump_recipe(make_recipe()), encoding="utf-8")
    launcher = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--main_process_port", "0")
    run = launch(tmp_path / "recipe.yaml", tmp_path / "pair", launcher=launcher)
    _, said = run.communicate(timeout=300)
    assert run.returncode == 0, said
    assert said.count("Trained") == 1
    start(make_recipe(), tmp_path / "alone").train()
    pair, alone = (
        [record for record in read_log(tmp_path / name) if "validation_images" in record] for name in ("pair", "alone")
    )
    assert [record["validation_images"] for record in pair] == [record["validation_images"] for record in alone]
    assert read_losses(tmp_path / "pair")[1] == pytest.approx(read_losses(tmp_path / "alone")[1], rel=0.2)


@needs_fork
@pytest.mark.slow
def test_a_killed_run_resumes(make_recipe, tmp_path):
    recipe = make_recipe(steps=400, checkpoint_steps=1, evaluation_steps=400, keep_checkpoints=1)
    log = tmp_path / "run" / "log.jsonl"
    for seconds in (0.0, 0.3, 0.7):
        before = len(read_losses(tmp_path / "run")) if log.exists() else 0
        run = multiprocessing.get_context("fork").Process(
            target=lambda: start(recipe, tmp_path / "run", resume=True).train()
        )
        run.start()
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and run.is_alive():
            if log.exists() and len(read_losses(tmp_path / "run")) > before + 3:
                break
            time.sleep(0.02)
        time.sleep(seconds)
        run.kill()
        run.join()
        assert run.exitcode == -signal.SIGKILL
    assert len(read_losses(tmp_path / "run")) > 6
    saved = json.loads(next((tmp_path / "run" / "checkpoints").glob("*/state.json")).read_text(encoding="utf-8"))
    resumed = start(recipe, tmp_path / "run", resume=True)
    assert resumed.progress.step >= saved["step"] > 0
    resumed.lock.close()


@pytest.mark.slow
def test_learns_shapes_from_the_bundled_classifier(tmp_path):
    """Held-out images reach a mean IoU of 0.85 in minutes on two cores."""
    draw_shapes(tmp_path / "shapes", training_images=400, validation_images=40, size=(96, 96))
    values = {"dataset": str(tmp_path / "shapes"), "image_size": 96, "hidden_size": 64, "report_to": []}
    fit = {"random_scale": [0.8, 1.25], "batch_size": 16, "learning_rate": 2e-3, "num_workers": 2}
    length = dict.fromkeys(["steps", "evaluation_steps", "checkpoint_steps"], 200)
    recipe = load_recipe("small", {"model": str(find_bundled_model()), **values, **fit, **length}, SegmentationRecipe)
    assert start(recipe, tmp_path / "run").train()["mean_iou"] >= 0.85
