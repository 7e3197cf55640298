import os
import socket
import tempfile
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from evmamba_hub.errors import UserError
from evmamba_hub.images.image_files import find_images, list_decodable_suffixes, list_directories


def create(folder: Path, *names: str) -> None:
    """Create empty files, and their directories."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def find_names(folder: Path) -> list[str]:
    return [file.relative_to(folder).as_posix() for file in find_images([folder]).files]


@contextmanager
def without_rights():
    """Act as a user who may not read everything, as root may."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_folders_are_searched_in_order(tmp_path):
    create(tmp_path, "b.png", "inner/a.JPG", "notes.txt")
    single = tmp_path / "notes.txt"
    found = find_images([tmp_path, single])
    assert found.files == [tmp_path / "b.png", tmp_path / "inner/a.JPG", single]
    assert found.ignored == [single]


def test_missing_paths_and_empty_folders_are_refused(tmp_path):
    for name in ("missing.png", "x" * 300, "a" * 5000):
        with pytest.raises(UserError, match="does not exist"):
            find_images([tmp_path / name])
    with pytest.raises(UserError, match="holds no image"):
        find_images([tmp_path])
    create(tmp_path, "photo.heic", "table.h5")
    with pytest.raises(UserError, match=r"holds no image.*Ignored 2 files, .*, such as .*photo\.heic"):
        find_images([tmp_path])


IGNORED = [
    ".DS_Store",
    ".hidden.png",
    "._b.png",
    ".thumbnails/b.png",
    ".ipynb_checkpoints/b-checkpoint.png",
    ".ipynb_checkpoints/deep/er/b.png",
    "__MACOSX/b.png",
    "@eaDir/b.png/SYNOFILE_THUMB_M.jpg",
    "deep/er/@eaDir/thumb.jpg",
    "$Recycle.Bin/b.png",
    "paper.pdf",
    "film.mpg",
    "table.h5",
    "field.grib",
    "Thumbs.db",
    "notes",
]


def test_hidden_and_foreign_files_are_ignored_and_counted(tmp_path):
    wanted = ["b.png", "c.PNG", "deep/er/c.webp", "folder.png/d.jpg", "x.y.tif"]
    create(tmp_path, *wanted, *IGNORED)
    found = find_images([tmp_path])
    assert found.files == sorted(tmp_path / name for name in wanted)
    assert sorted(found.ignored) == sorted(tmp_path / name for name in IGNORED)
    assert find_images([tmp_path / ".hidden.png"]).files == [tmp_path / ".hidden.png"]  # who names a file wants it


@pytest.mark.parametrize("root", [".cache/data", "@eaDir", "__MACOSX", "[a]*?"])
def test_the_root_may_have_any_name(tmp_path, monkeypatch, root):
    create(tmp_path / root, "cat/a.png", "cat/.b.png")
    assert find_names(tmp_path / root) == ["cat/a.png"]
    assert [path.name for path in list_directories(tmp_path / root)] == ["cat"]
    monkeypatch.chdir(tmp_path / root / "cat")
    assert find_images([Path()]).files == [Path("a.png")]
    assert find_images([Path("..")]).files == [Path("../cat/a.png")]


def test_formats_that_pillow_reads_here_are_images(tmp_path):
    """All formats of which Pillow writes files that it can also read."""
    suffixes = list_decodable_suffixes()
    for suffix, name in Image.registered_extensions().items():
        if name not in Image.SAVE or suffix in suffixes:
            continue
        content = BytesIO()
        try:
            Image.new("RGB", (16, 16)).save(content, name)
            Image.open(BytesIO(content.getvalue())).load()
        except (OSError, ValueError, KeyError):
            continue
        pytest.fail(f"{suffix} is ignored")
    assert {".jpg", ".jpeg", ".png", ".webp", ".tiff", ".mpo", ".gif", ".bmp"} <= suffixes
    assert not suffixes & {".pdf", ".mpg", ".mpeg", ".h5", ".hdf", ".grib", ".bufr", ".palm"}


def test_links_are_followed(tmp_path):
    create(tmp_path, "elsewhere/a.png", "elsewhere/inner/b.png", "more/c.png")
    (tmp_path / "elsewhere/inner/more").symlink_to(tmp_path / "more", target_is_directory=True)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (folder / "again").symlink_to("../elsewhere", target_is_directory=True)
    (folder / "file.png").symlink_to(tmp_path / "elsewhere/a.png")
    inside = ["a.png", "inner/b.png", "inner/more/c.png"]
    assert find_names(folder) == [
        *(f"again/{name}" for name in inside),
        "file.png",
        *(f"linked/{name}" for name in inside),
    ]
    assert [path.name for path in list_directories(folder)] == ["again", "linked"]
    (tmp_path / "root").symlink_to(folder, target_is_directory=True)
    assert len(find_names(tmp_path / "root")) == 7


def test_loops_of_links_end(tmp_path):
    folder = tmp_path / "folder"
    create(folder, "a/x.png", "a/b/y.png", "c/z.png")
    create(tmp_path, "outside.png")
    (folder / "self").symlink_to(folder, target_is_directory=True)
    (folder / "a/up").symlink_to("..", target_is_directory=True)
    (folder / "a/b/higher").symlink_to(tmp_path, target_is_directory=True)
    (folder / "a/b/circle").symlink_to("circle")
    (folder / "circle.png").symlink_to("circle.png")
    # each leads to the other
    (folder / "a/to_c").symlink_to(folder / "c", target_is_directory=True)
    (folder / "c/to_a").symlink_to(folder / "a", target_is_directory=True)
    names = find_names(folder)
    assert names == [
        "a/b/y.png",
        "a/to_c/z.png",
        "a/x.png",
        "c/to_a/b/y.png",
        "c/to_a/x.png",
        "c/z.png",
        "circle.png",
    ]


def test_many_links_to_each_other_take_no_time(tmp_path):
    for number in range(12):
        create(tmp_path, f"{number:02}/{number}.png")
        for other in range(12):
            (tmp_path / f"{number:02}/to_{other:02}").symlink_to(f"../{other:02}", target_is_directory=True)
    assert len(find_names(tmp_path)) == 12 * 12  # all directories, once below each


def test_a_directory_counts_once_below_an_entry(tmp_path):
    """By its own path, even if a link to it comes first."""
    create(tmp_path, "class/z/real/a.png")
    (tmp_path / "class/link").symlink_to("z", target_is_directory=True)
    (tmp_path / "class/z/again").symlink_to("real", target_is_directory=True)
    assert find_names(tmp_path) == ["class/z/real/a.png"]


def test_broken_links(tmp_path):
    """A broken link to an image is an image that cannot be read. One that may be a directory of images is refused."""
    create(tmp_path, "cat/a.png")
    (tmp_path / "cat/b.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "cat/c.txt").symlink_to(tmp_path / "nowhere.txt")
    assert find_names(tmp_path) == ["cat/a.png", "cat/b.png"]
    assert list_directories(tmp_path / "cat") == []
    (tmp_path / "dog").symlink_to(tmp_path / "nowhere", target_is_directory=True)
    with pytest.raises(UserError, match=r"the link .*dog leads nowhere: restore what it leads to, or remove it"):
        list_directories(tmp_path)


def test_pipes_and_sockets_are_ignored(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    create(tmp_path, "a.png")
    os.mkfifo("b.png")
    (tmp_path / "c.png").symlink_to("b.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("d.png")
        found = find_images([tmp_path])
    assert (found.files, len(found.ignored)) == ([tmp_path / "a.png"], 3)


def test_directories_without_permission():
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        create(folder, "cat/a.png", "dog/a.png", "lost+found/a.png")
        folder.chmod(0o755)
        (folder / "lost+found").chmod(0)
        with without_rights():
            assert find_names(folder) == ["cat/a.png", "dog/a.png"]  # nobody misses what a system keeps there
        (folder / "dog").chmod(0)
        with without_rights(), pytest.raises(UserError, match=r"directory .*dog cannot be read: Permission denied"):
            find_images([folder])
        for name in ("dog", "lost+found"):
            (folder / name).chmod(0o755)
