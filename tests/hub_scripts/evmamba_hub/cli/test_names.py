"""Commands show the names of files and labels as they are, on any stdout, and act on nothing in them."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress

from evmamba_demo.bundled import find_bundled_model, find_examples
from evmamba_hub.cli.training import ProgressCallback


# names and how they are shown
NAMES = {
    "run:100:": "run:100:",
    "animal:cat:indoor": "animal:cat:indoor",
    "[red]": "[red]",
    "a[b]\\": "a[b]\\",
    "\x1b[31mred": r"\x1b[31mred",
    "two\nlines\t": r"two\nlines\t",
    os.fsdecode(b"gr\xfcn"): r"gr\xfcn",
    "\u732b": "\u732b",
    "a long name " * 12 + "ends": "a long name " * 12 + "ends",
}


@pytest.fixture(params=NAMES, ids=ascii)
def name(request) -> str:
    return request.param


@pytest.fixture
def image(tmp_path, name) -> Path:
    path = tmp_path / f"{name}.png"
    try:
        shutil.copy(find_examples()[3], path)
    except OSError as error:
        pytest.skip(f"the file system refuses the name: {error}")
    return path


@pytest.fixture
def model(tmp_path, name) -> Path:
    """The model of the digits, which calls the three by the name."""
    shutil.copytree(find_bundled_model(), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["id2label"]["3"] = name
    config["label2id"] = {label: int(idx) for idx, label in config["id2label"].items()}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    return tmp_path / "model"


def find_line(text: str, piece: str) -> str:
    """Return the line that holds a piece, in which a narrow table may have broken the text."""
    (line,) = [line for line in text.splitlines() if piece in line]
    return line


def test_classify_shows_names_of_files(evmamba, image, name):
    code, out, err = evmamba("classify", image)
    assert code == 0, err
    assert find_line(out, ".png") == f"{image.parent}/{NAMES[name]}.png"


def test_classify_shows_labels(evmamba, model, name):
    code, out, err = evmamba("classify", find_examples()[3], "--model", model, "--top-k", 1)
    assert code == 0, err
    cells = [line[2:-2].rpartition(" 9")[0] or line for line in out.splitlines()[2:]]  # without score and bar
    assert "".join("".join(cells).split()) == "".join(NAMES[name].split())


def test_json_holds_the_names_themselves(evmamba, image, model, name):
    code, out, err = evmamba("classify", image, "--model", model, "--json")
    assert code == 0, err
    (classification,) = json.loads(out)
    assert classification["image"] == str(image)
    assert classification["predictions"][0]["label"] == name
    assert out.isascii()


def test_an_error_names_the_file(evmamba, image, name):
    image.write_bytes(b"no image")
    code, out, err = evmamba("classify", image)
    assert code == 1 and find_line(out, ".png") == f"{image.parent}/{NAMES[name]}.png"
    image.unlink()
    code, out, err = evmamba("classify", image)
    assert (code, out) == (1, "")
    assert err.startswith(f"Error: {image.parent}/{NAMES[name]}.png does not exist: ") and err.count("\n") == 1


def test_evaluate_shows_names(evmamba, model, name, tmp_path):
    """Ones in the directory of the threes are confused with them."""
    folder = tmp_path / "data" / name
    folder.mkdir(parents=True)
    shutil.copy(find_examples()[1], folder / "1.png")
    code, out, err = evmamba("evaluate", model, "--dataset", folder.parent, "--output", tmp_path / "results.json")
    assert code == 0, err
    assert NAMES[name].replace(" ", "")[:12] in out.replace(" ", "")
    assert "\x1b" not in out + err
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["most_confused"] == [{"label": name, "predicted": "1", "images": 1}]
    (folder / "1.png").write_bytes(b"no image")
    code, _, err = evmamba("evaluate", model, "--dataset", folder.parent)
    assert code == 1 and f"{folder.parent}/{NAMES[name]}/1.png: it is not an image" in err


def test_a_model_in_a_directory_whose_name_is_not_utf8(evmamba, tmp_path):
    """Safetensors cannot read it."""
    try:
        shutil.copytree(find_bundled_model(), model := tmp_path / os.fsdecode(b"m\xfc"))
    except OSError as error:
        pytest.skip(f"the file system refuses the name: {error}")
    (tmp_path / "data" / "0").mkdir(parents=True)
    image = shutil.copy(find_examples()[0], tmp_path / "data" / "0")
    for command in (["classify", image, "--model", model], ["evaluate", model, "--dataset", tmp_path / "data"]):
        code, out, err = evmamba(*command)
        assert (code, out) == (1, "") and "not valid UTF-8" in err and err.count("Error:") == 1


def test_train_names_skipped_images(name):
    console = Console(file=io.StringIO(), emoji=False, soft_wrap=True)
    ProgressCallback(Progress(console=console)).on_unreadable(f"{name}.png: it cannot be decoded")
    assert console.file.getvalue() == f"Skipped {NAMES[name]}.png: it cannot be decoded\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("options", [[], ["--json"]], ids=["tables", "json"])
def test_a_strict_stdout(evmamba, monkeypatch, image, model, encoding, options):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
    monkeypatch.setattr(sys, "stdout", stdout)
    code, _, err = evmamba("classify", image, "--model", model, *options)
    assert code == 0, err
    stdout.flush()
    assert ".png" in stdout.buffer.getvalue().decode(encoding)


@pytest.mark.parametrize("name", ["gr\u00fcn \u732b"], ids=ascii)
def test_a_system_with_another_encoding(model):
    """The console has the encoding of Western Windows, and Python's default is ASCII."""
    variables = {
        **os.environ,
        "LC_ALL": "C",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONIOENCODING": "cp1252",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "PYTHONUTF8": "0",
    }
    command = [sys.executable, "-m", "evmamba_hub.cli", "classify", find_examples()[3], "--model", model]
    run = subprocess.run(command, env=variables, capture_output=True, check=True)
    assert b"gr\xfcn \\u732b" in run.stdout
