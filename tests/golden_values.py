"""Golden values of the authors' implementation (float32, CPU), and the weights and images that produced them.

Names, shapes and a seed determine weights and images, so `golden/` holds only outputs.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file


GOLDEN_DIR = Path(__file__).parent / "golden"
SHAPES = json.loads((GOLDEN_DIR / "shapes.json").read_text())  # variant -> authors' name -> shape


def load_cases(file_name: str) -> dict[str, dict[str, torch.Tensor]]:
    """Load the tensors of a file by case: "case/name" becomes cases["case"]["name"]."""
    cases = {}
    for name, tensor in load_file(GOLDEN_DIR / file_name).items():
        case, _, rest = name.partition("/")
        cases.setdefault(case, {})[rest] = tensor
    return cases


def original_tensor(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])

    def normal(scale: float = 1.0) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32) * np.float32(scale)

    if name.endswith("num_batches_tracked"):
        return np.array(100, dtype=np.int64)
    if name.endswith("running_mean"):
        return normal(0.1)
    if name.endswith("running_var"):
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    if name.endswith("A_logs"):
        return (np.log(np.arange(1, shape[1] + 1, dtype=np.float32))[None] + normal(0.2)).astype(np.float32)
    if name.endswith("Ds"):
        return (1 + normal(0.2)).astype(np.float32)
    if name.endswith("dt_projs_bias"):
        dt = np.exp(rng.uniform(np.log(1e-3), np.log(1e-1), shape))
        return (dt + np.log(-np.expm1(-dt))).astype(np.float32)
    if name.endswith(("x_proj_weight", "dt_projs_weight")):
        return normal(1 / np.sqrt(shape[-1]))
    if len(shape) == 1:
        return 1 + normal(0.1) if name.endswith("weight") else normal(0.1)
    return normal(1 / np.sqrt(int(np.prod(shape[1:]))))


def original_state_dict(variant: str, seed: int) -> dict[str, torch.Tensor]:
    """Return a checkpoint of `variant` ("tiny", "small", "base", "micro") with the authors' names."""
    return {
        name: torch.from_numpy(original_tensor(name, tuple(shape), seed)) for name, shape in SHAPES[variant].items()
    }


def image(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng([seed, 7]).standard_normal(shape).astype(np.float32))


def relative_error(actual: torch.Tensor, expected: torch.Tensor, floor: float = 0.0) -> float:
    """Return |actual - expected| / max(|expected|, floor) in the Euclidean norm, or NaN if `actual` holds a NaN.

    The arithmetic is float64 on the CPU, since some devices have no float64.
    """
    assert actual.shape == expected.shape
    actual, expected = (tensor.detach().cpu().double() for tensor in (actual, expected))
    return ((actual - expected).norm() / expected.norm().clamp(min=floor)).item()
