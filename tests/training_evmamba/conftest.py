from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training_evmamba.recipe import Recipe, load_recipe


CLASSES = ["horizontal", "vertical"]


@pytest.fixture(scope="session")
def stripes(tmp_path_factory) -> Path:
    """An image folder: stripes of random width in noise, lying or standing; 37 to learn from, 10 held out."""
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
    """A recipe of seconds: `make_recipe(field=value)`."""

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
