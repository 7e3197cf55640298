"""The authors' checkpoint layouts, read into this package's: one table of names, shapes decide the rest.

Layouts met in the authors' repository (https://github.com/TerryPei/EfficientVMamba) and its older runs: weights under
one of several entries of a pickled dictionary, keys behind prefixes of wrappers, and two generations of module names.
Published networks use EVSS blocks first and inverted-residual blocks after, but nothing here relies on that.
"""

import math
import pickle
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from hub_scripts.errors import UserError
from modeling_evmamba import VARIANTS, EfficientVMambaConfig


RAW_ENTRIES = ("model", "state_dict")
EMA_ENTRIES = ("ema_model", "model_ema", "state_dict_ema")
WRAPPER_PREFIXES = re.compile(r"^(?:module\.|_orig_mod\.)+")

# Where a block stands: the authors count blocks of inverted-residual stages from 1, and let patch merging end the
# stage whose map it takes, where ours opens the stage that it feeds.
POSITIONS = [
    (r"^layers\.(\d+)\.blocks\.(\d+)\.", lambda m: f"encoder.stages.{m[1]}.layers.{m[2]}."),
    (
        r"^layers\.(\d+)\.(?:downsample|\d+)\.(norm|reduction)\.",
        lambda m: f"encoder.stages.{int(m[1]) + 1}.downsampling_layer.{m[2]}.",
    ),
    (r"^layers\.(\d+)\.(\d+)\.", lambda m: f"encoder.stages.{m[1]}.layers.{int(m[2]) - 1}."),
    (r"^outnorm(\d+)\.", lambda m: f"hidden_states_norms.stage{int(m[1]) + 1}."),
]

# What a module is called; applied in this order to the whole name.
NAMES = [
    (r"^patch_embed\.(?:0|proj)\.", "embeddings.patch_embeddings."),
    (r"^patch_embed\.(?:2|norm)\.", "embeddings.layernorm."),
    (r"^(?:classifier\.)?head\.", "classifier."),
    (r"^classifier\.norm\.", "layernorm."),
    (r"\.se\.conv_reduce\.", ".squeeze_excitation.squeeze."),
    (r"\.se\.conv_expand\.", ".squeeze_excitation.expand."),
    (r"\.se\.", ".gate."),
    (r"\.global_reduce\.", ".squeeze."),
    (r"\.channel_select\.", ".expand."),
    (r"\.(?:op|self_attention)\.", ".mixer."),
    (r"\.dt_projs_", ".dt_proj_"),
    (r"\.A_logs$", ".A_log"),
    (r"\.Ds$", ".D"),
    (r"\.conv_branch\.0\.", ".local_branch.depthwise_conv."),
    (r"\.conv_branch\.1\.", ".local_branch.batch_norm."),
    (r"\.conv_branch\.3\.", ".local_branch.pointwise_conv."),
    (r"\.conv_pw\.0\.", ".expand_conv."),
    (r"\.conv_pw\.1\.", ".expand_batch_norm."),
    (r"\.conv_dw\.0\.", ".depthwise_conv."),
    (r"\.conv_dw\.1\.", ".depthwise_batch_norm."),
    (r"\.conv_pw2\.0\.", ".project_conv."),
    (r"\.conv_pw2\.1\.", ".project_batch_norm."),
    (r"(^|\.)(?:norm|ln_1|out_norm)\.", r"\1layernorm."),
]


@dataclass
class OriginalCheckpoint:
    """A checkpoint of the authors under this package's names, without the prefix of the base model."""

    config: EfficientVMambaConfig
    state_dict: dict[str, torch.Tensor]
    weights: str  # "ema" or "raw"
    original_names: dict[str, str]  # our name -> the name in the file

    @property
    def is_backbone(self) -> bool:
        return "classifier.weight" not in self.state_dict

    @property
    def variant(self) -> str | None:
        """The published network that this is, or None."""
        for name, variant in VARIANTS.items():
            if all(getattr(self.config, field) == value for field, value in variant.items()):
                return name
        return None


def read_tensors(path: Path) -> dict:
    """What the file holds. Pickles are read with `weights_only`: one that wants to run code is refused."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path.name} is not a checkpoint of plain tensors and was not loaded: "
            "reading it would need to run code that the file brings along, or it is damaged"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise UserError(f"{path.name} cannot be read, it is truncated or no checkpoint: {error}") from error


def select_weights(content: dict, weights: str | None) -> tuple[str, dict[str, torch.Tensor]]:
    """The state dict inside a checkpoint and its kind: "ema" where present, "raw" otherwise, or the one asked for."""
    if not isinstance(content, dict):
        raise UserError(f"expected a dictionary of tensors, the checkpoint holds a {type(content).__name__}")
    entries = {"ema": EMA_ENTRIES, "raw": RAW_ENTRIES}
    found = {
        kind: content[name]
        for kind, names in entries.items()
        for name in reversed(names)
        if isinstance(content.get(name), dict)
    }
    if not found:
        found = {"raw": content}
    kind = weights or ("ema" if "ema" in found else "raw")
    if kind not in found:
        raise UserError(
            f"the checkpoint holds no {kind} weights (looked for {', '.join(entries[kind])}); "
            f"it holds {' and '.join(sorted(found))} weights"
        )
    state_dict = found[kind]
    for name in RAW_ENTRIES:  # some checkpoints nest: {"model_ema": {"state_dict": ...}}
        if isinstance(state_dict.get(name), dict):
            state_dict = state_dict[name]
    if strangers := [name for name, value in state_dict.items() if not isinstance(value, torch.Tensor)]:
        raise UserError(f"expected tensors only, but the entry {strangers[0]!r} of the checkpoint is none")
    return kind, state_dict


def rename(name: str) -> str:
    """The authors' name of a tensor in this package's words."""
    name = WRAPPER_PREFIXES.sub("", name)
    for pattern, position in POSITIONS:
        name, count = re.subn(pattern, position, name)
        if count:
            break
    for pattern, replacement in NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def infer_config(state_dict: dict[str, torch.Tensor]) -> EfficientVMambaConfig:
    """The configuration whose network has tensors of these names and shapes."""

    def shape(name: str) -> torch.Size:
        if name not in state_dict:
            raise UserError(f"the checkpoint holds no EfficientVMamba: {name!r} is missing")
        return state_dict[name].shape

    stages: dict[int, set[int]] = {}
    for name in state_dict:
        if match := re.match(r"encoder\.stages\.(\d+)\.layers\.(\d+)\.", name):
            stages.setdefault(int(match[1]), set()).add(int(match[2]))
    if not stages:
        raise UserError("the checkpoint holds no EfficientVMamba: it has no `layers.*` tensors")

    fields = {"hidden_sizes": [], "depths": [], "block_types": []}
    ranks, is_auto_rank = set(), True
    for stage in range(max(stages) + 1):
        first_layer = f"encoder.stages.{stage}.layers.0"
        fields["depths"].append(max(stages.get(stage, {0})) + 1)
        if f"{first_layer}.mixer.A_log" in state_dict:
            hidden_size, intermediate_size = shape(f"{first_layer}.mixer.out_proj.weight")
            rank = shape(f"{first_layer}.mixer.dt_proj_weight")[-1]
            ranks.add(rank)
            is_auto_rank = is_auto_rank and rank == math.ceil(hidden_size / 16)
            fields["block_types"].append("evss")
            fields["expand"] = intermediate_size // hidden_size
            fields["state_size"] = shape(f"{first_layer}.mixer.A_log")[-1]
            fields["conv_kernel"] = shape(f"{first_layer}.mixer.conv2d.weight")[-1]
        else:
            hidden_size, expanded_size = shape(f"{first_layer}.project_conv.weight")[:2]
            fields["block_types"].append("inverted_residual")
            fields["expand_ratio"] = expanded_size // hidden_size
        fields["hidden_sizes"].append(hidden_size)
    if not is_auto_rank:
        fields["time_step_rank"] = min(ranks)

    _, fields["num_channels"], fields["patch_size"], _ = shape("embeddings.patch_embeddings.weight")
    if "classifier.weight" in state_dict:
        fields["num_labels"] = state_dict["classifier.weight"].shape[0]
    norms = [name for name in state_dict if re.match(r"hidden_states_norms\..*\.weight", name)]
    if norms:
        fields["out_features"] = sorted(name.split(".")[1] for name in norms)
    try:
        return EfficientVMambaConfig(**fields)
    except Exception as error:
        raise UserError(f"the shapes in the checkpoint fit no EfficientVMamba: {error}") from error


def load_original_checkpoint(path: Path, weights: str | None = None) -> OriginalCheckpoint:
    """Reads a `.pth`, `.pth.tar` or `.safetensors` file of the authors.

    Args:
        path: the file.
        weights: "ema" or "raw"; None takes the averaged (EMA) weights where the file has them.

    Raises:
        UserError: for files that are damaged, want to run code, or hold no EfficientVMamba.
    """
    kind, content = select_weights(read_tensors(path), weights)
    state_dict, original_names = {}, {}
    for original_name, tensor in content.items():
        name = rename(original_name)
        if name in state_dict:
            raise UserError(f"{original_names[name]!r} and {original_name!r} both stand for {name!r}")
        state_dict[name], original_names[name] = tensor, original_name

    config = infer_config(state_dict)
    for name, tensor in state_dict.items():
        if name.endswith((".mixer.A_log", ".mixer.D")):
            num_groups, channels = state_dict[name.rpartition(".")[0] + ".dt_proj_bias"].shape
            state_dict[name] = tensor.reshape(num_groups, channels, *tensor.shape[1:])  # (K * D, ...) -> (K, D, ...)
    return OriginalCheckpoint(config, state_dict, kind, original_names)
