"""Classifiers on CPUs compute in optimized copies. Those that cannot be optimized compute as they are, and say so."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, ResNetConfig, ResNetForImageClassification

from evmamba_demo.bundled import find_bundled_model
from evmamba_hub.errors import Notice, UserError
from evmamba_hub.inference.classify import load_classifier
from evmamba_hub.inference.loading import Execution, check_execution, load_network
from golden_values import relative_error
from modeling_evmamba import EfficientVMambaConfig, EfficientVMambaForImageClassification


CPU = torch.device("cpu")
EXAMPLES = Path(__file__).parents[4] / "demo" / "examples"
DIGIT = EXAMPLES / "digit_3.png"

# the largest error of a logit, relative to the largest logit
BOUNDS = {"float32": 3e-6, "bfloat16": 3e-2, "int8": 1e-1}


@pytest.fixture
def small_model(tmp_path) -> Path:
    torch.manual_seed(0)
    config = EfficientVMambaConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], num_labels=7)
    EfficientVMambaForImageClassification(config).save_pretrained(tmp_path / "small")
    return tmp_path / "small"


@pytest.fixture
def other_network(tmp_path) -> Path:
    """The directory of a classifier that is no EfficientVMamba."""
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=3)
    ResNetForImageClassification(config).save_pretrained(tmp_path / "resnet")
    shutil.copy(find_bundled_model() / "preprocessor_config.json", tmp_path / "resnet")
    return tmp_path / "resnet"


@pytest.fixture
def adapted_model(tmp_path) -> Path:
    """The directory of the digits model with a LoRA adapter beside its weights."""
    peft = pytest.importorskip("peft", reason='needs peft: pip install ".[test]"')
    shutil.copytree(find_bundled_model(), tmp_path / "adapted")
    model = EfficientVMambaForImageClassification.from_pretrained(tmp_path / "adapted")
    torch.manual_seed(0)
    adapter = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    peft.get_peft_model(model, adapter).save_pretrained(tmp_path / "adapted")
    return tmp_path / "adapted"


def load(folder: Path, dtype: str = "float32", optimize: bool = True) -> tuple[PreTrainedModel, Execution]:
    return load_network(folder, str(folder), CPU, dtype, optimize)


@torch.no_grad()
def logits_of(network: nn.Module, num_channels: int = 3) -> torch.Tensor:
    images = torch.randn(2, num_channels, 33, 40, generator=torch.Generator().manual_seed(1))
    return network(images.to(network.dtype)).logits.float()


def has_batch_norms(network: nn.Module) -> bool:
    """Return whether a network is as it was trained: copies for inference fold the batch norms."""
    return any(isinstance(module, nn.BatchNorm2d) for module in network.modules())


@pytest.mark.parametrize("dtype", BOUNDS)
def test_networks_on_cpus_are_optimized_copies(small_model, dtype):
    with warnings.catch_warnings(action="error", category=Notice):
        network, execution = load(small_model, dtype)
    assert execution == Execution("cpu", dtype, optimized=True)
    assert not has_batch_norms(network) and not network.training
    expected = logits_of(EfficientVMambaForImageClassification.from_pretrained(small_model).eval())
    assert relative_error(logits_of(network), expected) < BOUNDS[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_switch_leaves_the_network_as_it_is(small_model, dtype):
    network, execution = load(small_model, str(dtype).removeprefix("torch."), optimize=False)
    assert str(execution) == f"on cpu in {execution.dtype}, as it is"
    assert has_batch_norms(network) and not network.training
    assert (network.dtype, network.efficientvmamba.encoder.stages[0].layers[0].mixer.A_log.dtype) == (
        dtype,
        torch.float32,
    )


def test_networks_on_other_devices_stay_as_they_are(small_model):
    network, execution = load_network(small_model, "small", torch.device("meta"), "bfloat16", optimize=True)
    assert execution == Execution("meta", "bfloat16", optimized=False)
    assert has_batch_norms(network) and network.dtype == torch.bfloat16 and network.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "model, reason",
    [
        ("adapted_model", r"mixer.in_proj of a block is a peft\.tuners\.lora\.layer\.Linear"),
        (
            "other_network",
            "an EfficientVMamba model or one with its backbone, got a ResNetForImageClassification",
        ),
    ],
)
def test_networks_that_cannot_be_optimized_run_as_they_are(request, model, reason, dtype):
    folder, name = request.getfixturevalue(model), str(dtype).removeprefix("torch.")
    with pytest.warns(Notice, match=f"^the model runs as it is: .*{reason}") as notices:
        network, execution = load(folder, name)
    assert len([notice for notice in notices if notice.category is Notice]) == 1
    assert execution == Execution("cpu", name, optimized=False)
    assert network.dtype == dtype and not network.training
    expected, _ = load(folder, name, optimize=False)
    assert torch.equal(logits_of(network), logits_of(expected))


def test_hooks_are_kept_and_called():
    classifier = load_classifier(str(find_bundled_model()), "cpu", "float32", optimize=False)
    calls = []
    mixer = classifier.model.efficientvmamba.encoder.stages[0].layers[0].mixer
    mixer.register_forward_hook(lambda *arguments: calls.append(1))
    with pytest.warns(Notice, match="^the model runs as it is: mixer has hooks"):
        assert classifier.optimize() is classifier
    assert classifier(str(DIGIT), top_k=1)[0]["label"] == "3" and calls
    assert not classifier.execution.optimized


def test_a_classifier_and_its_optimized_copy_agree():
    original = load_classifier(str(find_bundled_model()), "cpu", "float32", optimize=False)
    optimized = original.optimize()
    assert (original.execution.optimized, optimized.execution.optimized) == (False, True)
    assert has_batch_norms(original.model) and not has_batch_norms(optimized.model)
    first, second = original(str(DIGIT)), optimized(str(DIGIT))
    assert [each["label"] for each in first] == [each["label"] for each in second]
    assert [each["score"] for each in first] == pytest.approx([each["score"] for each in second], abs=1e-6)


@pytest.mark.parametrize(
    "device, optimize, message",
    [
        ("cuda", True, "int8 computes on CPUs only, not on cuda: choose another --dtype, or add --device cpu"),
        ("cuda", False, "int8 computes on CPUs only, not on cuda"),
        ("cpu", False, "int8 needs an optimized copy: choose another --dtype, or leave --no-optimize out"),
    ],
)
def test_int8_needs_a_cpu_and_an_optimized_copy(device, optimize, message):
    with pytest.raises(UserError, match=message):
        check_execution(torch.device(device), "int8", optimize)


@pytest.mark.parametrize("model", ["adapted_model", "other_network"])
def test_int8_is_refused_without_an_optimized_copy(request, model):
    folder = request.getfixturevalue(model)
    with warnings.catch_warnings(action="error", category=Notice), pytest.raises(UserError, match="compute in int8: "):
        load(folder, "int8")


def test_float16_computes_on_every_cpu(small_model):
    """Processors without instructions for float16 compute in the network as it is."""
    with warnings.catch_warnings(record=True) as caught:
        network, execution = load(small_model, "float16")
    notices = [str(each.message) for each in caught if each.category is Notice]
    assert execution.optimized == (not notices) and execution.dtype == "float16"
    expected = logits_of(EfficientVMambaForImageClassification.from_pretrained(small_model).eval())
    assert relative_error(logits_of(network), expected) < 1e-2


# The commands


def classify(evmamba, *options) -> tuple[list[dict], str]:
    code, out, err = evmamba("classify", DIGIT, "--json", "--device", "cpu", *options)
    assert code == 0, err
    return json.loads(out), err


@pytest.mark.parametrize("options, optimized", [([], True), (["--no-optimize"], False), (["--optimize"], True)])
def test_classify_says_what_ran(evmamba, options, optimized):
    (found,), err = classify(evmamba, *options)
    assert {name: found[name] for name in ("device", "dtype", "optimized")} == {
        "device": "cpu",
        "dtype": "float32",
        "optimized": optimized,
    }
    assert err.splitlines().count(f"Computing on cpu in float32, {'optimized' if optimized else 'as it is'}") == 1
    assert "Note:" not in err and found["predictions"][0]["label"] == "3"


def test_scores_do_not_depend_on_the_switch(evmamba):
    scores = []
    for options in ([], ["--no-optimize"]):
        (found,), _ = classify(evmamba, "--top-k", 10, *options)
        scores.append({each["label"]: each["score"] for each in found["predictions"]})
    assert scores[0] == pytest.approx(scores[1], abs=1e-6) and scores[0] != scores[1]


def test_classify_says_once_why_a_network_is_not_optimized(evmamba, adapted_model):
    (found, again), err = classify(evmamba, DIGIT, "--model", adapted_model)
    assert err.count("Note: the model runs as it is: ") == err.count("as it is: ") == 1
    assert "merge adapters first" in err and not found["optimized"] and found == again
    (expected,), err = classify(evmamba, "--model", adapted_model, "--no-optimize")
    assert found == expected and "Note:" not in err


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_classify_computes_in_other_dtypes(evmamba, dtype):
    (found,), err = classify(evmamba, "--dtype", dtype)
    assert f"Computing on cpu in {dtype}, optimized" in err and (found["dtype"], found["optimized"]) == (dtype, True)
    assert found["predictions"][0]["label"] == "3"


@pytest.mark.parametrize("command", ["classify", "evaluate"])
def test_int8_without_an_optimized_copy_is_one_message(evmamba, command, tmp_path):
    shutil.copytree(EXAMPLES, tmp_path / "data" / "0")
    arguments = {
        "classify": [DIGIT, "--model", find_bundled_model()],
        "evaluate": [find_bundled_model(), "--dataset", tmp_path / "data"],
    }
    code, out, err = evmamba(command, *arguments[command], "--device", "cpu", "--dtype", "int8", "--no-optimize")
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith("Error: int8 needs an optimized copy") and "Traceback" not in err
