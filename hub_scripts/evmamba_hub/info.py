"""`evmamba info`: the size of a network, the active backend, and the latency of a call."""

import platform
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeVar

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from evmamba_hub.dense_tasks import describe_other_network, find_head_class
from evmamba_hub.errors import UserError
from evmamba_hub.model_folder import check_is_converted, check_model_dir, refuse_dense_model
from evmamba_kernels import choose_backend
from evmamba_kernels.atrous_selective_scan import MACS_PER_STATE
from modeling_evmamba import VARIANTS, EfficientVMambaConfig, EfficientVMambaForImageClassification


Name = TypeVar("Name", bound=Hashable)

WARM_UP_ROUNDS = 2  # the first call compiles
CALLS_PER_TURN = 3  # after one untimed call, since the turns before have changed caches and allocator
# Seconds before each turn. Threads of OpenMP and of onnxruntime spin for up to 40 ms after their last call, and take
# a core from other methods (benchmarks/NOTES.md).
PAUSE = 0.1

PACKAGES = ("efficientvmamba", "torch", "transformers", "huggingface_hub", "numba", "triton", "onnxruntime", "timm")

MACS_CONVENTION = (
    "GMACs count the multiply-accumulates of convolutions and linear layers, including the projections to delta, B "
    f"and C. The scan adds {MACS_PER_STATE} per state (pixels x channels x states), as the authors count it. "
    "Norms, activations and gates are left out."
)


@dataclass
class Size:
    """The parameters of a network, and its multiply-accumulates for one image."""

    parameters: int
    macs: int


def measure_size(
    config: PreTrainedConfig,
    height: int,
    width: int,
    model_class: type[PreTrainedModel] = EfficientVMambaForImageClassification,
) -> Size:
    """Count parameters and multiply-accumulates for one image. Networks of this package compute and allocate nothing.

    Args:
        config: The configuration of the network.
        height, width: The sides of the image in pixels.
        model_class: The class of the network, which determines its head.

    Raises:
        UserError: If the head cannot take such an image.
    """
    num_channels = getattr(config, "backbone_config", config).num_channels
    # heads read the values of tensors, which the meta device does not have
    device = torch.device("meta" if isinstance(config, EfficientVMambaConfig) else "cpu")
    with device, torch.no_grad():
        model = model_class(config).eval().requires_grad_(False)
        with FlopCounterMode(display=False) as counter:
            try:
                model(torch.zeros(1, num_channels, height, width))
            except (RuntimeError, TypeError, ValueError) as error:
                raise UserError(
                    f"{model_class.__name__} does not take one image of {height} x {width} pixels alone: {error}"
                ) from error
    return Size(sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops() // 2)


def measure_latency(call: Callable[[], object], num_calls: int, warm_up_calls: int = 1) -> list[float]:
    """Measure the latency of successive calls. Each measurement waits for the accelerator, if there is one.

    Args:
        call: The function to measure.
        num_calls: The number of measured calls.
        warm_up_calls: The number of calls before them, which compile and allocate. They are not measured.

    Returns:
        The seconds of each measured call.
    """
    seconds = []
    for _ in range(warm_up_calls + num_calls):
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds[warm_up_calls:]


def measure_in_turns(
    calls: Mapping[Name, Callable[[], object]],
    rounds: Iterable[object],
    *,
    warm_up_rounds: int = WARM_UP_ROUNDS,
    calls_per_turn: int = CALLS_PER_TURN,
    untimed_calls: int = 1,
    pause: float = PAUSE,
) -> dict[Name, list[float]]:
    """Measure the latency of functions that take turns, so that a slow moment of the machine affects all of them.

    Args:
        calls: The functions to measure, by name.
        rounds: One item for each round, such as `range(10)`, or a progress bar around it. In a round, each function
            has one turn.
        warm_up_rounds: The number of rounds that are not measured. They are the first of `rounds`.
        calls_per_turn: The number of successive calls that a turn measures.
        untimed_calls: The number of calls before them in each turn.
        pause: The seconds to wait before each turn. Kernels of a GPU leave no threads that spin, so they need none.

    Returns:
        The seconds of each measured call, by name.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in calls}
    for number, _ in enumerate(rounds):
        for name, call in calls.items():
            time.sleep(pause)
            turn = measure_latency(call, calls_per_turn, untimed_calls)
            if number >= warm_up_rounds:
                seconds[name] += turn
    return seconds


def synchronize() -> None:
    """Wait until the accelerator has finished its work. Without an accelerator, return at once."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def find_variant(config: EfficientVMambaConfig) -> str | None:
    """Return the name of the published network that has these sizes, or None."""
    for name, fields in VARIANTS.items():
        if all(getattr(config, field) == value for field, value in fields.items()):
            return name
    return None


def load_auto_config(model: str) -> PreTrainedConfig:
    """Return the configuration of a directory or Hub id.

    Raises:
        UserError: If it cannot be loaded.
    """
    if Path(model).exists():
        check_model_dir(Path(model))
    else:
        check_is_converted(model)
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        place = "" if Path(model).exists() else " from the Hub, and there is no such directory"
        raise UserError(f"the model {model!r} cannot be loaded{place}: {error}") from error


def find_configs(model: str | None) -> dict[str, EfficientVMambaConfig]:
    """Return the configuration of a directory or Hub id by its name, or those of the published networks.

    Raises:
        UserError: If the model cannot be loaded, or is another network.
    """
    if model is None:
        return {
            f"EfficientVMamba-{variant.capitalize()}": EfficientVMambaConfig(**{**fields, "num_labels": 1000})
            for variant, fields in VARIANTS.items()
        }
    config = load_auto_config(model)
    refuse_dense_model(config.architectures or [], model)
    if not isinstance(config, EfficientVMambaConfig):
        raise UserError(describe_other_network(config, model))
    return {model: config}


def find_networks(model: str | None) -> dict[str, tuple[PreTrainedConfig, type[PreTrainedModel]]]:
    """Return the configuration and the class of a network by its name. Heads around the backbone are networks too.

    Args:
        model: Directory or Hub id, or None for the published networks.

    Raises:
        UserError: If the model cannot be loaded, or is another network.
    """
    if model is not None and not isinstance(config := load_auto_config(model), EfficientVMambaConfig):
        return {model: (config, find_head_class(config, model))}
    return {name: (config, EfficientVMambaForImageClassification) for name, config in find_configs(model).items()}


def choose_device(name: str) -> torch.device:
    """Return the device of a name.

    Args:
        name: A device of PyTorch ("cpu", "cuda:1", "mps"), or "auto" for the first accelerator, else the CPU.

    Raises:
        UserError: If the device cannot be used.
    """
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:
        message = str(error).strip().splitlines()[0]
        raise UserError(f"the device {name!r} cannot be used, choose another device: {message}") from error
    return device


def check_backend(device: torch.device, dtype: torch.dtype) -> None:
    """Check that the scan backend of the environment variable, if it is set, computes on a device.

    Raises:
        UserError: If the backend is unknown, or does not support the device or the dtype.
    """
    try:
        choose_backend(device.type, dtype)
    except (ValueError, ImportError) as error:
        raise UserError(f"the environment variable EVMAMBA_SCAN_BACKEND cannot be followed: {error}") from error


def describe_environment(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Return what determines the speed on this machine: system, devices, versions and the active backend.

    Args:
        packages: Names of distributions whose versions to include.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return {
        "system": platform.platform(terse=True),
        "cpu": read_cpu_name(),
        "threads": str(torch.get_num_threads()),
        "accelerator": "none" if accelerator is None else describe_accelerator(accelerator),
        "python": platform.python_version(),
        **{package: find_version(package) for package in packages},
        "scan": describe_scan(accelerator or torch.device("cpu")),
    }


def describe_scan(device: torch.device) -> str:
    """Return the active backend and the reason for it, or why the one that the environment requests cannot run."""
    try:
        scan = choose_backend(device.type, torch.float32)
    except (ValueError, ImportError) as error:
        return f"none: {error}"
    return f"{scan.backend}: {scan.reason}"


def describe_accelerator(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def find_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def read_cpu_name() -> str:
    """Return the name of the processor on Linux, and its architecture on other systems."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
