"""Read the authors' checkpoints into this package's names and shapes.

The authors' code (https://github.com/TerryPei/EfficientVMamba) writes a pickled dictionary. Its weights are under one
of several entries. Their keys may have prefixes of wrappers, and come in two generations of module names.

This module renames the keys of the file to the newer generation. It translates the names of our network to that
generation too. Both sets of names must agree.
"""

import argparse
import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mode
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from evmamba_hub.errors import UserError
from evmamba_hub.info import find_variant
from modeling_evmamba import EfficientVMambaBackbone, EfficientVMambaConfig, EfficientVMambaForImageClassification


WEIGHT_ENTRIES = {"ema": ("ema_model", "model_ema", "state_dict_ema"), "raw": ("model", "state_dict")}

# Prefixes of wrappers (DataParallel, torch.compile), and the names of older runs.
SPELLINGS = [
    (r"^(?:module\.|_orig_mod\.)+", ""),
    (r"^patch_embed\.proj\.", "patch_embed.0."),
    (r"^patch_embed\.norm\.", "patch_embed.2."),
    (r"^(norm|head)\.", r"classifier.\1."),
    (r"\.ln_1\.", ".norm."),
    (r"\.self_attention\.", ".op."),
]

# Our prefixes -> the authors'. The first match counts.
MODULE_NAMES = {
    "embeddings.patch_embeddings.": "patch_embed.0.",
    "embeddings.layernorm.": "patch_embed.2.",
    "layernorm.": "classifier.norm.",
    "classifier.": "classifier.head.",
}
BLOCK_NAMES = {
    # EVSS
    "layernorm.": "norm.",
    "mixer.dt_proj_": "op.dt_projs_",
    "mixer.A_log": "op.A_logs",
    "mixer.D": "op.Ds",
    "mixer.layernorm.": "op.out_norm.",
    "mixer.": "op.",
    "local_branch.depthwise_conv.": "conv_branch.0.",
    "local_branch.batch_norm.": "conv_branch.1.",
    "local_branch.pointwise_conv.": "conv_branch.3.",
    "gate.layernorm.": "se.norm.",
    "gate.squeeze.": "se.global_reduce.",
    "gate.expand.": "se.channel_select.",
    # inverted residual
    "expand_conv.": "conv_pw.0.",
    "expand_batch_norm.": "conv_pw.1.",
    "depthwise_conv.": "conv_dw.0.",
    "depthwise_batch_norm.": "conv_dw.1.",
    "squeeze_excitation.squeeze.": "se.conv_reduce.",
    "squeeze_excitation.expand.": "se.conv_expand.",
    "project_conv.": "conv_pw2.0.",
    "project_batch_norm.": "conv_pw2.1.",
}

# Tensors in the authors' blocks whose first dimension is the stage's hidden size. The group is the block's index.
BLOCK_TENSORS = {
    "evss": r"blocks\.(\d+)\.(?:norm|conv_branch\.\d)\.(?:weight|bias)$",
    "inverted_residual": r"(\d+)\.conv_pw2\.\d\.(?:weight|bias)$",
}

NUMPY_SCALAR: Any = np.float64(0).__reduce__()[0]

# Types that training scripts pickle beside the weights, and that `weights_only` rejects. They execute nothing. numpy
# moved `core` to `_core`. The settings of yacs are a dictionary: reading them as one needs no yacs.
HARMLESS_GLOBALS: list[Callable | tuple[Callable, str]] = [
    argparse.Namespace,
    np.dtype,
    *(type(np.dtype(name)) for name in ("bool", "int64", "float32", "float64")),
    (NUMPY_SCALAR, "numpy.core.multiarray.scalar"),
    (NUMPY_SCALAR, "numpy._core.multiarray.scalar"),
    (OrderedDict, "yacs.config.CfgNode"),
]

MAX_NAMES_IN_MESSAGE = 5


@dataclass
class OriginalCheckpoint:
    """A checkpoint of the authors, as `model_class.from_pretrained(None, config=, state_dict=)` takes it."""

    model_class: type[EfficientVMambaForImageClassification] | type[EfficientVMambaBackbone]
    config: EfficientVMambaConfig
    state_dict: dict[str, torch.Tensor]
    weights: str  # "ema" or "raw"

    @property
    def is_backbone(self) -> bool:
        return self.model_class is EfficientVMambaBackbone

    @property
    def variant(self) -> str | None:
        """The name of the published network, or None."""
        return find_variant(self.config)


def read_file(path: Path):
    """Returns the content of a file. `weights_only` rejects pickles that would execute code.

    Raises:
        UserError: If the file would execute code, or cannot be read.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(HARMLESS_GLOBALS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged pickles raise many types of errors
        if wanted := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(
                f"{path.name} was rejected and nothing in it ran: it holds more than tensors and plain data, and "
                f"loading it would call {wanted[1]}. Ask its authors for a file of tensors alone"
            ) from error
        raise UserError(f"{path.name} cannot be read: it is truncated, damaged, or no PyTorch checkpoint") from error


def select_weights(content, weights: str | None) -> tuple[str, dict[str, torch.Tensor]]:
    """Returns the kind of the weights, "ema" or "raw", and their state dict.

    Args:
        content: The content of the checkpoint.
        weights: "ema" or "raw". None prefers "ema".

    Raises:
        UserError: If the checkpoint lacks these weights, or holds something other than tensors in their place.
    """
    if not isinstance(content, dict):
        raise UserError(f"the checkpoint must hold a dictionary of tensors, got a {type(content).__name__}")
    found = {
        kind: content[entry]
        for kind, entries in WEIGHT_ENTRIES.items()
        for entry in reversed(entries)
        if isinstance(content.get(entry), dict)
    }
    found = found or {"raw": content}
    kind = weights or next(iter(found))
    if kind not in found:
        raise UserError(
            f"the checkpoint holds no {kind} weights (none of the entries {', '.join(WEIGHT_ENTRIES[kind])}): choose "
            f"--weights {next(iter(found))}"
        )
    for name, value in found[kind].items():
        if not (isinstance(name, str) and isinstance(value, torch.Tensor)):
            raise UserError(f"the weights of the checkpoint hold {name!r}, which is not a named tensor")
    return kind, found[kind]


def modern_name(name: str) -> str:
    """Returns a key of any generation in the newer generation of names."""
    for pattern, replacement in SPELLINGS:
        name = re.sub(pattern, replacement, name)
    return name


def original_name(name: str, config: EfficientVMambaConfig) -> str:
    """Returns the authors' name (newer generation) of a tensor of our network."""

    def translate(name: str, table: dict[str, str]) -> str:
        ours, theirs = next((pair for pair in table.items() if name.startswith(pair[0])), ("", ""))
        return theirs + name.removeprefix(ours)

    if match := re.match(r"hidden_states_norms\.stage(\d+)\.(.*)", name):
        return f"outnorm{int(match[1]) - 1}.{match[2]}"
    name = name.removeprefix("efficientvmamba.")
    if not (match := re.match(r"encoder\.stages\.(\d+)\.(?:layers\.(\d+)|downsampling_layer)\.(.*)", name)):
        return translate(name, MODULE_NAMES)

    stage, rest = int(match[1]), match[3]
    if match[2] is None:  # patch merging is last in the authors' stages, and first in ours
        stage -= 1
        position = "downsample" if config.block_types[stage] == "evss" else config.depths[stage] + 2
        return f"layers.{stage}.{position}.{rest.replace('layernorm.', 'norm.')}"
    layer = int(match[2])
    position = f"blocks.{layer}" if config.block_types[stage] == "evss" else layer + 1
    return f"layers.{stage}.{position}.{translate(rest, BLOCK_NAMES)}"


def infer_config(state_dict: dict[str, torch.Tensor]) -> EfficientVMambaConfig:
    """Returns the configuration of the network with these tensors.

    Args:
        state_dict: The tensors under the authors' names (newer generation).

    Raises:
        UserError: If a stage has no blocks.
    """
    fields: dict[str, Any] = {"hidden_sizes": [], "depths": []}
    for stage, block_type in enumerate(EfficientVMambaConfig().block_types):
        pattern = rf"layers\.{stage}\.{BLOCK_TENSORS[block_type]}"
        blocks = [(match, tensor) for name, tensor in state_dict.items() if (match := re.match(pattern, name))]
        sizes = [tensor.shape[0] for _, tensor in blocks if tensor.ndim > 0]
        if not sizes:
            raise UserError(f"the checkpoint holds no EfficientVMamba: it lacks the blocks 'layers.{stage}.*'")
        fields["hidden_sizes"].append(mode(sizes))  # the mode, so that a single wrong shape is reported as such
        last_block = max(int(match[1]) for match, _ in blocks)
        fields["depths"].append(last_block + 1 if block_type == "evss" else last_block)

    if normalized := {int(match[1]) for name in state_dict if (match := re.match(r"outnorm([0-3])\.", name))}:
        fields["out_features"] = [f"stage{stage + 1}" for stage in sorted(normalized)]
    for name in ("classifier.head.bias", "classifier.head.weight"):
        if name in state_dict and state_dict[name].ndim > 0:
            fields["num_labels"] = state_dict[name].shape[0]
    return EfficientVMambaConfig(**fields)


def load_original_checkpoint(path: Path, weights: str | None = None) -> OriginalCheckpoint:
    """Read a `.pth`, `.pth.tar` or `.safetensors` file of the authors.

    Args:
        path: The file.
        weights: "ema" or "raw". None takes the averaged (EMA) weights if the file has them.

    Raises:
        UserError: If the file is damaged, would execute code, or does not hold exactly the tensors of an
            EfficientVMamba.
    """
    kind, content = select_weights(read_file(path), weights)
    names_in_file: dict[str, str] = {}
    original: dict[str, torch.Tensor] = {}
    for name, tensor in content.items():
        modern = modern_name(name)
        if modern in original:
            raise UserError(f"the keys {names_in_file[modern]!r} and {name!r} of the checkpoint name the same tensor")
        names_in_file[modern], original[modern] = name, tensor

    config = infer_config(original)
    is_backbone = any(name.startswith("outnorm") for name in original)
    model_class = EfficientVMambaBackbone if is_backbone else EfficientVMambaForImageClassification
    with torch.device("meta"):
        expected = model_class(config).state_dict()

    state_dict: dict[str, torch.Tensor] = {}
    missing: list[str] = []
    wrong: list[str] = []
    for name, expected_tensor in expected.items():
        theirs = original_name(name, config)
        # the authors flatten A_log and D of the K scan groups: (K * D, ...) instead of (K, D, ...)
        is_flat = theirs.endswith((".A_logs", ".Ds"))
        expected_shape = tuple((expected_tensor.flatten(0, 1) if is_flat else expected_tensor).shape)
        if theirs not in original:
            missing.append(theirs)
            continue
        tensor = original.pop(theirs)
        if tuple(tensor.shape) != expected_shape:
            wrong.append(f"{names_in_file[theirs]} has the shape {tuple(tensor.shape)}, expected {expected_shape}")
        else:
            state_dict[name] = tensor.reshape(expected_tensor.shape)
    problems = {
        "missing key": missing,
        "extra key": [names_in_file[name] for name in original],
        "wrong shape": wrong,
    }
    if any(problems.values()):
        raise UserError(f"{path.name} does not fit the network: " + "; ".join(list_problems(problems)))
    return OriginalCheckpoint(model_class, config, state_dict, kind)


def list_problems(problems: dict[str, list[str]]) -> list[str]:
    """Returns one phrase per kind of problem, with the first names and the number of the others."""
    phrases = []
    for kind, names in problems.items():
        if names:
            others = len(names) - MAX_NAMES_IN_MESSAGE
            shown = ", ".join(names[:MAX_NAMES_IN_MESSAGE]) + (f" and {others} more" if others > 0 else "")
            phrases.append(f"{kind}: {shown}")
    return phrases
