"""What directories of images are taken for: splits, classes, tables, or none of them."""

import os
from pathlib import Path

import pytest

from evmamba_hub.errors import UserError
from evmamba_hub.images.labeled_images import LabeledImages, open_dataset, open_splits


def create(folder: Path, *names: str) -> Path:
    """Create empty files, and their directories. Names that end with a slash are directories."""
    for name in names:
        if name.endswith("/"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        else:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"")
    return folder


def classes(*splits: str) -> list[str]:
    """The images of two classes in each split."""
    return [f"{split}/{name}/1.png" for split in splits for name in ("cat", "dog")]


def describe(images: LabeledImages) -> tuple[str | None, list[str] | None, int | None]:
    return images.split, images.class_names, images.num_images


@pytest.mark.parametrize(
    "splits, chosen",
    [
        (["train", "valid", "test"], "valid"),
        (["Train", "Val"], "Val"),
        (["TRAIN", "VALID"], "VALID"),
        (["training", "testing"], "testing"),
        (["train", "validation"], "validation"),
        (["train", "dev"], "dev"),
        (["train", "eval", "test"], "eval"),
        (["train", "Evaluation"], "Evaluation"),
        (["valid", "test"], "valid"),
        (["train"], "train"),
        (["test"], "test"),
    ],
    ids="+".join,
)
def test_usual_names_of_splits(tmp_path, splits, chosen):
    create(tmp_path, *classes(*splits), "README.md", "data.yaml", ".git/x.png", "__MACOSX/train/cat/1.png")
    assert set(open_splits(str(tmp_path))) == set(splits)
    opened = open_dataset(str(tmp_path))
    assert describe(opened) == (chosen, ["cat", "dog"], 2)
    assert [f"Took the split {chosen} of" in note for note in opened.notes] == [True] * (len(splits) > 1)


@pytest.mark.parametrize(
    "wanted, chosen",
    [("train", "Train"), ("TRAINING", "Train"), ("validation", "valid"), ("VALID", "valid"), ("testing", "TEST")],
)
def test_a_split_by_its_name_in_any_case(tmp_path, wanted, chosen):
    create(tmp_path, *classes("Train", "valid", "TEST"))
    assert open_dataset(str(tmp_path), split=wanted).split == chosen


def test_several_splits_of_a_kind(tmp_path):
    create(tmp_path, *classes("train", "val", "valid"))
    with pytest.raises(UserError, match="several splits of this kind: choose val or valid with --dataset-split"):
        open_dataset(str(tmp_path))
    with pytest.raises(UserError, match="several splits of this kind: choose val or valid with --dataset-split"):
        open_dataset(str(tmp_path), split="dev")
    assert open_dataset(str(tmp_path), split="VALID").split == "valid"
    with pytest.raises(UserError, match="has no split 'test': --dataset-split takes train, val, valid"):
        open_dataset(str(tmp_path), split="test")


@pytest.mark.parametrize(
    "others, found",
    [
        (["extra/cat/1.png"], "extra"),
        (["extra/1.png"], "extra"),
        (["extra/"], "extra"),
        (["docs/notes.txt", "labels/1.txt"], "docs, labels"),
        (["bus/1.png", "car/1.png"], "bus, car"),
        (["loose.png"], "loose.png"),
        ([f"{number}/" for number in range(7)], "0, 1, 2, 3, 4 and 2 more"),
    ],
)
def test_splits_beside_others_are_refused(tmp_path, others, found):
    create(tmp_path, *classes("train", "val"), *others)
    with pytest.raises(UserError, match=rf"holds splits \(train, val\) beside {found}: "):
        open_dataset(str(tmp_path))
    for name in ("val", "VAL"):  # who names a split says that they are splits
        assert describe(open_dataset(str(tmp_path), split=name)) == ("val", ["cat", "dog"], 2)


def test_splits_of_other_names(tmp_path):
    create(tmp_path, *classes("fold1", "fold2"))
    assert open_dataset(str(tmp_path)).class_names == ["fold1", "fold2"]
    assert describe(open_dataset(str(tmp_path), split="fold2")) == ("fold2", ["cat", "dog"], 2)
    with pytest.raises(UserError, match="has no splits: leave --dataset-split out"):
        open_dataset(str(tmp_path), split="fold3")


@pytest.mark.parametrize(
    "names",
    [["bus", "car", "train"], ["Test", "bus"], ["train", "test"], ["dev", "eval", "train"], ["test", "val"]],
    ids="+".join,
)
def test_classes_with_names_of_splits(tmp_path, names):
    create(tmp_path, *(f"{name}/{number}.png" for name in names for number in range(2)))
    opened = open_dataset(str(tmp_path))
    assert describe(opened) == (None, sorted(names), 2 * len(names))
    taken = [note for note in opened.notes if "as classes, not as splits, because images lie directly in them" in note]
    assert len(taken) == (not {"bus", "car"} & set(names))


def test_classes_may_hold_directories(tmp_path):
    create(tmp_path, "bus/2019/1.png", "car/2019/1.png", "car/2020/train/1.png", "car/2020/val/1.png")
    assert describe(open_dataset(str(tmp_path))) == (None, ["bus", "car"], 4)


@pytest.mark.parametrize(
    "names, message",
    [
        (
            ["train/cat/1.png", "test/1.png"],
            r"test/1\.png is outside the class directories: .*test must hold a directory of images",
        ),
        (["train/cat/1.png", "val/loose.png", "val/cat/1.png"], r"val/loose\.png is outside the class directories"),
        (["train/cat/1.png", "val/"], "val holds no image"),
        (["train/", "val/"], "holds no image"),
        (["train/images/1.png", "train/labels/1.txt"], "train holds images, labels instead of classes"),
        (["images/train/1.png", "images/val/1.png", "labels/train/1.txt"], "holds images, labels instead of classes"),
        (
            ["JPEGImages/1.jpg", "Annotations/1.xml", "ImageSets/Main/a.txt"],
            "holds Annotations, ImageSets, JPEGImages",
        ),
        (["images/1.png", "masks/1.png"], "holds images, masks instead of classes"),
        (["data/train/cat/1.png", "data/val/cat/1.png"], r"data holds splits \(train, val\), so it is no class: give"),
        (["data/train/cat/1.png"], r"data holds splits \(train\)"),
        (["cat/train/1.png", "cat/val/1.png", "dog/train/1.png"], r"cat holds splits \(train, val\), so it is no"),
        (["loose.png", "cat/1.png"], r"loose\.png is outside the class directories"),
        (["1.png", "2.png"], r"1\.png is outside the class directories"),
        (["notes.txt"], "holds no image"),
        ([".hidden/1.png", "__MACOSX/cat/1.png"], "holds no image"),
    ],
)
def test_unclear_layouts_are_refused(tmp_path, names, message):
    create(tmp_path, *names)
    with pytest.raises(UserError, match=message):
        open_dataset(str(tmp_path))


def test_hidden_and_foreign_directories_are_no_classes(tmp_path):
    foreign = [".ipynb_checkpoints/1.png", "__MACOSX/cat/1.png", "@eaDir/1.png", ".thumbnails/1.png"]
    inner = ["cat/.ipynb_checkpoints/1.png", "cat/._1.png", "dog/1.pdf", "dog/labels.csv"]
    create(tmp_path, "cat/1.png", "dog/1.png", *foreign, *inner)
    opened = open_dataset(str(tmp_path))
    assert describe(opened) == (None, ["cat", "dog"], 2)
    assert any(
        note.startswith("Ignored 8 files, hidden or without an image extension, such as ") for note in opened.notes
    )


def test_classes_and_splits_may_be_links(tmp_path):
    create(tmp_path, "elsewhere/a/1.png", "elsewhere/b/more/2.png", "far/cat/3.png", "far/dog/4.png")
    root = create(tmp_path / "root", "cat/")
    (root / "dog").symlink_to(tmp_path / "elsewhere/b", target_is_directory=True)
    (root / "puppy").symlink_to(tmp_path / "elsewhere/b", target_is_directory=True)
    (root / "cat/more").symlink_to(tmp_path / "elsewhere/a", target_is_directory=True)
    opened = open_dataset(str(root))
    assert (opened.class_names, opened.labels) == (["cat", "dog", "puppy"], [0, 1, 2])
    splits = create(tmp_path, "splits/") / "splits"
    (splits / "train").symlink_to(tmp_path / "far", target_is_directory=True)
    (splits / "Val").symlink_to(tmp_path / "far", target_is_directory=True)
    assert describe(open_dataset(str(splits))) == ("Val", ["cat", "dog"], 2)
    (root / "mouse").symlink_to(tmp_path / "nowhere", target_is_directory=True)
    with pytest.raises(UserError, match=r"the link .*mouse leads nowhere"):
        open_dataset(str(root))


@pytest.mark.parametrize("split, place", [(None, ""), (None, "cat"), ("val", ""), ("val", "val"), ("val", "val/cat")])
@pytest.mark.parametrize("name", ["labels.csv", "labels.jsonl", "metadata.csv", "metadata.jsonl", "state.json"])
def test_tables_change_no_classes(tmp_path, name, split, place):
    """Whatever they hold, unless a metadata file names images."""
    create(tmp_path, *(["cat/1.png", "dog/1.png"] if split is None else classes("train", "val")))
    texts = [b"path,label\ncat/1.png,3\n", b"file_name,label\n", b'{"path": "cat/1.png"}\n', b"[1]\n2\n"]
    for content in (*texts, b"", b"\x89PNG\0\xff\xfe"):
        (tmp_path / place / name).write_bytes(content)
        assert describe(open_dataset(str(tmp_path))) == (split, ["cat", "dog"], 2)


def test_tables_of_images_in_classes_are_announced(tmp_path):
    create(tmp_path, "cat/1.png", "dog/1.png", "features.parquet")
    opened = open_dataset(str(tmp_path))
    assert opened.class_names == ["cat", "dog"]
    assert any("instead of" in note and "features.parquet" in note for note in opened.notes)


@pytest.mark.parametrize("root", ["a[1]", "[a-z]", "a*b", "why?", ".cache/data", "übung", "a b", "x.png"])
def test_any_path_works(tmp_path, monkeypatch, root):
    folder = create(tmp_path / root, "cat/1.png", "d[o]g/1[a].png", "labels.csv")
    assert describe(open_dataset(str(folder))) == (None, ["cat", "d[o]g"], 2)
    monkeypatch.chdir(folder)
    assert describe(open_dataset(".")) == (None, ["cat", "d[o]g"], 2)
    assert open_dataset("./").class_names == ["cat", "d[o]g"]
    monkeypatch.chdir(folder / "cat")
    assert open_dataset("..").class_names == ["cat", "d[o]g"]


def test_forms_of_unicode_are_one_class(tmp_path):
    create(tmp_path, "\u00fcbung/1.png", "u\u0308bung/2.png", "tea/1.png")
    assert describe(open_dataset(str(tmp_path))) == (None, ["tea", "\u00fcbung"], 3)


@pytest.mark.parametrize(
    "name, message",
    [
        ("flowers.zip", "is an archive: unpack it, and give a directory with a directory of images per class"),
        ("flowers.tar.gz", "is an archive: unpack it"),
        ("flowers.TAR", "is an archive: unpack it"),
        ("train.parquet", "is a single data file: give the directory that holds it"),
        ("labels.csv", r"is a file: give a directory with .*, or one of images with a metadata\.csv"),
        ("labels.jsonl", "is a file: give a directory"),
        ("model.safetensors", "is a file of a model: give a directory"),
        ("model.PTH", "is a file of a model"),
        ("cat.jpg", "is a single image: give a directory"),
        ("notes", "is no directory: give a directory"),
    ],
)
def test_files_are_no_datasets(tmp_path, monkeypatch, name, message):
    create(tmp_path, name)
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / name, name, f"{name}/"):
        with pytest.raises(UserError, match=message):
            open_dataset(str(path))


def test_pipes_and_broken_links_are_no_datasets(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("pipe", "link"):
        with pytest.raises(UserError, match="is no directory: give a directory"):
            open_dataset(str(tmp_path / name))


def test_names_that_no_path_can_have(hub):
    for name in ("x" * 300, "a/" * 3000):
        with pytest.raises(UserError, match="neither a path nor a valid repository id"):
            open_dataset(name)
