"""The web page: a picture, and what the network makes of it. Every function is an endpoint too."""

from collections.abc import Callable, Iterator
from functools import partial, wraps
from html import escape
from pathlib import Path
from uuid import uuid4

import gradio as gr
import pandas as pd
import torch
from gradio.components.image_editor import EditorData
from gradio.data_classes import ImageData
from PIL import Image

from evmamba_demo import drawings, explanations
from evmamba_demo.models import MAX_PIXELS, Models, measure_sides, predict, read_picture
from evmamba_hub.errors import UserError


MAX_FILE_SIZE = "20mb"
MAX_WAITING = 64  # requests in the queue; further ones are told to come back
MAX_RUNNING = 2  # forward passes at a time, each of which uses all cores by itself
CACHE_SECONDS = 3600  # uploads and pictures older than this are deleted

NO_PICTURE = "Give a picture first: upload, paste, photograph or draw one, or take an example."

# names of fonts alone: Gradio's own themes would load theirs from the internet
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])

INTRODUCTION = """\
# EfficientVMamba

A light-weight vision network that looks at an image in four interleaved sequences
([paper](https://arxiv.org/abs/2403.09977)). Give it a picture, then look inside.
"""


def readable(function: Callable) -> Callable:
    """Shows a `UserError` as a message in the page."""

    @wraps(function)
    def wrapper(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except UserError as error:
            raise gr.Error(escape(str(error)), print_exception=False) from error

    return wrapper


def find_upload(payload: ImageData | None, folder: str) -> str | None:
    """The path of a file that a visitor uploaded into Gradio's cache. A request may name any: others are refused."""
    if payload is None or payload.path is None:
        return None
    path = Path(payload.path).resolve()
    if not path.is_relative_to(Path(folder).resolve()):
        raise gr.Error("This file was not uploaded.", print_exception=False)
    return str(path)


def guard_drawing(drawing: gr.Sketchpad) -> None:
    """Makes a drawing refuse files that were not uploaded, as `find_upload` does for a picture."""
    preprocess = drawing.preprocess

    def check_and_preprocess(payload: EditorData | None) -> dict | None:
        if payload is not None:
            for file in (payload.background, payload.composite, *payload.layers):
                find_upload(file, drawing.GRADIO_CACHE)
        return preprocess(payload)

    drawing.preprocess = check_and_preprocess


def own_file(view: Image.Image) -> Image.Image:
    """Keeps a picture apart from equal ones: Gradio would write one file for all, while others are reading it."""
    view.info["id"] = uuid4().hex
    return view


class Demonstration:
    """The functions behind the page. Pictures come in as paths to uploaded files, None where there is none."""

    def __init__(self, models: Models):
        self.models = models
        self.model = models.shown.model
        config = self.model.config
        self.num_stages = config.num_stages
        self.scanning_stages = [stage for stage, kind in enumerate(config.block_types, start=1) if kind == "evss"]

    def look(self, picture: str) -> tuple[torch.Tensor, Image.Image]:
        """What the network sees of a file: (1, C, H, W) on its device, and as a picture."""
        pixel_values = self.models.shown.preprocess(read_picture(picture))["pixel_values"]
        return pixel_values.to(self.model.device), self.to_picture(pixel_values)

    def to_picture(self, pixel_values: torch.Tensor) -> Image.Image:
        processor = self.models.shown.image_processor
        return drawings.to_picture(pixel_values, processor.image_mean, processor.image_std)

    def find_label(self, label: str | None, pixel_values: torch.Tensor) -> int:
        """The index of a label, or of the most likely one where none is given."""
        config = self.model.config
        if not label:
            with torch.no_grad():
                return self.model(pixel_values).logits.argmax().item()
        if label not in config.label2id:
            raise UserError(f"The network knows no class {label!r}, take one of those that /classify names.")
        return config.label2id[label]

    def check_stage(self, stage: float) -> int:
        if stage not in range(1, self.num_stages + 1):
            raise UserError(f"The network has the stages 1 to {self.num_stages}, not {stage}.")
        return int(stage)

    @readable
    def classify(self, picture: str | None) -> tuple:
        """Labels with scores, what the network saw, and how long it took."""
        if picture is None:
            return None, None, NO_PICTURE
        found = predict(self.models.shown, read_picture(picture))
        _, _, height, width = found.pixel_values.shape
        described = (
            f"The network saw {width} x {height} pixels. Its forward pass took {found.milliseconds:.1f} ms, "
            f"with the scan in the backend {found.backend}."
        )
        return found.scores, own_file(self.to_picture(found.pixel_values)), described

    @readable
    def activation_map(self, picture: str | None, label: str | None, stage: float, opacity: float) -> tuple:
        """Where a class is seen: a map over the picture, and how to read it."""
        if picture is None:
            return None, NO_PICTURE
        stage = self.check_stage(stage)
        pixel_values, view = self.look(picture)
        index = self.find_label(label, pixel_values)
        name = f"“{self.model.config.id2label[index]}”"
        activation = explanations.activation_map(self.model, pixel_values, index, stage)
        if stage == self.num_stages:
            total = activation.sum().item()
            bias = self.model.classifier.bias[index].item()
            how = (
                f"Orange places speak for {name} and blue ones against it; the map is exact: all places together make "
                f"{total:.2f}, which with the class's bias of {bias:.2f} is its logit, {total + bias:.2f}."
            )
        else:
            how = f"The stronger the orange, the more stage {stage} speaks for {name} there (Grad-CAM, an estimate)."
        return own_file(drawings.draw_activation(view, activation, opacity / 100)), how

    @readable
    def scan_paths(self, picture: str | None, stage: float, progress: float) -> tuple:
        """The four groups of the scan in their order, drawn up to a percentage of their steps, and how to read it."""
        if picture is None:
            return None, NO_PICTURE
        stage = self.check_stage(stage)
        pixel_values, view = self.look(picture)
        if stage not in self.scanning_stages:
            return own_file(view), (
                f"Stage {stage} has no scan, its blocks are convolutions: choose a stage among "
                f"{', '.join(map(str, self.scanning_stages))} to see one."
            )
        _, hidden_states = explanations.run_stages(self.model, pixel_values)
        height, width = hidden_states[stage].shape[2:]
        paths = explanations.scan_paths(height, width)
        names = list(drawings.GROUP_COLORS)
        how = (
            f"A color is one sequence through a quarter of the {width} x {height} cells of stage {stage}, from its "
            f"small dot to the large: {names[0]} and {names[2]} go row by row, {names[1]} and {names[3]} column by "
            "column, and no cell is visited twice."
        )
        return own_file(drawings.draw_scan(view, paths, height, width, progress / 100)), how

    @readable
    def receptive_field(self, picture: str | None, stage: float, across: float, down: float) -> tuple:
        """Which pixels a cell of a stage depends on, at a place in percent of the sides, and how to read it."""
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
            f"The stronger the orange, the more that pixel moves the ringed cell of stage {stage}, from black and "
            f"white (a {10**drawings.DECADES:,}th of the strongest, or less) to full color; {reached:.0%} of the "
            "pixels reach it, by the scan along rows and columns, and faintly from everywhere by the channel gates."
        )
        view = drawings.draw_receptive_field(view, influence, (row + 0.5) / height, (column + 0.5) / width)
        return own_file(view), how

    @readable
    def compare(self, picture: str | None, first_model: str, second_model: str) -> tuple:
        """Labels with scores of two models, and whether they agree."""
        if picture is None:
            return None, None, NO_PICTURE
        image = read_picture(picture)
        found = [predict(self.models.load(name), image) for name in (first_model, second_model)]
        first, second = [next(iter(one.scores)) for one in found]
        shared = len(found[0].scores.keys() & found[1].scores.keys())
        verdict = f"Both say “{first}”" if first == second else f"They differ: “{first}” and “{second}”"
        times = " and ".join(f"{one.milliseconds:.1f} ms" for one in found)
        return found[0].scores, found[1].scores, f"{verdict}; their lists share {shared} labels. They took {times}."

    def measure(self) -> Iterator[tuple[pd.DataFrame, pd.DataFrame]]:
        """Milliseconds by image size, as the measurements come in."""
        rows = []
        for side, milliseconds in measure_sides(self.models.shown):
            rows.append({"side": side, "pixels": side * side, "milliseconds": round(milliseconds, 2)})
            table = pd.DataFrame(rows)
            yield table, table


def label_choices(scores: dict | None) -> gr.Dropdown:
    """The labels of a classification, the most likely first, as the choices of "Look inside"."""
    labels = list(scores or {})
    return gr.Dropdown(choices=labels, value=labels[0] if labels else None)


def take_drawing(drawing: dict) -> Image.Image:
    return drawing["composite"]


def pick_place(view: str, event: gr.SelectData) -> tuple[float, float]:
    """Where a click was, in percent of the sides."""
    with Image.open(view) as image:
        return round(100 * event.index[0] / image.width, 1), round(100 * event.index[1] / image.height, 1)


def create_app(models: Models, examples: list[Path]) -> gr.Blocks:
    """The page with its endpoints. `launch` starts it."""
    demonstration = Demonstration(models)
    network = {"concurrency_id": "network", "concurrency_limit": MAX_RUNNING}

    def show(label: str, alt_text: str, **settings) -> gr.Image:
        return gr.Image(label=label, alt_text=alt_text, interactive=False, format="png", buttons=[], **settings)

    with gr.Blocks(
        title="EfficientVMamba", analytics_enabled=False, delete_cache=(CACHE_SECONDS, CACHE_SECONDS)
    ) as app:
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                with gr.Tabs():
                    with gr.Tab("Picture"):
                        picture = gr.Image(
                            label=f"Picture (up to {MAX_FILE_SIZE.upper()}, {MAX_PIXELS // 1_000_000} million pixels)",
                            alt_text="The picture that you gave",
                            type="filepath",
                            image_mode=None,
                            sources=["upload", "clipboard", "webcam"],
                            height=300,
                            elem_id="picture",
                        )
                        # Gradio would open the file here and show what Pillow raises, with the path on the server;
                        # `read_picture` opens it and explains.
                        picture.preprocess = partial(find_upload, folder=picture.GRADIO_CACHE)
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
                        take = gr.Button("Take the drawing as the picture", variant="primary")
                if examples:
                    gr.Examples([[str(example)] for example in examples], picture, api_visibility="private")
            with gr.Column(scale=2, min_width=300), gr.Tabs():
                with gr.Tab("Classify"):
                    labels = gr.Label(num_top_classes=5, label="Most likely classes", elem_id="labels")
                    timing = gr.Markdown(NO_PICTURE, elem_id="timing")
                    preview = show(
                        "What the network really sees",
                        "The picture, scaled and cropped for the network",
                        height=320,
                        elem_id="preview",
                    )
                with gr.Tab("Look inside"):
                    with gr.Row():
                        label = gr.Dropdown(
                            [], label="Class", allow_custom_value=True, interactive=True, elem_id="label"
                        )
                        last = demonstration.num_stages
                        stage = gr.Slider(1, last, last, step=1, label="Stage", elem_id="stage")
                        opacity = gr.Slider(0, 100, 60, step=5, label="Opacity (%)", elem_id="opacity")
                    with gr.Row():
                        with gr.Column(min_width=280):
                            activation = show(
                                "Where the class is seen", "The picture under a map of the class", elem_id="activation"
                            )
                            activation_how = gr.Markdown(elem_id="activation-how")
                        with gr.Column(min_width=280):
                            scan = show(
                                "How the scan goes", "The picture under the four paths of the scan", elem_id="scan"
                            )
                            scan_how = gr.Markdown(elem_id="scan-how")
                            progress = gr.Slider(0, 100, 25, step=1, label="Steps of the scan (%)", elem_id="progress")
                        with gr.Column(min_width=280):
                            field = show(
                                "What a place depends on: click one",
                                "The picture under the influence of its pixels on one place",
                                type="filepath",
                                elem_id="field",
                            )
                            field.preprocess = partial(find_upload, folder=field.GRADIO_CACHE)
                            field_how = gr.Markdown(elem_id="field-how")
                            across = gr.Slider(0, 100, 50, step=0.1, label="Place: across (%)", elem_id="across")
                            down = gr.Slider(0, 100, 50, step=0.1, label="Place: down (%)", elem_id="down")
                with gr.Tab("Compare"):
                    if models.allow_any:
                        gr.Markdown("Choose a model, or type the id of one on the Hub or a folder.")
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
                with gr.Tab("Measure"):
                    gr.Markdown(
                        "The time of one image over its pixels, measured now: it should look like a straight line."
                    )
                    start = gr.Button("Measure", variant="primary")
                    plot = gr.LinePlot(
                        x="pixels",
                        y="milliseconds",
                        label="Milliseconds by pixels",
                        y_lim=[0, None],
                        height=300,
                        elem_id="plot",
                    )
                    table = gr.Dataframe(
                        headers=["side", "pixels", "milliseconds"], label="Measurements", interactive=False
                    )

        classified = picture.change(
            demonstration.classify, picture, [labels, preview, timing], api_name="classify", **network
        )
        chosen = classified.success(label_choices, labels, label, api_visibility="private")
        picked = field.select(pick_place, field, [across, down], api_visibility="private")

        def follow(function: Callable, triggers: list, after: list, inputs: list, outputs: list) -> None:
            """Calls a function at events, for which it is an endpoint of its name, and after other functions."""
            gr.on(
                triggers,
                function,
                inputs,
                outputs,
                api_name=function.__name__,
                trigger_mode="always_last",
                **network,
            )
            for event in after:
                event.success(function, inputs, outputs, api_visibility="private", **network)

        follow(
            demonstration.activation_map,
            [label.input, stage.input, opacity.input],
            [chosen],
            [picture, label, stage, opacity],
            [activation, activation_how],
        )
        follow(
            demonstration.scan_paths,
            [stage.input, progress.input],
            [chosen],
            [picture, stage, progress],
            [scan, scan_how],
        )
        follow(
            demonstration.receptive_field,
            [stage.input, across.input, down.input],
            [chosen, picked],
            [picture, stage, across, down],
            [field, field_how],
        )
        compare.click(demonstration.compare, [picture, *pair], [*verdicts, agreement], api_name="compare", **network)
        start.click(demonstration.measure, None, [plot, table], api_name="measure", **network)
        take.click(take_drawing, drawing, picture, api_visibility="private")
    return app.queue(max_size=MAX_WAITING)


def launch(models: list[str], examples: list[Path], allow_any: bool, host: str | None, port: int | None) -> None:
    """Shows models until it is stopped.

    Args:
        models: folders and Hub ids, the first of which is shown and the others offered for comparison.
        examples: images to try.
        allow_any: whether visitors may name other models.
        host, port: where to listen; None for what Gradio's own environment variables or defaults say.

    Raises:
        UserError: for models that cannot be shown and ports that are taken.
    """
    shown = Models(models, allow_any)
    predict(shown.shown, Image.new("RGB", (64, 64)))  # compiles kernels, which the first visitor need not wait for
    app = create_app(shown, examples)
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
