"""Explanations of a classification: activation maps, scan paths and receptive fields.

Stages count from 1; stage 0 is the patch embedding. Images are batches of one, from an image processor.
"""

import torch

from evmamba_kernels.atrous_selective_scan_torch import pixels_of_steps
from modeling_evmamba import EfficientVMambaForImageClassification


def run_stages(
    model: EfficientVMambaForImageClassification, pixel_values: torch.Tensor
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Return logits (1, labels) and the outputs (1, C, H, W) of the patch embedding and every stage, in one graph."""
    with torch.enable_grad():
        outputs = model(pixel_values, output_hidden_states=True)
    return outputs.logits, outputs.hidden_states


@torch.no_grad()
def class_activation_map(
    model: EfficientVMambaForImageClassification, pixel_values: torch.Tensor, label: int
) -> torch.Tensor:
    """Return what every cell of the last stage adds to a class's logit (CAM, Zhou et al., arXiv 1512.04150), (H, W).

    The head is a norm per cell, a mean over the cells and a linear layer. So the map is exact: its sum is the logit
    without its bias.
    """
    network = model.efficientvmamba
    normalized = network.layernorm(network(pixel_values).last_hidden_state)[0]  # (C, H, W)
    height, width = normalized.shape[1:]
    return torch.einsum("c,chw->hw", model.classifier.weight[label], normalized) / (height * width)


def grad_cam(
    model: EfficientVMambaForImageClassification, pixel_values: torch.Tensor, label: int, stage: int
) -> torch.Tensor:
    """Finds which cells of a stage raise a class's logit (Grad-CAM, Selvaraju et al., arXiv 1610.02391), (H, W), >= 0.

    The mean of the logit's gradient weights the channels. Unlike the map above, this is an approximation.
    """
    logits, hidden_states = run_stages(model, pixel_values)
    (gradient,) = torch.autograd.grad(logits[0, label], hidden_states[stage])
    weights = gradient.mean(dim=(2, 3))  # (1, C)
    return torch.einsum("bc,bchw->hw", weights, hidden_states[stage].detach()).relu()


def activation_map(
    model: EfficientVMambaForImageClassification, pixel_values: torch.Tensor, label: int, stage: int
) -> torch.Tensor:
    """Return the exact map for the last stage, Grad-CAM for the earlier ones: (H, W)."""
    if stage == model.config.num_stages:
        return class_activation_map(model, pixel_values, label)
    return grad_cam(model, pixel_values, label, stage)


def scan_paths(height: int, width: int) -> list[torch.Tensor]:
    """Return the (row, column) pairs (N, 2) of the four groups of the atrous scan, in the scan's order.

    The kernel's own table of steps names them. Steps beyond an odd side visit no cell and are left out.
    """
    num_steps = ((height + 1) // 2) * ((width + 1) // 2)
    pixels, inside = pixels_of_steps(height, width, num_steps, torch.device("cpu"))  # (4, L) each
    return [
        torch.stack([group[on_map] // width, group[on_map] % width], dim=1)
        for group, on_map in zip(pixels, inside, strict=True)
    ]


def effective_receptive_field(
    model: EfficientVMambaForImageClassification, pixel_values: torch.Tensor, stage: int, row: int, column: int
) -> torch.Tensor:
    """Return how strongly each pixel of the image changes one cell of a stage's output, (H, W) of the image, >= 0.

    This is the gradient of the sum over the cell's channels (Luo et al., arXiv 1701.04128). Its magnitudes are summed
    over the colors.
    """
    pixel_values = pixel_values.detach().requires_grad_(True)
    _, hidden_states = run_stages(model, pixel_values)
    (gradient,) = torch.autograd.grad(hidden_states[stage][0, :, row, column].sum(), pixel_values)
    return gradient[0].abs().sum(dim=0)
