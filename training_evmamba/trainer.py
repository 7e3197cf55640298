"""The training loop, on every process that accelerate starts."""

import math
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object, set_seed
from huggingface_hub import constants
from torch.distributed.tensor import DTensor

from evmamba_hub.client import fetch_model
from evmamba_hub.errors import UserError, escape_unprintable
from evmamba_hub.files import staged
from evmamba_hub.images.labeled_images import Share
from evmamba_hub.inference.evaluation import Counts, Preprocessor
from evmamba_hub.processes import call_on_main_first, failing_together
from modeling_evmamba import EfficientVMambaForImageClassification
from training_evmamba.augmentation_library import (
    choose_augmentation_library,
    create_augmentation,
    describe_choice,
)
from training_evmamba.callback import TrainingCallback
from training_evmamba.checkpoints import (
    Checkpoints,
    RunProgress,
    TrainingState,
    describe_last_checkpoint,
    gather_averages,
    sync_to_disk,
)
from training_evmamba.data import (
    EMPTY_BATCH,
    MIXING,
    UNREADABLE_LABEL,
    Batch,
    ClassifiedImageReader,
    SampleReader,
    ValidationReader,
    check_batch,
    create_rng,
    create_training_loader,
    create_validation_loader,
    next_batch,
    open_data,
    seed_network,
    translate_dead_worker,
)
from training_evmamba.distributed import create_accelerator, divide_batch, report_unreadable
from training_evmamba.network import (
    complete_recipe,
    create_image_processor,
    create_model,
    enable_gradient_checkpointing,
)
from training_evmamba.optimization import (
    ExponentialMovingAverage,
    count_steps,
    create_optimizer,
    create_schedule,
    freeze,
    set_training_mode,
)
from training_evmamba.recipe import Recipe
from training_evmamba.report import create_card, draw_curves
from training_evmamba.run_folder import RunFolder


class TrainingRun:
    """A training run, from its recipe or its last checkpoint to the model.

    At the end, its directory gets `model/`, which `from_pretrained` loads and `evmamba push` uploads. `notes` holds
    sentences for the user about images and weights.

    Args:
        recipe: Values of the run.
        output_dir: A new or empty directory. With `resume`, it may hold the run.
        resume: Resume from the last checkpoint, if there is one.

    Raises:
        UserError: If recipe, data, machine or directory do not allow the run, here and in `train`. Checkpoints stay.
    """

    def __init__(self, recipe: Recipe, output_dir: Path, *, resume: bool):
        self.folder = RunFolder(output_dir)
        self.accelerator = create_accelerator(recipe, output_dir)
        self.share = Share(self.accelerator.process_index, self.accelerator.num_processes)
        self.callback = TrainingCallback()
        with ExitStack() as lock:
            lock.enter_context(self.folder.locked(self.accelerator.is_main_process))
            self.set_up(recipe, resume)
            self.lock = lock.pop_all()  # until the training ends

    def set_up(self, recipe: Recipe, resume: bool) -> None:
        """Create everything that training needs, and restore the last checkpoint."""
        folder, accelerator = self.folder, self.accelerator
        checkpoint, self.data = call_on_main_first(
            accelerator.is_local_main_process,
            lambda: (None if recipe.model is None else fetch_model(recipe.model), open_data(recipe)),
        )
        saved_recipe = folder.read_recipe(Recipe, resume)
        self.recipe, timm_problem = choose_augmentation_library(complete_recipe(recipe, checkpoint), saved_recipe)
        if saved_recipe is not None:
            folder.check_same_recipe(saved_recipe, self.recipe)
        self.notes = [describe_choice(self.recipe, timm_problem), *self.data.notes]
        self.checkpoints = Checkpoints(folder.checkpoints_dir, self.recipe.keep_checkpoints)

        num_classes = len(self.data.class_names)
        self.transform, self.mix = create_augmentation(self.recipe, num_classes, self.micro_batch_size)
        self.image_processor = create_image_processor(self.recipe)
        set_seed(self.recipe.seed)
        model, notes_on_weights = create_model(self.recipe, checkpoint, self.data.class_names)
        self.prepare(model)
        if saved_recipe is not None and (checkpoints := self.checkpoints.list()):
            self.resume_from(checkpoints[-1])
        else:
            self.notes += notes_on_weights
        accelerator.wait_for_everyone()
        with failing_together():
            if accelerator.is_main_process:
                folder.begin(self.recipe, self.progress.step)
                self.checkpoints.clean_up()
        purge = {"tensorboard": {"purge_step": self.progress.step + 1}} if self.progress.step else {}
        accelerator.init_trackers(
            Path(self.recipe.name or folder.path.resolve()).name,
            {
                name: value if isinstance(value, (int, float)) else escape_unprintable(str(value))
                for name, value in vars(self.recipe).items()
            },
            init_kwargs=purge,
        )

    def prepare(self, model: EfficientVMambaForImageClassification) -> None:
        """Prepare the network with accelerate, and create the training state `self.state`."""
        recipe, accelerator = self.recipe, self.accelerator
        freeze(model, recipe)
        if recipe.gradient_checkpointing:
            enable_gradient_checkpointing(model)
        steps_per_epoch = self.data.images_per_epoch / recipe.batch_size
        self.num_steps = count_steps(recipe, self.data.images_per_epoch)
        # Four warnings do not apply. DDP warns about strides of dimensions of size 1. FSDP warns about views, but
        # nothing changes them in place. The schedule warns about the step that loss scaling wraps. DataLoader warns
        # about more workers than CPUs, but the order of a stream depends on their number.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        warnings.filterwarnings("ignore", ".*optimizer.step.* has been overridden")
        warnings.filterwarnings("ignore", "This DataLoader will create .* worker processes in total")
        try:
            self.model, self.optimizer = accelerator.prepare(model, create_optimizer(model, recipe))
        except ValueError as error:
            raise UserError(
                f"accelerate cannot prepare the network: {error} With FSDP, name the classes of its blocks in "
                "--fsdp_transformer_layer_cls_to_wrap"
            ) from error
        self.state = TrainingState(
            model=self.unwrapped_model,
            ema=ExponentialMovingAverage(self.unwrapped_model, recipe.ema_decay),
            optimizer=self.optimizer.optimizer,
            schedule=create_schedule(self.optimizer.optimizer, recipe, self.num_steps, steps_per_epoch),
            scaler=accelerator.scaler,
            progress=RunProgress(
                images_per_epoch=self.data.images_per_epoch,
                class_names=self.data.class_names,
                num_processes=accelerator.num_processes,
            ),
        )

    @property
    def progress(self) -> RunProgress:
        return self.state.progress

    @property
    def unwrapped_model(self) -> EfficientVMambaForImageClassification:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    @property
    def micro_batch_size(self) -> int:
        """Images of a micro-batch on one process."""
        return divide_batch(self.recipe, self.accelerator.num_processes)

    def resume_from(self, checkpoint: Path) -> None:
        RunProgress.read(checkpoint).check_same_run(self.progress, self.folder.describe_new_run())
        self.checkpoints.load(checkpoint, self.state)

    @property
    def num_images_seen(self) -> int:
        """Images that the run has trained on so far, on all processes."""
        return self.progress.step * self.recipe.batch_size

    def log(self, record: dict[str, float]) -> None:
        """Write a log line with its place in the run. The trackers get the same values."""
        place = self.progress.locate(self.recipe.batch_size)
        finite = {name: value for name, value in record.items() if math.isfinite(value)}  # JSON has no NaN
        try:
            self.accelerator.log(finite, step=self.progress.step)
            if self.accelerator.is_main_process:
                self.folder.append_to_log({**place, **finite})
        except OSError as error:
            raise UserError(
                f"the log in {self.folder.path} cannot be written: {error}. {self.describe_last_checkpoint()}"
            ) from error
        self.callback.on_log(record)

    def describe_last_checkpoint(self) -> str:
        """Return a sentence about the last checkpoint, for error messages."""
        return describe_last_checkpoint(self.checkpoints.list())

    def train(self, callback: TrainingCallback | None = None) -> dict[str, float | int] | None:
        """Train to the end and write the model.

        Args:
            callback: Receives the events of the run, on the main process.

        Returns:
            images of the evaluation, top1, top5 and loss of the model; None without validation images. Up to five
            classes have no top5.
        """
        if callback is not None and self.accelerator.is_main_process:
            self.callback = callback
        with translate_dead_worker(self.describe_last_checkpoint), self.lock:
            results = self.training_loop()
            self.export(results)
            self.accelerator.end_training()
        return results

    def training_loop(self) -> dict[str, float | int] | None:
        """Run the remaining steps with evaluations and checkpoints. Return the last results."""
        recipe = self.recipe
        loader = create_training_loader(
            self.data,
            recipe,
            SampleReader(ClassifiedImageReader(self.data.class_names, self.transform), recipe.seed),
            recipe.batch_size // recipe.gradient_accumulation_steps,
            self.progress.step * recipe.gradient_accumulation_steps,
            self.share,
        )
        batches, results, metrics = iter(loader), None, StepMetrics()
        set_training_mode(self.model, recipe)
        self.callback.on_train_begin(self.progress.step, self.num_steps)
        while self.progress.step < self.num_steps:
            metrics.add(*self.training_step(batches))
            step = self.progress.step
            epoch_ends = self.num_images_seen % self.data.images_per_epoch < recipe.batch_size
            is_last = step == self.num_steps
            saves = epoch_ends or is_last or (recipe.checkpoint_steps and step % recipe.checkpoint_steps == 0)
            if saves or step % recipe.logging_steps == 0:
                self.log_steps(metrics)
                metrics = StepMetrics()
            self.callback.on_step_end(step)
            if saves:
                self.state.ema.broadcast_statistics(self.unwrapped_model)
            if epoch_ends or is_last:
                results = self.evaluate()
                if results is not None:
                    self.progress.top1 = results["top1"]
                    names = {"loss": "validation_loss", "images": "validation_images"}
                    self.log({names.get(name, name): value for name, value in results.items()})
            if saves:
                with failing_together():
                    self.checkpoints.save(self.state, self.accelerator.is_main_process)
                metrics = StepMetrics()  # the time was not spent on training
        return results or self.evaluate()  # a run that was already complete

    def training_step(self, batches: Iterator[Batch]) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        """Run one optimizer step. Return this process's loss, the gradient norm, and the unreadable images."""
        recipe, accelerator = self.recipe, self.accelerator
        step, process = self.progress.step, accelerator.process_index
        # a resumed run draws the same numbers as an uninterrupted one
        seed_network(recipe.seed, step, process)
        losses, norm, unreadable = [], None, []
        for micro_batch in range(recipe.gradient_accumulation_steps):
            batch = check_batch(next_batch(batches), recipe, self.describe_last_checkpoint)
            unreadable += batch.unreadable
            place = (step * recipe.gradient_accumulation_steps + micro_batch, process)
            pixel_values, targets = self.mix(
                batch.pixel_values.to(accelerator.device, non_blocking=True),
                batch.labels.to(accelerator.device, non_blocking=True),
                create_rng(recipe.seed, MIXING, *place),
            )
            with accelerator.accumulate(self.model):
                with accelerator.autocast():  # accelerate enters it only without FSDP
                    logits = self.model(pixel_values).logits.float()
                loss = F.cross_entropy(logits, targets)
                losses.append(loss.detach())
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self.model.parameters(), recipe.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
        self.state.schedule.step()
        self.progress.step, self.progress.top1 = step + 1, None
        self.state.ema.update(self.unwrapped_model, self.progress.step)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        return torch.stack(losses).mean(), norm.detach(), unreadable

    def log_steps(self, metrics: "StepMetrics") -> None:
        """Write a log line about the steps since the last one.

        Raises:
            UserError: If a loss is not finite.
        """
        losses = self.accelerator.reduce(torch.stack(metrics.losses), reduction="mean")
        if not losses.isfinite().all():
            step = self.progress.step - len(losses) + 1 + losses.isfinite().logical_not().nonzero()[0].item()
            raise UserError(
                f"the loss of step {step} is {losses[~losses.isfinite()][0].item()}: lower --learning-rate, or train "
                f"with --mixed-precision no. {self.describe_last_checkpoint()}"
            )
        report_unreadable(metrics.unreadable, self.progress.unreadable, self.callback)
        seconds, norms = time.monotonic() - metrics.start, torch.stack(metrics.norms)
        self.log(
            {
                "loss": losses.mean().item(),
                "learning_rate": self.optimizer.param_groups[-1]["lr"],
                "gradient_norm": norms[norms.isfinite()].mean().item(),  # loss scaling skips the other steps
                "images_per_second": len(losses) * self.recipe.batch_size / seconds,
            }
        )

    @torch.no_grad()
    def evaluate(self) -> dict[str, float | int] | None:
        """Evaluate the averaged weights on the validation images. Each image counts once.

        Returns:
            `images`, `top1`, `top5` and `loss`, or None without validation images. Up to five classes have no `top5`.
        """
        if self.data.validation is None:
            return None
        accelerator, model = self.accelerator, self.unwrapped_model
        counts = Counts.start(len(self.data.class_names))
        read_sample = ValidationReader(self.data.class_names, Preprocessor(self.image_processor))
        loader = create_validation_loader(self.data, self.recipe, read_sample, self.micro_batch_size, self.share)
        batches, unreadable = iter(loader), []
        self.callback.on_evaluate_begin(self.data.validation.num_images)
        with self.state.ema.applied_to(model):
            model.eval()
            # sharded weights need every process, even one that has no images left
            while any(gather_object([(batch := next_batch(batches)) is not None])):
                batch = (
                    EMPTY_BATCH if batch is None else check_batch(batch, self.recipe, self.describe_last_checkpoint)
                )
                size = (3, self.recipe.image_size, self.recipe.image_size)
                pixel_values = batch.pixel_values if len(batch.labels) else torch.zeros(1, *size)
                with accelerator.autocast():
                    logits = model(pixel_values.to(accelerator.device, non_blocking=True)).logits.float()
                readable = batch.labels != UNREADABLE_LABEL
                counts.add(logits[: len(readable)].cpu()[readable], batch.labels[readable])
                unreadable += batch.unreadable
                self.callback.on_evaluate_step(len(readable) * accelerator.num_processes)
        self.callback.on_evaluate_end()
        if accelerator.num_processes > 1:
            counts = counts.add_up()
        set_training_mode(self.model, self.recipe)
        report_unreadable(unreadable, self.progress.unreadable_held_out, self.callback)
        if counts.num_images == 0:
            raise UserError(f"{self.data.validation.name} holds no readable image to evaluate on")
        return counts.summarize()

    def export(self, results: dict[str, float | int] | None) -> None:
        """Save the averaged weights for `from_pretrained`, with image processor and card, and draw the curves."""
        model = self.unwrapped_model
        weights = gather_averages(model, self.state.ema)
        if not self.accelerator.is_main_process:
            return
        with staged(self.folder.model_dir) as folder:
            model.save_pretrained(folder, state_dict=weights)
            self.image_processor.save_pretrained(folder)
            card = create_card(self.recipe, self.progress, model, self.data, results, self.folder.path.resolve().name)
            card.save(folder / constants.REPOCARD_NAME)
            sync_to_disk(folder)
        try:
            measures = {"top1": "top-1", "top5": "top-5"}
            draw_curves(self.folder.read_log(), self.folder.curves_file, "Accuracy", measures)
        except OSError as error:
            raise UserError(f"{self.folder.curves_file} cannot be written: {error}") from error


class StepMetrics:
    """The measurements of steps since the last log line."""

    def __init__(self):
        self.losses: list[torch.Tensor] = []
        self.norms: list[torch.Tensor] = []
        self.unreadable: list[str] = []
        self.start = time.monotonic()

    def add(self, loss: torch.Tensor, norm: torch.Tensor, unreadable: list[str]) -> None:
        self.losses.append(loss)
        self.norms.append(norm)
        self.unreadable += unreadable
