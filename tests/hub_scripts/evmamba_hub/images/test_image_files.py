import pytest

from evmamba_hub.errors import UserError
from evmamba_hub.images.image_files import find_images


def test_folders_are_searched_in_order(tmp_path):
    (tmp_path / "inner").mkdir()
    for name in ("b.png", "inner/a.JPG", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    single = tmp_path / "notes.txt"
    assert find_images([tmp_path, single]) == [tmp_path / "b.png", tmp_path / "inner/a.JPG", single]


def test_missing_paths_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"missing\.png does not exist"):
        find_images([tmp_path / "missing.png"])
    with pytest.raises(UserError, match="holds no image"):
        find_images([tmp_path])
