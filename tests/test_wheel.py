"""The wheel in a clean virtual environment, far from the repository: what `pip install efficientvmamba` gives."""

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]

pytestmark = [pytest.mark.wheel, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    constraints = ["-c", ROOT / "constraints.txt"]
    subprocess.run([folder / "bin" / "python", "-m", "pip", "install", "-q", *constraints, wheel], check=True)
    return folder


def run(environment: Path, *command: object) -> str:
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    program, *arguments = command
    completed = subprocess.run(
        [environment / "bin" / program, *arguments], cwd=environment, env=variables, capture_output=True, text=True
    )
    assert completed.returncode == 0, completed.stderr
    return completed.stdout


def test_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    folders = {name.split("/")[0] for name in names}
    assert {folder for folder in folders if not folder.endswith(".dist-info")} == {
        "evmamba_demo",
        "evmamba_digits",
        "evmamba_examples",
        "evmamba_kernels",
        "hub_scripts",
        "modeling_evmamba",
        "training_evmamba",
    }
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "training_evmamba/recipes/tiny.yaml" in names


def test_packages_come_from_the_environment(environment):
    script = "import evmamba_kernels, hub_scripts, modeling_evmamba as m; print(evmamba_kernels, hub_scripts, m)"
    assert run(environment, "python", "-c", script).count(str(environment)) == 3


def test_command_line_with_the_bundled_model(environment):
    example = sorted((ROOT / "demo" / "examples").glob("*.png"))[0]
    (classification,) = json.loads(run(environment, "evmamba", "classify", example, "--json"))
    assert classification["predictions"][0]["label"] == example.stem[-1]
    assert "0.787" in run(environment, "evmamba", "info")


def test_what_would_be_uploaded(environment, tmp_path):
    """Template, manifest and the network's code come with the wheel."""
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
