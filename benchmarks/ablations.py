"""Ablations of the paper on a task that needs global context: is the marked wire connected to the bar?

Wires run across an image to a bar at its right. Half of them are cut somewhere. A coin decides whether the left end of
a whole wire or of a cut wire is marked. It decides nothing else, so the amount of ink, the number of cuts and the
place of the mark do not reveal the label. As a check, classifiers of these numbers and of the pixels are fitted too.

The networks have two stages of one block, so their convolutions see at most half the width of the image. All train on
the same images with the same settings and several seeds. A seed sets the weights and the order of the images.
"""

import time
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Annotated, NamedTuple

import numpy as np
import torch
import typer
from measure import RESULTS_DIR, describe_environment, error_console, print_table, write_csv
from PIL import Image, ImageDraw
from rich.progress import MofNCompleteColumn, Progress, TaskID, TimeElapsedColumn, track
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import RidgeClassifier
from torch import nn
from torch.utils.data import Dataset
from transformers import EvalPrediction, PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from evmamba_hub.errors import UserError, exit_on_user_error
from modeling_evmamba import EfficientVMambaConfig, EfficientVMambaForImageClassification
from modeling_evmamba.modeling_evmamba import EfficientVMambaES2D, EfficientVMambaEVSSLayer


IMAGE_SIZE = 64
MARGIN = 5  # pixels between wires and border
BAR_WIDTH = 3
NUM_WIRES = 4
NUM_CUT = 2
NUM_KNOTS = 4  # of a wire, which is straight between them
SPACING = 9  # minimum number of pixels between neighboring wires
EVENNESS = 6.0  # concentration of the Dirichlet distribution that shares the other pixels between wires
CUT_LENGTH = 9
CUT_RANGE = (0.2, 0.9)  # of the width
MARK_RADIUS = 2.5

NUM_HELD_OUT = 2000
TRAINING_SEED, HELD_OUT_SEED = 1, 2

BATCH_SIZE = 16
LEARNING_RATE = 4e-3
WEIGHT_DECAY = 0.05
WARMUP = 0.1  # of all steps


class Drawing(NamedTuple):
    image: Image.Image
    is_connected: bool
    mark: float  # pixels from the top


def draw_wires(generator: np.random.Generator) -> Drawing:
    """Draw a random image of the task. The label is drawn after everything except the mark."""
    spare = IMAGE_SIZE - 2 * MARGIN - SPACING * (NUM_WIRES - 1)
    shares = generator.dirichlet(np.full(NUM_WIRES + 1, EVENNESS), size=NUM_KNOTS)
    ys = MARGIN + spare * shares.cumsum(axis=1)[:, :-1] + SPACING * np.arange(NUM_WIRES)  # (knots, wires)
    xs = np.linspace(MARGIN, IMAGE_SIZE - BAR_WIDTH, NUM_KNOTS)

    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle((IMAGE_SIZE - BAR_WIDTH, 0, IMAGE_SIZE, IMAGE_SIZE), fill="red")
    for wire in range(NUM_WIRES):
        draw.line(list(zip(xs, ys[:, wire], strict=True)), fill="black", width=2)
    wires = generator.permutation(NUM_WIRES)
    for wire in wires[:NUM_CUT]:
        start = round(generator.uniform(*CUT_RANGE) * IMAGE_SIZE - CUT_LENGTH / 2)
        for x in range(start, min(start + CUT_LENGTH, IMAGE_SIZE - BAR_WIDTH)):
            y = np.interp(x, xs, ys[:, wire])
            draw.line([(x, y - 3), (x, y + 3)], fill="white")

    is_connected = bool(generator.integers(2))
    mark = ys[0, generator.choice(wires[NUM_CUT:] if is_connected else wires[:NUM_CUT])]
    draw.ellipse((MARGIN - MARK_RADIUS, mark - MARK_RADIUS, MARGIN + MARK_RADIUS, mark + MARK_RADIUS), fill="red")
    return Drawing(image, is_connected, mark)


class Wires(Dataset):
    """The images of a seed, as dictionaries of `pixel_values` `(3, H, W)`, where white is 0, and `labels`."""

    def __init__(self, num_images: int, seed: int, description: str):
        generator = np.random.default_rng(seed)
        numbers = track(range(num_images), description, console=error_console, transient=True)
        drawings = [draw_wires(generator) for _ in numbers]
        self.images = np.stack([np.asarray(drawing.image) for drawing in drawings])  # (N, H, W, 3), uint8
        self.labels = np.array([drawing.is_connected for drawing in drawings])
        self.marks = np.array([drawing.mark for drawing in drawings])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        pixels = torch.from_numpy(self.images[index]).permute(2, 0, 1)  # (3, H, W)
        return {"pixel_values": 1 - pixels / 255, "labels": torch.tensor(int(self.labels[index]))}

    def describe(self) -> np.ndarray:
        """Return features that must not help, `(N, 4)`: counts of white, black and red pixels, place of the mark."""
        colors = [(255, 255, 255), (0, 0, 0), (255, 0, 0)]
        counts = [(self.images == color).all(axis=3).sum(axis=(1, 2)) for color in colors]
        return np.stack([*counts, self.marks], axis=1)

    def grey_pixels(self) -> np.ndarray:
        """Return the green channel, `(N, H * W)` in float32. Mark, bar and wires are 0 in it."""
        return self.images[..., 1].reshape(len(self), -1) / np.float32(255)


class NoScanES2D(EfficientVMambaES2D):
    """The mixer without its scan. Projections, depthwise convolution and gate remain."""

    def __init__(self, config: EfficientVMambaConfig, hidden_size: int):
        super().__init__(config, hidden_size)
        for name in ("x_proj_weight", "dt_proj_weight", "dt_proj_bias", "A_log", "D"):
            delattr(self, name)

    def init_scan_weights(self) -> None:
        """Do nothing, since there are no such weights."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # (B, H, W, C) -> (B, H, W, C)
        u, z = self.in_proj(hidden_states).chunk(2, dim=-1)  # (B, H, W, D) each
        u = self.activation(self.conv2d(u.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        return self.output_proj(self.layernorm(u, z))


class NoLocalBranch(nn.Module):
    """A local branch that returns zeros."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # (B, H, W, C) -> (B, H, W, C)
        return torch.zeros_like(hidden_states)


class Network(NamedTuple):
    block_types: tuple[str, str]
    has_scan: bool = True
    has_local_branch: bool = True


NETWORKS = {
    "paper": Network(("evss", "inverted_residual")),
    "evss-late": Network(("inverted_residual", "evss")),
    "no-local-branch": Network(("evss", "inverted_residual"), has_local_branch=False),
    "no-scan": Network(("evss", "inverted_residual"), has_scan=False),
    "no-evss": Network(("inverted_residual", "inverted_residual")),
}


def create_model(network: Network) -> EfficientVMambaForImageClassification:
    config = EfficientVMambaConfig(
        image_size=IMAGE_SIZE,
        hidden_sizes=[24, 48],
        depths=[1, 1],
        block_types=network.block_types,
        state_size=8,
        drop_path_rate=0.0,
        initializer_range=0.1,  # with the default of 0.02, a network this narrow takes long to start learning
        num_labels=2,
    )
    model = EfficientVMambaForImageClassification(config)
    for layer in model.modules():
        if isinstance(layer, EfficientVMambaEVSSLayer):
            hidden_size = layer.layernorm.normalized_shape[0]
            if not network.has_scan:
                layer.mixer = NoScanES2D(config, hidden_size)
                layer.mixer.apply(model._init_weights)
            if not network.has_local_branch:
                layer.local_branch = NoLocalBranch()
    return model


class ShowProgress(TrainerCallback):
    """Advance rich's progress bars, since Trainer has those of tqdm."""

    def __init__(self, progress: Progress, tasks: list[TaskID]):
        self.progress, self.tasks = progress, tasks

    def on_step_end(self, args, state, control, **kwargs):
        for task in self.tasks:
            self.progress.advance(task)


def measure_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(axis=1) == prediction.label_ids).mean())}


def train(
    network: Network, seed: int, steps: int, training: Wires, held_out: Wires, callback: TrainerCallback
) -> dict:
    """Train a network from random weights. Returns its number of parameters, accuracy and time in seconds."""
    set_seed(seed)
    model = create_model(network)
    start = time.perf_counter()
    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=BATCH_SIZE,
            per_device_eval_batch_size=100,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="cosine",
            warmup_steps=round(WARMUP * steps),
            weight_decay=WEIGHT_DECAY,
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = Trainer(model, arguments, train_dataset=training, compute_metrics=measure_accuracy)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(callback)
        trainer.train()
        accuracy = trainer.evaluate(held_out)["eval_accuracy"]
    return {
        "parameters": model.num_parameters(),
        "held-out accuracy %": 100 * accuracy,
        "seconds": time.perf_counter() - start,
    }


def measure_shortcuts(training: Wires, held_out: Wires) -> dict[str, float]:
    """Return the held-out accuracy, in percent, of classifiers that follow no wire."""
    of_numbers = HistGradientBoostingClassifier(random_state=0).fit(training.describe(), training.labels)
    of_pixels = RidgeClassifier().fit(training.grey_pixels(), training.labels)
    return {
        "boosted trees of ink and mark": 100 * of_numbers.score(held_out.describe(), held_out.labels),
        "linear classifier of pixels": 100 * of_pixels.score(held_out.grey_pixels(), held_out.labels),
    }


def summarize(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """Return one row per network: mean over the seeds, lowest and highest."""
    summary = []
    for name in dict.fromkeys(row["network"] for row in rows):
        runs = [row for row in rows if row["network"] == name]
        accuracies = [row["held-out accuracy %"] for row in runs]
        summary.append(
            {
                "network": name,
                "parameters": runs[0]["parameters"],
                "seeds": len(runs),
                "mean accuracy %": mean(accuracies),
                "lowest": min(accuracies),
                "highest": max(accuracies),
                "seconds a run": mean(row["seconds"] for row in runs),
            }
        )
    return summary


def main(
    networks: Annotated[
        list[str] | None,
        typer.Option(
            "--network", help=f"Network to train, repeatable. One of {', '.join(NETWORKS)}.", show_default="all"
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of runs of each network.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help=f"Training steps of {BATCH_SIZE} images.")] = 3000,
    images: Annotated[int, typer.Option(min=100, help="Number of training images.")] = 16000,
    output_dir: Annotated[
        Path, typer.Option(help="Directory of the CSV file.", show_default="benchmarks/results")
    ] = RESULTS_DIR,
) -> None:
    """Train networks with and without parts of EfficientVMamba on a task that needs global context.

    In the task, wires run across an image of 64 x 64 pixels to a bar. Is the marked wire cut?

    The networks have the paper's order of blocks (EVSS early), EVSS late, no local branch, no scan, or convolutions
    alone.

    Examples:

        python benchmarks/ablations.py

        python benchmarks/ablations.py --network paper --network no-scan --seeds 1 --steps 1500
    """
    names = networks or list(NETWORKS)
    if unknown := [name for name in names if name not in NETWORKS]:
        raise UserError(f"unknown network {unknown[0]!r}: --network accepts {', '.join(NETWORKS)}")
    environment = describe_environment()
    environment |= {"seeds": str(seeds), "steps": str(steps), "training images": str(images)}
    training = Wires(images, TRAINING_SEED, "drawing training images")
    held_out = Wires(NUM_HELD_OUT, HELD_OUT_SEED, "drawing held-out images")
    shortcuts = measure_shortcuts(training, held_out)
    print_table(
        "Classifiers that follow no wire",
        [{"classifier": name, "held-out accuracy %": value} for name, value in shortcuts.items()],
    )
    environment |= {f"accuracy % of {name}": f"{value:.4g}" for name, value in shortcuts.items()}

    rows = []
    with Progress(
        *Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn(), console=error_console
    ) as progress:
        total = progress.add_task("all", total=seeds * len(names) * steps)
        for seed in range(seeds):
            for name in names:
                task = progress.add_task(f"{name}, seed {seed}", total=steps)
                callback = ShowProgress(progress, [total, task])
                result = train(NETWORKS[name], seed, steps, training, held_out, callback)
                rows.append({"network": name, "seed": seed, **result})
                write_csv(output_dir / "ablations.csv", rows, environment)  # keeps finished runs if interrupted
                progress.remove_task(task)
                progress.console.print(f"{name}, seed {seed}: {result['held-out accuracy %']:.1f} %")
    print_table("Held-out accuracy", summarize(rows))


if __name__ == "__main__":
    with exit_on_user_error():
        typer.run(main)
