"""PEFT's adapters reach every linear layer, and survive saving, loading and merging."""

import pytest
import torch
from torch import nn

from golden_values import relative_error
from modeling_evmamba import (
    VARIANTS,
    EfficientVMambaConfig,
    EfficientVMambaForImageClassification,
    optimize_for_inference,
)


peft = pytest.importorskip("peft", reason='needs peft: pip install ".[test]"')

BATCH_NORMS = ["batch_norm", "expand_batch_norm", "depthwise_batch_norm", "project_batch_norm"]

ADAPTERS = {
    "lora": lambda **options: peft.LoraConfig(r=4, **options),
    "dora": lambda **options: peft.LoraConfig(r=4, use_dora=True, **options),
    "ia3": lambda **options: peft.IA3Config(feedforward_modules=[], **options),
}


def create_model() -> EfficientVMambaForImageClassification:
    torch.manual_seed(0)
    config = EfficientVMambaConfig(hidden_sizes=[16, 32, 64, 128], depths=[1, 1, 1, 1], num_labels=5)
    return EfficientVMambaForImageClassification(config)


def create_images(batch_size: int = 8) -> torch.Tensor:
    return torch.randn(batch_size, 3, 40, 32, generator=torch.Generator().manual_seed(1))


def train(model: nn.Module) -> None:
    """Take a few steps in train mode, which also update the running statistics of batch norms."""
    images, labels = create_images(), torch.arange(8) % 5
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.01)
    model.train()
    for _ in range(4):
        model(pixel_values=images, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def logits_of(model: nn.Module) -> torch.Tensor:
    return model.eval()(pixel_values=create_images()).logits


def linear_weights(model: nn.Module) -> int:
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))


def test_linear_layers_hold_the_weights():
    with torch.device("meta"):
        config = EfficientVMambaConfig(**VARIANTS["tiny"], num_labels=1000)
        model = EfficientVMambaForImageClassification(config)
    assert linear_weights(model) > 0.95 * model.num_parameters()


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters_of_all_linear_layers(adapter, tmp_path):
    model = create_model()
    names = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    config = ADAPTERS[adapter](target_modules="all-linear", modules_to_save=["classifier", *BATCH_NORMS])
    adapted = peft.get_peft_model(model, config)
    layers = dict(adapted.get_base_model().named_modules())
    assert {name for name in names if hasattr(layers[name], "base_layer")} == names - {"classifier"}
    train(adapted)
    expected = logits_of(adapted)
    assert relative_error(expected, logits_of(create_model())) > 0.01  # the steps changed something
    adapted.save_pretrained(tmp_path)

    loaded = peft.PeftModel.from_pretrained(create_model(), tmp_path)
    assert torch.equal(logits_of(loaded), expected)
    merged = loaded.merge_and_unload()
    assert relative_error(logits_of(merged), expected) < 3e-5
    assert type(merged.efficientvmamba.encoder.stages[0].layers[0].mixer.in_proj) is nn.Linear
    assert relative_error(logits_of(optimize_for_inference(merged)), expected) < 3e-5


def test_adapters_without_batch_norms_lose_their_statistics(tmp_path):
    adapted = peft.get_peft_model(create_model(), ADAPTERS["lora"](target_modules="all-linear"))
    train(adapted)
    expected = logits_of(adapted)
    adapted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(create_model(), tmp_path)
    assert relative_error(logits_of(loaded), expected) > 0.01


@pytest.mark.parametrize(
    "target", ["in_proj", "output_proj", "pointwise_conv", "expand_conv", "project_conv", "squeeze", "expand"]
)
def test_a_single_kind_of_layer(target):
    adapted = peft.get_peft_model(create_model(), ADAPTERS["lora"](target_modules=[target]))
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert trained and all(f".{target}.lora_" in name for name in trained)
    before = logits_of(adapted)
    train(adapted)
    assert not torch.equal(logits_of(adapted), before)


def test_optimized_copies_and_adapters_refuse_each_other():
    adapted = peft.get_peft_model(create_model(), ADAPTERS["lora"](target_modules="all-linear"))
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(TypeError, match="merge adapters first"):
            optimize_for_inference(adapted.get_base_model().to(dtype))
    optimized = optimize_for_inference(create_model())
    with pytest.raises(RuntimeError, match="quantize, adapt or trace the original"):
        peft.get_peft_model(optimized, ADAPTERS["lora"](target_modules="all-linear"))
