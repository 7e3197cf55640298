"""The backbone inside every head of transformers that takes one."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version

from dense_heads import (
    HEADS,
    STAGES,
    TINY,
    UNSUPPORTED,
    Head,
    check_reload,
    find_backbone,
    load,
    randomize,
)
from evmamba_demo.bundled import find_bundled_model
from evmamba_hub.publish.push import collect_model_files
from modeling_evmamba import (
    EfficientVMambaBackbone,
    EfficientVMambaConfig,
    EfficientVMambaForImageClassification,
    optimize_for_inference,
)
from modeling_evmamba.modeling_evmamba import EfficientVMambaEVSSLayer
from weights import assert_same_weights


ROOT = Path(__file__).parents[2]
MODELS = Path(transformers.__file__).parent / "models"

# Sam3's video tracker holds Sam3's vision model.
OTHER_FAMILIES = {"sam3_tracker_video"}


def skip_missing(head: Head) -> Head:
    if not head.is_installed:
        pytest.skip(f"transformers {transformers.__version__} has no {head.name}")
    return head


@pytest.fixture(params=HEADS, ids=lambda head: head.name)
def head(request) -> Head:
    return skip_missing(request.param)


@pytest.fixture
def model(head):
    torch.manual_seed(0)
    return head.create(EfficientVMambaConfig(**head.backbone_fields))


def find_floats(outputs) -> Iterator[torch.Tensor]:
    if isinstance(outputs, dict):
        outputs = list(outputs.values())
    if isinstance(outputs, torch.Tensor):
        if outputs.is_floating_point():
            yield outputs
    elif isinstance(outputs, list | tuple):
        for each in outputs:
            yield from find_floats(each)


def test_gradients_reach_the_first_layer(head, model):
    outputs = model.train()(**head.inputs())
    sum(each.square().mean() for each in find_floats(outputs) if each.requires_grad).backward()
    backbone = find_backbone(model)
    for layer in (backbone.embeddings.patch_embeddings, *backbone.hidden_states_norms.values()):
        assert layer.weight.grad.isfinite().all() and layer.weight.grad.any()


def test_logits_of_upernet_have_the_size_of_the_images():
    head = HEADS[0]
    model = head.create(EfficientVMambaConfig(**head.backbone_fields))
    labels = torch.zeros(2, 75, 101, dtype=torch.long)
    outputs = model(torch.randn(2, 3, 75, 101), labels=labels)
    assert outputs.logits.shape == (2, 3, 75, 101)
    assert outputs.loss.isfinite()


def test_recorded_outputs_leave_the_result(head, model):
    """A head that records its own layers must not mix them with those of the backbone."""
    inputs = head.inputs()
    with torch.no_grad():
        expected = model.eval()(**inputs)
        found = model(**inputs, output_hidden_states=True)
    names = [name for name, value in expected.items() if isinstance(value, torch.Tensor)]
    assert names
    for name in names:
        torch.testing.assert_close(found[name], expected[name], msg=name)


def test_every_tensor_of_a_head_is_loaded(model, tmp_path):
    randomize(model)
    check_reload(model, tmp_path)


@pytest.mark.parametrize("head", [head for head in HEADS if head.base_name], ids=lambda head: head.name, indirect=True)
def test_the_base_model_loads_a_head(head, model, tmp_path):
    if model.base_model is model:  # mended in 5.18 for RT-DETR and its relatives, and in 5.21 for PP-OCR
        assert Version(transformers.__version__) < Version("5.21")
        pytest.skip(f"transformers {transformers.__version__} finds no base model in {head.name}")
    randomize(model)
    model.save_pretrained(tmp_path)
    loaded, info = load(head.base_name, tmp_path)
    found, expected = loaded.state_dict(), model.base_model.state_dict()
    # a base model on its own may lack layers that the head hangs into it, or have a pooler
    shared = found.keys() & expected.keys()
    assert_same_weights({name: found[name] for name in shared}, {name: expected[name] for name in shared})
    assert_same_weights(find_backbone(loaded).state_dict(), find_backbone(model).state_dict())
    assert info["missing_keys"].isdisjoint(expected) and not info["mismatched_keys"]
    assert not [name for name in info["unexpected_keys"] if "backbone" in name]


def test_a_classifier_becomes_the_backbone(head, model, tmp_path):
    """As docs/dense_tasks.md says. Frozen batch norms of detectors count no batches."""
    classifier = EfficientVMambaForImageClassification(EfficientVMambaConfig(**TINY, num_channels=head.num_channels))
    randomize(classifier)
    classifier.save_pretrained(tmp_path)
    pretrained, info = EfficientVMambaBackbone.from_pretrained(
        tmp_path, out_features=head.stages or STAGES, output_loading_info=True
    )
    assert all(name.startswith("hidden_states_norms.") for name in info["missing_keys"])
    assert {name.rpartition(".")[0] for name in info["unexpected_keys"]} == {"classifier", "efficientvmamba.layernorm"}
    backbone = find_backbone(model)
    backbone.load_state_dict(pretrained.state_dict())
    expected = {name: tensor for name, tensor in pretrained.state_dict().items() if name in backbone.state_dict()}
    assert all("num_batches_tracked" in name for name in pretrained.state_dict().keys() - expected.keys())
    assert_same_weights(backbone.state_dict(), expected)


# Load a repository's code, and register it as docs/dense_tasks.md says. Every head with it must load what it saves.
REMOTE_SCRIPT = """
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from transformers import AutoBackbone, AutoConfig
from dense_heads import HEADS, check_reload, find_backbone, randomize

backbone = AutoBackbone.from_pretrained(sys.argv[1], trust_remote_code=True)
AutoConfig.register("efficientvmamba", type(backbone.config))
for head in HEADS:
    if head.is_installed:
        model = head.create(type(backbone.config)(**head.backbone_fields, auto_map=backbone.config.auto_map))
        assert type(find_backbone(model)) is type(backbone)
        randomize(model)
        with TemporaryDirectory() as folder:
            check_reload(model, Path(folder))
        print(head.name)
assert type(backbone).__module__.startswith("transformers_modules.")
assert "modeling_evmamba" not in sys.modules
"""


@pytest.mark.slow
def test_heads_with_remote_code(hub, tmp_path):
    hub.create("someone/digits", collect_model_files(find_bundled_model(), "someone/digits"))
    settings = {"HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}
    completed = subprocess.run(
        [sys.executable, "-c", REMOTE_SCRIPT, "someone/digits"],
        cwd=tmp_path,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert completed.returncode == 0, completed.stderr
    assert completed.stdout.split() == [head.name for head in HEADS if head.is_installed]


def set_statistics(model: torch.nn.Module) -> None:
    """Give batch norms, also frozen ones, other statistics than those of their initialization."""
    for module in model.modules():
        if hasattr(module, "running_var"):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 1.5)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-4), (torch.bfloat16, None), (torch.int8, None)])
def test_optimized_backbones(head, model, dtype, bound):
    """In lower precision, a head may choose other queries. Its inputs and outputs stay in float32."""
    set_statistics(model)
    inputs, state = head.inputs(), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimized = optimize_for_inference(model.eval(), dtype)
    with torch.no_grad():
        expected, found = list(find_floats(model(**inputs))), list(find_floats(optimized(**inputs)))
    assert not any(isinstance(module, EfficientVMambaEVSSLayer) for module in optimized.modules())
    assert not any(parameter.requires_grad for parameter in optimized.parameters())
    for one, other in zip(expected, found, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype and other.isfinite().eq(one.isfinite()).all()
        if bound is not None:
            torch.testing.assert_close(other, one, rtol=bound, atol=bound * one.abs().max().item())
    assert_same_weights(model.state_dict(), state)
    with pytest.raises(RuntimeError, match="optimized for inference and can neither be saved nor copied"):
        optimized.state_dict()


@pytest.mark.parametrize("head, message", UNSUPPORTED, ids=[head.name for head, _ in UNSUPPORTED])
def test_other_heads_refuse_the_backbone(head, message):
    """If this fails, the head may work by now: move it to HEADS."""
    skip_missing(head)
    config = EfficientVMambaConfig(**head.backbone_fields)
    with pytest.raises((AttributeError, RuntimeError, TypeError, ValueError), match=message):
        head.create(config)(**head.inputs())


def test_every_head_of_transformers_is_tested():
    """A new version of transformers may bring heads. Add them to HEADS or UNSUPPORTED, and to docs/dense_tasks.md."""
    found = {path.parent.name for path in MODELS.glob("*/configuration_*.py") if "backbone_config" in path.read_text()}
    unsupported = {head.family for head, _ in UNSUPPORTED if head.is_installed}
    supported = {head.family for head in HEADS if head.is_installed}
    assert found - OTHER_FAMILIES == supported | unsupported
    classes = {
        name
        for family in supported
        for path in (MODELS / family).glob("modeling_*.py")
        for name in re.findall(r"^class (\w+For[A-Z]\w+)\(\w+PreTrainedModel\)", path.read_text(), re.MULTILINE)
    }
    assert classes == {head.name for head in HEADS if head.is_installed}


def test_every_head_is_documented():
    page = (ROOT / "docs" / "dense_tasks.md").read_text(encoding="utf-8")
    missing = [each.name for each in [*HEADS, *(head for head, _ in UNSUPPORTED)] if f"`{each.name}`" not in page]
    assert not missing
