import dataclasses

import pytest
import yaml

from evmamba_hub.errors import UserError
from training_evmamba.recipe import (
    PRESETS,
    Recipe,
    create_recipe,
    dump_recipe,
    find_changes,
    list_presets,
    load_recipe,
)


def test_the_presets_are_there():
    assert list_presets() == ["base", "digits", "finetune", "small", "tiny"]


@pytest.mark.parametrize("preset", list_presets())
def test_presets_name_fields_and_survive_a_file(preset, tmp_path):
    recipe = load_recipe(preset, {})
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe))
    assert load_recipe(str(path), {}) == recipe
    assert find_changes(recipe, load_recipe(str(path), {})) == {}
    values = yaml.safe_load((PRESETS / f"{preset}.yaml").read_text())
    assert values.keys() <= {field.name for field in dataclasses.fields(Recipe)}


@pytest.mark.parametrize("preset, batch_size", [("tiny", 2048), ("small", 2048), ("base", 1024)])
def test_the_authors_recipe(preset, batch_size):
    """arXiv 2403.09977 and the authors' logs."""
    recipe = load_recipe(preset, {})
    expected = {
        "variant": preset,
        "epochs": 300,
        "batch_size": batch_size,
        "learning_rate": 2e-3,
        "min_learning_rate": 1e-6,
        "warmup_learning_rate": 1e-7,
        "warmup_epochs": 20,
        "weight_decay": 0.04,
        "adam_epsilon": 1e-8,
        "max_grad_norm": 1,
        "ema_decay": 0.9999,
        "label_smoothing": 0.1,
        "rand_augment": "rand-m9-mstd0.5",
        "mixup_alpha": 0.2,
        "cutmix_alpha": 1,
        "mix_switch_prob": 0.5,
        "random_erasing": 0.25,
        "drop_path_rate": 0.1,
    }
    assert {name: getattr(recipe, name) for name in expected} == expected


def test_values_are_read_as_their_field_means_them():
    recipe = create_recipe({"learning_rate": "1e-2", "epochs": 30, "crop_scale": [1, 1], "image_mean": [0, 0, 0]})
    assert (recipe.learning_rate, recipe.epochs, recipe.crop_scale) == (0.01, 30.0, (1.0, 1.0))
    assert all(isinstance(value, float) for value in recipe.image_mean)


def test_the_command_line_comes_before_the_file():
    recipe = load_recipe("digits", {"epochs": 50, "network": {"state_size": 4}})
    assert recipe.epochs == 50
    assert recipe.network == {**load_recipe("digits", {}).network, "state_size": 4}
    assert load_recipe("tiny", {"model": "someone/flowers"}).variant is None
    assert load_recipe("tiny", {"variant": "small"}).variant == "small"
    assert load_recipe("tiny", {"model": "none"}).variant == "tiny"


@pytest.mark.parametrize(
    "values, message",
    [
        ({"epoch": 3}, "a recipe has no 'epoch': do you mean 'epochs'"),
        ({"frobnicate": 3}, "a recipe has no 'frobnicate': `evmamba train --help`"),
        ({"epochs": 0}, "`epochs` must be positive, got 0"),
        ({"epochs": "many"}, "`epochs` is a number, got 'many'"),
        ({"epochs": float("nan")}, "`epochs` must be finite"),
        ({"learning_rate": float("inf")}, "`learning_rate` must be finite"),
        ({"batch_size": 2.5}, "'batch_size' expected int, got float"),
        ({"batch_size": True}, "'batch_size' expected int, got bool"),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
        ({"checkpoint_steps": 0}, "`checkpoint_steps` must be at least 1"),
        ({"num_workers": -1}, "`num_workers` must not be negative"),
        ({"horizontal_flip": 1.5}, r"`horizontal_flip` is a probability in \[0, 1\], got 1.5"),
        ({"ema_decay": 1}, r"`ema_decay` must lie in \[0, 1\)"),
        ({"layer_decay": 0}, r"`layer_decay` must lie in \(0, 1\]"),
        ({"min_learning_rate": 1}, r"`min_learning_rate` must lie in \[0, learning_rate\]"),
        ({"crop_scale": [0.5, 2]}, "`crop_scale` must not exceed the image"),
        ({"crop_ratio": [2, 1]}, "the smaller first"),
        ({"crop_ratio": [1, 2, 3]}, "'crop_ratio' expected a tuple of length 2"),
        ({"image_mean": [0.5]}, "`image_mean` must be three numbers"),
        ({"image_std": [1, 1, 0]}, "`image_std` must be positive"),
        ({"warmup_epochs": 20, "epochs": 20}, r"`warmup_epochs` \(20\) must be fewer than `epochs` \(20\)"),
        ({"variant": "huge"}, "expected one of"),
        ({"network": 3}, "`network` holds fields of EfficientVMambaConfig"),
        ({"model": "someone/flowers", "variant": "tiny"}, "not both"),
    ],
)
def test_refuses_what_no_run_can_have(values, message):
    with pytest.raises(UserError, match=message):
        load_recipe("digits", values)


@pytest.mark.parametrize(
    "content, message",
    [("epochs: [", "cannot be read"), ("- epochs", "must hold lines of the form"), (None, "there is no recipe")],
)
def test_damaged_and_missing_files(tmp_path, content, message):
    path = tmp_path / "mine.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        load_recipe(str(path), {})


def test_changes_that_matter():
    recipe = load_recipe("digits", {})
    assert find_changes(recipe, load_recipe("digits", {"logging_steps": 3, "name": "else"})) == {}
    assert find_changes(recipe, load_recipe("digits", {"seed": 1})) == {"seed": (0, 1)}
