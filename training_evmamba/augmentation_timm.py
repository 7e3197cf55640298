"""The augmentation of the authors' recipe with timm, the library that they trained with.

https://github.com/huggingface/pytorch-image-models, Apache-2.0. timm draws from the process's random number
generators. This module seeds them from its generator argument, and restores their state afterwards.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.mixup import Mixup, mixup_target
from torchvision.transforms import Compose, RandomInvert
from transformers.utils.versions import require_version

from training_evmamba.augmentation import MixingSettings, TransformSettings, check_mode, posterize


# as in setup.cfg: earlier versions read -inc0 as -inc1, and cut odd rectangles one pixel too short
require_version("timm>=1.0.29")


@contextmanager
def seeded(rng: np.random.Generator) -> Iterator[None]:
    """Seed the generators of Python, NumPy and PyTorch (on the CPU) from another one. Restore their state on exit."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            random.seed(rng.integers(2**63).item())
            np.random.seed(rng.integers(2**32))
            torch.default_generator.manual_seed(rng.integers(2**63).item())  # torch.manual_seed also seeds GPUs
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def posterize_for_timm(image: Image.Image, bits: int, *, fillcolor: tuple[int, ...], resample: int) -> Image.Image:
    return posterize(image, bits)


class TimmTransform(TransformSettings):
    """Augments one image with timm."""

    def __post_init__(self):
        super().__post_init__()
        crop_and_flip, rand_augment, finish = create_transform(
            self.image_size,
            is_training=True,
            scale=self.crop_scale,
            ratio=self.crop_ratio,
            hflip=self.horizontal_flip,
            color_jitter=None,
            auto_augment=self.rand_augment,
            interpolation="bicubic",
            mean=self.image_mean,
            std=self.image_std,
            re_prob=self.random_erasing,
            re_mode="pixel",
            re_count=1,
            separate=True,
        )
        # at low magnitudes, timm 1.0.31 asks Pillow to keep 0 bits, which Pillow rejects from version 13 on
        for operation in (each for step in rand_augment.transforms for each in step.ops):
            if operation.name.startswith("Posterize"):
                operation.aug_fn = posterize_for_timm
        invert = [RandomInvert(self.random_invert)] if self.random_invert else []  # timm has no inversion
        self.transform = Compose([crop_and_flip, *invert, rand_augment, finish])

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> torch.Tensor:
        """Return the augmented, normalized pixels of an RGB image, `(C, H, W)`, float32.

        Raises:
            ValueError: If the image has another mode.
        """
        check_mode(image)
        with seeded(rng):
            return self.transform(image)


class TimmMixing(MixingSettings):
    """Mixes a batch with timm, which supports even sizes only."""

    def __post_init__(self):
        super().__post_init__()
        self.mixup = Mixup(
            mixup_alpha=self.mixup_alpha,
            cutmix_alpha=self.cutmix_alpha,
            switch_prob=self.switch_prob,
            label_smoothing=self.label_smoothing,
            num_classes=self.num_labels,
        )

    def __call__(
        self, pixel_values: torch.Tensor, labels: torch.Tensor, rng: np.random.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mix images `(B, C, H, W)` of any floating dtype, and their labels `(B,)`, int64, in [0, num_labels).

        Without MixUp and CutMix, the batch size may be odd.

        Returns:
            The images, and their targets `(B, num_labels)`, float32, on the same device. Each target sums to 1.
        """
        if not self.mixes:
            return pixel_values, mixup_target(labels, self.num_labels, smoothing=self.label_smoothing)
        with seeded(rng):
            return self.mixup(pixel_values.clone(), labels)  # timm mixes in place
