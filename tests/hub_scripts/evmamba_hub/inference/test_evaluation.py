"""`evmamba evaluate`: counts are exact for any dataset and any number of processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from datasets import ClassLabel, Dataset, Features, Value, load_dataset
from datasets import Image as ImageFeature
from huggingface_hub import ModelCard
from PIL import Image
from transformers import BitImageProcessorPil
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from evmamba_hub.errors import UserError
from evmamba_hub.images.labeled_images import LabeledImage, open_dataset
from evmamba_hub.inference.evaluation import Counts, Preprocessor, choose_process_device
from evmamba_hub.publish.card import is_training_data
from hub_server import USERS, Fault
from modeling_evmamba import EfficientVMambaConfig, EfficientVMambaForImageClassification


ROOT = Path(__file__).parents[4]
DIGITS = ROOT / "demo" / "digits"


@pytest.fixture
def few_digits(digit_images, tmp_path) -> Path:
    """A dataset with seven digits per class."""
    for folder in digit_images.iterdir():
        (tmp_path / "few" / folder.name).mkdir(parents=True)
        for path in sorted(folder.iterdir())[:7]:
            shutil.copy(path, tmp_path / "few" / folder.name)
    return tmp_path / "few"


def evaluate(evmamba, *arguments) -> dict:
    output = Path(arguments[arguments.index("--output") + 1])
    code, _, err = evmamba("evaluate", *arguments)
    assert code == 0, err
    return json.loads(output.read_text(encoding="utf-8"))


def test_what_the_card_of_the_digits_says(evmamba, digit_images, tmp_path):
    results = evaluate(evmamba, DIGITS, "--dataset", digit_images, "--output", tmp_path / "results.json")
    stated = [result.metric_value for result in ModelCard.load(DIGITS / "README.md").data.eval_results]
    assert results["images"] == 599
    assert [round(results[name], 4) for name in ("top1", "top5", "loss")] == stated
    assert results["top1"] < results["top5"] <= 1 and 0 < results["loss"] < 0.2
    assert results["images_per_second"] > 0
    assert (results["dtype"], results["optimized"]) == ("float32", results["device"] == "cpu")
    num_wrong = round(599 * (1 - results["top1"]))
    assert sum(confusion["images"] for confusion in results["most_confused"]) == num_wrong
    worst = results["worst_classes"]
    assert {entry["label"] for entry in worst} == {confusion["label"] for confusion in results["most_confused"]}
    assert round(sum(entry["images"] * (1 - entry["accuracy"]) for entry in worst)) == num_wrong
    accuracies = [entry["accuracy"] for entry in worst]
    assert accuracies == sorted(accuracies) and accuracies[-1] < 1
    assert results["labels_matched"] == {"name": 10}
    assert list(tmp_path.iterdir()) == [tmp_path / "results.json"]


def test_links_are_followed_and_the_choice_of_images_is_told(evmamba, few_digits, tmp_path):
    for split in ("Train", "Valid"):
        (tmp_path / "data" / split).mkdir(parents=True)
        for folder in few_digits.iterdir():
            (tmp_path / "data" / split / folder.name).symlink_to(folder, target_is_directory=True)
    shutil.copytree(few_digits / "3", few_digits / "3" / ".ipynb_checkpoints")
    arguments = ["--dataset", tmp_path / "data", "--output", tmp_path / "results.json"]
    code, _, err = evmamba("evaluate", DIGITS, *arguments)
    assert code == 0, err
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["images"], results["dataset_split"]) == (70, "Valid")
    assert "Took the split Valid of Train, Valid" in err
    assert "Ignored 7 files, hidden or without an image extension, such as" in err


@pytest.mark.slow
def test_two_processes(evmamba, few_digits, tmp_path):
    """Two processes get 35 and 34 of 69 images. Other programs would pad these to batches of 8."""
    next(few_digits.glob("3/*.png")).unlink()
    single = evaluate(evmamba, DIGITS, "--dataset", few_digits, "--output", tmp_path / "single.json")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "-m"]
    arguments = ["--dataset", few_digits, "--output", tmp_path / "double.json", "--batch-size", "8"]
    completed = subprocess.run(
        [*launch, "evmamba_hub.cli", "evaluate", DIGITS, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert completed.returncode == 0, completed.stderr
    assert completed.stdout.count("images per second") == 1  # one process reports
    double = json.loads((tmp_path / "double.json").read_text())
    assert (single["processes"], double["processes"]) == (1, 2)
    for name in ("images", "top1", "top5", "most_confused", "worst_classes"):
        assert double[name] == single[name]
    assert double["images"] == 69
    assert double["loss"] == pytest.approx(single["loss"], rel=1e-5)
    assert sorted(path.name for path in tmp_path.glob("*.json*")) == ["double.json", "single.json"]


def test_an_interrupted_evaluation_goes_on(evmamba, few_digits, tmp_path):
    arguments = [DIGITS, "--dataset", few_digits, "--batch-size", 4]
    expected = evaluate(evmamba, *arguments, "--output", tmp_path / "expected.json")

    last = sorted(few_digits.glob("7/*.png"))[3]
    content = last.read_bytes()
    last.write_bytes(b"no image")
    arguments += ["--output", tmp_path / "results.json"]
    code, _, err = evmamba("evaluate", *arguments)
    assert code == 1 and f"{last}: it is not an image" in err
    assert not (tmp_path / "results.json").exists()
    (progress,) = tmp_path.glob("results.json.progress-*")

    last.write_bytes(content)
    for options in (["--dtype", "bfloat16"], ["--no-optimize"]):  # another network does not resume
        _, _, err = evmamba("evaluate", *arguments, *options)
        assert "Resuming" not in err

    last.write_bytes(b"no image")
    assert evmamba("evaluate", *arguments)[0] == 1
    last.write_bytes(content)
    code, _, err = evmamba("evaluate", *arguments)
    assert code == 0 and "Resuming after 52 images" in err
    results = json.loads((tmp_path / "results.json").read_text())
    assert {**results, "images_per_second": None} == {**expected, "images_per_second": None}
    assert not progress.exists()


def test_what_ran_is_told(evmamba, few_digits, tmp_path):
    found = {}
    for options in ([], ["--no-optimize"]):
        arguments = [
            DIGITS,
            "--dataset",
            few_digits,
            "--output",
            tmp_path / "results.json",
            "--device",
            "cpu",
            *options,
        ]
        code, out, err = evmamba("evaluate", *arguments)
        assert code == 0 and "Note:" not in err
        assert ("on cpu in float32, as it is" if options else "on cpu in float32, optimized") in out
        results = json.loads((tmp_path / "results.json").read_text())
        found[results["optimized"]] = results
    assert found[True]["loss"] == pytest.approx(found[False]["loss"], rel=1e-5)
    for name in ("top1", "top5", "most_confused", "images", "device", "dtype"):
        assert found[True][name] == found[False][name]


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_an_accuracy_in_another_dtype_has_its_own_name(evmamba, few_digits, tmp_path, dtype):
    """It replaces neither the accuracy in float32, nor the other way around."""
    shutil.copytree(DIGITS, tmp_path / "model")
    arguments = [tmp_path / "model", "--dataset", few_digits, "--output", tmp_path / "results.json", "--update-card"]
    for options in ([], ["--dtype", dtype, "--device", "cpu"], []):
        results = evaluate(evmamba, *arguments, *options)
        assert results["images"] == 70 and results["top1"] > 0.9
    added = ModelCard.load(tmp_path / "model" / "README.md").data.eval_results[3:]
    names = ["Top-1 accuracy", "Top-5 accuracy", "Loss"]
    assert [each.metric_name for each in added] == [*names, *(f"{name}, {dtype}" for name in names)]


def test_a_damaged_progress_file_is_no_obstacle(evmamba, few_digits, tmp_path):
    (tmp_path / "results.json.progress-0-of-1").write_bytes(b"damaged")
    arguments = [DIGITS, "--dataset", few_digits, "--output", tmp_path / "results.json"]
    assert evaluate(evmamba, *arguments)["images"] == 70


def test_counts():
    """Compare with sums over single images."""
    torch.manual_seed(0)
    logits, labels = torch.randn(200, 7), torch.randint(0, 7, (200,))
    counts = Counts.start(7)
    for batch in torch.arange(200).split(48):
        counts.add(logits[batch], labels[batch])
    predictions = logits.argmax(dim=-1)
    assert (counts.num_images, counts.num_classes) == (200, 7)
    confusion = {(label, prediction): images for label, prediction, images in counts.confusion.tolist()}
    assert sum(confusion.get((label, label), 0) for label in range(7)) == (predictions == labels).sum()
    for label in range(7):
        for prediction in range(7):
            expected = ((labels == label) & (predictions == prediction)).sum()
            assert confusion.get((label, prediction), 0) == expected
    ranks = (logits > logits.gather(1, labels[:, None])).sum(dim=1)
    assert counts.merge().sums[1] == (ranks < 5).sum() < 200
    assert counts.merge().sums[0].item() == pytest.approx(F.cross_entropy(logits, labels).item() * 200, rel=1e-6)


def test_counts_of_many_classes():
    """A dense confusion matrix would take 80 GB."""
    num_classes = 100_000
    labels, predictions = torch.tensor([5, 5, 5, 99_999, 7]), torch.tensor([5, 6, 6, 0, 7])
    counts = Counts.start(num_classes)
    for batch in torch.arange(5).split(2):
        counts.add(F.one_hot(predictions[batch], num_classes).float(), labels[batch])
    assert counts.num_images == 5 and counts.num_classes == num_classes
    assert counts.summarize()["top1"] == 2 / 5
    assert counts.summarize_confusion(dict(enumerate(map(str, range(num_classes))))) == {
        "most_confused": [
            {"label": "5", "predicted": "6", "images": 2},
            {"label": "99999", "predicted": "0", "images": 1},
        ],
        "worst_classes": [
            {"label": "99999", "accuracy": 0.0, "images": 1},
            {"label": "5", "accuracy": pytest.approx(1 / 3), "images": 3},
        ],
    }


PRINT_PEAK = """
from pathlib import Path
from evmamba_hub.cli.main import main
try:
    main()
finally:
    # not `resource.getrusage`, whose peak includes that of the process that starts this one
    [peak] = [line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line]
    print(peak)  # kibibytes
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_for_many_classes(tmp_path):
    """With a dense confusion matrix, the command took 6 GB."""
    names = [f"class {number:05}" for number in range(12_000)]
    config = EfficientVMambaConfig(hidden_sizes=[8] * 4, depths=[1] * 4, id2label=dict(enumerate(names)))
    EfficientVMambaForImageClassification(config).save_pretrained(tmp_path / "model")
    BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        tmp_path / "model"
    )
    (tmp_path / "data" / names[7]).mkdir(parents=True)
    Image.new("RGB", (32, 32), "red").save(tmp_path / "data" / names[7] / "red.png")
    command = [sys.executable, "-c", PRINT_PEAK, "evaluate", tmp_path / "model", "--dataset", tmp_path / "data"]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout.splitlines()[-1]) < 1.2e9 / 1024


def test_counts_without_errors():
    counts = Counts.start(3)
    counts.add(torch.eye(3), torch.arange(3))
    assert counts.summarize_confusion({0: "a", 1: "b", 2: "c"}) == {"most_confused": [], "worst_classes": []}


@pytest.mark.parametrize("num_classes, has_top5", [(2, False), (5, False), (6, True)])
def test_up_to_five_classes_have_no_top5_accuracy(num_classes, has_top5):
    counts = Counts.start(num_classes)
    counts.add(torch.eye(num_classes), torch.arange(num_classes))
    assert counts.summarize().keys() == {"images", "top1", "loss"} | ({"top5"} if has_top5 else set())


def test_the_results_of_few_classes_are_shown_without_top5(evmamba, few_digits, tmp_path):
    model = EfficientVMambaForImageClassification.from_pretrained(DIGITS)
    model.config.id2label = dict(enumerate(["0", "1", "2"]))
    model.classifier = torch.nn.Linear(model.classifier.in_features, 3)
    model.save_pretrained(tmp_path / "model")
    for name in ("preprocessor_config.json", "README.md"):
        shutil.copy(DIGITS / name, tmp_path / "model")
    for name in ("0", "1", "2"):
        shutil.copytree(few_digits / name, tmp_path / "three" / name)
    code, out, err = evmamba("evaluate", tmp_path / "model", "--dataset", tmp_path / "three", "--update-card")
    assert code == 0 and "top-1" in out and "top-5" not in out, err
    added = ModelCard.load(tmp_path / "model" / "README.md").data.eval_results[3:]
    assert [result.metric_name for result in added] == ["Top-1 accuracy", "Loss"]


def test_a_batch_without_images_counts_nothing():
    counts = Counts.start(3)
    counts.add(torch.empty(0, 3), torch.empty(0, dtype=torch.int64))
    assert counts.num_images == 0 and counts.merge().sums.tolist() == [0, 0]


def test_a_batch_counts_as_a_whole_or_not(monkeypatch):
    """Press Ctrl-C before each line of the function, one after the other."""
    logits, labels = torch.eye(7)[:4], torch.arange(4)

    def interrupt(frame, event, _):
        nonlocal num_lines
        if frame.f_code is Counts.add.__code__ and event == "line":
            num_lines -= 1
            if num_lines == 0:
                raise KeyboardInterrupt
        return interrupt

    outcomes = []
    for line in range(1, 100):
        counts, num_lines, trace = Counts.start(7), line, sys.gettrace()
        sys.settrace(interrupt)
        try:
            counts.add(logits, labels)
        except KeyboardInterrupt:
            outcomes.append((counts.num_images, counts.merge().sums[1].item()))
        else:
            break
        finally:
            sys.settrace(trace)
    assert len(outcomes) > 3 and set(outcomes) <= {(0, 0), (4, 4)}
    assert (counts.num_images, counts.merge().sums[1].item()) == (4, 4)


@pytest.fixture
def at_second_batch(monkeypatch):
    """Call a function once, while the second batch is being counted."""
    cross_entropy, calls = F.cross_entropy, []

    def prepare(action) -> None:
        def count_and_act(*args, **kwargs):
            calls.append(args)
            if len(calls) == 2:
                action()
            return cross_entropy(*args, **kwargs)

        monkeypatch.setattr(F, "cross_entropy", count_and_act)

    return prepare


def damage(folder: Path, positions: list[int]) -> list[Path]:
    """Damage images of a dataset by their positions. Return them."""
    paths = sorted(folder.glob("*/*.png"))
    damaged = [paths[position] for position in positions]
    for path in damaged:
        path.write_bytes(b"no image")
    return damaged


def test_unreadable_images_stop_the_evaluation_or_are_skipped_and_counted(evmamba, few_digits, tmp_path):
    """A whole batch is unreadable, and a part of another one."""
    damaged = damage(few_digits, [4, 5, 6, 7, 30])
    arguments = [DIGITS, "--dataset", few_digits, "--batch-size", "4", "--output", tmp_path / "results.json"]
    code, _, err = evmamba("evaluate", *arguments)
    assert code == 1 and err.splitlines()[-1] == (
        f"Error: {damaged[0]}: it is not an image in a format that Pillow reads: replace the image, or skip it with "
        "--on-unreadable skip"
    )
    code, out, err = evmamba("evaluate", *arguments, "--on-unreadable", "skip")
    assert code == 0 and "Resuming after 4 images" in err
    for path in damaged:
        assert err.count(f"Note: skipped {path}: it is not an image") == 1
    assert "unreadable, skipped" in out
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["images"], results["unreadable"]) == (65, 5)
    for path in damaged:
        path.unlink()
    expected = evaluate(evmamba, *arguments)
    assert expected["unreadable"] == 0
    for name in ("images", "top1", "top5", "most_confused", "worst_classes"):
        assert results[name] == expected[name]
    assert results["loss"] == pytest.approx(expected["loss"], rel=1e-6)


def test_skipped_images_are_not_read_again(evmamba, few_digits, tmp_path, at_second_batch):
    def interrupt() -> None:
        raise UserError("interrupted")

    (path,) = damage(few_digits, [1])
    arguments = [DIGITS, "--dataset", few_digits, "--batch-size", 8, "--on-unreadable", "skip", "--output"]
    expected = evaluate(evmamba, *arguments, tmp_path / "expected.json")
    at_second_batch(interrupt)
    code, _, err = evmamba("evaluate", *arguments, tmp_path / "results.json")
    assert code == 1 and f"skipped {path}" in err
    code, _, err = evmamba("evaluate", *arguments, tmp_path / "results.json")
    assert code == 0 and "Resuming after 8 images" in err and "skipped" not in err
    results = json.loads((tmp_path / "results.json").read_text())
    assert {**results, "images_per_second": None} == {**expected, "images_per_second": None}


def test_a_dataset_that_cannot_be_read(evmamba, few_digits):
    damage(few_digits, list(range(70)))
    code, _, err = evmamba("evaluate", DIGITS, "--dataset", few_digits, "--on-unreadable", "skip")
    assert code == 1 and err.splitlines()[-1] == f"Error: none of the 70 images of {few_digits} can be read"


def test_ctrl_c_while_a_batch_is_counted(evmamba, few_digits, tmp_path, at_second_batch):
    arguments = [DIGITS, "--dataset", few_digits, "--batch-size", 8, "--output"]
    expected = evaluate(evmamba, *arguments, tmp_path / "expected.json")
    at_second_batch(lambda: os.kill(os.getpid(), signal.SIGINT))
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs start with another handler
    code, out, _ = evmamba("evaluate", *arguments, tmp_path / "results.json")
    signal.signal(signal.SIGINT, handler)
    assert code != 0 and "top-1" not in out
    code, _, err = evmamba("evaluate", *arguments, tmp_path / "results.json")
    assert code == 0 and "Resuming after 8 images" in err
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["loss"] == pytest.approx(expected["loss"], rel=1e-9)
    ignored = {"images_per_second": None, "loss": None}
    assert {**results, **ignored} == {**expected, **ignored}


@pytest.mark.parametrize("output", ["file/results.json", "r" * 250, "r" * 300], ids=["folder", "name", "long"])
def test_an_output_that_cannot_be_written_is_found_before_the_work(evmamba, few_digits, tmp_path, output):
    (tmp_path / "file").touch()
    first = sorted(few_digits.glob("0/*.png"))[0]
    first.write_bytes(b"no image")
    code, out, err = evmamba("evaluate", DIGITS, "--dataset", few_digits, "--output", tmp_path / output)
    assert (code, out) == (1, "")
    assert f"{output}.progress-0-of-1 cannot be written" in err and str(first) not in err


def test_what_broke_it_off_is_told_where_nothing_can_be_saved_any_more(evmamba, few_digits, tmp_path, at_second_batch):
    last = sorted(few_digits.glob("9/*.png"))[-1]
    last.write_bytes(b"no image")

    def spoil() -> None:
        path = tmp_path / "results.json.progress-0-of-1"
        path.unlink()
        path.mkdir()

    at_second_batch(spoil)
    arguments = [DIGITS, "--dataset", few_digits, "--batch-size", 8, "--output", tmp_path / "results.json"]
    code, _, err = evmamba("evaluate", *arguments)
    assert code == 1 and f"{last}: it is not an image" in err


# Labels


def test_labels_are_matched_by_name(evmamba, few_digits, tmp_path):
    """Indices do not match: the dataset's class 0 is "1", and its last class is "zero"."""
    (few_digits / "0").rename(few_digits / "zero")
    (tmp_path / "map.json").write_text(json.dumps({"zero": "0"}))
    arguments = [DIGITS, "--dataset", few_digits, "--output", tmp_path / "results.json"]
    code, _, err = evmamba("evaluate", *arguments)
    assert code == 1 and "1 of the 10 labels of the dataset are none of the model's: 'zero'" in err
    results = evaluate(evmamba, *arguments, "--label-map", tmp_path / "map.json")
    assert results["top1"] > 0.95


def test_a_part_of_the_classes(evmamba, few_digits, tmp_path):
    for label in "0245679":
        shutil.rmtree(few_digits / label)
    for file in few_digits.glob("3/*.png"):
        shutil.copy(file, few_digits / "8" / f"three-{file.name}")
    results = evaluate(evmamba, DIGITS, "--dataset", few_digits, "--output", tmp_path / "results.json")
    assert results["images"] == 28 and 0.6 < results["top1"] < 0.8
    first, *others = results["worst_classes"]
    assert (first["label"], first["images"]) == ("8", 14) and first["accuracy"] == pytest.approx(0.5, abs=0.1)
    assert {entry["label"] for entry in others} <= {"1", "3"} and all(entry["accuracy"] < 1 for entry in others)


def rename_labels(tmp_path: Path, labels: list[str] | None) -> Path:
    """Return a copy of the model of the digits with other labels, or with labels without names."""
    shutil.copytree(DIGITS, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    id2label, _ = config.pop("id2label"), config.pop("label2id")
    config |= {"num_labels": len(id2label)} if labels is None else {"id2label": dict(enumerate(labels))}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    return tmp_path / "model"


NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.mark.parametrize(
    "labels, way, is_announced",
    [(None, "number", False), (NAMES, "number, counted from 0", True), (list("0123456789"), "name", False)],
    ids=["without names", "names", "numbers"],
)
def test_the_command_says_how_labels_matched(evmamba, few_digits, tmp_path, labels, way, is_announced):
    model, output = rename_labels(tmp_path, labels), tmp_path / "results.json"
    shutil.rmtree(few_digits / "4")
    code, out, err = evmamba("evaluate", model, "--dataset", few_digits, "--output", output)
    assert code == 0, err
    assert f"by {way}" in out
    assert (f"the labels match by {way}: check that this is right" in err) == is_announced
    results = json.loads(output.read_text())
    assert results["labels_matched"] == {way: 9} and results["top1"] > 0.9


def test_the_label_map_rules_over_labels_without_names(evmamba, few_digits, tmp_path):
    model, output = rename_labels(tmp_path, None), tmp_path / "results.json"
    for number, name in enumerate(NAMES):
        (few_digits / str(number)).rename(few_digits / name)
    (tmp_path / "map.json").write_text(json.dumps({name: f"LABEL_{number}" for number, name in enumerate(NAMES)}))
    arguments = [model, "--dataset", few_digits, "--output", output]
    results = evaluate(evmamba, *arguments, "--label-map", tmp_path / "map.json")
    assert results["labels_matched"] == {"label map": 10} and results["top1"] > 0.9
    code, _, err = evmamba("evaluate", *arguments)
    assert code == 0 and "the labels match by order: check that this is right" in err
    (tmp_path / "map.json").write_text(json.dumps({"zero": "0"}))
    code, _, err = evmamba("evaluate", *arguments, "--label-map", tmp_path / "map.json")
    assert code == 1 and "1 of the 1 labels in the label map are none of the model's: '0'" in err


@pytest.mark.parametrize("kind", ["numbers", "names"])
def test_labels_in_a_column(evmamba, few_digits, tmp_path, kind):
    """A column of numbers or names declares no classes. All of its labels are matched before the work."""
    files = sorted(few_digits.glob("[0-3]/*.png"))
    labels = [int(file.parent.name) if kind == "numbers" else NAMES[int(file.parent.name)] for file in files]
    column = Value("int64") if kind == "numbers" else Value("string")
    features = Features({"image": ImageFeature(), "label": column})
    Dataset.from_dict({"image": [str(file) for file in files], "label": labels}, features).save_to_disk(tmp_path / "t")
    model, output = rename_labels(tmp_path, NAMES), tmp_path / "results.json"
    results = evaluate(evmamba, model, "--dataset", tmp_path / "t", "--output", output)
    assert results["labels_matched"] == {"number, counted from 0" if kind == "numbers" else "name": 4}
    assert results["images"] == 28 and results["top1"] > 0.9
    (tmp_path / "map.json").write_text(json.dumps({str(labels[0]): "one", str(labels[-1]): "one"}))
    arguments = [model, "--dataset", tmp_path / "t", "--output", output, "--label-map", tmp_path / "map.json"]
    results = evaluate(evmamba, *arguments)
    assert results["labels_matched"]["label map"] == 2 and results["top1"] < 0.6


# Images


def test_a_dataset_without_images(evmamba, few_digits, tmp_path):
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["0", "1"])})
    empty = Dataset.from_dict({"image": [], "label": []}, features)
    empty.save_to_disk(tmp_path / "saved")
    (tmp_path / "parquet").mkdir()
    empty.to_parquet(tmp_path / "parquet" / "test.parquet")
    (tmp_path / "folder" / "0").mkdir(parents=True)
    for dataset, message in [
        ("saved", "holds no images: choose another --dataset"),
        ("parquet", "holds no images: choose another --dataset"),
        ("folder", "holds no image"),
    ]:
        arguments = [DIGITS, "--dataset", tmp_path / dataset, "--output", tmp_path / "results.json"]
        code, out, err = evmamba("evaluate", *arguments)
        assert (code, out) == (1, "") and message in err.splitlines()[-1]
    assert not list(tmp_path.glob("results.json*"))


def test_devices(evmamba, few_digits, tmp_path):
    arguments = [DIGITS, "--dataset", few_digits, "--output", tmp_path / "results.json"]
    assert evaluate(evmamba, *arguments, "--device", "cpu")["device"] == "cpu"
    for device in ("abacus", "meta", "cuda:99", ""):
        code, _, err = evmamba("evaluate", *arguments, "--device", device)
        assert code == 1 and f"the device {device!r} cannot be used, choose another device" in err


def test_processes_do_not_share_an_accelerator():
    processes = SimpleNamespace(num_processes=2, device=torch.device("cuda:1"))
    assert choose_process_device(processes, "auto") == choose_process_device(processes, "cuda") == processes.device
    with pytest.raises(UserError, match="2 processes cannot share the device 'cuda:0': leave --device out"):
        choose_process_device(processes, "cuda:0")


@pytest.mark.parametrize("size", [(640, 427), (427, 640), (300, 300), (500, 375), (257, 999)])
def test_images_are_cropped_like_torchvision(evmamba, tmp_path, size):
    preprocessor = {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": 256},
        "crop_size": {"height": 224, "width": 224},
        "resample": 3,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "image.png")
    image_processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    actual = Preprocessor(image_processor)(LabeledImage("image", tmp_path / "image.png", 0))

    # torchvision's Resize(256), CenterCrop(224), ToTensor and Normalize
    width, height = size
    scaled = (256, int(256 * height / width)) if width < height else (int(256 * width / height), 256)
    resized = Image.fromarray(noise).resize(scaled, Image.Resampling.BICUBIC)
    left, top = round((scaled[0] - 224) / 2.0), round((scaled[1] - 224) / 2.0)
    cropped = np.asarray(resized.crop((left, top, left + 224, top + 224)), dtype=np.float32) / 255
    expected = (cropped - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    torch.testing.assert_close(actual, torch.from_numpy(expected).permute(2, 0, 1).float(), atol=1e-5, rtol=0)


# Results


def test_results_in_a_card(evmamba, few_digits, tmp_path):
    shutil.copytree(DIGITS, tmp_path / "model")
    arguments = [tmp_path / "model", "--dataset", few_digits, "--output", tmp_path / "results.json", "--update-card"]
    results = evaluate(evmamba, *arguments)
    evaluate(evmamba, *arguments)
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert card.text == ModelCard.load(DIGITS / "README.md").text
    earlier, added = card.data.eval_results[:3], card.data.eval_results[3:]
    assert earlier == ModelCard.load(DIGITS / "README.md").data.eval_results
    assert [(result.dataset_name, result.metric_type) for result in added] == [
        ("few", "accuracy"),
        ("few", "accuracy"),
        ("few", "loss"),
    ]
    assert added[0].metric_value == round(results["top1"], 4)
    assert not (tmp_path / "model" / ".eval_results").exists()


@pytest.mark.parametrize(
    "recipe, warns",
    [
        ("dataset: {few}\ntrain_split: train\n", True),
        ("dataset: {few}/../few/\ntrain_split: train\n", True),
        ("dataset: {few}-2\ntrain_split: train\n", False),
        ("dataset: null\ntrain_split: train\n", False),
        ("dataset: {few}\n", False),
        ("a: [", False),
    ],
)
@pytest.mark.parametrize("options", [[], ["--update-card"]], ids=str)
def test_an_accuracy_on_training_images_is_told(evmamba, few_digits, tmp_path, recipe, warns, options):
    shutil.copytree(DIGITS, tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text(f"# x\n```yaml\n{recipe.format(few=few_digits)}```\n")
    code, _, err = evmamba("evaluate", tmp_path / "model", "--dataset", few_digits, *options)
    assert code == 0 and ("so this is no held-out accuracy: choose other images" in err) == warns


@pytest.mark.parametrize("trained_on", ["splits", "splits/training"])
@pytest.mark.parametrize(
    "dataset, split, warns",
    [
        ("splits", "train", True),
        ("splits", "validation", False),
        ("splits/training", None, True),
        ("splits/val", None, False),
    ],
)
def test_an_accuracy_on_another_split_is_held_out(few_digits, tmp_path, trained_on, dataset, split, warns):
    for name in ("training", "val"):
        shutil.copytree(few_digits, tmp_path / "splits" / name)
    card = f"# x\n```yaml\ndataset: {tmp_path / trained_on}\ntrain_split: train\n```\n"
    images = open_dataset(str(tmp_path / dataset), split=split)
    assert is_training_data(card, images, str(tmp_path / dataset)) == warns


def test_results_and_card_are_replaced_as_a_whole(evmamba, few_digits, tmp_path):
    """A process that has opened the old file can still read it, and links stay links."""
    shutil.copytree(DIGITS, tmp_path / "model")
    (tmp_path / "elsewhere.json").write_text("old")
    (tmp_path / "results.json").symlink_to(tmp_path / "elsewhere.json")
    arguments = ["--dataset", few_digits, "--output", tmp_path / "results.json", "--update-card"]
    with (tmp_path / "elsewhere.json").open() as old_results, (tmp_path / "model" / "README.md").open() as old_card:
        results = evaluate(evmamba, tmp_path / "model", *arguments)
        assert old_results.read() == "old"
        assert old_card.read() == (DIGITS / "README.md").read_text()
    assert (tmp_path / "results.json").is_symlink()
    assert json.loads((tmp_path / "elsewhere.json").read_text()) == results
    assert "few" in (tmp_path / "model" / "README.md").read_text()
    assert not list(tmp_path.rglob("*.partial"))


@pytest.fixture
def hub_data(hub, few_digits, tmp_path) -> str:
    """A dataset on the Hub with seven digits per class."""
    load_dataset("imagefolder", data_dir=str(few_digits), split="train").to_parquet(tmp_path / "data.parquet")
    hub.create("someone/data", {"test.parquet": (tmp_path / "data.parquet").read_bytes()}, kind="dataset")
    return "someone/data"


def test_results_are_shown_before_a_card_fails(evmamba, hub_data, tmp_path):
    shutil.copytree(DIGITS, tmp_path / "model")
    (tmp_path / "model" / ".eval_results").touch()  # a file in place of the directory
    arguments = ["--dataset", hub_data, "--output", tmp_path / "results.json", "--update-card"]
    code, out, err = evmamba("evaluate", tmp_path / "model", *arguments)
    assert code == 1 and "100.00%" in out
    assert "data.yaml cannot be written" in err.splitlines()[-1] and "Traceback" not in err
    assert json.loads((tmp_path / "results.json").read_text())["images"] == 70


def test_a_model_and_a_dataset_of_the_hub(evmamba, hub, hub_data, tmp_path):
    assert evmamba("push", DIGITS, "someone/digits")[0] == 0
    before = len(hub.repos["model", "someone/digits"].history)

    arguments = ["--dataset", hub_data, "--output", tmp_path / "results.json", "--update-card"]
    results = evaluate(evmamba, "someone/digits", *arguments)
    assert (results["images"], results["dataset_split"]) == (70, "test")
    assert results["model_revision"] in hub.repos["model", "someone/digits"].commits
    assert results["dataset_revision"] == hub.repos["dataset", "someone/data"].refs["main"]

    repo = hub.repos["model", "someone/digits"]
    assert len(repo.history) == before + 1
    card = ModelCard(repo.files()["README.md"].decode())
    assert {result.dataset_type for result in card.data.eval_results} == {"digits", "someone/data"}
    (entry,) = yaml.safe_load(repo.files()[".eval_results/data.yaml"])
    assert entry["dataset"]["id"] == "someone/data" and entry["value"] == round(100 * results["top1"], 2)
    assert repo.files()["model.safetensors"] == (DIGITS / "model.safetensors").read_bytes()

    shutil.copytree(DIGITS, tmp_path / "own", ignore=shutil.ignore_patterns("README.md"))
    code, _, err = evmamba("push", tmp_path / "own", "someone/own", "--results", tmp_path / "results.json")
    assert code == 0, err
    card = hub.repos["model", "someone/own"].files()["README.md"].decode()
    assert f"| someone/data | Top-1 accuracy | {round(results['top1'], 4)} | measured by" in card
    assert ".eval_results/data.yaml" in hub.repos["model", "someone/own"].files()
    assert not any(token in card for token in USERS)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["no/such/model", "--dataset", "DATA"], "nor a valid repository id"),
        ([DIGITS, "--dataset", "no/such/data"], "nor a valid repository id"),
        ([DIGITS, "--dataset", "DATA", "--revision", "main"], "only repositories on the Hub have revisions"),
        ([DIGITS, "--dataset", "DATA", "--label-map", "missing.json"], "missing.json cannot be read as JSON"),
        ([DIGITS.parent, "--dataset", "DATA"], f"holds no config.json: give a directory in it, {DIGITS}"),
        (["MODEL", "--dataset", "DATA", "--update-card"], "holds no README.md"),
        ([DIGITS, "--dataset", "DATA", "--output", "DATA"], "is not a regular file: --output takes a file"),
        ([DIGITS, "--dataset", "DATA", "--output", os.devnull], "is not a regular file: --output takes a file"),
        (["someone/missing", "--dataset", "DATA"], "neither a path here nor a repository on the Hub"),
    ],
)
def test_bad_arguments_get_one_message(evmamba, hub, few_digits, tmp_path, arguments, message):
    shutil.copytree(DIGITS, tmp_path / "model", ignore=shutil.ignore_patterns("README.md"))
    places = {"DATA": few_digits, "MODEL": tmp_path / "model"}
    code, out, err = evmamba("evaluate", *(places.get(argument, argument) for argument in arguments))
    assert (code, out) == (1, "")
    assert message in err and "Traceback" not in err


def test_the_hub_is_asked_before_the_work_begins(evmamba, hub, few_digits):
    """An unreadable card is found before the evaluation."""
    assert evmamba("push", DIGITS, "someone/digits")[0] == 0
    repo = hub.repos["model", "someone/digits"]
    del repo.commits[repo.refs["main"]].files["README.md"]
    code, _, err = evmamba("evaluate", "someone/digits", "--dataset", few_digits, "--update-card")
    assert code == 1 and "someone/digits" in err and "Evaluating" not in err


def test_images_of_different_sizes(evmamba, few_digits, tmp_path):
    shutil.copytree(DIGITS, tmp_path / "model")
    path = tmp_path / "model" / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "do_center_crop": False}))
    Image.open(next(few_digits.glob("3/*.png"))).crop((0, 0, 100, 160)).save(few_digits / "3" / "narrow.png")
    arguments = [tmp_path / "model", "--dataset", few_digits, "--output", tmp_path / "results.json"]
    code, _, err = evmamba("evaluate", *arguments)
    assert code == 1 and "different sizes: use --batch-size 1" in err
    assert evaluate(evmamba, *arguments, "--batch-size", 1)["images"] == 71


@pytest.mark.parametrize("action, message", [("hang up", "the connection was lost"), (403, "has no permission")])
def test_results_that_cannot_be_uploaded_are_not_lost(evmamba, hub, few_digits, tmp_path, action, message):
    assert evmamba("push", DIGITS, "someone/digits")[0] == 0
    hub.faults = [Fault("commit", action)]
    arguments = ["someone/digits", "--dataset", few_digits, "--output", tmp_path / "results.json", "--update-card"]
    code, out, err = evmamba("evaluate", *arguments)
    assert code == 1 and "100.00%" in out and message in err.splitlines()[-1] and err.count("Error:") == 1
    assert json.loads((tmp_path / "results.json").read_text())["images"] == 70
    code, out, err = evmamba("evaluate", *arguments)
    assert code == 0 and "Resuming after 70 images" in err and "100.00%" in out
    assert json.loads((tmp_path / "results.json").read_text())["images_per_second"] is None
    assert len(hub.repos["model", "someone/digits"].history) == 3
    assert not list(tmp_path.glob("*.progress-*"))


def test_missing_packages(evmamba, few_digits, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    code, _, err = evmamba("evaluate", DIGITS, "--dataset", few_digits)
    assert code == 1 and 'run pip install ".[evaluate]" in a clone of the repository' in err


def test_a_damaged_download(evmamba, hub, few_digits, tmp_path):
    assert evmamba("push", DIGITS, "someone/damaged")[0] == 0
    hub.faults = [Fault("download", "corrupt")]
    arguments = ["someone/damaged", "--dataset", few_digits, "--output", tmp_path / "results.json"]
    code, _, err = evmamba("evaluate", *arguments)
    assert code == 1 and "model.safetensors was damaged on its way" in err
    assert evaluate(evmamba, *arguments)["images"] == 70
