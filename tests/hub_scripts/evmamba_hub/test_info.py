import subprocess
import sys
import time
from functools import partial
from itertools import groupby, pairwise
from operator import itemgetter
from pathlib import Path

import pytest
import torch

from evmamba_hub import info
from evmamba_hub.info import describe_environment, measure_size
from evmamba_kernels import backends
from modeling_evmamba import VARIANTS, EfficientVMambaConfig


@pytest.mark.parametrize(
    "variant, parameters, gmacs",
    [("tiny", 6_493_660, 0.787), ("small", 11_273_688, 1.317), ("base", 33_717_136, 3.950)],
)
def test_published_sizes(variant, parameters, gmacs):
    size = measure_size(EfficientVMambaConfig(**VARIANTS[variant], num_labels=1000), 224, 224)
    assert size.parameters == parameters
    assert round(size.macs / 1e9, 3) == gmacs


def test_one_scan_block_counted_by_hand():
    config = EfficientVMambaConfig(
        hidden_sizes=[16], depths=[1], block_types=["evss"], state_size=4, num_labels=10, squeeze_expansion_ratio=0.5
    )
    height, width, channels = 5, 3, 32  # the sides of the map are odd, and the padding must not count
    pixels = height * width
    stem = pixels * 16 * 3 * 4 * 4
    projections = pixels * (16 * 2 * channels + channels * 16)
    scan = pixels * channels * (1 + 2 * 4 + 1 + 9 * 4)  # rank 1
    convolutions = pixels * (channels * 9 + 16 * 9 + 16 * 16)
    gate = 2 * (16 * 8 + 8 * 16)
    head = 16 * 10
    macs = measure_size(config, 4 * height, 4 * width).macs
    assert macs == stem + projections + scan + convolutions + gate + head


@pytest.mark.parametrize("backend", ["numba", "triton", "torch"])
def test_requested_backends_change_no_sizes(backend, monkeypatch):
    """The networks are counted on the meta device, on which no backend computes."""
    monkeypatch.setattr(backends, "preferred_backend", backend)
    assert measure_size(EfficientVMambaConfig(**VARIANTS["tiny"], num_labels=1000), 224, 224).macs == 787_017_984
    scan = describe_environment()["scan"]
    if backend in choose_backends():
        assert scan == f"{backend}: it was requested"
    else:
        assert scan.startswith(f"none: the backend '{backend}' computes on ")


def choose_backends() -> list[str]:
    """Return the backends that compute on the device of the environment."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    return ["torch", *(name for name, entry in backends.BACKENDS.items() if device.type in entry.device_types)]


def test_info_prints_the_sizes():
    # the installed program, in a separate process
    command = [Path(sys.executable).with_name("evmamba"), "info"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    for value in ("6,493,660", "0.787", "11,273,688", "1.317", "33,717,136", "3.950", "9 per state", "torch"):
        assert value in run.stdout
    assert run.stderr == ""


def test_info_of_a_checkpoint(evmamba, tmp_path):
    EfficientVMambaConfig(**VARIANTS["small"], num_labels=1000).save_pretrained(tmp_path)
    exit_code, stdout, _ = evmamba("info", tmp_path, "--image-size", 112)
    assert exit_code == 0
    assert "11,273,688" in stdout
    assert "0.350" in stdout  # more than a quarter of 1.317: 7 x 7 pixels become 4 x 4 in the last stage


def test_info_refuses_other_models(evmamba, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "resnet"}')
    for model, message in [
        (tmp_path, "is of the type 'resnet'"),
        (tmp_path / "missing", "and there is no such directory: "),
    ]:
        exit_code, _, stderr = evmamba("info", model)
        assert exit_code == 1
        assert message in stderr


def test_methods_take_turns_after_a_pause():
    """The threads of one method must not take a core from the next."""
    calls = []
    methods = {name: partial(lambda name: calls.append((name, time.perf_counter())), name) for name in ("a", "b")}
    times = info.measure_in_turns(methods, range(info.WARM_UP_ROUNDS + 2))
    assert {name: len(seconds) for name, seconds in times.items()} == dict.fromkeys("ab", 2 * info.CALLS_PER_TURN)
    turns = [list(turn) for _, turn in groupby(calls, key=itemgetter(0))]
    assert [turn[0][0] for turn in turns] == list("ab" * (info.WARM_UP_ROUNDS + 2))
    assert {len(turn) for turn in turns} == {1 + info.CALLS_PER_TURN}
    for previous, turn in pairwise(turns):
        assert turn[0][1] - previous[-1][1] >= info.PAUSE
