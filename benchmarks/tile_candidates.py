"""The tiles of Triton kernels that benchmarks.tune tries, by the row of their table, and the cases that time them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from typing import NamedTuple

import torch

from benchmarks.cases import AttentionCase, short, square
from fastattn.triton_kernels.tiles import Row, Tile

LONG_SEQLEN = 4096  # times the rows for any length
QUICK_HEAD_DIM, QUICK_SEQLENS = 64, (64, LONG_SEQLEN)
TUNED = ("fwd", "bwd", "dq", "dkdv")  # the bias gradient keeps its row


class Key(NamedTuple):
    """A row of the table of tiles, by its conditions."""

    kernel: str
    dtype: torch.dtype
    head_dim: int
    seqlen: int  # LONG_SEQLEN: any

    def __str__(self) -> str:
        return " ".join(self.words())

    def words(self) -> tuple[str, ...]:
        """The conditions as they stand in the table."""
        return self.kernel, short(self.dtype), str(self.head_dim), "any" if self.is_long() else str(self.seqlen)

    def is_long(self) -> bool:
        """True for the row of sequences of any length."""
        return self.seqlen == LONG_SEQLEN

    def case(self, tokens: int, nheads: int) -> AttentionCase:
        """The case that times it: the padded sentences of a batch of that many tokens, or long sequences."""
        mask = "none" if self.is_long() else "padding"
        return square("tune", tokens // self.seqlen, nheads, self.seqlen, self.head_dim, mask, self.dtype)


def safe_tiles(rows: Iterable[Row]) -> dict[Key, Tile]:
    """The tiles for any GPU, by the row to be measured."""
    found = {}
    for row in rows:
        if row.capability is None and row.kernel in TUNED:
            found[Key(row.kernel, row.dtype, row.head_dim, min(row.seqlen, LONG_SEQLEN))] = row.tile
    return found


def neighbours(tile: Tile, key: Key) -> list[Tile]:
    """The tile and those that differ from it in one field by one step."""
    limits = {"block_m": (16, 128), "block_n": (16, 128), "num_warps": (1, 16), "pairs": (1, 8)}
    found = [tile, tile._replace(num_stages=tile.num_stages + 1)]
    if tile.num_stages > 1:
        found.append(tile._replace(num_stages=tile.num_stages - 1))
    for name, (least, most) in limits.items():
        value = getattr(tile, name)
        found += [tile._replace(**{name: n}) for n in (value // 2, value * 2) if least <= n <= most]
    return [t for t in found if _makes_sense(t, key)]


def everything(tile: Tile, key: Key) -> list[Tile]:
    """All tiles of the product that make sense."""
    sizes, pairs = (16, 32, 64, 128), (1, 2, 4, 8)
    product = itertools.product(sizes, sizes, (1, 2, 4, 8), (1, 2, 3), pairs)
    return [t for values in product if _makes_sense(t := Tile(*values), key)]


def _makes_sense(tile: Tile, key: Key) -> bool:
    """True if it fits the sequences, has all keys where it has to, and enough but not too much work for a warp."""
    fits = max(tile.block_m, tile.block_n) <= key.seqlen and (key.kernel != "bwd" or tile.block_n == key.seqlen)
    scores_of_warp = tile.block_m * tile.block_n // tile.num_warps
    may_pair = not key.is_long() and key.kernel not in ("dq", "dkdv")
    return fits and 64 <= scores_of_warp <= 2048 and (tile.pairs == 1 or may_pair)


def choose_keys(safe: dict[Key, Tile], quick: bool, patterns: Iterable[re.Pattern[str]] = ()) -> dict[Key, list[Tile]]:
    """The candidates of each row that is asked for: by patterns of which each matches a word of the row."""
    keys = [key for key in safe if all(any(map(pattern.fullmatch, key.words())) for pattern in patterns)]
    if quick:
        keys = [key for key in keys if key.head_dim == QUICK_HEAD_DIM and key.seqlen in QUICK_SEQLENS]
        keys.sort(key=lambda key: (str(key.dtype), -key.seqlen))
    return {key: (neighbours if quick else everything)(safe[key], key) for key in keys}
