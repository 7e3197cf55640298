"""What the pages of the demo share: uploads, errors, pictures, and the part of a page where visitors choose one.

Every function of a page is also an endpoint.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial, wraps
from html import escape
from pathlib import Path
from uuid import uuid4

import gradio as gr
import pandas as pd
from gradio.components.image_editor import EditorData
from gradio.data_classes import ImageData
from gradio.utils import get_space
from PIL import Image

from evmamba_demo.bundled import find_credits
from evmamba_demo.models import MAX_PIXELS
from evmamba_hub.errors import UserError


MAX_FILE_SIZE = "20mb"
MAX_WAITING = 64  # requests in the queue; Gradio rejects further ones
CACHE_SECONDS = 3600  # uploads and pictures older than this are deleted

# names of system fonts: Gradio's own themes load fonts from the internet
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])

NETWORK = {"concurrency_id": "network", "concurrency_limit": 1}  # a forward pass uses all cores

PHOTOGRAPHERS = """\
Photographs: Stefan van der Walt, Rachel Michetti and SpaceX (public domain),
[danielbuechele](https://www.flickr.com/photos/danielbuechele/6061409035/) and
[vultilion](https://www.flickr.com/photos/vultilion/6056698931/)
([CC BY 2.0](https://creativecommons.org/licenses/by/2.0/), scaled).
"""


def reject(function: Callable) -> Callable:
    """For an endpoint: raise a `UserError` as the error that clients read."""

    @wraps(function)
    def wrapper(*args):
        try:
            return function(*args)
        except UserError as error:
            raise gr.Error(escape(str(error)), print_exception=False) from error

    return wrapper


def explain(function: Callable, num_outputs: int) -> Callable:
    """For the page: show a `UserError` as the last output, which is a text, and clear the other outputs.

    After an error, Gradio would keep the outputs of an older picture, and forget that an event is to run again.
    """

    @wraps(function)
    def wrapper(*args):
        try:
            return function(*args)
        except UserError as error:
            return *[None] * (num_outputs - 1), escape(str(error))

    return wrapper


def warn(notice: str) -> None:
    """Shows what the visitor should know of a picture."""
    gr.Warning(escape(f"About this picture: {notice}."))


def find_upload(payload: ImageData | None, folder: str) -> str | None:
    """Return the path of a file in Gradio's cache of uploads. A request may name any file: others are rejected."""
    if payload is None or payload.path is None:
        return None
    path = Path(payload.path).resolve()
    if not path.is_relative_to(Path(folder).resolve()):
        raise gr.Error("This file was not uploaded.", print_exception=False)
    return str(path)


def guard_drawing(drawing: gr.Sketchpad) -> None:
    """A drawing that rejects files that were not uploaded, as `find_upload` does for a picture."""
    preprocess = drawing.preprocess

    def check_and_preprocess(payload: EditorData | None) -> dict | None:
        if payload is not None:
            for file in (payload.background, payload.composite, *payload.layers):
                find_upload(file, drawing.GRADIO_CACHE)
        return preprocess(payload)

    drawing.preprocess = check_and_preprocess


def own_file(view: Image.Image) -> Image.Image:
    """Save a picture to a separate file. Gradio would rewrite the file of equal pictures while others read it."""
    view.info["id"] = uuid4().hex
    return view


def show(label: str, alt_text: str, **settings) -> gr.Image:
    """Creates a picture that a function draws."""
    return gr.Image(label=label, alt_text=alt_text, interactive=False, format="png", buttons=[], **settings)


def choose_picture(example: Path, alt_text: str) -> gr.Image:
    """Creates the part of a page where visitors give a picture. It starts with an example."""
    picture = gr.Image(
        str(example),
        label=f"Picture (up to {MAX_FILE_SIZE.upper()}, {MAX_PIXELS // 1_000_000} million pixels)",
        alt_text=alt_text,
        type="filepath",
        image_mode=None,
        sources=["upload", "clipboard", "webcam"],
        height=300,
        elem_id="picture",
    )
    # Gradio would open the file here and show Pillow's error with the server's path.
    # `read_picture` opens it and explains the error.
    picture.preprocess = partial(find_upload, folder=picture.GRADIO_CACHE)
    return picture


def offer_examples(picture: gr.Image, examples: list[Path]) -> None:
    """Creates the gallery of examples, with credits, and with the buttons that a Space has."""
    gallery = gr.Dataset(
        components=[picture],
        samples=[[str(example)] for example in examples],
        samples_per_page=len(examples),
        type="index",
        label="Examples",
    )
    # `gr.Examples` would ignore a click while it loads another example, and replace `picture.preprocess`
    gallery.click(
        lambda index: gallery.samples[index][0]["path"],
        gallery,
        picture,
        queue=False,
        show_progress="hidden",
        api_visibility="private",
        trigger_mode="always_last",
    )
    if find_credits(examples) is not None:
        gr.Markdown(PHOTOGRAPHERS, elem_id="photographers")
    if get_space():
        with gr.Row():
            gr.DeepLinkButton("Copy a link to this result", size="sm")
            gr.DuplicateButton("Duplicate this Space")


def tabulate(measurements: Iterable[tuple[int, float]]) -> Iterator[tuple[pd.DataFrame, pd.DataFrame]]:
    """Yield a table for the plot and for the list of "Measure" as measurements of `measure_sides` come in."""
    rows = []
    for side, milliseconds in measurements:
        rows.append({"side": side, "pixels": side * side, "milliseconds": round(milliseconds, 2)})
        table = pd.DataFrame(rows)
        yield table, table


def create_measure_tab(measure: Callable) -> None:
    """Creates the tab that shows how the latency grows. `measure` takes nothing, and yields like `tabulate`."""
    with gr.Tab("Measure") as tab:
        gr.Markdown("See how the latency of one image grows with its number of pixels.")
        start = gr.Button("Measure again", variant="primary")
        plot = gr.LinePlot(
            x="pixels",
            y="milliseconds",
            label="Latency by pixels (ms)",
            y_lim=[0, None],
            height=300,
            elem_id="plot",
        )
        table = gr.Dataframe(headers=["side", "pixels", "milliseconds"], label="Measurements", interactive=False)
    gr.on([start.click, tab.select], measure, None, [plot, table], api_name="measure", **NETWORK)


def answer(function: Callable, inputs: list, outputs: list) -> None:
    """Offers a function as the endpoint of its name."""
    gr.on([], reject(function), inputs, outputs, api_name=function.__name__, **NETWORK)


def write(function: Callable, triggers: list, inputs: list, outputs: list) -> None:
    """Makes a function the one that writes its outputs on the page."""
    gr.on(
        triggers,
        function,
        inputs,
        outputs,
        api_visibility="private",
        trigger_mode="always_last",
        **NETWORK,
    )


def answer_and_write(function: Callable, triggers: list, inputs: list, outputs: list) -> None:
    """Offers a function as the endpoint of its name, and makes it the one that writes its outputs on the page."""
    answer(function, inputs, outputs)
    write(explain(function, len(outputs)), triggers, inputs, outputs)
