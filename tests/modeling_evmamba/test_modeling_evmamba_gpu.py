"""Tests of the network on a GPU, as users run it there: `make test-gpu`."""

import copy

import pytest
import torch
from transformers import pipeline

from devices import DEVICE
from evmamba_demo.bundled import find_bundled_model, find_examples
from golden_values import relative_error
from modeling_evmamba import EfficientVMambaConfig, EfficientVMambaForImageClassification


if DEVICE.type == "cpu":
    pytest.skip("runs on a GPU: make test-gpu", allow_module_level=True)

CONFIG = EfficientVMambaConfig(hidden_sizes=[16, 32, 64, 128], depths=[1, 1, 1, 1], num_labels=3, drop_path_rate=0.0)
TF32_BOUND = 5e-3  # cuDNN's convolutions round to it by default


@pytest.fixture
def model() -> EfficientVMambaForImageClassification:
    torch.manual_seed(0)
    return EfficientVMambaForImageClassification(CONFIG).eval()


@pytest.fixture
def pixel_values() -> torch.Tensor:
    return torch.randn(3, 3, 67, 93, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_pipeline(dtype):
    images = list(map(str, find_examples()))
    model = str(find_bundled_model())
    expected = pipeline("image-classification", model=model, device="cpu")(images, top_k=1)
    for result, (best,) in zip(
        pipeline("image-classification", model=model, device=DEVICE, dtype=dtype)(images, top_k=1),
        expected,
        strict=True,
    ):
        assert result[0]["label"] == best["label"]
        assert result[0]["score"] == pytest.approx(best["score"], abs=0.05)


@pytest.mark.parametrize("classifier_device", [DEVICE, "cpu"], ids=["all on it", "the classifier elsewhere"])
def test_device_map(tmp_path, model, pixel_values, classifier_device):
    model.save_pretrained(tmp_path)
    device_map = {name: DEVICE for name, _ in model.named_children()} | {"classifier": classifier_device}
    placed = EfficientVMambaForImageClassification.from_pretrained(tmp_path, device_map=device_map)
    assert placed.efficientvmamba.encoder.stages[0].layers[0].layernorm.weight.device.type == DEVICE.type
    with torch.no_grad():
        logits, expected = placed(pixel_values.to(DEVICE)).logits, model(pixel_values).logits
    assert relative_error(logits.cpu(), expected) < TF32_BOUND


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])  # the second captures CUDA graphs
def test_compiled(model, pixel_values, mode):
    model.to(DEVICE)
    compiled = torch.compile(model, mode=mode)
    with torch.no_grad():
        for images in (pixel_values, 2 * pixel_values, pixel_values.flip(-1)):
            images = images.to(DEVICE)
            assert relative_error(compiled(images).logits.clone(), model(images).logits) < TF32_BOUND


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
def test_training_under_autocast(model, pixel_values, is_compiled):
    labels = torch.tensor([0, 2, 1])
    exact = copy.deepcopy(model).train()
    exact_loss = exact(pixel_values, labels=labels).loss
    exact_loss.backward()

    model.to(DEVICE).train()
    network = torch.compile(model) if is_compiled else model
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        loss = network(pixel_values.to(DEVICE), labels=labels.to(DEVICE)).loss
    loss.backward()
    assert loss.item() == pytest.approx(exact_loss.item(), rel=0.02)
    gradients, exact_gradients = (
        torch.cat([parameter.grad.cpu().flatten() for parameter in each.parameters()]) for each in (model, exact)
    )
    assert gradients.dtype == torch.float32
    assert relative_error(gradients, exact_gradients) < 0.3  # 0.14 on a CPU: bfloat16 through norms of 3 images
