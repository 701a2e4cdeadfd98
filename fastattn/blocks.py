"""Grid sizes: the partition of a fused pass into blocks (Triton: programs) of a GPU."""

from __future__ import annotations

import math

import torch

from .params import AttentionParams

MAX_BIAS_COPIES = 64


def count(n: int, block: int) -> int:
    """The number of blocks for n items; at least 1, because a block has to clear the tokens of no sequence."""
    return -(-n // block) or 1


def bias_tiles_and_copies(p: AttentionParams, shape: torch.Size, tile: tuple[int, int], busy: int) -> tuple[int, int]:
    """The tiles of a bias, and the copies of it in which partial sums of its gradient are kept.

    There are as many copies as give the GPU enough to do, but none without a tile of scores to sum up.

    Args:
        p: the problem.
        shape: of the bias, 4-D.
        tile: queries and keys of a tile.
        busy: blocks that keep the GPU busy.
    """
    scores = (p.batch_size(), p.q.shape[1], p.max_seqlen_q, p.max_seqlen_k)
    blocks = (1, 1, *tile)
    tiles = math.prod(count(size, block) for size, block in zip(shape, blocks, strict=True))
    summed = [count(n, block) for n, size, block in zip(scores, shape, blocks, strict=True) if size == 1]
    return tiles, min(MAX_BIAS_COPIES, math.prod(summed), count(busy, tiles))
