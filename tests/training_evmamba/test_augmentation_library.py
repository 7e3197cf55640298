"""Which library augments: the choice where timm can be imported, where it is missing, and where it is broken."""

import re
import sys

import pytest

from evmamba_hub.errors import UserError
from training_evmamba.augmentation_library import choose_library, create_augmentation, find_timm_problem


def take_timm_modules() -> dict:
    """Takes out what was imported of timm, and what imports it."""
    names = {"timm", "torchvision", "training_evmamba.augmentation_timm"}
    return {name: sys.modules.pop(name) for name in list(sys.modules) if {name, name.split(".")[0]} & names}


@pytest.fixture
def forget_timm():
    """As if nothing of timm had been imported yet, until the end of the test."""
    modules = take_timm_modules()
    yield
    take_timm_modules()
    sys.modules.update(modules)


@pytest.fixture
def missing_timm(forget_timm) -> str:
    """Python refuses to import timm, as where it is not installed. Gives what it says."""
    sys.modules["timm.data"] = sys.modules["timm"] = None
    return "ModuleNotFoundError: import of timm"


@pytest.fixture
def unfit_torchvision(forget_timm, monkeypatch, tmp_path) -> str:
    """A torchvision that was built for another PyTorch. Gives what it says."""
    message = "operator torchvision::nms does not exist"
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "__init__.py").touch()
    (tmp_path / "timm" / "data.py").write_text("import torchvision")
    (tmp_path / "torchvision.py").write_text(f"raise RuntimeError({message!r})")
    monkeypatch.syspath_prepend(tmp_path)
    return f"RuntimeError: {message}"


@pytest.fixture(params=["missing_timm", "unfit_torchvision"])
def problem(request) -> str:
    return request.getfixturevalue(request.param)


@pytest.fixture
def working_timm():
    pytest.importorskip("timm.data", exc_type=Exception)


def test_without_timm_our_operators_are_chosen_and_why(problem, make_recipe):
    recipe = make_recipe(augmentation_library="auto")
    chosen, reason = choose_library(recipe, None)
    assert vars(chosen) == {**vars(recipe), "augmentation_library": "pillow"}
    assert reason.startswith(problem)


def test_timm_is_chosen_where_it_can_be_imported(working_timm, make_recipe):
    assert find_timm_problem() is None
    chosen, reason = choose_library(make_recipe(augmentation_library="auto"), None)
    assert (chosen.augmentation_library, reason) == ("timm", None)


def test_older_versions_of_timm_are_as_if_missing(working_timm, make_recipe, monkeypatch, tmp_path):
    (tmp_path / "timm-1.0.28.dist-info").mkdir()
    (tmp_path / "timm-1.0.28.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: timm\nVersion: 1.0.28\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "training_evmamba.augmentation_timm", raising=False)
    chosen, reason = choose_library(make_recipe(augmentation_library="auto"), None)
    assert chosen.augmentation_library == "pillow"
    assert reason.startswith("ImportError: timm>=1.0.29 is required") and "found timm==1.0.28" in reason


def test_our_operators_where_they_are_asked_for(make_recipe):
    recipe = make_recipe(augmentation_library="pillow")
    assert choose_library(recipe, None) == (recipe, None)


def test_timm_is_asked_for_where_it_cannot_be_imported(problem, make_recipe):
    with pytest.raises(UserError, match=f"cannot be imported .{re.escape(problem)}.*--augmentation-library pillow"):
        choose_library(make_recipe(augmentation_library="timm"), None)


@pytest.mark.parametrize("library", ["auto", "timm"])
def test_a_run_that_began_with_timm_needs_it(problem, make_recipe, library):
    recipe = make_recipe(augmentation_library=library)
    with pytest.raises(UserError, match=f"{re.escape(problem)}.*, or start anew elsewhere: a run goes on with"):
        choose_library(recipe, make_recipe(augmentation_library="timm"))


@pytest.mark.parametrize("library", ["pillow", "timm"])
def test_a_run_goes_on_with_what_it_began_with(request, make_recipe, library):
    if library == "timm":
        request.getfixturevalue("working_timm")
    saved = make_recipe(augmentation_library=library)
    assert choose_library(make_recipe(augmentation_library="auto"), saved) == (saved, None)


def test_batches_that_timm_does_not_mix(working_timm, make_recipe):
    options = {"augmentation_library": "timm", "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    for alphas in ({"mixup_alpha": 0.2}, {"cutmix_alpha": 1.0}):
        with pytest.raises(UserError, match=r"a process has 5 in each piece .*--augmentation-library pillow"):
            create_augmentation(make_recipe(**options, **alphas), 2, 5)
        create_augmentation(make_recipe(**options, **alphas), 2, 6)
        create_augmentation(make_recipe(**options | {"augmentation_library": "pillow"}, **alphas), 2, 5)
    create_augmentation(make_recipe(**options), 2, 5)  # which mixes nothing
