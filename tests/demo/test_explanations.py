"""Properties of the explanations, on the bundled model and on a network with fresh weights."""

import copy

import pytest
import torch
from PIL import Image

from evmamba_demo.bundled import find_bundled_model
from evmamba_demo.drawings import draw_activation, draw_receptive_field, draw_scan, to_picture
from evmamba_demo.explanations import (
    activation_map,
    class_activation_map,
    effective_receptive_field,
    grad_cam,
    run_stages,
    scan_paths,
)
from modeling_evmamba import EfficientVMambaConfig, EfficientVMambaForImageClassification


@pytest.fixture(scope="module")
def model() -> EfficientVMambaForImageClassification:
    return EfficientVMambaForImageClassification.from_pretrained(find_bundled_model())


@pytest.fixture(scope="module")
def fresh_model() -> EfficientVMambaForImageClassification:
    torch.manual_seed(0)
    config = EfficientVMambaConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], num_labels=7)
    return EfficientVMambaForImageClassification(config).eval()


@pytest.fixture(scope="module")
def pixel_values() -> torch.Tensor:
    return torch.randn(1, 3, 90, 70, generator=torch.Generator().manual_seed(0))  # odd in some stage


@pytest.mark.parametrize("which", ["model", "fresh_model"])
def test_the_class_activation_map_sums_to_the_logit_but_for_the_bias(which, pixel_values, request):
    model = request.getfixturevalue(which)
    logits, _ = run_stages(model, pixel_values)
    assert logits.abs().max() > 0.1
    for label in range(model.config.num_labels):
        total = class_activation_map(model, pixel_values, label).sum() + model.classifier.bias[label]
        torch.testing.assert_close(total, logits[0, label].detach(), atol=1e-5, rtol=1e-5)


def test_the_map_of_the_last_stage_is_the_exact_one(model, pixel_values):
    exact = class_activation_map(model, pixel_values, 3)
    assert torch.equal(activation_map(model, pixel_values, 3, stage=4), exact)
    assert exact.min() < 0 < exact.max()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_grad_cam_agrees_with_finite_differences(model, pixel_values, stage):
    """Its channel weights are derivatives of the logit. A constant on a channel changes the logit likewise."""
    label, channel, step = 3, 5, 1e-5
    model, pixel_values = copy.deepcopy(model).double(), pixel_values.double()
    stages = model.efficientvmamba.encoder.stages

    def logit(change: float) -> float:
        def shift(module, inputs, output):
            output = output.clone()
            output[:, channel] += change
            return output

        handle = stages[stage - 1].register_forward_hook(shift)
        try:
            return model(pixel_values).logits[0, label].item()
        finally:
            handle.remove()

    logits, hidden_states = run_stages(model, pixel_values)
    channels = hidden_states[stage][0].detach()  # (C, H, W)
    (gradient,) = torch.autograd.grad(logits[0, label], hidden_states[stage])
    derivatives = gradient[0].sum(dim=(1, 2))
    expected = (logit(step) - logit(-step)) / (2 * step)
    assert derivatives[channel].item() == pytest.approx(expected, rel=1e-3)

    height, width = channels.shape[1:]
    cam = (derivatives[:, None, None] * channels).sum(dim=0).clamp_min(0) / (height * width)
    torch.testing.assert_close(grad_cam(model, pixel_values, label, stage), cam, atol=1e-5, rtol=1e-4)
    assert torch.equal(activation_map(model, pixel_values, label, stage), grad_cam(model, pixel_values, label, stage))


@pytest.mark.parametrize("height, width", [(8, 8), (7, 8), (8, 7), (7, 5), (1, 6), (6, 1), (1, 1)])
def test_scan_paths_cover_every_cell_exactly_once(height, width):
    paths = scan_paths(height, width)
    assert len(paths) == 4
    cells = [tuple(cell) for path in paths for cell in path.tolist()]
    assert sorted(cells) == [(row, column) for row in range(height) for column in range(width)]


def test_scan_paths_have_the_order_of_the_paper():
    paths = [path.tolist() for path in scan_paths(4, 4)]
    assert paths == [
        [[0, 0], [0, 2], [2, 0], [2, 2]],
        [[1, 0], [3, 0], [1, 2], [3, 2]],
        [[0, 1], [0, 3], [2, 1], [2, 3]],
        [[1, 1], [3, 1], [1, 3], [3, 3]],
    ]


def test_the_patch_embedding_sees_one_patch(model, pixel_values):
    """In a convolution without overlap, only pixels of the cell's patch have influence."""
    field = effective_receptive_field(model, pixel_values, stage=0, row=4, column=7)
    patch = model.config.patch_size
    rows, columns = torch.nonzero(field, as_tuple=True)
    assert field.shape == pixel_values.shape[2:]
    assert set(rows.tolist()) == set(range(4 * patch, 5 * patch))
    assert set(columns.tolist()) == set(range(7 * patch, 8 * patch))


def test_the_first_stage_sees_the_whole_image(model, pixel_values):
    _, hidden_states = run_stages(model, pixel_values)
    height, width = hidden_states[1].shape[2:]
    field = effective_receptive_field(model, pixel_values, stage=1, row=height - 1, column=width - 1)
    assert (field > 0).float().mean() > 0.99
    assert field[: field.shape[0] // 2].max() < field.max()  # and its neighborhood most


def test_a_receptive_field_is_the_derivative(model, pixel_values):
    stage, row, column, pixel = 2, 3, 4, (0, 1, 20, 25)
    model, pixel_values = model.double(), pixel_values.double()
    try:
        field = effective_receptive_field(model, pixel_values, stage, row, column)
        expected = 0.0
        for color in range(3):
            values = []
            for step in (1e-4, -1e-4):
                moved = pixel_values.clone()
                moved[0, color, pixel[2], pixel[3]] += step
                values.append(run_stages(model, moved)[1][stage][0, :, row, column].sum().item())
            expected += abs(values[0] - values[1]) / 2e-4
        assert field[pixel[2], pixel[3]].item() == pytest.approx(expected, rel=1e-4)
    finally:
        model.float()


def test_what_the_network_sees_is_restored_and_enlarged():
    pixels = torch.tensor([[0, 51], [102, 255]]) / 255
    picture = to_picture((pixels.expand(1, 3, 2, 2) - 0.5) / 0.25, [0.5] * 3, [0.25] * 3)
    assert picture.size == (448, 448)
    assert [picture.getpixel(place)[0] for place in [(0, 0), (447, 0), (0, 447), (447, 447)]] == [0, 51, 102, 255]


def test_colors_of_an_activation_map():
    picture = Image.new("RGB", (40, 20), (80, 80, 80))
    activation = torch.tensor([[2.0, -2.0]])
    drawn = draw_activation(picture, activation, opacity=1.0)
    assert (drawn.getpixel((0, 10)), drawn.getpixel((39, 10))) == ((213, 94, 0), (0, 114, 178))
    assert draw_activation(picture, activation, opacity=0.0).getcolors() == [(800, (80, 80, 80))]
    assert draw_activation(picture, torch.zeros(1, 2), opacity=1.0).getcolors() == [(800, (80, 80, 80))]


def test_a_receptive_field_is_drawn_in_decades():
    picture = Image.new("RGB", (400, 100), "black")
    drawn = draw_receptive_field(picture, torch.tensor([[1.0, 1e-2, 1e-4, 0.0]]), row=0.5, column=0.875)
    assert [drawn.getpixel((x, 5)) for x in (50, 150, 250, 350)] == [(230, 159, 0), (115, 80, 0), (0, 0, 0), (0, 0, 0)]
    assert drawn.getpixel((355, 50)) == (255, 255, 255)  # the ring


def test_scans_grow_with_the_progress():
    picture = Image.new("RGB", (160, 160), "black")
    drawn = [
        sum(count for count, color in draw_scan(picture, scan_paths(8, 8), 8, 8, progress).getcolors() if any(color))
        for progress in (0.0, 0.5, 1.0)
    ]
    assert 0 < drawn[0] < drawn[1] < drawn[2]
    draw_scan(picture, scan_paths(1, 1), 1, 1, 1.0)
