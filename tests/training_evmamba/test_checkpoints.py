import os
import subprocess
import sys

import pytest
import torch

from evmamba_hub.errors import UserError
from modeling_evmamba import EfficientVMambaForImageClassification
from training_evmamba.checkpoints import Checkpoints, RunProgress, TrainingState
from training_evmamba.network import complete_recipe, create_model
from training_evmamba.optimization import ExponentialMovingAverage, create_optimizer, create_schedule
from training_runs import train
from weights import assert_same_weights


class Training:
    """Return a training state after some steps on random images."""

    def __init__(self, recipe, num_steps: int):
        recipe = complete_recipe(recipe, None)
        torch.manual_seed(num_steps)
        self.model, _ = create_model(recipe, None, ["a", "b"])
        self.optimizer = create_optimizer(self.model, recipe)
        self.schedule = create_schedule(self.optimizer, recipe, 10, 5)
        self.ema = ExponentialMovingAverage(self.model, 0.5)
        for step in range(num_steps):
            self.model(torch.randn(2, 3, 16, 16), labels=torch.tensor([0, 1])).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.schedule.step()
            self.ema.update(self.model, step)

    def state(self, progress: RunProgress) -> TrainingState:
        return TrainingState(self.model, self.ema, self.optimizer, self.schedule, None, progress)


def test_everything_comes_back(make_recipe, tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    saved, loaded = Training(make_recipe(), 3), Training(make_recipe(), 1)
    progress = RunProgress(step=3, images_per_epoch=37, class_names=["a", "b"], unreadable=["x.png"], num_processes=2)
    checkpoints.save(saved.state(progress), is_main_process=True)
    (checkpoint,) = checkpoints.list()
    assert sorted(path.name for path in checkpoint.iterdir()) == [
        "ema.safetensors",
        "model.safetensors",
        "optimizer.pt",
        "state.json",
    ]
    assert RunProgress.read(checkpoint) == progress
    state = loaded.state(RunProgress())
    checkpoints.load(checkpoint, state)
    assert state.progress == progress
    assert_same_weights(saved.model.state_dict(), loaded.model.state_dict())
    for average, other in zip(saved.ema.averages, loaded.ema.averages, strict=True):
        assert torch.equal(average, other)
    assert saved.schedule.get_last_lr() == loaded.schedule.get_last_lr()
    states = [training.optimizer.state_dict() for training in (saved, loaded)]
    for group, other in zip(*(state["param_groups"] for state in states), strict=True):
        assert group == {**other, "betas": tuple(other["betas"])}
    for index, state in states[0]["state"].items():
        for name, tensor in state.items():
            assert torch.equal(tensor, states[1]["state"][index][name])


def test_the_last_and_the_best_are_kept(make_recipe, tmp_path):
    checkpoints, training = Checkpoints(tmp_path, keep=2), Training(make_recipe(), 1)
    for step, top1 in enumerate([0.5, 0.9, 0.7, None, 0.8], start=1):
        checkpoints.save(training.state(RunProgress(step=step, top1=top1)), is_main_process=True)
    assert [path.name for path in checkpoints.list()] == ["step-0000002", "step-0000004", "step-0000005"]
    assert sorted(os.listdir(tmp_path)) == ["step-0000002", "step-0000004", "step-0000005"]


def test_weights_that_are_not_finite_are_not_saved(make_recipe, tmp_path):
    checkpoints, training = Checkpoints(tmp_path, keep=1), Training(make_recipe(), 1)
    checkpoints.save(training.state(RunProgress(step=1)), is_main_process=True)
    with torch.no_grad():
        training.model.classifier.bias.fill_(float("nan"))
    with pytest.raises(UserError, match="the weights are no longer finite at step 2"):
        checkpoints.save(training.state(RunProgress(step=2)), is_main_process=True)
    assert os.listdir(tmp_path) == ["step-0000001"]


def test_what_was_left_half_written_is_removed_and_not_taken_for_a_checkpoint(make_recipe, tmp_path):
    (tmp_path / ".step-0000007.partial").mkdir()
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.list() == []
    checkpoints.clean_up()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "optimizer.pt", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_damaged_checkpoints(make_recipe, tmp_path, name, damage):
    checkpoints, training = Checkpoints(tmp_path, keep=2), Training(make_recipe(), 1)
    checkpoints.save(training.state(RunProgress(step=1)), is_main_process=True)
    (checkpoint,) = checkpoints.list()
    if damage == "cut":
        (checkpoint / name).write_bytes((checkpoint / name).read_bytes()[:40])
    else:
        (checkpoint / name).unlink()
    with pytest.raises(UserError, match="step-0000001 is damaged, remove it to resume from the one before"):
        if name == "state.json":
            RunProgress.read(checkpoint)
        else:
            checkpoints.load(checkpoint, training.state(RunProgress()))


def test_pickles_that_want_to_run_code_are_refused(make_recipe, tmp_path):
    checkpoints, training = Checkpoints(tmp_path, keep=2), Training(make_recipe(), 1)
    checkpoints.save(training.state(RunProgress(step=1)), is_main_process=True)
    (checkpoint,) = checkpoints.list()

    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save(Malicious(), checkpoint / "optimizer.pt")
    with pytest.raises(UserError, match="is damaged"):
        checkpoints.load(checkpoint, training.state(RunProgress()))
    assert not (tmp_path / "executed").exists()


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from evmamba_hub.cli.main import main

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing beyond the limit fails, like on a full disk
checkpoint = Path(sys.argv.pop()) / "checkpoints" / "step-0000005"
import training_evmamba.checkpoints as checkpoints
save = checkpoints.Checkpoints.save

def save_on_a_full_disk(self, *args, **kwargs):
    if checkpoint.exists():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    save(self, *args, **kwargs)

checkpoints.Checkpoints.save = save_on_a_full_disk
main()
"""


@pytest.mark.slow
def test_a_full_disk_leaves_the_checkpoints_before(make_recipe, tmp_path):
    from training_evmamba.recipe import dump_recipe

    (tmp_path / "recipe.yaml").write_text(dump_recipe(make_recipe(checkpoint_steps=5)))
    output = tmp_path / "run"
    options = ["train", "--recipe", str(tmp_path / "recipe.yaml"), "--output-dir", str(output)]
    command = [sys.executable, "-c", FULL_DISK, *options, str(output)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 1
    assert "step-0000010 cannot be written" in ended.stderr
    assert "File too large" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert sorted(os.listdir(output / "checkpoints")) == ["step-0000005"]
    train(make_recipe(checkpoint_steps=5), output, resume=True)
    EfficientVMambaForImageClassification.from_pretrained(output / "model")
