"""Augmentation of images with boxes: random crops, flips and colors, as DETR and RT-DETR have them.

The image processor of the model resizes and normalizes the result.

Papers: https://arxiv.org/abs/2005.12872 (DETR), https://arxiv.org/abs/2304.08069 (RT-DETR)
"""

import numpy as np
from PIL import Image

from training_evmamba.dense.boxes import Objects, clean, turn_objects
from training_evmamba.dense.mask_augmentation import distort_colors


MAX_TRIALS = 20  # of crops without an object


def crop(image: Image.Image, objects: Objects, box: tuple[int, int, int, int]) -> tuple[Image.Image, Objects]:
    """Crop an image. Keep the objects whose centers are inside, with the parts of their boxes that are.

    Args:
        box: x and y of the upper left and of the lower right corner.
    """
    corner, size = np.array(box[:2]), (box[2] - box[0], box[3] - box[1])
    boxes = np.concatenate([objects.boxes[:, :2] - corner, objects.boxes[:, 2:]], axis=1)
    centers = boxes[:, :2] + boxes[:, 2:] / 2
    is_inside = ((centers > 0) & (centers < size)).all(axis=1)
    return image.crop(box), clean(objects._replace(boxes=boxes).select(is_inside), size).objects


def choose_crop(size: tuple[int, int], min_scale: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Choose a crop at random. Each side is at least the given part of the image's."""
    sides = [max(1, round(side * rng.uniform(min_scale, 1))) for side in size]
    x, y = (int(rng.integers(whole - part + 1)) for whole, part in zip(size, sides, strict=True))
    return x, y, x + sides[0], y + sides[1]


class BoxTransform:
    """Crops and flips an image with its objects at random.

    Args:
        crop_probability: Probability of a crop. It keeps an object, if the image has any.
        min_crop: Lower bound of the sides of a crop, as a part of the image's.
        flip: Probability of a horizontal flip.
        distortion: Probability of each change of colors.
    """

    def __init__(self, crop_probability: float, min_crop: float, flip: float, distortion: float):
        self.crop_probability, self.min_crop, self.flip, self.distortion = crop_probability, min_crop, flip, distortion

    def __call__(self, image: Image.Image, objects: Objects, rng: np.random.Generator) -> tuple[Image.Image, Objects]:
        if rng.random() < self.crop_probability:
            image, objects = self.crop_with_object(image, objects, rng)
        if rng.random() < self.flip:
            turn = Image.Transpose.FLIP_LEFT_RIGHT
            image, objects = image.transpose(turn), turn_objects(objects, turn, image.size)
        return distort_colors(image, self.distortion, rng), objects

    def crop_with_object(
        self, image: Image.Image, objects: Objects, rng: np.random.Generator
    ) -> tuple[Image.Image, Objects]:
        for _ in range(MAX_TRIALS):
            cropped = crop(image, objects, choose_crop(image.size, self.min_crop, rng))
            if len(cropped[1].labels) or not len(objects.labels):
                return cropped
        return image, objects
