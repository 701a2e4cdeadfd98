"""Times of calls on the host: calls take turns, and a time is the mean of a turn."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks.host_timing import WARM_UP, time_in_turns

CPU = torch.device("cpu")


def test_calls_take_turns():
    called: list[str] = []
    time_in_turns({"a": lambda: called.append("a"), "b": lambda: called.append("b")}, 2, 3, CPU)
    assert "".join(called) == "a" * WARM_UP + "b" * WARM_UP + 2 * ("aaa" + "bbb")


def test_times_are_microseconds_of_one_call():
    def work():
        until = time.thread_time() + 2e-3
        while time.thread_time() < until:
            pass

    found = time_in_turns({"work": work, "nothing": lambda: None, "sleep": lambda: time.sleep(2e-3)}, 5, 2, CPU)
    assert 2000 <= found["work"].min_us <= found["work"].p50_us <= found["work"].p80_us
    assert 0 < found["nothing"].min_us < 1000 and found["sleep"].min_us < 1000


def test_threads_are_one_and_then_as_before():
    before, seen = torch.get_num_threads(), []
    torch.set_num_threads(2)

    def fail():
        seen.append(torch.get_num_threads())
        raise RuntimeError("fails")

    try:
        with pytest.raises(RuntimeError, match="fails"):
            time_in_turns({"fail": fail}, 2, 1, CPU)
        assert seen == [1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
