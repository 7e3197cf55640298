"""`evmamba export --format onnx-hub`: the files that transformers.js and ONNX Runtime load, or none."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import yaml
from onnxruntime import InferenceSession
from transformers import BitImageProcessorPil, ViTImageProcessorPil
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from evmamba_demo.bundled import find_photographs
from evmamba_hub.errors import Notice
from evmamba_hub.export.export import load_exportable
from evmamba_hub.export.onnx_files import ONNX_FILES, check_for_javascript
from evmamba_hub.inference.classify import classify_files, load_classifier
from evmamba_hub.publish.card_metadata import add_usage
from evmamba_hub.publish.onnx_folder import export_onnx_folder
from evmamba_hub.publish.push import collect_model_files, push_model
from modeling_evmamba import EfficientVMambaBackbone, EfficientVMambaConfig, EfficientVMambaForImageClassification


LABELS = ["bird", "cat", "dog", "été"]
CARD = '---\nlicense: mit\n---\n# Pets\n\npipeline(model="someone/dogs")\n'
BOUNDS = {"float32": 1e-5, "float16": 1e-2, "int8": 1e-1}


def save_model(folder: Path, **options) -> Path:
    """Save a small network of both block types. Its image processor names few of its settings."""
    settings = {
        "hidden_sizes": [8, 16],
        "depths": [1, 1],
        "block_types": ["evss", "inverted_residual"],
        "state_size": 4,
        "image_size": 32,
        "id2label": dict(enumerate(LABELS)),
        "label2id": {label: idx for idx, label in enumerate(LABELS)},
    }
    torch.manual_seed(1)
    model = EfficientVMambaForImageClassification(EfficientVMambaConfig(**(settings | options)))
    torch.nn.init.normal_(model.classifier.weight)
    model.save_pretrained(folder)
    processor = {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 40}, "crop_size": 32}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    """A model whose card names a license, and whose configuration names remote code."""
    folder = save_model(tmp_path_factory.mktemp("models") / "pets")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_evmamba.EfficientVMambaConfig"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "README.md").write_text(CARD)
    return folder


@pytest.fixture(scope="module")
def exported(model_dir, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "new" / "pets-onnx"
    names = []
    export_onnx_folder(str(model_dir), folder, before_file=names.append)
    assert names == list(ONNX_FILES.values())
    return folder


def list_files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.slow
def test_what_is_written(exported):
    own = ["README.md", "config.json", "preprocessor_config.json"]
    assert list_files(exported) == sorted([*own, *ONNX_FILES.values()])
    assert set(ONNX_FILES.values()) == {"onnx/model.onnx", "onnx/model_fp16.onnx", "onnx/model_quantized.onnx"}
    assert [path.name for path in exported.parent.iterdir()] == [exported.name]


@pytest.mark.slow
@pytest.mark.parametrize("dtype, name", ONNX_FILES.items())
def test_files_take_and_return_float32(exported, model_dir, dtype, name):
    session = InferenceSession(exported / name, providers=["CPUExecutionProvider"])
    model = EfficientVMambaForImageClassification.from_pretrained(model_dir).eval()
    pixel_values = torch.randn(3, 3, 37, 45, generator=torch.Generator().manual_seed(0))
    (logits,) = session.run(["logits"], {"pixel_values": pixel_values.numpy()})
    assert logits.dtype == np.float32
    with torch.no_grad():
        expected = model(pixel_values).logits
    assert expected.std(0).min() > 1e-2
    difference = np.abs(logits - expected.numpy()).max() / max(1, expected.abs().max().item())
    assert difference < BOUNDS[dtype]
    weights = onnx.load(exported / name).graph.initializer
    types = {onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in weights if len(tensor.dims) == 2}
    assert {"float32": "FLOAT", "float16": "FLOAT16", "int8": "INT8"}[dtype] in types


@pytest.mark.slow
def test_configuration_and_image_processor_are_those_of_the_model(exported, model_dir):
    config, original = (json.loads((folder / "config.json").read_text()) for folder in (exported, model_dir))
    del original["auto_map"]  # the code is not in the directory
    assert config == original
    written = json.loads((exported / "preprocessor_config.json").read_text())
    # transformers.js has other defaults: no normalization, no crop, bilinear
    assert {"do_normalize", "do_center_crop", "resample", "rescale_factor", "image_mean"} < written.keys()
    assert (written["crop_size"], written["resample"]) == ({"height": 32, "width": 32}, 3)
    picture = np.random.default_rng(0).integers(0, 256, (50, 41, 3), dtype=np.uint8)
    ours, theirs = (
        AutoImageProcessor.from_pretrained(folder)(picture, return_tensors="np").pixel_values
        for folder in (exported, model_dir)
    )
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
def test_the_card(exported):
    text = (exported / "README.md").read_text(encoding="utf-8")
    metadata = yaml.safe_load(text.split("---\n")[1])
    assert (metadata["library_name"], metadata["pipeline_tag"]) == ("onnx", "image-classification")
    assert metadata["license"] == "mit" and "base_model" not in metadata
    assert all(f"| `{name}` | " in text for name in ONNX_FILES.values())
    assert "a classifier of 4 classes" in text and "{%" not in text and "{{" not in text
    (script,) = re.findall(r"```js\n(.*?)```", text, re.DOTALL)
    assert 'const id = "your-name/pets-onnx";' in script


@pytest.mark.slow
def test_the_python_of_the_card_needs_neither_pytorch_nor_this_package(hub, exported, model_dir, tmp_path):
    """It runs as it stands, on a repository."""
    card = (exported / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert code.count('"your-name/pets-onnx"') == 2
    hub.create("your-name/pets-onnx", {name: (exported / name).read_bytes() for name in list_files(exported)})
    shutil.copy(find_photographs()[0], tmp_path / "photo.jpg")
    code += '\nimport sys\nassert not {"modeling_evmamba", "evmamba_kernels"} & sys.modules.keys()'
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    completed = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert completed.returncode == 0, completed.stderr
    (image,) = classify_files(load_classifier(str(model_dir), "cpu", "float32"), [tmp_path / "photo.jpg"], top_k=1)
    assert completed.stdout.strip() == image.predictions[0]["label"]


@pytest.mark.slow
def test_a_model_of_the_hub(evmamba, hub, model_dir, tmp_path):
    names = [name for name in list_files(model_dir) if name != "README.md"]
    hub.create("someone/pets", {name: model_dir / name for name in names})
    code, out, err = evmamba("export", "someone/pets", tmp_path / "pets", "--format", "onnx-hub")
    assert code == 0, err
    assert "3 ONNX files" in out and all(name in out for name in ONNX_FILES.values()) and "1 x 32 x 32" in out
    card = (tmp_path / "pets" / "README.md").read_text(encoding="utf-8")
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == "someone/pets"
    assert "[someone/pets](https://huggingface.co/someone/pets)" in card


# Rejected input


def test_a_directory_that_is_not_empty(evmamba, model_dir, tmp_path):
    (tmp_path / "file").write_text("mine")
    for taken in (tmp_path, tmp_path / "file", model_dir):
        before = list_files(tmp_path)
        code, _, err = evmamba("export", model_dir, taken, "--format", "onnx-hub")
        assert code == 1 and f"{taken} exists already: remove it or choose another directory" in err
        assert list_files(tmp_path) == before


def test_a_damaged_card_is_found_before_the_work(evmamba, tmp_path):
    (save_model(tmp_path / "model") / "README.md").write_text("---\nlicense: [\n---\n")
    code, out, err = evmamba("export", tmp_path / "model", tmp_path / "new", "--format", "onnx-hub")
    assert (code, out) == (1, "") and "the metadata of the card cannot be read" in err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("options", [["--dtype", "float32"], ["--half-inputs"]], ids=" ".join)
def test_one_dtype_is_not_for_the_directory(evmamba, model_dir, tmp_path, options):
    code, _, err = evmamba("export", model_dir, tmp_path / "new", "--format", "onnx-hub", *options)
    assert code == 1 and "the format onnx-hub writes a file of every dtype, which take float32: leave" in err
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_of_a_model_that_does_not_match(evmamba, tmp_path):
    model = EfficientVMambaForImageClassification.from_pretrained(save_model(tmp_path / "broken"))
    model.classifier.weight.data[0, 0] = math.nan
    model.save_pretrained(tmp_path / "broken")
    (tmp_path / "empty").mkdir()
    code, _, err = evmamba("export", tmp_path / "broken", tmp_path / "empty", "--format", "onnx-hub")
    assert code == 1 and "onnx/model.onnx: the logits of the export differ from PyTorch's" in err
    assert err.count("Error:") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "empty"]
    assert list((tmp_path / "empty").iterdir()) == []


@pytest.mark.parametrize("format, output", [("onnx", "model.onnx"), ("onnx-hub", "folder")])
def test_a_class_without_a_label(evmamba, tmp_path, format, output):
    model = save_model(tmp_path / "model", id2label={0: "bird", 2: "dog"}, label2id={"bird": 0, "dog": 2})
    code, _, err = evmamba("export", model, tmp_path / output, "--format", format)
    assert code == 1 and "id2label in config.json has no label for class 1: name the classes 0 to 1" in err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_without_the_extra(evmamba, model_dir, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    code, _, err = evmamba("export", model_dir, tmp_path / "new", "--format", "onnx-hub")
    assert code == 1 and 'run pip install ".[export]" in a clone of the repository' in err
    assert list(tmp_path.iterdir()) == []


# Upload with the model

REPO_ID = "someone/pets"


@pytest.mark.slow
def test_a_model_with_its_onnx_files(evmamba, hub, model_dir):
    code, out, err = evmamba("push", model_dir, REPO_ID, "--with-onnx", "--dry-run")
    assert code == 0, err
    assert hub.requests == []
    assert all(re.search(rf"{name} +│ +\d", out) for name in ONNX_FILES.values())
    assert "onnx/model*.onnx" in out and f'const id = "{REPO_ID}";' in out

    code, _, err = evmamba("push", model_dir, REPO_ID, "--with-onnx")
    assert code == 0 and "the examples in the card load someone/dogs" in err
    repo = hub.repos["model", REPO_ID]
    assert len(repo.history) == 2
    files = repo.files()
    assert files.keys() >= {"model.safetensors", "modeling_evmamba.py", *ONNX_FILES.values()}
    assert files["README.md"].decode().startswith(f"{CARD}\n## In JavaScript and ONNX Runtime\n\n")
    assert (model_dir / "README.md").read_text() == CARD
    assert json.loads(files["preprocessor_config.json"])["do_normalize"] is True
    session = InferenceSession(files["onnx/model.onnx"], providers=["CPUExecutionProvider"])
    assert json.loads(session.get_modelmeta().custom_metadata_map["labels"]) == LABELS

    assert "no commit was made" in evmamba("push", model_dir, REPO_ID, "--with-onnx")[1]


def test_onnx_files_of_an_earlier_upload_are_replaced(hub, model_dir):
    old = dict.fromkeys(["onnx/model.onnx", "onnx/model_q4.onnx", "onnx/model.onnx_data"], b"old")
    others = dict.fromkeys(["onnx/decoder.onnx", "model.onnx", "onnx/readme.txt"], b"other")
    hub.create(REPO_ID, old | others)
    files = collect_model_files(model_dir, REPO_ID) | dict.fromkeys(ONNX_FILES.values(), b"new")
    push_model(REPO_ID, files, message="Upload")
    found = hub.repos["model", REPO_ID].files()
    assert {name for name, content in found.items() if content == b"new"} == set(ONNX_FILES.values())
    assert found.keys() >= others.keys()
    assert not found.keys() & {"onnx/model_q4.onnx", "onnx/model.onnx_data"}


def test_new_weights_beside_old_onnx_files_are_announced(evmamba, hub, model_dir, tmp_path):
    """The files stay, as other variants of the weights do."""
    shutil.copytree(model_dir, tmp_path / "model")
    hub.create(REPO_ID, {"onnx/model_q4.onnx": b"old", "onnx/decoder.onnx": b"other"})
    notice = f"{REPO_ID} still holds onnx/model_q4.onnx beside new weights: add --with-onnx"
    assert notice in evmamba("push", tmp_path / "model", REPO_ID)[2]
    assert "onnx/model_q4.onnx" in hub.repos["model", REPO_ID].files()

    (tmp_path / "model" / "README.md").write_text("# Other words\n")
    _, out, err = evmamba("push", tmp_path / "model", REPO_ID)
    assert "Uploaded" in out and "still holds" not in err  # the weights are the same
    assert "still holds" not in evmamba("push", tmp_path / "model", REPO_ID)[2]

    model = EfficientVMambaForImageClassification.from_pretrained(model_dir)
    model.classifier.bias.data += 1
    model.save_pretrained(tmp_path / "model", max_shard_size="5KB")
    (tmp_path / "model" / "model.safetensors").unlink()
    assert notice in evmamba("push", tmp_path / "model", REPO_ID)[2]


def test_onnx_files_need_a_classifier(evmamba, hub, tmp_path):
    config = EfficientVMambaConfig(hidden_sizes=[8] * 4, depths=[1] * 4)
    EfficientVMambaBackbone(config).save_pretrained(tmp_path)
    BitImageProcessorPil().save_pretrained(tmp_path)
    code, out, err = evmamba("push", tmp_path, REPO_ID, "--with-onnx")
    assert (code, out) == (1, "") and "holds no image classifier but EfficientVMambaBackbone" in err
    assert hub.requests == []


USAGE = "## In JavaScript\n\ntext\n"


@pytest.mark.parametrize(
    "card, expected",
    [
        ("# Pets\n", "# Pets\n\n## In JavaScript\n\ntext\n"),
        ("# Pets", "# Pets\n\n## In JavaScript\n\ntext\n"),
        (
            "# A\n\n## How to use\n\nwords\n\n### More\n\n## Size\nsmall\n",
            "# A\n\n## How to use\n\nwords\n\n### More\n\n## In JavaScript\n\ntext\n\n## Size\nsmall\n",
        ),
        ("## How to use\n\nwords\n", "## How to use\n\nwords\n\n## In JavaScript\n\ntext\n"),
        ("# Pets\r\n\r\nwords\r\n", "# Pets\r\n\r\nwords\r\n\r\n## In JavaScript\r\n\r\ntext\r\n"),
    ],
)
def test_the_section_of_a_card(card, expected):
    assert add_usage(card, USAGE) == expected


# What transformers.js does otherwise


@pytest.mark.parametrize(
    "num_channels, processor, notice",
    [
        (3, BitImageProcessorPil(), None),
        (1, BitImageProcessorPil(), "gives 3 channels to the network, which takes 1"),
        (4, BitImageProcessorPil(), "gives 3 channels to the network, which takes 4"),
        (3, ViTImageProcessorPil(), "may know no ViTImageProcessor, or differ from it"),
    ],
)
def test_differences_of_transformers_js_are_announced(tmp_path, recwarn, num_channels, processor, notice):
    model = save_model(tmp_path / "model", num_channels=num_channels)
    processor.save_pretrained(model)
    check_for_javascript(load_exportable(str(model), "float32"))
    found = [str(warning.message) for warning in recwarn if warning.category is Notice]
    assert len(found) == (notice is not None)
    assert notice is None or notice in found[0]
