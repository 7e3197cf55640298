"""Events of a training run."""


class TrainingCallback:
    """Receives the events of a run on its main process. This class ignores them. `evmamba train` shows them."""

    def on_train_begin(self, step: int, num_steps: int) -> None:
        """Called before the first step. A resumed run has done `step` of its `num_steps` steps."""

    def on_step_end(self, step: int) -> None:
        """Called after each step, with its number."""

    def on_log(self, record: dict[str, float]) -> None:
        """Called with the values of a new log line."""

    def on_unreadable(self, message: str) -> None:
        """Called when an image is skipped for the first time. The message names it."""

    def on_evaluate_begin(self, num_images: int | None) -> None:
        """Called before an evaluation, with its images on all processes, or None for a stream of unknown length."""

    def on_evaluate_step(self, num_images: int) -> None:
        """Called after a batch of an evaluation, with its images on all processes."""

    def on_evaluate_end(self) -> None:
        """Called after an evaluation."""
