"""Checkpoints that are whole at any moment. A directory gets its final name once all its files are on the disk."""

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from evmamba_hub.errors import UserError
from evmamba_hub.files import partial_name, staged
from training_evmamba.optimization import ExponentialMovingAverage


STATE_NAME = "state.json"

# Processes save and load full tensors, whether they hold copies or shards of the weights.
FULL_STATE = StateDictOptions(full_state_dict=True, cpu_offload=True)


@dataclass
class RunProgress:
    """The progress of a run."""

    step: int = 0
    images_per_epoch: int = 0  # with `class_names`, detects a changed dataset
    class_names: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)  # skipped training images
    unreadable_held_out: list[str] = field(default_factory=list)  # skipped validation images
    num_processes: int = 1  # each draws different random numbers
    top1: float | None = None  # of the averaged weights, if evaluated at this step

    @property
    def num_unreadable(self) -> int:
        return len(self.unreadable) + len(self.unreadable_held_out)

    def locate(self, batch_size: int) -> dict[str, float]:
        """Return the place in the run for a log line. Steps have `batch_size` images over all processes."""
        num_images = self.step * batch_size
        return {"step": self.step, "images": num_images, "epoch": round(num_images / self.images_per_epoch, 4)}

    def check_same_run(self, fresh: "RunProgress", new_run: str) -> None:
        """Check that a run may resume from this progress.

        Args:
            fresh: The progress of a new run on the same data.
            new_run: What to do instead of resuming, for messages.

        Raises:
            UserError: If the dataset has changed, or there are more or fewer processes.
        """
        if (self.images_per_epoch, self.class_names) != (fresh.images_per_epoch, fresh.class_names):
            raise UserError(
                f"the dataset has changed since the run began: it had {self.images_per_epoch:,} images of "
                f"{len(self.class_names)} classes, now {fresh.images_per_epoch:,} of {len(fresh.class_names)}. "
                f"Restore it, or {new_run}"
            )
        if self.num_processes != fresh.num_processes:
            raise UserError(
                f"the run has used {self.num_processes} processes, now there are {fresh.num_processes}: resume with "
                f"{self.num_processes}, because the random numbers depend on their number"
            )

    @classmethod
    def read(cls, checkpoint: Path) -> "RunProgress":
        """Read the progress of a checkpoint.

        Raises:
            UserError: If it is damaged.
        """
        try:
            return cls(**json.loads((checkpoint / STATE_NAME).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{checkpoint} is damaged, remove it to resume from the one before: {error}") from error

    def write(self, checkpoint: Path) -> None:
        """Write the progress into a checkpoint."""
        (checkpoint / STATE_NAME).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


@dataclass
class TrainingState:
    """The objects that a checkpoint saves and restores."""

    model: nn.Module
    ema: ExponentialMovingAverage
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler | None
    progress: RunProgress


def gather_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the full weights and buffers, on the CPU. Call it on all processes."""
    # on a CPU, `get_model_state_dict` returns the tensors of the model, not copies
    return {name: tensor.clone() for name, tensor in get_model_state_dict(model, options=FULL_STATE).items()}


def gather_averages(model: nn.Module, ema: ExponentialMovingAverage) -> dict[str, torch.Tensor]:
    """Return the full averages, by the names of the weights. Call it on all processes."""
    with ema.applied_to(model):
        return gather_weights(model)


def sync_to_disk(folder: Path) -> None:
    """Wait until the files of a directory are on the disk."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def describe_last_checkpoint(checkpoints: list[Path]) -> str:
    """Return a sentence about the last checkpoint, for error messages."""
    if not checkpoints:
        return "There is no checkpoint yet"
    return f"The last checkpoint is {checkpoints[-1]}: resume from it with --resume auto"


class Checkpoints:
    """The checkpoints of a run: the latest ones and the best one.

    Each is a directory with `model.safetensors` (as trained), `ema.safetensors` (averaged), `optimizer.pt` (state of
    optimizer, schedule and loss scaling) and `state.json`.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep

    def list(self) -> list[Path]:
        """Return the checkpoints, the oldest first."""
        return sorted(self.folder.glob("step-*"))

    def find_best(self) -> Path | None:
        measured = [(RunProgress.read(path).top1, path) for path in self.list()]
        return max(((top1, path) for top1, path in measured if top1 is not None), default=(None, None))[1]

    def clean_up(self) -> None:
        """Remove partial checkpoints, and all whole ones except the latest and the best.

        Raises:
            UserError: If the directory cannot be written.
        """
        try:
            self.folder.mkdir(exist_ok=True)
            for partial in self.folder.glob(".*.partial"):
                shutil.rmtree(partial)
            best = self.find_best()
            for checkpoint in self.list()[: -self.keep]:
                if checkpoint != best:
                    removed = checkpoint.with_name(partial_name(checkpoint))
                    checkpoint.rename(removed)
                    shutil.rmtree(removed)
        except OSError as error:
            raise UserError(f"{self.folder} cannot be written: {error}") from error

    def save(self, state: TrainingState, is_main_process: bool) -> None:
        """Save a checkpoint. Call it on all processes. The main process writes.

        Raises:
            UserError: If the weights are not finite, or the checkpoint cannot be written. Earlier checkpoints stay.
        """
        weights, averages = gather_weights(state.model), gather_averages(state.model, state.ema)
        optimizer_state = {
            "optimizer": get_optimizer_state_dict(state.model, state.optimizer, options=FULL_STATE),
            "schedule": state.schedule.state_dict(),
            "scaler": None if state.scaler is None else state.scaler.state_dict(),
        }
        if not is_main_process:
            return
        step = state.progress.step
        for tensor in (*weights.values(), *averages.values()):
            if not tensor.isfinite().all():
                raise UserError(
                    f"the weights are no longer finite at step {step}: lower --learning-rate, or train "
                    "with --mixed-precision no"
                )
        with staged(self.folder / f"step-{step:07}") as folder:
            folder.mkdir()
            save_file(weights, folder / "model.safetensors")
            save_file(averages, folder / "ema.safetensors")
            try:
                torch.save(optimizer_state, folder / "optimizer.pt")
            except RuntimeError as error:  # PyTorch raises this if the disk is full
                raise OSError(str(error)) from error
            state.progress.write(folder)
            sync_to_disk(folder)
        self.clean_up()

    def load(self, checkpoint: Path, state: TrainingState) -> None:
        """Restore a run from a checkpoint. Call it on all processes.

        Raises:
            UserError: If the checkpoint is damaged, or belongs to another network.
        """
        model, progress = state.model, RunProgress.read(checkpoint)
        try:
            with state.ema.applied_to(model):
                set_model_state_dict(model, load_file(checkpoint / "ema.safetensors"), options=FULL_STATE)
            set_model_state_dict(model, load_file(checkpoint / "model.safetensors"), options=FULL_STATE)
            optimizer_state = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True)
            set_optimizer_state_dict(model, state.optimizer, optimizer_state["optimizer"], options=FULL_STATE)
        except (OSError, SafetensorError, UnpicklingError, EOFError, RuntimeError, KeyError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise UserError(f"{checkpoint} is damaged, remove it to resume from the one before: {reason}") from error
        state.schedule.load_state_dict(optimizer_state["schedule"])
        if state.scaler is not None and optimizer_state["scaler"] is not None:
            state.scaler.load_state_dict(optimizer_state["scaler"])
        state.progress = progress
