"""transformers.js in Node.js loads the directory of `evmamba export --format onnx-hub`, and agrees with Python."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

from evmamba_demo.bundled import find_bundled_model, find_examples
from evmamba_hub.images.images import read_image
from evmamba_hub.inference.classify import classify_files, load_pipeline
from evmamba_hub.publish.onnx_folder import render_usage
from modeling_evmamba import EfficientVMambaForImageClassification


HERE = Path(__file__).parent
ROOT = HERE.parents[1]
INSTALLED = ROOT / ".cache" / "javascript"  # a directory that git, the sdist and ruff leave out
COMPARE = (HERE / "compare.mjs").read_text(encoding="utf-8")
SCRIPT = re.compile(r"```js\n(.*?)```", re.DOTALL)
OLDEST_NODE = 20

# largest accepted difference of a logit to PyTorch for the same pixel values, in units of the largest logit
BOUNDS = {"fp32": 5e-6, "fp16": 1e-2, "q8": 1e-1}

pytestmark = pytest.mark.slow


def find_reason_to_skip() -> str | None:
    if shutil.which("node") is None or shutil.which("npm") is None:
        return f"needs Node.js {OLDEST_NODE} or newer with npm: install it from nodejs.org"
    version = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True).stdout
    if int(version.removeprefix("v").partition(".")[0]) < OLDEST_NODE:
        return f"needs Node.js {OLDEST_NODE} or newer, found {version.strip()}"
    return None


@pytest.fixture(scope="module")
def modules() -> Path:
    """A directory with transformers.js, of which the versions are in package-lock.json. It stays for later runs.

    Scripts of packages do not run, because that of onnxruntime-node would download libraries for CUDA.
    """
    if reason := find_reason_to_skip():
        pytest.skip(reason)
    lock_file = (HERE / "package-lock.json").read_text()
    marker = INSTALLED / "installed.json"
    INSTALLED.mkdir(parents=True, exist_ok=True)
    with FileLock(INSTALLED / "lock"):
        if not marker.is_file() or marker.read_text() != lock_file:
            marker.unlink(missing_ok=True)
            for name in ("package.json", "package-lock.json"):
                shutil.copy(HERE / name, INSTALLED)
            command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
            completed = subprocess.run(command, cwd=INSTALLED, capture_output=True, text=True)
            assert completed.returncode == 0, completed.stderr
            marker.write_text(lock_file)
    return INSTALLED


@pytest.fixture(scope="module")
def desk(modules, digits_onnx, tmp_path_factory) -> Path:
    """The directory of a reader of docs/javascript.md, who has exported the digits and installed transformers.js."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "digits-onnx").symlink_to(digits_onnx)
    shutil.copytree(find_examples()[0].parent, folder / "demo" / "examples")
    (folder / "node_modules").symlink_to(modules / "node_modules")
    return folder


def run_node(desk: Path, code: str, *arguments: object) -> str:
    (desk / "script.mjs").write_text(code)
    command = ["node", "script.mjs", *map(str, arguments)]
    completed = subprocess.run(command, cwd=desk, capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr
    return completed.stdout


@pytest.fixture(scope="module")
def pixel_values() -> torch.Tensor:
    """Noise of an odd size, on a different color for each image."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 3, 1, 1, generator=generator) + torch.randn(3, 3, 37, 45, generator=generator)


@pytest.fixture(scope="module")
def results(desk, pixel_values) -> dict:
    """What transformers.js computes with each file."""
    pixels = {"dims": pixel_values.shape, "values": pixel_values.flatten().tolist()}
    (desk / "pixels.json").write_text(json.dumps(pixels))
    return json.loads(run_node(desk, COMPARE, desk / "digits-onnx", "pixels.json", *find_examples()))


def test_the_script_of_the_page_runs(desk):
    """It is that of the cards."""
    (script,) = SCRIPT.findall((ROOT / "docs" / "javascript.md").read_text(encoding="utf-8"))
    (of_cards,) = SCRIPT.findall(render_usage("./digits-onnx"))
    assert script == of_cards.replace("photo.jpg", "demo/examples/digit_3.png")
    for dtype in BOUNDS:
        first, *_ = run_node(desk, script.replace("fp32", dtype)).splitlines()[1:]
        assert first.split(",")[0] == "  { label: '3'", dtype


@pytest.mark.parametrize("dtype", BOUNDS)
def test_first_classes_are_those_of_python(results, dtype):
    classifier = load_pipeline(str(find_bundled_model()), "cpu", "float32", optimize=False)
    files = classify_files(classifier, find_examples(), top_k=1)
    assert results["labels"][dtype] == [file.predictions[0]["label"] for file in files]
    assert results["labels"][dtype] == [path.stem[-1] for path in find_examples()]


@pytest.mark.parametrize("dtype", BOUNDS)
def test_logits_are_those_of_pytorch(results, pixel_values, dtype):
    model = EfficientVMambaForImageClassification.from_pretrained(find_bundled_model()).eval()
    with torch.no_grad():
        expected = model(pixel_values).logits
    assert expected.std(dim=0).min() > 1e-2
    logits = torch.tensor(results["logits"][dtype]).view_as(expected)
    difference = (logits - expected).abs().max().item()
    assert difference / max(1, expected.abs().max().item()) < BOUNDS[dtype]
    assert dtype == "fp32" or difference > 1e-4  # it is another file


def test_images_that_need_no_resize_are_prepared_as_in_python(desk, results):
    """Crop, scale and normalization are those of the image processor. Node.js resizes without antialiasing."""
    generator = np.random.default_rng(0)
    files = [desk / f"{height}x{width}.png" for height, width in [(32, 32), (32, 45), (44, 32), (32, 47)]]
    for file in files:
        height, width = map(int, file.stem.split("x"))
        Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file)
    prepared = json.loads(run_node(desk, COMPARE, desk / "digits-onnx", "pixels.json", *files))["prepared"]
    image_processor = load_pipeline(str(find_bundled_model()), "cpu", "float32", optimize=False).image_processor
    expected = image_processor([read_image(file) for file in files], return_tensors="np").pixel_values
    np.testing.assert_allclose(np.array(prepared).reshape(expected.shape), expected, atol=1e-6)
