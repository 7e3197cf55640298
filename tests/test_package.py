"""The metadata of the package: its layers, its version, and the Python that it needs."""

import configparser
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
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

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


def read_requirements() -> dict[str, Requirement]:
    """Return the requirements of the core and of all extras by name."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lists = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
    lines = {line for text in lists for line in text.splitlines() if line}
    requirements = {Requirement(line).name: Requirement(line) for line in lines}
    assert len(requirements) == len(lines)  # one bound for each package
    return requirements


def read_pins(name: str) -> dict[str, str]:
    """Return the versions of a file of constraints."""
    text = (ROOT / name).read_text()
    return {canonicalize_name(name): pin for name, pin in re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE)}


def test_lower_bounds_are_the_versions_of_the_lowest_environment():
    pins = read_pins("constraints-lowest.txt")
    for name, requirement in read_requirements().items():
        (lowest,) = [each.version for each in requirement.specifier if each.operator == ">="]
        if pin := pins.get(canonicalize_name(name)):
            assert Version(pin) == Version(lowest), name
        else:  # PyTorch brings Triton; tests need neither the documentation nor other packages' scans
            assert name in {"triton", "mkdocs-material", "mkdocstrings", "mambapy"}


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-newest.txt"])
def test_constraints_fit_the_requirements(name):
    pins = read_pins(name)
    missing = {name for name in read_requirements() if canonicalize_name(name) not in pins}
    assert missing == ({"timm"} if name == "constraints.txt" else {"mkdocs-material", "mkdocstrings", "mambapy"}) | {
        "triton"
    }
    for requirement in read_requirements().values():
        if pin := pins.get(canonicalize_name(requirement.name)):
            assert requirement.specifier.contains(pin), requirement


def test_tested_versions_of_python():
    """The checks or a workflow run with each version that the classifiers name."""
    classifiers = re.findall(r"Python :: (3\.\d+)", (ROOT / "setup.cfg").read_text())
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    matrix = workflow["core"]["strategy"]["matrix"]["python"]
    (of_checks,) = re.findall(r"^python:(3\.\d+)", workflow["checks"]["container"])
    assert {*classifiers} <= {of_checks, *matrix}
    assert classifiers[0] == metadata("efficientvmamba")["Requires-Python"].strip(">=")


def test_hooks_have_the_versions_of_the_constraints():
    """The hooks of ruff, codespell and nbstripout check what `make quality` checks."""
    constraints = read_pins("constraints.txt")
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
