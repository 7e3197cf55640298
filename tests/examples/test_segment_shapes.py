"""The example of dense prediction: a short run, and its error messages."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ResNetConfig

# the name in `transformers` itself is a placeholder that raises if torchvision is missing (5.17)
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from evmamba_demo.bundled import find_bundled_model
from evmamba_hub.errors import UserError
from examples import segment_shapes
from modeling_evmamba import EfficientVMambaForImageClassification


SCRIPT = Path(segment_shapes.__file__)


def test_scenes_come_from_the_seed_and_hold_every_class():
    first, second = (segment_shapes.draw_scenes(np.random.default_rng(3), 12, (50, 41)) for _ in range(2))
    for scene, other in zip(first, second, strict=True):
        assert scene.image.tobytes() == other.image.tobytes()
        assert np.array_equal(scene.mask, other.mask)
        assert scene.image.size == (50, 41) and scene.mask.shape == (41, 50)
    classes = np.unique([scene.mask for scene in first])
    assert classes.tolist() == list(range(len(segment_shapes.CLASSES)))


def test_mask_lies_where_the_shapes_are():
    """Pixels outside the shapes show only the gray gradient and its noise."""
    for scene in segment_shapes.draw_scenes(np.random.default_rng(0), 8, (96, 96)):
        pixels = np.asarray(scene.image).astype(float)
        gradient = pixels[scene.mask == 0].reshape(-1, 3)
        assert np.abs(gradient - gradient.mean(axis=1, keepdims=True)).mean() < 12


def test_the_backbone_holds_the_weights_of_the_classifier():
    segmenter = segment_shapes.create_segmenter(str(find_bundled_model()))
    classifier = EfficientVMambaForImageClassification.from_pretrained(find_bundled_model())
    weights = dict(segmenter.named_parameters())
    for name, weight in classifier.efficientvmamba.named_parameters():
        if not name.startswith("layernorm."):  # that of the pooled features
            assert torch.equal(weights[f"backbone.{name}"], weight), name


@pytest.mark.slow
def test_learns_and_shows_masks_as_large_as_the_images(tmp_path, capsys):
    path = tmp_path / "pictures" / "shapes.png"
    losses = segment_shapes.main(steps=25, output=path)
    assert len(losses) == 25
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    printed = capsys.readouterr().out
    assert f"written: {path}" in printed
    before, after = (line.split() for line in printed.splitlines() if "pixel accuracy" in line)
    assert float(after[3].rstrip("%,")) > float(before[3].rstrip("%,"))

    width, height = segment_shapes.TEST_SIZE
    gap, columns = segment_shapes.GAP, segment_shapes.NUM_SHOWN
    with Image.open(path) as picture:
        assert picture.size == (columns * (width + gap) - gap, 3 * (height + gap) - gap)


def test_predictions_have_the_size_of_the_images():
    segmenter = segment_shapes.create_segmenter(str(find_bundled_model()))
    image_processor = AutoImageProcessor.from_pretrained(find_bundled_model())
    scenes = segment_shapes.draw_scenes(np.random.default_rng(0), 2, (67, 45))
    masks = segment_shapes.predict(segmenter, image_processor, scenes)
    assert masks.shape == (2, 45, 67)
    assert masks.max() < len(segment_shapes.CLASSES)


def test_measures():
    scenes = segment_shapes.draw_scenes(np.random.default_rng(1), 6, (40, 30))
    truth = torch.from_numpy(np.stack([scene.mask for scene in scenes]))
    assert segment_shapes.measure(truth, scenes) == (1.0, 1.0)
    accuracy, mean_iou = segment_shapes.measure(torch.zeros_like(truth), scenes)
    background = (truth == 0).float().mean().item()
    assert (accuracy, mean_iou) == pytest.approx((background, background / 4))


def test_names_what_is_wrong(tmp_path):
    ResNetConfig().save_pretrained(tmp_path / "resnet")
    with pytest.raises(UserError, match="of the type 'resnet', not 'efficientvmamba'"):
        segment_shapes.main(checkpoint=str(tmp_path / "resnet"))
    shutil.copytree(find_bundled_model(), tmp_path / "no weights", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(UserError, match=r"no weights' cannot be loaded"):
        segment_shapes.main(checkpoint=str(tmp_path / "no weights"))
    with pytest.raises(UserError, match=r"a file that ends in \.png"):
        segment_shapes.main(output=tmp_path)

    run = subprocess.run(
        [sys.executable, SCRIPT, "--checkpoint", tmp_path / "nowhere"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    assert "cannot be loaded" in run.stderr
