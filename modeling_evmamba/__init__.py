"""EfficientVMamba for transformers. Importing this package registers the model with the Auto classes."""

from transformers import AutoBackbone, AutoConfig, AutoModel, AutoModelForImageClassification, BitImageProcessorPil

# in transformers 5.17, `transformers.AutoImageProcessor` is a placeholder that raises if torchvision is missing
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import is_torchvision_available

from .configuration_evmamba import VARIANTS, EfficientVMambaConfig
from .inference_evmamba import optimize_for_inference
from .modeling_evmamba import (
    EfficientVMambaBackbone,
    EfficientVMambaForImageClassification,
    EfficientVMambaModel,
    EfficientVMambaPreTrainedModel,
)


IMAGE_PROCESSOR_CLASSES: dict[str, type] = {"pil": BitImageProcessorPil}
if is_torchvision_available():
    from transformers import BitImageProcessor

    IMAGE_PROCESSOR_CLASSES["torchvision"] = BitImageProcessor

AutoConfig.register(EfficientVMambaConfig.model_type, EfficientVMambaConfig)
AutoModel.register(EfficientVMambaConfig, EfficientVMambaModel)
AutoModelForImageClassification.register(EfficientVMambaConfig, EfficientVMambaForImageClassification)
AutoBackbone.register(EfficientVMambaConfig, EfficientVMambaBackbone)
AutoImageProcessor.register(EfficientVMambaConfig, image_processor_classes=IMAGE_PROCESSOR_CLASSES)


__version__ = "0.1.0"

__all__ = [
    "VARIANTS",
    "EfficientVMambaBackbone",
    "EfficientVMambaConfig",
    "EfficientVMambaForImageClassification",
    "EfficientVMambaModel",
    "EfficientVMambaPreTrainedModel",
    "optimize_for_inference",
]
