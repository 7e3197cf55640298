"""The backbone in a detector of torchvision, as docs/dense_tasks.md shows it."""

import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]


def import_torchvision():
    """Import torchvision's detectors. A build for another PyTorch raises a RuntimeError."""
    try:
        from torchvision.models import detection
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"needs a torchvision that fits this PyTorch: pip install torchvision ({error})")
    return detection


def test_the_example_of_the_page(monkeypatch):
    detection = import_torchvision()
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "dense_tasks.md").read_text(encoding="utf-8")
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "from torchvision" in block)
    found: dict = {}
    exec(code, found)
    assert isinstance(found["detector"], detection.RetinaNet)
    assert set(found["losses"]) == {"classification", "bbox_regression"}
    sum(found["losses"].values()).backward()
    embeddings = found["detector"].backbone.backbone.embeddings.patch_embeddings
    assert embeddings.weight.grad.isfinite().all() and embeddings.weight.grad.any()
