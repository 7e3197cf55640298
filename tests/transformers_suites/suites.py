"""Make the fetched suites importable. `missing` replaces the parts that the source distribution leaves out."""

import importlib.util
import os
import re
import sys
import warnings

import pytest

from . import missing
from .fetch import fetch_suites


try:
    folder = fetch_suites()
except ConnectionError as error:
    if os.environ.get("CI") == "true":
        raise
    pytest.skip(
        f"`python tests/transformers_suites/fetch.py` must download transformers' test suites once: {error}",
        allow_module_level=True,
    )

# under another name, since this repository also has a directory `tests`
spec = importlib.util.spec_from_file_location("transformers_tests", folder / "tests/__init__.py")
sys.modules[spec.name] = importlib.util.module_from_spec(spec)

pipeline_tests = re.findall(r"pipelines\.test_pipelines_\w+", (folder / "tests/test_pipeline_mixin.py").read_text())
for module in ["exporters.test_export", "generation.test_utils", "utils.test_configuration_utils", *pipeline_tests]:
    sys.modules[f"{spec.name}.{module}"] = missing
    sys.modules[f"tests.{module}"] = missing  # recent versions name the tests of pipelines by this path

with warnings.catch_warnings():
    warnings.simplefilter("ignore", pytest.PytestUnknownMarkWarning)  # marks that transformers' conftest.py registers
    backbone_common = importlib.import_module("transformers_tests.test_backbone_common")
    configuration_common = importlib.import_module("transformers_tests.test_configuration_common")
    modeling_common = importlib.import_module("transformers_tests.test_modeling_common")
    pipeline_mixin = importlib.import_module("transformers_tests.test_pipeline_mixin")

BackboneTesterMixin = backbone_common.BackboneTesterMixin
ConfigTester = configuration_common.ConfigTester
ModelTesterMixin = modeling_common.ModelTesterMixin
floats_tensor = modeling_common.floats_tensor
ids_tensor = modeling_common.ids_tensor
PipelineTesterMixin = pipeline_mixin.PipelineTesterMixin
