"""Every runtime of the comparison classifies as PyTorch does."""

from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import runtimes
from modeling_evmamba import EfficientVMambaConfig, EfficientVMambaForImageClassification


COMPILED = {"compiled", "compiled bfloat16"}
# largest difference of a logit, in units of the largest logit
BOUNDS = {"int8": 0.2, "bfloat16": 0.05}


@pytest.fixture(scope="module")
def ours() -> nn.Module:
    torch.manual_seed(0)
    config = EfficientVMambaConfig(
        hidden_sizes=[16, 32], depths=[1, 1], block_types=["evss", "inverted_residual"], num_labels=10
    )
    return EfficientVMambaForImageClassification(config).eval()


@pytest.fixture(scope="module")
def peer() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, stride=2), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """The directories of files: the runtimes of a network share its export."""
    return {name: tmp_path_factory.mktemp(name) for name in ("ours", "peer")}


def classify(build: runtimes.Build, model: nn.Module, folder: Path) -> torch.Tensor:
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    output = build(model, images, folder)()
    return getattr(output, "logits", output).float()


def check(build: runtimes.Build, name: str, model: nn.Module, folder: Path) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = classify(runtimes.build_eager, model, folder)
    actual = classify(build, model, folder)
    bound = BOUNDS.get(name.split()[-1], 1e-5)
    assert (actual - expected).abs().max() <= bound * expected.abs().max()
    if name.endswith(("bfloat16", "int8")):
        assert not torch.equal(actual, expected)  # otherwise, nothing ran in the lower precision
    for key, value in model.state_dict().items():
        assert value.dtype == before[key].dtype and torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", sorted(runtimes.OUR_RUNTIMES))
def test_runtimes_of_ours(name, ours, folders):
    check(runtimes.OUR_RUNTIMES[name], name, ours, folders["ours"])


@pytest.mark.parametrize("name", sorted(runtimes.PEER_RUNTIMES.keys() - COMPILED))
def test_runtimes_of_others(name, peer, folders):
    check(runtimes.PEER_RUNTIMES[name], name, peer, folders["peer"])


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(COMPILED))
def test_compiled_runtimes_of_others(name, peer, folders):
    check(runtimes.PEER_RUNTIMES[name], name, peer, folders["peer"])


def test_quantized_files_hold_8_bit_weights(peer, folders):
    import onnx

    for name, operators in {
        "ONNX dynamic int8": {"DynamicQuantizeLinear", "Conv"},
        "ONNX static int8": {"QuantizeLinear", "DequantizeLinear", "Conv"},
    }.items():
        classify(runtimes.PEER_RUNTIMES[name], peer, folders["peer"])
        graph = onnx.load(folders["peer"] / f"{name.removeprefix('ONNX ').replace(' ', '_')}.onnx").graph
        assert operators <= {node.op_type for node in graph.node}, name
        assert onnx.TensorProto.INT8 in {tensor.data_type for tensor in graph.initializer}, name
