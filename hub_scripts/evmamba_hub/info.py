"""`evmamba info`: the size of a network, the active backend, and the latency of a call."""

import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig

from evmamba_hub.errors import UserError
from evmamba_hub.model_folder import check_model_dir
from evmamba_kernels import choose_backend
from modeling_evmamba import (
    VARIANTS,
    EfficientVMambaConfig,
    EfficientVMambaForImageClassification,
    EfficientVMambaPreTrainedModel,
)
from modeling_evmamba.modeling_evmamba import EfficientVMambaES2D


PACKAGES = ("efficientvmamba", "torch", "transformers", "huggingface_hub", "numba", "triton", "onnxruntime", "timm")

SCAN_MACS_PER_STATE = 9  # the authors' convention

MACS_CONVENTION = (
    "GMACs count the multiply-accumulates of convolutions and linear layers, including the projections to delta, B "
    f"and C. The scan adds {SCAN_MACS_PER_STATE} per state (pixels x channels x states), as the authors count it. "
    "Norms, activations and gates are left out."
)


@dataclass
class Size:
    """The parameters of a network, and its multiply-accumulates for one image."""

    parameters: int
    macs: int


def measure_size(
    config: EfficientVMambaConfig,
    height: int,
    width: int,
    model_class: type[EfficientVMambaPreTrainedModel] = EfficientVMambaForImageClassification,
) -> Size:
    """Count parameters and multiply-accumulates on the meta device, without computing or allocating anything.

    Args:
        config: The configuration of the network.
        height, width: The sides of the image in pixels.
        model_class: The class of the network, which determines its head.
    """
    macs = 0

    def count_convolution(module: nn.Conv2d, inputs: tuple, output: torch.Tensor) -> None:
        nonlocal macs
        macs += output.numel() * module.weight[0].numel()

    def count_linear(module: nn.Linear, inputs: tuple, output: torch.Tensor) -> None:
        nonlocal macs
        macs += output.numel() * module.in_features

    def count_scan(module: EfficientVMambaES2D, inputs: tuple, output: torch.Tensor) -> None:
        nonlocal macs
        num_pixels = output.shape[:3].numel()  # of (B, H, W, C): the padding of odd sides does not count
        _, channels, rank = module.dt_proj_weight.shape
        state_size = module.A_log.shape[-1]
        projections = rank + 2 * state_size + rank
        macs += num_pixels * channels * (projections + SCAN_MACS_PER_STATE * state_size)

    counters: dict[type[nn.Module], Callable] = {
        nn.Conv2d: count_convolution,
        nn.Linear: count_linear,
        EfficientVMambaES2D: count_scan,
    }
    with torch.device("meta"), torch.no_grad():
        model = model_class(config).eval()
        for module in model.modules():
            for counted_class, counter in counters.items():
                if isinstance(module, counted_class):
                    module.register_forward_hook(counter)
        model(torch.empty(1, config.num_channels, height, width))
    return Size(sum(parameter.numel() for parameter in model.parameters()), macs)


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


def synchronize() -> None:
    """Wait until the accelerator has finished its work. Without an accelerator, return at once."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def find_variant(config: EfficientVMambaConfig) -> str | None:
    """Returns the name of the published network that has these sizes, or None."""
    for name, fields in VARIANTS.items():
        if all(getattr(config, field) == value for field, value in fields.items()):
            return name
    return None


def find_configs(model: str | None) -> dict[str, EfficientVMambaConfig]:
    """Returns the configuration of a directory or Hub id by its name, or those of the published networks.

    Raises:
        UserError: If the model cannot be loaded, or is another network.
    """
    if model is None:
        return {
            f"EfficientVMamba-{variant.capitalize()}": EfficientVMambaConfig(**{**fields, "num_labels": 1000})
            for variant, fields in VARIANTS.items()
        }
    if Path(model).exists():
        check_model_dir(Path(model))
    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        place = "" if Path(model).exists() else " from the Hub, and there is no such directory"
        raise UserError(f"the model {model!r} cannot be loaded{place}: {error}") from error
    if not isinstance(config, EfficientVMambaConfig):
        raise UserError(
            f"the model {model!r} is of the type {config.model_type!r}, not {EfficientVMambaConfig.model_type!r}: "
            "give an EfficientVMamba"
        )
    return {model: config}


def choose_device(name: str) -> torch.device:
    """Returns the device of a name.

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
    """Returns what determines the speed on this machine: system, devices, versions and the active backend.

    Args:
        packages: Names of distributions whose versions to include.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    scan = choose_backend("cpu" if accelerator is None else accelerator.type, torch.float32)
    return {
        "system": platform.platform(terse=True),
        "cpu": read_cpu_name(),
        "threads": str(torch.get_num_threads()),
        "accelerator": "none" if accelerator is None else describe_accelerator(accelerator),
        "python": platform.python_version(),
        **{package: find_version(package) for package in packages},
        "scan": f"{scan.backend}: {scan.reason}",
    }


def describe_accelerator(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def find_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def read_cpu_name() -> str:
    """Returns the name of the processor on Linux, and its architecture on other systems."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
