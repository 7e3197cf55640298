"""Networks of three channels take color images, and networks of one channel take gray ones."""

import warnings
from typing import Any

from transformers import PreTrainedConfig

from evmamba_hub.errors import Notice, UserError


COLOR_MODES = {1: "L", 3: "RGB"}  # Pillow's modes by number of channels


def find_color_mode(config: PreTrainedConfig) -> str:
    """Return the mode of the images that a network takes. Networks of other packages may not name their channels.

    Raises:
        UserError: If the network takes neither gray nor color images.
    """
    num_channels = getattr(config, "num_channels", 3)
    if num_channels not in COLOR_MODES:
        raise UserError(
            f"the network takes {num_channels} channels, image files are read as gray (1 channel) or RGB (3): call it "
            "in Python with your own pixel values"
        )
    return COLOR_MODES[num_channels]


def fit_image_processor(image_processor: Any, mode: str) -> None:
    """Let the image processor of a network keep gray images gray, and normalize their only channel.

    If it has different values for several channels, it takes their mean, and a `Notice` says so.
    """
    if mode != "L":
        return
    image_processor.do_convert_rgb = False
    for name in ("image_mean", "image_std"):
        values = getattr(image_processor, name)
        if not isinstance(values, (list, tuple)):  # one number, or None
            continue
        setattr(image_processor, name, [sum(values) / len(values)])
        if len(set(values)) > 1:
            warnings.warn(
                f"the network takes gray images, its image processor has {name} {list(values)}: their mean is used. "
                f"Save the value that the network was trained with in preprocessor_config.json",
                Notice,
                stacklevel=2,
            )
