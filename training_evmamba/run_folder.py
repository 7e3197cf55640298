"""The directory of a run: its lock, its recipe and its log. It belongs to one run at a time."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from evmamba_hub.errors import UserError
from evmamba_hub.files import partial_name, write_atomic
from evmamba_hub.processes import failing_together
from training_evmamba.recipe import AnyRecipe, BaseRecipe, create_recipe, dump_recipe, find_changes, read_values


class RunFolder:
    """The directory of a run: `recipe.yaml`, `log.jsonl`, `checkpoints/`, and at the end the curves and `model/`."""

    def __init__(self, path: Path):
        """Name the files of the directory.

        Raises:
            UserError: If the path is not UTF-8, because neither safetensors nor TensorBoard could read there.
        """
        try:
            os.fspath(path).encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the name of {path} is not UTF-8: choose another --output-dir") from error
        self.path = path
        self.recipe_file = path / "recipe.yaml"
        self.log_file = path / "log.jsonl"
        self.lock_file = path / ".lock"
        self.checkpoints_dir = path / "checkpoints"
        self.curves_file = path / "training_curves.png"
        self.model_dir = path / "model"

    @contextmanager
    def locked(self, is_main_process: bool) -> Iterator[None]:
        """Lock the directory against other runs. The system releases the lock of a killed process.

        Call it on all processes of a run. The main process holds the lock.

        Raises:
            UserError: On all processes, if another run owns the directory or it cannot be written.
        """
        if self.path.is_file():
            raise UserError(f"{self.path} is a file: --output-dir takes a directory")
        lock, is_new = FileLock(self.lock_file, timeout=0), not self.path.exists()
        with failing_together():
            if is_main_process:
                self.acquire(lock)
        try:
            yield
        finally:
            if is_main_process:
                with suppress(OSError):  # on Windows, releasing the lock removes its file
                    self.lock_file.unlink()
                lock.release()
                if is_new:
                    with suppress(OSError):  # the run has written to the directory
                        self.path.rmdir()

    def acquire(self, lock: FileLock) -> None:
        """Create the directory, and acquire its lock.

        Raises:
            UserError: If another run owns the directory or it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout as error:
            raise UserError(
                f"another run writes to {self.path}: wait until it ends, or choose another --output-dir"
            ) from error
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error}") from error

    def read_recipe(self, recipe_class: type[AnyRecipe], resume: bool) -> AnyRecipe | None:
        """Return the recipe of the run in the directory, or None if there is no run.

        Raises:
            UserError: If the directory holds other files, or if it holds a run and `resume` is false.
        """
        if not self.recipe_file.is_file():
            written = {each.name for each in self.path.iterdir()} if self.path.exists() else set()
            if written - {self.lock_file.name, partial_name(self.recipe_file)}:
                raise UserError(f"{self.path} holds files that do not belong to a run: choose another --output-dir")
            return None
        if not resume:
            raise UserError(
                f"{self.path} already contains a run: pass `--resume auto` to continue it, or "
                f"{self.describe_new_run()}"
            )
        return create_recipe({**recipe_class.saved_without, **read_values(str(self.recipe_file))}, recipe_class)

    def check_same_recipe(self, saved: BaseRecipe, recipe: BaseRecipe) -> None:
        changes = find_changes(saved, recipe)
        if changes:
            listed = "; ".join(f"{name} was {old!r}, is {new!r}" for name, (old, new) in changes.items())
            raise UserError(
                f"{self.path} holds a run with another recipe ({listed}): resume with the same recipe, or "
                f"{self.describe_new_run()}"
            )

    def describe_new_run(self) -> str:
        """Return what to do instead of resuming, for error messages."""
        further = f", with --model {self.model_dir} to train the finished model further"
        return f"choose another --output-dir{further if self.model_dir.is_dir() else ''}"

    def begin(self, recipe: BaseRecipe, step: int) -> None:
        """Write the recipe, and drop the log lines after a step.

        Raises:
            UserError: If the directory cannot be written.
        """
        write_atomic(self.recipe_file, dump_recipe(recipe).encode())
        kept = [record for record in self.read_log() if record["step"] <= step]
        write_atomic(self.log_file, "".join(json.dumps(record) + "\n" for record in kept).encode())

    def read_log(self) -> list[dict]:
        """Return the log lines. A killed run may have left the last line half-written."""
        records: list[dict] = []
        for line in self.log_file.read_text(encoding="utf-8").splitlines() if self.log_file.is_file() else []:
            try:
                records.append(json.loads(line))
            except ValueError:
                break
        return records

    def append_to_log(self, record: dict[str, float]) -> None:
        with self.log_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
