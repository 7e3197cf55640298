"""Runs of several processes, with replicated or sharded weights."""

import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from filelock import FileLock
from safetensors.torch import load_file
from train_by_fsdp import train_by_fsdp

from evmamba_hub.errors import UserError
from modeling_evmamba import EfficientVMambaForImageClassification
from process_pairs import needs_fork, run_on_two_processes, show_in_two_processes
from training_evmamba.recipe import dump_recipe
from training_evmamba.trainer import TrainingRun
from training_runs import assert_same_models, go_back, read_log, read_losses, train


@needs_fork
@pytest.mark.slow
def test_all_processes_of_a_run_that_is_refused_end(make_recipe, tmp_path):
    """Nothing here ends those that wait for the rejected one, as a launcher would."""
    (tmp_path / "recipe.yaml").write_text(dump_recipe(make_recipe()))
    output = tmp_path / "run"
    output.mkdir()
    with FileLock(output / ".lock"):
        shown = show_in_two_processes("train", "--recipe", tmp_path / "recipe.yaml", "--output-dir", output)
    for each in shown:
        assert f"Error: another run writes to {output}" in each
        assert "Traceback" not in each
    assert os.listdir(output) == [".lock"]


def fail_in_training(recipe, output_dir: Path) -> str:
    with pytest.raises(UserError) as caught:
        TrainingRun(recipe, output_dir, resume=False).train()
    return str(caught.value)


@needs_fork
@pytest.mark.parametrize("failing", [0, 1], ids=["main process", "other process"])
def test_data_that_only_one_process_cannot_open(make_recipe, tmp_path, failing):
    recipes = [make_recipe(), make_recipe()]
    recipes[failing] = make_recipe(dataset="/nowhere")
    said = run_on_two_processes(lambda rank: fail_in_training(recipes[rank], tmp_path / "run"))
    assert said[0] == said[1] and said[0].startswith("'/nowhere' is neither a path")
    assert not (tmp_path / "run").exists()


@needs_fork
@pytest.mark.parametrize("name", ["evmamba_hub.files.os.replace", "training_evmamba.checkpoints.save_file"])
def test_a_disk_that_fills_up_ends_both_processes(make_recipe, tmp_path, monkeypatch, name):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    def work(rank: int) -> str:
        if rank == 0:
            monkeypatch.setattr(name, fail)
        return fail_in_training(make_recipe(epochs=0.2, warmup_epochs=0), tmp_path / "run")

    said = run_on_two_processes(work)
    assert said[0] == said[1] and "cannot be written" in said[0] and "No space left on device" in said[0]


def launch(recipe, output_dir: Path, *options: str) -> subprocess.CompletedProcess:
    """Run the command on two processes."""
    path = output_dir.with_suffix(".yaml")
    path.write_text(dump_recipe(recipe))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.run(
        [*command, "-m", "evmamba_hub.cli", "train", "--recipe", str(path), "--output-dir", str(output_dir), *options],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def launch_fsdp(recipe, output_dir: Path) -> None:
    """Start or resume training on two processes that shard the weights, as a user does."""
    path = output_dir.with_suffix(".yaml")
    path.write_text(dump_recipe(recipe))
    spread = ["--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]
    options = ["--use_fsdp", *spread, "--fsdp_cpu_ram_efficient_loading", "false", "--main_process_port", "0"]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", *options]
    ended = subprocess.run(
        [*command, str(Path(__file__).parents[1] / "train_by_fsdp.py"), str(path), str(output_dir)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""},
    )
    assert ended.returncode == 0, ended.stderr


# what `accelerate launch` sets for the options of `launch_fsdp`
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


def fork_fsdp(recipe, output_dir: Path) -> None:
    """Do the same in forked processes, which need no imports."""

    def train_shards(rank: int) -> dict:
        os.environ.update(FSDP)
        return train_by_fsdp(recipe, output_dir)

    assert_same_results(*run_on_two_processes(train_shards))


def train_on_two_processes(recipe, output_dir: Path, resume: bool = False) -> None:
    assert_same_results(*run_on_two_processes(lambda rank: TrainingRun(recipe, output_dir, resume=resume).train()))


def assert_same_results(first: dict | str, second: dict | str) -> None:
    assert isinstance(first, dict) and first["images"] == 10, first
    assert second == first


@needs_fork
@pytest.mark.slow
def test_two_processes_learn_like_one_with_the_same_batch(make_recipe, tmp_path):
    exact = make_recipe(freeze_batch_norm=True, drop_path_rate=0.0)
    train(exact, tmp_path / "one")
    train_on_two_processes(exact, tmp_path / "two")
    assert read_losses(tmp_path / "two") == pytest.approx(read_losses(tmp_path / "one"), rel=1e-4)
    one, two = read_log(tmp_path / "one")[-1], read_log(tmp_path / "two")[-1]
    assert two["validation_loss"] == pytest.approx(one["validation_loss"], rel=1e-4)
    assert (two["top1"], two["validation_images"], two["images"]) == (one["top1"], 10, one["images"])
    assert len(read_log(tmp_path / "two")) == len(read_log(tmp_path / "one"))

    # each process normalizes its half of the batch with different statistics
    train(make_recipe(drop_path_rate=0.0), tmp_path / "one_live")
    train_on_two_processes(make_recipe(drop_path_rate=0.0), tmp_path / "two_live")
    assert read_losses(tmp_path / "two_live") == pytest.approx(read_losses(tmp_path / "one_live"), rel=0.1)


@needs_fork
@pytest.mark.slow
def test_two_processes_resume_to_the_same_weights(make_recipe, tmp_path):
    recipe = make_recipe(mixup_alpha=0.2, cutmix_alpha=1.0, checkpoint_steps=3, keep_checkpoints=20)
    unbroken, resumed = tmp_path / "unbroken", tmp_path / "resumed"
    train_on_two_processes(recipe, unbroken)
    go_back(unbroken, resumed, step=3)
    ended = launch(recipe, resumed, "--resume", "auto")
    assert ended.returncode == 0, ended.stderr
    assert_same_models(resumed, unbroken)
    times = ("images_per_second",)
    logs = [
        [{k: v for k, v in line.items() if k not in times} for line in read_log(each)] for each in (resumed, unbroken)
    ]
    assert logs[0] == logs[1]
    with pytest.raises(UserError, match="the run has used 2 processes, now there are 1"):
        train(recipe, resumed, resume=True)


@needs_fork
@pytest.mark.slow
def test_two_processes_that_share_the_weights_learn_like_one(make_recipe, tmp_path):
    recipe = make_recipe(
        freeze_batch_norm=True, drop_path_rate=0.0, gradient_accumulation_steps=2, max_grad_norm=0.5, layer_decay=0.5
    )
    train(recipe, tmp_path / "one")
    fork_fsdp(recipe, tmp_path / "shared")
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


@needs_fork
@pytest.mark.slow
def test_two_processes_that_share_the_weights_resume_to_the_same(make_recipe, tmp_path):
    machine = {"mixed_precision": "bf16", "gradient_checkpointing": True}
    recipe = make_recipe(**machine, frozen_stages=1, mixup_alpha=0.2, checkpoint_steps=3, keep_checkpoints=20)
    unbroken, resumed = tmp_path / "unbroken", tmp_path / "resumed"
    fork_fsdp(recipe, unbroken)
    go_back(unbroken, resumed, step=3)
    launch_fsdp(recipe, resumed)
    assert_same_models(resumed, unbroken)
    assert read_losses(resumed) == read_losses(unbroken)


@pytest.mark.parametrize(
    "distributed_type, version, efficient, message",
    [
        (DistributedType.NO, "2", "false", "on GPUs only, and would ignore it here"),
        (DistributedType.MULTI_GPU, "1", "false", "give accelerate --fsdp_version 2"),
        (DistributedType.MULTI_GPU, "2", "true", "give it --fsdp_cpu_ram_efficient_loading false"),
        (DistributedType.MULTI_GPU, "2", "false", "use either --compile or --use_fsdp"),
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
            TrainingRun(make_recipe(compile=True), tmp_path / "run", resume=False)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@needs_fork
@pytest.mark.slow
def test_two_processes_learn_from_a_stream(make_recipe, hub, stripes, tmp_path):
    files = {}
    for split in ("train", "validation"):
        images = datasets.load_dataset("imagefolder", data_dir=str(stripes), split=split)
        images.cast_column("image", datasets.Image(decode=False)).to_parquet(tmp_path / f"{split}.parquet")
        files[f"data/{split}-00000-of-00001.parquet"] = (tmp_path / f"{split}.parquet").read_bytes()
    hub.create("someone/stripes", files, kind="dataset")
    recipe = make_recipe(dataset="someone/stripes", streaming=True, images_per_epoch=37, num_workers=1)
    train_on_two_processes(recipe, tmp_path / "run")
    assert read_log(tmp_path / "run")[-1]["validation_images"] == 10
