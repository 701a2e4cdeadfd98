"""Masks of modules, where True means blocked: from torch's two to what the function of attention takes."""

from __future__ import annotations

import operator
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def check(name: str, mask: Tensor | None, *shapes: tuple[int, ...]) -> None:
    """A mask's dtype and shape, which is one of these."""
    if mask is None:
        return
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"{name}: dtype must be bool or floating point, got {mask.dtype}")
    if not any([_is_of_shape(mask, shape) for shape in shapes]):
        raise ValueError(f"{name}: shape {tuple(mask.shape)} is not {' or '.join(map(str, shapes))}")


def _is_of_shape(x: Tensor, shape: tuple[int, ...]) -> bool:
    """Size by size, since not every supported torch.compile can compare tuples of symbolic sizes."""
    return x.dim() == len(shape) and all([have == wanted for have, wanted in zip(x.shape, shape, strict=True)])


def broadcast_over_heads(mask: Tensor | None, shape: tuple[int, int, int, int]) -> Tensor | None:
    """A checked attn_mask as a view that broadcasts to (batch, num_heads, seqlen_q, seqlen_k)."""
    if mask is None:
        return None
    batch, nheads, seqlen_q, seqlen_k = shape
    one_head = (seqlen_q, seqlen_k)
    outer = (batch, nheads)
    if mask.dim() == 4:
        outer = (1 if mask.size(0) == 1 else batch, 1 if mask.size(1) == 1 else nheads)
    check("attn_mask", mask, one_head, (batch * nheads, *one_head), (batch, *one_head), (*outer, *one_head))
    if mask.dim() != 3:
        return mask
    # The two kinds of three dimensions have the same size only where they mean the same: with one head, or no batch.
    return mask.unsqueeze(1) if mask.size(0) == batch else mask.unflatten(0, (batch, nheads))


def of_function(
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    lengths: tuple[int, int],
    appended: int,
    device: torch.device,
) -> dict[str, Any]:
    """attn_mask, attn_bias and is_causal of the function of attention.

    Masks keep their smallest broadcasting shapes; only two of one kind are merged.

    Args:
        attn_mask: broadcasts to (batch, num_heads, seqlen_q, seqlen_k).
        key_padding_mask: (batch, seqlen_k) or (seqlen_k,).
        lengths: seqlen_q and seqlen_k, without the keys that the module appends.
        appended: how many it appends, which nothing blocks.
    """
    # The causal band counts from the first key, so it would hide the appended keys.
    has_band = is_causal and not appended and (attn_mask is None or not attn_mask.requires_grad)
    if has_band:
        attn_mask = None
    elif is_causal and attn_mask is None:
        attn_mask = torch.ones(lengths, dtype=torch.bool, device=device).triu(1)
    if key_padding_mask is not None:
        key_padding_mask = key_padding_mask[..., None, None, :]
    masks = [mask for mask in (attn_mask, key_padding_mask) if mask is not None]
    if appended:
        masks = [F.pad(mask, (0, appended)) for mask in masks]
    blocked = [mask for mask in masks if mask.dtype == torch.bool]
    biases = [mask for mask in masks if mask.dtype != torch.bool]
    allowed = ~reduce(operator.or_, blocked) if blocked else None
    bias = reduce(operator.add, biases) if biases else None
    return {"attn_mask": allowed, "attn_bias": bias, "is_causal": has_band}
