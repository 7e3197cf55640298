import sys
from pathlib import Path

import pytest

from evmamba_hub.cli.main import main
from training_evmamba.digits import load_splits, save_folder


@pytest.fixture
def evmamba(monkeypatch, capsys):
    """Run the command line. Return exit code, stdout and stderr."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["evmamba", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_info:
            main()
        return exit_info.value.code or 0, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def digit_images(tmp_path_factory) -> Path:
    """The 599 held-out digits of the bundled model, in a directory per class."""
    pytest.importorskip("sklearn", reason='needs scikit-learn: pip install ".[digits]"')
    folder = tmp_path_factory.mktemp("digits")
    save_folder(folder, *load_splits())
    return folder / "validation"
