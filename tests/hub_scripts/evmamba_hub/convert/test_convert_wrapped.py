"""Checkpoints of programs that hold the network as a part of their own: `evmamba convert` finds it and says where."""

import json
import pathlib
import re
import sys
import types
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from golden_values import SHAPES, image, original_state_dict, relative_error
from modeling_evmamba import EfficientVMambaBackbone, EfficientVMambaForImageClassification
from original_checkpoints import (
    FORWARD_BOUND,
    MICRO_CASE,
    SEED,
    assert_golden,
    assert_refused,
    micro,
    older_names,
    prefixed,
    training_state,
)


STAGES = range(4)


def backbone(prefix: str = "") -> dict[str, torch.Tensor]:
    """Return the micro network as a backbone: without the classifier, with norms behind the stages."""
    state_dict = {name: tensor for name, tensor in micro().items() if not name.startswith("classifier.")}
    for stage in STAGES:
        channels = MICRO_CASE[f"stage{stage}"].shape[-1]
        state_dict[f"outnorm{stage}.weight"] = torch.linspace(0.5, 1.5, channels)
        state_dict[f"outnorm{stage}.bias"] = torch.linspace(-1, 1, channels)
    return {prefix + name: tensor for name, tensor in state_dict.items()}


def detector(prefix: str = "") -> dict[str, torch.Tensor]:
    """Return a backbone with the modules of a detector of MMDetection beside it."""
    names = {
        "neck.lateral_convs.0.conv.weight": (8, 16, 1, 1),
        "neck.lateral_convs.0.conv.bias": (8,),
        "rpn_head.rpn_conv.weight": (8, 8, 3, 3),
        "roi_head.bbox_head.fc_cls.weight": (3, 8),
        "bbox_head.transformer.encoder.layers.0.attentions.0.value_proj.weight": (8, 8),
    }
    return backbone(f"{prefix}backbone.") | {prefix + name: torch.zeros(shape) for name, shape in names.items()}


def segmenter(prefix: str = "") -> dict[str, torch.Tensor]:
    names = ("decode_head.conv_seg.weight", "auxiliary_head.conv_seg.weight", "auxiliary_head.conv_seg.bias")
    return backbone(f"{prefix}backbone.") | {prefix + name: torch.zeros(3) for name in names}


def lightning(state_dict: dict[str, torch.Tensor]) -> dict:
    """Return the entries that Lightning writes."""
    return {
        "epoch": 3,
        "global_step": 100,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": state_dict,
        "loops": {"fit_loop": {"epoch_progress": {"current": {"ready": 4}}}},
        "callbacks": {
            "ModelCheckpoint{'monitor': 'top1'}": {"best_model_score": torch.tensor(0.7), "dirpath": "checkpoints"},
            "EarlyStopping": {"wait_count": 0, "best_score": torch.tensor(0.1)},
        },
        "optimizer_states": [training_state()["optimizer"]],
        "lr_schedulers": [{"base_lrs": [1e-3]}],
        "hparams_name": "kwargs",
        "hyper_parameters": {"lr": 1e-3, "betas": (0.9, 0.999), "root": pathlib.Path("data"), "scale": np.float64(2)},
    }


def assert_feature_maps(directory) -> None:
    """Compare with the classifier of equal weights, whose hidden states the norms of the file follow."""
    model = EfficientVMambaBackbone.from_pretrained(directory)
    classifier = EfficientVMambaForImageClassification(model.config).eval()
    own = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("hidden_states_norms.")}
    missing, extra = classifier.efficientvmamba.load_state_dict(own, strict=False)
    assert missing == ["layernorm.weight", "layernorm.bias"] and not extra
    with torch.no_grad():
        feature_maps = model(image((2, 3, 64, 64), SEED)).feature_maps
        hidden_states = classifier(image((2, 3, 64, 64), SEED), output_hidden_states=True).hidden_states[1:]
    weights = backbone()
    for stage, feature_map, hidden_state in zip(STAGES, feature_maps, hidden_states, strict=True):
        weight, bias = weights[f"outnorm{stage}.weight"], weights[f"outnorm{stage}.bias"]
        for expected in (hidden_state.permute(0, 2, 3, 1), MICRO_CASE[f"stage{stage}"]):
            expected = F.layer_norm(expected, weight.shape, weight, bias, eps=1e-5)
            assert relative_error(feature_map.permute(0, 2, 3, 1), expected) < FORWARD_BOUND


def read_report(out: str) -> dict[str, str]:
    return dict(re.findall(r"^  (\w+(?: \w+)?) {2,}(.*)$", out, re.MULTILINE))


@pytest.mark.parametrize(
    "content, keys, left_out",
    [
        (lambda: lightning(prefixed("model.")), "state_dict.model.*", None),
        (lambda: lightning(prefixed("net._orig_mod.")), "state_dict.net._orig_mod.*", None),
        (
            lambda: lightning(prefixed("_forward_module.model.module.")),
            "state_dict._forward_module.model.module.*",
            None,
        ),
        (
            lambda: lightning({**prefixed("model."), "criterion.weight": torch.ones(10)}),
            "state_dict.model.*",
            "criterion (tensors: 1)",
        ),
        (
            lambda: {"state_dict": {f"model.{name}": each for name, each in older_names().items()}},
            "state_dict.model.*",
            None,
        ),
        *(
            (lambda entry=entry: {entry: micro(), "epoch": 3, "best": 0.7}, f"{entry}.*", None)
            for entry in ("net", "module", "model_state_dict", "weights", "params", "backbone", "a key with. dots")
        ),
        (
            lambda: {"checkpoint": {"model": {"state_dict": prefixed("module.")}}},
            "checkpoint.model.state_dict.module.*",
            None,
        ),
        (lambda: prefixed("encoder.backbone."), "encoder.backbone.*", None),
        (lambda: OrderedDict(prefixed("model.")), "model.*", None),
    ],
)
def test_classifiers_in_other_checkpoints(evmamba, tmp_path, content, keys, left_out):
    torch.save(content(), tmp_path / "source.ckpt")
    code, out, err = evmamba("convert", tmp_path / "source.ckpt", tmp_path / "converted")
    assert (code, err) == (0, "")
    report = read_report(out)
    assert (report["keys"], report.get("left out"), "not taken" in report) == (keys, left_out, False)
    assert_golden(tmp_path / "converted")


@pytest.mark.parametrize(
    "content, keys, left_out",
    [
        (
            lambda: {"meta": {"epoch": 12, "CLASSES": ("cat",), "config": "model = dict()"}, "state_dict": detector()},
            "state_dict.backbone.*",
            "neck (tensors: 2), rpn_head (tensors: 1), roi_head (tensors: 1), bbox_head (tensors: 1)",
        ),
        (
            lambda: {"state_dict": segmenter("module."), "meta": {}, "optimizer": training_state()["optimizer"]},
            "state_dict.module.backbone.*",
            "module.decode_head (tensors: 1), module.auxiliary_head (tensors: 2)",
        ),
        (
            lambda: lightning({**segmenter("model."), "loss.weight": torch.ones(2)}),
            "state_dict.model.backbone.*",
            "model.decode_head (tensors: 1), model.auxiliary_head (tensors: 2), loss (tensors: 1)",
        ),
        (lambda: lightning(backbone("encoder.")), "state_dict.encoder.*", None),
        (
            lambda: backbone("b.") | {f"head{idx}.weight": torch.ones(1) for idx in range(7)},
            "b.*",
            ", ".join(f"head{idx} (tensors: 1)" for idx in range(5)) + " and 2 more",
        ),
    ],
)
def test_backbones_of_detectors_and_segmenters(evmamba, tmp_path, content, keys, left_out):
    torch.save(content(), tmp_path / "source.pth")
    code, out, err = evmamba("convert", tmp_path / "source.pth", tmp_path / "converted")
    assert (code, err) == (0, "")
    report = read_report(out)
    assert (report["keys"], report.get("left out"), report["classes"]) == (keys, left_out, "none, a backbone")
    assert json.loads((tmp_path / "converted" / "config.json").read_text())["architectures"] == [
        "EfficientVMambaBackbone"
    ]
    assert_feature_maps(tmp_path / "converted")


def test_safetensors_of_a_segmenter(evmamba, tmp_path):
    save_file(segmenter("model."), tmp_path / "source.safetensors")
    code, out, _ = evmamba("convert", tmp_path / "source.safetensors", tmp_path / "converted")
    assert code == 0 and read_report(out)["keys"] == "model.backbone.*"
    assert_feature_maps(tmp_path / "converted")


def other() -> dict[str, torch.Tensor]:
    return original_state_dict("micro", SEED + 1)


def under(prefix: str, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in state_dict.items()}


@pytest.mark.parametrize(
    "content, options, keys, not_taken",
    [
        (
            lambda: lightning(under("model.", other()) | prefixed("ema_model.module.")),
            (),
            "ema_model.module.",
            "model.",
        ),
        (lambda: lightning(under("model.", other()) | prefixed("model_ema.")), (), "model_ema.", "model."),
        (lambda: lightning(under("model.", other()) | prefixed("ema.")), (), "ema.", "model."),
        (lambda: lightning(under("ema.", other()) | micro()), ("--weights", "raw"), "", "ema."),
        (lambda: lightning(under("ema.", other()) | prefixed("net.")), ("--weights", "raw"), "net.", "ema."),
        (
            lambda: lightning(under("ema.", other()) | prefixed("net.")),
            ("--prefix", "state_dict.net."),
            "net.",
            "ema.",
        ),
        (lambda: lightning(prefixed("teacher.") | under("student.", other())), (), "teacher.", "student."),
        (
            lambda: lightning(under("teacher.", other()) | prefixed("student.")),
            ("--prefix", "student."),
            "student.",
            "teacher.",
        ),
    ],
)
def test_a_copy_of_the_model(evmamba, tmp_path, content, options, keys, not_taken):
    torch.save(content(), tmp_path / "source.ckpt")
    code, out, _ = evmamba("convert", tmp_path / "source.ckpt", tmp_path / "converted", *options)
    assert code == 0
    report = read_report(out)
    assert report["keys"] == f"state_dict.{keys}*"
    option = "--weights ema" if "ema" in not_taken else "--weights raw" if "ema" in keys else "--prefix"
    assert report["not taken"] == f"state_dict.{not_taken}*: choose with {option}"
    assert report["weights"] == f"{'ema' if 'ema' in keys else 'raw'}, float32"
    assert "left out" not in report
    assert_golden(tmp_path / "converted")


@pytest.mark.parametrize(
    "swapped, raw",
    [
        ({"message_hub": {}, "ema_state_dict": under("module.", other())}, "ema_state_dict.module.*"),
        (
            {"averaging_state": {"n_averaged": torch.tensor(3)}, "current_model_state": other()},
            "current_model_state.*",
        ),
    ],
    ids=["mmengine", "lightning"],
)
def test_programs_that_save_the_average_as_the_state_dict(evmamba, tmp_path, swapped, raw):
    """MMEngine and Lightning exchange both states, so that the average loads like any model."""
    torch.save({"state_dict": micro(), **swapped}, tmp_path / "source.pth")
    code, out, _ = evmamba("convert", tmp_path / "source.pth", tmp_path / "converted")
    report = read_report(out)
    assert code == 0 and (report["keys"], report["weights"]) == ("state_dict.*", "ema, float32")
    assert_golden(tmp_path / "converted")
    code, out, _ = evmamba("convert", tmp_path / "source.pth", tmp_path / "second", "--weights", "raw")
    assert code == 0 and read_report(out)["keys"] == raw


def test_an_average_that_does_not_fit_is_no_reason_to_take_the_raw_weights(evmamba, tmp_path):
    average = {name: tensor for name, tensor in prefixed("ema.").items() if "head.bias" not in name}
    torch.save(average | prefixed("net."), tmp_path / "source.pth")
    result = evmamba("convert", tmp_path / "source.pth", tmp_path / "converted")
    assert_refused(
        result,
        tmp_path,
        "missing key: ema.classifier.head.bias. The file holds several networks",
        "choose one with --weights or --prefix: ema.*, net.*\n",
    )
    assert evmamba("convert", tmp_path / "source.pth", tmp_path / "converted", "--weights", "raw")[0] == 0


def test_the_raw_weights_of_several_networks_are_chosen_by_prefix(evmamba, tmp_path):
    torch.save(prefixed("ema.") | under("net.", other()) | under("teacher.", other()), tmp_path / "source.pth")
    code, out, _ = evmamba("convert", tmp_path / "source.pth", tmp_path / "converted")
    assert code == 0 and read_report(out)["not taken"] == "net.*, teacher.*: choose with --prefix"
    code, out, _ = evmamba("convert", tmp_path / "source.pth", tmp_path / "second", "--prefix", "teacher.")
    assert code == 0 and read_report(out)["not taken"] == "ema.*, net.*: choose with --prefix"


def test_copies_under_entries(evmamba, tmp_path):
    torch.save({"student": under("backbone.", other()), "teacher": prefixed("backbone.")}, tmp_path / "source.pth")
    code, out, _ = evmamba("convert", tmp_path / "source.pth", tmp_path / "converted", "--prefix", "teacher")
    assert code == 0 and read_report(out)["keys"] == "teacher.backbone.*"
    assert_golden(tmp_path / "converted")
    result = evmamba("convert", tmp_path / "source.pth", tmp_path / "second", "--prefix", "model.")
    assert (
        result[0] == 1 and "no network at 'model.': choose one of student.backbone.*, teacher.backbone.*" in result[2]
    )


def test_another_network_of_the_same_layout_is_not_taken(evmamba, tmp_path):
    """Swin has blocks of the same names. It may be the teacher of a distillation."""
    teacher = {
        "teacher.layers.0.blocks.0.attn.qkv.weight": torch.zeros(3),
        "teacher.layers.0.blocks.0.norm1.bias": torch.ones(1),
    }
    torch.save({"state_dict": teacher | prefixed("student.")}, tmp_path / "source.pth")
    code, out, _ = evmamba("convert", tmp_path / "source.pth", tmp_path / "converted")
    assert code == 0 and read_report(out)["keys"] == "state_dict.student.*"
    assert_golden(tmp_path / "converted")

    broken = {name: tensor for name, tensor in prefixed("student.").items() if "head.bias" not in name}
    torch.save({"state_dict": teacher | broken}, tmp_path / "source.pth")
    result = evmamba("convert", tmp_path / "source.pth", tmp_path / "second")
    assert result[0] == 1 and "missing key: student.classifier.head.bias\n" in result[2]


class Network(torch.nn.Module):
    """A module with the tensors of the micro network, for programs of PyTorch that wrap modules."""

    def __init__(self):
        super().__init__()
        for name, tensor in micro().items():
            *parents, last = name.split(".")
            module = self
            for parent in parents:
                if parent not in module._modules:
                    module.add_module(parent, torch.nn.Module())
                module = module._modules[parent]
            module.register_buffer(last, tensor)


@pytest.mark.parametrize(
    "wrap, keys, left_out",
    [
        (torch.nn.DataParallel, "module.*", None),
        (torch.compile, "_orig_mod.*", None),
        (lambda network: torch.compile(torch.nn.DataParallel(network)), "_orig_mod.module.*", None),
        (
            lambda network: AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn()),
            "module.*",
            "n_averaged (tensors: 1)",
        ),
        (torch.nn.Sequential, "0.*", None),
    ],
)
def test_wrappers_of_pytorch(evmamba, tmp_path, wrap, keys, left_out):
    torch.save(wrap(Network()).state_dict(), tmp_path / "source.pth")
    code, out, _ = evmamba("convert", tmp_path / "source.pth", tmp_path / "converted")
    assert code == 0 and (read_report(out)["keys"], read_report(out).get("left out")) == (keys, left_out)
    assert_golden(tmp_path / "converted")


def test_a_compiled_part_of_the_network(evmamba, tmp_path):
    state_dict = {
        re.sub(r"^(layers\.\d\.blocks\.\d\.)", r"\1_orig_mod.", name): each for name, each in micro().items()
    }
    assert "layers.0.blocks.0._orig_mod.norm.bias" in state_dict
    torch.save(state_dict, tmp_path / "source.pth")
    assert evmamba("convert", tmp_path / "source.pth", tmp_path / "converted")[0] == 0
    assert_golden(tmp_path / "converted")


def test_logs_of_mmengine_and_settings_of_lightning(evmamba, tmp_path, monkeypatch):
    """Both are pickled as objects of their packages. Reading them needs none, and runs nothing."""

    class HistoryBuffer:
        """As in mmengine 0.10.7, with its functions in the state."""

        def __init__(self):
            self._log_history, self._count_history = np.array([0.5, 0.25]), np.array([1, 1])
            self.statistics_methods = {"min": HistoryBuffer.min}

        def min(self):
            raise AssertionError("it ran")

    class AttributeDict(dict):
        pass

    modules = {"mmengine.logging.history_buffer": HistoryBuffer, "lightning.fabric.utilities.data": AttributeDict}
    with monkeypatch.context() as patch:
        for name, own in modules.items():
            parts = name.split(".")
            for length in range(1, len(parts) + 1):
                patch.setitem(sys.modules, ".".join(parts[:length]), types.ModuleType(".".join(parts[:length])))
            own.__module__, own.__qualname__ = name, own.__name__
            setattr(sys.modules[name], own.__name__, own)
        HistoryBuffer.min.__module__ = HistoryBuffer.__module__
        HistoryBuffer.min.__qualname__ = "HistoryBuffer.min"
        content = {
            "meta": {"cfg": "model = dict()", "seed": np.int64(3)},
            "message_hub": {"log_scalars": OrderedDict({"train/loss": HistoryBuffer()}), "runtime_info": {"epoch": 1}},
            "hyper_parameters": AttributeDict(lr=1e-3, path=pathlib.PurePosixPath("x")),
            "state_dict": detector(),
        }
        content["hyper_parameters"]["path"] = pathlib.PosixPath("x")
        torch.save(content, tmp_path / "source.pth")
    code, _, err = evmamba("convert", tmp_path / "source.pth", tmp_path / "converted")
    assert (code, err) == (0, "")
    assert_feature_maps(tmp_path / "converted")


@pytest.mark.parametrize(
    "content, message",
    [
        (
            lambda: {"state_dict": {**detector(), "backbone.extra": torch.ones(1)}},
            "extra key: backbone.extra\n",
        ),
        (
            lambda: {"state_dict": {name: each for name, each in detector().items() if "outnorm2.bias" not in name}},
            "missing key: backbone.outnorm2.bias\n",
        ),
        (
            lambda: {"state_dict": {name: each for name, each in detector().items() if "outnorm" not in name}},
            "missing key: backbone.classifier.norm.weight",
        ),
        (
            lambda: {"state_dict": {**prefixed("a."), "a.classifier.head.bias": torch.ones(7)}},
            "wrong shape: a.classifier",
        ),
        (lambda: {"a": {"b": {"c": {"d": {"e": micro()}}}}}, "holds no EfficientVMamba"),
    ],
)
def test_wrapped_tensors_that_do_not_fit(evmamba, tmp_path, content, message):
    torch.save(content(), tmp_path / "source.pth")
    assert_refused(evmamba("convert", tmp_path / "source.pth", tmp_path / "converted"), tmp_path, message)


def test_a_dictionary_that_holds_itself(evmamba, tmp_path):
    content = {"state_dict": micro()}
    content["self"] = content
    torch.save(content, tmp_path / "source.pth")
    code, out, _ = evmamba("convert", tmp_path / "source.pth", tmp_path / "converted")
    assert code == 0 and read_report(out)["keys"] == "state_dict.*"


def test_a_converted_model_needs_no_conversion(evmamba, tmp_path):
    torch.save(micro(), tmp_path / "source.pth")
    assert evmamba("convert", tmp_path / "source.pth", tmp_path / "source_converted")[0] == 0
    result = evmamba("convert", tmp_path / "source_converted" / "model.safetensors", tmp_path / "converted")
    assert_refused(result, tmp_path, "has this package's names already")


def test_every_key_of_a_network_decides_its_prefix_alone():
    """The pattern of the first blocks finds one prefix only in the keys of each published network."""
    from evmamba_hub.convert.original_checkpoint import NETWORK_KEY

    for shapes in SHAPES.values():
        matches = [NETWORK_KEY.match(f"a.b.{name}") for name in shapes]
        assert {match[1] for match in matches if match} == {"a.b."}
