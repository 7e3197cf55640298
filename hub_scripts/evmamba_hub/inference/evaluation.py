"""`evmamba evaluate`: measure the accuracy of a classifier on a dataset, in one process or several.

Every process evaluates a share of the images, each image once. The processes add up their counts, so no batch is
padded. A process saves its counts to a file while it works, and an interrupted evaluation resumes from this file.
"""

import json
import math
import re
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from transformers import AutoModelForImageClassification, BitImageProcessorPil

# the name in `transformers` itself is a placeholder that raises if torchvision is missing (5.17)
from transformers.models.auto.image_processing_auto import AutoImageProcessor

import modeling_evmamba  # noqa: F401, registers the model with the Auto classes
from evmamba_hub.errors import UserError, require
from evmamba_hub.files import write_atomic
from evmamba_hub.images import imagenet
from evmamba_hub.images.labeled_images import LabeledImage, LabeledImages, Share
from evmamba_hub.inference.channels import find_color_mode, fit_image_processor
from evmamba_hub.info import check_backend
from evmamba_hub.model_folder import check_is_classifier


SAVE_INTERVAL = 10  # seconds between two saves of the counts
NUM_SHOWN = 10  # confusions and classes in the summary
MAX_NAMES_IN_MESSAGE = 5


def match_labels(names: list[str], id2label: dict[int, str], label_map: dict[str, str]) -> list[int]:
    """Match the labels of a dataset with those of the model by name.

    A label of the model may be a list of synonyms, separated by commas. Each synonym matches if no other label has it.
    If the model has ImageNet's labels, WordNet ids match too.

    Args:
        names: The names of the dataset's labels.
        id2label: The labels of the model.
        label_map: The model's label by the dataset's name, for different spellings.

    Returns:
        The model's index of each name.

    Raises:
        UserError: If the model does not know a name.
    """
    labels = [id2label[idx] for idx in sorted(id2label)]
    if all(re.fullmatch(r"LABEL_\d+", label) for label in labels):  # the labels of the model have no names
        if len(names) != len(labels):
            raise UserError(
                f"the model has {len(labels)} classes without names, which cannot be matched with {len(names)} "
                "labels: add id2label to its configuration"
            )
        return list(range(len(names)))

    indices: dict[str, int] = {}
    if labels == imagenet.load_labels():
        indices = {name: idx for idx, name in enumerate(imagenet.load_synsets())}
    num_labels = Counter(synonym for label in labels for synonym in set(label.split(", ")))
    for idx, label in enumerate(labels):
        indices |= {synonym: idx for synonym in label.split(", ") if num_labels[synonym] == 1}
    indices |= {label: idx for idx, label in reversed(list(enumerate(labels)))}

    unknown = [name for name in names if label_map.get(name, name) not in indices]
    if unknown:
        shown = ", ".join(repr(name) for name in unknown[:MAX_NAMES_IN_MESSAGE])
        raise UserError(
            f"{len(unknown)} of the {len(names)} labels of the dataset are none of the model's: {shown}"
            f"{', ...' if len(unknown) > MAX_NAMES_IN_MESSAGE else ''}. The model knows {len(labels)} labels, "
            f"such as {labels[0]!r} and {labels[-1]!r}. Map different spellings with --label-map"
        )
    return [indices[label_map.get(name, name)] for name in names]


def read_label_map(path: Path) -> dict[str, str]:
    """Read a JSON file with the model's label by the dataset's name.

    Raises:
        UserError: If the file holds anything else.
    """
    try:
        label_map = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(label_map, dict) or not all(isinstance(label, str) for label in label_map.values()):
        raise UserError(
            f'{path} must hold an object of strings, such as {{"name in the dataset": "label of the model"}}'
        )
    return label_map


def save_results(path: Path, results: dict) -> None:
    """Write the results of an evaluation as JSON.

    Raises:
        UserError: If the file cannot be written.
    """
    write_atomic(path, (json.dumps(results, indent=2) + "\n").encode())


class Preprocessor:
    """The model's image processor with the center crop of torchvision.

    The networks were trained and evaluated with torchvision. If a margin is odd, its crop may differ from that of
    transformers by one pixel.
    """

    def __init__(self, image_processor: BitImageProcessorPil, mode: str = "RGB"):
        self.image_processor, self.mode = image_processor, mode
        fit_image_processor(image_processor, mode)

    def __call__(self, image: LabeledImage) -> torch.Tensor:  # (C, H, W)
        processor, pixels = self.image_processor, image.read()
        if self.mode != pixels.mode:
            pixels = pixels.convert(self.mode)
        if processor.do_center_crop:
            uncropped = processor(pixels, do_center_crop=False, return_tensors="pt").pixel_values[0]
            height, width = processor.crop_size["height"], processor.crop_size["width"]
            margins = uncropped.shape[1] - height, uncropped.shape[2] - width
            if min(margins) >= 0:
                top, left = (round(margin / 2) for margin in margins)
                return uncropped[:, top : top + height, left : left + width]
        return processor(pixels, return_tensors="pt").pixel_values[0]


@dataclass
class Counts:
    """The counts over the evaluated images.

    One tensor holds all counts, and one call adds a batch to it. So Ctrl-C never leaves a batch counted in part.
    """

    table: torch.Tensor  # (classes * classes + 2,) float64: the confusion matrix row by row, then the two sums

    @classmethod
    def start(cls, num_classes: int) -> "Counts":
        return cls(torch.zeros(num_classes**2 + 2, dtype=torch.float64))

    @property
    def num_classes(self) -> int:
        return math.isqrt(len(self.table) - 2)

    @property
    def confusion(self) -> torch.Tensor:
        """The confusion matrix, (classes, classes) int64. Rows are labels, columns are predictions."""
        return self.table[:-2].view(self.num_classes, self.num_classes).long()

    @property
    def sums(self) -> torch.Tensor:
        """The sum of the losses, and the number of images with the label in the top 5, (2,) float64."""
        return self.table[-2:]

    @property
    def num_images(self) -> int:
        return int(self.confusion.sum())

    def add(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Count a batch: logits (B, classes), labels (B,)."""
        logits, labels = logits.cpu().double(), labels.cpu()
        top5 = logits.topk(min(5, self.num_classes), dim=-1).indices
        sums = torch.stack([F.cross_entropy(logits, labels, reduction="sum"), (top5 == labels[:, None]).sum()])
        places = torch.cat([labels * self.num_classes + top5[:, 0], torch.tensor([-2, -1])])
        self.table.index_put_((places,), torch.cat([torch.ones(len(labels)), sums]), accumulate=True)

    def add_up(self, device: torch.device) -> "Counts":
        """Returns the sum of the counts of all processes. Call it on all processes, each with its own device."""
        from accelerate.utils import reduce

        return Counts(reduce(self.table.to(device), "sum").cpu())

    def summarize(self) -> dict[str, int | float]:
        """Returns the number of images, top-1 and top-5 accuracy, and the mean loss. There must be an image."""
        confusion, (loss, num_right_in_five) = self.confusion, self.sums.tolist()
        num_images = int(confusion.sum())
        return {
            "images": num_images,
            "top1": int(confusion.diag().sum()) / num_images,
            "top5": num_right_in_five / num_images,
            "loss": loss / num_images,
        }


def computes_on_cpu() -> bool:
    """Returns whether accelerate must use CPUs. Without this setting, CPU processes would not find each other."""
    from accelerate.utils import parse_flag_from_env

    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def join_processes():
    """Returns accelerate's `PartialState` of this process, which may be the only one.

    Raises:
        UserError: If accelerate is not installed.
    """
    require("accelerate", extra="evaluate")
    from accelerate import PartialState

    return PartialState(cpu=computes_on_cpu())


class Evaluation:
    """The evaluation of a model on the share of a dataset that belongs to this process."""

    def __init__(
        self,
        processes,
        model: str,
        folder: Path,
        dataset: LabeledImages,
        *,
        batch_size: int,
        dtype: str,
        workers: int,
        label_map: dict[str, str],
        progress_file: Path | None,
    ):
        """Load the model, and the counts of an interrupted evaluation.

        Args:
            processes: The result of `join_processes`.
            model: Directory or Hub id, for the results.
            folder: The directory of the model and its image processor.
            dataset: The dataset to evaluate on.
            batch_size: The number of images in a batch of one process.
            dtype: "float32", "bfloat16" or "float16".
            workers: The number of threads in each process that read and resize images.
            label_map: The model's label by the dataset's name, as for `match_labels`.
            progress_file: The file for the counts, to which the index of the process is appended.

        Raises:
            UserError: If the model is no classifier, or the labels do not match.
        """
        self.processes, self.name = processes, model
        # the directory of a download has the name of its commit
        self.commit = None if Path(model).is_dir() else folder.name
        check_is_classifier(folder, model)
        try:
            self.model = AutoModelForImageClassification.from_pretrained(folder, dtype=getattr(torch, dtype))
            # the same pixels with and without torchvision
            image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise UserError(f"{folder} cannot be loaded as an image classifier: {error}") from error
        self.preprocess = Preprocessor(image_processor, find_color_mode(self.model.config))
        check_backend(self.processes.device, self.model.dtype)
        self.model = self.model.to(self.processes.device).eval()
        self.dataset, self.batch_size, self.dtype, self.workers = dataset, batch_size, dtype, workers
        self.label_map, self.id2label = label_map, self.model.config.id2label
        self.class_indices: list[int] | None = None
        self.indices_of_names: dict[str, int] = {}
        if dataset.class_names is not None:
            self.class_indices = match_labels(dataset.class_names, self.id2label, label_map)

        self.share = Share(self.processes.process_index, self.processes.num_processes)
        self.progress_file = progress_file and progress_file.with_name(
            f"{progress_file.name}.progress-{self.share.process_index}-of-{self.share.num_processes}"
        )
        files = [path for path in sorted(folder.iterdir()) if path.suffix in (".json", ".safetensors")]
        weights = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        parts = [dataset.name, dataset.num_images, dataset.revision, dataset.config, dataset.split]
        # an evaluation resumes only if these are the same
        self.settings = json.dumps([str(folder.resolve()), weights, *parts, dtype, label_map])
        self.counts = self.load_progress() or Counts.start(self.model.config.num_labels)
        self.num_resumed, self.seconds = self.counts.num_images, 0.0

    @property
    def num_images(self) -> int | None:
        """The number of images of this process, or None if it is unknown."""
        return None if self.dataset.num_images is None else len(self.share.indices(self.dataset.num_images))

    def load_progress(self) -> Counts | None:
        if self.progress_file is None:
            return None
        try:
            with safe_open(self.progress_file, framework="pt") as file:
                if file.metadata()["settings"] != self.settings:
                    return None
                return Counts(file.get_tensor("table"))
        except (OSError, SafetensorError):  # the file is missing or damaged
            return None

    def save_progress(self) -> None:
        if self.progress_file is not None:
            write_atomic(self.progress_file, save(vars(self.counts), metadata={"settings": self.settings}))

    def find_index(self, image: LabeledImage) -> int:
        """Returns the model's index of an image's label."""
        if isinstance(image.label, str):
            if image.label not in self.indices_of_names:
                (index,) = match_labels([image.label], self.id2label, self.label_map)
                self.indices_of_names[image.label] = index
            return self.indices_of_names[image.label]
        num_known = len(self.class_indices or self.id2label)
        if image.label is None or not 0 <= image.label < num_known:
            raise UserError(f"{image.name} has the label {image.label}, which must be from 0 to {num_known - 1}")
        return image.label if self.class_indices is None else self.class_indices[image.label]

    def load_batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield pixel values (B, C, H, W) and labels (B,) of the remaining images. Threads prepare the next batch."""
        images = islice(self.dataset.read(self.share), self.num_resumed, None)
        with ThreadPoolExecutor(self.workers) as pool:

            def start() -> list[tuple[Future, int]]:
                batch = list(islice(images, self.batch_size))
                return [(pool.submit(self.preprocess, image), self.find_index(image)) for image in batch]

            batch = start()
            while batch:
                following = start()
                pixel_values = [future.result() for future, _ in batch]
                if len({image.shape for image in pixel_values}) > 1:
                    raise UserError("the model's image processor keeps images of different sizes: use --batch-size 1")
                yield torch.stack(pixel_values), torch.tensor([index for _, index in batch])
                batch = following

    @torch.inference_mode()
    def run(self) -> Iterator[int]:
        """Evaluate, and yield the number of images of each batch. An interruption saves the counts.

        Raises:
            UserError: If an image or a label is invalid, or the counts cannot be saved.
        """
        self.save_progress()  # find an unwritable disk before the work
        begin, saved = None, time.monotonic()
        try:
            for pixel_values, labels in self.load_batches():
                pixel_values = pixel_values.to(self.processes.device, self.model.dtype)
                if begin is None:
                    self.model(pixel_values)  # warm-up: the first call compiles kernels
                    begin = time.monotonic()
                self.counts.add(self.model(pixel_values).logits, labels)
                if time.monotonic() - saved > SAVE_INTERVAL:
                    self.save_progress()
                    saved = time.monotonic()
                yield len(labels)
        finally:
            self.seconds = 0.0 if begin is None else time.monotonic() - begin
            with suppress(UserError):  # a full disk must hide neither the results nor another error
                self.save_progress()

    def finish(self) -> dict:
        """Returns the results of all processes. Call it on all processes.

        Raises:
            UserError: If the dataset holds no images.
        """
        from accelerate.utils import gather

        num_new = self.counts.num_images - self.num_resumed
        work = torch.tensor([[num_new, self.seconds]], dtype=torch.float64)
        if self.processes.num_processes > 1:
            device = self.processes.device
            self.counts = self.counts.add_up(device)
            work = gather(work.to(device)).cpu()
        if self.counts.num_images == 0:
            raise UserError(f"the dataset {self.dataset.name} holds no images: choose another --dataset or --split")
        seconds = work[:, 1].max().item()
        return {
            "model": self.name,
            "model_revision": self.commit,
            "dataset": self.dataset.name,
            "dataset_id": self.dataset.hub_id,
            "dataset_config": self.dataset.config,
            "dataset_split": self.dataset.split,
            "dataset_revision": self.dataset.revision,
            **self.counts.summarize(),
            "images_per_second": work[:, 0].sum().item() / seconds if seconds > 0 else None,
            "processes": self.processes.num_processes,
            "batch_size": self.batch_size,
            "device": str(self.processes.device),
            "dtype": self.dtype,
            "torch": torch.__version__,
            **self.summarize_confusion(),
        }

    def discard_progress(self) -> None:
        """Delete the saved counts. Call it on all processes when the results are safe."""
        self.processes.wait_for_everyone()
        if self.progress_file is not None:
            self.progress_file.unlink(missing_ok=True)

    def summarize_confusion(self) -> dict:
        """Returns the most frequent confusions, and the classes with the lowest accuracy."""
        confusion = self.counts.confusion
        wrong = confusion - confusion.diag().diag()
        counts, cells = wrong.flatten().topk(min(NUM_SHOWN, wrong.numel()))
        totals = confusion.sum(dim=1)
        accuracies = torch.where(totals > 0, confusion.diag() / totals, torch.inf)
        accuracies, classes = accuracies.topk(min(NUM_SHOWN, len(totals)), largest=False)
        return {
            "most_confused": [
                {
                    "label": self.id2label[cell // len(totals)],
                    "predicted": self.id2label[cell % len(totals)],
                    "images": count,
                }
                for count, cell in zip(counts.tolist(), cells.tolist(), strict=True)
                if count > 0
            ],
            "worst_classes": [
                {"label": self.id2label[index], "accuracy": accuracy, "images": int(totals[index])}
                for accuracy, index in zip(accuracies.tolist(), classes.tolist(), strict=True)
                if totals[index] > 0
            ],
        }
