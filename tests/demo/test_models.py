"""What the demo shows of networks and pictures that are not usual."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ResNetConfig, ResNetForImageClassification

from evmamba_demo.bundled import find_bundled_model, find_examples
from evmamba_demo.interface import Demonstration, compile_kernels
from evmamba_demo.models import Models, name_models
from evmamba_hub.errors import Notice, UserError
from modeling_evmamba import EfficientVMambaConfig, EfficientVMambaForImageClassification


def save_model(folder: Path, num_channels: int) -> Path:
    """Save a network of ten classes with the image processor of the digits."""
    torch.manual_seed(0)
    config = EfficientVMambaConfig(
        num_channels=num_channels, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], num_labels=10
    )
    EfficientVMambaForImageClassification(config).save_pretrained(folder)
    shutil.copyfile(find_bundled_model() / "preprocessor_config.json", folder / "preprocessor_config.json")
    return folder


@pytest.fixture
def picture(tmp_path) -> str:
    Image.open(find_examples()[3]).convert("RGB").save(tmp_path / "picture.png")
    return str(tmp_path / "picture.png")


def test_a_network_of_one_channel_is_shown(tmp_path, picture):
    models = Models([str(save_model(tmp_path / "gray", 1)), str(find_bundled_model())], allow_any=False)
    demonstration = Demonstration(models)
    compile_kernels(models)  # as before the first visitor
    scores, view, _ = demonstration.classify(picture)
    assert len(scores) == 5
    assert view.mode == "RGB" and (np.asarray(view) == np.asarray(view)[..., :1]).all()
    label = next(iter(scores))
    for view, _ in (
        demonstration.activation_map(picture, label, 4, 60),
        demonstration.scan_paths(picture, 1, 50),
        demonstration.receptive_field(picture, 2, 50, 50),
    ):
        assert view.size == (448, 448)
    assert "They took" in demonstration.compare(picture, "gray", models.names[1])[2]


def test_predictions_come_from_optimized_copies_and_explanations_from_the_network(picture):
    """The copy computes no gradients, and its blocks have other parts."""
    digits = str(find_bundled_model())
    found = {}
    for optimize in (True, False):
        models = Models([digits], allow_any=True, optimize=optimize, device="cpu")
        assert models.shown.execution.optimized == models.load(f"{digits}/").execution.optimized == optimize
        assert (models.shown.model is models.network) != optimize
        demonstration = Demonstration(models)
        assert demonstration.model is models.network
        scores, _, described = demonstration.classify(picture)
        assert f"on cpu in float32, {'optimized' if optimize else 'as it is'} (backend: " in described
        view, _ = demonstration.activation_map(picture, "3", 2, 60)
        found[optimize] = scores, np.asarray(view)
    assert found[True][0] == pytest.approx(found[False][0], abs=1e-6)
    np.testing.assert_array_equal(found[True][1], found[False][1])


def test_a_network_that_cannot_be_optimized_is_shown_as_it_is(tmp_path, picture):
    folder = save_model(tmp_path / "model", 3)
    ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=10)
    ).save_pretrained(tmp_path / "resnet")
    shutil.copyfile(folder / "preprocessor_config.json", tmp_path / "resnet" / "preprocessor_config.json")
    models = Models([str(folder), str(tmp_path / "resnet")], allow_any=False, device="cpu")
    with pytest.warns(Notice, match="the model runs as it is: .* got a ResNetForImageClassification") as notices:
        for _ in range(2):
            assert "They took" in Demonstration(models).compare(picture, "model", "resnet")[2]
    assert len(notices) == 1


def test_models_of_equal_names_are_told_apart(tmp_path):
    folders = [tmp_path / name for name in ("runs/few/model", "runs/many/model", "digits", "someone/tiny", "tiny")]
    for folder in folders:
        folder.mkdir(parents=True)
    (tmp_path / "link").symlink_to(folders[0])
    few, many, digits, someone, tiny = map(str, folders)
    assert list(name_models([few, many])) == ["few/model", "many/model"]
    bundled = find_bundled_model()
    assert name_models([digits, str(bundled)]) == {
        f"{tmp_path.name}/digits": digits,
        f"{bundled.parent.name}/digits": str(bundled),
    }
    assert name_models([few, f"{few}/", str(tmp_path / "link"), "someone/x", "someone/x"]) == {
        "model": few,
        "someone/x": "someone/x",
    }
    assert name_models([someone, tiny, "someone/tiny", "tiny"]) == {
        f"{tmp_path.name}/someone/tiny": someone,
        f"{tmp_path.name}/tiny": tiny,
        "someone/tiny": "someone/tiny",
        "tiny": "tiny",
    }


@pytest.mark.parametrize("num_channels", [2, 4])
def test_a_network_of_other_channels_is_refused(tmp_path, num_channels):
    with pytest.raises(UserError, match=f"the network takes {num_channels} channels, image files are read as gray"):
        Models([str(save_model(tmp_path / "model", num_channels))], allow_any=False)


def test_a_dark_picture_is_announced_each_time_without_its_path(tmp_path):
    Image.fromarray(np.full((32, 32), 4095, dtype=np.uint16)).save(tmp_path / "dark.png")
    demonstration = Demonstration(Models([str(find_bundled_model())], allow_any=False))
    for _ in range(2):
        with pytest.warns(UserWarning, match="it uses 12 of its 16 bits and is read as dark") as notices:
            demonstration.classify(str(tmp_path / "dark.png"))
        assert not any(str(tmp_path) in str(notice.message) for notice in notices)


def test_a_damaged_picture_is_explained(tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "damaged.qoi")
    (tmp_path / "damaged.qoi").write_bytes((tmp_path / "damaged.qoi").read_bytes()[:15])
    demonstration = Demonstration(Models([str(find_bundled_model())], allow_any=False))
    with pytest.raises(Exception, match="This file cannot be shown to the network: it cannot be decoded"):
        demonstration.classify(str(tmp_path / "damaged.qoi"))
