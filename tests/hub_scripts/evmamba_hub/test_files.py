"""Files that are whole at any moment."""

import pytest

from evmamba_hub.errors import UserError
from evmamba_hub.files import partial_name, write_atomic


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
