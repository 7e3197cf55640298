import sys

import pytest

from hub_scripts.cli import main


@pytest.fixture
def evmamba(monkeypatch, capsys):
    """Runs the command line: exit code, stdout, stderr."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["evmamba", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_info:
            main()
        return exit_info.value.code or 0, *capsys.readouterr()

    return run
