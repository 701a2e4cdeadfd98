"""Times of a forward and a backward pass on a device."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch

from fastattn import compat

FLUSH_BYTES = 256 << 20  # more than any GPU's L2 cache
MOST_ROUNDS = 300
CYCLES_PER_MS = 2_000_000  # of a GPU's clock, at most
MOST_HEAD_START_MS = 20.0
Name = TypeVar("Name", bound=Hashable)


class PassTime(NamedTuple):
    """The milliseconds of one pass: median and fifths of the repetitions."""

    p50_ms: float
    p20_ms: float
    p80_ms: float


def time_passes(
    forward: Callable[[], Any], backward: Callable[[Any], Any], device: torch.device, repetitions: int
) -> dict[str, PassTime]:
    """Times `out = forward(); backward(out)`, by events on the stream on a GPU and by the clock on the CPU.

    Before each repetition the caches are overwritten. Then a GPU waits for twice as long as the host needs to queue the
    kernels: between them there is no time of the host, which `host_times` measures. backward follows forward at once,
    as in training. Warm up first.

    Args:
        forward: returns the output with its graph.
        backward: takes that output.
        device: where they run.
        repetitions: at least 2.

    Returns:
        "forward", "backward" and "both".
    """
    on_gpu = device.type == "cuda"
    mark: Callable[[], Any] = _mark_cuda if on_gpu else time.perf_counter
    milliseconds: Callable[[Any, Any], float] = _between_events if on_gpu else _between_times
    cache = torch.empty(FLUSH_BYTES if on_gpu else 0, dtype=torch.uint8, device=device)
    head_start_ms = 2 * host_times(forward, backward, device, 1)["both"] if on_gpu else 0.0
    marks = []
    for _ in range(repetitions):
        cache.zero_()
        if on_gpu:
            compat.sleep_on_gpu(round(CYCLES_PER_MS * min(head_start_ms, MOST_HEAD_START_MS)))
        start = mark()
        out = forward()
        middle = mark()
        backward(out)
        marks.append((start, middle, mark()))
        del out
    if on_gpu:
        torch.cuda.synchronize(device)
    return _passes(marks, milliseconds)


def host_times(
    forward: Callable[[], Any], backward: Callable[[Any], Any], device: torch.device, repetitions: int
) -> dict[str, float]:
    """Milliseconds after which the calls of `time_passes` return, medians; nothing is queued on a GPU before them."""
    times = []
    for _ in range(repetitions):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        out = forward()
        middle = time.perf_counter()
        backward(out)
        times.append((start, middle, time.perf_counter()))
        del out
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    spans = {"forward": (0, 1), "backward": (1, 2), "both": (0, 2)}
    return {which: statistics.median(1e3 * (t[b] - t[a]) for t in times) for which, (a, b) in spans.items()}


def time_for(
    forward: Callable[[], Any], backward: Callable[[Any], Any], device: torch.device, seconds: float
) -> dict[str, PassTime]:
    """Warms up, then times like `time_passes`, as often as fits into about that time: 3 to 100 times."""
    once = time_passes(forward, backward, device, 2)["both"].p20_ms
    if once < 1e3 * seconds:
        once = time_passes(forward, backward, device, 2)["both"].p20_ms
    return time_passes(forward, backward, device, max(3, min(100, int(1e3 * seconds / once))))


class TimedCall(NamedTuple):
    """What takes its turn on a CPU."""

    forward: Callable[[], Any]  # returns the output with its graph
    backward: Callable[[Any], Any] | None = None  # takes that output; None to time the forward pass alone
    context: Callable[[], AbstractContextManager[Any]] = nullcontext  # around both, and not timed


def cpu_clock(threads: int) -> Callable[[], float]:
    """The clock for calls on a CPU: what one thread worked, which others cannot lengthen much, else what passes."""
    return time.thread_time if threads == 1 else time.perf_counter


def time_in_turns(
    calls: Mapping[Name, TimedCall], clock: Callable[[], float], seconds: float, least: int
) -> dict[Name, dict[str, PassTime]]:
    """Times calls on a CPU that take turns, in a new order each time: what slows the machine slows all of them.

    Args:
        calls: what is timed, by name.
        clock: in seconds.
        seconds: for all of it, about.
        least: rounds, whatever they take; at least 2.

    Returns:
        By name "forward", "backward" and "both"; of a call without backward pass "forward" alone.
    """
    until = time.perf_counter() + seconds
    for call in calls.values():
        _turn(call, clock)  # warms up
    order, shuffle = list(calls), random.Random(0).shuffle
    turns: dict[Name, list[tuple[float, float, float]]] = {name: [] for name in calls}
    rounds = 0
    while rounds < least or (rounds < MOST_ROUNDS and time.perf_counter() < until):
        shuffle(order)
        for name in order:
            turns[name].append(_turn(calls[name], clock))
        rounds += 1
    return {
        name: {which: time for which, time in _passes(turns[name], _between_times).items() if which in _timed(call)}
        for name, call in calls.items()
    }


def _turn(call: TimedCall, clock: Callable[[], float]) -> tuple[float, float, float]:
    with call.context():
        start = clock()
        out = call.forward()
        middle = clock()
        if call.backward is not None:
            call.backward(out)
        return start, middle, clock()


def _timed(call: TimedCall) -> tuple[str, ...]:
    return ("forward",) if call.backward is None else ("forward", "backward", "both")


def time_once(run: Callable[[], Any], device: torch.device, repetitions: int) -> PassTime:
    """Times `run()` by itself, otherwise like `time_passes`."""
    return time_passes(run, lambda _: None, device, repetitions)["forward"]


def peak_memory_mib(run: Callable[[], Any], device: torch.device) -> float | None:
    """MiB that `run` allocates on a GPU at its peak, beyond what was there before; None on the CPU."""
    if device.type != "cuda":
        return None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return round((torch.cuda.max_memory_allocated(device) - before) / 2**20, 1)


def _passes(marks: list[tuple[Any, Any, Any]], milliseconds: Callable[[Any, Any], float]) -> dict[str, PassTime]:
    return {
        "forward": _summary([milliseconds(start, middle) for start, middle, _ in marks]),
        "backward": _summary([milliseconds(middle, end) for _, middle, end in marks]),
        "both": _summary([milliseconds(start, end) for start, _, end in marks]),
    }


def _mark_cuda() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between_events(start: torch.cuda.Event, end: torch.cuda.Event) -> float:
    return start.elapsed_time(end)


def _between_times(start: float, end: float) -> float:
    return (end - start) * 1e3


def _summary(times_ms: list[float]) -> PassTime:
    fifths = statistics.quantiles(times_ms, n=5, method="inclusive")
    return PassTime(statistics.median(times_ms), fifths[0], fifths[3])
