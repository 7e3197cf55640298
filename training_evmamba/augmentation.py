"""The augmentation of the authors' recipe: its settings, and an implementation with Pillow and PyTorch alone.

The authors trained with timm (https://github.com/huggingface/pytorch-image-models, Apache-2.0). If timm can be
imported, `augmentation_library.py` chooses it, through `augmentation_timm.py`. timm needs torchvision, and not every
PyTorch build has a matching one. This module needs neither.

The operations and their distributions are those of timm. With the same random numbers, both make the same pixels
(MixUp: up to rounding). The tests compare them. The module has only the operations of the recipe.

All random numbers come from the generator argument, so it and the pixels determine the result.

RandAugment (https://arxiv.org/abs/1909.13719), random erasing (https://arxiv.org/abs/1708.04896), MixUp
(https://arxiv.org/abs/1710.09412), CutMix (https://arxiv.org/abs/1905.04899).
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps


Color = tuple[int, ...]

ATTEMPTS = 10  # to draw a rectangle that fits into the image
ERASED_AREA = (0.02, 1 / 3)  # bounds, as fractions of the image
ERASED_RATIO = (0.3, 1 / 0.3)  # bounds of height to width


class Operation(NamedTuple):
    """An operation of RandAugment: `apply(image, level, fill)`."""

    apply: Callable[[Image.Image, float, Color], Image.Image]
    signed: bool = False  # levels lie in [-1, 1] instead of [0, 1], with random signs


def affine(image: Image.Image, matrix: tuple[float, ...], fill: Color) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=fill)


def posterize(image: Image.Image, bits: int) -> Image.Image:
    """Keep the upper 0 to 4 bits. Pillow's own function rejects 0 bits from version 13 on."""
    return image.point([value >> (8 - bits) << (8 - bits) for value in range(256)] * 3)


def solarize_add(image: Image.Image, amount: int) -> Image.Image:
    """Add an amount to values below 128."""
    return image.point([min(255, value + amount) if value < 128 else value for value in range(256)] * 3)


def enhancement(enhancer: Callable) -> Operation:
    """Return an operation that scales a property by a factor from 0.1 (level 0) to 1.9 (level 1)."""
    return Operation(lambda image, level, fill: enhancer(image).enhance(1.8 * level + 0.1))


def increasing_enhancement(enhancer: Callable) -> Operation:
    """Return an operation that scales a property by a factor from 0.1 to 1.9. Level 0 changes nothing."""
    return Operation(lambda image, level, fill: enhancer(image).enhance(max(0.1, 1 + 0.9 * level)), signed=True)


ENHANCERS = {
    "Color": ImageEnhance.Color,
    "Contrast": ImageEnhance.Contrast,
    "Brightness": ImageEnhance.Brightness,
    "Sharpness": ImageEnhance.Sharpness,
}

OPERATIONS = {  # posterize and solarize are strongest at level 0, enhancements weakest at 0.5
    "AutoContrast": Operation(lambda image, level, fill: ImageOps.autocontrast(image)),
    "Equalize": Operation(lambda image, level, fill: ImageOps.equalize(image)),
    "Invert": Operation(lambda image, level, fill: ImageOps.invert(image)),
    "Rotate": Operation(
        lambda image, level, fill: image.rotate(30 * level, Image.Resampling.BICUBIC, fillcolor=fill), signed=True
    ),
    "Posterize": Operation(lambda image, level, fill: posterize(image, int(4 * level))),
    "Solarize": Operation(lambda image, level, fill: ImageOps.solarize(image, int(256 * level))),
    "SolarizeAdd": Operation(lambda image, level, fill: solarize_add(image, int(110 * level))),
    **{name: enhancement(enhancer) for name, enhancer in ENHANCERS.items()},
    "ShearX": Operation(lambda image, level, fill: affine(image, (1, 0.3 * level, 0, 0, 1, 0), fill), signed=True),
    "ShearY": Operation(lambda image, level, fill: affine(image, (1, 0, 0, 0.3 * level, 1, 0), fill), signed=True),
    "TranslateX": Operation(
        lambda image, level, fill: affine(image, (1, 0, 0.45 * level * image.width, 0, 1, 0), fill), signed=True
    ),
    "TranslateY": Operation(
        lambda image, level, fill: affine(image, (1, 0, 0, 0, 1, 0.45 * level * image.height), fill), signed=True
    ),
}

INCREASING_OPERATIONS = {  # strength increases with the level
    **OPERATIONS,
    "Posterize": Operation(lambda image, level, fill: posterize(image, 4 - int(4 * level))),
    "Solarize": Operation(lambda image, level, fill: ImageOps.solarize(image, 256 - int(256 * level))),
    **{name: increasing_enhancement(enhancer) for name, enhancer in ENHANCERS.items()},
}


# timm's notation, with the fields of RandAugment as group names
SECTION = re.compile(
    r"m(?P<magnitude>\d|10)|mstd(?P<magnitude_std>\d{1,2}(?:\.\d+)?)|n(?P<num_operations>[1-9]\d?)"
    r"|p(?P<probability>0(?:\.\d+)?|1)|inc(?P<increasing>[01])",
    re.ASCII,
)


@dataclass(frozen=True)
class RandAugment:
    """Random operations of random strength. The defaults are those of timm's notation."""

    magnitude: int = 10  # mean, in tenths of the maximum
    magnitude_std: float = 0
    num_operations: int = 2  # drawn with replacement
    probability: float = 0.5  # of applying an operation that was drawn
    increasing: int = 0  # 1 for INCREASING_OPERATIONS

    @classmethod
    def parse(cls, text: str) -> "RandAugment":
        """Parse timm's notation, such as "rand-m9-mstd0.5".

        Raises:
            ValueError: If a section is unknown or repeated.
        """
        name, *sections = text.split("-")
        matches = filter(None, map(SECTION.fullmatch, sections))
        values = {match.lastgroup: match[match.lastgroup] for match in matches}
        if name != "rand" or len(values) < len(sections):
            raise ValueError(
                f"rand_augment {text!r} is invalid: give 'rand' and any of these sections, each at most once, such as "
                "rand-m9-mstd0.5. Sections are -m0 to -m10 (magnitude), -mstd0 to -mstd99.9 (its standard deviation), "
                "-n1 to -n99 (operations), -p0 to -p1 (probability of each), and -inc0 or -inc1 (whether strength "
                "increases with the magnitude)"
            )
        return cls(**{name: float(value) if "." in value else int(value) for name, value in values.items()})

    def __call__(self, image: Image.Image, fill: Color, rng: np.random.Generator) -> Image.Image:
        operations = list((INCREASING_OPERATIONS if self.increasing else OPERATIONS).values())
        for index in rng.integers(len(operations), size=self.num_operations):
            if rng.random() < self.probability:
                apply, signed = operations[index]
                level = min(max(rng.normal(self.magnitude, self.magnitude_std), 0), 10) / 10
                if signed and rng.random() > 0.5:
                    level = -level
                image = apply(image, level, fill)
        return image


def random_sides(
    area: int, scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int]:
    """Return two sides of a rectangle: a random fraction of an area, and a random ratio of first to second side."""
    area = rng.uniform(*scale) * area
    side_ratio = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
    return round(math.sqrt(area * side_ratio)), round(math.sqrt(area / side_ratio))


def random_crop_box(
    width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of a random crop.

    `scale` bounds its fraction of the area, and `ratio` its width to height. If no crop of `ATTEMPTS` fits, return the
    largest central one within the ratios.
    """
    for _ in range(ATTEMPTS):
        crop_width, crop_height = random_sides(width * height, scale, ratio, rng)
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(rng.integers(height - crop_height, endpoint=True))
            left = int(rng.integers(width - crop_width, endpoint=True))
            return left, top, left + crop_width, top + crop_height
    crop_width = min(width, max(1, round(height * ratio[1])))
    crop_height = min(height, max(1, round(width / ratio[0])))
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return left, top, left + crop_width, top + crop_height


def erase_rectangle(pixel_values: torch.Tensor, rng: np.random.Generator) -> None:
    """Fill a random rectangle of a normalized image `(C, H, W)` with standard normal noise, in place."""
    channels, height, width = pixel_values.shape
    for _ in range(ATTEMPTS):
        erased_height, erased_width = random_sides(height * width, ERASED_AREA, ERASED_RATIO, rng)
        if erased_height < height and erased_width < width:
            top = rng.integers(height - erased_height, endpoint=True)
            left = rng.integers(width - erased_width, endpoint=True)
            noise = rng.standard_normal((channels, erased_height, erased_width), dtype=np.float32)
            pixel_values[:, top : top + erased_height, left : left + erased_width] = torch.from_numpy(noise)
            return


def check_probability(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}: give a probability from 0 to 1")


@dataclass(kw_only=True)
class TransformSettings:
    """The augmentation of one image.

    The order is: random resized crop (bicubic, antialiased), horizontal flip, inversion, RandAugment, normalization,
    random erasing.

    Args:
        image_size: Height and width of the result.
        crop_scale: Smallest and largest fraction of the area that a crop covers.
        crop_ratio: Smallest and largest ratio of width to height of a crop.
        horizontal_flip: Probability of a horizontal flip.
        random_invert: Probability of inverting the image.
        rand_augment: RandAugment in timm's notation. None disables it.
        random_erasing: Probability of replacing a rectangle, 2 to 33 % of the result, with noise.
        image_mean: Mean per channel, for pixels in [0, 1]. Also fills the border of rotated, sheared and translated
            images.
        image_std: Standard deviation per channel.

    Raises:
        ValueError: If a value is out of bounds. The message names it.
    """

    image_size: tuple[int, int]
    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]
    horizontal_flip: float
    random_invert: float
    rand_augment: str | None
    random_erasing: float
    image_mean: list[float]
    image_std: list[float]

    def __post_init__(self):
        if min(self.image_size) < 1:
            raise ValueError(f"image_size is {self.image_size}: give a height and a width of at least 1")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(
                f"crop_scale is {self.crop_scale}: give the smallest and the largest fraction, above 0 and up to 1"
            )
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1] < math.inf:
            raise ValueError(f"crop_ratio is {self.crop_ratio}: give the smallest and the largest ratio, both above 0")
        if len(self.image_mean) != 3 or not all(0 <= value <= 1 for value in self.image_mean):
            raise ValueError(f"image_mean is {self.image_mean}: give three values from 0 to 1")
        if len(self.image_std) != 3 or not all(value > 0 for value in self.image_std):
            raise ValueError(f"image_std is {self.image_std}: give three values above 0")
        for name in ("horizontal_flip", "random_invert", "random_erasing"):
            check_probability(name, getattr(self, name))
        self.random_operations = None if self.rand_augment is None else RandAugment.parse(self.rand_augment)


def check_mode(image: Image.Image) -> None:
    if image.mode != "RGB":
        raise ValueError(f"the image has the mode {image.mode}: convert it to RGB first")


class TrainingTransform(TransformSettings):
    """Augments one image with Pillow and PyTorch."""

    def __post_init__(self):
        super().__post_init__()
        self.mean = torch.tensor(self.image_mean)[:, None, None]  # (C, 1, 1)
        self.std = torch.tensor(self.image_std)[:, None, None]
        self.fill = tuple(round(255 * value) for value in self.image_mean)

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> torch.Tensor:
        """Return the augmented, normalized pixels of an RGB image, `(C, H, W)`, float32.

        Raises:
            ValueError: If the image has another mode.
        """
        check_mode(image)
        height, width = self.image_size
        # not `resize(box=...)`, whose filter would read pixels outside the crop
        image = image.crop(random_crop_box(*image.size, self.crop_scale, self.crop_ratio, rng))
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        if rng.random() < self.horizontal_flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if rng.random() < self.random_invert:
            image = ImageOps.invert(image)
        if self.random_operations is not None:
            image = self.random_operations(image, self.fill, rng)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (H, W, C) -> (C, H, W)
        pixel_values = pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
        pixel_values.sub_(self.mean).div_(self.std)
        if rng.random() < self.random_erasing:
            erase_rectangle(pixel_values, rng)
        return pixel_values


def mix_up(
    pixel_values: torch.Tensor, alpha: float, rng: np.random.Generator
) -> tuple[torch.Tensor, float]:  # (B, C, H, W), kept fraction
    """Blend the batch with its reverse, and draw the weight from a beta distribution. Return images and weight."""
    kept = rng.beta(alpha, alpha)
    return pixel_values.flip(0).mul_(1 - kept).add_(pixel_values, alpha=kept), kept


def cut_mix(
    pixel_values: torch.Tensor, alpha: float, rng: np.random.Generator
) -> tuple[torch.Tensor, float]:  # (B, C, H, W), kept fraction
    """Paste a rectangle of the reversed batch into the batch. Return images and the fraction of pixels kept."""
    height, width = pixel_values.shape[-2:]
    side = math.sqrt(1 - rng.beta(alpha, alpha))
    cut_height, cut_width = int(height * side), int(width * side)
    center_y, center_x = int(rng.integers(height)), int(rng.integers(width))
    top, bottom = max(0, center_y - cut_height // 2), min(height, center_y + (cut_height + 1) // 2)
    left, right = max(0, center_x - cut_width // 2), min(width, center_x + (cut_width + 1) // 2)
    mixed = pixel_values.clone()
    mixed[..., top:bottom, left:right] = pixel_values[..., top:bottom, left:right].flip(0)
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)


@dataclass(kw_only=True)
class MixingSettings:
    """The augmentation of a batch: MixUp or CutMix, and label smoothing.

    Image i is mixed with image B - 1 - i. One fraction holds for the whole batch.

    Args:
        mixup_alpha: Parameter of the beta distribution of MixUp. 0 disables MixUp.
        cutmix_alpha: Parameter of the beta distribution of CutMix. 0 disables CutMix.
        switch_prob: Probability of CutMix instead of MixUp if both are enabled.
        label_smoothing: Fraction of the targets that is spread over all labels.
        num_labels: Labels of the head.

    Raises:
        ValueError: If a value is out of bounds. The message names it.
    """

    mixup_alpha: float
    cutmix_alpha: float
    switch_prob: float
    label_smoothing: float
    num_labels: int

    def __post_init__(self):
        for name in ("mixup_alpha", "cutmix_alpha"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}: give 0 (disabled) or more")
        if self.num_labels < 1:
            raise ValueError(f"num_labels is {self.num_labels}: give at least 1")
        check_probability("switch_prob", self.switch_prob)
        check_probability("label_smoothing", self.label_smoothing)

    @property
    def mixes(self) -> bool:
        """Whether MixUp or CutMix is enabled."""
        return self.mixup_alpha > 0 or self.cutmix_alpha > 0


class Mixing(MixingSettings):
    """Mixes a batch with PyTorch. In a batch of odd size, the image in the middle stays unmixed."""

    def __call__(
        self, pixel_values: torch.Tensor, labels: torch.Tensor, rng: np.random.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mix images `(B, C, H, W)` of any floating dtype, and their labels `(B,)`, int64, in [0, num_labels).

        Returns:
            The images, and their targets `(B, num_labels)`, float32, on the same device. Each target sums to 1.
        """
        kept = 1.0
        if self.cutmix_alpha and (not self.mixup_alpha or rng.random() < self.switch_prob):
            pixel_values, kept = cut_mix(pixel_values, self.cutmix_alpha, rng)
        elif self.mixup_alpha:
            pixel_values, kept = mix_up(pixel_values, self.mixup_alpha, rng)
        spread = self.label_smoothing / self.num_labels
        targets = torch.full((len(labels), self.num_labels), spread, dtype=torch.float32, device=labels.device)
        targets.scatter_(1, labels[:, None], 1 - self.label_smoothing + spread)
        return pixel_values, targets * kept + targets.flip(0) * (1 - kept)
