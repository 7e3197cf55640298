"""A mistake that only one of several processes finds."""

import pytest
from accelerate.state import AcceleratorState

from evmamba_hub.errors import UserError
from evmamba_hub.inference.evaluation import join_processes
from evmamba_hub.processes import call_on_main_first, failing_together
from process_pairs import needs_fork, run_on_two_processes


def refuse(message: str):
    raise UserError(message)


def message_of(function) -> str | None:
    try:
        function()
    except UserError as error:
        return str(error)
    return None


def test_one_process_raises_its_own_error():
    with pytest.raises(UserError, match=r"^no such file$"):
        call_on_main_first(True, lambda: refuse("no such file"))
    assert call_on_main_first(True, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError), failing_together():
        _ = 1 / 0


def test_a_launch_that_accelerate_does_not_support(monkeypatch):
    """Several nodes without the address of the first one."""
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    ranks = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": "29500"}
    for name, value in {"ACCELERATE_USE_CPU": "1", **ranks}.items():
        monkeypatch.setenv(name, value)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        with pytest.raises(UserError, match=r"accelerate cannot join the processes of this run: .*MASTER_ADDR"):
            join_processes()
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@needs_fork
@pytest.mark.parametrize("failing", [0, 1])
def test_the_error_of_a_process_is_that_of_all(failing):
    def work(rank: int) -> str | None:
        return message_of(
            lambda: call_on_main_first(rank == 0, lambda: refuse("no disk") if rank == failing else None)
        )

    assert run_on_two_processes(work) == ["no disk", "no disk"]


@needs_fork
def test_the_main_process_is_the_first(tmp_path):
    def work(rank: int) -> tuple[int, bool]:
        def download() -> tuple[int, bool]:
            was_there = (tmp_path / "file").exists()
            (tmp_path / "file").touch()
            return rank, was_there

        return call_on_main_first(rank == 0, download)

    assert run_on_two_processes(work) == [(0, False), (1, True)]
