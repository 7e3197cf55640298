import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_weights_that_are_spread_over_processes(tmp_path):
    """As accelerate's FSDP spreads them: averages, checkpoints and resuming are those of one process."""
    script = Path(__file__).with_name("shard.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    ended = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
