"""The training loop, on as many processes as accelerate started."""

import json
import math
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator, DistributedType
from accelerate.utils import (
    GradientAccumulationPlugin,
    ProjectConfiguration,
    gather_object,
    parse_flag_from_env,
    set_seed,
)
from filelock import FileLock, Timeout
from huggingface_hub import constants
from rich.console import Console
from rich.markup import escape
from rich.progress import MofNCompleteColumn, Progress, TextColumn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers.utils import logging

from evmamba_hub.client import fetch_model
from evmamba_hub.errors import UserError
from evmamba_hub.files import partial_name, write_atomic
from evmamba_hub.inference.evaluation import Counts, Preprocessor
from modeling_evmamba import EfficientVMambaForImageClassification
from training_evmamba.augmentation_library import choose_library, create_augmentation, describe_library
from training_evmamba.checkpoints import Checkpoints, RunProgress, copy_averages, whole_folder
from training_evmamba.data import (
    MIXING,
    NO_IMAGE,
    STOCHASTIC_DEPTH,
    UNREADABLE,
    Batch,
    create_rng,
    create_training_loader,
    create_validation_loader,
    open_data,
)
from training_evmamba.network import complete_recipe, create_image_processor, create_model, statistics_kept
from training_evmamba.optimization import (
    ExponentialMovingAverage,
    create_optimizer,
    create_schedule,
    freeze,
    set_training_mode,
)
from training_evmamba.recipe import Recipe, create_recipe, dump_recipe, find_changes, read_values
from training_evmamba.report import create_card, draw_curves


RECIPE_NAME = "recipe.yaml"
LOG_NAME = "log.jsonl"
CURVES_NAME = "training_curves.png"
TRACKERS_NAME = "trackers"
CHECKPOINTS_NAME = "checkpoints"
MODEL_NAME = "model"
LOCK_NAME = ".lock"

LOADER_DIED = "DataLoader worker"  # how PyTorch's messages begin


def create_accelerator(recipe: Recipe, output_dir: Path) -> Accelerator:
    """This process among those that accelerate started.

    Raises:
        UserError: where the machine lacks what the recipe asks for.
    """
    # processes on CPUs only find each other when they are told that they compute there
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    try:
        accelerator = Accelerator(
            cpu=on_cpu,
            mixed_precision=recipe.mixed_precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=recipe.gradient_accumulation_steps),
            dynamo_backend="inductor" if recipe.compile else "no",
            log_with=recipe.report_to or None,
            project_config=ProjectConfiguration(str(output_dir), logging_dir=str(output_dir / TRACKERS_NAME)),
        )
    except (ValueError, ImportError) as error:
        raise UserError(f"accelerate cannot do what the recipe asks for: {error}") from error
    if recipe.mixed_precision == "fp16" and accelerator.device.type == "cpu":  # accelerate would go on in float32
        raise UserError("mixed precision with float16 needs a GPU: use --mixed-precision bf16 or no")
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        set_up_fsdp(accelerator, recipe)
    if len(accelerator.log_with) < len(recipe.report_to):
        raise UserError(
            f"not all trackers of {', '.join(recipe.report_to)} are installed: install them, or use --report-to none"
        )
    pieces = accelerator.num_processes * recipe.gradient_accumulation_steps
    if recipe.batch_size % pieces:
        raise UserError(
            f"`batch_size` {recipe.batch_size} cannot be divided among {accelerator.num_processes} processes with "
            f"{recipe.gradient_accumulation_steps} pieces each: make it a multiple of {pieces}"
        )
    return accelerator


def set_up_fsdp(accelerator: Accelerator, recipe: Recipe) -> None:
    """Lets FSDP compute in the number formats that there are without it.

    Raises:
        UserError: for settings of accelerate that would fail later, or be left out.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        raise UserError("accelerate has FSDP for GPUs alone, and would leave it out here: start it without --use_fsdp")
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise UserError("of FSDP, version 2 is needed: give accelerate --fsdp_version 2")
    if plugin.cpu_ram_efficient_loading:  # https://github.com/huggingface/accelerate/issues/3898
        raise UserError(
            "accelerate cannot load the statistics of batch norms on one process alone: give it "
            "--fsdp_cpu_ram_efficient_loading false"
        )
    if recipe.compile:  # it would hide the hooks that gather the outermost weights from the evaluation
        raise UserError("a network that is compiled cannot be spread by FSDP: use one of --compile and --use_fsdp")
    # accelerate's policy would cast all weights, also of batch norms and scans; autocast chooses by operation
    plugin.mixed_precision_policy = MixedPrecisionPolicy()


@contextmanager
def only_run(output_dir: Path, accelerator: Accelerator) -> Iterator[None]:
    """Keeps other runs out of the output folder. The system takes the lock back from a process that is killed.

    To be called by all processes of a run, of which the main one holds the lock.

    Raises:
        UserError: in all processes, where another run has the folder or it cannot be written.
    """
    if output_dir.is_file():
        raise UserError(f"{output_dir} is a file, --output-dir is the folder of the run")
    path = output_dir / LOCK_NAME
    lock, is_new, problem = FileLock(path, timeout=0), not output_dir.exists(), None
    if accelerator.is_main_process:
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            problem = f"another run writes to {output_dir}: wait for its end, or choose another --output-dir"
        except OSError as error:
            problem = f"{output_dir} cannot be written: {error}"
    if problem := next(filter(None, gather_object([problem])), None):
        raise UserError(problem)
    try:
        yield
    finally:
        if accelerator.is_main_process:
            with suppress(OSError):  # of Windows, where releasing removes it
                path.unlink()
            lock.release()
            if is_new:
                with suppress(OSError):  # of a folder that the run has written to
                    output_dir.rmdir()


def read_saved_recipe(output_dir: Path, resume: bool) -> Recipe | None:
    """The recipe of the run that the folder holds; None where the run begins.

    Raises:
        UserError: where the folder holds something else, or a run that is not to go on.
    """
    path = output_dir / RECIPE_NAME
    if not path.is_file():
        written = {each.name for each in output_dir.iterdir()} if output_dir.exists() else set()
        if written - {LOCK_NAME, partial_name(path)}:
            raise UserError(f"{output_dir} holds files that are of no run: choose another --output-dir")
        return None
    if not resume:
        raise UserError(f"{output_dir} holds a run: go on with it by --resume auto, or choose another --output-dir")
    # recipes from before the field was there are of runs that Pillow augmented
    return create_recipe({"augmentation_library": "pillow", **read_values(str(path))})


def check_same_recipe(saved: Recipe, recipe: Recipe, output_dir: Path) -> None:
    changes = find_changes(saved, recipe)
    if changes:
        listed = "; ".join(f"{name} was {old!r}, is {new!r}" for name, (old, new) in changes.items())
        raise UserError(
            f"{output_dir} is a run with another recipe ({listed}): go on with the same, or start anew elsewhere"
        )


class TrainingRun:
    """A run: from its recipe, or from its last checkpoint, to the model.

    `output_dir` holds `recipe.yaml` (all values), `log.jsonl`, `checkpoints/` and, in the end, `model/`, which
    `from_pretrained` loads and `evmamba push` uploads.

    Args:
        recipe: what to do.
        output_dir: new or empty, or a run's where `resume` says so.
        resume: go on from the last checkpoint where there is one.
        console: for messages and progress bars.

    Raises:
        UserError: for all that a user can mend, here and in `train`. What the run has saved stays.
    """

    def __init__(self, recipe: Recipe, output_dir: Path, *, resume: bool, console: Console):
        self.output_dir, self.console = output_dir, console
        self.accelerator = create_accelerator(recipe, output_dir)
        with ExitStack() as lock:
            lock.enter_context(only_run(output_dir, self.accelerator))
            self.set_up(recipe, resume)
            self.lock = lock.pop_all()  # until the training ends

    def set_up(self, recipe: Recipe, resume: bool) -> None:
        """Makes all that training needs, and puts it where the last checkpoint is."""
        output_dir, accelerator = self.output_dir, self.accelerator
        with accelerator.local_main_process_first():
            checkpoint = None if recipe.model is None else fetch_model(recipe.model)
            self.data = open_data(recipe)
        saved_recipe = read_saved_recipe(output_dir, resume)
        recipe, timm_problem = choose_library(complete_recipe(recipe, checkpoint), saved_recipe)
        if saved_recipe is not None:
            check_same_recipe(saved_recipe, recipe, output_dir)
        self.recipe = recipe
        self.checkpoints = Checkpoints(output_dir / CHECKPOINTS_NAME, recipe.keep_checkpoints)

        self.transform, self.mix = create_augmentation(recipe, len(self.data.class_names), self.piece_size)
        self.image_processor = create_image_processor(recipe)
        set_seed(recipe.seed)
        model = create_model(recipe, checkpoint, self.data.class_names)
        freeze(model, recipe)
        if recipe.gradient_checkpointing:
            # torch.compile takes no contexts, and computes statistics once by itself
            contexts = {} if recipe.compile else {"context_fn": lambda: (nullcontext(), statistics_kept(model))}
            model.gradient_checkpointing_enable({"use_reentrant": False, **contexts})
        steps_per_epoch = self.data.images_per_epoch / recipe.batch_size
        self.num_steps = math.ceil(recipe.epochs * steps_per_epoch)
        # of DDP, about strides of sides of length 1; of FSDP, about views, which nothing changes in place; of the
        # schedule, about the step that the loss scaling replaces
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        warnings.filterwarnings("ignore", ".*optimizer.step.* has been overridden")
        try:
            self.model, self.optimizer = accelerator.prepare(model, create_optimizer(model, recipe))
        except ValueError as error:
            raise UserError(
                f"accelerate cannot prepare the network: {error} With FSDP, --fsdp_transformer_layer_cls_to_wrap "
                "names the classes of its blocks"
            ) from error
        self.schedule = create_schedule(self.optimizer.optimizer, recipe, self.num_steps, steps_per_epoch)
        self.ema = ExponentialMovingAverage(self.bare_model, recipe.ema_decay)
        self.progress = RunProgress(
            images_per_epoch=self.data.images_per_epoch,
            class_names=self.data.class_names,
            num_processes=accelerator.num_processes,
        )
        if saved_recipe is not None and (checkpoints := self.checkpoints.list()):
            self.resume_from(checkpoints[-1])
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            self.prepare_output()
            reason = "" if timm_problem is None else f". timm cannot be imported: {timm_problem}"
            library = describe_library(recipe.augmentation_library)
            self.console.print(f"Images are augmented by {escape(library + reason)}")
        purge = {"tensorboard": {"purge_step": self.progress.step + 1}} if self.progress.step else {}
        accelerator.init_trackers(
            Path(recipe.name or output_dir.resolve()).name,
            {name: value if isinstance(value, (int, float)) else str(value) for name, value in vars(recipe).items()},
            init_kwargs=purge,
        )

    @property
    def model_dir(self) -> Path:
        return self.output_dir / MODEL_NAME

    @property
    def bare_model(self) -> EfficientVMambaForImageClassification:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    @property
    def piece_size(self) -> int:
        """Images that a process computes at once."""
        return self.recipe.batch_size // self.accelerator.num_processes // self.recipe.gradient_accumulation_steps

    def resume_from(self, checkpoint: Path) -> None:
        progress = self.checkpoints.read_progress(checkpoint)
        fresh = self.progress
        if (progress.images_per_epoch, progress.class_names) != (fresh.images_per_epoch, fresh.class_names):
            raise UserError(
                f"the dataset has changed since the run began: it had {progress.images_per_epoch:,} images of "
                f"{len(progress.class_names)} classes, now {fresh.images_per_epoch:,} of {len(fresh.class_names)}"
            )
        if progress.num_processes != fresh.num_processes:
            raise UserError(
                f"the run has used {progress.num_processes} processes, now there are {fresh.num_processes}: their "
                "random numbers would be others. Go on with as many"
            )
        self.progress = progress
        self.checkpoints.load(
            checkpoint, self.bare_model, self.ema, self.optimizer.optimizer, self.schedule, self.accelerator.scaler
        )

    def prepare_output(self) -> None:
        """Writes the recipe, and takes back what the log says beyond the checkpoint."""
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            write_atomic(self.output_dir / RECIPE_NAME, dump_recipe(self.recipe).encode())
            self.checkpoints.folder.mkdir(exist_ok=True)
            self.checkpoints.clean_up()
            kept = [record for record in self.read_log() if record["step"] <= self.progress.step]
            write_atomic(self.output_dir / LOG_NAME, "".join(json.dumps(record) + "\n" for record in kept).encode())
        except OSError as error:
            raise UserError(f"{self.output_dir} cannot be written: {error}") from error

    def read_log(self) -> list[dict]:
        """What was logged so far. The last line may be half-written, when a run was killed."""
        path, records = self.output_dir / LOG_NAME, []
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
            try:
                records.append(json.loads(line))
            except ValueError:
                break
        return records

    @property
    def num_images(self) -> int:
        """That the run has trained on so far, in all processes."""
        return self.progress.step * self.recipe.batch_size

    def log(self, record: dict[str, float]) -> None:
        """A line of the log, with its place in the run; the trackers get the same."""
        place = {
            "step": self.progress.step,
            "images": self.num_images,
            "epoch": round(self.num_images / self.data.images_per_epoch, 4),
        }
        finite = {name: value for name, value in record.items() if math.isfinite(value)}  # JSON knows no others
        try:
            self.accelerator.log(finite, step=self.progress.step)
            if self.accelerator.is_main_process:
                with (self.output_dir / LOG_NAME).open("a", encoding="utf-8") as file:
                    file.write(json.dumps({**place, **finite}) + "\n")
        except OSError as error:
            raise UserError(f"the log in {self.output_dir} cannot be written: {error}. {self.way_back()}") from error

    def way_back(self) -> str:
        """For messages about the end of a run."""
        saved = self.checkpoints.list()
        return (
            f"The last checkpoint is {saved[-1]}: --resume auto goes on from it"
            if saved
            else "There is no checkpoint yet"
        )

    def train(self) -> dict[str, float | int] | None:
        """Trains to the end and writes the model.

        Returns:
            images of the evaluation, top1, top5 and loss of the model; None without validation images.
        """
        try:
            with self.lock:
                results = self.take_steps()
                self.export(results)
                self.accelerator.end_training()
        except RuntimeError as error:  # PyTorch raises it wherever the run is when a process of a loader dies
            if not str(error).startswith(LOADER_DIED):
                raise
            raise UserError(
                "a process that reads images was killed, as a system does that runs out of memory (fewer "
                f"--num-workers need less): {str(error).rstrip(' .')}. {self.way_back()}"
            ) from error
        return results

    def take_steps(self) -> dict[str, float | int] | None:
        """The steps that are left, with their evaluations and checkpoints. Returns the last results."""
        recipe, accelerator = self.recipe, self.accelerator
        loader = create_training_loader(
            self.data,
            recipe,
            self.transform,
            recipe.batch_size // recipe.gradient_accumulation_steps,
            self.progress.step * recipe.gradient_accumulation_steps,
            accelerator.process_index,
            accelerator.num_processes,
        )
        batches, results, log = iter(loader), None, TrainingLog(self)
        set_training_mode(self.model, recipe)
        with Progress(
            *Progress.get_default_columns(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            console=self.console,
            disable=not accelerator.is_main_process,
        ) as self.bar:
            task = self.bar.add_task("Training", total=self.num_steps, completed=self.progress.step, status="")
            while self.progress.step < self.num_steps:
                log.add(*self.take_step(batches))
                step = self.progress.step
                epoch_ends = self.num_images % self.data.images_per_epoch < recipe.batch_size
                is_last = step == self.num_steps
                saves = epoch_ends or is_last or (recipe.checkpoint_steps and step % recipe.checkpoint_steps == 0)
                if saves or step % recipe.logging_steps == 0:
                    self.bar.update(task, status=log.write())
                self.bar.update(task, completed=step)
                if saves:
                    self.ema.broadcast_statistics(self.bare_model)
                if epoch_ends or is_last:
                    results = self.evaluate()
                    if results is not None:
                        self.progress.top1 = results["top1"]
                        self.log(
                            {
                                "top1": results["top1"],
                                "top5": results["top5"],
                                "validation_loss": results["loss"],
                                "validation_images": results["images"],
                            }
                        )
                if saves:
                    self.save()
                    log.restart()  # the time was not spent on training
            return results or self.evaluate()  # of a run that was complete already

    def take_step(self, batches: Iterator[Batch]) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        """One step of the optimizer. Returns this process's loss, the gradient's norm, and unreadable images."""
        recipe, accelerator = self.recipe, self.accelerator
        step, process = self.progress.step, accelerator.process_index
        # a run that goes on in the middle draws what an unbroken one draws
        torch.manual_seed(create_rng(recipe.seed, STOCHASTIC_DEPTH, step, process).integers(2**63).item())
        losses, norm, unreadable = [], None, []
        for piece in range(recipe.gradient_accumulation_steps):
            batch = self.check(next_batch(batches))
            unreadable += batch.unreadable
            place = (step * recipe.gradient_accumulation_steps + piece, process)
            pixel_values, targets = self.mix(
                batch.pixel_values.to(accelerator.device, non_blocking=True),
                batch.labels.to(accelerator.device, non_blocking=True),
                create_rng(recipe.seed, MIXING, *place),
            )
            with accelerator.accumulate(self.model):
                with accelerator.autocast():  # which accelerate does for us only without FSDP
                    logits = self.model(pixel_values).logits.float()
                loss = F.cross_entropy(logits, targets)
                losses.append(loss.detach())
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self.model.parameters(), recipe.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
        self.schedule.step()
        self.progress.step, self.progress.top1 = step + 1, None
        self.ema.update(self.bare_model, self.progress.step)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        return torch.stack(losses).mean(), norm.detach(), unreadable

    def check(self, batch: Batch) -> Batch:
        if batch.error is not None:
            raise UserError(f"{batch.error}. {self.way_back()}")
        if batch.unreadable and self.recipe.on_unreadable == "stop":
            raise UserError(
                f"{batch.unreadable[0]}. {self.way_back()}; --on-unreadable skip goes on without the image"
            )
        return batch

    def report_unreadable(self, names: list[str]) -> None:
        """Counts images that could not be read, in all processes, and names those that are new."""
        names = set(gather_object(names)) - set(self.progress.unreadable)
        for name in sorted(names) if self.accelerator.is_main_process else []:
            self.console.print(f"[yellow]Skipped[/] {escape(name)}")
        self.progress.unreadable += sorted(names)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float | int] | None:
        """Measures the averaged weights on the validation images, each of which counts once.

        Returns:
            images, top1, top5 and loss; None without validation images.
        """
        if self.data.validation is None:
            return None
        accelerator, model = self.accelerator, self.bare_model
        counts = Counts.start(len(self.data.class_names))
        loader = create_validation_loader(
            self.data,
            self.recipe,
            Preprocessor(self.image_processor),
            self.piece_size,
            accelerator.process_index,
            accelerator.num_processes,
        )
        batches, unreadable = iter(loader), []
        task = self.bar.add_task("Evaluating", total=self.data.validation.num_images, status="")
        with self.ema.applied_to(model):
            model.eval()
            # weights that are spread over the processes need all of them, also those whose images are through
            while any(gather_object([(batch := next_batch(batches)) is not None])):
                batch = NO_IMAGE if batch is None else self.check(batch)
                size = (3, self.recipe.image_size, self.recipe.image_size)
                pixel_values = batch.pixel_values if len(batch.labels) else torch.zeros(1, *size)
                with accelerator.autocast():
                    logits = model(pixel_values.to(accelerator.device, non_blocking=True)).logits.float()
                readable = batch.labels != UNREADABLE
                counts.add(logits[: len(readable)].cpu()[readable], batch.labels[readable])
                unreadable += batch.unreadable
                self.bar.advance(task, len(readable) * accelerator.num_processes)
        self.bar.remove_task(task)
        if accelerator.num_processes > 1:
            counts = counts.add_up(accelerator.device)
        set_training_mode(self.model, self.recipe)
        self.report_unreadable(unreadable)
        if counts.num_images == 0:
            raise UserError(f"{self.data.validation.name} holds no image to evaluate on that can be read")
        return counts.summarize()

    def save(self) -> None:
        self.checkpoints.save(
            self.progress,
            self.bare_model,
            self.ema,
            self.optimizer.optimizer,
            self.schedule,
            self.accelerator.scaler,
            self.accelerator.is_main_process,
        )
        self.accelerator.wait_for_everyone()

    def export(self, results: dict[str, float | int] | None) -> None:
        """Writes the averaged weights for `from_pretrained`, with image processor and card, and draws the curves."""
        model = self.bare_model
        weights = copy_averages(model, self.ema)
        if not self.accelerator.is_main_process:
            return
        with whole_folder(self.model_dir) as folder:
            logging.disable_progress_bar()
            model.save_pretrained(folder, state_dict=weights)
            self.image_processor.save_pretrained(folder)
            card = create_card(self.recipe, self.progress, model, self.data, results, str(self.output_dir))
            card.save(folder / constants.REPOCARD_NAME)
        try:
            draw_curves(self.read_log(), self.output_dir / CURVES_NAME)
        except OSError as error:
            raise UserError(f"{self.output_dir / CURVES_NAME} cannot be written: {error}") from error


def next_batch(batches: Iterator[Batch]) -> Batch | None:
    """The next batch of a loader; None behind the last.

    Raises:
        RuntimeError: as PyTorch does where a process of the loader dies, also when it dies while handing over a batch.
    """
    try:
        return next(batches, None)
    except (EOFError, ConnectionError, FileNotFoundError) as error:
        raise RuntimeError(f"{LOADER_DIED} hung up: {error}") from error


class TrainingLog:
    """What steps say of themselves, until a line of the log is due."""

    def __init__(self, run: TrainingRun):
        self.run = run
        self.restart()

    def restart(self) -> None:
        self.losses, self.norms, self.unreadable, self.since = [], [], [], time.monotonic()

    def add(self, loss: torch.Tensor, norm: torch.Tensor, unreadable: list[str]) -> None:
        self.losses.append(loss)
        self.norms.append(norm)
        self.unreadable += unreadable

    def write(self) -> str:
        """A line about the steps since the last one. Returns it in short.

        Raises:
            UserError: where a loss is not finite.
        """
        run = self.run
        losses = run.accelerator.reduce(torch.stack(self.losses), reduction="mean")
        last = run.progress.step
        if not losses.isfinite().all():
            step = last - len(losses) + 1 + losses.isfinite().logical_not().nonzero()[0].item()
            raise UserError(
                f"the loss of step {step} is {losses[~losses.isfinite()][0].item()}: lower --learning-rate, or train "
                f"with --mixed-precision no. {run.way_back()}"
            )
        run.report_unreadable(self.unreadable)
        seconds, norms = time.monotonic() - self.since, torch.stack(self.norms)
        record = {
            "loss": losses.mean().item(),
            "learning_rate": run.optimizer.param_groups[-1]["lr"],
            "gradient_norm": norms[norms.isfinite()].mean().item(),  # loss scaling skips steps with others
            "images_per_second": len(losses) * run.recipe.batch_size / seconds,
        }
        run.log(record)
        self.restart()
        return f"loss {record['loss']:.3f}  {record['images_per_second']:.0f} images/s"
