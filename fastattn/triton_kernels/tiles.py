"""Which tiles the Triton kernels take: tiles.csv is chosen from by data, never by timing in the user's process.

A row is one kernel's tile for the calls that all its conditions fit: `capability` of the GPU that measured it, or
"any"; `dtype` of the tensors; upper bounds of the larger head_dim and of the longer sequence, or "any". `smem_bytes` is
what the kernel takes of a block's shared memory there at most. The rows for any GPU keep to the 99 KB that a block has
on the smallest GPUs of capability 8.0 and newer, and up to head_dim 128 common calls spill no register.
`python -m benchmarks.tune` measures rows for the GPU it runs on.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from ..seam import Seam

TABLE = Path(__file__).with_name("tiles.csv")
KERNELS = ("fwd", "bwd", "dq", "dkdv", "dbias")
LONG = 2**31  # a bound that no length passes
BUSY_WARPS = 16  # of a multiprocessor


class Tile(NamedTuple):
    """A tile of the scores, and the warps and stages of the program that computes it."""

    block_m: int  # queries
    block_n: int  # keys
    num_warps: int
    num_stages: int
    pairs: int = 1  # (batch, head) of a program at most


class Gpu(NamedTuple):
    """The facts about a GPU that the choice of a tile depends on."""

    capability: tuple[int, int] | None  # None: the interpreter
    multiprocessors: int
    smem_bytes: int  # of a block

    def programs(self, tile: Tile) -> int:
        """The number of programs that keep the GPU busy."""
        return self.multiprocessors * max(1, BUSY_WARPS // tile.num_warps)

    def share(self, heads: int, tile: Tile) -> int:
        """The number of (batch, head) pairs that a program takes: a divisor that leaves the GPU busy."""
        pairs = tile.pairs
        while pairs > 1 and (heads % pairs or heads // pairs < self.programs(tile)):
            pairs //= 2
        return pairs


class Row(NamedTuple):
    """A line of the table."""

    kernel: str
    capability: tuple[int, int] | None  # None: any
    dtype: torch.dtype
    head_dim: int
    seqlen: int
    tile: Tile
    smem_bytes: int


# In the interpreter every operation costs the same however large its tile is.
INTERPRETER = Tile(128, 128, num_warps=BUSY_WARPS, num_stages=1, pairs=2)


@functools.cache
def block(n: int) -> int:
    """The least size of a tile that n fits in: a power of 2 that tensor cores can multiply."""
    return max(16, 1 << (n - 1).bit_length()) if n > 0 else 16


def read(file: Path) -> tuple[Row, ...]:
    """The rows of such a table."""
    with file.open(newline="") as lines:
        return tuple(
            Row(
                line["kernel"],
                _capability(line["capability"]),
                getattr(torch, line["dtype"]),
                int(line["head_dim"]),
                LONG if line["seqlen"] == "any" else int(line["seqlen"]),
                Tile(*(int(line[name]) for name in Tile._fields)),
                int(line["smem_bytes"]),
            )
            for line in csv.DictReader(lines)
        )


def _capability(text: str) -> tuple[int, int] | None:
    major, _, minor = text.partition(".")
    return None if text == "any" else (int(major), int(minor))


def _order(row: Row) -> tuple[Any, ...]:
    return KERNELS.index(row.kernel), row.capability or (0, 0), str(row.dtype), row.head_dim, row.seqlen


def write(file: Path, rows: Iterable[Row]) -> None:
    """Such a table of these rows, in order of their conditions."""
    head = ("kernel", "capability", "dtype", "head_dim", "seqlen", *Tile._fields, "smem_bytes")
    lines = sorted(rows, key=_order)
    with file.open("w", newline="") as text:
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(head)
        for row in lines:
            capability = "any" if row.capability is None else ".".join(map(str, row.capability))
            dtype, seqlen = str(row.dtype).removeprefix("torch."), "any" if row.seqlen == LONG else row.seqlen
            writer.writerow((row.kernel, capability, dtype, row.head_dim, seqlen, *row.tile, row.smem_bytes))


@functools.cache
def table() -> tuple[Row, ...]:
    """The rows of tiles.csv."""
    return read(TABLE)


@functools.cache
def gpu(device: torch.device) -> Gpu:
    """The device's; on the CPU the interpreter's."""
    if device.type == "cpu":
        return Gpu(None, 1, 0)
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index)
    capability = torch.cuda.get_device_capability(device)
    return Gpu(capability, properties["multiprocessor_count"], properties["max_shared_mem"])


@functools.cache
def choose(
    kernel: str, gpu: Gpu, dtype: torch.dtype, head_dims: tuple[int, int], seqlens: tuple[int, int]
) -> Tile | None:
    """The tile of the row with the tightest bounds, a measured one before one for any GPU; cut to the sequences.

    Args:
        kernel: one of KERNELS.
        gpu: where it runs; a row that takes more shared memory than it has does not fit.
        dtype: of q, k and v.
        head_dims, seqlens: of (q and k, v) and of (queries, keys), each as the block that it fits in.

    Returns:
        None of "bwd" if the sequences are too long for one tile.

    Raises:
        ValueError: no row fits.
    """
    return choose_from(table(), kernel, gpu, dtype, head_dims, seqlens)


def choose_from(
    rows: tuple[Row, ...],
    kernel: str,
    gpu: Gpu,
    dtype: torch.dtype,
    head_dims: tuple[int, int],
    seqlens: tuple[int, int],
) -> Tile | None:
    """The choice of `choose` from another table."""
    head_dim, seqlen = max(head_dims), max(seqlens)
    if gpu.capability is None:
        fitting = [INTERPRETER] if kernel != "bwd" or seqlen <= INTERPRETER.block_m else []
    else:
        found = [
            row
            for row in rows
            if (row.kernel, row.dtype) == (kernel, dtype)
            and row.capability in (None, gpu.capability)
            and (head_dim <= row.head_dim and seqlen <= row.seqlen)
            and row.smem_bytes <= gpu.smem_bytes
        ]
        found.sort(key=lambda row: (row.head_dim, row.seqlen, row.capability is None))
        fitting = [row.tile for row in found]
    if not fitting and kernel == "bwd":
        return None
    if not fitting:
        raise ValueError(f"no tiles of {kernel} for {dtype}, head_dim {head_dim} in {gpu.smem_bytes} bytes")
    tile = fitting[0]
    return tile._replace(block_m=min(tile.block_m, seqlens[0]), block_n=min(tile.block_n, seqlens[1]))


_choice: Seam[Callable[..., Tile | None]] = Seam(choose)


def chosen(
    kernel: str, gpu: Gpu, dtype: torch.dtype, head_dims: tuple[int, int], seqlens: tuple[int, int]
) -> Tile | None:
    """The tile that a call takes: `choose`'s, unless another choice is forced."""
    return _choice.value(kernel, gpu, dtype, head_dims, seqlens)


def forced(choice: Callable[..., Tile | None]) -> AbstractContextManager[None]:
    """Calls inside, and their backward passes in whatever thread, take this choice, called like `choose`."""
    return _choice.replaced(choice)
