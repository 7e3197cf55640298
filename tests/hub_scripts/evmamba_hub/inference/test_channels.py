"""Networks of one channel see gray images; those of two and four channels take no image files."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BitImageProcessorPil, pipeline

from evmamba_hub.cli.console import show_notices
from evmamba_hub.errors import Notice
from evmamba_hub.export.export import create_check_images, load_exportable
from evmamba_hub.images import images
from evmamba_hub.inference.channels import fit_image_processor
from evmamba_hub.inference.classify import load_classifier
from modeling_evmamba import EfficientVMambaConfig, EfficientVMambaForImageClassification
from process_pairs import needs_fork, show_in_two_processes


LABELS = ["bus", "car", "tram"]


@pytest.fixture(autouse=True)
def forget_notices(monkeypatch):
    """Let every test see its first notice."""
    monkeypatch.setattr(images, "has_warned", bytearray(1))


@pytest.fixture
def create_model(tmp_path) -> Callable[..., Path]:
    """Saves a network of some channels with an image processor, of 32 x 32 pixels unless options say otherwise."""

    def create(num_channels: int, **options) -> Path:
        torch.manual_seed(0)
        config = EfficientVMambaConfig(
            num_channels=num_channels,
            image_size=32,
            hidden_sizes=[8, 16, 24, 32],
            depths=[1, 1, 1, 1],
            id2label=dict(enumerate(LABELS)),
            label2id={label: index for index, label in enumerate(LABELS)},
        )
        folder = tmp_path / f"model of {num_channels}"
        EfficientVMambaForImageClassification(config).save_pretrained(folder)
        sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
        BitImageProcessorPil(**{**sizes, "image_mean": [0.5], "image_std": [0.25], **options}).save_pretrained(folder)
        return folder

    return create


@pytest.fixture
def dataset(tmp_path) -> Path:
    """Colored noise of 32 x 32 pixels, three images of each class."""
    generator = np.random.default_rng(0)
    for label in LABELS:
        (tmp_path / "dataset" / label).mkdir(parents=True)
        for number in range(3):
            noise = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / "dataset" / label / f"{number}.png")
    return tmp_path / "dataset"


def compute_gray_logits(model: Path, files: list[Path], mean: float = 0.5, std: float = 0.25) -> torch.Tensor:
    """Return the logits (B, labels) of gray images, which need no scaling."""
    gray = np.stack([np.asarray(Image.open(file).convert("L"), dtype=np.float32) for file in files])
    pixel_values = torch.from_numpy((gray / 255 - mean) / std)[:, None]  # (B, 1, H, W)
    with torch.no_grad():
        return EfficientVMambaForImageClassification.from_pretrained(model)(pixel_values).logits


def test_classify_reads_gray(evmamba, create_model, dataset):
    model, files = create_model(1), sorted(dataset.rglob("*.png"))
    code, out, err = evmamba("classify", *files, "--model", model, "--json", "--device", "cpu")
    assert code == 0, err
    scores = [
        [{found["label"]: found["score"] for found in image["predictions"]}[label] for label in LABELS]
        for image in json.loads(out)
    ]
    torch.testing.assert_close(torch.tensor(scores), compute_gray_logits(model, files).softmax(-1), atol=1e-5, rtol=0)


def test_evaluate_reads_gray(evmamba, create_model, dataset, tmp_path):
    model, files = create_model(1), sorted(dataset.rglob("*.png"))
    code, _, err = evmamba("evaluate", model, "--dataset", dataset, "--output", tmp_path / "results.json")
    assert code == 0, err
    results = json.loads((tmp_path / "results.json").read_text())
    labels = torch.tensor([LABELS.index(file.parent.name) for file in files])
    logits = compute_gray_logits(model, files)
    assert results["top1"] == (logits.argmax(-1) == labels).double().mean().item()
    assert results["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), abs=1e-5)


@pytest.mark.parametrize("num_channels", [2, 4])
def test_other_numbers_of_channels_are_refused(evmamba, create_model, dataset, num_channels):
    model = create_model(num_channels)
    for arguments in (["classify", dataset, "--model", model], ["evaluate", model, "--dataset", dataset]):
        code, _, err = evmamba(*arguments)
        assert code == 1
        assert f"Error: the network takes {num_channels} channels, image files are read as gray (1 channel) or" in err
        assert err.count("Error:") == 1 and "Traceback" not in err


@pytest.mark.parametrize("num_channels", [1, 2, 4])
def test_networks_of_any_channels_can_be_exported(create_model, num_channels):
    exportable = load_exportable(str(create_model(num_channels)), "float32")
    pixel_values = create_check_images(exportable.model.config, (2, 32, 48))
    assert exportable.model(pixel_values).logits.shape == (2, 3)


@pytest.mark.parametrize("values", [0.5, [0.5], [0.5, 0.5, 0.5]])
def test_one_value_for_all_channels_is_taken(recwarn, values):
    processor = BitImageProcessorPil(image_mean=values, image_std=values)
    fit_image_processor(processor, "L")
    pixel_values = processor(Image.new("L", (224, 224), 255), return_tensors="pt").pixel_values
    assert pixel_values.shape == (1, 1, 224, 224) and pixel_values.unique().tolist() == [1.0]
    assert not recwarn.list


def test_values_of_three_colors_are_averaged_and_announced(evmamba, create_model, dataset):
    model = create_model(1, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.25, 0.3])
    with pytest.warns(Notice, match=r"gray images, its image processor has image_mean \[0.4, 0.5, 0.6\]: their mean"):
        classifier = load_classifier(str(model), "cpu", "float32")
    (file,) = dataset.glob("bus/0.png")
    found = {each["label"]: each["score"] for each in classifier(Image.open(file), top_k=3)}
    expected = compute_gray_logits(model, [file])[0].softmax(-1).tolist()
    assert [found[label] for label in LABELS] == pytest.approx(expected, abs=1e-5)


def test_networks_of_three_channels_stay_as_they_are(create_model):
    processor = load_classifier(str(create_model(3, image_mean=[0.4, 0.5, 0.6])), "cpu", "float32").image_processor
    assert processor.do_convert_rgb and list(processor.image_mean) == [0.4, 0.5, 0.6]


def test_the_pipeline_of_transformers_takes_no_network_of_one_channel(create_model, dataset):
    """docs/faq.md says so. If it takes one, `GrayClassifier` can go."""
    model = create_model(1, do_convert_rgb=False)
    with pytest.raises(ValueError, match=r"mean must have 3 elements|must have 1 channels"):
        pipeline("image-classification", model=str(model), device="cpu")(str(next(dataset.rglob("*.png"))))


# What the commands say about images


def test_dark_images_are_announced_once(evmamba, dataset):
    for name in ("a.png", "b.png"):
        Image.fromarray(np.full((32, 32), 4095, dtype=np.uint16)).save(dataset / "car" / name)
    code, _, err = evmamba("classify", dataset, "--device", "cpu")
    assert code == 0
    assert err.count("Note: ") == 1
    assert "a.png: it uses 12 of its 16 bits and is read as dark: if all images do, scale them to 16 bits. " in err


@needs_fork
def test_two_processes_note_what_both_find_once_and_each_its_own_images(create_model, dataset):
    model = create_model(1, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.25, 0.3])
    # the second process reads every second image
    dark, damaged = dataset / "bus" / "1.png", dataset / "car" / "0.png"
    damaged.write_bytes(b"")
    Image.fromarray(np.full((32, 32), 1023, dtype=np.uint16)).save(dark)
    main_process, other = show_in_two_processes("evaluate", model, "--dataset", dataset, "--on-unreadable", "skip")
    notes, other_notes = ([line for line in said.splitlines() if "Note" in line] for said in (main_process, other))
    assert len(notes) == 2 and all("takes gray images" in note for note in notes)
    assert len(other_notes) == 2
    assert any(note.startswith(f"Note: {dark}: it uses 10 of its 16 bits") for note in other_notes)
    assert any(note.startswith(f"Note: skipped {damaged}: it is not an image") for note in other_notes)


def test_damaged_metadata_are_no_message(evmamba, dataset):
    """Pillow warns of them, in two lines with a path of its own."""
    exif = Image.Exif()
    exif[0x010F] = "Maker of cameras"
    Image.new("RGB", (32, 32)).save(dataset / "car" / "a.jpg", exif=exif.tobytes()[:20])
    code, _, err = evmamba("classify", dataset / "car" / "a.jpg", "--device", "cpu")
    assert code == 0
    assert "Warning" not in err and "EXIF" not in err


def test_other_warnings_are_shown(capsys):
    with pytest.warns(UserWarning, match="one of another package") as others, show_notices():
        warnings.warn("one of another package", stacklevel=1)
        warnings.warn("one of [this] package", Notice, stacklevel=1)
    assert len(others) == 1
    assert capsys.readouterr().err == "Note: one of [this] package\n"
