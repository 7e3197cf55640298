"""What commands say of a path in the place of a model that is no directory of a model."""

import os
import shutil
import socket
from itertools import product
from pathlib import Path

import pytest

from evmamba_demo.bundled import find_bundled_model, find_examples
from evmamba_hub.client import fetch_model
from evmamba_hub.errors import UserError
from evmamba_hub.info import find_configs
from evmamba_hub.model_folder import load_config
from modeling_evmamba import EfficientVMambaConfig


@pytest.fixture
def run_dir(tmp_path) -> Path:
    """A directory as a run leaves it, with the model in a directory of its own, and files of other kinds."""
    shutil.copytree(find_bundled_model(), tmp_path / "run" / "model")
    for name in ("last.ckpt", "best.PTH", "a.pth.tar", "lone.safetensors", "model.onnx", "model.pt2", "flowers.zip"):
        (tmp_path / "run" / name).write_bytes(b"x")
    (tmp_path / "run" / "notes.txt").write_text("x")
    (tmp_path / "run" / "empty").mkdir()
    (tmp_path / "run" / "other").mkdir()
    (tmp_path / "run" / "other" / "notes.txt").write_text("x")
    return tmp_path / "run"


@pytest.mark.parametrize("read", [fetch_model, find_configs, load_config])
@pytest.mark.parametrize(
    "name, messages",
    [
        (
            "model/model.safetensors",
            ["is a file, and a model is a directory: give the directory of the file, ", "/model"],
        ),
        ("model/config.json", ["give the directory of the file, ", "/model"]),
        ("model/README.md", ["give the directory of the file, ", "/model"]),
        ("lone.safetensors", ["is a file", "`evmamba convert`"]),
        ("last.ckpt", ["is a file", "`evmamba convert`"]),
        ("best.PTH", ["is a file", "`evmamba convert`"]),
        ("a.pth.tar", ["is a file", "`evmamba convert`"]),
        ("model.onnx", ["is a file", "that it was exported from"]),
        ("model.pt2", ["is a file", "that it was exported from"]),
        ("flowers.zip", ["is a file", "unpack it first"]),
        ("notes.txt", ["is a file", "`save_pretrained`, `evmamba convert` or `evmamba train`"]),
        ("empty", ["empty is empty: give a directory that `save_pretrained`"]),
        ("other", ["holds no config.json: give a directory that `save_pretrained`"]),
        (".", ["holds no config.json: give a directory in it, ", "/run/model"]),
    ],
)
def test_paths_that_are_no_model(run_dir, read, name, messages):
    path = run_dir / name
    with pytest.raises(UserError) as error:
        read(path if read is load_config else str(path))
    assert str(error.value).startswith(str(path))
    assert all(message in str(error.value) for message in messages), error.value


COMMANDS = ["classify", "evaluate", "export", "check-runtimes", "demo"]


@pytest.mark.parametrize(
    "command, name",
    [
        *product([*COMMANDS, "push", "train"], ["model/model.safetensors", "other"]),
        *product(COMMANDS, ["backbone"]),  # which transformers would give a random head
    ],
)
def test_every_command_refuses_them_in_one_line(evmamba, run_dir, tmp_path, command, name):
    EfficientVMambaConfig(architectures=["EfficientVMambaBackbone"]).save_pretrained(run_dir / "backbone")
    model, examples = run_dir / name, find_examples()
    (tmp_path / "images" / "three").mkdir(parents=True)
    shutil.copyfile(examples[3], tmp_path / "images" / "three" / "3.png")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    arguments = {
        "classify": [examples[0], "--model", model],
        "evaluate": [model, "--dataset", tmp_path / "images"],
        "export": [model, tmp_path / "model.onnx"],
        "check-runtimes": [model],
        "push": [model, "someone/model"],
        "train": ["--model", model, "--dataset", tmp_path / "images", "--output-dir", tmp_path / "trained"],
        "demo": ["--model", model, "--port", port],
    }
    code, out, err = evmamba(command, *arguments[command])
    assert (code, out) == (1, "") and err.strip().startswith(f"Error: {model} ") and err.strip().count("\n") == 0
    messages = {"other": "holds no config.json", "backbone": "holds no image classifier but EfficientVMambaBackbone"}
    assert messages.get(name, "is a file, and a model is a directory") in err
    assert not (tmp_path / "model.onnx").exists() and not (tmp_path / "trained" / "model").exists()


def test_a_repository_that_is_no_model(hub):
    hub.create("someone/original", {"checkpoint.pth": b"x", "README.md": b"x"})
    with pytest.raises(UserError, match=r"^someone/original .*`evmamba convert`"):
        fetch_model("someone/original")


def test_links_to_a_model_are_followed(run_dir):
    os.symlink(run_dir / "model", run_dir / "link")
    assert fetch_model(str(run_dir / "link")) == run_dir / "link"
