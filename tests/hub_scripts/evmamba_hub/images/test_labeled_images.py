"""Datasets from every source, and their shares for several processes."""

import random
import shutil
from itertools import chain, islice
from pathlib import Path

import datasets
import pandas
import pytest
from PIL import Image

from evmamba_hub.errors import UserError
from evmamba_hub.images.labeled_images import (
    IndexedImages,
    LabeledImages,
    Share,
    StreamedImages,
    open_dataset,
    open_splits,
)


NAMES = [str(digit) for digit in range(10)]


@pytest.fixture(scope="module")
def digits(digit_images) -> datasets.Dataset:
    """A dataset of 61 shuffled digits."""
    paths = sorted(digit_images.glob("*/*.png"))
    random.Random(0).shuffle(paths)
    paths = paths[:61]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    columns = {"image": [str(path) for path in paths], "label": [int(path.parent.name) for path in paths]}
    return datasets.Dataset.from_dict(columns, features=features)


def parquet_files(dataset: datasets.Dataset, folder: Path, num_shards: int, split: str = "test") -> dict[str, bytes]:
    files = {}
    for index in range(num_shards):
        path = folder / f"{split}-{index:05}-of-{num_shards:05}.parquet"
        dataset.shard(num_shards, index, contiguous=True).to_parquet(path)
        files[f"data/{path.name}"] = path.read_bytes()
    return files


@pytest.fixture(params=["saved", "saved_dict", "parquet", "hub"])
def opened(request, hub, digits, tmp_path) -> LabeledImages:
    if request.param == "saved":
        digits.save_to_disk(tmp_path / "digits")
    elif request.param == "saved_dict":
        datasets.DatasetDict({"train": digits.select(range(3)), "test": digits}).save_to_disk(tmp_path / "digits")
    else:
        files = parquet_files(digits, tmp_path, 2)
        if request.param == "hub":
            hub.create("someone/digits-data", files, kind="dataset")
            return open_dataset("someone/digits-data")
        (tmp_path / "digits" / "data").mkdir(parents=True)
        for name, content in files.items():
            (tmp_path / "digits" / name).write_bytes(content)
    return open_dataset(str(tmp_path / "digits"))


def pixels_and_labels(images) -> list[tuple[bytes, int]]:
    return [(image.read().tobytes(), image.label) for image in images]


def test_kinds_of_datasets(opened, digits):
    assert opened.class_names == NAMES
    assert opened.num_images in (61, None)
    expected = [(row["image"].convert("RGB").tobytes(), row["label"]) for row in digits]
    assert sorted(pixels_and_labels(opened.read(Share(0, 1)))) == sorted(expected)


@pytest.mark.parametrize("kind", ["classes", "names", "directories"])
def test_labels_are_in_nfc(tmp_path, kind):
    """Systems differ in the Unicode form of the same name."""
    nfc, nfd = "gr\u00fcn", "gru\u0308n"
    (tmp_path / "data" / nfd).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "data" / nfd / "image.png")
    if kind != "directories":
        feature = datasets.ClassLabel(names=[nfd]) if kind == "classes" else datasets.Value("string")
        columns = {"image": [str(tmp_path / "data" / nfd / "image.png")], "label": [nfd]}
        features = datasets.Features({"image": datasets.Image(), "label": feature})
        datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "table")
    images = open_dataset(str(tmp_path / ("data" if kind == "directories" else "table")))
    (image,) = images.read(Share(0, 1))
    names = images.class_names
    assert (names or images.labels) == [nfc]
    assert image.label == (nfc if names is None else 0)


@pytest.mark.parametrize("num_processes", [2, 3])
def test_shares_are_the_dataset_each_image_once(opened, num_processes):
    shares = [pixels_and_labels(opened.read(Share(index, num_processes))) for index in range(num_processes)]
    everything = pixels_and_labels(opened.read(Share(0, 1)))
    assert sorted(chain(*shares)) == sorted(everything)
    for index, share in enumerate(shares):
        assert len(share) > 0
        assert pixels_and_labels(islice(opened.read(Share(index, num_processes)), 7, None)) == share[7:]


def test_images_by_index(opened):
    if isinstance(opened, StreamedImages):
        pytest.skip("a stream has no indices")
    everything = list(opened.read(Share(0, 1)))
    assert isinstance(opened, IndexedImages)
    assert opened.labels == [image.label for image in everything]
    assert opened[60].read().tobytes() == everything[60].read().tobytes()


def test_a_shuffled_stream(hub, digits, tmp_path):
    hub.create("someone/digits-data", parquet_files(digits, tmp_path, 2), kind="dataset")
    opened = open_dataset("someone/digits-data")
    orders = [
        pixels_and_labels(opened.shuffle(*order).read(Share(0, 1))) for order in [(0, 0), (0, 0), (0, 1), (1, 0)]
    ]
    assert orders[0] == orders[1]
    assert orders[0] not in orders[2:]
    assert sorted(orders[0]) == sorted(orders[2]) == sorted(pixels_and_labels(opened.read(Share(0, 1))))


def test_a_folder_of_images(digit_images):
    opened = open_dataset(str(digit_images))
    assert (opened.class_names, opened.num_images, opened.hub_id) == (NAMES, 599, None)
    shares = [list(opened.read(Share(index, 2))) for index in range(2)]
    assert [len(share) for share in shares] == [300, 299]
    for image in chain(*shares):
        assert Path(image.name).parent.name == opened.class_names[image.label]


def test_streams_of_the_hub_keep_to_one_commit(hub, digits, tmp_path):
    repo = hub.create("someone/digits-data", parquet_files(digits, tmp_path, 1), kind="dataset")
    old = repo.refs["main"]
    opened = open_dataset("someone/digits-data")
    assert (opened.hub_id, opened.revision, opened.split) == ("someone/digits-data", old, "test")
    files = {name: blob for name, blob in repo.commits[old].files.items() if not name.endswith(".parquet")}
    repo.commit("main", files, "Remove the data", old)
    assert len(list(opened.read(Share(0, 1)))) == 61
    assert len(list(open_dataset("someone/digits-data", revision=old).read(Share(0, 1)))) == 61


def test_gated_and_missing_datasets(hub, digits, tmp_path):
    hub.create("else/gated", parquet_files(digits, tmp_path, 1), kind="dataset", gated=True)
    with pytest.raises(UserError, match="else/gated is gated"):
        open_dataset("else/gated")
    for name in ("someone/missing", str(tmp_path / "missing")):
        with pytest.raises(UserError, match="repository"):
            open_dataset(name)


def test_a_stream_that_breaks_off(hub, digits, tmp_path):
    hub.create("someone/digits-data", parquet_files(digits, tmp_path, 1), kind="dataset")
    opened = open_dataset("someone/digits-data")
    hub.repos.clear()
    with pytest.raises(UserError, match="someone/digits-data"):
        list(opened.read(Share(0, 1)))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"split": "train"}, "has no split 'train': --dataset-split takes a, b"),
        ({}, "choose a split of .* with --dataset-split: it has a, b"),
        ({"split": "a", "image_column": "photo"}, "has no column photo: choose one of image, label"),
        ({"split": "a", "image_column": "label"}, "the column label of .* holds no images"),
    ],
)
def test_wrong_splits_and_columns(digits, tmp_path, options, message):
    datasets.DatasetDict({"a": digits, "b": digits}).save_to_disk(tmp_path)
    with pytest.raises(UserError, match=message):
        open_dataset(str(tmp_path), **options)


def test_columns_without_the_usual_types(digits, tmp_path):
    names = digits.cast_column("label", datasets.Value("string")).rename_column("label", "kind")
    names.save_to_disk(tmp_path)
    with pytest.raises(UserError, match=r"choose the label column of .* with --label-column: it has image, kind"):
        open_dataset(str(tmp_path))
    opened = open_dataset(str(tmp_path), label_column="kind")
    assert opened.class_names is None
    assert next(opened.read(Share(0, 1))).label in NAMES


def test_options_that_a_folder_of_images_has_not(digit_images):
    with pytest.raises(UserError, match="has no splits: leave --dataset-split out"):
        open_dataset(str(digit_images), split="test")
    with pytest.raises(UserError, match="neither configurations, revisions nor columns"):
        open_dataset(str(digit_images), revision="main")


def test_a_folder_of_splits(digit_images, tmp_path):
    for split, digit in (("train", "3"), ("train", "5"), ("val", "3")):
        shutil.copytree(digit_images / digit, tmp_path / split / digit)
    assert {split: opened().class_names for split, opened in open_splits(str(tmp_path)).items()} == {
        "train": ["3", "5"],
        "val": ["3"],
    }
    opened = open_dataset(str(tmp_path))
    assert (opened.split, opened.class_names) == ("val", ["3"])
    shutil.copytree(digit_images / "7", tmp_path / "car")  # is `train` a class now?
    with pytest.raises(UserError, match=r"holds splits \(train, val\) beside car"):
        open_dataset(str(tmp_path))


def write_metadata(folder: Path, suffix: str, rows: dict[str, list]) -> None:
    frame = pandas.DataFrame(rows)
    if suffix == ".csv":
        frame.to_csv(folder / "metadata.csv", index=False)
    elif suffix == ".jsonl":
        frame.to_json(folder / "metadata.jsonl", orient="records", lines=True)
    else:
        frame.to_parquet(folder / "metadata.parquet")


@pytest.fixture(params=["digits", "digits[0-9]*?"])
def flat(request, digit_images, tmp_path) -> Path:
    """A directory of digits without classes: 0.png ... 9.png in `images`."""
    folder = tmp_path / request.param
    (folder / "images").mkdir(parents=True)
    for digit in NAMES:
        shutil.copy(min((digit_images / digit).iterdir()), folder / "images" / f"{digit}.png")
    return folder


FILE_NAMES = [f"images/{digit}.png" for digit in range(10)]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize(
    "labels", [list(range(10)), [f"no. {digit}" for digit in range(10)]], ids=["numbers", "names"]
)
def test_a_metadata_file_names_images_and_labels(flat, suffix, labels):
    write_metadata(flat, suffix, {"file_name": FILE_NAMES[::-1], "label": labels[::-1], "remark": [None] * 10})
    opened = open_dataset(str(flat))
    assert (opened.name, opened.class_names, opened.labels) == (str(flat), None, labels[::-1])
    images = list(opened.read(Share(0, 1)))
    assert [image.label for image in images] == labels[::-1]
    assert images[0].read().tobytes() == Image.open(flat / FILE_NAMES[9]).convert("RGB").tobytes()
    assert opened.notes == (f"Read the labels in the column label of {flat / 'metadata'}{suffix}",)


def test_the_label_column_of_a_metadata_file(flat):
    write_metadata(flat, ".csv", {"file_name": FILE_NAMES, "kind": NAMES, "image": NAMES})
    with pytest.raises(
        UserError, match=r"choose the label column of .* with --label-column: it has file_name, kind, image"
    ):
        open_dataset(str(flat))
    assert open_dataset(str(flat), label_column="kind").labels == list(range(10))
    with pytest.raises(UserError, match="has no column color: choose one of file_name, kind, image"):
        open_dataset(str(flat), label_column="color")
    with pytest.raises(UserError, match="neither configurations, revisions nor columns"):
        open_dataset(str(flat), label_column="kind", config="default")


def test_gaps_in_a_metadata_file(flat):
    write_metadata(flat, ".csv", {"file_name": [*FILE_NAMES[:9], None], "label": [None, *range(1, 10)]})
    opened = open_dataset(str(flat))
    assert opened.labels == [None, *range(1, 10)]
    with pytest.raises(UserError, match=r"image 9 of .*: it is not an image"):
        opened[9].read()
    (flat / "metadata.csv").write_text("file_name,label\nimages/0.png,NA\nimages/1.png,None\n")
    assert open_dataset(str(flat)).labels == ["NA", "None"]


@pytest.mark.parametrize("name", ["../images/0.png", "/etc/passwd", "images/../../x.png"])
def test_metadata_files_stay_in_their_directory(flat, name):
    write_metadata(flat, ".csv", {"file_name": [*FILE_NAMES[:9], name], "label": NAMES})
    with pytest.raises(UserError, match=r"metadata\.csv names the image .*, which lies outside of"):
        open_dataset(str(flat))


def test_metadata_files_of_splits(flat, tmp_path):
    write_metadata(flat, ".csv", {"file_name": FILE_NAMES, "label": NAMES})
    for split in ("Train", "valid"):
        shutil.copytree(flat, tmp_path / "splits" / split)
    opened = open_dataset(str(tmp_path / "splits"))
    assert (opened.split, opened.labels) == ("valid", list(range(10)))
    write_metadata(
        tmp_path / "splits", ".csv", {"file_name": [f"Train/{name}" for name in FILE_NAMES], "label": NAMES}
    )
    assert open_dataset(str(tmp_path / "splits")).split == "valid"
    for split in ("Train", "valid"):
        (tmp_path / "splits" / split / "metadata.csv").unlink()
        shutil.move(tmp_path / "splits" / split / "images" / "0.png", tmp_path / "splits" / split)
        shutil.rmtree(tmp_path / "splits" / split / "images")
    with pytest.raises(UserError, match=r"metadata\.csv lists images of several splits, Train and valid"):
        open_dataset(str(tmp_path / "splits"))


def test_a_metadata_file_beside_classes(digit_images, tmp_path):
    for digit in "35":
        shutil.copytree(digit_images / digit, tmp_path / digit)
    names = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png"))
    write_metadata(tmp_path, ".csv", {"file_name": names, "text": ["a digit"] * len(names)})
    opened = open_dataset(str(tmp_path))
    assert (opened.class_names, opened.num_images) == (["3", "5"], len(names))
    assert any("metadata.csv has no column label" in note for note in opened.notes)
    write_metadata(tmp_path, ".csv", {"file_name": names[:5], "label": ["three"] * 5})
    opened = open_dataset(str(tmp_path))
    assert (opened.labels, opened.num_images) == (["three"] * 5, 5)
    assert any("Read the labels in the column label of" in note for note in opened.notes)


TABLES = {
    "semicolons": ("metadata.csv", b"file_name;label\nimages/0.png;zero\n"),
    "tabs": ("metadata.csv", b"file_name\tlabel\nimages/0.png\tzero\n"),
    "cp1252": ("metadata.csv", "file_name,label\nimages/0.png,pêche\n".encode("cp1252")),
    "utf-16": ("metadata.csv", "file_name,label\nimages/0.png,pêche\n".encode("utf-16")),
    "another column": ("metadata.csv", b"image,label\nimages/0.png,zero\n"),
    "header only": ("metadata.csv", b"file_name,label\n"),
    "empty": ("metadata.csv", b""),
    "cut JSON": ("metadata.jsonl", b'{"file_name": "images/0.png", "lab'),
}


@pytest.mark.parametrize("name, content", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("place", [".", "images", "photos"])
@pytest.mark.parametrize("splits", [(), ("train", "val")], ids=["one set", "splits"])
def test_a_metadata_file_that_names_no_images(digit_images, tmp_path, name, content, place, splits):
    for folder in [tmp_path / split for split in splits] or [tmp_path]:
        shutil.copytree(digit_images / "3", folder / place, dirs_exist_ok=True)
        (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name} names no images: save it .*with .*columns file_name and label, or"):
        open_dataset(str(tmp_path))
    with pytest.raises(UserError, match=rf"{name} names no images"):
        open_dataset(str(tmp_path), label_column="label")


@pytest.mark.parametrize("name, content", TABLES.values(), ids=TABLES)
def test_a_metadata_file_that_names_no_images_beside_classes(digit_images, tmp_path, name, content):
    for digit in "35":
        shutil.copytree(digit_images / digit, tmp_path / digit)
    (tmp_path / name).write_bytes(content)
    opened = open_dataset(str(tmp_path))
    assert opened.class_names == ["3", "5"]
    assert f"Took the directories as classes, because {tmp_path / name} names no images" in opened.notes


@pytest.fixture(params=["brackets", "a linked directory", "both"])
def odd_directory(request, digits, tmp_path) -> Path:
    """A directory of Parquet files that `datasets` itself does not find."""
    folder = tmp_path / ("digits" if request.param == "a linked directory" else "digits[1]*?")
    target = folder / "data" if request.param == "brackets" else tmp_path / "elsewhere"
    target.mkdir(parents=True)
    folder.mkdir(exist_ok=True)
    for name, content in parquet_files(digits, tmp_path, 2).items():
        (target / Path(name).name).write_bytes(content)
    if request.param != "brackets":
        (folder / "data").symlink_to(target, target_is_directory=True)
    return folder


@pytest.mark.parametrize("streaming", [True, False])
def test_parquet_files_at_any_path(odd_directory, digits, streaming):
    opened = open_dataset(str(odd_directory), streaming=streaming)
    assert (opened.name, opened.split, opened.class_names) == (str(odd_directory), "test", NAMES)
    assert [image.label for image in opened.read(Share(0, 1))] == digits["label"][:]
    # the directory changes
    files = sorted(path for path in (odd_directory / "data").iterdir())
    files[0].unlink()
    opened = open_dataset(str(odd_directory), streaming=streaming)
    assert [image.label for image in opened.read(Share(0, 1))] == digits["label"][31:]


def test_saved_datasets_at_any_path(digits, tmp_path, monkeypatch):
    digits.save_to_disk(tmp_path / "digits[1]*?")
    assert open_dataset(str(tmp_path / "digits[1]*?")).labels == digits["label"][:]
    monkeypatch.chdir(tmp_path / "digits[1]*?")
    assert open_dataset(".").labels == digits["label"][:]


def test_a_directory_with_the_name_of_a_format(digits, tmp_path, monkeypatch):
    (tmp_path / "parquet/data").mkdir(parents=True)
    for name, content in parquet_files(digits, tmp_path, 1).items():
        (tmp_path / "parquet" / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    assert open_dataset("parquet").class_names == NAMES


def test_pictures_beside_parquet_files(digits, tmp_path):
    for name, content in parquet_files(digits, tmp_path, 1).items():
        for place in ("one", "two"):
            (tmp_path / place / name).parent.mkdir(parents=True)
            (tmp_path / place / name).write_bytes(content)
    for name in ("one/assets/banner.png", "two/assets/banner.png", "two/docs/plot.png"):
        (tmp_path / name).parent.mkdir()
        Image.new("L", (2, 2)).save(tmp_path / name)
    assert open_dataset(str(tmp_path / "one")).class_names == NAMES
    opened = open_dataset(str(tmp_path / "two"))  # two directories of images may be classes
    assert opened.class_names == ["assets", "docs"]
    assert any("instead of" in note and ".parquet" in note for note in opened.notes)
    assert open_dataset(str(tmp_path / "two"), label_column="label").class_names == NAMES


def test_images_beside_the_classes(tmp_path, digit_images):
    (tmp_path / "loose.png").write_bytes(next(digit_images.glob("*/*.png")).read_bytes())
    with pytest.raises(UserError, match=r"loose\.png is outside the class directories"):
        open_dataset(str(tmp_path))
