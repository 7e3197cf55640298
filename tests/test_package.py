"""The metadata of the package: its layers, its version, and the Python that it needs."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import metadata, version
from pathlib import Path

import pytest
import yaml

import evmamba_hub
import modeling_evmamba
from evmamba_hub.cli.main import main


ROOT = Path(__file__).parents[1]


def test_layers_name_every_subpackage():
    """import-linter checks only the subpackages and top-level modules that the contract names."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    named = {name.strip() for layer in layers for name in layer.split("|")}
    (folder,) = map(Path, evmamba_hub.__path__)
    modules = {path.stem for path in folder.glob("*.py") if path.name != "__init__.py"}
    packages = {path.parent.name for path in folder.glob("*/__init__.py")}
    assert {f"evmamba_hub.{name}" for name in modules | packages} == {
        name for name in named if name.startswith("evmamba_hub.")
    }


def test_version_has_one_source(capsys, monkeypatch):
    assert version("efficientvmamba") == modeling_evmamba.__version__
    monkeypatch.setattr(sys, "argv", ["evmamba", "--version"])
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().out == f"evmamba {modeling_evmamba.__version__}\n"
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == modeling_evmamba.__version__


def test_hooks_have_the_versions_of_the_constraints():
    """The hooks of ruff, codespell and nbstripout check what `make quality` checks."""
    constraints = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    versions = {hook["id"].split("-")[0]: repo["rev"].removeprefix("v") for repo in repos for hook in repo["hooks"]}
    shared = versions.keys() & {"ruff", "codespell", "nbstripout"}
    assert shared == {"ruff", "codespell", "nbstripout"}
    assert {name: versions[name] for name in shared} == {name: constraints[name] for name in shared}


def test_make_says_which_python_it_wants(tmp_path):
    """The message comes before pip starts. The older Python is a script that runs the check with another version."""
    older = tmp_path / "python3.10"
    older.write_text(f'#!/bin/sh\nexec {sys.executable} "$1" "import sys; sys.version_info = (3, 10); $2"\n')
    older.chmod(0o755)
    arguments = ["make", "install", f"PYTHON={older}", f"VENV={tmp_path / 'venv'}"]
    variables = {"PATH": os.environ["PATH"]}
    completed = subprocess.run(arguments, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert completed.returncode != 0
    assert f"needs Python {metadata('efficientvmamba')['Requires-Python'].strip('>=')} or newer" in completed.stderr
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize(
    "target, wanted", [("classify", ["."]), ("demo", [".", ".[demo]"]), ("test", [".", ".[test]"])]
)
def test_make_installs_what_a_target_needs(tmp_path, target, wanted):
    """The first command of the README needs the core alone. Later ones add to the same environment."""
    arguments = ["make", "--dry-run", target, f"PYTHON={sys.executable}", f"VENV={tmp_path / 'venv'}"]
    plan = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    installed = [shlex.split(line)[-1] for line in plan.splitlines() if "pip install" in line]
    assert installed == wanted
    notice = plan.index("Installing the package with PyTorch, transformers and Numba into")
    assert notice < plan.index("-m venv") < plan.index("pip install")


def test_git_ignores_what_the_commands_of_the_documentation_write():
    written = ["flowers/a/1.jpg", "runs/flowers/model/config.json", "digits.onnx", "results.json"]
    tracked = ["demo/digits/config.json", "tests/golden/README.md", "README.md"]
    command = ["git", "-c", "safe.directory=*", "check-ignore", "--no-index", *written, *tracked]
    ignored = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if ignored.returncode == 128:
        pytest.skip("the tests run outside of a clone")
    assert ignored.stdout.split() == written


def test_readme_for_an_index_has_absolute_links():
    command = [sys.executable, "docs/index_readme.py", "https://example.org/someone/code/", "v1"]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    links = re.findall(r"(?:\]\(|src=\"|srcset=\")([^)\"]+)", text)
    assert all(link.startswith(("https://", "http://")) for link in links)
    files = [link.removeprefix("https://example.org/someone/code/") for link in links if "example.org" in link]
    files = [file.partition("#")[0] for file in files]
    assert len(files) > 20
    for file in files:
        kind, _, path = file.partition("/v1/")
        assert kind == ("raw" if path.endswith(".png") else "blob")
        assert (ROOT / path).is_file()


def test_checks_say_why_they_cannot_install_chromium(tmp_path):
    for program in ("bash", "dirname", "id"):
        (tmp_path / program).symlink_to(shutil.which(program))
    run = subprocess.run([ROOT / ".ci" / "run"], env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.startswith("Chromium is missing, and its installation needs Debian and root: install it")
