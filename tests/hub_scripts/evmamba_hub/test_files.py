"""Files and directories that are whole at any moment."""

import os
import sys
from pathlib import Path

import pytest

from evmamba_hub.errors import UserError
from evmamba_hub.files import partial_name, staged, write_atomic


def test_a_file_is_replaced_by_another(tmp_path):
    path = tmp_path / "new" / "folder" / "file"
    for content in (b"old", b"new"):
        write_atomic(path, content)
        assert path.read_bytes() == content
        assert list(path.parent.iterdir()) == [path]


def test_a_file_that_cannot_be_written_stays(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, b"old")
    (tmp_path / partial_name(path)).mkdir()
    with pytest.raises(UserError, match="file cannot be written"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"


def test_nothing_is_left_of_a_file_that_cannot_be_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="folder cannot be written"):
        write_atomic(tmp_path / "folder", b"new")
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]


def write_model(target: Path, content: str) -> None:
    with staged(target) as folder:
        folder.mkdir()
        (folder / "config.json").write_text(content)


def read_model(target: Path) -> str:
    return (target / "config.json").read_text()


def test_a_folder_replaces_another_only_when_it_is_whole(tmp_path):
    target = tmp_path / "model"
    write_model(target, "1")
    with pytest.raises(UserError, match="model cannot be written: disk"), staged(target) as folder:
        folder.mkdir()
        (folder / "config.json").write_text("2")
        raise OSError("disk")
    assert read_model(target) == "1"
    assert os.listdir(tmp_path) == ["model"]
    write_model(target, "3")
    assert read_model(target) == "3"
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("fails", [False, True], ids=["next write succeeds", "next write fails"])
def test_a_process_that_is_killed_while_it_replaces_a_folder_loses_nothing(tmp_path, fails):
    target = tmp_path / "model"
    write_model(target, "old")
    write_model(tmp_path / ".model.partial" / "model", "new")
    target.rename(tmp_path / ".model.partial" / "replaced")  # the state after a kill between the two renames
    if fails:
        with pytest.raises(UserError, match="disk"), staged(target):
            raise OSError("disk")
    else:
        write_model(target, "4")
    assert read_model(target) == ("old" if fails else "4")
    assert os.listdir(tmp_path) == ["model"]


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    write_model(tmp_path / "model", "old")
    write_model(tmp_path / ".model.partial" / "model", "half of new")
    with pytest.raises(UserError, match="disk"), staged(tmp_path / "model") as folder:
        assert not folder.exists()
        raise OSError("disk")
    assert read_model(tmp_path / "model") == "old"
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("write", [Path.write_text, lambda path, _: path.mkdir()], ids=["file", "folder"])
def test_a_folder_that_cannot_be_replaced_stays(tmp_path, monkeypatch, write):
    write_model(tmp_path / "model", "old")

    def fail(path, target):
        raise PermissionError("no right")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(UserError, match="model cannot be written: no right"), staged(tmp_path / "model") as path:
        write(path, "new")
    assert read_model(tmp_path / "model") == "old"
    assert os.listdir(tmp_path) == ["model"]


def test_a_staged_file(tmp_path):
    target = tmp_path / "new" / "model.onnx"
    for content in ("old", "new"):
        with staged(target) as path:
            path.write_text(content)
        assert target.read_text() == content
        assert list(target.parent.iterdir()) == [target]
    with pytest.raises(UserError, match=r"model\.onnx cannot be written"), staged(target) as path:
        path.write_text("half")
        raise OSError("disk")
    assert target.read_text() == "new"


def test_a_file_does_not_replace_a_folder_nor_a_folder_a_file(tmp_path):
    write_model(tmp_path / "model", "old")
    with pytest.raises(UserError, match="model cannot be written"), staged(tmp_path / "model") as path:
        path.write_text("new")
    assert read_model(tmp_path / "model") == "old"
    (tmp_path / "file").write_text("old")
    with pytest.raises(UserError, match="file cannot be written"):
        write_model(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["file", "model"]


def test_ctrl_c_while_a_folder_is_replaced(tmp_path):
    """Press Ctrl-C before each line of the function. The old or the new directory remains."""

    def interrupt(frame, event, _):
        nonlocal num_lines
        if frame.f_code.co_filename == staged.__wrapped__.__code__.co_filename and event == "line":
            num_lines -= 1
            if num_lines == 0:
                raise KeyboardInterrupt
        return interrupt

    left = set()
    for line in range(1, 100):
        target = tmp_path / str(line) / "model"
        write_model(target, "old")
        num_lines, trace = line, sys.gettrace()
        sys.settrace(interrupt)
        try:
            write_model(target, "new")
        except KeyboardInterrupt:
            pass
        else:
            break
        finally:
            sys.settrace(trace)
        with pytest.raises(UserError, match="disk"), staged(target):
            raise OSError("disk")
        left.add(read_model(target))
        assert os.listdir(target.parent) == ["model"]
    assert line > 10 and left == {"old", "new"}
