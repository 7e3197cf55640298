"""Runs that start from the weights of a checkpoint."""

import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file

from evmamba_hub.errors import UserError
from evmamba_hub.model_folder import hide_load_report
from modeling_evmamba import EfficientVMambaForImageClassification
from training_evmamba.network import complete_recipe, create_model
from training_evmamba.recipe import create_recipe, read_values
from training_runs import CLASSES, start, train


@pytest.fixture
def said_by_transformers():
    """The log messages of transformers."""
    messages: list[str] = []
    handler, logger = logging.Handler(), logging.getLogger("transformers")
    handler.emit = lambda record: messages.append(record.getMessage())
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


def create_classifier(recipe, class_names=CLASSES) -> EfficientVMambaForImageClassification:
    return create_model(complete_recipe(recipe, None), None, class_names)[0]


def load(recipe, checkpoint, class_names, **network):
    recipe = create_recipe({**vars(complete_recipe(recipe, None)), "network": network})
    return create_model(recipe, checkpoint, class_names)


OTHERS = "A new head for 2 classes replaces the checkpoint's of 2 classes, because their names or their order differ"


@pytest.mark.parametrize(
    "class_names, notes",
    [
        (CLASSES, []),
        (["a", "b", "c"], ["A new head for 3 classes replaces the checkpoint's of 2 classes"]),
        (["a", "b"], [OTHERS]),
        (CLASSES[::-1], [OTHERS]),
        (["0", "1"], [OTHERS]),
    ],
    ids=["same", "more", "other names", "other order", "numbers"],
)
def test_a_new_head_is_announced_in_one_sentence(make_recipe, tmp_path, said_by_transformers, class_names, notes):
    old = create_classifier(make_recipe())
    old.save_pretrained(tmp_path)
    model, said = load(make_recipe(), tmp_path, class_names)
    assert (said, said_by_transformers) == (notes, [])
    keeps_head = torch.equal(model.classifier.weight[:2], old.classifier.weight)
    assert keeps_head == (not notes)


def test_a_head_of_classes_without_names_is_not_kept(make_recipe, tmp_path):
    """They would match any names by order, which says nothing about the classes."""
    old = create_classifier(make_recipe(), ["LABEL_0", "LABEL_1"])
    old.save_pretrained(tmp_path)
    model, said = load(make_recipe(), tmp_path, CLASSES)
    assert said == [OTHERS]
    assert not torch.equal(model.classifier.weight, old.classifier.weight)


def test_a_checkpoint_without_a_head(make_recipe, tmp_path, said_by_transformers):
    old = create_classifier(make_recipe())
    old.efficientvmamba.save_pretrained(tmp_path)
    for class_names in (CLASSES, ["a", "b", "c"]):
        _, said = load(make_recipe(), tmp_path, class_names)
        assert said == [f"The checkpoint has no head: a new one for {len(class_names)} classes is added"]
    assert said_by_transformers == []


def test_weights_that_the_network_lacks_are_announced(make_recipe, tmp_path, said_by_transformers):
    create_classifier(make_recipe()).save_pretrained(tmp_path)
    _, (said,) = load(make_recipe(), tmp_path, CLASSES, block_types=["evss", "evss"], depths=[1, 0])
    assert said.startswith("Ignored ") and " weights of the checkpoint that the network lacks: " in said
    assert said_by_transformers == []


@pytest.mark.parametrize(
    "options, kept",
    [
        ({}, []),
        ({"frozen_stages": 1}, ["--frozen-stages freezes stages with fresh weights, which thus stay random"]),
        ({"freeze_batch_norm": True}, ["--freeze-batch-norm freezes fresh statistics of batch norms"]),
    ],
)
def test_fresh_weights_that_are_frozen_are_announced(make_recipe, tmp_path, options, kept):
    recipe = complete_recipe(make_recipe(**options), None)
    model, said = create_model(recipe, None, CLASSES)
    assert said == [f"{words}: leave it out, or start from a checkpoint with --model" for words in kept]
    model.save_pretrained(tmp_path)
    assert load(recipe, tmp_path, CLASSES)[1] == []


def test_other_messages_of_transformers_are_kept(said_by_transformers):
    logger = logging.getLogger("transformers.modeling_utils")
    with hide_load_report():
        logger.warning("Network LOAD REPORT from: here")
        logger.warning("another warning")
        logger.error("an error")
    logger.warning("Network LOAD REPORT from: there")
    assert said_by_transformers == ["another warning", "an error", "Network LOAD REPORT from: there"]


def test_fine_tuning_keeps_the_head_of_the_same_classes(make_recipe, tmp_path):
    train(make_recipe(), tmp_path / "first")
    checkpoint = tmp_path / "first" / "model"
    options = {"model": str(checkpoint), "network": {}, "image_size": None, "learning_rate": 1e-9}
    options |= {"min_learning_rate": 0.0, "warmup_learning_rate": 0.0, "freeze_batch_norm": True}
    first = load_file(checkpoint / "model.safetensors")
    train(make_recipe(**options), tmp_path / "second")
    second = load_file(tmp_path / "second" / "model" / "model.safetensors")
    torch.testing.assert_close(second["classifier.weight"], first["classifier.weight"], atol=1e-6, rtol=0)
    saved = create_recipe(read_values(str(tmp_path / "second" / "recipe.yaml")))
    assert saved.image_size == 16


def test_fine_tuning_on_other_classes(make_recipe, stripes, tmp_path):
    train(make_recipe(), tmp_path / "first")
    others = tmp_path / "others"
    for name in ("a", "b", "c"):
        shutil.copytree(stripes / "train" / "vertical", others / name)
    options = {"model": str(tmp_path / "first" / "model"), "network": {}, "epochs": 1}
    rates = {"learning_rate": 1e-5, "min_learning_rate": 0.0}
    recipe = make_recipe(dataset=str(others), **options, **rates)
    run = start(recipe, tmp_path / "second")
    run.train()
    new_head = "A new head for 3 classes replaces the checkpoint's of 2 classes"
    assert run.notes[-1] == new_head
    assert new_head not in start(recipe, tmp_path / "second", resume=True).notes
    first = load_file(tmp_path / "first" / "model" / "model.safetensors")
    second = load_file(tmp_path / "second" / "model" / "model.safetensors")
    assert second["classifier.weight"].shape == (3, 16)
    stem = "efficientvmamba.embeddings.patch_embeddings.weight"
    torch.testing.assert_close(second[stem], first[stem], atol=1e-3, rtol=0)


def test_a_checkpoint_that_does_not_fit_the_recipe(make_recipe, tmp_path):
    train(make_recipe(), tmp_path / "first")
    recipe = make_recipe(model=str(tmp_path / "first" / "model"), network={"state_size": 3})
    with pytest.raises(UserError, match=r"in another shape, among them .*: `network` must not change"):
        train(recipe, tmp_path / "second")


def test_the_head_of_other_classes_is_not_kept_for_directories_of_numbers(make_recipe, stripes, tmp_path):
    """Numbers would match the classes of the checkpoint by index, which says nothing about the classes."""
    train(make_recipe(), tmp_path / "first")
    for number, name in enumerate(["vertical", "horizontal"]):
        shutil.copytree(stripes / "train" / name, tmp_path / "numbers" / str(number))
    options = {"model": str(tmp_path / "first" / "model"), "network": {}, "learning_rate": 1e-9}
    options |= {"min_learning_rate": 0.0, "warmup_learning_rate": 0.0}
    train(make_recipe(dataset=str(tmp_path / "numbers"), **options), tmp_path / "second")
    first = load_file(tmp_path / "first" / "model" / "model.safetensors")
    second = load_file(tmp_path / "second" / "model" / "model.safetensors")
    assert not torch.allclose(second["classifier.weight"], first["classifier.weight"], atol=1e-3)
