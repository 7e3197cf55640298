"""What both programs for dense tasks read from the Hub and upload to it, on the Hub of the tests."""

import json
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import datasets
import pytest
from accelerate.state import AcceleratorState
from huggingface_hub import ModelCard
from transformers import AutoModelForObjectDetection, AutoModelForSemanticSegmentation, pipeline
from transformers.utils import logging

from evmamba_hub.cli.console import create_app, run_app
from examples import object_detection, semantic_segmentation
from examples.draw_shapes import CLASSES, draw_shapes
from hub_server import Fault, HubServer
from training_runs import read_log
from weights import assert_same_weights


NETWORK = {"patch_size": 2, "hidden_sizes": [8, 12, 16, 24], "depths": [1, 1, 1, 1], "state_size": 2}
QUICK = ["--network", json.dumps(NETWORK), "--image-size=32", "--hidden-size=32", "--steps=2", "--batch-size=4"]
PROGRAMS = {
    "image-segmentation": (semantic_segmentation.main, AutoModelForSemanticSegmentation, []),
    "object-detection": (
        object_detection.main,
        AutoModelForObjectDetection,
        ["--decoder-layers=2", "--num-queries=8"],
    ),
}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shapes"
    draw_shapes(folder, training_images=8, validation_images=2, size=(32, 32), seed=0)
    return folder


@pytest.fixture(params=PROGRAMS)
def task(request) -> str:
    return request.param


@pytest.fixture
def train(task, shapes, tmp_path, monkeypatch, capsys) -> Callable[..., tuple[int, str]]:
    """Run a program for seconds, and return the exit code and stderr: `train("--option=value")`."""
    main, _, options = PROGRAMS[task]

    def run(*words: str) -> tuple[int, str]:
        AcceleratorState._reset_state(reset_partial_state=True)  # left by the last run in this process
        base = [f"--dataset={shapes}", f"--output-dir={tmp_path / 'run'}", "--num-workers=0", "--report-to=none"]
        monkeypatch.setattr(sys, "argv", ["program.py", *QUICK, *options, *base, *words])
        app = create_app()
        app.command()(main)
        with pytest.raises(SystemExit) as exit_info:
            run_app(app)
        logging.enable_progress_bar()
        return exit_info.value.code or 0, capsys.readouterr().err

    return run


def find_error(err: str) -> str:
    """Return the only line that is an error, which ends the output."""
    assert err.count("Error:") == 1 and "Traceback" not in err
    return err[err.index("Error:") :].strip()


def test_the_model_is_uploaded(train, task, hub, tmp_path):
    code, err = train("--push-to=someone/shapes")
    assert code == 0, err
    assert f"Uploaded {hub.endpoint}/someone/shapes" in err
    files = hub.repos["model", "someone/shapes"].files()
    card = ModelCard(files["README.md"].decode())
    assert card.data.pipeline_tag == task and "someone/shapes" in card.text and "your-name" not in card.content
    loaded, saved = (
        PROGRAMS[task][1].from_pretrained(source) for source in ("someone/shapes", tmp_path / "run" / "model")
    )
    assert_same_weights(loaded.state_dict(), saved.state_dict())
    assert pipeline(task, model="someone/shapes").model.config.id2label == saved.config.id2label


def test_without_a_token_nothing_begins(train, hub, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    code, err = train("--push-to=someone/shapes")
    assert code == 1
    assert find_error(err) == err.strip() and "\n" not in err.strip()
    assert "there is no access token for --push-to: log in with `hf auth login` or set HF_TOKEN" in err
    assert not (tmp_path / "run").exists() and not hub.requests


@pytest.mark.parametrize(
    "phase, action, reason",
    [
        ("create", "hang up", "cannot be reached for someone/shapes, or the connection was lost"),
        ("commit", 500, "answered 500 for someone/shapes"),
    ],
)
def test_a_failed_upload_leaves_the_model_here_and_nothing_there(train, task, hub, tmp_path, phase, action, reason):
    hub.faults = [Fault(phase, action, times=100)]
    code, err = train("--push-to=someone/shapes")
    assert code == 1
    error, folder = " ".join(find_error(err).split()), tmp_path / "run" / "model"
    assert f"the model is saved, but not uploaded, which `evmamba push {folder} someone/shapes` does later" in error
    assert reason in error and "Uploaded" not in err
    assert all(repo.files().keys() <= {".gitattributes"} for repo in hub.repos.values())
    assert pipeline(task, model=str(folder)).model.config.id2label


def create_dataset(hub: HubServer, repo: str, shapes: Path) -> None:
    """Put the drawn images on the Hub, with the masks and the boxes of each as columns."""
    kind = datasets.ClassLabel(names=CLASSES[1:])
    objects = {"bbox": datasets.List(datasets.List(datasets.Value("float32"))), "category": datasets.List(kind)}
    features = {"image": datasets.Image(), "mask": datasets.Image(), "objects": objects}
    files = {"id2label.json": json.dumps(dict(enumerate(CLASSES))).encode()}
    for split in ("train", "validation"):
        content = json.loads((shapes / split / "annotations.json").read_text(encoding="utf-8"))
        rows = []
        for image in content["images"]:
            found = [each for each in content["annotations"] if each["image_id"] == image["id"]]
            boxes = {"bbox": [each["bbox"] for each in found], "category": [each["category_id"] - 1 for each in found]}
            name = image["file_name"]
            paths = {"image": str(shapes / split / "images" / name), "mask": str(shapes / split / "masks" / name)}
            rows.append({**paths, "objects": boxes})
        table = datasets.Dataset.from_list(rows, features=datasets.Features(features))
        table.to_parquet(file := BytesIO())
        files[f"data/{split}-00000-of-00001.parquet"] = file.getvalue()
    hub.create(repo, files, kind="dataset")


@pytest.mark.parametrize("streaming", [True, False], ids=["streamed", "downloaded"])
def test_a_dataset_of_the_hub(train, task, hub, shapes, tmp_path, streaming):
    repo = f"someone/{tmp_path.name}"  # datasets caches by name
    create_dataset(hub, repo, shapes)
    columns = ["--image-column=image", *(["--mask-column=mask"] if task == "image-segmentation" else [])]
    options = ["--streaming", "--images-per-epoch=8"] if streaming else []
    code, err = train(f"--dataset={repo}", *columns, *options)
    assert code == 0, err
    (record,) = (each for each in read_log(tmp_path / "run") if "validation_images" in each)
    assert record["validation_images"] == 2
    names = CLASSES if task == "image-segmentation" else CLASSES[1:]
    model = PROGRAMS[task][1].from_pretrained(tmp_path / "run" / "model")
    assert list(model.config.id2label.values()) == names
