"""The table of tiles: every row can be chosen, an unknown GPU gets a safe one, and none that does not fit."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from fastattn.triton_kernels import tiles
from fastattn.triton_kernels.tiles import Gpu, Row, Tile

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
UNKNOWN = Gpu((99, 0), 132, 99 << 10)
HALF = torch.float16


def choose(
    kernel: str, gpu: Gpu, dtype: torch.dtype, head_dim: int, seqlen: int, rows: tuple[Row, ...] | None = None
) -> Tile | None:
    return tiles.choose_from(rows or tiles.table(), kernel, gpu, dtype, (head_dim, 16), (seqlen, seqlen))


def test_every_row_can_be_chosen() -> None:
    for row in tiles.table():
        gpu = UNKNOWN if row.capability is None else UNKNOWN._replace(capability=row.capability, smem_bytes=227 << 10)
        assert choose(row.kernel, gpu, row.dtype, row.head_dim, min(row.seqlen, 4096)) == row.tile


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_unknown_gpu_gets_a_tile_for_every_call(dtype: torch.dtype) -> None:
    for head_dim in (16, 32, 64, 128, 256):
        for seqlen in (16, 32, 64, 128, 256, 4096):
            for kernel in tiles.KERNELS:
                tile = choose(kernel, UNKNOWN, dtype, head_dim, seqlen)
                if kernel != "bwd":
                    assert tile is not None and max(tile[:2]) <= seqlen
                elif tile is not None:
                    assert tile.block_n == seqlen, "all keys are one tile"
    assert choose("bwd", UNKNOWN, dtype, 64, 16) is not None
    assert choose("bwd", UNKNOWN, dtype, 64, 256) is None
    with pytest.raises(ValueError, match="no tiles of fwd for torch.float16, head_dim 512 in 101376 bytes"):
        choose("fwd", UNKNOWN, HALF, 512, 16)


def test_the_tightest_bounds_count_and_then_the_gpu_that_measured() -> None:
    any_gpu, measured, short = (Tile(n, n, 4, 1) for n in (32, 64, 128))
    rows = (
        Row("fwd", None, HALF, 64, tiles.LONG, any_gpu, 0),
        Row("fwd", (9, 0), HALF, 64, tiles.LONG, measured, 0),
        Row("fwd", None, HALF, 64, 128, short, 0),
        Row("fwd", (9, 0), HALF, 256, tiles.LONG, Tile(16, 16, 1, 1), 0),
    )
    assert choose("fwd", UNKNOWN, HALF, 64, 4096, rows) == any_gpu
    assert choose("fwd", Gpu((9, 0), 1, 1), HALF, 64, 4096, rows) == measured
    assert choose("fwd", Gpu((8, 0), 1, 1), HALF, 64, 4096, rows) == any_gpu
    assert choose("fwd", Gpu((9, 0), 1, 1), HALF, 64, 128, rows) == short
    assert choose("fwd", Gpu((9, 0), 1, 1), HALF, 128, 4096, rows) == Tile(16, 16, 1, 1)
    with pytest.raises(ValueError, match="no tiles of fwd for torch.float32"):
        choose("fwd", UNKNOWN, torch.float32, 64, 128, rows)


def test_a_row_that_takes_too_much_shared_memory_is_passed_over() -> None:
    large, small = Tile(128, 128, 8, 3), Tile(32, 32, 4, 1)
    rows = tuple(Row(k, None, HALF, 64, 128, large, 100_000) for k in ("fwd", "bwd"))
    rows += (Row("fwd", None, HALF, 64, tiles.LONG, small, 30_000),)
    assert choose("fwd", UNKNOWN, HALF, 64, 128, rows) == large
    assert choose("bwd", UNKNOWN, HALF, 64, 128, rows) == large
    assert choose("fwd", UNKNOWN._replace(smem_bytes=65_536), HALF, 64, 128, rows) == small
    assert choose("bwd", UNKNOWN._replace(smem_bytes=65_536), HALF, 64, 128, rows) is None


def test_no_tile_is_larger_than_the_sequences() -> None:
    rows = (Row("fwd", None, HALF, 64, tiles.LONG, Tile(128, 64, 8, 2), 0),)
    chosen = tiles.choose_from(rows, "fwd", UNKNOWN, HALF, (64, 64), (16, 4096))
    assert chosen == Tile(16, 64, 8, 2)
    assert [tiles.block(n) for n in (0, 1, 16, 17, 64, 65)] == [16, 16, 16, 32, 64, 128]


def test_a_forced_choice_holds_in_every_thread_and_ends() -> None:
    forced, call = Tile(16, 32, 1, 1), ("fwd", UNKNOWN, HALF, (64, 64), (64, 64))
    seen = []
    with tiles.forced(lambda *call: forced):
        thread = threading.Thread(target=lambda: seen.append(tiles.chosen(*call)))
        thread.start()
        thread.join()
    assert seen == [forced]
    assert tiles.chosen(*call) == tiles.choose(*call) != forced


@pytest.mark.parametrize(
    ("heads", "multiprocessors", "pairs"), [(4096, 1, 8), (4096, 132, 4), (4096, 1000, 1), (12, 1, 2), (9, 1, 1)]
)
def test_pairs_of_a_program_leave_the_gpu_busy(heads: int, multiprocessors: int, pairs: int) -> None:
    """4 warps per program: 4 programs keep a multiprocessor busy."""
    gpu = Gpu((9, 0), multiprocessors, 0)
    assert gpu.share(heads, Tile(16, 16, num_warps=4, num_stages=1, pairs=8)) == pairs


def test_the_table_is_read_as_it_is_written(tmp_path: Path) -> None:
    rows = (
        Row("dq", (9, 0), HALF, 64, tiles.LONG, Tile(64, 32, 4, 2), 1234),
        Row("fwd", (8, 6), torch.float32, 128, 64, Tile(64, 64, 8, 3, 4), 99),
        Row("fwd", None, torch.bfloat16, 64, 16, Tile(16, 16, 1, 1, 8), 0),
    )
    tiles.write(tmp_path / "tiles.csv", rows)
    assert sorted(map(str, tiles.read(tmp_path / "tiles.csv"))) == sorted(map(str, rows))
    tiles.write(tmp_path / "again.csv", tiles.table())
    assert (tmp_path / "again.csv").read_text() == tiles.TABLE.read_text()
