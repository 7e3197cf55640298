"""The web page: a picture, its classification, and explanations. Every function is also an endpoint.

A visitor may change the picture while older requests run. Their answers must not replace those of the new picture:

- One event writes a result. `trigger_mode="always_last"` runs it again if an input changes while it runs.
- The requests that run the network come one after the other, so their answers arrive in order.
"""

import errno
import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from uuid import uuid4

import gradio as gr
import pandas as pd
import torch
from PIL import Image

from evmamba_demo import drawings, explanations
from evmamba_demo.bundled import choose_examples, find_bundled_model
from evmamba_demo.dense_page import create_dense_app
from evmamba_demo.models import LATENCY_SIDES, Models, measure_sides, predict, read_picture
from evmamba_demo.page_parts import (
    CACHE_SECONDS,
    MAX_FILE_SIZE,
    MAX_WAITING,
    THEME,
    answer,
    answer_and_write,
    choose_picture,
    create_measure_tab,
    explain,
    find_upload,
    guard_drawing,
    offer_examples,
    own_file,
    show,
    tabulate,
    warn,
    write,
)
from evmamba_hub.client import fetch_model
from evmamba_hub.dense_tasks import find_dense_task
from evmamba_hub.errors import UserError
from evmamba_hub.inference.dense import load_dense_model
from evmamba_hub.model_folder import read_fields


PANEL_WIDTH = 220  # minimum width of a panel of "Look inside" in pixels: three fit side by side on a laptop

NO_PICTURE = "Give a picture first: upload, paste, photograph or draw one, or click an example."

INTRODUCTION = """\
# EfficientVMamba

A lightweight vision network that scans an image in four interleaved sequences
([paper](https://arxiv.org/abs/2403.09977)). Choose a picture, then look inside.
"""


class Demonstration:
    """The functions behind the page. Pictures are paths to uploaded files, or None."""

    def __init__(self, models: Models):
        self.models = models
        self.model = models.network
        config = self.model.config
        self.num_stages = config.num_stages
        self.scanning_stages = [stage for stage, kind in enumerate(config.block_types, start=1) if kind == "evss"]

    def look(self, picture: str) -> tuple[torch.Tensor, Image.Image]:
        """Return what the network sees of a file: (1, C, H, W) on its device, and as a picture."""
        pixel_values = self.models.shown.preprocess(read_picture(picture))["pixel_values"]
        return pixel_values.to(self.model.device), self.to_picture(pixel_values)

    def to_picture(self, pixel_values: torch.Tensor) -> Image.Image:
        processor = self.models.shown.image_processor
        return drawings.to_picture(pixel_values, processor.image_mean, processor.image_std)

    def find_label(self, label: str | None, pixel_values: torch.Tensor) -> int:
        """Return the index of a label, or of the most likely label by default."""
        config = self.model.config
        if not label:
            with torch.no_grad():
                return self.model(pixel_values).logits.argmax().item()
        if label not in config.label2id:
            raise UserError(f"The network knows no class {label!r}. Choose one that /classify returns.")
        return config.label2id[label]

    def check_stage(self, stage: float) -> int:
        if stage not in range(1, self.num_stages + 1):
            raise UserError(f"The network has the stages 1 to {self.num_stages}, not {stage}.")
        return int(stage)

    def classify(self, picture: str | None) -> tuple:
        """Return labels with scores, what the network saw, and the latency."""
        if picture is None:
            return None, None, NO_PICTURE
        found = predict(self.models.shown, read_picture(picture, warn))
        _, _, height, width = found.pixel_values.shape
        described = (
            f"The network saw {width} x {height} pixels. The forward pass took {found.milliseconds:.1f} ms "
            f"{found.computed}."
        )
        return found.scores, own_file(self.to_picture(found.pixel_values)), described

    def activation_map(self, picture: str | None, label: str | None, stage: float, opacity: float) -> tuple:
        """Draws an activation map of a class over the picture, and says how to read it."""
        if picture is None:
            return None, NO_PICTURE
        stage = self.check_stage(stage)
        pixel_values, view = self.look(picture)
        index = self.find_label(label, pixel_values)
        name = f"“{self.model.config.id2label[index].partition(',')[0]}”"  # without ImageNet's synonyms
        activation = explanations.activation_map(self.model, pixel_values, index, stage)
        if stage == self.num_stages:
            how = f"Orange raises the logit of {name}, blue lowers it. The map is exact (CAM)."
        else:
            how = f"Orange shows where stage {stage} raises the logit of {name}. The map is an estimate (Grad-CAM)."
        return own_file(drawings.draw_activation(view, activation, opacity / 100)), how

    def scan_paths(self, picture: str | None, stage: float, progress: float) -> tuple:
        """Draws the four sequences of the scan up to a percentage of their steps, and says how to read them."""
        if picture is None:
            return None, NO_PICTURE
        stage = self.check_stage(stage)
        pixel_values, view = self.look(picture)
        if stage not in self.scanning_stages:
            return own_file(view), (
                f"Stage {stage} has no scan, its blocks are convolutions. "
                f"Choose among the stages {', '.join(map(str, self.scanning_stages))}."
            )
        _, hidden_states = explanations.run_stages(self.model, pixel_values)
        height, width = hidden_states[stage].shape[2:]
        paths = explanations.scan_paths(height, width)
        how = (
            "Follow each color from its small dot to its large dot. "
            f"Together they visit the {width} x {height} cells of stage {stage} once."
        )
        return own_file(drawings.draw_scan(view, paths, height, width, progress / 100)), how

    def receptive_field(self, picture: str | None, stage: float, across: float, down: float) -> tuple:
        """Draws which pixels change a cell of a stage, at a place in percent of the sides, and says how to read it."""
        if picture is None:
            return None, NO_PICTURE
        stage = self.check_stage(stage)
        pixel_values, view = self.look(picture)
        _, hidden_states = explanations.run_stages(self.model, pixel_values)
        height, width = hidden_states[stage].shape[2:]
        row, column = min(int(down / 100 * height), height - 1), min(int(across / 100 * width), width - 1)
        influence = explanations.effective_receptive_field(self.model, pixel_values, stage, row, column)
        reached = (influence > influence.max() * 10.0**-drawings.DECADES).float().mean().item()
        how = (
            f"Orange pixels change the ringed cell of stage {stage}. "
            f"{reached:.0%} of the pixels reach it. Click to move the ring."
        )
        view = drawings.draw_receptive_field(view, influence, (row + 0.5) / height, (column + 0.5) / width)
        return own_file(view), how

    def compare(self, picture: str | None, first_model: str, second_model: str) -> tuple:
        """Return labels with scores of two models, and whether the models agree."""
        if picture is None:
            return None, None, NO_PICTURE
        image = read_picture(picture)
        found = [predict(self.models.load(name), image) for name in (first_model, second_model)]
        first, second = [next(iter(one.scores)) for one in found]
        verdict = f"Both say “{first}”" if first == second else f"They differ: “{first}” and “{second}”"
        times = " and ".join(f"{one.milliseconds:.1f} ms" for one in found)
        return found[0].scores, found[1].scores, f"{verdict}. They took {times}."

    def measure(self) -> Iterator[tuple[pd.DataFrame, pd.DataFrame]]:
        """Yield the latency by image size as the measurements come in."""
        shown = self.models.shown
        forward = lambda pixel_values: shown.forward({"pixel_values": pixel_values})  # noqa: E731
        yield from tabulate(measure_sides(forward, shown.model.config.num_channels, LATENCY_SIDES))


def offer_labels(scores: dict | None) -> gr.Dropdown:
    """Return the labels of a classification, the most likely first, as the choices of "Look inside"."""
    labels = list(scores or {})
    return gr.Dropdown(choices=labels, value=labels[0] if labels else None)


def take_drawing(drawing: dict) -> Image.Image:
    return drawing["composite"]


def pick_place(view: str, event: gr.SelectData) -> tuple[float, float, str]:
    """Return the place of a click in percent of the sides, and a name of the click."""
    with Image.open(view) as image:
        across, down = 100 * event.index[0] / image.width, 100 * event.index[1] / image.height
    return round(across, 1), round(down, 1), uuid4().hex


def create_app(models: Models) -> gr.Blocks:
    """Creates the page with its endpoints. `launch` starts it."""
    demonstration = Demonstration(models)
    examples = choose_examples(demonstration.model.config.label2id)

    with gr.Blocks(
        title="EfficientVMamba", analytics_enabled=False, delete_cache=(CACHE_SECONDS, CACHE_SECONDS)
    ) as app:
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                with gr.Tabs():
                    with gr.Tab("Picture"):
                        picture = choose_picture(examples[0], "The picture to classify")
                    with gr.Tab("Draw"):
                        drawing = gr.Sketchpad(
                            label="Draw with a thick line",
                            type="pil",
                            format="png",
                            canvas_size=(280, 280),
                            fixed_canvas=True,
                            brush=gr.Brush(default_size=26, default_color="#000000", colors=["#000000"]),
                            layers=False,
                            transforms=(),
                            elem_id="drawing",
                        )
                        guard_drawing(drawing)
                        take = gr.Button("Classify the drawing", variant="primary")
                offer_examples(picture, examples)
            with gr.Column(scale=2, min_width=300), gr.Tabs():
                with gr.Tab("Classify"), gr.Row():
                    with gr.Column(min_width=280):
                        labels = gr.Label(num_top_classes=5, label="Most likely classes", elem_id="labels")
                        timing = gr.Markdown(NO_PICTURE, elem_id="timing")
                    with gr.Column(min_width=280):
                        preview = show(
                            "What the network sees",
                            "The picture, scaled and cropped for the network",
                            elem_id="preview",
                        )
                with gr.Tab("Look inside"):
                    with gr.Row():
                        label = gr.Dropdown(
                            [], label="Class", allow_custom_value=True, interactive=True, elem_id="label"
                        )
                        last = demonstration.num_stages
                        stage = gr.Slider(1, last, last, step=1, label="Stage of the maps", elem_id="stage")
                    with gr.Row():
                        with gr.Column(min_width=PANEL_WIDTH):
                            activation = show(
                                "Activation map", "The picture under a map of the class", elem_id="activation"
                            )
                            activation_how = gr.Markdown(elem_id="activation-how")
                            opacity = gr.Slider(0, 100, 60, step=5, label="Opacity (%)", elem_id="opacity")
                        scanning_stages = demonstration.scanning_stages
                        with gr.Column(min_width=PANEL_WIDTH, visible=bool(scanning_stages)):
                            scan = show("Scan", "The picture under the four paths of the scan", elem_id="scan")
                            scan_how = gr.Markdown(elem_id="scan-how")
                            progress = gr.Slider(0, 100, 50, step=1, label="Steps (%)", elem_id="progress")
                            scan_stage = gr.Radio(
                                scanning_stages,
                                value=scanning_stages[-1] if scanning_stages else None,
                                label="Stage of the scan",
                                elem_id="scan-stage",
                            )
                            # Gradio would reject the other stages. `scan_paths` answers for them too.
                            scan_stage.preprocess = lambda stage: stage
                        with gr.Column(min_width=PANEL_WIDTH):
                            field = show(
                                "Receptive field",
                                "The picture under the influence of its pixels on one place",
                                type="filepath",
                                elem_id="field",
                            )
                            field.preprocess = partial(find_upload, folder=field.GRADIO_CACHE)
                            field_how = gr.Markdown(elem_id="field-how")
                            across = gr.Slider(0, 100, 50, step=0.1, label="Across (%)", elem_id="across")
                            down = gr.Slider(0, 100, 50, step=0.1, label="Down (%)", elem_id="down")
                with gr.Tab("Compare"):
                    gr.Markdown("Classify the picture with two models.")
                    if models.allow_any:
                        gr.Markdown("Choose a model, or type a Hub id or a directory.")
                    pair, verdicts = [], []
                    with gr.Row():
                        for position, name in [("First model", models.names[0]), ("Second model", models.names[-1])]:
                            with gr.Column(min_width=280):
                                pair.append(
                                    gr.Dropdown(
                                        models.names,
                                        value=name,
                                        label=position,
                                        allow_custom_value=models.allow_any,
                                        interactive=True,
                                    )
                                )
                                verdicts.append(gr.Label(num_top_classes=5, label=f"{position}: most likely classes"))
                    compare = gr.Button("Compare", variant="primary")
                    agreement = gr.Markdown(elem_id="agreement")
                create_measure_tab(demonstration.measure)

        classified = gr.State()  # another value after each classification
        picked = gr.State()  # another value after each click on a place

        def classify_and_offer_labels(picture: str | None) -> tuple:
            scores, view, described = explain(demonstration.classify, 3)(picture)
            return scores, view, described, offer_labels(scores), uuid4().hex

        answer(demonstration.classify, [picture], [labels, preview, timing])
        write(
            classify_and_offer_labels,
            [picture.change, app.load],
            [picture],
            [labels, preview, timing, label, classified],
        )
        answer_and_write(
            demonstration.activation_map,
            [classified.change, label.input, stage.input, opacity.input],
            [picture, label, stage, opacity],
            [activation, activation_how],
        )
        answer_and_write(
            demonstration.scan_paths,
            [classified.change, scan_stage.input, progress.input],
            [picture, scan_stage, progress],
            [scan, scan_how],
        )
        field.select(pick_place, field, [across, down, picked], api_visibility="private", trigger_mode="multiple")
        answer_and_write(
            demonstration.receptive_field,
            [classified.change, picked.change, stage.input, across.input, down.input],
            [picture, stage, across, down],
            [field, field_how],
        )
        answer_and_write(
            demonstration.compare,
            [classified.change, compare.click],
            [picture, *pair],
            [*verdicts, agreement],
        )
        take.click(take_drawing, drawing, picture, api_visibility="private", trigger_mode="always_last")
    return app.queue(max_size=MAX_WAITING)


def compile_kernels(models: Models) -> None:
    """Compile the kernels of both directions, so that the first requests do not wait for it."""
    pixel_values = predict(models.shown, Image.new("RGB", (64, 64))).pixel_values.to(models.network.device)
    explanations.effective_receptive_field(models.network, pixel_values, models.network.config.num_stages, 0, 0)


def check_address(host: str, port: int) -> None:
    """Checks that the demonstration can listen on a port of an address.

    Raises:
        UserError: If the port is taken, in which case the message names a free one, or the address does not exist.
    """
    bare_host = host.strip("[]")  # of IPv6, as in URLs
    listen = partial(socket.create_server, family=socket.AF_INET6 if ":" in bare_host else socket.AF_INET)
    try:
        listen((bare_host, port)).close()
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise UserError(f"the demonstration cannot listen on port {port} of {host!r}: {error.strerror}") from error
        with listen((bare_host, 0)) as free:
            raise UserError(
                f"another program listens on port {port} of {host}: choose a free one, such as --port "
                f"{free.getsockname()[1]}"
            ) from error


def prepare_app(models: list[str], allow_any: bool, optimize: bool) -> gr.Blocks:
    """Load the first model, and create the page for its task. `launch` has the arguments."""
    folder = fetch_model(models[0])
    if find_dense_task(read_fields(folder).get("architectures") or []) is not None:
        refuse_comparison(models, allow_any)
        return create_dense_app(load_dense_model(models[0], optimize=optimize))
    shown = Models(models, allow_any, optimize)
    compile_kernels(shown)
    return create_app(shown)


def refuse_comparison(models: list[str], allow_any: bool) -> None:
    """Refuse models to compare with a segmentation model or a detector. The bundled model is always offered.

    Raises:
        UserError: If there are others, or visitors may name some.
    """
    if allow_any or any(Path(model).resolve() != find_bundled_model().resolve() for model in models[1:]):
        raise UserError(
            f"{models[0]} is no classifier, and the demonstration compares classifiers only: give one --model, and "
            "leave --allow-any-model out"
        )


def launch(models: list[str], allow_any: bool, host: str | None, port: int | None, optimize: bool = True) -> None:
    """Serve the page until it is stopped.

    Args:
        models: Directories and Hub ids. The page shows the first, and offers the others for comparison if it is a
            classifier.
        allow_any: Whether visitors may name other models.
        host, port: Address to listen on. None takes Gradio's environment variables or defaults.
        optimize: Whether classifications and latencies come from optimized copies on CPUs.

    Raises:
        UserError: If a model cannot be shown, the port is taken, or the address does not exist.
    """
    if host is not None and port is not None:
        check_address(host, port)
    app = prepare_app(models, allow_any, optimize)
    try:
        app.launch(
            server_name=host,
            server_port=port,
            theme=THEME,
            max_file_size=MAX_FILE_SIZE,
            show_error=False,
            ssr_mode=False,
        )
    except OSError as error:
        raise UserError(f"the demonstration cannot listen there: {error}") from error
