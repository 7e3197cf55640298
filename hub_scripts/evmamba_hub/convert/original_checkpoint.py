"""Read the authors' checkpoints into this package's names and shapes.

The authors' code (https://github.com/TerryPei/EfficientVMamba) writes a pickled dictionary. Other programs save the
network as a part of their own: Lightning, MMDetection, MMSegmentation, or a wrapper for averaging or compilation. So
this module searches the whole checkpoint for the network's keys, below any entry and behind any prefix.

It renames these keys, which come in two generations of module names, to the newer generation. It translates the names
of our network to that generation too. Both sets of names must agree.
"""

import re
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mode
from typing import Any

import torch
from safetensors.torch import load_file

from evmamba_hub.errors import UserError
from evmamba_hub.info import find_variant
from evmamba_hub.wording import shorten
from modeling_evmamba import EfficientVMambaBackbone, EfficientVMambaConfig, EfficientVMambaForImageClassification


# Modules around modules: DataParallel, torch.compile, DeepSpeed, FSDP, activation checkpointing.
WRAPPERS = r"(?:(?:module|_orig_mod|_forward_module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)"

# A key of the first stage. The group is the prefix of the network's keys.
NETWORK_KEY = re.compile(rf"((?:[^.]+\.)*?)layers\.0\.{WRAPPERS}*blocks\.\d+\.")

# Words in the names of entries and prefixes that averaged weights have.
EMA_NAME = re.compile(r"(?:^|[._])(?:ema|swa|averaged)[._]", re.IGNORECASE)

# Entries of MMEngine and Lightning that tell that `state_dict` holds the averaged weights, and another entry the raw
# ones. MMEngine calls that entry `ema_state_dict`.
SWAPPED_ENTRIES = [{"state_dict", "ema_state_dict", "message_hub"}, {"state_dict", "current_model_state"}]

MAX_DEPTH = 4  # of the dictionaries in a checkpoint that are searched

# The spellings of older runs, and of modules in wrappers.
SPELLINGS = [
    (rf"(?:^|(?<=\.)){WRAPPERS}+", ""),
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
    "mixer.output_proj.": "op.out_proj.",
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


class Inert:
    """Stands for a pickled object that is not needed. Its class is not imported, and nothing of it runs."""

    def __init__(self, *arguments: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


# What training scripts pickle beside the weights, and `weights_only` rejects. numpy moved `core` to `_core`, and
# Python moved the classes of `pathlib`. MMEngine's logs hold functions, which are pickled by `getattr`.
INERT_NAMES = [
    "argparse.Namespace",
    "builtins.getattr",
    "mmengine.logging.history_buffer.HistoryBuffer",
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *(f"pathlib{local}.{system}Path" for local in ("", "._local") for system in ("Posix", "Windows")),
]
DICTIONARY_NAMES = [
    "yacs.config.CfgNode",
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "lightning.pytorch.utilities.parsing.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
]
HARMLESS_GLOBALS: list = [(Inert, name) for name in INERT_NAMES] + [(OrderedDict, name) for name in DICTIONARY_NAMES]


class Misfit(UserError):
    """Says why tensors are not those of an EfficientVMamba."""

    def __init__(self, message: str, num_problems: int):
        super().__init__(message)
        self.num_problems = num_problems


@dataclass
class StoredNetwork:
    """A network in a checkpoint: the keys of one dictionary that begin with a prefix."""

    entries: str  # that lead to the dictionary, such as "state_dict.", or "" for the checkpoint itself
    prefix: str  # such as "model.backbone.", or ""
    content: dict[str, Any]  # by the keys without the prefix
    left_out: dict[str, int]  # modules of the dictionary outside of all networks -> their number of tensors
    weights: str  # "ema" or "raw"

    @property
    def name(self) -> str:
        return f"{self.entries}{self.prefix}*"


@dataclass
class OriginalCheckpoint:
    """A checkpoint of the authors, as `model_class.from_pretrained(None, config=, state_dict=)` takes it."""

    model_class: type[EfficientVMambaForImageClassification] | type[EfficientVMambaBackbone]
    config: EfficientVMambaConfig
    state_dict: dict[str, torch.Tensor]
    source: StoredNetwork
    not_taken: dict[str, str]  # names of the other networks in the file -> "ema" or "raw"

    @property
    def is_backbone(self) -> bool:
        return self.model_class is EfficientVMambaBackbone

    @property
    def variant(self) -> str | None:
        """The name of the published network, or None."""
        return find_variant(self.config)


def read_file(path: Path):
    """Return the content of a file. `weights_only` rejects pickles that would execute code.

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


def find_dictionaries(content: Any, entries: str = "") -> Iterator[tuple[str, dict]]:
    """Yield the dictionaries in a checkpoint, with the entries that lead to them."""
    if isinstance(content, dict) and entries.count(".") < MAX_DEPTH:
        yield entries, content
        for name, value in content.items():
            yield from find_dictionaries(value, f"{entries}{name}.")


def find_networks(content: Any) -> list[StoredNetwork]:
    """Return the networks in a checkpoint, in the order of the file.

    Raises:
        UserError: If there is none.
    """
    networks = []
    for entries, dictionary in find_dictionaries(content):
        matches = [NETWORK_KEY.match(key) for key, value in dictionary.items() if is_named_tensor(key, value)]
        prefixes = list(dict.fromkeys(match[1] for match in matches if match))
        members: dict[str, dict] = {prefix: {} for prefix in prefixes}
        others = []
        for key, value in dictionary.items():
            # of nested networks, such as a model and its average inside of it, the inner one owns the key
            owner = max((prefix for prefix in prefixes if str(key).startswith(prefix)), key=len, default=None)
            if owner is not None:
                members[owner][str(key).removeprefix(owner) if owner else key] = value
            elif is_named_tensor(key, value):
                others.append(key)
        for prefix in prefixes:
            weights = "ema" if is_averaged(content, entries, prefix) else "raw"
            networks.append(StoredNetwork(entries, prefix, members[prefix], count_modules(others, prefix), weights))
    if not networks:
        raise explain_absence(content)
    return networks


def is_averaged(content: dict, entries: str, prefix: str) -> bool:
    """Return whether averaged weights stand below these entries, behind this prefix of a checkpoint."""
    if any(swapped <= content.keys() for swapped in SWAPPED_ENTRIES):
        return entries == "state_dict."
    return EMA_NAME.search(entries + prefix) is not None


def is_named_tensor(name: Any, value: Any) -> bool:
    return isinstance(name, str) and isinstance(value, torch.Tensor)


def count_modules(keys: list[str], prefix: str) -> dict[str, int]:
    """Return the modules beside a network, such as the neck beside a backbone, with their numbers of tensors."""
    parent = re.sub(r"[^.]+\.$", "", prefix)
    names = [(parent if key.startswith(parent) else "", key) for key in keys]
    return dict(Counter(start + key.removeprefix(start).partition(".")[0] for start, key in names))


def explain_absence(content: Any) -> UserError:
    """Return the error for a checkpoint without the network."""
    if not isinstance(content, dict):
        return UserError(f"the checkpoint must hold a dictionary of tensors, got a {type(content).__name__}")
    weights = max((each for _, each in find_dictionaries(content)), key=count_tensors)
    for name, value in weights.items():
        if isinstance(name, str) and "encoder.stages.0." in name:
            return UserError(
                "the checkpoint has this package's names already and needs no conversion: give its directory to the "
                "other commands"
            )
        if isinstance(value, torch.Tensor) and not isinstance(name, str):
            return UserError(f"the weights of the checkpoint hold {name!r}, which is not a named tensor")
    return UserError("the checkpoint holds no EfficientVMamba: it lacks the blocks 'layers.0.*'")


def count_tensors(dictionary: dict) -> int:
    return sum(isinstance(value, torch.Tensor) for value in dictionary.values())


def select_networks(networks: list[StoredNetwork], weights: str | None, prefix: str | None) -> list[StoredNetwork]:
    """Return the networks that are asked for.

    Args:
        networks: Those of the checkpoint.
        weights: "ema" or "raw". None prefers "ema".
        prefix: The beginning of the keys, with or without the entries above them.

    Raises:
        UserError: If there is none.
    """
    names = ", ".join(network.name for network in networks)
    if prefix is not None:
        networks = [
            network for network in networks if network.name.startswith(prefix) or network.prefix.startswith(prefix)
        ]
        if not networks:
            raise UserError(f"the checkpoint holds no network at {prefix!r}: choose one of {names} with --prefix")
    kinds = {network.weights for network in networks}
    kind = weights or ("ema" if "ema" in kinds else "raw")
    if kind not in kinds:
        raise UserError(
            f"the checkpoint holds no {kind} weights (its networks are {names}): choose --weights {next(iter(kinds))}"
        )
    return [network for network in networks if network.weights == kind]


def modern_name(name: str) -> str:
    """Return a key of any generation in the newer generation of names."""
    for pattern, replacement in SPELLINGS:
        name = re.sub(pattern, replacement, name)
    return name


def original_name(name: str, config: EfficientVMambaConfig) -> str:
    """Return the authors' name (newer generation) of a tensor of our network."""

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
    """Return the configuration of the network with these tensors.

    Args:
        state_dict: The tensors under the authors' names (newer generation).

    Raises:
        Misfit: If a stage has no blocks.
    """
    fields: dict[str, Any] = {"hidden_sizes": [], "depths": []}
    for stage, block_type in enumerate(EfficientVMambaConfig().block_types):
        pattern = rf"layers\.{stage}\.{BLOCK_TENSORS[block_type]}"
        blocks = [(match, tensor) for name, tensor in state_dict.items() if (match := re.match(pattern, name))]
        sizes = [tensor.shape[0] for _, tensor in blocks if tensor.ndim > 0]
        if not sizes:
            message = f"the checkpoint holds no EfficientVMamba: it lacks the blocks 'layers.{stage}.*'"
            raise Misfit(message, len(state_dict))
        fields["hidden_sizes"].append(mode(sizes))  # the mode, so that a single wrong shape is reported as such
        last_block = max(int(match[1]) for match, _ in blocks)
        fields["depths"].append(last_block + 1 if block_type == "evss" else last_block)

    if normalized := {int(match[1]) for name in state_dict if (match := re.match(r"outnorm([0-3])\.", name))}:
        fields["out_features"] = [f"stage{stage + 1}" for stage in sorted(normalized)]
    for name in ("classifier.head.bias", "classifier.head.weight"):
        if name in state_dict and state_dict[name].ndim > 0:
            fields["num_labels"] = state_dict[name].shape[0]
    return EfficientVMambaConfig(**fields)


def load_original_checkpoint(path: Path, weights: str | None = None, prefix: str | None = None) -> OriginalCheckpoint:
    """Read a `.pth`, `.pth.tar`, `.ckpt` or `.safetensors` file that holds a network of the authors.

    Args:
        path: The file.
        weights: "ema" or "raw". None takes the averaged (EMA) weights if the file has them.
        prefix: The beginning of the keys, with or without the entries above them, if the file holds several networks.
            None takes the first one that fits.

    Raises:
        UserError: If the file is damaged, would execute code, or does not hold exactly the tensors of an
            EfficientVMamba.
    """
    networks = find_networks(read_file(path))
    misfits = []
    for network in select_networks(networks, weights, prefix):
        try:
            model_class, config, state_dict = translate(network)
        except Misfit as error:
            misfits.append(error)
        else:
            not_taken = {other.name: other.weights for other in networks if other is not network}
            return OriginalCheckpoint(model_class, config, state_dict, network, not_taken)
    message = f"{path.name} does not fit the network: {min(misfits, key=lambda error: error.num_problems)}"
    if len(misfits) < len(networks):
        names = ", ".join(network.name for network in networks)
        message += f". The file holds several networks, choose one with --weights or --prefix: {names}"
    raise UserError(message)


def translate(network: StoredNetwork) -> tuple[type, EfficientVMambaConfig, dict[str, torch.Tensor]]:
    """Return the class, the configuration and the tensors under our names of a network.

    Raises:
        Misfit: If the tensors are not exactly those of an EfficientVMamba.
    """
    names_in_file: dict[str, str] = {}
    original: dict[str, torch.Tensor] = {}
    for name, tensor in network.content.items():
        if not is_named_tensor(name, tensor):
            raise Misfit(f"it holds {name!r}, which is not a named tensor", 1)
        modern, name = modern_name(name), network.prefix + name
        if modern in original:
            raise Misfit(f"the keys {names_in_file[modern]!r} and {name!r} name the same tensor", 1)
        names_in_file[modern], original[modern] = name, tensor

    config = infer_config(original)
    is_backbone = any(name.startswith("outnorm") for name in original)
    model_class = EfficientVMambaBackbone if is_backbone else EfficientVMambaForImageClassification
    with torch.device("meta"):
        model = model_class(config)
    pointwise_convs = {f"{name}.weight" for name, part in model.named_modules() if hasattr(part, "is_pointwise_conv")}

    state_dict: dict[str, torch.Tensor] = {}
    missing: list[str] = []
    wrong: list[str] = []
    for name, expected_tensor in model.state_dict().items():
        theirs = original_name(name, config)
        expected_shape = tuple(expected_tensor.shape)
        if theirs.endswith((".A_logs", ".Ds")):  # (K * D, ...) instead of (K, D, ...) for the K scan groups
            expected_shape = tuple(expected_tensor.flatten(0, 1).shape)
        elif name in pointwise_convs:  # convolutions instead of linear layers
            expected_shape = (*expected_shape, 1, 1)
        if theirs not in original:
            missing.append(network.prefix + theirs)
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
    if num_problems := sum(map(len, problems.values())):
        raise Misfit("; ".join(list_problems(problems)), num_problems)
    return model_class, config, state_dict


def list_problems(problems: dict[str, list[str]]) -> list[str]:
    """Return one phrase per kind of problem."""
    return [f"{kind}: {shorten(names)}" for kind, names in problems.items() if names]
