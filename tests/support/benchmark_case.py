"""Tiny cases of the benchmark of attention."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from benchmarks.cases import AttentionCase, square


def case(mask: str = "none", dtype: torch.dtype = torch.float32, **changes: Any) -> AttentionCase:
    """Two sentences of 9 tokens, two heads."""
    return dataclasses.replace(square("masks", 2, 2, 9, 16, mask, dtype), **changes)


def packed(mask: str = "none") -> AttentionCase:
    """Three sentences end to end."""
    lengths = (3, 9, 5)
    return case(mask, layout="packed", batch=3, lengths_q=lengths, lengths_k=lengths)
