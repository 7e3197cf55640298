"""The presets of dense tasks: they are valid, and their learning rates are those of the published schedules."""

import pytest
import torch
from transformers import TrainingArguments, get_scheduler

from examples.object_detection import DETECTORS, DetectionRecipe
from examples.semantic_segmentation import SegmentationRecipe
from training_evmamba.recipe import load_recipe


ADE20K_STEPS, COCO_STEPS = 160_000, 12 * 118_287 // 16
ADE20K_WARMUP, COCO_WARMUP = 1500, 1000


def create_schedule(recipe, num_steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Create the schedule as the Trainer does."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=recipe.learning_rate)
    arguments = TrainingArguments(warmup_steps=recipe.warmup_fraction, use_cpu=True)
    return get_scheduler(recipe.schedule, optimizer, arguments.get_warmup_steps(num_steps), num_steps)


@pytest.mark.parametrize(
    "preset, recipe_class",
    [
        ("small", SegmentationRecipe),
        ("ade20k", SegmentationRecipe),
        ("small", DetectionRecipe),
        ("coco", DetectionRecipe),
    ],
)
def test_presets_are_valid(preset, recipe_class):
    recipe = load_recipe(preset, {}, recipe_class)
    assert recipe.model is None and recipe.variant is None
    if recipe_class is DetectionRecipe:
        DETECTORS[recipe.detector].config(**recipe.detector_fields)


def test_ade20k_has_the_linear_and_the_polynomial_schedule_of_mmsegmentation():
    recipe = load_recipe("ade20k", {}, SegmentationRecipe)
    assert recipe.steps == ADE20K_STEPS
    factor = create_schedule(recipe, ADE20K_STEPS).lr_lambdas[0]
    for step in (1, 700, ADE20K_WARMUP):
        assert factor(step) == pytest.approx(step / ADE20K_WARMUP, abs=1e-6)
    for step in (ADE20K_WARMUP, 50_000, 159_000, ADE20K_STEPS):
        power_one = (ADE20K_STEPS - step) / (ADE20K_STEPS - ADE20K_WARMUP)
        assert factor(step) == pytest.approx(power_one, abs=1e-9)


def test_coco_warms_up_over_a_thousand_steps():
    recipe = load_recipe("coco", {}, DetectionRecipe)
    assert recipe.epochs * 118_287 // recipe.batch_size == COCO_STEPS
    factor = create_schedule(recipe, COCO_STEPS).lr_lambdas[0]
    for step in (COCO_WARMUP // 2, COCO_WARMUP):
        assert factor(step) == pytest.approx(step / COCO_WARMUP, abs=0.005)
    assert factor(COCO_STEPS) == pytest.approx(0, abs=1e-9)
