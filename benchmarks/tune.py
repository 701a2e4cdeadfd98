"""Measures which tiles the Triton kernels should take on this GPU, and writes them into the table they choose from.

    python -m benchmarks.tune                      every row, more than an hour
    python -m benchmarks.tune --quick              the rows that matter most, two minutes
    python -m benchmarks.tune --filter fwd float16 only rows with all these words
    python -m benchmarks.tune --dry-run            what would be measured, on any machine

Every candidate first computes attention next to the float64 reference, in processes of their own on all processor
cores, because compiling takes longest; one that is wrong or that the GPU cannot run is a line with the reason. The
others are then timed one after the other. The fastest of each row goes into fastattn/triton_kernels/tiles.csv, for GPUs
of this capability; all measurements go into tune.csv and, with where they come from, tune.json.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from tqdm import tqdm

import fastattn
from benchmarks.cases import Case, short, square
from benchmarks.gate import Gate, Wrong
from benchmarks.provenance import folder_name, provenance
from benchmarks.providers import Provider, Unavailable, all_providers
from benchmarks.timing import time_passes

WARM_UP, REPETITIONS = 3, 20
DEVICE = torch.device("cuda")
QUICK_SECONDS = {"checks": 80, "all": 110}
NO_TIME = "not measured: no time left"
ANSWER_SECONDS = 180  # in which a candidate must be compiled and have computed
TOKENS, NHEADS = 32768, 8
LONG_SEQLEN = 4096  # that a row for any length is timed with
QUICK_HEAD_DIM, QUICK_SEQLENS = 64, (64, LONG_SEQLEN)
TUNED = ("fwd", "bwd", "dq", "dkdv")  # the bias gradient keeps its row


class Key(NamedTuple):
    """A row of the table."""

    kernel: str
    dtype: torch.dtype
    head_dim: int
    seqlen: int  # LONG_SEQLEN: any

    def __str__(self) -> str:
        seqlen = "any" if self.seqlen == LONG_SEQLEN else self.seqlen
        return f"{self.kernel} {short(self.dtype)} {self.head_dim} {seqlen}"

    def case(self) -> Case:
        """What it is timed with: the padded sentences of a batch, or long sequences."""
        mask = "none" if self.seqlen == LONG_SEQLEN else "padding"
        return square("tune", TOKENS // self.seqlen, NHEADS, self.seqlen, self.head_dim, mask, self.dtype)


class Result(NamedTuple):
    """Of one candidate."""

    key: Key
    tile: Any  # tiles.Tile
    smem_bytes: int = 0
    p50_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    no_numbers_because: str | None = None


# ---- what is measured ----


def safe_tiles(rows: Iterable[Any]) -> dict[Key, Any]:
    """The tiles for any GPU, by the row to be measured."""
    found = {}
    for row in rows:
        if row.capability is None and row.kernel in TUNED:
            found[Key(row.kernel, row.dtype, row.head_dim, min(row.seqlen, LONG_SEQLEN))] = row.tile
    return found


def neighbours(tile: Any, key: Key) -> list[Any]:
    """The tile and those that differ from it in one field by one step."""
    limits = {"block_m": (16, 128), "block_n": (16, 128), "num_warps": (1, 16), "pairs": (1, 8)}
    found = [tile, tile._replace(num_stages=tile.num_stages + 1)]
    if tile.num_stages > 1:
        found.append(tile._replace(num_stages=tile.num_stages - 1))
    for name, (least, most) in limits.items():
        value = getattr(tile, name)
        found += [tile._replace(**{name: n}) for n in (value // 2, value * 2) if least <= n <= most]
    return [t for t in found if _makes_sense(t, key)]


def everything(tile: Any, key: Key) -> list[Any]:
    """All tiles of the product that make sense."""
    sizes, pairs = (16, 32, 64, 128), (1, 2, 4, 8)
    product = itertools.product(sizes, sizes, (1, 2, 4, 8), (1, 2, 3), pairs)
    return [t for values in product if _makes_sense(t := type(tile)(*values), key)]


def _makes_sense(tile: Any, key: Key) -> bool:
    """Not larger than the sequences, all keys in one tile where they have to be, enough and not too much for a warp."""
    is_long = key.seqlen == LONG_SEQLEN
    fits = max(tile.block_m, tile.block_n) <= key.seqlen and (key.kernel != "bwd" or tile.block_n == key.seqlen)
    scores_of_warp = tile.block_m * tile.block_n // tile.num_warps
    return fits and 64 <= scores_of_warp <= 2048 and (tile.pairs == 1 or not (is_long or key.kernel in ("dq", "dkdv")))


# ---- one candidate ----


@contextmanager
def forced(key: Key, tile: Any, smem: list[int] | None = None) -> Iterator[None]:
    """fastattn runs on Triton with the tile for that kernel; the shared memory of its launches is added to the list."""
    from fastattn.triton_kernels import attention, tiles

    choose, launch = tiles.choose, attention._launch

    def choose_forced(kernel: str, *call: Any) -> Any:
        if kernel == "bwd" and key.kernel in ("dq", "dkdv"):
            return None
        return tile if kernel == key.kernel else choose(kernel, *call)

    def launch_noted(kernel: Any, *call: Any) -> Any:
        compiled = launch(kernel, *call)
        if smem is not None and kernel is attention.KERNELS[key.kernel]:
            smem.append(compiled.metadata.shared)
        return compiled

    with (
        mock.patch.object(tiles, "choose", choose_forced),
        mock.patch.object(attention, "_launch", launch_noted),
        fastattn.use_backend("triton"),
    ):
        yield


def candidate(key: Key, tile: Any, smem: list[int] | None = None) -> Provider:
    """fastattn's Triton backend with that tile."""
    (triton,) = (provider for provider in all_providers() if provider.name == "fastattn-triton")
    return triton._replace(name="candidate", context=partial(forced, key, tile, smem))


def check(key: Key, tile: Any) -> Result:
    """Whether the candidate is right, also with every feature at once; how much shared memory it takes."""
    case, smem = key.case(), []
    if case.seqlen_k == LONG_SEQLEN:
        case = replace(case, batch=1, seqlen_q=1000, seqlen_k=1000)
    try:
        for features in (case, replace(case, mask="all")):
            Gate(features, DEVICE).admit(candidate(key, tile, smem))
    except Unavailable as error:
        return Result(key, tile, no_numbers_because=f"unavailable: {error}")
    except Wrong as error:
        return Result(key, tile, no_numbers_because=f"wrong: {error}")
    return Result(key, tile, max(smem))


def check_or_say_why(key: Key, tile: Any) -> Result:
    """As `check`, with every error as a reason."""
    try:
        return check(key, tile)
    except Exception as error:
        return Result(
            key, tile, no_numbers_because=f"unavailable: {type(error).__name__}: {' '.join(str(error).split())}"
        )


def take_time(result: Result) -> Result:
    """The checked candidate with its times: of the pass that its kernel belongs to."""
    provider, problem = candidate(result.key, result.tile), result.key.case().make(DEVICE)
    leaves = list(problem.leaves().values())

    def backward(out: torch.Tensor) -> None:
        torch.autograd.grad(out, leaves, problem.dout)

    with provider.context():
        call = provider.prepare(problem)
        time_passes(call, backward, DEVICE, WARM_UP)
        timing = time_passes(call, backward, DEVICE, REPETITIONS)
    return result._replace(**timing["forward" if result.key.kernel == "fwd" else "backward"]._asdict())


# ---- all candidates ----


def in_turn(wanted: dict[Key, list[Any]]) -> list[tuple[Key, Any]]:
    """The first candidate of every row, then the second, ...: whenever the time is over, every row has had some."""
    rounds = itertools.zip_longest(*([(key, tile) for tile in tiles] for key, tiles in wanted.items()))
    return [candidate for one_round in rounds for candidate in one_round if candidate is not None]


def measure(
    candidates: list[tuple[Key, Any]],
    check_all: Callable[[list[tuple[Key, Any]]], Iterator[Result]],
    timed: Callable[[Result], Result],
    is_over: Callable[[], bool] = lambda: False,
) -> Iterator[Result]:
    """The result of every candidate: first all are checked, then, with nothing else on the GPU, timed.

    Args:
        candidates: rows and their tiles.
        check_all: their results without times, in order.
        timed: adds the times.
        is_over: whether there is no time left.
    """
    bar = partial(tqdm, total=len(candidates), unit="tile", disable=None)
    for result in bar(list(bar(check_all(candidates), desc="checked")), desc="timed"):
        if result.no_numbers_because is None:
            result = result._replace(no_numbers_because=NO_TIME) if is_over() else timed(result)
        yield result


def check_in_processes(candidates: list[tuple[Key, Any]], until: float = float("inf")) -> Iterator[Result]:
    """Checks on all cores; a candidate that crashes takes nothing with it, because its process does nothing else.

    Args:
        candidates: rows and their tiles.
        until: what time.monotonic() says when it is over; candidates that are not done by then have no numbers.
    """
    with multiprocessing.get_context("spawn").Pool(maxtasksperchild=1) as pool:
        answers = [pool.apply_async(check_or_say_why, candidate) for candidate in candidates]
        for (key, tile), answer in zip(candidates, answers, strict=True):
            left = until - time.monotonic()
            try:
                yield answer.get(max(0.0, min(left, ANSWER_SECONDS)))
            except multiprocessing.TimeoutError:
                reason = NO_TIME if left < ANSWER_SECONDS else f"unavailable: no answer in {ANSWER_SECONDS} s"
                yield Result(key, tile, no_numbers_because=reason)


def fastest(results: Iterable[Result]) -> dict[Key, Result]:
    """The candidate with the least median of each row; no row has one without numbers."""
    best: dict[Key, Result] = {}
    for result in results:
        if result.p50_ms is not None and (result.key not in best or result.p50_ms < best[result.key].p50_ms):
            best[result.key] = result
    return best


def updated(rows: Iterable[Any], best: dict[Key, Result], capability: tuple[int, int], long: int) -> list[Any]:
    """The table with the rows measured on GPUs of that capability, in the place of those measured before."""
    rows = list(rows)
    measured = [
        type(rows[0])(r.key.kernel, capability, r.key.dtype, r.key.head_dim, _bound(r.key, long), r.tile, r.smem_bytes)
        for r in best.values()
    ]
    replaced = {row[:5] for row in measured}
    return [row for row in rows if row[:5] not in replaced] + measured


def _bound(key: Key, long: int) -> int:
    return long if key.seqlen == LONG_SEQLEN else key.seqlen


def write(folder: Path, results: Iterable[Result], device: torch.device) -> list[Result]:
    """Writes the two files, the lines as they come; returns the results."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tune.json").write_text(json.dumps(provenance(device), indent=2) + "\n")
    done = []
    with (folder / "tune.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        tile_fields = ("block_m", "block_n", "num_warps", "num_stages", "pairs")
        writer.writerow(("kernel", "dtype", "head_dim", "seqlen", *tile_fields, *Result._fields[2:]))
        for result in results:
            writer.writerow((*str(result.key).split(), *result.tile, *result[2:]))
            file.flush()
            done.append(result)
    return done


def choose_keys(safe: dict[Key, Any], quick: bool, words: list[str]) -> dict[Key, list[Any]]:
    """The candidates of each row that is asked for."""
    keys = [key for key in safe if set(words) <= set(str(key).split())]
    if quick:
        keys = [key for key in keys if key.head_dim == QUICK_HEAD_DIM and key.seqlen in QUICK_SEQLENS]
        keys.sort(key=lambda key: (str(key.dtype), -key.seqlen))
    return {key: (neighbours if quick else everything)(safe[key], key) for key in keys}


def main(arguments: list[str] | None = None) -> int:
    """Measures and writes; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune", description="Measure tiles of the Triton kernels."
    )
    parser.add_argument("--quick", action="store_true", help="the rows that matter most, in two minutes")
    parser.add_argument("--filter", nargs="+", default=[], metavar="WORD", help="only rows with all these words")
    parser.add_argument("--dry-run", action="store_true", help="say what would be measured")
    parser.add_argument("--out", type=Path, help="folder of tune.csv (default: benchmarks/results/<gpu>)")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    if missing := fastattn.backends.get("triton").why_missing():
        print(f"the triton backend {missing}; nothing was measured", file=sys.stderr)
        return 1
    from fastattn.triton_kernels import tiles

    wanted = choose_keys(safe_tiles(tiles.table()), options.quick, options.filter)
    if options.dry_run or not wanted:
        for key, candidates in wanted.items():
            print(f"{key}: {len(candidates)} tiles")
        print(f"{len(wanted)} rows, {sum(map(len, wanted.values()))} tiles")
        return 0 if wanted else 1
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        print(
            "no CUDA device of capability 8.0 or newer: see python -m fastattn.info; nothing was measured",
            file=sys.stderr,
        )
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    folder = options.out or Path(__file__).parent / "results" / folder_name(device)
    limits = {name: start + (seconds if options.quick else float("inf")) for name, seconds in QUICK_SECONDS.items()}
    check_all = partial(check_in_processes, until=limits["checks"])
    results = write(
        folder, measure(in_turn(wanted), check_all, take_time, lambda: time.monotonic() > limits["all"]), device
    )
    best = fastest(results)
    tiles.write(tiles.TABLE, updated(tiles.table(), best, tiles.gpu(device).capability, tiles.LONG))
    for key in {result.key for result in results} - set(best):
        print(f"{key}: no candidate gave numbers; it keeps its row", file=sys.stderr)
    print(f"wrote {len(best)} rows of {tiles.TABLE} and {folder}/tune.csv")
    return 0 if best else 1


if __name__ == "__main__":
    sys.exit(main())
