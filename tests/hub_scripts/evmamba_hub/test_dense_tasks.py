"""What commands do with segmentation models and detectors around the backbone."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    PreTrainedModel,
    ResNetConfig,
    SegformerConfig,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    pipeline,
)

from dense_models import DETECTOR, IMAGE_PROCESSORS, SEGMENTER, save_dense_model
from evmamba_demo.bundled import find_examples, find_photographs
from evmamba_hub.errors import UserError
from evmamba_hub.info import find_configs
from evmamba_hub.model_folder import load_config
from evmamba_hub.publish.bundle import find_remote_code
from evmamba_hub.publish.push import collect_model_files
from weights import assert_same_weights


SEGMENTATION = (SEGMENTER, "a segmentation model", "image-segmentation", "examples/semantic_segmentation.py")
DETECTION = (DETECTOR, "a detector", "object-detection", "examples/object_detection.py")


RESULTS = {
    "model": "someone/model",
    "classes": 3,
    "dataset": "someone/flowers",
    "dataset_id": "someone/flowers",
    "dataset_config": None,
    "dataset_split": "test",
    "dataset_revision": None,
    "top1": 0.5,
    "loss": 0.5,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A directory for each head that has an image processor."""
    folder = tmp_path_factory.mktemp("models")
    return {name: save_dense_model(folder / name, name) for name in IMAGE_PROCESSORS}


def load(folder: Path) -> PreTrainedModel:
    (name,) = AutoConfig.from_pretrained(folder).architectures
    return getattr(transformers, name).from_pretrained(folder)


@pytest.mark.parametrize("name, noun, task, program", [SEGMENTATION, DETECTION], ids=["segmenter", "detector"])
@pytest.mark.parametrize(
    "command",
    [
        "classify",
        "evaluate",
        "export",
        "onnx-hub",
        "check-runtimes",
        "push-with-onnx",
        "push-results",
        "train",
        "push-space",
    ],
)
def test_commands_for_classifiers_name_what_runs_the_model(
    evmamba, folders, tmp_path, command, name, noun, task, program
):
    model, image = folders[name], find_examples()[3]
    for digit in ("three", "four"):
        (tmp_path / "images" / digit).mkdir(parents=True)
        shutil.copyfile(image, tmp_path / "images" / digit / "image.png")
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    arguments = {
        "classify": ["classify", image, "--model", model],
        "evaluate": ["evaluate", model, "--dataset", tmp_path / "images"],
        "export": ["export", model, tmp_path / "out.onnx"],
        "onnx-hub": ["export", model, tmp_path / "out", "--format", "onnx-hub"],
        "check-runtimes": ["check-runtimes", model],
        "push-with-onnx": ["push", model, "someone/model", "--dry-run", "--with-onnx"],
        "push-results": ["push", model, "someone/model", "--dry-run", "--results", tmp_path / "results.json"],
        "train": ["train", "--model", model, "--dataset", tmp_path / "images", "--output-dir", tmp_path / "out"],
        "push-space": ["push-space", "someone/space", "--model", model, "--static", "--dry-run"],
    }
    code, out, err = evmamba(*arguments[command])
    assert (code, out) == (1, "")
    line = err.strip().splitlines()[-1]
    assert line == (
        f'Error: {model} is {noun} ({name}) and no classifier: run it with pipeline("{task}") or `evmamba demo`, '
        f"and measure it with {program}"
    )
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("read", [load_config, lambda folder: find_configs(str(folder))], ids=["load", "find"])
def test_a_checkpoint_of_a_network_is_no_head(folders, read):
    with pytest.raises(UserError, match=r"is a detector .* and no classifier"):
        read(folders[DETECTOR])


@pytest.mark.parametrize("name", IMAGE_PROCESSORS)
def test_info_counts_the_whole_model(evmamba, folders, name):
    code, out, _ = evmamba("info", folders[name], "--image-size", 96)
    assert code == 0
    assert f"{load(folders[name]).num_parameters():,}" in out


def test_info_names_a_size_that_the_head_does_not_take(evmamba, folders):
    code, _, err = evmamba("info", folders[DETECTOR], "--image-size", 100)
    assert code == 1
    assert "RTDetrForObjectDetection does not take one image of 100 x 100 pixels alone: " in err


@pytest.mark.parametrize("command", ["info", "push", "demo"])
def test_other_networks_are_refused(evmamba, tmp_path, command):
    config = UperNetConfig(
        backbone_config=ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1]),
        hidden_size=8,
        auxiliary_in_channels=8,
        auxiliary_channels=8,
    )
    UperNetForSemanticSegmentation(config).save_pretrained(tmp_path / "resnet")
    SegformerConfig(architectures=["SegformerForSemanticSegmentation"]).save_pretrained(tmp_path / "segformer")
    for name in ("resnet", "segformer"):
        arguments = {
            "info": ["info", tmp_path / name],
            "push": ["push", tmp_path / name, "someone/model", "--dry-run"],
            "demo": ["demo", "--model", tmp_path / name],
        }
        code, out, err = evmamba(*arguments[command])
        assert (code, out) == (1, "") and err.strip().count("\n") == 0
        assert "is a segmentation model (" in err and err.strip().endswith(
            "with another backbone: give one with an EfficientVMamba"
        )


@pytest.mark.parametrize("name", IMAGE_PROCESSORS)
def test_push_and_load(evmamba, hub, folders, name):
    code, _, err = evmamba("push", folders[name], "someone/dense")
    assert code == 0, err
    files = hub.repos["model", "someone/dense"].files()
    card = ModelCard(files["README.md"].decode())
    task = "object-detection" if "Detection" in name else "image-segmentation"
    assert card.data.pipeline_tag == task and card.data.library_name == "transformers"
    config = json.loads(files["config.json"])
    assert config["auto_map"] == {"AutoConfig": f"heads_evmamba.{getattr(transformers, name).config_class.__name__}"}
    assert files.keys() >= find_remote_code(config["auto_map"]).keys()
    loaded = pipeline(task, model="someone/dense")
    assert type(loaded.model).__name__ == name
    saved = type(loaded.model).from_pretrained(folders[name])
    assert_same_weights(loaded.model.state_dict(), saved.state_dict())
    assert isinstance(loaded(str(find_photographs()[0])), list)


@pytest.mark.parametrize("name", [SEGMENTER, DETECTOR])
def test_the_card_of_a_head(folders, name):
    text = collect_model_files(folders[name], "someone/dense")["README.md"].decode()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        compile(block, "card", "exec")
        assert '"someone/dense"' in block
    assert f"{load(folders[name]).num_parameters():,} parameters" in text
    assert f"of 3 classes, a {name} of transformers with an EfficientVMamba of another size as its backbone." in text
    assert "{" not in text.split("```bibtex")[0] and "\n\n\n" not in text


@pytest.mark.parametrize(
    "damage, message",
    [
        ("pickle", "holds no model.safetensors: save the model with `save_pretrained`; pickles are not read"),
        ("no processor", "holds no preprocessor_config.json: save the image processor there"),
        ("truncated", "the weights in .* are damaged, save the model again: "),
        ("missing", "the weights do not fit RTDetrForObjectDetection with this config.json: 1 tensors are missing"),
        ("shape", "the weights do not fit RTDetrForObjectDetection with this config.json: "),
        ("config", "config.json is damaged: "),
        ("no config", "config.json is missing or damaged: "),
    ],
)
@pytest.mark.parametrize("command", ["push", "demo"])
def test_damaged_directories_are_refused(evmamba, folders, tmp_path, command, damage, message):
    folder = tmp_path / "model"
    shutil.copytree(folders[DETECTOR], folder)
    weights, config = folder / "model.safetensors", folder / "config.json"
    if damage == "pickle":
        torch.save(load_file(weights), folder / "pytorch_model.bin")
        weights.unlink()
    elif damage == "no processor":
        (folder / "preprocessor_config.json").unlink()
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:100])
    elif damage == "missing":
        tensors = load_file(weights)
        del tensors[min(tensors)]
        save_file(tensors, weights, metadata={"format": "pt"})
    elif damage == "shape":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"num_queries": 4, "encoder_ffn_dim": 16}))
    elif damage == "config":
        fields = json.loads(config.read_text())
        fields["backbone_config"]["depths"] = [1]
        config.write_text(json.dumps(fields))
    else:
        config.write_text("[]")
    arguments = {"push": ["push", folder, "someone/model", "--dry-run"], "demo": ["demo", "--model", folder]}
    code, out, err = evmamba(*arguments[command])
    assert (code, out) == (1, "") and err.strip().count("\n") == 0, err
    assert re.search(message, err), err
