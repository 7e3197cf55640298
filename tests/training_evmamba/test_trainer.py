import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from filelock import FileLock
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from transformers import pipeline

from evmamba_hub.errors import UserError
from evmamba_hub.publish.card import load_card
from evmamba_hub.publish.push import collect_model_files
from modeling_evmamba import EfficientVMambaForImageClassification
from training_evmamba.recipe import create_recipe, dump_recipe, read_values
from training_evmamba.trainer import TrainingRun, create_accelerator


def start(recipe, output_dir, resume=False, console=None) -> TrainingRun:
    AcceleratorState._reset_state(reset_partial_state=True)  # of the run before, in this process
    return TrainingRun(recipe, output_dir, resume=resume, console=console or Console(quiet=True))


def train(recipe, output_dir, resume=False, console=None):
    return start(recipe, output_dir, resume, console).train()


def read_log(output_dir) -> list[dict]:
    return [json.loads(line) for line in (output_dir / "log.jsonl").read_text().splitlines()]


def losses(output_dir) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in read_log(output_dir) if "loss" in record}


def assert_same_weights(output_dir, other) -> None:
    weights, others = (load_file(folder / "model" / "model.safetensors") for folder in (output_dir, other))
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, others[name]), name


def test_learns_and_leaves_a_model_ready_to_push(make_recipe, stripes, tmp_path):
    output = tmp_path / "run"
    recipe = make_recipe(epochs=8, rand_augment=None, horizontal_flip=0.0, report_to=["tensorboard"], license="mit")
    results = train(recipe, output)
    assert results["images"] == 10
    assert results["top1"] >= 0.9
    log = read_log(output)
    assert [record["step"] for record in log if "top1" in record] == [5, 10, 14, 19, 24, 28, 33, 37]
    assert losses(output)[36] < 0.7 * losses(output)[2]
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
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, averages[name])
    classifier = pipeline("image-classification", model=str(output / "model"))
    held_out = sorted((stripes / "validation").glob("*/*.png"))
    right = [classifier(str(path))[0]["label"] == path.parent.name for path in held_out]
    assert sum(right) == round(results["top1"] * 10)

    card = load_card(str(output / "model"))
    assert card.data.license == "mit"
    accuracy = next(result for result in card.data.eval_results if result.metric_type == "accuracy")
    assert accuracy.metric_value == pytest.approx(results["top1"])
    assert "learning_rate: 0.003" in card.text
    assert "in 37 steps of 8 images (8 epochs)" in card.text
    assert "model.safetensors" in collect_model_files(output / "model", "someone/stripes")


def test_the_moving_average_is_evaluated_and_exported(make_recipe, tmp_path):
    train(make_recipe(ema_decay=0.0), tmp_path / "run")
    last = tmp_path / "run" / "checkpoints" / "step-0000010"
    weights, averages = load_file(last / "model.safetensors"), load_file(last / "ema.safetensors")
    assert all(torch.equal(weights[name], averages[name]) for name in weights)
    train(make_recipe(), tmp_path / "averaged")
    averages = load_file(tmp_path / "averaged" / "model" / "model.safetensors")
    assert not torch.equal(weights["classifier.weight"], averages["classifier.weight"])


def test_gradient_accumulation_and_checkpointing_change_nothing(make_recipe, tmp_path):
    """But for batch norms, which see pieces of the batch: here they keep their statistics."""
    options = {"freeze_batch_norm": True, "drop_path_rate": 0.0}
    train(make_recipe(**options), tmp_path / "whole")
    train(make_recipe(**options, gradient_accumulation_steps=2), tmp_path / "pieces")
    train(make_recipe(**options, gradient_checkpointing=True), tmp_path / "checkpointed")
    assert losses(tmp_path / "pieces") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    assert losses(tmp_path / "checkpointed") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


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
    assert losses(tmp_path / "bfloat16") == pytest.approx(losses(tmp_path / "float32"), rel=0.05)
    assert losses(tmp_path / "bfloat16") != losses(tmp_path / "float32")


FIRST_SCALE = 2.0**30  # of losses; gradients overflow until it has been halved some times


@pytest.fixture
def float16(monkeypatch):
    """accelerate as it is with float16 on GPUs: PyTorch offers both autocast and loss scaling on CPUs, too."""

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
    assert_same_weights(tmp_path / "resumed", output_dir)
    assert losses(tmp_path / "resumed") == losses(output_dir)


def train_in_another_process(recipe, output_dir, resume):
    torch.set_num_threads(1)
    train(recipe, output_dir, resume)


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_it_gives_the_same_weights(make_recipe, tmp_path):
    recipe = make_recipe(epochs=4, mixup_alpha=0.2, cutmix_alpha=1.0, drop_path_rate=0.2, checkpoint_steps=2)
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training_evmamba.trainer"])
    process = context.Process(target=train_in_another_process, args=(recipe, unbroken, False))
    process.start()
    process.join(300)
    assert process.exitcode == 0

    log = killed / "log.jsonl"
    for number in range(7):
        old = log.stat().st_ino if log.exists() else None
        process = context.Process(target=train_in_another_process, args=(recipe, killed, True))
        process.start()
        # until it is on its way: it begins by replacing the log, and goes on with lines
        while process.is_alive() and (not log.exists() or log.stat().st_ino == old or not log.stat().st_size):
            time.sleep(0.001)
        if number < 6:
            time.sleep(0.03 * number)  # in a step, in an evaluation, in a checkpoint
            os.kill(process.pid, signal.SIGKILL)
        process.join(300)
        assert process.exitcode == (-signal.SIGKILL if number < 6 else 0), "it was too fast to be killed"
    assert_same_weights(killed, unbroken)
    assert losses(killed) == losses(unbroken)
    assert [record["step"] for record in read_log(killed)] == [record["step"] for record in read_log(unbroken)]
    assert not list(killed.rglob(".*"))


def test_a_folder_is_of_one_run_at_a_time(make_recipe, tmp_path):
    output = tmp_path / "run"
    run = start(make_recipe(), output)
    written = read_values(str(output / "recipe.yaml"))
    for resume in (False, True):
        with pytest.raises(UserError, match=r"another run writes to .*run: wait for its end, or choose another"):
            train(make_recipe(learning_rate=1e-3), output, resume=resume)
    assert read_values(str(output / "recipe.yaml")) == written
    run.train()
    assert not list(output.rglob(".*"))
    (output / ".lock").touch()  # as a run leaves it that is killed
    train(make_recipe(), output, resume=True)
    assert not list(output.rglob(".*"))


@pytest.mark.slow
def test_all_processes_of_a_run_that_is_refused_end(make_recipe, tmp_path):
    """Without a launcher, which would end those that wait for the refused one."""
    (tmp_path / "recipe.yaml").write_text(dump_recipe(make_recipe()))
    output = tmp_path / "run"
    output.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "evmamba_hub.cli", "train", "--recipe", str(tmp_path / "recipe.yaml")]
    with FileLock(output / ".lock"):
        processes = [
            subprocess.Popen(
                [*command, "--output-dir", str(output)],
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, **place, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"},
            )
            for rank in "01"
        ]
        for process in processes:
            _, said = process.communicate(timeout=120)
            assert process.returncode == 1
            assert f"Error: another run writes to {output}" in said
            assert "Traceback" not in said
    assert os.listdir(output) == [".lock"]


def test_a_process_of_the_loader_that_is_killed(make_recipe, tmp_path, monkeypatch):
    recipe = make_recipe(num_workers=1, checkpoint_steps=2)
    run = start(recipe, tmp_path / "run")
    take_step = run.take_step

    def kill_and_take_step(batches):
        if run.progress.step == 3:
            for process in multiprocessing.active_children():
                process.kill()
        return take_step(batches)

    monkeypatch.setattr(run, "take_step", kill_and_take_step)
    message = r"was killed, .*: DataLoader worker .*\. The last checkpoint is .*step-0000002: --resume auto goes on"
    with pytest.raises(UserError, match=message):
        run.train()


def test_other_errors_of_pytorch_are_not_taken_for_it(make_recipe, tmp_path, monkeypatch):
    run = start(make_recipe(), tmp_path / "run")
    monkeypatch.setattr(run.model, "forward", lambda pixel_values: pixel_values.reshape(7))
    with pytest.raises(RuntimeError, match="is invalid for input of size"):
        run.train()


def test_a_run_from_before_there_was_a_choice_goes_on_with_pillow(make_recipe, tmp_path):
    train(make_recipe(), tmp_path / "run")
    path = tmp_path / "run" / "recipe.yaml"
    path.write_text(path.read_text().replace("augmentation_library: pillow\n", ""))
    train(make_recipe(augmentation_library="auto"), tmp_path / "run", resume=True)
    assert read_values(str(path))["augmentation_library"] == "pillow"


def test_a_run_that_is_complete_can_be_resumed(make_recipe, tmp_path):
    results = train(make_recipe(), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    assert train(make_recipe(), tmp_path / "run", resume=True) == results
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_the_library_is_said_and_saved(make_recipe, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "training_evmamba.augmentation_timm", None)  # as where timm is missing
    recipe = make_recipe(augmentation_library="auto", epochs=1)
    said = []
    for output, resume in ((tmp_path / "run", False), (tmp_path / "run", True)):
        console = Console(record=True, width=400, force_terminal=False, file=StringIO())
        train(recipe, output, resume=resume, console=console)
        said.append(console.export_text().splitlines()[0])
    words = "Images are augmented by Pillow's operators (RandAugment, crops) and PyTorch's (erasing, MixUp, CutMix)."
    assert said[0].startswith(words + " timm cannot be imported: ModuleNotFoundError: ")
    assert said[1] == words[:-1]
    assert read_values(str(tmp_path / "run" / "recipe.yaml"))["augmentation_library"] == "pillow"
    text = load_card(str(tmp_path / "run" / "model")).text
    assert words in text and "augmentation_library: pillow" in text
    with pytest.raises(UserError, match="augmented by timm, which cannot be imported"):
        train(make_recipe(augmentation_library="timm", epochs=1), tmp_path / "timm")
    assert not (tmp_path / "timm").exists()


def test_timm_augments_and_a_run_goes_on_with_it(make_recipe, tmp_path):
    pytest.importorskip("timm.data", exc_type=Exception)
    import timm

    options = {"mixup_alpha": 0.2, "cutmix_alpha": 1.0, "random_invert": 0.5, "random_erasing": 0.25}
    options |= {"augmentation_library": "auto", "checkpoint_steps": 3, "keep_checkpoints": 20}
    unbroken, resumed = tmp_path / "unbroken", tmp_path / "resumed"
    console = Console(record=True, width=400, force_terminal=False, file=StringIO())
    train(make_recipe(**options), unbroken, console=console)
    words = f"Images are augmented by timm {timm.__version__} (`create_transform` and `Mixup`)"
    assert console.export_text().splitlines()[0] == words
    assert words in load_card(str(unbroken / "model")).text
    assert read_values(str(unbroken / "recipe.yaml"))["augmentation_library"] == "timm"

    shutil.copytree(unbroken, resumed)
    shutil.rmtree(resumed / "model")
    for checkpoint in (resumed / "checkpoints").iterdir():
        if checkpoint.name > "step-0000003":
            shutil.rmtree(checkpoint)
    train(make_recipe(**options), resumed, resume=True)
    assert_same_weights(resumed, unbroken)
    assert losses(resumed) == losses(unbroken)

    # images are the same in processes of their own, and others than those of our operators
    train(make_recipe(**options, num_workers=2), tmp_path / "workers")
    assert_same_weights(tmp_path / "workers", unbroken)
    ours = make_recipe(**options | {"augmentation_library": "pillow"})
    train(ours, tmp_path / "ours")
    assert losses(tmp_path / "ours") != losses(unbroken)
    with pytest.raises(UserError, match="augmentation_library was 'timm', is 'pillow'"):
        train(ours, resumed, resume=True)
    with pytest.raises(UserError, match="a process has 9 in each piece of a step"):
        train(make_recipe(**options, batch_size=9), tmp_path / "odd")
    assert not (tmp_path / "odd").exists()


def launch(num_processes: int, recipe, output_dir: Path, *options: str) -> subprocess.CompletedProcess:
    """The command, on a number of processes."""
    path = output_dir.with_suffix(".yaml")
    path.write_text(dump_recipe(recipe))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    return subprocess.run(
        [*command, "-m", "evmamba_hub.cli", "train", "--recipe", str(path), "--output-dir", str(output_dir), *options],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def launch_fsdp(recipe, output_dir: Path) -> None:
    """Trains, or goes on, on two processes that share the weights."""
    path = output_dir.with_suffix(".yaml")
    path.write_text(dump_recipe(recipe))
    spread = ["--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]
    options = ["--use_fsdp", *spread, "--fsdp_cpu_ram_efficient_loading", "false", "--main_process_port", "0"]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", *options]
    ended = subprocess.run(
        [*command, str(Path(__file__).with_name("train_by_fsdp.py")), str(path), str(output_dir)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""},
    )
    assert ended.returncode == 0, ended.stderr


def go_back(output_dir: Path, copy: Path, step: int) -> None:
    """A copy of a run as it was after an earlier checkpoint."""
    shutil.copytree(output_dir, copy)
    shutil.rmtree(copy / "model")
    for checkpoint in (copy / "checkpoints").iterdir():
        if checkpoint.name > f"step-{step:07}":
            shutil.rmtree(checkpoint)


@pytest.mark.slow
def test_two_processes_learn_like_one_with_the_same_batch(make_recipe, tmp_path):
    exact = make_recipe(freeze_batch_norm=True, drop_path_rate=0.0)
    train(exact, tmp_path / "one")
    ended = launch(2, exact, tmp_path / "two")
    assert ended.returncode == 0, ended.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    one, two = read_log(tmp_path / "one")[-1], read_log(tmp_path / "two")[-1]
    assert two["validation_loss"] == pytest.approx(one["validation_loss"], rel=1e-4)
    assert (two["top1"], two["validation_images"], two["images"]) == (one["top1"], 10, one["images"])
    assert len(read_log(tmp_path / "two")) == len(read_log(tmp_path / "one"))

    # with statistics of its own, each process normalizes its half of the batch otherwise
    train(make_recipe(drop_path_rate=0.0), tmp_path / "one_live")
    assert launch(2, make_recipe(drop_path_rate=0.0), tmp_path / "two_live").returncode == 0
    assert losses(tmp_path / "two_live") == pytest.approx(losses(tmp_path / "one_live"), rel=0.1)


@pytest.mark.slow
def test_two_processes_resume_to_the_same_weights(make_recipe, tmp_path):
    recipe = make_recipe(mixup_alpha=0.2, cutmix_alpha=1.0, checkpoint_steps=3, keep_checkpoints=20)
    unbroken, resumed = tmp_path / "unbroken", tmp_path / "resumed"
    assert launch(2, recipe, unbroken).returncode == 0
    go_back(unbroken, resumed, step=3)
    ended = launch(2, recipe, resumed, "--resume", "auto")
    assert ended.returncode == 0, ended.stderr
    assert_same_weights(resumed, unbroken)
    times = ("images_per_second",)
    logs = [
        [{k: v for k, v in line.items() if k not in times} for line in read_log(each)] for each in (resumed, unbroken)
    ]
    assert logs[0] == logs[1]
    ended = launch(1, recipe, resumed, "--resume", "auto")
    assert ended.returncode == 1
    assert "the run has used 2 processes, now there are 1" in ended.stderr


@pytest.mark.slow
def test_two_processes_that_share_the_weights_learn_like_one(make_recipe, tmp_path):
    recipe = make_recipe(
        freeze_batch_norm=True, drop_path_rate=0.0, gradient_accumulation_steps=2, max_grad_norm=0.5, layer_decay=0.5
    )
    train(recipe, tmp_path / "one")
    launch_fsdp(recipe, tmp_path / "shared")
    logs = [read_log(tmp_path / name) for name in ("one", "shared")]
    for one, shared in zip(*logs, strict=True):
        assert {**shared, "images_per_second": 0} == pytest.approx({**one, "images_per_second": 0}, rel=1e-5)
    for name in ("model.safetensors", "ema.safetensors"):
        one, shared = (
            load_file(tmp_path / each / "checkpoints" / "step-0000010" / name) for each in ("one", "shared")
        )
        torch.testing.assert_close(shared, one, rtol=1e-4, atol=1e-6)
    model = EfficientVMambaForImageClassification.from_pretrained(tmp_path / "shared" / "model")
    torch.testing.assert_close(dict(model.state_dict()), shared, rtol=0, atol=0)


@pytest.mark.slow
def test_two_processes_that_share_the_weights_resume_to_the_same(make_recipe, tmp_path):
    machine = {"mixed_precision": "bf16", "gradient_checkpointing": True}
    recipe = make_recipe(**machine, frozen_stages=1, mixup_alpha=0.2, checkpoint_steps=3, keep_checkpoints=20)
    unbroken, resumed = tmp_path / "unbroken", tmp_path / "resumed"
    launch_fsdp(recipe, unbroken)
    go_back(unbroken, resumed, step=3)
    launch_fsdp(recipe, resumed)
    assert_same_weights(resumed, unbroken)
    assert losses(resumed) == losses(unbroken)


@pytest.mark.parametrize(
    "distributed_type, version, efficient, message",
    [
        (DistributedType.NO, "2", "false", "for GPUs alone, and would leave it out here"),
        (DistributedType.MULTI_GPU, "1", "false", "give accelerate --fsdp_version 2"),
        (DistributedType.MULTI_GPU, "2", "true", "give it --fsdp_cpu_ram_efficient_loading false"),
        (DistributedType.MULTI_GPU, "2", "false", "use one of --compile and --use_fsdp"),
    ],
)
def test_sharing_of_weights_that_cannot_be(
    make_recipe, tmp_path, monkeypatch, distributed_type, version, efficient, message
):
    settings = {"FSDP_VERSION": version, "FSDP_CPU_RAM_EFFICIENT_LOADING": efficient}
    for name, value in {"ACCELERATE_USE_FSDP": "true", **settings}.items():
        monkeypatch.setenv(name, value)
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True).distributed_type = distributed_type
    try:
        with pytest.raises(UserError, match=message):
            TrainingRun(make_recipe(compile=True), tmp_path / "run", resume=False, console=Console(quiet=True))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


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


@pytest.mark.slow
def test_two_processes_learn_from_a_stream(make_recipe, hub, stripes, tmp_path):
    files = {}
    for split in ("train", "validation"):
        images = datasets.load_dataset("imagefolder", data_dir=str(stripes), split=split)
        images.cast_column("image", datasets.Image(decode=False)).to_parquet(tmp_path / f"{split}.parquet")
        files[f"data/{split}-00000-of-00001.parquet"] = (tmp_path / f"{split}.parquet").read_bytes()
    hub.create("someone/stripes", files, kind="dataset")
    recipe = make_recipe(dataset="someone/stripes", streaming=True, images_per_epoch=37, num_workers=1)
    ended = launch(2, recipe, tmp_path / "run")
    assert ended.returncode == 0, ended.stderr
    assert read_log(tmp_path / "run")[-1]["validation_images"] == 10


def test_unreadable_images_are_counted(make_recipe, stripes, tmp_path, capsys):
    damaged = tmp_path / "images"
    shutil.copytree(stripes, damaged)
    (damaged / "train" / "vertical" / "01.png").write_bytes(b"")
    (damaged / "validation" / "vertical" / "01.png").write_bytes(b"")
    console = Console(record=True, width=400, force_terminal=False)
    results = train(make_recipe(dataset=str(damaged), num_workers=1), tmp_path / "run", console=console)
    assert results["images"] == 9
    text = console.export_text()
    assert text.count("Skipped") == 2
    assert "train/vertical/01.png: it is not an image" in text
    assert "2 images could not be read and were skipped." in load_card(str(tmp_path / "run" / "model")).text
    with pytest.raises(UserError, match=r"01\.png: it is not .*--on-unreadable skip goes on without the image"):
        train(make_recipe(dataset=str(damaged), on_unreadable="stop"), tmp_path / "stopped")


def test_a_loss_that_is_not_finite_stops_the_run(make_recipe, tmp_path):
    recipe = make_recipe(
        learning_rate=1e30, min_learning_rate=0.0, warmup_epochs=1.0, checkpoint_steps=2, max_grad_norm=1e30
    )
    with pytest.raises(
        UserError, match=r"the loss of step \d+ is (nan|inf)|not finite any more at step \d+"
    ) as caught:
        train(recipe, tmp_path / "run")
    step = int(re.search(r"step (\d+)", str(caught.value))[1])
    for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
        assert int(checkpoint.name[5:]) < step
        assert all(tensor.isfinite().all() for tensor in load_file(checkpoint / "model.safetensors").values())
    assert all(math.isfinite(value) for value in losses(tmp_path / "run").values())


def test_resuming_needs_the_same_recipe_and_data(make_recipe, stripes, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(stripes, images)
    output = tmp_path / "run"
    train(make_recipe(dataset=str(images)), output)
    with pytest.raises(UserError, match="holds a run: go on with it by --resume auto"):
        train(make_recipe(dataset=str(images)), output)
    with pytest.raises(UserError, match=r"another recipe .*learning_rate was 0.003, is 0.001"):
        train(make_recipe(dataset=str(images), learning_rate=1e-3), output, resume=True)
    (images / "train" / "vertical" / "01.png").unlink()
    with pytest.raises(UserError, match="the dataset has changed since the run began: it had 37 images"):
        train(make_recipe(dataset=str(images)), output, resume=True)


def test_refuses_a_folder_with_other_files(make_recipe, tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"thesis\.tex is a file, --output-dir is the folder of the run"):
        train(make_recipe(), tmp_path / "thesis.tex")
    with pytest.raises(UserError, match="holds files that are of no run"):
        train(make_recipe(), tmp_path)


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
        ({"report_to": ["smoke"]}, "accelerate cannot do .*smoke"),
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
