"""`evmamba convert`, from the command line to the files that it writes, on weights with known logits."""

import json
import re
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import is_torchvision_available

from golden_values import image, original_state_dict, relative_error
from modeling_evmamba import EfficientVMambaBackbone
from original_checkpoints import (
    FORWARD_BOUND,
    GOLDEN,
    MICRO_CASE,
    SEED,
    assert_golden,
    assert_refused,
    micro,
    older_names,
    prefixed,
    training_state,
)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(micro, id="bare"),
        *(
            pytest.param(lambda entry=entry: {entry: micro(), **training_state()}, id=entry)
            for entry in ("model", "state_dict", "ema_model", "model_ema", "state_dict_ema")
        ),
        pytest.param(lambda: {"model": micro(), "model_ema": None}, id="empty_ema"),
        *(
            pytest.param(lambda prefix=prefix: {"model": prefixed(prefix)}, id=prefix)
            for prefix in ("module.", "module.module.", "_orig_mod.", "_orig_mod.module.")
        ),
        pytest.param(older_names, id="older_names"),
        pytest.param(
            lambda: {"state_dict": {f"module.{name}": tensor for name, tensor in older_names().items()}},
            id="older_names_with_prefix",
        ),
        pytest.param(lambda: {name: tensor.double() for name, tensor in micro().items()}, id="float64"),
    ],
)
def test_layouts(evmamba, tmp_path, content):
    torch.save(content(), tmp_path / "source.pth.tar")
    code, out, err = evmamba("convert", tmp_path / "source.pth.tar", tmp_path / "converted")
    assert (code, err) == (0, "")
    assert "397,122" in out and "none of the published ones" in out and "evmamba classify IMAGE --model" in out
    files = {path.name for path in (tmp_path / "converted").iterdir()}
    assert files == {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert_golden(tmp_path / "converted")


def test_safetensors(evmamba, tmp_path):
    save_file(prefixed("module."), tmp_path / "source.safetensors")
    assert evmamba("convert", tmp_path / "source.safetensors", tmp_path / "converted")[0] == 0
    assert_golden(tmp_path / "converted")


def test_pickle_of_older_torch(evmamba, tmp_path):
    torch.save({"model": micro(), **training_state()}, tmp_path / "source.pth", _use_new_zipfile_serialization=False)
    assert evmamba("convert", tmp_path / "source.pth", tmp_path / "converted")[0] == 0
    assert_golden(tmp_path / "converted")


def test_views_of_one_buffer(evmamba, tmp_path):
    """Distributed training may flatten parameters into one buffer, but safetensors rejects shared memory."""
    state_dict = micro()
    floats = {name: tensor for name, tensor in state_dict.items() if tensor.is_floating_point()}
    parts = torch.cat([tensor.flatten() for tensor in floats.values()]).split([t.numel() for t in floats.values()])
    views = {name: part.view(floats[name].shape) for name, part in zip(floats, parts, strict=True)}
    torch.save({"model": state_dict | views}, tmp_path / "source.pth")
    assert evmamba("convert", tmp_path / "source.pth", tmp_path / "converted")[0] == 0
    assert_golden(tmp_path / "converted")


def test_settings_of_yacs(evmamba, tmp_path, monkeypatch):
    """The authors' script pickles its yacs settings under "config". Reading them needs no yacs."""
    module = types.ModuleType("yacs.config")
    module.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    settings = module.CfgNode(MODEL=module.CfgNode(TYPE="vssm", DROP_PATH_RATE=0.1))
    settings.__dict__["__immutable__"] = True
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
        patch.setitem(sys.modules, "yacs.config", module)
        torch.save({"model": micro(), "config": settings}, tmp_path / "source.pth")
    assert evmamba("convert", tmp_path / "source.pth", tmp_path / "converted")[0] == 0
    assert_golden(tmp_path / "converted")


@pytest.mark.parametrize("stages", [(0, 1, 2, 3), (1, 3)], ids=["all_stages", "some_stages"])
def test_backbone(evmamba, tmp_path, stages):
    state_dict = {name: tensor for name, tensor in micro().items() if not name.startswith("classifier.")}
    for stage in stages:
        channels = MICRO_CASE[f"stage{stage}"].shape[-1]
        state_dict[f"outnorm{stage}.weight"] = torch.linspace(0.5, 1.5, channels)
        state_dict[f"outnorm{stage}.bias"] = torch.linspace(-1, 1, channels)
    torch.save({"state_dict": state_dict}, tmp_path / "source.pth")
    code, out, _ = evmamba("convert", tmp_path / "source.pth", tmp_path / "converted")
    assert code == 0 and "backbone" in out and "classify" not in out

    backbone = EfficientVMambaBackbone.from_pretrained(tmp_path / "converted")
    assert backbone.out_features == [f"stage{stage + 1}" for stage in stages]
    with torch.no_grad():
        feature_maps = backbone(image((2, 3, 64, 64), SEED)).feature_maps
    for stage, feature_map in zip(stages, feature_maps, strict=True):
        expected = MICRO_CASE[f"stage{stage}"]
        weight, bias = state_dict[f"outnorm{stage}.weight"], state_dict[f"outnorm{stage}.bias"]
        expected = F.layer_norm(expected, weight.shape, weight, bias, eps=1e-5)
        assert relative_error(feature_map.permute(0, 2, 3, 1), expected) < FORWARD_BOUND


def test_tiny_with_imagenet_labels(evmamba, tmp_path):
    torch.save({"model": original_state_dict("tiny", SEED)}, tmp_path / "source.pth.tar")
    code, out, _ = evmamba("convert", tmp_path / "source.pth.tar", tmp_path / "converted")
    assert code == 0
    assert re.search(r"variant +tiny\n.*parameters +6,493,660\n.*weights +raw, float32\n.*classes +1000\n", out)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "converted")
    with torch.no_grad():
        logits = model(image((1, 3, 224, 224), SEED)).logits
    assert relative_error(logits, GOLDEN["tiny_seed11_1x3x224x224"]["logits"]) < FORWARD_BOUND

    labels = model.config.id2label
    assert sorted(labels) == list(range(1000))
    expected = {
        0: "tench, Tinca tinca",
        1: "goldfish, Carassius auratus",
        134: "crane",
        207: "golden retriever",
        281: "tabby, tabby cat",
        388: "giant panda, panda, panda bear, coon bear, Ailuropoda melanoleuca",
        517: "crane, construction crane",
        638: "maillot",
        639: "maillot, tank suit",
        817: "sports car, sport car",
        999: "toilet tissue, toilet paper, bathroom tissue",
    }
    assert {idx: labels[idx] for idx in expected} == expected
    assert model.config.label2id == {label: idx for idx, label in labels.items()}
    assert len(model.config.label2id) == 1000


def test_other_class_counts_keep_neutral_labels(evmamba, tmp_path):
    torch.save(micro(), tmp_path / "source.pth")
    assert evmamba("convert", tmp_path / "source.pth", tmp_path / "converted")[0] == 0
    config = json.loads((tmp_path / "converted" / "config.json").read_text())
    assert config["id2label"] == {str(idx): f"LABEL_{idx}" for idx in range(10)}


def test_image_processor(evmamba, tmp_path):
    torch.save(micro(), tmp_path / "source.pth")
    assert evmamba("convert", tmp_path / "source.pth", tmp_path / "converted")[0] == 0
    pixels = np.random.default_rng(SEED).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels).resize((480, 360), Image.Resampling.BILINEAR)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "converted")
    actual = processor(picture, return_tensors="pt").pixel_values

    resized = picture.resize((341, 256), Image.Resampling.BICUBIC).crop((58, 16, 58 + 224, 16 + 224))
    expected = torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None] / 255
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    atol = 2.1 / 255 / std.min() if is_torchvision_available() else 1e-5  # torchvision resizes with other roundings
    torch.testing.assert_close(actual, (expected - mean) / std, atol=float(atol), rtol=0)


@pytest.mark.parametrize(
    "options, expected", [((), "ema"), (("--weights", "ema"), "ema"), (("--weights", "raw"), "raw")]
)
def test_choice_of_weights(evmamba, tmp_path, options, expected):
    state_dicts = {"raw": original_state_dict("micro", SEED + 1), "ema": micro()}
    torch.save({"model": state_dicts["raw"], "model_ema": state_dicts["ema"]}, tmp_path / "source.pth")
    code, out, _ = evmamba("convert", tmp_path / "source.pth", tmp_path / "converted", *options)
    assert code == 0 and re.search(rf"weights +{expected}, float32", out)
    converted = load_file(tmp_path / "converted" / "model.safetensors")
    assert torch.equal(converted["classifier.weight"], state_dicts[expected]["classifier.head.weight"])


@pytest.mark.parametrize("dtype, bound", [("float16", 3e-3), ("bfloat16", 3e-2)])
def test_half_precision(evmamba, tmp_path, dtype, bound):
    torch.save(micro(), tmp_path / "source.pth")
    code, out, _ = evmamba("convert", tmp_path / "source.pth", tmp_path / "converted", "--dtype", dtype)
    assert code == 0 and f"raw, {dtype}" in out
    for name, tensor in load_file(tmp_path / "converted" / "model.safetensors").items():
        if name.endswith("num_batches_tracked"):
            assert tensor.dtype == torch.int64
        elif name.endswith((".A_log", ".D")):
            assert tensor.dtype == torch.float32, name
        else:
            assert tensor.dtype == getattr(torch, dtype), name

    as_stored = AutoModelForImageClassification.from_pretrained(tmp_path / "converted")
    assert as_stored.dtype == getattr(torch, dtype)
    assert as_stored.efficientvmamba.encoder.stages[0].layers[0].mixer.A_log.dtype == torch.float32
    widened = AutoModelForImageClassification.from_pretrained(tmp_path / "converted", dtype="float32")
    with torch.no_grad():
        logits = widened(image((2, 3, 64, 64), SEED)).logits
    assert 0 < relative_error(logits, MICRO_CASE["logits"]) < bound


def test_values_beyond_the_range_of_half_precision(evmamba, tmp_path):
    state_dict = micro()
    state_dict["layers.3.1.conv_dw.1.running_var"][3] = 1e6
    torch.save(state_dict, tmp_path / "source.pth")
    result = evmamba("convert", tmp_path / "source.pth", tmp_path / "converted", "--dtype", "float16")
    assert_refused(result, tmp_path, "layers.3.1.conv_dw.1.running_var holds values that are not finite", "float16")
    assert evmamba("convert", tmp_path / "source.pth", tmp_path / "converted", "--dtype", "bfloat16")[0] == 0
