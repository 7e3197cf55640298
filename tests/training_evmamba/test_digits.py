"""The handwritten digits as an image folder."""

import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

from evmamba_hub.errors import UserError
from evmamba_hub.images.labeled_images import Share, open_dataset
from training_evmamba.digits import Digits, load_splits, main, save_folder


EXAMPLES = Path(__file__).parents[2] / "demo" / "examples"


@pytest.fixture(scope="module")
def splits() -> tuple[Digits, Digits]:
    return load_splits()


def test_split(splits):
    training, held_out = splits
    assert (len(training.images), len(held_out.images)) == (1198, 599)
    assert held_out.labels.bincount().min() >= 58
    assert not {image.tobytes() for image in training.images} & {image.tobytes() for image in held_out.images}


def test_folder(tmp_path, splits):
    main(tmp_path / "new" / "digits")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["digits"]
    for split, digits in zip(("train", "validation"), splits, strict=True):
        dataset = open_dataset(str(tmp_path / "new" / "digits" / split))
        assert dataset.class_names == [str(digit) for digit in range(10)]
        read = [(image.read().tobytes(), image.label) for image in dataset.read(Share(0, 1))]
        expected = zip(digits.images, digits.labels.tolist(), strict=True)
        assert sorted(read) == sorted((image.convert("RGB").tobytes(), label) for image, label in expected)


def test_examples_are_the_committed_ones(tmp_path):
    main(tmp_path / "digits", examples=tmp_path / "examples")
    written = sorted(path.name for path in (tmp_path / "examples").iterdir())
    assert written == sorted(path.name for path in EXAMPLES.glob("*.png")) and len(written) == 10
    for name in written:
        with Image.open(tmp_path / "examples" / name) as image, Image.open(EXAMPLES / name) as committed:
            assert image.tobytes() == committed.tobytes()


def test_nothing_half_written(tmp_path, monkeypatch, splits):
    """Simulate a disk that fills up after some images."""
    save, saved = Image.Image.save, []

    def fail_late(image, path):
        if len(saved) == 1500:
            raise OSError(28, "No space left on device")
        saved.append(path)
        save(image, path)

    monkeypatch.setattr(Image.Image, "save", fail_late)
    with pytest.raises(UserError, match="No space left"):
        save_folder(tmp_path / "digits", *splits)
    assert len(saved) == 1500 and list(tmp_path.iterdir()) == []


def test_refuses_a_folder_that_holds_something(tmp_path, splits):
    (tmp_path / "notes.txt").touch()
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(UserError, match="exists already"):
            save_folder(path, *splits)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.filterwarnings("ignore:'training_evmamba.digits' found in sys.modules:RuntimeWarning")
def test_the_command_says_what_is_wrong_in_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["digits", str(tmp_path / "file" / "digits")])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("training_evmamba.digits", run_name="__main__")
    assert end.value.code == 1
    out, err = capsys.readouterr()
    assert err.startswith("Error: ") and "cannot be written" in err and err.count("\n") == 1
    assert not out


def test_names_the_extra_where_scikit_learn_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match=r"the package sklearn: run pip install \"\.\[digits\]\""):
        load_splits()
