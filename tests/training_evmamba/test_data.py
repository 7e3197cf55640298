import multiprocessing
import os
import re
import shutil
from collections import Counter
from io import BytesIO
from itertools import chain, islice
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from evmamba_hub.errors import UserError
from evmamba_hub.images.labeled_images import ImageFolder, SelectedImages, Share
from evmamba_hub.inference.evaluation import Preprocessor
from training_evmamba.augmentation_library import create_augmentation
from training_evmamba.data import (
    MAX_UNREADABLE_IN_A_ROW,
    UNREADABLE_LABEL,
    ClassifiedImageReader,
    SampleReader,
    ShuffledBatchSampler,
    ValidationReader,
    choose_held_out,
    create_training_loader,
    create_validation_loader,
    find_class_names,
    open_data,
)
from training_evmamba.network import complete_recipe, create_image_processor
from training_runs import start


WHOLE = Share(0, 1)  # of a dataset


def to_rows(table: datasets.Dataset) -> list[dict]:
    """With images as they are stored."""
    return list(table.cast_column("image", datasets.Image(decode=False)))


def create_loader(data, recipe, batch_size=8, start=0, share=WHOLE):
    recipe = complete_recipe(recipe, None)
    transform, _ = create_augmentation(recipe, len(data.class_names), batch_size)
    read_sample = SampleReader(ClassifiedImageReader(data.class_names, transform), recipe.seed)
    return create_training_loader(data, recipe, read_sample, batch_size, start, share)


def create_validation_reader(data, recipe) -> ValidationReader:
    return ValidationReader(data.class_names, Preprocessor(create_image_processor(complete_recipe(recipe, None))))


def read_batches(recipe, number, *, batch_size=8, start=0, share=WHOLE) -> list:
    return list(islice(create_loader(open_data(recipe), recipe, batch_size, start, share), number))


def assert_same(batches, others) -> None:
    assert len(batches) == len(others) > 0
    for batch, other in zip(batches, others, strict=True):
        assert torch.equal(batch.labels, other.labels)
        assert torch.equal(batch.pixel_values, other.pixel_values)


@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_the_sequence_uses_each_image_once_per_epoch(num_processes):
    shares = [
        islice(ShuffledBatchSampler(10, 8, 0, 0, Share(process, num_processes)), 10)
        for process in range(num_processes)
    ]
    batches = [list(chain(*parts)) for parts in zip(*shares, strict=True)]
    assert {len(batch) for batch in batches} == {8}
    items = list(chain(*batches))
    assert [place for place, _ in items] == list(range(80))
    epochs = [[index for _, index in items[first : first + 10]] for first in range(0, 80, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
    later = list(chain(*islice(ShuffledBatchSampler(10, 8, 0, 7, WHOLE), 3)))
    assert later == items[56:]
    assert list(chain(*islice(ShuffledBatchSampler(10, 8, 1, 0, WHOLE), 10))) != items


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_images_depend_on_their_place_alone(make_recipe, num_workers):
    everything = read_batches(make_recipe(), 8)
    assert {tuple(batch.pixel_values.shape) for batch in everything} == {(8, 3, 16, 16)}
    assert_same(read_batches(make_recipe(num_workers=num_workers), 3, start=5), everything[5:])
    shares = [read_batches(make_recipe(num_workers=num_workers), 8, share=Share(process, 2)) for process in range(2)]
    for whole, *parts in zip(everything, *shares, strict=True):
        assert torch.equal(whole.pixel_values, torch.cat([part.pixel_values for part in parts]))
    # the second epoch repeats the first image, with another augmentation
    assert not torch.equal(everything[0].pixel_values, read_batches(make_recipe(seed=1), 1)[0].pixel_values)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_batches_of_an_evaluation_depend_on_no_workers(make_recipe, num_workers):
    """In float32, the logits of an image depend on its batch by rounding."""
    data = open_data(make_recipe())
    read_sample = create_validation_reader(data, make_recipe())
    loaders = [
        create_validation_loader(data, make_recipe(num_workers=number), read_sample, 4, Share(1, 2))
        for number in (0, num_workers)
    ]
    assert_same(*map(list, loaders))
    assert [len(batch.labels) for batch in loaders[0]] == [4, 1]


@pytest.fixture(params=["affinity", "count"])
def one_cpu(request, monkeypatch):
    """Let the process use one CPU, on systems with and without `os.sched_setaffinity`."""
    if request.param == "count":
        monkeypatch.delattr(os, "sched_getaffinity", raising=False)
        monkeypatch.setattr(os, "cpu_count", lambda: 1)
        yield
    elif hasattr(os, "sched_setaffinity"):
        cpus = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(cpus)})
        yield
        os.sched_setaffinity(0, cpus)
    else:
        pytest.skip("the system has no CPU affinity")


def test_images_on_disk_are_read_by_one_worker_per_cpu(one_cpu, make_recipe, recwarn):
    for number, expected in ((0, 0), (1, 1), (3, 1)):
        recipe = make_recipe(num_workers=number)
        data = open_data(recipe)
        read_sample = create_validation_reader(data, recipe)
        assert create_loader(data, recipe).num_workers == expected
        assert create_validation_loader(data, recipe, read_sample, 8, WHOLE).num_workers == expected
        reduced = "Reduced --num-workers from 3 to 1, the number of available CPUs"
        assert [note for note in data.notes if "workers" in note] == ([reduced] if number > 1 else [])
    assert not recwarn.list


@pytest.fixture
def spawned_workers():
    """Start the workers of data loaders as on Windows and macOS: without the memory of this process."""
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


@pytest.mark.slow
def test_spawned_workers_give_the_same_batches(spawned_workers, make_recipe):
    recipe, with_worker = make_recipe(), make_recipe(num_workers=1)
    assert_same(read_batches(with_worker, 2), read_batches(recipe, 2))
    data = open_data(recipe)
    read_sample = create_validation_reader(data, recipe)
    loaders = [create_validation_loader(data, each, read_sample, 4, WHOLE) for each in (recipe, with_worker)]
    assert_same(*map(list, loaders))


@pytest.mark.slow
def test_spawned_workers_read_a_stream(spawned_workers, make_recipe, stream):
    options = {"dataset": stream, "streaming": True, "images_per_epoch": 37}
    batches = read_batches(make_recipe(**options, num_workers=1), 2)
    assert_same(batches, read_batches(make_recipe(**options), 2))


def test_part_of_the_training_images_is_held_out_where_there_is_no_other_split(make_recipe, stripes):
    data = open_data(make_recipe(dataset=str(stripes / "train"), validation_fraction=0.2))
    assert (data.training.num_images, data.validation.num_images, data.images_per_epoch) == (30, 7, 30)
    assert isinstance(data.validation, SelectedImages)
    names = [{image.name for image in images.read(WHOLE)} for images in (data.training, data.validation)]
    assert names[0].isdisjoint(names[1])
    assert data.validation.labels == [image.label for image in data.validation.read(WHOLE)]
    everything = open_data(make_recipe(dataset=str(stripes / "train"), validation_fraction=0.0))
    assert (everything.training.num_images, everything.validation) == (37, None)


def create_classes(folder: Path, **counts: int) -> Path:
    """Create empty images: so many of each class."""
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            (folder / name / f"{index}.png").touch()
    return folder


def count_labels(images) -> Counter:
    return Counter(images.labels)


def test_images_are_held_out_by_class(make_recipe, tmp_path):
    counts = {"many": 40, "some": 14, "few": 3, "pair": 2, "single": 1}
    recipe = make_recipe(dataset=str(create_classes(tmp_path, **counts)))
    data = open_data(recipe)
    training, held_out = (
        {data.class_names[label]: number for label, number in count_labels(images).items()}
        for images in (data.training, data.validation)
    )
    assert held_out == {"many": 4, "some": 2}  # a tenth of all 60 is 6; the 14 lose most by rounding
    assert training == {name: count - held_out.get(name, 0) for name, count in counts.items()}
    assert data.notes == [
        "Held out 6 images for evaluation",
        "3 classes have no held-out image: few, pair, single",
    ]

    again, other = open_data(recipe), open_data(make_recipe(dataset=str(tmp_path), seed=1))
    assert data.validation.indices == again.validation.indices != other.validation.indices
    assert sorted(data.training.indices + data.validation.indices) == list(range(60))


def test_training_goes_on_where_it_was_with_images_held_out(make_recipe, stripes):
    recipe = make_recipe(dataset=str(stripes / "train"))
    assert_same(read_batches(recipe, 3, start=5), read_batches(recipe, 8)[5:])


@pytest.mark.parametrize("seed", range(3))
def test_a_training_image_of_each_class_is_left(make_recipe, tmp_path, seed):
    """Of twenty classes of one image, and of twenty of two."""
    singles = {f"single{index:02}": 1 for index in range(20)}
    pairs = {f"pair{index:02}": 2 for index in range(20)}
    create_classes(tmp_path, **singles, **pairs)
    data = open_data(make_recipe(dataset=str(tmp_path), validation_fraction=0.2, seed=seed))
    assert len(count_labels(data.training)) == 40
    assert set(count_labels(data.validation).values()) == {1}
    assert data.validation.num_images == 12  # a fifth
    assert re.fullmatch(r"28 classes have no held-out image: (pair\d\d, ){4}pair\d\d and 23 more", data.notes[-1])


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.29, 0.5, 0.9, 0.99])
def test_the_fraction_is_held_out_of_the_whole_and_of_each_class(fraction):
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(30), rng.integers(0, 60, 30)))
    is_held_out = choose_held_out(labels, fraction, rng)
    counts, held_out = (np.bincount(each, minlength=30) for each in (labels, labels[is_held_out]))
    assert (held_out <= np.maximum(counts - 1, 0)).all()
    assert (np.abs(held_out - fraction * counts) < 1 + 1e-9).all()
    if fraction < 0.9:
        assert is_held_out.sum() == round(fraction * len(labels))


def test_classes_too_small_to_hold_out_anything(make_recipe, tmp_path):
    data = open_data(make_recipe(dataset=str(create_classes(tmp_path, a=1, b=1)), validation_fraction=0.5))
    assert (data.training.num_images, data.validation) == (2, None)
    assert data.notes == [
        "No image is held out for evaluation, because the classes have too few",
        "An epoch of 2 images is less than one step of 8: lower --batch-size for more steps",
    ]


@pytest.mark.parametrize("batch_size, is_large", [(53, False), (54, False), (55, True)])
def test_a_batch_larger_than_the_dataset_is_told(make_recipe, tmp_path, batch_size, is_large):
    data = open_data(make_recipe(dataset=str(create_classes(tmp_path, many=40, few=20)), batch_size=batch_size))
    assert data.training.num_images == 54
    assert any("lower --batch-size" in note for note in data.notes) == is_large


def test_tables_hold_out_by_class(make_recipe, table, tmp_path):
    names = ["lying"] * 30 + ["standing"] * 6 + ["leaning"]
    table.remove_columns("label").add_column("label", names).save_to_disk(tmp_path)
    data = open_data(make_recipe(dataset=str(tmp_path)))
    assert count_labels(data.validation) == {"lying": 3, "standing": 1}
    assert data.notes == ["Held out 4 images for evaluation", "1 class has no held-out image: leaning"]


@pytest.mark.parametrize(
    "names, options, expected",
    [
        (["train", "valid", "test"], {}, ("train", "valid")),
        (["Train", "Val"], {}, ("Train", "Val")),
        (["training", "testing"], {}, ("training", "testing")),
        (["train", "test", "dev"], {"validation_split": "TEST"}, ("train", "test")),
        (["train", "val", "valid"], {"validation_split": "valid"}, ("train", "valid")),
        (["train", "val"], {"train_split": "VAL"}, ("val", None)),
        (["fold1", "fold2", "fold3"], {"train_split": "fold1", "validation_split": "Fold3"}, ("fold1", "fold3")),
        (["train", "val", "extra"], {"validation_split": "val"}, ("train", "val")),
        (["TRAIN"], {}, ("TRAIN", None)),
    ],
)
def test_splits_are_directories(make_recipe, stripes, tmp_path, names, options, expected):
    for name in names:
        (tmp_path / name).symlink_to(stripes / "train", target_is_directory=True)
    data = open_data(make_recipe(dataset=str(tmp_path), **options))
    assert data.class_names == ["horizontal", "vertical"]
    assert data.training.split == expected[0]
    assert expected[1] is None or data.validation.split == expected[1]
    evaluation = "" if expected[1] is None else f", evaluating on {expected[1]}"
    assert f"Training on the split {expected[0]}{evaluation}" in data.notes


@pytest.mark.parametrize(
    "names, options, message",
    [
        (["train", "val", "valid"], {}, "several splits of this kind: choose val or valid with --validation-split"),
        (["valid", "test"], {}, "has no split 'train': --train-split takes test, valid"),
        (["train", "val", "extra"], {}, r"holds splits \(train, val\) beside extra"),
        (["fold1", "fold2"], {"validation_split": "fold2"}, "has no split 'train': --train-split takes fold1, fold2"),
        (["horizontal", "vertical"], {"train_split": "training"}, "has no splits, leave --train-split out"),
        (["horizontal", "vertical"], {"validation_split": "val"}, "has no splits, leave --validation-split out"),
    ],
)
def test_unclear_splits(make_recipe, stripes, tmp_path, names, options, message):
    for name in names:
        (tmp_path / name).symlink_to(stripes / "train", target_is_directory=True)
    with pytest.raises(UserError, match=message):
        open_data(make_recipe(dataset=str(tmp_path), **options))


def test_classes_are_links_and_ignored_files_are_counted(make_recipe, stripes, tmp_path):
    for name in ("horizontal", "vertical"):
        (tmp_path / name).symlink_to(stripes / "train" / name, target_is_directory=True)
    for name in (".ipynb_checkpoints", "__MACOSX", "@eaDir"):
        shutil.copytree(stripes / "train" / "vertical", tmp_path / name)
    (tmp_path / "labels.csv").write_text("path,label\n")
    data = open_data(make_recipe(dataset=str(tmp_path)))
    assert (data.class_names, data.images_per_epoch) == (["horizontal", "vertical"], 33)
    assert data.notes[0].startswith("Ignored 55 files, hidden or without an image extension")


def test_a_file_is_no_dataset(make_recipe, tmp_path):
    (tmp_path / "flowers.zip").touch()
    with pytest.raises(UserError, match=r"flowers\.zip is an archive: unpack it"):
        open_data(make_recipe(dataset=str(tmp_path / "flowers.zip")))


@pytest.fixture
def damaged(stripes, tmp_path):
    """The stripes with three unreadable images."""
    folder = tmp_path / "damaged"
    shutil.copytree(stripes, folder)
    (folder / "train" / "vertical" / "01.png").write_bytes(b"")
    whole = (folder / "train" / "vertical" / "03.png").read_bytes()
    (folder / "train" / "vertical" / "03.png").write_bytes(whole[:200])
    (folder / "validation" / "vertical" / "01.png").write_text("no image")
    return folder


def test_unreadable_images_are_reported_and_others_stand_in(make_recipe, damaged):
    recipe = make_recipe(dataset=str(damaged))
    batches = read_batches(recipe, 10)  # two epochs
    names = Counter(chain(*(batch.unreadable for batch in batches)))
    assert len(names) == 2
    assert all(number >= 2 for number in names.values())
    assert {name.partition(":")[0].rpartition("/")[2] for name in names} == {"01.png", "03.png"}
    assert all(len(batch.labels) == 8 for batch in batches)

    data = open_data(recipe)
    (batch,) = create_validation_loader(data, recipe, create_validation_reader(data, recipe), 64, WHOLE)
    assert batch.labels.tolist().count(UNREADABLE_LABEL) == 1
    assert len(batch.labels) == len(batch.pixel_values) == 10
    assert len(batch.unreadable) == 1


def test_an_image_whose_decoder_fails_is_skipped(make_recipe, stripes, tmp_path):
    """Pillow raises an IndexError for a cut QOI file."""
    shutil.copytree(stripes, tmp_path / "damaged")
    Image.new("RGB", (32, 32)).save(cut := BytesIO(), "QOI")
    for split in ("train", "validation"):
        (tmp_path / "damaged" / split / "vertical" / "01.png").write_bytes(cut.getvalue()[:15])
    recipe = make_recipe(dataset=str(tmp_path / "damaged"))
    (message,) = {name for batch in read_batches(recipe, 5) for name in batch.unreadable}
    assert "01.png: it cannot be decoded: " in message
    data = open_data(recipe)
    (batch,) = create_validation_loader(data, recipe, create_validation_reader(data, recipe), 64, WHOLE)
    assert batch.labels.tolist().count(UNREADABLE_LABEL) == len(batch.unreadable) == 1 and batch.error is None


def test_a_dataset_without_any_readable_image(make_recipe, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(MAX_UNREADABLE_IN_A_ROW):
            (tmp_path / name / f"{index}.png").touch()
    (batch,) = read_batches(make_recipe(dataset=str(tmp_path)), 1)
    assert batch.error.startswith("100 images in a row cannot be read")


def test_a_class_without_images(make_recipe, stripes, tmp_path):
    shutil.copytree(stripes / "train", tmp_path / "images")
    (tmp_path / "images" / "diagonal").mkdir()
    with pytest.raises(UserError, match=r"the class directory .*diagonal holds no image: fill it, or remove it$"):
        open_data(make_recipe(dataset=str(tmp_path / "images")))
    (tmp_path / "images" / "diagonal" / "photo.heic").write_bytes(b"")
    with pytest.raises(UserError, match=r"remove it\. Ignored 1 file, hidden or without .*photo\.heic$"):
        open_data(make_recipe(dataset=str(tmp_path / "images")))


def test_a_single_class(make_recipe, stripes, tmp_path):
    shutil.copytree(stripes / "train" / "vertical", tmp_path / "vertical")
    with pytest.raises(UserError, match="one class only, 'vertical'"):
        open_data(make_recipe(dataset=str(tmp_path)))


def test_other_classes_in_evaluation(make_recipe, stripes, tmp_path):
    shutil.copytree(stripes, tmp_path, dirs_exist_ok=True)
    (tmp_path / "validation" / "vertical").rename(tmp_path / "validation" / "upright")
    with pytest.raises(UserError, match="training and evaluation know different classes, 2 and 2: upright, vertical"):
        open_data(make_recipe(dataset=str(tmp_path)))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dataset": None}, "give a --dataset"),
        ({"train_split": "all"}, "has no split 'all': --train-split takes train, validation"),
        ({"validation_split": "all"}, "has no split 'all': --validation-split takes train, validation"),
    ],
)
def test_wrong_splits(make_recipe, options, message):
    with pytest.raises(UserError, match=message):
        open_data(make_recipe(**options))


@pytest.fixture
def table(stripes) -> datasets.Dataset:
    paths = sorted((stripes / "train").glob("*/*.png"))
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["horizontal", "vertical"])}
    )
    columns = {"image": [str(path) for path in paths], "label": [path.parent.name for path in paths]}
    return datasets.Dataset.from_dict(columns, features=features)


def test_a_saved_dataset(make_recipe, table, tmp_path):
    datasets.DatasetDict({"train": table, "test": table.select(range(5))}).save_to_disk(tmp_path)
    data = open_data(make_recipe(dataset=str(tmp_path)))
    assert data.class_names == ["horizontal", "vertical"]
    assert (data.training.num_images, data.validation.num_images) == (37, 5)
    assert len(read_batches(make_recipe(dataset=str(tmp_path)), 6)) == 6


@pytest.mark.parametrize("kind", ["string", "int64"])
def test_labels_without_names(make_recipe, table, tmp_path, kind):
    if kind == "string":
        names = ["lying" if label == 0 else "standing" for label in table["label"]]
        table = table.remove_columns("label").add_column("label", names)
    else:
        table = table.cast_column("label", datasets.Value(kind))
    table.save_to_disk(tmp_path)
    recipe = make_recipe(dataset=str(tmp_path))
    assert open_data(recipe).class_names == (["lying", "standing"] if kind == "string" else ["0", "1"])
    assert set(torch.cat([batch.labels for batch in read_batches(recipe, 4)]).tolist()) == {0, 1}


def test_a_row_without_an_image_cannot_be_read(make_recipe, table, tmp_path):
    images = [None, *({"path": path, "bytes": None} for path in (row["image"]["path"] for row in to_rows(table)[1:]))]
    datasets.Dataset.from_dict({"image": images, "label": table["label"]}, features=table.features).save_to_disk(
        tmp_path
    )
    batches = read_batches(make_recipe(dataset=str(tmp_path), validation_fraction=0.0), 5)
    names = {name for batch in batches for name in batch.unreadable}
    assert len(names) == 1
    assert next(iter(names)).startswith("image 0 of")


def test_labels_of_the_validation_images_are_looked_at_first(make_recipe, table, tmp_path):
    rows = table.to_dict()
    rows["label"] = [-1] * len(rows["label"])
    unlabeled = datasets.Dataset.from_dict(rows, features=table.features)
    datasets.DatasetDict({"train": table, "test": unlabeled}).save_to_disk(tmp_path)
    with pytest.raises(UserError, match="label -1 at image 0"):
        open_data(make_recipe(dataset=str(tmp_path)))


def test_no_images(stripes):
    with pytest.raises(UserError, match="train holds no images"):
        find_class_names(SelectedImages(ImageFolder(stripes / "train"), []))


def test_a_label_of_no_class(make_recipe, table, tmp_path):
    rows = table.to_dict()
    rows["label"][5] = -1
    datasets.Dataset.from_dict(rows, features=table.features).save_to_disk(tmp_path)
    with pytest.raises(UserError, match=r"label -1 at image 5: there are the labels 0 to 1"):
        open_data(make_recipe(dataset=str(tmp_path)))


@pytest.fixture
def stream(hub, table, tmp_path) -> str:
    """The id of a dataset on the Hub with four files and one unreadable image."""
    images = [{"bytes": Path(row["image"]["path"]).read_bytes()} for row in to_rows(table)]
    images[20] = {"bytes": b"no image"}
    table = datasets.Dataset.from_dict({"image": images, "label": table["label"]}, features=table.features)
    files = {}
    for index in range(4):
        path = tmp_path / f"train-{index:05}-of-00004.parquet"
        table.shard(4, index, contiguous=True).to_parquet(path)
        files[f"data/{path.name}"] = path.read_bytes()
    hub.create("someone/stripes", files, kind="dataset")
    return "someone/stripes"


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_stream_goes_on_where_it_was(make_recipe, stream, num_workers):
    recipe = make_recipe(dataset=stream, streaming=True, images_per_epoch=37, num_workers=num_workers)
    everything = read_batches(recipe, 9)
    assert any(batch.unreadable for batch in everything)
    assert_same(read_batches(recipe, 2, start=7), everything[7:])
    if num_workers == 0:  # the first epoch's images are 37 different ones
        pixels = torch.cat([batch.pixel_values for batch in everything])[:37]
        assert len({image.numpy().tobytes() for image in pixels}) == 37


def test_a_stream_keeps_its_workers_in_silence(one_cpu, make_recipe, stream, tmp_path, recwarn):
    recipe = make_recipe(dataset=stream, streaming=True, images_per_epoch=37, num_workers=2)
    run = start(recipe, tmp_path / "run")
    assert create_loader(run.data, recipe).num_workers == 2
    assert not [note for note in run.data.notes if "workers" in note]
    assert not [warning for warning in recwarn if "worker processes" in str(warning.message)]


def test_processes_share_a_stream(make_recipe, stream):
    recipe = make_recipe(
        dataset=stream,
        streaming=True,
        images_per_epoch=37,
        rand_augment=None,
        horizontal_flip=0.0,
        crop_scale=[1, 1],
    )
    shares = [read_batches(recipe, 2, batch_size=16, share=Share(process, 2)) for process in range(2)]
    pixels = [
        {image.numpy()[:, 4:12, 4:12].tobytes() for image in chain(*(b.pixel_values for b in s))} for s in shares
    ]
    assert all(len(share) >= 15 for share in pixels)  # one image replaces another
    assert pixels[0].isdisjoint(pixels[1])


def test_streams_need_names_and_lengths(make_recipe, hub, stream, table, tmp_path):
    with pytest.raises(UserError, match="does not tell its length: give --images-per-epoch"):
        open_data(make_recipe(dataset=stream, streaming=True))
    path = tmp_path / "train.parquet"
    table.cast_column("label", datasets.Value("int64")).to_parquet(path)
    hub.create("someone/numbers", {"train.parquet": path.read_bytes()}, kind="dataset")
    with pytest.raises(UserError, match="does not name its classes: download it, without --streaming"):
        open_data(make_recipe(dataset="someone/numbers", streaming=True))


def test_a_stream_that_breaks_off(make_recipe, hub, stream):
    recipe = make_recipe(dataset=stream, streaming=True, images_per_epoch=37)
    data = open_data(recipe)
    hub.repos.clear()
    assert "someone/stripes" in next(iter(create_loader(data, recipe))).error


def test_a_downloaded_dataset(make_recipe, stream):
    data = open_data(make_recipe(dataset=stream, streaming=False, validation_fraction=0.0))
    assert data.training.num_images == 37
    assert np.unique(data.training.labels).tolist() == [0, 1]
