"""Trains a network whose weights are spread over the processes, saves, loads, and compares. Run by a test."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard

from modeling_evmamba import EfficientVMambaConfig, EfficientVMambaForImageClassification
from training_evmamba.checkpoints import Checkpoints, RunProgress
from training_evmamba.optimization import ExponentialMovingAverage, create_optimizer, create_schedule
from training_evmamba.recipe import load_recipe


class Training:
    def __init__(self, seed: int, sharded: bool):
        torch.manual_seed(seed)
        config = EfficientVMambaConfig(
            hidden_sizes=[8, 16], depths=[1, 1], block_types=["evss", "inverted_residual"], num_labels=3
        )
        self.model = EfficientVMambaForImageClassification(config).eval()  # statistics would differ by process
        if sharded:
            for stage in self.model.efficientvmamba.encoder.stages:
                fully_shard(stage)
            fully_shard(self.model)
        recipe = load_recipe("finetune", {})
        self.optimizer = create_optimizer(self.model, recipe)
        self.schedule = create_schedule(self.optimizer, recipe, 10, 5)
        self.ema = ExponentialMovingAverage(self.model, 0.9)

    def take_steps(self, first: int, last: int, images: slice) -> None:
        for step in range(first, last):
            rng = torch.Generator().manual_seed(step)
            pixel_values, labels = torch.randn(4, 3, 32, 32, generator=rng), torch.tensor([0, 1, 2, 0])
            self.model(pixel_values[images], labels=labels[images]).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.schedule.step()
            self.ema.update(self.model, step)

    @property
    def parts(self) -> tuple:
        return self.model, self.ema, self.optimizer, self.schedule, None


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    share = slice(2 * rank, 2 * rank + 2)
    checkpoints = Checkpoints(folder / "sharded", keep=9)
    unbroken = Training(0, sharded=True)
    unbroken.take_steps(1, 3, share)
    checkpoints.save(RunProgress(step=2), *unbroken.parts, is_main_process=rank == 0)
    dist.barrier()
    unbroken.take_steps(3, 6, share)
    resumed = Training(1, sharded=True)
    checkpoints.load(checkpoints.list()[0], *resumed.parts)
    resumed.take_steps(3, 6, share)
    checkpoints.save(RunProgress(step=5), *unbroken.parts, is_main_process=rank == 0)
    checkpoints.save(RunProgress(step=6), *resumed.parts, is_main_process=rank == 0)
    if rank == 0:
        whole = Training(0, sharded=False)
        whole.take_steps(1, 6, slice(None))
        Checkpoints(folder / "whole", keep=9).save(RunProgress(step=5), *whole.parts, is_main_process=True)
        for name in ("model.safetensors", "ema.safetensors"):
            expected, actual, again = (
                load_file(folder / path / name)
                for path in ("whole/step-0000005", "sharded/step-0000005", "sharded/step-0000006")
            )
            assert expected.keys() == actual.keys()
            for key, tensor in expected.items():
                torch.testing.assert_close(actual[key], tensor, rtol=1e-4, atol=1e-6)
                assert torch.equal(actual[key], again[key]), key
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
