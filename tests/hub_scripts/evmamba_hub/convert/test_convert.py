"""`evmamba convert` from the command line to the files that it writes, on weights whose logits are known."""

import argparse
import builtins
import json
import os
import re
import resource
import subprocess
import sys
import types
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from evmamba_hub.convert.convert import choose_checkpoint
from evmamba_hub.errors import UserError
from golden_values import image, load_cases, original_state_dict, relative_error
from hub_server import WRITE_TOKEN, Fault
from modeling_evmamba import EfficientVMambaBackbone, EfficientVMambaForImageClassification


SEED = 11
GOLDEN = load_cases("forward.safetensors")
MICRO_CASE = GOLDEN["micro_seed11_2x3x64x64"]
FORWARD_BOUND = 3e-6


def micro() -> dict[str, torch.Tensor]:
    return original_state_dict("micro", SEED)


def prefixed(prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in micro().items()}


def older_names() -> dict[str, torch.Tensor]:
    """As the authors' older runs spelt them."""
    spellings = [
        (r"^patch_embed\.0\.", "patch_embed.proj."),
        (r"^patch_embed\.2\.", "patch_embed.norm."),
        (r"^classifier\.", ""),
        (r"(blocks\.\d+)\.norm\.", r"\1.ln_1."),
        (r"\.op\.", ".self_attention."),
    ]
    state_dict = {}
    for name, tensor in micro().items():
        for pattern, replacement in spellings:
            name = re.sub(pattern, replacement, name)
        state_dict[name] = tensor
    assert {"patch_embed.proj.bias", "norm.bias", "head.bias", "layers.0.blocks.1.ln_1.bias"} < state_dict.keys()
    assert "layers.0.blocks.1.self_attention.Ds" in state_dict
    return state_dict


def training_state() -> dict:
    """What stands beside the weights."""
    return {
        "epoch": 299,
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]},
        "metrics": OrderedDict(top1=np.float64(76.5), top5=np.float32(93.1), best=np.int64(299), done=np.bool_(True)),
        "args": argparse.Namespace(lr=2e-3, opt_betas=None, output="runs"),
        "scaler": None,
    }


def assert_golden(directory) -> None:
    model = AutoModelForImageClassification.from_pretrained(directory)
    assert isinstance(model, EfficientVMambaForImageClassification)
    with torch.no_grad():
        logits = model(image((2, 3, 64, 64), SEED)).logits
    assert relative_error(logits, MICRO_CASE["logits"]) < FORWARD_BOUND


def assert_refused(result, tmp_path, *fragments) -> None:
    """Exit code 1, one line that holds the fragments, and nothing in the directory but what the test put there."""
    code, out, err = result
    assert (code, out) == (1, "")
    assert err.startswith("Error: ") and err.count("\n") == 1
    for fragment in fragments:
        assert fragment in err
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith("source")] == []


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
    assert "397,122" in out and "of no published size" in out and "evmamba classify IMAGE --model" in out
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
    """Distributed training may flatten parameters; safetensors takes no shared memory."""
    state_dict = micro()
    floats = {name: tensor for name, tensor in state_dict.items() if tensor.is_floating_point()}
    parts = torch.cat([tensor.flatten() for tensor in floats.values()]).split([t.numel() for t in floats.values()])
    views = {name: part.view(floats[name].shape) for name, part in zip(floats, parts, strict=True)}
    torch.save({"model": state_dict | views}, tmp_path / "source.pth")
    assert evmamba("convert", tmp_path / "source.pth", tmp_path / "converted")[0] == 0
    assert_golden(tmp_path / "converted")


def test_settings_of_yacs(evmamba, tmp_path, monkeypatch):
    """The authors' script pickles its yacs settings under "config"; reading them needs no yacs."""
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
    torch.testing.assert_close(actual, (expected - mean) / std, atol=1e-5, rtol=0)


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
    assert_refused(result, tmp_path, "layers.3.1.conv_dw.1.running_var holds values that are no finite", "float16")
    assert evmamba("convert", tmp_path / "source.pth", tmp_path / "converted", "--dtype", "bfloat16")[0] == 0


class Payload:
    """Unpickled, it calls `function(*arguments)`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "older_torch"])
@pytest.mark.parametrize("place", ["whole", "beside_the_weights", "in_the_args", "as_a_weight"])
@pytest.mark.parametrize("function", ["os.system", "eval", "open", "subprocess.Popen"])
def test_pickle_that_wants_to_run_code(evmamba, tmp_path, function, place, is_zip):
    evidence = tmp_path / "ran"
    payload = {
        "os.system": Payload(os.system, f"touch {evidence}"),
        "eval": Payload(builtins.eval, f"open({str(evidence)!r}, 'w')"),
        "open": Payload(builtins.open, str(evidence), "w"),
        "subprocess.Popen": Payload(subprocess.Popen, ["touch", str(evidence)]),
    }[function]
    content = {
        "whole": payload,
        "beside_the_weights": {"model": micro(), "metrics": payload},
        "in_the_args": {"model": micro(), "args": argparse.Namespace(output=payload)},
        "as_a_weight": {"model": {**micro(), "payload": payload}},
    }[place]
    torch.save(content, tmp_path / "source.pth", _use_new_zipfile_serialization=is_zip)
    result = evmamba("convert", tmp_path / "source.pth", tmp_path / "converted")
    assert_refused(result, tmp_path, "source.pth was refused and nothing in it ran", function.rpartition(".")[2])


def test_payload_of_the_test_would_run(tmp_path):
    torch.save(Payload(os.system, f"touch {tmp_path / 'ran'}"), tmp_path / "source.pth")
    torch.load(tmp_path / "source.pth", weights_only=False)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_file(evmamba, tmp_path, suffix, share):
    source = tmp_path / f"source{suffix}"
    save = save_file if suffix == ".safetensors" else torch.save
    save(micro(), source)
    os.truncate(source, int(share * source.stat().st_size))
    result = evmamba("convert", source, tmp_path / "converted")
    assert_refused(result, tmp_path, f"{source.name} cannot be read: it is truncated, damaged or no checkpoint")


@pytest.mark.parametrize(
    "text",
    ["<!DOCTYPE html>", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"],
    ids=["html", "lfs_pointer"],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_text_in_place_of_a_checkpoint(evmamba, tmp_path, suffix, text):
    (tmp_path / f"source{suffix}").write_text(text)
    result = evmamba("convert", tmp_path / f"source{suffix}", tmp_path / "converted")
    assert_refused(result, tmp_path, f"source{suffix} cannot be read")


def without(*names):
    return lambda: {name: tensor for name, tensor in micro().items() if not name.startswith(names)}


def reshaped(name, *shape):
    return lambda: {**micro(), name: torch.zeros(shape)}


@pytest.mark.parametrize(
    "content, fragments",
    [
        pytest.param(
            without("layers.0.blocks.1.op.A_logs"), ["missing key: layers.0.blocks.1.op.A_logs\n"], id="missing"
        ),
        pytest.param(
            lambda: {name: tensor for name, tensor in older_names().items() if name != "head.weight"},
            ["missing key: classifier.head.weight\n"],
            id="missing_of_older_run",
        ),
        pytest.param(
            without("layers.0.blocks.1.", "layers.1.downsample"),
            ["missing key: layers.1.downsample.norm.weight"],
            id="missing_modules",
        ),
        pytest.param(
            without("layers.0.blocks.0."),
            ["missing key: layers.0.blocks.0.norm.weight, ", " and 23 more\n"],
            id="missing_block",
        ),
        pytest.param(
            without("layers.2.2."), ["missing key: layers.2.3.norm.weight", "extra key: layers.2.4."], id="last_block"
        ),
        pytest.param(without("classifier."), ["missing key: classifier.norm.weight, "], id="missing_head"),
        pytest.param(without("layers.3."), ["no EfficientVMamba", "'layers.3.*'"], id="missing_stage"),
        pytest.param(
            lambda: (
                {f"module.{name}": tensor for name, tensor in micro().items()}
                | {"module.layers.0.blocks.0.op.extra": torch.zeros(3)}
            ),
            ["extra key: module.layers.0.blocks.0.op.extra\n"],
            id="extra",
        ),
        pytest.param(
            lambda: {**micro(), "outnorm1.weight": torch.ones(32)}, ["outnorm1.bias", "classifier.head"], id="outnorm"
        ),
        pytest.param(
            reshaped("layers.1.blocks.0.op.A_logs", 256, 8),
            ["wrong shape: layers.1.blocks.0.op.A_logs has the shape (256, 8), expected (256, 16)\n"],
            id="shape_of_A_logs",
        ),
        pytest.param(
            reshaped("layers.0.blocks.1.norm.weight", 24),
            ["wrong shape: layers.0.blocks.1.norm.weight has the shape (24,), expected (16,)\n"],
            id="shape_of_norm",
        ),
        pytest.param(
            reshaped("layers.3.1.conv_pw2.0.weight", 96, 512, 1, 1),
            ["wrong shape: layers.3.1.conv_pw2.0.weight has the shape (96, 512, 1, 1), expected (128, 512, 1, 1)\n"],
            id="shape_of_convolution",
        ),
        pytest.param(
            reshaped("classifier.head.bias", 7),
            ["wrong shape: classifier.head.bias has the shape (7,), expected (10,)\n"],
            id="shape_of_head",
        ),
        pytest.param(
            reshaped("classifier.head.bias"),
            ["wrong shape: classifier.head.bias has the shape (), expected (10,)\n"],
            id="scalar_head",
        ),
        pytest.param(
            lambda: {
                **without("patch_embed.2.bias")(),
                **reshaped("layers.0.blocks.0.op.Ds", 3)(),
                "x": torch.zeros(1),
            },
            ["wrong shape: layers.0.blocks.0.op.Ds", "extra key: x"],
            id="several_problems",
        ),
        pytest.param(
            lambda: {**micro(), "module.norm.bias": torch.zeros(128)},
            ["'classifier.norm.bias' and 'module.norm.bias'"],
            id="same_tensor_twice",
        ),
        pytest.param(lambda: {"fc.weight": torch.zeros(2, 2)}, ["holds no EfficientVMamba"], id="other_network"),
        pytest.param(dict, ["holds no EfficientVMamba"], id="nothing"),
        pytest.param(lambda: [torch.zeros(3)], ["no dictionary of tensors but a list"], id="list"),
        pytest.param(
            lambda: {"model": {**micro(), "epoch": 3}}, ["'epoch', which is no named tensor"], id="no_tensor"
        ),
        pytest.param(lambda: {"model": {0: torch.zeros(3)}}, ["0, which is no named tensor"], id="no_name"),
    ],
)
def test_tensors_that_do_not_fit(evmamba, tmp_path, content, fragments):
    torch.save(content(), tmp_path / "source.pth")
    assert_refused(evmamba("convert", tmp_path / "source.pth", tmp_path / "converted"), tmp_path, *fragments)


@pytest.mark.parametrize("kind, other", [("ema", "raw"), ("raw", "ema")])
def test_weights_that_are_not_there(evmamba, tmp_path, kind, other):
    torch.save({"model" if other == "raw" else "model_ema": micro()}, tmp_path / "source.pth")
    result = evmamba("convert", tmp_path / "source.pth", tmp_path / "converted", "--weights", kind)
    assert_refused(result, tmp_path, f"no {kind} weights", f"only {other} ones")


@pytest.mark.parametrize("source", ["source.pth", "./runs/tiny", "a/b/c", "someone/tiny.pth.tar", "no-such-file"])
def test_source_that_does_not_exist(evmamba, tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    assert_refused(evmamba("convert", source, "converted"), tmp_path, f"{source} does not exist")


def test_source_that_is_a_directory(evmamba, tmp_path):
    assert_refused(evmamba("convert", tmp_path, tmp_path / "converted"), tmp_path, "is a directory")


def test_output_directory_in_use(evmamba, tmp_path):
    torch.save(micro(), tmp_path / "source.pth")
    used = tmp_path / "source_used"
    used.mkdir()
    (used / "thesis.txt").write_text("mine")
    assert_refused(evmamba("convert", tmp_path / "source.pth", used), tmp_path, f"{used} exists already")
    assert_refused(evmamba("convert", tmp_path / "source.pth", used / "thesis.txt"), tmp_path, "exists already")
    assert [path.name for path in used.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("output", ["converted", "new/parents/converted", "with [brackets]/a.b"])
def test_output_directory(evmamba, tmp_path, monkeypatch, output):
    monkeypatch.chdir(tmp_path)
    torch.save(micro(), "source.pth")
    (tmp_path / "converted").mkdir()  # empty: may be used
    code, out, _ = evmamba("convert", "source.pth", output)
    assert code == 0 and f"--model {output}\n" in out
    assert_golden(tmp_path / output)
    assert [path.name for path in (tmp_path / output).parent.iterdir() if path.name.startswith(".")] == []


def test_write_that_fails_midway(evmamba, tmp_path):
    torch.save(micro(), tmp_path / "source.pth")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # a full disk to this process
    try:
        result = evmamba("convert", tmp_path / "source.pth", tmp_path / "converted")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_refused(result, tmp_path, f"{tmp_path / 'converted'} cannot be written")


@pytest.mark.parametrize(
    "files, wanted, expected",
    [
        ([".gitattributes", "README.md", "tiny.pth"], None, "tiny.pth"),
        (["README.md", "weights/tiny.pth.tar"], None, "weights/tiny.pth.tar"),
        (["config.json", "tiny.safetensors"], None, "tiny.safetensors"),
        (["a.pth", "b.pth"], "b.pth", "b.pth"),
        (["a.ckpt"], "a.ckpt", "a.ckpt"),
    ],
)
def test_choice_of_the_file(files, wanted, expected):
    assert choose_checkpoint("someone/tiny", files, wanted) == expected


@pytest.mark.parametrize(
    "files, wanted, message",
    [
        (["README.md", "code.tar"], None, "someone/tiny holds no checkpoint"),
        (["a.pth", "b.safetensors"], None, "choose one with --file: a.pth, b.safetensors"),
        (["a.pth"], "c.pth", "someone/tiny holds no file c.pth, it holds a.pth"),
    ],
)
def test_no_choice_of_the_file(files, wanted, message):
    with pytest.raises(UserError, match=re.escape(message)):
        choose_checkpoint("someone/tiny", files, wanted)


def checkpoint_bytes(tmp_path, state_dict) -> bytes:
    torch.save({"model_ema": state_dict}, tmp_path / "source.pth")
    return (tmp_path / "source.pth").read_bytes()


@pytest.mark.parametrize(
    "names, options", [(["micro.pth.tar"], []), (["raw.pth", "weights/micro.pth"], ["--file", "weights/micro.pth"])]
)
def test_repository_on_the_hub(evmamba, hub, tmp_path, names, options):
    files = dict.fromkeys(["README.md", *names], b"else")
    hub.create("someone/micro", {**files, names[-1]: checkpoint_bytes(tmp_path, micro())})
    code, out, _ = evmamba("convert", "someone/micro", tmp_path / "converted", *options)
    assert code == 0 and "Converted someone/micro\n" in out and re.search("weights +ema", out)
    assert_golden(tmp_path / "converted")


@pytest.mark.parametrize(
    "repo_id, fragments",
    [
        ("someone/else", ["someone/else is neither a path here nor a repository on the Hub", "`hf auth login`"]),
        ("else/gated", ["else/gated is gated: accept its conditions", "`hf auth login`"]),
        ("someone/several", ["choose one with --file: a.pth, b.pth"]),
        ("someone/truncated", ["tiny.pth cannot be read"]),
    ],
)
def test_trouble_with_the_hub(evmamba, hub, tmp_path, repo_id, fragments):
    hub.create("else/gated", gated=True)
    hub.create("someone/several", {"a.pth": b"", "b.pth": b""})
    hub.create("someone/truncated", {"tiny.pth": checkpoint_bytes(tmp_path, micro())[:-100]})
    result = evmamba("convert", repo_id, tmp_path / "converted")
    assert WRITE_TOKEN not in "".join(result[1:])
    assert_refused(result, tmp_path, *fragments)


def test_a_damaged_download(evmamba, hub, tmp_path):
    hub.create("someone/damaged", {"tiny.pth": checkpoint_bytes(tmp_path, micro())})
    hub.faults = [Fault("download", "corrupt")]
    result = evmamba("convert", "someone/damaged", tmp_path / "converted")
    assert_refused(result, tmp_path, "tiny.pth was damaged on its way", "run the command again")
    assert evmamba("convert", "someone/damaged", tmp_path / "converted")[0] == 0


def test_no_connection(tmp_path):
    """In a process of its own: the Hub's client reads its endpoint when it is imported."""
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "hf_secret"}
    process = subprocess.run(
        [sys.executable, "-m", "evmamba_hub.cli", "convert", "TerryPei/EfficientVMamba-Tiny", "converted"],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "hf_secret" not in process.stderr
    result = process.returncode, process.stdout, process.stderr
    assert_refused(
        result, tmp_path, "http://127.0.0.1:9 cannot be reached for TerryPei/EfficientVMamba-Tiny", "check it"
    )
