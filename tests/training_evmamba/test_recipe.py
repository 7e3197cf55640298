import dataclasses

import pytest
import yaml

from evmamba_hub.errors import Notice, UserError
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


@pytest.mark.parametrize("preset", list_presets())
def test_presets_say_nothing_about_the_data_in_the_card(preset):
    """A preset trains on any dataset."""
    card = {field.name for field in dataclasses.fields(Recipe) if field.metadata["group"] == "Card"}
    assert {getattr(load_recipe(preset, {}), name) for name in card} == {None}


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


@pytest.mark.parametrize("network", [{"model": "other/net"}, {"variant": "tiny"}], ids=str)
def test_another_network_has_another_base_model(network, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: converted\nbase_model: someone/tiny\n")
    assert load_recipe(str(path), {}).base_model == "someone/tiny"
    assert load_recipe(str(path), network).base_model is None
    if "model" in network:
        assert load_recipe(str(path), {**network, "base_model": "other/base"}).base_model == "other/base"


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
        (
            {"warmup_epochs": 20, "epochs": 20},
            r"`warmup_epochs` \(20\) must be fewer than `epochs` \(20\): give --warmup-epochs 0, or more --epochs",
        ),
        ({"variant": "huge"}, "expected one of"),
        ({"network": 3}, "`network` holds fields of EfficientVMambaConfig"),
        ({"model": "someone/flowers", "variant": "tiny"}, "not both"),
        ({"base_model": "someone/tiny"}, "`base_model` names what `model` was made from: give `model` too"),
        ({"name": "Birds"}, "`name` is an id on the Hub, as user/name, got 'Birds'"),
        ({"name": "someone/vögel"}, "`name` is an id on the Hub, as user/name, got 'someone/vögel'"),
        ({"name": ""}, "`name` is an id on the Hub, as user/name, got ''"),
        ({"model": "tiny", "base_model": "./tiny"}, "`base_model` is an id on the Hub, as user/name, got './tiny'"),
    ],
)
def test_refuses_what_no_run_can_have(values, message):
    with pytest.raises(UserError, match=message):
        load_recipe("digits", values)


@pytest.mark.parametrize(
    "line, name, value",
    [
        ("mixed_precision: no", "mixed_precision", "no"),
        ("mixed_precision: 'no'", "mixed_precision", "no"),
        ("train_split: no", "train_split", "no"),
        ("train_split: on", "train_split", "on"),
        ("validation_split: off", "validation_split", "off"),
        ("dataset_config: yes", "dataset_config", "yes"),
        ("image_column: y", "image_column", "y"),
        ("label_column: =", "label_column", "="),
        ("dataset_config: 12:30", "dataset_config", "12:30"),
        ("dataset_revision: 2024-01-02", "dataset_revision", "2024-01-02"),
        ("dataset_revision: 0b11", "dataset_revision", "0b11"),
        ("report_to: [no, on]", "report_to", ["no", "on"]),
        ("compile: true", "compile", True),
        ("compile: False", "compile", False),
        ("learning_rate: 1e-3", "learning_rate", 0.001),
        ("learning_rate: .5", "learning_rate", 0.5),
        ("batch_size: 1_000", "batch_size", 1000),
        ("epochs: 1_000", "epochs", 1000.0),
        ("seed: 0o17", "seed", 15),
        ("seed: 017", "seed", 17),
        ("seed: 0x1F", "seed", 31),
        ("license: ~", "license", None),
        ("license:", "license", None),
        ("license: null", "license", None),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_yaml_is_read_by_version_1_2(tmp_path, line, name, value, encoding):
    (tmp_path / "mine.yaml").write_text(f"warmup_epochs: 0\n{line}\n", encoding=encoding)
    recipe = load_recipe(str(tmp_path / "mine.yaml"), {})
    assert getattr(recipe, name) == value and type(getattr(recipe, name)) is type(value)
    (tmp_path / "saved.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(str(tmp_path / "saved.yaml"), {}) == recipe


TEXTS = [
    "no", "On", "y", "1e5", "0o17", "017", "12:30", "2024-01-02", "1_000", "~", "null", "", ".5", "=", "<<",
    "a: b", "# x", "- a", " lead", "tab\t", "two\nlines\n", "naïve 日本 😀", "\u2028", "'", '"', "&a", "*a", "{", "%x",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_texts_survive_a_file_for_readers_of_both_versions(tmp_path, text):
    recipe = create_recipe({"about_data": text, "network": {"text": text, "texts": [text, 1e-7, None, False]}})
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe))
    assert load_recipe(str(path), {}) == recipe
    assert yaml.safe_load(path.read_text())["network"] == recipe.network


@pytest.mark.parametrize(
    "content, message",
    [
        ("- epochs", "must hold lines of the form"),
        ("", "must hold lines of the form"),
        ("epochs", "must hold lines of the form"),
        (None, "there is no recipe"),
        ("seed: 1\nepochs: [", "cannot be read: line 2, column 10: "),
        ("seed: 1\nepochs: 3\nseed: 2", "cannot be read: line 3, column 1: the key 'seed' is a duplicate"),
        ("network: {depths: [1], depths: [2]}", "line 1, column 24: the key 'depths' is a duplicate"),
        ("network:\n\tdepths: [1]", r"cannot be read: line 2, column 1: .*'\\t'"),
        ("seed: 1\n---\nseed: 2", "cannot be read: line 2, column 1: expected a single document"),
        ("seed: *x", "line 1, column 7: found undefined alias 'x'"),
        ("model: !!python/object:os.system x", "line 1, column 8: could not determine a constructor"),
        ("name: na\xefve".encode("latin-1"), "cannot be read: byte 9 is no text in UTF-8 or UTF-16: invalid"),
        ("seed: 1".encode("utf-32"), "cannot be read: byte 2 is no text in UTF-8 or UTF-16"),
        ("network: " + "[" * 3000, "cannot be read: maximum recursion depth"),
        (f"seed: {'9' * 5000}", "cannot be read: Exceeds the limit"),
        ("seed: 1\nepoch: 3", r"has no 'epoch': do you mean 'epochs'\? \(.*mine.yaml, line 2\)$"),
        ("# note\n\nbatch_size: 0", r"`batch_size` must be at least 1, got 0 \(.*mine.yaml, line 3\)$"),
        ("seed: 1\nbatch_size: 12:30", r"`batch_size` is a whole number, got '12:30' \(.*mine.yaml, line 2\)$"),
        ("epochs: 12:30", r"`epochs` is a number, got '12:30' \(.*, line 1\)$"),
        ("batch_size: 2.5", r"'batch_size' expected int, got float .*, line 1\)$"),
        ("image_size: yes", r"`image_size` is a whole number, got 'yes' \(.*, line 1\)$"),
        ("compile: yes", r"`compile` is true or false, got 'yes' \(.*, line 1\)$"),
        ("compile: 1", r"'compile' expected bool, got int .*, line 1\)$"),
        ("mixed_precision: off", r"'mixed_precision' expected one of .*got off \(.*, line 1\)$"),
        ("mixed_precision: false", r"'mixed_precision' expected one of .*False \(.*, line 1\)$"),
        ("dataset_config: 2018", r"`dataset_config` is text, got 2018: write it in quotes \(.*, line 1\)$"),
        ("train_split: true", r"`train_split` is text, got True: write it in quotes \(.*, line 1\)$"),
        ("epochs:", r"'epochs' expected float, got NoneType .*, line 1\)$"),
        ("report_to: tensorboard", r"'report_to' expected a list, got str \(.*, line 1\)$"),
        ("3: 4", r"a recipe has no 3: "),
        ("seed: 1\nno: 3", r"a recipe has no 'no': .*, line 2\)$"),
        ("seed: 1\nepochs: .inf", r"`epochs` must be finite, got inf \(.*, line 2\)$"),
    ],
)
def test_damaged_and_missing_files(tmp_path, content, message):
    path = tmp_path / "mine.yaml"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as error:
        load_recipe(str(path), {})
    assert "\n" not in str(error.value)


def test_an_error_of_the_command_line_names_no_line(tmp_path):
    (tmp_path / "mine.yaml").write_text("batch_size: 8")
    with pytest.raises(UserError, match=r"got 0$"):
        load_recipe(str(tmp_path / "mine.yaml"), {"batch_size": 0})


@pytest.mark.parametrize("preset, epochs, warmup", [("finetune", 1, 0.1), ("tiny", "20", 2), ("digits", 0.5, 0.05)])
def test_the_warm_up_of_a_preset_is_shortened_for_few_epochs(preset, epochs, warmup):
    with pytest.warns(Notice, match=rf"Shortened the warm-up from \d+ to {warmup} epochs, because the run has"):
        recipe = load_recipe(preset, {"epochs": epochs})
    assert recipe.warmup_epochs == pytest.approx(warmup)
    assert recipe == load_recipe(preset, {"epochs": epochs, "warmup_epochs": recipe.warmup_epochs})


def test_the_default_warm_up_is_shortened_and_that_of_a_file_is_not(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("epochs: 10")
    with pytest.warns(Notice, match="Shortened the warm-up from 20 to 1 epochs"):
        assert load_recipe(str(path), {}).warmup_epochs == 1
    path.write_text("epochs: 10\nwarmup_epochs: 5")
    with pytest.raises(
        UserError, match=r"`warmup_epochs` \(5\) must be fewer than `epochs` \(1\): give --warmup-epochs"
    ):
        load_recipe(str(path), {"epochs": 1})


@pytest.mark.filterwarnings("error")
def test_a_warm_up_that_fits_is_kept():
    assert load_recipe("finetune", {"epochs": 2}).warmup_epochs == 1


def test_changes_that_matter():
    recipe = load_recipe("digits", {})
    assert find_changes(recipe, load_recipe("digits", {"logging_steps": 3, "name": "else/digits"})) == {}
    assert find_changes(recipe, load_recipe("digits", {"seed": 1})) == {"seed": (0, 1)}
