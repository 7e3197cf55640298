"""The checkpoints of transformers' Trainer, of which the whole ones have a file with the progress of the run.

The Trainer writes a checkpoint file by file. A run that was killed meanwhile leaves a part of it. So the run writes
`state.json` into a checkpoint once the Trainer has finished it.
"""

import shutil
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from evmamba_hub.errors import UserError
from training_evmamba.checkpoints import STATE_NAME, RunProgress, sync_to_disk


class TrainerCheckpoints:
    """The latest checkpoints of a run."""

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep

    def find_folders(self) -> list[Path]:
        """Return the directories of checkpoints, the oldest first, whole or not."""
        prefix = f"{PREFIX_CHECKPOINT_DIR}-"
        return sorted(self.folder.glob(f"{prefix}*"), key=lambda path: int(path.name.removeprefix(prefix)))

    def list(self) -> list[Path]:
        """Return the whole checkpoints, the oldest first."""
        return [path for path in self.find_folders() if (path / STATE_NAME).is_file()]

    def finish(self, progress: RunProgress) -> None:
        """Mark the checkpoint of this step as whole, and remove all but the latest ones.

        Raises:
            UserError: If the directory cannot be written.
        """
        checkpoint = self.folder / f"{PREFIX_CHECKPOINT_DIR}-{progress.step}"
        try:
            sync_to_disk(checkpoint)
            progress.write(checkpoint)
        except OSError as error:
            raise UserError(f"{checkpoint} cannot be written: {error}") from error
        self.clean_up()

    def clean_up(self) -> None:
        """Remove partial checkpoints, and all whole ones except the latest.

        Raises:
            UserError: If the directory cannot be written.
        """
        kept = self.list()[-self.keep :]
        try:
            for checkpoint in self.find_folders():
                if checkpoint not in kept:
                    (checkpoint / STATE_NAME).unlink(missing_ok=True)  # a part of a checkpoint is no checkpoint
                    shutil.rmtree(checkpoint)
        except OSError as error:
            raise UserError(f"{self.folder} cannot be written: {error}") from error
