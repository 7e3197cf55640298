"""Directories of tiny segmentation models and detectors with fresh weights, as training leaves them."""

from pathlib import Path

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from dense_heads import HEADS
from modeling_evmamba import EfficientVMambaConfig


LABELS = ["background", "cat, house cat", "狗"]

# Image processors by head. With transformers 5.22 or newer, they need no torchvision.
IMAGE_PROCESSORS = {
    "UperNetForSemanticSegmentation": ("SegformerImageProcessorPil", {"size": {"height": 64, "width": 64}}),
    "Mask2FormerForUniversalSegmentation": (
        "Mask2FormerImageProcessorPil",
        {"size": {"shortest_edge": 64, "longest_edge": 128}},
    ),
    "RTDetrForObjectDetection": ("RTDetrImageProcessorPil", {"size": {"height": 64, "width": 64}}),
    "DFineForObjectDetection": ("RTDetrImageProcessorPil", {"size": {"height": 64, "width": 64}}),
    "DeformableDetrForObjectDetection": (
        "DeformableDetrImageProcessorPil",
        {"size": {"shortest_edge": 64, "longest_edge": 128}},
    ),
}
SEGMENTER, DETECTOR = "UperNetForSemanticSegmentation", "RTDetrForObjectDetection"


def create_dense_model(name: str, **backbone_fields) -> PreTrainedModel:
    """Create a head of `dense_heads.HEADS` around the backbone, with three classes."""
    torch.manual_seed(0)
    head = next(head for head in HEADS if head.name == name)
    model = head.create(EfficientVMambaConfig(**{**head.backbone_fields, **backbone_fields})).eval()
    model.config.id2label = dict(enumerate(LABELS))
    model.config.label2id = {label: index for index, label in enumerate(LABELS)}
    return model


def save_dense_model(folder: Path, name: str) -> Path:
    """Save a model with its image processor. Return the directory."""
    create_dense_model(name).save_pretrained(folder)
    processor, settings = IMAGE_PROCESSORS[name]
    try:
        image_processor = getattr(transformers, processor)(**settings)
    except ImportError:  # an older transformers
        pytest.skip(f"transformers {transformers.__version__} needs torchvision for {processor}")
    image_processor.save_pretrained(folder)
    return folder
