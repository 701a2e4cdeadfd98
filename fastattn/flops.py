"""Floating-point operations of the torch operators, for torch.utils.flop_counter.

Counted as torch counts its own attention: the matrix products, two forward and five backward, of every query with every
key of its sequence, whatever mask or band forbids. A packed call counts its sequences' own lengths where the numbers
are there to be read, and the longest length for each where they are not (fake tensors, tensors without memory).
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import operators  # noqa: F401  defines them
from .params import AttentionParams

COUNTER = "torch.utils.flop_counter"


def forward_flops(*args: Any, **kwargs: Any) -> int:
    """The operations of `fastattn::attention_fwd`: Q K^T and P V."""
    p = AttentionParams(*args[: len(AttentionParams._fields)])
    return 2 * _scores(p) * (p.q.shape[-1] + p.v.shape[-1])


def backward_flops(*args: Any, **kwargs: Any) -> int:
    """The operations of `fastattn::attention_bwd`: Q K^T again, dO V^T, P^T dO, dS K and dS^T Q."""
    p = AttentionParams(*args[: len(AttentionParams._fields)])
    return 2 * _scores(p) * (3 * p.q.shape[-1] + 2 * p.v.shape[-1])


def _scores(p: AttentionParams) -> int:
    """How many scores there are."""
    nheads = p.q.shape[1]
    used = None if p.seqused_k is None or not _is_readable(p.seqused_k) else p.seqused_k.tolist()
    if p.cu_seqlens_q is None or p.cu_seqlens_k is None:
        return nheads * p.max_seqlen_q * (p.q.shape[0] * p.max_seqlen_k if used is None else sum(used))
    lengths_q = _lengths(p.cu_seqlens_q, p.max_seqlen_q)
    lengths_k = used or _lengths(p.cu_seqlens_k, p.max_seqlen_k)
    return nheads * sum(n * m for n, m in zip(lengths_q, lengths_k, strict=True))


def _lengths(cu_seqlens: Tensor, max_seqlen: int) -> list[int]:
    if _is_readable(cu_seqlens):
        return cu_seqlens.diff().tolist()
    return [max_seqlen] * (cu_seqlens.shape[0] - 1)


def _is_readable(x: Tensor) -> bool:
    return type(x) is Tensor and not x.is_meta


def register(counter: ModuleType) -> None:
    """Give torch's counter, the module, both formulas."""
    ours = torch.ops.fastattn
    counter.register_flop_formula(ours.attention_fwd, get_raw=True)(forward_flops)
    counter.register_flop_formula(ours.attention_bwd, get_raw=True)(backward_flops)


class _AtImport(MetaPathFinder):
    """Registers the formulas when somebody imports the counter, which takes longer than to import fastattn."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname == COUNTER else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            register(module)
            sys.meta_path.remove(self)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if COUNTER in sys.modules:
    register(sys.modules[COUNTER])
else:
    sys.meta_path.insert(0, _AtImport())
