"""The backbone in MMDetection's registry, as docs/dense_tasks.md shows it."""

import re
from pathlib import Path

import pytest
import torch

from evmamba_demo.bundled import find_bundled_model


PAGE = Path(__file__).parents[2] / "docs" / "dense_tasks.md"


def test_the_block_of_the_page():
    pytest.importorskip("mmdet.models", reason="needs MMDetection and mmcv's operators: pip install mmdet mmcv")
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (code,) = (block for block in blocks if "mmdet.registry" in block)
    found: dict = {}
    exec(code, found)
    config = {**found["model"]["backbone"], "checkpoint": str(find_bundled_model())}
    del config["_delete_"]  # mmengine takes it out when it merges configurations
    backbone = found["MODELS"].build(config)
    weights = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    backbone.init_weights()  # MMEngine's runner calls it before it trains
    assert all(torch.equal(tensor, weights[name]) for name, tensor in backbone.state_dict().items())
    feature_maps = backbone(torch.randn(1, 3, 64, 96))
    assert [tuple(each.shape[2:]) for each in feature_maps] == [(32, 48), (16, 24), (8, 12), (4, 6)]
    sum(each.square().mean() for each in feature_maps).backward()
    gradient = backbone.backbone.embeddings.patch_embeddings.weight.grad
    assert gradient.isfinite().all() and gradient.any()
