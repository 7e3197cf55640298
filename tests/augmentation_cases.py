"""Settings of the augmentation, and helpers for the tests of both libraries."""

import random

import numpy as np
import pytest
import torch
from PIL import Image


MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
FILL = (124, 116, 104)
RECIPE = {
    "image_size": (224, 224),
    "crop_scale": (0.08, 1.0),
    "crop_ratio": (3 / 4, 4 / 3),
    "horizontal_flip": 0.5,
    "random_invert": 0.0,
    "rand_augment": "rand-m9-mstd0.5",
    "random_erasing": 0.25,
    "image_mean": MEAN,
    "image_std": STD,
}
# the image without augmentation, scaled to [0, 1]
PLAIN = RECIPE | {
    "crop_scale": (1.0, 1.0),
    "crop_ratio": (1.0, 1.0),
    "horizontal_flip": 0.0,
    "rand_augment": None,
    "random_erasing": 0.0,
    "image_mean": [0.0] * 3,
    "image_std": [1.0] * 3,
}
MIXING = {"mixup_alpha": 0.2, "cutmix_alpha": 1.0, "switch_prob": 0.5, "label_smoothing": 0.1, "num_labels": 10}


def picture(width: int = 90, height: int = 60, seed: int = 0) -> Image.Image:
    """Return an image with color gradients and noise, which every operation changes."""
    noise = np.random.default_rng(seed).integers(0, 60, (height, width, 3))
    across = np.linspace(0, 150, width)[None, :, None] * np.array([1, 0.6, 0.3])
    down = np.linspace(40, 0, height)[:, None, None]
    return Image.fromarray((noise + across + down).astype("uint8"))


def import_timm():
    """Skip the test if timm cannot be imported. A mismatched torchvision raises other errors than ImportError too."""
    return pytest.importorskip("timm.data", exc_type=Exception)


class UnchangedGenerators:
    """Fail if the block changes the state of the process's random number generators."""

    def __enter__(self):
        self.states = self.get_states()

    def __exit__(self, *error):
        before, after = self.states, self.get_states()
        assert before[0] == after[0] and torch.equal(before[2], after[2])
        np.testing.assert_equal(after[1], before[1])

    def get_states(self):
        return random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state()
