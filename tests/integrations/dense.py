"""flash-attn's arguments by their definition, over all pairs of one sequence: what its adapters are held to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    slopes: Tensor | None = None,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse and the weights before dropout, in q's precision.

    Args:
        q, k, v: (seqlen_q, nheads, headdim), (seqlen_k, nheads_k, headdim), (seqlen_k, nheads_k, headdim_v).
        slopes: (nheads,).
        keep: (nheads, seqlen_q, seqlen_k) bool, what dropout keeps.

    Returns:
        (seqlen_q, nheads, headdim_v), (nheads, seqlen_q), (nheads, seqlen_q, seqlen_k).
    """
    seqlen_q, seqlen_k, groups = q.shape[0], k.shape[0], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = torch.einsum("ihd,jhd->hij", q, k) * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(seqlen_k) - (torch.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q)
    if slopes is not None:
        scores = scores - slopes.to(scores.dtype)[:, None, None] * distance.abs()
    left, right = (int(edge) for edge in window_size)
    right = 0 if causal else right
    seen = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool)
    if left >= 0:
        seen &= distance >= -left
    if right >= 0:
        seen &= distance <= right
    scores = scores.masked_fill(~seen, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    kept = weights if keep is None else weights * keep / (1 - dropout_p)
    return torch.einsum("hij,jhd->ihd", kept, v), lse, weights
