"""The test module of a vision model, as in transformers' repository."""

import copy
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import torch
from transformers import BitImageProcessorPil
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_BACKBONE_MAPPING_NAMES,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)
from transformers.testing_utils import torch_device

from modeling_evmamba import (
    EfficientVMambaBackbone,
    EfficientVMambaConfig,
    EfficientVMambaForImageClassification,
    EfficientVMambaModel,
    EfficientVMambaPreTrainedModel,
)

from .suites import (
    BackboneTesterMixin,
    ConfigTester,
    ModelTesterMixin,
    PipelineTesterMixin,
    floats_tensor,
    ids_tensor,
    pipeline_mixin,
)


class EfficientVMambaModelTester:
    def __init__(self, parent):
        self.parent = parent
        self.batch_size = 2
        self.image_size = 32
        self.num_channels = 3
        self.hidden_sizes = [8, 16, 24, 32]
        self.depths = [1, 1, 2, 1]
        self.state_size = 4
        self.num_labels = 10
        self.is_training = True

    def get_config(self) -> EfficientVMambaConfig:
        return EfficientVMambaConfig(
            image_size=self.image_size,
            num_channels=self.num_channels,
            hidden_sizes=self.hidden_sizes,
            depths=self.depths,
            state_size=self.state_size,
            num_labels=self.num_labels,
            out_features=["stage2", "stage3", "stage4"],
        )

    def prepare_config_and_inputs(self):
        pixel_values = floats_tensor([self.batch_size, self.num_channels, self.image_size, self.image_size])
        return self.get_config(), pixel_values, ids_tensor([self.batch_size], self.num_labels)

    def prepare_config_and_inputs_for_common(self):
        config, pixel_values, _ = self.prepare_config_and_inputs()
        return config, {"pixel_values": pixel_values}

    def create_and_check_model(self, config, pixel_values, labels):
        model = EfficientVMambaModel(config).to(torch_device).eval()
        result = model(pixel_values)
        side = self.image_size // 32
        self.parent.assertEqual(result.last_hidden_state.shape, (self.batch_size, self.hidden_sizes[-1], side, side))
        self.parent.assertEqual(result.pooler_output.shape, (self.batch_size, self.hidden_sizes[-1]))

    def create_and_check_for_image_classification(self, config, pixel_values, labels):
        model = EfficientVMambaForImageClassification(config).to(torch_device).eval()
        result = model(pixel_values, labels=labels)
        self.parent.assertEqual(result.logits.shape, (self.batch_size, self.num_labels))
        self.parent.assertEqual(result.loss.shape, ())

    def create_and_check_backbone(self, config, pixel_values, labels):
        model = EfficientVMambaBackbone(config).to(torch_device).eval()
        result = model(pixel_values)
        self.parent.assertEqual(
            [feature_map.shape[1:] for feature_map in result.feature_maps], [(16, 4, 4), (24, 2, 2), (32, 1, 1)]
        )


# the suites look up classes by name, and skip missing ones
@mock.patch.dict(MODEL_MAPPING_NAMES, efficientvmamba="EfficientVMambaModel")
@mock.patch.dict(MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, efficientvmamba="EfficientVMambaForImageClassification")
@mock.patch.dict(MODEL_FOR_BACKBONE_MAPPING_NAMES, efficientvmamba="EfficientVMambaBackbone")
@mock.patch.dict(
    pipeline_mixin.tiny_model_summary,
    {
        name: {"tokenizer_classes": [], "processor_classes": ["BitImageProcessorPil"]}
        for name in ("EfficientVMambaModel", "EfficientVMambaForImageClassification")
    },
)
class EfficientVMambaModelTest(ModelTesterMixin, PipelineTesterMixin, unittest.TestCase):
    all_model_classes = (EfficientVMambaModel, EfficientVMambaForImageClassification, EfficientVMambaBackbone)
    pipeline_model_mapping = {
        "image-feature-extraction": EfficientVMambaModel,
        "image-classification": EfficientVMambaForImageClassification,
    }

    test_resize_embeddings = False
    has_attentions = False

    def setUp(self):
        self.model_tester = EfficientVMambaModelTester(self)
        self.config_tester = ConfigTester(
            self,
            config_class=EfficientVMambaConfig,
            has_text_modality=False,
            state_size=8,
            number=37,  # not a field: unknown arguments are kept
            common_properties=["hidden_sizes", "num_channels"],
        )

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_model(self):
        self.model_tester.create_and_check_model(*self.model_tester.prepare_config_and_inputs())

    def test_for_image_classification(self):
        self.model_tester.create_and_check_for_image_classification(*self.model_tester.prepare_config_and_inputs())

    def test_backbone(self):
        self.model_tester.create_and_check_backbone(*self.model_tester.prepare_config_and_inputs())

    @unittest.skip(reason="EfficientVMamba does not use inputs_embeds")
    def test_inputs_embeds(self):
        pass

    @unittest.skip(reason="EfficientVMamba embeds patches by a convolution, the suite expects an nn.Embedding")
    def test_model_get_set_embeddings(self):
        pass

    @unittest.skip(reason="EfficientVMamba does not use feedforward chunking")
    def test_feed_forward_chunking(self):
        pass

    def test_hidden_states_output(self):
        """Replace the suite's test, which expects hidden states of a sequence."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        asking_config = copy.deepcopy(config)
        asking_config.output_hidden_states = True

        for model_class in self.all_model_classes:
            for config_of_model, arguments in [(config, {"output_hidden_states": True}), (asking_config, {})]:
                model = model_class(config_of_model).to(torch_device).eval()
                hidden_states = model(**inputs, **arguments).hidden_states
                self.assertEqual(
                    [state.shape[1:] for state in hidden_states],
                    [(8, 8, 8), (8, 8, 8), (16, 4, 4), (24, 2, 2), (32, 1, 1)],
                )
            self.assertIsNone(model_class(config).to(torch_device).eval()(**inputs).hidden_states)

    def test_keep_in_fp32_modules(self):
        """Adapt to transformers 5.17, whose suite expects BatchNorm's integer step counters in half precision."""

        def floating_point_state(model, *args, **kwargs):
            state = torch.nn.Module.state_dict(model, *args, **kwargs)
            return {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}

        with mock.patch.object(EfficientVMambaPreTrainedModel, "state_dict", floating_point_state):
            super().test_keep_in_fp32_modules()

    # the mixin runs these two only if timm is installed, which this model does not need
    def test_pipeline_image_feature_extraction(self):
        self.run_task_tests("image-feature-extraction")

    def test_pipeline_image_feature_extraction_fp16(self):
        self.run_task_tests("image-feature-extraction", dtype="float16")

    def run_pipeline_test(self, task, repo_name, model_architecture, **kwargs):
        """Run on a new checkpoint instead of one on the Hub. Fail if the mixin cannot load and skips it."""
        with (
            tempfile.TemporaryDirectory() as folder,
            mock.patch.object(pipeline_mixin, "TRANSFORMERS_TINY_MODEL_PATH", folder),
        ):
            checkpoint = Path(folder, EfficientVMambaConfig.model_type, repo_name)
            model_architecture(self.model_tester.get_config()).save_pretrained(checkpoint)
            side = self.model_tester.image_size
            BitImageProcessorPil(size={"shortest_edge": side}, crop_size=side).save_pretrained(checkpoint)
            try:
                super().run_pipeline_test(task, repo_name, model_architecture, **kwargs)
            except unittest.SkipTest as skip:
                self.fail(skip)


class EfficientVMambaBackboneTest(BackboneTesterMixin, unittest.TestCase):
    all_model_classes = (EfficientVMambaBackbone,)
    config_class = EfficientVMambaConfig
    has_attentions = False

    def setUp(self):
        self.model_tester = EfficientVMambaModelTester(self)
