"""The bundled model and the example images."""

from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image, ImageChops, ImageOps
from transformers import BitImageProcessorPil, pipeline

from modeling_evmamba import EfficientVMambaForImageClassification
from training_evmamba.digits import Digits, load_splits
from training_evmamba.recipe import PRESETS, create_recipe, find_changes, load_recipe


DEMO = Path(__file__).parents[2] / "demo"
CHECKPOINT = DEMO / "digits"
EXAMPLES = {digit: DEMO / "examples" / f"digit_{digit}.png" for digit in range(10)}


@pytest.fixture(scope="module")
def held_out() -> Digits:
    return load_splits()[1]


@pytest.fixture(scope="module")
def classifier():
    return pipeline("image-classification", model=str(CHECKPOINT))


def predicted_label(classifier, image) -> str:
    return classifier(image, top_k=1)[0]["label"]


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


@torch.no_grad()
def count_right(images: list[Image.Image], labels: torch.Tensor) -> int:
    model = EfficientVMambaForImageClassification.from_pretrained(CHECKPOINT)
    image_processor = BitImageProcessorPil.from_pretrained(CHECKPOINT)
    logits = model(image_processor(images, return_tensors="pt").pixel_values).logits
    return (logits.argmax(dim=-1) == labels).sum().item()


def test_accuracy_is_what_the_card_states(held_out):
    card = ModelCard.load(CHECKPOINT / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "image-classification")
    assert (card.data.license, card.data.metrics) == ("apache-2.0", ["accuracy"])
    stated = next(result for result in card.data.eval_results if result.metric_type == "accuracy")

    correct = count_right(held_out.images, held_out.labels)
    assert correct / 599 >= 0.99
    assert stated.metric_value == round(correct / 599, 4)
    assert f"On 599 held-out images, the top-1 accuracy is {correct / 599:.2%}, the top-5" in card.text

    assert count_right([ImageOps.invert(image) for image in held_out.images], held_out.labels) / 599 >= 0.985


def test_the_card_states_the_recipe():
    card = ModelCard.load(CHECKPOINT / "README.md")
    stated = yaml.safe_load(card.text.partition("```yaml\n")[2].partition("```")[0])
    recipe = load_recipe("digits", {"dataset": stated["dataset"]})
    assert find_changes(create_recipe(stated), recipe) == {}
    for name in ("digits_data.md", "digits_limits.md"):  # as `make digits` gives them
        assert (PRESETS / name).read_text().strip() in card.text


@pytest.mark.parametrize("digit", EXAMPLES)
def test_example_is_held_out_and_read_right(classifier, held_out, digit):
    with Image.open(EXAMPLES[digit]) as image:
        index = [held_out_image.tobytes() for held_out_image in held_out.images].index(image.tobytes())
    assert held_out.labels[index] == digit
    assert predicted_label(classifier, str(EXAMPLES[digit])) == str(digit)


def test_pictures_of_other_kinds(classifier):
    """Another size, a non-square shape, colors, and light digits on dark paper."""
    with Image.open(EXAMPLES[3]) as image:
        assert predicted_label(classifier, image.resize((47, 47))) == "3"
        assert predicted_label(classifier, ImageOps.expand(image, border=(40, 0), fill=255)) == "3"
        assert predicted_label(classifier, ImageOps.colorize(image, "navy", "white")) == "3"
        assert predicted_label(classifier, ImageChops.invert(image).convert("RGB")) == "3"
