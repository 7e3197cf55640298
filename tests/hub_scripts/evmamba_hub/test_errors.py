"""What a command prints for an error."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from evmamba_hub.errors import (
    UserError,
    check_versions,
    escape_unprintable,
    exit_on_user_error,
    literal,
    require,
    translate_lost_process,
)
from process_pairs import needs_fork, show_in_two_processes


ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    "text, shown",
    [
        ("run:100:.png", "run:100:.png"),
        ("[red]a[/red].png", "[red]a[/red].png"),
        ("[/]", "[/]"),
        ("[link=https://example.org]a[/link]", "[link=https://example.org]a[/link]"),
        ("a\\[b]\\", "a\\[b]\\"),
        ("gr\u00fcn \u732b \U0001f408.png", "gr\u00fcn \u732b \U0001f408.png"),
        ("gru\u0308n", "gru\u0308n"),
        ("5\u202fPM.png", "5\u202fPM.png"),  # a space in the names of screenshots
        ("\U0001f469\u200d\U0001f52c", "\U0001f469\u200d\U0001f52c"),  # joined by an invisible character
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("\x9b31m", r"\x9b31m"),
        ("a\tb\rc\nd\x00\x07\x08\x7f", r"a\tb\rc\nd\x00\x07\x08\x7f"),
        ("a\u2028b\u2029c", r"a\u2028b\u2029c"),
        ("gpj\u202e.exe", r"gpj\u202e.exe"),
        (os.fsdecode(b"gr\xfcn.png"), r"gr\xfcn.png"),
        ("\ud83d", r"\ud83d"),  # half of a pair
    ],
    ids=ascii,
)
def test_names_are_shown_as_they_are_and_what_cannot_be_printed_is_escaped(text, shown):
    assert escape_unprintable(text) == shown
    console = Console(emoji=False, soft_wrap=True)
    with console.capture() as capture:
        console.print("[bold]Name:[/]", literal(text))
    assert capture.get() == f"Name: {shown}\n"


def exit_with(error: UserError) -> None:
    with pytest.raises(SystemExit) as info, exit_on_user_error():
        raise error
    assert info.value.code == 1


def test_a_message_is_one_line(capsys):
    """A line break in a name is escaped. Those in messages of other libraries become spaces."""
    exit_with(UserError("two\nlines.png:100: [red] does not exist"))
    assert capsys.readouterr().err == "Error: two\\nlines.png:100: [red] does not exist\n"
    foreign = ValueError("no such field:\n    depths")
    error = UserError(f"a\nb cannot be loaded: {foreign}")
    error.__cause__ = foreign
    exit_with(error)
    assert capsys.readouterr().err == "Error: a\\nb cannot be loaded: no such field: depths\n"
    longer = UserError(f"{error}: replace it")
    longer.__cause__ = error
    exit_with(longer)
    assert capsys.readouterr().err == "Error: a\\nb cannot be loaded: no such field: depths: replace it\n"


def test_stderr_that_cannot_encode_a_name(monkeypatch, tmp_path):
    with (tmp_path / "err").open("w", encoding="ascii", errors="backslashreplace") as file:
        monkeypatch.setattr(sys, "stderr", file)
        exit_with(UserError("\u732b.png does not exist"))
    assert (tmp_path / "err").read_text() == "Error: \\u732b.png does not exist\n"


MISTAKES = [
    "evaluate demo/digits --dataset missing/x/y",
    "train --model missing/x/y --dataset demo --output-dir OUT",
    "evaluate missing/x/y --dataset demo/examples",
    "train --recipe digits --dataset missing/x/y --output-dir OUT",
]


@needs_fork
@pytest.mark.slow
@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_one_line_in_every_process(tmp_path, monkeypatch, command):
    monkeypatch.chdir(ROOT)
    for shown in show_in_two_processes(*command.replace("OUT", str(tmp_path / "run")).split()):
        *notes, error = shown.splitlines()
        assert error.startswith("Error: 'missing/x/y' is neither a path nor a valid repository id")
        assert all(note.startswith("Note: ") for note in notes)


@pytest.mark.slow
@pytest.mark.parametrize("command", MISTAKES[:2])
def test_a_mistake_has_no_traceback_under_torchrun(tmp_path, command):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "evmamba_hub.cli"]
    completed = subprocess.run(
        [*launch, *command.replace("OUT", str(tmp_path / "run")).split()],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert completed.returncode == 1
    own, _, of_torchrun = completed.stderr.partition("torch/distributed/elastic")
    assert "Error: 'missing/x/y' is neither a path nor a valid repository id" in completed.stderr
    assert "Traceback" not in own and "[rank" not in completed.stderr
    assert of_torchrun.count("Traceback") == 1


def test_other_errors_of_pytorch_pass():
    with pytest.raises(RuntimeError, match="shape"), exit_on_user_error(), translate_lost_process():
        raise RuntimeError("shape mismatch")


def install(folder: Path, package: str, version: str) -> None:
    """Put the metadata of a package into a folder, where Python finds them as those of an installed one."""
    metadata = folder / f"{package.replace('-', '_')}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")


def test_a_package_that_is_too_old(tmp_path, monkeypatch):
    """It stops what needs it. A release candidate of a newer version does not."""
    install(tmp_path, "scikit-learn", "1.0")
    install(tmp_path, "torch", "99.0rc1")
    monkeypatch.syspath_prepend(tmp_path)
    check_versions()
    message = r'this needs scikit-learn (.+) or newer, found 1\.0: run pip install "scikit-learn>=\1"$'
    with pytest.raises(UserError, match=message):
        require(extra="digits")
    install(tmp_path / "older", "torch", "2.6.0")
    monkeypatch.syspath_prepend(tmp_path / "older")
    with pytest.raises(
        UserError, match=r'this needs torch (.+) or newer, found 2\.6\.0: run pip install "torch>=\1"$'
    ):
        check_versions()
