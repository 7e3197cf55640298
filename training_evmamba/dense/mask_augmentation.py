"""The augmentation of images with masks, as MMSegmentation's recipes for UperNet have it.

Its steps are a random scale, a random crop, a flip and a photometric distortion
(https://github.com/open-mmlab/mmsegmentation, Apache-2.0, `configs/_base_/datasets/ade20k.py`). Pillow does the
geometry and the colors, with the bounds of the original. transformers' image processor normalizes.

All random numbers come from the generator argument.
"""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance
from transformers.image_processing_utils import BaseImageProcessor


ATTEMPTS = 10  # to find a crop that no class fills
LONGEST_TO_SHORTEST = 4  # bound of the sides of a scaled image, as 2048 to 512
# bounds of the factors of brightness, contrast and saturation, and of the shift of the hue in Pillow's units
BRIGHTNESS = (1 - 32 / 255, 1 + 32 / 255)
CONTRAST = SATURATION = (0.5, 1.5)
HUE = 18 * 256 / 180


def distort_colors(image: Image.Image, probability: float, rng: np.random.Generator) -> Image.Image:
    """Change brightness, contrast, saturation and hue, each with a probability."""
    for enhancer, bounds in (
        (ImageEnhance.Brightness, BRIGHTNESS),
        (ImageEnhance.Contrast, CONTRAST),
        (ImageEnhance.Color, SATURATION),
    ):
        if rng.random() < probability:
            image = enhancer(image).enhance(rng.uniform(*bounds))
    if rng.random() < probability:
        shift = round(rng.uniform(-HUE, HUE))
        hue, saturation, value = image.convert("HSV").split()
        hue = hue.point([(level + shift) % 256 for level in range(256)])
        image = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    return image


class MaskTransform:
    """Makes a training sample: pixels (3, S, S) and class indices (S, S).

    Args:
        image_processor: Normalizes the pixels.
        size: Side S of the crop. Images are scaled until their shorter side has this length, times a random factor.
        scale: Bounds of that factor.
        max_class_fraction: The largest part of a crop that one class may fill.
        flip: Probability of a horizontal flip.
        distortion: Probability of each change of colors.
        ignored: The class index of pixels without label.
    """

    def __init__(
        self,
        image_processor: BaseImageProcessor,
        size: int,
        scale: tuple[float, float],
        max_class_fraction: float,
        flip: float,
        distortion: float,
        ignored: int,
    ):
        self.image_processor, self.size, self.scale, self.ignored = image_processor, size, scale, ignored
        self.max_class_fraction, self.flip, self.distortion = max_class_fraction, flip, distortion

    def __call__(
        self, image: Image.Image, mask: np.ndarray, rng: np.random.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        classes = Image.fromarray(mask.astype(np.int32))  # [H, W]
        scaled = self.choose_size(image, rng)
        image = image.resize(scaled, Image.Resampling.BILINEAR)
        classes = classes.resize(scaled, Image.Resampling.NEAREST)
        box = self.choose_crop(np.asarray(classes), rng)
        image, classes = image.crop(box), classes.crop(box)
        if rng.random() < self.flip:
            image, classes = (each.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for each in (image, classes))
        image = distort_colors(image, self.distortion, rng)
        pixels = self.image_processor(image, do_resize=False, return_tensors="pt").pixel_values[0]  # [3, H, W]
        labels = torch.from_numpy(np.array(classes, dtype=np.int64))  # [H, W]
        margins = (0, self.size - pixels.shape[2], 0, self.size - pixels.shape[1])  # on the right and below
        return F.pad(pixels, margins), F.pad(labels, margins, value=self.ignored)

    def choose_size(self, image: Image.Image, rng: np.random.Generator) -> tuple[int, int]:
        """Return the width and the height of the scaled image."""
        shortest, longest = sorted(image.size)
        factor = rng.uniform(*self.scale) * self.size * min(1 / shortest, LONGEST_TO_SHORTEST / longest)
        width, height = (max(1, round(side * factor)) for side in image.size)
        return width, height

    def choose_crop(self, classes: np.ndarray, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """Return the box of a crop: left, upper, right, lower. No class fills it, if one of some attempts finds such.

        Args:
            classes: Class indices of the scaled image, (H, W).
        """
        height, width = classes.shape
        for _ in range(ATTEMPTS if self.max_class_fraction < 1 else 1):
            left, top = (int(rng.integers(max(side - self.size, 0) + 1)) for side in (width, height))
            box = left, top, min(left + self.size, width), min(top + self.size, height)
            found, counts = np.unique(classes[top : box[3], left : box[2]], return_counts=True)
            counts = counts[found != self.ignored]
            if len(counts) > 1 and counts.max() < self.max_class_fraction * counts.sum():
                break
        return box
