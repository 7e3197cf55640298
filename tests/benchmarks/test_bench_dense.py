"""Segmentation and detection: the compared models, and a short run on small images."""

import pytest
import torch

from benchmarks import bench_dense
from modeling_evmamba.modeling_evmamba import EfficientVMambaEVSSLayer


@pytest.mark.parametrize("head", bench_dense.HEADS)
def test_backbones_differ_below_the_same_head(head):
    with torch.device("meta"):
        models = {
            name: bench_dense.create_as_loaded(name, head) for name in ("EfficientVMamba-T", "Swin-T", "ResNet-50")
        }
    classes = {type(model) for model in models.values()}
    assert len(classes) == 1 and any(
        isinstance(module, EfficientVMambaEVSSLayer) for module in models["EfficientVMamba-T"].modules()
    )


def test_other_sizes_are_refused(monkeypatch):
    monkeypatch.setitem(bench_dense.BACKBONES, "Swin-T", bench_dense.BACKBONES["Swin-T"]._replace(millions=3.0))
    with pytest.raises(ValueError, match=r"Swin-T has 27\.\d\d M parameters, not 3\.0 M"):
        bench_dense.create_as_loaded("Swin-T", "UperNet")


@pytest.mark.slow
def test_short_run(monkeypatch):
    names = ("EfficientVMamba-T, optimized", "Swin-T", "ResNet-50")
    monkeypatch.setattr(bench_dense, "BACKBONES", {name: bench_dense.BACKBONES[name] for name in names})
    monkeypatch.setattr(bench_dense, "IMAGE_SIZES", [(256, 256), (256, 288)])
    rows = bench_dense.measure_head("RT-DETR", repeats=1)
    assert [(row["backbone"], row["image"]) for row in rows] == [
        (name, image) for name in names for image in ("256x256", "256x288")
    ]
    for row in rows:
        assert row["median ms"] > 0 and row["peak MiB"] > 0
        assert (row["/ Swin-T"] == 1) == (row["backbone"] == "Swin-T")
