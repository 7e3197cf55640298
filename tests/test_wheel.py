"""The sdist, the wheel that is built from it, and their use outside of the repository."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PACKAGES = {"evmamba_demo", "evmamba_hub", "evmamba_kernels", "modeling_evmamba", "training_evmamba"}
DATA_FILES = {
    "evmamba_demo/digits/model.safetensors",
    "evmamba_demo/examples/digit_3.png",
    "evmamba_demo/space/README.md",
    "evmamba_demo/space/requirements.txt",
    "evmamba_demo/web/README.md",
    "evmamba_demo/web/index.html",
    "evmamba_demo/web/page.js",
    "evmamba_demo/web/runtime.json",
    "evmamba_demo/web/service-worker.js",
    "evmamba_demo/web/worker.js",
    "evmamba_hub/images/imagenet1k_labels.txt",
    "evmamba_hub/images/imagenet1k_synsets.txt",
    "evmamba_hub/publish/data/checkpoints.yaml",
    "evmamba_hub/publish/data/model_card.md",
    "evmamba_hub/publish/data/onnx_card.md",
    "evmamba_hub/publish/data/onnx_usage.md",
    "evmamba_hub/py.typed",
    "evmamba_kernels/py.typed",
    "modeling_evmamba/py.typed",
    "training_evmamba/recipes/tiny.yaml",
}

pytestmark = [pytest.mark.wheel, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> Path:
    """A directory with the sdist, and the wheel that is built from the unpacked sdist."""
    folder = tmp_path_factory.mktemp("distributions")
    subprocess.run([sys.executable, "-m", "build", "--outdir", folder, ROOT], check=True, stdout=subprocess.DEVNULL)
    return folder


@pytest.fixture(scope="module")
def sources(distributions, tmp_path_factory) -> Path:
    """The unpacked sdist."""
    (sdist,) = distributions.glob("*.tar.gz")
    folder = tmp_path_factory.mktemp("sources")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return folder / sdist.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(distributions) -> Path:
    (wheel,) = distributions.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    options = ["-q", "--no-compile", "-c", ROOT / "constraints.txt"]  # to compile all of PyTorch takes half a minute
    subprocess.run([folder / "bin" / "python", "-m", "pip", "install", *options, wheel], check=True)
    return folder


def run(environment: Path, *command: object) -> str:
    """Run a program of the environment in an empty directory."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    program, *arguments = command
    (environment / "empty").mkdir(exist_ok=True)
    completed = subprocess.run(
        [environment / "bin" / program, *arguments],
        cwd=environment / "empty",
        env=variables | {"COLUMNS": "200"},
        capture_output=True,
        text=True,
    )
    assert completed.returncode == 0, completed.stderr
    return completed.stdout


def test_the_sdist_holds_the_repository(sources):
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    assert [name for name in tracked if name != ".gitignore" and not (sources / name).exists()] == []
    assert [path for path in sources.rglob("*") if path.name == "__pycache__"] == []


def test_tests_are_found_in_the_sdist(sources):
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", ""]
    completed = subprocess.run(command, cwd=sources, capture_output=True, text=True)
    assert completed.returncode == 0, completed.stdout
    assert "tests/test_wheel.py::test_contents" in completed.stdout


def test_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    folders = {name.split("/")[0] for name in names}
    assert {folder for folder in folders if not folder.endswith(".dist-info")} == PACKAGES
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert set(names) >= DATA_FILES
    assert [name for name in names if "__pycache__" in name or "test" in name.rpartition("/")[2]] == []


def test_packages_come_from_the_environment(environment):
    script = f"import {', '.join(sorted(PACKAGES))}; print(*(sys.modules[name] for name in {PACKAGES}))"
    assert run(environment, "python", "-c", f"import sys; {script}").count(str(environment)) == len(PACKAGES)


def test_command_line_with_the_bundled_model(environment, wheel):
    example = sorted((ROOT / "demo" / "examples").glob("*.png"))[0]
    (classification,) = json.loads(run(environment, "evmamba", "classify", example, "--json"))
    assert classification["predictions"][0]["label"] == example.stem[-1]
    assert "0.787" in run(environment, "evmamba", "info")
    assert "classify" in run(environment, "python", "-m", "evmamba_hub.cli", "--help")
    assert run(environment, "evmamba", "--version") == f"evmamba {wheel.name.split('-')[1]}\n"


def test_what_would_be_uploaded(environment, tmp_path):
    """The wheel holds the card's template, the manifest and the network's code."""
    shutil.copytree(ROOT / "demo" / "digits", tmp_path / "model", ignore=shutil.ignore_patterns("README.md"))
    files = run(environment, "evmamba", "push", tmp_path / "model", "someone/digits", "--dry-run")
    for text in (
        "atrous_selective_scan_numba.py",
        "modeling_evmamba.py",
        "## Limits and biases",
        "128,184 parameters",
    ):
        assert text in files
    run(environment, "python", "-c", "from evmamba_hub.publish.republish import load_manifest; assert load_manifest()")


def test_the_space_that_would_be_uploaded(environment):
    shown = run(environment, "evmamba", "push-space", "someone/space", "--model", "someone/digits", "--dry-run")
    files = {line.split("│")[1].strip() for line in shown.splitlines() if line.startswith("│")}
    own = {path.relative_to(ROOT / "demo").as_posix() for path in (ROOT / "demo").rglob("*") if path.is_file()}
    assert {name for name in own if "__pycache__" not in name and not name.startswith("web/")} <= files
    assert {"evmamba_hub/client.py", "evmamba_kernels/__init__.py", "modeling_evmamba/__init__.py"} <= files
    assert not any(name.startswith(("training_evmamba", "evmamba_hub/cli/", "evmamba_demo/space/")) for name in files)
