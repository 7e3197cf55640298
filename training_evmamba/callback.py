"""What a run tells while it trains."""


class TrainingCallback:
    """Is called by the main process of a run. This one does nothing; that of `evmamba train` shows the run."""

    def on_train_begin(self, step: int, num_steps: int) -> None:
        """Before the first step, `step` of which are done already where a run goes on."""

    def on_step_end(self, step: int) -> None:
        """After each step, with its number."""

    def on_log(self, record: dict[str, float]) -> None:
        """With the values of a new line of the log."""

    def on_unreadable(self, message: str) -> None:
        """Where an image is skipped for the first time. The message names it."""

    def on_evaluate_begin(self, num_images: int | None) -> None:
        """Before an evaluation, with the images of all processes; None for a stream of unknown length."""

    def on_evaluate_step(self, num_images: int) -> None:
        """After a batch of an evaluation, with its images of all processes."""

    def on_evaluate_end(self) -> None:
        """After an evaluation."""
