"""Start or resume training with FSDP on CPUs. A test runs it with `accelerate launch`, a recipe and a directory."""

import sys
from pathlib import Path

from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from training_evmamba.recipe import Recipe, create_recipe, read_values
from training_evmamba.trainer import TrainingRun


def check_sharding(model: nn.Module) -> None:
    """Check that both processes shard every weight, and that each block gathers its own weights."""
    for name, weight in model.named_parameters():
        assert isinstance(weight, DTensor), name
        assert weight.placements == (Shard(0),), name
        assert weight.device_mesh.size() == 2, name
    blocks = [block for stage in model.efficientvmamba.encoder.stages for block in stage.layers]
    assert all(isinstance(module, FSDPModule) for module in (model, *blocks))


def train_by_fsdp(recipe: Recipe, output_dir: Path) -> dict:
    # this alone makes accelerate use FSDP
    PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
    run = TrainingRun(recipe, output_dir, resume=True)
    check_sharding(run.model)
    return run.train()


if __name__ == "__main__":
    path, output_dir = map(Path, sys.argv[1:])
    train_by_fsdp(create_recipe(read_values(str(path))), output_dir)
