"""Times of calls on the host, which take turns: whatever slows the machine for a while slows all of them.

On a CPU a time is what the thread worked; with a GPU it is what passed, as a part of the work is another thread's.
"""

from __future__ import annotations

import statistics
import time
import timeit
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch

WARM_UP = 3
HostCall = Callable[[], Any]
Name = TypeVar("Name", bound=Hashable)


class HostTime(NamedTuple):
    """Microseconds that one call took, over the rounds."""

    min_us: float
    p50_us: float
    p80_us: float


def time_in_turns(
    calls: Mapping[Name, HostCall], rounds: int, number: int, device: torch.device
) -> dict[Name, HostTime]:
    """The times of the calls, with one thread and without garbage collection.

    Args:
        calls: what is timed, by name.
        rounds: how often every call has its turn; at least 2.
        number: of calls in a turn, whose mean is one time.
        device: where kernels may be queued; a turn begins when there are none.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for call in calls.values():
            _turn(call, WARM_UP, device)
        turns = [{name: _turn(call, number, device) for name, call in calls.items()} for _ in range(rounds)]
    finally:
        torch.set_num_threads(threads)
    return {name: _summary([turn[name] for turn in turns]) for name in calls}


def _turn(call: HostCall, number: int, device: torch.device) -> float:
    """Microseconds of a call, the mean of this many."""
    timer = time.thread_time if device.type == "cpu" else time.perf_counter
    seconds = timeit.timeit(call, timer=timer, number=number)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e6 * seconds / number


def _summary(times_us: list[float]) -> HostTime:
    fifths = statistics.quantiles(times_us, n=5, method="inclusive")
    return HostTime(min(times_us), statistics.median(times_us), fifths[3])
