"""Input that `evmamba convert` rejects: pickles with code, damaged files, other networks, unwritable directories."""

import argparse
import builtins
import os
import resource
import subprocess

import pytest
import torch
from safetensors.torch import save_file

from original_checkpoints import assert_golden, assert_refused, micro, older_names


class Payload:
    """Unpickling this object calls `function(*arguments)`."""

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
    assert_refused(result, tmp_path, "source.pth was rejected and nothing in it ran", function.rpartition(".")[2])


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
    assert_refused(
        result, tmp_path, f"{source.name} cannot be read: it is truncated, damaged, or no PyTorch checkpoint"
    )


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
        pytest.param(lambda: [torch.zeros(3)], ["must hold a dictionary of tensors, got a list"], id="list"),
        pytest.param(
            lambda: {"model": {**micro(), "epoch": 3}}, ["'epoch', which is not a named tensor"], id="no_tensor"
        ),
        pytest.param(lambda: {"model": {0: torch.zeros(3)}}, ["0, which is not a named tensor"], id="no_name"),
    ],
)
def test_tensors_that_do_not_fit(evmamba, tmp_path, content, fragments):
    torch.save(content(), tmp_path / "source.pth")
    assert_refused(evmamba("convert", tmp_path / "source.pth", tmp_path / "converted"), tmp_path, *fragments)


@pytest.mark.parametrize("kind, other", [("ema", "raw"), ("raw", "ema")])
def test_weights_that_are_not_there(evmamba, tmp_path, kind, other):
    torch.save({"model" if other == "raw" else "model_ema": micro()}, tmp_path / "source.pth")
    result = evmamba("convert", tmp_path / "source.pth", tmp_path / "converted", "--weights", kind)
    assert_refused(result, tmp_path, f"no {kind} weights", f"choose --weights {other}")


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
    (tmp_path / "converted").mkdir()  # an empty directory is accepted
    code, out, _ = evmamba("convert", "source.pth", output)
    assert code == 0 and f"--model {output}\n" in out
    assert_golden(tmp_path / output)
    assert [path.name for path in (tmp_path / output).parent.iterdir() if path.name.startswith(".")] == []


def test_write_that_fails_midway(evmamba, tmp_path):
    torch.save(micro(), tmp_path / "source.pth")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # appears as a full disk to this process
    try:
        result = evmamba("convert", tmp_path / "source.pth", tmp_path / "converted")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_refused(result, tmp_path, f"{tmp_path / 'converted'} cannot be written")
