"""`evmamba evaluate`: measure the accuracy of a classifier on a dataset, in one process or several.

Every process evaluates a share of the images, each image once. The processes add up their counts, so no batch is
padded. A process saves its counts to a file while it works, and an interrupted evaluation resumes from this file.
"""

import json
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import reduce
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from transformers import BitImageProcessorPil

# the name in `transformers` itself is a placeholder that raises if torchvision is missing (5.17)
from transformers.models.auto.image_processing_auto import AutoImageProcessor

import modeling_evmamba  # noqa: F401, registers the model with the Auto classes
from evmamba_hub.errors import Notice, ProcessNotice, UserError, require
from evmamba_hub.files import write_atomic
from evmamba_hub.images.labeled_images import IndexedImages, LabeledImage, LabeledImages, Share
from evmamba_hub.inference.channels import find_color_mode, fit_image_processor
from evmamba_hub.inference.labels import GUESSES, LabelMatcher, describe_ways
from evmamba_hub.inference.loading import check_execution, load_network, translate_loading_errors
from evmamba_hub.info import choose_device
from evmamba_hub.model_folder import check_is_classifier


SAVE_INTERVAL = 10  # seconds between two saves of the counts
MAX_PARTS = 1000  # of counts, before they are merged
NUM_SHOWN = 10  # confusions and classes in the summary


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


class Part(NamedTuple):
    """The counts over a part of the images. They are sparse: most pairs of classes are never confused."""

    pairs: torch.Tensor  # (pairs,) int64: label * classes + prediction
    images: torch.Tensor  # (pairs,) int64: the number of images of each pair
    sums: torch.Tensor  # (2,) float64: the sum of the losses, the number of images with the label in the top 5
    unreadable: torch.Tensor  # () int64: the number of skipped images


@dataclass
class Counts:
    """The counts over the evaluated images.

    A batch is a part, and one call appends it. So Ctrl-C never leaves a batch counted in part.
    """

    num_classes: int
    parts: list[Part]

    @classmethod
    def start(cls, num_classes: int) -> "Counts":
        none = torch.empty(0, dtype=torch.int64)
        return cls(num_classes, [Part(none, none, torch.zeros(2, dtype=torch.float64), torch.tensor(0))])

    def merge(self) -> Part:
        """Merge the parts into one, in which each pair occurs once. Return it."""
        pairs, places = torch.cat([part.pairs for part in self.parts]).unique(return_inverse=True)
        images = torch.zeros_like(pairs).index_add(0, places, torch.cat([part.images for part in self.parts]))
        # from left to right, so that the sum of losses does not depend on earlier merges
        sums = reduce(torch.add, [part.sums for part in self.parts])
        unreadable = torch.stack([part.unreadable for part in self.parts]).sum()
        self.parts = [Part(pairs, images, sums, unreadable)]
        return self.parts[0]

    @property
    def confusion(self) -> torch.Tensor:
        """The confusion matrix as its entries (pairs, 3) int64: label, prediction, number of images above 0."""
        pairs, images, *_ = self.merge()
        return torch.stack([pairs // self.num_classes, pairs % self.num_classes, images], dim=1)

    @property
    def num_images(self) -> int:
        return int(self.merge().images.sum())

    @property
    def num_unreadable(self) -> int:
        return int(self.merge().unreadable)

    def add(self, logits: torch.Tensor, labels: torch.Tensor, num_unreadable: int = 0) -> None:
        """Count a batch: logits (B, classes), labels (B,), and the number of images beside them that were skipped."""
        logits, labels = logits.cpu().double(), labels.cpu()
        top5 = logits.topk(min(5, self.num_classes), dim=-1).indices
        sums = torch.stack([F.cross_entropy(logits, labels, reduction="sum"), (top5 == labels[:, None]).sum()])
        pairs = labels * self.num_classes + top5[:, 0]
        self.parts.append(Part(pairs, torch.ones_like(labels), sums, torch.tensor(num_unreadable)))
        if len(self.parts) > MAX_PARTS:
            self.merge()

    def add_up(self) -> "Counts":
        """Return the sum of the counts of all processes. Call it on all processes."""
        from accelerate.utils import gather_object

        return Counts(self.num_classes, gather_object([self.merge()]))

    def summarize(self) -> dict[str, int | float]:
        """Return the number of images, top-1 and top-5 accuracy, and the mean loss. There must be an image.

        Up to five classes have no top-5 accuracy, which would always be 1.
        """
        labels, predictions, images = self.confusion.unbind(dim=1)
        loss, num_right_in_five = self.merge().sums.tolist()
        num_images = self.num_images
        return {
            "images": num_images,
            "top1": int(images[labels == predictions].sum()) / num_images,
            **({"top5": num_right_in_five / num_images} if self.num_classes > 5 else {}),
            "loss": loss / num_images,
        }

    def summarize_confusion(self, id2label: dict[int, str]) -> dict[str, list[dict]]:
        """Return the most frequent confusions, and the classes with the lowest accuracy among those with errors."""
        confusion = self.confusion
        labels, predictions, images = confusion.unbind(dim=1)
        is_right = labels == predictions
        totals = torch.bincount(labels, images, minlength=self.num_classes)  # (classes,)
        rights = torch.bincount(labels[is_right], images[is_right], minlength=self.num_classes)
        accuracies = rights / totals  # NaN without images, which is not below 1 and sorts last
        worst = accuracies.argsort(stable=True)[: (accuracies < 1).sum()][:NUM_SHOWN]
        confusions = confusion[~is_right]
        confusions = confusions[confusions[:, 2].argsort(descending=True, stable=True)][:NUM_SHOWN]
        return {
            "most_confused": [
                {"label": id2label[label], "predicted": id2label[prediction], "images": num_images}
                for label, prediction, num_images in confusions.tolist()
            ],
            "worst_classes": [
                {"label": id2label[idx], "accuracy": accuracies[idx].item(), "images": int(totals[idx])}
                for idx in worst.tolist()
            ],
        }


def computes_on_cpu() -> bool:
    """Return whether accelerate must use CPUs. Without this setting, CPU processes would not find each other."""
    from accelerate.utils import parse_flag_from_env

    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def join_processes(device: str = "auto"):
    """Return accelerate's `PartialState` of this process, which may be the only one.

    Args:
        device: A device of PyTorch, or "auto" to let accelerate choose one for each process.

    Raises:
        UserError: If accelerate is not installed or does not support the launch, or the device cannot be used.
    """
    require("accelerate", extra="evaluate")
    from accelerate import PartialState

    cpu = computes_on_cpu() if device == "auto" else choose_device(device).type == "cpu"
    try:
        return PartialState(cpu=cpu)
    except (ValueError, ImportError) as error:
        raise UserError(f"accelerate cannot join the processes of this run: {error}") from error


def choose_process_device(processes, device: str) -> torch.device:
    """Return the device of this process.

    Args:
        processes: The result of `join_processes`.
        device: The device that `join_processes` got.

    Raises:
        UserError: If several processes would compute on one accelerator.
    """
    if device == "auto" or torch.device(device) == torch.device(processes.device.type):
        return processes.device
    if processes.num_processes > 1:
        raise UserError(
            f"{processes.num_processes} processes cannot share the device {device!r}: leave --device out, and "
            "accelerate gives each process a device"
        )
    return torch.device(device)


class Batch(NamedTuple):
    pixel_values: torch.Tensor  # (B, C, H, W), or (0,) if all images are unreadable
    labels: torch.Tensor  # (B,)
    num_unreadable: int  # the images that were skipped

    @property
    def num_images(self) -> int:
        return len(self.labels) + self.num_unreadable


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
        device: str,
        dtype: str,
        optimize: bool,
        workers: int,
        label_map: dict[str, str],
        on_unreadable: Literal["skip", "stop"],
        progress_file: Path | None,
    ):
        """Load the model, and the counts of an interrupted evaluation.

        A `Notice` says so if the labels match by a guess or the network cannot be optimized, and names each image that
        is skipped.

        Args:
            processes: The result of `join_processes`.
            model: Directory or Hub id, for the results.
            folder: The directory of the model and its image processor.
            dataset: The dataset to evaluate on.
            batch_size: The number of images in a batch of one process.
            device: The device that `join_processes` got.
            dtype: "float32", "bfloat16", "float16" or, in optimized copies only, "int8".
            optimize: Whether to optimize the network on CPUs.
            workers: The number of threads in each process that read and resize images.
            label_map: The model's label by the dataset's name, as for `LabelMatcher`.
            on_unreadable: Whether to skip unreadable images, or to stop at the first one.
            progress_file: The file for the counts, to which the index of the process is appended.

        Raises:
            UserError: If the model is not an image classifier, the dataset is empty, or the labels do not match. Also
                if the device, backend or dtype cannot be used.
        """
        if dataset.num_images == 0:
            raise no_images(dataset)
        self.processes, self.name = processes, model
        # the directory of a download has the name of its commit
        self.commit = None if Path(model).is_dir() else folder.name
        self.device = choose_process_device(processes, device)
        check_execution(self.device, dtype, optimize)
        check_is_classifier(folder, model)
        self.model, self.execution = load_network(folder, model, self.device, dtype, optimize)
        with translate_loading_errors(model):
            # the same pixels with and without torchvision
            image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        self.preprocess = Preprocessor(image_processor, find_color_mode(self.model.config))
        self.dataset, self.batch_size, self.workers = dataset, batch_size, workers
        self.on_unreadable = on_unreadable
        self.id2label = self.model.config.id2label
        self.matcher = LabelMatcher(self.id2label, label_map)
        labels = find_labels(dataset)
        self.indices = dict(zip(labels, self.matcher.match(list(labels.values())), strict=True)) if labels else {}
        if not GUESSES.isdisjoint(self.matcher.ways):
            notice = f"the labels match {describe_ways(self.matcher.ways)}: check that this is right"
            warnings.warn(notice, Notice, stacklevel=2)

        self.share = Share(self.processes.process_index, self.processes.num_processes)
        self.progress_file = progress_file and progress_file.with_name(
            f"{progress_file.name}.progress-{self.share.process_index}-of-{self.share.num_processes}"
        )
        files = [path for path in sorted(folder.iterdir()) if path.suffix in (".json", ".safetensors")]
        weights = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        parts = [dataset.name, dataset.num_images, dataset.revision, dataset.config, dataset.split]
        # an evaluation resumes only if these are the same
        self.settings = json.dumps(
            [str(folder.resolve()), weights, *parts, dtype, self.execution.optimized, label_map]
        )
        self.counts = self.load_progress() or Counts.start(self.model.config.num_labels)
        self.num_resumed, self.seconds = self.num_done, 0.0

    @property
    def num_images(self) -> int | None:
        """The number of images of this process, or None if it is unknown."""
        return None if self.dataset.num_images is None else len(self.share.indices(self.dataset.num_images))

    @property
    def num_done(self) -> int:
        """The number of images of this process that were counted or skipped."""
        return self.counts.num_images + self.counts.num_unreadable

    def load_progress(self) -> Counts | None:
        if self.progress_file is None:
            return None
        try:
            with safe_open(self.progress_file, framework="pt") as file:
                if file.metadata()["settings"] != self.settings:
                    return None
                part = Part(*map(file.get_tensor, Part._fields))
                return Counts(self.model.config.num_labels, [part])
        except (OSError, SafetensorError):  # the file is missing or damaged
            return None

    def save_progress(self) -> None:
        if self.progress_file is not None:
            part = self.counts.merge()._asdict()
            write_atomic(self.progress_file, save(part, metadata={"settings": self.settings}))

    def find_index(self, image: LabeledImage) -> int:
        """Return the model's index of an image's label."""
        label = image.label
        if (name := to_name(label)) is None or (label not in self.indices and self.dataset.class_names is not None):
            num_known = len(self.dataset.class_names or self.id2label)
            raise UserError(f"{image.name} has the label {label}, which must be from 0 to {num_known - 1}")
        if label not in self.indices:
            self.indices[label] = self.matcher.match_one(name)
        return self.indices[label]

    def load_batches(self) -> Iterator[Batch]:
        """Yield the batches of the remaining images. Threads prepare the next batch."""
        images = islice(self.dataset.read(self.share), self.num_resumed, None)
        with ThreadPoolExecutor(self.workers) as pool:

            def start() -> list[tuple[Future, int]]:
                batch = list(islice(images, self.batch_size))
                return [(pool.submit(self.preprocess, image), self.find_index(image)) for image in batch]

            batch = start()
            while batch:
                following = start()
                yield self.collect(batch)
                batch = following

    def collect(self, prepared: list[tuple[Future, int]]) -> Batch:
        """Return a batch of prepared images with the model's indices of their labels."""
        pixel_values, labels = [], []
        for future, index in prepared:
            try:
                pixel_values.append(future.result())
            except UserError as error:
                if self.on_unreadable == "stop":
                    raise UserError(f"{error}: replace the image, or skip it with --on-unreadable skip") from error
                warnings.warn(f"skipped {error}", ProcessNotice, stacklevel=2)
            else:
                labels.append(index)
        if len({image.shape for image in pixel_values}) > 1:
            raise UserError("the model's image processor keeps images of different sizes: use --batch-size 1")
        images = torch.stack(pixel_values) if pixel_values else torch.empty(0)
        return Batch(images, torch.tensor(labels, dtype=torch.int64), len(prepared) - len(labels))

    def compute_logits(self, pixel_values: torch.Tensor) -> torch.Tensor:  # (B, classes)
        if len(pixel_values) == 0:
            return torch.empty(0, self.counts.num_classes)
        return self.model(pixel_values.to(self.device, self.model.dtype)).logits

    @torch.inference_mode()
    def run(self) -> Iterator[int]:
        """Evaluate, and yield the number of images of each batch. An interruption saves the counts.

        Raises:
            UserError: If an image or a label is invalid, or the counts cannot be saved. Unreadable images are errors
                if `on_unreadable` is "stop".
        """
        self.save_progress()  # find an unwritable disk before the work
        begin, saved = None, time.monotonic()
        try:
            for batch in self.load_batches():
                if begin is None and len(batch.labels):
                    self.compute_logits(batch.pixel_values)  # warm-up: the first call compiles kernels
                    begin = time.monotonic()
                self.counts.add(self.compute_logits(batch.pixel_values), batch.labels, batch.num_unreadable)
                if time.monotonic() - saved > SAVE_INTERVAL:
                    self.save_progress()
                    saved = time.monotonic()
                yield batch.num_images
        finally:
            self.seconds = 0.0 if begin is None else time.monotonic() - begin
            with suppress(UserError):  # a full disk must hide neither the results nor another error
                self.save_progress()

    def finish(self) -> dict:
        """Return the results of all processes. Call it on all processes.

        Raises:
            UserError: If the dataset holds no images, or none that can be read.
        """
        from accelerate.utils import gather

        num_new = self.num_done - self.num_resumed
        work = torch.tensor([[num_new, self.seconds]], dtype=torch.float64)
        if self.processes.num_processes > 1:
            self.counts = self.counts.add_up()
            work = gather(work.to(self.processes.device)).cpu()
        if self.counts.num_images == 0:
            self.discard_progress()
            if self.counts.num_unreadable:
                raise UserError(f"none of the {self.counts.num_unreadable} images of {self.dataset.name} can be read")
            raise no_images(self.dataset)
        seconds = work[:, 1].max().item()
        return {
            "model": self.name,
            "model_revision": self.commit,
            "classes": len(self.id2label),
            "dataset": self.dataset.name,
            "dataset_id": self.dataset.hub_id,
            "dataset_config": self.dataset.config,
            "dataset_split": self.dataset.split,
            "dataset_revision": self.dataset.revision,
            "labels_matched": dict(self.matcher.ways),
            **self.counts.summarize(),
            "unreadable": self.counts.num_unreadable,
            "images_per_second": work[:, 0].sum().item() / seconds if seconds > 0 else None,
            "processes": self.processes.num_processes,
            "batch_size": self.batch_size,
            **self.execution.as_json(),
            "torch": torch.__version__,
            **self.counts.summarize_confusion(self.id2label),
        }

    def discard_progress(self) -> None:
        """Delete the saved counts. Call it on all processes when the results are safe."""
        self.processes.wait_for_everyone()
        if self.progress_file is not None:
            self.progress_file.unlink(missing_ok=True)


def no_images(dataset: LabeledImages) -> UserError:
    return UserError(f"the dataset {dataset.name} holds no images: choose another --dataset or --dataset-split")


def find_labels(dataset: LabeledImages) -> dict[int | str, str]:
    """Return the names of a dataset's labels by the labels, or nothing for a stream that does not name them."""
    if dataset.class_names is not None:
        return dict(enumerate(dataset.class_names))
    if not isinstance(dataset, IndexedImages):
        return {}
    names = {label: name for label in dataset.labels if label is not None and (name := to_name(label)) is not None}
    return dict(sorted(names.items(), key=itemgetter(1)))


def to_name(label: int | str | None) -> str | None:
    """Return the name of a label of an image, or None if it is no label: missing, or below 0."""
    if isinstance(label, int) and label >= 0:
        return str(int(label))
    return label if isinstance(label, str) else None
