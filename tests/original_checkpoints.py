"""Checkpoints in the layouts of the authors' code, with known logits, and checks of their conversion."""

import argparse
import re
from collections import OrderedDict

import numpy as np
import torch
from transformers import AutoModelForImageClassification

from golden_values import image, load_cases, original_state_dict, relative_error
from modeling_evmamba import EfficientVMambaForImageClassification


SEED = 11
GOLDEN = load_cases("forward.safetensors")
MICRO_CASE = GOLDEN["micro_seed11_2x3x64x64"]
FORWARD_BOUND = 3e-6


def micro() -> dict[str, torch.Tensor]:
    return original_state_dict("micro", SEED)


def prefixed(prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in micro().items()}


def older_names() -> dict[str, torch.Tensor]:
    """Return the state dict with the names of the authors' older runs."""
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
    """Return the entries of a checkpoint beside the weights."""
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
    """Check for exit code 1, one line with the fragments, and no file in the directory but the test's own."""
    code, out, err = result
    assert (code, out) == (1, "")
    assert err.startswith("Error: ") and err.count("\n") == 1
    for fragment in fragments:
        assert fragment in err
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith("source")] == []
