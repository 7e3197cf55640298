"""The depthwise convolutions of the blocks, fused with the activation and the mean over the feature map.

As PyTorch operators, these take up to four passes over the feature map. They are a copy if it is half of another one,
the convolution, the activation, and the mean. The kernel for inference on CPUs takes one pass. It supports 3 x 3
windows. With gradients, on other devices and in compiled graphs, PyTorch operators run instead.
"""

from math import prod

import torch
import torch.nn.functional as F

from .backends import NAMESPACE, check_argument, is_for_cpu_inference_kernel, register_flops


ACTIVATIONS = {"none": lambda x: x, "relu": F.relu, "silu": F.silu, "gelu": F.gelu}


def depthwise_conv(
    hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, activation: str = "none"
) -> torch.Tensor:
    """Compute a depthwise convolution with zero padding that keeps the size of the feature map, and an activation.

    Args:
        hidden_states: The feature map, `(B, H, W, D)`, in the floating-point dtype of the weights.
        weight: `(D, 1, kernel_size, kernel_size)` with an odd size, as in `torch.nn.Conv2d` with D groups. The CPU
            kernel reads it in the order `(3, 3, D)`. It copies the weight unless memory has that order, as after
            `weight.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)`.
        bias: `(D)`, or `None`.
        activation: `"none"`, `"relu"`, `"silu"` or `"gelu"`.

    Returns:
        `(B, H, W, D)`, in the dtype of `hidden_states`, also under autocast. There, PyTorch's convolution computes in
        the dtype of autocast, and the CPU kernel in float32.

    Raises:
        ValueError: If `hidden_states` does not have four dimensions, shapes do not match, the tensors are on several
            devices, or the activation is unknown.
    """
    if use_kernel(hidden_states, weight, bias, activation):
        return convolution_operator(hidden_states, weight, bias, activation)
    return convolve_in_pytorch(hidden_states, weight, bias, activation)


def depthwise_conv_and_mean(
    hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, activation: str = "none"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output of `depthwise_conv`, `(B, H, W, D)`, and its mean over the feature map, `(B, D)`.

    Arguments and errors are those of `depthwise_conv`.
    """
    if use_kernel(hidden_states, weight, bias, activation):
        return convolution_and_mean_operator(hidden_states, weight, bias, activation)
    y = convolve_in_pytorch(hidden_states, weight, bias, activation)
    return y, y.mean(dim=(1, 2))


def use_kernel(hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str) -> bool:
    """Check the arguments. Returns whether the CPU kernel supports them."""
    if hidden_states.ndim != 4:
        raise ValueError(f"hidden_states must have the shape (B, H, W, D), got {tuple(hidden_states.shape)}")
    channels, kernel_size = hidden_states.shape[-1], weight.shape[-1] if weight.ndim else 0
    if kernel_size % 2 == 0:
        raise ValueError(
            f"weight must have the shape (D, 1, kernel_size, kernel_size) with an odd size, got {tuple(weight.shape)}"
        )
    check_argument("weight", weight, hidden_states, (channels, 1, kernel_size, kernel_size))
    if bias is not None:
        check_argument("bias", bias, hidden_states, (channels,))
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    parameters = (weight,) if bias is None else (weight, bias)
    return kernel_size == 3 and is_for_cpu_inference_kernel((hidden_states,), parameters)


def convolve_in_pytorch(
    hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str
) -> torch.Tensor:
    maps = F.conv2d(hidden_states.permute(0, 3, 1, 2), weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))
    return ACTIVATIONS[activation](maps.to(hidden_states.dtype)).permute(0, 2, 3, 1)


@torch.library.custom_op(f"{NAMESPACE}::depthwise_conv", mutates_args=(), device_types="cpu")
def convolution_operator(
    hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str
) -> torch.Tensor:
    from .depthwise_conv_numba import convolve

    y, _ = convolve(hidden_states, weight, bias, activation)
    return y


@convolution_operator.register_fake
def fake_convolution(hidden_states, weight, bias, activation):
    return hidden_states.new_empty(hidden_states.shape)


@torch.library.custom_op(f"{NAMESPACE}::depthwise_conv_and_mean", mutates_args=(), device_types="cpu")
def convolution_and_mean_operator(
    hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    from .depthwise_conv_numba import convolve

    return convolve(hidden_states, weight, bias, activation)


@convolution_and_mean_operator.register_fake
def fake_convolution_and_mean(hidden_states, weight, bias, activation):
    batch_size, _, _, channels = hidden_states.shape
    return hidden_states.new_empty(hidden_states.shape), hidden_states.new_empty(batch_size, channels)


def count_flops(map_shape, weight_shape, bias_shape, activation, *, out_shape) -> int:
    """Count the FLOPs of the convolution alone, as PyTorch does."""
    return 2 * prod(map_shape) * prod(weight_shape[1:])


register_flops(convolution_operator, count_flops)
register_flops(convolution_and_mean_operator, count_flops)
