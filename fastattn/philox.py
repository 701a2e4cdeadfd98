"""Philox4x32-10, the counter-based random numbers of dropout, in plain torch (Salmon et al. 2011).

A kernel computes the bits of any tile by itself, in any order, and every backend gets the same ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW_32 = 0xFFFFFFFF


def _mulhilo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32-bit words of a * b, for 32-bit values held in int64."""
    # In 16-bit halves, because a signed 64-bit integer cannot hold the whole product.
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox4x32(seed: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit random words per counter, ten rounds.

    Args:
        seed: (1,) int64; its low and high 32 bits are the key.
        counter: four int64 tensors of 32-bit values that broadcast together.
    """
    c0, c1, c2, c3 = counter
    key0, key1 = seed & _LOW_32, (seed >> 32) & _LOW_32
    for _ in range(10):
        high0, low0 = _mulhilo(_PHILOX_MULTIPLIERS[0], c0)
        high1, low1 = _mulhilo(_PHILOX_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + _PHILOX_WEYL[0]) & _LOW_32, (key1 + _PHILOX_WEYL[1]) & _LOW_32
    return c0, c1, c2, c3


def keep_mask(seed: Tensor, sequences: Tensor, nheads: int, seqlen_q: int, seqlen_k: int, dropout_p: float) -> Tensor:
    """Dropout bits of the sequences with these batch indices, (len(sequences), nheads, seqlen_q, seqlen_k) bool."""
    device = seed.device
    key_group = torch.arange((seqlen_k + 3) // 4, device=device)
    query = torch.arange(seqlen_q, device=device)[:, None]
    head = torch.arange(nheads, device=device)[:, None, None]
    words = philox4x32(seed, (key_group, query, head, sequences[:, None, None, None]))
    return torch.stack(torch.broadcast_tensors(*words), -1).flatten(-2)[..., :seqlen_k] >= round(dropout_p * 2**32)
