"""The heads of transformers that take a backbone, in tiny sizes, and a check that they load what they saved.

A process without this package imports this file too, so nothing here imports the package.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.backbone_utils import BackboneMixin

from weights import assert_same_weights


WIDTHS = [8, 12, 16, 24]  # all differ, so that no stage passes for another
STAGES = ["stage1", "stage2", "stage3", "stage4"]
TINY = {"hidden_sizes": WIDTHS, "depths": [1, 1, 1, 1], "state_size": 2, "drop_path_rate": 0.0}

Inputs = Callable[[], dict[str, torch.Tensor]]


def images(height: int, width: int, num_channels: int = 3) -> Inputs:
    return lambda: {"pixel_values": torch.randn(2, num_channels, height, width)}


ODD = images(75, 101)
MULTIPLES_OF_32 = images(64, 96)  # for heads that join feature maps after upsampling by 2
SENTENCES = torch.tensor([[5, 6, 9], [5, 7, 9]])


def with_tasks() -> dict[str, torch.Tensor]:
    return {**ODD(), "task_inputs": torch.rand(2, 6)}


def with_captions() -> dict[str, torch.Tensor]:
    input_ids = torch.tensor([[101, 7, 1012, 102]] * 2)  # in BERT: [CLS], a word, a period, [SEP]
    return {**ODD(), "input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def with_classes() -> dict[str, torch.Tensor]:
    return {
        **MULTIPLES_OF_32(),
        **{f"{kind}_input_ids": SENTENCES for kind in ("classes", "tasks")},
        **{f"{kind}_attention_mask": torch.ones_like(SENTENCES) for kind in ("classes", "tasks")},
        "classes_structure": torch.tensor([1, 1]),  # classes per image
    }


def video_with_caption() -> dict[str, torch.Tensor]:  # TVP takes batches of one video only
    return {
        "pixel_values": torch.randn(1, 2, 3, 96, 96),
        "input_ids": SENTENCES[:1],
        "attention_mask": torch.ones_like(SENTENCES[:1]),
    }


@dataclass
class Head:
    """A class of transformers that takes a backbone.

    Args:
        name: Name of the class.
        config_name: Name of its configuration's class.
        fields: Fields of the configuration, except for the backbone's.
        base_name: Name of the class without the head, if there is one that loads the same checkpoints.
        stages: Feature maps that the head takes.
        inputs: Returns inputs of the head.
        num_channels: Number of channels of the images.
    """

    name: str
    config_name: str
    fields: dict[str, Any]
    base_name: str | None = None
    stages: list[str] | None = None
    inputs: Inputs = ODD
    num_channels: int = 3

    @property
    def is_installed(self) -> bool:
        return hasattr(transformers, self.name)

    @property
    def family(self) -> str:
        """Directory below `transformers/models`."""
        return getattr(transformers, self.config_name).__module__.split(".")[2]

    @property
    def backbone_fields(self) -> dict[str, Any]:
        """Fields of the backbone's configuration."""
        return {**TINY, "out_features": self.stages or STAGES, "num_channels": self.num_channels}

    def create(self, backbone_config: Any) -> PreTrainedModel:
        fields = deepcopy(self.fields)  # transformers 5.17 changes the dictionaries inside
        config = getattr(transformers, self.config_name)(backbone_config=backbone_config, **fields)
        return getattr(transformers, self.name)(config)


def find_backbone(model: PreTrainedModel) -> PreTrainedModel:
    (backbone,) = (module for module in model.modules() if isinstance(module, BackboneMixin))
    return backbone


def randomize(model: PreTrainedModel) -> None:
    """Let no tensor keep the value of its initialization, which a tensor that is not loaded would have too."""
    for tensor in model.state_dict().values():
        tensor.uniform_(0.5, 1.5) if tensor.is_floating_point() else tensor.fill_(7)


def load(name: str, folder: Path) -> tuple[PreTrainedModel, dict[str, set]]:
    """Load a checkpoint with a class of transformers. Return the model, and the loading info."""
    return getattr(transformers, name).from_pretrained(folder, output_loading_info=True)


def check_reload(model: PreTrainedModel, folder: Path) -> None:
    """Save a model, and assert that every tensor is loaded as it was."""
    model.save_pretrained(folder)
    loaded, info = load(type(model).__name__, folder)
    assert not any(info.values()), info
    assert_same_weights(loaded.state_dict(), model.state_dict())


DETR = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_ffn_dim": 8,
    "decoder_ffn_dim": 8,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "num_queries": 4,
    "num_labels": 3,
}
DAB_DETR = {name: value for name, value in DETR.items() if name != "d_model"} | {"hidden_size": 32}
DETR_FOR_SEGMENTATION = {**DETR, "d_model": 64, "encoder_attention_heads": 8, "decoder_attention_heads": 8}
RT_DETR = {
    **DETR,
    "encoder_hidden_dim": 32,
    "encoder_in_channels": WIDTHS[1:],
    "decoder_in_channels": [32, 32, 32],
    "hidden_expansion": 0.5,
    "num_denoising": 0,
}
TRANSFORMER = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
BERT = {"model_type": "bert", "vocab_size": 2000, **TRANSFORMER}
CLIP = {"model_type": "clip_text_model", "vocab_size": 10, "max_position_embeddings": 8, "eos_token_id": 9}
UNIVERSAL = {
    "hidden_dim": 32,
    "encoder_feedforward_dim": 8,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "num_attention_heads": 2,
    "dim_feedforward": 8,
    "num_queries": 4,
    "num_labels": 3,
}
DPT_HYBRID = {
    "is_hybrid": True,
    **TRANSFORMER,
    "hidden_size": WIDTHS[-1],  # that of the backbone
    "num_hidden_layers": 4,
    "image_size": 64,
    "backbone_out_indices": [0, 1, 2, 3],
    "backbone_featmap_shape": [1, WIDTHS[2], 4, 4],
    "neck_hidden_sizes": [*WIDTHS[:2], 8, 8],
    "fusion_hidden_size": 8,
}

HEADS = [
    Head(
        "UperNetForSemanticSegmentation",
        "UperNetConfig",
        {"hidden_size": 8, "auxiliary_in_channels": WIDTHS[2], "auxiliary_channels": 8, "num_labels": 3},
    ),
    Head(
        "MaskFormerForInstanceSegmentation",
        "MaskFormerConfig",
        {"fpn_feature_size": 32, "mask_feature_size": 32, "decoder_config": {"model_type": "detr", **DETR}},
        "MaskFormerModel",
    ),
    Head(
        "Mask2FormerForUniversalSegmentation",
        "Mask2FormerConfig",
        {**UNIVERSAL, "feature_size": 32, "mask_feature_size": 32},
        "Mask2FormerModel",
    ),
    Head(
        "OneFormerForUniversalSegmentation",
        "OneFormerConfig",
        {**UNIVERSAL, "conv_dim": 32, "mask_dim": 32, "query_dec_layers": 1, "task_seq_len": 6},
        "OneFormerModel",
        inputs=with_tasks,
    ),
    Head("DetrForObjectDetection", "DetrConfig", DETR, "DetrModel", ["stage4"]),
    Head("DetrForSegmentation", "DetrConfig", DETR_FOR_SEGMENTATION),
    Head("ConditionalDetrForObjectDetection", "ConditionalDetrConfig", DETR, "ConditionalDetrModel", ["stage4"]),
    Head("ConditionalDetrForSegmentation", "ConditionalDetrConfig", DETR_FOR_SEGMENTATION),
    Head("DabDetrForObjectDetection", "DabDetrConfig", DAB_DETR, "DabDetrModel", ["stage4"]),
    Head("DeformableDetrForObjectDetection", "DeformableDetrConfig", DETR, "DeformableDetrModel", STAGES[1:]),
    Head("TableTransformerForObjectDetection", "TableTransformerConfig", DETR, "TableTransformerModel", ["stage4"]),
    Head("RTDetrForObjectDetection", "RTDetrConfig", RT_DETR, "RTDetrModel", STAGES[1:], MULTIPLES_OF_32),
    Head("RTDetrV2ForObjectDetection", "RTDetrV2Config", RT_DETR, "RTDetrV2Model", STAGES[1:], MULTIPLES_OF_32),
    Head("DFineForObjectDetection", "DFineConfig", RT_DETR, "DFineModel", STAGES[1:], MULTIPLES_OF_32),
    Head("Deimv2ForObjectDetection", "Deimv2Config", RT_DETR, "Deimv2Model", STAGES[1:], MULTIPLES_OF_32),
    Head(
        "PPDocLayoutV2ForObjectDetection",
        "PPDocLayoutV2Config",
        {
            **RT_DETR,
            "class_thresholds": [0.5] * 3,
            "class_order": [0, 1, 2],
            "reading_order_config": {**TRANSFORMER, "coordinate_size": 4, "shape_size": 4, "num_classes": 3},
        },
        "PPDocLayoutV2Model",
        STAGES[1:],
        MULTIPLES_OF_32,
    ),
    Head(
        "PPDocLayoutV3ForObjectDetection",
        "PPDocLayoutV3Config",
        {**RT_DETR, "x4_feat_dim": WIDTHS[0], "mask_feature_channels": [8, 8], "num_prototypes": 4},
        "PPDocLayoutV3Model",
        inputs=MULTIPLES_OF_32,
    ),
    Head(
        "PPDocLayoutV4ForObjectDetection",
        "PPDocLayoutV4Config",
        {**RT_DETR, "global_pointer_head_size": 4},
        "PPDocLayoutV4Model",
        STAGES[1:],
        MULTIPLES_OF_32,
    ),
    Head(
        "GroundingDinoForObjectDetection",
        "GroundingDinoConfig",
        {**DETR, "text_config": BERT},
        "GroundingDinoModel",
        STAGES[1:],
        with_captions,
    ),
    Head(
        "MMGroundingDinoForObjectDetection",
        "MMGroundingDinoConfig",
        {**DETR, "text_config": BERT},
        "MMGroundingDinoModel",
        STAGES[1:],
        with_captions,
    ),
    Head(
        "OmDetTurboForObjectDetection",
        "OmDetTurboConfig",
        {
            "text_config": {**CLIP, **TRANSFORMER, "hidden_size": 16, "projection_dim": 16},
            "apply_layernorm_after_vision_backbone": False,  # expects (B, H, W, C)
            "text_projection_in_dim": 16,
            "text_projection_out_dim": 16,
            "task_encoder_hidden_dim": 8,
            "class_embed_dim": 16,
            "num_queries": 4,
            "encoder_hidden_dim": 8,
            "vision_features_channels": [8, 8, 8],
            "encoder_in_channels": WIDTHS[1:],
            "encoder_attention_heads": 2,
            "encoder_dim_feedforward": 8,
            "decoder_hidden_dim": 8,
            "decoder_num_heads": 2,
            "decoder_num_layers": 1,
            "decoder_dim_feedforward": 8,
        },
        stages=STAGES[1:],
        inputs=with_classes,
    ),
    Head(
        "TvpForVideoGrounding",
        "TvpConfig",
        {
            **TRANSFORMER,
            "vocab_size": 10,
            "max_position_embeddings": 8,
            "max_img_size": 96,
            "visual_prompt_size": 8,
            "num_frames": 2,
        },
        "TvpModel",
        ["stage4"],
        video_with_caption,
    ),
    Head(
        "VitMatteForImageMatting",
        "VitMatteConfig",
        {"hidden_size": WIDTHS[2], "convstream_hidden_sizes": [4, 4, 8], "fusion_hidden_sizes": [8, 8, 4, 4]},
        stages=["stage3"],
        inputs=images(64, 96, num_channels=4),  # the fourth is the trimap
        num_channels=4,
    ),
    Head("DPTForDepthEstimation", "DPTConfig", DPT_HYBRID, "DPTModel", stages=STAGES[:3], inputs=images(64, 64)),
    Head("DPTForSemanticSegmentation", "DPTConfig", DPT_HYBRID, "DPTModel", stages=STAGES[:3], inputs=images(64, 64)),
    Head(
        "PPOCRV5MobileDetForObjectDetection",
        "PPOCRV5MobileDetConfig",
        {"neck_out_channels": 16, "layer_list_out_channels": [4, 4, 8, 8]},
        "PPOCRV5MobileDetModel",
        inputs=MULTIPLES_OF_32,
    ),
    Head(
        "PPOCRV6SmallDetForObjectDetection",
        "PPOCRV6SmallDetConfig",
        {"neck_out_channels": 16, "layer_list_out_channels": WIDTHS},
        "PPOCRV6SmallDetModel",
        inputs=MULTIPLES_OF_32,
    ),
    Head(
        "SLANetForTableRecognition",
        "SLANetConfig",
        {"post_conv_out_channels": 8, "out_channels": 4, "hidden_size": 8, "max_text_length": 4},
        stages=STAGES[1:],
    ),
]

DEPTH_ANYTHING = {
    "reassemble_hidden_size": WIDTHS[3],
    "neck_hidden_sizes": WIDTHS,
    "fusion_hidden_size": 8,
    "head_hidden_size": 8,
}

# heads that cannot take a backbone with feature maps, and what they raise
UNSUPPORTED = [
    (Head("DepthAnythingForDepthEstimation", "DepthAnythingConfig", DEPTH_ANYTHING), "too many values to unpack"),
    (
        Head("PromptDepthAnythingForDepthEstimation", "PromptDepthAnythingConfig", DEPTH_ANYTHING),
        "too many values to unpack",
    ),
    (
        Head("DPTForDepthEstimation", "DPTConfig", {"neck_hidden_sizes": WIDTHS, "fusion_hidden_size": 8}),
        "too many values to unpack",
    ),
    (Head("ZoeDepthForDepthEstimation", "ZoeDepthConfig", {}), "Expected size 8 but got size 12"),
    (Head("CHMv2ForDepthEstimation", "CHMv2Config", {}), "'cls_tokens'"),
    (Head("VitPoseForPoseEstimation", "VitPoseConfig", {}), "not subscriptable"),
    (Head("Tipsv2DptForDepthEstimation", "Tipsv2DptConfig", {}), "'num_register_tokens'"),
    (Head("LwDetrForObjectDetection", "LwDetrConfig", {}), "'pretrain_image_size'"),
    (Head("RfDetrForObjectDetection", "RfDetrConfig", {}), "'use_mask_token'"),
    (Head("UVDocModel", "UVDocConfig", {}), "'resnet_head'"),
    (Head("Sam2VisionModel", "Sam2VisionConfig", {}), "'intermediate_hidden_states'"),
    (Head("EdgeTamVisionModel", "EdgeTamVisionConfig", {}), "permute"),
    (Head("Sam3VisionModel", "Sam3VisionConfig", {}), "is invalid for input"),
    (Head("PPOCRV5ServerDetForObjectDetection", "PPOCRV5ServerDetConfig", {}), "'stage_out_channels'"),
    (Head("PPOCRV5ServerRecForTextRecognition", "PPOCRV5ServerRecConfig", {}), "'stage_out_channels'"),
    (Head("PPOCRV6MediumDetForObjectDetection", "PPOCRV6MediumDetConfig", {}), "'stage_out_channels'"),
    (Head("PPOCRV5MobileRecForTextRecognition", "PPOCRV5MobileRecConfig", {}), "'block_configs'"),
    (Head("PPOCRV6SmallRecForTextRecognition", "PPOCRV6SmallRecConfig", {}), "'block_configs'"),
    (Head("PPOCRV6TinyRecForTextRecognition", "PPOCRV6TinyRecConfig", {}), "'block_configs'"),
]
