"""Launches of Triton kernels that were launched before: what was compiled is called without asking Triton which it is.

Triton compiles a kernel anew for what an argument says of itself beside its type: that it is 1, or that 16 divides it.
To find that out takes longer than the launch, in each of which a call of attention has a part. So a compiled kernel is
kept here under a key at least as fine as Triton's.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any, NamedTuple

import torch

from .scores import PerRow, Rows, Scores

MOST_KEPT = 4096  # of whatever sizes a process may see
FLOATS = ("scale", "scale_log2")  # of which Triton knows nothing


Trait = Callable[[Any], Any]


class Description(NamedTuple):
    """How the key of a kernel's launch is made of its arguments."""

    kernel: Any  # kept here, so that its id stays its own
    values: Callable[[dict[str, Any]], tuple[Any, ...]]  # of all arguments, in the kernel's order
    exact: Callable[[dict[str, Any]], tuple[Any, ...]]  # of those that are in the key as they are
    traits: list[tuple[str, Trait]]  # of the others


class Launches:
    """The kernels launched so far."""

    def __init__(self) -> None:
        self._compiled: dict[tuple[Any, ...], Any] = {}
        self._described: dict[int, Description] = {}  # by the kernel's id

    def launch(
        self, kernel: Any, programs: int, arguments: dict[str, Any], device: int, num_warps: int, num_stages: int
    ) -> Any:
        """Run a kernel on the current stream; returns what was compiled for it.

        Args:
            kernel: made by triton.jit.
            programs: how many there are.
            arguments: all of the kernel's, by name.
            device: the current one's ordinal.
            num_warps, num_stages: as Triton takes them.
        """
        described = self._described.get(id(kernel)) or self._describe(kernel)
        key = (id(kernel), device, num_warps, num_stages, *_key(described, arguments))
        compiled = self._compiled.get(key)
        if compiled is not None:
            compiled[(programs, 1, 1)](*described.values(arguments))
            return compiled
        compiled = kernel[(programs,)](**arguments, num_warps=num_warps, num_stages=num_stages)
        if len(self._compiled) >= MOST_KEPT:
            self._compiled.clear()
        self._compiled[key] = compiled
        return compiled

    def key(self, kernel: Any, arguments: dict[str, Any]) -> tuple[Any, ...]:
        """What launches with the same compiled kernel have in common beside device, warps and stages."""
        return _key(self._described.get(id(kernel)) or self._describe(kernel), arguments)

    def _describe(self, kernel: Any) -> Description:
        traits = {name: _of_changing for name in kernel.do_not_specialize} | _TRAITS
        names = kernel.arg_names
        exact = [name for name in names if name not in traits and name not in FLOATS]
        others = [(name, traits[name]) for name in names if name in traits]
        description = Description(kernel, itemgetter(*names), itemgetter(*exact), others)
        return self._described.setdefault(id(kernel), description)


def _key(described: Description, arguments: dict[str, Any]) -> tuple[Any, ...]:
    return described.exact(arguments), *[trait(arguments[name]) for name, trait in described.traits]


# ---- what Triton can know of an argument ----


def _of_changing(value: int) -> int:
    return value >> 31  # int32 or int64


def _of_pointer(x: torch.Tensor | None) -> Any:
    return None if x is None else (x.dtype, x.data_ptr() & 15)


def _of_stride(n: int) -> int:
    return n if n < 16 else n & 15 | 16 | n >> 31 << 5


def _of_rows(x: Rows) -> tuple[Any, ...]:
    ptr, b, h, row = x
    return ptr.dtype, ptr.data_ptr() & 15, _of_stride(b), h, row  # the others follow no length of a batch


def _of_per_row(x: PerRow) -> Any:
    ptr, b, h = x
    return None if ptr is None else (ptr.dtype, ptr.data_ptr() & 15, b >> 31, h >> 31)


def _of_scores(x: Scores) -> Any:
    ptr, b, h, m, n = x
    return None if ptr is None else (ptr.dtype, ptr.data_ptr() & 15, *map(_of_stride, (b, h, m, n)))


def _of_dropout(dropout: Any) -> Any:
    return None if dropout.seed_ptr is None else (dropout.seed_ptr.data_ptr() & 15, dropout.threshold)


def _of_presence(value: Any) -> bool:
    return value is None  # else it is of floats, of which Triton knows nothing


_TRAITS: dict[str, Trait] = {
    **dict.fromkeys(("q", "k", "v", "out", "dout", "dq", "dk", "dv"), _of_rows),
    **dict.fromkeys(("lse", "dlse", "delta"), _of_per_row),
    **dict.fromkeys(("mask", "bias"), _of_scores),
    **dict.fromkeys(("cu_seqlens_q_ptr", "cu_seqlens_k_ptr", "seqused_k_ptr", "partial_ptr"), _of_pointer),
    "dropout": _of_dropout,
    "softcap": _of_presence,
}
