"""The tuner: which tiles it tries, what it makes of results, and what it writes; with timers that only pretend."""

from __future__ import annotations

import csv
import json
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import fastattn
from benchmarks import tune, tuning
from benchmarks.command import Command
from benchmarks.result_table import ResultTable
from benchmarks.tile_candidates import LONG_SEQLEN, Key, choose_keys, everything, safe_tiles
from benchmarks.tuning import Result, Trial
from fastattn.triton_kernels import attention, tiles
from fastattn.triton_kernels.tiles import Row, Tile
from tests.support.triton_attention import DEVICE, on_triton

ROOT = Path(__file__).parents[2]
HALF = torch.float16


def milliseconds(tile: Tile) -> float:
    return abs(tile.block_m - 32) + abs(tile.num_warps - 4) + tile.num_stages + 1 / tile.pairs


@pytest.fixture
def pretend():
    """A checker that refuses tiles of 64 queries, and a timer."""

    def check_all(candidates):
        for key, tile in candidates:
            reason = "wrong: out is off" if tile.block_m == 64 else None
            yield Result(key, tile, smem_bytes=7, no_numbers_because=reason)

    def timed(result):
        assert result.tile.block_m != 64, "a wrong candidate is timed"
        p50 = milliseconds(result.tile)
        return result._replace(p50_ms=p50, p20_ms=0.9 * p50, p80_ms=1.1 * p50)

    return check_all, timed


# ---- what is tried ----


def test_every_row_for_any_gpu_is_measured_but_the_bias_gradients() -> None:
    safe = safe_tiles(tiles.table())
    assert len(safe) == sum(row.capability is None and row.kernel != "dbias" for row in tiles.table())
    assert {key.kernel for key in safe} == {"fwd", "bwd", "dq", "dkdv"}
    wanted = choose_keys(safe, False)
    assert wanted.keys() == safe.keys() and all(len(found) > 5 for found in wanted.values())


def test_the_quick_run_tries_the_safe_tile_first_and_its_neighbours() -> None:
    safe = safe_tiles(tiles.table())
    wanted = choose_keys(safe, True)
    assert {(key.kernel, str(key.dtype)) for key in wanted} >= {("fwd", "torch.float32"), ("dq", "torch.bfloat16")}
    assert {key.head_dim for key in wanted} == {64} and {key.seqlen for key in wanted} == {64, LONG_SEQLEN}
    for key, candidates in wanted.items():
        assert candidates[0] == safe[key]
        changes = [sum(x != y for x, y in zip(tile, safe[key], strict=True)) for tile in candidates]
        assert changes == [0] + [1] * (len(candidates) - 1) and len(candidates) >= 4
    assert sum(map(len, wanted.values())) < 150


def test_candidates_make_sense() -> None:
    short, long = Key("bwd", HALF, 64, 32), Key("dq", HALF, 64, LONG_SEQLEN)
    for tile in everything(Tile(16, 32, 2, 1), short):
        assert tile.block_n == 32 and tile.block_m <= 32
    assert {tile.pairs for tile in everything(Tile(16, 32, 2, 1), short)} == {1, 2, 4, 8}
    assert {tile.pairs for tile in everything(Tile(64, 64, 4, 2), long)} == {1}
    assert max(tile.block_m for tile in everything(Tile(64, 64, 4, 2), long)) == 128


def test_filter() -> None:
    patterns = [re.compile(word) for word in ("fwd", "float16", "any")]
    keys = choose_keys(safe_tiles(tiles.table()), False, patterns)
    assert {str(key) for key in keys} == {f"fwd float16 {head_dim} any" for head_dim in (64, 128, 256)}


def test_every_row_gets_candidates_before_any_gets_all() -> None:
    assert tuning.in_turn({"a": [1, 2, 3], "b": [4], "c": [5, 6]}) == [
        *(("a", 1), ("b", 4), ("c", 5)),
        *(("a", 2), ("c", 6), ("a", 3)),
    ]


# ---- what becomes of results ----


def test_the_fastest_right_candidate_becomes_the_row(pretend, tmp_path: Path) -> None:
    safe = {key: tile for key, tile in safe_tiles(tiles.table()).items() if key.head_dim == 64}
    wanted = {key: everything(tile, key) for key, tile in safe.items()}
    with ResultTable(Command(torch.device("cpu"), "full", (), tmp_path), "tune", tuning.COLUMNS) as table:
        results = tuning.write(table, tuning.measure(tuning.in_turn(wanted), *pretend))
    best = tuning.fastest(results)
    assert best.keys() == wanted.keys()
    for key, result in best.items():
        right = [tile for tile in wanted[key] if tile.block_m != 64]
        assert milliseconds(result.tile) == min(map(milliseconds, right))

    rows = tuning.updated(tiles.table(), best, (9, 0))
    tiles.write(tmp_path / "tiles.csv", rows)
    again = tiles.read(tmp_path / "tiles.csv")
    assert sorted(map(str, again)) == sorted(map(str, rows)) and set(tiles.table()) < set(again)
    for key, result in best.items():
        seqlen = min(key.seqlen, 512)
        call = (key.kernel, tiles.Gpu((9, 0), 132, 227 << 10), key.dtype, (64, 64), (seqlen, seqlen))
        assert tiles.choose_from(again, *call) == result.tile

    with (tmp_path / "tune.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == sum(map(len, wanted.values())) and json.loads((tmp_path / "tune.json").read_text())
    for line in lines:
        assert (line["no_numbers_because"] == "wrong: out is off") == (line["block_m"] == "64") == (not line["p50_ms"])


def test_measuring_again_replaces_only_the_rows_of_that_gpu() -> None:
    key = Key("fwd", HALF, 64, LONG_SEQLEN)
    tables = [list(tiles.table())]
    for capability, tile in (((9, 0), Tile(16, 16, 1, 1)), ((8, 0), Tile(32, 32, 1, 1)), ((9, 0), Tile(64, 64, 1, 1))):
        best = tuning.fastest([Result(key, tile, 5, 1.0, 1.0, 1.0)])
        tables.append(tuning.updated(tables[-1], best, capability))
    assert [len(table) - len(tables[0]) for table in tables] == [0, 1, 2, 2]
    measured = {row.capability: row for row in tables[-1] if row.capability is not None}
    assert measured[9, 0] == Row("fwd", (9, 0), HALF, 64, tiles.LONG, Tile(64, 64, 1, 1), 5)
    assert measured[8, 0].tile == Tile(32, 32, 1, 1)


def test_what_there_is_no_time_for_gets_no_numbers(pretend) -> None:
    key = Key("fwd", HALF, 64, 64)
    timed = []

    def is_over() -> bool:
        timed.append(None)
        return len(timed) > 1

    candidates = [(key, Tile(32, 32, 4, 1)), (key, Tile(16, 32, 4, 1))]
    first, second = tuning.measure(candidates, *pretend, is_over)
    assert first.p50_ms is not None and second.no_numbers_because == "not measured: no time left"
    assert tuning.fastest([second]) == {}


def test_checks_run_in_processes_of_their_own_and_say_why_they_fail(monkeypatch) -> None:
    key = Key("fwd", HALF, 64, 64)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (failed,) = tuning.check_in_processes([(key, "no tile")], Trial())
    assert failed.no_numbers_because.startswith("unavailable: ") and failed.p50_ms is None
    (late,) = tuning.check_in_processes([(key, "no tile")], Trial(), until=time.monotonic())
    assert late.no_numbers_because == "not measured: no time left"


@pytest.mark.triton
@pytest.mark.parametrize(
    ("kernel", "seqlen", "launched"),
    [("fwd", 64, {"fwd", "bwd"}), ("bwd", 64, {"fwd", "bwd"}), ("dq", 64, {"fwd", "dq", "dkdv"}), ("dkdv", 200, None)],
)
def test_the_tile_is_forced_on_its_kernel_alone(kernel: str, seqlen: int, launched) -> None:
    names, tile, found = {v: k for k, v in attention.KERNELS.items()}, Tile(16, 64, 1, 1), {}

    class Recorder(attention.Device):
        def launch(self, kernel, programs, tile, p, arguments):
            found[names[kernel]] = tile
            return says_shared_memory(len(found))

    q = torch.zeros(1, 1, seqlen, 16, device=DEVICE, requires_grad=True)
    launcher = tuning.SharedMemory(kernel, Recorder())
    with on_triton(), tuning.forced(Key(kernel, torch.float32, 64, seqlen), tile, launcher):
        torch.autograd.grad(fastattn.scaled_dot_product_attention(q, q, q).sum(), q)
    assert found.keys() == (launched or {"fwd", "dq", "dkdv"})
    assert [name for name in found if found[name] == tile] == [kernel]
    assert launcher.smem_bytes == [1 + list(found).index(kernel)]


def says_shared_memory(smem_bytes: int) -> SimpleNamespace:
    """A stand-in for what Triton compiled."""
    return SimpleNamespace(metadata=SimpleNamespace(shared=smem_bytes))


class AtHand(attention.Device):
    """The device at hand, on which every launch says 7 bytes."""

    def launch(self, kernel, programs, tile, p, arguments):
        super().launch(kernel, programs, tile, p, arguments)
        return says_shared_memory(7)


SMALL = Trial(torch.device(DEVICE), AtHand(), tokens=32, nheads=1, warm_up=2, repetitions=2)


@pytest.mark.triton
@pytest.mark.parametrize("kernel", ["fwd", "bwd", "dq", "dkdv"])
def test_a_right_candidate_is_timed(kernel: str) -> None:
    with on_triton():
        checked = tuning.check(Key(kernel, torch.float32, 64, 16), Tile(16, 16, 1, 1), SMALL)
        assert checked.no_numbers_because is None and checked.smem_bytes == 7
        timed = tuning.take_time(checked, SMALL)
    assert 0 < timed.p20_ms <= timed.p50_ms <= timed.p80_ms


class TwiceAsSharp(AtHand):
    """The device at hand, with a forward kernel that doubles the scores."""

    def launch(self, kernel, programs, tile, p, arguments):
        is_forward = kernel is attention.KERNELS["fwd"]
        sharper = {"scale_log2": 2 * arguments["scale_log2"]} if is_forward else {}
        return super().launch(kernel, programs, tile, p, arguments | sharper)


@pytest.mark.triton
def test_a_wrong_candidate_has_a_reason() -> None:
    key, tile, sharp = Key("fwd", torch.float32, 64, 16), Tile(16, 16, 1, 1), SMALL._replace(launcher=TwiceAsSharp())
    with on_triton():
        assert tuning.check(key, tile, sharp).no_numbers_because.startswith("wrong: out is off by")
    assert tuning.check(key, tile, sharp).no_numbers_because.startswith("unavailable: ") or DEVICE != "cpu"


# ---- the command ----


def test_without_a_gpu_nothing_is_measured(monkeypatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main(["--quick", "--out", str(tmp_path / "results")]) == 1
    assert "no CUDA device of capability 8.0" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_dry_run(capsys) -> None:
    assert tune.main(["--dry-run", "--quick", "--filter", "dkdv"]) == 0
    said = capsys.readouterr().out
    assert "dkdv float16 64 any: " in said and "3 rows, " in said and "fwd" not in said
    assert tune.main(["--dry-run", "--filter", "nothing"]) == 1
