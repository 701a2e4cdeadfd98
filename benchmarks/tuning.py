"""Trials of tiles of the Triton kernels: candidates are checked in processes of their own, then timed one by one."""

from __future__ import annotations

import itertools
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

import fastattn
from benchmarks.command import Command
from benchmarks.gate import Gate, Wrong
from benchmarks.parallel import processes
from benchmarks.providers import Provider, Unavailable, all_providers
from benchmarks.result_table import ResultTable
from benchmarks.tile_candidates import Key
from benchmarks.timing import time_passes
from fastattn.params import AttentionParams
from fastattn.triton_kernels import attention, tiles
from fastattn.triton_kernels.tiles import Row, Tile

COLUMNS = (
    *("kernel", "dtype", "head_dim", "seqlen", *Tile._fields),
    *("smem_bytes", "p50_ms", "p20_ms", "p80_ms", "no_numbers_because"),
)
QUICK_SECONDS = {"checks": 28, "all": 40}
NO_TIME = "not measured: no time left"
ANSWER_SECONDS = 180  # for compiling and checking one candidate


class Trial(NamedTuple):
    """Where and on how much the candidates are tried."""

    device: torch.device = torch.device("cuda")
    launcher: attention.Device = attention.Device()
    tokens: int = 32768
    nheads: int = 8
    warm_up: int = 3
    repetitions: int = 20


class Result(NamedTuple):
    """The measurements of one candidate."""

    key: Key
    tile: Tile
    smem_bytes: int = 0
    p50_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    no_numbers_because: str | None = None

    def columns(self) -> dict[str, Any]:
        """The line of tune.csv."""
        return dict(zip(COLUMNS, (*self.key.words(), *self.tile, *self[2:]), strict=True))


# ---- one candidate ----


class SharedMemory(attention.Device):
    """Another device, and the bytes of shared memory that its launches of one kernel took.

    Args:
        kernel: one of attention.KERNELS.
        launcher: the other device.
    """

    def __init__(self, kernel: str, launcher: attention.Device) -> None:
        self.kernel, self.launcher = attention.KERNELS[kernel], launcher
        self.smem_bytes: list[int] = []

    def gpu(self, device: torch.device) -> tiles.Gpu:
        return self.launcher.gpu(device)

    def launch(self, kernel: Any, programs: int, tile: Tile, p: AttentionParams, arguments: dict[str, Any]) -> Any:
        compiled = self.launcher.launch(kernel, programs, tile, p, arguments)
        if kernel is self.kernel:
            self.smem_bytes.append(compiled.metadata.shared)
        return compiled


@contextmanager
def forced(key: Key, tile: Tile, launcher: attention.Device) -> Iterator[None]:
    """Inside, fastattn runs on Triton, launches by that device, and takes the tile for the key's kernel."""

    def choose(
        kernel: str, gpu: tiles.Gpu, dtype: torch.dtype, head_dims: tuple[int, int], seqlens: tuple[int, int]
    ) -> Tile | None:
        if kernel == "bwd" and key.kernel in ("dq", "dkdv"):
            return None
        return tile if kernel == key.kernel else tiles.choose(kernel, gpu, dtype, head_dims, seqlens)

    with tiles.forced(choose), attention.on(launcher), fastattn.use_backend("triton"):
        yield


def candidate(key: Key, tile: Tile, launcher: attention.Device) -> Provider:
    """fastattn's Triton backend with that tile."""
    (triton,) = (provider for provider in all_providers() if provider.name == "fastattn-triton")
    return triton._replace(name="candidate", context=partial(forced, key, tile, launcher))


def check(key: Key, tile: Tile, trial: Trial) -> Result:
    """The shared memory of a candidate that is right, also with every feature at once, or why it has no numbers."""
    case, launcher = key.case(trial.tokens, trial.nheads), SharedMemory(key.kernel, trial.launcher)
    if key.is_long():
        case = replace(case, batch=1, seqlen_q=1000, seqlen_k=1000)
    try:
        for features in (case, replace(case, mask="all")):
            Gate(features, trial.device).admit(candidate(key, tile, launcher))
    except Unavailable as error:
        return Result(key, tile, no_numbers_because=f"unavailable: {error}")
    except Wrong as error:
        return Result(key, tile, no_numbers_because=f"wrong: {error}")
    return Result(key, tile, max(launcher.smem_bytes))


def check_or_say_why(key: Key, tile: Tile, trial: Trial) -> Result:
    """The result of `check`, with every error as a reason."""
    try:
        return check(key, tile, trial)
    except Exception as error:
        reason = f"unavailable: {type(error).__name__}: {' '.join(str(error).split())}"
        return Result(key, tile, no_numbers_because=reason)


def take_time(result: Result, trial: Trial) -> Result:
    """The checked candidate with the times of the pass that its kernel belongs to."""
    provider = candidate(result.key, result.tile, trial.launcher)
    inputs = result.key.case(trial.tokens, trial.nheads).make(trial.device)
    leaves = list(inputs.leaves().values())

    def backward(out: torch.Tensor) -> None:
        torch.autograd.grad(out, leaves, inputs.dout)

    with provider.context():
        call = provider.prepare(inputs)
        time_passes(call, backward, trial.device, trial.warm_up)
        times = time_passes(call, backward, trial.device, trial.repetitions)
    return result._replace(**times["forward" if result.key.kernel == "fwd" else "backward"]._asdict())


# ---- all candidates ----


def in_turn(wanted: dict[Key, list[Tile]]) -> list[tuple[Key, Tile]]:
    """The first candidate of every row, then the second, ...: whenever the time is over, every row has had some."""
    rounds = itertools.zip_longest(*([(key, tile) for tile in found] for key, found in wanted.items()))
    return [pair for one_round in rounds for pair in one_round if pair is not None]


def measure(
    candidates: list[tuple[Key, Tile]],
    check_all: Callable[[list[tuple[Key, Tile]]], Iterator[Result]],
    timed: Callable[[Result], Result],
    is_over: Callable[[], bool] = lambda: False,
) -> Iterator[Result]:
    """The result of every candidate: first all are checked, then, with nothing else on the GPU, timed.

    Args:
        candidates: rows and their tiles.
        check_all: their results without times, in order.
        timed: adds the times.
        is_over: says when there is no time left.
    """
    bar = partial(tqdm, total=len(candidates), unit="tile", disable=None)
    for result in bar(list(bar(check_all(candidates), desc="checked")), desc="timed"):
        if result.no_numbers_because is None:
            result = result._replace(no_numbers_because=NO_TIME) if is_over() else timed(result)
        yield result


def check_in_processes(
    candidates: list[tuple[Key, Tile]], trial: Trial, until: float = float("inf")
) -> Iterator[Result]:
    """Checks on all cores; a candidate that crashes takes nothing with it, because its process does nothing else.

    Args:
        candidates: rows and their tiles.
        trial: what they are tried on.
        until: what time.monotonic() says when it is over; candidates that are not done by then have no numbers.
    """
    with multiprocessing.get_context("spawn").Pool(processes(trial.device), maxtasksperchild=1) as pool:
        answers = [pool.apply_async(check_or_say_why, (*candidate, trial)) for candidate in candidates]
        for (key, tile), answer in zip(candidates, answers, strict=True):
            left = until - time.monotonic()
            try:
                yield answer.get(max(0.0, min(left, ANSWER_SECONDS)))
            except multiprocessing.TimeoutError:
                reason = NO_TIME if left < ANSWER_SECONDS else f"unavailable: no answer in {ANSWER_SECONDS} s"
                yield Result(key, tile, no_numbers_because=reason)


def fastest(results: Iterable[Result]) -> dict[Key, Result]:
    """The candidate with the least median of each row; no row has one without numbers."""
    best: dict[Key, tuple[float, Result]] = {}
    for result in results:
        if result.p50_ms is not None and (result.key not in best or result.p50_ms < best[result.key][0]):
            best[result.key] = result.p50_ms, result
    return {key: result for key, (_, result) in best.items()}


def updated(rows: Iterable[Row], best: dict[Key, Result], capability: tuple[int, int]) -> list[Row]:
    """The table with the rows measured on GPUs of that capability, in the place of those measured before."""
    measured = []
    for key, result in best.items():
        seqlen = tiles.LONG if key.is_long() else key.seqlen
        measured.append(Row(key.kernel, capability, key.dtype, key.head_dim, seqlen, result.tile, result.smem_bytes))
    replaced = {row[:5] for row in measured}
    return [row for row in rows if row[:5] not in replaced] + measured


def write(table: ResultTable, results: Iterable[Result]) -> list[Result]:
    """Writes the results as they come; returns them."""
    done = []
    for result in results:
        table.add(**result.columns())
        done.append(result)
    return done


def measure_all(wanted: dict[Key, list[Tile]], command: Command, trial: Trial, start: float) -> list[Result]:
    """The results of all candidates, which are also written; the quick form ends by the clock.

    Args:
        wanted: the rows and their candidates.
        command: says where results are written, and whether there is an end.
        trial: what the candidates are tried on.
        start: what time.monotonic() said when the benchmark began.
    """
    limits = {name: start + (left if command.size == "quick" else float("inf")) for name, left in QUICK_SECONDS.items()}
    check_all = partial(check_in_processes, trial=trial, until=limits["checks"])
    timed, is_over = partial(take_time, trial=trial), lambda: time.monotonic() > limits["all"]
    with ResultTable(command, "tune", COLUMNS) as table:
        return write(table, measure(in_turn(wanted), check_all, timed, is_over))
