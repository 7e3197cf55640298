"""The choice of the augmentation library if timm can be imported, is missing, or is broken."""

import re
import shutil
import sys
from io import StringIO

import pytest
from rich.console import Console

from evmamba_hub.cli.training import train_with_progress
from evmamba_hub.errors import UserError
from evmamba_hub.publish.card import load_card
from training_evmamba.augmentation_library import (
    choose_augmentation_library,
    create_augmentation,
    describe_choice,
    find_timm_problem,
)
from training_evmamba.recipe import read_values
from training_runs import assert_same_models, read_losses, start, train


def take_timm_modules() -> dict:
    """Remove the modules of timm, and those that import it, from `sys.modules`. Return them."""
    names = {"timm", "torchvision", "training_evmamba.augmentation_timm"}
    return {name: sys.modules.pop(name) for name in list(sys.modules) if {name, name.split(".")[0]} & names}


@pytest.fixture
def forget_timm():
    """Hide earlier imports of timm until the end of the test."""
    modules = take_timm_modules()
    yield
    take_timm_modules()
    sys.modules.update(modules)


@pytest.fixture
def missing_timm(forget_timm) -> str:
    """Block the import of timm, as if it were not installed. Return the problem."""
    sys.modules["timm.data"] = sys.modules["timm"] = None
    return "is not installed"


@pytest.fixture
def unfit_torchvision(forget_timm, monkeypatch, tmp_path) -> str:
    """A torchvision that was built for another PyTorch. Return the problem."""
    message = "operator torchvision::nms does not exist"
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "__init__.py").touch()
    (tmp_path / "timm" / "data.py").write_text("import torchvision")
    (tmp_path / "torchvision.py").write_text(f"raise RuntimeError({message!r})")
    monkeypatch.syspath_prepend(tmp_path)
    return f"cannot be imported (RuntimeError: {message})"


@pytest.fixture
def missing_torchvision(forget_timm, monkeypatch, tmp_path) -> str:
    """Block the import of torchvision beside an installed timm. Return the problem."""
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "__init__.py").touch()
    (tmp_path / "timm" / "data.py").write_text("import torchvision")
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules["torchvision"] = None
    message = "import of torchvision halted; None in sys.modules"
    return f"cannot be imported (ModuleNotFoundError: {message})"


@pytest.fixture(params=["missing_timm", "unfit_torchvision", "missing_torchvision"])
def problem(request) -> str:
    return request.getfixturevalue(request.param)


@pytest.fixture
def working_timm():
    pytest.importorskip("timm.data", exc_type=Exception)


def test_without_timm_our_operators_are_chosen_and_why(problem, make_recipe):
    recipe = make_recipe(augmentation_library="auto")
    chosen, reason = choose_augmentation_library(recipe, None)
    assert vars(chosen) == {**vars(recipe), "augmentation_library": "pillow"}
    assert reason == problem


def test_timm_is_chosen_where_it_can_be_imported(working_timm, make_recipe):
    assert find_timm_problem() is None
    chosen, reason = choose_augmentation_library(make_recipe(augmentation_library="auto"), None)
    assert (chosen.augmentation_library, reason) == ("timm", None)


def test_older_versions_of_timm_are_as_if_missing(working_timm, make_recipe, monkeypatch, tmp_path):
    (tmp_path / "timm-1.0.28.dist-info").mkdir()
    (tmp_path / "timm-1.0.28.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: timm\nVersion: 1.0.28\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "training_evmamba.augmentation_timm", raising=False)
    chosen, reason = choose_augmentation_library(make_recipe(augmentation_library="auto"), None)
    assert chosen.augmentation_library == "pillow"
    assert reason.startswith("cannot be imported (ImportError: timm>=1.0.29 is required")
    assert "found timm==1.0.28" in reason


def test_our_operators_where_they_are_asked_for(make_recipe):
    recipe = make_recipe(augmentation_library="pillow")
    assert choose_augmentation_library(recipe, None) == (recipe, None)


def test_timm_is_asked_for_where_it_cannot_be_imported(problem, make_recipe):
    with pytest.raises(UserError, match=f"timm, which {re.escape(problem)}: .*--augmentation-library pillow"):
        choose_augmentation_library(make_recipe(augmentation_library="timm"), None)


@pytest.mark.parametrize("library", ["auto", "timm"])
def test_a_run_that_began_with_timm_needs_it(problem, make_recipe, library):
    recipe = make_recipe(augmentation_library=library)
    with pytest.raises(
        UserError, match=f"{re.escape(problem)}.*, or choose another --output-dir: a resumed run keeps its library"
    ):
        choose_augmentation_library(recipe, make_recipe(augmentation_library="timm"))


@pytest.mark.parametrize("library", ["pillow", "timm"])
def test_a_run_goes_on_with_what_it_began_with(request, make_recipe, library):
    if library == "timm":
        request.getfixturevalue("working_timm")
    saved = make_recipe(augmentation_library=library)
    assert choose_augmentation_library(make_recipe(augmentation_library="auto"), saved) == (saved, None)


def test_batches_that_timm_does_not_mix(working_timm, make_recipe):
    options = {"augmentation_library": "timm", "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    for alphas in ({"mixup_alpha": 0.2}, {"cutmix_alpha": 1.0}):
        with pytest.raises(UserError, match=r"a process has 5 in each micro-batch.*--augmentation-library pillow"):
            create_augmentation(make_recipe(**options, **alphas), 2, 5)
        create_augmentation(make_recipe(**options, **alphas), 2, 6)
        create_augmentation(make_recipe(**options | {"augmentation_library": "pillow"}, **alphas), 2, 5)
    create_augmentation(make_recipe(**options), 2, 5)  # without MixUp and CutMix


def test_a_run_from_before_there_was_a_choice_goes_on_with_pillow(make_recipe, tmp_path):
    train(make_recipe(), tmp_path / "run")
    path = tmp_path / "run" / "recipe.yaml"
    path.write_text(path.read_text().replace("augmentation_library: pillow\n", ""))
    train(make_recipe(augmentation_library="auto"), tmp_path / "run", resume=True)
    assert read_values(str(path))["augmentation_library"] == "pillow"


def test_a_broken_timm_is_named(unfit_torchvision, make_recipe):
    chosen, reason = choose_augmentation_library(make_recipe(augmentation_library="auto"), None)
    assert describe_choice(chosen, reason).startswith(
        "timm cannot be imported (RuntimeError: operator torchvision::nms does not exist), so this package augments "
        "the images by random crops, "
    )


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, "random crops, horizontal flips and RandAugment"),
        ({"horizontal_flip": 0, "rand_augment": None}, "random crops"),
        ({"horizontal_flip": 0, "rand_augment": None, "cutmix_alpha": 1}, "random crops and CutMix"),
        (
            {"random_invert": 0.5, "random_erasing": 0.25, "mixup_alpha": 0.2},
            "random crops, horizontal flips, random inversion, RandAugment, random erasing and MixUp",
        ),
    ],
)
def test_only_enabled_operators_are_named(make_recipe, options, expected):
    said = describe_choice(make_recipe(**options), None)
    assert said == f"Images are augmented by {expected} on Pillow and PyTorch"


def test_the_library_is_said_and_saved(missing_timm, make_recipe, tmp_path):
    recipe = make_recipe(augmentation_library="auto", epochs=1)
    said = []
    for output, resume in ((tmp_path / "run", False), (tmp_path / "run", True)):
        console = Console(record=True, width=400, force_terminal=False, file=StringIO())
        train_with_progress(start(recipe, output, resume), console)
        said.append(console.export_text().splitlines()[0])
    operators = "random crops, horizontal flips and RandAugment on Pillow and PyTorch"
    assert said == [
        f"timm is not installed, so this package augments the images by {operators}",
        f"Images are augmented by {operators}",
    ]
    assert read_values(str(tmp_path / "run" / "recipe.yaml"))["augmentation_library"] == "pillow"
    text = load_card(str(tmp_path / "run" / "model")).text
    assert f"Images are augmented by {operators}." in text and "augmentation_library: pillow" in text
    with pytest.raises(UserError, match="augments images with timm, which is not installed: install timm and the"):
        train(make_recipe(augmentation_library="timm", epochs=1), tmp_path / "timm")
    assert not (tmp_path / "timm").exists()


def test_timm_augments_and_a_run_goes_on_with_it(make_recipe, tmp_path):
    pytest.importorskip("timm.data", exc_type=Exception)
    import timm

    options = {"mixup_alpha": 0.2, "cutmix_alpha": 1.0, "random_invert": 0.5, "random_erasing": 0.25}
    options |= {"augmentation_library": "auto", "checkpoint_steps": 3, "keep_checkpoints": 20}
    unbroken, resumed = tmp_path / "unbroken", tmp_path / "resumed"
    console = Console(record=True, width=400, force_terminal=False, file=StringIO())
    train_with_progress(start(make_recipe(**options), unbroken), console)
    words = "Images are augmented by random crops, horizontal flips, random inversion, RandAugment, random erasing, "
    words += f"MixUp and CutMix of timm {timm.__version__}"
    assert console.export_text().splitlines()[0] == words
    assert words in load_card(str(unbroken / "model")).text
    assert read_values(str(unbroken / "recipe.yaml"))["augmentation_library"] == "timm"

    shutil.copytree(unbroken, resumed)
    shutil.rmtree(resumed / "model")
    for checkpoint in (resumed / "checkpoints").iterdir():
        if checkpoint.name > "step-0000003":
            shutil.rmtree(checkpoint)
    train(make_recipe(**options), resumed, resume=True)
    assert_same_models(resumed, unbroken)
    assert read_losses(resumed) == read_losses(unbroken)

    # worker processes make the same images, and our operators make different ones
    train(make_recipe(**options, num_workers=2), tmp_path / "workers")
    assert_same_models(tmp_path / "workers", unbroken)
    ours = make_recipe(**options | {"augmentation_library": "pillow"})
    train(ours, tmp_path / "ours")
    assert read_losses(tmp_path / "ours") != read_losses(unbroken)
    with pytest.raises(UserError, match="augmentation_library was 'timm', is 'pillow'"):
        train(ours, resumed, resume=True)
    with pytest.raises(UserError, match="a process has 9 in each micro-batch"):
        train(make_recipe(**options, batch_size=9), tmp_path / "odd")
    assert not (tmp_path / "odd").exists()
