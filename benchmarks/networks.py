"""EfficientVMamba and networks of its size, with random weights, for the benchmarks of whole networks.

The other networks come from timm if it can be imported, else from transformers. Their parameter counts must match.
"""

from collections.abc import Callable, Iterable
from functools import partial
from types import ModuleType
from typing import NamedTuple

import torch
from measure import console
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    EfficientNetConfig,
    MobileViTConfig,
    PreTrainedConfig,
    SwinConfig,
    ViTConfig,
)

from modeling_evmamba import VARIANTS, EfficientVMambaConfig


OURS = {"EfficientVMamba-T": "tiny", "EfficientVMamba-S": "small", "EfficientVMamba-B": "base"}


class Peer(NamedTuple):
    timm_name: str
    config: Callable[[], PreTrainedConfig] | None  # the same architecture in transformers, if it has it
    millions: float  # parameters according to its paper
    image_size: int = 224


PEERS = {
    # DeiT without its distillation token is a ViT
    "DeiT-Ti": Peer(
        "deit_tiny_patch16_224",
        partial(ViTConfig, hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768),
        5.7,
    ),
    "EfficientNet-B0": Peer(
        "efficientnet_b0",
        partial(
            EfficientNetConfig,
            width_coefficient=1.0,
            depth_coefficient=1.0,
            image_size=224,
            hidden_dim=1280,
            dropout_rate=0.2,
        ),
        5.3,
    ),
    "MobileViT-S": Peer("mobilevit_s", MobileViTConfig, 5.6, image_size=256),
    # according to timm's model card
    "MobileNetV4-Conv-M": Peer("mobilenetv4_conv_medium", None, 9.7, image_size=256),
    "Swin-T": Peer("swin_tiny_patch4_window7_224", partial(SwinConfig, embed_dim=96, depths=[2, 2, 6, 2]), 28.3),
}

NAMES = [*OURS, *PEERS]

# ImageNet-1k top-1 accuracy in percent, for one crop at the network's own image size
PUBLISHED_ACCURACY = {
    "EfficientVMamba-T": (76.5, "the authors' training log"),
    "EfficientVMamba-S": (78.7, "the authors' training log"),
    "EfficientVMamba-B": (81.8, "the authors' training log"),
    "DeiT-Ti": (72.2, "arXiv 2012.12877"),
    "EfficientNet-B0": (77.1, "arXiv 1905.11946"),
    "MobileViT-S": (78.4, "arXiv 2110.02178"),
    "MobileNetV4-Conv-M": (79.9, "arXiv 2404.10518"),
    "Swin-T": (81.3, "arXiv 2103.14030"),
}


class Network(NamedTuple):
    source: str
    model: nn.Module
    image_size: int


def create_networks(names: Iterable[str] = NAMES) -> dict[str, Network]:
    """Create networks in evaluation mode. Leave out those that neither timm nor transformers has here."""
    timm = import_timm()
    networks = {}
    for name in names:
        if name in OURS:
            networks[name] = Network("this package", create_ours(OURS[name]), 224)
        elif timm is None and PEERS[name].config is None:
            console.print(f"{name} is left out: it needs timm")
        else:
            networks[name] = create_peer(name, timm)
    return networks


def import_timm() -> ModuleType | None:
    try:
        import timm
    except ImportError as error:
        console.print(f"timm cannot be imported, using transformers instead: {error}", soft_wrap=True)
        return None
    return timm


def create_ours(variant: str) -> nn.Module:
    config = EfficientVMambaConfig(**VARIANTS[variant], num_labels=1000)
    return AutoModelForImageClassification.from_config(config).eval()


def create_peer(name: str, timm: ModuleType | None) -> Network:
    """Create another network, from timm if it is given.

    Raises:
        ValueError: If its number of parameters is not the published one.
    """
    peer = PEERS[name]
    if timm is not None:
        source, model = "timm", timm.create_model(peer.timm_name, pretrained=False)
    else:
        source, model = "transformers", AutoModelForImageClassification.from_config(peer.config(num_labels=1000))
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    if abs(millions - peer.millions) > 0.05:
        raise ValueError(f"{name} has {millions:.2f} M parameters, not {peer.millions} M")
    return Network(source, model.eval(), peer.image_size)


def run_model(model: nn.Module, images: torch.Tensor) -> object:
    with torch.inference_mode():
        return model(images)
