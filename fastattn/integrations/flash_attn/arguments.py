"""What the arguments of flash-attn's functions become; every error names the argument, the rule and the value."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import tensors, values

WindowSize = Sequence[int]


def check_shapes(q: Tensor, k: Tensor, v: Tensor, is_packed: bool = False, is_paged: bool = False) -> tuple[int, int]:
    """batch and nheads of shapes that fit together; the batch of packed tensors counts for nothing.

    Raises:
        ValueError: an argument is no tensor, or shapes do not fit together.
    """
    dense, packed = "(batch, seqlen, nheads, headdim)", "(total, nheads, headdim)"
    keys = "(num_blocks, page_block_size, nheads_k, headdim)" if is_paged else packed if is_packed else dense
    for name, x, layout in (("q", q, packed if is_packed else dense), ("k", k, keys), ("v", v, keys)):
        tensors.check(name, x)
        if x.dim() != layout.count(",") + 1:
            raise ValueError(f"{name}: must be {layout}, got shape {tuple(x.shape)}")
    if k.shape[:-1] != v.shape[:-1]:
        raise ValueError(f"v: shape {tuple(v.shape)} differs from k's {tuple(k.shape)} before headdim")
    if not is_packed and q.shape[0] != k.shape[0]:
        raise ValueError(f"k: batch {k.shape[0]} differs from q's {q.shape[0]}")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"k: headdim {k.shape[-1]} differs from q's {q.shape[-1]}")
    nheads, nheads_k = q.shape[-2], k.shape[-2]
    if nheads != nheads_k and (nheads_k == 0 or nheads % nheads_k):
        raise ValueError(f"k: q's heads must be a multiple of its heads, got {nheads} and {nheads_k}")
    return q.shape[0], nheads


def options(
    dropout_p: float, softmax_scale: float | None, causal: bool, window_size: WindowSize, softcap: float | None
) -> dict[str, Any]:
    """The arguments of fastattn's functions that these become.

    Raises:
        ValueError: window_size is not two ints, or another one is of a wrong kind.
    """
    left, right = _edges(window_size)
    is_capped = softcap is not None and softcap > 0
    return {
        "dropout_p": dropout_p,
        "scale": softmax_scale,
        "window": (left, 0 if values.flag("causal", causal) else right),
        "causal_align": "bottom-right",
        "enable_gqa": True,
        "softcap": softcap if is_capped else None,
    }


def looks_ahead(how: dict[str, Any]) -> bool:
    """Whether a query may see keys behind its own."""
    return how["window"][1] != 0


def check_cu_seqlens(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> int:
    """The number of sequences, the same for both; `varlen_attention` checks the rest.

    Raises:
        ValueError: an argument is no tensor, or the numbers are not the same.
    """
    for name, x in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        tensors.check(name, x)
        if x.dim() != 1 or x.shape[0] == 0 or x.shape != cu_seqlens_q.shape:
            shapes = f"{tuple(cu_seqlens_q.shape)} and {tuple(cu_seqlens_k.shape)}"
            raise ValueError(f"{name}: both must be (batch + 1,), got {shapes}")
    return cu_seqlens_q.shape[0] - 1


def _edges(window_size: WindowSize) -> tuple[int | None, int | None]:
    try:
        left, right = (operator.index(edge) for edge in window_size)
    except (TypeError, ValueError):
        rule = "must be two ints, (left, right), negative where there is no bound"
        raise ValueError(f"window_size: {rule}, got {values.described(window_size)}") from None
    return None if left < 0 else left, None if right < 0 else right


def unpacked(name: str, x: Tensor, count: int, ndim: int) -> tuple[Tensor, ...]:
    """The tensors that one tensor holds, at the dimension before the heads."""
    tensors.check(name, x)
    if x.dim() != ndim or x.shape[-3] != count:
        layout = f"({'batch, seqlen' if ndim == 5 else 'total'}, {count}, nheads, headdim)"
        raise ValueError(f"{name}: must be {layout}, got shape {tuple(x.shape)}")
    return x.unbind(-3)


# ---- pages ----


def check_block_table(block_table: Tensor, q: Tensor, batch: int) -> None:
    """(batch, blocks) int32 on q's device.

    Raises:
        ValueError: it is not.
    """
    tensors.check("block_table", block_table)
    tensors.check_device("block_table", block_table, q)
    if block_table.dtype != torch.int32 or block_table.dim() != 2 or block_table.shape[0] != batch:
        got = f"{block_table.dtype}, {tuple(block_table.shape)}"
        raise ValueError(f"block_table: must be int32, (batch, blocks) = ({batch}, ...), got {got}")


def used_blocks(block_table: Tensor, cache: Tensor, lengths: Tensor | None) -> Tensor:
    """A block table with page 0 in the entries that no key needs, which may be anything.

    Args:
        block_table: (batch, blocks) int32, of the right kind.
        cache: (num_blocks, page_block_size, nheads_k, headdim).
        lengths: (batch,) int32, how many keys each sequence has; None: as many as there are places.

    Raises:
        ValueError: an entry that is needed names no page; a GPU's are not read.
    """
    if lengths is not None:
        first = cache.shape[1] * torch.arange(block_table.shape[1], device=block_table.device)
        block_table = block_table.where(first < lengths[:, None], 0)
    check_indices("block_table", block_table, cache.shape[0], "pages")
    return block_table


def check_indices(name: str, indices: Tensor, end: int, what: str) -> None:
    """Each is below `end` and not negative, which torch would count from the end; a GPU's are not read.

    Raises:
        ValueError: one is not.
    """
    if not tensors.is_readable(indices):
        return
    for b, row in enumerate(indices.reshape(len(indices), -1).tolist()):
        for index in row:
            if not 0 <= index < end:
                raise ValueError(
                    f"{name}: must be in [0, {end - 1}], one of {end} {what}, got {index} for sequence {b}"
                )


def pages(cache: Tensor, block_table: Tensor, seqlen: int | None = None) -> Tensor:
    """Keys or values of each sequence side by side, copied from pages.

    Args:
        cache: (num_blocks, page_block_size, nheads_k, headdim).
        block_table: (batch, blocks) int32, from `used_blocks`.
        seqlen: how many places are needed at most, None for all.

    Returns:
        (batch, places, nheads_k, headdim).
    """
    if seqlen is not None:
        block_table = block_table[:, : -(-seqlen // max(1, cache.shape[1]))]
    return cache[block_table.long()].flatten(1, 2)
