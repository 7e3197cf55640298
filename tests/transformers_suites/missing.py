"""Replacements for modules of transformers' `tests/` that its source distribution leaves out."""

import copy

import numpy as np
import torch
from huggingface_hub import ImageClassificationOutputElement
from parameterized import parameterized
from PIL import Image
from transformers import ImageClassificationPipeline, ImageFeatureExtractionPipeline
from transformers.exporters import DynamoConfig, DynamoExporter
from transformers.testing_utils import (
    compare_pipeline_output_to_hub_spec,
    require_torch_greater_or_equal,
    torch_device,
)


# tests/utils/test_configuration_utils.py: a value other than the default for each common field
config_common_kwargs = {
    "architectures": ["AnyModel"],
    "output_hidden_states": True,
    "return_dict": False,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "is_encoder_decoder": True,
    "id2label": {0: "label"},
    "label2id": {"label": 0},
    "problem_type": "regression",
}


class GenerationTesterMixin:
    """tests/generation/test_utils.py. Models without `generate` must not inherit its tests."""


class ExportTesterMixin:
    """tests/exporters/test_export.py. Its part for `torch.export` needs no other package."""

    # more than one pixel in every feature map, since an exported graph treats sizes of 1 as constants
    @parameterized.expand([("static", [(2, 64, 64)]), ("dynamic", [(2, 64, 64), (3, 96, 72)])])
    @require_torch_greater_or_equal(DynamoExporter.min_versions["torch"])
    def test_torch_export(self, kind, sizes):
        config, _ = self.model_tester.prepare_config_and_inputs_for_common()
        samples = [
            {"pixel_values": torch.rand(batch_size, config.num_channels, height, width, device=torch_device)}
            for batch_size, height, width in sizes
        ]
        for model_class in self.all_model_classes:
            with self.subTest(model_class.__name__):
                model = model_class(copy.deepcopy(config)).to(torch_device).eval()
                exported = DynamoExporter().export(model, samples[0], config=DynamoConfig(dynamic=kind == "dynamic"))
                program = getattr(exported, "program", exported).module()  # recent versions wrap the program
                for sample in samples:
                    with torch.no_grad():
                        expected, actual = model(**sample), program(**sample)
                    torch.testing.assert_close(actual.to_tuple(), expected.to_tuple(), rtol=1e-4, atol=1e-4)


def images() -> list[Image.Image]:
    """Return one image per kind: color, color with alpha, gray with alpha, gray."""
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    return [Image.fromarray(pixels).convert(mode) for mode in ("RGB", "RGBA", "LA", "L")]


class ImageClassificationPipelineTests:
    """tests/pipelines/test_pipelines_image_classification.py"""

    def get_test_pipeline(self, model, tokenizer=None, image_processor=None, dtype="float32"):
        pipeline = ImageClassificationPipeline(model=model, image_processor=image_processor, dtype=dtype, top_k=2)
        return pipeline, images()

    def run_pipeline_test(self, image_classifier, examples):
        for outputs in [image_classifier(examples[0]), *image_classifier(examples)]:
            assert len(outputs) == 2
            for output in outputs:
                compare_pipeline_output_to_hub_spec(output, ImageClassificationOutputElement)
                assert output["label"] in image_classifier.model.config.label2id
                assert 0 <= output["score"] <= 1


class ImageFeatureExtractionPipelineTests:
    """tests/pipelines/test_pipelines_image_feature_extraction.py"""

    def get_test_pipeline(self, model, tokenizer=None, image_processor=None, dtype="float32"):
        pipeline = ImageFeatureExtractionPipeline(model=model, image_processor=image_processor, dtype=dtype)
        return pipeline, images()

    def run_pipeline_test(self, feature_extractor, examples):
        channels = feature_extractor.model.config.hidden_sizes[-1]
        maps = feature_extractor(examples)
        assert len(maps) == len(examples)
        for features in [feature_extractor(examples[0]), *maps]:
            assert np.shape(features)[:2] == (1, channels)
            assert np.isfinite(features).all()
        assert np.shape(feature_extractor(examples[0], pool=True)) == (1, channels)


def __getattr__(name):
    """The tests of the other pipelines. Some versions import them, but none of them runs."""
    if name.endswith("PipelineTests"):
        return type(name, (), {})
    raise AttributeError(name)
