"""Runs that start from the weights of a checkpoint."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from evmamba_hub.errors import UserError
from training_evmamba.recipe import create_recipe, read_values
from training_runs import train


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
    train(make_recipe(dataset=str(others), **options, **rates), tmp_path / "second")
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
