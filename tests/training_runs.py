"""Short training runs: their images, their recipe, and readers of their output."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from training_evmamba.recipe import Recipe, load_recipe
from weights import assert_same_weights


CLASSES = ["horizontal", "vertical"]


@pytest.fixture(scope="session")
def stripes(tmp_path_factory) -> Path:
    """An image folder of noisy horizontal and vertical stripes: 37 training images, 10 held-out images."""
    folder = tmp_path_factory.mktemp("stripes")
    rng = np.random.default_rng(0)
    for split, num_images in (("train", 37), ("validation", 10)):
        for index in range(num_images):
            wave = np.sin(np.arange(24) * rng.uniform(0.6, 1.2) + rng.uniform(0, 6))
            pixels = 128 + 70 * np.tile(wave, (20, 1))[:, :, None] + rng.normal(0, 10, (20, 24, 3))
            label = index % 2
            path = folder / split / CLASSES[label] / f"{index:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(pixels.clip(0, 255).astype("uint8"))
            (image if label else image.transpose(Image.Transpose.ROTATE_90)).save(path)
    return folder


@pytest.fixture
def make_recipe(stripes):
    """Create a recipe that trains for seconds: `make_recipe(field=value)`."""

    def make(**values) -> Recipe:
        small = {
            "network": {
                "patch_size": 2,
                "hidden_sizes": [8, 16],
                "depths": [1, 1],
                "block_types": ["evss", "inverted_residual"],
                "state_size": 2,
            },
            "dataset": str(stripes),
            "image_size": 16,
            "augmentation_library": "pillow",
            "epochs": 2,
            "warmup_epochs": 0.5,
            "batch_size": 8,
            "learning_rate": 3e-3,
            "ema_decay": 0.8,
            "num_workers": 0,
            "logging_steps": 2,
            "report_to": [],
        }
        return load_recipe("finetune", {**small, **values})

    return make


def start(recipe, output_dir, resume=False):
    from accelerate.state import AcceleratorState

    from training_evmamba.trainer import TrainingRun

    AcceleratorState._reset_state(reset_partial_state=True)  # left by the last run in this process
    return TrainingRun(recipe, output_dir, resume=resume)


def train(recipe, output_dir, resume=False):
    return start(recipe, output_dir, resume).train()


def read_log(output_dir) -> list[dict]:
    return [json.loads(line) for line in (output_dir / "log.jsonl").read_text().splitlines()]


def read_losses(output_dir) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in read_log(output_dir) if "loss" in record}


def assert_same_models(output_dir, other) -> None:
    assert_same_weights(*(load_file(folder / "model" / "model.safetensors") for folder in (output_dir, other)))


def go_back(output_dir: Path, copy: Path, step: int) -> None:
    """Copy a run in its state after an earlier checkpoint."""
    shutil.copytree(output_dir, copy)
    shutil.rmtree(copy / "model")
    for checkpoint in (copy / "checkpoints").iterdir():
        if checkpoint.name > f"step-{step:07}":
            shutil.rmtree(checkpoint)
