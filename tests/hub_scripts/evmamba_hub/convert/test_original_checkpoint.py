import pytest
import torch

from evmamba_hub.convert.original_checkpoint import infer_config, modern_name, original_name
from golden_values import SHAPES
from modeling_evmamba import VARIANTS, EfficientVMambaConfig, EfficientVMambaForImageClassification


MICRO = {"hidden_sizes": [16, 32, 64, 128], "depths": [2, 1, 2, 1]}


@pytest.mark.parametrize("variant", ["tiny", "small", "base", "micro"])
def test_every_tensor_has_the_authors_name_and_size(variant):
    config = EfficientVMambaConfig(**VARIANTS.get(variant, MICRO), num_labels=10 if variant == "micro" else 1000)
    with torch.device("meta"):
        ours = EfficientVMambaForImageClassification(config).state_dict()
    assert {original_name(name, config): tensor.numel() for name, tensor in ours.items()} == {
        name: torch.Size(shape).numel() for name, shape in SHAPES[variant].items()
    }


@pytest.mark.parametrize("variant", ["tiny", "small", "base", "micro"])
def test_shapes_tell_the_configuration(variant):
    state_dict = {name: torch.empty(shape, device="meta") for name, shape in SHAPES[variant].items()}
    expected = EfficientVMambaConfig(**VARIANTS.get(variant, MICRO), num_labels=10 if variant == "micro" else 1000)
    assert infer_config(state_dict).to_dict() == expected.to_dict()


@pytest.mark.parametrize(
    "name, modern",
    [
        ("module.head.bias", "classifier.head.bias"),
        ("module.module.norm.weight", "classifier.norm.weight"),
        ("_orig_mod.module.patch_embed.proj.weight", "patch_embed.0.weight"),
        ("module._orig_mod.patch_embed.norm.bias", "patch_embed.2.bias"),
        ("layers.0.blocks.1.ln_1.weight", "layers.0.blocks.1.norm.weight"),
        ("layers.1.blocks.0.self_attention.out_norm.bias", "layers.1.blocks.0.op.out_norm.bias"),
        ("layers.0.downsample.norm.weight", "layers.0.downsample.norm.weight"),
        ("classifier.norm.weight", "classifier.norm.weight"),
    ],
)
def test_older_spellings(name, modern):
    assert modern_name(name) == modern


@pytest.mark.parametrize("name", [name for name in SHAPES["micro"] if len(SHAPES["micro"][name]) > 0])
def test_one_wrong_shape_does_not_change_the_sizes(name):
    """The error must name this key, so no single tensor may determine the network (except the number of classes)."""
    state_dict = {other: torch.empty(shape, device="meta") for other, shape in SHAPES["micro"].items()}
    state_dict[name] = torch.empty(7, device="meta")
    config = infer_config(state_dict)
    assert (config.hidden_sizes, config.depths) == (MICRO["hidden_sizes"], MICRO["depths"])
