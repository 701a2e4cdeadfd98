"""Keys that no query may see, whatever k and v hold there: which they are, and NaN and infinities in their place."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

import fastattn
from fastattn.arguments import attention_params, varlen_attention_params
from fastattn.params import AttentionParams

HEADS = 1  # the dimension of heads, dense or packed


def unseen_keys(tensors: tuple[Tensor, ...], arguments: dict[str, Any]) -> Tensor:
    """The keys that lengths, band and a mask that is the same for all queries exclude.

    Returns:
        bool, (batch, nheads_k, seqlen_k), packed (total_k, nheads_k).
    """
    q, k, v, bias = tensors
    given = {name: x for name, x in arguments.items() if name not in ("return_lse", "sinks")}
    packed = "cu_seqlens_q" in given
    p = (varlen_attention_params if packed else attention_params)(q, k, v, attn_bias=bias, **given)
    mask = None if p.mask is None or p.mask.size(2) != 1 else p.mask
    used = None if p.seqused_k is None else p.seqused_k.tolist()
    if p.cu_seqlens_q is None or p.cu_seqlens_k is None:
        unseen = torch.ones(k.shape[:3], dtype=torch.bool, device=k.device)
        for b in range(len(k)):
            n = k.size(2) if used is None else used[b]
            unseen[b, :, :n] = ~_seen(_of_sequence(mask, b), p, q.size(2), n)[0]
        return unseen
    unseen = torch.ones(k.shape[:2], dtype=torch.bool, device=k.device)
    edges = zip(p.cu_seqlens_q.tolist(), p.cu_seqlens_k.tolist(), strict=True)
    for b, ((first_q, first_k), (end_q, end_k)) in enumerate(itertools.pairwise(edges)):
        n = end_k - first_k if used is None else used[b]
        seen = _seen(_of_sequence(mask, b), p, end_q - first_q, n)
        unseen[first_k : first_k + n] = ~seen.expand(1, k.size(HEADS), -1)[0].T
    return unseen


def _of_sequence(mask: Tensor | None, b: int) -> Tensor | None:
    return mask if mask is None or mask.size(0) == 1 else mask[b : b + 1]


def _seen(mask: Tensor | None, p: AttentionParams, seqlen_q: int, seqlen_k: int) -> Tensor:
    """The keys that some query of a sequence may see, (1, 1 or nheads_k, seqlen_k)."""
    query, key = (torch.arange(n, device=p.q.device) for n in (seqlen_q, seqlen_k))
    offset = key - query[:, None] - (seqlen_k - seqlen_q if p.bottom_right else 0)
    seen = ((offset >= -p.left) & (offset <= p.right)).any(0)[None, None]
    if mask is None:
        return seen
    seen = seen & mask[:, :, 0, :seqlen_k]
    return seen if seen.size(1) == 1 else seen.unflatten(1, (p.k.size(HEADS), -1)).any(2)


def poison_unseen_keys(tensors: tuple[Tensor, ...], arguments: dict[str, Any]) -> None:
    """Fills k and v with NaN and infinities, in place, where no query may see them."""
    unseen = unseen_keys(tensors, arguments)
    for x in tensors[1:3]:
        own, where = x.detach(), unseen
        if x.stride(HEADS) == 0:  # heads that share memory: where none of them is seen
            own, where = own.narrow(HEADS, 0, 1), where.all(HEADS, keepdim=True)
        values = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=x.dtype, device=x.device)
        number = torch.arange(where.numel(), device=x.device).view(where.shape)
        own.copy_(torch.where(where[..., None], values[number % 3][..., None], own))


def may_hold_anything(tensors: tuple[Tensor, ...], arguments: dict[str, Any]) -> bool:
    """Whether the backend of a call lets unseen keys hold anything; torch's own function does not."""
    q, k, v, bias = tensors
    return fastattn.explain(q, k, v, attn_bias=bias, **arguments).backend != "torch"


def heads_with_nan(device: str = "cpu") -> list[bool]:
    """Which of four query heads of one key head have NaN in out: the second one does not see the key that is NaN."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 3, 8, generator=generator).to(device) for heads in (4, 1, 1))
    mask = torch.ones(1, 4, 1, 3, dtype=torch.bool, device=device)
    mask[0, 1, 0, 2] = False
    k[0, 0, 2], v[0, 0, 2] = torch.nan, torch.nan
    out = fastattn.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    return [bool(x.isnan().all()) for x in out[0]]
