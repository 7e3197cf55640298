import sys
from pathlib import Path

import pytest

from hub_scripts.cli import main
from hub_scripts.train_digits import load_splits


@pytest.fixture
def evmamba(monkeypatch, capsys):
    """Runs the command line: exit code, stdout, stderr."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["evmamba", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_info:
            main()
        return exit_info.value.code or 0, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def digit_images(tmp_path_factory) -> Path:
    """The digits that the bundled model was not trained with, 599 of them, in a folder for every class."""
    _, held_out = load_splits()
    folder = tmp_path_factory.mktemp("digits")
    for index, (image, label) in enumerate(zip(held_out.images, held_out.labels.tolist(), strict=True)):
        (folder / str(label)).mkdir(exist_ok=True)
        image.save(folder / str(label) / f"{index:03}.png")
    return folder
