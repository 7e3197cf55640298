"""`evmamba classify` with the bundled model, on the example images."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from evmamba_demo.bundled import find_bundled_model
from evmamba_kernels import backends
from modeling_evmamba import EfficientVMambaConfig, EfficientVMambaModel


EXAMPLES = Path(__file__).parents[4] / "demo" / "examples"


def label_in_name(path: str | Path) -> str:
    return Path(path).stem[-1]  # the examples are digit_0.png ... digit_9.png


def test_examples_are_classified_right(evmamba):
    exit_code, stdout, stderr = evmamba("classify", EXAMPLES, "--json", "--top-k", 2)
    assert exit_code == 0, stderr
    classifications = json.loads(stdout)
    assert len(classifications) == len(list(EXAMPLES.glob("*.png"))) > 0
    for classification in classifications:
        first, second = classification["predictions"]
        assert first["label"] == label_in_name(classification["image"])
        assert 1 >= first["score"] >= second["score"] >= 0


def test_links_are_followed_and_other_files_are_ignored_and_counted(evmamba, tmp_path):
    folder = tmp_path / "photos [1]"
    (folder / ".thumbnails").mkdir(parents=True)
    (folder / "linked").symlink_to(EXAMPLES, target_is_directory=True)
    for name in (".thumbnails/a.png", "._b.png", "notes.pdf"):
        (folder / name).touch()
    exit_code, stdout, stderr = evmamba("classify", folder, "--json", "--top-k", 1)
    assert exit_code == 0, stderr
    assert len(json.loads(stdout)) == len(list(EXAMPLES.glob("*.png")))
    ignored = 3 + len([path for path in EXAMPLES.iterdir() if path.suffix != ".png"])
    assert f"Ignored {ignored} files, hidden or without an image extension, such as {folder}" in stderr


def test_tables_name_image_and_label(evmamba):
    image = sorted(EXAMPLES.glob("*.png"))[3]
    exit_code, stdout, stderr = evmamba("classify", image)
    assert exit_code == 0, stderr
    lines = stdout.splitlines()
    assert image.name in stdout
    labels = [line.split()[0] for line in lines if "%" in line]
    assert len(labels) == 5 and labels[0] == label_in_name(image)


def test_a_broken_image_is_reported_and_the_rest_goes_on(evmamba, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    image = sorted(EXAMPLES.glob("*.png"))[0]
    exit_code, stdout, stderr = evmamba("classify", broken, image, "--json", "--device", "cpu", "--dtype", "bfloat16")
    assert exit_code == 1
    first, second = json.loads(stdout)
    assert first == {"image": str(broken), "error": "it is not an image in a format that Pillow reads"}
    assert second["predictions"][0]["label"] == label_in_name(image)
    assert "1 of 2 images could not be classified" in stderr


@pytest.mark.parametrize("batch_size", [1, 3, 20])
def test_batches(evmamba, tmp_path, batch_size):
    """Results keep their order, also of a broken image and of an image that is given twice."""
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    images = sorted(EXAMPLES.glob("*.png"))[:5]
    paths = [images[0], broken, *images[1:], images[2], broken]
    exit_code, stdout, stderr = evmamba("classify", *paths, "--json", "--batch-size", batch_size)
    assert exit_code == 1 and "2 of 8 images could not be classified" in stderr
    classifications = json.loads(stdout)
    assert [classification["image"] for classification in classifications] == list(map(str, paths))
    for path, classification in zip(paths, classifications, strict=True):
        if path == broken:
            assert "error" in classification
        else:
            assert classification["predictions"][0]["label"] == label_in_name(path)


def test_images_of_different_sizes(evmamba, tmp_path):
    shutil.copytree(find_bundled_model(), tmp_path / "model")
    config = tmp_path / "model" / "preprocessor_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "do_center_crop": False}))
    image = sorted(EXAMPLES.glob("*.png"))[3]
    Image.open(image).crop((0, 0, 100, 160)).save(tmp_path / "narrow.png")
    arguments = ["classify", image, tmp_path / "narrow.png", "--model", tmp_path / "model"]
    exit_code, _, stderr = evmamba(*arguments, "--batch-size", 2)
    assert exit_code == 1 and "different sizes: use --batch-size 1" in stderr
    assert evmamba(*arguments)[0] == 0


def test_more_labels_than_the_model_has(evmamba):
    _, stdout, _ = evmamba("classify", EXAMPLES / "digit_3.png", "--json", "--top-k", 50)
    assert len(json.loads(stdout)[0]["predictions"]) == 10


@pytest.mark.parametrize(
    "arguments, expected_code, message",
    [
        (["missing.png"], 1, "missing.png does not exist"),
        ([EXAMPLES, "--model", "no/such/folder"], 1, "'no/such/folder' is neither a path nor a valid repository id"),
        ([EXAMPLES, "--device", "abacus"], 1, "device 'abacus' cannot be used"),
        ([EXAMPLES, "--dtype", "int4"], 2, "int4"),
        ([EXAMPLES, "--device", "meta"], 1, "device 'meta' cannot be used"),
        ([EXAMPLES, "--top-k", "0"], 2, "top-k"),
        ([EXAMPLES, "--batch-size", "0"], 2, "batch-size"),
        ([], 2, "Missing argument"),
    ],
    ids=str,
)
def test_bad_arguments_get_one_message(evmamba, arguments, expected_code, message):
    exit_code, _, stderr = evmamba("classify", *arguments)
    assert exit_code == expected_code
    assert message in stderr
    assert "Traceback" not in stderr


@pytest.mark.parametrize(
    "backend, message",
    [("cuda", f"choose one of {', '.join(map(repr, [*backends.BACKENDS, 'torch']))}"), ("triton", "on cpu")],
)
def test_a_backend_that_cannot_be_followed_is_one_message(evmamba, monkeypatch, backend, message):
    monkeypatch.setattr(backends, "preferred_backend", backend)  # as EVMAMBA_SCAN_BACKEND does at import
    exit_code, _, stderr = evmamba("classify", EXAMPLES, "--device", "cpu")
    assert exit_code == 1
    assert stderr.count("\n") == 1 and message in stderr


def test_a_model_without_a_head_is_refused(evmamba, tmp_path):
    EfficientVMambaModel(EfficientVMambaConfig(hidden_sizes=[8] * 4, depths=[1] * 4)).save_pretrained(tmp_path)
    exit_code, _, stderr = evmamba("classify", EXAMPLES, "--model", tmp_path)
    assert exit_code == 1
    assert "Traceback" not in stderr


def test_half_precision_agrees_with_float32(evmamba):
    scores = {}
    for dtype in ("float32", "float16"):
        _, stdout, _ = evmamba("classify", EXAMPLES, "--json", "--dtype", dtype)
        scores[dtype] = torch.tensor([item["predictions"][0]["score"] for item in json.loads(stdout)])
    assert torch.allclose(scores["float32"], scores["float16"], atol=0.02)
