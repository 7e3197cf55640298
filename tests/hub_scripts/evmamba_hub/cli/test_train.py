import dataclasses
import re
import shutil
from io import StringIO
from pathlib import Path

import pytest
import torch
import typer
import yaml
from accelerate.state import AcceleratorState
from rich.console import Console
from transformers.utils import logging
from typer.testing import CliRunner

from evmamba_hub.cli.main import app
from evmamba_hub.cli.recipe_options import find_overrides, with_recipe_options
from evmamba_hub.cli.training import train_with_progress
from evmamba_hub.errors import UserError
from evmamba_hub.publish.card import load_card
from modeling_evmamba import EfficientVMambaForImageClassification
from process_pairs import needs_fork, show_in_two_processes
from training_evmamba.recipe import Recipe, dump_recipe, get_kinds, list_presets, load_recipe
from training_evmamba.trainer import TrainingRun


DIGITS = Path(__file__).parents[4] / "demo" / "digits"


@pytest.fixture
def run(make_recipe, tmp_path):
    """Run `evmamba train` with a small recipe and options. Return the output directory."""
    (tmp_path / "recipe.yaml").write_text(dump_recipe(make_recipe(epochs=1)))
    AcceleratorState._reset_state(reset_partial_state=True)  # left by the last run in this process

    def run(*options: str):
        base = ["train", "--recipe", str(tmp_path / "recipe.yaml"), "--output-dir", str(tmp_path / "run")]
        ended = CliRunner().invoke(app, [*base, *options], env={"COLUMNS": "200"})
        if isinstance(ended.exception, SystemExit):
            raise UserError(ended.output)  # the message of typer, in a frame
        if ended.exception is not None:
            raise ended.exception
        return tmp_path / "run"

    return run


def test_the_help_lists_all_values():
    text = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "300"}).stdout
    assert f"Preset ({', '.join(list_presets())})" in text
    options = set(re.findall(r"--[a-z0-9-]+", text))
    for field in dataclasses.fields(Recipe):
        assert f"--{field.name.replace('_', '-')}" in options


def test_the_help_shows_the_values_of_the_default_recipe():
    text = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "300"}).stdout
    shown = {
        "epochs": "20", "learning-rate": "0.0005", "warmup-epochs": "1", "mixup-alpha": "0", "layer-decay": "0.8",
        "crop-scale": "0.35 1", "crop-ratio": "0.75 1.333", "report-to": "tensorboard", "ema-decay": "0.99",
    }  # fmt: skip
    for name, value in shown.items():
        assert re.search(rf"--{name} .*\[{re.escape(value)}\]", text), name
    assert "--model" in text and not re.search(r"--(model|image-size|license) .*\[", text)


def test_options_have_the_same_names_in_training_and_evaluation():
    of_training, of_evaluation = (
        set(re.findall(r"--[a-z0-9-]+", CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "300"}).stdout))
        for name in ("train", "evaluate")
    )
    data = {"--dataset", "--dataset-config", "--dataset-revision", "--image-column", "--label-column"}
    assert data | {"--batch-size", "--num-workers"} <= of_training & of_evaluation
    assert not (of_training | of_evaluation) & {"--workers", "--config", "--split"}


def test_the_end_names_the_next_step(evmamba, make_recipe, tmp_path):
    (tmp_path / "recipe.yaml").write_text(dump_recipe(make_recipe(epochs=0.2, warmup_epochs=0)))
    AcceleratorState._reset_state(reset_partial_state=True)  # left by the last run in this process
    code, _, err = evmamba("train", "--recipe", tmp_path / "recipe.yaml", "--output-dir", tmp_path / "run")
    assert code == 0, err
    *_, result, step = err.splitlines()
    assert re.fullmatch(r"Trained .*/model, top-1 \d+\.\d\d% on 10 held-out images", result)
    assert step == f"Try it: evmamba classify IMAGE --model {tmp_path / 'run' / 'model'}"


def test_options_replace_values_of_the_recipe(run):
    output = run(
        "--epochs=0.75",
        "--learning-rate=1e-4",
        "--crop-scale", "0.5", "1",
        "--rand-augment=none",
        "--no-compile",
        "--network={state_size: 3}",
        "--image-mean=0.1", "--image-mean=0.2", "--image-mean=0.3",
    )  # fmt: skip
    saved = load_recipe(str(output / "recipe.yaml"), {})
    assert (saved.epochs, saved.learning_rate, saved.crop_scale, saved.rand_augment) == (0.75, 1e-4, (0.5, 1.0), None)
    assert saved.image_mean == [0.1, 0.2, 0.3]
    assert saved.network["state_size"] == 3
    assert EfficientVMambaForImageClassification.from_pretrained(output / "model").config.state_size == 3


def test_the_choice_of_images_is_told(make_recipe, stripes, tmp_path):
    shutil.copytree(stripes / "train", tmp_path / "stripes")
    shutil.copytree(stripes / "train" / "vertical", tmp_path / "stripes" / "vertical" / ".hidden")
    (tmp_path / "stripes" / "dotted").mkdir()
    shutil.copy(stripes / "train" / "vertical" / "01.png", tmp_path / "stripes" / "dotted")
    AcceleratorState._reset_state(reset_partial_state=True)  # left by the last run in this process
    recipe = make_recipe(dataset=str(tmp_path / "stripes"), epochs=0.2, warmup_epochs=0)
    console = Console(file=StringIO(), width=300)
    train_with_progress(TrainingRun(recipe, tmp_path / "run", resume=False), console)
    text = console.file.getvalue()
    assert "Ignored 18 files, hidden or without an image extension, such as" in text
    assert "Held out 4 images for evaluation\n1 class has no held-out image: dotted\n" in text


def test_options_that_are_not_given_change_nothing():
    assert find_overrides({"epochs": None, "image_mean": [], "compile": False}) == {"compile": False}


def test_none_takes_back_what_a_recipe_says(tmp_path):
    numbers = {"image_size": 64, "crop_pct": 0.9, "images_per_epoch": 100, "checkpoint_steps": 5}
    lists = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1], "report_to": ["tensorboard"]}
    texts = {"variant": "small", "rand_augment": "rand-m5", "validation_split": "val", "license": "mit"}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(numbers | lists | texts))
    given = {}
    app = typer.Typer()
    app.command()(with_recipe_options(Recipe, "finetune")(lambda **values: given.update(values)))
    names = {field.name for field in dataclasses.fields(Recipe) if type(None) in get_kinds(field.type)}
    assert {*numbers, *lists, *texts} - names == {"report_to"}
    options = [f"--{name.replace('_', '-')}=none" for name in sorted(names | {"report_to"})]
    ended = CliRunner().invoke(app, options)
    assert ended.exit_code == 0, ended.output
    recipe = load_recipe(str(path), find_overrides(given))
    assert {name: getattr(recipe, name) for name in names} == dict.fromkeys(names)
    assert recipe.report_to == []


def test_words_of_yaml_are_words_on_the_command_line():
    given = {}
    app = typer.Typer()
    app.command()(with_recipe_options(Recipe, "finetune")(lambda **values: given.update(values)))
    words = ["--mixed-precision=no", "--train-split=no", "--dataset-config=on", "--network={a: no, b: 12:30, c: 1e-3}"]
    ended = CliRunner().invoke(app, words)
    assert ended.exit_code == 0, ended.output
    recipe = load_recipe("tiny", find_overrides(given))
    assert (recipe.mixed_precision, recipe.train_split, recipe.dataset_config) == ("no", "no", "on")
    assert recipe.network == {"a": "no", "b": "12:30", "c": 0.001}


@pytest.mark.parametrize(
    "options, message",
    [
        (["--network=[1]"], "give YAML"),
        (["--network={a: 1, a: 2}"], "give YAML"),
        (["--image-size=large"], "'large' is neither a valid int nor `none`"),
        (["--image-mean=none", "--image-mean=half"], "'half' is neither a valid float nor `none`"),
        (["--epochs=0"], "`epochs` must be positive"),
        (["--recipe=gigantic"], "there is no recipe gigantic: give a YAML file or one of base, digits"),
        (["--push-to=nobody"], "names no owner"),
        (["--dataset=/nowhere"], "nowhere"),
    ],
)
def test_wrong_options(run, hub, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        run(*options)
    assert not (tmp_path / "run").exists()


def test_uploads_the_model_and_fine_tunes_it_from_there(run, hub, make_recipe, tmp_path):
    output = run("--push-to=someone/stripes")
    files = hub.repos["model", "someone/stripes"].files()
    assert {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"} <= set(files)
    assert b'model="someone/stripes"' in (output / "model" / "README.md").read_bytes()
    model = EfficientVMambaForImageClassification.from_pretrained("someone/stripes")
    assert torch.equal(
        model.classifier.weight,
        EfficientVMambaForImageClassification.from_pretrained(output / "model").classifier.weight,
    )

    AcceleratorState._reset_state(reset_partial_state=True)
    recipe = make_recipe(model="someone/stripes", network={}, epochs=1)
    TrainingRun(recipe, tmp_path / "tuned", resume=False).train()
    assert load_card(str(tmp_path / "tuned" / "model")).data.base_model == "someone/stripes"


def test_loading_a_checkpoint_shows_nothing(stripes, tmp_path, capfd):
    AcceleratorState._reset_state(reset_partial_state=True)  # left by the last run in this process
    logging.enable_progress_bar()
    options = {"model": DIGITS, "dataset": stripes, "output-dir": tmp_path / "run", "frozen-stages": 9}
    ended = CliRunner().invoke(app, ["train", *(f"--{name}={value}" for name, value in options.items())])
    assert "the network has 4 stages" in str(ended.exception)
    assert ended.output + "".join(capfd.readouterr()) == ""


@needs_fork
def test_two_processes_note_a_shorter_warmup_once(tmp_path):
    main_process, other = show_in_two_processes(
        "train", "--epochs=1", "--dataset=/nowhere", "--output-dir", tmp_path / "run"
    )
    note, error = main_process.splitlines()
    assert note.startswith("Note: Shortened the warm-up from") and error.startswith("Error: '/nowhere' is neither")
    assert other == error + "\n"


def test_asks_for_a_token_before_the_work_begins(run, hub, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(UserError, match="there is no access token for --push-to"):
        run("--push-to=someone/stripes")
    assert not (tmp_path / "run").exists()
