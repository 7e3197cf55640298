"""Draws the architecture: the stages, the EVSS block, and the four skip-sampled scans, for light and dark pages.

    python docs/images/architecture.py

Writes `architecture-light.png` and `architecture-dark.png` beside this file. The scans are those of the network:
their order comes from the operator's own index function.
"""

from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from evmamba_kernels.atrous_selective_scan_torch import pixels_of_steps
from modeling_evmamba import VARIANTS


HERE = Path(__file__).parent
SIDE = 6  # pixels of the map on which the scans are drawn
GROUP_COLORS = ["#E69F00", "#56B4E9", "#009E73", "#CC79A7"]  # told apart by color-blind eyes (Okabe and Ito)


class Theme(NamedTuple):
    ink: str
    paper: str
    box: str
    scan: str  # boxes with a scan
    convolution: str
    muted: str


THEMES = {
    "light": Theme("#1f2328", "#ffffff", "#f6f8fa", "#fdf0d5", "#e0effa", "#59636e"),
    "dark": Theme("#e6edf3", "#0d1117", "#161b22", "#4d3a10", "#123a57", "#9198a1"),
}


def draw_box(axes: Axes, x: float, y: float, text: str, theme: Theme, color: str, width: float, height=0.62) -> None:
    """Draws a box of a width around (x, y), with its text."""
    box = FancyBboxPatch(
        (x - width / 2, y - height / 2),
        width,
        height,
        boxstyle="round,pad=0,rounding_size=0.1",
        facecolor=color,
        edgecolor=theme.muted,
        linewidth=0.8,
    )
    axes.add_patch(box)
    axes.text(x, y, text, ha="center", va="center", color=theme.ink, fontsize=8.5, linespacing=1.35)


def draw_arrow(axes: Axes, points: list[tuple[float, float]], theme: Theme) -> None:
    """Draws a line through points, with an arrow head at the last one."""
    axes.plot(*zip(*points[:-1], strict=True), color=theme.muted, linewidth=1, solid_capstyle="round")
    arrow = {"arrowstyle": "-|>", "color": theme.muted, "lw": 1, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", points[-1], points[-2], arrowprops=arrow)


def draw_title(axes: Axes, text: str, theme: Theme) -> None:
    axes.set_title(text, loc="left", color=theme.ink, fontsize=11, fontweight="bold")


def draw_stages(axes: Axes, theme: Theme) -> None:
    """The network from top to bottom, with the sizes of T."""
    draw_title(axes, "Network", theme)
    sizes, depths = VARIANTS["tiny"]["hidden_sizes"], VARIANTS["tiny"]["depths"]
    rows = [("Image\n224 x 224 x 3", theme.box), (f"Patch embedding, 4 x 4\n56 x 56 x {sizes[0]}", theme.box)]
    for stage, (size, depth) in enumerate(zip(sizes, depths, strict=True)):
        side = 56 // 2**stage
        block, color = ("EVSS", theme.scan) if stage < 2 else ("inverted residual", theme.convolution)
        rows.append((f"Stage {stage + 1}: {depth} x {block}\n{side} x {side} x {size}", color))
    rows.append(("LayerNorm, average pooling\nLinear, class scores", theme.box))
    for row, (text, color) in enumerate(rows):
        draw_box(axes, 0, -row, text, theme, color, width=2.6)
        if row:
            draw_arrow(axes, [(0, -row + 0.69), (0, -row + 0.31)], theme)
    for row in (3, 4, 5):
        axes.text(0.12, -row + 0.5, "merge 2 x 2", color=theme.muted, fontsize=7, va="center")
    axes.set(xlim=(-1.5, 1.5), ylim=(-6.5, 0.45))


def draw_block(axes: Axes, theme: Theme) -> None:
    """The EVSS block: a global branch with the scan beside a local one, both behind the same gate."""
    draw_title(axes, "EVSS block", theme)
    left, right = -1.3, 1.3
    draw_box(axes, 0, 0, "LayerNorm", theme, theme.box, width=1.5)
    global_branch = [
        ("Linear: u and z", theme.box),
        ("Depthwise 3 x 3, SiLU", theme.convolution),
        ("Atrous selective scan", theme.scan),
        ("LayerNorm, times SiLU(z)\nLinear", theme.box),
    ]
    local_branch = [
        ("Depthwise 3 x 3", theme.convolution),
        ("BatchNorm, GELU", theme.box),
        ("Pointwise 1 x 1", theme.convolution),
    ]
    for x, branch in ((left, global_branch), (right, local_branch)):
        draw_arrow(axes, [(0, -0.31), (0, -0.5), (x, -0.5), (x, -0.69)], theme)
        for row, (text, color) in enumerate(branch, start=1):
            draw_box(axes, x, -row, text, theme, color, width=2.1)
            if row > 1:
                draw_arrow(axes, [(x, -row + 0.69), (x, -row + 0.31)], theme)
        draw_arrow(axes, [(x, -len(branch) - 0.31), (x, -4.69)], theme)
        draw_box(axes, x, -5, "Gate: a factor per channel,\nfrom the mean over pixels", theme, theme.box, width=2.1)
        draw_arrow(axes, [(x, -5.31), (x, -5.8), (0.2 if x > 0 else -0.2, -5.8)], theme)
    for y in (-5.8, -6.5):
        axes.text(0, y, "+", ha="center", va="center", color=theme.ink, fontsize=14)
        draw_arrow(axes, [(0, y - 0.17), (0, y - 0.5)], theme)
    draw_arrow(axes, [(0, 0.45), (0, 0.31)], theme)
    draw_arrow(axes, [(0, 0.4), (2.45, 0.4), (2.45, -6.5), (0.2, -6.5)], theme)
    axes.text(0, -5, "shared\nweights", ha="center", va="center", color=theme.muted, fontsize=6.5)
    axes.text(left, 0.05, "global branch", ha="center", color=theme.muted, fontsize=8)
    axes.text(right, 0.05, "local branch", ha="center", color=theme.muted, fontsize=8)
    axes.set(xlim=(-2.4, 2.6), ylim=(-7.05, 0.45))


def draw_scans(axes: Axes, theme: Theme) -> None:
    """The four groups of pixels in the order in which the scan visits them."""
    draw_title(axes, "Atrous selective scan", theme)
    pixels, _ = pixels_of_steps(SIDE, SIDE, (SIDE // 2) ** 2, "cpu")  # (K, L)
    for row in range(SIDE):
        for column in range(SIDE):
            color = GROUP_COLORS[row % 2 + 2 * (column % 2)]
            axes.add_patch(
                Rectangle((column, row), 1, 1, facecolor=color, alpha=0.35, edgecolor=theme.paper, linewidth=1.5)
            )
    length = SIDE // 2
    for k, (group, color) in enumerate(zip(pixels.tolist(), GROUP_COLORS, strict=True)):
        shift = 0.42 if k < 2 else 0.58  # groups that go the same way do not cover each other
        places = [(pixel % SIDE + shift, pixel // SIDE + shift) for pixel in group]
        axes.plot(*zip(*places, strict=True), color=color, linewidth=0.8, linestyle=":")
        for start in range(0, len(places), length):
            line = places[start : start + length]
            axes.plot(*zip(*line, strict=True), color=color, linewidth=2, solid_capstyle="round")
            axes.annotate(
                "", line[-1], line[-2], arrowprops={"arrowstyle": "-|>", "color": color, "lw": 2, "shrinkB": 0}
            )
        axes.plot(*places[0], "o", color=color, markersize=5)
    lines = (
        "Skip sampling with step 2 makes four sequences.",
        "Two go row by row, two column by column.",
        "Each pixel is visited once, each sequence has",
        "its own parameters: time linear in the pixels.",
    )
    for number, line in enumerate(lines):
        axes.text(0, SIDE + 0.45 + 0.36 * number, line, color=theme.ink, fontsize=8.5, va="center")
    axes.set(xlim=(-0.1, SIDE + 0.1), ylim=(SIDE + 1.9, -0.1), aspect="equal")


def draw(theme: Theme, path: Path) -> None:
    with matplotlib.rc_context({"font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(12, 5.6), facecolor=theme.paper, layout="constrained")
        for axes, draw_part in zip(
            figure.subplots(1, 3, width_ratios=[1, 1.6, 1.5]), (draw_stages, draw_block, draw_scans), strict=True
        ):
            axes.set_axis_off()
            draw_part(axes, theme)
        figure.savefig(path, dpi=150, facecolor=theme.paper)


if __name__ == "__main__":
    for name, theme in THEMES.items():
        draw(theme, HERE / f"architecture-{name}.png")
