"""The training loop, in one process."""

import math
import multiprocessing
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from transformers import pipeline

from evmamba_hub.cli.train import describe_result
from evmamba_hub.cli.training import train_with_progress
from evmamba_hub.errors import UserError
from evmamba_hub.publish.card import load_card
from evmamba_hub.publish.push import collect_model_files
from modeling_evmamba import EfficientVMambaForImageClassification
from training_evmamba.recipe import create_recipe, read_values
from training_evmamba.trainer import create_accelerator
from training_runs import assert_same_models, go_back, read_log, read_losses, start, train
from weights import assert_same_weights


def test_learns_and_leaves_a_model_ready_to_push(make_recipe, stripes, tmp_path):
    output = tmp_path / "run"
    recipe = make_recipe(epochs=8, rand_augment=None, horizontal_flip=0.0, report_to=["tensorboard"], license="mit")
    results = train(recipe, output)
    assert results["images"] == 10
    assert results["top1"] >= 0.9
    log = read_log(output)
    assert [record["step"] for record in log if "top1" in record] == [5, 10, 14, 19, 24, 28, 33, 37]
    assert read_losses(output)[36] < 0.7 * read_losses(output)[2]
    assert log[-1]["top1"] == results["top1"]
    assert (log[-1]["images"], log[-1]["epoch"]) == (37 * 8, 8.0)

    assert sorted(path.name for path in output.iterdir()) == [
        "checkpoints",
        "log.jsonl",
        "model",
        "recipe.yaml",
        "trackers",
        "training_curves.png",
    ]
    with Image.open(output / "training_curves.png") as image:
        assert image.width > 1000
    assert list((output / "trackers").rglob("events.out.tfevents.*"))
    saved = create_recipe(read_values(str(output / "recipe.yaml")))
    assert (saved.image_mean, saved.crop_pct) == ([0.485, 0.456, 0.406], 0.875)

    model = EfficientVMambaForImageClassification.from_pretrained(output / "model")
    assert model.config.id2label == {0: "horizontal", 1: "vertical"}
    averages = load_file(output / "checkpoints" / "step-0000037" / "ema.safetensors")
    assert_same_weights(model.state_dict(), averages)
    earlier = output / "checkpoints" / "step-0000033" / "ema.safetensors"
    model_of_earlier = shutil.copytree(output / "model", tmp_path / "earlier")
    shutil.copy(earlier, model_of_earlier / "model.safetensors")
    model = EfficientVMambaForImageClassification.from_pretrained(model_of_earlier)
    assert_same_weights(model.state_dict(), load_file(earlier))
    classifier = pipeline("image-classification", model=str(output / "model"))
    held_out = sorted((stripes / "validation").glob("*/*.png"))
    right = [classifier(str(path))[0]["label"] == path.parent.name for path in held_out]
    assert sum(right) == round(results["top1"] * 10)

    card = load_card(str(output / "model"))
    assert card.data.license == "mit"
    accuracy = next(result for result in card.data.eval_results if result.metric_type == "accuracy")
    assert accuracy.metric_value == pytest.approx(results["top1"])
    assert "top-5" not in str(card).lower()  # there are two classes
    assert not any("top5" in record for record in log)
    assert "learning_rate: 0.003" in card.text
    assert "in 37 steps of 8 images (8 epochs)" in card.text
    assert card.text.startswith("\n# run\n") and card.text.count('"your-name/run"') == 5
    files = collect_model_files(output / "model", "someone/stripes")
    assert "model.safetensors" in files
    pushed = ModelCard(files["README.md"].decode())
    assert pushed.text == card.text.replace("# run", "# stripes", 1).replace('"your-name/run"', '"someone/stripes"')
    assert pushed.data.model_name == "stripes"


def test_the_moving_average_is_evaluated_and_exported(make_recipe, tmp_path):
    train(make_recipe(ema_decay=0.0), tmp_path / "run")
    last = tmp_path / "run" / "checkpoints" / "step-0000010"
    weights, averages = load_file(last / "model.safetensors"), load_file(last / "ema.safetensors")
    assert all(torch.equal(weights[name], averages[name]) for name in weights)
    train(make_recipe(), tmp_path / "averaged")
    averages = load_file(tmp_path / "averaged" / "model" / "model.safetensors")
    assert not torch.equal(weights["classifier.weight"], averages["classifier.weight"])


def test_gradient_accumulation_and_checkpointing_change_nothing(make_recipe, tmp_path):
    """Batch norms are the exception, since they normalize micro-batches. Here, their statistics are frozen."""
    options = {"freeze_batch_norm": True, "drop_path_rate": 0.0}
    train(make_recipe(**options), tmp_path / "whole")
    train(make_recipe(**options, gradient_accumulation_steps=2), tmp_path / "micro_batches")
    train(make_recipe(**options, gradient_checkpointing=True), tmp_path / "checkpointed")
    assert read_losses(tmp_path / "micro_batches") == pytest.approx(read_losses(tmp_path / "whole"), rel=1e-5)
    assert read_losses(tmp_path / "checkpointed") == pytest.approx(read_losses(tmp_path / "whole"), rel=1e-5)


def test_gradient_checkpointing_counts_a_batch_once_for_the_statistics(make_recipe, tmp_path):
    train(make_recipe(), tmp_path / "whole")
    train(make_recipe(gradient_checkpointing=True), tmp_path / "checkpointed")
    last = Path("checkpoints", "step-0000010", "model.safetensors")
    expected, actual = (load_file(tmp_path / name / last) for name in ("whole", "checkpointed"))
    statistics = [name for name in expected if "running_" in name or "num_batches" in name]
    assert any(name.endswith("running_var") for name in statistics)
    for name in statistics:
        torch.testing.assert_close(actual[name], expected[name])


def test_bfloat16(make_recipe, tmp_path):
    train(make_recipe(), tmp_path / "float32")
    train(make_recipe(mixed_precision="bf16"), tmp_path / "bfloat16")
    assert read_losses(tmp_path / "bfloat16") == pytest.approx(read_losses(tmp_path / "float32"), rel=0.05)
    assert read_losses(tmp_path / "bfloat16") != read_losses(tmp_path / "float32")


FIRST_SCALE = 2.0**30  # gradients overflow until it has been halved some times


@pytest.fixture
def float16(monkeypatch):
    """Emulate accelerate with float16 on GPUs. PyTorch has autocast and loss scaling on CPUs too."""

    def create_with_float16(recipe, output_dir):
        accelerator = create_accelerator(recipe, output_dir)
        accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=FIRST_SCALE)
        return accelerator

    monkeypatch.setattr("training_evmamba.trainer.create_accelerator", create_with_float16)


def test_float16_skips_steps_that_overflow_and_resumes(make_recipe, tmp_path, float16):
    recipe = make_recipe(epochs=4, checkpoint_steps=2, keep_checkpoints=99)
    output_dir = tmp_path / "run"
    train(recipe, output_dir)
    folders = [output_dir / "checkpoints" / f"step-{step:07}" for step in (2, 4, 18)]
    weights = [load_file(folder / "model.safetensors")["classifier.weight"] for folder in folders]
    scales = [torch.load(folder / "optimizer.pt", weights_only=True)["scaler"]["scale"] for folder in folders]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert FIRST_SCALE > scales[0] > scales[1] > scales[2]

    go_back(output_dir, tmp_path / "resumed", 6)
    train(recipe, tmp_path / "resumed", resume=True)
    assert_same_models(tmp_path / "resumed", output_dir)
    assert read_losses(tmp_path / "resumed") == read_losses(output_dir)


def test_a_process_of_the_loader_that_is_killed(make_recipe, tmp_path, monkeypatch):
    recipe = make_recipe(num_workers=1, checkpoint_steps=2)
    run = start(recipe, tmp_path / "run")
    training_step = run.training_step

    def kill_and_training_step(batches):
        if run.progress.step == 3:
            for process in multiprocessing.active_children():
                process.kill()
        return training_step(batches)

    monkeypatch.setattr(run, "training_step", kill_and_training_step)
    way_out = r"The last checkpoint is .*step-0000002: resume from it with --resume auto"
    with pytest.raises(UserError, match=rf"was killed, .*: DataLoader worker .*\. {way_out}"):
        run.train()


def test_other_errors_of_pytorch_are_not_taken_for_it(make_recipe, tmp_path, monkeypatch):
    run = start(make_recipe(), tmp_path / "run")
    monkeypatch.setattr(run.model, "forward", lambda pixel_values: pixel_values.reshape(7))
    with pytest.raises(RuntimeError, match="is invalid for input of size"):
        run.train()


def test_unreadable_images_are_counted(make_recipe, stripes, tmp_path, capsys):
    damaged = tmp_path / "images"
    shutil.copytree(stripes, damaged)
    (damaged / "train" / "vertical" / "01.png").write_bytes(b"")
    (damaged / "validation" / "vertical" / "01.png").write_bytes(b"")
    console = Console(record=True, width=400, force_terminal=False)
    run = start(make_recipe(dataset=str(damaged), num_workers=1), tmp_path / "run")
    results = train_with_progress(run, console)
    assert results["images"] == 9
    text = console.export_text()
    assert text.count("Skipped") == 2
    assert "train/vertical/01.png: it is not an image" in text
    card = load_card(str(tmp_path / "run" / "model")).text
    assert "on 36 images of 2 classes" in card and "2 more images could not be read." in card
    assert describe_result(run, results).endswith("on 9 held-out images, skipped 2 unreadable images")
    with pytest.raises(
        UserError, match=r"01\.png: it is not .*: replace the image, or skip it with --on-unreadable skip"
    ):
        train(make_recipe(dataset=str(damaged), on_unreadable="stop"), tmp_path / "stopped")


def test_a_loss_that_is_not_finite_stops_the_run(make_recipe, tmp_path):
    recipe = make_recipe(
        learning_rate=1e30, min_learning_rate=0.0, warmup_epochs=1.0, checkpoint_steps=2, max_grad_norm=1e30
    )
    with pytest.raises(UserError, match=r"the loss of step \d+ is (nan|inf)|no longer finite at step \d+") as caught:
        train(recipe, tmp_path / "run")
    step = int(re.search(r"step (\d+)", str(caught.value))[1])
    for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
        assert int(checkpoint.name[5:]) < step
        assert all(tensor.isfinite().all() for tensor in load_file(checkpoint / "model.safetensors").values())
    assert all(math.isfinite(value) for value in read_losses(tmp_path / "run").values())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"network": {"depths": [1]}}, "must have one entry per stage"),
        ({"network": {"num_labels": 3}}, "`network` must not hold 'num_labels'"),
        ({"network": {"stages": 3}}, r"has no field 'stages'"),
        ({"network": {"num_channels": 1, "patch_size": 2}}, "images have 3 channels, the network takes 1"),
        ({"network": {}}, "say what to train"),
        ({"frozen_stages": 3}, "`frozen_stages` is 3, the network has 2 stages"),
        ({"batch_size": 9, "gradient_accumulation_steps": 2}, "make it a multiple of 2"),
        ({"mixed_precision": "fp16"}, "float16 needs a GPU: use --mixed-precision bf16 or no"),
        ({"report_to": ["smoke"]}, "accelerate does not support .*smoke"),
        ({"rand_augment": "strong"}, "strong"),
        ({"model": "no/such", "network": {}}, "no/such"),
    ],
)
def test_runs_that_cannot_be(make_recipe, hub, tmp_path, options, message):
    base = make_recipe()
    if "network" in options and "depths" not in options["network"] and options["network"]:
        options = {**options, "network": {**base.network, **options["network"]}}
    with pytest.raises(UserError, match=message):
        train(create_recipe({**vars(base), **options}), tmp_path / "run")
