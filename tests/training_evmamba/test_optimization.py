import copy
import math

import pytest
import torch

from modeling_evmamba import EfficientVMambaConfig, EfficientVMambaForImageClassification
from training_evmamba.optimization import (
    ExponentialMovingAverage,
    count_steps,
    create_optimizer,
    create_schedule,
    find_depth,
    freeze,
    set_training_mode,
)
from training_evmamba.recipe import load_recipe


@pytest.fixture
def model() -> EfficientVMambaForImageClassification:
    config = EfficientVMambaConfig(
        hidden_sizes=[8, 16], depths=[2, 1], block_types=["evss", "inverted_residual"], num_labels=3
    )
    return EfficientVMambaForImageClassification(config)


def options_by_name(model, optimizer) -> dict[str, dict]:
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    return {name: groups[id(parameter)] for name, parameter in model.named_parameters() if id(parameter) in groups}


def test_weight_decay_is_for_matrices_and_filters(model):
    options = options_by_name(model, create_optimizer(model, load_recipe("tiny", {})))
    assert options.keys() == {name for name, _ in model.named_parameters()}
    decayed = {name for name, group in options.items() if group["weight_decay"] == 0.04}
    assert all(group["weight_decay"] in (0.0, 0.04) for group in options.values())
    for name, parameter in model.named_parameters():
        is_free = parameter.ndim == 1 or name.rpartition(".")[2] in ("A_log", "D", "dt_proj_bias")
        assert (name in decayed) != is_free, name


def test_layer_decay_slows_early_blocks_down(model):
    recipe = load_recipe("finetune", {"layer_decay": 0.5, "learning_rate": 1.0})
    options = options_by_name(model, create_optimizer(model, recipe))
    rates = {name: group["lr"] for name, group in options.items()}
    stages = "efficientvmamba.encoder.stages"
    assert rates["efficientvmamba.embeddings.patch_embeddings.weight"] == 0.5**4
    assert rates[f"{stages}.0.layers.0.mixer.in_proj.weight"] == 0.5**3
    assert rates[f"{stages}.0.layers.1.mixer.D"] == 0.5**2
    assert rates[f"{stages}.1.downsampling_layer.reduction.weight"] == 0.5
    assert rates[f"{stages}.1.layers.0.expand_conv.weight"] == 0.5
    assert rates["efficientvmamba.layernorm.weight"] == rates["classifier.weight"] == 1.0


def test_the_fused_optimizer_takes_the_steps_of_adamw(model):
    recipe = load_recipe("tiny", {"layer_decay": 0.5})
    other = copy.deepcopy(model)
    optimizer, expected = create_optimizer(model, recipe), create_optimizer(other, recipe)
    assert all(group["fused"] for group in optimizer.param_groups)
    for group in expected.param_groups:
        group["fused"] = False
    for _ in range(3):
        for parameter, its_copy in zip(model.parameters(), other.parameters(), strict=True):
            parameter.grad = torch.randn_like(parameter)
            its_copy.grad = parameter.grad.clone()
        optimizer.step()
        expected.step()
    torch.testing.assert_close(list(model.parameters()), list(other.parameters()))


def test_depths_of_the_published_networks_count_blocks():
    assert find_depth("efficientvmamba.encoder.stages.2.layers.3.expand_conv.weight", [1, 3, 5, 9], 10) == 8


def test_frozen_stages_do_not_learn(model):
    recipe = load_recipe("finetune", {"frozen_stages": 1, "freeze_batch_norm": True})
    freeze(model, recipe)
    set_training_mode(model, recipe)
    backbone = model.efficientvmamba
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    expected = ("efficientvmamba.embeddings.", "efficientvmamba.encoder.stages.0.")
    assert frozen == {name for name, _ in model.named_parameters() if name.startswith(expected)}
    assert options_by_name(model, create_optimizer(model, recipe)).keys().isdisjoint(frozen)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model(torch.randn(2, 3, 32, 32), labels=torch.tensor([0, 1])).loss.backward()
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before), "statistics moved"
    assert backbone.encoder.stages[1].layers[0].training
    assert not backbone.encoder.stages[0].training


def test_batch_norms_learn_unless_frozen(model):
    set_training_mode(model, load_recipe("finetune", {}))
    assert all(module.training for module in model.modules())


def test_the_schedule_warms_up_and_follows_a_cosine(model):
    recipe = load_recipe("tiny", {})
    optimizer = create_optimizer(model, recipe)
    schedule = create_schedule(optimizer, recipe, num_steps=3000, steps_per_epoch=10)  # 200 steps of warm-up
    rates = []
    for _ in range(3000):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(1e-7)
    assert rates[199] == pytest.approx(2e-3)
    assert max(rates) == pytest.approx(2e-3)
    assert rates[1600] == pytest.approx((2e-3 - 1e-6) / 2 * (1 + math.cos(math.pi * 1401 / 2800)) + 1e-6)
    assert rates[-1] == pytest.approx(1e-6, rel=0.01)
    assert rates[:200] == sorted(rates[:200])
    assert rates[200:] == sorted(rates[200:], reverse=True)


def test_the_moving_average(model):
    ema = ExponentialMovingAverage(model, 0.75)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    model.efficientvmamba.encoder.stages[0].layers[0].local_branch.batch_norm.running_mean.add_(2.0)
    moved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ema.update(model, 1)
    ema.update(model, 1000)
    kept = 2 / 11 * 0.75  # of the first weights: the decay of an early step is lower
    with ema.applied_to(model):
        for name, average in model.state_dict().items():
            torch.testing.assert_close(average, kept * start[name] + (1 - kept) * moved[name], check_dtype=False)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, moved[name])


@pytest.mark.parametrize(
    "epochs, images, batch_size, steps",
    [
        (5, 180, 64, 15),
        (8, 37, 8, 37),
        (30, 100, 12, 250),  # 30 * (100 / 12) is a little more than 250
        (30, 166, 10, 498),
        (0.7, 10, 1, 7),  # 0.7 * 10 too
        (0.1, 5, 8, 1),
        (300, 1_281_167, 2048, 187_671),
    ],
)
def test_steps_are_the_epochs_rounded_up_to_whole_batches(epochs, images, batch_size, steps):
    recipe = load_recipe("finetune", {"epochs": epochs, "batch_size": batch_size, "warmup_epochs": 0})
    assert count_steps(recipe, images) == steps
