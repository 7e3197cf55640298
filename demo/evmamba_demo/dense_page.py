"""The web page of a segmentation model or a detector: a picture, and what the model finds in it.

One event runs the network, and another draws its results. So the slider does not run the network again.
"""

from collections.abc import Iterator
from html import escape

import gradio as gr
import pandas as pd
import torch

from evmamba_demo.bundled import find_photographs
from evmamba_demo.findings import Finding, Findings, draw_boxes, draw_regions, find
from evmamba_demo.models import DENSE_LATENCY_SIDES, measure_sides, read_picture
from evmamba_demo.page_parts import (
    CACHE_SECONDS,
    MAX_WAITING,
    answer,
    choose_picture,
    create_measure_tab,
    explain,
    offer_examples,
    own_file,
    show,
    tabulate,
    warn,
    write,
)
from evmamba_hub.dense_tasks import DETECTION
from evmamba_hub.errors import UserError
from evmamba_hub.inference.dense import DenseModel
from evmamba_kernels import choose_backend


NO_PICTURE = "Give a picture first: upload, paste or photograph one, or click an example."

MAX_LISTED = 30  # items of the list

INTRODUCTION = """\
# EfficientVMamba

{noun} on EfficientVMamba, a lightweight vision network that scans an image in four interleaved sequences
([paper](https://arxiv.org/abs/2403.09977)). Choose a picture.
"""

SLIDERS = {True: ("Threshold of the scores (%)", 50, "threshold"), False: ("Opacity (%)", 60, "opacity")}

LIST_STYLE = (
    "list-style: none; margin: 0; padding: 0; display: flex; flex-wrap: wrap; align-items: center; gap: 0.4rem 1rem"
)
ITEM_STYLE = "margin: 0; display: flex; align-items: center; gap: 0.4rem; overflow-wrap: anywhere"
CHIP_STYLE = "display: inline-block; width: 1em; height: 1em; border-radius: 3px; flex: none; border: 1px solid gray"


class DenseDemonstration:
    """The functions behind the page. Pictures are paths to uploaded files, or None."""

    def __init__(self, model: DenseModel):
        self.model = model
        self.is_detector = model.task is DETECTION

    def find(self, picture: str | None) -> tuple[Findings | None, str]:
        """Return what the model finds in a picture, and a sentence about the time."""
        if picture is None:
            return None, NO_PICTURE
        findings = find(self.model, read_picture(picture, warn).convert("RGB"))
        backend = choose_backend(self.model.pipeline.device.type, self.model.network.dtype).backend
        return findings, (
            f"The forward pass took {findings.milliseconds:.0f} ms {self.model.execution} (backend: {backend})."
        )

    def draw(self, findings: Findings | None, percent: float) -> tuple:
        """Draws findings by the percentage of the slider. Returns the picture, the list, and how to read them."""
        if findings is None:
            return None, None, ""
        if not self.is_detector:
            view = draw_regions(findings, percent / 100)
            return own_file(view), list_findings(findings.items), describe_regions(findings.items)
        boxes = findings.select(percent / 100)
        view = draw_boxes(findings, boxes)
        return own_file(view), list_findings(boxes), describe_boxes(findings.items, boxes)

    def segment(self, picture: str | None, opacity: float) -> tuple:
        """Draws the regions of a picture. Returns them with labels and shares of the pixels, and the time."""
        return self.answer(picture, opacity, 0)

    def detect(self, picture: str | None, threshold: float) -> tuple:
        """Draws the boxes of a picture. Returns them with labels and scores, and the time."""
        return self.answer(picture, threshold, threshold)

    def answer(self, picture: str | None, percent: float, threshold: float) -> tuple:
        findings, described = self.find(picture)
        if findings is None:
            raise UserError(described)
        view, _, _ = self.draw(findings, percent)
        return view, [each.as_json() for each in findings.select(threshold / 100)], described

    def measure(self) -> Iterator[tuple[pd.DataFrame, pd.DataFrame]]:
        """Yield the latency by image size as the measurements come in."""
        yield from tabulate(measure_sides(self.model.forward, 3, DENSE_LATENCY_SIDES))


def list_findings(items: list[Finding]) -> str:
    """Return a list in HTML: the color of each item, its label, and its score or its share of the pixels."""
    entries = []
    for number, each in enumerate(items[:MAX_LISTED], start=1):
        chip = f"{CHIP_STYLE}; background: {each.color.css}" if each.color else CHIP_STYLE
        numbered = f"{number}. " if each.box else ""
        parts = [f"{each.score:.0%}" if each.score is not None else "", f"{each.share:.1%}" if each.share else ""]
        values = ", ".join(filter(None, parts))
        entries.append(
            f'<li style="{ITEM_STYLE}"><span style="{chip}"></span>'
            f"<span>{numbered}{escape(each.label)} <strong>{values}</strong></span></li>"
        )
    return f'<ul style="{LIST_STYLE}">{"".join(entries)}</ul>'


def describe_regions(items: list[Finding]) -> str:
    """Return how to read the regions of a picture."""
    if not items:
        return "The model finds nothing in this picture."
    shown = f"The list shows the {MAX_LISTED} largest of {len(items)}. " if len(items) > MAX_LISTED else ""
    return f"{shown}Percentages are shares of the pixels{'; bold scores precede them' if items[0].score else ''}."


def describe_boxes(items: list[Finding], boxes: list[Finding]) -> str:
    """Return how many boxes reach the threshold, and what to do if none does."""
    if not items:
        return "The model finds nothing in this picture."
    if not boxes:
        return f"No box reaches the threshold. The best has {items[0].score:.0%}: lower the threshold to see it."
    shown = f" The list shows the {MAX_LISTED} best." if len(boxes) > MAX_LISTED else ""
    return f"Boxes that reach the threshold: {len(boxes)}.{shown}"


def create_dense_app(model: DenseModel) -> gr.Blocks:
    """Creates the page with its endpoints."""
    demonstration = DenseDemonstration(model)
    side = min(DENSE_LATENCY_SIDES)
    model.forward(torch.zeros(1, 3, side, side))  # compiles the kernels before the first request
    noun = model.task.noun[0].upper() + model.task.noun[1:]
    with gr.Blocks(
        title="EfficientVMamba", analytics_enabled=False, delete_cache=(CACHE_SECONDS, CACHE_SECONDS)
    ) as app:
        gr.Markdown(INTRODUCTION.format(noun=noun))
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                examples = find_photographs()
                picture = choose_picture(examples[0], "The picture to look at")
                offer_examples(picture, examples)
            with gr.Column(scale=2, min_width=300), gr.Tabs():
                with gr.Tab("Detect" if demonstration.is_detector else "Segment"):
                    view = show("What the model finds", "The picture under what the model finds", elem_id="view")
                    how = gr.Markdown(elem_id="how")
                    found_list = gr.HTML(elem_id="list")
                    label, value, name = SLIDERS[demonstration.is_detector]
                    slider = gr.Slider(0, 100, value, step=1, label=label, elem_id=name)
                    timing = gr.Markdown(NO_PICTURE, elem_id="timing")
                create_measure_tab(demonstration.measure)
        findings = gr.State(time_to_live=CACHE_SECONDS)
        found = gr.JSON(visible=False)
        endpoint = demonstration.detect if demonstration.is_detector else demonstration.segment
        answer(endpoint, [picture, slider], [view, found, timing])
        write(explain(demonstration.find, 2), [picture.change, app.load], [picture], [findings, timing])
        write(demonstration.draw, [findings.change, slider.input], [findings, slider], [view, found_list, how])
    return app.queue(max_size=MAX_WAITING)
