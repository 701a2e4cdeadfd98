"""Which calls torch's memory-efficient kernel computes faster than a fused backend that can take them, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .params import AttentionParams


class Contest(NamedTuple):
    """What decides between a fused backend and torch's memory-efficient kernel, where a row of FASTER_IN_TORCH asks."""

    seqlen: int  # the longer of the call's two lengths
    needs_grad: bool


@dataclass(frozen=True)
class FasterInTorch:
    """Calls that a fused backend can take, and that torch's memory-efficient kernel computes faster.

    They run there, unless a backend is named, where F.scaled_dot_product_attention says the same and the longer of the
    two lengths is above the limit.
    """

    backend: str
    dtype: torch.dtype
    capabilities: tuple[tuple[int, int], tuple[int, int]]  # from the first on, below the second
    seqlen: int  # the limit where a gradient is asked for
    seqlen_without_grad: int | None  # None: no such call is faster there

    def has(self, contest: Contest) -> bool:
        """Whether the call is one of them."""
        limit = self.seqlen if contest.needs_grad else self.seqlen_without_grad
        return limit is not None and contest.seqlen > limit

    def in_words(self) -> str:
        """Which calls they are, for a reader."""
        words = f"more than {self.seqlen} tokens with a gradient"
        return words if self.seqlen_without_grad is None else f"{words}, or {self.seqlen_without_grad} without"


# The backward of the cuda kernels multiplies in float32 and uses no tensor cores yet. Limits by prediction
# (docs/volta_report.md), from nothing measured.
FASTER_IN_TORCH: tuple[FasterInTorch, ...] = (
    FasterInTorch("cuda", torch.float16, ((7, 0), (7, 5)), 96, None),
    FasterInTorch("cuda", torch.float16, ((7, 5), (8, 0)), 96, 128),
)


def row(dtype: torch.dtype, capability: tuple[int, int] | None) -> FasterInTorch | None:
    """The row for tensors of this type on a GPU of this compute capability, or None."""
    for known in FASTER_IN_TORCH:
        first, end = known.capabilities
        if capability is not None and dtype == known.dtype and first <= capability < end:
            return known
    return None


def of(p: AttentionParams, capability: tuple[int, int]) -> Contest | None:
    """What decides; None where no row asks, torch has no such kernel, or results have to be reproducible."""
    # Only here lengths are read: where no row asks, torch.compile must not guard them.
    if row(p.q.dtype, capability) is None or torch.are_deterministic_algorithms_enabled():
        return None
    inputs = [x for x in (p.q, p.k, p.v, p.bias) if x is not None]
    if not _is_memory_efficient(*inputs[:3]):
        return None
    needs_grad = torch.is_grad_enabled() and any([x.requires_grad for x in inputs])
    return Contest(max(p.max_seqlen_q, p.max_seqlen_k), needs_grad)


def _is_memory_efficient(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether torch's memory-efficient kernel takes half-precision tensors; its other one stores scores in float32."""
    if q.is_nested or q.dim() != 4 or q.shape[1] != k.shape[1]:
        return False
    return all([x.shape[-1] % 8 == 0 and x.stride(-1) == 1 for x in (q, k, v)])
