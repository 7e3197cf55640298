"""Fixtures for training runs, and for both augmentation libraries."""

from types import SimpleNamespace

import pytest

from augmentation_cases import import_timm
from training_evmamba.augmentation import Mixing, TrainingTransform
from training_runs import make_recipe, stripes  # noqa: F401, fixtures


@pytest.fixture(params=["pillow", "timm"], scope="module")
def library(request) -> SimpleNamespace:
    """The two classes of a library: `transform` and `mixing`."""
    if request.param == "pillow":
        return SimpleNamespace(name="pillow", transform=TrainingTransform, mixing=Mixing)
    import_timm()
    from training_evmamba.augmentation_timm import TimmMixing, TimmTransform

    return SimpleNamespace(name="timm", transform=TimmTransform, mixing=TimmMixing)
