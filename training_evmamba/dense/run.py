"""A training run on a dense task: transformers' Trainer in the directory of a run."""

import math
import os
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub import constants
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.image_processing_utils import BaseImageProcessor
from transformers.trainer_callback import PrinterCallback

from evmamba_hub.client import fetch_model
from evmamba_hub.errors import UserError
from evmamba_hub.files import staged
from evmamba_hub.images.labeled_images import Share
from evmamba_hub.inference.evaluation import computes_on_cpu, join_processes
from evmamba_hub.processes import call_on_main_first, failing_together
from modeling_evmamba import EfficientVMambaBackbone
from training_evmamba.callback import TrainingCallback
from training_evmamba.checkpoints import RunProgress, describe_last_checkpoint, sync_to_disk
from training_evmamba.data import (
    Batch,
    SampleReader,
    TrainingData,
    check_batch,
    create_training_loader,
    create_validation_loader,
    next_batch,
    seed_network,
    translate_dead_worker,
)
from training_evmamba.dense.card import create_card
from training_evmamba.dense.checkpoints import TrainerCheckpoints
from training_evmamba.dense.data import EvaluationReader
from training_evmamba.dense.network import create_backbone, is_dense, load_whole
from training_evmamba.dense.recipe import DenseRecipe
from training_evmamba.distributed import TRACKERS_NAME, check_mixed_precision, divide_batch, report_unreadable
from training_evmamba.network import complete_recipe, enable_gradient_checkpointing, translate_network_errors
from training_evmamba.optimization import count_steps
from training_evmamba.report import draw_curves
from training_evmamba.run_folder import RunFolder


class DenseRun(ABC):
    """A training run, from its recipe or its last checkpoint to the model.

    A program derives its task from this class. At the end, the directory of the run gets `model/`, which a pipeline
    loads. `notes` holds sentences for the user about images and weights.

    Args:
        recipe: Values of the run.
        output_dir: A new or empty directory. With `resume`, it may hold the run.
        resume: Resume from the last checkpoint, if there is one.

    Raises:
        UserError: If recipe, data, machine or directory do not allow the run, here and in `train`. Checkpoints stay.
    """

    task: ClassVar[str]  # on the Hub, which is also that of the pipeline
    measures: ClassVar[dict[str, str]]  # name in the log -> name in curves and card, the most important one first
    num_stages: ClassVar[int | None] = None  # last stages of the backbone that the head takes; None for all

    @abstractmethod
    def open_data(self, recipe: DenseRecipe) -> TrainingData:
        """Open the images and their annotations."""

    @abstractmethod
    def create_image_processor(self) -> BaseImageProcessor:
        """Return the image processor that is saved with the model."""

    @abstractmethod
    def create_model(self, backbone: EfficientVMambaBackbone) -> PreTrainedModel:
        """Return a model with an untrained head. Its backbone gets the weights of the given one."""

    @abstractmethod
    def create_sample_reader(self) -> SampleReader:
        """Return what reads and augments training images. It makes `pixel_values` and `labels` of the model."""

    @abstractmethod
    def create_evaluation_reader(self) -> EvaluationReader:
        """Return what reads images for evaluation, one in a batch."""

    @abstractmethod
    def evaluate_batches(self, batches: Iterator[Batch]) -> dict[str, float]:
        """Return the measures of `measures` on the batches of all processes, and of single classes by other names.

        Call it on all processes. Some may have fewer batches than others.
        """

    @property
    def has_unused_parameters(self) -> bool:
        """Whether some parameters of the model get no gradient. Several processes must know."""
        return False

    def compute_loss(self, outputs: Any, labels: Any) -> torch.Tensor:
        """Return the loss of a batch, from the outputs of the model."""
        return outputs.loss

    def __init__(self, recipe: DenseRecipe, output_dir: Path, *, resume: bool):
        self.folder = RunFolder(output_dir)
        self.processes = join_processes()
        self.share = Share(self.processes.process_index, self.processes.num_processes)
        self.callback = TrainingCallback()
        with ExitStack() as lock:
            lock.enter_context(self.folder.locked(self.processes.is_main_process))
            self.set_up(recipe, resume)
            self.lock = lock.pop_all()  # until the training ends

    def set_up(self, recipe: DenseRecipe, resume: bool) -> None:
        """Create everything that training needs, and find the last checkpoint."""
        folder = self.folder
        check_mixed_precision(recipe, self.processes.device)
        self.micro_batch_size = divide_batch(recipe, self.processes.num_processes)
        checkpoint, self.data = call_on_main_first(
            self.processes.is_local_main_process,
            lambda: (None if recipe.model is None else fetch_model(recipe.model), self.open_data(recipe)),
        )
        saved_recipe = folder.read_recipe(type(recipe), resume)
        self.recipe = complete_recipe(recipe, checkpoint)
        if saved_recipe is not None:
            folder.check_same_recipe(saved_recipe, self.recipe)
        self.notes = list(self.data.notes)
        self.checkpoints = TrainerCheckpoints(folder.checkpoints_dir, self.recipe.keep_checkpoints)
        self.progress = RunProgress(
            images_per_epoch=self.data.images_per_epoch,
            class_names=self.data.class_names,
            num_processes=self.processes.num_processes,
        )
        self.results: dict[str, float | int] | None = None  # of the last evaluation
        self.last_checkpoint: Path | None = None
        if saved_recipe is not None and (checkpoints := self.checkpoints.list()):
            self.last_checkpoint = checkpoints[-1]
            saved = RunProgress.read(self.last_checkpoint)
            saved.check_same_run(self.progress, folder.describe_new_run())
            self.progress = saved

        self.new_unreadable: list[str] = []  # since the last log line
        self.num_steps = self.recipe.steps or count_steps(self.recipe, self.data.images_per_epoch)
        self.image_processor = self.create_image_processor()
        set_seed(self.recipe.seed)
        backbone = create_backbone(self.recipe, checkpoint, self.num_stages)
        with translate_network_errors():
            self.model = self.create_model(backbone)
        backbone = load_backbone(self.model, backbone)
        if checkpoint is not None and is_dense(checkpoint):
            self.notes += load_whole(self.model, checkpoint)
        if self.recipe.gradient_checkpointing:
            enable_gradient_checkpointing(backbone)
        with failing_together():
            if self.processes.is_main_process:
                folder.begin(self.recipe, self.progress.step)
                self.checkpoints.clean_up()
        self.trainer = create_trainer(self)

    @property
    def accelerator(self):
        return self.trainer.accelerator

    def describe_last_checkpoint(self) -> str:
        """Return a sentence about the last checkpoint, for error messages."""
        return describe_last_checkpoint(self.checkpoints.list())

    def train(self, callback: TrainingCallback | None = None) -> dict[str, float | int] | None:
        """Train to the end and write the model.

        Args:
            callback: Receives the events of the run, on the main process.

        Returns:
            `images` of the evaluation and the measures of the model. None without validation images.
        """
        if callback is not None and self.processes.is_main_process:
            self.callback = callback
        with translate_dead_worker(self.describe_last_checkpoint), self.lock:
            if self.progress.step < self.num_steps:
                self.train_to_end()
            else:
                load_whole(self.model, self.last_checkpoint)
            results = self.results or self.evaluate()  # a run that was already complete
            self.export(results)
            self.accelerator.end_training()
        return results

    def train_to_end(self) -> None:
        """Run the remaining steps with evaluations and checkpoints."""
        try:
            self.trainer.train(resume_from_checkpoint=self.last_checkpoint and str(self.last_checkpoint))
        except OSError as error:
            raise UserError(
                f"{self.folder.path} cannot be written: {error}. {self.describe_last_checkpoint()}"
            ) from error

    def read_training_batches(self) -> Iterator[dict[str, Any]]:
        """Yield the endless batches of this process, from the step of the run on.

        The place of a batch in the run determines PyTorch's random numbers, which stochastic depth and the noisy boxes
        of detectors take. So a resumed run repeats them.
        """
        accumulated = self.recipe.gradient_accumulation_steps
        loader = create_training_loader(
            self.data,
            self.recipe,
            self.create_sample_reader(),
            self.recipe.batch_size // accumulated,
            self.progress.step * accumulated,
            self.share,
        )
        batches = iter(loader)
        for place in count(self.progress.step * accumulated):
            batch = check_batch(next_batch(batches), self.recipe, self.describe_last_checkpoint)
            self.new_unreadable += batch.unreadable
            seed_network(self.recipe.seed, place, self.processes.process_index)
            yield {"pixel_values": batch.pixel_values, "labels": batch.labels}

    def read_validation_batches(self, unreadable: list[str]) -> Iterator[Batch]:
        """Yield the batches of one validation image of this process. Unreadable images are left out.

        Args:
            unreadable: Gets the names of unreadable images.
        """
        loader = create_validation_loader(self.data, self.recipe, self.create_evaluation_reader(), 1, self.share)
        batches = iter(loader)
        while (batch := next_batch(batches)) is not None:
            batch = check_batch(batch, self.recipe, self.describe_last_checkpoint)
            unreadable += batch.unreadable
            if len(batch.labels):
                yield batch
            self.callback.on_evaluate_step(self.processes.num_processes)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float | int] | None:
        """Evaluate the model on the validation images. Each image counts once.

        Returns:
            `images` and the measures, or None without validation images.

        Raises:
            UserError: If an image stops the run, on any process.
        """
        if self.data.validation is None:
            return None
        self.callback.on_evaluate_begin(self.data.validation.num_images)
        self.model.eval()
        unreadable: list[str] = []
        num_images = 0

        def counted_batches() -> Iterator[Batch]:
            nonlocal num_images
            for batch in self.read_validation_batches(unreadable):
                num_images += 1
                yield batch

        with self.trainer.compute_loss_context_manager():
            measures = self.evaluate_batches(counted_batches())
        self.callback.on_evaluate_end()
        report_unreadable(unreadable, self.progress.unreadable_held_out, self.callback)
        num_images = int(self.accelerator.reduce(torch.tensor(num_images, device=self.accelerator.device)).item())
        if num_images == 0:
            raise UserError(f"{self.data.validation.name} holds no readable image to evaluate on")
        self.model.train()
        return {"images": num_images, **measures}

    def log(self, record: dict[str, float]) -> None:
        """Write a log line with its place in the run."""
        place = self.progress.locate(self.recipe.batch_size)
        finite = {name: value for name, value in record.items() if math.isfinite(value)}  # JSON has no NaN
        if self.processes.is_main_process:
            self.folder.append_to_log({**place, **finite})
        self.callback.on_log(record)

    def log_steps(self, logs: dict[str, float]) -> None:
        """Write a log line about the steps since the last one.

        Raises:
            UserError: If the loss is not finite.
        """
        if not math.isfinite(logs["loss"]):
            raise UserError(
                f"the loss of step {self.progress.step} is {logs['loss']}: lower --learning-rate, or train with "
                f"--mixed-precision no. {self.describe_last_checkpoint()}"
            )
        report_unreadable(self.new_unreadable, self.progress.unreadable, self.callback)
        self.new_unreadable = []
        seconds, num_steps = time.monotonic() - self.log_start, self.progress.step - self.logged_step
        self.log(
            {
                "loss": logs["loss"],
                "learning_rate": logs["learning_rate"],
                "gradient_norm": logs["grad_norm"],
                "images_per_second": num_steps * self.recipe.batch_size / seconds,
            }
        )
        self.start_clock()

    def start_clock(self) -> None:
        """Start to measure the time of the next steps."""
        self.log_start, self.logged_step = time.monotonic(), self.progress.step

    def export(self, results: dict[str, float | int] | None) -> None:
        """Save the model for `from_pretrained`, with image processor and card, and draw the curves."""
        if not self.processes.is_main_process:
            return
        with staged(self.folder.model_dir) as folder:
            self.model.save_pretrained(folder)
            self.image_processor.save_pretrained(folder)
            name = self.folder.path.resolve().name
            card = create_card(
                self.recipe, self.progress, self.model, self.data, results, self.task, self.measures, name
            )
            card.save(folder / constants.REPOCARD_NAME)
            sync_to_disk(folder)
        try:
            draw_curves(self.folder.read_log(), self.folder.curves_file, "Measures", self.measures)
        except OSError as error:
            raise UserError(f"{self.folder.curves_file} cannot be written: {error}") from error


def load_backbone(model: PreTrainedModel, backbone: EfficientVMambaBackbone) -> EfficientVMambaBackbone:
    """Load the weights of a backbone into that of a model, wherever it is in the model, and return the latter.

    Its batch norms may be frozen ones, which have the same weights.
    """
    for module in model.modules():
        if isinstance(module, EfficientVMambaBackbone):
            module.load_state_dict(backbone.state_dict())
            return module
    raise ValueError(f"{type(model).__name__} has no EfficientVMamba backbone")


class RunTrainer(Trainer):
    """transformers' Trainer with the images, the loss and the evaluation of a run."""

    def __init__(self, run: DenseRun, **arguments: Any):
        self.run = run
        super().__init__(**arguments)
        # the losses of the heads are means over a micro-batch, although their `forward` takes any keyword
        self.model_accepts_loss_kwargs = False

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """Load the weights of a checkpoint.

        The Trainer's own method does not convert names, as `save_pretrained` does for detectors. It leaves weights
        with other names fresh, with a warning.
        """
        load_whole(self.run.model, Path(resume_from_checkpoint))

    def get_train_dataloader(self) -> "TrainingBatches":
        return TrainingBatches(self.run)

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Return the names of parameters with weight decay: all but biases, norms, `A_log` and `D`."""
        exempt = ("bias", "A_log", "D")
        return [
            name
            for name, parameter in model.named_parameters()
            if parameter.ndim > 1 and name.rpartition(".")[2] not in exempt
        ]

    def compute_loss(self, model: torch.nn.Module, inputs: dict, return_outputs: bool = False, **_: Any) -> Any:
        outputs = model(**inputs)
        loss = self.run.compute_loss(outputs, inputs["labels"])
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        results = self.run.results = self.run.evaluate()
        names = {"images": "validation_images"}
        record = {names.get(name, name): value for name, value in results.items()}
        self.run.log(record)
        metrics = {f"eval_{name}": value for name, value in record.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.run.start_clock()
        return record


class TrainingBatches:
    """The batches of a run, as the Trainer iterates over them. Their number is not known."""

    def __init__(self, run: DenseRun):
        self.run = run

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.run.read_training_batches()


class Events(TrainerCallback):
    """Hand the events of the Trainer to the run."""

    def __init__(self, run: DenseRun):
        self.run = run

    def on_train_begin(self, args, state, control, **_):
        self.run.start_clock()
        self.run.callback.on_train_begin(state.global_step, state.max_steps)

    def on_step_end(self, args, state, control, **_):
        self.run.progress.step = state.global_step
        self.run.callback.on_step_end(state.global_step)
        if state.global_step == state.max_steps:
            control.should_save, control.should_evaluate = True, self.run.data.validation is not None
        control.should_log |= control.should_save or control.should_evaluate

    def on_log(self, args, state, control, logs, **_):
        if "loss" in logs:  # other records are of evaluations
            self.run.log_steps(logs)

    def on_save(self, args, state, control, **_):
        with failing_together():
            if state.is_world_process_zero:
                self.run.checkpoints.finish(self.run.progress)
        self.run.start_clock()


def create_trainer(run: DenseRun) -> RunTrainer:
    """Return the Trainer of a run.

    Raises:
        UserError: If the machine or the Trainer does not support the recipe.
    """
    recipe = run.recipe
    steps_per_epoch = max(1, round(run.data.images_per_epoch / recipe.batch_size))
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(run.folder.path / TRACKERS_NAME)
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    try:
        arguments = TrainingArguments(
            output_dir=str(run.folder.checkpoints_dir),
            max_steps=run.num_steps,
            per_device_train_batch_size=run.micro_batch_size,
            gradient_accumulation_steps=recipe.gradient_accumulation_steps,
            learning_rate=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            adam_beta1=recipe.adam_beta1,
            adam_beta2=recipe.adam_beta2,
            max_grad_norm=recipe.max_grad_norm,
            lr_scheduler_type=recipe.schedule,
            warmup_steps=recipe.warmup_fraction,
            bf16=recipe.mixed_precision == "bf16",
            fp16=recipe.mixed_precision == "fp16",
            logging_steps=recipe.logging_steps,
            logging_nan_inf_filter=False,
            eval_strategy="no" if run.data.validation is None else "steps",
            eval_steps=recipe.evaluation_steps or steps_per_epoch,
            save_steps=recipe.checkpoint_steps or steps_per_epoch,
            ignore_data_skip=True,  # the batches begin at the step of the run
            remove_unused_columns=False,
            ddp_find_unused_parameters=run.has_unused_parameters,
            disable_tqdm=True,
            report_to=recipe.report_to or "none",
            run_name=Path(recipe.name or run.folder.path.resolve()).name,
            seed=recipe.seed,
            use_cpu=computes_on_cpu(),
        )
        trainer = RunTrainer(
            run,
            model=run.model,
            args=arguments,
            train_dataset=Dataset(),
            eval_dataset=Dataset(),
            processing_class=run.image_processor,
            callbacks=[Events(run)],
        )
    except (ValueError, ImportError, RuntimeError) as error:
        raise UserError(f"transformers' Trainer does not support the recipe: {error}") from error
    trainer.remove_callback(PrinterCallback)
    return trainer
