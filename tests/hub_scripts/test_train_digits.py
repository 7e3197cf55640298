"""The committed demonstration checkpoint, and a short run of the script that makes such a one."""

import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image, ImageChops, ImageOps
from transformers import pipeline

from hub_scripts import train_digits
from hub_scripts.errors import UserError
from hub_scripts.train_digits import (
    SEED,
    Digits,
    create_image_processor,
    create_model,
    evaluate,
    load_splits,
    main,
    train,
)
from modeling_evmamba import EfficientVMambaForImageClassification


DEMO = Path(__file__).parents[2] / "demo"
CHECKPOINT = DEMO / "digits"
EXAMPLES = {digit: DEMO / "examples" / f"digit_{digit}.png" for digit in range(10)}


@pytest.fixture(scope="module")
def splits():
    return load_splits()


@pytest.fixture(scope="module")
def classifier():
    return pipeline("image-classification", model=str(CHECKPOINT))


def predicted_label(classifier, image) -> str:
    return classifier(image, top_k=1)[0]["label"]


def test_split(splits):
    training, held_out = splits
    assert (len(training.images), len(held_out.images)) == (1198, 599)
    assert held_out.labels.bincount().min() >= 58
    assert not {image.tobytes() for image in training.images} & {image.tobytes() for image in held_out.images}


def test_checkpoint_is_small_and_a_mixed_network():
    assert {path.name for path in CHECKPOINT.iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) <= 2 * 1024**2
    model = EfficientVMambaForImageClassification.from_pretrained(CHECKPOINT)
    assert model.dtype == torch.float32
    assert set(model.config.block_types) == {"evss", "inverted_residual"}
    assert model.config.id2label == {digit: str(digit) for digit in range(10)}


def test_accuracy_is_what_the_card_states(splits):
    held_out = splits[1]
    card = ModelCard.load(CHECKPOINT / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "image-classification")
    assert (card.data.license, card.data.metrics) == ("apache-2.0", ["accuracy"])
    [stated] = card.data.eval_results

    correct = evaluate(CHECKPOINT, held_out)
    assert correct / 599 >= 0.985
    assert stated.metric_value == round(correct / 599, 4)
    assert f"| dark on light | {correct} of 599 | {correct / 599:.2%} |" in card.text

    correct = evaluate(CHECKPOINT, Digits([ImageOps.invert(image) for image in held_out.images], held_out.labels))
    assert correct / 599 >= 0.985
    assert f"| light on dark | {correct} of 599 | {correct / 599:.2%} |" in card.text


@pytest.mark.parametrize("digit", EXAMPLES)
def test_example_is_held_out_and_read_right(classifier, splits, digit):
    _, held_out = splits
    with Image.open(EXAMPLES[digit]) as image:
        index = [held_out_image.tobytes() for held_out_image in held_out.images].index(image.tobytes())
    assert held_out.labels[index] == digit
    assert predicted_label(classifier, str(EXAMPLES[digit])) == str(digit)


def test_pictures_of_other_kinds(classifier):
    """Another size, a shape that is not square, colors, light on dark."""
    with Image.open(EXAMPLES[3]) as image:
        assert predicted_label(classifier, image.resize((47, 47))) == "3"
        assert predicted_label(classifier, ImageOps.expand(image, border=(40, 0), fill=255)) == "3"
        assert predicted_label(classifier, ImageOps.colorize(image, "navy", "white")) == "3"
        assert predicted_label(classifier, ImageChops.invert(image).convert("RGB")) == "3"


def test_short_training_run(tmp_path, monkeypatch, splits):
    training, held_out = (Digits(digits.images[:160], digits.labels[:160]) for digits in splits)
    monkeypatch.setattr(train_digits, "load_splits", lambda: (training, held_out))
    output = tmp_path / "runs" / "digits"
    losses = main(output, epochs=4)
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    correct = evaluate(output, held_out)
    assert f"| dark on light | {correct} of 160 |" in ModelCard.load(output / "README.md").text
    assert len(list((output.parent / "examples").glob("*.png"))) == 10
    assert sorted(path.name for path in output.parent.iterdir()) == ["digits", "examples"]

    before = (output / "model.safetensors").stat().st_ino
    main(output, epochs=1)
    assert (output / "model.safetensors").stat().st_ino != before
    assert sorted(path.name for path in output.parent.iterdir()) == ["digits", "examples"]


def test_the_seed_fixes_the_weights(splits):
    training, _ = splits
    pixel_values = training.pixel_values(create_image_processor())[:80]

    def trained_weights() -> dict[str, torch.Tensor]:
        torch.manual_seed(SEED)
        model = create_model()
        train(model, pixel_values, training.labels[:80], epochs=1)
        return model.state_dict()

    torch.testing.assert_close(trained_weights(), trained_weights(), rtol=0, atol=0)


def test_names_the_extra_where_scikit_learn_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match=r"efficientvmamba\[digits\]"):
        load_splits()


def test_refuses_to_replace_a_folder_that_is_no_checkpoint(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match="holds no checkpoint"):
        main(tmp_path)
    assert (tmp_path / "notes.txt").exists()
