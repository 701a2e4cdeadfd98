"""Times of calls on the host: calls take turns, and a time is the mean of a turn."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks import timing
from benchmarks.attention_columns import of_host
from benchmarks.host_timing import WARM_UP, time_in_turns
from fastattn import compat

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


def test_a_gpu_waits_until_all_kernels_are_queued(monkeypatch):
    """So that between its marks there is no time of the host."""
    log: list[object] = []
    empty = torch.empty

    class Cache:
        def zero_(self) -> None:
            log.append("flush")

    monkeypatch.setattr(torch, "empty", lambda *size, device=None, **_: Cache() if device == gpu else empty(*size))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("wait"))
    monkeypatch.setattr(compat, "sleep_on_gpu", lambda cycles: log.append(cycles))
    monkeypatch.setattr(timing, "_mark_cuda", lambda: log.append("mark") or len(log))
    monkeypatch.setattr(timing, "_between_events", lambda start, end: float(end - start))
    gpu = torch.device("cuda", 0)
    found = timing.time_passes(
        lambda: time.sleep(0.01) or log.append("forward"), lambda _: log.append("backward"), gpu, 2
    )
    cycles = log[5]
    assert log[:4] == ["wait", "forward", "backward", "wait"]
    assert log[4:] == 2 * ["flush", cycles, "mark", "forward", "mark", "backward", "mark"] + ["wait"]
    assert 2 * 10 * timing.CYCLES_PER_MS <= cycles <= timing.MOST_HEAD_START_MS * timing.CYCLES_PER_MS
    assert found["both"].p50_ms == 4


def test_the_time_of_the_host_is_noted_where_it_is_more_than_the_devices():
    assert of_host(0.2, 0.1, "") == {"host_ms": "0.2000", "note": "the host takes longer than the device"}
    assert of_host(0.2, 0.1, "flash")["note"] == "flash; the host takes longer than the device"
    assert of_host(0.05, 0.1, "flash") == {"host_ms": "0.0500", "note": "flash"}
    times = timing.host_times(lambda: time.sleep(0.002), lambda _: time.sleep(0.004), torch.device("cpu"), 3)
    assert 2 <= times["forward"] < times["backward"] < times["both"]
