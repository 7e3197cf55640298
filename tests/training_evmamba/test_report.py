"""What the card of a trained model says about its training."""

import pytest

from evmamba_hub.images.labeled_images import StreamedImages
from modeling_evmamba import EfficientVMambaConfig, EfficientVMambaForImageClassification
from training_evmamba.checkpoints import RunProgress
from training_evmamba.data import TrainingData, open_data
from training_evmamba.optimization import count_steps
from training_evmamba.report import create_card, describe_training


def describe(recipe, data, **progress) -> str:
    step = count_steps(recipe, data.images_per_epoch)
    return describe_training(recipe, RunProgress(step=step, **progress), data, None)


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"epochs": 8}, "37 images of 2 classes, in 37 steps of 8 images (8 epochs), with"),
        ({"epochs": 2}, "in 10 steps of 8 images (2 epochs, rounded up to whole steps), with"),
        ({"epochs": 2, "gradient_accumulation_steps": 4}, "in 10 steps of 8 images (2 epochs, rounded up"),
        ({"epochs": 0.2, "warmup_epochs": 0}, "in 1 step of 8 images (0.2 epochs, rounded up"),
        ({"epochs": 1, "batch_size": 1}, "in 37 steps of 1 image (1 epoch), with"),
        (
            {"epochs": 3, "images_per_epoch": 16},
            "37 images of 2 classes, in 6 steps of 8 images (3 epochs of 16 images), ",
        ),
        ({"epochs": 1.5, "images_per_epoch": 37}, "in 7 steps of 8 images (1.5 epochs, rounded up"),
    ],
)
def test_the_length_of_the_training(make_recipe, options, expected):
    recipe = make_recipe(**options)
    assert expected in describe(recipe, open_data(recipe))


@pytest.mark.parametrize(
    "num_images, expected",
    [
        (None, "on a stream of images of 2 classes, in 25 steps of 8 images (2 epochs of 100 images), with"),
        (100, "on 100 images of 2 classes, in 25 steps of 8 images (2 epochs), with"),
    ],
)
def test_the_length_of_a_stream(make_recipe, num_images, expected):
    stream = StreamedImages(name="stream", class_names=["a", "b"], num_images=num_images, stream=None, columns=None)
    assert expected in describe(make_recipe(), TrainingData(stream, None, ["a", "b"], 100, []))


@pytest.mark.parametrize(
    "options, base_model",
    [
        ({"model": "someone/tiny"}, "someone/tiny"),
        ({"model": "HERE"}, None),
        ({"model": "HERE", "base_model": "someone/tiny"}, "someone/tiny"),
        ({"model": "someone/copy", "base_model": "someone/tiny"}, "someone/tiny"),
    ],
)
def test_a_card_names_the_id_of_the_base_model(make_recipe, tmp_path, options, base_model):
    recipe = make_recipe(**{**options, "model": options["model"].replace("HERE", str(tmp_path))})
    data = open_data(recipe)
    model = EfficientVMambaForImageClassification(EfficientVMambaConfig(hidden_sizes=[8] * 4, depths=[1] * 4))
    card = create_card(recipe, RunProgress(), model, data, None, "run")
    assert card.data.base_model == base_model
    assert f"It was fine-tuned from `{base_model or tmp_path}` on 37 images" in card.text


@pytest.mark.parametrize(
    "training, held_out, expected",
    [
        (["a"], [], ["on 36 images of 2 classes", "steps. 1 more image could not be read."]),
        (["a"], ["b"], ["on 36 images of 2 classes", "steps. 2 more images could not be read."]),
        ([], ["b"], ["on 37 images of 2 classes", "steps. 1 more image could not be read."]),
    ],
)
def test_unreadable_images_do_not_count(make_recipe, training, held_out, expected):
    text = describe(make_recipe(), open_data(make_recipe()), unreadable=training, unreadable_held_out=held_out)
    assert all(part in text for part in expected)


def test_unreadable_images_of_a_stream_have_no_number(make_recipe):
    stream = StreamedImages(name="stream", class_names=["a", "b"], num_images=100, stream=None, columns=None)
    text = describe(make_recipe(), TrainingData(stream, None, ["a", "b"], 100, []), unreadable=["a", "b"])
    assert "on 100 images of" in text and "steps. Unreadable images were skipped." in text
