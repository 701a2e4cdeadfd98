"""Which tiles the Triton kernels take: a table to choose from by data, never by timing in the user's process."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """How one pass divides its work."""

    block_m: int  # queries
    block_n: int  # keys
    num_warps: int
    num_stages: int


class Tiles(NamedTuple):
    """One for each pass."""

    fwd: Tile
    dq: Tile
    dkdv: Tile
    dbias: Tile


class Row(NamedTuple):
    """The tiles of the calls that all of its conditions fit."""

    capability: tuple[int, int] | None  # of the GPU that measured them; None: any GPU, within what every one offers
    element_size: int  # bytes
    head_dim: int  # the larger one's upper bound
    seqlen_q: int | None  # upper bound; None: any
    tiles: Tiles


# In order of preference, so a measured row goes before the one for any GPU. Those keep to the 99 KB of shared memory
# that a block has on the smallest GPUs (8.6, 8.9 and 12.0) and, up to head_dim 128, to registers without spills.
TABLE = (
    Row(None, 2, 64, None, Tiles(Tile(128, 64, 8, 2), Tile(64, 32, 4, 2), Tile(32, 64, 4, 1), Tile(32, 64, 4, 2))),
    Row(None, 2, 128, None, Tiles(Tile(64, 32, 8, 2), Tile(64, 32, 4, 2), Tile(32, 32, 4, 1), Tile(16, 32, 4, 2))),
    Row(None, 2, 256, None, Tiles(Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(16, 32, 8, 1), Tile(16, 32, 8, 1))),
    Row(None, 4, 64, None, Tiles(Tile(32, 32, 4, 1), Tile(32, 32, 8, 1), Tile(16, 64, 8, 1), Tile(32, 32, 8, 1))),
    Row(None, 4, 128, None, Tiles(Tile(32, 32, 8, 1), Tile(16, 16, 8, 1), Tile(16, 32, 4, 1), Tile(32, 32, 8, 1))),
    Row(None, 4, 256, None, Tiles(Tile(16, 16, 4, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1))),
)
# In the interpreter every operation costs the same however large its tile is.
INTERPRETER = Tiles(*[Tile(128, 128, 4, 1)] * 4)


@functools.cache
def choose(capability: tuple[int, int] | None, element_size: int, head_dim: int, seqlen_q: int) -> Tiles:
    """The first row that fits; a capability of None is the interpreter's."""
    if capability is None:
        return INTERPRETER
    for row in TABLE:
        is_its_gpu = row.capability in (None, capability)
        is_its_size = head_dim <= row.head_dim and (row.seqlen_q is None or seqlen_q <= row.seqlen_q)
        if is_its_gpu and is_its_size and element_size == row.element_size:
            return row.tiles
    raise ValueError(f"no tiles for head_dim {head_dim} in elements of {element_size} bytes")


def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors the device has."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
