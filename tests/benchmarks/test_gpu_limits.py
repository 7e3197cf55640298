"""What the floors of the scan on GPUs count."""

import pytest


pytest.importorskip("triton", reason="triton is not installed, which there are no wheels of for this system")

from benchmarks.gpu_limits import Limits


H100 = Limits(bytes_per_second=3.35e12, exponentials_per_second=132 * 16 * 1.755e9)  # by its data sheet
MAP = (128, 56, 56, 96)


def test_exponentials_bind_with_many_states_bytes_with_one():
    floor = H100.find_floor(MAP, state_size=16, element_size=4, is_training=False)
    assert floor.binding == "exponentials"
    assert floor.seconds == pytest.approx(166e-6, rel=0.01)  # as counted in NOTES.md
    floor = H100.find_floor(MAP, state_size=1, element_size=4, is_training=False)
    assert floor.binding == "bytes"
    assert floor.seconds == pytest.approx(92e-6, rel=0.01)


def test_a_backward_pass_adds_as_many_exponentials_and_three_maps():
    for state_size, factor in [(16, 2), (1, 5 / 2)]:
        both, forward = (H100.find_floor(MAP, state_size, 4, is_training) for is_training in (True, False))
        assert both.binding == forward.binding
        assert both.seconds == pytest.approx(factor * forward.seconds)
